"""Transforms of one image: random crops and flips, timm's augmentation, and the centre crop of evaluation.

Images are (C, H, W) in the depth of their files before and after; `Pixels` normalises them on the device.
uint8 is a quarter of the bytes between processes, and needs no floating-point work in the loader's workers.
Sizes are (H, W).

Transforms draw from the global generators. A random crop that gets a key draws from its own generator
instead, which the key seeds. Some transforms have further methods, which callers look for by name:

    crop_jpeg(data, key, max_pixels)
                                  makes the result from a JPEG's bytes and decodes only what the crop needs
    window(height, width, key)    says which part of an image is shown, for images that are resampled
    elsewhere
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from util.data import native
from util.data.formats import depth_name, to_depth
from util.data.seeding import seeded
from util.flags.groups import IMAGENET_MEAN, MAX_PIXELS

Range = tuple[float, float]
Size = tuple[int, int]
Box = tuple[int, int, int, int]  # top, left, height, width

# Pixels of a resized image that a centre crop is cut from, if the image itself has fewer. At usual sizes only
# images need more that are hundreds of times longer than wide.
RESIZED_PIXELS = 1 << 25


class Unreadable(ValueError):
    """An image that cannot be read or transformed. The message is the reason."""


# Draws for a sample whose image is unreadable.
MAX_TRIES = 20
# What a transform may raise for an image of an impossible size, or one that there is no memory for. torch
# raises RuntimeError for both.
IMAGE_FAULTS = (ValueError, ArithmeticError, MemoryError, RuntimeError)


def apply(transform: Any, image: torch.Tensor, key: int) -> Any:
    """Return what a transform makes of an image (C, H, W) with the draws of `key`.

    Raises Unreadable if the image is at fault: the transform works on an ordinary one. An error of the
    transform itself is raised as it is.
    """
    try:
        return _drawn(transform, image, key)
    except IMAGE_FAULTS as error:
        if not _works(transform, image, key):
            raise
        height, width = image.shape[-2:]
        reason = str(error) or type(error).__name__
        raise Unreadable(f"its {height} x {width} pixels cannot be transformed: {reason}") from error


def _drawn(transform: Any, image: torch.Tensor, key: int) -> Any:
    if hasattr(transform, "crop_jpeg"):
        return transform(image, key)  # draws from its own generators
    with seeded(key):
        return transform(image)


def _works(transform: Any, image: torch.Tensor, key: int) -> bool:
    try:
        _drawn(transform, black_image(len(image), image.dtype), key)
    except Exception:
        return False
    return True


def black_image(channels: int, depth: torch.dtype = torch.uint8) -> torch.Tensor:
    """Return an image that any transform can be applied to, zeros (channels, 64, 64)."""
    return torch.zeros(channels, 64, 64, dtype=depth)


def resized_crop(image: torch.Tensor, box: Box, size: Size) -> torch.Tensor:
    """Cut a box from an image and resize it (bicubic, antialiased), in the depth of the image.

    Values of more than 8 bits are resized as float32, and then rounded and clipped to their type.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    if image.dtype == torch.uint8:
        return F.resized_crop(image, *box, size=list(size), interpolation=bicubic, antialias=True)
    top, left, height, width = box
    part = image[:, top : top + height, left : left + width].float()
    return to_depth(F.resize(part, list(size), interpolation=bicubic, antialias=True), image.dtype)


def check_depth(transform: Any, depth: torch.dtype | None) -> None:
    """Raise ValueError for images of more than 8 bits and a transform that works on 8 bits only."""
    names = getattr(transform, "only_8_bits", "")
    if names and depth not in (None, torch.uint8):
        raise ValueError(
            f"{names} change the colours of 8-bit images, and these are {depth_name(depth)}: turn both off "
            "(`auto_augment` '' and no `color_jitter`)"
        )


def views(result: Any) -> dict[str, Any]:
    """Return a transform's result by name: one tensor is `image`, several views are a dictionary already."""
    if isinstance(result, dict):
        return result
    return {"image": result}


