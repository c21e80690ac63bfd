"""Images that attack: files that are programs, headers that claim more memory than there is, absurd shapes.

All files are made here. `little_memory` turns an allocation that a header asks for into an error.
"""

import contextlib
import io
import os
import resource
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import by_pil, encode, in_mode, picture, write
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import main_finetune
import main_linprobe
import main_pretrain
import main_sere
from util.data import __main__ as commands
from util.data import formats, timm_datasets, transforms
from util.data.datasets import ImageDataset, build_dataset
from util.data.formats import ReadSettings, decode, is_plain_jpeg, open_image
from util.data.loading import cache, memory
from util.data.loading.loader import eval_loader
from util.data.loading.resample import Axis, resample
from util.data.multicrop import MultiCrop, TwoViews
from util.data.pixels import Pixels
from util.data.repacking.conversion import ENCODED, UNREADABLE, convert
from util.data.sources.layouts import build_index
from util.data.timm_datasets import TimmDataset, TimmIterableDataset
from util.data.transforms import eval_transform, finetune_transform, pretrain_transform
from util.flags.parser import parse
from util.train.setup import Setup

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
SIDE = 60_000  # 3.6 billion pixels


@contextlib.contextmanager
def little_memory(megabytes=300):
    """Let this process take so much more memory, and no more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once():
    data = encode(picture(), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    data = data[:-2] + scan * 2000 + data[-2:]
    with pytest.raises(ValueError, match=r"a JPEG of 20\d\d scans, more than 100"):
        decode(data)


# --- programs ---


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program of that name, which leaves a mark when it is run -> the mark's path."""
    mark = tmp_path / "executed"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {mark}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return mark


@pytest.mark.parametrize("kind", ["ours", "timm's", "stream"])
def test_postscript_is_never_executed(tmp_path, ghostscript, kind, monkeypatch):
    """A file that would be is an unreadable image, also where timm's readers call PIL."""
    root = write(tmp_path / "set" / "train", ["a/1.jpg", "a/2.jpg", "a/3.jpg"])
    Path(root, "a/2.jpg").write_bytes(POSTSCRIPT)
    path = {"ours": tmp_path / "set", "timm's": f"torch/image_folder={root}"}.get(kind, "wds/x")
    if kind == "stream":
        monkeypatch.setattr("timm.data.create_dataset", lambda *a, **k: Stream(Path(root)))
    dataset = build_dataset(path, "train", pretrain_transform(16), labels=False)
    samples = [dataset[i] for i in range(3)] if kind != "stream" else list(dataset)
    assert len(samples) == 3 - (kind == "stream")
    assert [sample["bad"] for sample in samples] == {"ours": [[], [1], []]}.get(kind, [[]] * len(samples))
    with pytest.raises(ValueError, match=r"starting with b'%!PS'.*no valid header of JPEG, PNG, GIF"):
        decode(POSTSCRIPT)
    assert convert(POSTSCRIPT) == (POSTSCRIPT, UNREADABLE)
    assert not ghostscript.exists()


class Stream(torch.utils.data.IterableDataset):
    """A reader that opens images as those of timm do, and skips what PIL cannot open."""

    def __init__(self, root):
        self.paths = sorted(root.rglob("*.jpg"))

    def __len__(self):
        return len(self.paths)

    def __iter__(self):
        for path in self.paths:
            with contextlib.suppress(OSError), open(path, "rb") as file:
                yield Image.open(file).convert("RGB"), 0


def test_formats_are_those_of_our_suffixes():
    Image.init()
    suffixes = {suffix for kind in formats.FORMATS if kind.read_by_pil for suffix in kind.suffixes}
    assert {Image.registered_extensions()[suffix] for suffix in suffixes} == set(formats.PIL_FORMATS)
    # A JPEG with several pictures is the JPEG that it begins with.
    file = io.BytesIO()
    picture(1).save(file, "MPO", save_all=True, append_images=[picture(2)])
    assert torch.equal(decode(file.getvalue()), decode(encode(picture(1), "JPEG")))
    assert open_image(file.getvalue()).format == "MPO"


