"""Bytes -> uint8 images -> augmented uint8 images -> normalised batches on the device.

Images stay uint8 (C, H, W) until they are on the device: a quarter of the bytes between processes, and no float work in
the loader's workers. Sizes are (H, W). Transforms take and return uint8 (C, H, W) and draw from the global generators.
"""
import io
import math
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from util import native

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
    except Exception as error:  # decoders raise many types on damaged input: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"not a readable image ({len(data)} bytes, starting with {data[:4]!r}): {error}") from error


def _is_plain_jpeg(data):
    """8-bit grey or YCbCr, of a size that PIL would accept: what torchvision decodes exactly as PIL does."""
    if data[:2] != b"\xff\xd8":
        return False
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            bits, channels = data[at + 4], data[at + 9]
            height, width = int.from_bytes(data[at + 5:at + 7]), int.from_bytes(data[at + 7:at + 9])
            return bits == 8 and channels in (1, 3) and height * width <= (Image.MAX_IMAGE_PIXELS or 1 << 32)
        # 0xFF may be repeated as padding before a marker; a segment's length counts its own two bytes
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2:at + 4])
    return False


def _to_8_bit(image):
    if image.mode[0] == "I":  # PIL's own conversion clips at 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integer pixels from {values.min()} to {values.max()}: only 8 and 16 bit are known")
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


