"""The class head and patch embedding of a classifier, resolved from flags, checkpoint and model."""

from typing import Any

from backbones.registry import find
from util.weights.checkpoint import stored_flags
from util.weights.types import Checkpoint

# Flags, and the options of layers.second_order.SecondOrderHead that they set.
SECOND_ORDER_FLAGS = {
    "so_dims": "dims",
    "so_heads": "heads",
    "so_fusion": "fusion",
    "so_alpha": "alpha",
    "so_iters": "iters",
    "so_dropout": "dropout",
}


def second_order_options(flags: dict[str, Any]) -> dict[str, Any]:
    """Options of a second-order head from those so_* flags that have a value."""
    return {option: flags[name] for name, option in SECOND_ORDER_FLAGS.items() if flags.get(name) is not None}


def resolve_head(given: dict[str, Any], model: str, saved: Checkpoint | None) -> dict[str, Any]:
    """The flags `head`, so_* and `patch_embed`: as given, else as in the checkpoint `saved` that continues.

    `head` then has a value, "linear" or "second_order". `patch_embed` has one if it is known to be another
    than linear; None is the model's own. Raises ValueError if the given head is not the checkpoint's, and if
    so_* flags are given for a linear head.
    """
    flags = {name: given.get(name) for name in ("head", "patch_embed", *SECOND_ORDER_FLAGS)}
    before = stored_flags(saved)
    for name, value in flags.items():
        if value is None:
            flags[name] = before.get(name)
    stored = _stored_head(saved)
    if saved is not None and stored:
        if given.get("head") not in (None, stored):
            raise ValueError(
                f"{saved.path} was trained with `head` {stored}, found `head` {given['head']}: leave `head` "
                "out, or choose another `output_dir`"
            )
        flags["head"] = stored
    usual = find(model).options
    flags["head"] = flags["head"] or _head_kind(usual)
    # A linear embedding need not be named, and Swin and timm's models do not take the option.
    if flags["patch_embed"] is None and usual.get("patch_embed", "linear") != "linear":
        flags["patch_embed"] = usual["patch_embed"]
    if flags["head"] == "linear":
        _check_linear(given)
    return flags


def _check_linear(given: dict[str, Any]) -> None:
    # Only flags that are given now: a checkpoint may store those of an earlier head.
    for name in SECOND_ORDER_FLAGS:
        if given.get(name) is not None:
            raise ValueError(f"`{name}` belongs to `head` second_order, but the head is linear")


def _stored_head(saved: Checkpoint | None) -> str:
    """The kind of head whose weights a checkpoint has; '' without a checkpoint or without a head."""
    if saved is None:
        return ""
    weights = saved.model
    if "head.pool.start" in weights:
        return "second_order"
    if any(name.startswith("head.") for name in weights):
        return "linear"
    return ""


def _head_kind(options: dict[str, Any]) -> str:
    if options["second_order"] is None:
        return "linear"
    return "second_order"


def head_options(model: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Options of a model's entry from the result of `resolve_head`.

    Raises ValueError if the model does not take `patch_embed`.
    """
    usual = find(model).options
    options: dict[str, Any] = {}
    if flags["patch_embed"] is not None:
        if "patch_embed" not in usual:
            raise ValueError(
                f"`patch_embed` belongs to vit_*, deit_* and so_vit_* models; {model} has its own embedding"
            )
        options["patch_embed"] = flags["patch_embed"]
    if flags["head"] == "second_order":
        options["second_order"] = second_order_options(flags)
    # A model whose usual head is second-order must be told that its head is linear.
    elif usual["second_order"] is not None:
        options["second_order"] = None
    return options
