"""Pictures of what a model has learned, and of runs."""

import os
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from layers.positional.pairs import relative_labels
from models_mae_pl import MaskedAutoencoderViT, random_masking, sample_noise
from tools.stored_model import model_of
from util.data.datasets import build_dataset
from util.data.loading.loader import collate, some_samples
from util.data.sources.image_index import NoSplit
from util.data.transforms import eval_transform, normalize, unnormalize
from util.flags.groups import channel_stats
from util.report import charts, runs
from util.report import page as report
from util.report.panels import accuracy_map, reconstruction_panel, unnormalize_patches
from util.weights import checkpoint
from util.weights.types import KINDS

BATCH = 50


def load_model(path: str):
    """(model, flags) of a checkpoint; ValueError for files that hold no model of ours or MAE's."""
    state = checkpoint.load(path)
    if state.kind not in ("pretraining", "classifier", "encoder"):
        raise ValueError(
            f"{path} is {KINDS[state.kind][0]}, which cannot be drawn: it is for {KINDS[state.kind][1]}"
        )
    return model_of(state), state.args


def load_images(model, flags: dict, data_path: str, first: int, n: int = 0):
    """Up to n images spread over the validation (else the training) set: batches of (images, keys), and mean and std.

    The first `first` of them are spread, too: data sets are often in the order of their classes.
    """
    stats = channel_stats(
        SimpleNamespace(in_chans=model.in_chans, mean=flags.get("mean"), std=flags.get("std"))
    )
    options = dict(in_chans=model.in_chans, labels=False, evaluation=True)
    transform = eval_transform(tuple(model.img_size))
    try:
        dataset = build_dataset(data_path, "val", transform, **options)
    except NoSplit:
        dataset = build_dataset(data_path, "train", transform, **options)
    samples = [s for s in some_samples(dataset, max(first, n)) if not s["bad"]]
    front = range(0, len(samples), max(1, len(samples) // first))[
        :first
    ]  # places, as a stream's samples have no index
    samples = [samples[i] for i in front] + [s for i, s in enumerate(samples) if i not in front]
    if not samples:
        raise ValueError(f"none of the images in {data_path or 'the demo set'} can be read")
    ends = [first, *range(first + BATCH, len(samples) + BATCH, BATCH)]
    batches = (collate(samples[a:b]) for a, b in zip([0, *ends], ends) if samples[a:b])
    return ((normalize(b["image"], *stats), b["key"]) for b in batches), stats


def as_pixels(images: Tensor, mean, std) -> np.ndarray:
    """Normalised (N, C, H, W) -> (N, H, W, 3) in [0, 1]; one and two channels are shown grey."""
    pixels = (unnormalize(images, mean, std).clamp(0, 255) / 255).permute(0, 2, 3, 1).numpy()
    return pixels[..., [0, 1, 2] if images.shape[1] >= 3 else [0, 0, 0]]


def visible_cells(model, keys: Tensor, mask_ratio: float | None, flags: dict) -> Tensor:
    """(B, n) cells: at a masked autoencoder's mask ratio; all of a classifier's."""
    L = model.patch_embed.num_patches
    if not isinstance(model, MaskedAutoencoderViT):
        return torch.arange(L).expand(len(keys), -1)
    ratio = mask_ratio if mask_ratio is not None else float(flags.get("mask_ratio", 0.75))
    return random_masking(sample_noise(keys, L), ratio)


def label_tokens(model, images: Tensor, ids: Tensor) -> Tensor:
    """Normalised patch tokens (B, n, C) of the visible cells: what label heads read."""
    if isinstance(model, MaskedAutoencoderViT):
        return model.forward_encoder(images, ids)[:, 1:]
    return model.label_tokens(model.forward_features(images))


def visible_stats_patches(pred: Tensor, patches: Tensor, ids_keep: Tensor) -> Tensor:
    """Normalised predictions (N, L, P) with the mean brightness and contrast of each image's visible patches."""
    visible = patches.gather(1, ids_keep[..., None].expand(-1, -1, patches.shape[-1]))  # (N, n, P)
    std = (visible.var(-1, keepdim=True) + 1e-6).sqrt().mean(1, keepdim=True)
    return pred * std + visible.mean((1, 2), keepdim=True)


@torch.no_grad()
def reconstruct(
    path: str, data_path: str, n: int, mask_ratio: float | None, stats: str, norm_pix_loss: bool
) -> np.ndarray:
    """The picture of `util.report.panels.reconstruction_panel` for n images, titled by the statistics that it uses."""
    model, flags = load_model(path)
    if not isinstance(model, MaskedAutoencoderViT):
        raise ValueError(
            f"{path} has no decoder, so there is nothing to reconstruct with: give the full pretraining "
            "checkpoint (checkpoint-last.pth of main_pretrain.py, or MAE's *_full.pth)"
        )
    batches, (mean, std) = load_images(model, flags, data_path, n)
    images, keys = next(batches)
    ids_keep = visible_cells(model, keys, mask_ratio, flags)
    pred, mask = model.predict(images, ids_keep)
    title, patches = "reconstruction", model.patchify(images)
    if flags.get("norm_pix_loss") is None and not norm_pix_loss:
        print(
            f"{path} does not say whether its target was normalised: taken as pixels; --norm_pix_loss if it was"
        )
    if norm_pix_loss or model.norm_pix_loss:
        true = stats == "true"
        title = (
            "reconstruction (uses ground-truth patch mean/std)"
            if true
            else "reconstruction (mean/std of visible patches)"
        )
        pred = unnormalize_patches(pred, patches) if true else visible_stats_patches(pred, patches, ids_keep)
    cells = None
    if model.pos_head is not None and model.pos_head.absolute is not None:
        cells = model.pos_head.absolute.logits(label_tokens(model, images, ids_keep)).argmax(-1)
    return reconstruction_panel(
        unnormalize(images, mean, std) / 255,
        mask,
        unnormalize(model.unpatchify(pred), mean, std) / 255,
        patch_size=model.patch_size,
        grid=model.grid,
        visible_ids=None if cells is None else ids_keep,
        predicted_cells=cells,
        reconstruction_title=title,
    )


def confusion(true: Tensor, said: Tensor, k: int) -> np.ndarray:
    """(k, k) shares of what was said, across, for each true value, down; rows add up to 1, or to 0 where none is."""
    counts = torch.bincount(true.flatten() * k + said.flatten(), minlength=k * k).reshape(k, k).double()
    return (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()


def offsets(codes: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Relative labels -> (row offset + h - 1, column offset + w - 1), both from 0."""
    width = 2 * grid[1] - 1
    return codes.div(width, rounding_mode="floor"), codes % width


@torch.no_grad()
def positions(path: str, data_path: str, n: int, measure: int, mask_ratio: float | None):
    """A chart of what the label head says about unseen images: arrows with absolute labels, offsets with relative ones."""
    model, flags = load_model(path)
    if model.pos_head is None:
        raise ValueError(
            f"{path} has no label head (--pos_label none, or exported without): there are no positions to draw"
        )
    shown_kind = model.pos_head.absolute or next(model.pos_head.children())
    (h, w), absolute = model.grid, not shown_kind.relative
    batches, stats = load_images(model, flags, data_path, n, measure)
    ids, true, said, shown = [], [], [], None
    for images, keys in batches:
        shown = as_pixels(images, *stats) if shown is None else shown
        cells = visible_cells(model, keys, mask_ratio, flags)
        said.append(shown_kind.logits(label_tokens(model, images, cells)).argmax(-1))
        true.append(cells if absolute else relative_labels(model.grid, cells, cells))
        ids.append(cells if absolute else cells[:, :, None].expand_as(true[-1]))
    ids, true, said = (torch.cat(x) for x in (ids, true, said))
    if absolute:
        tables = [
            ("row", confusion(true // w, said // w, h), 0),
            ("column", confusion(true % w, said % w, w), 0),
        ]
    else:
        pairs = zip(
            ("row offset", "column offset"), offsets(true, model.grid), offsets(said, model.grid), (h, w)
        )
        tables = [(name, confusion(t, s, 2 * k - 1), 1 - k) for name, t, s, k in pairs]
    level = model.pos_head.chance(ids.shape[1])
    title = (
        f"{'absolute' if absolute else 'relative'} labels of {len(true)} images, {ids.shape[1]} of {h * w} patches "
        f"visible: {100 * (true == said).double().mean():.1f} % right, chance "
        f"{100 * level.get(f'{shown_kind.name}_acc', level['position_acc']):.1f} %"
    )
    k = len(shown)
    arrows = (true[:k].numpy(), said[:k].numpy()) if absolute else (np.zeros((k, 0), int),) * 2
    return charts.positions(
        shown, *arrows, accuracy_map(true == said, ids, model.grid), tables, model.grid, title
    )


@torch.no_grad()
def attention(path: str, data_path: str, n: int):
    """A chart of the last block's attention from the class token to the patches of whole images, per head."""
    model, flags = load_model(path)
    batches, stats = load_images(model, flags, data_path, n)
    images = next(batches)[0]
    maps = class_attention(model, images).reshape(len(images), -1, *model.grid)
    title = "attention of the class token in the last block; each map from 0 to its own largest"
    return charts.attention(as_pixels(images, *stats), maps.numpy(), title)


def class_attention(model, images: Tensor) -> Tensor:
    """Softmax weights (B, heads, L) of the last block's class token over the patches; its prefix tokens have the rest."""
    last, seen = model.blocks[-1].attn, []
    hook = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    if isinstance(model, MaskedAutoencoderViT):
        model.forward_encoder(images, torch.arange(model.patch_embed.num_patches).expand(len(images), -1))
    else:
        model.forward_features(images)
    hook.remove()
    B, N, C = seen[0].shape
    q, k, _ = last.qkv(seen[0]).reshape(B, N, 3, last.num_heads, C // last.num_heads).permute(2, 0, 3, 1, 4)
    weights = (q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)  # (B, heads, 1, N)
    return weights[:, :, 0, model.num_prefix :]


def sweep(folder: str, out: str, flag: str | None, metric: str | None) -> None:
    """The chart, and its table as Markdown beside it and on the screen."""
    records, swept, missing = runs.read_sweep(folder)
    flag = flag or next((f for f in swept if f != "seed"), "seed")
    if flag not in swept:
        raise ValueError(
            f"--flag {flag} was not swept in {folder}; there are {', '.join(swept) or 'no differences'}"
        )
    found = runs.metrics_of(records, [metric] if metric else None)
    if not found:
        raise ValueError(f"no run in {folder} has a usual figure: name one by --metric")
    metric = found[0]
    groups, chance = runs.aggregate(records, flag, metric), report.chance_of(records, metric)
    table = runs.sweep_table(groups, flag, metric, chance)
    charts.save(charts.sweep(groups, flag, metric, chance), out)
    with open(os.path.splitext(out)[0] + ".md", "w") as f:
        f.write(table + "\n")
    print(table + (f"\nwithout figures so far: {', '.join(missing)}" if missing else ""))


def read_runs(folders: list[str]) -> list[runs.RunRecord]:
    """Of each folder the run, or, where it is a sweep, all of its runs, the seeds of a setting as one point.

    Where two folders have a point of the same name, what tells their paths apart comes before it.
    """
    found = [runs.read_sweep(f)[0] if runs.is_sweep(f) else [runs.read_run(f)] for f in folders]
    paths = [os.path.abspath(f) for f in folders]
    above = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    times = Counter(point for records in found for point in {r.point for r in records})
    out = []
    for path, records in zip(paths, found):
        own = os.path.relpath(path, above)
        names = {r.point: own if r.point == os.path.basename(path) else f"{own}: {r.point}" for r in records}
        out += [r if times[r.point] == 1 else replace(r, point=names[r.point]) for r in records]
    return out
