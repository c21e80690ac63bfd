"""Several crops of one image, each with its box in the image, and the block masks of iBOT.

Transforms take uint8 (C, H, W) and return a dictionary of tensors, which takes the place of `image` in a sample. A box is
(x, y, width, height, flipped) in pixels of the source image. All randomness comes from the global generators.
"""

import math
import random

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


def crop_with_box(
    image: torch.Tensor, size: tuple[int, int], scale: tuple[float, float], hflip: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random resized crop (bicubic, antialiased), flipped with chance `hflip` -> (C, *size), box float32 (5,)."""
    top, left, height, width = v2.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
    flipped = random.random() < hflip
    crop = F.resized_crop(
        image, top, left, height, width, list(size), v2.InterpolationMode.BICUBIC, antialias=True
    )
    box = torch.tensor([left, top, width, height, flipped], dtype=torch.float32)
    return (F.horizontal_flip(crop) if flipped else crop), box


class TwoViews:  # used as a function; a class so that it can be pickled for workers
    """MAE's augmentation twice: `image` and `second` (C, *size), `boxes` (2, 5)."""

    def __init__(self, size: tuple[int, int], crop_scale: tuple[float, float], hflip: float):
        self.crop = size, crop_scale, hflip

    def __call__(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        (a, box_a), (b, box_b) = (crop_with_box(image, *self.crop) for _ in range(2))
        return dict(image=a, second=b, boxes=torch.stack([box_a, box_b]))


class MultiCrop:
    """iBOT's views: `image` (2, C, *size) global crops, `local` (n, C, *local_size), `boxes` (2+n, 5), and `mask`
    (2, L), true = a masked cell of a global crop.

    Colour changes (jitter, grey, solarisation) are for three channels and left out of others. `grid` (h, w) are the cells
    of a global crop, `mask_ratios` (low, high) ranges of which each crop draws one.
    """

    def __init__(
        self,
        size: tuple[int, int],
        local_size: tuple[int, int],
        num_local: int,
        grid: tuple[int, int],
        *,
        global_scale: tuple[float, float],
        local_scale: tuple[float, float],
        mask_ratios: list[tuple[float, float]],
    ):
        self.views = [(size, global_scale, 1.0, 0.0), (size, global_scale, 0.1, 0.2)]
        self.views += [(local_size, local_scale, 0.5, 0.0)] * num_local
        self.grid, self.mask_ratios, self.local_size = grid, mask_ratios, local_size
        self.jitter = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)]
        )

    def _view(self, image, size, scale, blur, solarize):
        crop, box = crop_with_box(image, size, scale)
        if len(crop) == 3:
            crop = self.jitter(crop)
        if random.random() < blur:
            crop = gaussian_blur(crop)
        if random.random() < solarize and len(crop) == 3:
            crop = F.solarize(crop, 128)
        return crop, box

    def __call__(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        crops, boxes = zip(*(self._view(image, *view) for view in self.views))
        masks = [block_mask(self.grid, random.uniform(*random.choice(self.mask_ratios))) for _ in range(2)]
        local = torch.stack(crops[2:]) if crops[2:] else image.new_empty(0, len(image), *self.local_size)
        return dict(
            image=torch.stack(crops[:2]),
            local=local,
            boxes=torch.stack(boxes),
            mask=torch.stack(masks).flatten(1),
        )


def gaussian_blur(crop: torch.Tensor) -> torch.Tensor:
    """DINO's blur, sigma 0.1 to 2 pixels on a crop of 224, and in proportion on others."""
    side = min(crop.shape[-2:])
    sigma = random.uniform(0.1, 2.0) * side / 224
    reach = min(math.ceil(3 * sigma), side - 1)
    return F.gaussian_blur(crop, [2 * reach + 1, 2 * reach + 1], [sigma, sigma])


def block_mask(grid: tuple[int, int], ratio: float) -> torch.Tensor:
    """bool (h, w) with at most ratio * h * w true cells, in rectangles (BEiT, Bao et al. 2022, Alg. 1).

    A rectangle has at least a ninth of the grid (less only where less is wanted) and a side ratio of 0.3 to 1/0.3.
    """
    h, w = grid
    mask, wanted = torch.zeros(h, w, dtype=torch.bool), int(ratio * h * w)
    smallest, misses = max(1, (h // 3) * (w // 3)), 0
    while wanted > 0 and misses < 10:
        area = random.uniform(min(smallest, wanted), wanted)
        aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        bh, bw = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        misses += 1
        if not (0 < bh <= h and 0 < bw <= w):
            continue
        top, left = random.randint(0, h - bh), random.randint(0, w - bw)
        block = mask[top : top + bh, left : left + bw]
        new = block.numel() - int(block.sum())
        if 0 < new <= wanted:
            block.fill_(True)
            wanted, misses = wanted - new, 0
    return mask
