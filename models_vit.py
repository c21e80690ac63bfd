"""Classifiers: ViT (Dosovitskiy et al. 2021) as MAE fine-tunes it, and DeiT (Touvron et al. 2021).

State-dict keys are those of MAE's fine-tuned files and of timm's models; positional labels add `pos_head.*`.

Shapes: B batch, L patches, C channels of a token, K classes.
"""

import dataclasses

from torch import Tensor, nn

from layers.classifier import Classifier, make_head
from layers.contract import Entry, Heads, Trunk
from layers.positional.draws import Draws
from layers.sizes import DEIT_SIZES, SIZES, named_sizes
from layers.vit import ViTBackbone


class VisionTransformer(Classifier, ViTBackbone):
    """ViT with a class head and optional positional labels; positional embedding and labels are independent.

    With `pool` "avg" there is no `norm`: the patch tokens of the last block are averaged, then `fc_norm` and
    `head` follow (MAE, end-to-end fine-tuning), and `forward_features` returns tokens before any final norm.
    With "cls" all tokens go through `norm` and the class token through `head`. In both cases the label heads
    read normalised tokens. Raises ValueError as `ViTBackbone` and `Classifier.init_classifier` do.
    """

    def __init__(self, trunk: Trunk, heads: Heads):
        super().__init__(trunk)
        heads = dataclasses.replace(heads, pool=heads.pool or self.usual_pool(heads))
        if heads.pool == "avg":
            self.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(trunk.dim, eps=trunk.norm_eps)
        self.init_classifier(heads)

    def usual_pool(self, heads: Heads) -> str:
        """The average, as in MAE; the class token if a second-order feature is fused with it."""
        if heads.second_order is None:
            return "avg"
        return "cls"


class DeiT(VisionTransformer):
    """DeiT without a distillation token: the ViT that classifies its class token."""

    def usual_pool(self, heads: Heads) -> str:
        """The class token."""
        return "cls"


class DistilledVisionTransformer(DeiT):
    """DeiT with a class token and a distillation token, which learns from a teacher (DeiT, Sec. 4).

    It adds the keys `dist_token` and `head_dist.*`; `pos_embed` has a row for each of the two tokens. The
    head of the distillation token is linear, even if the class head is second-order. Raises ValueError if
    `pool` is not "cls".
    """

    prefix_names = ("cls_token", "dist_token")

    def __init__(self, trunk: Trunk, heads: Heads):
        if heads.pool not in (None, "cls"):
            raise ValueError(
                f"a model with a distillation token reads its class tokens (pool 'cls'), found {heads.pool!r}"
            )
        super().__init__(trunk, heads)

    def init_heads(self, feature_dim: int) -> None:
        """Create the class head and the head of the distillation token."""
        super().init_heads(feature_dim)
        self.head_dist = make_head(feature_dim, self.num_classes, self.heads.init_std)

    def forward(
        self,
        x: Tensor,
        positions: bool = False,
        draws: Draws | None = None,
        distillation: bool = False,
    ):
        """Images (B, in_chans, H, W) -> logits (B, K), the mean of both heads, as DeiT predicts.

        With `distillation` the two stay separate, (logits, dist_logits), the second for the teacher's labels.
        With `positions` it returns a pair of that and {position, position_acc, ...}.
        """
        tokens = self.forward_features(x)  # (B, 2 + L, C)
        class_logits = self.class_logits(tokens)  # (B, K)
        dist_logits = self.head_dist(tokens[:, 1])  # (B, K)
        logits = (class_logits + dist_logits) / 2
        if distillation:
            logits = class_logits, dist_logits
        if not positions:
            return logits
        return logits, self.position_losses(tokens, draws)


VIT = Entry(VisionTransformer, {"trunk": Trunk(pos_embed="learned"), "heads": Heads()})
DEIT = dataclasses.replace(VIT, build=DeiT)
DEIT_DISTILLED = dataclasses.replace(VIT, build=DistilledVisionTransformer, distillation=True)

MODELS: dict[str, Entry[Classifier]] = {
    f"vit_{size}_patch{patch}": VIT.override(**SIZES[size], patch_size=(patch, patch))
    for size, patch in named_sizes()
}
for _size, _patch in DEIT_SIZES:
    for _name, _entry in ((f"deit_{_size}", DEIT), (f"deit_{_size}_distilled", DEIT_DISTILLED)):
        MODELS[f"{_name}_patch{_patch}"] = _entry.override(**SIZES[_size], patch_size=(_patch, _patch))
