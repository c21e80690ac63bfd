"""Files of weights: reading them without running code, and telling from keys and shapes what they hold."""

import argparse
import contextlib
import json
import os
import pathlib
import pickle
import pickletools
import re
import zipfile
from dataclasses import dataclass

import torch

# kind -> (what to call it, the flags that take it)
KINDS = {
    "pretraining": (
        "a full pretraining checkpoint (encoder and decoder)",
        "main_pretrain.py --resume or --init_from; main_finetune.py and main_linprobe.py --finetune; visualize.py",
    ),
    "self-distillation": (
        "a SERE checkpoint (student and teacher)",
        "main_sere.py --resume; main_finetune.py and main_linprobe.py --finetune, which take the teacher",
    ),
    "encoder": ("an encoder without decoder and heads", "main_finetune.py and main_linprobe.py --finetune"),
    "classifier": (
        "a fine-tuned classifier",
        "main_finetune.py --resume, with --eval to evaluate; its encoder alone, made by checkpoints.py export "
        "--to encoder, is for --finetune",
    ),
    "probe": ("a linear probe", "main_linprobe.py --resume"),
    "huggingface": ("a Hugging Face file", "checkpoints.py import, with its folder"),
    "dino": ("a DINO-style file of student and teacher", "checkpoints.py import"),
    "unknown": ("a file of weights that no command here knows", "none of the commands here"),
}
# What is no part of the plain Vision Transformer and its decoder: heads of pretraining objectives.
LABEL_HEADS = ("pos_head.", "sr_", "ibot_head.")
SO_VIT = ("head.pool.start", "patch_embed.stem.0.weight")  # a second-order head, a convolutional embedding


def load(path: str) -> dict:
    """Load a checkpoint without running any code in it; tensors on the CPU.

    MAE's own files, which pickle an argparse.Namespace with pathlib paths, load too. Raises ValueError that says what
    is wrong: no file, an empty or truncated one, or one that would run code (with the names it asked for).
    """
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        near = sorted(f for f in os.listdir(folder) if f.endswith(".pth")) if os.path.isdir(folder) else []
        raise ValueError(f"no checkpoint at {path}" + (f"; {folder} has {', '.join(near)}" if near else ""))
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty: the run that wrote it was cut off; use another checkpoint")
    if path.endswith(".safetensors"):
        return _load_safetensors(path)
    # Python 3.13 moved pathlib's classes; files name them as the Python that wrote them did.
    paths = (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.Path)
    allowed = [
        argparse.Namespace,
        *((c, f"{home}.{c.__name__}") for c in paths for home in ("pathlib", "pathlib._local")),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if zipfile.is_zipfile(path):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        else:
            names = _names_in_pickle(path)
        names = {n for n in names if not n.startswith(("argparse.", "pathlib."))}
        if names:
            raise ValueError(
                f"{path} is refused: loading it would run code; it asks for {', '.join(sorted(names))}. "
                "Checkpoints hold tensors and plain values only: re-save its 'model' entry where you trust the file"
            ) from None
        raise ValueError(
            f"{path} is no checkpoint: its pickle cannot be read as tensors and plain values"
        ) from None
    except Exception as e:  # damaged files fail in many ways, and the remedy is one
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} is truncated or no checkpoint ({reason}): use another one") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dictionary of weights")
    state = _unwrap(state, path)
    if isinstance(state.get("args"), argparse.Namespace):
        state["args"] = {
            k: v if isinstance(v, (int, float, bool, type(None))) else str(v)
            for k, v in vars(state["args"]).items()
        }
    return state


def _names_in_pickle(path: str) -> set[str]:
    """What an old-style file, up to five pickles in a row, would import; nothing is run."""
    names, texts = set(), []
    with open(path, "rb") as f, contextlib.suppress(ValueError, IndexError):
        for _ in range(5):
            for op, value, _ in pickletools.genops(f):
                if op.name == "GLOBAL":
                    names.add(value.replace(" ", "."))
                elif op.name == "STACK_GLOBAL":
                    names.add(".".join(texts[-2:]))
                elif isinstance(value, str):
                    texts.append(value)
    return names


