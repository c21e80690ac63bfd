"""Heads for segmentation, from maps of features to maps of logits, and probes of frozen maps.

Shapes: B batch, C channels of a feature, K classes, (h, w) the grid of patch tokens.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.contract import NORM_EPS


class LinearHead(nn.Module):
    """ImageNet-S's head for fine-tuning: a norm of each patch token, then a linear map.

    (B, C, h, w) -> (B, K, h, w). `std` is the standard deviation of the initial weights (truncated normal);
    biases are 0.
    """

    def __init__(self, dim: int, classes: int, std: float = 2e-5):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.classify = linear_map(dim, classes, std)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, K, h, w)."""
        x = self.norm(features.permute(0, 2, 3, 1))  # (B, h, w, C)
        return self.classify(x.permute(0, 3, 1, 2))


class UPerNetHead(nn.Module):
    """UPerNet (Xiao et al. 2018) on a plain ViT: 4 maps (B, C, h, w) -> logits (B, K, 4h, 4w).

    The maps are first brought to 4, 2, 1 and 1/2 times their resolution, as in BEiT. In training a batch of a
    single image is an error, because batch norms see the mean of each image.
    """

    def __init__(self, dim: int, classes: int, std: float = 0.01, width: int = 256):
        super().__init__()
        decoder: Any = _decoder("upernet", "UPerNetDecoder")
        self.pyramid = nn.ModuleList(
            [
                nn.Sequential(_doubled(dim), nn.BatchNorm2d(dim), nn.GELU(), _doubled(dim)),
                _doubled(dim),
                nn.Identity(),
                # An odd side is rounded up, so that a grid of one cell keeps it.
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        # The decoder leaves the first two of the encoder's maps out, those of 1/1 and 1/2 of the image.
        self.decoder = decoder([0, 0, dim, dim, dim, dim], encoder_depth=5, decoder_channels=width)
        self.dropout = nn.Dropout(0.1)
        self.classify = linear_map(width, classes, std)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """4 maps (B, C, h, w) -> (B, K, 4h, 4w)."""
        levels = [scale(features) for scale, features in zip(self.pyramid, maps, strict=True)]
        x = self.decoder([levels[0], levels[0], *levels])  # (B, width, 4h, 4w)
        return self.classify(self.dropout(x))


class DPTHead(nn.Module):
    """Dense Prediction Transformer (Ranftl et al. 2021): 4 maps (B, C, h, w) -> logits (B, K, 8h, 8w).

    It reads patch tokens only (the readout "ignore").
    """

    def __init__(self, dim: int, classes: int, width: int = 256):
        super().__init__()
        decoder: Any = _decoder("dpt", "DPTDecoder")
        head: Any = _decoder("dpt", "DPTSegmentationHead")
        # Strides of 16 stand for the factors 4, 2, 1 and 1/2, whatever the patch.
        self.decoder = decoder([dim] * 4, [16] * 4, False, "ignore", fusion_channels=width)
        self.classify = head(width, classes, upsampling=1.0)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """4 maps (B, C, h, w) -> (B, K, 8h, 8w)."""
        h, w = maps[0].shape[-2:]
        # The decoder halves and doubles the grid, which must be even for that.
        even = [F.pad(features, (0, w % 2, 0, h % 2), mode="replicate") for features in maps]
        x = self.decoder(even, [None] * 4)  # (B, width, 8h', 8w')
        return self.classify(x)[..., : 8 * h, : 8 * w]


class DenseProbe(nn.Module):
    """Linear classifiers on standardised maps (B, C, h, w), one per learning rate -> (heads, B, K, h, w).

    As in `layers.probe.Probe`, `head.0` holds the BatchNorm statistics, over all places of all images, and
    `head.<i>`, from 1, is a linear map of the features at a place.
    """

    def __init__(self, dim: int, classes: int, heads: int):
        super().__init__()
        self.head = nn.ModuleList([nn.BatchNorm2d(dim, affine=False, eps=1e-6)])
        self.head.extend(linear_map(dim, classes, std=0.01) for _ in range(heads))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, h, w) -> logits (heads, B, K, h, w) in float32, also under autocast."""
        # The encoder may run in low precision, which is too coarse for the statistics.
        with torch.autocast(features.device.type, enabled=False):
            x = self.head[0](features.float())
            return torch.stack([linear(x) for linear in self.head[1:]])


def linear_map(dim: int, classes: int, std: float) -> nn.Conv2d:
    """A 1x1 convolution with truncated normal weights and zero biases."""
    layer = nn.Conv2d(dim, classes, kernel_size=1)
    nn.init.trunc_normal_(layer.weight, std=std)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _doubled(dim: int) -> nn.Module:
    return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)


def _decoder(kind: str, name: str) -> Any:
    """A class of segmentation-models-pytorch, which takes seconds to import and few runs need."""
    try:
        module = import_module(f"segmentation_models_pytorch.decoders.{kind}.decoder")
    except ImportError:
        raise ValueError(
            f"the head {kind} needs a package that is not installed: pip install segmentation-models-pytorch"
        ) from None
    return getattr(module, name)
