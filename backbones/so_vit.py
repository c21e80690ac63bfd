"""So-ViT (Xie et al. 2021, arXiv 2104.10935): convolutional token embedding, second-order head.

Shapes: B batch, L patches, C channels of a token, K classes.
"""

from functools import partial

import torch
from torch import nn

from layers.classifier import Classifier
from layers.pos_embed import sincos_1d
from layers.vit import ViTBackbone


class SoVisionTransformer(Classifier, ViTBackbone):
    """So-ViT's classifier; positional labels work on it as on every other.

    Pre-norm blocks whose attention has no biases on queries, keys and values, LayerNorm eps 1e-5, a norm on all tokens.
    `pos_embed` 'none' leaves out the fixed one-dimensional sinusoid over all tokens (the class token is position 0),
    anything else has it. `patch_embed` is 'conv' or 'linear'. `pool` says what is classified, and fused with the
    second-order feature: the class token or the mean of the patch tokens. `second_order` None gives the linear twin.
    The rest is as for `VisionTransformer`. Raises ValueError as `ViTBackbone`, `Classifier.init_classifier` and the
    embedding do.
    """

    def __init__(
        self,
        img_size: tuple[int, int] = (224, 224),
        patch_size: tuple[int, int] = (16, 16),
        in_chans: int = 3,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        second_order: dict | None,
        patch_embed: str = "conv",
        pos_embed: str = "sincos",
        drop_path: float = 0.0,
        num_classes: int = 1000,
        pool: str = "cls",
        pos_label: str = "none",
        pos_tokens: str = "half",
        rpl_pairs: int = 0,
        head_init_std: float = 0.02,
    ):
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            dim,
            depth,
            num_heads,
            mlp_ratio,
            "none" if pos_embed == "none" else "sincos",
            drop_path,
            patch_embed,
            qkv_bias=False,
            norm_eps=1e-5,
        )
        self.blocks.apply(_init_linear)
        self.init_classifier(
            num_classes, pool, pos_label, pos_tokens, rpl_pairs, head_init_std, second_order=second_order
        )

    def _make_pos_embed(self, kind: str) -> nn.Parameter | None:
        if kind == "none":
            return None
        table = sincos_1d(self.dim, torch.arange(self.num_prefix + self.grid[0] * self.grid[1]))
        return nn.Parameter(table.float()[None], requires_grad=False)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)


def _so_vit(head: dict, **kwargs) -> SoVisionTransformer:
    given = {name: value for name, value in kwargs.items() if not (name == "pool" and value is None)}
    second_order = given.pop("second_order", {})
    return SoVisionTransformer(**given, second_order=None if second_order is None else head | second_order)


# name -> builder; keyword arguments of SoVisionTransformer override what the name says, those in `second_order` one by
# one; pool=None keeps its default.
MODELS = {
    "so_vit_7": partial(_so_vit, {"dims": (48, 24)}, dim=256, depth=7, num_heads=4, mlp_ratio=2),
    "so_vit_10": partial(_so_vit, {"dims": (48, 24)}, dim=256, depth=10, num_heads=4, mlp_ratio=2),
    "so_vit_14": partial(
        _so_vit, {"dims": (64, 48), "dropout": 0.5}, dim=384, depth=14, num_heads=6, mlp_ratio=3
    ),
    "so_vit_19": partial(
        _so_vit, {"dims": (96, 48), "dropout": 0.5}, dim=448, depth=19, num_heads=7, mlp_ratio=3
    ),
}
