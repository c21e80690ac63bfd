"""What a dense probe reads: the tokens of an encoder, and controls that say what their score is worth.

Shapes: B images, C channels, D features, K classes, (h, w) cells.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layers.classifier import Classifier
from layers.segmentation import DenseProbe, patch_maps
from util import dist
from util.data.contract import Batches
from util.data.loading.loader import device_batches
from util.data.loading.memory import available_memory
from util.data.seeding import epoch_and_index
from util.data.segments.dataset import SegmentDataset
from util.evaluate.position import (
    CellStatistics,
    PositionProjection,
    add_position,
    pixel_patches,
    position_only,
)
from util.evaluate.segments.patch_memory import soft_labels
from util.run.guards import BadImages
from util.train.setup import Setup

ENCODER = "encoder"
POSITION = "position"
# In the order of the table.
CONTROLS = (POSITION, "pixels", "random", "without_position", "with_position")


@dataclass(frozen=True)
class Sources:
    """Maps of features of normalised images, of one or several sources.

    Attributes:
        names: of the sources: `ENCODER`, and of `CONTROLS`. "position" is the one-hot cell alone; "pixels"
            are a patch's own values; "random" is an encoder that has learned nothing; "without_position" and
            "with_position" are the encoder's tokens without the subspace that tells positions, and with the
            cell beside them.
        backbone: the frozen encoder, in evaluation mode.
        patch: height and width of a cell in pixels.
        layers: of the tokens, as in `patch_maps`.
        random: the encoder with random weights; needed for its source only.
        projection: needed for "without_position" only.
    """

    names: tuple[str, ...]
    backbone: Classifier
    patch: tuple[int, int]
    layers: Sequence[int] | None = None
    random: Classifier | None = None
    projection: PositionProjection | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> features of all sources, one behind the other, (B, D, h, w) in float32."""
        return torch.cat(self._parts(images), dim=1)

    def blank(self) -> Tensor:
        """Return an image of zeros (1, C, H, W), of the size that the encoder was built for."""
        device = next(self.backbone.parameters()).device
        return torch.zeros(1, self.backbone.in_chans, *self.backbone.img_size, device=device)

    @torch.no_grad()
    def widths(self) -> list[int]:
        """Return the number of features of each source."""
        return [part.shape[1] for part in self._parts(self.blank())]

    def tokens(self, images: Tensor) -> Tensor:
        """Return the encoder's tokens (B, D, h, w) alone, in float32."""
        return patch_maps(self.backbone, images, self.layers).float()

    def _parts(self, images: Tensor) -> list[Tensor]:
        tokens = self.tokens(images)
        return [self._of(name, images, tokens).float() for name in self.names]

    def _of(self, name: str, images: Tensor, tokens: Tensor) -> Tensor:
        if name == ENCODER:
            return tokens
        if name == POSITION:
            return position_only(len(images), (tokens.shape[2], tokens.shape[3]), tokens.device)
        if name == "pixels":
            return pixel_patches(images, self.patch)
        if name == "with_position":
            return add_position(tokens)
        if name == "random":
            assert self.random is not None
            return patch_maps(self.random, images, self.layers)
        assert name == "without_position" and self.projection is not None, name
        return self.projection.remove(as_rows(tokens)).transpose(1, 2).reshape(tokens.shape)


def as_rows(maps: Tensor) -> Tensor:
    """Maps (B, D, h, w) -> rows (B, h * w, D)."""
    return maps.flatten(2).transpose(1, 2)


class Probes(nn.Module):
    """A `DenseProbe` for each source of features.

    Features (B, sum of the widths, h, w) -> logits (sources * heads, B, K, h, w), source by source. The
    projection that a source needs is stored with them.
    """

    def __init__(
        self, widths: Sequence[int], classes: int, heads: int, projection: PositionProjection | None = None
    ):
        super().__init__()
        self.widths = list(widths)
        self.dense = nn.ModuleList(DenseProbe(width, classes, heads) for width in widths)
        if projection is not None:
            self.register_buffer("projection_mean", projection.mean)
            self.register_buffer("projection_basis", projection.basis)

    def forward(self, features: Tensor) -> Tensor:
        parts = features.split(self.widths, dim=1)
        return torch.cat([probe(part) for probe, part in zip(self.dense, parts)])

    def by_head(self) -> list[list[nn.Parameter]]:
        """Return the parameters of the first head of all sources, of the second, ..."""
        probes: list[Any] = list(self.dense)
        heads = [[list(head.parameters()) for head in probe.head[1:]] for probe in probes]
        return [[p for part in same for p in part] for same in zip(*heads)]


@torch.no_grad()
def fit_projection(sources: Sources, loader: Batches[SegmentDataset], setup: Setup) -> PositionProjection:
    """Fit the projection that removes positions from the encoder's tokens, on all ranks alike.

    The loader has each training image once, of one size. Raises ValueError for too few images; see
    `PositionProjection.fit`.
    """
    cells = sources.backbone.grid[0] * sources.backbone.grid[1]
    statistics = CellStatistics(cells, sources.tokens(sources.blank()).shape[1], setup.device)
    for batch in device_batches(loader, setup.device, setup.pixels):
        with setup.autocast():
            tokens = sources.tokens(batch["image"])
        readable = batch["label"] >= 0
        statistics.add(as_rows(tokens)[readable], batch["index"][readable].cpu())
    statistics.reduce()
    return PositionProjection.fit(statistics)


