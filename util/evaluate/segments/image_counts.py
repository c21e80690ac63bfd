"""Files of the counts of pixels of each image, from which intervals over images follow by resampling.

Shapes: N images, S settings (maps of logits that are graded side by side), K classes.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from util.files.atomic import replacing
from util.files.names import printable

FILE = "image_counts.npz"
# The columns of the table in a file.
COLUMNS = ("image", "setting", "class", "shared", "truth", "predicted")


def write_image_counts(
    path: str, table: np.ndarray, names: Sequence[str], settings: Sequence[str], classes: Sequence[str]
) -> None:
    """Write a table of `COLUMNS` (n, 6), int: the numbers of image, setting and class, and three counts.

    Classes that an image and its prediction lack take no room. Raises OSError if the file cannot be written.
    """
    table = table[np.lexsort(table.T[2::-1])]  # by image, setting and class
    columns: dict[str, Any] = {column: table[:, i] for i, column in enumerate(COLUMNS)}
    texts = {"names": names, "settings": settings, "classes": classes}
    columns |= {key: np.array(value, dtype=str) for key, value in texts.items()}
    with replacing(path, "wb") as f:
        np.savez_compressed(f, **columns)


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
        """Return the mIoU of a setting in percent, with `weights` (..., N) of the images, or with ones.

        Classes that are neither in the truth nor in the predictions are left out of the mean. Raises
        ValueError for an unknown setting.
        """
        if setting not in self.settings:
            raise ValueError(f"no setting {setting!r}; there are {', '.join(self.settings)}")
        counts = self.counts[self.settings.index(setting)]  # (N, 3, K)
        if weights is None:
            weights = np.ones(len(counts))
        shared, truth, predicted = np.moveaxis(np.tensordot(weights, counts, axes=1), -2, 0)
        union = truth + predicted - shared
        with np.errstate(invalid="ignore"):
            return 100 * np.nanmean(shared / np.where(union > 0, union, np.nan), axis=-1)

    def best(self, source: str) -> str:
        """Return the setting of a source of features that has the highest mIoU.

        Settings are named `source/setting`. Raises ValueError if there is none.
        """
        settings = [each for each in self.settings if each.partition("/")[0] == source]
        if not settings:
            raise ValueError(f"no setting of {source!r}; there are {', '.join(self.settings)}")
        return max(settings, key=lambda each: float(self.miou(each)))

    def write(self, path: str, settings: Sequence[str]) -> None:
        """Write the counts of these settings alone. Raises OSError if the file cannot be written."""
        counts = np.stack([self.counts[self.settings.index(each)] for each in settings])
        setting, image, kind = np.nonzero(counts[:, :, 1:].sum(2))
        table = np.column_stack([image, setting, kind, counts[setting, image, :, kind]]).astype(np.int32)
        write_image_counts(path, table, self.names, settings, self.classes)


def read_image_counts(path: str) -> Counted:
    """Read a file of `ImageCounts`. Raises OSError if it cannot be read, and ValueError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as content:
            table = {name: content[name].astype(np.int64) for name in COLUMNS}
            texts = [content[name].tolist() for name in ("names", "settings", "classes")]
        names, settings, classes = ([str(text) for text in each] for each in texts)
        counts = np.zeros((len(settings), len(names), 3, len(classes)), dtype=np.int64)
        place = table["setting"], table["image"], slice(None), table["class"]
        counts[place] = np.stack([table[name] for name in ("shared", "truth", "predicted")], axis=1)
    except (KeyError, ValueError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{printable(path)} has no counts of images, or is damaged: {error}") from None
    return Counted(names, settings, classes, counts)
