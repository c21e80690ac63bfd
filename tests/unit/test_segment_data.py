"""Segmentation masks, joint transforms of images and masks, and samples of both."""

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from util.data.datasets import ImageDataset
from util.data.formats import ReadSettings
from util.data.loading.loader import build_loader, check_same_everywhere
from util.data.seeding import sample_seed
from util.data.segments.dataset import SegmentDataset, build_segment_dataset, survey_masks
from util.data.segments.layouts import build_pairs
from util.data.segments.masks import IGNORED, MaskSettings, decode_mask
from util.data.segments.transforms import SegmentCrop, SegmentEval, SegmentResize
from util.data.transforms import CropSettings, pretrain_transform
from util.flags.data_path import DataPath
from util.run.training_images import TrainingImages

PLAIN = MaskSettings()
RGB = ReadSettings()


def encoded(values: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, settings: MaskSettings = PLAIN, max_pixels: int = 10**6) -> torch.Tensor:
    mask = decode_mask(data, settings, max_pixels)
    assert mask.dtype == torch.int16
    return mask


def png(values: np.ndarray, bits: int, colours: int = 0, size: tuple[int, int] | None = None) -> bytes:
    """A PNG by hand: `values` are packed with `bits` bits each; `size` is what its header claims."""
    height, width = size or values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    palette = b""
    if colours == 3:
        palette = chunk(b"PLTE", bytes([7, 200, 90] * 2**bits))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + palette
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# --- masks: stored numbers ---


@pytest.mark.parametrize(
    ("bits", "colours"), [(bits, 0) for bits in (1, 2, 4, 8, 16)] + [(bits, 3) for bits in (1, 2, 4, 8)]
)
def test_numbers_are_those_in_the_file(bits, colours):
    values = np.arange(15).reshape(3, 5) % min(2**bits, 11)
    if bits == 16:
        values = values * 1000
    assert np.array_equal(decoded(png(values, bits, colours)), values)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palettes_are_not_looked_up(kind):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = Image.fromarray(values, "P")
    image.putpalette([200, 30, 40, 0, 0, 0] * 128)
    file = io.BytesIO()
    image.save(file, kind)
    if kind == "GIF":
        # PIL's writer merges equal colours.
        image.putpalette([(i * 37 + 11) % 256 for i in range(768)])
        file = io.BytesIO()
        image.save(file, kind, optimize=False)
    assert np.array_equal(decoded(file.getvalue()), values)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32])
def test_tiffs(dtype):
    values = np.arange(12).reshape(3, 4).astype(dtype)
    data = encoded(values.astype(np.int32 if dtype == np.int16 else dtype), "TIFF")
    assert np.array_equal(decoded(data), values)
    assert np.array_equal(decoded(encoded(values.astype(np.uint8), "TIFF", compression="tiff_lzw")), values)


def test_transparency_of_a_palette_does_not_matter():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([9, 9, 9] * 256)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes([0, 255, 128]))
    assert decoded(file.getvalue()).tolist() == [[0, 1, 2]]


