"""So-ViT (Xie et al. 2021, arXiv 2104.10935): convolutional token embedding, second-order head.

Shapes: B batch, L patches, C channels of a token, K classes.
"""

import dataclasses

import torch
from torch import nn

from layers.classifier import Classifier
from layers.contract import Entry, Heads, Trunk
from layers.pos_embed import sincos_1d
from layers.vit import ViTBackbone


class SoVisionTransformer(Classifier, ViTBackbone):
    """So-ViT's classifier; positional labels work on it as on every other.

    Pre-norm blocks without biases on queries, keys and values, LayerNorm eps 1e-5, and a final norm on all
    tokens. Every `pos_embed` but "none" is So-ViT's own: a fixed one-dimensional sinusoid over all tokens,
    with the class token at position 0. `pool` is the first-order feature that is classified, and fused with
    the second-order one. `second_order` None makes the head linear. Raises ValueError as `ViTBackbone` and
    `Classifier.init_classifier` do.
    """

    def __init__(self, trunk: Trunk, heads: Heads):
        if trunk.pos_embed != "none":
            trunk = dataclasses.replace(trunk, pos_embed="sincos")
        super().__init__(trunk)
        self.blocks.apply(_init_linear)
        self.init_classifier(heads)

    def usual_pool(self, heads: Heads) -> str:
        """The class token."""
        return "cls"

    def _make_pos_embed(self, kind: str) -> nn.Parameter | None:
        if kind == "none":
            return None
        table = sincos_1d(self.dim, torch.arange(self.num_prefix + self.grid[0] * self.grid[1]))  # (1 + L, C)
        return nn.Parameter(table.float()[None], requires_grad=False)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)


_TRUNK = Trunk(patch_embed="conv", pos_embed="sincos", qkv_bias=False, norm_eps=1e-5)
SO_VIT = Entry(SoVisionTransformer, {"trunk": _TRUNK, "heads": Heads(init_std=0.02, second_order={})})

# The two larger models have wider projections and dropout on the second-order feature.
MODELS: dict[str, Entry[Classifier]] = {
    "so_vit_7": SO_VIT.override(dim=256, depth=7, num_heads=4, mlp_ratio=2, second_order={"dims": (48, 24)}),
    "so_vit_10": SO_VIT.override(
        dim=256, depth=10, num_heads=4, mlp_ratio=2, second_order={"dims": (48, 24)}
    ),
    "so_vit_14": SO_VIT.override(
        dim=384, depth=14, num_heads=6, mlp_ratio=3, second_order={"dims": (64, 48), "dropout": 0.5}
    ),
    "so_vit_19": SO_VIT.override(
        dim=448, depth=19, num_heads=7, mlp_ratio=3, second_order={"dims": (96, 48), "dropout": 0.5}
    ),
}
