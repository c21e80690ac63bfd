"""Pictures of what a masked autoencoder with positional labels does: arrays in, uint8 arrays out, no model needed.

Legend: N images, C channels, H W pixels, h w grid cells, L = h * w, n visible patches, P = patch height * width * C.
Cells are numbered row by row; a mask has 1 where a patch was removed. Every input may be a numpy array or a tensor.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, REMOVED = (255, 255, 255), (32, 32, 32), (128, 128, 128)
RIGHT, WRONG = (0, 158, 115), (222, 45, 38)  # a green and a red that colour-blind readers can tell apart
GAP, FONT_SIZE = 6, 12
READABLE_SIDE, READABLE_CELL = 192, 16  # pixels
# Dark blue to yellow, lighter throughout, so that the order survives grey printing.
HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)


def unnormalize_patches(pred, target):
    """Undo the per-patch normalisation of MAE's norm_pix_loss, so that a prediction can be shown.

    pred: (N, L, P) normalised patches as the decoder gives them; target: (N, L, P) the true patches in pixel values.
    Returns (N, L, P) in the units of target, on its device. Mean and standard deviation of every patch come from the
    ground truth: what is shown knows each patch's brightness and contrast, which the model never predicted. So give
    `reconstruction_panel` the title "reconstruction (true patch mean/std)".
    """
    target = torch.as_tensor(target).float()
    pred = torch.as_tensor(pred).to(target)
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must both be (N, L, P)")
    mean, var = (
        target.mean(dim=-1, keepdim=True),
        target.var(dim=-1, keepdim=True),
    )  # unbiased, as in MAE's loss
    return pred * (var + 1e-6) ** 0.5 + mean


def reconstruction_panel(
    images,
    mask,
    prediction,
    *,
    patch_size,
    grid,
    visible_ids=None,
    predicted_cells=None,
    titles=True,
    scale=None,
    reconstruction_title="reconstruction",
):
    """One row per image: original | masked | reconstruction | predicted positions.

    images: (N, C, H, W) in [0, 1]; 1 and 2 channels are shown grey, of more than three the first three.
    mask: (N, L), 1 = removed. prediction: (N, C, H, W) in [0, 1], as pixels; visible patches are pasted over it.
    patch_size: an int or (height, width). grid: (h, w) with h * patch height == H and w * patch width == W.
    visible_ids: (N, n) the true cell of every visible token; predicted_cells: (N, n) the cell the model named for it.
    Without these two the last column is left out. It shows every visible patch in the cell that was named: framed green
    where that is its own cell, framed red otherwise, with a line (below the patches) to a white dot in the cell that it
    comes from. Where several patches land in one cell, they lie on each other like cards (at most four are seen), a
    right one on top, and the cell carries their number.
    scale: every pixel becomes scale x scale; by default as many as make pictures and cells readable.
    titles: column names, with the share removed and the number of right answers, and that number below every row.
    Returns uint8 (H', W', 3). Raises ValueError for shapes that do not fit together.
    """
    images, mask, prediction = _array(images), _array(mask), _array(prediction)
    patch = _pair(patch_size)
    _check(images, mask, prediction, patch, tuple(grid), visible_ids, predicted_cells)
    if scale is None:
        scale = max(1, round(READABLE_SIDE / max(images.shape[2:])), -(-READABLE_CELL // min(patch)))
    removed = (
        mask.reshape(-1, *grid).repeat(patch[0], axis=1).repeat(patch[1], axis=2)[..., None] > 0.5
    )  # (N, H, W, 1)
    original, predicted = _rgb(images), _rgb(prediction)  # (N, H, W, 3)
    masked = np.where(removed, np.uint8(REMOVED), original)
    columns = [original, masked, np.where(removed, predicted, original)]
    names = ["original", f"masked {100 * (mask > 0.5).mean():.0f} %", reconstruction_title]
    columns = [[_enlarge(picture, scale) for picture in column] for column in columns]
    captions = [""] * len(images)
    if visible_ids is not None:
        true, said = _array(visible_ids).astype(int), _array(predicted_cells).astype(int)
        columns.append([_positions(*row, tuple(grid)) for row in zip(columns[0], true, said)])
        names.append(f"predicted positions {(true == said).sum()}/{true.size} right")
        if len(images) > 1:
            captions = [f"{count}/{true.shape[1]} right" for count in (true == said).sum(1)]
    return _page(columns, names if titles else None, captions if titles else [""] * len(images))


def accuracy_map(correct, ids, grid):
    """Mean accuracy per true cell: float (h, w) in [0, 1], nan where no patch came from.

    correct: bool or 0/1, any shape; ids: the same shape, the true cell 0..h*w-1 of each; grid: (h, w).
    """
    correct, ids = _array(correct).astype(np.float64).ravel(), _array(ids).astype(int).ravel()
    cells = grid[0] * grid[1]
    if correct.shape != ids.shape or (ids.size and not 0 <= ids.min() <= ids.max() < cells):
        raise ValueError(
            f"{correct.size} answers for {ids.size} ids; the grid {tuple(grid)} has ids 0..{cells - 1}"
        )
    seen = np.bincount(ids, minlength=cells)
    right = np.bincount(ids, weights=correct, minlength=cells)
    return np.where(seen > 0, right / np.maximum(seen, 1), np.nan).reshape(grid)


def heat_picture(values, *, title="", low=0.0, high=1.0, cell=None):
    """A map as coloured cells with a colour bar: uint8 (H', W', 3); nan is grey with a cross.

    values: (h, w) floats; low and high: the ends of the colours, outside values take the colour of the end.
    cell: pixels per cell; by default enough for the number (in percent of 1) that is written into large cells.
    """
    values = _array(values).astype(np.float64)
    if values.ndim != 2 or not low < high:
        raise ValueError(f"a map is (h, w) with low < high, this one is {values.shape} with {low} and {high}")
    rows, cols = values.shape
    cell = cell or max(READABLE_CELL, round(READABLE_SIDE / max(rows, cols)))
    ramp = np.clip((values - low) / (high - low), 0, 1)
    colours = np.where(np.isnan(values)[..., None], np.float64(REMOVED), _heat(np.nan_to_num(ramp)))
    picture = Image.fromarray(_enlarge(np.round(colours).astype(np.uint8), cell))
    draw = ImageDraw.Draw(picture)
    for row, col in np.ndindex(rows, cols):
        x, y = col * cell, row * cell
        if np.isnan(values[row, col]):
            draw.line([x, y, x + cell - 1, y + cell - 1], fill=INK)
            draw.line([x, y + cell - 1, x + cell - 1, y], fill=INK)
        elif cell >= 20:
            ink = PAPER if ramp[row, col] < 0.6 else INK
            draw.text(
                (x + cell / 2, y + cell / 2), f"{100 * values[row, col]:.0f}", ink, _font(10), anchor="mm"
            )
    bar = np.broadcast_to(_heat(np.linspace(1, 0, picture.height))[:, None], (picture.height, 12, 3))
    ends = Image.new("RGB", (40, picture.height), PAPER)
    ImageDraw.Draw(ends).text((4, 0), f"{100 * high:.0f} %", INK, _font(FONT_SIZE))
    ImageDraw.Draw(ends).text((4, picture.height), f"{100 * low:.0f} %", INK, _font(FONT_SIZE), anchor="ld")
    legend = np.concatenate([np.round(bar).astype(np.uint8), np.asarray(ends)], axis=1)
    return _page([[np.asarray(picture)], [legend]], [title, ""] if title else None, [""])


def save_png(array, path):
    """Write uint8 (H, W, 3) or (H, W) as a PNG; folders that are missing are made. Returns the path."""
    array, path = np.asarray(array), Path(path)
    if array.dtype != np.uint8:
        raise ValueError(f"a picture is uint8, this array is {array.dtype}")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, "PNG")
    return path


# -- inside ------------------------------------------------------------------------------------------------------------
def _array(values):
    """numpy, also from a tensor on a device, with gradient, or in a type that numpy does not have (bfloat16)."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def _check(images, mask, prediction, patch, grid, visible_ids, predicted_cells):
    if images.ndim != 4 or images.shape != prediction.shape:
        raise ValueError(f"images {images.shape} and prediction {prediction.shape} must both be (N, C, H, W)")
    if images.shape[2:] != (grid[0] * patch[0], grid[1] * patch[1]):
        raise ValueError(
            f"a grid of {grid} patches of {patch} pixels does not cover images of {images.shape[2:]}"
        )
    if mask.shape != (len(images), grid[0] * grid[1]):
        raise ValueError(f"mask is {mask.shape}, expected (N, L) = {(len(images), grid[0] * grid[1])}")
    if (visible_ids is None) != (predicted_cells is None):
        raise ValueError("visible_ids and predicted_cells belong together: give both or none")
    if visible_ids is None:
        return
    true, said = _array(visible_ids), _array(predicted_cells)
    if true.shape != said.shape or true.ndim != 2 or len(true) != len(images):
        raise ValueError(f"visible_ids {true.shape} and predicted_cells {said.shape} must both be (N, n)")
    for name, cells in (("visible_ids", true), ("predicted_cells", said)):
        if cells.size and not 0 <= cells.min() <= cells.max() < grid[0] * grid[1]:
            raise ValueError(
                f"{name} holds {cells.min()}..{cells.max()}, outside the cells of the grid {grid}"
            )