def test_red_and_green():
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 920, (7, 9))
    classes[2, 3] = classes[0, 0] = 1000
    rgb = np.stack([classes % 256, classes // 256, np.zeros_like(classes)], 2).astype(np.uint8)
    settings = MaskSettings(920, 1000, encoding="red_green")
    expected = np.where(classes == 1000, IGNORED, classes)
    assert np.array_equal(decoded(encoded(rgb), settings), expected)
    opaque = np.dstack([rgb, np.full((7, 9), 255, np.uint8)])
    assert np.array_equal(decoded(encoded(opaque), settings), expected)
    # 255 is a class here.
    one = np.full((1, 1, 3), (255, 0, 0), np.uint8)
    assert decoded(encoded(one), settings).item() == 255
    with pytest.raises(ValueError, match=r"value 920: `num_classes` 920 takes 0 to 919, and .* is 1000"):
        decoded(encoded(np.full((1, 1, 3), (920 - 768, 3, 0), np.uint8)), settings)
    with pytest.raises(ValueError, match="its mask is L, and `encoding` red_green takes RGB"):
        decoded(encoded(one[:, :, 0]), settings)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([5, 1, 0, 232, 3, 0])
    file = io.BytesIO()
    palette.save(file, "PNG")
    assert decoded(file.getvalue(), settings).tolist() == [[261, IGNORED]]


# --- masks: classes ---


def test_reduce_zero_label():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values[values > 150] = 255
    expected = np.where((values == 0) | (values == 255), IGNORED, values.astype(int) - 1)
    settings = MaskSettings(150, 255, reduce_zero_label=True)
    assert np.array_equal(decoded(encoded(values), settings), expected)
    with pytest.raises(
        ValueError, match=r"value 151: `num_classes` 150 takes 1 to 150 with `reduce_zero_label`"
    ):
        decoded(encoded(np.full((1, 1), 151, np.uint8)), settings)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_a_table(dtype):
    settings = MaskSettings(3, 9, table=(2, -1, 0, 9, 1))
    values = np.array([[0, 1, 2, 3, 4, 9]], dtype)
    data = encoded(values, "TIFF")
    assert decoded(data, settings).tolist() == [[2, IGNORED, 0, IGNORED, 1, IGNORED]]
    with pytest.raises(ValueError, match="value 5: the table of 3 classes takes 0 to 4"):
        decoded(encoded(np.array([[5]], dtype), "TIFF"), settings)


def test_numbers_without_a_class():
    values = np.array([[0, 10, 255], [11, 12, 0]], np.uint8)
    with pytest.raises(
        ValueError,
        match="the value 11, 12: `num_classes` 11 takes 0 to 10, and `ignore_index` is 255",
    ):
        decoded(encoded(values), MaskSettings(11))
    assert decoded(encoded(values), MaskSettings(13)).tolist() == [[0, 10, IGNORED], [11, 12, 0]]
    assert decoded(encoded(values), MaskSettings(256, None))[0, 2] == 255
    assert decoded(encoded(values), MaskSettings(256, -1))[0, 2] == 255
    with pytest.raises(ValueError, match=r"the value 255: .* no `ignore_index` is given"):
        decoded(encoded(values), MaskSettings(13, -1))
    many = np.arange(100, dtype=np.uint8)[None]
    with pytest.raises(ValueError, match=r"the value 11, 12, 13, 14, 15, \.\.\. \(89 values\)"):
        decoded(encoded(many), MaskSettings(11))


@pytest.mark.parametrize("value", [32768, 65534, 70000, -2])
def test_numbers_that_int16_cannot_hold(value):
    data = encoded(np.array([[value]], np.int32), "TIFF")
    if 0 <= value < 1 << 16:
        data = encoded(np.array([[value]], np.uint16))
    with pytest.raises(ValueError, match=f"the value {value}, and masks may have 0 to 32767"):
        decoded(data)
    assert decoded(encoded(np.array([[32767]], np.uint16))).item() == 32767
    assert decoded(encoded(np.array([[-1]], np.int32), "TIFF"), MaskSettings(2, -1)).item() == IGNORED


def test_settings_that_make_no_sense():
    for options in (
        dict(num_classes=0),
        dict(num_classes=40000),
        dict(ignore_index=-2),
        dict(encoding="blue"),
        dict(reduce_zero_label=True, table=(1, 2)),
    ):
        with pytest.raises(ValueError, match="`"):
            MaskSettings(**options)


def test_settings_over_those_of_a_layout():
    layout = MaskSettings(19, 1000, encoding="red_green")
    assert MaskSettings().over(layout) == layout
    assert MaskSettings(ignore_index=None).over(layout) == layout
    assert MaskSettings(5).over(layout) == MaskSettings(5, 1000, encoding="red_green")
    given = MaskSettings(5, 7, reduce_zero_label=True)
    assert given.over(MaskSettings(9)) == given


# --- masks: files that are refused ---


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), {}, "its mask is RGB, not one band .*: convert its colours"),
        (np.zeros((4, 4, 4), np.uint8), {}, "its mask is RGBA, not one band"),
        (np.zeros((4, 4, 2), np.uint8), {}, "its mask is LA, not one band"),
        (np.zeros((4, 4), np.uint8), dict(kind="JPEG"), "stored as JPEG, which may change class numbers"),
        (np.zeros((4, 4, 3), np.uint8), dict(kind="JPEG"), "stored as JPEG"),
        (np.zeros((4, 4), np.uint8), dict(kind="WEBP"), "stored as WEBP"),
        (np.zeros((16, 16), np.uint8), dict(kind="TIFF", compression="jpeg"), "jpeg in a TIFF"),
        (np.zeros((4, 4), np.float32), dict(kind="TIFF"), "its mask is F, not one band"),
    ],
)
def test_files_that_are_no_masks(values, options, message):
    with pytest.raises(ValueError, match=message) as error:
        decoded(encoded(values, **options))
    assert "\n" not in str(error.value)


