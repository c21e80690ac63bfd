"""Checkpoints to and from the formats of other libraries."""

import json
import os

import torch

import models_mae_pl
from backbones import registry as models
from tools import stored_model
from tools.formats import (
    DECODER,
    appears_whole,
    hf_folder,
    hf_outputs,
    largest_difference,
    outputs,
    read,
    refuse_above_limit,
    timm_options,
    timm_outputs,
)
from tools.inspect import describe
from util.weights import checkpoint, transfer
from util.weights.architecture import Architecture, architecture
from util.weights.types import Checkpoint


# -- export ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def export(path: str, out: str, to: str, pos_embed_init: str = "zero") -> float:
    """Write `out` for another library; returns the largest difference between both models' outputs on two images.

    Raises ValueError for weights that the other library's model cannot hold, and where the outputs differ too much.
    """
    suffixes = {"safetensors": (".safetensors",), "timm": (".safetensors", ".pth"), "hf": ("",)}.get(
        to, (".pth",)
    )
    if not out.endswith(suffixes):
        raise ValueError(f"--to {to} writes {' or '.join(suffixes)}, found {out}")
    state = read(path)
    source = stored_model.model_of(state)
    if to == "encoder":
        state, source = encoder_of(state, source)
    elif to != "safetensors" and "pos_embed" not in state.model:
        table = torch.zeros(1, source.num_prefix + source.patch_embed.num_patches, source.dim)
        state.model["pos_embed"] = transfer.new_pos_embed(table, source.grid, pos_embed_init)
        if pos_embed_init != "zero":  # it computes something else than the source: the check is of the rest
            source = stored_model.model_of(state)
    state.args["input_size"] = list(source.img_size)
    a = architecture(state)
    state.args |= stored_flags(source, a)
    if a.decoder_depth and to == "hf" and "norm_pix_loss" not in state.args:
        print(f"{path} does not say whether its target was normalised: norm_pix_loss is written as false")
    full = a.decoder_depth > 0 and to != "timm"
    with appears_whole(out, path) as partial:
        theirs, name, usage = WRITERS[to](state, a, source, path, partial)
        difference = largest_difference(source, theirs, full)
        refuse_above_limit(difference, path, name)
    what = "predicted patches" if full else "logits" if a.classes else "tokens"
    print(
        f"wrote {out}; largest difference to the {what} of {name}: {difference:.2g}\n{usage.format(out=out)}"
    )
    return difference


def encoder_of(state: Checkpoint, source):
    """The encoder alone and its model. The norm that a mean of tokens went through becomes the norm of each token."""
    weights = {
        k.replace("fc_norm.", "norm."): v
        for k, v in state.model.items()
        if not k.startswith((*DECODER, "head."))
    }
    encoder = Checkpoint(state.path, weights, state.args)
    if isinstance(source, models_mae_pl.MaskedAutoencoderViT):
        return encoder, source
    source.num_classes = 0
    if source.fc_norm is not None:
        source.norm = source.fc_norm
    return encoder, source


def stored_flags(source, a: Architecture) -> dict:
    """What a file of weights cannot show, in the flags stored beside it."""
    out = {
        "in_chans": a.in_chans,
        "patch_size": list(a.patch_size),
        "pos_label": "none",
        "pos_embed": "learned" if a.pos_embed else "none",
        "num_heads": source.blocks[0].attn.num_heads,
    }
    if a.decoder_depth:
        out["decoder_heads"] = source.decoder_blocks[0].attn.num_heads
    return out


def write_ours(state, a, source, path, partial):
    checkpoint.save_atomic(state.to_dict(), partial)
    return (
        reloaded(partial, a),
        "the model read back",
        ("load it with main_finetune.py or main_linprobe.py --finetune {out}"),
    )


def write_mae(state, a, source, path, partial):
    """Without positional labels and with an embedding our models are MAE's, name by name."""
    checkpoint.save_atomic(state.to_dict(), partial)
    usage = "--eval --resume {out}" if a.classes else "--finetune {out}"
    if a.decoder_depth:
        usage += ", main_pretrain.py with --init_from {out} --pos_embed sincos --pos_label none"
    return (
        reloaded(partial, a),
        "the plain MAE model",
        f"facebookresearch/mae and this toolkit load it with {usage}",
    )


