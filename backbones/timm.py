"""Any timm backbone whose last features form a grid of tokens, under this toolkit's classifier: `--model timm/NAME`.

Shapes: B batch, N cells of the grid, C channels of a token, F width of the pooled features, K classes.
"""

import difflib
import math
import re
from types import SimpleNamespace

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from layers.classifier import POOLS, Classifier


class TimmClassifier(Classifier, nn.Module):
    """A timm model without its classifier, our heads on top; its parameters keep timm's names after `backbone.`.

    Pooling, and what comes between it and the classifier, are timm's own, so that without labels this is the timm
    model. Positional labels read the grid of tokens that `forward_features` gives; where the model normalises after
    pooling, that norm is applied to each token for them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        img_size: tuple[int, int],
        in_chans: int,
        num_classes: int = 1000,
        pos_label: str = "none",
        pos_tokens: str = "half",
        rpl_pairs: int = 0,
        head_init_std: float = 2e-5,
        second_order: dict | None = None,
    ):
        super().__init__()
        self.backbone, self.img_size, self.in_chans = backbone, tuple(img_size), in_chans
        raw, pooled = dry_run(backbone, self.img_size, in_chans)
        self.layout = token_layout(raw, backbone)
        has_cls = getattr(backbone, "cls_token", None) is not None
        self.num_prefix = int(getattr(backbone, "num_prefix_tokens", has_cls)) if self.layout == "NLC" else 0
        self.grid = token_grid(raw, self.layout, self.num_prefix, self.img_size, backbone)
        self.dim = raw.shape[1 if self.layout == "NCHW" else -1]
        pool = "cls" if getattr(backbone, "global_pool", "") == "token" else "avg"
        self.init_classifier(
            num_classes, pool, pos_label, pos_tokens, rpl_pairs, head_init_std, pooled.shape[-1], second_order
        )
        self._layer_ids = self._group_layers()

    def _to_tokens(self, raw: Tensor) -> Tensor:
        """The model's own layout -> (B, num_prefix + N, C)."""
        if self.layout == "NCHW":
            return raw.flatten(2).transpose(1, 2)
        return raw.flatten(1, 2) if self.layout == "NHWC" else raw

    def _from_tokens(self, tokens: Tensor) -> Tensor:
        """Inverse of `_to_tokens`."""
        if self.layout == "NLC":
            return tokens
        grid = tokens.unflatten(1, self.grid)  # (B, h, w, C)
        return grid.permute(0, 3, 1, 2) if self.layout == "NCHW" else grid

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> (B, num_prefix + N, C), rows first; ValueError on images of another size."""
        if x.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f"the model takes images of (channels, height, width) {(self.in_chans, *self.img_size)}, "
                f"found {tuple(x.shape[1:])}: give the same --input_size and --in_chans to data and model"
            )
        return self._to_tokens(self.backbone.forward_features(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's own; ValueError for models that have none."""
        try:
            self.backbone.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError):  # timm has no other way to ask
            raise ValueError(
                f"timm's {type(self.backbone).__name__} cannot run its blocks again in backward: leave "
                "--grad_checkpointing out"
            ) from None

    def pool_tokens(self, tokens: Tensor) -> Tensor:
        """(B, num_prefix + N, C) -> (B, F), by the model's own pooling and what follows it."""
        return self.backbone.forward_head(self._from_tokens(tokens), pre_logits=True)

    def label_tokens(self, tokens: Tensor) -> Tensor:
        """(B, num_prefix + N, C) -> patch tokens after the final norm (B, N, C), wherever the model has that."""
        norm = _norm_after_pooling(self.backbone)
        if norm is not None:
            tokens = self._to_tokens(norm(self._from_tokens(tokens)))
        return tokens[:, self.num_prefix :]

    def no_weight_decay(self) -> set[str]:
        """timm's list for the model."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"backbone.{name}" for name in names}

    def _group_layers(self) -> dict[str, int]:
        """{name: id} by timm's matcher, heads as '': they share an id with what timm leaves to the classifier."""
        if not hasattr(self.backbone, "group_matcher"):
            return {f"backbone.{name}": 0 for name, _ in self.backbone.named_parameters()} | {"": 1}
        # Our head is named along with the backbone's parameters, because the ids depend on what is left unmatched.
        named = [*self.backbone.named_parameters(), ("head.weight", None)]
        ids = group_parameters(
            SimpleNamespace(named_parameters=lambda: named),
            self.backbone.group_matcher(coarse=False),
            reverse=True,
        )
        head = ids.pop("head.weight")
        return {f"backbone.{name}": i for name, i in ids.items()} | {"": head}

    @property
    def num_layers(self) -> int:
        """The largest `layer_id`."""
        return max(self._layer_ids.values())

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates, as timm groups the model's parameters."""
        return self._layer_ids.get(name, self._layer_ids[""])


