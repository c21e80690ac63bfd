"""Pictures to attack with: a valid one of every kind that is read, and hand-made hostile ones."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attacks.mutations import PNG, chunk

# What is expected of a picture; "" leaves it open whether it is read or refused.
READ = "accepted"
REFUSED = "refused"


@dataclass(frozen=True)
class Picture:
    """A file: its bytes, or `make(path)` for what is no regular file, which lies in folders only."""

    what: str
    suffix: str
    data: bytes = b""
    expected: str = ""
    make: Callable[[Path], None] | None = None


def pixels(height: int = 37, width: int = 53, channels: int = 3) -> np.ndarray:
    """Return a ramp with noise, which every codec compresses to some hundred bytes or more."""
    draw = np.random.default_rng(0)
    ramp = np.linspace(0, 200, height * width * channels).reshape(height, width, channels)
    return (ramp + draw.integers(0, 55, ramp.shape)).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


# --- valid files ---


def seeds() -> list[Picture]:
    """Return a file of every kind that data sets consist of."""
    rgb = Image.fromarray(pixels())
    grey = rgb.convert("L")
    deep = Image.fromarray(pixels()[..., 0].astype(np.uint16) * 256)
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation
    exif[0x010E] = "a description"
    files = [
        *_jpegs(rgb, grey, exif),
        *_pngs(rgb, grey, deep),
        *_tiffs(rgb, grey, deep),
        Picture("GIF", ".gif", saved(rgb.quantize(64), "GIF"), READ),
        Picture("GIF, moving", ".gif", _moving(rgb, "GIF"), READ),
        Picture("WebP", ".webp", saved(rgb, "WEBP"), READ),
        Picture(
            "WebP, lossless with alpha", ".webp", saved(rgb.convert("RGBA"), "WEBP", lossless=True), READ
        ),
        Picture("WebP, moving", ".webp", _moving(rgb, "WEBP"), READ),
        Picture("BMP", ".bmp", saved(rgb, "BMP"), READ),
        Picture("BMP, palette", ".bmp", saved(rgb.quantize(16), "BMP"), READ),
        Picture("PPM", ".ppm", saved(rgb, "PPM"), READ),
        Picture("PGM", ".pgm", saved(grey, "PPM"), READ),
        # Most files of the set have 8 bits, and no range serves both.
        Picture("PGM, 16 bits", ".pgm", saved(deep, "PPM"), REFUSED),
        Picture("PPM, text", ".ppm", b"P3 2 2 255 " + b"1 2 3 " * 4, READ),
    ]
    return files + _arrays()


def _jpegs(rgb: Image.Image, grey: Image.Image, exif: Image.Exif) -> list[Picture]:
    files = {
        "JPEG": saved(rgb, "JPEG"),
        "JPEG, 4:4:4": saved(rgb, "JPEG", quality=95, subsampling=0),
        "JPEG, progressive": saved(rgb, "JPEG", progressive=True),
        "JPEG, grey": saved(grey, "JPEG"),
        "JPEG, grey progressive": saved(grey, "JPEG", progressive=True),
        "JPEG, CMYK": saved(rgb.convert("CMYK"), "JPEG"),
        "JPEG, EXIF": saved(rgb, "JPEG", exif=exif, icc_profile=b"x" * 300),
        "JPEG, restarts": saved(rgb, "JPEG", restart_marker_blocks=1, optimize=True),
        "JPEG, larger": saved(Image.fromarray(pixels(150, 201)), "JPEG"),
    }
    return [Picture(what, ".jpg", data, READ) for what, data in files.items()]


def _pngs(rgb: Image.Image, grey: Image.Image, deep: Image.Image) -> list[Picture]:
    files = {
        "PNG": saved(rgb, "PNG"),
        "PNG, alpha": saved(rgb.convert("RGBA"), "PNG"),
        "PNG, palette": saved(rgb.quantize(32), "PNG", transparency=3),
        "PNG, 1 bit": saved(grey.convert("1"), "PNG"),
        "PNG, interlaced": interlaced(pixels()),
        "PNG, text and profile": saved(rgb, "PNG", icc_profile=b"x" * 300, dpi=(72, 72)),
    }
    read = [Picture(what, ".png", data, READ) for what, data in files.items()]
    return [*read, Picture("PNG, 16 bits", ".png", saved(deep, "PNG"), REFUSED)]


def interlaced(image: np.ndarray) -> bytes:
    """Return an RGB image (H, W, 3) as a PNG of Adam7's seven passes, which Pillow does not write."""
    passes = (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    )
    rows = [
        b"\0" + row.tobytes()
        for top, left, down, right in passes
        for row in image[top::down, left::right]
        if row.size
    ]
    height, width = image.shape[:2]
    return _png(width, height, 2, b"".join(rows), interlace=1)


