"""What is trained on frozen encoders, and the features that it sees.

Shapes: B batch, N patch tokens, C channels of a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.second_order import SecondOrderHead


class Probe(nn.Module):
    """Linear classifiers on standardised features (B, C), one per learning rate -> logits (heads, B, classes).

    MAE's names `head.0` (BatchNorm statistics) and `head.<i>` (a linear layer each, from 1).
    """

    def __init__(self, dim: int, num_classes: int, heads: int):
        super().__init__()
        self.head = nn.ModuleList([nn.BatchNorm1d(dim, affine=False, eps=1e-6)])
        for _ in range(heads):
            linear = nn.Linear(dim, num_classes)
            nn.init.trunc_normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            self.head.append(linear)

    def forward(self, features: Tensor) -> Tensor:
        x = self.head[0](features.float())
        return torch.stack([linear(x) for linear in self.head[1:]])


class SecondOrderProbe(nn.Module):
    """Second-order heads on frozen tokens (B, 1 + N, C), one per learning rate -> logits (heads, B, classes).

    The first token is the feature that is fused with the second-order one: it is standardised by `head.0`, as in `Probe`.
    """

    def __init__(self, dim: int, num_classes: int, heads: int, options: dict):
        super().__init__()
        self.head = nn.ModuleList([nn.BatchNorm1d(dim, affine=False, eps=1e-6)])
        self.head.extend(SecondOrderHead(dim, dim, num_classes, 0.01, **options) for _ in range(heads))

    def forward(self, tokens: Tensor) -> Tensor:
        feature, patches = self.head[0](tokens[:, 0].float()), tokens[:, 1:].float()
        return torch.stack([head(patches, feature) for head in self.head[1:]])


def pool_tokens(tokens: Tensor, num_prefix: int, pool: str) -> Tensor:
    """Tokens (B, prefix + N, C) -> (B, C): the class token, or the patch tokens' mean, normalised without parameters."""
    if pool == "cls":
        return tokens[:, 0]
    mean = tokens[:, num_prefix:].mean(1)
    return F.layer_norm(mean, mean.shape[-1:])


def pooled(backbone, images: Tensor, pool: str) -> Tensor:
    """Frozen features (B, C) of normalised images."""
    with torch.no_grad():
        return pool_tokens(backbone.forward_features(images), backbone.num_prefix, pool)


def pooled_and_patches(backbone, images: Tensor, pool: str) -> Tensor:
    """Frozen tokens (B, 1 + N, C) of normalised images: the pooled feature, then the patch tokens after the final norm."""
    with torch.no_grad():
        tokens = backbone.forward_features(images)
        feature = pool_tokens(tokens, backbone.num_prefix, pool)
        return torch.cat([feature[:, None], backbone.label_tokens(tokens)], dim=1)
