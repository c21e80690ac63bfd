"""The records that models are built from, the registry entry that fills them, and what a backbone offers.

A model takes its parameters as a few frozen records and keeps them (`model.trunk`, `model.heads`), so that a
teacher or a picture can read the sizes that the model was built with. A registry entry holds the default
records of a named model. Calling it replaces single fields by name:

    MODELS["vit_base_patch16"](img_size=(32, 32), pos_label="rpl")
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from layers.self_relation import RelationHead

# Options that are (H, W), for which one number stands for a square.
SIDES = ("img_size", "patch_size")
# Epsilon of the layer norms of MAE and timm.
NORM_EPS = 1e-6


def option(name: str, default: Any) -> Any:
    """A record's field that a registry entry takes under another name than the field's own."""
    return field(default=default, metadata={"option": name})


@dataclass(frozen=True)
class Trunk:
    """Sizes of a plain Vision Transformer.

    Attributes:
        img_size: (H, W) of the images in pixels.
        patch_size: (H, W) of a patch in pixels.
        in_chans: channels of the images.
        dim: channels of a token.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_ratio: hidden width of a block's MLP, as a multiple of `dim`.
        pos_embed: "none" (the model has no such parameter), "sincos" (MAE's frozen table) or "learned".
        drop_path: stochastic depth of the last block; it grows linearly from 0 in the first.
        patch_embed: "linear" (MAE's) or "conv" (So-ViT's, for images without masking).
        qkv_bias: whether queries, keys and values have biases.
        norm_eps: epsilon of the layer norms, also of a decoder's.
    """

    img_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    in_chans: int = 3
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    pos_embed: str = "none"
    drop_path: float = 0.0
    patch_embed: str = "linear"
    qkv_bias: bool = True
    norm_eps: float = NORM_EPS


@dataclass(frozen=True)
class Labels:
    """The positional labels that a model learns; see `layers.positional.head.PositionalHead`.

    Attributes:
        pos_label: "none", a kind ("apl", "rpl", ...), or kinds joined by "+".
        pos_tokens: channels that the label head reads, "half" of a token or the "full" one.
        rpl_pairs: partners that a relative label draws per query and step; 0 takes all pairs.
        seed: seed of draws that an image keeps for good.
    """

    pos_label: str = "none"
    pos_tokens: str = "half"
    rpl_pairs: int = 0
    seed: int = option("label_seed", 0)


@dataclass(frozen=True)
class Heads(Labels):
    """The heads of a classifier: class head and label heads.

    Attributes:
        num_classes: outputs of the class head; 0 leaves it out, and the model returns pooled features.
        pool: "avg" (mean of the patch tokens), "cls" (class token), or None for the model's usual one.
        init_std: standard deviation of the class head's initial weights. MAE starts fine-tuning with 2e-5;
            0.02 is usual from scratch.
        second_order: None for a linear head, or options of So-ViT's second-order head by name ({} for its
            defaults).
    """

    num_classes: int = 1000
    pool: str | None = None
    init_std: float = option("head_init_std", 2e-5)
    second_order: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Relations:
    """The self-relations that a model learns (SERE), and the temperatures of their teacher."""

    spatial: bool = option("sr_spatial", False)
    channel: bool = option("sr_channel", False)
    temp_spatial: float = option("sr_temp_spatial", 0.5)
    temp_channel: float = option("sr_temp_channel", 0.1)


def relation_head(wanted: bool, dim: int, predictor: bool) -> RelationHead | None:
    """A relation head, the student's with a predictor, or None if the relation is not learned."""
    if not wanted:
        return None
    return RelationHead(dim, predictor=predictor)


class AnyTrunk(Protocol):
    """What the record of a backbone's sizes holds for every backbone."""

    @property
    def pos_embed(self) -> str:
        """The kind of positional embedding; "none" for a model without one."""


