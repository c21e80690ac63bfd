"""Which values become 0 and 1: as given, from percentiles, or an error with what was found."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from util import dist
from util.data.formats import depth_name
from util.data.pixels import BYTE_RANGE, Pixels, split_range
from util.data.survey.headers import spread
from util.data.survey.values import Values
from util.data.transforms import check_depth
from util.files.names import counted, printable

SAMPLED = 64  # images whose values are looked at
# Percentiles of a suggested range: a few broken pixels do not decide it.
SUGGESTED = (0.1, 99.9)
# Torchvision's convention for images whose mean and standard deviation are given: the type's largest value is
# 1, and float32 values are in [0, 1] already.
CONVENTION = {torch.uint16: (0.0, 65535.0), torch.float32: (0.0, 1.0)}

MOST_PAIRS = 3  # of a range in messages

Bounds = Sequence[float | str]
Range = tuple[tuple[float, ...], tuple[float, ...]]


def percent(bound: float | str) -> float | None:
    """Return the number of a percentile "p99.5"; None for a value. Raises ValueError for anything else."""
    if not isinstance(bound, str):
        return None
    match = re.fullmatch(r"p(\d+(?:\.\d+)?)", bound)
    if match is None or float(match[1]) > 100:
        raise ValueError(f"`range` takes values and percentiles from p0 to p100, found {bound}")
    return float(match[1])


def settle_range(
    dataset: Any, given: Bounds | None, scaled: bool, trained: Mapping[str, Any] | None = None
) -> Range:
    """Return the low and the high values of a data set, on all ranks together.

    Args:
        dataset: an opened data set, with its `depth`.
        given: `range` as the user gave it: values, or percentiles of a sample; None if not.
        scaled: whether the user gave mean and standard deviation.
        trained: the flags of the training of the checkpoint that the run starts from, with its `range` and
            `image_depth`.

    Raises ValueError for images of more than 8 bits whose range is not known, with what was found.
    """
    _check_depth_everywhere(dataset)
    if given:
        return _from_bounds(dataset, given)
    if trained and trained.get("range"):
        return _stored_range(dataset, trained)
    if dataset.depth == torch.uint8:
        return BYTE_RANGE
    found, range_of_all = dist.compute_on_main(lambda: _looked_at(dataset))
    if scaled and dataset.depth in CONVENTION:
        low, high = CONVENTION[dataset.depth]
        dist.print_rank0(
            f"warning: {found}; without a range, {low:g} becomes 0 and {high:g} becomes 1, as mean and "
            "standard deviation are given"
        )
        return (low,), (high,)
    raise ValueError(
        f"{found}. The values of black and white are not known: give `range` {range_of_all} "
        f"(percentiles {SUGGESTED[0]:g} and {SUGGESTED[1]:g}); `python -m util.data stats` prints it with "
        "`mean` and `std` for each channel"
    )


def _stored_range(dataset: Any, trained: Mapping[str, Any]) -> Range:
    known = split_range([float(bound) for bound in trained["range"]])
    depth = trained.get("image_depth")
    was_deep = depth != "uint8" and known != BYTE_RANGE
    if dataset.depth == torch.uint8 and was_deep:
        raise ValueError(
            f"the checkpoint has seen images of {depth or 'another depth'} with values in `range` "
            f"{_some(known)}, and those of {_name(dataset)} are uint8: give `range` as these images need it "
            "(0 255 for usual ones), or the images in their own depth"
        )
    dist.print_rank0(f"values as in the checkpoint: {_some(known)} become 0 and 1")
    return known


def with_range(
    pixels: Pixels,
    dataset: Any,
    given: Bounds | None,
    scaled: bool,
    trained: Mapping[str, Any] | None = None,
) -> Pixels:
    """Return `pixels` with the range of a data set; see `settle_range`.

    Raises ValueError also for a transform that works on 8 bits only, if the images have more.
    """
    low, high = settle_range(dataset, given, scaled, trained)
    # After the ranks have compared their depths, so that none fails alone.
    check_depth(getattr(dataset, "transform", None), dataset.depth)
    pixels = replace(pixels, low=low, high=high, deep=dataset.depth != torch.uint8)
    # Refuses a number of pairs that does not fit, before the first batch.
    pixels.normalize(torch.zeros(dataset.read.in_chans, 1, 1))
    return pixels


def check_same_depth(train: Any, val: Any, given: Bounds | None) -> None:
    """Raise ValueError if only one of the sets has 8-bit images, unless their range is given."""
    _check_depth_everywhere(val)
    if given or (train.depth == torch.uint8) == (val.depth == torch.uint8):
        return
    raise ValueError(
        f"the training images are {depth_name(train.depth)} and the validation images "
        f"{depth_name(val.depth)}, and one range does not fit both: store them in one depth, or give "
        "`range`, which is then used for both"
    )


def kept_range(given: Bounds | None, trained: Mapping[str, Any]) -> Bounds | None:
    """Return the range for a run that continues or evaluates what `trained` describes.

    Percentiles were settled when it began. Measured again, on other images perhaps, they would be others.
    """
    if given and trained.get("range") and any(isinstance(bound, str) for bound in given):
        return trained["range"]
    return given


def suggested(values: Values) -> str:
    """Return LOW HIGH for all channels, as flags take it."""
    ends = values.percentiles(SUGGESTED)
    return " ".join(written(min(low for low, _ in ends), max(high for _, high in ends)))


def written(low: float, high: float) -> tuple[str, str]:
    """Return the ends of a range as text, with as many digits as its width needs; equal ones get a width."""
    if high <= low:
        high = low + max(1.0, abs(low)) * 1e-3
    for digits in range(6, 17):
        found = f"{low:.{digits}g}", f"{high:.{digits}g}"
        if max(abs(float(found[0]) - low), abs(float(found[1]) - high)) < 1e-5 * (high - low):
            return found
    return repr(low), repr(high)


def sampled(dataset: Any, most: int = SAMPLED) -> Values:
    """Decode up to `most` images, evenly spread, and collect their values. Unreadable ones are passed over.

    Raises ValueError if none can be read.
    """
    numbers = spread(len(dataset), most)
    values = Values(dataset.read.in_chans, dataset.depth, len(numbers))
    reason = "there are none"
    for i in numbers:
        try:
            values.add(dataset.decoded(i))
        except (OSError, ValueError) as error:
            reason = str(error)
    if not values.images:
        raise ValueError(f"no image of {_name(dataset)} could be read: {printable(reason)}")
    return values


def _percents(given: Bounds) -> list[float]:
    """Return the numbers of two percentiles; [] for values. Raises ValueError for a mixture."""
    wanted = [each for each in map(percent, given) if each is not None]
    if not wanted:
        return []
    if len(given) != 2 or len(wanted) != 2:
        raise ValueError("`range` takes two percentiles, as in p1 p99, or values only")
    if wanted[0] >= wanted[1]:
        raise ValueError(f"`range` takes a low and a higher percentile, found {given[0]} {given[1]}")
    return wanted


def _from_bounds(dataset: Any, given: Bounds) -> Range:
    wanted = _percents(given)
    if not wanted:
        return split_range([float(bound) for bound in given])
    if not dataset.exact_resume:
        raise ValueError(
            f"`range` {' '.join(map(str, given))} takes percentiles of images that are spread over the data "
            f"set, and {_name(dataset)} is a stream: give values"
        )
    # One rank reads: the sample is the same everywhere.
    ends = dist.compute_on_main(lambda: sampled(dataset).percentiles(wanted))
    _check_widths(given, ends)
    listed = " ".join(bound for low, high in ends for bound in written(low, high))
    images = counted(min(SAMPLED, len(dataset)), "image")
    dist.print_rank0(f"range {' '.join(map(str, given))} of {images}: {listed}")
    return tuple(low for low, _ in ends), tuple(high for _, high in ends)


def _check_depth_everywhere(dataset: Any) -> None:
    """Raise ValueError on all ranks if files on one of the hosts have another depth than on the others."""
    depths = sorted(set(dist.gather_objects(depth_name(dataset.depth))))
    if len(depths) > 1:
        raise ValueError(
            f"the processes find images of different depths in {_name(dataset)} ({', '.join(depths)}): "
            "copy the data to the nodes again, or give one copy that all of them see"
        )


def _some(ends: Range) -> str:
    """The first pairs of a range that may have hundreds."""
    pairs = [" and ".join(written(*pair)) for pair in zip(*ends)]
    if len(pairs) > MOST_PAIRS:
        pairs[MOST_PAIRS:] = [f"... ({len(pairs)} pairs)"]
    return ", ".join(pairs)


def _check_widths(given: Bounds, ends: list[list[float]]) -> None:
    """Raise ValueError for channels whose percentiles are equal."""
    flat = [str(i) for i, (low, high) in enumerate(ends) if low >= high]
    if flat:
        raise ValueError(
            f"`range` {' '.join(map(str, given))} is empty in channel {', '.join(flat)}, counted from 0: "
            "leave it out by `channels`, or give values"
        )


def _looked_at(dataset: Any) -> tuple[str, str]:
    """Describe the values of a data set, and suggest a range."""
    values = sampled(dataset)
    return _described(dataset, values), suggested(values)


def _described(dataset: Any, values: Values) -> str:
    ends = values.ends()
    low = min(low for low, _ in ends)
    high = max(high for _, high in ends)
    return (
        f"the images of {_name(dataset)} are {depth_name(dataset.depth)}, with values from {low:.9g} to "
        f"{high:.9g} in {counted(values.images, 'image')} of {len(dataset)}"
    )


def _name(dataset: Any) -> str:
    return printable(dataset.path)
