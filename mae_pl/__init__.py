"""The toolkit from Python, from any folder, beside any modules of your own.

    import mae_pl

    encoder = mae_pl.encoder("RUN/checkpoint-last.pth")
    images = torch.stack([encoder.transform(image) for image in pil_images])
    features = encoder.features(images)        # {"cls": (B, D), "patches": (B, N, D), "mean": (B, D)}

    model = mae_pl.model("mae_vit_base_patch16", img_size=224)      # untrained
    losses, pred, mask = model(images, mask_ratio=0.75)
    mae_pl.total(losses, pos_weight=0.5).backward()

The rooms of the toolkit are modules of this package: `mae_pl.util`, `mae_pl.layers`, `mae_pl.models_mae_pl`.
A module `util` or `models` of your own stays what it is.
"""

import os
from typing import TYPE_CHECKING, Any

from mae_pl import rooms

rooms.install()

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tools.encoder import Encoder, TrainedClassifier


def encoder(checkpoint: str | os.PathLike) -> "Encoder":
    """The frozen encoder of a checkpoint: a file, the folder of a run, an https address, or timm/NAME.

    It is on the CPU and in evaluation mode, and has `.transform(image)` and `.features(images)`. Raises
    ValueError if there is no encoder in the file, and OSError if it cannot be read.
    """
    from mae_pl.tools.encoder import load_encoder

    return load_encoder(checkpoint)


def classifier(checkpoint: str | os.PathLike) -> "TrainedClassifier":
    """The fine-tuned classifier of a checkpoint, on the CPU and in evaluation mode.

    It has `.transform(image)` and `.classes`. Raises ValueError if there is none in the file, and OSError if
    it cannot be read.
    """
    from mae_pl.tools.encoder import load_classifier

    return load_classifier(checkpoint)


def model(name: str, **options: Any) -> "nn.Module":
    """A model of the registries with random weights: mae_vit_base_patch16, vit_base_patch16, timm/NAME, ...

    `options` are those of its entry: img_size=64 or (64, 128), patch_size, in_chans, pos_label, ...
    Raises ValueError for an unknown name or option, and as the model does.
    """
    from mae_pl.backbones.registry import build_classifier
    from mae_pl.models_mae_pl import MODELS
    from mae_pl.util.flags.early import check_model

    if name.startswith("mae_"):
        check_model("main_pretrain", name, list(MODELS))
        return MODELS[name](**options)
    return build_classifier(name, **options)


def total(losses: "dict[str, Tensor]", pos_weight: float = 0.5) -> "Tensor":
    """The loss to minimise, of what a masked autoencoder returns: pixel + pos_weight * position."""
    from mae_pl.models_mae_pl import total as total_loss

    return total_loss(losses, pos_weight)


def names() -> list[str]:
    """The names that `model` knows, without timm's."""
    from mae_pl.backbones.registry import MODELS as classifiers
    from mae_pl.models_mae_pl import MODELS as autoencoders

    return sorted([*autoencoders, *classifiers])


__all__ = ["classifier", "encoder", "model", "names", "total"]
