"""Pictures of what a model has learned, and charts of runs.

Legend: N images, L grid cells, n visible patches, P = patch height * patch width * channels. Cells are
numbered row by row.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from layers.contract import Backbone
from layers.positional.head import PositionalHead
from layers.positional.pairs import relative_labels
from layers.transformer import Attention
from models_mae_pl import MaskedAutoencoderViT, random_masking, sample_noise
from models_vit import VisionTransformer
from tools.stored_model import model_of
from util.data.datasets import ImageDataset, build_dataset
from util.data.formats import IMAGE_SUFFIXES, ReadSettings
from util.data.loading.loader import collate, some_samples
from util.data.pixels import Pixels
from util.data.sources.image_index import ImageIndex, NoSplit
from util.data.sources.listing import from_names
from util.data.survey.headers import survey
from util.data.survey.ranges import Bounds, with_range
from util.data.timm_datasets import TimmDataset
from util.data.transforms import eval_transform
from util.files.atomic import write_text
from util.files.names import counted, printable, printable_lines
from util.flags.groups import channel_stats
from util.report import charts
from util.report.aggregate import aggregate, chance_of, sweep_table
from util.report.panels import (
    Bands,
    PredictedPositions,
    accuracy_map,
    reconstruction_panel,
    unnormalize_patches,
)
from util.report.runs import RunRecord, is_sweep, metrics_of, read_run, read_sweep
from util.weights import checkpoint
from util.weights.types import KINDS

# What `load_model` returns.
Model = MaskedAutoencoderViT | VisionTransformer
# Images that go through the model at once.
BATCH = 50


@dataclass(frozen=True)
class Display:
    """How images are shown.

    Attributes:
        bands: `picture_bands`, the numbers of one or three channels; None for the first ones.
        range: of the values, as flags give it; None for that of the checkpoint.
    """

    bands: Sequence[int] | None = None
    range: Bounds | None = None


USUAL = Display()


def load_model(path: str) -> tuple[Model, dict]:
    """The model of a checkpoint, and the flags stored with it.

    Raises ValueError if the file holds neither a masked autoencoder nor a Vision Transformer.
    """
    state = checkpoint.load(path)
    if state.kind not in ("pretraining", "classifier", "encoder"):
        name, commands = KINDS[state.kind]
        raise ValueError(f"{path} is {name}, which cannot be drawn so: it is for {commands}")
    return model_of(state), state.args


def bands_of(model: Backbone, flags: dict, display: Display) -> Bands:
    """The channels that pictures show: those of `display`, or else those of the run's own pictures."""
    return Bands.of(model.in_chans, display.bands or flags.get("picture_bands"))


# One folder, tar or list of images, or files of images; "" is the demo set.
Images = str | os.PathLike | Sequence[str]


def load_images(
    model: Backbone, flags: dict, data_path: Images, first: int, n: int = 0, display: Display = USUAL
) -> tuple[Iterator[tuple[Tensor, Tensor]], Pixels]:
    """Up to n images spread over the validation set, or over the training set if there is no other.

    Returns batches of (images (B, C, H, W), keys (B,)), and how they were normalised. The first batch has
    `first` images. Raises ValueError if no image can be read, or one that `data_path` names.
    """
    dataset, pixels = open_images(model, flags, data_path, display)
    samples = some_samples(dataset, max(first, n))
    bad = [sample["index"] for sample in samples if sample["bad"]]
    if bad and isinstance(dataset, ImageDataset) and named_files(data_path):
        name = printable(dataset.index.name(bad[0]))
        raise ValueError(f"{name} cannot be read: {printable(dataset.fault(bad[0]))}")
    samples = [sample for sample in samples if not sample["bad"]]
    if not samples:
        raise ValueError(f"none of the images in {data_path or 'the demo set'} can be read")
    samples = _spread_first(samples, first)
    # The first batch is the one that is drawn; the others are measured only.
    starts = [0, *range(first, len(samples), BATCH)]
    batches = (collate(samples[a:b]) for a, b in zip(starts, [*starts[1:], len(samples)]))
    return ((pixels.normalize(batch["image"]), batch["key"]) for batch in batches), pixels


def open_images(
    model: Backbone, flags: dict, data_path: Images, display: Display = USUAL
) -> tuple[ImageDataset | TimmDataset, Pixels]:
    """The images of `load_images` as a data set, and how they are normalised."""
    stats = stats_of(model, flags)
    read = replace(ReadSettings.of(flags), in_chans=model.in_chans)
    dataset = _evaluation_set(model, data_path, read)
    # Nobody gave mean and standard deviation for these images, so that a convention does not apply.
    return dataset, with_range(stats, dataset, display.range, scaled=False, trained=flags)


