"""What a checkpoint is, where it comes from, and what it fits."""

import hashlib
import os

from tools import stored_model
from tools.formats import (
    read,
)
from util.data.sources.image_index import some_names
from util.weights import checkpoint
from util.weights.architecture import SO_VIT, Architecture, architecture, num_parameters
from util.weights.types import KINDS, Checkpoint


# -- inspect -----------------------------------------------------------------------------------------------------------
def describe(path: str) -> str:
    """What a checkpoint holds and which command takes it, a line each."""
    folder = os.path.isdir(path)
    state = read(path) if folder else checkpoint.load(path)
    kind, args, weights = state.kind, state.args, state.model
    lines = {"kind": KINDS[kind][0] + origin(state, kind, folder)}
    try:
        a = architecture(state)
    except ValueError:  # Swin, timm's backbones, foreign names
        a = None
        lines["model"] = args.get(
            "model", f"{len(weights)} tensors, the first {', '.join(list(weights)[:3])}"
        )
    if a is not None:
        lines |= describe_architecture(a, args)
    if state.classes:
        lines["class names"] = some_names(state.classes)
    if any(k in weights for k in SO_VIT):
        lines["So-ViT"] = " and ".join(
            name for name, k in zip(("second-order head", "convolutional embedding"), SO_VIT) if k in weights
        )
    if state.ema is not None:
        lines["average"] = "a moving average of the weights, which is what evaluation and export take"
    if state.epoch is not None:
        steps = f" (step {state.step})" if state.step is not None else ""
        lines["epoch"] = f"{state.epoch}{steps}{', with optimizer' if 'optimizer' in state.entries else ''}"
    lines["parameters"] = f"{num_parameters(weights) / 1e6:.2f} M"
    if not folder:
        with open(path, "rb") as f:
            lines["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
    lines["for"] = accepted_by(state, kind, folder)
    return "\n".join([path, *(f"  {name:<11} {text}" for name, text in lines.items())])


def origin(state: Checkpoint, kind: str, folder: bool) -> str:
    """Whose file it is, and the target of a pretraining file, where they can be told."""
    args = state.args
    # --pos_embed is a flag of all mains here, and of none of MAE's.
    ours = "pos_embed" in args or any(k.startswith("pos_head.") for k in state.model)
    target = {True: ", norm-pix target", False: ", pixel target"}.get(
        args.get("norm_pix_loss"), ", target not stored"
    )
    whose = (
        "this toolkit's"
        if ours
        else "Hugging Face's"
        if folder
        else "facebookresearch/mae's"
        if args or kind == "pretraining"
        else "names of MAE and timm"
    )
    return (target if kind == "pretraining" else "") + (
        f"; {whose}" if kind not in ("dino", "huggingface", "unknown") else ""
    )


def describe_architecture(a: Architecture, args: dict) -> dict[str, str]:
    heads, decoder_heads, known = stored_model.heads_of(a, args)
    heads = f"{heads} heads" if known else f"{heads} heads (assumed: weights do not show it)"
    decoder = (
        f"; decoder {a.decoder_depth} blocks of width {a.decoder_dim}, {decoder_heads} heads"
        if a.decoder_depth
        else ""
    )
    size = "any image size" if a.img_size is None else f"{a.img_size[0]}x{a.img_size[1]} pixels"
    out = {
        "model": f"{args.get('model', 'no name stored')}: {a.depth} blocks of width {a.dim}, {heads}{decoder}",
        "images": f"{size}, {a.in_chans} channels, patches of {a.patch_size[0]}x{a.patch_size[1]}",
        "positions": f"{'with' if a.pos_embed else 'without'} positional embedding, "
        + (f"labels {'+'.join(a.labels)}" if a.labels else "no label head"),
    }
    if a.classes:
        out["classes"] = (
            f"{a.classes}, from {'the mean patch token' if a.pool == 'avg' else 'the class token'}"
        )
    return out


def accepted_by(state: Checkpoint, kind: str, folder: bool) -> str:
    if folder:
        return "checkpoints.py import"
    text = KINDS[kind][1]
    if "optimizer" not in state.entries:  # then nothing can be resumed
        text = text.replace("--resume or --init_from", "--init_from")
        text = text.replace("--resume, with --eval to evaluate", "--eval --resume")
    return text
