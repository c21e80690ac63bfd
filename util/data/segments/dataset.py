"""Samples of images with segmentation masks, and what their masks hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.data import native
from util.data.datasets import DEMO, ReplacedSamples
from util.data.formats import DEFAULT, PIL_MODES, ReadSettings, decode
from util.data.seeding import sample_seed
from util.data.segments.layouts import Pairs, build_pairs
from util.data.segments.masks import MAX_CLASSES, MaskSettings, decode_mask
from util.data.segments.transforms import Joint, apply_jointly, ignored_mask
from util.data.sources.image_index import some_names
from util.data.survey.headers import Survey, spread, survey
from util.data.transforms import Unreadable, black_image
from util.files.names import counted, printable
from util.flags.data_path import DataPath

SURVEYED = 500  # masks whose classes are counted
LISTED = 20  # classes in the line of a survey


class SegmentDataset(ReplacedSamples):
    """Samples of `Pairs` by `(epoch, i)`, or by `i` for epoch 0.

    A sample is a dictionary: image (C, h, w) in the data set's depth; mask int16 (h, w) with class numbers
    and IGNORED; label int, 0; index int; key int, its `sample_seed`; bad list[int]. It depends on
    (seed, epoch, index) only, not on worker or rank.

    A pair is unreadable if the image or the mask is, or if their sizes differ. In training another sample
    replaces it, drawn with its key. With `evaluation=True` it keeps its index and becomes a zero image with a
    mask of IGNORED and label -1. See `ImageDataset`, also for the errors. Masks are never turned: with
    `read.exif` "apply" they must belong to the turned images.

    Args:
        transform: makes the image and the mask of a sample, see util/data/segments/transforms.py.
        settings: what the numbers in masks mean. `num_classes` must be known.
        read: how files become images. If its `depth` is None, images have 8 bits.
        found: what the headers of some of the images tell, for the summary.

    Attributes:
        index: the pairs.
        classes: names of the classes, or their numbers as text.

    Raises ValueError if the number of classes is not known or not that of their names, and for a transform
    that does not work on such images.
    """

    index: Pairs
    exact_resume = True

    def __init__(
        self,
        pairs: Pairs,
        transform: Joint,
        *,
        settings: MaskSettings,
        read: ReadSettings,
        seed: int = 0,
        evaluation: bool = False,
        found: Survey | None = None,
    ):
        self.index = pairs
        self.transform: Any = transform
        self.settings = settings
        self.read = read
        self.seed = seed
        self.evaluation = evaluation
        self.found = found
        self.classes = _class_names(pairs, settings)
        if hasattr(transform, "check"):
            transform.check(read.in_chans, self.depth)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def path(self) -> str:
        """Return what the user named."""
        return self.index.path

    @property
    def depth(self) -> torch.dtype:
        """Return the type of the images' pixels."""
        return self.read.depth or torch.uint8

    def summary(self) -> str:
        """Return one line: path, number of pairs, layout, number of classes, what was found."""
        found = ""
        if self.found is not None:
            found = self.found.summary(self.read)
        return f"{self.index.summary()}; {counted(len(self.classes), 'class', 'classes')}{found}"

    def name(self, i: int) -> str:
        """Return the path of image i in its listing."""
        return self.index.name(i)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        result, sample = self.resolve(item, self._load)
        # A pair that cannot be read.
        if result is None:
            black = black_image(self.read.in_chans, self.depth)
            result = apply_jointly(self.transform, black, ignored_mask(black), sample["key"])
        image, mask = result
        return dict(image=image, mask=mask) | sample

    def check_classes(self, trained: list[str] | None, path: str) -> None:
        """Raise ValueError if the segmenter or probe in the file `path` was trained on other classes.

        `trained` are the names of its classes, None if they are not known.
        """
        if trained in (None, self.classes):
            return
        raise ValueError(
            f"{printable(path)} was trained on {some_names(trained)}, and the masks of "
            f"{printable(self.path)} have {some_names(self.classes)}: give the data that it was made with"
        )

    def fault(self, i: int) -> str:
        """Return why pair i cannot be read or transformed, and '' if it can."""
        try:
            self._load(i, sample_seed(self.seed, 0, i))
        except Unreadable as error:
            return str(error)
        return ""

    def decoded(self, i: int) -> Tensor:
        """Return image i as it is decoded, (C, H, W). Raises OSError or ValueError if it cannot be read."""
        # Arrays need no copy of writable memory.
        if self.depth != torch.uint8 or self.read.in_chans not in PIL_MODES:
            return decode(self.index.read_writable(i), self.read)
        return decode(self.index.read(i), self.read)

    def decoded_mask(self, i: int) -> Tensor:
        """Return mask i as it is decoded, int16 (H, W). Raises OSError or ValueError if it cannot be read."""
        return decode_mask(self.index.read_mask(i), self.settings, self.read.max_pixels)

    def _load(self, i: int, key: int) -> tuple[Tensor, Tensor]:
        """Return the image and mask of a sample; raise Unreadable if the files of the pair are at fault."""
        try:
            mask = self.decoded_mask(i)
            cropped = self._from_jpeg(i, mask, key)
            if cropped is not None:
                return cropped
            image = self.decoded(i)
            if image.shape[-2:] != mask.shape:
                height, width = image.shape[-2:]
                raise ValueError(
                    f"its image has {height} x {width} pixels, and its mask {mask.shape[0]} x {mask.shape[1]}"
                )
        # Another pair may need less memory.
        except (OSError, ValueError, MemoryError) as error:
            raise Unreadable(str(error) or type(error).__name__) from error
        return apply_jointly(self.transform, image, mask, key)

    def _from_jpeg(self, i: int, mask: Tensor, key: int) -> tuple[Tensor, Tensor] | None:
        """Return a sample of which only the crop was decoded; None if that is not possible."""
        read = self.read
        if read.in_chans != 3 or not read.plain or self.depth != torch.uint8 or not native.library():
            return None
        if not hasattr(self.transform, "crop_jpeg"):
            return None
        return self.transform.crop_jpeg(self.index.read(i), mask, key, read.max_pixels)


