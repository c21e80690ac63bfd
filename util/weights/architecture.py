"""The architecture of a plain Vision Transformer, read off its weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from util.weights.types import KINDS, Checkpoint
from util.weights.validate import refuse, shown

# Sizes in pixels of images and patches; larger ones are no image's.
MOST_PIXELS = 1 << 16
MOST_CELLS = 1 << 16
# Weights that only So-ViT has: the second-order head and the convolutional patch embedding.
SO_VIT = ("head.pool.start", "patch_embed.stem.0.weight")
# What the name of a weight begins with -> the part of a model that it belongs to, which a plain Vision
# Transformer does not have. BEiT, DINOv2, EVA and others have some of them.
_FOREIGN = {
    r"head\.pool\.": "So-ViT's second-order head",
    r"patch_embed\.stem\.": "a convolutional patch embedding",
    r"(rel_pos_bias|blocks\.\d+\.attn)\.relative_position_": "relative position biases",
    r"blocks\.\d+\.(gamma_|ls)\d": "LayerScale",
    r"blocks\.\d+\.attn\.[qv]_bias": "separate biases of queries and values",
    r"blocks\.\d+\.attn\.(q|k)_norm\.": "norms of queries and keys",
    r"blocks\.\d+\.mlp\.(w\d|fc1_g|norm)": "a gated or normalised MLP",
    r"(reg_token|register_tokens)": "register tokens",
    r"norm_pre\.": "a norm before the blocks",
}


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

    Raises ValueError if the weights are not a plain Vision Transformer's, or if a part of it is not whole: a
    model of this architecture is not larger than the weights.
    """
    weights = checkpoint.model
    _check_plain_vit(checkpoint)
    # The weight of the patch embedding is (C, c, ph, pw).
    dim, in_chans, patch_height, patch_width = _shape(checkpoint, "patch_embed.proj.weight", 4)
    decoder_dim = 0
    if "decoder_embed.weight" in weights:
        decoder_dim = _shape(checkpoint, "decoder_embed.weight", 2)[0]
        pixels = in_chans * patch_height * patch_width
        _check_shape(checkpoint, "decoder_embed.weight", (decoder_dim, dim))
        _check_shape(checkpoint, "decoder_pred.weight", (pixels, decoder_dim))
    classes = 0
    if "head.weight" in weights:
        classes = _shape(checkpoint, "head.weight", 2)[0]
        _check_shape(checkpoint, "head.weight", (classes, dim))
    mlp_ratio = _shape(checkpoint, "blocks.0.mlp.fc1.weight", 2)[0] / dim
    return Architecture(
        dim=dim,
        depth=_depth(checkpoint, "blocks.", dim, mlp_ratio),
        mlp_ratio=mlp_ratio,
        patch_size=(patch_height, patch_width),
        in_chans=in_chans,
        img_size=_img_size(checkpoint, (patch_height, patch_width)),
        decoder_dim=decoder_dim,
        decoder_depth=_depth(checkpoint, "decoder_blocks.", decoder_dim, mlp_ratio),
        classes=classes,
        # Models that pool by the mean of the patch tokens have their final norm after it, as in MAE.
        pool="avg" if "fc_norm.weight" in weights else "cls",
        pos_embed="pos_embed" in weights,
        labels=tuple(sorted({k.split(".")[1] for k in weights if k.startswith("pos_head.")})),
    )


def _check_plain_vit(checkpoint: Checkpoint) -> None:
    weights = checkpoint.model
    if "patch_embed.proj.weight" not in weights or "blocks.0.attn.qkv.weight" not in weights:
        raise ValueError(
            f"{checkpoint.path} is {KINDS[checkpoint.kind][0]}, but it does not hold a plain Vision "
            f"Transformer; it has {', '.join(map(shown, list(weights)[:4]))}"
        )
    parts = foreign_parts(weights)
    found = []
    if parts:
        found.append(f"it has {', '.join(parts)}")
    if "blocks.0.attn.qkv.bias" not in weights:
        found.append("it lacks blocks.0.attn.qkv.bias")
    if found:
        raise ValueError(f"{checkpoint.path} does not hold a plain Vision Transformer: {'; '.join(found)}")


def foreign_parts(weights: Mapping[str, Tensor]) -> list[str]:
    """What a plain Vision Transformer does not have, in words, each with the name of a weight."""
    found = {}
    for name in weights:
        for pattern, words in _FOREIGN.items():
            if words not in found and re.match(pattern, name):
                found[words] = name
    return [f"{words} ({shown(name)})" for words, name in found.items()]