def _png(width: int, height: int, colours: int, rows: bytes, bits: int = 8, interlace: int = 0) -> bytes:
    return _png_of(width, height, colours, zlib.compress(rows), bits, interlace)


def _png_of(width: int, height: int, colours: int, body: bytes, bits: int = 8, interlace: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlace)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _tiffs(rgb: Image.Image, grey: Image.Image, deep: Image.Image) -> list[Picture]:
    files = {
        f"TIFF, {name}": saved(rgb, "TIFF", compression=name)
        for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    }
    files |= {
        "TIFF, fax": saved(grey.convert("1"), "TIFF", compression="group4"),
        "TIFF, CMYK": saved(rgb.convert("CMYK"), "TIFF"),
        "TIFF, large": saved(rgb, "TIFF", big_tiff=True),
    }
    read = [Picture(what, ".tif", data, READ) for what, data in files.items()]
    others = {
        "TIFF, 16 bits": saved(deep, "TIFF", compression="tiff_lzw"),
        "TIFF, float": saved(grey.convert("F"), "TIFF"),
    }
    return [*read, *(Picture(what, ".tiff", data, REFUSED) for what, data in others.items())]


def _moving(image: Image.Image, kind: str) -> bytes:
    frames = [image.rotate(90 * turns) for turns in range(1, 4)]
    return saved(image, kind, save_all=True, append_images=frames)


def _arrays() -> list[Picture]:
    rgb = pixels()
    values = {
        "": rgb,
        "in Fortran's order": np.asfortranarray(rgb),
        "one pixel": rgb[:1, :1],
        "grey": rgb[..., 0],  # three equal channels
    }
    wrong = {
        "four channels": pixels(channels=4),
        "float32": rgb.astype(np.float32),
        "uint16": rgb.astype(">u2"),
        "bool": rgb > 99,
        "objects": np.array([{"a": 1}, print], dtype=object),
        "a record": np.zeros(3, dtype=[("a", "u1"), ("b", "f8")]),
        "without rows": rgb[:0],
        "a number": np.array(7, np.uint8),
        "five axes": rgb[None, None],
    }
    return [
        *(Picture(f".npy {what}", ".npy", array(x), READ) for what, x in values.items()),
        *(Picture(f".npy {what}", ".npy", array(x), REFUSED) for what, x in wrong.items()),
    ]


# --- hostile files ---


def hostile() -> list[Picture]:
    """Return hand-made files that once did, or could do, harm."""
    return [
        *_programs(),
        *_other_formats(),
        *_huge_claims(),
        *_bombs(),
        *_bad_arrays(),
        *_bad_jpegs(),
        *_no_files(),
        Picture("an empty file", ".jpg", b"", REFUSED),
        Picture("one byte", ".png", b"\x89", REFUSED),
        Picture("zeros", ".webp", bytes(100_000), REFUSED),
        Picture("text", ".jpg", b"404 Not Found\n" * 30, REFUSED),
        Picture("a web page", ".jpg", b"<!DOCTYPE html><html><script>1</script></html>", REFUSED),
    ]