@dataclass(frozen=True)
class CropSettings:
    """What a random crop is drawn from.

    Attributes:
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width divided by its height.
        hflip, vflip: chance of a left-right and of an upside-down flip.
        rot90: chance of a turn by 90, 180 or 270 degrees, which are equally likely; of `RandomCrop` only.
    """

    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    rot90: float = 0.0


class Crop(NamedTuple):
    """One drawn crop: its box in pixels of the image, and whether it is flipped and then turned."""

    top: int
    left: int
    height: int
    width: int
    flip_x: bool  # left-right
    flip_y: bool  # upside down
    turns: int = 0  # by 90 degrees, counterclockwise

    @property
    def box(self) -> Box:
        """Return (top, left, height, width)."""
        return self[:4]

    @property
    def native_flags(self) -> int:
        """Return the flips as flags of the native library."""
        return self.flip_x * native.FLIP_X | self.flip_y * native.FLIP_Y

    def size_before_turns(self, size: Size) -> Size:
        """Return the size from which the turns make a crop of `size`.

        A box is drawn without regard to the size of the result, and the range of its aspect ratios is the
        same upright and on its side. So a turned crop is drawn as a crop of the turned image would be.
        """
        if self.turns % 2:
            return size[1], size[0]
        return size

    def turned(self, image: torch.Tensor) -> torch.Tensor:
        """Return a crop (C, h, w) of that size after the turns, (C, H, W)."""
        if not self.turns:
            return image
        return torch.rot90(image, self.turns, (-2, -1)).contiguous()

    def moved(self, values: torch.Tensor) -> torch.Tensor:
        """Flip an image (C, h, w) or a mask (h, w) as drawn, and turn it."""
        # Older versions of torch cannot flip uint16. Its bits stay what they are.
        if values.dtype == torch.uint16:
            return self.moved(values.view(torch.int16)).view(torch.uint16)
        if self.flip_x:
            values = values.flip(-1)
        if self.flip_y:
            values = values.flip(-2)
        return self.turned(values)


class Window(NamedTuple):
    """Which part of an image a transform shows, for an image that is resampled elsewhere.

    The box (top, left, height, width) is resized to (full_height, full_width). The result is the part of that
    which starts at (row, column) and has the transform's size. It is then flipped if the flags are 1.
    """

    top: int
    left: int
    height: int
    width: int
    full_height: int
    full_width: int
    row: int = 0
    column: int = 0
    flip_x: int = 0
    flip_y: int = 0


# --- random crops ---

# Seeded for every sample, which takes less time than seeding the global generators and restoring them.
_torch_draws = torch.Generator()
_python_draws = random.Random()


