"""Bytes -> uint8 images -> augmented uint8 images -> normalised batches on the device.

Images stay uint8 (C, H, W) until they are on the device: a quarter of the bytes between processes, and no float work in
the loader's workers. Sizes are (H, W). Transforms take and return uint8 (C, H, W). They draw from the global
generators. A random crop that gets a key draws from a generator of its own, which the key seeds.
"""

import io
import math
import random
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from util.data import native

try:  # deprecated since torchvision 0.29; without it PIL decodes the same pixels, a third slower
    from torchvision.io import decode_jpeg
except ImportError:
    decode_jpeg = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(data: bytes, in_chans: int = 3) -> torch.Tensor:
    """Undecoded file -> uint8 (in_chans, H, W).

    1, 3 and 4 channels (grey, RGB, RGBA) are read from any format that PIL reads; 16-bit grey is scaled to 8 bit. Any
    channel count is read from `.npy` files with a uint8 array (H, W, in_chans), or (H, W) for one channel.
    Raises ValueError for what cannot be decoded, truncated files included.
    """
    try:
        if data[:6] == b"\x93NUMPY":
            return _decode_npy(data, in_chans)
        if in_chans not in PIL_MODES:
            raise ValueError(f"{in_chans} channels are read from .npy files of uint8 (H, W, {in_chans}) only")
        if decode_jpeg and in_chans in (1, 3) and _is_plain_jpeg(data):
            mode = "GRAY" if in_chans == 1 else "RGB"
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
        with Image.open(io.BytesIO(data)) as image:
            if in_chans == 1:
                image.draft("L", None)  # grey is the luma that a JPEG stores, as torchvision gives it
            image = _to_8_bit(image).convert(PIL_MODES[in_chans])
        return F.pil_to_tensor(image)
    except (
        Exception
    ) as error:  # decoders raise many types on damaged input: OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"not a readable image ({len(data)} bytes, starting with {data[:4]!r}): {error}"
        ) from error


def _is_plain_jpeg(data):
    """8-bit grey or YCbCr, of a size that PIL would accept: what torchvision decodes exactly as PIL does."""
    if data[:2] != b"\xff\xd8":
        return False
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            bits, channels = data[at + 4], data[at + 9]
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            return bits == 8 and channels in (1, 3) and height * width <= (Image.MAX_IMAGE_PIXELS or 1 << 32)
        # 0xFF may be repeated as padding before a marker; a segment's length counts its own two bytes
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


def _to_8_bit(image):
    if image.mode[0] == "I":  # PIL's own conversion clips at 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"integer pixels from {values.min()} to {values.max()}: only 8 and 16 bit are known"
            )
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: store 8-bit images or uint8 .npy files")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # the same colours, without PIL's warning
    return image


def _decode_npy(data, in_chans):
    array = np.load(io.BytesIO(data), allow_pickle=False)
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != in_chans or array.size == 0:
        raise ValueError(f"found {array.dtype} {array.shape}, expected uint8 (H, W, {in_chans})")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


class Window(NamedTuple):
    """Which part of an image a transform shows, for an image that is resampled elsewhere.

    The box (top, left, height, width) is resized to (full_height, full_width). The result is the part of that
    which starts at (row, column) and has the transform's size. It is then flipped where the flags are 1.
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


# Seeded for every sample: that takes less time than to seed the global generators and to give them back.
_torch_draws, _python_draws = torch.Generator(), random.Random()


class _RandomCrop:
    """A random resized crop (bicubic, antialiased) and flips. Subclasses draw the box.

    Called with a uint8 image (C, H, W). `crop_jpeg` takes a file's bytes instead, draws the same, and decodes
    only what the crop needs. `key` seeds the draws; without one they come from the global generators.
    """

    def __init__(self, input_size, scale, ratio, flips: tuple[float, float], dct_scaling: bool = False):
        self.size, self.scale, self.ratio = _pair(input_size), tuple(scale), tuple(ratio)
        self.flips, self.dct_scaling = flips, dct_scaling

    def draw(self, height: int, width: int, key: int | None = None) -> tuple[int, int, int, int, bool, bool]:
        """top, left, height, width of the crop, and whether to flip it left-right and upside down."""
        generator = None if key is None else _torch_draws.manual_seed(key)
        box = self._draw_box(height, width, key, generator) or self._largest_box(height, width)
        return *box, *(p > 0 and torch.rand(1, generator=generator).item() < p for p in self.flips)

    def _largest_box(self, height, width):
        """For images in which no drawn crop fits: the largest with an allowed aspect ratio, in the middle."""
        h, w = min(height, round(width / self.ratio[0])), min(width, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w

    def window(self, height: int, width: int, key: int | None = None) -> Window:
        """The same draws, for an image that is resampled elsewhere."""
        *box, x, y = self.draw(height, width, key)
        return Window(*box, *self.size, flip_x=int(x), flip_y=int(y))

    def __call__(self, image: torch.Tensor, key: int | None = None) -> torch.Tensor:
        *box, x, y = self.draw(*image.shape[-2:], key)
        if image.shape[0] == 3 and native.library():
            return native.crop_pixels(image, box, self.size, x * native.FLIP_X | y * native.FLIP_Y)
        image = F.resized_crop(
            image, *box, size=self.size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        return image.flip([d for d, flipped in ((-1, x), (-2, y)) if flipped]) if x or y else image

    def crop_jpeg(self, data: bytes, key: int | None = None) -> torch.Tensor | None:
        """The same of a file's bytes, as RGB; None without the native library and for unusual JPEGs."""
        size = native.library() and native.jpeg_size(data)
        if not size or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 1 << 32):
            return None
        *box, x, y = self.draw(*size, key)
        return native.crop_jpeg(
            data,
            box,
            self.size,
            x * native.FLIP_X | y * native.FLIP_Y | self.dct_scaling * native.DCT_SCALING,
        )


