"""Damaged and hostile files of the formats that PIL does not read, through `decode` and `describe`.

A file is refused with a ValueError, or gives a tensor of the promised depth and channels. Nothing else may
happen: no crash of a native library, no hang, and no memory beyond the budget of pixels.
"""

import contextlib
import io
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attacks.children import Begin, Limits, Outcome, Started, judge, measured, watched
from attacks.image_files import READ, REFUSED, Picture, array, pixels, saved
from attacks.mutations import PNG, changed, chunk
from util.data.formats import DEPTHS, Facts, ReadSettings, decode, describe

MAX_PIXELS = 1_000_000
# A million pixels of four bands of 8 bytes, some copies of them, and a little more for the libraries.
LIMITS = Limits(cpu=10, wall=40, memory_mb=250)
BATCH = 250
SETTINGS = (
    ReadSettings(1, max_pixels=MAX_PIXELS),
    ReadSettings(3, max_pixels=MAX_PIXELS),
    ReadSettings(4, max_pixels=MAX_PIXELS, transparency="white", exif="apply"),
    ReadSettings(5, max_pixels=MAX_PIXELS),
    ReadSettings(2, channels=(1, 0), max_pixels=MAX_PIXELS),
    ReadSettings(3, channels=(2, 1, 0), bands=5, max_pixels=MAX_PIXELS),
)


def values(kind: str, bands: int, height: int = 37, width: int = 53) -> np.ndarray:
    """Return a ramp with noise, (H, W, bands)."""
    return (pixels(height, width, bands).astype(np.float64) * 120 - 9000 * (kind[1] == "i")).astype(kind)


# --- valid files ---


@lru_cache(maxsize=1)
def valid() -> list[Picture]:
    """Return files of every kind whose libraries are installed."""
    made = []
    for make in (_tiffs, _dicoms, _pictures, _pngs, _archives):
        with contextlib.suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made += list(make())
    return made


def _tiffs() -> Iterator[Picture]:
    import tifffile

    kinds: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "five bands": (values("<u1", 5), {"photometric": "minisblack"}),
        "RGB of 16 bits, LZW": (values("<u2", 3), {"photometric": "rgb", "compression": "lzw"}),
        "RGBA of 16 bits": (values("<u2", 4), {"photometric": "rgb", "extrasamples": [2]}),
        "int16, planar, deflate": (
            np.moveaxis(values("<i2", 5), 2, 0),
            {"planarconfig": "separate", "compression": "zlib", "photometric": "minisblack"},
        ),
        "float32, tiles, Zstandard": (
            values("<f4", 3),
            {"tile": (16, 16), "compression": "zstd", "photometric": "minisblack"},
        ),
        "big-endian, predictor": (
            values("<u2", 5),
            {"byteorder": ">", "compression": "lzw", "predictor": 2, "photometric": "minisblack"},
        ),
        "BigTIFF": (values("<u2", 5), {"bigtiff": True, "photometric": "minisblack", "rowsperstrip": 4}),
        "JPEG 2000": (values("<u2", 5), {"compression": "jpeg2000", "photometric": "minisblack"}),
        "JPEG, planar": (
            np.moveaxis(values("<u1", 5), 2, 0),
            {
                "compression": "jpeg",
                "photometric": "minisblack",
                "planarconfig": "separate",
                "tile": (32, 32),
            },
        ),
        "three pages": (
            values("<u2", 1)[None, ..., 0].repeat(3, 0),
            {"photometric": "minisblack", "metadata": None},
        ),
        "float64": (values("<f8", 1)[..., 0], {"photometric": "minisblack"}),
    }
    for what, (image, options) in kinds.items():
        if image.shape[-1] <= 5:
            options = {"planarconfig": "contig"} | options  # bands, not pages
        file = io.BytesIO()
        tifffile.imwrite(file, image, **options)
        yield Picture(f"TIFF, {what}", ".tif", file.getvalue(), READ)


def _dicoms() -> Iterator[Picture]:
    import pydicom

    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    names = ["MR_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_implicit", "MR_small_jp2klossless"]
    names += [
        "SC_rgb_small_odd",
        "SC_rgb_small_odd_jpeg",
        "SC_rgb_rle_16bit_2frame",
        "SC_rgb_dcmtk_+eb+cy+np",
    ]
    names += ["rtdose", "image_dfl", "SC_jpeg_no_color_transform", "liver_1frame", "CT_small"]
    for name in names:
        path = folder / f"{name}.dcm"
        if path.exists():
            yield Picture(f"DICOM, {name}", ".dcm", path.read_bytes(), READ)


