"""Converts checkpoints to and from the formats of other libraries, and checks that both models agree."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import models_mae_pl
from backbones import registry as models
from layers.contract import NORM_EPS
from tools import stored_model
from tools.deploy import programs
from tools.deploy.inputs import INPUT_FIELD, InputFacts
from tools.deploy.models import encoder_of
from tools.formats import (
    DECODER,
    TIMM_NAME,
    Model,
    Outputs,
    appears_whole,
    hf_folder,
    hf_outputs,
    input_note,
    largest_difference,
    outputs,
    read,
    refuse_above_limit,
    timm_file,
    timm_folder,
    timm_folder_outputs,
    timm_options,
    timm_outputs,
)
from tools.inspect import describe
from util.weights import transfer
from util.weights.architecture import Architecture, architecture
from util.weights.checkpoint import save_atomic
from util.weights.files import DIGEST, digest, load
from util.weights.types import EPS_FLAG, Checkpoint

# Format -> the endings of its files. '' stands for a folder. A Hugging Face model is a folder of any name.
SUFFIXES = {
    "encoder": (".pth",),
    "mae": (".pth",),
    "timm": (".safetensors", ".pth", ""),
    "hf": ("",),
    "safetensors": (".safetensors",),
    **programs.SUFFIXES,
}


# -- export --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Written:
    """A model in the format of a library, after it was written."""

    # Of the model read back from the file.
    outputs: Outputs
    # The model's name, for messages.
    model: str
    # How to load the file; {out} stands for its name.
    usage: str
    # What the library does not know about the model's images; '' for nothing.
    note: str = ""


@torch.no_grad()
def export(
    path: str, out: str, to: str, pos_embed_init: str = "zero", remove_position: str | None = None
) -> float:
    """Write the model in `path` to `out` in the format `to`, a key of `WRITERS`.

    Other libraries' models need a positional embedding: `pos_embed_init` (zero, sincos or normal) is what a
    model without one gets. `remove_position` names images on which `_without_position` finds what tokens tell
    of their position. Returns the largest difference between both models' outputs for two images. Raises
    ValueError for weights that the other library's model cannot hold, and if the outputs differ too much.
    """
    _check_request(out, to, remove_position)
    if to in programs.SUFFIXES:
        return programs.export_program(path, out, to)
    checkpoint = read(path)
    # The file itself, if `path` is a run's folder.
    path = checkpoint.path
    source = stored_model.model_of(checkpoint)
    if remove_position is not None:
        checkpoint = _without_position(checkpoint, source, remove_position)
        source = stored_model.model_of(checkpoint)
    if to == "encoder":
        checkpoint = encoder_of(checkpoint, source)
    elif to != "safetensors" and "pos_embed" not in checkpoint.model:
        _add_pos_embed(checkpoint, source, pos_embed_init)
        if pos_embed_init != "zero":
            # The new model computes something else than the stored one, so the comparison starts from
            # the new one.
            source = stored_model.model_of(checkpoint)
    checkpoint.args["input_size"] = list(source.img_size)
    arch = architecture(checkpoint)
    checkpoint.args |= _hidden_facts(source, arch)
    if arch.decoder_depth and to == "hf" and "norm_pix_loss" not in checkpoint.args:
        print(f"{path} does not say whether its target was normalised: norm_pix_loss is written as false")
    # timm has no decoder: its model is compared with our encoder.
    full = arch.decoder_depth > 0 and to != "timm"
    with appears_whole(out, path) as partial:
        written = WRITERS[to](checkpoint, arch, source, partial)
        difference = largest_difference(source, written.outputs, full)
        refuse_above_limit(difference, path, written.model)
    compared = f"the {_compared(arch, full)} of {written.model}"
    # Not by `format`: the code that loads a file may have braces of its own.
    usage = written.usage.replace("{out}", out)
    print(f"wrote {out}; largest difference to {compared}: {difference:.2g}\n{usage}")
    if written.note:
        print(written.note)
    return difference


def _check_request(out: str, to: str, remove_position: str | None) -> None:
    """Raise ValueError if a format's files do not have the ending of `out`, or cannot lose positions."""
    if remove_position is not None and to != "timm":
        raise ValueError(
            f"`remove_position` needs `to` timm, found {to}: the projection is a matrix after the final "
            "norm, which the norm cannot hold; timm's model has it as its head, and readers of other formats "
            "take a head for that of classes, or leave it out"
        )
    suffixes = SUFFIXES[to]
    # A folder for timm has no suffix, so that a mistyped one is not taken for a folder's.
    is_folder = "" in suffixes and (len(suffixes) == 1 or not os.path.splitext(out.rstrip("/"))[1])
    if is_folder or out.endswith(tuple(filter(None, suffixes))):
        return
    kinds = [suffix or "a folder, whose name has no suffix" for suffix in suffixes]
    raise ValueError(f"`to` {to} writes {' or '.join(kinds)}, found {out}")