def _norm_after_pooling(backbone: nn.Module) -> nn.Module | None:
    """The norm that timm's model applies to pooled features: `fc_norm` of ViTs, `head.norm` of newer convnets."""
    for owner, name in ((backbone, "fc_norm"), (getattr(backbone, "head", None), "norm")):
        norm = getattr(owner, name, None)
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
            return norm
    return None


@torch.no_grad()
def dry_run(backbone: nn.Module, img_size: tuple[int, int], in_chans: int) -> tuple[Tensor, Tensor]:
    """Features in the model's own layout and pooled features (1, F), for a black image; the model is not changed."""
    was_training = backbone.training
    backbone.eval()  # batch statistics must not move, dropout must not draw
    raw = backbone.forward_features(torch.zeros(1, in_chans, *img_size))
    if not torch.is_tensor(raw) or raw.dim() not in (3, 4):
        found = f"shape {tuple(raw.shape)}" if torch.is_tensor(raw) else f"a {type(raw).__name__}"
        raise ValueError(
            f"{type(backbone).__name__} gives no grid of tokens (its features: {found}), so that there is nothing to "
            "pool or to label: choose a model whose forward_features keeps the positions"
        )
    pooled = backbone.forward_head(raw, pre_logits=True)
    backbone.train(was_training)
    return raw, pooled


def token_layout(raw: Tensor, backbone: nn.Module) -> str:
    """'NLC', 'NHWC' or 'NCHW': by the number of axes, the model's `output_fmt`, or the axis of `num_features`."""
    if raw.dim() == 3:
        return "NLC"
    documented = getattr(backbone, "output_fmt", None)
    if documented in ("NHWC", "NCHW"):
        return str(getattr(documented, "value", documented))
    width = getattr(backbone, "num_features", None)
    for layout, axis in (("NCHW", 1), ("NHWC", 3)):
        if raw.shape[axis] == width:
            return layout
    raise ValueError(
        f"cannot tell the channels of {type(backbone).__name__}'s features {tuple(raw.shape)}: the model has neither "
        "`output_fmt` nor an axis of `num_features` channels"
    )


def token_grid(
    raw: Tensor, layout: str, num_prefix: int, img_size: tuple[int, int], backbone: nn.Module
) -> tuple[int, int]:
    """(h, w) of the tokens, rows first.

    A sequence of N is taken as the model's patch grid, else the grid of its last reduction, else the one with the
    image's proportions; ValueError when none of them has N cells.
    """
    if layout != "NLC":
        return tuple(raw.shape[2:] if layout == "NCHW" else raw.shape[1:3])
    (H, W), N = img_size, raw.shape[1] - num_prefix
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
        f"{H}x{W}; tried {', '.join(f'{h}x{w}' for h, w in candidates)}: choose a model whose tokens keep their place"
    )


# timm's names of arguments, and ours.
_FLAGS = {
    "drop_path_rate": "--drop_path",
    "patch_size": "--patch_size",
    "in_chans": "--in_chans",
    "global_pool": "pool",
}


