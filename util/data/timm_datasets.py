"""Data sets that timm reads: Hugging Face, WebDataset, TensorFlow Datasets and torchvision's own."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import IterableDataset, get_worker_info

from util import dist
from util.data.contract import ClassSamples
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
from util.data.formats.pil import facts_of
from util.data.seeding import epoch_and_index, sample_seed
from util.data.sources.image_index import NoSplit
from util.data.survey.headers import Survey, spread
from util.data.transforms import MAX_TRIES, Unreadable, apply, black_image, views
from util.files.names import counted, printable
from util.files.regular import open_regular
from util.flags.data_path import VAL_SPLIT, DataPath

log = logging.getLogger(__name__)
LOOKED_AT = 8  # images of a set, when it is opened


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
    """Return the bytes of an open file or of a path; torchvision's folders get it as their `loader`."""
    if isinstance(file, (str, bytes, os.PathLike)):
        with open_regular(os.fsdecode(file)) as opened:
            return opened.read()
    file.seek(0)
    return file.read()


def pixels_of(image: Image.Image, read: ReadSettings) -> torch.Tensor:
    """Return what `decode` makes of the file of an image that a reader has opened. Raises ValueError."""
    return with_depth(image_to_tensor(image, read), read.depth or torch.uint8)


def look(dataset: "TimmDataset", most: int = LOOKED_AT) -> Survey:
    """Look at up to `most` images of a map-style set, evenly spread. Unreadable ones are passed over."""
    found = Survey(of=len(dataset))
    for i in spread(len(dataset), most):
        with contextlib.suppress(Exception):
            found.add(dataset.facts(i))
    return found


class TimmDataset(ClassSamples):
    """The samples of an `ImageDataset` from a map-style set of (image, label).

    An image is decoded from its bytes where the reader gives them, as those of folders are. timm has no names
    for images: one that cannot be read is logged, in training it is replaced, and `bad` is empty. Raises
    ValueError after 20 unreadable draws.

    Attributes:
        classes: names of the classes; empty before `name_classes`. Labels are checked against them.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable,
        *,
        name: str = "",
        read: ReadSettings = DEFAULT,
        seed: int = 0,
        evaluation: bool = False,
    ):
        self.dataset = dataset
        self.transform = transform
        self.path = name
        self.classes: list[str] = []
        # Labels of `classes` by label of the reader; None if they are the same.
        self.numbers: list[int] | None = None
        self.read = read
        self.found = Survey()
        self.seed = seed
        self.evaluation = evaluation
        # torchvision's own would convert 16-bit images to white.
        if hasattr(dataset, "loader"):
            dataset.loader = _content

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def depth(self) -> torch.dtype:
        """Return the type of the images' pixels."""
        return self.read.depth or torch.uint8

    def facts(self, i: int) -> Facts:
        """Return what the header of image i tells. Raises many types."""
        image, _ = self._content(i)
        if isinstance(image, bytes):
            return describe(image, self.read)
        return facts_of(image)

    def decoded(self, i: int) -> torch.Tensor:
        """Return image i as it is decoded, (C, H, W). Raises Unreadable."""
        return self._decoded(i)[0]

    def use_classes(self, classes: list[str]) -> None:
        """Number the labels as in `classes`, which may have more names. Raises KeyError if one is missing."""
        if classes == self.classes:
            return
        number = {name: i for i, name in enumerate(classes)}
        self.numbers = [number[name] for name in self.classes]
        self.classes = list(classes)

    def name_classes(self, nb_classes: int | None = None) -> None:
        """Set `classes` to the names that the reader has, or else to 0, 1, ..., `nb_classes` - 1.

        Raises ValueError if neither names nor number are known.
        """
        names = reader_classes(self.dataset)
        if not names and nb_classes:
            names = [str(i) for i in range(nb_classes)]
        if not names:
            raise ValueError(f"{self.path} does not name its classes: give their number by `nb_classes`")
        self.classes = names

    def summary(self) -> str:
        """Return one line: name, number of images and classes, and how a run resumes."""
        resume = ""
        if not self.exact_resume:
            resume = "; a stream: a run resumes at whole epochs only"
        classes = ""
        if self.classes:
            classes = f", {counted(len(self.classes), 'class', 'classes')}"
        line = f"{self.path}: {counted(len(self), 'image')}{classes} (read by timm{resume})"
        return line + self.found.summary(self.read)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        epoch, i = epoch_and_index(item)
        first_key = sample_seed(self.seed, epoch, i)
        for tries in range(1, MAX_TRIES + 1):
            key = sample_seed(self.seed, epoch, i)
            try:
                image, label = self._decoded(i)
                return self._sample(image, label, i, key)
            except Unreadable as error:
                reason = printable(str(error))
            # A replacement would count twice in the accuracy.
            if self.evaluation:
                log.warning("image %d of %s is unreadable and left out: %s", i, self.path, reason)
                black = apply(self.transform, black_image(self.read.in_chans, self.depth), key)
                return views(black) | dict(label=-1, index=i, key=key, bad=[i])
            log.warning("image %d of %s is unreadable and replaced: %s", i, self.path, reason)
            i = sample_seed(first_key, 0, tries) % len(self)
        raise ValueError(f"{MAX_TRIES} images of {self.path} in a row could not be read: {reason}")

    def _decoded(self, i: int) -> tuple[torch.Tensor, Any]:
        """Return the pixels and the label of image i. Raises Unreadable."""
        try:
            image, label = self._content(i)
            if isinstance(image, bytes):
                return decode(image, replace(self.read, depth=self.depth)), label
            return pixels_of(image, replace(self.read, depth=self.depth)), label
        # Another image may need less memory.
        except (OSError, ValueError, MemoryError) as error:
            raise Unreadable(str(error) or type(error).__name__) from error

    def _content(self, i: int) -> tuple[bytes | Image.Image, Any]:
        """Return the bytes of image i, or the image if the reader decodes it itself, and its label."""
        reader = getattr(self.dataset, "reader", None)
        if reader is None:
            with our_pil(self.read.max_pixels):
                return self.dataset[i]
        # Not the data set itself: it would replace an unreadable image by its neighbour.
        file, label, *_ = reader[i]
        with contextlib.closing(file):
            return _content(file), label

    def _sample(self, pixels: torch.Tensor, label: Any, index: int, key: int) -> dict:
        transformed = apply(self.transform, pixels, key)
        return views(transformed) | dict(label=self._label(label), index=index, key=key, bad=[])

    def _label(self, label: Any) -> int:
        """Return a label as a number. Raises ValueError for one that is not in the range of the classes."""
        try:
            number = int(label)
        except (TypeError, ValueError):
            number = -1
        if self.classes and not 0 <= number < len(self.classes):
            raise ValueError(
                f"{self.path} has the label {printable(str(label)[:40])}, and labels of "
                f"{counted(len(self.classes), 'class', 'classes')} are 0 to {len(self.classes) - 1}: check "
                "`nb_classes`, or give a set with labels"
            )
        if self.numbers is not None and number >= 0:
            return self.numbers[number]
        return number


