"""Pictures of segmentation: arrays in, uint8 arrays out, no model needed.

Legend: H W pixels of a mask, h w pixels of an image as the model sees it, K classes. In masks -1 is a pixel
without a class. Every input may be a numpy array or a tensor.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from util.files.names import counted, printable
from util.report.panels import (
    FONT_SIZE,
    GAP,
    INK,
    PAPER,
    READABLE_SIDE,
    REMOVED,
    WRONG,
    Array,
    as_array,
    font,
    sheet,
)

NO_CLASS = -1
IGNORED = REMOVED
# The dimmed image is darker than IGNORED and WRONG.
DIMMED = 0.3
# Longer sides are drawn smaller.
LARGEST_SIDE = 480
SWATCH = 12  # pixels
MOST_NAMED = 60  # classes in a legend
LONGEST_NAME = 40  # characters
# Later classes have the colours of the first ones again.
COLOURS = 1024
# Of the candidates for colours: values of red, green and blue, and limits in CIELAB.
LEVELS = np.linspace(0, 255, 18).round().astype(np.uint8)
LIGHTNESS = (35, 85)
# Brighter colours would tire the eye, and duller ones look grey.
CHROMA = (25, 75)


class SegmentView(NamedTuple):
    """An image uint8 (1 or 3, h, w), and the classes of its pixels, integers (H, W): truth and prediction."""

    image: Array
    truth: Array
    prediction: Array


def palette(count: int) -> np.ndarray:
    """Colours of the classes 0 to count - 1: uint8 (count, 3), red, green, blue.

    Each is as far as possible, in CIELAB, from grey, which stands for ignored pixels, and from those of all
    classes before it. None is grey, dark, light or garish. The colour of a class does not depend on the
    number of classes. The first COLOURS ones are different.
    """
    return _colours()[np.arange(count) % COLOURS]


@lru_cache(maxsize=1)
def _colours() -> np.ndarray:
    """The first COLOURS colours, uint8 (COLOURS, 3)."""
    red, green, blue = np.meshgrid(LEVELS, LEVELS, LEVELS, indexing="ij")
    candidates = np.stack([red, green, blue], -1).reshape(-1, 3)  # (n, 3)
    lab = cielab(candidates)  # (n, 3)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    kept = np.ones(len(lab), bool)
    for values, (least, most) in ((lab[:, 0], LIGHTNESS), (chroma, CHROMA)):
        kept &= (least <= values) & (values <= most)
    candidates = candidates[kept]
    lab = lab[kept]
    nearest = np.linalg.norm(lab - cielab(np.array([IGNORED], np.uint8)), axis=1)  # (n,)
    chosen = []
    for _ in range(COLOURS):
        # Rounded, so that equal distances are equal on all machines.
        best = int(nearest.round(6).argmax())
        chosen.append(best)
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[best], axis=1))
    return candidates[chosen]


def cielab(colours: np.ndarray) -> np.ndarray:
    """sRGB colours uint8 (n, 3) -> CIELAB (n, 3) for the white point D65: lightness 0 to 100, a and b."""
    values = colours / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )  # IEC 61966-2-1
    xyz = linear @ to_xyz.T / to_xyz.sum(1)  # white is (1, 1, 1)
    cubic = (6 / 29) ** 3
    f = np.where(xyz > cubic, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def coloured(classes: Array) -> np.ndarray:
    """Classes (H, W) in their colours, uint8 (H, W, 3); -1 is IGNORED."""
    numbers = as_array(classes).astype(np.int64)
    if numbers.ndim != 2 or numbers.min(initial=0) < NO_CLASS:
        raise ValueError(
            f"a mask has two dimensions and classes from {NO_CLASS} on, found {numbers.shape} from "
            f"{numbers.min(initial=0)} on"
        )
    seen, places = np.unique(numbers, return_inverse=True)
    colours = np.array([_colour(number) for number in seen.tolist()], np.uint8).reshape(-1, 3)
    return colours[places.reshape(numbers.shape)]


def _colour(number: int) -> np.ndarray:
    if number == NO_CLASS:
        return np.array(IGNORED, np.uint8)
    return _colours()[number % COLOURS]


def errors(image: np.ndarray, truth: Array, prediction: Array) -> np.ndarray:
    """The image uint8 (H, W, 3), dimmed, with wrong pixels in WRONG and ignored ones in IGNORED.

    Raises ValueError if the sizes differ.
    """
    truth = as_array(truth)
    prediction = as_array(prediction)
    if not image.shape[:2] == truth.shape == prediction.shape:
        raise ValueError(
            f"image {image.shape[:2]}, truth {truth.shape} and prediction {prediction.shape} must have one "
            "size"
        )
    ignored = truth == NO_CLASS
    out = (image * DIMMED).round().astype(np.uint8)
    out[(truth != prediction) & ~ignored] = WRONG
    out[ignored] = IGNORED
    return out


def wrong_share(truth: Array, prediction: Array) -> float:
    """The share, in percent, of the pixels with a class that are predicted wrongly; nan if there are none."""
    truth = as_array(truth)
    counted_pixels = truth != NO_CLASS
    if not counted_pixels.any():
        return float("nan")
    return 100 * float((as_array(prediction) != truth)[counted_pixels].mean())


def segment_panel(views: Sequence[SegmentView], classes: Sequence[str], note: str = "") -> np.ndarray:
    """One row per image: image | truth | prediction | error, and below them the names of the classes.

    All four have the size of the mask, brought to a readable one: masks by the nearest pixel. The share of
    wrong pixels is that of the whole mask. Named are classes that occur in a truth or a prediction, those
    with the most pixels if there are many.

    classes: their names. note: is added to the name of the first column.
    Returns uint8 (H', W', 3). Raises ValueError without views, and if masks have other sizes or classes.
    """
    if not views:
        raise ValueError("there is no image to draw")
    columns: list[list[np.ndarray]] = [[], [], [], []]
    captions = []
    counts = np.zeros(1 + len(classes), np.int64)
    for view in views:
        truth, prediction = _checked(view, len(classes))
        counts += np.bincount((truth + 1).ravel(), minlength=len(counts))
        # Predictions of ignored pixels are drawn, too.
        counts += np.bincount((prediction + 1).ravel(), minlength=len(counts))
        size = drawn_size(truth.shape)
        captions.append(f"{wrong_share(truth, prediction):.1f} % wrong")
        rows = _centres(truth.shape[0], size[0])
        across = _centres(truth.shape[1], size[1])
        truth = truth[rows][:, across]
        prediction = prediction[rows][:, across]
        image = _fitted(as_array(view.image), size)
        pictures = (image, coloured(truth), coloured(prediction), errors(image, truth, prediction))
        for column, picture in zip(columns, pictures):
            column.append(picture)
    names = [f"image{note}", "truth", "prediction", "wrong: red, ignored: grey"]
    page = sheet(columns, names, captions)
    return np.concatenate([page, legend(counts, classes, page.shape[1])])


def _checked(view: SegmentView, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction, int64 (H, W). Raises ValueError if they do not fit together."""
    truth = as_array(view.truth).astype(np.int64)
    prediction = as_array(view.prediction).astype(np.int64)
    if truth.shape != prediction.shape or truth.ndim != 2 or not truth.size:
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} must both be (H, W)")
    for name, values in (("truth", truth), ("prediction", prediction)):
        if values.min() < NO_CLASS or values.max() >= classes:
            raise ValueError(
                f"the {name} has classes from {values.min()} to {values.max()}, and there are "
                f"{counted(classes, 'name')}"
            )
    return truth, prediction


