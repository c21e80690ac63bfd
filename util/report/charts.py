"""Charts of runs, positions and attention, drawn by matplotlib without a display: data in, Figures out.

Legend: N images, n visible patches, h w grid cells, H W pixels. Cells are numbered row by row.
"""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from util.report.aggregate import Aggregate, is_number
from util.report.labels import LONGEST_TICK, chart_text
from util.report.runs import RunRecord

# Okabe and Ito's palette, whose colours colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BEHIND = "#B0B0B0"
# Of the first seven points, the next seven, and so on: colours alone would repeat.
MARKERS = ("", "^", "s", "x", "D")
NOT_CURVES = {"epoch", "grad_norm", "img_per_s", "data_wait", "mfu", "n_parameters", "lr", "loss"}
# A foreign log.txt may have any number of figures.
MOST_PANELS = 60
# A curve of fewer epochs shows each of them as a dot.
FEW_EPOCHS = 15


@dataclass(frozen=True)
class Look:
    """Colour and marker of a point's curves; their width is in points."""

    color: str
    marker: str = ""
    width: float = 1.2


def curves(runs: Sequence[RunRecord], references: Sequence[RunRecord] = ()) -> Figure:
    """A panel per metric over epochs: training solid, validation dashed, chance dotted, references grey.

    The panels show the metrics of `runs`, or of the references if there are no runs. Raises ValueError if
    there is neither.
    """
    if not runs:
        runs = references
        references = ()
    if not runs:
        raise ValueError("no runs to draw: give folders with a log.txt, or `references`")
    all_metrics = _curve_names(runs)
    metrics = all_metrics[:MOST_PANELS]
    looks = _looks(runs)
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    # The legend below the panels grows with its entries.
    entries = len(looks) + bool(references)
    height = 3.2 * rows + 0.4 + 0.1 * entries
    figure = Figure(figsize=(4.2 * columns, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, metric in zip(panels, metrics):
        # First, so that they lie behind.
        for run in references:
            _draw_curves(axes, run, metric, Look(BEHIND, width=1.0))
        for run in runs:
            _draw_curves(axes, run, metric, looks[run.point])
        for level in _chance_levels(runs, metric):
            axes.axhline(level, color="grey", linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain(axes, _curve_title(metric, runs), "epochs done")
    for axes in panels[len(metrics) :]:
        axes.remove()
    title = "solid: training, dashed: validation, dotted: chance"
    if len(all_metrics) > MOST_PANELS:
        title += f"; the first {MOST_PANELS} of {len(all_metrics)} figures"
    _legend(figure, looks, references, title)
    return figure


def _curve_names(runs: Sequence[RunRecord]) -> list[str]:
    """The metrics of training and validation, without their prefix."""
    keys = {key for run in runs for line in run.log for key in line}
    names = {key.partition("_")[2] for key in keys if key.startswith(("train_", "test_"))}
    # The total loss is worth a panel only if a run logs none of its parts.
    return sorted(names - NOT_CURVES) or ["loss"]


def _curve_title(metric: str, runs: Sequence[RunRecord]) -> str:
    """The name of a panel, which says so if its figure is of a token that no run's loss reads."""
    if metric == "effective_rank_cls" and not any(_learns_class_token(run) for run in runs):
        return f"{metric} (no loss reads this token)"
    return metric


def _learns_class_token(run: RunRecord) -> bool:
    # Self-distillation logs this loss, even if its weight is 0. Masked autoencoders have none.
    return any("train_cls" in line for line in run.log) and run.flags.get("cls_weight") not in (0, "0", "0.0")


def _looks(runs: Sequence[RunRecord]) -> dict[str, Look]:
    """A look for each point, which its seeds share."""
    looks: dict[str, Look] = {}
    for run in runs:
        i = len(looks)
        look = Look(COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)])
        looks.setdefault(run.point, look)
    return looks


def _draw_curves(axes: Axes, run: RunRecord, metric: str, look: Look) -> None:
    for prefix, style in (("train_", "-"), ("test_", "--")):
        key = prefix + metric
        points = [(line["epoch"] + 1, line[key]) for line in run.log if key in line]
        if not points:
            continue
        # Dots would hide a long curve, and a short one is hard to see without them.
        marker = look.marker
        size = 4.0
        if not marker and len(points) < FEW_EPOCHS:
            marker = "."
            size = 6.0  # matplotlib's default
        axes.plot(
            *zip(*points),
            style,
            color=look.color,
            marker=marker,
            markevery=max(1, len(points) // FEW_EPOCHS),
            linewidth=look.width,
            markersize=size,
        )


def _chance_levels(runs: Sequence[RunRecord], metric: str) -> list[float]:
    key = f"chance_{metric}"
    return sorted({line[key] for run in runs for line in run.log if key in line})


def _legend(figure: Figure, looks: dict[str, Look], references: Sequence[RunRecord], title: str) -> None:
    labels = [chart_text(point) for point in looks]
    # Not those of the curves: a point may have no curve in the first panel.
    handles = [Line2D([], [], markersize=4, color=look.color, marker=look.marker) for look in looks.values()]
    if references:
        points = {run.point for run in references}
        # All references look the same, so that they have one entry.
        name = f"{len(points)} settings"
        if len(points) == 1:
            (name,) = points
        labels.append(chart_text(f"reference: {name}"))
        handles.append(Line2D([], [], color=BEHIND))
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        fontsize=8,
        ncols=2,
        frameon=False,
        title=title,
        title_fontsize=8,
        alignment="left",
    )


def sweep(groups: dict[str, list[Aggregate]], flag: str, metric: str, chance: float | None) -> Figure:
    """A metric against a flag: a dot per seed, a line through the means, bars over the range of the seeds.

    `groups` is the result of `aggregate`: each group of other flags is a line of its own.
    """
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    # As text, because a flag may have numbers and words as values.
    values = sorted({row.x for rows in groups.values() for row in rows}, key=str)
    numeric = all(map(is_number, values))
    # Values that are not numbers stand side by side, in the order of their names.
    places: dict = {x: i for i, x in enumerate(values)}
    if numeric:
        places = {x: x for x in values}
    for colour, (others, rows) in zip(cycle(COLOURS), groups.items()):
        _draw_sweep(axes, [places[row.x] for row in rows], rows, others, colour)
    if not numeric:
        _name_ticks(axes, places)
    if chance is not None:
        axes.axhline(chance, color="grey", linestyle=":", label=f"chance {chance:.4g}")
    _plain(axes, f"{metric} in the last epoch", flag)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _draw_sweep(axes: Axes, x: list[float], rows: list[Aggregate], others: str, colour: str) -> None:
    mean = np.array([row.mean for row in rows])
    lowest = np.array([min(row.values) for row in rows])
    highest = np.array([max(row.values) for row in rows])
    seeds = max(len(row.values) for row in rows)
    label = "one seed"
    if seeds > 1:
        label = f"mean of {seeds} seeds, lowest to highest"
    if others:
        label = f"{others}, {label}"
    bars = [mean - lowest, highest - mean]
    axes.errorbar(x, mean, bars, color=colour, marker="o", capsize=3, label=chart_text(label))
    for place, row in zip(x, rows):
        axes.plot([place] * len(row.values), row.values, ".", color=colour, alpha=0.5)


def _name_ticks(axes: Axes, places: dict) -> None:
    names = [chart_text(str(x), LONGEST_TICK) for x in places]
    rotation = 0
    if len("".join(names)) > 50:
        # Side by side they would overlap.
        rotation = 90
    axes.set_xticks(list(places.values()), names, rotation=rotation)


def _plain(axes: Axes, title: str, below: str) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        formatter = axis.get_major_formatter()
        # Ticks that are names have another formatter.
        if isinstance(formatter, ScalarFormatter):
            # Otherwise values that differ little are written as differences from a number in the corner.
            formatter.set_useOffset(False)
    axes.set_title(chart_text(title), fontsize=10)
    axes.set_xlabel(chart_text(below), fontsize=9)
    axes.grid(alpha=0.25)
    # A frame without its upper and right side.
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


class Confusion(NamedTuple):
    """A confusion matrix (k, k): targets down, predictions across.

    Rows add up to 1, or to 0 for values that are never a target. `first` is the value of the
    first row and column.
    """

    name: str
    shares: np.ndarray
    first: int


def positions(
    images: np.ndarray,
    target: np.ndarray,
    predicted: np.ndarray,
    per_cell: np.ndarray,
    confusions: list[Confusion],
    grid: tuple[int, int],
    title: str,
) -> Figure:
    """The predictions of a label head: arrows from patches to predicted cells, accuracy per cell, confusions.

    images (N, H, W, 3) in [0, 1]; target and predicted (N, n) cells, which are (N, 0) for relative labels:
    then no images are drawn; per_cell (h, w) accuracies in [0, 1], nan for cells that no patch came from.
    """
    # The upper row has the images, the lower one the matrices.
    shown = len(images)
    if not target.shape[1]:
        shown = 0
    rows = 1 + (shown > 0)
    below = 1 + len(confusions)
    columns = max(shown, below)
    figure = Figure(figsize=(3 * columns, 2.8 * rows + 0.3), layout="constrained")
    figure.suptitle(chart_text(title), fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i in range(shown):
        _arrows(axes[0, i], images[i], target[i], predicted[i], grid)
    heat = axes[-1, 0].imshow(100 * per_cell, vmin=0, cmap="viridis")
    axes[-1, 0].set_title("accuracy per cell, %", fontsize=9)
    figure.colorbar(heat, ax=axes[-1, 0], shrink=0.8)
    for panel, confusion in zip(axes[-1, 1:], confusions):
        _draw_confusion(figure, panel, confusion)
    for panel in axes[-1, :below]:
        panel.tick_params(labelsize=7)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    if shown:
        # One of the two rows is shorter than the other.
        for panel in [*axes[0, shown:], *axes[-1, below:]]:
            panel.axis("off")
    return figure


def _draw_confusion(figure: Figure, axes: Axes, confusion: Confusion) -> None:
    # Pixel centres are whole numbers, so that ticks name the values.
    low = confusion.first - 0.5
    high = confusion.first + len(confusion.shares) - 0.5
    heat = axes.imshow(100 * confusion.shares, vmin=0, cmap="viridis", extent=(low, high, high, low))
    axes.set_title(f"{confusion.name}, % of the true one", fontsize=9)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("true", fontsize=8)
    figure.colorbar(heat, ax=axes, shrink=0.8)


def _arrows(
    axes: Axes, image: np.ndarray, target: np.ndarray, predicted: np.ndarray, grid: tuple[int, int]
) -> None:
    """An arrow from each visible patch to its predicted cell, or a green ring if that is its own cell."""
    cell_height = image.shape[0] / grid[0]
    cell_width = image.shape[1] / grid[1]
    axes.imshow(image)
    axes.axis("off")

    def centres(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # The centre of the first pixel is 0, not 0.5.
        x = (cells % grid[1] + 0.5) * cell_width - 0.5
        y = (cells // grid[1] + 0.5) * cell_height - 0.5
        return x, y

    right = target == predicted
    x, y = centres(target[~right])
    to_x, to_y = centres(predicted[~right])
    axes.quiver(
        x, y, to_x - x, to_y - y, angles="xy", scale_units="xy", scale=1, color=COLOURS[1], width=0.008
    )
    axes.scatter(*centres(target[right]), s=60, facecolors="none", edgecolors="#00FF9C", linewidths=2)
    axes.set_title(f"{right.sum()} of {len(target)} patches right", fontsize=9)


def attention(images: np.ndarray, maps: np.ndarray, title: str, image_title: str = "") -> Figure:
    """A row per image: the image, the mean over heads, each head.

    images (N, H, W, 3) in [0, 1]; maps (N, heads, h, w). Each map's colours go from 0 to
    its own largest value. `image_title` stands above the images.
    """
    # Two more columns: the image, and the mean over heads.
    heads = maps.shape[1]
    # Inches: a square for each map, and the title.
    figure = Figure(figsize=(1.5 * (2 + heads), 1.6 * len(images) + 0.5), layout="constrained")
    figure.suptitle(chart_text(title), fontsize=10)
    names = ["all heads", *(f"head {i}" for i in range(heads))]
    for row, image, image_maps in zip(figure.subplots(len(images), 2 + heads, squeeze=False), images, maps):
        row[0].imshow(image)
        row[0].set_title(image_title, fontsize=8)
        for axes, values, name in zip(row[1:], [image_maps.mean(0), *image_maps], names):
            axes.imshow(values, cmap="viridis", vmin=0)
            axes.set_title(name, fontsize=8)
        for axes in row:
            axes.axis("off")
    return figure


def save(figure: Figure, path: str) -> str:
    """Write the figure in the format of the path's suffix, and create missing folders. Returns the path."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def data_uri(figure: Figure) -> str:
    """The figure as an SVG in a data: URI, for a page that needs no other file."""
    # SVG stays sharp at any size of the page.
    out = io.BytesIO()
    figure.savefig(out, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
