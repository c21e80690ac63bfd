"""Segmentation by retrieval: patches get the labels of their nearest patches of the training images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from util.data.contract import Batches
from util.data.segments.dataset import SegmentDataset
from util.evaluate.segments.patch_memory import PatchMemory
from util.evaluate.segments.sources import POSITION, Sources, as_rows, training_patches
from util.train.setup import Setup

# Rows of a memory that are read at a time.
_ROWS = 65536


@dataclass(frozen=True)
class Neighbours:
    """How patches vote: the number of neighbours, the temperature, and the most patches in a memory."""

    k: int
    temperature: float
    capacity: int
    seed: int = 0

    def name(self, source: str) -> str:
        """Return the name of a row of the table: the source of features, and who votes."""
        if source == POSITION:
            return f"{source}/cell"
        return f"{source}/k{self.k}"


@torch.no_grad()
def remember(
    sources: Sources, loader: Batches[SegmentDataset], setup: Setup, neighbours: Neighbours
) -> list[PatchMemory]:
    """Return a memory of the patches of all training images for each source, the same on all ranks.

    The loader has each image once, of one size, and masks of that size.
    """
    classes = len(loader.dataset.classes)
    cells = sources.backbone.grid[0] * sources.backbone.grid[1]
    capacity = min(neighbours.capacity, cells * len(loader.dataset))
    widths = sources.widths()
    memories = [PatchMemory(width, classes, capacity, setup.device, seed=neighbours.seed) for width in widths]
    for features, labels, numbers in training_patches(sources, loader, setup):
        for memory, part in zip(memories, features.split(widths, dim=1)):
            memory.add(part, labels, numbers)
    for memory in memories:
        memory.gather()
    return memories


def scores_of(
    sources: Sources, memories: list[PatchMemory], neighbours: Neighbours
) -> Callable[[Tensor], Tensor]:
    """Return a function from images (B, C, H, W) to the scores of all sources, (B, G * K, h, w)."""
    widths = sources.widths()
    votes = [_votes(name, memory, neighbours) for name, memory in zip(sources.names, memories)]

    def scores(images: Tensor) -> Tensor:
        maps = sources(images)
        b, _, h, w = maps.shape
        rows = [as_rows(part).flatten(0, 1) for part in maps.split(widths, dim=1)]
        found = [vote(part) for vote, part in zip(votes, rows)]  # (B * h * w, K) each
        return torch.cat([each.reshape(b, h, w, -1).permute(0, 3, 1, 2) for each in found], dim=1)

    return scores


def _votes(source: str, memory: PatchMemory, neighbours: Neighbours) -> Callable[[Tensor], Tensor]:
    """Return a function from features (m, d) of a source to scores (m, K)."""
    if source == POSITION:
        # All patches of a cell are equally near. The first k of them would be those of a few images.
        means = mean_labels(memory)
        return lambda rows: rows.float() @ means
    return lambda rows: memory.scores(rows, neighbours.k, neighbours.temperature)


def mean_labels(memory: PatchMemory) -> Tensor:
    """Return the mean labels (d, K) of the patches of each cell; their features are the one-hot cell (d,).

    Cells without a patch get zeros.
    """
    features, labels = memory.features, memory.labels
    total = torch.zeros(features.shape[1], labels.shape[1], device=features.device)
    count = torch.zeros(features.shape[1], 1, device=features.device)
    for cells, shares in zip(features.split(_ROWS), labels.split(_ROWS)):
        total += cells.float().t() @ shares.float()
        count += cells.float().sum(0)[:, None]
    return total / count.clamp(min=1)
