"""Look at checkpoints, and hand them on.

    python checkpoints.py inspect FILE...                 # kind, architecture, epoch, which command takes it
    python checkpoints.py export FILE OUT --to timm       # weights for timm's VisionTransformer, checked

An export runs both models on the same images and refuses to write when their outputs differ by more than 1e-4.
"""
import argparse
import sys

from util.args import Parser, pair, run


def get_args_parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, parser_class=argparse.ArgumentParser)
    inspect = commands.add_parser("inspect", help="say what files hold")
    inspect.add_argument("files", nargs="+")
    export = commands.add_parser("export", help="write weights for another library")
    export.add_argument("file")
    export.add_argument("out", help=".safetensors or .pth")
    export.add_argument("--to", choices=["timm"], default="timm")
    return p


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a mistyped flag answer at once.
    ARGS = get_args_parser().parse_args()

import torch

from models import build_classifier
from util import checkpoint

COMMANDS = {
    "pretraining": "main_pretrain.py --resume or --init_from; main_finetune.py and main_linprobe.py --finetune",
    "self-distillation": "main_sere.py --resume; main_finetune.py and main_linprobe.py --finetune, which take the teacher",
    "classifier": "main_finetune.py --resume, with --eval to evaluate",
    "encoder": "main_finetune.py and main_linprobe.py --finetune",
    "unknown": "none of the commands here",
}


def describe(path: str) -> str:
    """One line on what a checkpoint holds and which command takes it."""
    state = checkpoint.load(path)
    kind, args, weights = checkpoint.kind_of(state), state.get("args") or {}, state["model"]
    labels = sorted({k.split(".")[1] for k in weights if k.startswith("pos_head.")})
    parts = [
        kind, f"--model {args['model']}" if "model" in args else "no flags stored",
        f"{sum(v.numel() for v in weights.values()) / 1e6:.2f} M numbers",
        "second-order head" if "head.pool.start" in weights else "",
        f"labels {'+'.join(labels)}" if labels else "no label head",
        "with positional embedding" if "pos_embed" in weights else "without positional embedding",
        f"epoch {state['epoch']}" if "epoch" in state else "",
    ]
    return f"{path}: {', '.join(p for p in parts if p)}; for {COMMANDS[kind]}"


def timm_weights(state: dict, path: str) -> tuple[dict, dict]:
    """Our weights under timm's names, and the keywords of timm's `vit_base_patch16_224` that fit them.

    Decoder and label heads stay behind; a missing positional embedding becomes zeros, which computes the same.
    """
    weights = {k: v for k, v in checkpoint.encoder_weights(state).items() if not k.startswith("pos_head.")}
    args = state.get("args") or {}
    if "patch_embed.proj.weight" not in weights or not any(k.startswith("blocks.") for k in weights):
        raise ValueError(f"{path} holds no plain Vision Transformer: nothing to export to timm's")
    if "dist_token" in weights:
        raise ValueError(f"{path} has a distillation token: timm's plain Vision Transformer has none")
    if "head.pool.start" in weights or "patch_embed.stem.0.weight" in weights or "blocks.0.attn.qkv.bias" not in weights:
        raise ValueError(f"{path} has a second-order head or other parts of So-ViT, which timm's Vision Transformer lacks")
    dim, in_chans, ph, pw = weights["patch_embed.proj.weight"].shape
    size = pair(args.get("input_size", [224]), "--input_size")
    heads = dim // 64
    if "model" in args:  # the number of heads does not show in the weights
        options = {"patch_size": (ph, pw)} if args.get("patch_size") else {}
        heads = build_encoder(args, size, in_chans, options).blocks[0].attn.num_heads
    if "pos_embed" not in weights:
        weights["pos_embed"] = torch.zeros(1, 1 + (size[0] // ph) * (size[1] // pw), dim)
    return weights, dict(
        img_size=size, patch_size=(ph, pw), in_chans=in_chans, embed_dim=dim, num_heads=heads,
        depth=1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks.")),
        num_classes=weights["head.weight"].shape[0] if "head.weight" in weights else 0,
        global_pool="avg" if "fc_norm.weight" in weights else "token",
    )


def build_encoder(args: dict, size: tuple[int, int], in_chans: int, options: dict):
    """Our classifier with the encoder of a checkpoint's --model, whose pretraining name starts with mae_ or sere_."""
    name = args["model"].removeprefix("mae_").removeprefix("sere_").removesuffix("_dec512d8b")
    return build_classifier(name, img_size=size, in_chans=in_chans, **options)


@torch.no_grad()
def export_timm(path: str, out: str) -> float:
    """Write `out` for timm and return the largest difference between both models' outputs on two random images."""
    import timm
    from safetensors.torch import save_file

    state = checkpoint.load(path)
    weights, options = timm_weights(state, path)
    theirs = timm.create_model("vit_base_patch16_224", **options).eval()
    theirs.load_state_dict(weights)
    args = state.get("args") or {}
    name = args.get("model", "vit_base_patch16")
    ours = build_encoder({"model": name}, options["img_size"], options["in_chans"], dict(
        num_classes=options["num_classes"], pool="avg" if options["global_pool"] == "avg" else "cls",
        pos_embed="learned" if "pos_embed" in state["model"] else "none", patch_size=options["patch_size"])).eval()
    ours.load_state_dict({k: v for k, v in weights.items() if k in ours.state_dict()})
    images = torch.randn(2, options["in_chans"], *options["img_size"], generator=torch.Generator().manual_seed(0))
    difference = float((ours(images) - theirs(images)).abs().max())
    if not difference <= 1e-4:
        raise ValueError(f"{path}: our model and timm's differ by {difference:.2g} on the same images: nothing was written")
    weights = {k: v.contiguous() for k, v in weights.items()}
    save_file(weights, out) if out.endswith(".safetensors") else torch.save(weights, out)
    print(f"wrote {out}; largest difference to timm's output {difference:.2g}\n"
          f"timm.create_model('vit_base_patch16_224', checkpoint_path={out!r}, "
          + ", ".join(f"{k}={v!r}" for k, v in options.items()) + ")")
    return difference


def main(args) -> int:
    if args.command == "inspect":
        for path in args.files:
            print(describe(path))
    else:
        export_timm(args.file, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, ARGS))
