"""Several crops of one image, each with its box in the image, and the block masks of iBOT.

Transforms take (C, H, W) in any depth and return a dictionary of tensors, which replaces `image` in a sample.
A box is (x, y, width, height, flipped) in pixels of the source image. All draws come from the global
generators.
"""

import math
import random
from typing import NamedTuple

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from util.data.formats import to_depth
from util.data.transforms import resized_crop

Range = tuple[float, float]
Size = tuple[int, int]


def crop_with_box(
    image: torch.Tensor, size: Size, scale: Range, hflip: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a random resized crop (bicubic, antialiased), flipped with chance `hflip`.

    Returns (C, *size) in the depth of the image, and its box, float32 (5,).
    """
    # torchvision draws the box from torch's generator; the flip comes from Python's.
    top, left, height, width = v2.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
    flipped = random.random() < hflip
    crop = resized_crop(image, (top, left, height, width), size)  # (C, H, W) -> (C, *size)
    if flipped:
        crop = F.horizontal_flip(crop)
    # The box stays that of the unflipped crop; its last value tells how to read it.
    return crop, torch.tensor([left, top, width, height, flipped], dtype=torch.float32)


class TwoViews:
    """MAE's augmentation twice: `image` and `second` (C, *size), `boxes` (2, 5)."""

    def __init__(self, size: Size, crop_scale: Range, hflip: float):
        self.size = size
        self.crop_scale = crop_scale
        self.hflip = hflip

    def __call__(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        first, first_box = crop_with_box(image, self.size, self.crop_scale, self.hflip)
        second, second_box = crop_with_box(image, self.size, self.crop_scale, self.hflip)
        return dict(image=first, second=second, boxes=torch.stack([first_box, second_box]))


class View(NamedTuple):
    """How one view of an image is made: its size, its share of the area, and the chances of two changes."""

    size: Size
    scale: Range
    blur: float
    solarize: float


class Details(NamedTuple):
    """What may differ in iBOT's views.

    Attributes:
        mask_shape: "block" or "rand", which masks single cells.
        exact: follows the code that iBOT and SERE published: blurs of local crops are as wide as those of
            global ones, in pixels, and block masks are drawn as there.
    """

    mask_shape: str = "block"
    exact: bool = False


USUAL = Details()


class MultiCrop:
    """iBOT's views of an image.

    They are `image` (2, C, *size), the global crops; `local` (n, C, *local_size); `boxes` (2+n, 5); and
    `mask` (2, L), where true marks a masked cell of a global crop. Colour changes (jitter, grey,
    solarisation) are made on uint8 images of three channels only.

    Args:
        grid: (h, w), the cells of a global crop.
        global_scale, local_scale: ranges of a crop's share of the image's area.
        mask_ratios: (low, high) ranges; each global crop draws one of them.
        details: what else may differ.
    """

    def __init__(
        self,
        size: Size,
        local_size: Size,
        num_local: int,
        grid: Size,
        *,
        global_scale: Range,
        local_scale: Range,
        mask_ratios: list[Range],
        details: Details = USUAL,
    ):
        # Blur and solarisation of the two global crops differ, as in BYOL and DINO.
        self.views = [
            View(size, global_scale, blur=1.0, solarize=0.0),
            View(size, global_scale, blur=0.1, solarize=0.2),
            *[View(local_size, local_scale, blur=0.5, solarize=0.0)] * num_local,
        ]
        self.grid = grid
        self.mask_ratios = mask_ratios
        self.details = details
        self.local_size = local_size
        # The strengths and chances of DINO and iBOT.
        self.jitter = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)]
        )

    def _make(self, image: torch.Tensor, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        crop, box = crop_with_box(image, view.size, view.scale)
        coloured = len(crop) == 3 and crop.dtype == torch.uint8
        if coloured:
            crop = self.jitter(crop)
        if random.random() < view.blur:
            crop = gaussian_blur(crop, in_proportion=not self.details.exact)
        # Drawn for every image, so that the draws do not depend on the number of channels.
        solarized = random.random() < view.solarize
        if solarized and coloured:
            crop = F.solarize(crop, 128)
        return crop, box

    def __call__(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        crops, boxes = zip(*(self._make(image, view) for view in self.views))
        masks = [self._mask(random.uniform(*random.choice(self.mask_ratios))) for _ in range(2)]
        # An empty tensor instead of none, so that batches have the same names.
        local = image.new_empty(0, len(image), *self.local_size)
        if len(crops) > 2:
            local = torch.stack(crops[2:])
        return dict(
            image=torch.stack(crops[:2]),
            local=local,
            boxes=torch.stack(boxes),
            mask=torch.stack(masks).flatten(1),  # (2, h, w) -> (2, L)
        )

    def _mask(self, ratio: float) -> torch.Tensor:
        if self.details.mask_shape == "rand":
            return scattered_mask(self.grid, ratio)
        if self.details.exact:
            return block_mask(self.grid, ratio, published=True)
        return block_mask(self.grid, ratio)


def gaussian_blur(crop: torch.Tensor, in_proportion: bool = True) -> torch.Tensor:
    """Blur as DINO: sigma from 0.1 to 2 pixels for a crop of 224, and in proportion for others.

    Without `in_proportion` sigma has that range for crops of any size, as in DINO's code.
    """
    side = min(crop.shape[-2:])
    sigma = random.uniform(0.1, 2.0)
    if in_proportion:
        sigma = sigma * side / 224
    # torchvision refuses a filter that reaches beyond the opposite edge.
    reach = min(math.ceil(3 * sigma), side - 1)
    kernel = [2 * reach + 1, 2 * reach + 1]
    if crop.dtype == torch.uint8:
        return F.gaussian_blur(crop, kernel, [sigma, sigma])
    return to_depth(F.gaussian_blur(crop.float(), kernel, [sigma, sigma]), crop.dtype)


def block_mask(grid: Size, ratio: float, published: bool = False) -> torch.Tensor:
    """Draw a bool mask (h, w) of at most ratio * h * w true cells, in rectangles.

    A rectangle covers at least a ninth of the grid, or what is left to mask, and has a side ratio of 0.3 to
    1/0.3. `published` has the limits of the code that BEiT, iBOT and SERE published: the wanted number of
    cells is not rounded down, an area of a ninth is drawn also where less is left, and a rectangle is
    narrower and lower than the grid.

    Source: BEiT, Bao et al. 2022, Algorithm 1.
    """
    h, w = grid
    mask = torch.zeros(h, w, dtype=torch.bool)
    wanted: float = ratio * h * w
    heights = range(1, h + 1)
    widths = range(1, w + 1)
    smallest = max(1, (h // 3) * (w // 3))
    if published:
        heights = range(h)
        widths = range(w)
        smallest = (min(h, w) // 3) ** 2
    else:
        wanted = int(wanted)
    misses = 0
    # Ten misses in a row mean that hardly any rectangle still fits.
    while wanted > 0 and misses < 10:
        # The published range may be reversed; it is still one.
        area = random.uniform(smallest if published else min(smallest, wanted), wanted)
        aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        misses += 1  # until the rectangle is accepted
        if height not in heights or width not in widths:
            continue
        top = random.randint(0, h - height)
        left = random.randint(0, w - width)
        block = mask[top : top + height, left : left + width]
        new = block.numel() - int(block.sum())
        # A rectangle over masked cells only, or with too many new ones, is not used.
        if 0 < new <= wanted:
            block.fill_(True)
            wanted -= new
            misses = 0
    return mask


def scattered_mask(grid: Size, ratio: float) -> torch.Tensor:
    """Draw a bool mask (h, w) of ratio * h * w cells, rounded down, that lie anywhere."""
    h, w = grid
    mask = torch.zeros(h * w, dtype=torch.bool)
    mask[random.sample(range(h * w), int(ratio * (h * w)))] = True
    return mask.view(h, w)
