"""The models timm/NAME: a timm backbone whose last features form a grid of tokens, with our heads.

Shapes: B batch, N cells of the grid, C channels of a token, F width of the pooled features, K classes.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.layers import Format, PatchEmbed
from timm.models import VisionTransformer, group_parameters
from torch import Tensor, nn

from layers.classifier import POOLS, Classifier
from layers.contract import Entry, Heads
from layers.transformer import patch_grid
from util.weights.layouts import without_backbone
from util.weights.transfer import adapt_channels
from util.weights.types import Checkpoint

# Layouts of a model's features: tokens in a sequence, channels last, channels first.
SEQUENCE = "NLC"
CHANNELS_LAST = "NHWC"
CHANNELS_FIRST = "NCHW"


@dataclass(frozen=True)
class TimmTrunk:
    """The parameters of a timm backbone that this toolkit sets.

    Attributes:
        patch_size: (H, W), or None for the model's own.
        pos_embed: "none" zeroes and freezes the model's parameters `pos_embed`, if it has no other positional
            part; every other value keeps the model's own.
        drop_path: stochastic depth of the last block.
    """

    img_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] | None = None
    in_chans: int = 3
    pos_embed: str = "learned"
    drop_path: float = 0.0


class TimmClassifier(Classifier):
    """A timm model with our heads; its parameters keep timm's names after `backbone.`.

    Pooling, and the layers between pooling and classifier, are timm's own: without labels this is the timm
    model. Positional labels read the grid of tokens from `forward_features`. If the model normalises after
    pooling, that norm is applied to each token for them. Raises ValueError as `Classifier.init_classifier`
    does, and if the features form no grid.
    """

    trunk: TimmTrunk
    backbone: Any

    def __init__(self, backbone: nn.Module, trunk: TimmTrunk, heads: Heads):
        super().__init__()
        self.trunk = trunk
        self.backbone = backbone
        self.img_size = trunk.img_size
        self.in_chans = trunk.in_chans
        raw, pooled = dry_run(backbone, self.img_size, trunk.in_chans)
        self.layout = token_layout(raw, backbone)
        self.num_prefix = 0
        if self.layout == SEQUENCE:
            has_cls = getattr(backbone, "cls_token", None) is not None
            self.num_prefix = int(getattr(backbone, "num_prefix_tokens", has_cls))
        self.grid = token_grid(raw, self.layout, self.num_prefix, self.img_size, backbone)
        self.dim = self._to_tokens(raw).shape[-1]
        # timm's own pooling: `pool_tokens` calls it.
        pool = "avg"
        if getattr(backbone, "global_pool", "") == "token":
            pool = "cls"
        self.init_classifier(dataclasses.replace(heads, pool=pool), pooled.shape[-1])
        self._layer_ids = self._group_layers()

    def _to_tokens(self, raw: Tensor) -> Tensor:
        """The model's own layout -> (B, num_prefix + N, C)."""
        if self.layout == CHANNELS_FIRST:
            return raw.flatten(2).transpose(1, 2)
        if self.layout == CHANNELS_LAST:
            return raw.flatten(1, 2)
        return raw

    def _from_tokens(self, tokens: Tensor) -> Tensor:
        """Inverse of `_to_tokens`. On images of another size all tokens are in one row."""
        if self.layout == SEQUENCE:
            return tokens
        h, w = self.grid
        if tokens.shape[1] != h * w:
            h, w = 1, tokens.shape[1]
        grid = tokens.unflatten(1, (h, w))  # (B, h, w, C)
        if self.layout == CHANNELS_FIRST:
            return grid.permute(0, 3, 1, 2)
        return grid

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens (B, num_prefix + N, C), row by row.

        Raises ValueError if the images have another size.
        """
        if x.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f"the model takes images of (channels, height, width) {(self.in_chans, *self.img_size)}, "
                f"found {tuple(x.shape[1:])}: give the same `img_size` and `in_chans` to data and model"
            )
        return self._to_tokens(self.backbone.forward_features(x))

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid (h, w) of the tokens of images of `size` (H, W).

        Plain ViTs take sizes that their patches fill, and convolutional models nearly all sizes. Raises
        ValueError for other models and sizes.
        """
        if tuple(size) == tuple(self.img_size):
            return self.grid
        if self.layout == SEQUENCE and _can_be_dynamic(self.backbone):
            return patch_grid(size, self.backbone.patch_embed.patch_size)
        info = getattr(self.backbone, "feature_info", None)
        if self.layout != CHANNELS_FIRST or hasattr(self.backbone, "patch_embed") or not info:
            return super().grid_of(size)
        reduction = list(info)[-1]["reduction"]
        return -(-size[0] // reduction), -(-size[1] // reduction)

    def forward_any_size(self, x: Tensor) -> Tensor:
        """`forward_features` for images of any size that `grid_of` takes.

        timm's ViTs resize their positional embedding (bicubic, antialiased).
        """
        self.grid_of((x.shape[-2], x.shape[-1]))
        with self._size_of(x):
            return self._to_tokens(self.backbone.forward_features(x))

    @property
    def num_blocks(self) -> int:
        """The number of blocks of a model of the ViT family, else 0."""
        forward = getattr(self.backbone, "forward_intermediates", None)
        if self.layout != SEQUENCE or forward is None or not hasattr(self.backbone, "blocks"):
            return 0
        if "return_prefix_tokens" not in inspect.signature(forward).parameters:
            return 0
        return len(self.backbone.blocks)

    def block_tokens(self, x: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Images of any size that `grid_of` takes -> tokens (B, num_prefix + N, C) after each of the blocks.

        The final norm is applied to the tokens of each block, where timm's model has it before the pooling.
        """
        self.grid_of((x.shape[-2], x.shape[-1]))
        # timm returns the blocks in their own order, each once.
        wanted = sorted(set(blocks))
        with self._size_of(x):
            found = self.backbone.forward_intermediates(
                x,
                indices=wanted,
                return_prefix_tokens=True,
                norm=True,
                output_fmt=SEQUENCE,
                intermediates_only=True,
            )
        if self.num_prefix:
            found = [torch.cat([prefix, patches], 1) for patches, prefix in found]
        tokens = dict(zip(wanted, found))
        return [tokens[block] for block in blocks]

    def _size_of(self, x: Tensor) -> contextlib.AbstractContextManager[None]:
        """A context in which the backbone takes these images."""
        if tuple(x.shape[-2:]) == tuple(self.img_size) or not _can_be_dynamic(self.backbone):
            return contextlib.nullcontext()
        return _dynamic(self.backbone)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's own; raises ValueError if the model does not support it."""
        try:
            self.backbone.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError):  # timm has no other way to ask
            raise ValueError(
                f"timm's {type(self.backbone).__name__} cannot run its blocks again in backward: leave "
                "`grad_checkpointing` out"
            ) from None

    def pool_tokens(self, tokens: Tensor) -> Tensor:
        """(B, num_prefix + N, C) -> (B, F), by the model's own pooling and the layers after it."""
        return self.backbone.forward_head(self._from_tokens(tokens), pre_logits=True)

    def label_tokens(self, tokens: Tensor) -> Tensor:
        """(B, num_prefix + N, C) -> patch tokens after the final norm (B, N, C)."""
        norm = _norm_after_pooling(self.backbone)
        if norm is not None:
            tokens = self._to_tokens(norm(self._from_tokens(tokens)))
        return tokens[:, self.num_prefix :]

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of timm's model, or of this one, under the names of this one.

        timm's own filter resizes embeddings of another image or patch size. The class head of timm's model
        becomes `head`. Raises ValueError if timm cannot convert the weights.
        """
        prefix = "backbone."
        heads, body = _heads_and_body(weights, self.backbone)
        expected = {name: weight.shape for name, weight in self.backbone.state_dict().items()}
        if {name: weight.shape for name, weight in body.items()} != expected:
            body = _fitted(body, self.backbone, self.in_chans)
        named = {prefix + name: weight for name, weight in body.items()}
        if self.trunk.pos_embed == "none":
            # The zeros of `_remove_pos_embed` stay.
            own = self.state_dict()
            named |= {name: own[name] for name in own if name.rpartition(".")[2] == "pos_embed"}
        return named | heads

    def no_weight_decay(self) -> set[str]:
        """timm's list for the model."""
        if not hasattr(self.backbone, "no_weight_decay"):
            return set()
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def _group_layers(self) -> dict[str, int]:
        """{name: id} by timm's matcher; '' stands for the heads, with the id of timm's classifier."""
        if not hasattr(self.backbone, "group_matcher"):
            return {f"backbone.{name}": 0 for name, _ in self.backbone.named_parameters()} | {"": 1}
        # Our head is listed with the backbone's parameters: the ids depend on the parameters that
        # match no group.
        named = [*self.backbone.named_parameters(), ("head.weight", None)]
        # `group_parameters` asks a module for nothing but its named parameters.
        listing: Any = SimpleNamespace(named_parameters=lambda: named)
        ids = group_parameters(listing, self.backbone.group_matcher(coarse=False), reverse=True)
        head = ids.pop("head.weight")
        return {f"backbone.{name}": i for name, i in ids.items()} | {"": head}

    @property
    def num_layers(self) -> int:
        """The largest `layer_id`."""
        return max(self._layer_ids.values())

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates, as timm groups the model's parameters."""
        return self._layer_ids.get(name, self._layer_ids[""])


def _can_be_dynamic(backbone: nn.Module) -> bool:
    """Whether this is one of timm's ViTs that can resize their positional embedding in a forward pass."""
    return isinstance(backbone, VisionTransformer) and isinstance(backbone.patch_embed, PatchEmbed)


@contextlib.contextmanager
def _dynamic(backbone: Any) -> Iterator[None]:
    """Let a ViT of timm take images of other sizes, as if it had been built with `dynamic_img_size`."""
    changes = [
        (backbone, "dynamic_img_size", True),
        (backbone.patch_embed, "strict_img_size", False),
        (backbone.patch_embed, "flatten", False),
        (backbone.patch_embed, "output_fmt", Format.NHWC),
    ]
    before = [getattr(module, name) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, before):
            setattr(module, name, value)


def _norm_after_pooling(backbone: nn.Module) -> nn.Module | None:
    """The norm of pooled features in timm's model: `fc_norm` of ViTs, `head.norm` of newer convnets."""
    for owner, name in ((backbone, "fc_norm"), (getattr(backbone, "head", None), "norm")):
        norm = getattr(owner, name, None)
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
            return norm
    return None


def _names_of(backbone: Any, entry: str) -> list[str]:
    """Names of layers in the configuration of a timm model: one, several, or none."""
    found = (getattr(backbone, "pretrained_cfg", None) or {}).get(entry) or ()
    if isinstance(found, str):
        return [found]
    return list(found)


def _heads_and_body(
    weights: Mapping[str, Tensor], backbone: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The heads under our names, and the backbone under timm's, of a file of ours or of timm's."""
    # Label heads are ours in all files.
    heads = {name: weight for name, weight in weights.items() if name.startswith("pos_head.")}
    body = {name: weight for name, weight in weights.items() if name not in heads}
    own = without_backbone(body)
    if own:
        heads |= {name: weight for name, weight in body.items() if not name.startswith("backbone.")}
        return heads, own
    heads |= _pop_class_head(body, backbone)
    return heads, body


def _pop_class_head(weights: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Take timm's class head out of the weights, and return it under our name."""
    heads = {}
    # DeiT's second classifier has no place in a model of one head.
    for i, layer in enumerate(_names_of(backbone, "classifier")):
        for part in ("weight", "bias"):
            weight = weights.pop(f"{layer}.{part}", None)
            if weight is not None and i == 0:
                heads[f"head.{part}"] = weight
    return heads


def _fitted(weights: dict[str, Tensor], backbone: Any, in_chans: int) -> dict[str, Tensor]:
    """Fit weights of timm's names to a model with other channels, sizes or pooling."""
    for layer in _names_of(backbone, "first_conv"):
        first = weights.get(f"{layer}.weight")
        if first is not None and first.ndim == 4 and first.shape[1] != in_chans:
            weights[f"{layer}.weight"] = adapt_channels(first, in_chans)
    weights = _filtered(weights, backbone)
    own = backbone.state_dict()
    # The same norm, before or after the pooling.
    for here, there in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        if f"{there}weight" in own and f"{there}weight" not in weights and f"{here}weight" not in own:
            weights = {re.sub(f"^{re.escape(here)}", there, name): w for name, w in weights.items()}
    return weights


def _filtered(weights: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Apply the filter that timm applies to published weights of this kind of model, if it has one."""
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    try:
        return dict(convert(weights, backbone))
    except (AssertionError, AttributeError, KeyError, IndexError, RuntimeError, TypeError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(
            f"timm cannot fit these weights to its {type(backbone).__name__} ({reason}): use a file of the "
            "same model, trained on square images if the size is another one now"
        ) from None


@torch.no_grad()
def dry_run(backbone: Any, img_size: tuple[int, int], in_chans: int) -> tuple[Tensor, Tensor]:
    """Features in the model's own layout and pooled features (1, F) of a black image."""
    was_training = backbone.training
    # In evaluation mode batch statistics do not move, and dropout does not draw.
    backbone.eval()
    raw = backbone.forward_features(torch.zeros(1, in_chans, *img_size))
    if not torch.is_tensor(raw) or raw.dim() not in (3, 4):
        found = f"a {type(raw).__name__}"
        if torch.is_tensor(raw):
            found = f"shape {tuple(raw.shape)}"
        raise ValueError(
            f"{type(backbone).__name__} gives no grid of tokens (its features: {found}), so there are no "
            "positions to pool or to label: choose a model whose forward_features keeps the positions"
        )
    pooled = backbone.forward_head(raw, pre_logits=True)
    backbone.train(was_training)
    return raw, pooled


def token_layout(raw: Tensor, backbone: nn.Module) -> str:
    """'NLC', 'NHWC' or 'NCHW', by the axes, the model's `output_fmt`, or the axis of `num_features`.

    Raises ValueError if none of these determines the layout.
    """
    if raw.dim() == 3:
        return SEQUENCE
    documented = getattr(backbone, "output_fmt", None)
    if documented in (CHANNELS_LAST, CHANNELS_FIRST):
        # Some versions of timm have an enumeration here.
        return str(getattr(documented, "value", documented))
    width = getattr(backbone, "num_features", None)
    for layout, axis in ((CHANNELS_FIRST, 1), (CHANNELS_LAST, 3)):
        if raw.shape[axis] == width:
            return layout
    raise ValueError(
        f"cannot find the channels of {type(backbone).__name__}'s features {tuple(raw.shape)}: the model "
        "has neither `output_fmt` nor an axis of `num_features` channels"
    )


def token_grid(
    raw: Tensor, layout: str, num_prefix: int, img_size: tuple[int, int], backbone: Any
) -> tuple[int, int]:
    """(h, w) of the tokens, rows first.

    A sequence of N tokens has the model's patch grid, else the grid of its last reduction, else one with the
    image's proportions. Raises ValueError if none of these has N cells.
    """
    if layout == CHANNELS_FIRST:
        return raw.shape[2], raw.shape[3]
    if layout == CHANNELS_LAST:
        return raw.shape[1], raw.shape[2]
    H, W = img_size
    N = raw.shape[1] - num_prefix
    candidates = []
    patch_grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if patch_grid is not None:
        candidates.append(tuple(patch_grid))
    if getattr(backbone, "feature_info", None):
        last = list(backbone.feature_info)[-1]
        if "reduction" in last:
            candidates.append((-(-H // last["reduction"]), -(-W // last["reduction"])))
    rows = max(1, round(math.sqrt(max(N, 0) * H / W)))
    candidates.append((rows, N // rows))
    for h, w in candidates:
        if N > 0 and h * w == N:
            return int(h), int(w)
    raise ValueError(
        f"the {N} tokens of {type(backbone).__name__} (and {num_prefix} others) form no grid on an image of "
        f"{H}x{W}; tried {', '.join(f'{h}x{w}' for h, w in candidates)}: choose a model whose tokens keep "
        "their positions"
    )


# timm's names of parameters, and ours.
_OUR_NAMES = {"drop_path_rate": "drop_path", "global_pool": "pool"}


def _create(name: str, required: dict[str, Any], optional: dict[str, Any]) -> nn.Module:
    """timm.create_model without those parameters in `optional` that the model does not know.

    Raises ValueError if the model does not know a parameter in `required`, and if it cannot take the values.
    """
    while True:
        try:
            return timm.create_model(name, **required, **optional)
        except TypeError as e:
            unknown = _unknown_parameter(e)
            if unknown in required:
                raise ValueError(_refusal(name, unknown, required[unknown])) from None
            if unknown not in optional:
                raise
            del optional[unknown]
        except (AssertionError, ValueError) as e:
            # Sizes that the architecture cannot take.
            reason = str(e) or type(e).__name__
            raise ValueError(f"timm/{name} cannot be built with {required | optional}: {reason}") from e


def _unknown_parameter(error: TypeError) -> str:
    """The name of the parameter that a call did not know; '' for other errors."""
    text = str(error).replace("argument(s)", "argument")
    match = re.search(r"unexpected keyword argument\W+(\w+)", text)
    if match is None:
        return ""
    return match[1]


def _refusal(name: str, parameter: str, value: Any) -> str:
    ours = _OUR_NAMES.get(parameter, parameter)
    remedy = {"drop_path": "give 0"}.get(ours, "leave it out")
    return f"timm/{name} does not take `{ours}`, found {value!r}: {remedy}"


# Positional parts of timm's models other than an additive embedding.
_OTHER_POSITIONS = re.compile(
    r"pos_embed[\w.]|rel_pos|relative_position|rope|cpb_mlp|attention_bias|\bpeg\b|pos_block"
)


def _remove_pos_embed(backbone: nn.Module, name: str) -> None:
    """Zero and freeze every parameter called `pos_embed`.

    Raises ValueError if the model has no such parameter, or positional parts of another
    kind, which would stay.
    """
    tables = [p for n, p in backbone.named_parameters() if n.rpartition(".")[2] == "pos_embed"]
    names = [n for n, _ in [*backbone.named_parameters(), *backbone.named_modules()]]
    others = [n for n in names if _OTHER_POSITIONS.search(n)]
    reason = ""
    if not tables:
        reason = "it has no parameter pos_embed"
    if others:
        reason = f"its positions are in {others[0]}"
    if reason:
        raise ValueError(
            f"`pos_embed` none is not possible with timm/{name}: {reason}. Leave `pos_embed` at its default, "
            "which is the model's own, or take a vit_*, deit_* or swin_* model of this toolkit"
        )
    for table in tables:
        nn.init.zeros_(table).requires_grad_(False)


def timm_model(name: str, trunk: TimmTrunk, heads: Heads) -> TimmClassifier:
    """Classifier on the timm backbone `name`, with random weights; `heads.pool` None is the model's own
    pooling.

    Raises ValueError if the pooling is unknown, if the model does not take a parameter, and if its features
    form no grid.
    """
    required: dict[str, Any] = {"num_classes": 0, "in_chans": trunk.in_chans}
    optional: dict[str, Any] = {"img_size": tuple(trunk.img_size)}
    if trunk.patch_size is not None:
        required["patch_size"] = _side_or_pair(trunk.patch_size)
    if heads.pool is not None:
        if heads.pool not in POOLS:
            raise ValueError(f"pool is one of {', '.join(POOLS)}, found {heads.pool!r}")
        required["global_pool"] = {"cls": "token"}.get(heads.pool, heads.pool)
    # The rate is always passed, because some models drop paths by default, up to a half of them.
    if trunk.drop_path:
        required["drop_path_rate"] = trunk.drop_path
    else:
        optional["drop_path_rate"] = trunk.drop_path
    # Models without a size of their own, e.g. convolutional ones, do not know `img_size`: hence optional.
    backbone = _create(name, required, optional)
    if trunk.pos_embed == "none":
        _remove_pos_embed(backbone, name)
    return TimmClassifier(backbone, trunk, heads)


# Seconds until a hub that does not answer counts as unreachable; timm would try for minutes.
_HUB_TIMEOUT = 10


def published_model(name: str) -> nn.Module:
    """A timm model with the weights that timm publishes for it, from the hub or its cache.

    Raises ValueError if there are none, and if they cannot be had.
    """
    name = name.removeprefix("timm/")
    try:
        config = timm.get_pretrained_cfg(name)
        # Some names are models of two kinds, with weights for one of them.
        if config is None or not config.has_weights:
            raise ValueError("there are none")
        _check_reachable(config.hf_hub_id)
        return timm.create_model(name, pretrained=True)
    except Exception as e:  # an unknown name, no network, a wrong hash: many types, one remedy
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"cannot get timm's weights of timm/{name} ({reason})") from e


def _check_reachable(repository: str | None) -> None:
    """Raise OSError if weights on the Hugging Face hub are not in the cache, and the hub does not answer."""
    if not repository:
        return
    from huggingface_hub import constants, try_to_load_from_cache

    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        return
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=_HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        # It has answered.
        return
    except OSError as e:
        raise OSError(f"{constants.ENDPOINT} does not answer: {getattr(e, 'reason', e)}") from None


def published_checkpoint(name: str) -> Checkpoint:
    """The weights that timm publishes for a model as a checkpoint, with the statistics of its images.

    Raises ValueError as `published_model` does.
    """
    try:
        model: Any = published_model(name)
    except ValueError as e:
        raise ValueError(
            f"{e}: where a network reaches the hub, save the state_dict() of timm.create_model(..., "
            "pretrained=True) with torch.save, and give the file as `finetune`"
        ) from None
    config = model.pretrained_cfg
    flags = {"in_chans": config["input_size"][0], "mean": list(config["mean"]), "std": list(config["std"])}
    return Checkpoint(f"timm/{name.removeprefix('timm/')}", model.state_dict(), flags)


def _side_or_pair(size: tuple[int, int]) -> int | tuple[int, int]:
    """A square's side, which more models of timm take than a pair."""
    if size[0] == size[1]:
        return size[0]
    return size


def timm_entry(name: str) -> Entry[TimmClassifier]:
    """The registry entry of a timm model, for a name with or without "timm/" in front.

    Raises ValueError if timm does not have the model.
    """
    name = name.removeprefix("timm/")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = ""
        if near:
            hint = f"; near: {', '.join(near)}"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint}")
    build = functools.partial(timm_model, name)
    return Entry(build, {"trunk": TimmTrunk(), "heads": Heads()}, own_positions=True)