@dataclass(frozen=True)
class CheckedBatches:
    """Batches of passes over all images. After each pass the ranks check together those that cannot be read.

    Raises ValueError then if their share is too large.
    """

    loader: Batches[SegmentDataset]
    bad_images: BadImages

    @property
    def dataset(self) -> SegmentDataset:
        """The data set of the batches."""
        return self.loader.dataset

    @property
    def sampler(self) -> Iterable:
        """The order of the images."""
        return self.loader.sampler

    @property
    def batch_size(self) -> int:
        """The number of images in a batch of one rank."""
        return self.loader.batch_size

    @property
    def readable(self) -> int:
        """The number of images without those that earlier passes could not read."""
        return len(self.loader.dataset) - len(self.bad_images.known)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        for batch in self.loader:
            self.bad_images.add(batch["bad"])
            yield batch
        self.bad_images.check()


@torch.no_grad()
def training_patches(
    sources: Sources, loader: Batches[SegmentDataset], setup: Setup
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the patches of each batch: features of all sources (m, D), soft labels (m, K), numbers (m,).

    A patch has the same number on any rank, and in any order of the images. Those that are all ignored, also
    the patches of unreadable images, have labels of zeros. The loader has each image once, of one size, and
    masks of that size.
    """
    classes = len(loader.dataset.classes)
    grid = sources.backbone.grid
    cells = grid[0] * grid[1]
    for batch in device_batches(loader, setup.device, setup.pixels):
        with setup.autocast():
            maps = sources(batch["image"])
        labels = soft_labels(batch["mask"], grid, classes).flatten(0, 2)
        first = batch["index"].cpu()[:, None] * cells
        yield as_rows(maps).flatten(0, 1), labels, (first + torch.arange(cells)).flatten()


class FeatureSamples(SegmentDataset):
    """Maps of features (n, D, h, w) of the readable pairs of a data set, computed before, and their masks.

    Samples have `features` in the place of `image`. Masks have one size, or those of their files.
    """

    def __init__(
        self,
        features: Tensor,
        masks: Sequence[Tensor] | Tensor,
        numbers: Sequence[int],
        source: SegmentDataset,
    ):
        self.features = features
        self.masks = masks
        self.numbers = list(numbers)
        self.index = source.index
        self.classes = source.classes
        self.settings = source.settings
        self.read = source.read

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        _, i = epoch_and_index(item)
        return dict(
            features=self.features[i], mask=self.masks[i], label=0, index=self.numbers[i], key=0, bad=[]
        )


def check_room(count: int, feature: Tensor, place: str) -> None:
    """Raise ValueError if `count` maps of features like `feature` (1, D, h, w) do not fit into memory."""
    needed = count * feature.numel() * feature.itemsize
    left = available_memory()
    if needed > left:
        raise ValueError(
            f"the features of {count} images of {place} would take {needed / 1e9:.1f} GB, and "
            f"{left / 1e9:.1f} GB are left: leave `cached` out, or `controls`"
        )


@torch.no_grad()
def cached_features(sources: Sources, loader: Batches[SegmentDataset], setup: Setup) -> FeatureSamples:
    """Return the features of all readable training images, the same on all ranks, in the host's memory.

    The loader has each image once, of one size, and masks of that size.
    """
    dataset = loader.dataset
    sample = sources(sources.blank())
    check_room(len(dataset), sample, dataset.path)
    features = torch.zeros(len(dataset), *sample.shape[1:])
    # Plus two: 0 marks a pixel of another rank's image.
    masks = torch.zeros(len(dataset), *setup.size, dtype=torch.int32)
    readable = torch.zeros(len(dataset), dtype=torch.int32)
    for batch in device_batches(loader, setup.device, setup.pixels):
        with setup.autocast():
            maps = sources(batch["image"])
        numbers = batch["index"].cpu()
        features[numbers] = maps.cpu()
        masks[numbers] = batch["mask"].cpu().int() + 2
        readable[numbers] = (batch["label"].cpu() >= 0).int()
    if dist.world_size() > 1:
        features, masks, readable = (_summed(each, setup) for each in (features, masks, readable))
    kept = readable.nonzero().flatten()
    if len(kept) < len(dataset):
        features, masks = features[kept], masks[kept]
    return FeatureSamples(features, (masks - 2).to(torch.int16), kept.tolist(), dataset)


@dataclass(frozen=True)
class FeatureBatches:
    """Batches of features in the place of images, each with the mask of one image."""

    dataset: SegmentDataset
    batches: list[dict]
    sampler: Iterable = ()
    batch_size: int = 1

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict]:
        return iter(self.batches)


@torch.no_grad()
def own_features(sources: Sources, loader: Batches[SegmentDataset], setup: Setup) -> FeatureBatches:
    """Return the features of this rank's share of the validation images, in the host's memory."""
    check_room(len(loader), sources(sources.blank()), loader.dataset.path)
    batches = []
    for batch in device_batches(loader, setup.device, setup.pixels):
        with setup.autocast():
            maps = sources(batch["image"])
        left = {name: value for name, value in batch.items() if name != "image"}
        batches.append(left | {"features": maps.cpu(), "mask": batch["mask"].cpu()})
    return FeatureBatches(loader.dataset, batches)


def _summed(values: Tensor, setup: Setup) -> Tensor:
    """Add up what the ranks have, some images at a time: each is zero on all ranks but one."""
    return torch.cat([dist.sum_over_ranks(part.to(setup.device)).cpu() for part in values.split(64)])