def test_readers_open_images_as_we_do_and_pil_is_left_as_it_was(tmp_path):
    pils = Image.open
    root = write(tmp_path, ["a/0.png", "a/1.png"])
    with timm_datasets.our_pil(max_pixels=900):
        for opened in (Path(root, "a/0.png"), os.fsencode(Path(root, "a/0.png")), io.BytesIO(POSTSCRIPT)):
            with pytest.raises(OSError, match=r"more than `max_pixels` 900|no valid header"):
                Image.open(opened)
    with timm_datasets.our_pil(max_pixels=9000):
        assert Image.open(str(Path(root, "a/0.png"))).size == (40, 36)
    assert Image.open is pils


def test_images_that_timm_cannot_read_are_replaced(tmp_path, caplog):
    write(tmp_path, ["a/0.png", "a/1.png", "a/2.png"])
    Path(tmp_path, "a/1.png").write_bytes(huge()["PNG"])
    data = build_dataset(f"torch/image_folder={tmp_path}", "train", pretrain_transform(16))
    replaced = data[0, 1]
    assert replaced["index"] in (0, 2) and replaced["bad"] == []
    assert "image 1 of torch/image_folder" in caplog.text and "`max_pixels` 100000000" in caplog.text
    evaluated = TimmDataset(data.dataset, pretrain_transform(16), name="x", evaluation=True)[0, 1]
    assert (evaluated["index"], evaluated["label"], evaluated["bad"]) == (1, -1, [1])
    assert not evaluated["image"].any(), "a replacement would count twice in an accuracy"
    none = TimmDataset(data.dataset, pretrain_transform(16), name="x", read=ReadSettings(max_pixels=900))
    with pytest.raises(
        ValueError, match=r"20 images of x in a row could not be read: .*: its 3\d x 4\d pixels"
    ):
        none[0]


# --- headers that claim too much ---


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(b"x" * 99))


def tiff(width, height, content=b"", **tags):
    """A deflated grey TIFF of one strip, or of one tile."""
    fields = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1}
    where = (273, 279)
    if tags:
        fields |= {322: tags["tile"], 323: tags["tile"]}
        where = (324, 325)
    fields |= {where[0]: 8, where[1]: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(fields.items()))
    start = 8 + len(content)
    return b"II*\0" + struct.pack("<I", start) + content + struct.pack("<H", len(fields)) + entries + bytes(4)


def jpeg_of_size(width, height, **options):
    data = bytearray(encode(picture(0, size=(16, 16)), "JPEG", **options))
    marker = b"\xff\xc2" if options.get("progressive") else b"\xff\xc0"
    struct.pack_into(">HH", data, data.index(marker) + 5, height, width)
    return bytes(data)


def npy(shape, content=b"", fortran=False, dtype="|u1"):
    file = io.BytesIO()
    header = dict(descr=dtype, fortran_order=fortran, shape=shape)
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


def bmp(width, height):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def webp(width, height):
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = encode(picture(0, size=(16, 16)), "WEBP")[12:]
    chunk = b"VP8X" + struct.pack("<II", 10, 2) + canvas
    return b"RIFF" + struct.pack("<I", 22 + len(frame)) + b"WEBP" + chunk + frame


def huge():
    """Small files that claim `SIDE` x `SIDE` pixels, or nearly so."""
    gif = b"GIF89a" + struct.pack("<HH", SIDE, SIDE) + b"\xf0\0\0" + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, SIDE, SIDE, 0) + b"\x02\x02\x44\x01\0;"
    disposal = b"!\xf9\x04\x08\0\0\0\0"
    small = b"GIF89a" + struct.pack("<HH", 4, 4) + b"\xf0\0\0" + bytes(6)
    return {
        "GIF": gif + frame,
        "GIF frame": small + disposal + frame,
        "PNG": png(SIDE, SIDE),
        # PIL takes the second header; older versions fill a background when they open an animation.
        "PNG twice": png(
            4,
            4,
            png(SIDE, SIDE)[8:33],
            png_chunk(b"acTL", struct.pack(">II", 2, 0)),
            png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, SIDE, SIDE, 0, 0, 1, 1, 1, 0)),
        ),
        "BMP": bmp(SIDE, SIDE),
        "PPM": b"P6\n60000 60000\n255\n",
        "WEBP": webp(SIDE, SIDE),
        "TIFF": tiff(SIDE, SIDE, zlib.compress(bytes(100))),
        "TIFF tile": tiff(16, 16, zlib.compress(bytes(100)), tile=SIDE),
        "JPEG": jpeg_of_size(SIDE, SIDE),
        "JPEG progressive": jpeg_of_size(SIDE, SIDE, progressive=True),
        "NPY": npy((10**6, 10**6, 3)),
        "NPY fortran": npy((10**12, 1, 3), fortran=True),
    }


