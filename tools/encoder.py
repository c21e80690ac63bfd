"""Trained models for use from Python: an encoder or a classifier with the transform of its images.

Shapes: B images, (C, H, W) channels and pixels of an image, N patch tokens of a grid (h, w), D channels of a
    token, K classes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from layers.classifier import Classifier
from layers.contract import Backbone
from tools import stored_model
from tools.deploy.models import registered_classifier
from tools.draw import stats_of
from tools.features import backbone_of, is_plain_vit
from util.data.formats import ReadSettings, decode, image_to_tensor
from util.data.formats.arrays import as_tensor
from util.data.formats.settings import depth_name
from util.data.pixels import BYTE_RANGE, Pixels, split_range
from util.data.transforms import CenterCrop, eval_transform
from util.files.names import printable
from util.weights import checkpoint


@dataclass(frozen=True)
class ImageTransform:
    """From an image to the numbers that a model was trained with: resized, centre cropped and normalised.

    It is the transform by which the mains evaluate. Attributes:
        read: which channels, and what becomes of transparency and EXIF orientations.
        crop: resizes and crops to `size`.
        pixels: range, mean and standard deviation of the training.
    """

    read: ReadSettings
    crop: CenterCrop
    pixels: Pixels

    @classmethod
    def of(cls, model: Backbone, flags: Mapping[str, Any]) -> "ImageTransform":
        """That of a trained model and the flags stored with it; 8-bit images with ImageNet's statistics
        without any.

        Raises ValueError if the statistics of the channels are not known.
        """
        stats = stats_of(model, dict(flags))
        values = split_range([float(bound) for bound in flags.get("range") or (0, 255)])
        deep = (flags.get("image_depth") or "uint8") != "uint8" or values != BYTE_RANGE
        pixels = Pixels(stats.mean, stats.std, *values, deep)
        read = ReadSettings.of({**flags, "in_chans": model.in_chans})
        return cls(read, eval_transform(model.img_size, flags.get("crop_pct")), pixels)

    @property
    def size(self) -> tuple[int, int]:
        """The height and the width of the result."""
        return self.crop.size

    def __call__(self, image: Any) -> Tensor:
        """Return an image as float32 (C, H, W), normalised.

        Takes a PIL image, the path of an image, or an array or tensor (H, W), (H, W, C) or (C, H, W). Floats
        are between 0 and 1 for models of 8-bit images, as torchvision's are, and in the units of `range` for
        others. Raises ValueError for another number of channels and for values of another depth, and OSError
        for a file that cannot be read.
        """
        values = self._values(image)
        if values.shape[0] != self.read.in_chans:
            raise ValueError(
                f"the model sees {self.read.in_chans} channels, and the image has {values.shape[0]} "
                f"(its shape is {tuple(values.shape)})"
            )
        return self.pixels.normalize(self.crop(values))

    def _values(self, image: Any) -> Tensor:
        """The image as (C, H, W) in units of the range."""
        if isinstance(image, str | os.PathLike):
            with open(image, "rb") as file:
                return self._checked(decode(file.read(), self.read))
        if isinstance(image, Image.Image):
            return self._checked(image_to_tensor(image, self.read))
        values = image.detach().cpu() if torch.is_tensor(image) else as_tensor(np.asarray(image))
        values = self._channels_first(values)
        if not self.pixels.deep and values.is_floating_point():
            return _of_bytes(values.float())
        return self._checked(values)

    def _channels_first(self, values: Tensor) -> Tensor:
        if values.ndim == 2:
            values = values[None]
        if values.ndim != 3 or not values.numel():
            raise ValueError(
                f"an image has the shape (H, W), (H, W, C) or (C, H, W), found {tuple(values.shape)}: give "
                "one image at a time"
            )
        channels = self.read.in_chans
        if values.shape[0] not in (1, channels) and values.shape[2] in (1, channels):
            values = values.permute(2, 0, 1).contiguous()
        if values.shape[0] == 1 and channels == 3:
            values = values.expand(3, -1, -1)
        return values

    def _checked(self, values: Tensor) -> Tensor:
        if (values.dtype == torch.uint8) != self.pixels.deep:
            return values
        trained = "more than 8 bits" if self.pixels.deep else "8 bits"
        raise ValueError(
            f"the model was trained on images of {trained}, and this one is {depth_name(values.dtype)}: give "
            "the images in the depth of the training"
        )


def _of_bytes(values: Tensor) -> Tensor:
    """Floats from 0 to 1 -> 0 to 255; uint8 if they were bytes before, whose resizing rounds in between.

    Raises ValueError for other floats.
    """
    low, high = (float(end) for end in values.aminmax())
    # Comparisons with nan are false.
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"floats are between 0 and 1 for this model of 8-bit images, found {low:g} to {high:g}: give "
            "uint8, or divide by 255"
        )
    scaled = values * 255
    rounded = scaled.round()
    if float((scaled - rounded).abs().max()) < 1e-3:
        return rounded.to(torch.uint8)
    return scaled


class Encoder(nn.Module):
    """A frozen encoder with the transform of its images.

    `encoder(images)` is the class token (B, D), or the mean of the patch tokens for models without one.

    Attributes:
        backbone: the model.
        transform: one image -> (C, H, W); see `ImageTransform`.
        dim: D.
        img_size: (H, W) of the training. Plain ViTs take any size that their patches fill.
        flags: those of the training.
    """

    def __init__(self, backbone: Backbone, transform: ImageTransform, flags: Mapping[str, Any]):
        super().__init__()
        self.backbone = backbone
        self.transform = transform
        self.flags = dict(flags)
        self.dim = backbone.dim
        self.img_size = tuple(backbone.img_size)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """The grid (h, w) of the patch tokens of images (B, C, H, W); raises ValueError for a wrong size."""
        return self.backbone.grid_of((images.shape[-2], images.shape[-1]))

    def features(self, images: Tensor) -> dict[str, Tensor | None]:
        """Normalised images (B, C, H, W) -> {"cls", "patches", "mean"}, after the encoder's final norm.

        `cls` is the class token (B, D), or None; `patches` are the patch tokens (B, N, D), row by row of
        `grid_of`; `mean` is their mean (B, D). Raises ValueError for a size that the model does not take.
        """
        backbone = self.backbone
        tokens = backbone.forward_any_size(images)  # (B, num_prefix + N, D)
        # In classifiers that pool the average, the final norm follows it.
        norm = getattr(backbone, "fc_norm", None)
        if norm is not None:
            tokens = norm(tokens)
        patches = tokens[:, backbone.num_prefix :]
        cls = tokens[:, 0] if backbone.num_prefix else None
        return {"cls": cls, "patches": patches, "mean": patches.mean(dim=1)}

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> (B, D)."""
        found = self.features(images)
        summary = found["mean"] if found["cls"] is None else found["cls"]
        assert summary is not None
        return summary