def _pictures() -> Iterator[Picture]:
    rgb = Image.fromarray(pixels())
    deep = Image.fromarray(values("<u2", 1)[..., 0])
    with contextlib.suppress(KeyError, OSError):
        yield Picture("JPEG 2000", ".jp2", saved(rgb, "JPEG2000"), READ)
        yield Picture("JPEG 2000, 16 bits", ".jp2", saved(deep, "JPEG2000"), READ)
        yield Picture("JPEG 2000, tiles", ".jp2", saved(rgb, "JPEG2000", tile_size=(32, 32)), READ)
        codestream = saved(rgb, "JPEG2000", no_jp2=True)
        yield Picture("JPEG 2000, without boxes", ".j2k", codestream, READ)
    with contextlib.suppress(KeyError, OSError):
        yield Picture("AVIF", ".avif", saved(rgb, "AVIF"), READ)
        yield Picture("AVIF, alpha", ".avif", saved(rgb.convert("RGBA"), "AVIF"), READ)
    yield from _heics(rgb)


def _heics(rgb: Image.Image) -> Iterator[Picture]:
    try:
        import pillow_heif
    except ImportError:
        return
    for what, mode in (("HEIC", "RGB"), ("HEIC, alpha", "RGBA"), ("HEIC, grey", "L")):
        file = io.BytesIO()
        pillow_heif.from_pillow(rgb.convert(mode)).save(file)
        yield Picture(what, ".heic", file.getvalue(), READ)
    file = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (53, 37), values("<u2", 3).tobytes()).save(file)
    yield Picture("HEIC, 10 bits", ".heic", file.getvalue(), READ)


def deep_png(image: np.ndarray, *chunks: bytes) -> bytes:
    """Return a PNG of 16 bits of (H, W, bands), with 2, 3 or 4 bands."""
    height, width, bands = image.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    return _png_of(width, height, {2: 4, 3: 2, 4: 6}[bands], zlib.compress(rows), *chunks)


def _png_of(width: int, height: int, colours: int, body: bytes, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return PNG + b"".join(parts)


def _pngs() -> Iterator[Picture]:
    for bands in (2, 3, 4):
        yield Picture(f"PNG, 16 bits, {bands} bands", ".png", deep_png(values("<u2", bands)), READ)
    clear = chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))
    yield Picture("PNG, a clear colour", ".png", deep_png(values("<u2", 3), clear), READ)


def _archives() -> Iterator[Picture]:
    for kind, bands in (("<u2", 5), (">i2", 3), ("<f4", 5), ("<i4", 1), ("<f8", 3)):
        yield Picture(f".npy {kind}", ".npy", array(values(kind, bands)), READ)
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, image=values("<u2", 5), other=values("<u1", 3))
        yield Picture(f".npz, {save.__name__}", ".npz", file.getvalue(), READ)


# --- hostile files ---


@lru_cache(maxsize=1)
def hostile() -> list[Picture]:
    """Return hand-made files: sizes that lie, circles and bombs."""
    files = {}
    for valid_file in valid():
        if "five bands" in valid_file.what or "JPEG" in valid_file.what:
            files |= _lies(valid_file)
    files |= _archive_bombs() | _png_bombs()
    return [Picture(what, suffix, data, REFUSED) for what, (suffix, data) in files.items()]


def _lies(file: Picture) -> dict[str, tuple[str, bytes]]:
    """Return copies of a file with another size in the codestream, or in the first directory."""
    size = struct.pack(">II", 53, 37)
    huge = struct.pack(">II", 60_000, 60_000)
    data = file.data
    found = {}
    at = data.find(b"\xff\x4f\xff\x51")
    if at >= 0 and data[at + 8 : at + 16] == size:
        found[f"{file.what}: a huge codestream"] = file.suffix, data[: at + 8] + huge + data[at + 16 :]
    if data.find(b"ihdr") >= 0:
        at = data.find(b"ihdr") + 4
        found[f"{file.what}: a huge box"] = file.suffix, data[:at] + huge + data[at + 8 :]
    return found