def test_a_tiff_in_which_zero_is_white():
    data = bytearray(encoded(np.zeros((4, 4), np.uint8), "TIFF"))
    at = data.index(struct.pack("<HHIHH", 262, 3, 1, 1, 0))
    data[at + 8] = 0
    with pytest.raises(ValueError, match="a TIFF in which 0 is white"):
        decoded(bytes(data))


def test_deep_colours_are_refused():
    rows = [[1, 2, 3] * 2, [4, 5, 6] * 2]
    data = png(np.array(rows), 16, 2, (2, 2))
    for settings in (PLAIN, MaskSettings(encoding="red_green")):
        with pytest.raises(ValueError, match="a PNG of 16 bits with colours"):
            decoded(data, settings)


@pytest.mark.parametrize("cut", [0, 4, 20, 60])
def test_damaged_masks(cut):
    whole = encoded(np.random.default_rng(1).integers(0, 99, (50, 50)).astype(np.uint8))
    with pytest.raises(ValueError, match="not a readable mask") as error:
        decoded(whole[:cut])
    assert "\n" not in str(error.value)


def test_a_mask_that_claims_a_huge_size():
    values = np.zeros((2, 2), int)
    for data in (png(values, 8, size=(60000, 60000)), png(values, 1, 3, size=(2**31 - 1, 2**31 - 1))):
        with pytest.raises(ValueError, match="pixels are more than `max_pixels` 1000000"):
            decoded(data)
    assert decoded(png(values, 8), max_pixels=4).shape == (2, 2)
    with pytest.raises(ValueError, match="max_pixels"):
        decoded(png(values, 8), max_pixels=3)


# --- joint transforms ---


def scene(height: int = 90, width: int = 120) -> torch.Tensor:
    """A mask of large areas, int16 (height, width): 0 to 3, without a symmetry."""
    rows = torch.arange(height)[:, None]
    columns = torch.arange(width)[None]
    mask = (columns > width * 0.6).short() + 2 * (rows > height * 0.3).short()
    mask[(rows - 20) ** 2 + (columns - 30) ** 2 < 150] = 3
    return mask