def _programs() -> list[Picture]:
    """PostScript in its disguises: whoever renders it runs it."""
    loop = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n"
    loop += b"{} loop\nshowpage\n%%EOF\n"
    shell = loop.replace(b"{} loop", b"(%pipe%touch owned) (w) file closefile")
    # A binary header in front of it: magic, offset and length of the PostScript, then of previews.
    wrapped = b"\xc5\xd0\xd3\xc6" + struct.pack("<6IH", 32, len(loop), 0, 0, 0, 0, 0xFFFF) + b"\0\0" + loop
    tiff = saved(Image.fromarray(pixels()), "TIFF")
    preview = b"\xc5\xd0\xd3\xc6" + struct.pack(
        "<6IH", 32 + len(tiff), len(loop), 0, 0, 32, len(tiff), 0xFFFF
    )
    svg = b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
    svg += b'<svg xmlns="http://www.w3.org/2000/svg"><text>&a;</text></svg>'
    return [
        Picture("PostScript, endless", ".jpg", loop, REFUSED),
        Picture("PostScript, a shell", ".png", shell, REFUSED),
        Picture("PostScript, wrapped", ".tif", wrapped, REFUSED),
        Picture("PostScript with a TIFF preview", ".tif", preview + b"\0\0" + tiff + loop, REFUSED),
        Picture("PostScript after a JPEG's start", ".jpg", b"\xff\xd8" + loop, REFUSED),
        Picture("PostScript in a TIFF's place", ".tiff", b"II*\0" + loop, REFUSED),
        Picture("PDF", ".jpg", b"%PDF-1.7\n1 0 obj\n<< /OpenAction 2 0 R >>\nendobj\n", REFUSED),
        Picture("SVG with an entity", ".png", svg, REFUSED),
        Picture("an executable", ".jpg", Path("/bin/true").read_bytes()[:4000], REFUSED),
        Picture("a shell script", ".jpg", b"#!/bin/sh\ntouch owned\n", REFUSED),
    ]


def _other_formats() -> list[Picture]:
    """Formats that Pillow knows and data sets do not consist of, under names that are read."""
    rgb = Image.fromarray(pixels())
    found = []
    kinds = ("AVIF", "BLP", "DDS", "DIB", "EPS", "GRIB", "ICNS", "ICO", "IM", "JPEG2000", "MPO", "MSP", "PCX")
    kinds += ("PDF", "QOI", "SGI", "SPIDER", "TGA", "XBM")
    for kind in kinds:
        for mode in ("RGB", "P", "L", "1", "F"):
            try:
                found.append(Picture(kind, ".jpg", saved(rgb.convert(mode), kind)))
                break
            # Not every Pillow writes every kind, and not of every mode.
            except (KeyError, OSError, ValueError):
                continue
    magics = {
        "FITS": b"SIMPLE  =                    T".ljust(2880) + bytes(2880),
        "FITS, huge": _fits(100_000),
        "PSD": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 30000, 30000, 8, 3) + bytes(100),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "GRIB": b"GRIB\0\0\0\1" + bytes(100),
        "BUFR": b"BUFR" + bytes(100),
        "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 30000, 30000, 100) + bytes(60),
        "FLI": struct.pack("<IHHHHHH", 128, 0xAF11, 1, 30000, 30000, 8, 0) + bytes(120),
        "XPM": b'/* XPM */\nstatic char *x[] = {\n"99999 99999 1 1",\n"a c #ffffff",\n',
        "QOI, huge": b"qoif" + struct.pack(">IIBB", 60000, 60000, 3, 0) + b"\xfd" * 100,
        "PhotoCD": bytes(2048) + b"PCD_" + bytes(2000),
        "a zip": b"PK\3\4" + bytes(60),
        "gzip": b"\x1f\x8b\x08" + bytes(60),
    }
    return found + [Picture(what, ".png", data) for what, data in magics.items()]


def _fits(side: int) -> bytes:
    cards = [
        b"SIMPLE  = T",
        b"BITPIX  = 8",
        b"NAXIS   = 2",
        b"NAXIS1  = %d" % side,
        b"NAXIS2  = %d" % side,
        b"END",
    ]
    return b"".join(card.ljust(80) for card in cards).ljust(2880)


def _gif(width: int, height: int) -> bytes:
    """Return a GIF of 40 bytes of that screen and frame."""
    size = struct.pack("<HH", width, height)
    frame = b"," + bytes(4) + size + b"\0" + b"\x02\x02\x4c\x01\x00;"
    return b"GIF89a" + size + b"\x80\0\0" + bytes(6) + frame