class pretrain_transform(_RandomCrop):  # used as a function; a class so that it also takes undecoded JPEGs
    """MAE's pretraining augmentation: random resized crop (bicubic, antialiased) and flips.

    The crops are torchvision's for the same seed; the pixels equal its PIL pipeline's up to rounding.

    Args:
        dct_scaling: let `crop_jpeg` decode at 1/2, 1/4, 1/8 where the crop is at least that much larger than the result:
            faster on large images, and no longer the exact pixels.
    """

    def __init__(
        self,
        input_size,
        crop_scale=(0.2, 1.0),
        hflip: float = 0.5,
        vflip: float = 0.0,
        *,
        dct_scaling: bool = False,
    ):
        super().__init__(input_size, crop_scale, (3 / 4, 4 / 3), (hflip, vflip), dct_scaling)
        self.log_ratio = torch.log(torch.tensor(self.ratio)).tolist()

    def _draw_box(self, height, width, key, generator):
        """As torchvision's RandomResizedCrop draws it; that one takes no generator of one's own."""
        for _ in range(10):
            area = height * width * torch.empty(1).uniform_(*self.scale, generator=generator).item()
            aspect = torch.empty(1).uniform_(*self.log_ratio, generator=generator).exp_().item()
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < w <= width and 0 < h <= height:
                top = torch.randint(height - h + 1, (1,), generator=generator).item()
                return top, torch.randint(width - w + 1, (1,), generator=generator).item(), h, w
        return None


