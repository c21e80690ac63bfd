"""Describes a checkpoint: its kind, its architecture, its origin, and the commands that take it."""

import hashlib

from tools import stored_model
from tools.deploy.inputs import INPUT_NAMES, input_flags
from tools.formats import is_hf_folder, read, short_list
from util.data.sources.image_index import some_names
from util.weights.architecture import SO_VIT, Architecture, architecture, num_parameters
from util.weights.files import load
from util.weights.types import KINDS, Checkpoint
from util.weights.validate import shown


def describe(path: str) -> str:
    """A description of a checkpoint file, or of a Hugging Face folder, one fact a line.

    Raises ValueError if the file cannot be read.
    """
    is_folder = is_hf_folder(path)
    # `read` would leave out the label heads and the entries that are to be described.
    if is_folder:
        checkpoint = read(path)
    else:
        checkpoint = load(path)
    lines = {"kind": KINDS[checkpoint.kind][0] + _target(checkpoint) + _origin(checkpoint, is_folder)}
    if checkpoint.origin:
        lines["read"] = checkpoint.origin
    lines |= _model_lines(checkpoint)
    lines |= _content_lines(checkpoint)
    if not is_folder:
        # The file that a run's folder or an address stands for.
        with open(checkpoint.path, "rb") as f:
            lines["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
    lines["for"] = _accepted_by(checkpoint, is_folder)
    return "\n".join([path, *(f"  {name:<11} {text}" for name, text in lines.items())])


def _target(checkpoint: Checkpoint) -> str:
    """The target of the pixel loss of a pretraining checkpoint."""
    if checkpoint.kind != "pretraining":
        return ""
    # MAE's published files store weights only, and so do not say which target they were trained for.
    norm_pix_loss = checkpoint.args.get("norm_pix_loss")
    if norm_pix_loss is None:
        return ", target not stored"
    if norm_pix_loss:
        return ", norm-pix target"
    return ", pixel target"


def _origin(checkpoint: Checkpoint, is_folder: bool) -> str:
    """The project that wrote the file, as far as the file shows it."""
    if checkpoint.kind in ("dino", "huggingface", "unknown"):
        # The kind names the project already.
        return ""
    # All mains here have a flag `pos_embed`, and none of MAE's has it.
    if "pos_embed" in checkpoint.args or any(k.startswith("pos_head.") for k in checkpoint.model):
        return "; this toolkit's"
    if is_folder:
        return "; Hugging Face's"
    # Exports for timm keep how images become the input, and no other flags.
    if set(checkpoint.args) - set(INPUT_NAMES) or checkpoint.kind == "pretraining":
        return "; facebookresearch/mae's"
    return "; names of MAE and timm"


def _model_lines(checkpoint: Checkpoint) -> dict[str, str]:
    """The architecture of a plain Vision Transformer; the name or the first weights of other models."""
    try:
        arch = architecture(checkpoint)
    except ValueError:
        # Swin, timm's backbones, and files of other projects.
        weights = checkpoint.model
        first = f"{len(weights)} tensors, the first {', '.join(map(shown, list(weights)[:3]))}"
        return {"model": shown(checkpoint.args.get("model", first))}
    lines = {
        "model": f"{shown(checkpoint.args.get('model', 'name not stored'))}: {_sizes(arch, checkpoint)}",
        "images": _images(arch),
        "positions": _positions(arch),
    }
    if arch.classes:
        pooled = "the class token"
        if arch.pool == "avg":
            pooled = "the mean patch token"
        lines["classes"] = f"{arch.classes}, from {pooled}"
    return lines


def _sizes(arch: Architecture, checkpoint: Checkpoint) -> str:
    try:
        heads, decoder_heads, is_known = stored_model.heads_of(arch, checkpoint.args)
    except ValueError as e:
        raise ValueError(f"{checkpoint.path}: its stored {e}") from None
    text = f"{arch.depth} blocks of width {arch.dim}, {heads} heads"
    if not is_known:
        text += " (assumed: weights do not show it)"
    if arch.decoder_depth:
        text += f"; decoder {arch.decoder_depth} blocks of width {arch.decoder_dim}, {decoder_heads} heads"
    return text


def _images(arch: Architecture) -> str:
    size = "any image size"
    # Weights without a table of positions do not depend on the size.
    if arch.img_size is not None:
        size = f"{arch.img_size[0]}x{arch.img_size[1]} pixels"
    return f"{size}, {arch.in_chans} channels, patches of {arch.patch_size[0]}x{arch.patch_size[1]}"


def _positions(arch: Architecture) -> str:
    embedding = "without positional embedding"
    if arch.pos_embed:
        embedding = "with positional embedding"
    if not arch.labels:
        return f"{embedding}, no label head"
    return f"{embedding}, labels {shown('+'.join(arch.labels))}"


def _content_lines(checkpoint: Checkpoint) -> dict[str, str]:
    """What the file holds besides the model's architecture."""
    lines = {}
    if checkpoint.classes:
        lines["class names"] = some_names(checkpoint.classes)
    # In the order of `SO_VIT`.
    names = ("second-order head", "convolutional embedding")
    parts = [name for name, key in zip(names, SO_VIT) if key in checkpoint.model]
    if parts:
        lines["So-ViT"] = " and ".join(parts)
    found = input_flags(checkpoint.args)
    if found:
        lines["input"] = ", ".join(f"{name} {short_list(value)}" for name, value in found.items())
    if checkpoint.ema is not None:
        lines["average"] = "a moving average of the weights, which evaluation and export use"
    if checkpoint.epoch is not None:
        lines["epoch"] = _progress(checkpoint)
    lines["parameters"] = f"{num_parameters(checkpoint.model) / 1e6:.2f} M"
    return lines


def _progress(checkpoint: Checkpoint) -> str:
    text = str(checkpoint.epoch)
    # Epochs count from 0.
    if checkpoint.epoch == -1:
        text = "before the end of the first one"
    if checkpoint.step is not None:
        text += f" (step {checkpoint.step})"
    if "optimizer" in checkpoint.entries:
        text += ", with optimizer"
    return text


def _accepted_by(checkpoint: Checkpoint, is_folder: bool) -> str:
    """The commands and flags that take the file."""
    if is_folder:
        return "checkpoints.py import"
    text = KINDS[checkpoint.kind][1]
    if "optimizer" not in checkpoint.entries:
        # Without an optimizer no run can be resumed.
        text = text.replace("--resume or --init_from", "--init_from")
        text = text.replace("--resume, with --eval to evaluate", "--eval --resume")
    return text