def reader_classes(dataset: Any) -> list[str]:
    """Return the names of the classes that a data set of timm's or torchvision's has; [] if it has none.

    Raises ValueError for labels that are text.
    """
    reader = getattr(dataset, "reader", None)
    if reader is None:
        # torchvision's ImageNet has several names for each class; those of its folders are unique.
        names = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
        return list(map(str, names or getattr(dataset, "all_categories", [])))
    info = getattr(reader, "info", None)
    # WebDataset's _info.json.
    if isinstance(info, dict):
        return [str(i) for i in range(int(info.get("num_classes", 0)))]
    return _names_in_features(reader)


def _names_in_features(reader: Any) -> list[str]:
    """Return the names that the features of Hugging Face's and TensorFlow's sets have."""
    key = getattr(reader, "label_key", None) or getattr(reader, "target_key", None) or "label"
    # A set that is listed, or else the builder of a stream.
    listed = getattr(reader, "dataset", None)
    source = listed if listed is not None else getattr(getattr(reader, "builder", None), "info", None)
    features = getattr(source, "features", None) or {}
    if key not in features:
        return []
    names = getattr(features[key], "names", None)
    if names is None and listed is not None:
        return _numbered(listed.unique(key))
    return list(names or [])


def _numbered(labels: list) -> list[str]:
    """Return the names of classes that are numbers only: 0, 1, ... up to the largest label."""
    if not all(isinstance(label, int) for label in labels):
        raise ValueError(
            f"the labels, as {printable(str(labels[0])[:40])}, are {type(labels[0]).__name__}, not "
            "numbers: cast the column with class_encode_column of the `datasets` package"
        )
    return [str(i) for i in range(max(labels, default=-1) + 1)]


