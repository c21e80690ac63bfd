"""What a checkpoint says about the model and its images, for runs whose flags leave it open."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from layers.sizes import nearest_size, same_encoder
from util import dist
from util.weights.architecture import MOST_PIXELS, Architecture, architecture, whole_numbers
from util.weights.layouts import without_backbone
from util.weights.types import Checkpoint
from util.weights.validate import MOST_CHANNELS, shown

# Flags that default to those of the checkpoint.
NAMES = ("model", "input_size", "in_chans", "patch_size")


def as_stored(
    flags: Mapping[str, Any], given: Collection[str], saved: Checkpoint | None, models: Collection[str]
) -> dict[str, Any]:
    """Return the flags of a run with those of NAMES that are not given replaced by those of its checkpoint.

    Prints on rank 0 what was replaced. What the checkpoint does not know stays as it is.

    Args:
        flags: the flags by name.
        given: names of the flags that the user has set.
        saved: the checkpoint that the run starts from, or None.
        models: names of the models that the run can have.
    """
    if saved is None:
        return dict(flags)
    known = {name: value for name, value in known_flags(saved, models).items() if name not in given}
    changed = {name: value for name, value in known.items() if flags.get(name) != value}
    if changed:
        listed = ", ".join(f"{name} {_text(value)}" for name, value in changed.items())
        dist.print_rank0(f"taken from {shown(saved.path)}: {listed}")
    return {**flags, **changed}


def known_flags(saved: Checkpoint, models: Collection[str]) -> dict[str, Any]:
    """Return those of NAMES that a checkpoint knows, from its stored flags, and else from its weights.

    The model is the one among `models` that has the checkpoint's encoder: a classifier for a masked
    autoencoder, for example.
    """
    found: dict[str, Any] = {}
    stored = saved.args
    found["model"] = _stored_model(stored.get("model"), models)
    found["input_size"] = _sizes(stored.get("input_size"))
    found["patch_size"] = _sizes(stored.get("patch_size"))
    channels = stored.get("in_chans")
    if type(channels) is int and 1 <= channels <= MOST_CHANNELS:
        found["in_chans"] = channels
    # Files of others store no flags, or only some of these. A stored model has its own patch size.
    settled = {name for name, value in found.items() if value}
    if "model" in settled:
        settled.add("patch_size")
    found |= {k: v for k, v in _from_weights(saved, models).items() if k not in settled}
    return {name: found[name] for name in NAMES if found.get(name)}


def _stored_model(name: Any, models: Collection[str]) -> str:
    if type(name) is not str:
        return ""
    # timm's models have no list of names here. Only classifiers can be timm's.
    if name.startswith("timm/") and "vit_base_patch16" in models:
        return name
    return same_encoder(name, models)


def _sizes(value: Any) -> list[int]:
    """A stored size H [W]; [] if there is none. timm stores three numbers, which are not a size here."""
    if value is None:
        return []
    sizes = whole_numbers(value)
    if len(sizes) not in (1, 2) or not all(1 <= size <= MOST_PIXELS for size in sizes):
        return []
    return sizes


def _from_weights(saved: Checkpoint, models: Collection[str]) -> dict[str, Any]:
    # DINO, iBOT and SERE keep the encoder apart from their heads.
    own = without_backbone(saved.model)
    if own:
        saved = replace(saved, model=own)
    try:
        a = architecture(saved)
    except ValueError:
        # Not a plain Vision Transformer.
        return {}
    found: dict[str, Any] = {"in_chans": a.in_chans}
    if a.img_size is not None:
        found["input_size"] = _shortest(a.img_size)
    return found | _model_of_size(a, "dist_token" in saved.model, models)


def _model_of_size(a: Architecture, distilled: bool, models: Collection[str]) -> dict[str, Any]:
    """The model of that size, and its patch size if it is another than the model's."""
    named = nearest_size(a.dim, a.depth, a.patch_size[0])
    if named is None:
        return {}
    size, patch = named
    plain = f"vit_{size}_patch{patch}"
    model = same_encoder(plain, models)
    if distilled and f"deit_{size}_distilled_patch{patch}" in models:
        model = f"deit_{size}_distilled_patch{patch}"
    if not model:
        return {}
    found: dict[str, Any] = {"model": model}
    if a.patch_size != (patch, patch):
        found["patch_size"] = _shortest(a.patch_size)
    return found


def _shortest(size: tuple[int, int]) -> list[int]:
    if size[0] == size[1]:
        return [size[0]]
    return list(size)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return shown(str(value))
