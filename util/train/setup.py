"""The two records that training and evaluation share: where a model runs, and how long it trains."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from util.data.pixels import Pixels
from util.train.amp import autocast, described


@dataclass(frozen=True)
class Setup:
    """Device, precision, image size (H, W), and the meaning of pixel values."""

    device: torch.device
    amp: str
    size: tuple[int, int]
    pixels: Pixels

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which forward passes run."""
        return autocast(self.device, self.amp)

    @property
    def precision(self) -> str:
        """The name of the precision for messages."""
        return described(self.amp, self.device)

    def __str__(self) -> str:
        return f"{self.precision} on {self.device}"


@dataclass(frozen=True)
class Budget:
    """How long a run trains, and by which rules.

    `lr_at` maps epochs done, a fraction within an epoch, to the learning rate. `accum_iter` is the number of
    batches per update. `clip_grad` is the largest gradient norm; None and 0 mean no clipping. `compile_mode`
    is a mode of torch.compile; None means that the model is not compiled. `max_bad_images` is the share of
    images that may fail to decode. After `max_steps` updates the run saves and stops, although its epochs are
    not done; None means no such limit.
    """

    epochs: int
    lr_at: Callable[[float], float]
    seed: int = 0
    accum_iter: int = 1
    clip_grad: float | None = None
    compile_mode: str | None = None
    max_bad_images: float = 0.01
    max_steps: int | None = None
