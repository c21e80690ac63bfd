"""What the engine, the loaders and the evaluations rely on in a data set and in a loader."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import torch
from torch.utils.data import Dataset

from util.data.sources.image_index import ImageIndex


class Samples(Dataset[dict]):
    """A data set whose samples are dictionaries, as described in `util.data.datasets.ImageDataset`.

    Attributes:
        exact_resume: whether each sample can be made again from its number, so that a run resumes at any
            step. If not, the data set is a stream, which can be entered at the start of an epoch only.
    """

    exact_resume = True

    @property
    def depth(self) -> torch.dtype:
        """Return the type of the images' pixels."""
        return torch.uint8

    def __len__(self) -> int:
        raise NotImplementedError

    def summary(self) -> str:
        """Return one line about the data."""
        return f"{len(self)} samples"

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration of a stream. Other samples have the epoch in their name."""
        raise NotImplementedError


class ClassSamples(Samples):
    """Samples with the labels of a classifier.

    Attributes:
        classes: names of the classes; the label of a sample is an index into them.
        path: what the user named, for messages.
    """

    classes: list[str]
    path: str

    def name(self, i: int) -> str:
        """Return a name for image i."""
        return str(i)

    def use_classes(self, classes: list[str]) -> None:
        """Number the labels as in `classes`, which may have more names. Raises KeyError if one is missing."""
        raise NotImplementedError

    def without_images(self) -> list[str]:
        """Return the names of the classes that have no image, as far as that is known."""
        return []


class IndexedSamples(ClassSamples):
    """A data set of images that are listed, with their classes, in an index."""

    index: ImageIndex

    @property
    def classes(self) -> list[str]:  # type: ignore[override]
        return self.index.classes

    @property
    def path(self) -> str:  # type: ignore[override]
        return self.index.path

    def name(self, i: int) -> str:
        return self.index.name(i)

    def use_classes(self, classes: list[str]) -> None:
        self.index.use_classes(classes)

    def without_images(self) -> list[str]:
        return self.index.without_images()


# Names of the images in a sample. Its other tensors are boxes, masks and numbers.
VIEWS = ("image", "second", "local")

S = TypeVar("S", bound=Samples, covariant=True)


class Batches(Protocol[S]):
    """A loader of this rank's batches, whether it makes them in workers or on the device."""

    @property
    def dataset(self) -> S:
        """The data set that the batches are made of."""

    @property
    def sampler(self) -> Iterable:
        """The order of the samples."""

    @property
    def batch_size(self) -> int:
        """The number of images in a batch of one rank."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict]: ...