def stats_of(model: Backbone, flags: dict) -> Pixels:
    """Raises ValueError, for channels that have no usual statistics, if the checkpoint stores none."""
    mean, std = flags.get("mean"), flags.get("std")
    if not (mean and std) and model.in_chans not in (1, 3):
        raise ValueError(
            f"the checkpoint does not store by which mean and std its {model.in_chans} channels were "
            "normalised, and pictures need them: draw a checkpoint of this toolkit, which stores them"
        )
    return Pixels(*channel_stats(model.in_chans, mean, std))


def named_files(data_path: Images) -> list[str]:
    """The paths of a `data_path` that names files of images; [] if it is a data set.

    Raises ValueError for several paths that are not all such files.
    """
    if isinstance(data_path, str | os.PathLike):
        paths: Sequence[str] = [os.fspath(data_path)]
    else:
        paths = data_path
    suffixes = tuple(map(os.fsdecode, IMAGE_SUFFIXES))
    others = [p for p in paths if not p.lower().endswith(suffixes) or os.path.isdir(os.path.expanduser(p))]
    if not others:
        return list(paths)
    if len(paths) > 1:
        raise ValueError(
            f"`data_path` takes one folder, tar or list of images, or any number of image files, and "
            f"{printable(others[0]) or 'an empty path'} is no image file: leave it out, or give it alone"
        )
    return []


def _index_of(files: list[str]) -> ImageIndex:
    """An index of files in the given order, without labels."""
    names = [os.fsencode(os.path.abspath(os.path.expanduser(file))) for file in files]
    return ImageIndex(", ".join(files), "", "image files", from_names(names, sort=False), labels=False)


def _evaluation_set(model: Backbone, data_path: Images, read: ReadSettings) -> ImageDataset | TimmDataset:
    transform = eval_transform(model.img_size)
    files = named_files(data_path)
    if files:
        index = _index_of(files)
        read = replace(read, depth=survey(index, read).depth)
        return ImageDataset(index, transform, read=read, evaluation=True)
    if not isinstance(data_path, str | os.PathLike):
        (data_path,) = data_path

    def split(name: str) -> ImageDataset | TimmDataset:
        return build_dataset(
            data_path,
            name,
            transform,
            read=read,
            labels=False,
            evaluation=True,
        )

    try:
        return split("val")
    except NoSplit:
        return split("train")