def picture_of(mask: torch.Tensor, channels: int = 3, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """An image from which the mask can be read: class c has the value 40 + 50 * c."""
    return (40 + 50 * mask.int()).to(dtype).expand(channels, -1, -1).contiguous()


def agreement(image: torch.Tensor, mask: torch.Tensor) -> float:
    """The share of pixels whose value is that of their class."""
    classes = ((image[0].float() - 40) / 50).round()
    return (classes == mask).float().mean().item()


ALL_MOVES = CropSettings((0.2, 1.0), vflip=0.5, rot90=0.5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
@pytest.mark.parametrize("jitter", [None, (0.5, 2.0)])
@pytest.mark.parametrize("channels", [3, 5])
def test_an_image_made_from_the_mask_moves_with_it(dtype, jitter, channels):
    mask = scene()
    image = picture_of(mask, channels, dtype)
    transform = SegmentCrop((64, 48), ALL_MOVES, scale_jitter=jitter)
    for key in range(30):
        crop, classes = transform(image, mask, key)
        assert crop.shape == (channels, 64, 48) and crop.dtype == dtype
        assert classes.shape == (64, 48) and classes.dtype == torch.int16
        # Where the image ends it is 0, which stands for no class, and the mask is IGNORED.
        assert agreement(crop, classes) > 0.94


def test_images_are_those_of_pretraining():
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.manual_seed(0))
    for flips in ({}, dict(vflip=0.5, rot90=0.5)):
        usual = pretrain_transform((64, 48), (0.2, 1.0), **flips)
        joint = SegmentCrop((64, 48), CropSettings((0.2, 1.0), **flips))
        for key in range(20):
            assert torch.equal(joint(image, scene(), key)[0], usual(image, key))


def test_masks_are_cropped_as_torchvision_crops_them():
    mask = torch.randint(-1, 9, (90, 120), dtype=torch.int16, generator=torch.manual_seed(0))
    usual = pretrain_transform((64, 48), (0.05, 1.0), vflip=0.5)
    joint = SegmentCrop((64, 48), CropSettings((0.05, 1.0), vflip=0.5))
    image = picture_of(mask)
    seen = set()
    for key in range(40):
        crop = usual.draw(90, 120, key)
        # torchvision resizes no int16, and float32 holds the values.
        expected = F.resized_crop(
            mask[None].float(), *crop.box, size=[64, 48], interpolation=v2.InterpolationMode.NEAREST_EXACT
        )
        expected = F.horizontal_flip(expected) if crop.flip_x else expected
        expected = F.vertical_flip(expected) if crop.flip_y else expected
        seen.add((crop.flip_x, crop.flip_y))
        assert torch.equal(joint(image, mask, key)[1].float(), expected[0])
    assert len(seen) == 4


def test_a_whole_image_that_just_fits():
    mask = scene(90, 120)
    image = torch.randint(1, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.manual_seed(0))
    settings = CropSettings(hflip=0.0)
    crop, classes = SegmentCrop((60, 60), settings, scale_jitter=(1.0, 1.0))(image, mask, 5)
    inside = (classes != IGNORED).any(1)
    assert inside.sum() == 45 and (classes != IGNORED).sum() == 45 * 60
    expected = F.resize(image, [45, 60], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(crop[:, inside], expected)
    small = F.resize(mask[None].float(), [45, 60], interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]
    assert torch.equal(classes[inside].float(), small)
    assert not crop[:, ~inside].any()


def test_factors_and_places_are_drawn():
    mask = torch.zeros(60, 80, dtype=torch.int16)
    image = torch.full((3, 60, 80), 99, dtype=torch.uint8)
    transform = SegmentCrop((64, 64), CropSettings(), scale_jitter=(0.5, 2.0))
    widths = []
    firsts = set()
    for key in range(300):
        crop, classes = transform(image, mask, key)
        assert torch.equal(crop[0] != 0, classes != IGNORED)
        widths.append(int((classes != IGNORED).any(0).sum()))
        firsts.add(int((classes != IGNORED).any(1).float().argmax()))
    assert min(widths) >= 32 and max(widths) == 64
    # Two thirds of the factors are at least 1, and fill the width.
    assert 0.58 < np.mean([width == 64 for width in widths]) < 0.75
    assert len(firsts) > 15
    assert torch.equal(transform(image, mask, 7)[1], transform(image, mask, 7)[1])


def test_scale_jitter_of_impossible_ranges():
    for bounds in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="`scale_jitter`"):
            SegmentCrop((8, 8), CropSettings(), scale_jitter=bounds)


def test_colours_change_with_the_key_and_masks_do_not():
    mask = scene()
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.manual_seed(0))
    plain = SegmentCrop((32, 32), CropSettings())
    photo = pickle.loads(pickle.dumps(SegmentCrop((32, 32), CropSettings(), photo=True)))
    grey = 0
    same = 0
    for key in map(lambda k: sample_seed(3, 0, k), range(200)):
        before = torch.get_rng_state()
        crop, classes = photo(image, mask, key)
        assert torch.equal(torch.get_rng_state(), before)
        base, base_classes = plain(image, mask, key)
        assert torch.equal(classes, base_classes)
        assert torch.equal(crop, photo(image, mask, key)[0])
        grey += bool((crop[0] == crop[1]).all() and (crop[1] == crop[2]).all())
        same += torch.equal(crop, base)
    # Chance 0.2; and unchanged with 0.2 * 0.8 * 0.5.
    assert 22 <= grey <= 60 and 5 <= same <= 30