def _load_safetensors(path: str) -> dict:
    """Weights, and the flags and names of classes that `checkpoints.py export` leaves beside them as JSON."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            weights, notes = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is truncated or no safetensors file ({e}): use another one") from None
    return {"model": weights} | {k: json.loads(notes[k]) for k in ("args", "classes") if k in notes}


def _unwrap(state: dict, path: str) -> dict:
    """Find the weights where others put them: at the top, in 'state_dict' (timm), in 'teacher' (DINO)."""
    if "model" not in state and state and all(torch.is_tensor(v) for v in state.values()):
        return {"model": state}
    entry = next(
        (k for k in ("model", "state_dict", "teacher", "student") if isinstance(state.get(k), dict)), None
    )
    if entry is None:
        raise ValueError(
            f"{path} has no entry 'model'; it has {', '.join(map(str, list(state)[:8])) or 'nothing'}"
        )
    # DistributedDataParallel puts its own name in front, and DINO trains one.
    return state | {"model": {k.removeprefix("module."): v for k, v in state[entry].items()}}


def kind_of(state: dict) -> str:
    """A key of KINDS, from the names of the weights."""
    keys = state["model"].keys()
    if any(k.startswith("ibot_head.") for k in keys):
        return "self-distillation"
    if any(k.startswith("decoder_") for k in keys):
        return "pretraining"
    if "head.0.running_mean" in keys or any(re.match(r"head\.\d+\.", k) for k in keys):
        return "probe"
    if any(re.fullmatch(r"head\.(fc\.|fc_visual\.)?weight", k) for k in keys):  # fc: of a second-order head
        return "classifier"
    if any(k.startswith(("blocks.", "patch_embed.")) for k in keys):
        return "encoder"
    if any(".attention.attention.query." in k for k in keys):
        return "huggingface"
    return "dino" if any(k.startswith("backbone.") for k in keys) else "unknown"


def evaluated_weights(state: dict) -> dict:
    """The weights that a checkpoint is evaluated with: their moving average where the run kept one."""
    if "ema" not in state:
        return state["model"]
    return {k.removeprefix("module."): v for k, v in state["ema"].items() if k != "n_averaged"}


def encoder_weights(state: dict) -> dict:
    """The weights of a pretrained encoder in a checkpoint: of self-distillation the teacher's, which is what its authors
    evaluate; pixel decoder, prototypes, relation heads and mask token stay behind."""
    weights = (
        state["teacher"]
        if kind_of(state) == "self-distillation" and "teacher" in state
        else evaluated_weights(state)
    )
    return {
        k: v for k, v in weights.items() if not k.startswith(("decoder_", "mask_token", "ibot_head.", "sr_"))
    }


def check_kind(state: dict, path: str, wanted: str) -> None:
    """ValueError that names the right flag unless a checkpoint is of the wanted kind."""
    kind = kind_of(state)
    if kind != wanted:
        has = f" (it has {', '.join(list(state['model'])[:4])})" if kind == "unknown" else ""
        raise ValueError(
            f"{path} is {KINDS[kind][0]}{has}, not {KINDS[wanted][0]}: it is for {KINDS[kind][1]}"
        )


@dataclass(frozen=True)
class Architecture:
    """A plain Vision Transformer as its weights show it. Sizes are (H, W); 0 stands for a part that is not there.

    `img_size` is None where neither flags nor a table of positions tell it: then any size goes.
    """

    dim: int
    depth: int
    mlp_ratio: float
    patch_size: tuple[int, int]
    in_chans: int
    img_size: tuple[int, int] | None
    decoder_dim: int
    decoder_depth: int
    classes: int
    pool: str
    pos_embed: bool
    labels: tuple[str, ...]


def architecture(state: dict, path: str) -> Architecture:
    """Read off the weights (and the image size off the flags); ValueError where they are no plain Vision Transformer."""
    weights = state["model"]
    if "patch_embed.proj.weight" not in weights or "blocks.0.attn.qkv.weight" not in weights:
        raise ValueError(
            f"{path} is {KINDS[kind_of(state)][0]} that holds no plain Vision Transformer; it has "
            + ", ".join(list(weights)[:4])
        )
    other = [k for k in SO_VIT if k in weights]
    if other or "blocks.0.attn.qkv.bias" not in weights:
        raise ValueError(
            f"{path} has parts of So-ViT ({', '.join(other) or 'no attn.qkv.bias'}), which a plain Vision "
            "Transformer lacks"
        )
    dim, in_chans, ph, pw = weights["patch_embed.proj.weight"].shape
    decoder = weights.get("decoder_embed.weight")
    return Architecture(
        dim=dim,
        depth=_depth(weights, "blocks."),
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        patch_size=(ph, pw),
        in_chans=in_chans,
        img_size=_img_size(state, (ph, pw)),
        decoder_dim=0 if decoder is None else decoder.shape[0],
        decoder_depth=_depth(weights, "decoder_blocks."),
        classes=weights["head.weight"].shape[0] if "head.weight" in weights else 0,
        pool="avg" if "fc_norm.weight" in weights else "cls",
        pos_embed="pos_embed" in weights,
        labels=tuple(sorted({k.split(".")[1] for k in weights if k.startswith("pos_head.")})),
    )


def _depth(weights, prefix):
    return 1 + max(
        (int(k.removeprefix(prefix).split(".")[0]) for k in weights if k.startswith(prefix)), default=-1
    )


def _img_size(state, patch):
    """(H, W) from the flags where they fit the tables of positions, else from the tables, taken as square."""
    weights = state["model"]
    rows = [weights[k].shape[1] for k in ("pos_embed", "decoder_pos_embed") if k in weights]
    prefix = 1 + ("dist_token" in weights)
    cells = rows[0] - prefix if rows else None
    if cells is None and "pos_head.apl.classifier.weight" in weights:
        cells = weights["pos_head.apl.classifier.weight"].shape[0]
    size = numbers((state.get("args") or {}).get("input_size"))
    if size and cells in (None, (size[0] // patch[0]) * (size[-1] // patch[1])):
        return size[0], size[-1]
    if cells is None:
        return None
    h, w = square_grid(cells)
    return h * patch[0], w * patch[1]


def numbers(value) -> list[int]:
    """The whole numbers in a stored flag, which is a number, a list, or (from others' files) text."""
    return [int(x) for x in re.findall(r"\d+", str(value))]


def square_grid(cells: int) -> tuple[int, int]:
    """(side, side) of a square grid; ValueError where it cannot be one."""
    side = round(cells**0.5)
    if side * side != cells:
        raise ValueError(
            f"cannot tell the grid of a positional embedding with {cells} cells: the checkpoint has no "
            "--input_size"
        )
    return side, side


def parameters(weights: dict[str, torch.Tensor]) -> int:
    """How many numbers the weights are."""
    return sum(v.numel() for v in weights.values())