class RandomCrop:
    """A random resized crop (bicubic, antialiased), flips, and turns. Subclasses draw the box.

    Called with (C, H, W) and perhaps a key, which seeds the draws.

    Args:
        input_size: of the result, one number or (H, W).
        settings: what the crop is drawn from.
        dct_scaling: lets `crop_jpeg` decode at 1/2, 1/4 or 1/8 of the size if the crop is at least that many
            times larger than the result: faster for large images, and the pixels are no longer exact.
    """

    def __init__(self, input_size: int | Size, settings: CropSettings, dct_scaling: bool = False):
        self.size = _pair(input_size)
        self.settings = settings
        self.dct_scaling = dct_scaling

    def _draw_box(
        self, height: int, width: int, key: int | None, generator: torch.Generator | None
    ) -> Box | None:
        """Draw (top, left, height, width); None if ten draws do not fit in the image.

        The draws come from torch's `generator`, which `key` has seeded, or from another one that `key` seeds.
        Both are None for the global generators.
        """
        raise NotImplementedError

    def draw(self, height: int, width: int, key: int | None = None) -> Crop:
        """Draw the crop of an image of that height and width."""
        generator = None
        if key is not None:
            generator = _torch_draws.manual_seed(key)
        box = self._draw_box(height, width, key, generator) or self._largest_box(height, width)
        flip_x = _happens(self.settings.hflip, generator)
        flip_y = _happens(self.settings.vflip, generator)
        return Crop(*box, flip_x, flip_y, _quarter_turns(self.settings.rot90, generator))

    def _largest_box(self, height: int, width: int) -> Box:
        """Return the largest centred box of an allowed aspect ratio, for images that fit no drawn box."""
        narrowest, widest = self.settings.ratio
        h = min(height, round(width / narrowest))
        w = min(width, round(height * widest))
        return (height - h) // 2, (width - w) // 2, h, w

    def window(self, height: int, width: int, key: int | None = None) -> Window:
        """Draw the same crop for an image that is resampled elsewhere, where it cannot be turned."""
        assert not self.settings.rot90, "a window has no turns"
        crop = self.draw(height, width, key)
        return Window(*crop.box, *self.size, flip_x=int(crop.flip_x), flip_y=int(crop.flip_y))

    def __call__(self, image: torch.Tensor, key: int | None = None) -> torch.Tensor:
        height, width = image.shape[-2:]
        return self.cut(image, self.draw(height, width, key))

    def cut(self, image: torch.Tensor, crop: Crop) -> torch.Tensor:
        """Return a drawn crop of an image, (C, H, W) -> (C, *size)."""
        size = crop.size_before_turns(self.size)
        # The library takes RGB only. Both ways give the same pixels, up to rounding.
        if image.shape[0] == 3 and image.dtype == torch.uint8 and native.library():
            return crop.turned(native.crop_pixels(image, crop.box, size, crop.native_flags))
        return crop.moved(resized_crop(image, crop.box, size))  # (C, H, W) -> (C, *size)

    def crop_jpeg(
        self, data: bytes, key: int | None = None, max_pixels: int = MAX_PIXELS
    ) -> torch.Tensor | None:
        """Make the result, as RGB, from a JPEG's bytes.

        Returns None without the native library, for unusual JPEGs, and for more than `max_pixels` pixels:
        `decode` then says what is wrong.
        """
        size = native.library() and native.jpeg_size(data)
        if not size or size[0] * size[1] > max_pixels:
            return None
        crop = self.draw(*size, key)
        flags = crop.native_flags | self.dct_scaling * native.DCT_SCALING
        image = native.crop_jpeg(data, crop.box, crop.size_before_turns(self.size), flags)
        if image is None:
            return None
        return crop.turned(image)


def _happens(chance: float, generator: torch.Generator | None) -> bool:
    # MAE and timm have no step for a flip whose chance is 0. A draw for it would change later draws.
    return chance > 0 and torch.rand(1, generator=generator).item() < chance


def _quarter_turns(chance: float, generator: torch.Generator | None) -> int:
    """Draw 1, 2 or 3 with that chance, else 0; after all others, so that boxes and flips stay the same."""
    if not _happens(chance, generator):
        return 0
    return int(torch.randint(1, 4, (1,), generator=generator))


class TorchvisionCrop(RandomCrop):
    """torchvision's random resized crop, for the same seed."""

    def __init__(self, input_size: int | Size, settings: CropSettings, dct_scaling: bool = False):
        super().__init__(input_size, settings, dct_scaling)
        # In float32, as torchvision: another precision would move a box by a pixel now and then.
        self.log_ratio = torch.log(torch.tensor(settings.ratio)).tolist()

    def _draw_box(
        self, height: int, width: int, key: int | None, generator: torch.Generator | None
    ) -> Box | None:
        """Draw as torchvision's RandomResizedCrop, which does not accept a generator."""
        for _ in range(10):
            h, w = self._draw_sides(height, width, generator)
            if 0 < w <= width and 0 < h <= height:
                return self._place(h, w, height, width, generator)
        return None

    def _draw_sides(self, height: int, width: int, generator: torch.Generator | None) -> tuple[int, int]:
        """Draw the crop's height and width, which may exceed those of the image."""
        share = torch.empty(1).uniform_(*self.settings.scale, generator=generator).item()
        area = height * width * share
        aspect = torch.empty(1).uniform_(*self.log_ratio, generator=generator).exp_().item()
        return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))

    def _place(self, h: int, w: int, height: int, width: int, generator: torch.Generator | None) -> Box:
        """Draw the place of a crop of that size."""
        # First the row, then the column: the order of torchvision's draws.
        top = int(torch.randint(height - h + 1, (1,), generator=generator))
        left = int(torch.randint(width - w + 1, (1,), generator=generator))
        return top, left, h, w


