"""Look at checkpoints, and take them from one library to another.

    python checkpoints.py inspect FILE...                  # kind, architecture, epoch, sha256, which command takes it
    python checkpoints.py export FILE OUT --to encoder     # or mae, timm, hf (a folder), safetensors
    python checkpoints.py import FILE OUT                  # from MAE, timm, Hugging Face (its folder), DINO

Export and import run both models on the same images, print the largest difference between their outputs, and write
nothing above 1e-4. Label heads and the optimizer stay behind.
"""
import argparse
import hashlib
import json
import os
import sys

from util.args import Parser, run

FORMATS = ("encoder", "mae", "timm", "hf", "safetensors")


def get_args_parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, parser_class=argparse.ArgumentParser)
    inspect = commands.add_parser("inspect", help="say what files hold")
    inspect.add_argument("files", nargs="+")
    export = commands.add_parser("export", help="write weights for another library")
    export.add_argument("file")
    export.add_argument("out", help="encoder, mae: .pth; timm: .pth or .safetensors; hf: a new folder")
    export.add_argument("--to", choices=FORMATS, default="timm")
    export.add_argument("--pos_embed_init", choices=["zero", "sincos"], default="zero",
                        help="mae, timm and hf need a positional embedding: what a checkpoint without one gets; zero "
                             "computes the same as none")
    into = commands.add_parser("import", help="write a file of this toolkit from another library's")
    into.add_argument("file", help="a .pth or .safetensors file, or a folder of Hugging Face's")
    into.add_argument("out", help=".pth")
    return p


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a mistyped flag answer at once.
    ARGS = get_args_parser().parse_args()

import torch

