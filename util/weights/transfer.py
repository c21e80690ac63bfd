"""Starts a classifier from a pretrained encoder, and a pretraining from another one."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layers.classifier import Classifier
from layers.pos_embed import resize_pos_embed, sincos_2d
from layers.vit import ViTBackbone
from util.weights.architecture import foreign_parts, square_grid, whole_numbers
from util.weights.checkpoint import describe_mismatch, load_strict
from util.weights.defaults import fitting
from util.weights.types import Checkpoint
from util.weights.validate import shown

Weights = dict[str, Tensor]

# Parts of a classifier that a pretrained encoder may lack. They then keep their initial values.
_CLASSIFIER_HEADS = ("head", "fc_norm.", "pos_head.", "dist_token")
_PRETRAINING_HEADS = ("pos_head.", "sr_")


def init_encoder(
    model: Classifier, checkpoint: Checkpoint, pos_embed_init: str, classes: list[str] | None = None
) -> str:
    """Load a pretrained encoder into a classifier of the same architecture; returns a line on what was done.

    - Decoder, mask token and the heads of DINO, iBOT and SERE are left out.
    - A classifier is an encoder, too. Its head goes on if the model has the same head and the file the same
      `classes`, or as many without names; None leaves the head out.
    - A positional embedding of another grid is resized (bicubic, height and width separately). If the
      checkpoint lacks it, a learned one starts as `pos_embed_init` says: zero, sincos or normal (std 0.02).
    - A patch embedding of other channels is adapted as in timm.
    - The label heads are taken over if they fit.

    Raises ValueError for the wrong kind of file, and if the weights do not fit.
    """
    weights = _pretrained_encoder(model, checkpoint)
    _check_parts(weights, model, checkpoint)
    weights, head = _fit_class_head(weights, model, checkpoint, classes)
    weights, position = _fit_pos_embed(weights, model, checkpoint.args, pos_embed_init)
    weights, channels = _fit_channels(weights, model)
    weights = _leave_out_unfit_heads(weights, model)
    weights = _carry_norm_with_label_head(weights, model)
    weights = _leave_out_unused(weights, model)
    heads = _names(model.state_dict(), _CLASSIFIER_HEADS)
    _check_fit(weights, model, heads - weights.keys(), checkpoint)
    # Not strict: new heads stay as they were initialised.
    model.load_state_dict(weights, strict=False)
    notes = [note for note in (_origin(checkpoint), head, position, channels) if note]
    return "; ".join([*notes, _new_note(heads - weights.keys())])


def _origin(checkpoint: Checkpoint) -> str:
    """Whose weights are taken from a file that holds several models."""
    if checkpoint.kind == "self-distillation":
        return "the teacher's weights"
    return checkpoint.origin


def _pretrained_encoder(model: Classifier, checkpoint: Checkpoint) -> Weights:
    """The file's weights under the model's names. Raises ValueError for the wrong kind of file."""
    stored = checkpoint.encoder_weights()
    try:
        weights = model.own_names(stored)
    except ValueError as e:
        raise ValueError(f"the encoder in {checkpoint.path} does not fit `model`: {e}") from None
    needed = {name for name in model.state_dict() if not name.startswith(_CLASSIFIER_HEADS)}
    kinds = ("pretraining", "self-distillation", "dino", "classifier", "encoder", "segmenter")
    # Names that are the model's own need no kind: timm's models have many.
    if checkpoint.kind not in kinds and not needed <= weights.keys():
        checkpoint.check_kind("encoder")
    if checkpoint.kind not in ("classifier", "probe", "segmenter") or "fc_norm.weight" not in weights:
        return weights
    if "fc_norm.weight" in model.state_dict():
        return weights
    # The norm after the mean becomes that of each token.
    return {k.replace("fc_norm.", "norm."): v for k, v in weights.items()}


def _check_parts(weights: Weights, model: Classifier, checkpoint: Checkpoint) -> None:
    """Raise ValueError if the file has a part, such as LayerScale, that the model does not have."""
    expected = model.state_dict()
    unknown = {k: v for k, v in weights.items() if k not in expected and not k.startswith("head")}
    parts = foreign_parts(unknown)
    if parts:
        raise ValueError(
            f"the encoder in {checkpoint.path} does not fit `model`: it has {', '.join(parts)}; choose the "
            "model that it was made with, a timm/NAME perhaps"
        )


def _fit_class_head(
    weights: Weights, model: Classifier, checkpoint: Checkpoint, classes: list[str] | None
) -> tuple[Weights, str]:
    """Keep the class head of a file if it answers the same question, or leave it out."""
    stored = _names(weights, ("head",))
    if not stored:
        return weights, ""
    body = {k: v for k, v in weights.items() if k not in stored}
    expected = model.state_dict()
    fits = stored == _names(expected, ("head",)) and not misfits(expected, weights, stored)
    # The head of a mean does not read a class token.
    pooled = _pools_the_mean(checkpoint.encoder_weights()) == _pools_the_mean(expected)
    if classes is None or not fits or not pooled or checkpoint.classes not in (None, classes):
        return body, "from a classifier, without its head"
    names = "the same classes"
    if checkpoint.classes is None:
        names = f"{len(classes)} outputs, whose classes the file does not name"
    return weights, f"from a classifier, with its head, which has {names}"


def _pools_the_mean(weights: Mapping[str, Tensor]) -> bool:
    """Whether a Vision Transformer's head reads the mean of the tokens, which then has a norm of its own."""
    return "fc_norm.weight" in weights or "backbone.fc_norm.weight" in weights


