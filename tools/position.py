"""The position audit: how much the patch tokens of backbones know about where they are, layer by layer."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from layers.classifier import Classifier
from layers.contract import Backbone
from tools.draw import USUAL, Display, Images
from tools.features import ImageStream, layer_numbers, layer_tokens, load_backbone
from util.evaluate.position import RIDGE, PositionFigures, PositionProjection, audit, gather, is_held_out
from util.files.names import counted
from util.report import features
from util.report.comparison import names_of
from util.report.tables import Table


@dataclass(frozen=True)
class FileAudit:
    """The figures of one file.

    Attributes:
        file: as it was named.
        grid: (h, w) of the patch tokens.
        images: the number of images, without those that are held out.
        held_out: the number of images that R^2 and accuracy are measured on.
        layers: figures by the number of their layer.
    """

    file: str
    grid: tuple[int, int]
    images: int
    held_out: int
    layers: dict[int, PositionFigures]

    @property
    def chance(self) -> float:
        """Percent of right cells by guessing."""
        return 100 / (self.grid[0] * self.grid[1])


def audit_file(path: str, data_path: Images, n: int, display: Display = USUAL) -> FileAudit:
    """Audit a checkpoint, or timm/NAME, on up to n images, every fourth of which is held out.

    Raises ValueError as `load_backbone` and `audit` do, and for a grid of one cell.
    """
    model, flags = load_backbone(path)
    if model.grid == (1, 1):
        raise ValueError(f"the tokens of {path} form a grid of one cell, so there are no positions to audit")
    stream = ImageStream.open(model, flags, data_path, n, display)

    def tokens(images: Tensor) -> list[Tensor]:
        return layer_tokens(model, images)

    train = stream.batches(lambda number: not is_held_out(number))
    found = audit(tokens, train, stream.batches(is_held_out), model.grid)
    if note := stream.note():
        print(note)
    layers = dict(zip(layer_numbers(model, len(found.layers)), found.layers))
    return FileAudit(path, model.grid, found.images, found.held_out, layers)


def position_audit(
    paths: Sequence[str], data_path: Images, n: int, display: Display = USUAL
) -> list[FileAudit]:
    """The audits of several files on the same images, in their order. Prints each one's table."""
    audits = []
    for path in paths:
        found = audit_file(path, data_path, n, display)
        print(table([found]).text(), flush=True)
        audits.append(found)
    return audits


def fit_removal(model: Backbone, flags: dict, data_path: Images, n: int = 1000) -> PositionProjection:
    """The projection that removes the position from a model's patch tokens after its final norm.

    It is fitted to up to n images. Raises ValueError as `gather` and `PositionProjection.fit` do.
    """
    stream = ImageStream.open(model, flags, data_path, n)

    @torch.no_grad()
    def tokens(images: Tensor) -> list[Tensor]:
        found = model.forward_features(images)
        if isinstance(model, Classifier):
            return [model.label_tokens(found)]
        return [found[:, model.num_prefix :]]

    (statistics,) = gather(tokens, stream.batches())
    projection = PositionProjection.fit(statistics)
    removed = projection.basis.shape[1]
    print(
        f"position is in {removed} of {model.dim} directions of the tokens after the final norm, measured on "
        f"{counted(statistics.images, 'image')}"
    )
    return projection


def table(audits: Sequence[FileAudit]) -> Table:
    """A row for each file and layer."""
    header = ("file", "layer", "row R2", "column R2", "right cells %", "chance %", "explained %", "rank")
    rows = []
    for found in audits:
        for layer, figures in found.layers.items():
            rows.append(
                (
                    found.file,
                    str(layer),
                    _number(figures.row_r2, 3),
                    _number(figures.column_r2, 3),
                    _number(figures.cell_accuracy, 1),
                    _number(found.chance, 1),
                    _number(100 * figures.explained, 1),
                    str(figures.rank),
                )
            )
    return Table(header, rows)


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}"


def record(audits: Sequence[FileAudit]) -> dict[str, Any]:
    """The audits as JSON, with what was measured how; a figure that does not exist is null."""
    files = []
    for found in audits:
        layers = [{"layer": layer, **_plain(figures)} for layer, figures in found.layers.items()]
        files.append(
            {
                "file": found.file,
                "grid": list(found.grid),
                "images": found.images,
                "held_out": found.held_out,
                "chance": found.chance,
                "layers": layers,
            }
        )
    return {"ridge": RIDGE, "tokens": "LayerNorm without parameters", "files": files}


def _plain(figures: PositionFigures) -> dict[str, Any]:
    # JSON has no nan.
    return {k: None if math.isnan(v) else v for k, v in asdict(figures).items()}


def chart(audits: Sequence[FileAudit]) -> Figure:
    """The figures over layers, a line for each file, named by the part of its path that tells it apart."""
    names = [found.file for found in audits]
    # One that is named twice keeps its path.
    with suppress(ValueError):
        names = names_of(names)
    curves = []
    for name, found in zip(names, audits):
        figures = list(found.layers.values())
        curves.append(
            features.PositionCurve(
                name,
                list(found.layers),
                [f.row_r2 for f in figures],
                [f.column_r2 for f in figures],
                [f.cell_accuracy for f in figures],
                [100 * f.explained for f in figures],
                found.chance,
            )
        )
    most = max(found.images for found in audits)
    held = max(found.held_out for found in audits)
    title = f"what single patch tokens tell about their cell, by ridge regression on {most} images"
    return features.position_audit(curves, f"{title}; R² and right cells on {held} others")