class OneDrawCrop(TorchvisionCrop):
    """MAE's random crop of linear probing, after BYOL's: one draw, for the same seed.

    torchvision draws again if a crop exceeds the image, which happens to large crops most of all. Here the
    side that is too long is cut to the image's. So crops are larger on average (of 500 x 375 pixels 51.9 % of
    the area, not 43.3 %), and their aspect ratio may leave the range.
    """

    def _draw_box(
        self, height: int, width: int, key: int | None, generator: torch.Generator | None
    ) -> Box | None:
        h, w = self._draw_sides(height, width, generator)
        # On images of a few pixels a side may round to 0, which MAE's code does not survive.
        h = max(1, min(h, height))
        w = max(1, min(w, width))
        return self._place(h, w, height, width, generator)


class TimmCrop(RandomCrop):
    """timm's random crop and flips, without its PIL images."""

    def _draw_box(
        self, height: int, width: int, key: int | None, generator: torch.Generator | None
    ) -> Box | None:
        """Draw as timm's RandomResizedCropAndInterpolation, from Python's generator.

        The flips use torch's, as in timm.
        """
        draws: Any = random
        if key is not None:
            draws = _python_draws
            draws.seed(key)
        log_ratio = [math.log(ratio) for ratio in self.settings.ratio]
        for _ in range(10):
            area = draws.uniform(*self.settings.scale) * (height * width)
            aspect = math.exp(draws.uniform(*log_ratio))
            h = round(math.sqrt(area / aspect))
            w = round(math.sqrt(area * aspect))
            # On images of a few pixels timm accepts a crop without rows or columns, and fails later.
            if 0 < w <= width and 0 < h <= height:
                top = draws.randint(0, height - h)
                left = draws.randint(0, width - w)
                return top, left, h, w
        return None


def pretrain_transform(
    input_size: int | Size,
    crop_scale: Sequence[float] = (0.2, 1.0),
    hflip: float = 0.5,
    vflip: float = 0.0,
    *,
    rot90: float = 0.0,
    dct_scaling: bool = False,
) -> TorchvisionCrop:
    """MAE's pretraining augmentation: a random resized crop (bicubic, antialiased) and flips.

    The crops are torchvision's for the same seed; the pixels equal its PIL pipeline's up to rounding. For
    `dct_scaling` see `RandomCrop`, for `rot90`, which MAE does not have, `CropSettings`.
    """
    low, high = crop_scale
    settings = CropSettings((low, high), hflip=hflip, vflip=vflip, rot90=rot90)
    return TorchvisionCrop(input_size, settings, dct_scaling)


def probe_transform(input_size: int | Size, crop_scale: Sequence[float] = (0.08, 1.0)) -> OneDrawCrop:
    """MAE's augmentation of linear probing: its own random crop (bicubic, antialiased) and left-right flips.

    The crops are those of MAE's code for the same seed. The pixels are made as in `pretrain_transform`.
    """
    low, high = crop_scale
    return OneDrawCrop(input_size, CropSettings((low, high)))


# --- evaluation ---


