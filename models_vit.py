"""Vision Transformer classifiers: ViT (Dosovitskiy et al. 2021) as MAE fine-tunes it, and DeiT (Touvron et al. 2021).

State-dict keys are those of MAE's fine-tuned files and of timm's models; positional labels add `pos_head.*`.

Shapes: B batch, L patches, C channels of a token, K classes.
"""

from functools import partial

from torch import Tensor, nn

from layers.classifier import Classifier, make_head
from layers.vit import ViTBackbone


class VisionTransformer(Classifier, ViTBackbone):
    """ViT with a class head and optional positional labels; positional embedding and labels are independent flags.

    With `pool` 'avg' there is no `norm`: the patch tokens of the last block are averaged, then `fc_norm` and `head`
    follow (MAE, end-to-end fine-tuning), and `forward_features` gives tokens before any final norm. With 'cls' all
    tokens go through `norm` and the class token through `head`. Either way the label head reads normalised tokens.

    `pool` None is 'avg', under a second-order head 'cls'. Image and patch sizes are (H, W). `pos_embed` is none, sincos
    or learned, `patch_embed` linear or conv; for the other arguments from `num_classes` on see
    `Classifier.init_classifier`. Raises ValueError as that does, and on sizes that do not fit.
    """

    def __init__(
        self,
        img_size: tuple[int, int] = (224, 224),
        patch_size: tuple[int, int] = (16, 16),
        in_chans: int = 3,
        *,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        pos_embed: str = "learned",
        drop_path: float = 0.0,
        num_classes: int = 1000,
        pool: str | None = None,
        pos_label: str = "none",
        pos_tokens: str = "half",
        rpl_pairs: int = 0,
        head_init_std: float = 2e-5,
        patch_embed: str = "linear",
        second_order: dict | None = None,
    ):
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            dim,
            depth,
            num_heads,
            mlp_ratio,
            pos_embed,
            drop_path,
            patch_embed,
        )
        if pool is None:  # a second-order feature is fused with the class token
            pool = "avg" if second_order is None else "cls"
        if pool == "avg":
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(dim, eps=1e-6)
        self.init_classifier(
            num_classes, pool, pos_label, pos_tokens, rpl_pairs, head_init_std, second_order=second_order
        )


class DistilledVisionTransformer(VisionTransformer):
    """DeiT with a distillation token that learns from a teacher beside the class token (DeiT, Sec. 4).

    Keys `dist_token` and `head_dist.*` come on top; `pos_embed` has a row for each of the two tokens. `pool` is 'cls'.
    The distillation token's head is linear even where the class head is of second order.
    """

    prefix_names = ("cls_token", "dist_token")

    def __init__(self, *args, pool: str = "cls", **kwargs):
        if pool != "cls":
            raise ValueError(
                f"a model with a distillation token reads its class tokens (pool 'cls'), found {pool!r}"
            )
        super().__init__(*args, pool=pool, **kwargs)

    def init_heads(self, width: int, std: float, second_order: dict | None) -> None:
        super().init_heads(width, std, second_order)
        self.head_dist = make_head(width, self.num_classes, std)

    def forward(self, x: Tensor, positions: bool = False, distillation: bool = False):
        """Images (B, in_chans, H, W) -> logits (B, K), the mean of both heads, which is how DeiT predicts.

        With `distillation` the two stay apart, (logits, dist_logits), the second for the teacher's labels; with
        `positions` a pair of that and {position, position_acc, ...}.
        """
        tokens = self.forward_features(x)  # (B, 2 + L, C)
        pair = self.class_logits(tokens), self.head_dist(tokens[:, 1])
        logits = pair if distillation else (pair[0] + pair[1]) / 2
        return (logits, self.position_losses(tokens)) if positions else logits


# Width, depth, heads. Pico and nano are for experiments on CPUs; small patches are for small images.
_SIZES = {
    "pico": (96, 4, 3),
    "nano": (128, 6, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_PATCHES = {
    "pico": (8, 4),
    "nano": (8, 4),
    "tiny": (16, 8, 4),
    "small": (16, 8, 4),
    "base": (16, 8, 4),
    "large": (16,),
    "huge": (14,),
}


def _build(
    model: type[VisionTransformer], size: str, patch: int, default_pool: str | None, **kwargs
) -> VisionTransformer:
    named = dict(zip(("dim", "depth", "num_heads"), _SIZES[size])) | {"patch_size": (patch, patch)}
    given = {name: value for name, value in kwargs.items() if not (name == "pool" and value is None)}
    return model(**{"pool": default_pool} | named | given)


# name -> builder; keyword arguments of VisionTransformer override what the name says, pool=None keeps its default:
# the average for ViT (MAE), the class token for DeiT and under a second-order head.
MODELS = {
    f"vit_{size}_patch{patch}": partial(_build, VisionTransformer, size, patch, None)
    for size, patches in _PATCHES.items()
    for patch in patches
}
for _size, _patch in (("pico", 8), ("tiny", 16), ("small", 16), ("base", 16)):
    MODELS[f"deit_{_size}_patch{_patch}"] = partial(_build, VisionTransformer, _size, _patch, "cls")
    MODELS[f"deit_{_size}_distilled_patch{_patch}"] = partial(
        _build, DistilledVisionTransformer, _size, _patch, "cls"
    )