def test_colours_of_other_images_are_refused(tmp_path):
    transform = SegmentCrop((8, 8), CropSettings(), photo=True)
    image = picture_of(scene(), 5)
    with pytest.raises(ValueError, match=r"`photo` changes .* these have 5 channels of uint8"):
        transform(image, scene(), 1)
    with pytest.raises(ValueError, match="these have 3 channels of uint16"):
        transform(picture_of(scene(), 3, torch.uint16), scene(), 1)
    pairs = build_pairs(written(tmp_path), "train")
    deep = ReadSettings(depth=torch.uint16)
    with pytest.raises(ValueError, match="turn `photo` off"):
        SegmentDataset(pairs, transform, settings=MaskSettings(4), read=deep)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_evaluation_keeps_the_mask(dtype):
    mask = scene()
    image = picture_of(mask, 2, dtype)

    def resized(size: list[int]) -> torch.Tensor:
        values = image.float() if dtype != torch.uint8 else image
        values = F.resize(values, size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        return values if dtype != torch.uint16 else values.round()

    for transform, size in (
        (SegmentEval((50, 70)), [50, 70]),
        (SegmentEval(short_side=64), [64, 85]),
        (SegmentEval(), [90, 120]),
    ):
        result, classes = transform(image, mask, 3)
        assert result.dtype == dtype and list(result.shape) == [2, *size]
        assert torch.equal(classes, mask)
        if size != [90, 120]:
            assert torch.allclose(result.float(), resized(size).float(), atol=1e-3)
    with pytest.raises(ValueError, match="exclude each other"):
        SegmentEval((5, 5), 5)


def test_a_thread_of_an_image_is_not_enlarged():
    image = torch.zeros(3, 1, 100_000, dtype=torch.uint8)
    with pytest.raises(ValueError, match="it would have 256 x 25600000 pixels"):
        SegmentEval(short_side=256)(image, torch.zeros(1, 100_000, dtype=torch.int16), 1)


def test_both_are_resized():
    mask = scene()
    image, classes = SegmentResize((30, 44))(picture_of(mask), mask, 1)
    assert image.shape == (3, 30, 44)
    expected = np.asarray(Image.fromarray(mask.numpy().astype(np.uint8)).resize((44, 30), Image.NEAREST))
    assert np.array_equal(classes, expected)
    assert agreement(image, classes) > 0.95


# --- samples ---


def written(root: Path, count: int = 8, split: str = "train", **sizes: tuple[int, int]) -> DataPath:
    """Pairs of JPEG and PNG, 40 x 56 or of the given sizes (by name of the image or mask, as m3)."""
    for i in range(count):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 256, (*sizes.get(f"i{i}", (40, 56)), 3), np.uint8)
        Image.fromarray(values).save(root / "images" / split / f"{i}.jpg", quality=95)
        mask = scene(*sizes.get(f"m{i}", (40, 56))).numpy().astype(np.uint8)
        mask[0, : i + 1] = 255
        Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    return DataPath(str(root))


def crop_of(size: int = 32, **options) -> SegmentCrop:
    return SegmentCrop((size, size), CropSettings((0.2, 1.0)), **options)


def test_samples(tmp_path):
    source = written(tmp_path)
    dataset = build_segment_dataset(source, "train", crop_of(), seed=3)
    sample = dataset[(2, 5)]
    assert set(sample) == {"image", "mask", "label", "index", "key", "bad"}
    assert sample["image"].shape == (3, 32, 32) and sample["image"].dtype == torch.uint8
    assert sample["mask"].shape == (32, 32) and sample["mask"].dtype == torch.int16
    assert (sample["label"], sample["index"], sample["bad"]) == (0, 5, [])
    assert sample["key"] == sample_seed(3, 2, 5)
    # The same image as without masks.
    plain = ImageDataset(dataset.index.images, pretrain_transform(32, (0.2, 1.0)), seed=3)
    assert torch.equal(sample["image"], plain[(2, 5)]["image"])
    assert torch.equal(dataset[(2, 5)]["mask"], sample["mask"])
    assert not torch.equal(dataset[(3, 5)]["mask"], sample["mask"])
    assert (len(dataset), dataset.path, dataset.exact_resume) == (8, str(tmp_path), True)
    assert (dataset.depth, dataset.name(5), dataset.fault(5)) == (torch.uint8, "5.jpg", "")
    assert dataset.classes == ["0", "1", "2", "3"]
    assert dataset.summary() == (f"{tmp_path}: 8 pairs of image and mask (images and masks); 4 classes")
    images = TrainingImages.of(dataset)
    assert images == TrainingImages(str(tmp_path), 8, dataset.index.digest())
    check_same_everywhere(dataset)


def test_crops_of_jpegs_are_those_of_decoded_images(tmp_path, library):
    source = written(tmp_path, 3)
    for options in ({}, dict(photo=True)):
        fast = build_segment_dataset(source, "train", crop_of(**options))
        slow = build_segment_dataset(source, "train", crop_of(**options))
        slow._from_jpeg = lambda *_: None
        assert fast._from_jpeg(0, fast.decoded_mask(0), 1) is not None
        for i in range(12):
            one, other = fast[(i, i % 3)], slow[(i, i % 3)]
            assert torch.equal(one["mask"], other["mask"])
            difference = (one["image"].int() - other["image"].int()).abs()
            assert difference.float().mean() < 0.5
            # Changes of colours enlarge differences by rounding.
            assert options or difference.max() <= 1


