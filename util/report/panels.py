"""Pictures of a masked autoencoder with positional labels: arrays in, uint8 arrays out, no model needed.

Legend: N images, C channels, H W pixels, h w grid cells, L = h * w, n visible patches, P = patch height *
patch width * C. Cells are numbered row by row. A mask has 1 where a patch was removed. Every input may be a
numpy array or a tensor.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Array = np.ndarray | torch.Tensor
Colour = tuple[int, int, int]

PAPER = (255, 255, 255)
INK = (32, 32, 32)
REMOVED = (128, 128, 128)
# A green and a red that colour-blind readers can distinguish.
RIGHT = (0, 158, 115)
WRONG = (222, 45, 38)
# In pixels.
GAP = 6
FONT_SIZE = 12
READABLE_SIDE = 192
READABLE_CELL = 16
# How many of the patches that lie in one cell can be seen.
MOST_CARDS = 4


@dataclass(frozen=True)
class Bands:
    """Which channels of an image a picture shows: one as grey, or three as red, green and blue.

    `numbers` count from 0 among the channels that the model sees. `note` names them for titles, as in
    ", bands 0 1 2"; it is '' where a picture shows all channels in their order.
    """

    numbers: tuple[int, ...]
    note: str = ""

    @classmethod
    def of(cls, channels: int, given: Sequence[int] | None = None) -> "Bands":
        """Choose those of images with `channels` channels: the given ones, or the first one or three.

        Raises ValueError unless one or three are given, all of them below `channels`.
        """
        numbers: tuple[int, ...] = (0,)
        if channels >= 3:
            numbers = (0, 1, 2)
        if given:
            numbers = tuple(given)
        listed = " ".join(map(str, numbers))
        if len(numbers) not in (1, 3):
            raise ValueError(
                f"`picture_bands` takes one number (grey) or three (red, green, blue), found {listed}"
            )
        if not 0 <= min(numbers) <= max(numbers) < channels:
            raise ValueError(
                f"`picture_bands` {listed}: the model sees {channels} channels, and their numbers are 0 to "
                f"{channels - 1}"
            )
        if numbers == tuple(range(channels)):
            return cls(numbers)
        word = "band"
        if len(numbers) > 1:
            word = "bands"
        return cls(numbers, f", {word} {listed}")

    def shown(self, images: torch.Tensor) -> torch.Tensor:
        """Return the channels that are shown, (N, C, H, W) -> (N, 1 or 3, H, W)."""
        return images[:, list(self.numbers)]


@dataclass(frozen=True)
class PredictedPositions:
    """Cells of the visible patches, both (N, n): where each comes from, and where the model places it."""

    target: Array
    predicted: Array


def unnormalize_patches(pred: Array, target: Array) -> torch.Tensor:
    """Undo the per-patch normalisation of MAE's norm_pix_loss, so that a prediction can be shown.

    pred: (N, L, P) normalised patches, as the decoder predicts them. target: (N, L, P) the true patches in
    pixel values. Returns (N, L, P) in the units of the target, on its device.

    Mean and standard deviation of every patch are those of the target. The picture then shows the brightness
    and contrast of each patch, which the model did not predict, and its title should say so.
    """
    target = torch.as_tensor(target).float()
    pred = torch.as_tensor(pred).to(target)
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must both be (N, L, P)")
    mean = target.mean(dim=-1, keepdim=True)  # (N, L, 1)
    # Unbiased, as in MAE's loss.
    var = target.var(dim=-1, keepdim=True)  # (N, L, 1)
    return pred * (var + 1e-6) ** 0.5 + mean


def reconstruction_panel(
    images: Array,
    mask: Array,
    prediction: Array,
    *,
    patch_size: int | tuple[int, int],
    positions: PredictedPositions | None = None,
    titles: tuple[str, str] | None = ("original", "reconstruction"),
    scale: int | None = None,
) -> np.ndarray:
    """One row per image: original | masked | reconstruction | predicted positions.

    images: (N, C, H, W) in [0, 1]; one and two channels are shown grey, of more than three the first three.
    mask: (N, L), 1 = removed.
    prediction: (N, C, H, W) pixels in [0, 1]; visible patches are pasted over it.
    patch_size: an int or (height, width); it must divide H and W.
    positions: draws the last column, each visible patch in its predicted cell. Right ones have a green frame,
        wrong ones a red frame and a line to a white dot in their true cell. Patches of one cell lie on each
        other like cards, the right one on top; four are visible, and the cell shows their number.
    titles: names of the first and the third column. With them the masked share and the number of right
        predictions are written; None for no text.
    scale: every pixel becomes scale x scale; by default as many as make pictures and cells readable.
    Returns uint8 (H', W', 3). Raises ValueError if shapes do not fit together.
    """
    images, mask, prediction = map(as_array, (images, mask, prediction))
    patch = _pair(patch_size)
    grid = _grid_of(images, prediction, patch)
    if mask.shape != (len(images), grid[0] * grid[1]):
        raise ValueError(f"mask is {mask.shape}, expected (N, L) = {(len(images), grid[0] * grid[1])}")
    if scale is None:
        scale = _readable_scale(images, patch)
    removed = _removed_pixels(mask, grid, patch)
    original = _rgb(images)  # (N, H, W, 3)
    masked = np.where(removed, np.array(REMOVED, np.uint8), original)
    filled = np.where(removed, _rgb(prediction), original)
    columns = [[_enlarged(p, scale) for p in column] for column in (original, masked, filled)]
    first, third = titles or ("", "")
    names = [first, f"masked {100 * (mask > 0.5).mean():.0f} %", third]
    captions = [""] * len(images)
    if positions is not None:
        # Both (N, n).
        target, predicted = _cells(positions, len(images), grid)
        right = target == predicted
        columns.append([_position_board(*row, grid) for row in zip(columns[0], target, predicted)])
        names.append(f"predicted positions {right.sum()}/{right.size} right")
        if len(images) > 1:
            captions = [f"{count}/{right.shape[1]} right" for count in right.sum(axis=1)]
    if titles is None:
        return sheet(columns, [], [""] * len(images))
    return sheet(columns, names, captions)


def accuracy_map(correct: Array, ids: Array, grid: tuple[int, int]) -> np.ndarray:
    """Mean accuracy per true cell: float (h, w) in [0, 1], nan for cells that no patch came from.

    correct: bool or 0/1, any shape. ids: the true cell 0..h*w-1 of each prediction, the same shape. Raises
    ValueError if the shapes differ or an id lies outside the grid.
    """
    correct = as_array(correct).astype(np.float64).ravel()
    ids = as_array(ids).astype(int).ravel()
    cells = grid[0] * grid[1]
    if correct.shape != ids.shape or not _within(ids, cells):
        raise ValueError(
            f"{correct.size} predictions for {ids.size} ids; the grid {tuple(grid)} has ids 0..{cells - 1}"
        )
    # Predictions of each cell, and how many of them are right.
    seen = np.bincount(ids, minlength=cells)
    right = np.bincount(ids, weights=correct, minlength=cells)
    return np.where(seen > 0, right / np.maximum(seen, 1), np.nan).reshape(grid)


def save_png(array: np.ndarray, path: str | Path) -> Path:
    """Write uint8 (H, W, 3) or (H, W) as a PNG, and create missing folders. Returns the path."""
    array = np.asarray(array)
    if array.dtype != np.uint8:
        raise ValueError(f"a picture is uint8, this array is {array.dtype}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, "PNG")
    return path


# Inputs


def as_array(values: Array) -> np.ndarray:
    """numpy, also from a tensor on a device, with a gradient, or of a type that numpy lacks (bfloat16)."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.float()
        values = values.numpy()
    return np.asarray(values)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _grid_of(images: np.ndarray, prediction: np.ndarray, patch: tuple[int, int]) -> tuple[int, int]:
    if images.ndim != 4 or images.shape != prediction.shape:
        raise ValueError(f"images {images.shape} and prediction {prediction.shape} must both be (N, C, H, W)")
    height, width = images.shape[2:]
    if height % patch[0] or width % patch[1]:
        raise ValueError(f"`patch_size` {patch} does not divide images of {(height, width)} pixels")
    return height // patch[0], width // patch[1]