def _rgb(images):
    """(N, C, H, W) in [0, 1] -> uint8 (N, H, W, 3)."""
    pixels = np.round(np.clip(np.nan_to_num(images.astype(np.float64)), 0, 1) * 255).astype(np.uint8)
    channels = (0, 1, 2) if images.shape[1] >= 3 else (0, 0, 0)
    return pixels[:, channels].transpose(0, 2, 3, 1)


def _enlarge(picture, scale):
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def _positions(picture, true, said, grid):
    """The visible patches of one enlarged picture (H, W, 3), each in the cell that the model named for it."""
    ch, cw = picture.shape[0] // grid[0], picture.shape[1] // grid[1]  # cell height and width
    edge, r = max(1, min(ch, cw) // 12), max(2, min(ch, cw) // 8)  # width of a frame, radius of a dot
    board = Image.new("RGB", (picture.shape[1], picture.shape[0]), REMOVED)
    draw = ImageDraw.Draw(board)

    def corner(cell, shift=0):
        return cell % grid[1] * cw + shift, cell // grid[1] * ch + shift

    def middle(cell):
        return corner(cell)[0] + cw // 2, corner(cell)[1] + ch // 2

    # From bottom to top: lines (many lines must not hide the patches), patches, dots, numbers.
    pairs = list(zip(true.tolist(), said.tolist()))
    wrong = [(t, s) for t, s in pairs if t != s]
    for t, s in wrong:
        draw.line([middle(s), middle(t)], fill=WRONG)
    crowd = Counter(said.tolist())
    above, cards = crowd.copy(), []
    for t, s in wrong + [(t, s) for t, s in pairs if t == s]:
        above[s] -= 1  # how many patches will lie on this one: the lower a card, the further it sticks out
        cards.append((min(above[s], 3), t, s))
    for depth, t, s in sorted(
        cards, key=lambda card: -card[0]
    ):  # top cards last, else one may hide the next cell's
        (x, y), (tx, ty) = corner(s, shift=r * depth), corner(t)
        board.paste(Image.fromarray(picture[ty : ty + ch, tx : tx + cw]), (x, y))
        draw.rectangle([x, y, x + cw - 1, y + ch - 1], outline=RIGHT if t == s else WRONG, width=edge)
    for t, _ in wrong:
        x, y = middle(t)
        draw.ellipse([x - r, y - r, x + r, y + r], PAPER, WRONG)
    for cell, count in crowd.items():
        if count > 1:
            x, y = corner(cell)
            draw.text((x + 3, y + 2), str(count), PAPER, _font(10), stroke_width=1, stroke_fill=INK)
    return np.asarray(board)


def _heat(ramp):
    """Values in [0, 1] -> float colours (..., 3)."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(ramp, stops, HEAT[:, channel]) for channel in range(3)], axis=-1)


def _font(size):
    return ImageFont.load_default(size)


def _wrap(text, width):
    """Break a title into lines that fit width pixels; a single long word stays whole."""
    lines = []
    for word in text.split():
        if lines and _font(FONT_SIZE).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _page(columns, names, captions):
    """Put columns of equally high uint8 pictures on white paper, names above, a caption under the last of every row."""
    line = FONT_SIZE + 3
    lines = [_wrap(name, column[0].shape[1]) for name, column in zip(names or [], columns)]
    head = line * max(map(len, lines)) + 4 if lines else 0
    foot = line if any(captions) else 0
    height = columns[0][0].shape[0]
    widths = [column[0].shape[1] for column in columns]
    size = sum(widths) + GAP * (len(widths) + 1), head + (height + foot + GAP) * len(captions) + GAP
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for index, column in enumerate(columns):
        left = GAP + sum(widths[:index]) + GAP * index
        if lines:
            draw.text((left, GAP), "\n".join(lines[index]), INK, _font(FONT_SIZE), spacing=2)
        for row, picture in enumerate(column):
            top = head + GAP + row * (height + foot + GAP)
            page.paste(Image.fromarray(picture), (left, top))
            if index == len(columns) - 1:
                draw.text((left, top + height), captions[row], INK, _font(FONT_SIZE - 1))
    return np.asarray(page)