def _webp(width: int, height: int) -> bytes:
    """Return a moving WebP with a canvas of that size and one frame of one pixel."""
    pixel = saved(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]

    def side(value: int) -> bytes:
        return (value - 1).to_bytes(3, "little")

    def riff(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    frame = bytes(6) + side(1) + side(1) + (100).to_bytes(3, "little") + b"\0" + pixel
    body = riff(b"VP8X", b"\x02\0\0\0" + side(width) + side(height)) + riff(b"ANIM", bytes(6))
    body = b"WEBP" + body + riff(b"ANMF", frame)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(tags: dict[int, tuple[int, int, int]], body: bytes = b"", following: int = 0) -> bytes:
    """Return a TIFF with one directory: tag -> (type, count, value or offset)."""
    entries = b"".join(struct.pack("<HHII", tag, *tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following) + body


def _tiff_of(side: int, compression: int, body: bytes, **more: int) -> bytes:
    tags = {
        256: (4, 1, side),
        257: (4, 1, side),
        258: (3, 1, 8),
        259: (3, 1, compression),
        262: (3, 1, 1),
        273: (4, 1, 8 + 2 + 12 * 9 + 4),
        277: (3, 1, 1),
        278: (4, 1, more.get("rows", side)),
        279: (4, 1, more.get("length", len(body))),
    }
    return _tiff(tags, body, more.get("following", 0))


def _bmp(width: int, height: int, compression: int = 0, bits: int = 24, body: bytes = b"") -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 1, 1, 256, 0)
    palette = bytes(1024)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(body), 0, 0, 54 + 1024) + header + palette + body


def _huge_claims() -> list[Picture]:
    """Small files that claim to be huge pictures, or are."""
    lines = {
        "GIF, 65535 x 65535": (".gif", _gif(65535, 65535)),
        "GIF, 13000 x 13000": (".gif", _gif(13000, 13000)),
        "GIF, a frame larger than the screen": (".gif", _gif(1, 1)[:-15] + _gif(65535, 65535)[-15:]),
        "PNG, 13000 x 13000 of zeros": (".png", _png_of(13000, 13000, 0, zeros(13001 * 13000))),
        "PNG, 2^31 x 2^31": (".png", _png(2**31 - 1, 2**31 - 1, 6, b"", 16)),
        "PNG, 20000 x 20000 palette": (".png", _png(20000, 20000, 3, bytes(100))),
        "PNG, 0 x 0": (".png", _png(0, 0, 2, b"")),
        "WebP, 16383 x 16383": (".webp", _webp(16383, 16383)),
        "WebP, 12500 x 12500": (".webp", _webp(12500, 12500)),
        "BMP, 32000 x 32000": (".bmp", _bmp(32000, 32000)),
        "BMP, -2^31 rows": (".bmp", _bmp(1, -(2**31))),
        "BMP, RLE of 13000 x 13000": (".bmp", _bmp(13000, 13000, 1, 8, b"\xff\0" * 100 + b"\0\1")),
        "TIFF, 60000 x 60000": (".tif", _tiff_of(60000, 5, bytes(100))),
        "TIFF, 13000 x 13000": (".tif", _tiff_of(13000, 32773, b"\x81\0" * (13000 * 102))),
        "PPM, 99999 x 99999": (".ppm", b"P6 99999 99999 255\n" + bytes(100)),
        "PPM, a million digits": (".ppm", b"P6 " + b"9" * 1_000_000),
        "PPM, 12500 x 12500 bits": (".pgm", b"P4 12500 12500\n" + bytes(1563 * 12500)),
        "JPEG, 65500 x 65500": (".jpg", jpeg_of(65500, 65500)),
        "JPEG, 12000 x 12000 progressive": (".jpg", jpeg_of(12000, 12000, progressive=True)),
    }
    refused = [Picture(what, suffix, data, REFUSED) for what, (suffix, data) in lines.items()]
    long = [
        Picture("PNG, 1 x 65000", ".png", _png(1, 65000, 0, bytes(2 * 65000))),
        Picture("PNG, 65000 x 1", ".png", _png(65000, 1, 0, bytes(65001))),
        Picture("PNG, 3 x 2000000", ".png", _png_of(3, 2_000_000, 0, zeros(4 * 2_000_000))),
        Picture(".npy 1 x 2000000", ".npy", array(np.zeros((1, 2_000_000, 3), np.uint8))),
        Picture("JPEG, 1 x 65500", ".jpg", saved(Image.new("RGB", (1, 65500)), "JPEG")),
        Picture("JPEG, 5000 x 5000 without pixels", ".jpg", jpeg_of(5000, 5000)),
    ]
    # Just below the default of `max_pixels`: the most that one picture may cost.
    most = Picture("PNG, 9999 x 10000", ".png", _png_of(9999, 10000, 0, zeros(10000 * 10000)), READ)
    return [*refused, *long, most]