def _compared(arch: Architecture, full: bool) -> str:
    if full:
        return "predicted patches"
    if arch.classes:
        return "logits"
    return "tokens"


def _without_position(checkpoint: Checkpoint, source: Model, images: str) -> Checkpoint:
    """The encoder with a linear head that projects the position out of each token after the final norm.

    Such a projection mixes channels, so that no norm can hold it: a norm scales each channel alone.
    """
    # It imports the library of charts, which other exports do not need.
    from tools.position import fit_removal

    # First, because the norm of `source` moves.
    projection = fit_removal(source, checkpoint.args, images)
    print("the written model.head(model.forward_features(images)) are the tokens without their position")
    encoder = encoder_of(checkpoint, source)
    removal = projection.basis @ projection.basis.t()  # (C, C)
    head = torch.eye(source.dim, dtype=torch.float64) - removal
    # x - removal (x - mean).
    encoder.model["head.weight"] = head.float()
    encoder.model["head.bias"] = (removal @ projection.mean).float()
    encoder.model = {k: v for k, v in encoder.model.items() if not k.startswith("pos_head.")}
    return encoder


def _add_pos_embed(checkpoint: Checkpoint, source: Model, init: str) -> None:
    tokens = source.num_prefix + source.patch_embed.num_patches
    table = torch.zeros(1, tokens, source.dim)
    checkpoint.model["pos_embed"] = transfer.new_pos_embed(table, source.grid, init)


def _hidden_facts(source: Model, arch: Architecture) -> dict[str, Any]:
    """What weights do not show, as the flags to store."""
    flags = {
        "in_chans": arch.in_chans,
        "patch_size": list(arch.patch_size),
        # Label heads stay behind.
        "pos_label": "none",
        "pos_embed": "learned" if arch.pos_embed else "none",
        "num_heads": source.trunk.num_heads,
    }
    if arch.decoder_depth and isinstance(source, models_mae_pl.MaskedAutoencoderViT):
        flags["decoder_heads"] = source.decoder.num_heads
    if source.trunk.norm_eps != NORM_EPS:
        flags[EPS_FLAG] = source.trunk.norm_eps
    return flags


# -- the writers: each writes `partial` and reads it back ----------------------------------------------------
def _write_encoder(checkpoint: Checkpoint, arch: Architecture, source: Model, partial: str) -> Written:
    save_atomic(checkpoint.to_dict(), partial)
    usage = "load it with main_finetune.py or main_linprobe.py --finetune {out}"
    return Written(_reloaded(partial, arch), "the model read back", usage)


def _write_mae(checkpoint: Checkpoint, arch: Architecture, source: Model, partial: str) -> Written:
    # Without label heads and with a positional embedding, our weights have MAE's names. MAE's models have one
    # epsilon, which matters for tokens of small variance: the comparison is with that.
    eps = checkpoint.args.pop(EPS_FLAG, None)
    save_atomic(checkpoint.to_dict(), partial)
    flags = "--finetune {out}"
    if arch.classes:
        flags = "--eval --resume {out}"
    if arch.decoder_depth:
        # Zeros stand for an encoder without an embedding.
        embedding = "sincos" if bool(checkpoint.model["pos_embed"].any()) else "none"
        flags += f", main_pretrain.py with --init_from {{out}} --pos_embed {embedding} --pos_label none"
    usage = f"facebookresearch/mae and this toolkit load it with {flags}"
    model = "the plain MAE model"
    if eps is not None:
        model += f" (layer_norm_eps {NORM_EPS:g} instead of {eps:g})"
    note = input_note(checkpoint.args, "facebookresearch/mae", "among the flags in the file")
    return Written(_reloaded(partial, arch), model, usage, note)


def _write_safetensors(checkpoint: Checkpoint, arch: Architecture, source: Model, partial: str) -> Written:
    from safetensors.torch import save_file

    # The format holds tensors and strings: flags and class names become JSON.
    metadata = {k: json.dumps(v) for k, v in checkpoint.to_dict().items() if k != "model"}
    weights = {k: v.contiguous() for k, v in checkpoint.model.items()}
    metadata[DIGEST] = digest(weights, metadata)
    save_file(weights, partial, metadata=metadata)
    usage = "--finetune, --init_from and --eval --resume take {out}"
    return Written(_reloaded(partial, arch), "the model read back", usage)


def _reloaded(file: str, arch: Architecture) -> Outputs:
    """The outputs of the model in a file of ours."""
    model = stored_model.model_of(load(file))
    return lambda images, noise: outputs(model, images, noise, full=arch.decoder_depth > 0)