def _archive_bombs() -> dict[str, tuple[str, bytes]]:
    def archive(content: bytes, method: int, name: str = "image.npy") -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as written:
            written.writestr(name, content)
        return file.getvalue()

    huge = array(np.zeros((9000, 9000, 3), np.uint8))
    small = archive(array(np.zeros((9, 9, 3), np.uint8)), zipfile.ZIP_DEFLATED)
    return {
        ".npz, a bomb": (".npz", archive(huge, zipfile.ZIP_DEFLATED)),
        ".npz, a bomb of another kind": (".npz", archive(huge, zipfile.ZIP_BZIP2)),
        ".npz, a bomb of LZMA": (".npz", archive(huge, zipfile.ZIP_LZMA)),
        ".npz, a size that lies": (
            ".npz",
            archive(huge, zipfile.ZIP_DEFLATED).replace(struct.pack("<I", len(huge)), struct.pack("<I", 200)),
        ),
        ".npz, text": (".npz", archive(b"text", zipfile.ZIP_STORED, "a.txt")),
        ".npz, no end": (".npz", small[:-20]),
    }


def _png_bombs() -> dict[str, tuple[str, bytes]]:
    return {
        "PNG, 16 bits, 60000 x 60000": (".png", _png_of(60_000, 60_000, 6, zlib.compress(bytes(999)))),
        "PNG, 16 bits, two headers": (
            ".png",
            _png_of(
                8,
                8,
                6,
                zlib.compress(bytes(999)),
                chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 16, 6, 0, 0, 0)),
            ),
        ),
    }


# --- the attack ---


@lru_cache(maxsize=1)
def given() -> list[Picture]:
    """Return the files that are not drawn."""
    return [*valid(), *hostile()]


def picture(seed: int, number: int) -> Picture:
    """Return input `number`: first the given files, and then damaged ones."""
    if number < len(given()):
        return given()[number]
    draw = random.Random(f"formats {seed} {number}")
    base = draw.choice(valid())
    data, changes = changed(base.data, draw, [other.data for other in valid()])
    return Picture(f"{base.what}: {changes}", base.suffix, data)


def attack(count: int, seed: int, keep: Path | None, only: int | None = None) -> list[Outcome]:
    """Judge that many files."""
    numbers = list(range(max(count, 1)))
    if only is not None:
        numbers = [only]
    # Before the forks: the libraries are imported once.
    for file in valid():
        _read(file.data, SETTINGS[1])
    batches = max(1, round(len(numbers) / BATCH))

    def work(batch: list[int], begin: Begin) -> Iterator[Outcome]:
        for number in batch:
            begin(number, picture(seed, number).what)
            yield _judged(picture(seed, number), number)

    outcomes = judge([numbers[start::batches] for start in range(batches)], work, LIMITS)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for outcome in outcomes:
            if outcome.failures:
                file = picture(seed, outcome.number)
                (keep / f"format-{outcome.number}{file.suffix}").write_bytes(file.data)
    return outcomes


def _judged(file: Picture, number: int) -> Outcome:
    outcome = Outcome(number, file.what)
    for read in SETTINGS:
        try:
            with measured(outcome, LIMITS), watched(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                problem = _read(file.data, read)
        except Started as error:
            outcome.fail("a program", str(error))
            continue
        except BaseException as error:
            outcome.fail(type(error).__name__, f"{read}: {error}")
            continue
        if problem is None:
            outcome.verdict = READ
        elif problem:
            outcome.fail("another tensor", f"{read}: {problem}")
    if file.expected not in ("", outcome.verdict) and not outcome.failures:
        outcome.fail(f"not {file.expected}", outcome.verdict)
    return outcome


def _read(data: bytes, read: ReadSettings) -> str | None:
    """Return what is wrong with the tensor of a file; "" if the file is refused, and None if all is right."""
    facts: Facts | None = None
    with contextlib.suppress(ValueError):
        facts = describe(data, read)
    try:
        image = decode(data, read)
    except ValueError:
        return ""
    if image.ndim != 3 or len(image) != read.in_chans or image.dtype not in DEPTHS:
        return f"{tuple(image.shape)} of {image.dtype}"
    if image.shape[1] * image.shape[2] > read.max_pixels:
        return f"{tuple(image.shape)} is more than the budget"
    if facts is None or facts.depth != image.dtype:
        return f"{image.dtype}, and its header tells {facts}"
    return None