def _bombs() -> list[Picture]:
    """Files that expand, repeat or point to themselves."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    bomb = zeros(3_000_000_000)
    end = chunk(b"IEND", b"")
    rows = chunk(b"IDAT", zlib.compress(bytes(25 * 8)))
    many = b"".join(chunk(b"tEXt", b"a\0" + b"b" * 1000) for _ in range(3000))
    frames = _gif(8, 8)[:-15] + _gif(8, 8)[-15:-1] * 50_000 + b";"
    grey = saved(Image.fromarray(pixels()[..., 0]), "JPEG", progressive=True)
    data = {
        "PNG, a bomb of pixels": (".png", PNG + header + chunk(b"IDAT", bomb) + end),
        "PNG, a bomb of text": (".png", PNG + header + chunk(b"zTXt", b"a\0\0" + bomb) + rows + end),
        "PNG, a bomb of a profile": (".png", PNG + header + chunk(b"iCCP", b"a\0\0" + bomb) + rows + end),
        "PNG, 3000 texts": (".png", PNG + header + many + rows + end),
        "PNG, a chunk of 2 GB": (".png", PNG + header + b"\x7f\xff\xff\xffIDAT" + bytes(100)),
        "PNG, empty chunks": (".png", PNG + header + chunk(b"IDAT", b"") * 50_000 + rows + end),
        "GIF, 50000 frames": (".gif", frames),
        "GIF, endless code": (".gif", _gif(4000, 4000)[:-5] + b"\x02\xff" + b"\x4c" * 255 + b"\0;"),
        "TIFF, a circle of directories": (".tif", _tiff_of(8, 1, bytes(64), following=8)),
        "TIFF, 2^32 strips": (".tif", _tiff({256: (4, 1, 8), 257: (4, 1, 8), 273: (4, 2**32 - 1, 8)})),
        "TIFF, 2^28 descriptions": (".tif", _tiff({256: (4, 1, 8), 257: (4, 1, 8), 270: (2, 2**28, 8)})),
        "TIFF, a strip of 4 GB": (".tif", _tiff_of(8, 5, bytes(64), length=2**32 - 1)),
        "TIFF, no rows in a strip": (".tif", _tiff_of(8, 5, bytes(64), rows=0)),
        "TIFF, a bomb": (".tif", _tiff_of(8, 8, bomb)),
        "JPEG, 5000 scans": (".jpg", more_scans(grey, 5000)),
        "JPEG, a large one of 2000 scans": (".jpg", more_scans(_large_grey(), 2000)),
        "JPEG, 20000 comments": (".jpg", grey[:2] + b"\xff\xfe\0\x04ab" * 20_000 + grey[2:]),
        "PPM, an endless comment": (".ppm", b"P6 #" + b"a" * 300_000),
        "PPM, a maximum of 0": (".ppm", b"P6 2 2 0\n" + bytes(12)),
    }
    return [Picture(what, suffix, content) for what, (suffix, content) in data.items()]


def zeros(count: int) -> bytes:
    """Return a zlib stream of that many zeros, without compressing them all."""
    size = 1_000_000
    packer = zlib.compressobj(9)
    first = packer.compress(bytes(size)) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush the next block does not refer to earlier ones, so it can be repeated.
    block = packer.compress(bytes(size)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, wbits=-15)
    end = rest.compress(bytes(count % size)) + rest.flush()
    checksum = struct.pack(">HH", count % 65521, 1)
    return first + block * (count // size - 1) + end + checksum


def _large_grey() -> bytes:
    return saved(Image.new("L", (4000, 4000), 90), "JPEG", progressive=True)


def more_scans(jpeg: bytes, times: int) -> bytes:
    """Repeat the last scan of a progressive JPEG."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * times + b"\xff\xd9"