class TimmIterableDataset(TimmDataset, IterableDataset):
    """The same samples from a stream, in the stream's order.

    `index` is -1, as a stream has no numbers, and a run can resume at epochs only. An image that cannot be
    transformed is left out; what happens to one that cannot be read is up to the reader.

    In evaluation all ranks together give each image once: timm itself pads or cuts the shares of ranks.
    """

    # A stream cannot be entered in the middle of an epoch.
    exact_resume = False

    def __init__(self, dataset: Any, transform: Callable, **options: Any):
        super().__init__(dataset, transform, **options)
        # Shared, so that workers that are already running see a new epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.rank = dist.rank()
        self.shared_by = 1
        if self.evaluation:
            self._share_exactly()

    def _share_exactly(self) -> None:
        """Let each rank read the whole stream and keep its share, if the reader does not divide exactly."""
        reader = getattr(self.dataset, "reader", None)
        # `datasets` gives each rank its own images, each once.
        if reader is None or type(reader).__name__ == "ReaderHfids":
            return
        reader.dist_rank = 0
        reader.dist_num_replicas = 1
        self.shared_by = dist.world_size()

    def __len__(self) -> int:
        # The reader divides by ranks and workers, and rounds.
        if self.evaluation:
            total = getattr(getattr(self.dataset, "reader", None), "num_samples", 0)
            return total or len(self.dataset)
        return len(self.dataset)

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
            if count % self.shared_by != self.rank % self.shared_by:
                continue
            key = sample_seed(self.seed, int(self.epoch), stream | count)
            try:
                sample = self._sample(self._pixels(image), label, -1, key)
            except Unreadable as error:
                log.warning("an image of %s is left out: %s", self.path, printable(str(error)))
                continue
            yield sample

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        try:
            return pixels_of(image, replace(self.read, depth=self.depth))
        except (OSError, ValueError, MemoryError) as error:
            raise Unreadable(str(error) or type(error).__name__) from error

    @property
    def depth(self) -> torch.dtype:
        """Return the type of the images' pixels."""
        return self.read.depth or self.read.stream_depth

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
    data_path: str | os.PathLike,
    split: str,
    transform: Callable,
    *,
    read: ReadSettings,
    seed: int,
    evaluation: bool,
) -> TimmDataset:
    """Open `data_path`, <reader>/<name>[=<root>], with timm.

    Its settings are those of a `DataPath`; a `val_split` that is given is the reader's name of the split.

    Raises ValueError if timm cannot open it or a package is missing, and `NoSplit` if that happens for "val".
    """
    source = DataPath.of(data_path)
    if source.val_share or source.class_depth:
        raise ValueError(
            f"{source}: `val_share` and `class_depth` serve folders, tars and lists, not timm's readers"
        )
    if read.in_chans not in (1, 3):
        raise ValueError(
            f"{source}: timm's readers give 1 or 3 channels, not {read.in_chans}; use folders of .npy files"
        )
    with our_pil(read.max_pixels):
        dataset = _open(source, split, read.in_chans, seed, evaluation)
    options: dict[str, Any] = dict(name=source.path, read=read, seed=seed, evaluation=evaluation)
    # DataLoader decides by the class how it reads a data set.
    if isinstance(dataset, IterableDataset):
        options["read"] = replace(read, depth=read.depth or read.stream_depth)
        return TimmIterableDataset(dataset, transform, **options)
    made = TimmDataset(dataset, transform, **options)
    made.found = look(made)
    made.read = replace(read, depth=read.depth or made.found.depth)
    return made


def build_timm_classes(source: DataPath, split: str, transform: Callable, **options: Any) -> TimmDataset:
    """`build_timm_dataset` for a classifier: "val" is "test" if there are no validation images."""
    try:
        return build_timm_dataset(source, split, transform, **options)
    except NoSplit as error:
        # The public form of many small sets.
        try:
            dataset = build_timm_dataset(source, "test", transform, **options)
        except ValueError:
            raise error from None
    dataset.path = f"{source} (test)"
    return dataset


def _open(source: DataPath, split: str, in_chans: int, seed: int, evaluation: bool) -> Any:
    from timm.data import create_dataset  # slow to import, and most runs do not need it

    name, _, root = source.path.partition("=")
    name_of_split = split
    if split == "val":
        # "validation" is the usual name there.
        name_of_split = {VAL_SPLIT: "validation"}.get(source.val_split, source.val_split)
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
            split=name_of_split,
            input_img_mode=mode,
        )
    except ImportError as error:
        raise ValueError(
            f"{source} needs a package that is not installed: pip install {error.name}"
        ) from error
    # Readers raise many types for a data set or a split that does not exist.
    except Exception as error:
        error_type = {"validation": NoSplit}.get(name_of_split, ValueError)
        raise error_type(
            f"timm cannot open {source} (split {name_of_split}, root {root or 'not given'}): {error!r}. The "
            "form is <reader>/<name>[=<root>]; wds and torch need the root of the data."
        ) from error