def _fit_pos_embed(
    weights: Weights, model: Classifier, stored: Mapping[str, Any], init: str
) -> tuple[Weights, str]:
    """Give the weights a positional embedding that fits the model, if the model has one."""
    parameter = dict(model.named_parameters()).get("pos_embed")
    if parameter is None:
        return weights, ""
    table = weights.get("pos_embed")
    if table is not None:
        _check_sizes("pos_embed", table, 3)
        grid = grid_of(stored, table.shape[1] - 1 - ("dist_token" in weights))
        table, note = _resized_pos_embed(table, grid, parameter.shape[1], model.grid)
    elif not parameter.requires_grad:
        # A fixed embedding cannot be learned from another start.
        table = parameter.detach()
        note = "the checkpoint has no positional embedding: the fixed sine-cosine one"
    else:
        table = new_pos_embed(parameter, model.grid, init)
        note = f"the checkpoint has no positional embedding: a new one, {init}"
    return weights | {"pos_embed": table}, note


def _resized_pos_embed(
    table: Tensor, grid: tuple[int, int], tokens: int, new_grid: tuple[int, int]
) -> tuple[Tensor, str]:
    """A stored positional embedding (1, prefix + L, C) of a `grid` for a `new_grid` and a number of `tokens`.

    The second result is a note on what was done.
    """
    prefix = table.shape[1] - grid[0] * grid[1]
    table = resize_pos_embed(table, grid, new_grid)  # (1, prefix + L', C)
    # DeiT's second token is new, and its position is the one before the patches.
    missing = max(0, tokens - table.shape[1])
    more = table.new_zeros(1, missing, table.shape[2])
    note = "positional embedding from the checkpoint"
    if grid != new_grid:
        note += f", resized from {grid} to {new_grid}"
    return torch.cat([table[:, :prefix], more, table[:, prefix:]], dim=1), note


def fit_for_evaluation(model: Classifier, checkpoint: Checkpoint) -> tuple[Checkpoint, str]:
    """The evaluated weights of a classifier, for a model of another image size; and a note on what was done.

    The positional embedding is resized as in `init_encoder`, so that a model can be evaluated on larger
    images than it was trained on (Touvron et al. 2019). All other weights stay.
    """
    weights = dict(checkpoint.evaluated_weights())
    entries = {name: entry for name, entry in checkpoint.entries.items() if name != "ema"}
    note = ""
    expected = model.state_dict().get("pos_embed")
    table = weights.get("pos_embed")
    if expected is not None and table is not None and table.shape != expected.shape:
        _check_sizes("pos_embed", table, 3)
        grid = grid_of(checkpoint.args, table.shape[1] - 1 - ("dist_token" in weights))
        weights["pos_embed"], _ = _resized_pos_embed(table, grid, expected.shape[1], model.grid)
        note = f"positional embedding resized from {grid} to {model.grid}"
    return replace(checkpoint, model=weights, entries=entries), note


