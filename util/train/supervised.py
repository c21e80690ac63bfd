"""Supervised training: the augmentation of batches on the device, and the loss with positional labels and a
teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.positional.draws import draws_of


@dataclass(frozen=True)
class Erasing:
    """Random erasing (Zhong et al. 2017), by timm: its probability, its fill, and the largest number of
    boxes.
    """

    probability: float = 0.0
    mode: str = "pixel"
    max_count: int = 1


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019), by timm.

    `mixup` and `cutmix` are alphas of Beta distributions; 0 turns one off. `cutmix_minmax` gives the range of
    the box instead of its alpha. `probability` is that of mixing at all, `switch_probability` that of CutMix
    if both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: list[float] | None = None
    probability: float = 1.0
    switch_probability: float = 0.5
    mode: str = "batch"

    @property
    def active(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0 or bool(self.cutmix_minmax)


class BatchAugmentation:
    """Augments a batch on the device: random erasing, then mixup or CutMix.

    `mixes` says whether targets are soft, (B, num_classes), and include the label smoothing.
    """

    def __init__(
        self, num_classes: int, smoothing: float, erasing: Erasing, mixing: Mixing, device: torch.device
    ):
        # timm takes seconds to import.
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        self.mixes = mixing.active
        self._erase: Callable | None = None
        if erasing.probability > 0:
            self._erase = RandomErasing(
                erasing.probability, mode=erasing.mode, max_count=erasing.max_count, device=device
            )
        self._mix: Callable | None = None
        if self.mixes:
            self._mix = Mixup(
                mixing.mixup,
                mixing.cutmix,
                mixing.cutmix_minmax,
                mixing.probability,
                mixing.switch_probability,
                mixing.mode,
                label_smoothing=smoothing,
                num_classes=num_classes,
            )

    def check(self, batch_size: int) -> None:
        """Raise ValueError for an odd batch, whose images cannot be mixed in pairs."""
        if self.mixes and batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even `batch_size`, found {batch_size}")

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W) and targets: (B,) classes, or (B, num_classes) if images are mixed."""
        if self._erase is not None:
            images = self._erase(images)
        if self._mix is not None:
            return self._mix(images, labels)
        return images, labels


@dataclass
class SupervisedLoss:
    """L_class + pos_weight * L_position (Zhang et al. 2023, Eq. 6) of a batch after its augmentation.

    Mixup mixes class targets only; positional labels are the cells of the augmented image. With a `teacher`,
    a classifier, L_class is the mean of the class token's loss and of the distillation token's loss.
    """

    augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    smoothing: float = 0.0
    positions: bool = False
    pos_weight: float = 0.5
    teacher: nn.Module | None = None

    def __call__(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms: class, distill, and those of the label head."""
        images, target = self.augment(batch["image"], batch["label"])
        options: dict[str, Any] = {}
        if self.positions:
            options = {"positions": True, "draws": draws_of(batch)}
        if self.teacher is not None:
            options["distillation"] = True
        positions: dict[str, Tensor] = {}
        logits = model(images, **options)
        if self.positions:
            logits, positions = logits
        terms = {}
        if self.teacher is None:
            loss = terms["class"] = self._cross_entropy(logits, target)
        else:
            # Hard distillation (Touvron et al. 2021, Eq. 3): the distillation token learns
            # the teacher's prediction.
            logits, distilled = logits
            with torch.no_grad():
                predicted = self.teacher(images).argmax(-1)
            terms["distill"] = F.cross_entropy(distilled.float(), predicted)
            terms["class"] = self._cross_entropy(logits, target)
            loss = (terms["class"] + terms["distill"]) / 2
        if positions:
            loss = loss + self.pos_weight * positions["position"]
        return loss, terms | positions

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        smoothing = self.smoothing
        # Soft targets, which mixup makes, are smoothed already.
        if target.is_floating_point():
            smoothing = 0.0
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)
