"""Counts of pixels for each image, from which intervals over images follow by resampling.

Shapes: N images, S settings (maps of logits that are graded side by side), K classes.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from util import dist
from util.data.segments.masks import IGNORED
from util.files.atomic import replacing
from util.files.names import printable

FILE = "image_counts.npz"
_TABLE = ("image", "setting", "class", "shared", "truth", "predicted")


class ImageCounts:
    """Counts of pixels by image, setting and class, gathered while an evaluation runs.

    Classes that an image and its prediction lack take no room: 12,000 images of ten classes and thirty
    settings take 90 MB.
    """

    def __init__(self, classes: int):
        self.classes = classes
        self._rows: list[Tensor] = []

    def add(self, number: int, predictions: Sequence[Tensor], mask: Tensor) -> None:
        """Count the pixels of image `number`.

        Takes the prediction (H, W) of each setting and the mask (H, W), int; its pixels of IGNORED do not count.
        """
        counted = mask != IGNORED
        truth = mask[counted].long()
        for setting, prediction in enumerate(predictions):
            guess = prediction[counted].long()
            parts = (truth[truth == guess], truth, guess)
            counts = torch.stack([torch.bincount(part, minlength=self.classes) for part in parts], dim=1).cpu()
            seen = counts[:, 1:].sum(1).nonzero()  # (n, 1), the classes of the image or of its prediction
            place = torch.tensor([[number, setting]]).expand(len(seen), 2)
            self._rows.append(torch.cat([place, seen, counts[seen[:, 0]]], dim=1).int())

    def write(
        self, path: str, name_of: Callable[[int], str], settings: Sequence[str], classes: Sequence[str]
    ) -> None:
        """Write the counts of all ranks, which must call this together; rank 0 writes.

        `name_of` is the name of an image by its number. Raises OSError if the file cannot be written.
        """
        gathered = dist.gather_objects(torch.cat([torch.zeros(0, 6, dtype=torch.int32), *self._rows]))
        if not dist.is_main():
            return
        table = torch.cat(gathered).numpy()
        table = table[np.lexsort(table.T[2::-1])]  # by image, setting and class
        used, numbers = np.unique(table[:, 0], return_inverse=True)
        table[:, 0] = numbers
        columns = {name: table[:, i] for i, name in enumerate(_TABLE)}
        texts = dict(names=[name_of(int(i)) for i in used], settings=settings, classes=classes)
        arrays = {key: np.array(value, dtype=str) for key, value in texts.items()}
        with replacing(path, "wb") as f:
            np.savez_compressed(f, **columns, **arrays)


@dataclass(frozen=True)
class Counted:
    """The counts of a file.

    Attributes:
        names, settings, classes: of the images, the settings and the classes.
        counts: int64 (S, N, 3, K): pixels that truth and prediction share, those of the truth, and those of
            the prediction.
    """

    names: list[str]
    settings: list[str]
    classes: list[str]
    counts: np.ndarray

    def miou(self, setting: str, weights: np.ndarray | None = None) -> np.ndarray:
        """Return the mIoU in percent of a setting, with `weights` (..., N) of images; each counts once if None.

        Classes that are neither in the truth nor in the predictions are left out of the mean. Raises KeyError
        for an unknown setting.
        """
        if setting not in self.settings:
            raise KeyError(f"no setting {setting!r}; there are {', '.join(self.settings)}")
        counts = self.counts[self.settings.index(setting)]  # (N, 3, K)
        if weights is None:
            weights = np.ones(len(counts))
        shared, truth, predicted = np.moveaxis(np.tensordot(weights, counts, axes=1), -2, 0)
        union = truth + predicted - shared
        with np.errstate(invalid="ignore"):
            return 100 * np.nanmean(shared / np.where(union > 0, union, np.nan), axis=-1)


def read_image_counts(path: str) -> Counted:
    """Read a file of `ImageCounts`. Raises OSError if it cannot be read, and ValueError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as content:
            table = {name: content[name].astype(np.int64) for name in _TABLE}
            names, settings, classes = ([str(v) for v in content[k]] for k in ("names", "settings", "classes"))
        counts = np.zeros((len(settings), len(names), 3, len(classes)), dtype=np.int64)
        place = table["setting"], table["image"], slice(None), table["class"]
        counts[place] = np.stack([table[name] for name in ("shared", "truth", "predicted")], axis=1)
    except (KeyError, ValueError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{printable(path)} has no counts of images, or is damaged: {error}") from None
    return Counted(names, settings, classes, counts)