def _check_sizes(name: str, weight: Tensor, ndim: int) -> None:
    """Raise ValueError unless a weight that is to be adapted has `ndim` sizes above 0, and real numbers."""
    if weight.ndim != ndim or not weight.numel() or not weight.is_floating_point():
        raise ValueError(
            f"the weight {name} of the pretrained file is {shown(weight)}, expected {ndim} sizes above 0 and "
            "real numbers: use another file"
        )


def _fit_channels(weights: Weights, model: Classifier) -> tuple[Weights, str]:
    """Adapt the patch embedding to the model's number of channels."""
    names = [n for n in ("patch_embed.stem.0.weight", "patch_embed.proj.weight") if n in weights]
    if not names:
        return weights, ""
    name = names[0]
    _check_sizes(name, weights[name], 4)
    if weights[name].shape[1] == model.in_chans:
        return weights, ""
    channels = weights[name].shape[1]
    adapted = adapt_channels(weights[name], model.in_chans)
    note = f"patch embedding adapted from {channels} to {model.in_chans} channels"
    return weights | {name: adapted}, note


def _leave_out_unfit_heads(weights: Weights, model: nn.Module) -> Weights:
    """Leave out heads of another shape, which start anew."""
    # A classifier may have more classes, other labels or another grid than the file.
    expected = model.state_dict()
    unfit = misfits(expected, weights, _names(expected, _CLASSIFIER_HEADS))
    return {k: v for k, v in weights.items() if k not in unfit}


def _carry_norm_with_label_head(weights: Weights, model: nn.Module) -> Weights:
    """Give the norm after the mean the encoder's final norm if a label head is taken over.

    MAE starts a new norm after the mean, but a label head needs the norm that it was trained with.
    """
    expected = model.state_dict()
    takes_label_head = any(k.startswith("pos_head.") for k in weights.keys() & expected.keys())
    if "fc_norm.weight" not in expected or not takes_label_head:
        return weights
    return weights | {f"fc_{k}": v for k, v in weights.items() if k.startswith("norm.")}


def _leave_out_unused(weights: Weights, model: nn.Module) -> Weights:
    """Leave out final norm, positional embedding and label heads if the model does not have them."""
    expected = model.state_dict()
    optional = ("norm.", "pos_embed", "pos_head.")
    return {k: v for k, v in weights.items() if k in expected or not k.startswith(optional)}


def _check_fit(weights: Weights, model: nn.Module, new: Collection[str], checkpoint: Checkpoint) -> None:
    """Raise ValueError unless the weights are all of the model's but the `new` ones."""
    expected = {k: v for k, v in model.state_dict().items() if k not in new}
    problem = describe_mismatch(expected, weights)
    if not problem:
        return
    remedy = fitting(checkpoint, model.state_dict()) or "choose the classifier of the same size and patch"
    raise ValueError(f"the encoder in {checkpoint.path} does not fit `model`: {remedy}; {problem}")