class pretrain_transform:  # used as a function, like the next two; a class so that it also takes undecoded JPEGs
    """MAE's pretraining augmentation: random resized crop (bicubic, antialiased) and flips.

    The crops are torchvision's for the same seed; the pixels equal its PIL pipeline's up to rounding. Called with a uint8
    image (C, H, W), or by `crop_jpeg` with a file's bytes, which draws the same and decodes only what the crop needs.

    Args:
        dct_scaling: let `crop_jpeg` decode at 1/2, 1/4, 1/8 where the crop is at least that much larger than the result:
            faster on large images, and no longer the exact pixels.
    """

    def __init__(self, input_size, crop_scale=(0.2, 1.0), hflip: float = 0.5, vflip: float = 0.0, *,
                 dct_scaling: bool = False):
        self.size, self.hflip, self.vflip, self.dct_scaling = _pair(input_size), hflip, vflip, dct_scaling
        self.scale, self.ratio = tuple(crop_scale), (3 / 4, 4 / 3)
        self.log_ratio = torch.log(torch.tensor(self.ratio)).tolist()

    def draw(self, height: int, width: int, generator: torch.Generator | None = None) -> tuple[int, int, int, int, bool, bool]:
        """top, left, height, width of the crop, and whether to flip it left-right and upside down.

        As torchvision's RandomResizedCrop and flips draw them from the same state; which take no generator of one's own.
        """
        top, left, h, w = self._draw_box(height, width, generator)
        flips = [p > 0 and torch.rand(1, generator=generator).item() < p for p in (self.hflip, self.vflip)]
        return top, left, h, w, *flips

    def _draw_box(self, height, width, generator):
        for _ in range(10):
            area = height * width * torch.empty(1).uniform_(*self.scale, generator=generator).item()
            aspect = torch.empty(1).uniform_(*self.log_ratio, generator=generator).exp_().item()
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < w <= width and 0 < h <= height:
                top = torch.randint(height - h + 1, (1,), generator=generator).item()
                return top, torch.randint(width - w + 1, (1,), generator=generator).item(), h, w
        # no such crop fits: the largest one with an allowed aspect ratio, in the middle
        h, w = min(height, round(width / self.ratio[0])), min(width, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        *box, x, y = self.draw(*image.shape[-2:])
        image = F.resized_crop(image, *box, size=self.size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        return image.flip([d for d, flipped in ((-1, x), (-2, y)) if flipped]) if x or y else image

    def crop_jpeg(self, data: bytes, generator: torch.Generator | None = None) -> torch.Tensor | None:
        """The same of undecoded bytes, as RGB; None where `decode` is needed: no native library, or no plain JPEG."""
        size = native.library() and native.jpeg_size(data)
        if not size or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 1 << 32):
            return None
        *box, x, y = self.draw(*size, generator)
        return native.crop_jpeg(data, box, self.size, x * native.FLIP_X | y * native.FLIP_Y
                                | self.dct_scaling * native.DCT_SCALING)


def eval_transform(input_size, crop_pct: float | None = None) -> v2.Compose:
    """MAE's evaluation transform: resize (bicubic, antialiased) to cover input_size / crop_pct, then crop the centre.

    crop_pct: default 224/256 for a shorter side up to 224, else 1. For squares this is torchvision's Resize of the
    shorter side, equal to its PIL pipeline up to rounding; a rectangle is covered with the aspect ratio kept.
    """
    height, width = _pair(input_size)
    crop_pct = crop_pct or (224 / 256 if min(height, width) <= 224 else 1.0)
    return v2.Compose([_ResizeToCover((int(height / crop_pct), int(width / crop_pct))), v2.CenterCrop((height, width))])


class _ResizeToCover(nn.Module):
    """Resize with the aspect ratio kept so that neither side is below `size`, and one equals it."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, image):
        (h, w), (height, width) = self.size, image.shape[-2:]
        if h * width >= w * height:  # the height needs the larger factor
            size = h, max(w, h * width // height)  # rounds down, as torchvision
        else:
            size = max(h, w * height // width), w
        return F.resize(image, size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


class finetune_transform:  # used as a function, like the two above; a class so that it can be pickled for workers
    """timm's training augmentation on a uint8 (in_chans, H, W) image; random erasing follows on the device.

    Args:
        color_jitter: strength; without effect where auto_augment is on, as in timm.
        auto_augment: timm's description, e.g. "rand-m9-mstd0.5-inc1"; "" or None for none.
        crop_scale, crop_ratio: ranges of the crop's share of the area and of its aspect ratio.
        mean: per channel, in [0, 1]: the colour that fills the corners after a rotation or a shift.

    Other than 1 or 3 channels get the geometric part only; asking for colour changes there raises ValueError.
    """

    def __init__(self, input_size, *, in_chans: int = 3, color_jitter: float | None = None,
                 auto_augment: str | None = "rand-m9-mstd0.5-inc1", hflip: float = 0.5, vflip: float = 0.0,
                 crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), interpolation: str = "bicubic", mean=IMAGENET_MEAN):
        self.pil = in_chans in (1, 3)
        if not self.pil and (auto_augment or color_jitter):
            raise ValueError(f"auto_augment={auto_augment!r}, color_jitter={color_jitter} work on 1 or 3 channels, not "
                             f"on {in_chans}: turn both off (--aa '' and no --color_jitter)")
        if not self.pil:
            crop = v2.RandomResizedCrop(_pair(input_size), tuple(crop_scale), tuple(crop_ratio),
                                        v2.InterpolationMode(interpolation), antialias=True)
            self.transform = v2.Compose([crop, *_flips(hflip, vflip)])
            return
        from timm.data import auto_augment as timm_ops  # slow to import, and pretraining does not need it
        from timm.data import create_transform
        timm_ops.NAME_TO_OP |= {name: _posterize for name in ("Posterize", "PosterizeIncreasing")}
        mean = tuple(mean) if len(mean) == in_chans else (sum(mean) / len(mean),) * in_chans
        self.transform = create_transform(
            _pair(input_size), is_training=True, use_prefetcher=True, scale=tuple(crop_scale), ratio=tuple(crop_ratio),
            hflip=hflip, vflip=vflip, color_jitter=color_jitter, auto_augment=auto_augment or None,
            interpolation=interpolation, mean=mean)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return self.transform(F.to_pil_image(image) if self.pil else image)


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
        raise ValueError(f"mean {mean} and std {std} need one positive value or one per channel, and images have "
                         f"{channels}: give --mean and --std ({channels} values each)")
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
    scale, shift = 1 / (255 * std), -mean / std
    return tuple(v.float().to(device)[:, None, None] for v in (scale, shift))  # (C, 1, 1) or (1, 1, 1)


def _flips(hflip, vflip):
    return [flip(p) for flip, p in ((v2.RandomHorizontalFlip, hflip), (v2.RandomVerticalFlip, vflip)) if p > 0]


def _pair(size):
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
