"""What a checkpoint file holds: the `Checkpoint` type and the kinds of checkpoints."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from util.files import formats
from util.weights.layouts import without_backbone
from util.weights.validate import shown

# The stored flag of a model whose layer norms have another epsilon than the model's own.
EPS_FLAG = "layer_norm_eps"
# Kind -> (its description, the commands and flags that take it).
KINDS = {
    "pretraining": (
        "a full pretraining checkpoint (encoder and decoder)",
        "main_pretrain.py --resume or --init_from; main_segment.py, main_finetune.py and main_linprobe.py "
        "--finetune; visualize.py",
    ),
    "self-distillation": (
        "a checkpoint of main_sere.py (student and teacher)",
        "main_sere.py --resume; main_segment.py, main_finetune.py and main_linprobe.py --finetune, which "
        "take the teacher",
    ),
    "encoder": (
        "an encoder without decoder and heads",
        "main_segment.py, main_finetune.py and main_linprobe.py --finetune",
    ),
    "classifier": (
        "a fine-tuned classifier",
        "main_finetune.py --resume, with --eval to evaluate; main_segment.py, main_finetune.py and "
        "main_linprobe.py --finetune, which take its encoder",
    ),
    "probe": ("a linear probe", "main_linprobe.py --resume"),
    "segmenter": (
        "a segmenter of main_segment.py",
        "main_segment.py --resume, with --eval to evaluate; main_segment.py, main_finetune.py and "
        "main_linprobe.py --finetune, which take its encoder; visualize.py segments",
    ),
    "dense probe": ("linear maps of patch tokens", "main_segment.py --probe linear --resume"),
    "huggingface": ("a Hugging Face file", "checkpoints.py import, with its folder"),
    "dino": (
        "a file of the authors' code of SERE, iBOT or DINO (backbone and heads)",
        "main_finetune.py and main_linprobe.py --finetune; checkpoints.py import",
    ),
    "unknown": ("a file of weights that no command here knows", "none of the commands here"),
}
# Kind -> what the name of one of its weights starts with. The first kind that matches counts: a pretraining
# checkpoint, for example, has the weights of an encoder as well.
_SIGNS = {
    "segmenter": r"segment_head\.",
    "dense probe": r"dense\.\d+\.",
    "self-distillation": r"ibot_head\.",
    "pretraining": r"decoder_",
    # A probe is a list of heads, one for each learning rate.
    "probe": r"head\.\d+\.",
    # `fc` and `fc_visual` are layers of a second-order head.
    "classifier": r"head\.(fc\.|fc_visual\.)?weight$",
    "encoder": r"(blocks|patch_embed)\.",
    "huggingface": r".*\.attention\.attention\.query\.",
    "dino": r"backbone\.",
}
# Weights that only pretraining needs.
PRETRAINING_ONLY = (
    *("decoder_", "mask_token", "ibot_head.", "sr_"),
    # In the backbones of iBOT and SERE.
    *("masked_embed", "channel_sere", "pixel_sere"),
    "segment_head.",
)


def _norm_of_segments(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norm of a linear segmentation head under the name that a classifier's has; {} for other heads."""
    names = {f"segment_head.norm.{part}": f"fc_norm.{part}" for part in ("weight", "bias")}
    return {new: weights[old] for old, new in names.items() if old in weights}


def kind_of(keys: Collection[str]) -> str:
    """The kind of a checkpoint, a key of `KINDS`, from the names of its weights."""
    for kind, pattern in _SIGNS.items():
        if any(re.match(pattern, key) for key in keys):
            return kind
    return "unknown"


@dataclass
class Checkpoint:
    """A checkpoint file in memory, all tensors on the CPU.

    `args` are the stored flags, {} if the file stores none. `classes` are the class names in the order of the
    classifier's outputs. `entries` are all other entries under the names of the file: optimizer, scaler,
    epoch, step, best, meters, and the state dicts of further modules (ema, teacher, centres). `origin` says
    which of several models in the file was taken, if there were several.
    """

    path: str
    model: dict[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None
    entries: dict[str, Any] = field(default_factory=dict)
    origin: str = ""

    @property
    def kind(self) -> str:
        """A key of `KINDS`."""
        return kind_of(self.model)

    @property
    def is_whole_probe(self) -> bool:
        """Whether a probe's file holds its encoder, too, as MAE's files do."""
        return self.kind == "probe" and any(name.startswith("blocks.") for name in self.model)

    @property
    def step(self) -> int | None:
        """Number of optimizer updates done; None for files of other projects."""
        return self.entries.get("step")

    @property
    def epoch(self) -> int | None:
        """The last finished epoch."""
        return self.entries.get("epoch")

    @property
    def ema(self) -> dict[str, Tensor] | None:
        """The moving average of the weights, as torch.optim.swa_utils.AveragedModel stores it."""
        return self.entries.get("ema")

    def evaluated_weights(self) -> dict[str, Tensor]:
        """The weights to evaluate: the moving average if the run kept one, else the model."""
        if self.ema is None:
            return self.model
        # AveragedModel wraps the model and counts the averaged steps.
        return {k.removeprefix("module."): v for k, v in self.ema.items() if k != "n_averaged"}

    def encoder_weights(self) -> dict[str, Tensor]:
        """The weights of the pretrained encoder, without decoder, mask token, prototypes and relation heads.

        Of a self-distillation run they are the teacher's, which the authors of iBOT and SERE evaluate.
        """
        if self.kind == "self-distillation" and "teacher" in self.entries:
            weights = self.entries["teacher"]
        else:
            weights = self.evaluated_weights()
        if self.kind in ("dino", "segmenter"):
            norm = _norm_of_segments(weights)
            weights = without_backbone(weights)
            # A classifier's norm after the mean becomes that of each token in other models.
            if "norm.weight" not in weights:
                weights |= norm
        return {k: v for k, v in weights.items() if not k.startswith(PRETRAINING_ONLY)}

    def check_kind(self, wanted: str) -> None:
        """Raise ValueError, with the commands that take the file, unless it is of the kind `wanted`."""
        if self.kind == wanted:
            return
        description, commands = KINDS[self.kind]
        if self.kind == "unknown":
            description += f" (it has {', '.join(map(shown, list(self.model)[:4]))})"
        if self.kind == "huggingface":
            # The names of its weights, and what the weights do not show, follow from config.json beside it.
            commands += f": {formats.hf_import(os.path.dirname(self.path))}"
        raise ValueError(f"{self.path} is {description}, not {KINDS[wanted][0]}: it is for {commands}")

    def drop_optimizer(self) -> None:
        """Free the optimizer state, which takes twice the memory of the weights."""
        self.entries.pop("optimizer", None)

    def release(self) -> None:
        """Free all tensors. Path, flags and class names stay."""
        # The dictionaries themselves may be in use elsewhere, so they are not cleared.
        self.model = {}
        self.entries = {}

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that a file stores."""
        # `classes` stays out if unknown: readers take a stored list as the truth.
        stored: dict[str, Any] = {"model": self.model, "args": self.args}
        if self.classes is not None:
            stored["classes"] = self.classes
        return stored | self.entries


def stored_eps(flags: Mapping[str, Any]) -> dict[str, float]:
    """The flag EPS_FLAG alone if it is among the stored flags, else nothing."""
    return {name: value for name, value in flags.items() if name == EPS_FLAG and value is not None}


def stored_flags(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The flags stored in a checkpoint; {} for a run that starts without one."""
    if checkpoint is None:
        return {}
    return checkpoint.args