def jpeg_of(width: int, height: int, progressive: bool = False) -> bytes:
    """Return a JPEG of 8 x 8 pixels that claims to have another size."""
    data = saved(Image.new("RGB", (8, 8), (200, 100, 50)), "JPEG", progressive=progressive)
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def _bad_arrays() -> list[Picture]:
    def npy(header: bytes, body: bytes = b"", version: bytes = b"\1\0") -> bytes:
        length = struct.pack("<H", len(header))
        if version != b"\1\0":
            length = struct.pack("<I", len(header))
        return b"\x93NUMPY" + version + length + header + body

    def shaped(shape: str, kind: str = "|u1", body: bytes = bytes(300)) -> bytes:
        return npy(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode(), body)

    bomb = b"cos\nsystem\n(S'touch owned'\ntR."
    files = {
        "10^12 pixels": shaped("(1000000, 1000000, 3)"),
        "10^30 pixels": shaped(f"({10**15}, {10**15}, 3)"),
        "a negative shape": shaped("(-1, 10, 3)"),
        "13000 x 13000": shaped("(13000, 13000, 3)"),
        "a deep header": npy(b"(" * 60_000 + b")" * 60),
        "an expression": npy(b"{'descr': '|u1', 'fortran_order': 1, 'shape': (9**9**9, 1, 3)}\n"),
        "a call": npy(b"{'descr': __import__('os').system('touch owned'), 'shape': (1, 1, 3)}\n"),
        "a header of 4 GB": b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(100),
        "version 9": npy(b"{}\n", version=b"\x09\x09"),
        "a pickle": shaped("(1,)", "|O", bomb),
        "strings of 1 GB": shaped("(2, 2, 3)", "<U268435456"),
        "no bytes an element": shaped("(1000000000000, 1, 3)", "|V0"),
        "zeros in the shape": shaped("(0, 1000000000000, 3)"),
        "one number": b"\x93NUMPY\1",
    }
    return [Picture(f".npy, {what}", ".npy", data, REFUSED) for what, data in files.items()]


def _bad_jpegs() -> list[Picture]:
    good = saved(Image.fromarray(pixels()), "JPEG")
    frame = good.index(b"\xff\xc0")

    def framed(at: int, value: bytes) -> bytes:
        return good[: frame + at] + value + good[frame + at + len(value) :]

    files = {
        "no rows": framed(5, b"\0\0"),
        "no columns": framed(7, b"\0\0"),
        "12 bits": framed(4, b"\x0c"),
        "2 components": framed(9, b"\2"),
        "255 components": framed(9, b"\xff"),
        "sampling 4 x 4": framed(11, b"\x44"),
        "sampling 0 x 0": framed(11, b"\0"),
        "sampling 15 x 15": framed(11, b"\xff"),
        "a table that is missing": framed(12, b"\3"),
        "lossless": framed(0, b"\xff\xc3"),
        "arithmetic": framed(0, b"\xff\xc9"),
        "hierarchical": framed(0, b"\xff\xc5"),
        "twice the frame": good[: frame + 19] + good[frame : frame + 19] + good[frame + 19 :],
        "no pixels": good[: good.index(b"\xff\xda")] + b"\xff\xd9",
        "only its start": b"\xff\xd8",
        "a segment of no length": good[:frame] + b"\xff\xe1\0\0" + good[frame:],
        "an EXIF of rubbish": good[:2]
        + b"\xff\xe1\0\x20Exif\0\0MM\0*\xff\xff\xff\xff"
        + b"\xff" * 16
        + good[2:],
        "fill bytes": good[:2] + b"\xff" * 100_000 + good[2:],
    }
    return [Picture(f"JPEG, {what}", ".jpg", data) for what, data in files.items()]


def _no_files() -> list[Picture]:
    """Names that are no regular files."""
    makers: dict[str, Callable[[Path], None]] = {
        "a pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to /dev/tty": lambda path: path.symlink_to("/dev/tty"),
        "a link to nothing": lambda path: path.symlink_to("nothing"),
        "a link to itself": lambda path: path.symlink_to(path.name),
    }
    return [Picture(what, ".jpg", expected=REFUSED, make=make) for what, make in makers.items()]
