"""Numbers of a command line: argparse types that refuse what a flag cannot mean, in one line with a hint.

nan and inf are refused everywhere: a run would spend hours on them.
"""

import argparse
import math
import re
from collections.abc import Callable

INFINITY = math.inf
# Larger images have more positions than any model takes.
MOST_SIDE = 1 << 16


def number(
    least: float,
    most: float = INFINITY,
    kind: type = int,
    *,
    above: bool = False,
    below: bool = False,
    hint: Callable[[float], str] | None = None,
) -> Callable[[str], float]:
    """Make an argparse type that accepts finite numbers of a kind from `least` to `most`.

    Both ends are included, unless `above` leaves out the lower one and `below` the upper one. `hint(value)`
    says what a refused value may have meant; '' adds nothing.
    """
    allowed = _allowed(least, most, above, below)

    def read(text: str) -> float:
        value = _read(text, kind)
        fits = least <= value <= most and not (above and value == least) and not (below and value == most)
        if fits:
            return value
        message = f"{allowed}, found {text}"
        meant = hint(value) if hint is not None else ""
        if meant:
            message += f"; {meant}"
        raise argparse.ArgumentTypeError(message)

    read.__name__ = kind.__name__
    return read


def _read(text: str, kind: type) -> float:
    """Convert a word to a finite number. Raises ArgumentTypeError, which says what was expected."""
    expected = "a whole number" if kind is int else "a number"
    try:
        value = kind(text)
    except ValueError:
        meant = ""
        if kind is float and re.fullmatch(r"-?\d*,\d+", text):
            meant = f"; write {text.replace(',', '.')}"
        raise argparse.ArgumentTypeError(f"takes {expected}, found {text!r}{meant}") from None
    if kind is float and not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, found {text}")
    return value


def _allowed(least: float, most: float, above: bool, below: bool) -> str:
    """Describe a range of numbers, as the start of an error."""
    if most == INFINITY:
        return f"must be greater than {least}" if above else f"must be {least} or more"
    if not (above or below):
        return f"must lie between {least} and {most}"
    lower = f"greater than {least}" if above else f"at least {least}"
    upper = f"less than {most}" if below else f"at most {most}"
    return f"must be {lower} and {upper}"


def _percentage(value: float) -> str:
    if 2 <= value <= 100:
        return f"if it is a percentage, give {value / 100:g}"
    return ""


def _grey_levels(value: float) -> str:
    if 1 < value <= 255:
        return f"if it is a grey level from 0 to 255, divide it by 255: {value / 255:.3f}"
    return ""


def _no_epoch(value: float) -> str:
    if value == 0:
        return "--dry_run measures a few steps and trains nothing"
    return ""


def _no_decay(value: float) -> str:
    if value == 0:
        return "1 turns it off; for the head alone give 1e-9"
    return _percentage(value)


COUNT = number(1)
FROM_ZERO = number(0)
NOT_NEGATIVE = number(0, kind=float)
POSITIVE = number(0, kind=float, above=True)
SHARE = number(0, 1, float, hint=_percentage)
# Rates of dropout and of stochastic depth: 1 would drop everything and divide by zero.
BELOW_ONE = number(0, 1, float, below=True, hint=_percentage)

LAYER_DECAY = number(0, 1, float, above=True, hint=_no_decay)
EPOCHS = number(1, hint=_no_epoch)
# torch takes 64 bits.
SEED = number(0, 2**63 - 1)
MINUTES = number(0, 1_000_000, float)
# Statistics of pixel values scaled to [0, 1].
PIXEL_MEAN = number(0, 1, float, hint=_grey_levels)
PIXEL_STD = number(0, 1, float, above=True, hint=_grey_levels)
# What `type=int` and `type=float` mean without limits of their own.
WHOLE = number(-INFINITY)
FINITE = number(-INFINITY, kind=float)


def bound(text: str) -> float | str:
    """Read a value, or a percentile from p0 to p100: the argparse type of the ends of a range."""
    if re.fullmatch(r"p\d+(\.\d+)?", text) is None:
        return FINITE(text)
    if float(text[1:]) > 100:
        raise argparse.ArgumentTypeError(f"takes percentiles from p0 to p100, found {text}")
    return text


def side(text: str) -> int:
    """Read a height or width in pixels: the argparse type of sizes H [W]."""
    pair = re.fullmatch(r"(\d+)[x,*](\d+)", text)
    if pair is not None:
        raise argparse.ArgumentTypeError(
            f"takes height and width as separate numbers, found {text}; write {pair[1]} {pair[2]}"
        )
    return _SIDE(text)


_SIDE: Callable[[str], int] = number(1, MOST_SIDE)  # type: ignore[assignment]
