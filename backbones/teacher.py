"""Frozen classifiers that teach DeiT's distillation token."""

import torch
from torch import nn

from backbones.registry import build_classifier, trained_options
from util.data.sources.image_index import some_names
from util.flags.groups import head_options, resolve_head
from util.weights.checkpoint import load, load_for_evaluation


def build_teacher(
    name: str,
    file: str,
    *,
    classes: list[str],
    img_size: tuple[int, int],
    in_chans: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> nn.Module:
    """A frozen classifier for distillation: a model of ours in `file`, or timm's pretrained one where `file` is ''.

    It takes images that were normalised with the student's `mean` and `std`, whatever its own are. Raises ValueError where
    its classes are not the data's, in their order.
    """
    if file:
        saved = load(file)
        flags = saved.args
        if saved.classes not in (None, classes):
            raise ValueError(
                f"--distill_checkpoint {file} knows the classes {some_names(saved.classes)}, the data have "
                f"{some_names(classes)}: fine-tune a teacher on them"
            )
        options = head_options(name, resolve_head({}, name, saved)) | trained_options(flags)
        teacher = build_classifier(
            name, img_size=img_size, in_chans=in_chans, num_classes=len(classes), **options
        )
        load_for_evaluation(teacher, saved)
        own = flags.get("mean") or mean, flags.get("std") or std
    else:
        teacher = pretrained_teacher(name, len(classes))
        own = teacher.pretrained_cfg["mean"], teacher.pretrained_cfg["std"]
    teacher = Renormalized(teacher, (mean, std), own).eval().requires_grad_(False)
    try:
        teacher(torch.zeros(1, in_chans, *img_size))
    except (AssertionError, RuntimeError) as e:
        size = f"{in_chans}x{img_size[0]}x{img_size[1]}"
        raise ValueError(f"--distill {name} does not take images of {size}: {e}") from e
    return teacher


def pretrained_teacher(name: str, num_classes: int) -> nn.Module:
    """A timm model with its published weights; ValueError where there are none, or its classes are not as many."""
    import timm

    try:
        model = timm.create_model(name.removeprefix("timm/"), pretrained=True)
    except Exception as e:  # an unknown name, no weights, no network: many types, one remedy
        raise ValueError(
            f"--distill {name}: timm cannot give its pretrained weights ({e}); train a teacher with "
            "main_finetune.py and give it with --distill_checkpoint"
        ) from e
    if model.num_classes != num_classes:
        raise ValueError(
            f"--distill {name} knows {model.num_classes} classes, the data have {num_classes}: "
            "fine-tune a teacher on them and give it with --distill_checkpoint"
        )
    return model


class Renormalized(nn.Module):
    """A model for images that were normalised with another (mean, std) than its own."""

    def __init__(self, model: nn.Module, given: tuple, own: tuple):
        super().__init__()
        self.model = model
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(x)[:, None, None] for x in stats] for stats in (given, own)
        )
        self.register_buffer("scale", std / own_std)  # (C, 1, 1)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x * self.scale + self.shift)