import models
import models_mae_pl
from conversions import (
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
from util import checkpoint
from util.image_index import some_names
from util.weights import KINDS, SO_VIT, Architecture, architecture, kind_of, parameters


# -- inspect -----------------------------------------------------------------------------------------------------------
def describe(path: str) -> str:
    """What a checkpoint holds and which command takes it, a line each."""
    folder = os.path.isdir(path)
    state = read(path) if folder else checkpoint.load(path)
    kind, args, weights = kind_of(state), state.get("args") or {}, state["model"]
    lines = {"kind": KINDS[kind][0] + origin(state, kind, folder)}
    try:
        a = architecture(state, path)
    except ValueError:  # Swin, timm's backbones, foreign names
        a = None
        lines["model"] = args.get("model", f"{len(weights)} tensors, the first {', '.join(list(weights)[:3])}")
    if a is not None:
        lines |= describe_architecture(a, args)
    if state.get("classes"):
        lines["class names"] = some_names(state["classes"])
    if any(k in weights for k in SO_VIT):
        lines["So-ViT"] = " and ".join(name for name, k in zip(("second-order head", "convolutional embedding"), SO_VIT)
                                       if k in weights)
    if "ema" in state:
        lines["average"] = "a moving average of the weights, which is what evaluation and export take"
    if "epoch" in state:
        steps = f" (step {state['step']})" if "step" in state else ""
        lines["epoch"] = f"{state['epoch']}{steps}{', with optimizer' if 'optimizer' in state else ''}"
    lines["parameters"] = f"{parameters(weights) / 1e6:.2f} M"
    if not folder:
        with open(path, "rb") as f:
            lines["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
    lines["for"] = accepted_by(state, kind, folder)
    return "\n".join([path, *(f"  {name:<11} {text}" for name, text in lines.items())])


def origin(state: dict, kind: str, folder: bool) -> str:
    """Whose file it is, and the target of a pretraining file, where they can be told."""
    args = state.get("args") or {}
    # --pos_embed is a flag of all mains here, and of none of MAE's.
    ours = "pos_embed" in args or any(k.startswith("pos_head.") for k in state["model"])
    target = {True: ", norm-pix target", False: ", pixel target"}.get(args.get("norm_pix_loss"), ", target not stored")
    whose = ("this toolkit's" if ours else "Hugging Face's" if folder
             else "facebookresearch/mae's" if args or kind == "pretraining" else "names of MAE and timm")
    return (target if kind == "pretraining" else "") + (f"; {whose}" if kind not in ("dino", "huggingface", "unknown") else "")


def describe_architecture(a: Architecture, args: dict) -> dict[str, str]:
    heads, decoder_heads, known = models.heads_of(a, args)
    heads = f"{heads} heads" if known else f"{heads} heads (assumed: weights do not show it)"
    decoder = f"; decoder {a.decoder_depth} blocks of width {a.decoder_dim}, {decoder_heads} heads" if a.decoder_depth else ""
    size = "any image size" if a.img_size is None else f"{a.img_size[0]}x{a.img_size[1]} pixels"
    out = {
        "model": f"{args.get('model', 'no name stored')}: {a.depth} blocks of width {a.dim}, {heads}{decoder}",
        "images": f"{size}, {a.in_chans} channels, patches of {a.patch_size[0]}x{a.patch_size[1]}",
        "positions": f"{'with' if a.pos_embed else 'without'} positional embedding, "
                     + (f"labels {'+'.join(a.labels)}" if a.labels else "no label head"),
    }
    if a.classes:
        out["classes"] = f"{a.classes}, from {'the mean patch token' if a.pool == 'avg' else 'the class token'}"
    return out


def accepted_by(state: dict, kind: str, folder: bool) -> str:
    if folder:
        return "checkpoints.py import"
    text = KINDS[kind][1]
    if "optimizer" not in state:  # then nothing can be resumed
        text = text.replace("--resume or --init_from", "--init_from")
        text = text.replace("--resume, with --eval to evaluate", "--eval --resume")
    return text


# -- export ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def export(path: str, out: str, to: str, pos_embed_init: str = "zero") -> float:
    """Write `out` for another library; returns the largest difference between both models' outputs on two images.

    Raises ValueError for weights that the other library's model cannot hold, and where the outputs differ too much.
    """
    suffixes = {"safetensors": (".safetensors",), "timm": (".safetensors", ".pth"), "hf": ("",)}.get(to, (".pth",))
    if not out.endswith(suffixes):
        raise ValueError(f"--to {to} writes {' or '.join(suffixes)}, found {out}")
    state = read(path)
    source = models.model_of(state, path)
    if to == "encoder":
        state, source = encoder_of(state, source, path)
    elif to != "safetensors" and "pos_embed" not in state["model"]:
        table = torch.zeros(1, source.num_prefix + source.patch_embed.num_patches, source.dim)
        state["model"]["pos_embed"] = checkpoint.new_pos_embed(table, source.grid, pos_embed_init)
        if pos_embed_init != "zero":  # it computes something else than the source: the check is of the rest
            source = models.model_of(state, path)
    state["args"]["input_size"] = list(source.img_size)
    a = architecture(state, path)
    state["args"] |= stored_flags(source, a)
    if a.decoder_depth and to == "hf" and "norm_pix_loss" not in state["args"]:
        print(f"{path} does not say whether its target was normalised: norm_pix_loss is written as false")
    full = a.decoder_depth > 0 and to != "timm"
    with appears_whole(out, path) as partial:
        theirs, name, usage = WRITERS[to](state, a, source, path, partial)
        difference = largest_difference(source, theirs, full)
        refuse_above_limit(difference, path, name)
    what = "predicted patches" if full else "logits" if a.classes else "tokens"
    print(f"wrote {out}; largest difference to the {what} of {name}: {difference:.2g}\n{usage.format(out=out)}")
    return difference


def encoder_of(state: dict, source, path: str):
    """The encoder alone and its model. The norm that a mean of tokens went through becomes the norm of each token."""
    weights = {k.replace("fc_norm.", "norm."): v for k, v in state["model"].items()
               if not k.startswith((*DECODER, "head."))}
    encoder = {"model": weights, "args": state["args"]}
    if isinstance(source, models_mae_pl.MaskedAutoencoderViT):
        return encoder, source
    source.num_classes = 0
    if source.fc_norm is not None:
        source.norm = source.fc_norm
    return encoder, source


def stored_flags(source, a: Architecture) -> dict:
    """What a file of weights cannot show, in the flags stored beside it."""
    out = {"in_chans": a.in_chans, "patch_size": list(a.patch_size), "pos_label": "none",
           "pos_embed": "learned" if a.pos_embed else "none", "num_heads": source.blocks[0].attn.num_heads}
    if a.decoder_depth:
        out["decoder_heads"] = source.decoder_blocks[0].attn.num_heads
    return out


def write_ours(state, a, source, path, partial):
    checkpoint.save_atomic(state, partial)
    return reloaded(partial, a), "the model read back", ("load it with main_finetune.py or main_linprobe.py --finetune {out}")


def write_mae(state, a, source, path, partial):
    """Without positional labels and with an embedding our models are MAE's, name by name."""
    checkpoint.save_atomic(state, partial)
    usage = "--eval --resume {out}" if a.classes else "--finetune {out}"
    if a.decoder_depth:
        usage += ", main_pretrain.py with --init_from {out} --pos_embed sincos --pos_label none"
    return reloaded(partial, a), "the plain MAE model", f"facebookresearch/mae and this toolkit load it with {usage}"


def write_safetensors(state, a, source, path, partial):
    from safetensors.torch import save_file

    notes = {k: json.dumps(v) for k, v in state.items() if k != "model"}
    save_file({k: v.contiguous() for k, v in state["model"].items()}, partial, metadata=notes)
    return reloaded(partial, a), "the model read back", "--finetune, --init_from and --eval --resume take {out}"


def reloaded(file: str, a: Architecture):
    """The model in a file of ours -> its outputs as a function."""
    model = models.model_of(checkpoint.load(file), file)
    return lambda images, noise: outputs(model, images, noise, full=a.decoder_depth > 0)


def write_timm(state, a, source, path, partial):
    from safetensors.torch import load_file, save_file

    weights = {k: v.contiguous() for k, v in state["model"].items() if not k.startswith(DECODER)}
    options = timm_options(a, source.blocks[0].attn.num_heads, source.img_size)
    if partial.endswith(".pth"):
        torch.save(weights, partial)
        weights = torch.load(partial, weights_only=True)
    else:
        save_file(weights, partial)
        weights = load_file(partial)
    usage = "timm.create_model('vit_base_patch16_224', checkpoint_path='{out}', " + ", ".join(
        f"{k}={v!r}" for k, v in options.items()) + ")"
    return timm_outputs(weights, options), "timm's VisionTransformer", usage


def write_hf(state, a, source, path, partial):
    heads = models.heads_of(a, state["args"])[:2]
    name = hf_folder(state["model"], a, heads, bool(state["args"].get("norm_pix_loss")), path, partial, state.get("classes"))
    extra = ", add_pooling_layer=False" if name == "ViTModel" else ""
    return (hf_outputs(partial, a.decoder_depth > 0, a.classes), f"transformers' {name}",
            f"transformers.{name}.from_pretrained('{{out}}'{extra})")


# Each writes `partial` and returns the outputs of the model read back from it, that model's name, and how to load it.
WRITERS = {"encoder": write_ours, "mae": write_mae, "timm": write_timm, "hf": write_hf, "safetensors": write_safetensors}


# -- import ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def import_file(path: str, out: str) -> float:
    """Write a file of ours from MAE's, timm's, Hugging Face's or DINO's; returns the largest difference, as `export`.

    Files that transformers did not write are compared with timm's Vision Transformer: a decoder is read, but not compared.
    """
    if not out.endswith(".pth"):
        raise ValueError(f"import writes .pth, found {out}")
    state = read(path)
    if "pos_label" in state["args"]:
        raise ValueError(f"{path} is a file of this toolkit already: inspect says which command takes it")
    model = models.model_of(state, path)
    state["args"]["input_size"] = list(model.img_size)
    eps = state["args"].pop("layer_norm_eps", 1e-6)
    a = architecture(state, path)
    size, *_ = models_mae_pl.name_and_heads(a.dim, a.depth, a.decoder_dim, a.patch_size[0])
    name = f"{'mae_' if a.decoder_depth else ''}vit_{size}_patch{a.patch_size[0]}"
    state["args"] |= stored_flags(model, a)
    if name in models.MODELS | models_mae_pl.MODELS:
        state["args"]["model"] = name
    full = a.decoder_depth > 0 and os.path.isdir(path)
    with appears_whole(out, path) as partial:
        checkpoint.save_atomic(state, partial)
        ours = models.model_of(checkpoint.load(partial), partial)
        if os.path.isdir(path):
            theirs, library = hf_outputs(path, full, a.classes), "transformers'"
        else:
            options = timm_options(a, model.blocks[0].attn.num_heads, model.img_size)
            theirs, library = timm_outputs(state["model"], options), "timm's"
        difference = largest_difference(ours, theirs, full)
        note = f" (layer_norm_eps {eps:g}, ours 1e-06)" if eps != 1e-6 else ""  # matters for tokens of small variance
        refuse_above_limit(difference, path, f"{library} model{note}")
    known = state["args"].get("model")
    print(f"wrote {out}; largest difference to the outputs of {library} model: {difference:.2g}\n"
          + (f"--model {known}" if known else f"no model of ours has its size: {a.depth} blocks of {a.dim}"))
    print(describe(out))
    return difference


def main(args) -> int:
    if args.command == "inspect":
        for path in args.files:
            print(describe(path))
    elif args.command == "export":
        export(args.file, args.out, args.to, args.pos_embed_init)
    else:
        import_file(args.file, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, ARGS))
