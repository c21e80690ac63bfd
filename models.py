"""All classifiers by name: ours, and any timm backbone as timm/NAME."""
import difflib

import torch
from torch import nn

import models_so_vit
import models_swin
import models_vit

MODELS = models_vit.MODELS | models_swin.MODELS | models_so_vit.MODELS


def build_classifier(name: str, **options):
    """`options` are the builder's keywords; ValueError names what there is, and the option that a model does not take."""
    if name.startswith("timm/"):
        from models_timm import timm_model  # timm takes seconds to import

        return timm_model(name.removeprefix("timm/"), **options)
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        raise ValueError(f"--model {name} is unknown" + (f"; did you mean {near[0]}?" if near else "")
                         + f" There are {', '.join(MODELS)}, and timm/NAME for timm's")
    return MODELS[name](**options)


class PretrainedTeacher(nn.Module):
    """A timm model with its published weights, for images that were normalised with our mean and std -> logits.

    Raises ValueError where its classes are not as many as the data's; the weights come from timm's hub.
    """

    def __init__(self, name: str, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        import timm

        try:
            self.model = timm.create_model(name.removeprefix("timm/"), pretrained=True)
        except Exception as e:  # an unknown name, no weights, no network: many types, one remedy
            raise ValueError(f"--distill {name}: timm cannot give its pretrained weights ({e}); train a teacher with "
                             "main_finetune.py and give it with --distill_checkpoint") from e
        if self.model.num_classes != num_classes:
            raise ValueError(f"--distill {name} knows {self.model.num_classes} classes, the data have {num_classes}: "
                             "fine-tune a teacher on them and give it with --distill_checkpoint")
        own_mean, own_std = (torch.tensor(self.model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
        mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
        self.register_buffer("scale", std / own_std)  # (C, 1, 1)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x * self.scale + self.shift)
