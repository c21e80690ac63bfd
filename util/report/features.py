"""Charts of patch tokens, drawn by matplotlib without a display: data in, Figures out.

Legend: N images, h w grid cells, H W pixels. Cells are numbered row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from util.report.charts import COLOURS, MARKERS
from util.report.labels import chart_text

# Patches on each side of a neighbour that its crop shows.
MARGIN = 2
FRAME = "#FF2D2D"


@dataclass(frozen=True)
class PositionCurve:
    """The figures of one file: a value for each of `layers`; accuracies and shares are in percent.

    `chance` is that of the cell accuracy.
    """

    name: str
    layers: Sequence[int]
    row_r2: Sequence[float]
    column_r2: Sequence[float]
    cell_accuracy: Sequence[float]
    explained: Sequence[float]
    chance: float


# Attribute of `PositionCurve` -> the title of its panel.
_PANELS = {
    "row_r2": "row, held-out R²",
    "column_r2": "column, held-out R²",
    "cell_accuracy": "right cells, %",
    "explained": "variance explained by the cell, %",
}


def position_audit(curves: Sequence[PositionCurve], title: str) -> Figure:
    """A panel for each figure over layers: a line for each file, chance dashed."""
    height = 3.4 + 0.2 * len(curves)
    figure = Figure(figsize=(3.4 * len(_PANELS), height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = list(figure.subplots(1, len(_PANELS)))
    for axes, (figure_name, name) in zip(panels, _PANELS.items()):
        levels = {0.0}
        if figure_name == "cell_accuracy":
            levels = {curve.chance for curve in curves}
        for level in levels:
            axes.axhline(level, color="grey", linestyle="--", linewidth=1)
        for i, curve in enumerate(curves):
            marker = MARKERS[i // len(COLOURS) % len(MARKERS)] or "."
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(
                curve.layers,
                getattr(curve, figure_name),
                color=colour,
                marker=marker,
                label=chart_text(curve.name),
            )
        _style(axes, name)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", fontsize=8, frameon=False, title="dashed: chance"
    )
    return figure


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("layer (0: patch embedding)", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def components(images: np.ndarray, maps: np.ndarray, title: str) -> Figure:
    """Images (N, H, W, 3) in [0, 1], each beside its map (N, h, w, 3) of the same size on paper."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.4 * columns, 1.75 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(rows, 2 * columns, squeeze=False)
    height, width = images.shape[1:3]
    for panel in axes.flat:
        panel.axis("off")
    for i, (image, colours) in enumerate(zip(images, maps)):
        left = axes[i // columns, i % columns * 2]
        left.imshow(image, interpolation="nearest")
        right = axes[i // columns, i % columns * 2 + 1]
        # Patches may be no squares.
        right.imshow(colours, interpolation="nearest", extent=(0, width, height, 0))
    return figure


class PatchView(NamedTuple):
    """A patch of an image (H, W, 3) in [0, 1], and the text above it."""

    image: np.ndarray
    cell: int
    text: str


def window(cell: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left, right, in pixels of an image of `size`, of a crop around a cell.

    It has MARGIN cells on each side, and is moved to lie within the image.
    """
    edges = []
    for place, cells, pixels in zip(divmod(cell, grid[1]), grid, size):
        shown = min(cells, 2 * MARGIN + 1)
        first = min(max(place - MARGIN, 0), cells - shown)
        edges += [round(first * pixels / cells), round((first + shown) * pixels / cells)]
    top, bottom, left, right = edges
    return top, bottom, left, right


def neighbours(rows: Sequence[Sequence[PatchView]], grid: tuple[int, int], title: str) -> Figure:
    """A row for each query: its whole image, then crops around its neighbours, each patch in a frame."""
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.6 * columns, 1.75 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for panels, views in zip(figure.subplots(len(rows), columns, squeeze=False), rows):
        for panel in panels:
            panel.axis("off")
        for i, (panel, view) in enumerate(zip(panels, views)):
            _draw_patch(panel, view, grid, whole=i == 0)
    return figure


def _draw_patch(axes: Axes, view: PatchView, grid: tuple[int, int], whole: bool) -> None:
    height, width = view.image.shape[:2]
    axes.imshow(view.image, interpolation="nearest", extent=(0, width, height, 0))
    row, column = divmod(view.cell, grid[1])
    cell_height = height / grid[0]
    cell_width = width / grid[1]
    corner = column * cell_width, row * cell_height
    axes.add_patch(Rectangle(corner, cell_width, cell_height, fill=False, edgecolor=FRAME, linewidth=1.5))
    if not whole:
        top, bottom, left, right = window(view.cell, grid, (height, width))
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)
    axes.set_title(view.text, fontsize=7)