def _class_names(pairs: Pairs, settings: MaskSettings) -> list[str]:
    count = settings.num_classes
    if count is None:
        raise ValueError(f"the number of classes in {printable(pairs.path)} is not known: give `num_classes`")
    if pairs.classes and len(pairs.classes) != count:
        raise ValueError(
            f"`num_classes` {count}, and {printable(pairs.path)} ({pairs.kind}) has names of "
            f"{counted(len(pairs.classes), 'class', 'classes')}: leave `num_classes` out"
        )
    return pairs.classes or [str(number) for number in range(count)]


def build_segment_dataset(
    source: DataPath,
    split: str,
    transform: Joint,
    *,
    read: ReadSettings = DEFAULT,
    masks: MaskSettings | Mapping[str, Any] | None = None,
    seed: int = 0,
    evaluation: bool = False,
) -> SegmentDataset:
    """Open `split` ("train" or "val") of the images with masks at `source`; see `build_pairs`.

    An empty path is the embedded demo set.

    Args:
        read: how files become images. If its `depth` is None, the data set has the depth that a look at some
            files finds, see `util.data.datasets.build_dataset`.
        masks: what the numbers in masks mean. What has its default or is None follows from the layout. If
            that does not say the number of classes, it is the highest class of up to 500 masks plus one.
            A mapping has fields of `MaskSettings`, and each one counts, also if it is the default.

    Validation images should get the settings of the training images (`vars(dataset.settings)`), as they may
    lack the highest class. Raises ValueError as `build_pairs` does, and if no mask can be read.
    """
    if not source:
        source = replace(source, path=DEMO)
    pairs = build_pairs(source, split)
    settings = pairs.settings
    if isinstance(masks, MaskSettings):
        settings = masks.over(settings)
    elif masks is not None:
        settings = replace(settings, **masks)
    if settings.num_classes is None:
        settings = replace(settings, num_classes=_highest_class(pairs, settings, read.max_pixels) + 1)
    found = survey(pairs, read)
    read = replace(read, depth=read.depth or found.depth)
    return SegmentDataset(
        pairs, transform, settings=settings, read=read, seed=seed, evaluation=evaluation, found=found
    )