class CenterCrop:
    """Resize (bicubic, antialiased) and crop the centre to `size`.

    The resized image covers `cover`, and its aspect ratio is kept. It is not made as a whole if it would have
    more than `RESIZED_PIXELS` pixels and more than the image: the pixels are the same, up to rounding.
    """

    def __init__(self, size: Size, cover: Size):
        self.size = size
        self.cover = cover

    def window(self, height: int, width: int, key: int | None = None) -> Window:
        """Return the centre of the image, resized so that one side equals `cover` and none is below it."""
        h, w = self.cover
        # Round down, as torchvision does.
        if h * width >= w * height:  # the height needs the larger factor
            full_height = h
            full_width = max(w, h * width // height)
        else:
            full_height = max(h, w * height // width)
            full_width = w
        # torchvision's center_crop rounds half a pixel to even.
        row = round((full_height - self.size[0]) / 2)
        column = round((full_width - self.size[1]) / 2)
        return Window(0, 0, height, width, full_height, full_width, row, column)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        window = self.window(height, width)
        full = [window.full_height, window.full_width]
        values = image
        if image.dtype != torch.uint8:
            values = image.float()
        if math.prod(full) > max(RESIZED_PIXELS, height * width):
            values = self._shown_part(values, window)
        else:
            values = F.resize(values, full, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        values = F.center_crop(values, self.size)  # (C, *full) -> (C, *size)
        if image.dtype == torch.uint8:
            return values
        return to_depth(values, image.dtype)

    def _shown_part(self, image: torch.Tensor, window: Window) -> torch.Tensor:
        """Return the part of the resized image that the crop shows, (C, h, w)."""
        rows = Shown.of(window.row, self.size[0], window.height, window.full_height)
        columns = Shown.of(window.column, self.size[1], window.width, window.full_width)
        source = image[:, rows.source, columns.source].numpy()
        box = columns.start, rows.start, columns.end, rows.end
        size = columns.size, rows.size
        parts = []
        for channel in source:
            # PIL resizes a box with fractions, and uses the pixels around it. Its filter is F.resize's.
            whole = Image.fromarray(np.ascontiguousarray(channel))
            parts.append(np.asarray(whole.resize(size, Image.Resampling.BICUBIC, box)))
        return torch.from_numpy(np.stack(parts))


class Shown(NamedTuple):
    """What a crop shows of one axis of an image that is resized.

    Attributes:
        size: positions of the resized axis.
        source: positions of the image that these depend on.
        start, end: where they begin and end in `source`, in fractions of its positions.
    """

    size: int
    source: slice
    start: float
    end: float

    @classmethod
    def of(cls, first: int, size: int, length: int, full: int) -> "Shown":
        """Make that of the positions from `first` on, at most `size`, of `length` resized to `full`."""
        begin = max(0, first)
        end = min(full, first + size)
        scale = length / full
        margin = math.ceil(2 * max(1.0, scale)) + 1  # the reach of the bicubic filter
        low = max(0, math.floor(begin * scale) - margin)
        high = min(length, math.ceil(end * scale) + margin)
        return cls(end - begin, slice(low, high), begin * scale - low, min(end * scale - low, high - low))


def default_crop_pct(size: Size) -> float:
    """Return the share of the resized image that MAE's centre crop shows.

    It is 224/256 for a shorter side of up to 224 pixels, and 1 above.
    """
    if min(size) <= 224:
        return 224 / 256
    return 1.0


def eval_transform(input_size: int | Size, crop_pct: float | None = None) -> CenterCrop:
    """MAE's evaluation transform: resize to cover input_size / crop_pct, then crop the centre.

    For squares this is torchvision's Resize of the shorter side, equal to its PIL pipeline up to rounding. A
    rectangle is covered with the aspect ratio kept. For the default of `crop_pct` see `default_crop_pct`.
    """
    size = _pair(input_size)
    crop_pct = crop_pct or default_crop_pct(size)
    return CenterCrop(size, (int(size[0] / crop_pct), int(size[1] / crop_pct)))


# --- fine-tuning ---


def finetune_transform(
    input_size: int | Size,
    *,
    in_chans: int = 3,
    crop: CropSettings = CropSettings(),
    color_jitter: float | None = None,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
) -> Callable[..., Any]:
    """timm's training augmentation of an image (in_chans, H, W); random erasing follows on the device.

    The transform draws what timm draws. Without auto_augment and color_jitter only a bicubic
    crop and flips remain, which need no PIL image; the transform then also takes undecoded
    JPEGs, as `pretrain_transform` does.

    Args:
        crop: what the crop and the flips are drawn from.
        color_jitter: strength; without effect if auto_augment is on, as in timm.
        auto_augment: timm's description, e.g. "rand-m9-mstd0.5-inc1"; "" or None for none.
        mean: per channel, in [0, 1]: the colour that fills the corners after a rotation or a shift.

    Other numbers of channels than 1 and 3 get the geometric part only, by torchvision's draws. Raises
    ValueError if colour changes are wanted for them, and for an unknown policy.
    """
    assert not crop.rot90, "timm's augmentation has no turns by 90 degrees"
    changes_colours = bool(auto_augment or color_jitter)
    if in_chans not in (1, 3):
        if changes_colours:
            raise ValueError(
                f"`auto_augment` {auto_augment!r} and `color_jitter` {color_jitter} work on 1 or 3 channels, "
                f"not on {in_chans}: turn both off (`auto_augment` '' and no `color_jitter`)"
            )
        return _geometric_transform(_pair(input_size), crop, interpolation)
    # The fast way, without a PIL image.
    if interpolation == "bicubic" and not changes_colours:
        return TimmCrop(input_size, crop)
    with _policy_errors(auto_augment):
        return TimmAugment(
            _pair(input_size),
            scale=crop.scale,
            ratio=crop.ratio,
            hflip=crop.hflip,
            vflip=crop.vflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment or None,
            interpolation=interpolation,
            mean=_per_channel(mean, in_chans),
        )


@contextlib.contextmanager
def _policy_errors(auto_augment: str | None) -> Iterator[None]:
    """Turn timm's answer to a policy that it does not know into a ValueError with the remedy."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(
            f"`auto_augment` {auto_augment!r} is no policy of timm ({error}): give rand-m9-mstd0.5-inc1, "
            "which is MAE's, another one of timm's, or '' for none"
        ) from None


def _per_channel(mean: Sequence[float], channels: int) -> tuple[float, ...]:
    # A mean of RGB also serves grey images, and one value serves all channels.
    if len(mean) != channels:
        return (sum(mean) / len(mean),) * channels
    return tuple(mean)


def _geometric_transform(size: Size, crop: CropSettings, interpolation: str) -> Callable[..., Any]:
    """torchvision's random crop and flips, for any number of channels."""
    # The same draws and pixels. It also rounds pixels of more than 8 bits, which bicubic resizing may push
    # beyond the limits of their type.
    if interpolation == "bicubic":
        return TorchvisionCrop(size, crop)
    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(
            size,
            scale=crop.scale,
            ratio=crop.ratio,
            interpolation=v2.InterpolationMode(interpolation),
            antialias=True,
        )
    ]
    # torchvision's flips draw even if their chance is 0, which would change later draws.
    if crop.hflip > 0:
        steps.append(v2.RandomHorizontalFlip(crop.hflip))
    if crop.vflip > 0:
        steps.append(v2.RandomVerticalFlip(crop.vflip))
    return v2.Compose(steps)


class TimmAugment:
    """timm's `create_transform` for a uint8 (C, H, W) image; `options` are its keywords.

    It is a class, not a closure, so that it can be pickled for spawned workers.
    """

    # PIL images have 8 bits.
    only_8_bits = "`auto_augment` and `color_jitter`"

    def __init__(self, size: Size, **options: Any):
        from timm.data import auto_augment as timm_ops  # slow to import, and pretraining does not need it
        from timm.data import create_transform

        # Both of timm's names lead to a function that fails at 0 bits.
        timm_ops.NAME_TO_OP |= {name: _posterize for name in ("Posterize", "PosterizeIncreasing")}
        self.transform = create_transform(size, is_training=True, use_prefetcher=True, **options)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        # timm's augmentations are written for PIL images.
        return self.transform(F.to_pil_image(image))


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the highest bits of each channel; 0 bits give black.

    timm asks for 0 bits at the highest magnitude. That was black in the Pillow of the published recipes and
    is an error in Pillow 13.
    """
    if bits_to_keep > 0:
        return ImageOps.posterize(image, bits_to_keep)
    return Image.new(image.mode, image.size)


def _pair(size: int | Sequence[int]) -> Size:
    if isinstance(size, int):
        return size, size
    return int(size[0]), int(size[-1])  # [s] means a square