@pytest.mark.parametrize("name", huge())
def test_a_header_allocates_nothing_beyond_the_budget(name):
    data = huge()[name]
    decode(encode(picture(), "WEBP"))  # PIL's plugins are loaded
    with little_memory(), pytest.raises(ValueError, match="max_pixels` 100000000"):
        decode(data)
    if name.startswith("JPEG"):
        with little_memory(), pytest.raises(ValueError, match="max_pixels` 100000000"):
            decode(data, ReadSettings(4))  # by PIL


@pytest.mark.parametrize(
    "name, data, message",
    [
        # All numbers of pixels are within the budget: the data must be there, too.
        ("NPY", npy((9000, 9000, 3), b"few"), r"needs 243000000 bytes, and 3 follow"),
        ("NPY", npy((2, -2, 3)), r"found uint8 \(2, -2, 3\)"),
        ("NPY", npy((2, 2, 3), bytes(99), dtype="<c8"), "complex64"),
        ("NPY", b"\x93NUMPY\x03\0" + bytes(20), "version .3, 0."),
        ("text", png(4, 4, png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**28)))), "(?i)too large"),
        ("profile", png(4, 4, png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**28)))), "not a readable"),
        ("TIFF", tiff(16, 16, b"\0" * 9, tile=0), "not a readable"),
    ],
    ids=lambda value: value[:9] if isinstance(value, str) else "",
)
def test_data_that_a_small_header_hides(name, data, message):
    with little_memory(), pytest.raises(ValueError, match=message):
        decode(data)


def tiff_of_fields(fields, content, magic=b"II*\0"):
    """A TIFF of 4 x 4 grey pixels; `fields` are (tag, type, number of values), and all lie in `content`."""
    order = "<" if magic[:2] == b"II" else ">"
    short = {258: 8, 259: 1, 262: 1, 277: 1}
    wanted = {tag: (3, 1, value) for tag, value in short.items()}
    wanted |= {tag: (4, 1, value) for tag, value in {256: 4, 257: 4, 273: 8, 279: 16}.items()}
    wanted |= {tag: (kind, number, 8) for tag, kind, number in fields}
    entries = []
    for tag, (kind, number, value) in sorted(wanted.items()):
        letters = "HHIHxx" if (kind, number) == (3, 1) else "HHII"
        entries.append(struct.pack(order + letters, tag, kind, number, value))
    start = 8 + len(content)
    head = magic + struct.pack(order + "I", start) + content
    return head + struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)