# --- what masks hold ---


@dataclass
class MaskSurvey:
    """The classes of some masks.

    Attributes:
        pairs: how many there are.
        classes: their names.
        masks: how many were read.
        counts: pixels of each class, int64 (classes,).
        ignored: pixels without a class.
        unreadable: masks that could not be read, and `reason`, why the last of them could not.
    """

    pairs: int
    classes: list[str]
    counts: np.ndarray
    masks: int = 0
    ignored: int = 0
    unreadable: int = 0
    reason: str = field(default="", repr=False)

    @property
    def pixels(self) -> int:
        """Return the number of all pixels of the masks."""
        return int(self.counts.sum()) + self.ignored

    @property
    def shares(self) -> list[float]:
        """Return the share of all pixels, from 0 to 1, that each class has."""
        return (self.counts / max(1, self.pixels)).tolist()

    @property
    def ignored_share(self) -> float:
        """Return the share of pixels without a class."""
        return self.ignored / max(1, self.pixels)

    @property
    def never_seen(self) -> list[int]:
        """Return the classes without a pixel."""
        return np.flatnonzero(self.counts == 0).tolist()

    def __str__(self) -> str:
        """Return one line: "367 pairs; 11 classes: 0 15.8 %, 1 24.1 %, ...; ignored 3.6 %"."""
        looked = ""
        if self.masks < self.pairs:
            looked = f", {counted(self.masks, 'mask')} looked at"
        shares = self.shares
        order = list(range(len(shares)))
        largest = ""
        if len(order) > LISTED:
            order = sorted(np.argsort(-self.counts, kind="stable")[:LISTED].tolist())
            largest = f", the {LISTED} largest"
        listed = ", ".join(f"{printable(self.classes[i])} {100 * shares[i]:.1f} %" for i in order)
        line = (
            f"{counted(self.pairs, 'pair')}{looked}; {counted(len(shares), 'class', 'classes')}{largest}: "
            f"{listed}; ignored {100 * self.ignored_share:.1f} %"
        )
        if self.never_seen:
            line += f"; never seen: {some_names([self.classes[i] for i in self.never_seen])}"
        if self.unreadable:
            line += f"; {counted(self.unreadable, 'unreadable mask')} ({printable(self.reason)})"
        return line


def survey_masks(dataset: SegmentDataset, most: int = SURVEYED) -> MaskSurvey:
    """Count the classes in up to `most` masks, evenly spread.

    Raises ValueError, with the reason of the last one, if none can be read.
    """
    return _surveyed(dataset.index, dataset.settings, dataset.classes, dataset.read.max_pixels, most)


def _highest_class(pairs: Pairs, settings: MaskSettings, max_pixels: int) -> int:
    """Return the highest class of some masks. Raises ValueError if they have none."""
    found = _surveyed(pairs, settings, [str(i) for i in range(MAX_CLASSES)], max_pixels, SURVEYED)
    seen = np.flatnonzero(found.counts)
    if not len(seen):
        raise ValueError(
            f"the masks of {printable(pairs.path)} that were looked at have no class, only pixels that are "
            f"ignored (`ignore_index` {settings.ignore_index}): give `num_classes`"
        )
    return int(seen[-1])


def _surveyed(
    pairs: Pairs, settings: MaskSettings, classes: list[str], max_pixels: int, most: int
) -> MaskSurvey:
    found = MaskSurvey(len(pairs), classes, np.zeros(len(classes), np.int64))
    for i in spread(len(pairs), most):
        try:
            mask = decode_mask(pairs.read_mask(i), settings, max_pixels)
        except (OSError, ValueError) as error:
            pairs.check_unchanged(i)
            found.unreadable += 1
            found.reason = f"{pairs.mask_name(i)}: {error}"
            continue
        # IGNORED is -1.
        counts = np.bincount(mask.numpy().reshape(-1) + np.int16(1))
        found.masks += 1
        found.ignored += int(counts[0])
        found.counts[: len(counts) - 1] += counts[1:]
    if not found.masks:
        raise ValueError(f"no mask of {printable(pairs.path)} could be read: {printable(found.reason)}")
    return found
