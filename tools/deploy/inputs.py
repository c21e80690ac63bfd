"""How images become a model's input, in the words of the libraries that exported weights are for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from util.data.transforms import default_crop_pct
from util.flags.groups import channel_stats
from util.weights.types import Checkpoint

# The field of a configuration that holds `input_flags`, and the same in the metadata of other files.
INPUT_FIELD = "mae_pl_input"
INPUT_NAMES = ("range", "mean", "std", "channels", "bands", "alpha", "exif")
# PIL's number of the bicubic filter, by which images are resized here.
BICUBIC = 3
MOST_CROP = 2.0  # of the resized image; the largest value that evaluation takes


def input_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a checkpoint's flags that say how images become the model's input, if they are not 8-bit RGB.

    Grey images of 8 bits with all of their channels are usual as well.
    """
    usual = flags.get("in_chans", 3) in (1, 3) and not (flags.get("range") or flags.get("channels"))
    if usual:
        return {}
    return {name: flags[name] for name in INPUT_NAMES if flags.get(name) not in (None, "drop", "ignore")}


@dataclass(frozen=True)
class InputFacts:
    """How images become the input of a model, as evaluation does it.

    Attributes:
        size: (H, W) of the input in pixels.
        in_chans: its channels.
        crop_pct: the share of the resized image that the centre crop shows.
        mean, std: one value a channel, of values in [0, 1]; () if nothing tells them.
        stored: whether the checkpoint stores them. Otherwise they are ImageNet's.
        unusual: `input_flags` of the checkpoint.
    """

    size: tuple[int, int]
    in_chans: int
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stored: bool
    unusual: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint, size: tuple[int, int], in_chans: int) -> "InputFacts":
        """Those of a checkpoint whose model takes images of `size` with `in_chans` channels.

        Raises ValueError if the stored mean and std are not one value, or one a channel.
        """
        flags = checkpoint.args
        mean = flags.get("mean")
        std = flags.get("std")
        # A run that was given none used ImageNet's, and stores that there are none.
        stored = bool(mean and std) or {"mean", "std"} <= flags.keys()
        unusual = input_flags({**flags, "in_chans": in_chans})
        means: tuple[float, ...] = ()
        stds: tuple[float, ...] = ()
        if stored or in_chans in (1, 3):
            means, stds = channel_stats(in_chans, mean, std)
        return cls(size, in_chans, _crop_pct(flags, size), means, stds, stored, unusual)

    @property
    def resized(self) -> tuple[int, int]:
        """(H, W) that the resized image covers before the crop."""
        return int(self.size[0] / self.crop_pct), int(self.size[1] / self.crop_pct)

    def note(self) -> str:
        """A line about mean and std that are not the checkpoint's; '' if they are."""
        if self.stored or not self.mean:
            return ""
        return "the checkpoint does not store mean and std: ImageNet's are written"

    def without_processor(self) -> str:
        """Why no image processor of transformers can be described; '' if one can."""
        if self.unusual or not self.mean:
            return "its images are not 8-bit RGB or grey, and transformers' processors read no others"
        return ""

    def hf_processor(self) -> dict[str, Any]:
        """The fields of preprocessor_config.json, for images of 8 bits.

        A square is resized and cropped as here. transformers' ViT processor does so in its newer versions
        only, and its BiT processor in all: hence that one. No processor keeps the aspect ratio for a
        rectangle, which is resized without a crop.
        """
        height, width = self.size
        config: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor",
            # One that makes grey images RGB.
            "do_convert_rgb": self.in_chans == 3,
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": BICUBIC,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if height == width:
            config |= {
                "image_processor_type": "BitImageProcessor",
                "size": {"shortest_edge": self.resized[0]},
                "do_center_crop": True,
                "crop_size": {"height": height, "width": width},
            }
        return config

    def hf_note(self) -> str:
        """How transformers' processor treats images, in a line."""
        if reason := self.without_processor():
            return f"no preprocessor_config.json: {reason}"
        height, width = self.size
        if height == width:
            steps = f"shorter side {self.resized[0]}, centre crop {height}x{width}"
        else:
            steps = (
                f"resized to {height}x{width} without a crop, which changes the aspect ratio; evaluation "
                "here keeps it, and crops"
            )
        return f"preprocessor_config.json: {steps}"

    def timm_config(self, num_classes: int, classes: list[str] | None = None) -> dict[str, Any]:
        """timm's `pretrained_cfg` of a Vision Transformer with these images."""
        config: dict[str, Any] = {
            "input_size": (self.in_chans, *self.size),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": self.crop_pct,
            "crop_mode": "center",
            "num_classes": num_classes,
            "classifier": "head",
        }
        if self.mean:
            config |= {"mean": self.mean, "std": self.std}
        # timm adapts the layer of this name to other channels, and takes it to have three.
        if self.in_chans == 3:
            config["first_conv"] = "patch_embed.proj"
        if classes:
            config["label_names"] = tuple(classes)
        return config

    def metadata(self) -> dict[str, Any]:
        """Everything by name, for files that no library has names for."""
        facts: dict[str, Any] = {
            "input": "images, float32 (batch, channels, height, width): (values in [0, 1] - mean) / std",
            "size": list(self.size),
            "channels": self.in_chans,
            "resize": list(self.resized),
            "crop_pct": self.crop_pct,
            "interpolation": "bicubic",
        }
        if self.mean:
            facts |= {"mean": list(self.mean), "std": list(self.std)}
        if self.unusual:
            facts[INPUT_FIELD] = self.unusual
        return facts


def _crop_pct(flags: Mapping[str, Any], size: tuple[int, int]) -> float:
    """The share of the centre crop in the run's evaluation, or that of evaluation if none is stored."""
    value = flags.get("crop_pct")
    # A comparison with nan is false.
    if isinstance(value, int | float) and 0 < value <= MOST_CROP:
        return float(value)
    return default_crop_pct(size)
