"""Pictures of what a segmenter predicts: validation images beside their masks."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from backbones.registry import MODELS, build_classifier, norm_options
from layers.segmentation import KINDS, Segmenter
from tools.draw import USUAL, Display, bands_of, stats_of
from util.data.formats import ReadSettings
from util.data.loading.loader import some_samples
from util.data.segments.dataset import SegmentDataset, build_segment_dataset
from util.data.segments.masks import MaskSettings
from util.data.segments.transforms import SegmentEval
from util.data.survey.ranges import with_range
from util.evaluate.segments.figures import Protocol
from util.evaluate.segments.grading import Evaluation, predict_samples
from util.files.names import counted, printable
from util.flags.data_path import DataPath
from util.flags.groups import pair
from util.report.segments import SegmentView, segment_panel
from util.weights import checkpoint
from util.weights.architecture import whole_numbers
from util.weights.defaults import known_flags
from util.weights.types import Checkpoint


def segments(path: str, data_path: DataPath, n: int, display: Display = USUAL) -> np.ndarray:
    """The picture of `segment_panel` for n validation images, evenly spread, as uint8 (H', W', 3).

    Images and predictions are made as the run that wrote the file evaluates them, in float32. Raises
    ValueError if the file is no segmenter, if the images have no masks or other classes, and if none can be
    read.
    """
    saved = checkpoint.load(path)
    saved.check_kind("segmenter")
    saved.drop_optimizer()
    backbone_flags = _model_flags(saved)
    data = _validation_set(saved, data_path, backbone_flags)
    model = _segmenter(saved, backbone_flags, len(data.classes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval().requires_grad_(False)
    backbone = model.backbone
    stats = stats_of(backbone, saved.args)
    pixels = with_range(stats, data, display.range, scaled=False, trained=saved.args)
    samples = some_samples(data, n)
    size = backbone.img_size
    cell = size[0] // backbone.grid[0], size[1] // backbone.grid[1]
    evaluation = Evaluation(_protocol(saved.args, data), cell)
    found = predict_samples(model, samples, evaluation, pixels, device)
    if not found:
        number = next(sample["index"] for sample in samples if sample["bad"])
        raise ValueError(
            f"none of {counted(len(samples), 'image')} in {printable(data_path)} can be read; "
            f"{printable(data.name(number))}: {printable(data.fault(number))}"
        )
    if len(found) < len(samples):
        print(f"left out {counted(len(samples) - len(found), 'image')} that cannot be read")
    bands = bands_of(backbone, saved.args, display)
    views = [SegmentView(bands.shown(each.image)[0], each.mask, each.prediction) for each in found]
    return segment_panel(views, data.classes, bands.note)


def _model_flags(saved: Checkpoint) -> dict[str, Any]:
    """Name, sizes and channels of the stored model. Raises ValueError if the file does not tell them."""
    known = known_flags(saved, list(MODELS))
    missing = [name for name in ("model", "input_size", "in_chans") if name not in known]
    if missing:
        raise ValueError(
            f"{printable(saved.path)} does not store {', '.join(f'`{name}`' for name in missing)} of its "
            "run: give a checkpoint of main_segment.py"
        )
    return known


def _segmenter(saved: Checkpoint, known: dict[str, Any], classes: int) -> Segmenter:
    """The segmenter with the weights of a file. Raises ValueError if they do not fit its flags."""
    flags = saved.args
    # Fine-tuning takes a learned embedding if not told otherwise.
    embedding = _choice(flags, "pos_embed", ("none", "sincos", "learned"), "learned")
    options = norm_options(known["model"], flags) | {"pos_embed": embedding}
    if known.get("patch_size"):
        options["patch_size"] = pair(known["patch_size"], "patch_size")
    size = pair(known["input_size"], "input_size")
    backbone = build_classifier(
        known["model"], img_size=size, in_chans=known["in_chans"], num_classes=0, **options
    )
    model = Segmenter(backbone, classes, _choice(flags, "head", KINDS, KINDS[0]))
    checkpoint.load_strict(model, saved)
    return model


def _validation_set(saved: Checkpoint, data_path: DataPath, known: dict[str, Any]) -> SegmentDataset:
    """The validation images with masks, as the run evaluates them."""
    flags = saved.args
    read = ReadSettings.of(flags | {"in_chans": known["in_chans"]})
    transform = SegmentEval()
    images = _choice(flags, "eval_images", ("short", "exact", "own"), "short")
    size = pair(known["input_size"], "input_size")
    if images == "exact":
        transform = SegmentEval(size)
    elif images == "short":
        transform = SegmentEval(short_side=_number(flags, "eval_side", 1) or round(min(size) * 256 / 224))
    found: dict[str, Any] = {}
    for name, least in (("num_classes", 1), ("ignore_index", -1)):
        if _number(flags, name, least) is not None:
            found[name] = flags[name]
    if flags.get("reduce_zero_label") is True:
        found["reduce_zero_label"] = True
    data = build_segment_dataset(
        data_path, "val", transform, read=read, masks=MaskSettings(**found), evaluation=True
    )
    data.check_classes(saved.classes, saved.path)
    return data


def _protocol(flags: dict, data: SegmentDataset) -> Protocol:
    window = stride = None
    if whole_numbers(flags.get("window")):
        window = pair(whole_numbers(flags["window"]), "window")
        stride = max(1, 2 * window[0] // 3), max(1, 2 * window[1] // 3)
        if whole_numbers(flags.get("stride")):
            stride = pair(whole_numbers(flags["stride"]), "stride")
    return Protocol(
        image="as it is evaluated",
        window=window,
        stride=stride,
        ignore=data.settings.ignore_index,
        classes=len(data.classes),
        max_res=_number(flags, "max_res", 1),
        upsample=_choice(flags, "upsample", ("bilinear", "nearest"), "bilinear"),
    )


def _choice(flags: dict, name: str, choices: Collection[str], usual: str) -> str:
    """A stored choice; the usual one if it is none of them."""
    value = flags.get(name)
    if isinstance(value, str) and value in choices:
        return value
    return usual


def _number(flags: dict, name: str, least: int) -> int | None:
    """A stored whole number; None if there is none of at least `least`."""
    value = flags.get(name)
    if type(value) is int and value >= least:
        return value
    return None
