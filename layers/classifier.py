"""What every classifier has in common: pooling, class head, positional-label head; independent of the backbone.

Shapes: B batch, N patch tokens, C channels of a token, K classes.
"""

from torch import Tensor, nn

from layers.positional import PositionalHead
from layers.second_order import SecondOrder, SecondOrderHead

POOLS = ("avg", "cls")


class Classifier:
    """Mixin that makes a backbone a classifier, without a prefix in front of the backbone's state-dict keys.

    The backbone is an `nn.Module` with `forward_features(x) -> (B, num_prefix + N, C)`, row-major, and the attributes
    `dim`, `grid` (h, w) and `num_prefix`. It names this class first among its bases and calls `init_classifier` once
    its own parameters stand. Its tokens leave `forward_features` normalised, or else it sets `fc_norm`, which comes
    after the average, as in MAE's fine-tuning. The mixin adds `head.*` and, with labels, `pos_head.*`.
    """

    def init_classifier(
        self,
        num_classes: int = 1000,
        pool: str = "avg",
        pos_label: str = "none",
        pos_tokens: str = "half",
        rpl_pairs: int = 0,
        head_init_std: float = 2e-5,
        head_width: int | None = None,
        second_order: dict | None = None,
    ) -> None:
        """Create the heads; with `num_classes` 0 the model's output are the pooled features, (B, C).

        `pool` is 'avg' (mean of the patch tokens) or 'cls' (class token). `head_init_std` is MAE's for fine-tuning;
        0.02 is usual from scratch. `pos_label`, `pos_tokens` and `rpl_pairs` are explained at `PositionalHead`.
        `head_width` is the width of the pooled features, `dim` if not given. The class head is linear on the pooled
        features; with `second_order`, keyword arguments of `SecondOrderHead` (a dictionary, {} for its defaults), it
        is that head on all patch tokens, fused with the pooled features.
        Raises ValueError on an unknown pooling, a missing class token, labels or second order on a grid of one cell.
        """
        if pool not in POOLS:
            raise ValueError(f"pool is one of {', '.join(POOLS)}, found {pool!r}")
        if pool == "cls" and not self.num_prefix:
            raise ValueError(f"{type(self).__name__} has no class token: use the average (pool 'avg')")
        h, w = self.grid
        if pos_label != "none" and h * w < 2:
            raise ValueError(
                f"--pos_label {pos_label} tells positions apart, but the last grid of this model is {h}x{w}: "
                "use a larger --input_size or a smaller patch"
            )
        if second_order is not None and h * w < 2:
            raise ValueError(
                f"--head second_order relates patch tokens, but the last grid of this model is {h}x{w}: use a "
                "larger --input_size or a smaller patch"
            )
        if not hasattr(self, "fc_norm"):  # no class attribute: it would hide the submodule of that name
            self.fc_norm = None
        self.pool, self.num_classes = pool, num_classes
        self.init_heads(head_width or self.dim, head_init_std, second_order)
        # Last, so that everything else starts from the same random numbers with and without labels.
        self.pos_head = None
        if pos_label != "none":
            self.pos_head = PositionalHead(self.dim, self.grid, pos_label, pos_tokens, rpl_pairs)

    def init_heads(self, width: int, std: float, second_order: dict | None) -> None:
        if second_order is None or self.num_classes == 0:
            self.head = make_head(width, self.num_classes, std)
        else:
            options = SecondOrder(**second_order)
            self.head = SecondOrderHead(self.dim, width, self.num_classes, std, options)

    def class_logits(self, tokens: Tensor) -> Tensor:
        """What `forward_features` gives, (B, num_prefix + N, C) -> logits (B, K)."""
        pooled = self.pool_tokens(tokens)
        if isinstance(self.head, SecondOrderHead):
            return self.head(self.label_tokens(tokens), pooled)
        return self.head(pooled)

    def pool_tokens(self, tokens: Tensor) -> Tensor:
        """What `forward_features` gives, (B, num_prefix + N, C) -> what the class head reads, (B, C)."""
        if self.pool == "cls":
            return tokens[:, 0]
        mean = tokens[:, self.num_prefix :].mean(dim=1)
        return mean if self.fc_norm is None else self.fc_norm(mean)

    def label_tokens(self, tokens: Tensor) -> Tensor:
        """What `forward_features` gives, (B, num_prefix + N, C) -> normalised patch tokens (B, N, C).

        Positional labels and second-order heads read tokens after the final norm; where the norm comes after the
        average, it is applied to each token here.
        """
        patches = tokens[:, self.num_prefix :]
        return patches if self.fc_norm is None else self.fc_norm(patches)

    def position_losses(self, tokens: Tensor) -> dict[str, Tensor]:
        """Label losses and accuracies of all grid cells, by `PositionalHead`'s names; empty without labels."""
        return {} if self.pos_head is None else self.pos_head(self.label_tokens(tokens))

    def forward(self, x: Tensor, positions: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Images (B, in_chans, H, W) -> logits (B, K); with `positions` (logits, {position, position_acc, ...}).

        The label heads run only when asked for, in training as in evaluation (Sec. 3: they are dropped afterwards).
        """
        tokens = self.forward_features(x)  # (B, num_prefix + N, C)
        logits = self.class_logits(tokens)
        return (logits, self.position_losses(tokens)) if positions else logits

    def chance(self) -> dict[str, float]:
        """Loss and accuracy of guessing positions, by the names of `position_losses`; empty without labels."""
        return {} if self.pos_head is None else self.pos_head.chance(self.grid[0] * self.grid[1])


def make_head(width: int, num_classes: int, std: float) -> nn.Module:
    """Linear to the classes, truncated normal weights and zero biases; nothing at all for no classes."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
    return head
