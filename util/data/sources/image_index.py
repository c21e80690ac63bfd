"""A compact listing of images: their names, labels and bytes.

A listing is a few numpy arrays (names as one blob of bytes), not a million Python objects. Forked loader
workers share its memory, because numpy has no per-element reference counts that would copy the pages.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from util.data.sources.listing_cache import Listing, unpack_names

MAX_OPEN_TARS = 256  # per process; the usual limit on open files is 1024
# A sparse file or a wrong entry of a tar may claim any size, and it is allocated before it is read.
MAX_BYTES = 1 << 30
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

# Gets the number of an image before it is read; data workers report what they do.
_report: Callable[[int], None] | None = None


class NoSplit(ValueError):
    """The data are there, but not this split of them."""


class ImageIndex:
    """Names, labels and bytes of n images; made by `build_index`.

    Attributes:
        path: what the user named.
        root: the folder that names are relative to.
        kind: the layout, in words.
        tars: paths of the tars that hold the images; empty for files.
        classes: sorted class names; empty without labels.
        labels: (n,) int32, index into `classes`, or -1 without a label.
        ignored: number of images that are left out because they have no label.
    """

    def __init__(
        self,
        path: str,
        root: str,
        kind: str,
        arrays: Listing,
        tars: Sequence[str] = (),
        labels: bool = True,
    ):
        self.path = path
        self.root = root
        self.kind = kind
        self.tars = list(tars)
        self.classes: list[str] = []
        self.ignored = 0
        if labels:
            self.classes = unpack_names(arrays["classes"])
            # Loose images next to class folders have no label. They sort first, so a slice leaves them out.
            self.ignored = int(np.searchsorted(arrays["labels"], 0))
        first = self.ignored
        self.labels = arrays["labels"][first:]
        if not labels:
            self.labels = np.full(len(arrays["labels"]), -1, np.int32)
        self._blob = arrays["names"]
        # Name i ends at _ends[i] of the blob and starts where the one before ends.
        self._ends = arrays["ends"][first:]
        self._first_start = 0
        if first:
            self._first_start = int(arrays["ends"][first - 1])
        if self.tars:
            self._shard = arrays["shard"][first:]
            self._offset = arrays["offset"][first:]
            self._size = arrays["size"][first:]
        # Tar number -> open file; each process opens what it needs.
        self._files: dict[int, BinaryIO] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files cannot be sent to a spawned worker

    def name(self, i: int) -> str:
        """Return the path of image i relative to `root`, or its member name in the tar."""
        start = self._first_start
        if i > 0:
            start = self._ends[i - 1]
        return os.fsdecode(self._blob[start : self._ends[i]].tobytes())

    def read(self, i: int) -> bytes:
        """Return the undecoded bytes of image i.

        Raises OSError if they cannot be read, are more than MAX_BYTES, or are not in a regular file: a pipe
        would be waited for, and a device has no end.
        """
        if _report is not None:
            _report(i)
        if not self.tars:
            return _read_file(os.path.join(self.root, self.name(i)))
        size = int(self._size[i])
        if not 0 <= size <= MAX_BYTES:
            raise OSError(f"{self.name(i)} in {self.tars[self._shard[i]]} {_wrong_size(size)}")
        # pread has no file position, so workers may share a file that was opened before a fork.
        data = os.pread(self._tar(int(self._shard[i])).fileno(), size, int(self._offset[i]))
        if len(data) != size:
            raise OSError(f"{self.tars[self._shard[i]]} ends inside {self.name(i)}")
        return data

    def _tar(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            # A data set can have more shards than a process may open files.
            if len(self._files) >= MAX_OPEN_TARS:
                oldest = next(iter(self._files))
                self._files.pop(oldest).close()
            self._files[shard] = _open_tar(self.tars[shard])
        return self._files[shard]

    def digest(self) -> str:
        """Return a hash of names, order and labels; it is the same wherever the same images are listed."""
        # Not of paths or times, which differ between nodes.
        content = hashlib.sha256(self._blob.data)
        for array in (self._ends, self.labels):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()

    def summary(self) -> str:
        """Return one line: path, number of images and classes, layout."""
        classes = "no labels"
        if self.classes:
            classes = f"{len(self.classes)} classes"
        ignored = ""
        if self.ignored:
            ignored = f"; {self.ignored} images outside class folders are ignored"
        return f"{self.path}: {len(self)} images, {classes} ({self.kind}{ignored})"


def report_reads(report: Callable[[int], None]) -> None:
    """Let this process call `report` with the number of each image before it is read."""
    global _report
    _report = report


def _read_file(path: str) -> bytes:
    """Return the content of a regular file; see `ImageIndex.read`."""
    descriptor = _open_safely(path, os.O_RDONLY)
    try:
        left = _size_of(descriptor, path)
        parts = []
        # A file system may give less at a time. What is appended meanwhile is left out.
        while left:
            part = os.read(descriptor, left)
            if not part:
                raise OSError(f"{path} has become shorter while it was read")
            parts.append(part)
            left -= len(part)
    finally:
        os.close(descriptor)
    return b"".join(parts)


def _size_of(descriptor: int, path: str) -> int:
    """Return the size of an open file. Raises OSError for one that is not regular, or too large."""
    found = os.fstat(descriptor)
    _check_regular(found, path)
    if found.st_size > MAX_BYTES:
        raise OSError(f"{path} {_wrong_size(found.st_size)}")
    return found.st_size


def _check_regular(found: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "a special file")
        raise OSError(f"{path} is {kind}, not a regular file")


def _wrong_size(size: int) -> str:
    return f"claims {size} bytes, and an image may have up to {MAX_BYTES}"


def _open_safely(path: str, flags: int) -> int:
    # Opening a pipe must not wait for its other end, and opening a terminal must not adopt it.
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def _open_tar(path: str) -> BinaryIO:
    """Open a tar, without a buffer. Raises OSError if it is not a regular file."""
    file = open(path, "rb", buffering=0, opener=_open_safely)  # noqa: SIM115 (stays open)
    try:
        _check_regular(os.fstat(file.fileno()), path)
    except OSError:
        file.close()
        raise
    return file


def check_same_classes(train: ImageIndex, val: ImageIndex) -> None:
    """Raise ValueError unless both splits have the same class names.

    Equal labels would otherwise mean different classes.
    """
    if train.classes == val.classes:
        return
    only_train = some_names(sorted(set(train.classes) - set(val.classes))) or "none"
    only_val = some_names(sorted(set(val.classes) - set(train.classes))) or "none"
    raise ValueError(
        f"{len(train.classes)} training and {len(val.classes)} validation classes in {train.path} differ; "
        f"only in training: {only_train}; only in validation: {only_val}. Give both the same class folders."
    )


def some_names(names: list[str], most: int = 5) -> str:
    """Return the first of many names, and how many there are."""
    more = ""
    if len(names) > most:
        more = f", ... ({len(names)} in all)"
    return ", ".join(names[:most]) + more
