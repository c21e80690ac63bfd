"""Counts of pixels for each image, gathered while an evaluation runs.

Shapes: (H, W) pixels, K classes.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from util import dist
from util.data.segments.masks import IGNORED
from util.evaluate.segments.image_counts import COLUMNS, write_image_counts


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

        Takes the prediction (H, W) of each setting and the mask (H, W), int. Pixels of IGNORED do not count.
        """
        counted = mask != IGNORED
        truth = mask[counted].long()
        for setting, prediction in enumerate(predictions):
            guess = prediction[counted].long()
            parts = (truth[truth == guess], truth, guess)
            counts = torch.stack([part.bincount(minlength=self.classes) for part in parts], dim=1).cpu()
            seen = counts[:, 1:].sum(1).nonzero()  # (n, 1), the classes of the image or of its prediction
            place = torch.tensor([[number, setting]]).expand(len(seen), 2)
            self._rows.append(torch.cat([place, seen, counts[seen[:, 0]]], dim=1).int())

    def write(
        self, path: str, name_of: Callable[[int], str], settings: Sequence[str], classes: Sequence[str]
    ) -> None:
        """Write the counts of all ranks, which must call this together; rank 0 writes.

        `name_of` is the name of an image by its number. Raises OSError if the file cannot be written.
        """
        rows = torch.cat([torch.zeros(0, len(COLUMNS), dtype=torch.int32), *self._rows])
        gathered = dist.gather_objects(rows)
        if not dist.is_main():
            return
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        table = torch.cat(gathered).numpy()
        used, table[:, 0] = np.unique(table[:, 0], return_inverse=True)
        write_image_counts(path, table, [name_of(int(number)) for number in used], settings, classes)
