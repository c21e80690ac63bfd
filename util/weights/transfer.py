"""Weights of one model as the start of another."""

import re

import torch

from layers.pos_embed import resize_pos_embed, sincos_2d
from util.weights.checkpoint import describe_mismatch, load_strict
from util.weights.files import SO_VIT, check_kind, encoder_weights, kind_of, numbers, square_grid


def init_encoder(model: torch.nn.Module, state: dict, path: str, pos_embed_init: str) -> str:
    """Load a pretrained encoder into a classifier of the same architecture; returns one line on what was done.

    Decoder and mask token are left behind, and of Swin's, So-ViT's and timm's classifiers the head. A positional embedding
    of another grid is resized (bicubic, height and width apart); a checkpoint without one leaves `model.pos_embed` at
    `pos_embed_init`: zero, sincos or normal (0.02). A patch embedding of other channels is adapted as timm does. The label
    head is taken over where it fits. Raises ValueError for the wrong kind of file and for weights that do not fit.
    """
    kind, notes = kind_of(state), []
    own, found = model.state_dict(), encoder_weights(state)
    if kind == "self-distillation":
        notes.append("the teacher's weights")
    elif kind == "classifier" and (
        any(k in found for k in SO_VIT) or not any(k.startswith("blocks.") for k in found)
    ):
        # Only of a plain Vision Transformer there are encoders by themselves, which checkpoints.py exports.
        found = {k: v for k, v in found.items() if not k.startswith("head")}
        notes.append("of a classifier, whose head is left behind")
    elif kind != "pretraining":
        check_kind(state, path, "encoder")
    if "pos_embed" in own:
        if "pos_embed" in found:
            prefix = 1 + ("dist_token" in found)
            grid = _grid_of(state, found["pos_embed"].shape[1] - prefix)
            table = resize_pos_embed(found["pos_embed"], grid, model.grid)
            # DeiT's second token is new, and so is its place, which patches come after.
            more = table.new_zeros(1, max(0, own["pos_embed"].shape[1] - table.shape[1]), table.shape[2])
            found["pos_embed"] = torch.cat([table[:, :prefix], more, table[:, prefix:]], dim=1)
            notes.append(
                "positional embedding from the checkpoint"
                + (f", resized from {grid} to {model.grid}" if grid != model.grid else "")
            )
        elif not model.pos_embed.requires_grad:  # nothing could learn it from another start
            found["pos_embed"] = own["pos_embed"]
            notes.append("the checkpoint has no positional embedding: the fixed sine-cosine one")
        else:
            found["pos_embed"] = new_pos_embed(model.pos_embed, model.grid, pos_embed_init)
            notes.append(f"the checkpoint has no positional embedding: a new one, {pos_embed_init}")
    first = next((k for k in ("patch_embed.stem.0.weight", "patch_embed.proj.weight") if k in found), "")
    weight = found.get(first)
    if weight is not None and weight.shape[1] != model.in_chans:
        found[first] = adapt_channels(weight, model.in_chans)
        notes.append(f"patch embedding adapted from {weight.shape[1]} to {model.in_chans} channels")
    heads = {k for k in own if k.startswith(("head", "fc_norm.", "pos_head.", "dist_token"))}
    anew = misfits(own, found, heads)
    found = {k: v for k, v in found.items() if k not in anew}
    if "fc_norm.weight" in own and any(k.startswith("pos_head.") for k in found.keys() & own.keys()):
        # MAE starts a new norm after the mean; a label head that goes on needs the norm that it has learned with.
        found |= {f"fc_{k}": v for k, v in found.items() if k.startswith("norm.")}
    found = {
        k: v for k, v in found.items() if k in own or not k.startswith(("norm.", "pos_embed", "pos_head."))
    }
    problem = describe_mismatch({k: v for k, v in own.items() if k not in heads or k in found}, found)
    if problem:
        made_by = (state.get("args") or {}).get("model")
        raise ValueError(
            f"the encoder in {path} does not fit --model: {problem}"
            + (f". It was made with --model {made_by}" if made_by else "")
            + "; choose the classifier of the same size and patch"
        )
    model.load_state_dict(found, strict=False)
    new = sorted({k.split(".")[0] for k in heads - found.keys()})
    return "; ".join([*notes, f"new: {', '.join(new) or 'nothing'}"])


