"""Reads the zip file that torch.save writes, and compares what is read with the checksums that it stores.

torch.load does not look at the CRC-32 of a record, so a damaged file would load as other weights.
"""

import contextlib
import io
import os
import threading
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from util.files.cores import own_cores
from util.files.formats import ZIP

try:
    # Intel's implementation, the extra `fast`, is several times as fast as most builds of zlib.
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

# The part of a record that a thread reads and sums up at once: it fits the cache of a core.
CHUNK = 1 << 19
# Shorter records are read by one thread.
SHARED = 1 << 21
MOST_THREADS = 4
# torch.save does not compress. A file that claims to hold far more than its size asks for memory only.
MOST_EXPANSION = 8
SLACK = 1 << 24
LOCAL_HEADER = 30
# The polynomial of CRC-32, reflected: the highest bit belongs to x^0.
POLYNOMIAL = 0xEDB88320


def most_bytes(path: str) -> int:
    """How many bytes the content of a file can plausibly have."""
    return MOST_EXPANSION * os.path.getsize(path) + SLACK


def is_archive(path: str) -> bool:
    """Whether the file begins as torch.save's files do since PyTorch 1.6."""
    with open(path, "rb") as file:
        return file.read(len(ZIP)) == ZIP


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo that of CRC-32."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ (POLYNOMIAL * (b & 1))
    return product


# Records of a model have few different lengths.
@lru_cache(maxsize=256)
def _zeros(length: int) -> int:
    """x^(8 length): what `length` more bytes multiply a checksum by."""
    power = 1 << 23  # x^8
    product = 1 << 31  # x^0
    while length:
        if length & 1:
            product = _times(product, power)
        power = _times(power, power)
        length >>= 1
    return product


def joined_crc(first: int, second: int, length: int) -> int:
    """The CRC-32 of two byte strings in a row, from theirs and the length of the second one."""
    return _times(_zeros(length), first) ^ second


class Archive(io.RawIOBase):
    """A file for torch.load that sums up each record while it is read. Close it after use.

    Raises ValueError, without the file's name, if the directory of records is damaged.
    """

    def __init__(self, path: str):
        super().__init__()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._size = os.fstat(self._file.fileno()).st_size
        self._position = 0
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._damaged: list[str] = []
        try:
            self._threads = _num_threads()
            self._zip = zipfile.ZipFile(self._file)
            self._records = self._directory()
        except BaseException:
            self.close()
            raise
        # Where a record begins -> the record, as long as nobody has read it.
        self._unread = dict(self._records)

    def _directory(self) -> dict[int, zipfile.ZipInfo]:
        """Where each record's bytes begin -> the record."""
        infos = self._zip.infolist()
        if len({info.filename for info in infos}) < len(infos):
            raise ValueError("two of its records have one name")
        if sum(info.file_size for info in infos) > MOST_EXPANSION * self._size + SLACK:
            raise ValueError("its records claim to be many times as large as the file")
        return {self._start(info): info for info in infos}

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where a record's bytes begin, from the header in front of them."""
        header = bytearray(LOCAL_HEADER)
        self._read_at(memoryview(header), info.header_offset)
        name = bytearray(int.from_bytes(header[26:28], "little"))
        begin = info.header_offset + LOCAL_HEADER
        self._read_at(memoryview(name), begin)
        if header[:4] != ZIP or name != info.orig_filename.encode():
            raise ValueError(f"its record {info.filename!r} is not where the directory says")
        return begin + len(name) + int.from_bytes(header[28:30], "little")

    @property
    def has_checksums(self) -> bool:
        """Whether the writer stored checksums; torch.save can be told not to, and then stores zeros."""
        return any(info.CRC for info in self._records.values())

    def damaged(self) -> str:
        """The name of a record that was read and differs from its checksum; '' if there is none."""
        if not self.has_checksums:
            return ""
        return next(iter(self._damaged), "")

    def check_small_records(self) -> None:
        """Read and check what is not the bytes of a tensor, such as the pickle: torch interprets it."""
        self._check([start for start, info in self._unread.items() if "/data/" not in info.filename])

    def check_rest(self) -> None:
        """Read and check all records that nobody has read."""
        self._check(list(self._unread))

    def _check(self, starts: list[int]) -> None:
        if not self.has_checksums:
            return
        for start in starts:
            info = self._unread.pop(start)
            # zipfile expands compressed records and compares checksums.
            try:
                with self._zip.open(info) as record:
                    while record.read(CHUNK):
                        pass
            except (zipfile.BadZipFile, zlib.error, EOFError):
                self._damaged.append(info.filename)

    def pickled(self) -> bytes:
        """The pickle that says which tensors there are; empty if there is none."""
        for start, info in self._records.items():
            if info.filename.endswith("/data.pkl"):
                return self._content(start, info)
        return b""

    def _content(self, start: int, info: zipfile.ZipInfo) -> bytes:
        if info.compress_type != zipfile.ZIP_STORED:
            return self._zip.read(info)
        # zipfile compares checksums, of which the writer may have stored none.
        content = bytearray(min(info.compress_size, self._size))
        self._read_part(memoryview(content), start)
        return bytes(content)

    # -- what torch calls ------------------------------------------------------------------------------------
    def readable(self) -> bool:
        """Whether the file can be read: always."""
        return True

    def seekable(self) -> bool:
        """Whether the file has positions: always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, and return it."""
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}
        self._position = starts[whence] + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the bytes at the position, and return their number."""
        view = memoryview(buffer).cast("B")
        start = self._position
        done, crc = self._read_shared(view, start)
        self._position += done
        info = self._unread.get(start)
        if info is not None and done == info.compress_size and info.compress_type == zipfile.ZIP_STORED:
            del self._unread[start]
            if crc != info.CRC:
                self._damaged.append(info.filename)
        return done

    def close(self) -> None:
        """Close the file, and end the threads."""
        if self._pool is not None:
            self._pool.shutdown()
        self._file.close()
        super().close()

    # -- reading ---------------------------------------------------------------------------------------------
    def _read_shared(self, view: memoryview, start: int) -> tuple[int, int]:
        """`_read_part`, by several threads if that pays."""
        if len(view) < SHARED or self._threads < 2:
            return self._read_part(view, start)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads - 1)
        size = -(-len(view) // self._threads)
        parts = [(view[i : i + size], start + i) for i in range(size, len(view), size)]
        others = [self._pool.submit(self._read_part, *part) for part in parts]
        done, crc = self._read_part(view[:size], start)
        for other in others:
            more, crc_of_more = other.result()
            done += more
            crc = joined_crc(crc, crc_of_more, more)
        return done, crc

    def _read_part(self, view: memoryview, start: int) -> tuple[int, int]:
        """Fill `view` with the bytes at `start`; the number of bytes and their CRC-32."""
        done = 0
        crc = 0
        while done < len(view):
            chunk = view[done : done + CHUNK]
            count = self._read_at(chunk, start + done)
            if not count:
                break
            # In the same thread, while the bytes are in the cache of its core.
            crc = crc32(chunk[:count], crc)
            done += count
        return done, crc

    def _read_at(self, view: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], start)
        with self._lock:
            self._file.seek(start)
            return self._file.readinto(view) or 0


def _num_threads() -> int:
    """The number of cores that this process may use, at most MOST_THREADS."""
    return min(MOST_THREADS, own_cores())


@contextlib.contextmanager
def opened(path: str) -> Iterator[Archive]:
    """Lend an archive, and close it afterwards. Raises ValueError and zipfile's errors; see `Archive`."""
    archive = Archive(path)
    try:
        yield archive
    finally:
        archive.close()
