"""Data sets that timm reads: Hugging Face, WebDataset, TensorFlow Datasets and torchvision's own."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import IterableDataset, get_worker_info

from util import dist
from util.data.contract import Samples
from util.data.formats import (
    DEFAULT,
    PIL_FORMATS,
    PIL_MODES,
    Facts,
    ReadSettings,
    decode,
    describe,
    image_to_tensor,
    open_image,
    with_depth,
)
from util.data.seeding import epoch_and_index, sample_seed
from util.data.sources.image_index import NoSplit
from util.data.survey.headers import Survey, spread
from util.data.transforms import MAX_TRIES, Unreadable, apply, views
from util.files.names import counted, printable

log = logging.getLogger(__name__)
LOOKED_AT = 8  # images, which are decoded, when a data set is opened


@contextlib.contextmanager
def our_pil(max_pixels: int) -> Iterator[None]:
    """Let readers, which call PIL themselves, open images as `open_image` does, and decode them at once.

    Every error of an image is an OSError then, which timm's readers expect.
    """
    pils = Image.open

    def open_listed(file: Any, mode: Any = "r", formats: Any = None) -> Image.Image:
        # The call that `open_image` makes.
        if formats is PIL_FORMATS:
            return pils(file, mode, formats)
        try:
            image = open_image(_content(file), max_pixels)
            image.load()
        except Exception as error:
            raise UnidentifiedImageError(str(error) or type(error).__name__) from error
        return image

    Image.open = open_listed  # type: ignore[assignment]
    try:
        yield
    finally:
        Image.open = pils


def _content(file: Any) -> bytes:
    if isinstance(file, (str, bytes, os.PathLike)):
        return Path(os.fsdecode(file)).read_bytes()
    file.seek(0)
    return file.read()


def pixels_of(image: Image.Image | bytes, read: ReadSettings) -> torch.Tensor:
    """Return what `decode` makes of an image, its bytes or what PIL opened. Raises Unreadable."""
    depth = read.depth or torch.uint8
    try:
        if isinstance(image, bytes):
            return decode(image, replace(read, depth=depth))
        return with_depth(image_to_tensor(image, read), depth)
    except (OSError, ValueError) as error:
        raise Unreadable(str(error)) from error


class TimmDataset(Samples):
    """The samples of an `ImageDataset` from a map-style set of (PIL image, label).

    timm has no names for images: one that cannot be read is logged and replaced, and `bad` is always empty.
    Raises ValueError after 20 unreadable draws.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable,
        *,
        name: str = "",
        read: ReadSettings = DEFAULT,
        seed: int = 0,
    ):
        self.dataset = dataset
        self.transform = transform
        self.name = name
        self.read = read
        self.seed = seed
        # torchvision's own would convert images of 16 bits to white.
        if hasattr(dataset, "loader"):
            dataset.loader = _content

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def depth(self) -> torch.dtype:
        """Return the type of the images' pixels."""
        return self.read.depth or torch.uint8

    def decoded(self, i: int) -> torch.Tensor:
        """Return image i as it is decoded, (C, H, W). Raises OSError or ValueError if it cannot be read."""
        return pixels_of(self._image(i), self.read)

    def look_at_depth(self) -> None:
        """Set the depth to that of some of the images, as `Survey.depth` chooses it."""
        found = Survey()
        for i in spread(len(self), LOOKED_AT):
            # An image that cannot be read is reported when its turn comes.
            with contextlib.suppress(OSError, ValueError):
                found.add(Facts(self._depth(i), self.read.in_chans))
        self.read = replace(self.read, depth=found.depth)

    def _image(self, i: int) -> Image.Image | bytes:
        with our_pil(self.read.max_pixels):
            return self.dataset[i][0]

    def _depth(self, i: int) -> torch.dtype:
        image = self._image(i)
        if isinstance(image, bytes):
            return describe(image, self.read).depth
        return image_to_tensor(image, self.read).dtype

    def summary(self) -> str:
        """Return one line: name, number of images, and how a run resumes."""
        resume = ""
        if not self.exact_resume:
            resume = "; a stream: a run resumes at whole epochs only"
        return f"{self.name}: {counted(len(self), 'image')} (read by timm{resume})"

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        epoch, i = epoch_and_index(item)
        first_key = sample_seed(self.seed, epoch, i)
        for tries in range(1, MAX_TRIES + 1):
            try:
                with our_pil(self.read.max_pixels):
                    image, label = self.dataset[i]
                return self._sample(image, label, i, sample_seed(self.seed, epoch, i))
            except (OSError, Unreadable) as error:
                reason = printable(str(error))
                log.warning("image %d of %s is unreadable and replaced: %s", i, self.name, reason)
            i = sample_seed(first_key, 0, tries) % len(self)
        raise ValueError(f"{MAX_TRIES} images of {self.name} in a row could not be read: {reason}")

    def _sample(self, image: Any, label: int, index: int, key: int) -> dict:
        transformed = apply(self.transform, pixels_of(image, self.read), key)
        return views(transformed) | dict(label=int(label), index=index, key=key, bad=[])