def _names(weights: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> set[str]:
    return {k for k in weights if k.startswith(prefixes)}


def _new_note(names: Collection[str]) -> str:
    """The parts of a model that start anew."""
    parts = sorted({name.split(".")[0] for name in names})
    return f"new: {', '.join(parts) or 'nothing'}"


def misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], heads: set[str]) -> set[str]:
    """The parameters among `heads` that start anew: not in `weights`, or of another shape there.

    If a hidden layer of a label head starts anew, all of that head does: its later layers were trained on
    that layer's outputs.
    """
    unfit = {k for k in heads if k not in weights or weights[k].shape != expected[k].shape}
    labels = tuple(k.partition("fc")[0] for k in unfit if k.startswith("pos_head.") and ".fc" in k)
    return unfit | {k for k in heads if k.startswith(labels)}


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch embedding (C, c, ph, pw) for other channels, with the same outputs for grey images.

    This generalises timm's rule for 3 channels: one channel gets the sum of the old ones, more get the
    old ones in turn, scaled.
    """
    old = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)  # (C, 1, ph, pw)
    return weight[:, torch.arange(channels) % old] * (old / channels)  # (C, channels, ph, pw)


def init_from(model: ViTBackbone, checkpoint: Checkpoint) -> str:
    """Load a whole pretraining checkpoint into a model with other labels, embedding or image size.

    Fixed tables stay the model's own, and a learned one is resized. Heads of labels and relations that the
    file lacks, or has in another shape, start anew. Returns one line on what is new. Raises ValueError for
    the wrong kind of file, and if anything else differs.
    """
    checkpoint.check_kind("pretraining")
    expected = model.state_dict()
    weights = dict(checkpoint.model)
    heads = _names(expected, _PRETRAINING_HEADS)
    new = misfits(expected, weights, heads)
    kept = new | _fixed_tables(model)
    note = ""
    # The encoder's embedding. The decoder's is always a fixed table.
    if "pos_embed" not in expected and "pos_embed" in weights:
        note = "its positional embedding is left out; "
    elif "pos_embed" in expected and "pos_embed" not in kept:
        if "pos_embed" in weights:
            _check_sizes("pos_embed", weights["pos_embed"], 3)
            grid = grid_of(checkpoint.args, weights["pos_embed"].shape[1] - 1)
            weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], grid, model.grid)
        else:
            new.add("pos_embed")
            kept.add("pos_embed")
    # Weights of the file that the model may do without. Others are errors, which `load_strict` reports.
    optional = ("pos_embed", *_PRETRAINING_HEADS)
    weights = {
        k: v for k, v in weights.items() if k not in kept and (k in expected or not k.startswith(optional))
    }
    weights |= {k: expected[k] for k in kept}
    load_strict(model, replace(checkpoint, model=weights))
    return note + _new_note(new)


def _fixed_tables(model: nn.Module) -> set[str]:
    """Names of the positional embeddings that are not learned."""
    return {
        name for name, p in model.named_parameters() if name.endswith("pos_embed") and not p.requires_grad
    }


def new_parameters(pretrained: Checkpoint | None) -> set[str]:
    """The positional embedding and DeiT's second token if the pretrained encoder does not have them."""
    if pretrained is None:
        return set()
    return {"pos_embed", "dist_token"} - pretrained.encoder_weights().keys()


def grid_of(stored: Mapping[str, Any], cells: int) -> tuple[int, int]:
    """The grid (h, w) of a positional embedding of `cells` patches: from the stored flags, else a square."""
    size = whole_numbers(stored.get("input_size"))
    patch = whole_numbers(stored.get("patch_size"))
    # MAE stores no patch size: it is part of the model's name, as in vit_base_patch16.
    in_name = re.search(r"patch([0-9]{1,9})", str(stored.get("model", "")))
    if in_name and not stored.get("patch_size"):
        patch = [int(in_name[1])]
    if size and patch and min(patch) > 0:
        grid = (size[0] // patch[0], size[-1] // patch[-1])
        if grid[0] * grid[1] == cells:
            return grid
    return square_grid(cells)


def new_pos_embed(table: Tensor, grid: tuple[int, int], init: str) -> Tensor:
    """A new positional embedding (1, prefix + L, C) like `table`: zero, sincos, or normal with std 0.02."""
    prefix = table.shape[1] - grid[0] * grid[1]
    if init == "sincos":
        return sincos_2d(table.shape[2], grid, prefix)
    if init == "zero":
        return torch.zeros_like(table)
    return torch.randn_like(table) * 0.02
