"""Data sets. A sample is named by `(epoch, index)`, and everything random about it follows from that."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from util.data import native
from util.data.contract import ClassSamples, IndexedSamples, Samples
from util.data.formats import DEFAULT, PIL_MODES, ReadSettings, decode, raise_pillows_limit
from util.data.formats.pil import orientation
from util.data.seeding import epoch_and_index, sample_seed
from util.data.sources.image_index import ImageIndex, Listed
from util.data.sources.layouts import build_index
from util.data.survey.headers import Survey, survey
from util.data.timm_datasets import TimmDataset, build_timm_classes, build_timm_dataset
from util.data.transforms import MAX_TRIES, Unreadable, apply, black_image, views
from util.files.names import printable
from util.flags.data_path import DataPath
from util.flags.groups import is_timm_path

# The embedded demo set, so that every main runs without data.
DEMO = os.path.join(str(Path(__file__).resolve().parents[2]), "data", "demo")


class Loaded(NamedTuple):
    """One image: decoded as a whole, or already transformed if the transform could crop the file's bytes."""

    image: Any
    transformed: bool


class ReplacedSamples(Samples):
    """Samples by `(epoch, i)`, or by `i` for epoch 0, of which unreadable ones are replaced.

    Attributes:
        index: what the samples are made of.
        seed: of the run; the key of a sample follows from it.
        evaluation: whether an unreadable sample keeps its place instead.
    """

    index: Listed
    seed: int
    evaluation: bool

    def resolve(self, item: int | tuple[int, int], load: Callable[[int, int], Any]) -> tuple[Any, dict]:
        """Return what `load(i, key)` gives for the image of the sample `item`, and the sample's other fields.

        `load` raises Unreadable for an image that cannot be read. The result is then None in evaluation; in
        training it is the result of the sample that replaces it. Raises ValueError after 20 unreadable draws.
        """
        epoch, i = epoch_and_index(item)
        # Replacements follow from the sample's own key, so that they are the same in every run.
        first_key = sample_seed(self.seed, epoch, i)
        bad: list[int] = []
        while True:
            key = sample_seed(self.seed, epoch, i)
            try:
                return load(i, key), dict(label=int(self.index.labels[i]), index=i, key=key, bad=bad)
            except Unreadable as error:
                # A tar that was replaced is an error of its own, not one bad image after the other.
                self.index.check_unchanged(i)
                bad.append(i)
                if self.evaluation:
                    return None, dict(label=-1, index=i, key=key, bad=bad)
                if len(bad) == MAX_TRIES:
                    raise ValueError(
                        f"{len(bad)} images in a row could not be read; the last is "
                        f"{printable(self.index.name(i))} in {printable(self.index.path)}: "
                        f"{printable(str(error))}"
                    ) from error
                # Not a neighbour: it lies in the same folder, which may be damaged as a whole.
                i = sample_seed(first_key, 0, len(bad)) % len(self)


class ImageDataset(IndexedSamples, ReplacedSamples):
    """Samples of an `ImageIndex` by `(epoch, i)`, or by `i` for epoch 0.

    A sample is a dictionary: image (C, H, W) in the data set's depth; label int, -1 without one; index int;
    key int, its `sample_seed`; bad list[int]. It depends on (seed, epoch, index) only, not on worker or rank.

    If image i cannot be read or transformed, i goes into `bad`, and another sample replaces it, drawn with
    the key of i. With `evaluation=True` the sample keeps its index and becomes a zero image with label -1
    instead, so that it can be left out and counted. Raises ValueError after 20 unreadable draws. Errors of
    the transform that are not an image's fault are raised as they are; see `apply`.

    Args:
        read: how files become images. If its `depth` is None, images keep the depth of their files.
        found: what the headers of some of the files tell, for the summary.

    Attributes:
        pixels: None, or a cache of decoded images from which samples are then made: `pixels[i]` is image i,
            or raises ValueError; see util/data/loading/cache.py.
    """

    index: ImageIndex

    def __init__(
        self,
        index: ImageIndex,
        transform: Any,
        *,
        read: ReadSettings = DEFAULT,
        seed: int = 0,
        evaluation: bool = False,
        found: Survey | None = None,
    ):
        self.index = index
        self.found = found
        self.transform = transform
        self.read = read
        self.seed = seed
        self.evaluation = evaluation
        self.pixels: Any = None

    def __len__(self) -> int:
        return len(self.index)

    def summary(self) -> str:
        """Return one line: path, number of images and classes, layout, what was found, who decodes JPEGs."""
        line = self.index.summary()
        if self.found is not None:
            line += self.found.summary(self.read)
        if self._crops_jpegs():
            line += f"; {native.describe()}"
        return line

    def _crops_jpegs(self) -> bool:
        read = self.read
        rgb = read.in_chans == 3 and not read.channels and self.depth == torch.uint8
        return rgb and self.pixels is None and hasattr(self.transform, "crop_jpeg")

    @property
    def depth(self) -> torch.dtype:
        """Return the type of the images' pixels."""
        return self.read.depth or torch.uint8

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        result, sample = self.resolve(item, self._load)
        # An image that cannot be read.
        if result is None:
            black = black_image(self.read.in_chans, self.depth)
            result = apply(self.transform, black, sample["key"])
        return views(result) | sample

    def fault(self, i: int) -> str:
        """Return why image i cannot be read or transformed, and '' if it can."""
        try:
            self._load(i, sample_seed(self.seed, 0, i))
        except Unreadable as error:
            return str(error)
        return ""

    def decoded(self, i: int) -> torch.Tensor:
        """Return image i as it is decoded, (C, H, W). Raises OSError or ValueError if it cannot be read."""
        raise_pillows_limit(self.read.max_pixels)
        return decode(self.index.read(i), self.read)

    def _load(self, i: int, key: int) -> Any:
        """Return what the transform makes of image i; raise Unreadable if the image is at fault."""
        try:
            loaded = self._read(i, key)
        # Another image may need less memory.
        except (OSError, ValueError, MemoryError) as error:
            raise Unreadable(str(error) or type(error).__name__) from error
        if loaded.transformed:
            return loaded.image
        return apply(self.transform, loaded.image, key)

    def _read(self, i: int, key: int) -> Loaded:
        """Load image i; raise OSError, ValueError or MemoryError if that fails."""
        # timm's augmentation uses PIL, also for images that torchvision or another process has decoded.
        raise_pillows_limit(self.read.max_pixels)
        if self.pixels is not None:
            return Loaded(self.pixels[i], transformed=False)
        if not self._crops_jpegs():
            if self._mostly_arrays:
                return Loaded(decode(self.index.read_writable(i), self.read), transformed=False)
            return Loaded(decode(self.index.read(i), self.read), transformed=False)
        data = self.index.read(i)
        # Decoding only the crop is faster, if the native library is there and the file is an ordinary JPEG.
        if not self._is_turned(data):
            crop = self.transform.crop_jpeg(data, key, self.read.max_pixels)
            if crop is not None:
                return Loaded(crop, transformed=True)
        return Loaded(decode(data, self.read), transformed=False)

    @property
    def _mostly_arrays(self) -> bool:
        """Tell whether the files are probably .npy, whose pixels need no copy of their bytes."""
        return self.depth != torch.uint8 or self.read.in_chans not in PIL_MODES

    def _is_turned(self, data: bytes) -> bool:
        return self.read.exif == "apply" and orientation(data) != 1