def _shape(checkpoint: Checkpoint, name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a weight. Raises ValueError unless it has `ndim` sizes above 0."""
    weight = checkpoint.model.get(name)
    if weight is None:
        raise ValueError(f"{checkpoint.path} lacks {name}: it does not hold a plain Vision Transformer")
    if weight.ndim != ndim or not weight.numel():
        refuse(checkpoint.path, name, weight, f"{ndim} sizes above 0")
    return tuple(weight.shape)


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    if _shape(checkpoint, name, len(shape)) != shape:
        refuse(checkpoint.path, name, checkpoint.model[name], f"the shape {shape}")


def _depth(checkpoint: Checkpoint, prefix: str, dim: int, mlp_ratio: float) -> int:
    """The number of blocks under `prefix`, of width `dim`.

    Raises ValueError unless they are numbered from 0 and have all weights of a block: names alone must not
    make a model of any size.
    """
    # Names are like blocks.11.attn.qkv.weight; without any block the depth is 0.
    numbers = {k.removeprefix(prefix).split(".")[0] for k in checkpoint.model if k.startswith(prefix)}
    wanted = {str(i) for i in range(len(numbers))}
    if numbers != wanted:
        strange = ", ".join(sorted(map(shown, numbers - wanted))[:4])
        raise ValueError(
            f"{checkpoint.path} has weights of {prefix}{strange}, but its blocks are not numbered from 0 to "
            f"there: it does not hold a plain Vision Transformer, or a part of it is missing"
        )
    for i in range(len(numbers)):
        for name, shape in _block_shapes(dim, round(dim * mlp_ratio)).items():
            _check_shape(checkpoint, f"{prefix}{i}.{name}", shape)
    return len(numbers)


def _block_shapes(dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The weights of a transformer block of width `dim`."""
    return {
        "norm1.weight": (dim,),
        "attn.qkv.weight": (3 * dim, dim),
        "attn.proj.weight": (dim, dim),
        "norm2.weight": (dim,),
        "mlp.fc1.weight": (hidden, dim),
        "mlp.fc2.weight": (dim, hidden),
    }


def _img_size(checkpoint: Checkpoint, patch: tuple[int, int]) -> tuple[int, int] | None:
    """(H, W) from the flags if they fit the positional embedding, else from that, taken as square."""
    cells = _num_cells(checkpoint)
    # The stored size counts only if it gives the number of patches that the weights were made for.
    size = whole_numbers(checkpoint.args.get("input_size"))
    if size and cells in (None, (size[0] // patch[0]) * (size[-1] // patch[1])):
        _check_size(checkpoint, (size[0], size[-1]), patch)
        return size[0], size[-1]
    if cells is None:
        return None
    height, width = square_grid(cells)
    _check_size(checkpoint, (height * patch[0], width * patch[1]), patch)
    return height * patch[0], width * patch[1]


def _check_size(checkpoint: Checkpoint, size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raise ValueError for images that are smaller than a patch, or larger than images are."""
    height = size[0] // patch[0]
    width = size[1] // patch[1]
    if not (1 <= height * width <= MOST_CELLS and max(size) <= MOST_PIXELS):
        text = f"{size[0]}x{size[1]} pixels in patches of {patch[0]}x{patch[1]}"
        refuse(checkpoint.path, "args.input_size", f"a size of {text}", "the size of an image")


def _num_cells(checkpoint: Checkpoint) -> int | None:
    """The number of patches of an image; None if the weights do not depend on it."""
    weights = checkpoint.model
    # Besides patches, a table has a row for the class token, and one for DeiT's distillation token.
    prefix = 1 + ("dist_token" in weights)
    tables = [name for name in ("pos_embed", "decoder_pos_embed") if name in weights]
    # A decoder always has a table of its own.
    if "decoder_embed.weight" in weights:
        tables.append("decoder_pos_embed")
    if tables:
        rows = _shape(checkpoint, tables[0], 3)[1]
        for name in tables:
            _check_shape(checkpoint, name, (1, rows, _shape(checkpoint, name, 3)[2]))
        return rows - prefix
    if "pos_head.apl.classifier.weight" in weights:
        return _shape(checkpoint, "pos_head.apl.classifier.weight", 2)[0]
    return None


def whole_numbers(value: Any) -> list[int]:
    """The whole numbers in a stored flag, which is a number, a list, or (in files of others) a string."""
    # At most nine digits each: Python refuses to read thousands of them, and no size has as many.
    return [int(digits) for digits in re.findall(r"[0-9]{1,9}", str(value))]


def square_grid(cells: int) -> tuple[int, int]:
    """(side, side) of a square grid of `cells` patches; raises ValueError if there is no such grid."""
    side = round(max(0, cells) ** 0.5)
    if side * side != cells or not cells:
        raise ValueError(
            f"the grid of a positional embedding of {cells} patches is unknown: {cells} is not a square, and "
            "the checkpoint does not store `input_size`"
        )
    return side, side


def num_parameters(weights: Mapping[str, Tensor]) -> int:
    """The number of values in the weights."""
    return sum(v.numel() for v in weights.values())