class TimmIterableDataset(TimmDataset, IterableDataset):
    """The same samples from a stream, in the stream's order.

    `index` is -1, as a stream has no numbers, and a run can resume at epochs only. An image that cannot be
    transformed is left out; what happens to one that cannot be read is up to the reader.
    """

    # A stream cannot be entered in the middle of an epoch.
    exact_resume = False

    def __init__(self, dataset: Any, transform: Callable, **options: Any):
        super().__init__(dataset, transform, **options)
        # Shared, so that workers that are already running see a new epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.rank = dist.rank()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number = 0
        if worker is not None:
            number = worker.id
        # Ranks and workers read different parts of the stream; each gets keys of its own.
        stream = self.rank << 40 | number << 32
        for count, (image, label) in enumerate(self._images()):
            key = sample_seed(self.seed, int(self.epoch), stream | count)
            try:
                sample = self._sample(image, label, -1, key)
            except Unreadable as error:
                log.warning("an image of %s is left out: %s", self.name, printable(str(error)))
                continue
            yield sample

    def _images(self) -> Iterator[tuple[Any, int]]:
        images = iter(self.dataset)
        while True:
            # Not around the loop: between two images, others may use PIL.
            with our_pil(self.read.max_pixels):
                found = next(images, None)
            if found is None:
                return
            yield found


def build_timm_dataset(
    data_path: str,
    split: str,
    transform: Callable,
    *,
    read: ReadSettings,
    seed: int,
    evaluation: bool,
) -> TimmDataset:
    """Open `data_path`, <reader>/<name>[=<root>], with timm.

    Raises ValueError if timm cannot open it or a package is missing, and `NoSplit` if that happens for "val".
    """
    if read.in_chans not in (1, 3):
        raise ValueError(
            f"{data_path}: timm's readers give 1 or 3 channels, not {read.in_chans}; use folders of .npy "
            "files"
        )
    with our_pil(read.max_pixels):
        dataset = _open(data_path, split, read.in_chans, seed, evaluation)
    options: dict[str, Any] = dict(name=data_path, read=read, seed=seed)
    # DataLoader decides by the class how it reads a data set.
    if isinstance(dataset, IterableDataset):
        options["read"] = replace(read, depth=read.depth or read.stream_depth)
        return TimmIterableDataset(dataset, transform, **options)
    found = TimmDataset(dataset, transform, **options)
    if read.depth is None:
        found.look_at_depth()
    return found


def _open(data_path: str, split: str, in_chans: int, seed: int, evaluation: bool) -> Any:
    from timm.data import create_dataset  # slow to import, and most runs do not need it

    name, _, root = data_path.partition("=")
    # Readers leave images as they are, and `pixels_of` converts them. TensorFlow decodes to 8 bits itself.
    mode = ""
    if name.lower().startswith("tfds/"):
        mode = PIL_MODES[in_chans]
    try:
        return create_dataset(
            name,
            root=os.path.expanduser(root) or None,
            is_training=not evaluation,
            seed=seed,
            split={"val": "validation"}.get(split, split),
            input_img_mode=mode,
        )
    except ImportError as error:
        raise ValueError(
            f"{data_path} needs a package that is not installed: pip install {error.name}"
        ) from error
    # Readers raise many types for a data set or a split that does not exist.
    except Exception as error:
        error_type = {"val": NoSplit}.get(split, ValueError)
        raise error_type(
            f"timm cannot open {data_path} (split {split}, root {root or 'not given'}): {error!r}. The "
            "form is <reader>/<name>[=<root>]; wds and torch need the root of the data."
        ) from error