def test_the_small_tiff_is_read():
    content = bytes(range(16))
    for magic in (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0"):
        found = decode(tiff_of_fields([], content, magic), ReadSettings(1))
        assert found.flatten().tolist() == list(content)


@pytest.mark.parametrize("magic", [b"II*\0", b"MM\0*", b"II\0*", b"MM*\0"])
@pytest.mark.parametrize(
    "fields, message",
    [
        # Bits and format, which are bytes here, the colours of a palette, and places of strips.
        ([(258, 1, 16_000_000), (339, 1, 16_000_000)], "its field 258 has 16000000 values"),
        ([(258, 3, 8_000_000)], "its field 258 has 8000000 values"),
        ([(320, 3, 8_000_000)], "its field 320 has 8000000 values"),
        ([(273, 4, 4_000_000), (279, 4, 4_000_000)], "its field 273 has 4000000 values"),
        # Texts, bytes and fractions of users that share bytes.
        ([(50_000 + n, 2 + 5 * (n % 2), 16_000_000) for n in range(50)], "its fields have 8000000.. bytes"),
        ([(50_000 + n, 5, 2_000_000) for n in range(50)], "its fields have 8000000.. bytes"),
        ([(10_000 + n, 4, 1) for n in range(5000)], "a directory of 5008 fields, more than 4096"),
    ],
    ids=["bits and format", "bits", "colours", "strips", "shared", "shared fractions", "many"],
)
def test_long_fields_of_a_tiff_are_refused_before_they_are_unpacked(fields, message, magic):
    data = tiff_of_fields(fields, bytes(16_000_000), magic)
    for read in (ReadSettings(1), ReadSettings(5)):
        with little_memory(60), pytest.raises(ValueError, match=message):
            decode(data, read)
    with little_memory(60), pytest.raises(ValueError, match=message):
        formats.describe(data)


@pytest.mark.parametrize(
    "length, message",
    [(5000, r"Cannot parse header: .*a\.\.\.$"), (12_000, r"Header info length .* To allow")],
)
def test_the_reason_of_an_error_is_one_short_line(length, message):
    """NumPy repeats a header that it cannot parse, and advises in several lines."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': '" + b"a" * length + b"': 1}\n"
    data = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(60)
    for read in (decode, formats.describe):
        with pytest.raises(ValueError, match=f"^not a readable image .*: {message}") as error:
            read(data)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_jpeg_whose_header_libjpeg_reads_differently():
    """A marker without a length, which a reader of lengths takes for a segment that hides the true frame."""
    true = jpeg_of_size(SIDE, SIDE)
    length = int.from_bytes(true[2:4])
    small = jpeg_of_size(16, 16)
    frame = small[small.index(b"\xff\xc0") : small.index(b"\xff\xc4")]
    data = b"\xff\xd8\xff\xd0" + true[2:] + bytes(length - len(true[2:])) + frame
    assert not is_plain_jpeg(data)
    with little_memory(), pytest.raises(ValueError, match="max_pixels"):
        decode(data)


CASES = [
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "P", dict(transparency=bytes(range(256)))),
    ("WEBP", "RGB", dict(lossless=True)),
    ("BMP", "RGB", {}),
    ("TIFF", "RGB", dict(compression="tiff_deflate")),
    ("GIF", "P", {}),
    ("PPM", "RGB", {}),
]


@pytest.mark.parametrize("format, mode, options", CASES)
def test_the_budget_is_exact_and_pillows_limit_does_not_count(format, mode, options, monkeypatch):
    data = encode(in_mode(mode), format, **options)  # 40 x 48
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for channels in (1, 3, 4):
            with pytest.raises(ValueError, match=r"than `max_pixels` 1919$"):
                decode(data, ReadSettings(channels, max_pixels=1919))
            assert decode(data, ReadSettings(channels, max_pixels=1920)).shape == (channels, 40, 48)
    assert Image.MAX_IMAGE_PIXELS == 1920  # raised, not removed


def test_the_budget_of_arrays():
    array = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    for data in (npy((4, 5, 3), array.tobytes()), npy((4, 5, 3), array.tobytes(order="F"), fortran=True)):
        decoded = decode(data, ReadSettings(max_pixels=20))
        assert (decoded.numpy() == array.transpose(2, 0, 1)).all() and decoded.is_contiguous()
        decoded += 1  # a copy, which may be changed
        with pytest.raises(ValueError, match="4 x 5 pixels are more than `max_pixels` 19"):
            decode(data, ReadSettings(max_pixels=19))


@pytest.mark.parametrize("format, mode, options", CASES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_large_images_are_converted_in_strips(format, mode, options, channels, monkeypatch):
    """The bits and the layout in memory are those of small images."""
    data = encode(in_mode(mode), format, **options)
    whole = decode(data, ReadSettings(channels))
    monkeypatch.setattr(formats.pil, "STRIP_PIXELS", 48 * 7)
    found = decode(data, ReadSettings(channels))
    assert torch.equal(found, whole) and found.stride() == whole.stride()
    expected = np.asarray(by_pil(data, mode, channels)).reshape(40, 48, channels)
    assert (found.numpy() == expected.transpose(2, 0, 1)).all()


def test_repacking_has_the_budget():
    data = encode(picture(1, size=(48, 40)), "PNG")
    assert convert(data, max_pixels=1919) == (data, UNREADABLE)
    # Nothing is allocated for what is claimed.
    for data in (npy((10**6, 10**6, 3)), npy((10**6, 10**6), dtype="<u2"), npy((10**12, 1, 3), fortran=True)):
        assert convert(data) == (data, UNREADABLE)


def test_repacking_shrinks_what_pillow_would_refuse(library, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert convert(encode(picture(1), "PNG"), long_side=24, max_pixels=1920)[1] == ENCODED


def test_the_native_library_has_the_budget(library, tmp_path):
    write(tmp_path, ["a/0.jpg"])
    index = build_index(tmp_path, labels=False)
    pixels = 40 * 36
    for budget, fault in ((pixels, ""), (pixels - 1, "36 x 40 pixels are more than `max_pixels` 1439")):
        dataset = ImageDataset(
            index, pretrain_transform(8), read=ReadSettings(max_pixels=budget), evaluation=True
        )
        assert "native" in dataset.summary()
        assert dataset.fault(0).endswith(fault) and dataset[0]["bad"] == [0] * bool(fault)


@pytest.mark.parametrize("cache_data", ["none", "memory", "device"])
def test_every_way_to_load_has_the_budget(tmp_path, cache_data):
    write(tmp_path, ["a/0.png", "a/1.png", "b/2.png"])  # 36 x 40, 37 x 41, 38 x 42
    dataset = ImageDataset(
        build_index(tmp_path), eval_transform(8), evaluation=True, read=ReadSettings(max_pixels=37 * 41)
    )
    loader = eval_loader(dataset, batch_size=3, num_workers=0, pin_memory=False)
    batch = next(iter(cache.cached(loader, cache_data, torch.device("cpu"))))
    assert batch["bad"] == [2] and batch["label"].tolist() == [0, 0, -1]


@pytest.mark.parametrize("main", [main_pretrain, main_finetune, main_linprobe, main_sere])
def test_every_main_has_the_flag(main, tmp_path):
    write(tmp_path, [f"{split}/{c}/{i}.png" for split in ("train", "val") for c in "ab" for i in range(2)])
    parser = main.get_args_parser()
    assert parse(parser, []).max_pixels == 100_000_000
    words = f"--data_path {tmp_path} --batch_size 2 --num_workers 0 --max_pixels 1234 --device cpu"
    args = parse(parser, words.split())
    if main is main_linprobe:
        args.cached = args.knn = False
    setup = Setup(torch.device("cpu"), "fp32", (16, 16), Pixels((0.5,) * 3, (0.5,) * 3))
    made = main.build_data(args, setup, *[(2, 2)] * (main is main_sere), {})[:2]
    sets = [getattr(part, "dataset", part) for part in made]
    assert [dataset.read.max_pixels for dataset in sets] == [1234, 1234]


# --- absurd shapes ---


def shape_of(height, width, channels=3):
    return torch.from_numpy(
        np.random.default_rng(height).integers(0, 256, (channels, height, width), dtype=np.uint8)
    )


def plainly(transform, image):
    """The centre crop of the whole resized image."""
    window = transform.window(*image.shape[-2:])
    full = [window.full_height, window.full_width]
    resized = F.resize(image, full, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(resized, transform.size)


@pytest.mark.parametrize("height, width", [(1, 65_000), (65_000, 1), (3, 65_000), (65_000, 2)])
def test_long_images_are_evaluated_with_little_memory(height, width):
    transform = eval_transform(224)
    with little_memory():
        found = transform(shape_of(height, width))
    assert found.shape == (3, 224, 224)


LONG_AND_ORDINARY = [(3, 700), (700, 3), (7, 331), (330, 11), (64, 500), (90, 700), (5, 5)]


@pytest.mark.parametrize("size, crop_pct", [(32, None), ((20, 48), 1.0), (48, 0.9), (24, 1.5)])
@pytest.mark.parametrize("height, width", LONG_AND_ORDINARY)
def test_the_shown_part_equals_the_whole(size, crop_pct, height, width):
    transform = eval_transform(size, crop_pct)
    for channels in (1, 3, 5):
        image = shape_of(height, width, channels)
        expected = plainly(transform, image)
        assert torch.equal(transform(image), expected), "ordinary images keep their bits"
        part = transform._shown_part(image, transform.window(height, width))
        found = F.center_crop(part, transform.size)
        difference = (found.int() - expected.int()).abs()
        assert found.shape == expected.shape and difference.max() <= 2 and difference.float().mean() < 0.05


def test_only_images_of_extreme_shape_are_cut_before_they_are_resized(monkeypatch):
    cut = []
    monkeypatch.setattr(
        transforms.CenterCrop,
        "_shown_part",
        lambda self, image, window: cut.append(tuple(image.shape[1:])) or image.new_zeros(3, 224, 224),
    )
    for height, width in ((375, 500), (100, 2000), (8, 4000), (2000, 3000), (1, 65_000), (65_000, 1)):
        eval_transform(224)(torch.zeros(3, height, width, dtype=torch.uint8))
    assert cut == [(1, 65_000), (65_000, 1)]


def test_long_images_on_the_device(monkeypatch):
    """The weights of millions of positions are not all looked at."""
    transform = eval_transform(16)
    looked_at = []
    exact = Axis._exact
    monkeypatch.setattr(Axis, "_exact", lambda self, i, n: looked_at.append(i.numel()) or exact(self, i, n))
    for height, width in ((400, 1), (1, 2000), (50, 30)):
        image = shape_of(height, width)
        window = torch.tensor([transform.window(height, width)])
        found = resample(image[None], torch.tensor([0]), window, (16, 16))[0]
        assert (found.int() - transform(image).int()).abs().max() <= 1
    assert sum(looked_at) < 20_000 < 2000 * 18


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 65_000), (65_000, 1), (3, 50_000)])
def test_every_transform_takes_every_shape_with_little_memory(size):
    image = shape_of(*size)
    several = dict(global_scale=(0.3, 1.0), local_scale=(0.05, 0.3), mask_ratios=[(0.1, 0.3)])
    made = [
        pretrain_transform(32),
        eval_transform(32),
        finetune_transform(32),
        finetune_transform(32, auto_augment=None, color_jitter=0.4),
        TwoViews((32, 32), (0.2, 1.0), 0.5),
        MultiCrop((32, 32), (16, 16), 2, (4, 4), **several),
    ]
    with little_memory():
        for transform in made:
            for key in range(5):
                result = transforms.views(transforms.apply(transform, image, key))["image"]
                assert result.shape[-2:] == (32, 32)


def test_an_image_that_pads_all_others_is_named(tmp_path, monkeypatch):
    write(tmp_path, ["a/0.png", "a/1.png", "b/2.png"])
    Path(tmp_path, "a/1.png").write_bytes(encode(Image.new("RGB", (1, 5000)), "PNG"))
    monkeypatch.setattr(memory, "available_memory", lambda: 1.0e6)
    dataset = ImageDataset(build_index(tmp_path), eval_transform(8), evaluation=True)
    loader = eval_loader(dataset, batch_size=3, num_workers=0, pin_memory=False)
    with pytest.raises(ValueError, match=r"padded to .*would take about 2 MB.*give `cache_data` memory"):
        cache.cached(loader, "device", torch.device("cpu"))


# --- errors in transforms ---


class Picky:
    """A transform that fails for narrow images, or for all of them."""

    def __init__(self, error, always=False):
        self.error = error
        self.always = always

    def __call__(self, image):
        if self.always or image.shape[1] < 20:
            raise self.error
        return image[:, :8, :8]


def narrow_set(tmp_path, transform, **options):
    """Three images, of which the second is narrow."""
    write(tmp_path, ["a/0.png", "a/1.png", "a/2.png"])
    Path(tmp_path, "a/1.png").write_bytes(encode(Image.new("RGB", (30, 10)), "PNG"))
    return ImageDataset(build_index(tmp_path, labels=False), transform, **options)


@pytest.mark.parametrize(
    "error", [ValueError("too narrow"), RuntimeError("sizes"), MemoryError(), ZeroDivisionError("by zero")]
)
def test_an_image_that_a_transform_cannot_take_is_unreadable(tmp_path, error):
    training = narrow_set(tmp_path, Picky(error))
    assert training[0, 1]["bad"] == [1] and training[0, 1]["index"] in (0, 2)
    reason = f"its 10 x 30 pixels cannot be transformed: {str(error) or 'MemoryError'}"
    assert [training.fault(i) for i in range(3)] == ["", reason, ""]


def test_an_image_that_cannot_be_transformed_is_left_out_of_an_evaluation(tmp_path):
    def pick(image):
        if image.shape[1] == 10:
            raise ValueError("too narrow")
        return image[:, :8, :8]

    sample = narrow_set(tmp_path, pick, evaluation=True)[1]
    assert (sample["bad"], sample["label"], sample["index"]) == ([1], -1, 1) and not sample["image"].any()


@pytest.mark.parametrize("evaluation", [True, False])
@pytest.mark.parametrize(
    "error, always",
    [
        (ValueError("a bug"), True),
        (RuntimeError("a bug"), True),
        (TypeError("a bug"), False),
        (KeyError("a bug"), False),
        (AttributeError("a bug"), False),
    ],
)
def test_a_bug_in_a_transform_is_not_taken_for_a_bad_image(tmp_path, error, always, evaluation):
    dataset = narrow_set(tmp_path, Picky(error, always), evaluation=evaluation)
    with pytest.raises(type(error), match="a bug"):
        dataset[1]


def test_a_stream_leaves_out_what_cannot_be_transformed(tmp_path, caplog):
    narrow_set(tmp_path, None)
    for path in tmp_path.rglob("*.png"):
        path.rename(path.with_suffix(".jpg"))
    stream = TimmIterableDataset(Stream(tmp_path), Picky(ValueError("too narrow")), name="s")
    assert len(list(stream)) == 2 and "an image of s is left out: its 10 x 30 pixels" in caplog.text


# --- the command line ---


def test_check_gives_the_reason_of_each_file(tmp_path, capsys):
    write(tmp_path, ["a/0.png", "a/1.png", "a/2.jpg", "a/3.png"], broken=["a/2.jpg"])
    Path(tmp_path, "a/1.png").write_bytes(huge()["PNG"])
    Path(tmp_path, "a/3.png").rename(Path(tmp_path, "a/\x1b[2J\n3.png"))
    argv = ["check", str(tmp_path), "--num_workers", "0", "--max_pixels"]
    assert commands.main([*argv, "2000"]) == 1
    out = capsys.readouterr().out
    assert "unreadable: a/1.png: not a readable image" in out
    assert "its 60000 x 60000 pixels are more than --max_pixels 2000\n" in out
    assert "unreadable: a/2.jpg: not a readable image (4 bytes, starting with b'junk'): it has no" in out
    assert out.endswith("2 of 4 images unreadable\n")
    assert commands.main([*argv, "1000"]) == 1
    out = capsys.readouterr().out
    assert r"unreadable: a/\x1b[2J\n3.png: " in out and "\x1b" not in out


def test_stats_have_the_budget_and_exact_sums(tmp_path, capsys):
    write(tmp_path, ["a/0.png", "a/1.png", "a/2.png"])
    assert commands.main(["stats", str(tmp_path), "--max_pixels", str(37 * 41), "--recipe", ""]) == 0
    out = capsys.readouterr().out
    assert "left out: 1 image, as a/2.png: its 38 x 42 pixels are more than --max_pixels 1517" in out
    # One line, though the sizes differ.
    assert commands.main(["stats", str(tmp_path), "--max_pixels", "1440", "--recipe", ""]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert lines == [
        "left out: 2 images, as a/1.png: its 37 x 41 pixels are more than --max_pixels 1440",
    ]
    images = [decode(Path(tmp_path, f"a/{i}.png").read_bytes()).double().flatten(1) / 255 for i in (0, 1)]
    pixels = torch.cat(images, 1)  # (C, H*W)
    numbers = [float(word) for word in out.splitlines()[-1].split() if word[0] == "0"]
    expected = [*pixels.mean(1).tolist(), *pixels.std(1, correction=0).tolist()]
    assert numbers == pytest.approx(expected, abs=1e-4)
