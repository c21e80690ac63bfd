"""Probes on frozen encoders, and the features that they read.

Shapes: B batch, N patch tokens, C channels of a token.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.second_order import SecondOrder, SecondOrderHead


class Encoder(Protocol):
    """The part of a backbone that a probe needs."""

    num_prefix: int
    fc_norm: nn.Module | None

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) -> tokens (B, num_prefix + N, C)."""

    def pool_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens of `forward_features` -> the pooled feature of the encoder's own classifier."""

    def label_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens of `forward_features` -> patch tokens after the final norm, (B, N, C)."""


class Probe(nn.Module):
    """Linear classifiers on standardised features (B, C), one per learning rate -> logits (heads, B,
    classes).

    As in MAE's linear probing, `head.0` holds the BatchNorm statistics; `head.<i>`, from 1,
    is a linear layer.
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
        """Features (B, C) -> logits (heads, B, classes)."""
        # float32: the encoder may run in low precision, which is too coarse for the statistics.
        x = self.head[0](features.float())
        return torch.stack([linear(x) for linear in self.head[1:]])


class SecondOrderProbe(nn.Module):
    """Second-order heads on frozen tokens (B, 1 + N, C), one per learning rate -> logits (heads, B, classes).

    The first token is the feature that is fused with the second-order one. `head.0` standardises it, as in
    `Probe`. Raises ValueError if a value of `options` is out of range.
    """

    def __init__(self, dim: int, num_classes: int, heads: int, options: SecondOrder):
        super().__init__()
        self.head = nn.ModuleList([nn.BatchNorm1d(dim, affine=False, eps=1e-6)])
        # 0.01 is the standard deviation of a probe's initial weights, as in `Probe`.
        self.head.extend(SecondOrderHead(dim, dim, num_classes, 0.01, options) for _ in range(heads))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, 1 + N, C) -> logits (heads, B, classes)."""
        feature = self.head[0](tokens[:, 0].float())  # (B, C)
        patches = tokens[:, 1:].float()  # (B, N, C)
        return torch.stack([head(patches, feature) for head in self.head[1:]])


def pool_tokens(tokens: Tensor, num_prefix: int, pool: str) -> Tensor:
    """Pool tokens (B, prefix + N, C) -> (B, C).

    `pool` 'cls' takes the class token. Everything else takes the mean of the patch tokens, normalised over
    its channels by a LayerNorm without parameters.
    """
    if pool == "cls":
        return tokens[:, 0]
    mean = tokens[:, num_prefix:].mean(1)  # (B, C)
    return F.layer_norm(mean, mean.shape[-1:])


def probed_feature(backbone: Encoder, tokens: Tensor, pool: str) -> Tensor:
    """Pool tokens of the backbone's `forward_features`, (B, prefix + N, C) -> (B, C), as a probe reads them.

    A backbone with a norm after its average gives tokens before any final norm and pools them itself, as
    MAE's model does with global pooling. All others give tokens after their final norm, for `pool_tokens`.
    """
    if pool != "cls" and backbone.fc_norm is not None:
        return backbone.pool_tokens(tokens)
    return pool_tokens(tokens, backbone.num_prefix, pool)


def pooled(backbone: Encoder, images: Tensor, pool: str) -> Tensor:
    """Frozen features (B, C) of normalised images (B, channels, H, W)."""
    with torch.no_grad():
        return probed_feature(backbone, backbone.forward_features(images), pool)


def pooled_and_patches(backbone: Encoder, images: Tensor, pool: str) -> Tensor:
    """Frozen tokens (B, 1 + N, C) of normalised images (B, channels, H, W).

    The pooled feature comes first, then the patch tokens after the final norm.
    """
    with torch.no_grad():
        tokens = backbone.forward_features(images)  # (B, prefix + N, C)
        feature = probed_feature(backbone, tokens, pool)  # (B, C)
        return torch.cat([feature[:, None], backbone.label_tokens(tokens)], dim=1)  # (B, 1 + N, C)
