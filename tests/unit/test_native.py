"""The native library: the same bits as torchvision and PIL's decoder give, for every kind of file; see test_data.py."""

import contextlib
import ctypes
import io
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
from timm.data import create_transform
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the run of this file by itself

from util.data import native
from util.data.datasets import ImageDataset, build_dataset
from util.data.formats import decode
from util.data.native import bindings, compiler
from util.data.seeding import seeded
from util.data.sources.layouts import build_index
from util.data.transforms import CropSettings, finetune_transform, pretrain_transform

ROOT = Path(__file__).resolve().parents[2]
SAME_BITS = torch.backends.cpu.get_cpu_capability() in (
    "AVX2",
    "AVX512",
)  # elsewhere torch rounds in its own way


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
    assert found.dtype == torch.uint8 and difference <= (0 if SAME_BITS else 1), difference


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
def test_tensors_that_are_no_decoded_image_are_refused(library, image):
    with pytest.raises(ValueError, match=r"found .* on (meta|cpu); expected uint8 \(3, H, W\) on the CPU"):
        native.crop_pixels(image, (0, 0, 5, 5), (4, 4))


def test_sizes_that_do_not_fit_into_32_bit_are_refused(library):
    """Before anything is allocated in Python; in C, those of which sizes in bytes would not fit."""
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
    planes, out = torch.zeros(3 * many, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)
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
    """PIL crops and resizes the file; every path that calls itself exact must look the same."""
    for k, data in enumerate(files):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        for box in boxes(image.height, image.width, n=4, seed=k)[4:]:
            top, left, height, width = box
            crop = image.crop((left, top, left + width, top + height))
            # Pillow 13 resizes the columns first where that is cheaper, older ones the rows: both are PIL's bicubic
            expected = np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC))
            rows_first = np.asarray(
                crop.resize((size[1], height), Image.Resampling.BICUBIC).resize(
                    size[::-1], Image.Resampling.BICUBIC
                )
            ).astype(int)
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


def test_the_transform_hands_its_switch_on(library):
    data, outputs = jpeg(picture((640, 480))), []
    for scaling in (False, True):
        crop = pretrain_transform(16, (0.9, 1.0), dct_scaling=scaling)
        outputs.append(crop.crop_jpeg(data, 0))
    assert not torch.equal(*outputs) and (outputs[0].int() - outputs[1].int()).abs().max() < 40


# --- what is not a plain, undamaged JPEG goes the general way, with the same result ---


def odd_files():
    image, exif = picture(), Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees: nobody here does
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


@pytest.mark.parametrize(
    "transform",
    [
        pretrain_transform((24, 20), vflip=0.5),
        finetune_transform((24, 20), auto_augment="", crop=CropSettings(vflip=0.5)),
    ],
)
def test_samples_do_not_depend_on_the_library(library, tmp_path, monkeypatch, transform):
    """Every kind of file, damaged ones too: same crop, same flip, same pixels, same list of bad images."""
    folder = tmp_path / "train"
    folder.mkdir()
    files = odd_files()
    for name, data in files.items():
        (folder / f"{name}.jpg").write_bytes(data)
    dataset = build_dataset(tmp_path, "train", transform, labels=False, seed=3)
    assert dataset.summary().endswith("; JPEGs by the native library")
    names = [dataset.index.name(i).partition(".")[0] for i in range(len(dataset))]
    state = torch.get_rng_state()
    fast = [dataset[epoch, i] for epoch in range(4) for i in range(len(dataset))]
    assert torch.equal(torch.get_rng_state(), state)
    direct = {name for name, data in files.items() if pretrain_transform(8).crop_jpeg(data) is not None}
    assert direct == {"plain", "grey", "rotated"}
    monkeypatch.setattr(bindings, "LIBRARY", tmp_path / "absent.so")
    assert "python -m util.data.native build" in dataset.summary() and native.library() is None
    slow = [dataset[epoch, i] for epoch in range(4) for i in range(len(dataset))]
    for a, b in zip(fast, slow, strict=True):
        assert {k: v for k, v in a.items() if k != "image"} == {k: v for k, v in b.items() if k != "image"}
        assert_same_pixels(a["image"], b["image"])
    assert {names[i] for sample in slow for i in sample["bad"]} == {"truncated", "cut", "empty"}


@pytest.mark.parametrize(
    "transform",
    [
        pretrain_transform(24, vflip=0.5),
        finetune_transform(24, auto_augment="", crop=CropSettings(vflip=0.5)),
    ],
)
def test_a_key_draws_the_same_from_a_file_and_from_its_pixels(library, transform):
    data = jpeg(picture())
    whole = decode(data)
    for key in range(20):
        *box, x, y = transform.draw(61, 97, key)
        expected = native.crop_jpeg(data, box, (24, 24), x * native.FLIP_X | y * native.FLIP_Y)
        assert torch.equal(transform.crop_jpeg(data, key), expected) and torch.equal(
            transform(whole, key), expected
        )


