"""Charts of runs, positions and attention, drawn by matplotlib without a display: data in, Figures out.

Legend: N images, h w grid cells, H W pixels. Cells are numbered row by row.
"""

import base64
import io
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from util.report.runs import Aggregate, RunRecord

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BEHIND = "#B0B0B0"
MARKERS = ("", "^", "s", "x", "D")  # of the first seven points, the next seven, ...
NOT_CURVES = {"epoch", "grad_norm", "img_per_s", "data_wait", "mfu", "n_parameters", "lr", "loss"}


def curves(runs: list[RunRecord], references: Sequence[RunRecord] = ()) -> Figure:
    """A panel per metric over epochs: training solid, validation dashed, chance dotted; references grey, behind.

    With references there is a panel for each metric of the runs, and only where there are no runs one for theirs.
    ValueError where there is neither.
    """
    if not (runs or references):
        raise ValueError("no runs to draw: give folders with a log.txt, or --reference")
    runs, references = (runs, references) if runs else (references, ())
    names = {
        k.split("_", 1)[1]
        for run in runs
        for line in run.log
        for k in line
        if k.startswith(("train_", "test_"))
    }
    names = sorted(names - NOT_CURVES) or ["loss"]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    points = list(dict.fromkeys(run.point for run in runs))  # seeds of a point share a colour
    looks = {
        point: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}
        for i, point in enumerate(points)
    }
    labels = [Line2D([], [], markersize=4, **looks[point]) for point in points]
    if references:
        names_behind = list(dict.fromkeys(run.point for run in references))
        points = [
            *points,
            "reference: " + (names_behind[0] if len(names_behind) == 1 else f"{len(names_behind)} settings"),
        ]
        labels.append(Line2D([], [], color=BEHIND))
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.4 + 0.1 * len(points)), layout="constrained")
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names):
        for run, behind in [*((run, True) for run in references), *((run, False) for run in runs)]:
            for prefix, style in (("train_", "-"), ("test_", "--")):
                line = [
                    (epoch["epoch"] + 1, epoch[prefix + name]) for epoch in run.log if prefix + name in epoch
                ]
                if line:
                    look = {"color": BEHIND, "marker": ""} if behind else dict(looks[run.point])
                    look["marker"] = look["marker"] or ("." if len(line) < 15 else "")
                    axes.plot(
                        *zip(*line),
                        style,
                        **look,
                        markevery=max(1, len(line) // 15),
                        linewidth=1.0 if behind else 1.2,
                        markersize=4 if look["marker"] != "." else None,
                    )
        for level in sorted(
            {line[f"chance_{name}"] for run in runs for line in run.log if f"chance_{name}" in line}
        ):
            axes.axhline(level, color="grey", linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain(axes, name, "epochs done")
    for axes in list(figure.axes)[len(names) :]:
        axes.remove()
    figure.legend(
        labels,
        points,
        loc="outside lower left",
        fontsize=8,
        ncols=2,
        frameon=False,
        title="solid: training, dashed: validation, dotted: chance",
        title_fontsize=8,
        alignment="left",
    )
    return figure


def sweep(groups: dict[str, list[Aggregate]], flag: str, metric: str, chance: float | None) -> Figure:
    """A metric against a flag: a dot per seed, a line through the means, bars from the lowest seed to the highest."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    ticks = sorted({row.x for rows in groups.values() for row in rows}, key=str)
    numeric = all(isinstance(x, (int, float)) for x in ticks)
    place = {x: x if numeric else i for i, x in enumerate(ticks)}
    for colour, (others, rows) in zip(COLOURS * 9, groups.items()):
        x = [place[row.x] for row in rows]
        mean = np.array([row.mean for row in rows])
        spread = [
            mean - [min(row.values) for row in rows],
            np.array([max(row.values) for row in rows]) - mean,
        ]
        seeds = max(len(row.values) for row in rows)
        label = ", ".join(
            part
            for part in (others, f"mean of {seeds} seeds, lowest to highest" if seeds > 1 else "one seed")
            if part
        )
        axes.errorbar(x, mean, spread, color=colour, marker="o", capsize=3, label=label)
        for at, row in zip(x, rows):
            axes.plot([at] * len(row.values), row.values, ".", color=colour, alpha=0.5)
    if not numeric:
        names = [str(x) for x in ticks]
        axes.set_xticks(
            list(place.values()), names, rotation=90 if len("".join(names)) > 50 else 0
        )  # they would overlap
    if chance is not None:
        axes.axhline(chance, color="grey", linestyle=":", label=f"chance {chance:.4g}")
    _plain(axes, f"{metric} in the last epoch", flag)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _plain(axes, title, below):
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(below, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def positions(
    images: np.ndarray,
    true: np.ndarray,
    said: np.ndarray,
    per_cell: np.ndarray,
    confusions: list[tuple[str, np.ndarray, int]],
    grid: tuple[int, int],
    title: str,
) -> Figure:
    """What a label head says: an arrow on each patch to the cell that was named; accuracy per cell; confusions.

    images (N, H, W, 3) in [0, 1]; true and said (N, n) cells, empty (N, 0) without absolute labels; per_cell (h, w)
    accuracies, nan where nothing was seen; confusions: (name, (k, k) with rows that add up to 1, true down, said across,
    the value of the first row and column).
    """
    shown = len(images) if true.shape[1] else 0
    below = 1 + len(confusions)
    columns = max(shown, below)
    figure = Figure(figsize=(3 * columns, 2.8 * (1 + (shown > 0)) + 0.3), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1 + (shown > 0), columns, squeeze=False)
    for i in range(shown):
        _arrows(axes[0, i], images[i], true[i], said[i], grid)
    heat = axes[-1, 0].imshow(100 * per_cell, vmin=0, cmap="viridis")
    axes[-1, 0].set_title("accuracy per cell, %", fontsize=9)
    figure.colorbar(heat, ax=axes[-1, 0], shrink=0.8)
    for panel, (name, table, first) in zip(axes[-1, 1:], confusions):
        low, high = first - 0.5, first + len(table) - 0.5
        heat = panel.imshow(100 * table, vmin=0, cmap="viridis", extent=(low, high, high, low))
        panel.set_title(f"{name}, % of the true one", fontsize=9)
        panel.set_xlabel("said", fontsize=8)
        panel.set_ylabel("true", fontsize=8)
        figure.colorbar(heat, ax=panel, shrink=0.8)
    for panel in axes[-1, :below]:
        panel.tick_params(labelsize=7)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in [*axes[0, shown:], *axes[-1, below:]] if shown else []:
        panel.axis("off")
    return figure


def _arrows(axes, image, true, said, grid):
    """From the middle of each visible patch to the cell that was named; a green ring where that is its own."""
    height, width = image.shape[0] / grid[0], image.shape[1] / grid[1]
    axes.imshow(image)
    axes.axis("off")

    def middle(cell):
        return (cell % grid[1] + 0.5) * width - 0.5, (cell // grid[1] + 0.5) * height - 0.5

    right = true == said
    (x, y), (to_x, to_y) = middle(true[~right]), middle(said[~right])
    axes.quiver(
        x, y, to_x - x, to_y - y, angles="xy", scale_units="xy", scale=1, color=COLOURS[1], width=0.008
    )
    axes.scatter(*middle(true[right]), s=60, facecolors="none", edgecolors="#00FF9C", linewidths=2)
    axes.set_title(f"{right.sum()} of {len(true)} patches right", fontsize=9)


def attention(images: np.ndarray, maps: np.ndarray, title: str) -> Figure:
    """A row per image: the image, the mean over heads, each head. images (N, H, W, 3) in [0, 1]; maps (N, heads, h, w)."""
    heads = maps.shape[1]
    figure = Figure(figsize=(1.5 * (2 + heads), 1.6 * len(images) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for row, image, own in zip(figure.subplots(len(images), 2 + heads, squeeze=False), images, maps):
        row[0].imshow(image)
        for axes, part, name in zip(
            row[1:], [own.mean(0), *own], ["all heads", *(f"head {i}" for i in range(heads))]
        ):
            axes.imshow(part, cmap="viridis", vmin=0)
            axes.set_title(name, fontsize=8)
        for axes in row:
            axes.axis("off")
    return figure


def save(figure: Figure, path: str) -> str:
    """Write a PNG (or what the suffix says); folders that are missing are made."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def data_uri(figure: Figure) -> str:
    """The figure as an SVG in a data: URI, for a page that needs no other file."""
    out = io.BytesIO()
    figure.savefig(out, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
