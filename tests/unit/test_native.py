"""The native library gives the bits of torchvision's and PIL's decoders for every kind of file."""

import ctypes
import io
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the run of this file by itself

from util.data import formats, native
from util.data.datasets import ImageDataset, build_dataset
from util.data.formats import ReadSettings, decode
from util.data.native import bindings, compiler
from util.data.seeding import seeded
from util.data.sources.layouts import build_index
from util.data.transforms import CropSettings, finetune_transform, pretrain_transform, probe_transform

ROOT = Path(__file__).resolve().parents[2]
# On other processors torch rounds differently.
SAME_BITS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def picture(size=(97, 61), mode="RGB", seed=0):
    """(W, H): smooth colours, hard edges and noise, so that every step of the decoder matters."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    pixels = np.asarray(image).astype(int) + rng.integers(-9, 10, (size[1], size[0], 3))
    pixels[size[1] // 3 : size[1] // 2, size[0] // 4 : size[0] // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **dict(quality=90) | options)
    return file.getvalue()


def boxes(height, width, n=12, seed=1):
    torch.manual_seed(seed)
    crop = v2.RandomResizedCrop(8, scale=(0.05, 1.0), ratio=(0.3, 3.0))
    drawn = [crop.make_params([torch.empty(1, height, width)]) for _ in range(n)]
    return [
        (0, 0, height, width),
        (height - 1, width - 1, 1, 1),
        (0, 0, 1, 1),
        (0, width // 2, height, 1),
        *((d["top"], d["left"], d["height"], d["width"]) for d in drawn),
    ]


def resized(image, box, size):
    return F.resized_crop(image, *box, size=size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def assert_same_pixels(found, expected):
    difference = (found.int() - expected.int()).abs().max()
    assert found.dtype == torch.uint8 and difference <= int(not SAME_BITS), difference


# --- the crop ---


@pytest.mark.parametrize(
    "options",
    [
        dict(subsampling="4:4:4"),
        dict(subsampling="4:2:2"),
        dict(subsampling="4:2:0"),
        dict(quality=100),
        dict(quality=5),
        dict(subsampling="4:2:0", restart_marker_blocks=3),
        dict(subsampling="4:4:4", restart_marker_rows=1),
        dict(optimize=True),
        dict(comment=b"x" * 300, dpi=(72, 72)),
    ],
)
@pytest.mark.parametrize(
    "size, mode", [((97, 61), "RGB"), ((61, 130), "L"), ((16, 16), "RGB"), ((1, 7), "RGB")]
)
def test_crops_equal_torchvisions(library, size, mode, options):
    data = jpeg(picture(size, mode), **options)
    whole = decode(data)
    for part in (data, native.add_restart_markers(data)):
        assert native.jpeg_size(part) == size[::-1] and torch.equal(decode(part), whole)
        for i, box in enumerate(boxes(*size[::-1])):
            out = ((24, 24), (7, 33), (40, 5))[i % 3]
            found = native.crop_jpeg(part, box, out)
            assert_same_pixels(found, resized(whole, box, out))
            assert torch.equal(native.crop_jpeg(part, box, out, native.PORTABLE), found)
            for flags, dims in (
                (native.FLIP_X, [-1]),
                (native.FLIP_Y, [-2]),
                (native.FLIP_X | native.FLIP_Y, [-1, -2]),
            ):
                assert torch.equal(native.crop_jpeg(part, box, out, flags), found.flip(dims))


@pytest.mark.parametrize("size", [(97, 61), (61, 130), (16, 16), (1, 7)])
def test_crops_of_decoded_pixels_have_the_same_bits(library, size):
    data = jpeg(picture(size))
    whole = decode(data)
    for i, box in enumerate(boxes(*size[::-1])):
        out = ((24, 24), (7, 33), (40, 5))[i % 3]
        flags = (0, native.FLIP_X, native.FLIP_Y, native.FLIP_X | native.FLIP_Y)[i % 4]
        found = native.crop_pixels(whole, box, out, flags)
        assert torch.equal(found, native.crop_jpeg(data, box, out, flags))
        assert torch.equal(found, native.crop_pixels(whole.contiguous(), box, out, flags | native.PORTABLE))
    for box in (
        (-1, 0, 1, 1),
        (0, 0, size[1] + 1, 1),
        (0, size[0], 1, 1),
        (0, 0, 0, 1),
        (2**32, 0, 1, 1),
        (0, 0, 2**32 + 1, 1),
        (0, -(2**32), 1, 1),
    ):
        with pytest.raises(ValueError, match=r"the box .* (is impossible|does not lie in an image of)"):
            native.crop_pixels(whole, box, (8, 8))
    strided = torch.stack([whole, whole], dim=-1)[..., 0]
    assert torch.equal(
        native.crop_pixels(strided, (0, 0, *size[::-1]), (8, 8)),
        native.crop_pixels(whole, (0, 0, *size[::-1]), (8, 8)),
    )


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8, dtype=torch.uint8, device="meta"),
        torch.zeros(3, 8, 8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, dtype=torch.uint8),
        torch.zeros(3, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_other_tensors_than_decoded_images_are_refused(library, image):
    with pytest.raises(ValueError, match=r"found .* on (meta|cpu); expected uint8 \(3, H, W\) on the CPU"):
        native.crop_pixels(image, (0, 0, 5, 5), (4, 4))


def test_sizes_that_do_not_fit_into_32_bit_are_refused(library):
    """Python refuses them before it allocates anything. C refuses sizes whose bytes would not fit."""
    data = jpeg(picture((40, 30)))
    whole = decode(data)
    for size in ((2**32 + 8, 8), (8, 2**26 + 1), (0, 8), (8, -1)):
        for crop, source in ((native.crop_pixels, whole), (native.crop_jpeg, data)):
            with pytest.raises(ValueError, match="is impossible: a side has 1 to 67108864 pixels"):
                crop(source, (0, 0, 5, 5), size)
    for crop, source in ((native.crop_pixels, whole), (native.crop_jpeg, data)):
        with pytest.raises(TypeError):
            crop(source, (0.5, 0, 5, 5), (8, 8))
    many = 2**26 + 1
    with pytest.raises(ValueError, match="more than 67108864 pixels"):
        native.crop_pixels(torch.zeros(1, dtype=torch.uint8).expand(3, 1, many), (0, 0, 1, 5), (1, 1))
    planes = torch.zeros(3 * many, dtype=torch.uint8)
    out = torch.zeros(3, 8, 8, dtype=torch.uint8)
    box = (ctypes.c_int32 * 4)(0, 0, 1, 1)
    crop = native.library().native_crop_pixels
    assert crop(planes.data_ptr(), 1, many - 1, box, out.data_ptr(), 8, 8, 0) == 0
    for sides in ((1, many), (many, 1)):
        assert crop(planes.data_ptr(), *sides, box, out.data_ptr(), 8, 8, 0) == 1
    for sides in ((1, many), (many, 1)):
        assert crop(planes.data_ptr(), 1, 1, box, out.data_ptr(), *sides, 0) == 1
        assert native.library().native_crop(data, len(data), box, out.data_ptr(), *sides, 0) == 1


def psnr(a, b):
    return 10 * np.log10(255**2 / max(((a.astype(float) - b) ** 2).mean(), 1e-9))


def sharpness(image):
    x = image.astype(float)
    return ((4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]) ** 2).mean()


def check_against_pil(files, size):
    """PIL crops and resizes the file; every exact path must give the same picture."""
    for k, data in enumerate(files):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        for box in boxes(image.height, image.width, n=4, seed=k)[4:]:
            top, left, height, width = box
            crop = image.crop((left, top, left + width, top + height))
            # Pillow 13 resizes the columns first if that is cheaper, and older versions the rows.
            expected = np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC))
            rows = crop.resize((size[1], height), Image.Resampling.BICUBIC)
            rows_first = np.asarray(rows.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
            for part in (data, native.add_restart_markers(data)):
                found = native.crop_jpeg(part, box, size).permute(1, 2, 0).numpy()
                assert np.abs(found - rows_first).max() <= 2
                assert psnr(found, expected) >= 50
                assert abs(sharpness(found) / sharpness(expected) - 1) <= 0.02


def test_crops_equal_pils(library):
    check_against_pil([jpeg(picture((160, 120), seed=k)) for k in range(4)], (48, 64))


def test_crops_of_photos_equal_pils(library, real_data):
    with tarfile.open(real_data / "photos.tar") as tar:
        files = [tar.extractfile(m).read() for m in tar.getmembers()[::8]]
    check_against_pil(files, (224, 224))


def test_dct_scaling_is_a_switch_and_close(library):
    image = picture((640, 480))
    data = jpeg(image)
    for box in ((0, 0, 480, 640), (13, 21, 401, 533), (100, 301, 128, 128)):
        exact, scaled = (
            native.crop_jpeg(data, box, (32, 48), flags).numpy() for flags in (0, native.DCT_SCALING)
        )
        assert psnr(scaled, exact) > 38 and (exact != scaled).any()
    for box in ((0, 0, 63, 640), (5, 5, 480 - 5, 95)):  # less than twice the result: decoded in full
        exact, scaled = (native.crop_jpeg(data, box, (32, 48), flags) for flags in (0, native.DCT_SCALING))
        assert torch.equal(exact, scaled)


def test_the_transform_passes_its_switch_to_the_library(library):
    data = jpeg(picture((640, 480)))
    outputs = []
    for scaling in (False, True):
        crop = pretrain_transform(16, (0.9, 1.0), dct_scaling=scaling)
        outputs.append(crop.crop_jpeg(data, 0))
    assert not torch.equal(*outputs) and (outputs[0].int() - outputs[1].int()).abs().max() < 40


# --- other files than plain, undamaged JPEGs go to the general decoder, with the same result ---


def odd_files():
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees", which no decoder here does
    files = dict(
        plain=jpeg(image),
        grey=jpeg(image.convert("L")),
        cmyk=jpeg(image.convert("CMYK")),
        progressive=jpeg(image, progressive=True),
        rotated=jpeg(image, exif=exif),
        rgb=jpeg(image, keep_rgb=True),
        trailing=jpeg(image) + b"\0junk",
    )
    for name, picture_, options in (
        ("png", image, {}),
        ("webp", image, dict(lossless=True)),
        ("tiff", image, {}),
        ("gif", image, {}),
        ("png16", Image.fromarray(np.arange(96 * 60, dtype=np.uint16).reshape(60, 96) * 11), {}),
    ):
        file = io.BytesIO()
        picture_.save(file, name.rstrip("16"), **options)
        files[name] = file.getvalue()
    files["truncated"] = files["plain"][:-200]
    files["cut"] = files["plain"][:-2]
    files["empty"] = b""
    return files


def write_odd_files(folder):
    folder.mkdir()
    for name, data in odd_files().items():
        (folder / f"{name}.jpg").write_bytes(data)


@pytest.mark.parametrize(
    "transform",
    [
        pretrain_transform((24, 20), vflip=0.5),
        pretrain_transform((24, 20), vflip=0.5, rot90=0.8),
        probe_transform((24, 20)),
        finetune_transform((24, 20), auto_augment="", crop=CropSettings(vflip=0.5)),
    ],
)
def test_samples_do_not_depend_on_the_library(library, tmp_path, monkeypatch, transform):
    """Every kind of file, damaged ones as well: same crop, flip and pixels, same list of bad images."""
    write_odd_files(tmp_path / "train")
    dataset = build_dataset(tmp_path, "train", transform, labels=False, seed=3)
    items = list(itertools.product(range(4), range(len(dataset))))
    assert dataset.summary().endswith("; JPEGs by the native library")
    state = torch.get_rng_state()
    fast = [dataset[item] for item in items]
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(bindings, "LIBRARY", tmp_path / "absent.so")
    assert "python -m util.data.native build" in dataset.summary() and native.library() is None
    slow = [dataset[item] for item in items]
    bad = {i for sample in slow for i in sample["bad"]}
    assert set(map(dataset.index.name, bad)) == {"truncated.jpg", "cut.jpg", "empty.jpg", "png16.jpg"}
    for a, b in zip(fast, slow, strict=True):
        assert_same_pixels(a.pop("image"), b.pop("image"))
        assert a == b


def test_the_library_crops_plain_jpegs_itself(library):
    crop = pretrain_transform(8)
    direct = {name for name, data in odd_files().items() if crop.crop_jpeg(data) is not None}
    assert direct == {"plain", "grey", "rotated"}


@pytest.mark.parametrize(
    "transform",
    [
        pretrain_transform(24, vflip=0.5),
        probe_transform(24),
        finetune_transform(24, auto_augment="", crop=CropSettings(vflip=0.5)),
    ],
)
def test_a_key_draws_the_same_from_a_file_and_from_its_pixels(library, transform):
    data = jpeg(picture())
    whole = decode(data)
    for key in range(20):
        *box, x, y, _ = transform.draw(61, 97, key)
        expected = native.crop_jpeg(data, box, (24, 24), x * native.FLIP_X | y * native.FLIP_Y)
        assert torch.equal(transform.crop_jpeg(data, key), expected)
        assert torch.equal(transform(whole, key), expected)


def check_finetuning_against_pil(files, size, least):
    """Compare the path without a PIL image with the one through PIL that it replaces.

    `least` is in dB, of all pixels together.
    """
    from timm.data import create_transform

    fast = finetune_transform(size, auto_augment="")
    slow = create_transform(
        size,
        is_training=True,
        use_prefetcher=True,
        auto_augment=None,
        color_jitter=None,
        interpolation="bicubic",
    )
    pairs = []
    for key, data in enumerate(files):
        with seeded(key):
            expected = np.asarray(slow(F.to_pil_image(decode(data))))
        pairs.append((fast.crop_jpeg(data, key).numpy(), expected))
    assert psnr(*(np.stack(side) for side in zip(*pairs))) >= least


def test_fine_tuning_on_photos_equals_pil(library, real_data):
    with tarfile.open(real_data / "photos.tar") as tar:
        photos = [tar.extractfile(m).read() for m in tar.getmembers()[::8]]
    check_finetuning_against_pil(photos, 224, 50)
    with tarfile.open(real_data / "mini_imagenet20" / "val.tar") as tar:
        small = [tar.extractfile(m).read() for m in tar.getmembers()[::40]]
    check_finetuning_against_pil(small, 64, 50)


def test_other_channel_counts_and_transforms_use_the_general_decoder(library, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(picture()))
    grey = ImageDataset(build_index(tmp_path, labels=False), pretrain_transform(16), read=ReadSettings(1))
    assert grey[0]["image"].shape == (1, 16, 16) and "JPEGs" not in grey.summary()
    unchanged = ImageDataset(build_index(tmp_path, labels=False), lambda image: image)
    assert unchanged[0]["image"].shape == (3, 61, 97)


def test_an_image_of_more_pixels_than_allowed(library):
    data = jpeg(picture())  # 61 x 97
    assert pretrain_transform(8).crop_jpeg(data, max_pixels=61 * 97 - 1) is None
    assert pretrain_transform(8).crop_jpeg(data, max_pixels=61 * 97) is not None


def test_impossible_boxes_are_refused(library):
    data = jpeg(picture((40, 30)))
    for box in ((0, 0, 31, 5), (0, 36, 5, 5), (0, 2**26, 5, 5), (2**26, 0, 2**26, 1)):
        assert native.crop_jpeg(data, box, (8, 8)) is None
    for box in ((-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (2**31 - 1, 0, 2**31 - 1, 1), (2**32, 0, 5, 5)):
        with pytest.raises(ValueError, match="is impossible"):
            native.crop_jpeg(data, box, (8, 8))
    assert native.crop_jpeg(data, (0, 0, 30, 40), (8, 8)) is not None


@pytest.mark.slow  # 3000 files in another process
def test_damaged_files_neither_crash_nor_leak_nor_change(library):
    """Bits are flipped and bytes cut at random.

    This happens in another process, whose crash would be seen and whose memory can be measured.
    """
    done = subprocess.run(
        [sys.executable, __file__, str(bindings.LIBRARY)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def fuzz(rounds=3000):
    """Damage small JPEGs, with and without markers; print the growth of memory after the first third.

    A crop of a damaged file must be what the general decoder makes of it. This is checked for files with
    whole headers.
    """
    import resource

    sources = fuzzed_sources()
    rng = np.random.default_rng(0)
    read = 0
    memory = []
    for i in range(rounds):
        whole_header = i % 2 == 1  # then the entropy-coded data are reached
        data = damaged(sources[i % len(sources)], rng, whole_header, shorten=i % 5 == 0)
        native.add_restart_markers(data)
        read += crops_as_the_general_decoder(data, rng, whole_header)
        if i >= rounds // 3:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    growth = memory[-1] - memory[0]
    print(f"{read} of {rounds} damaged files gave a crop; peak memory grew by {growth} KiB")
    return read > 100 and growth < 20_000


def fuzzed_sources():
    sources = [
        jpeg(picture((90, 70))),
        jpeg(picture((90, 70)), restart_marker_blocks=2),
        jpeg(picture((50, 60), "L")),
        jpeg(picture((90, 70)), progressive=True),
    ]
    # The header of the scan itself ends like a file: there is no scan.
    endless = sources[0][: sources[0].rindex(b"\xff\xda") + 12] + b"\xff\xd9"
    assert native.crop_jpeg(endless, (0, 0, 70, 90), (16, 16)) is None
    assert native.add_restart_markers(endless) is None
    shortened = sources[0][:-300] + b"\xff\xd9"
    assert native.add_restart_markers(shortened) is None, "half of it would become grey for good"
    return sources + [native.add_restart_markers(source) for source in sources]


def damaged(source, rng, whole_header, shorten):
    data = bytearray(source)
    first = 0
    if whole_header:
        first = data.rindex(b"\xff\xda") + 12
    for _ in range(rng.integers(1, 6)):
        data[rng.integers(first, len(data))] ^= 1 << rng.integers(8)
    if shorten:
        del data[rng.integers(0, len(data)) : -2]
    return bytes(data)


def crops_as_the_general_decoder(data, rng, compare):
    """Crop a damaged file, with random flags as well.

    Returns whether the crop was compared with that of the general decoder.
    """
    size = native.jpeg_size(data)
    if not size or size[0] * size[1] >= 1 << 22:
        return False
    height, width = size
    box = height // 4, width // 4, height - height // 4, width - width // 4
    native.crop_jpeg(data, box, (16, 16), int(rng.integers(16)))
    crop = native.crop_jpeg(data, box, (16, 16))
    if crop is None or not compare:
        return False
    try:
        whole = decode(data)
    except ValueError:
        return False
    assert_same_pixels(crop, resized(whole, box, (16, 16)))
    return True


# --- building and loading ---


def test_without_a_usable_library_the_general_decoder_is_named(built, tmp_path, monkeypatch):
    for content, message in (
        (None, "faster after `python -m util.data.native build`"),
        (b"junk", "cannot be loaded"),
    ):
        path = tmp_path / f"{message[:4]}.so"
        if content:
            path.write_bytes(content)
        monkeypatch.setattr(bindings, "LIBRARY", path)
        assert native.library() is None and message in native.describe()
        assert native.describe().startswith(f"JPEGs by {formats.jpeg.decoder().name}; ")
        assert pretrain_transform(8).crop_jpeg(jpeg(picture())) is None
    shutil.copy(built, tmp_path / "old.so")
    monkeypatch.setattr(bindings, "LIBRARY", tmp_path / "old.so")
    monkeypatch.setattr(compiler, "source_id", lambda: "of other files")
    assert native.library() is None and "out of date" in native.describe()


def test_build_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no C compiler: .*apt-get install gcc"):
        native.build(tmp_path / "x.so")
    if shutil.which("cc"):
        monkeypatch.setenv("CC", "cc")
        with pytest.raises(ValueError, match="libjpeg-turbo's headers are missing"):
            native.build(tmp_path / "x.so", flags=("-include", "jpeglib.h", "-nostdinc"))
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    bindings.LIBRARY = Path(sys.argv[1])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(int(not fuzz(*map(int, sys.argv[2:]))))
