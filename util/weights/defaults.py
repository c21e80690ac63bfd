"""What a checkpoint says about the model and its images, for runs whose flags leave it open."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from layers.sizes import classifier_names, mae_names, nearest_size, same_encoder, sere_names
from util import dist
from util.weights.architecture import MOST_PIXELS, Architecture, architecture, whole_numbers
from util.weights.layouts import without_backbone
from util.weights.types import Checkpoint, kind_of
from util.weights.validate import MOST_CHANNELS, shown

# Kind of a checkpoint -> the names of its models.
_MODELS = {"pretraining": mae_names, "self-distillation": sere_names}
# Flags that default to those of the checkpoint.
NAMES = ("model", "input_size", "in_chans", "patch_size", "channels", "bands", "alpha", "exif")


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
    # Other bands than the checkpoint's need not be among the same ones.
    if {"in_chans", "channels"} & set(given):
        known = {name: value for name, value in known.items() if name not in ("channels", "bands")}
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
    found |= {name: stored.get(name) for name in ("channels", "bands")}
    found["exif"] = _choice(stored.get("exif"), ("ignore", "apply"))
    # main_sere.py has another name for it. In files of SERE's authors, alpha is a weight.
    alpha = stored.get("image_alpha") or stored.get("alpha")
    found["alpha"] = _choice(alpha, ("drop", "white", "black"))
    # Files of others store no flags, or only some of these. A stored model has its own patch size.
    settled = {name for name, value in found.items() if value}
    if "model" in settled:
        settled.add("patch_size")
    found |= {k: v for k, v in _from_weights(saved, models).items() if k not in settled}
    return {name: found[name] for name in NAMES if found.get(name)}


def _choice(value: Any, choices: Collection[str]) -> str:
    """A stored choice; '' if it is none of ours."""
    if type(value) is str and value in choices:
        return value
    return ""


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


def _plain_vit(saved: Checkpoint) -> Architecture | None:
    """The architecture of a plain Vision Transformer; None for other models."""
    # DINO, iBOT and SERE keep the encoder apart from their heads.
    own = without_backbone(saved.model)
    if own:
        saved = replace(saved, model=own)
    try:
        return architecture(saved)
    except ValueError:
        return None


def _from_weights(saved: Checkpoint, models: Collection[str]) -> dict[str, Any]:
    a = _plain_vit(saved)
    if a is None:
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


def fitting(saved: Checkpoint, expected: Mapping[str, Tensor]) -> str:
    """What to give for a model that fits a checkpoint, and the sizes that it has; '' if it shows none.

    Args:
        saved: the checkpoint.
        expected: the weights of a model that does not fit it.
    """
    whole = kind_of(expected) == kind_of(saved.model)
    theirs = _plain_vit(saved)
    ours = _plain_vit(Checkpoint("", dict(expected)))
    if theirs is None and ours is None:
        # Swin, So-ViT and timm's have more flags than a name.
        if "model" not in saved.args:
            return ""
        return f"it was made with `model` {shown(saved.args['model'])}: give the flags of that run"
    wrong = _wrong_parameters(theirs, ours, whole)
    if "model" not in wrong:
        return _listed(wrong)
    wrong["model"] = _model_like(saved, kind_of(expected), whole)
    if theirs is None:
        return _listed(wrong)
    height, width = theirs.patch_size
    sizes = f"{theirs.depth} blocks of width {theirs.dim}, patches of {height}x{width}"
    if not wrong["model"]:
        made = ""
        if "model" in saved.args:
            made = f"it was made with `model` {shown(saved.args['model'])}; "
        timm = ""
        if kind_of(expected) not in _MODELS:
            timm = "; a timm/NAME may have it"
        return f"{made}no model here has its size ({sizes}){timm}"
    pooled = ""
    if whole and ours is not None and theirs.pool != ours.pool:
        pooled = {"avg": " without `cls_token`", "cls": " with `cls_token`"}[theirs.pool]
    return f"{_listed(wrong)}{pooled} ({sizes})"


def _model_like(saved: Checkpoint, kind: str, whole: bool) -> str:
    """The model of a kind that has a checkpoint's encoder, or is the `whole` model; '' if there is none."""
    # An encoder is that of a classifier without a head.
    names = list(_MODELS.get(kind, classifier_names)())
    stored = saved.args.get("model")
    if whole and kind not in _MODELS and isinstance(stored, str) and re.fullmatch(r"timm/[\w.]+", stored):
        names.append(stored)
    return str(known_flags(saved, names).get("model", ""))


def _listed(parameters: Mapping[str, str]) -> str:
    given = [f"`{name}` {value}" for name, value in parameters.items() if value]
    if not given:
        return ""
    return f"give {' and '.join(given)}"


def _wrong_parameters(theirs: Architecture | None, ours: Architecture | None, whole: bool) -> dict[str, str]:
    """The parameters in which two models differ, with the values of the first; `model` without a value.

    Unless the `whole` models are to agree, it is their encoders.
    """
    if theirs is None or ours is None:
        return {"model": ""}
    wrong = {}
    trunk = ["dim", "depth", "mlp_ratio", "patch_size"]
    if whole:
        trunk += ["decoder_dim", "decoder_depth"]
    if any(getattr(theirs, name) != getattr(ours, name) for name in trunk):
        wrong["model"] = ""
    if theirs.patch_size != ours.patch_size:
        wrong["patch_size"] = _text(_shortest(theirs.patch_size))
    if whole:
        wrong |= _wrong_heads(theirs, ours)
    return wrong


def _wrong_heads(theirs: Architecture, ours: Architecture) -> dict[str, str]:
    wrong = {}
    if theirs.pool != ours.pool:
        # DeiT and ViT differ in nothing else.
        wrong["model"] = ""
    if theirs.in_chans != ours.in_chans:
        wrong["in_chans"] = str(theirs.in_chans)
    if theirs.labels != ours.labels:
        wrong["pos_label"] = shown("+".join(theirs.labels) or "none")
    if theirs.pos_embed != ours.pos_embed:
        wrong["pos_embed"] = "learned"
        if not theirs.pos_embed:
            wrong["pos_embed"] = "none"
    return wrong


def _shortest(size: tuple[int, int]) -> list[int]:
    if size[0] == size[1]:
        return [size[0]]
    return list(size)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return shown(str(value))
