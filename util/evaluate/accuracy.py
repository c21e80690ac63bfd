"""Accuracy and loss of logits, over the images and over the classes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from util import dist


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the type of sums over a data set: they lose digits in float32. MPS has nothing better."""
    if device.type == "mps":
        return torch.float32
    return torch.float64


@dataclass(frozen=True)
class Balanced:
    """The mean over classes of the share of each class's images that are classified correctly, in percent.

    `seen` of the `classes` have images, and the mean is over these.
    """

    accuracy: float
    seen: int
    classes: int

    def __str__(self) -> str:
        text = f"balanced {self.accuracy:.3f}"
        if self.seen < self.classes:
            text += f" ({self.seen} of {self.classes} classes)"
        return text


class Recalls:
    """Counts of the images of each class, and of those that are classified correctly.

    The counts stay on the device until all images are seen. Several `heads` may classify the images.
    """

    def __init__(self, classes: int, device: torch.device, heads: int = 1):
        # Correct ones, and all: (2, heads, classes)
        self.counts = torch.zeros(2, heads, classes, dtype=exact_dtype(device), device=device)

    def add(self, correct: Tensor, label: Tensor, head: int = 0) -> None:
        """Count images with `correct` (B,) and `label` (B,); a label of -1 is left out."""
        target = label.clamp(min=0)
        valid = label >= 0
        for counts, counted in zip(self.counts[:, head], (correct & valid, valid)):
            counts.index_add_(0, target, counted.to(counts.dtype))

    def reduce(self) -> None:
        """Add the counts of all ranks, which must call this together, and once."""
        self.counts = dist.sum_over_ranks(self.counts)

    @property
    def images(self) -> int:
        """The number of images."""
        return int(self.counts[1, 0].sum())

    def accuracies(self) -> list[float]:
        """Return the share of all images that each head classifies correctly, in percent."""
        correct, images = self.counts.sum(2)  # (heads,) each
        return (100 * correct / images).tolist()

    def balanced(self) -> list[Balanced]:
        """Return the mean over the classes that have images, for each head; an empty list for one class."""
        correct, images = self.counts  # (heads, classes) each
        classes = images.shape[1]
        if classes < 2:
            return []
        seen = (images > 0).sum(1)  # (heads,)
        means = 100 * (correct / images.clamp(min=1)).sum(1) / seen.clamp(min=1)  # (heads,)
        return [Balanced(mean, count, classes) for mean, count in zip(means.tolist(), seen.tolist())]


def classification(
    logits: Tensor, label: Tensor, recalls: Recalls | None = None, head: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean cross-entropy and {acc1, acc5 in percent, images} over the readable images.

    Takes logits (B, classes) and labels (B,); a label of -1 marks an image that could not be decoded. Of
    equal logits, which are frequent in bf16, the earlier class counts as the better one, as for argmax. A nan
    counts as better than any number, so that a broken model is never correct. Without readable images all
    values are 0. `recalls` also counts the images, as those of `head`.
    """
    valid = label >= 0
    count = valid.sum()
    target = label.clamp(min=0)[:, None]  # (B, 1)
    logit = logits.gather(1, target)  # (B, 1)
    earlier = torch.arange(logits.shape[1], device=logits.device) < target  # (B, classes)
    # `~(a <= b)` instead of `a > b`: it is true for nan.
    ahead = (~(logits <= logit) | ((logits == logit) & earlier)).sum(
        1
    )  # (B,) classes ahead of the correct one
    loss = F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="sum") / count.clamp(min=1)
    if recalls is not None:
        recalls.add(ahead < 1, label, head)
    stats = {f"acc{k}": 100.0 * ((ahead < k) & valid).sum() / count.clamp(min=1) for k in (1, 5)}
    return loss, stats | {"images": count}