def _write_timm(checkpoint: Checkpoint, arch: Architecture, source: Model, partial: str) -> Written:
    facts = InputFacts.of(checkpoint, source.img_size, source.in_chans)
    config = facts.timm_config(arch.classes, checkpoint.classes)
    options = timm_options(arch, source.trunk, source.img_size)
    keywords = ", ".join(f"{k}={v!r}" for k, v in options.items())
    weights = {k: v.contiguous() for k, v in checkpoint.model.items() if not k.startswith(DECODER)}
    place = "in its metadata"
    usage = (
        f"timm.create_model({TIMM_NAME!r}, checkpoint_path='{{out}}', {keywords}, pretrained_cfg={config!r})"
    )
    if partial.endswith(".pth"):
        place = "not in this file, which holds weights only"
        torch.save(weights, partial)
        weights = torch.load(partial, weights_only=True)
        theirs = timm_outputs(weights, options)
    elif partial.endswith(".safetensors"):
        weights = timm_file(weights, checkpoint.args, config, partial)
        theirs = timm_outputs(weights, options)
    else:
        place = f"{INPUT_FIELD} in config.json"
        usage = timm_folder(weights, checkpoint.args, options, config, partial)
        theirs = timm_folder_outputs(partial, options)
    note = _joined(input_note(checkpoint.args, "timm", place), facts.note())
    return Written(theirs, "timm's VisionTransformer", usage, note)


def _joined(*lines: str) -> str:
    return "\n".join(filter(None, lines))


def _write_hf(checkpoint: Checkpoint, arch: Architecture, source: Model, partial: str) -> Written:
    heads, decoder_heads, _ = stored_model.heads_of(arch, checkpoint.args)
    facts = InputFacts.of(checkpoint, source.img_size, source.in_chans)
    name = hf_folder(checkpoint, arch, (heads, decoder_heads), facts, partial)
    extra = ""
    if name == "ViTModel":
        extra = ", add_pooling_layer=False"
    usage = f"transformers.{name}.from_pretrained('{{out}}'{extra})"
    theirs = hf_outputs(partial, arch.decoder_depth > 0, arch.classes)
    note = _joined(
        input_note(checkpoint.args, "transformers", f"{INPUT_FIELD} in config.json"),
        facts.hf_note(),
        facts.note(),
    )
    return Written(theirs, f"transformers' {name}", usage, note)


WRITERS: dict[str, Callable[[Checkpoint, Architecture, Model, str], Written]] = {
    "encoder": _write_encoder,
    "mae": _write_mae,
    "timm": _write_timm,
    "hf": _write_hf,
    "safetensors": _write_safetensors,
}


# -- import --------------------------------------------------------------------------------------------------
@torch.no_grad()
def import_file(path: str, out: str) -> float:
    """Write a file of ours from MAE's, timm's, Hugging Face's or DINO's.

    Returns the largest difference, as `export` does. A Hugging Face folder is compared with its model in
    transformers, other files with timm's Vision Transformer: their decoder is read, but not compared. Raises
    ValueError for files of this toolkit and for weights that are not a plain Vision Transformer's.
    """
    if not out.endswith(".pth"):
        raise ValueError(f"import writes .pth, found {out}")
    checkpoint = read(path)
    path = checkpoint.path
    if "pos_label" in checkpoint.args:
        raise ValueError(
            f"{path} is a file of this toolkit already, which needs no import: checkpoints.py inspect says "
            "which command takes it"
        )
    model = stored_model.model_of(checkpoint)
    checkpoint.args["input_size"] = list(model.img_size)
    arch = architecture(checkpoint)
    checkpoint.args |= _hidden_facts(model, arch)
    name = _model_name(arch)
    if name is not None:
        checkpoint.args["model"] = name
    with appears_whole(out, path) as partial:
        save_atomic(checkpoint.to_dict(), partial)
        ours = stored_model.model_of(load(partial))
        library, theirs, full = _other_model(checkpoint, arch, ours)
        difference = largest_difference(ours, theirs, full)
        refuse_above_limit(difference, path, f"{library} model")
    name = checkpoint.args.get("model")
    usage = f"no model of ours has its size: {arch.depth} blocks of {arch.dim}"
    if name:
        usage = f"--model {name}"
    print(
        f"wrote {out}; largest difference to the outputs of {library} model: {difference:.2g}\n{usage}\n"
        + describe(out)
    )
    return difference


def _model_name(arch: Architecture) -> str | None:
    """The name of our model of this architecture; None if there is no such model."""
    patch = arch.patch_size[0]
    size, *_ = models_mae_pl.name_and_heads(arch.dim, arch.depth, arch.decoder_dim, patch)
    name = f"vit_{size}_patch{patch}"
    if arch.decoder_depth:
        name = f"mae_{name}"
    if name not in models.MODELS | models_mae_pl.MODELS:
        return None
    return name


def _other_model(checkpoint: Checkpoint, arch: Architecture, ours: Model) -> tuple[str, Outputs, bool]:
    """The model to compare an imported one with: its library, its outputs, whether it has a decoder."""
    if os.path.isdir(checkpoint.path):
        full = arch.decoder_depth > 0
        return "transformers'", hf_outputs(checkpoint.path, full, arch.classes), full
    options = timm_options(arch, ours.trunk, ours.img_size)
    return "timm's", timm_outputs(checkpoint.model, options), False