def files(root: Path, split: str = "train") -> tuple[Path, Path]:
    return root / "images" / split, root / "masks" / split


def damage(root: Path) -> dict[int, str]:
    """Damage some of eight pairs; return the reasons."""
    images, masks = files(root)
    (images / "1.jpg").write_bytes(b"no image")
    (masks / "2.png").write_bytes((masks / "2.png").read_bytes()[:50])
    Image.fromarray(np.full((40, 56), 77, np.uint8)).save(masks / "4.png")
    (masks / "7.png").unlink()
    os.mkfifo(masks / "7.png")
    return {
        1: "not a readable image",
        2: "not a readable mask",
        3: "its image has 40 x 56 pixels, and its mask 41 x 56",
        4: "its mask has the value 77: `num_classes` 4 takes 0 to 3",
        7: "not a regular file",
    }


def test_unreadable_pairs_in_evaluation(tmp_path):
    source = written(tmp_path, m3=(41, 56))
    reasons = damage(tmp_path)
    pairs = build_pairs(source, "train")
    dataset = SegmentDataset(
        pairs, SegmentEval((24, 20)), settings=MaskSettings(4), read=RGB, evaluation=True
    )
    for i in range(8):
        sample = dataset[(0, i)]
        assert sample["index"] == i and sample["image"].shape == (3, 24, 20)
        if i not in reasons:
            assert (sample["label"], sample["bad"]) == (0, [])
            continue
        assert reasons[i] in dataset.fault(i)
        assert (sample["label"], sample["bad"]) == (-1, [i])
        assert not sample["image"].any() and (sample["mask"] == IGNORED).all()


def test_unreadable_pairs_in_training(tmp_path):
    source = written(tmp_path, m3=(41, 56))
    reasons = damage(tmp_path)
    pairs = build_pairs(source, "train")
    dataset = SegmentDataset(pairs, crop_of(), settings=MaskSettings(4), read=RGB, seed=1)
    replaced = 0
    for epoch in range(3):
        for i in range(8):
            sample = dataset[(epoch, i)]
            assert set(sample["bad"]) <= set(reasons) and sample["index"] not in reasons
            assert bool(sample["bad"]) == (i in reasons)
            if sample["bad"]:
                # The replacement is the sample that its own number gives.
                own = dataset[(epoch, sample["index"])]
                assert own["key"] == sample["key"] and torch.equal(own["mask"], sample["mask"])
                replaced += 1
    assert replaced == 15


def test_pairs_that_are_all_unreadable(tmp_path):
    source = written(tmp_path, 3)
    dataset = build_segment_dataset(source, "train", crop_of(), masks=MaskSettings(2))
    with pytest.raises(
        ValueError, match=r"20 images in a row .* the value 2, 3: `num_classes` 2 takes 0 to 1"
    ):
        dataset[0]
    with pytest.raises(ValueError, match=r"no mask of .* could be read: 2\.png: its mask has the value 2, 3"):
        survey_masks(dataset)


@pytest.mark.slow
def test_samples_do_not_depend_on_the_workers(tmp_path):
    source = written(tmp_path, m3=(41, 56))
    damage(tmp_path)
    batches = {}
    for workers in (0, 2):
        transform = crop_of(scale_jitter=(0.5, 2.0), photo=True)
        dataset = SegmentDataset(
            build_pairs(source, "train"), transform, settings=MaskSettings(4), read=RGB, seed=5
        )
        order = [(1, i) for i in (5, 2, 7, 1, 0, 3, 4, 6)]
        batches[workers] = list(build_loader(dataset, order, batch_size=4, num_workers=workers))
    for one, other in zip(batches[0], batches[2], strict=True):
        assert one["mask"].shape == (4, 32, 32) and one["mask"].dtype == torch.int16
        for name in ("image", "mask", "index", "key", "label"):
            assert torch.equal(one[name], other[name]), name
        assert one["bad"] == other["bad"]


