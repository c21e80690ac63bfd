"""The part that all classifiers share: pooling, class head and label heads, independent of the backbone.

Shapes: B batch, N patch tokens, C channels of a token, F channels of the pooled feature, K classes.
"""

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from layers.contract import Backbone, Heads
from layers.positional.draws import Draws
from layers.positional.head import PositionalHead
from layers.second_order import SecondOrder, SecondOrderHead

POOLS = ("avg", "cls")


class Classifier(Backbone):
    """Mixin that makes a classifier of a backbone without a prefix on the backbone's state-dict keys.

    The backbone is a `layers.contract.Backbone`. It names this class first among its bases and calls
    `init_classifier` after its own parameters are made. Its `forward_features` returns normalised tokens, or
    it sets `fc_norm`, which is applied after the average, as in MAE's fine-tuning. The mixin adds the
    parameters `head.*` and, with labels, `pos_head.*`.
    """

    head: nn.Module
    heads: Heads
    # Only an annotation: a class attribute would hide the submodule of that name.
    fc_norm: nn.Module | None
    pos_head: PositionalHead | None

    def usual_pool(self, heads: Heads) -> str:
        """The pooling for `heads.pool` None."""
        return "avg"

    def init_classifier(self, heads: Heads, feature_dim: int | None = None) -> None:
        """Create the heads. `feature_dim` is F, by default `dim`.

        The class head is linear on the pooled features. A second-order head reads all patch tokens, and is
        fused with the pooled features. Raises ValueError if the pooling is unknown, if the class token that
        it reads is missing, and if labels or a second-order head meet a grid of a single cell.
        """
        heads = dataclasses.replace(heads, pool=heads.pool or self.usual_pool(heads))
        self._check(heads)
        if not hasattr(self, "fc_norm"):
            self.fc_norm = None
        self.heads = heads
        self.pool = heads.pool
        self.num_classes = heads.num_classes
        self.init_heads(feature_dim or self.dim)
        # The label heads are made last, so that all other parameters start alike with and without labels.
        self.pos_head = None
        if heads.pos_label != "none":
            self.pos_head = PositionalHead(self.dim, self.grid, heads)
            if self.pos_head.changes_input:
                raise ValueError(
                    f"`pos_label` {heads.pos_label} changes the tokens that the encoder reads, which only "
                    "pretraining supports: choose another label"
                )

    def _check(self, heads: Heads) -> None:
        if heads.pool not in POOLS:
            raise ValueError(f"pool is one of {', '.join(POOLS)}, found {heads.pool!r}")
        if heads.pool == "cls" and not self.num_prefix:
            raise ValueError(f"{type(self).__name__} has no class token: use the average (pool 'avg')")
        h, w = self.grid
        if h * w >= 2:
            return
        remedy = "use a larger `img_size` or a smaller patch"
        if heads.pos_label != "none":
            raise ValueError(
                f"`pos_label` {heads.pos_label} needs several positions, but the last grid of this model is "
                f"{h}x{w}: {remedy}"
            )
        if heads.second_order is not None:
            raise ValueError(
                "`head` second_order relates patch tokens, but the last grid of this model is "
                f"{h}x{w}: {remedy}"
            )

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a file under the names of this model: Lightning's classifiers have `backbone.` first.

        Raises ValueError if a weight is there with and without this prefix.
        """
        named = {name.removeprefix("backbone."): weight for name, weight in weights.items()}
        if len(named) < len(weights):
            raise ValueError("a weight is there twice, with the prefix 'backbone.' and without")
        return named

    def init_heads(self, feature_dim: int) -> None:
        """Create the class head; subclasses add heads of their own."""
        heads = self.heads
        if heads.second_order is None or heads.num_classes == 0:
            self.head = make_head(feature_dim, heads.num_classes, heads.init_std)
        else:
            options = SecondOrder(**heads.second_order)
            self.head = SecondOrderHead(self.dim, feature_dim, heads.num_classes, heads.init_std, options)

    def class_logits(self, tokens: Tensor) -> Tensor:
        """Tokens from `forward_features`, (B, num_prefix + N, C) -> logits (B, K)."""
        pooled = self.pool_tokens(tokens)  # (B, F)
        if isinstance(self.head, SecondOrderHead):
            return self.head(self.label_tokens(tokens), pooled)
        return self.head(pooled)

    def pool_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens from `forward_features`, (B, num_prefix + N, C) -> input of the class head (B, C)."""
        if self.pool == "cls":
            return tokens[:, 0]
        mean = tokens[:, self.num_prefix :].mean(dim=1)  # (B, C)
        if self.fc_norm is None:
            return mean
        return self.fc_norm(mean)

    def label_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens from `forward_features`, (B, num_prefix + N, C) -> normalised patch tokens (B, N, C)."""
        patches = tokens[:, self.num_prefix :]  # (B, N, C)
        if self.fc_norm is None:
            return patches
        # Label heads and second-order heads read tokens after the final norm, which here follows the average.
        return self.fc_norm(patches)

    def position_losses(self, tokens: Tensor, draws: Draws | None = None) -> dict[str, Tensor]:
        """Label losses and accuracies over all cells, named as by `PositionalHead`; empty without labels."""
        if self.pos_head is None:
            return {}
        return self.pos_head(self.label_tokens(tokens), draws=draws)

    def forward(
        self, x: Tensor, positions: bool = False, draws: Draws | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Images (B, in_chans, H, W) -> logits (B, K); with `positions` (logits, {position, ...}).

        The label heads run only if `positions` asks for them, in training as in evaluation: after
        training the method drops them (Zhang et al. 2023, Sec. 3). `draws` are the images' own, for
        label kinds that draw.
        """
        tokens = self.forward_features(x)  # (B, num_prefix + N, C)
        logits = self.class_logits(tokens)
        if not positions:
            return logits
        return logits, self.position_losses(tokens, draws)

    def chance(self) -> dict[str, float]:
        """Loss and accuracy of guessed positions, named as in `position_losses`; empty without labels."""
        if self.pos_head is None:
            return {}
        return self.pos_head.chance(self.grid[0] * self.grid[1])


def make_head(width: int, num_classes: int, std: float) -> nn.Module:
    """A linear layer with truncated normal weights and zero biases; the identity for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
    return head