def _spread_first(samples: list[dict], first: int) -> list[dict]:
    """Move `first` samples that are spread over all of them to the front."""
    # Data sets are often sorted by class: without this, only the first class would be drawn. These are places
    # in the list, because samples of a stream have no index of their own.
    front = range(0, len(samples), max(1, len(samples) // first))[:first]
    rest = [sample for i, sample in enumerate(samples) if i not in front]
    return [samples[i] for i in front] + rest


def as_pixels(images: Tensor, pixels: Pixels, bands: Bands) -> np.ndarray:
    """Normalised (N, C, H, W) -> (N, H, W, 3) in [0, 1]; one band is shown grey."""
    shown = bands.shown(pixels.unnormalize(images)).expand(-1, 3, -1, -1)  # (N, 1 or 3, H, W)
    return (shown / 255).permute(0, 2, 3, 1).numpy()


def visible_cells(model: Model, keys: Tensor, mask_ratio: float | None, flags: dict) -> Tensor:
    """The cells (B, n) of the model's input: the unmasked ones of a masked autoencoder, all of a classifier.

    The mask ratio is that of training if not given.
    """
    num_patches = model.patch_embed.num_patches
    if not isinstance(model, MaskedAutoencoderViT):
        return torch.arange(num_patches).expand(len(keys), -1)
    if mask_ratio is None:
        mask_ratio = 0.75
        # Files of other programs may store None.
        if flags.get("mask_ratio") is not None:
            mask_ratio = float(flags["mask_ratio"])
    return random_masking(sample_noise(keys, num_patches), mask_ratio)


def label_tokens(model: Model, images: Tensor, ids_keep: Tensor) -> Tensor:
    """Normalised patch tokens (B, n, C) of the visible cells: the input of label heads."""
    if isinstance(model, MaskedAutoencoderViT):
        return model.forward_encoder(images, ids_keep)[:, 1:]
    return model.label_tokens(model.forward_features(images))


def visible_stats_patches(pred: Tensor, patches: Tensor, ids_keep: Tensor) -> Tensor:
    """Undo the normalisation of predictions (N, L, P) by the visible patches' brightness and contrast."""
    visible = patches.gather(1, ids_keep[..., None].expand(-1, -1, patches.shape[-1]))  # (N, n, P)
    # The same epsilon as in MAE's normalisation.
    std = (visible.var(-1, keepdim=True) + 1e-6).sqrt().mean(1, keepdim=True)  # (N, 1, 1)
    return pred * std + visible.mean((1, 2), keepdim=True)


@torch.no_grad()
def reconstruct(
    path: str,
    data_path: Images,
    n: int,
    mask_ratio: float | None,
    stats: str,
    norm_pix_loss: bool,
    display: Display = USUAL,
) -> np.ndarray:
    """The picture of `reconstruction_panel` for n images, as uint8 (H', W', 3).

    A model with a normalised target does not predict brightness and contrast. `stats` says where they come
    from: "true" for each patch's own, "visible" for those of the image's visible patches; the title says so
    too. `norm_pix_loss` declares a normalised target for files without this flag. Raises ValueError if the
    file has no decoder.
    """
    model, flags = load_model(path)
    if not isinstance(model, MaskedAutoencoderViT):
        raise ValueError(
            f"{path} has no decoder, so there is nothing to reconstruct with: give the full pretraining "
            "checkpoint (checkpoint-last.pth of main_pretrain.py, or MAE's *_full.pth)"
        )
    if flags.get("norm_pix_loss") is None and not norm_pix_loss:
        print(
            f"{path} does not say whether its target was normalised, so the prediction is taken as pixels: "
            "pass norm_pix_loss if it was normalised"
        )
    bands = bands_of(model, flags, display)
    batches, pixels = load_images(model, flags, data_path, n, display=display)
    images, keys = next(batches)
    ids_keep = visible_cells(model, keys, mask_ratio, flags)
    pred, mask = model.predict(images, ids_keep)
    title = "reconstruction"
    # Without a normalised target, the prediction has the units of the images already.
    if norm_pix_loss or model.norm_pix_loss:
        pred, title = _unnormalized(pred, model.patchify(images), ids_keep, stats)
    positions = None
    if model.pos_head is not None and model.pos_head.absolute is not None:
        logits = model.pos_head.absolute.logits(label_tokens(model, images, ids_keep))  # (N, n, L)
        positions = PredictedPositions(ids_keep, logits.argmax(-1))
    return reconstruction_panel(
        bands.shown(pixels.unnormalize(images)) / 255,
        mask,
        bands.shown(pixels.unnormalize(model.unpatchify(pred))) / 255,
        patch_size=model.patch_size,
        positions=positions,
        titles=(f"original{bands.note}", title),
    )


def _unnormalized(pred: Tensor, patches: Tensor, ids_keep: Tensor, stats: str) -> tuple[Tensor, str]:
    """A normalised prediction in the units of the images, and a title that names the statistics used."""
    if stats == "true":
        title = "reconstruction (uses ground-truth patch mean/std)"
        return unnormalize_patches(pred, patches), title
    return visible_stats_patches(pred, patches, ids_keep), "reconstruction (mean/std of visible patches)"


@dataclass(frozen=True)
class LabelPredictions:
    """The predictions of a label head for all visible patches of N images.

    Absolute labels: target and predicted cells (N, n). Relative labels: offsets (N, n, n). `ids`, of the same
    shape, is the cell of the patch that each prediction is about (of an offset's first patch).
    """

    kind: str
    relative: bool
    grid: tuple[int, int]
    ids: Tensor
    target: Tensor
    predicted: Tensor

    @property
    def accuracy(self) -> float:
        return (self.target == self.predicted).double().mean().item()

    def confusions(self) -> list[charts.Confusion]:
        """Confusion matrices of rows and of columns."""
        # The matrix of all cells would have L * L entries, too many to read.
        h, w = self.grid
        if not self.relative:
            rows = confusion(self.target // w, self.predicted // w, h)
            columns = confusion(self.target % w, self.predicted % w, w)
            return [charts.Confusion("row", rows, 0), charts.Confusion("column", columns, 0)]
        target_rows, target_columns = offsets(self.target, self.grid)
        rows_predicted, columns_predicted = offsets(self.predicted, self.grid)
        rows = confusion(target_rows, rows_predicted, 2 * h - 1)
        columns = confusion(target_columns, columns_predicted, 2 * w - 1)
        return [
            charts.Confusion("row offset", rows, 1 - h),
            charts.Confusion("column offset", columns, 1 - w),
        ]


def confusion(target: Tensor, predicted: Tensor, size: int) -> np.ndarray:
    """The confusion matrix (size, size): for each target, down, the share of each prediction, across.

    Rows add up to 1, or to 0 for values that are never a target.
    """
    # One code for each (target, predicted) pair, so that a single bincount fills the matrix.
    codes = target.flatten() * size + predicted.flatten()
    counts = torch.bincount(codes, minlength=size * size).reshape(size, size).double()  # (size, size)
    return (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()


def offsets(codes: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Relative labels -> (row offset + h - 1, column offset + w - 1), both from 0."""
    width = 2 * grid[1] - 1
    return codes.div(width, rounding_mode="floor"), codes % width


@torch.no_grad()
def positions(
    path: str,
    data_path: Images,
    n: int,
    measure: int,
    mask_ratio: float | None,
    display: Display = USUAL,
) -> Figure:
    """A chart of a label head's predictions on unseen images.

    Accuracies are measured over `measure` images. For absolute labels, n of them are drawn with arrows.
    Raises ValueError if the model has no label head.
    """
    model, flags = load_model(path)
    if model.pos_head is None:
        raise ValueError(
            f"{path} has no label head (`pos_label` none, or exported without it): no positions to draw"
        )
    bands = bands_of(model, flags, display)
    batches, pixels = load_images(model, flags, data_path, n, measure, display)
    first = next(batches)
    shown = as_pixels(first[0], pixels, bands)  # (n, H, W, 3)
    # A generator: the normalised images of all batches would take several hundred MB.
    seen = (
        (images, visible_cells(model, keys, mask_ratio, flags)) for images, keys in chain([first], batches)
    )
    answers = _predict_labels(model, model.pos_head, seen)
    # Relative labels have no arrows: their chart has no images.
    target = np.zeros((len(shown), 0), int)
    predicted = target
    if not answers.relative:
        target = answers.target[: len(shown)].numpy()
        predicted = answers.predicted[: len(shown)].numpy()
    per_cell = accuracy_map(answers.target == answers.predicted, answers.ids, model.grid)
    title = _positions_title(model.pos_head, answers)
    if not answers.relative:
        title += bands.note
    return charts.positions(shown, target, predicted, per_cell, answers.confusions(), model.grid, title)


def _predict_labels(
    model: Model, head: PositionalHead, batches: Iterable[tuple[Tensor, Tensor]]
) -> LabelPredictions:
    """The predictions for batches of images (B, C, H, W) and their visible cells (B, n)."""
    # A model with both heads is drawn by its absolute labels, which can be shown as arrows.
    kind = head.absolute or next((kind for kind in head.kinds.values() if kind.relative), None)
    if kind is None:
        names = "+".join(head.kinds)
        raise ValueError(f"the labels {names} are neither cells nor offsets: there are no positions to draw")
    ids = []
    target = []
    predicted = []
    for images, cells in batches:
        logits = kind.logits(label_tokens(model, images, cells))
        labels = cells
        if kind.relative:
            labels = relative_labels(model.grid, cells, cells)  # (B, n, n)
            cells = cells[:, :, None]  # (B, n, 1)
        ids.append(cells.expand_as(labels))
        target.append(labels)
        predicted.append(logits.argmax(-1))  # (B, n) or (B, n, n)
    return LabelPredictions(
        kind.name, kind.relative, model.grid, torch.cat(ids), torch.cat(target), torch.cat(predicted)
    )


def _positions_title(head: PositionalHead, answers: LabelPredictions) -> str:
    images, visible = answers.ids.shape[:2]
    # A model with one head calls its chance level position_acc, without the kind.
    levels = head.chance(visible)
    chance = levels.get(f"{answers.kind}_acc", levels["position_acc"])
    name = "absolute"
    if answers.relative:
        name = "relative"
    cells = head.grid[0] * head.grid[1]
    return (
        f"{name} labels of {counted(images, 'image')}, {visible} of {cells} patches visible: "
        f"{100 * answers.accuracy:.1f} % right, chance {100 * chance:.1f} %"
    )


@torch.no_grad()
def attention(path: str, data_path: Images, n: int, display: Display = USUAL) -> Figure:
    """A chart of the last block's attention from the class token to the patches of whole images, per head."""
    model, flags = load_model(path)
    bands = bands_of(model, flags, display)
    batches, pixels = load_images(model, flags, data_path, n, display=display)
    images, _ = next(batches)
    maps = class_attention(model, images).reshape(len(images), -1, *model.grid)  # (N, heads, h, w)
    unread = ""
    if not _is_read(model):
        unread = " (no loss reads it)"
    title = f"attention of the class token{unread} in the last block; each map from 0 to its own largest"
    return charts.attention(as_pixels(images, pixels, bands), maps.numpy(), title, bands.note.lstrip(", "))


def _is_read(model: Model) -> bool:
    """Whether a loss of the model's training reads the output of its class token."""
    # In pretraining only the decoder does, and a classifier may take the mean of the patch tokens.
    return not isinstance(model, MaskedAutoencoderViT) and (model.pool == "cls" or not model.num_classes)


def class_attention(model: Model, images: Tensor) -> Tensor:
    """Attention weights (B, heads, L) of the last block's class token over the patches.

    They add up to less than 1: the softmax also covers the prefix tokens.
    """
    attn = [module for module in model.blocks.modules() if isinstance(module, Attention)][-1]
    inputs: list[Tensor] = []
    hook = attn.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    if isinstance(model, MaskedAutoencoderViT):
        model.forward_encoder(images, torch.arange(model.patch_embed.num_patches).expand(len(images), -1))
    else:
        model.forward_features(images)
    hook.remove()
    # Fused attention kernels do not return the weights, so they are computed again from the block's input.
    B, N, C = inputs[0].shape
    qkv = attn.qkv(inputs[0]).reshape(B, N, 3, attn.num_heads, C // attn.num_heads)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, C / heads)
    weights = (q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)  # (B, heads, 1, N)
    return weights[:, :, 0, model.num_prefix :]


def sweep(folder: str, out: str, flag: str | None, metric: str | None) -> None:
    """Write the chart of a sweep to `out`, and its table as Markdown next to it; print the table too.

    By default the flag is the first swept one that is not the seed, and the metric the first usual one.
    Raises ValueError if the flag was not swept, or if no run has the metric.
    """
    runs, swept, missing = read_sweep(folder)
    flag = flag or next((name for name in swept if name != "seed"), "seed")
    if flag not in swept:
        raise ValueError(
            f"`flag` {flag} was not swept in {folder}; swept: {', '.join(swept) or 'no flag differs'}"
        )
    requested = []
    if metric:
        requested.append(metric)
    metrics = metrics_of(runs, requested)
    if not metrics:
        raise ValueError(f"no run in {folder} has one of the usual figures: name one by `metric`")
    metric = metrics[0]
    groups = aggregate(runs, flag, metric)
    chance = chance_of(runs, metric)
    table = sweep_table(groups, flag, metric, chance).markdown()
    charts.save(charts.sweep(groups, flag, metric, chance), out)
    write_text(os.path.splitext(out)[0] + ".md", table + "\n", follow=True)
    print(printable_lines(table))
    if missing:
        print(f"no figures yet: {', '.join(map(printable, missing))}")


def read_runs(folders: list[str]) -> list[RunRecord]:
    """The runs in several folders, each a run or a sweep; the seeds of a setting have the same point.

    If two folders have a point of the same name, the part of the path in which they differ comes before it.
    """
    if not folders:
        return []
    folders = list(map(_folder_of, folders))
    groups = [_runs_in(folder) for folder in folders]
    paths = [os.path.abspath(folder) for folder in folders]
    # Folders of the same name differ in the path above them.
    parent = os.path.commonpath([os.path.dirname(path) for path in paths])
    times = Counter(point for runs in groups for point in {run.point for run in runs})
    out = []
    for path, runs in zip(paths, groups):
        for run in runs:
            if times[run.point] > 1:
                run = replace(run, point=_point_with_path(run.point, path, parent))
            out.append(run)
    return out


def _folder_of(path: str) -> str:
    """The folder of a run that is given by its log."""
    if os.path.isfile(path):
        return os.path.dirname(path) or "."
    return path


def _runs_in(folder: str) -> list[RunRecord]:
    if is_sweep(folder):
        return read_sweep(folder).runs
    return [read_run(folder)]


def _point_with_path(point: str, path: str, parent: str) -> str:
    prefix = os.path.relpath(path, parent)
    if point == os.path.basename(path):
        return prefix
    return f"{prefix}: {point}"