def write_safetensors(state, a, source, path, partial):
    from safetensors.torch import save_file

    notes = {k: json.dumps(v) for k, v in state.to_dict().items() if k != "model"}
    save_file({k: v.contiguous() for k, v in state.model.items()}, partial, metadata=notes)
    return (
        reloaded(partial, a),
        "the model read back",
        "--finetune, --init_from and --eval --resume take {out}",
    )


def reloaded(file: str, a: Architecture):
    """The model in a file of ours -> its outputs as a function."""
    model = stored_model.model_of(checkpoint.load(file))
    return lambda images, noise: outputs(model, images, noise, full=a.decoder_depth > 0)


def write_timm(state, a, source, path, partial):
    from safetensors.torch import load_file, save_file

    weights = {k: v.contiguous() for k, v in state.model.items() if not k.startswith(DECODER)}
    options = timm_options(a, source.blocks[0].attn.num_heads, source.img_size)
    if partial.endswith(".pth"):
        torch.save(weights, partial)
        weights = torch.load(partial, weights_only=True)
    else:
        save_file(weights, partial)
        weights = load_file(partial)
    usage = (
        "timm.create_model('vit_base_patch16_224', checkpoint_path='{out}', "
        + ", ".join(f"{k}={v!r}" for k, v in options.items())
        + ")"
    )
    return timm_outputs(weights, options), "timm's VisionTransformer", usage


def write_hf(state, a, source, path, partial):
    heads = stored_model.heads_of(a, state.args)[:2]
    name = hf_folder(
        state.model,
        a,
        heads,
        bool(state.args.get("norm_pix_loss")),
        path,
        partial,
        state.classes,
    )
    extra = ", add_pooling_layer=False" if name == "ViTModel" else ""
    return (
        hf_outputs(partial, a.decoder_depth > 0, a.classes),
        f"transformers' {name}",
        f"transformers.{name}.from_pretrained('{{out}}'{extra})",
    )


# Each writes `partial` and returns the outputs of the model read back from it, that model's name, and how to load it.
WRITERS = {
    "encoder": write_ours,
    "mae": write_mae,
    "timm": write_timm,
    "hf": write_hf,
    "safetensors": write_safetensors,
}


# -- import ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def import_file(path: str, out: str) -> float:
    """Write a file of ours from MAE's, timm's, Hugging Face's or DINO's; returns the largest difference, as `export`.

    Files that transformers did not write are compared with timm's Vision Transformer: a decoder is read, but not compared.
    """
    if not out.endswith(".pth"):
        raise ValueError(f"import writes .pth, found {out}")
    state = read(path)
    if "pos_label" in state.args:
        raise ValueError(f"{path} is a file of this toolkit already: inspect says which command takes it")
    model = stored_model.model_of(state)
    state.args["input_size"] = list(model.img_size)
    eps = state.args.pop("layer_norm_eps", 1e-6)
    a = architecture(state)
    size, *_ = models_mae_pl.name_and_heads(a.dim, a.depth, a.decoder_dim, a.patch_size[0])
    name = f"{'mae_' if a.decoder_depth else ''}vit_{size}_patch{a.patch_size[0]}"
    state.args |= stored_flags(model, a)
    if name in models.MODELS | models_mae_pl.MODELS:
        state.args["model"] = name
    full = a.decoder_depth > 0 and os.path.isdir(path)
    with appears_whole(out, path) as partial:
        checkpoint.save_atomic(state.to_dict(), partial)
        ours = stored_model.model_of(checkpoint.load(partial))
        if os.path.isdir(path):
            theirs, library = hf_outputs(path, full, a.classes), "transformers'"
        else:
            options = timm_options(a, model.blocks[0].attn.num_heads, model.img_size)
            theirs, library = timm_outputs(state.model, options), "timm's"
        difference = largest_difference(ours, theirs, full)
        note = (
            f" (layer_norm_eps {eps:g}, ours 1e-06)" if eps != 1e-6 else ""
        )  # matters for tokens of small variance
        refuse_above_limit(difference, path, f"{library} model{note}")
    known = state.args.get("model")
    print(
        f"wrote {out}; largest difference to the outputs of {library} model: {difference:.2g}\n"
        + (f"--model {known}" if known else f"no model of ours has its size: {a.depth} blocks of {a.dim}")
    )
    print(describe(out))
    return difference
