"""Maps of patch features: what dense evaluation and heads for segmentation read from a backbone.

Shapes: B batch, N patch tokens, C channels of a token, (h, w) the grid of patch tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layers.classifier import Classifier


def patch_maps(backbone: Classifier, images: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """Normalised patch tokens of images (B, channels, H, W) as a map (B, C, h, w).

    They are those of the last layer, or with `layers` those after each of these blocks, concatenated over
    the channels in the given order, (B, C * len(layers), h, w). Blocks are counted from 0, negative ones from
    the end. The backbone's final norm is applied to each of them. Plain ViTs take images of any size that
    their patches fill.

    Raises ValueError if the backbone does not take images of that size, and if it has no such layers.
    """
    grid = backbone.grid_of((images.shape[-2], images.shape[-1]))
    if layers is None:
        found = [backbone.forward_any_size(images)]
    else:
        found = backbone.block_tokens(images, block_numbers(backbone, layers))
    patches = torch.cat([backbone.label_tokens(tokens) for tokens in found], dim=2)  # (B, N, C * layers)
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{type(backbone).__name__} gives {patches.shape[1]} tokens on images of "
            f"{images.shape[-2]}x{images.shape[-1]}, which do not form a grid of {grid[0]}x{grid[1]}: resize "
            f"the images to {backbone.img_size[0]}x{backbone.img_size[1]}"
        )
    return patches.transpose(1, 2).unflatten(2, grid)  # (B, C * layers, h, w)


def block_numbers(backbone: Classifier, layers: Sequence[int]) -> list[int]:
    """The numbers of blocks from 0. Raises ValueError if the backbone does not have them."""
    count = backbone.num_blocks
    if not count:
        raise ValueError(
            f"{type(backbone).__name__} has no blocks of one width and one grid, so there are only the "
            "features of its last layer: leave `layers` out, or choose a plain ViT"
        )
    if not layers or any(not -count <= layer < count for layer in layers):
        raise ValueError(
            f"`layers` takes some of the {count} blocks, counted from 0 to {count - 1} or from the end by -1 "
            f"to -{count}, found {list(layers)}"
        )
    return [layer % count for layer in layers]


def even_blocks(backbone: Classifier, count: int = 4) -> list[int]:
    """The numbers of `count` evenly spaced blocks, the last one among them: 2, 5, 8, 11 of twelve.

    A model with fewer blocks gives some of them twice. Raises ValueError if the backbone has no blocks that
    `block_tokens` returns.
    """
    depth = backbone.num_blocks
    block_numbers(backbone, [-1])
    return [-(-depth * (i + 1) // count) - 1 for i in range(count)]