def test_images_of_16_bits(tmp_path):
    source = written(tmp_path, 4)
    images, masks = files(tmp_path)
    for i in range(4):
        values = 1000 * (1 + np.asarray(Image.open(masks / f"{i}.png")).astype(np.uint16) % 5)
        Image.fromarray(values).save(images / f"{i}.png")
        (images / f"{i}.jpg").unlink()
    dataset = build_segment_dataset(source, "train", crop_of(), read=ReadSettings(in_chans=1))
    assert dataset.depth == torch.uint16
    sample = dataset[(0, 1)]
    assert sample["image"].dtype == torch.uint16 and sample["image"].shape == (1, 32, 32)
    known = sample["mask"] != IGNORED
    classes = (sample["image"][0].float() / 1000 - 1).round()
    assert (classes == sample["mask"])[known].float().mean() > 0.9


def test_images_of_five_bands(tmp_path):
    source = written(tmp_path, 4)
    images, masks = files(tmp_path)
    for i in range(4):
        mask = np.asarray(Image.open(masks / f"{i}.png")).astype(np.float32)
        np.save(images / f"{i}.npy", np.stack([mask * (band + 1) for band in range(5)], 2))
        (images / f"{i}.jpg").unlink()
    dataset = build_segment_dataset(source, "train", SegmentEval(), read=ReadSettings(in_chans=5))
    sample = dataset[2]
    assert sample["image"].shape == (5, 40, 56) and sample["image"].dtype == torch.float32
    known = sample["mask"] != IGNORED
    assert torch.equal(sample["image"][4][known], 5.0 * sample["mask"][known])
    assert torch.equal(dataset.decoded(2), sample["image"])


# --- what masks hold ---


def test_a_survey_of_masks(tmp_path):
    source = written(tmp_path, 6)
    dataset = build_segment_dataset(source, "train", crop_of(), masks=MaskSettings(6))
    found = survey_masks(dataset)
    stacked = np.stack([np.asarray(Image.open(files(tmp_path)[1] / f"{i}.png")) for i in range(6)])
    expected = [(stacked == value).mean() for value in range(6)]
    assert found.shares == pytest.approx(expected)
    assert found.ignored_share == pytest.approx((stacked == 255).mean())
    assert (found.masks, found.never_seen, found.unreadable) == (6, [4, 5], 0)
    listed = ", ".join(f"{i} {100 * share:.1f} %" for i, share in enumerate(expected))
    ignored = 100 * (stacked == 255).mean()
    assert str(found) == f"6 pairs; 6 classes: {listed}; ignored {ignored:.1f} %; never seen: 4, 5"
    some = survey_masks(dataset, 3)
    assert some.masks == 3 and str(some).startswith("6 pairs, 3 masks looked at; 6 classes: 0 ")
    (files(tmp_path)[1] / "3.png").write_bytes(b"")
    damaged = survey_masks(dataset)
    assert damaged.unreadable == 1 and "; 1 unreadable mask (3.png: not a readable mask" in str(damaged)


def test_a_survey_of_many_classes_lists_the_largest(tmp_path):
    source = written(tmp_path, 1)
    values = np.repeat(np.arange(30), np.arange(1, 31))[None].astype(np.uint8)
    Image.fromarray(values).save(files(tmp_path)[1] / "0.png")
    dataset = build_segment_dataset(source, "train", crop_of())
    line = str(survey_masks(dataset))
    assert len(dataset.classes) == 30
    assert "30 classes, the 20 largest: 10 2.4 %, 11 2.6 %" in line and "29 6.5 %; ignored 0.0 %" in line


def test_the_number_of_classes_is_found(tmp_path):
    source = written(tmp_path, 5)
    Image.fromarray(np.full((40, 56), 9, np.uint8)).save(files(tmp_path)[1] / "4.png")
    train = build_segment_dataset(source, "train", crop_of())
    assert train.settings == MaskSettings(num_classes=10) and len(train.classes) == 10
    written(tmp_path, 2, "val")
    val = build_segment_dataset(source, "val", SegmentEval(), masks=train.settings, evaluation=True)
    assert len(val.classes) == 10
    given = build_segment_dataset(source, "train", crop_of(), masks=MaskSettings(ignore_index=9))
    assert given.settings == MaskSettings(256, 9)
    for path in files(tmp_path)[1].iterdir():
        Image.fromarray(np.full((40, 56), 255, np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"have no class, only pixels .* give `num_classes`"):
        build_segment_dataset(source, "train", crop_of())
    with pytest.raises(ValueError, match=r"the number of classes in .* is not known"):
        SegmentDataset(build_pairs(source, "train"), crop_of(), settings=PLAIN, read=RGB)
