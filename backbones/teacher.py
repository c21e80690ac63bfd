"""Frozen classifiers that teach DeiT's distillation token."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbones.heads import head_options, resolve_head
from backbones.registry import build_classifier, norm_options, trained_options
from util.data.sources.image_index import some_names
from util.weights.checkpoint import load, load_for_evaluation


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, with which images are normalised."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    range: list[float] | None = None


def build_teacher(
    distill: str,
    distill_checkpoint: str,
    *,
    classes: list[str],
    img_size: tuple[int, int],
    in_chans: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    value_range: list[float] | None = None,
) -> nn.Module:
    """A frozen classifier for distillation.

    `distill` is the name of a model whose weights are in the file `distill_checkpoint`, or, if that is '', a
    model of timm with its published weights. The teacher takes images normalised with the student's `mean`
    and `std`, and converts them to its own statistics. Raises ValueError if its classes are not the data's
    `classes`, in their order, if it does not take images of that size, and if it was trained on another
    `value_range`, which cannot be converted: values outside of the student's are clipped.
    """
    given = Statistics(mean, std, value_range)
    teacher: Any
    if distill_checkpoint:
        teacher, own = _stored_teacher(distill, distill_checkpoint, classes, img_size, in_chans, given)
    else:
        teacher = pretrained_teacher(distill, len(classes))
        own = Statistics(teacher.pretrained_cfg["mean"], teacher.pretrained_cfg["std"])
    teacher = Renormalized(teacher, given, own).eval().requires_grad_(False)
    try:
        teacher(torch.zeros(1, in_chans, *img_size))
    except (AssertionError, RuntimeError) as e:
        size = f"{in_chans}x{img_size[0]}x{img_size[1]}"
        raise ValueError(f"`distill` {distill} does not take images of {size}: {e}") from e
    return teacher


def _stored_teacher(
    name: str,
    path: str,
    classes: list[str],
    img_size: tuple[int, int],
    in_chans: int,
    given: Statistics,
) -> tuple[nn.Module, Statistics]:
    """The model in a checkpoint, and the statistics of its images, by default the `given` ones."""
    saved = load(path)
    flags = saved.args
    if saved.classes not in (None, classes):
        raise ValueError(
            f"`distill_checkpoint` {path} knows the classes {some_names(saved.classes)}, the data have "
            f"{some_names(classes)}: fine-tune a teacher on them"
        )
    options = head_options(name, resolve_head({}, name, saved)) | trained_options(flags)
    options |= norm_options(name, flags)
    teacher = build_classifier(
        name, img_size=img_size, in_chans=in_chans, num_classes=len(classes), **options
    )
    load_for_evaluation(teacher, saved)
    if flags.get("range") != given.range:
        own_range, students = (_range_text(each) for each in (flags.get("range"), given.range))
        raise ValueError(
            f"`distill_checkpoint` {path} was trained with `range` {own_range}, and the student has "
            f"{students}: train both with the same range"
        )
    own = Statistics(flags.get("mean") or given.mean, flags.get("std") or given.std)
    if len(own.mean) != in_chans or len(own.std) != in_chans:
        raise ValueError(
            f"`distill_checkpoint` {path} stores statistics of {len(own.mean)} and {len(own.std)} channels, "
            f"the images have {in_chans}: use another teacher"
        )
    return teacher, own


def _range_text(ends: list[float] | None) -> str:
    return " ".join(f"{end:g}" for end in ends or (0, 255))


def pretrained_teacher(distill: str, num_classes: int) -> nn.Module:
    """A timm model with its published weights.

    Raises ValueError if timm does not have them, and if the number of its classes is not `num_classes`.
    """
    # timm takes seconds to import.
    from backbones.timm import published_model

    try:
        model: Any = published_model(distill)
    except ValueError as e:
        raise ValueError(
            f"`distill` {distill}: {e}; train a teacher with main_finetune.py and give it as "
            "`distill_checkpoint`"
        ) from e
    if model.num_classes != num_classes:
        raise ValueError(
            f"`distill` {distill} knows {model.num_classes} classes, the data have {num_classes}: "
            "fine-tune a teacher on them and give it as `distill_checkpoint`"
        )
    return model


class Renormalized(nn.Module):
    """A model for images that were normalised with other statistics than the model's own."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, given: Statistics, own: Statistics):
        super().__init__()
        self.model = model
        own_std = _per_channel(own.std)
        # x_own = (x_given * std + mean - own_mean) / own_std
        self.register_buffer("scale", _per_channel(given.std) / own_std)  # (C, 1, 1)
        self.register_buffer("shift", (_per_channel(given.mean) - _per_channel(own.mean)) / own_std)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) normalised with the given statistics -> the model's output."""
        return self.model(x * self.scale + self.shift)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]  # (C, 1, 1)
