"""What the numbers of an image mean."""

from dataclasses import dataclass

from torch import Tensor

from util.data.transforms import normalize


@dataclass(frozen=True)
class Pixels:
    """How uint8 images become the numbers that a model sees.

    `mean` and `std` have one value per channel, for images scaled to [0, 1].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, images: Tensor) -> Tensor:
        """Scale images (..., C, H, W) from uint8 to float32 with zero mean and unit variance."""
        return normalize(images, self.mean, self.std)