def check_finetuning_against_pil(files, size, least):
    """Of the path that has no PIL image, against the one through PIL that it replaces; in dB, of all pixels together."""
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


def test_other_channel_counts_and_transforms_decode_in_general(library, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(picture()))
    grey = ImageDataset(build_index(tmp_path, labels=False), pretrain_transform(16), in_chans=1)
    assert grey[0]["image"].shape == (1, 16, 16) and "JPEGs" not in grey.summary()
    kept = ImageDataset(build_index(tmp_path, labels=False), lambda image: image)
    assert kept[0]["image"].shape == (3, 61, 97)


def test_an_image_that_pil_would_call_a_bomb(library, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    assert pretrain_transform(8).crop_jpeg(jpeg(picture())) is None


def test_impossible_boxes_are_refused(library):
    data = jpeg(picture((40, 30)))
    for box in ((0, 0, 31, 5), (0, 36, 5, 5), (0, 2**26, 5, 5), (2**26, 0, 2**26, 1)):
        assert native.crop_jpeg(data, box, (8, 8)) is None
    for box in ((-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (2**31 - 1, 0, 2**31 - 1, 1), (2**32, 0, 5, 5)):
        with pytest.raises(ValueError, match="is impossible"):
            native.crop_jpeg(data, box, (8, 8))
    assert native.crop_jpeg(data, (0, 0, 30, 40), (8, 8)) is not None


def test_damaged_files_neither_crash_nor_leak_nor_change(library):
    """Bits flipped and bytes cut at random, in another process so that a crash is seen, and its memory can be measured."""
    done = subprocess.run(
        [sys.executable, __file__, str(bindings.LIBRARY)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def fuzz(rounds=3000):
    """Damage small JPEGs, with and without markers, and print how the memory grows after the first third.

    What still gives a crop must be what the general decoder makes of it; compared where the headers are whole.
    """
    import resource

    sources = [
        jpeg(picture((90, 70))),
        jpeg(picture((90, 70)), restart_marker_blocks=2),
        jpeg(picture((50, 60), "L")),
        jpeg(picture((90, 70)), progressive=True),
    ]
    sources += [native.add_restart_markers(s) for s in sources]
    # the scan's header itself ends like a file: there is no scan
    endless = sources[0][: sources[0].rindex(b"\xff\xda") + 12] + b"\xff\xd9"
    assert (
        native.crop_jpeg(endless, (0, 0, 70, 90), (16, 16)) is None
        and native.add_restart_markers(endless) is None
    )
    assert native.add_restart_markers(sources[0][:-300] + b"\xff\xd9") is None, (
        "half of it would become grey for good"
    )
    rng, read, memory = np.random.default_rng(0), 0, []
    for i in range(rounds):
        data = bytearray(sources[i % len(sources)])
        # in half of the rounds the headers stay whole, so that the entropy-coded data is reached
        first = 0 if i % 2 else data.rindex(b"\xff\xda") + 12
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(first, len(data))] ^= 1 << rng.integers(8)
        if i % 5 == 0:
            del data[rng.integers(0, len(data)) : -2]
        data = bytes(data)
        native.add_restart_markers(data)
        size = native.jpeg_size(data)
        if size and size[0] * size[1] < 1 << 22:
            box = size[0] // 4, size[1] // 4, size[0] - size[0] // 4, size[1] - size[1] // 4
            native.crop_jpeg(data, box, (16, 16), int(rng.integers(16)))
            crop = native.crop_jpeg(data, box, (16, 16))
            with contextlib.suppress(ValueError):
                if crop is not None and i % 2:
                    assert_same_pixels(crop, resized(decode(data), box, (16, 16)))
                    read += 1
        if i >= rounds // 3:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(f"{read} of {rounds} damaged files gave a crop; peak memory grew by {memory[-1] - memory[0]} KiB")
    return read > 100 and memory[-1] - memory[0] < 20_000


# --- building and loading ---


def test_absent_foreign_and_outdated_libraries_mean_the_slower_path(built, tmp_path, monkeypatch):
    for content, message in (
        (None, "faster after `python -m util.data.native build`"),
        (b"junk", "cannot be loaded"),
    ):
        path = tmp_path / f"{message[:4]}.so"
        if content:
            path.write_bytes(content)
        monkeypatch.setattr(bindings, "LIBRARY", path)
        assert native.library() is None and message in native.describe()
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
    sys.exit(0 if fuzz(*map(int, sys.argv[2:])) else 1)