def _create(name: str, required: dict, optional: dict) -> nn.Module:
    """timm.create_model; arguments of `optional` that the model does not know are left out."""
    while True:
        try:
            return timm.create_model(name, **required, **optional)
        except TypeError as e:
            unknown = re.search(
                r"unexpected keyword argument\W+(\w+)", str(e).replace("argument(s)", "argument")
            )
            if unknown is None or unknown[1] not in required | optional:
                raise
            if unknown[1] in required:
                flag = _FLAGS.get(unknown[1], unknown[1])
                given = required[unknown[1]]
                remedy = "give 0" if flag == "--drop_path" else "leave it out"
                raise ValueError(f"timm/{name} takes no {flag}, found {given!r}: {remedy}") from None
            del optional[unknown[1]]
        except (AssertionError, ValueError) as e:  # sizes that the architecture cannot take
            raise ValueError(
                f"timm/{name} cannot be built with {required | optional}: {e or type(e).__name__}"
            ) from e


# Positional parts of timm's models that are no additive embedding.
_OTHER_POSITIONS = re.compile(
    r"pos_embed[\w.]|rel_pos|relative_position|rope|cpb_mlp|attention_bias|\bpeg\b|pos_block"
)


def _remove_pos_embed(backbone: nn.Module, name: str) -> None:
    """Zero and freeze every parameter called `pos_embed`; ValueError if that would leave other positional parts."""
    tables = [p for n, p in backbone.named_parameters() if n.rpartition(".")[2] == "pos_embed"]
    names = [n for n, _ in [*backbone.named_parameters(), *backbone.named_modules()]]
    others = [n for n in names if _OTHER_POSITIONS.search(n)]
    if others or not tables:
        found = f"its positions are in {others[0]}" if others else "it has no parameter pos_embed"
        raise ValueError(
            f"--pos_embed none is not possible with timm/{name}: {found}. Leave --pos_embed at its default, which is "
            "the model's own, or take a vit_*, deit_* or swin_* model of this toolkit"
        )
    for table in tables:
        nn.init.zeros_(table).requires_grad_(False)


def timm_model(
    name: str,
    *,
    img_size: tuple[int, int] = (224, 224),
    patch_size: tuple[int, int] | None = None,
    in_chans: int = 3,
    num_classes: int = 1000,
    pool: str | None = None,
    pos_embed: str = "learned",
    pos_label: str = "none",
    pos_tokens: str = "half",
    rpl_pairs: int = 0,
    drop_path: float = 0.0,
    head_init_std: float = 2e-5,
    second_order: dict | None = None,
) -> TimmClassifier:
    """Classifier on the timm backbone `name` ('timm/' in front may stay), with random weights.

    `patch_size` and `pool` are the model's own if None. `pos_embed` 'none' zeroes and freezes the model's `pos_embed`
    parameters where it has no other positional part; anything else keeps the model's own. The rest is as for the other
    classifiers. Raises ValueError on an unknown name, arguments that the model does not take, features without a grid.
    """
    name = name.removeprefix("timm/")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint}")
    required, optional = {"num_classes": 0, "in_chans": in_chans}, {"img_size": tuple(img_size)}
    if patch_size is not None:
        required["patch_size"] = patch_size[0] if patch_size[0] == patch_size[1] else tuple(patch_size)
    if pool is not None:
        if pool not in POOLS:
            raise ValueError(f"pool is one of {', '.join(POOLS)}, found {pool!r}")
        required["global_pool"] = "token" if pool == "cls" else "avg"
    # Always given, because some models drop paths by default, up to a half of them.
    (required if drop_path else optional)["drop_path_rate"] = drop_path
    backbone = _create(name, required, optional)
    if pos_embed == "none":
        _remove_pos_embed(backbone, name)
    return TimmClassifier(
        backbone,
        img_size,
        in_chans,
        num_classes,
        pos_label,
        pos_tokens,
        rpl_pairs,
        head_init_std,
        second_order,
    )