class TensorSamples(ClassSamples):
    """Samples from tensors: features (n, d) under the name `image`, and labels (n,).

    `source` has the classes: the data set that the features were computed from, or the listing of its images.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, source: ImageIndex | ClassSamples):
        self.features = features
        self.labels = labels
        self.classes = source.classes
        self.path = source.path
        # Ranks compare their listings.
        if not isinstance(source, Samples):
            self.index = source

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        _, i = epoch_and_index(item)
        # There is nothing random here: one key serves all.
        return dict(image=self.features[i], label=int(self.labels[i]), index=i, key=0, bad=[])


def build_dataset(
    data_path: str | os.PathLike | None,
    split: str,
    transform: Callable,
    *,
    in_chans: int | None = None,
    read: ReadSettings = DEFAULT,
    seed: int = 0,
    labels: bool = True,
    evaluation: bool = False,
) -> ImageDataset | TimmDataset:
    """Open `split` of the data set at `data_path`.

    The path is one as in `build_index`, maybe a `DataPath` with settings of its own, or None or "" for the
    embedded demo set. timm reads `<reader>/<name>[=<root>]` if the reader is one of hfds, hfids, wds, tfds
    and torch, e.g. `hfds/uoft-cs/cifar10`, `wds/imagenet=/data/shards` or `torch/cifar10=/data`.
    Streams (hfids, wds, tfds) resume at epochs only: their `exact_resume` is False. Every data set has
    `summary()`, one line.

    `in_chans` is short for `read=ReadSettings(in_chans)`. Images are of one depth, which the data set has as
    `depth`: uint8 if most of some that are looked at have it, and else that of the widest; `read` may say
    another. Images of narrower types are widened, and those of wider ones count as unreadable.

    Raises ValueError if there are no such images, and `NoSplit` if only this split is missing.
    """
    if in_chans is not None:
        read = replace(read, in_chans=in_chans)
    source = DataPath()
    if data_path is not None:
        source = DataPath.of(data_path)
    if not source:
        source = replace(source, path=DEMO)
    options: dict[str, Any] = dict(seed=seed, evaluation=evaluation)
    if is_timm_path(source.path):
        return build_timm_dataset(source, split, transform, read=read, **options)
    index = build_index(source, split, labels=labels)
    found = survey(index, read)
    read = replace(read, depth=read.depth or found.depth)
    return ImageDataset(index, transform, read=read, found=found, **options)


def build_class_dataset(
    data_path: str | os.PathLike | None,
    split: str,
    transform: Callable,
    *,
    read: ReadSettings = DEFAULT,
    seed: int = 0,
    evaluation: bool = False,
    nb_classes: int | None = None,
) -> ImageDataset | TimmDataset:
    """`build_dataset` for a classifier, which needs the names of the classes.

    Args:
        nb_classes: the number of classes, for a set of timm's readers that does not name them. Their names
            are then 0, 1, ...

    A set of timm's readers that has no validation images gives its test images for "val". Raises ValueError
    also for a set without known classes.
    """
    source = DataPath()
    if data_path is not None:
        source = DataPath.of(data_path)
    if is_timm_path(source.path):
        dataset = build_timm_classes(source, split, transform, read=read, seed=seed, evaluation=evaluation)
        dataset.name_classes(nb_classes)
        return dataset
    return build_dataset(source, split, transform, read=read, seed=seed, evaluation=evaluation)