def _cells(
    positions: PredictedPositions, images: int, grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The integer cells of targets and predictions, both (N, n)."""
    target = as_array(positions.target)
    predicted = as_array(positions.predicted)
    if target.shape != predicted.shape or target.ndim != 2 or len(target) != images:
        raise ValueError(f"target {target.shape} and predicted {predicted.shape} must both be (N, n)")
    for name, cells in (("target", target), ("predicted", predicted)):
        if not _within(cells, grid[0] * grid[1]):
            raise ValueError(
                f"{name} holds {cells.min()}..{cells.max()}, outside the cells of the grid {grid}"
            )
    return target.astype(int), predicted.astype(int)


def _within(ids: np.ndarray, cells: int) -> bool:
    return not ids.size or 0 <= ids.min() <= ids.max() < cells


def _removed_pixels(mask: np.ndarray, grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """Which pixels are masked: (N, L) -> bool (N, H, W, 1)."""
    removed = mask.reshape(-1, *grid) > 0.5  # (N, h, w)
    return removed.repeat(patch[0], axis=1).repeat(patch[1], axis=2)[..., None]


def _readable_scale(images: np.ndarray, patch: tuple[int, int]) -> int:
    # Both the image and its cells must be readable.
    side = round(READABLE_SIDE / max(images.shape[2:]))
    cell = -(-READABLE_CELL // min(patch))
    return max(1, side, cell)


def _rgb(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W) in [0, 1] -> uint8 (N, H, W, 3)."""
    # A diverged model predicts nan, which has no byte: it is shown black.
    pixels = np.round(np.clip(np.nan_to_num(images.astype(np.float64)), 0, 1) * 255).astype(np.uint8)
    channels = [0, 0, 0]
    if images.shape[1] >= 3:
        channels = [0, 1, 2]
    return pixels[:, channels].transpose(0, 2, 3, 1)  # (N, H, W, 3)


def _enlarged(picture: np.ndarray, scale: int) -> np.ndarray:
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


# Drawing


class _Cells(NamedTuple):
    """Cells of `height` x `width` pixels in `columns` columns: where each is in the picture."""

    columns: int
    height: int
    width: int

    def corner(self, cell: int) -> tuple[int, int]:
        return cell % self.columns * self.width, cell // self.columns * self.height

    def centre(self, cell: int) -> tuple[int, int]:
        x, y = self.corner(cell)
        return x + self.width // 2, y + self.height // 2


def _position_board(
    picture: np.ndarray, target: np.ndarray, predicted: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """The visible patches of one enlarged picture (H, W, 3), each in its predicted cell."""
    cells = _Cells(grid[1], picture.shape[0] // grid[0], picture.shape[1] // grid[1])
    board = Image.new("RGB", (picture.shape[1], picture.shape[0]), REMOVED)
    draw = ImageDraw.Draw(board)
    pairs = list(zip(target.tolist(), predicted.tolist()))
    wrong = [(t, p) for t, p in pairs if t != p]
    # From bottom to top: lines (many lines must not hide the patches), patches, dots, numbers.
    for t, p in wrong:
        draw.line([cells.centre(p), cells.centre(t)], fill=WRONG)
    # Right patches come last, on top of their cell.
    _draw_cards(board, picture, cells, wrong + [(t, p) for t, p in pairs if t == p])
    radius = max(2, min(cells.height, cells.width) // 8)
    for t, _ in wrong:
        x, y = cells.centre(t)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], PAPER, WRONG)
    for cell, count in Counter(predicted.tolist()).items():
        if count > 1:
            x, y = cells.corner(cell)
            draw.text((x + 3, y + 2), str(count), PAPER, font(10), stroke_width=1, stroke_fill=INK)
    return np.asarray(board)


def _draw_cards(board: Image.Image, picture: np.ndarray, cells: _Cells, pairs: list[tuple[int, int]]) -> None:
    """Paste the patch of each (target, predicted) pair into its predicted cell; later ones lie on top."""
    draw = ImageDraw.Draw(board)
    side = min(cells.height, cells.width)
    frame = max(1, side // 12)
    shift = max(2, side // 8)
    above = Counter(predicted for _, predicted in pairs)
    cards = []
    for target, predicted in pairs:
        # The more patches lie on a card, the further it sticks out.
        above[predicted] -= 1
        cards.append((min(above[predicted], MOST_CARDS - 1), target, predicted))
    # Top cards of all cells last: a card that sticks out must not hide the top card of the next cell.
    cards.sort(key=lambda card: -card[0])
    for depth, target, predicted in cards:
        from_x, from_y = cells.corner(target)
        patch = picture[from_y : from_y + cells.height, from_x : from_x + cells.width]
        x, y = cells.corner(predicted)
        x += shift * depth
        y += shift * depth
        board.paste(Image.fromarray(patch), (x, y))
        colour = _answer_colour(target == predicted)
        draw.rectangle([x, y, x + cells.width - 1, y + cells.height - 1], outline=colour, width=frame)


def _answer_colour(right: bool) -> Colour:
    if right:
        return RIGHT
    return WRONG


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrapped(text: str, width: int) -> list[str]:
    """Break a title into lines of at most `width` pixels; a single long word stays whole."""
    lines: list[str] = []
    for word in text.split():
        if lines and font(FONT_SIZE).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def sheet(columns: list[list[np.ndarray]], names: list[str], captions: list[str]) -> np.ndarray:
    """Put columns of uint8 pictures (H, W, 3) on white paper. Those of a row are equally high.

    Names stand above the columns, if there are any, and captions below the last picture of each row.
    """
    # In pixels: a line of text, and the space between two.
    line = FONT_SIZE + 3
    heights = [picture.shape[0] for picture in columns[0]]
    widths = [max(picture.shape[1] for picture in column) for column in columns]
    titles = [_wrapped(name, width) for name, width in zip(names, widths)]
    head = 0
    if titles:
        head = line * max(map(len, titles)) + 4
    foot = line * any(captions)
    page_width = sum(widths) + GAP * (len(widths) + 1)
    page_height = head + sum(heights) + (foot + GAP) * len(captions) + GAP
    page = Image.new("RGB", (page_width, page_height), PAPER)
    draw = ImageDraw.Draw(page)
    lefts = [GAP * (i + 1) + sum(widths[:i]) for i in range(len(widths))]
    for left, title in zip(lefts, titles):
        draw.text((left, GAP), "\n".join(title), INK, font(FONT_SIZE), spacing=2)
    top = head + GAP
    for row, caption in enumerate(captions):
        for left, column in zip(lefts, columns):
            page.paste(Image.fromarray(column[row]), (left, top))
        top += heights[row]
        draw.text((lefts[-1], top), caption, INK, font(FONT_SIZE - 1))
        top += foot + GAP
    return np.asarray(page)