class TrainedClassifier(nn.Module):
    """A trained classifier with the transform of its images and the names of its classes.

    `classifier(images)` are logits (B, K).

    Attributes:
        model: the classifier.
        transform: one image -> (C, H, W); see `ImageTransform`.
        classes: the names of the K outputs; [] if the file does not store them.
    """

    def __init__(self, model: Classifier, transform: ImageTransform, classes: list[str]):
        super().__init__()
        self.model = model
        self.transform = transform
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> logits (B, K)."""
        return self.model(images)


def load_encoder(path: str | os.PathLike) -> Encoder:
    """The frozen encoder of a checkpoint, on the CPU and in evaluation mode.

    Takes a file, the folder of a run, an https address, or timm/NAME for the weights that timm publishes.
    Raises ValueError if there is no encoder in it, and OSError if it cannot be read.
    """
    backbone, flags = backbone_of(os.fspath(path))
    return Encoder(backbone, ImageTransform.of(backbone, flags), flags).eval()


def load_classifier(path: str | os.PathLike) -> TrainedClassifier:
    """The trained classifier of a checkpoint, on the CPU and in evaluation mode.

    Raises ValueError if there is none in it, and OSError if it cannot be read.
    """
    saved = checkpoint.load(os.fspath(path))
    saved.drop_optimizer()
    saved.check_kind("classifier")
    model: Any
    if is_plain_vit(saved):
        model = stored_model.model_of(saved)
    else:
        model = registered_classifier(saved)
    if not model.num_classes:
        raise ValueError(f"{printable(saved.path)} has no class head: load it as an encoder")
    transform = ImageTransform.of(model, saved.args)
    model.requires_grad_(False)
    return TrainedClassifier(model, transform, list(saved.classes or [])).eval()
