"""Damage to the bytes of a file. Every change is drawn from the given generator."""

import random
import struct
import zlib
from collections.abc import Callable, Iterator

Change = Callable[[bytearray, random.Random, list[bytes]], bytearray]
# What a size, an offset or a count in a file may claim.
EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 0x10000)
EXTREMES += (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
HEADER = 256  # bytes in which most formats state their sizes
PNG = b"\x89PNG\r\n\x1a\n"


def _place(data: bytearray, draw: random.Random, width: int = 1) -> int:
    """Return an offset, half of the time in the header."""
    last = max(0, len(data) - width)
    if draw.random() < 0.5:
        last = min(last, HEADER)
    return draw.randint(0, last)


def flip_bits(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    for _ in range(draw.choice([1, 1, 1, 2, 4, 16])):
        data[_place(data, draw)] ^= 1 << draw.randrange(8)
    return data


def set_bytes(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    for _ in range(draw.choice([1, 2, 8])):
        data[_place(data, draw)] = draw.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF, draw.randrange(256)])
    return data


def set_sizes(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    """Write an extreme number over two or four bytes, in one of the byte orders."""
    for _ in range(draw.choice([1, 1, 2])):
        code = draw.choice(["<H", ">H", "<I", ">I"])
        width = struct.calcsize(code)
        value = draw.choice(EXTREMES) & (1 << 8 * width) - 1
        at = _place(data, draw, width)
        data[at : at + width] = struct.pack(code, value)
    return data


def insert(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    at = _place(data, draw)
    data[at:at] = draw.randbytes(draw.choice([1, 2, 4, 100]))
    return data


def delete(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    at = _place(data, draw)
    del data[at : at + draw.choice([1, 2, 4, 100])]
    return data


def truncate(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    return data[: draw.randrange(len(data))]


def repeat(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    """Repeat a part, up to a few hundred times."""
    at = _place(data, draw)
    part = data[at : at + draw.choice([1, 8, 64, 1000])]
    data[at:at] = part * draw.choice([1, 2, 16, 300])
    return data


def blank(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    at = _place(data, draw)
    part = data[at : at + draw.choice([4, 64, 512])]
    data[at : at + len(part)] = draw.choice([b"\0", b"\xff"]) * len(part)
    return data


def splice(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    """Join the beginning of this file and the end of another."""
    other = draw.choice(others)
    return data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :]


def noise(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    """Keep the first bytes only."""
    return data[: draw.choice([2, 4, 8, 16, 40])] + draw.randbytes(draw.choice([10, 200, 4000]))


CHANGES: tuple[Change, ...] = (
    flip_bits,
    set_bytes,
    set_sizes,
    insert,
    delete,
    truncate,
    repeat,
    blank,
    splice,
    noise,
)


def changed(data: bytes, draw: random.Random, others: list[bytes]) -> tuple[bytes, str]:
    """Return the file after one to three changes, and their names.

    Half of the PNGs get true checksums again: the decoder would not look behind a wrong one.
    """
    file = bytearray(data)
    names = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        change = draw.choice(CHANGES)
        file = change(file or bytearray(b"\0"), draw, others)
        names.append(change.__name__)
    if file.startswith(PNG) and draw.random() < 0.5:
        file = bytearray(with_checksums(bytes(file)))
        names.append("checksums")
    return bytes(file), " + ".join(names)


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_checksums(data: bytes) -> bytes:
    """Correct the checksums of a PNG, as far as its chunks can be followed."""
    return PNG + b"".join(_chunks(data))


def _chunks(data: bytes) -> Iterator[bytes]:
    at = len(PNG)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        if at + 12 + length > len(data):
            break
        yield chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    yield data[at:]