class Backbone(nn.Module):
    """What classifiers, probes, the engine and the tools may rely on in a backbone.

    Attributes:
        trunk: the record that the backbone was built from.
        dim: channels C of a token.
        grid: (h, w) of the patch tokens, N = h * w, row by row.
        num_prefix: number of tokens before the patch tokens (class token, distillation token).
        in_chans: channels of the images.
        img_size: (H, W) of the images that the backbone was built for.
    """

    trunk: AnyTrunk
    dim: int
    img_size: tuple[int, int]
    grid: tuple[int, int]
    num_prefix: int
    in_chans: int

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens (B, num_prefix + N, C)."""
        raise NotImplementedError

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid (h, w) of the patch tokens of images of `size` (H, W).

        Raises ValueError if the backbone does not take images of that size.
        """
        if tuple(size) != tuple(self.img_size):
            raise ValueError(
                f"{type(self).__name__} takes only images of {self.img_size[0]}x{self.img_size[1]} pixels, "
                f"found {size[0]}x{size[1]}: resize the images, or use a sliding window of that size"
            )
        return self.grid

    def forward_any_size(self, x: Tensor) -> Tensor:
        """`forward_features` for images of any size that `grid_of` takes; raises ValueError as it does."""
        self.grid_of((x.shape[-2], x.shape[-1]))
        return self.forward_features(x)

    @property
    def num_blocks(self) -> int:
        """The number of blocks whose tokens `block_tokens` returns; 0 if they differ in width or grid."""
        return 0

    def block_tokens(self, x: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Images of any size as in `grid_of` -> tokens (B, num_prefix + N, C) after each of the blocks.

        Blocks are counted from 0, and are below `num_blocks`. The final norm is applied to the tokens of each
        block, where `forward_features` applies it.
        """
        raise NotImplementedError

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a file under the names of this model; most models have the names that files have."""
        return dict(weights)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, in addition to all one-dimensional ones."""
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """The largest `layer_id`."""
        raise NotImplementedError

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates, 0 for the embedding."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Run each block again in backward instead of keeping its inner tensors."""
        raise NotImplementedError


# The class of the models of an entry.
M = TypeVar("M", bound=nn.Module, covariant=True)


@dataclass(frozen=True)
class Entry(Generic[M]):
    """A model of a registry: its class, the records that it is built from, and what else distinguishes it.

    Attributes:
        build: the model's class, or a function that returns the model.
        defaults: for each parameter of `build` a record, whose fields are options, or a plain value, which is
            an option itself.
        distillation: the model has DeiT's distillation token, and `forward` takes `distillation`.
        own_positions: the model encodes positions by other means than a parameter `pos_embed`, and pools in
            its own way.
    """

    build: Callable[..., M]
    defaults: Mapping[str, Any]
    distillation: bool = False
    own_positions: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """All options by name, with their defaults."""
        found: dict[str, Any] = {}
        for name, default in self.defaults.items():
            if dataclasses.is_dataclass(default):
                found |= {key: getattr(default, attr) for key, attr in _fields(default).items()}
            else:
                found[name] = default
        return found

    def override(self, **options: Any) -> "Entry[M]":
        """The entry with other defaults. A mapping changes single keys of a mapping, a number is a square.

        Raises ValueError if the model does not take an option.
        """
        taken = self.options
        unknown = sorted(options.keys() - taken.keys())
        if unknown:
            names = ", ".join(f"`{name}`" for name in unknown)
            raise ValueError(f"the model does not take {names}; its options are {', '.join(taken)}")
        for name, value in options.items():
            if isinstance(value, Mapping) and isinstance(taken[name], Mapping):
                options[name] = {**taken[name], **value}
            elif isinstance(value, int) and name in SIDES:
                options[name] = (value, value)
        defaults = {name: _replaced(name, default, options) for name, default in self.defaults.items()}
        return dataclasses.replace(self, defaults=defaults)

    def __call__(self, **options: Any) -> M:
        """Build the model, with single options replaced; raises ValueError as `override` and the model do."""
        return self.build(**self.override(**options).defaults)


def _fields(record: Any) -> dict[str, str]:
    """Option name -> field name of a record."""
    return {f.metadata.get("option", f.name): f.name for f in dataclasses.fields(record)}


def _replaced(name: str, default: Any, options: Mapping[str, Any]) -> Any:
    """A parameter's record or plain value with the options that concern it."""
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return options.get(name, default)
    fields = _fields(default)
    changes = {fields[key]: value for key, value in options.items() if key in fields}
    return dataclasses.replace(default, **changes)