class eval_transform:  # used as a function; a class so that it can say which window it shows
    """MAE's evaluation transform: resize (bicubic, antialiased) to cover input_size / crop_pct, then crop the centre.

    crop_pct: default 224/256 for a shorter side up to 224, else 1. For squares this is torchvision's Resize of the
    shorter side, equal to its PIL pipeline up to rounding; a rectangle is covered with the aspect ratio kept.
    """

    def __init__(self, input_size, crop_pct: float | None = None):
        self.size = _pair(input_size)
        crop_pct = crop_pct or (224 / 256 if min(self.size) <= 224 else 1.0)
        self.cover = tuple(int(side / crop_pct) for side in self.size)

    def window(self, height: int, width: int, key: int | None = None) -> Window:
        """The centre of the whole image at a size of which no side is below `cover`, and one equals it."""
        h, w = self.cover
        if h * width >= w * height:  # the height needs the larger factor
            full = h, max(w, h * width // height)  # rounds down, as torchvision
        else:
            full = max(h, w * height // width), w
        # As torchvision's center_crop, which rounds half a pixel to even.
        row, column = (round((a - b) / 2) for a, b in zip(full, self.size))
        return Window(0, 0, height, width, *full, row, column)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        full = self.window(*image.shape[-2:])[4:6]
        image = F.resize(image, full, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        return F.center_crop(image, self.size)


def finetune_transform(
    input_size,
    *,
    in_chans: int = 3,
    color_jitter: float | None = None,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    hflip: float = 0.5,
    vflip: float = 0.0,
    crop_scale=(0.08, 1.0),
    crop_ratio=(3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    mean=IMAGENET_MEAN,
):
    """timm's training augmentation on a uint8 (in_chans, H, W) image; random erasing follows on the device.

    Without auto_augment and color_jitter only a bicubic crop and flips remain, which need no PIL image. The
    transform then also takes undecoded JPEGs, as pretrain_transform does. It draws what timm draws.

    Args:
        color_jitter: strength; without effect where auto_augment is on, as in timm.
        auto_augment: timm's description, e.g. "rand-m9-mstd0.5-inc1"; "" or None for none.
        crop_scale, crop_ratio: ranges of the crop's share of the area and of its aspect ratio.
        mean: per channel, in [0, 1]: the colour that fills the corners after a rotation or a shift.

    Other than 1 or 3 channels get the geometric part only, by torchvision's draws. Asking for colour changes
    there raises ValueError.
    """
    pil = in_chans in (1, 3)
    if not pil and (auto_augment or color_jitter):
        raise ValueError(
            f"auto_augment={auto_augment!r}, color_jitter={color_jitter} work on 1 or 3 "
            f"channels, not on {in_chans}: turn both off (--aa '' and no --color_jitter)"
        )
    crop = dict(scale=tuple(crop_scale), ratio=tuple(crop_ratio))
    if not pil:
        kind = v2.InterpolationMode(interpolation)
        crop = v2.RandomResizedCrop(_pair(input_size), **crop, interpolation=kind, antialias=True)
        return v2.Compose([crop, *_flips(hflip, vflip)])
    if interpolation == "bicubic" and not auto_augment and not color_jitter:
        return _TimmCrop(input_size, **crop, flips=(hflip, vflip))
    mean = tuple(mean) if len(mean) == in_chans else (sum(mean) / len(mean),) * in_chans
    return _TimmAugment(
        _pair(input_size),
        **crop,
        hflip=hflip,
        vflip=vflip,
        color_jitter=color_jitter,
        auto_augment=auto_augment or None,
        interpolation=interpolation,
        mean=mean,
    )


class _TimmCrop(_RandomCrop):
    """timm's random crop and flips without its PIL images."""

    def _draw_box(self, height, width, key, generator):
        """As timm's RandomResizedCropAndInterpolation, which uses Python's generator; flips use torch's."""
        draws = random
        if key is not None:
            draws = _python_draws
            draws.seed(key)
        low, high = (math.log(r) for r in self.ratio)
        for _ in range(10):
            area = draws.uniform(*self.scale) * (height * width)
            aspect = math.exp(draws.uniform(low, high))
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            # timm lets a crop without rows or columns pass, on images of a few pixels, and then fails.
            if 0 < w <= width and 0 < h <= height:
                top = draws.randint(0, height - h)
                return top, draws.randint(0, width - w), h, w
        return None


class _TimmAugment:  # used as a function; a class so that it can be pickled for workers
    """What timm's `create_transform` makes, on a uint8 (C, H, W) image by way of PIL's."""

    def __init__(self, size, **options):
        from timm.data import auto_augment as timm_ops  # slow to import, and pretraining does not need it
        from timm.data import create_transform

        timm_ops.NAME_TO_OP |= {name: _posterize for name in ("Posterize", "PosterizeIncreasing")}
        self.transform = create_transform(size, is_training=True, use_prefetcher=True, **options)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return self.transform(F.to_pil_image(image))


def _posterize(image, bits_to_keep, **_):
    """timm asks for 0 bits at the highest magnitude: black in the Pillow that recipes used, an error in Pillow 13."""
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def normalize(images: torch.Tensor, mean, std) -> torch.Tensor:
    """uint8 (..., C, H, W) -> float32 (images / 255 - mean) / std, on the images' device."""
    scale, shift = _affine(tuple(mean), tuple(std), images.shape[-3], images.device)
    return images.to(torch.float32).mul_(scale).add_(shift)


def unnormalize(images: torch.Tensor, mean, std) -> torch.Tensor:
    """The inverse of `normalize`: float (..., C, H, W) -> uint8, rounded and clipped."""
    scale, shift = _affine(tuple(mean), tuple(std), images.shape[-3], images.device)
    return images.detach().float().sub(shift).div_(scale).round_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=32)  # so that a step copies no constants to the device
def _affine(mean, std, channels, device):
    if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
        raise ValueError(
            f"mean {mean} and std {std} need one positive value or one per channel, and images have "
            f"{channels}: give --mean and --std ({channels} values each)"
        )
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
    scale, shift = 1 / (255 * std), -mean / std
    return tuple(v.float().to(device)[:, None, None] for v in (scale, shift))  # (C, 1, 1) or (1, 1, 1)


def _flips(hflip, vflip):
    return [
        flip(p) for flip, p in ((v2.RandomHorizontalFlip, hflip), (v2.RandomVerticalFlip, vflip)) if p > 0
    ]


def _pair(size):
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