def drawn_size(size: tuple[int, ...]) -> tuple[int, int]:
    """The size (height, width) in which a mask of that size is drawn.

    Small masks are enlarged by a whole number, so that each of their pixels has the same size.
    """
    height, width = size
    longer = max(height, width)
    if longer > LARGEST_SIDE:
        return max(1, height * LARGEST_SIDE // longer), max(1, width * LARGEST_SIDE // longer)
    scale = max(1, round(READABLE_SIDE / longer))
    return height * scale, width * scale


def _centres(length: int, size: int) -> np.ndarray:
    """The positions, below `length`, of the centres of `size` equal parts."""
    return (2 * np.arange(size) + 1) * length // (2 * size)


def _fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image uint8 (1 or 3, h, w) in a size (H, W), (H, W, 3)."""
    if image.ndim != 3 or image.shape[0] not in (1, 3) or image.dtype != np.uint8:
        raise ValueError(f"an image is uint8 (1 or 3, h, w), found {image.dtype} {image.shape}")
    pixels = np.ascontiguousarray(image.repeat(3 // image.shape[0], axis=0).transpose(1, 2, 0))
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def legend(counts: np.ndarray, classes: Sequence[str], width: int) -> np.ndarray:
    """A picture uint8 (., width, 3): colour and name of each class that occurs, in lines.

    counts: int (1 + K,), pixels that are ignored, then those of each class.
    """
    shown = np.flatnonzero(counts[1:])
    more = ""
    if len(shown) > MOST_NAMED:
        more = f"and {len(shown) - MOST_NAMED} more"
        shown = np.sort(shown[np.argsort(-counts[1:][shown], kind="stable")[:MOST_NAMED]])
    entries = [(_colour(number), _short(classes[number])) for number in shown.tolist()]
    if counts[0]:
        entries.append((_colour(NO_CLASS), "ignored"))
    if more:
        entries.append((np.array(PAPER, np.uint8), more))
    step = FONT_SIZE + 6
    places = []
    x, y = GAP, 0
    for _, name in entries:
        needed = SWATCH + 4 + int(font(FONT_SIZE).getlength(name)) + 2 * GAP
        if x > GAP and x + needed > width:
            x = GAP
            y += step
        places.append((x, y))
        x += needed
    page = Image.new("RGB", (width, y + step + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    for (colour, name), (x, y) in zip(entries, places):
        red, green, blue = colour.tolist()
        draw.rectangle([x, y + 2, x + SWATCH - 1, y + 1 + SWATCH], (red, green, blue))
        draw.text((x + SWATCH + 4, y), name, INK, font(FONT_SIZE))
    return np.asarray(page)


def _short(name: str) -> str:
    name = printable(name)
    if len(name) > LONGEST_NAME:
        return f"{name[: LONGEST_NAME - 3]}..."
    return name