def misfits(own: dict, found: dict, heads: set[str]) -> set[str]:
    """Of the parameters `heads` those that start anew: not in the file, or of another shape there.

    Where a hidden layer of a label head does, all of that head does: its other layers have learned behind it.
    """
    anew = {k for k in heads if k not in found or found[k].shape != own[k].shape}
    labels = tuple(k.partition("fc")[0] for k in anew if k.startswith("pos_head.") and ".fc" in k)
    return anew | {k for k in heads if k.startswith(labels)}


def adapt_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """A patch embedding (C, c, ph, pw) for another number of channels, which answers the same to grey images.

    timm's rule for 3 channels, for any number: for one channel the sum, for more the old ones in turn, scaled.
    """
    old = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(channels) % old] * (old / channels)


def init_from(model: torch.nn.Module, state: dict, path: str) -> str:
    """Load a whole pretraining checkpoint into a model with other labels, embedding or image size; one line on what is new.

    Fixed tables are the model's own, a learned one is resized, and heads of labels and relations that the file lacks, or has
    in another shape, start anew. Raises ValueError for the wrong kind of file and where anything else differs.
    """
    own, found = model.state_dict(), dict(state["model"])
    heads = tuple(k for k in (*own, *found) if k.startswith(("pos_head.", "sr_")))
    kept = misfits(own, found, {k for k in heads if k in own})
    kept |= {
        name for name, p in model.named_parameters() if name.endswith("pos_embed") and not p.requires_grad
    }
    notes = []
    if "pos_embed" in own and "pos_embed" not in kept:
        if "pos_embed" in found:
            grid = _grid_of(state, found["pos_embed"].shape[1] - 1)
            found["pos_embed"] = resize_pos_embed(found["pos_embed"], grid, model.grid)
        else:
            kept.add("pos_embed")
    elif "pos_embed" in found and "pos_embed" not in own:
        notes.append("its positional embedding is left out")
    found = {
        k: v
        for k, v in found.items()
        if k not in kept and not (k not in own and (k in heads or k == "pos_embed"))
    }
    load_strict(model, state | {"model": found}, path, kept)
    new = sorted(
        {k.split(".")[0] for k in kept if k in heads or (k == "pos_embed" and model.pos_embed.requires_grad)}
    )
    return "; ".join([*notes, f"new: {', '.join(new) or 'nothing'}"])


def new_parameters(pretrained: dict | None) -> set[str]:
    """What a pretrained encoder does not bring: a positional embedding, where it had none, and DeiT's second token."""
    return (
        {"pos_embed", "dist_token"} - encoder_weights(pretrained).keys() if pretrained is not None else set()
    )


def _grid_of(state: dict, cells: int) -> tuple[int, int]:
    """The grid (h, w) of a checkpoint's positional embedding: from its flags, else a square."""
    args = state.get("args") or {}
    size, patch = numbers(args.get("input_size")), re.search(r"patch(\d+)", str(args.get("model", "")))
    if size and (args.get("patch_size") or patch):
        ph, *pw = numbers(args.get("patch_size")) or [int(patch[1])]
        grid = size[0] // ph, size[-1] // (pw[-1] if pw else ph)
        if grid[0] * grid[1] == cells:
            return grid
    return square_grid(cells)


def new_pos_embed(table: torch.Tensor, grid: tuple[int, int], init: str) -> torch.Tensor:
    """A positional embedding (1, prefix + L, C) like `table`, made anew: zero, sincos, or normal with std 0.02."""
    prefix = table.shape[1] - grid[0] * grid[1]
    if init == "sincos":
        return sincos_2d(table.shape[2], grid, prefix)
    return torch.zeros_like(table) if init == "zero" else torch.randn_like(table) * 0.02
