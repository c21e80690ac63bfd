"""The architecture of a plain Vision Transformer, read off its weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from util.weights.types import KINDS, Checkpoint

# Weights that only So-ViT has: the second-order head and the convolutional patch embedding.
SO_VIT = ("head.pool.start", "patch_embed.stem.0.weight")


@dataclass(frozen=True)
class Architecture:
    """A plain Vision Transformer. Sizes are (H, W); 0 stands for a part that the model does not have.

    `img_size` is None if neither the flags nor a positional embedding show it: the model then takes any size.
    """

    dim: int
    depth: int
    mlp_ratio: float
    patch_size: tuple[int, int]
    in_chans: int
    img_size: tuple[int, int] | None
    decoder_dim: int
    decoder_depth: int
    classes: int
    pool: str
    pos_embed: bool
    labels: tuple[str, ...]


def architecture(checkpoint: Checkpoint) -> Architecture:
    """Read the architecture off the weights, and the image size off the stored flags.

    Raises ValueError if the weights are not a plain Vision Transformer's.
    """
    weights = checkpoint.model
    _check_plain_vit(checkpoint)
    dim, in_chans, patch_height, patch_width = weights["patch_embed.proj.weight"].shape
    decoder_dim = 0
    if "decoder_embed.weight" in weights:
        decoder_dim = weights["decoder_embed.weight"].shape[0]
    classes = 0
    if "head.weight" in weights:
        classes = weights["head.weight"].shape[0]
    return Architecture(
        dim=dim,
        depth=_depth(weights, "blocks."),
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        patch_size=(patch_height, patch_width),
        in_chans=in_chans,
        img_size=_img_size(checkpoint, (patch_height, patch_width)),
        decoder_dim=decoder_dim,
        decoder_depth=_depth(weights, "decoder_blocks."),
        classes=classes,
        # Models that average the patch tokens have their norm after the mean, as in MAE.
        pool="avg" if "fc_norm.weight" in weights else "cls",
        pos_embed="pos_embed" in weights,
        labels=tuple(sorted({k.split(".")[1] for k in weights if k.startswith("pos_head.")})),
    )


def _check_plain_vit(checkpoint: Checkpoint) -> None:
    weights = checkpoint.model
    if "patch_embed.proj.weight" not in weights or "blocks.0.attn.qkv.weight" not in weights:
        raise ValueError(
            f"{checkpoint.path} is {KINDS[checkpoint.kind][0]}, but it does not hold a plain Vision Transformer; "
            f"it has {', '.join(list(weights)[:4])}"
        )
    parts = [k for k in SO_VIT if k in weights]
    if "blocks.0.attn.qkv.bias" not in weights:
        parts.append("no attn.qkv.bias")
    if parts:
        raise ValueError(
            f"{checkpoint.path} has parts of So-ViT ({', '.join(parts)}): it does not hold a plain Vision "
            "Transformer"
        )


def _depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    """The number of blocks under `prefix`."""
    numbers = [int(k.removeprefix(prefix).split(".")[0]) for k in weights if k.startswith(prefix)]
    return 1 + max(numbers, default=-1)


def _img_size(checkpoint: Checkpoint, patch: tuple[int, int]) -> tuple[int, int] | None:
    """(H, W) from the flags if they fit the positional embedding, else from that, taken as square."""
    cells = _num_cells(checkpoint.model)
    size = whole_numbers(checkpoint.args.get("input_size"))
    if size and cells in (None, (size[0] // patch[0]) * (size[-1] // patch[1])):
        return size[0], size[-1]
    if cells is None:
        return None
    height, width = square_grid(cells)
    return height * patch[0], width * patch[1]


def _num_cells(weights: Mapping[str, Tensor]) -> int | None:
    """The number of patches of an image; None if the weights do not depend on it."""
    # Besides patches, a table has a row for the class token, and one for DeiT's distillation token.
    prefix = 1 + ("dist_token" in weights)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in weights:
            return weights[name].shape[1] - prefix
    if "pos_head.apl.classifier.weight" in weights:
        return weights["pos_head.apl.classifier.weight"].shape[0]
    return None


def whole_numbers(value: Any) -> list[int]:
    """The whole numbers in a stored flag, which is a number, a list, or (in files of others) a string."""
    return [int(digits) for digits in re.findall(r"\d+", str(value))]


def square_grid(cells: int) -> tuple[int, int]:
    """(side, side) of a square grid of `cells` patches; raises ValueError if there is no such grid."""
    side = round(cells**0.5)
    if side * side != cells:
        raise ValueError(
            f"the grid of a positional embedding of {cells} patches is unknown: {cells} is not a square, and the "
            "checkpoint does not store `input_size`"
        )
    return side, side


def num_parameters(weights: Mapping[str, Tensor]) -> int:
    """The number of values in the weights."""
    return sum(v.numel() for v in weights.values())
