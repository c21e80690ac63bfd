"""A compact listing of images: their names, labels and bytes.

A listing is a few numpy arrays (names as one blob of bytes), not a million Python objects. Forked loader
workers share its memory, because numpy has no per-element reference counts that would copy the pages.
"""

import copy
import hashlib
import os
import tarfile
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from util.data.sources.listing_cache import (
    NO_SUFFIX,
    OTHER_SUFFIXES,
    Listing,
    stamp,
    unpack_left_out,
    unpack_names,
)
from util.files.names import counted, printable
from util.files.regular import open_regular, open_safely, regular_size

MAX_OPEN_TARS = 256  # per process; the usual limit on open files is 1024
PROBED_MEMBERS = 32  # whose headers are compared with the listing, if a tar has another time than there
# A sparse file or a wrong entry of a tar may claim any size, and it is allocated before it is read.
MAX_BYTES = 1 << 30
SHOWN_SUFFIXES = 5  # of files that are left out, in a summary
PLURALS = {NO_SUFFIX: "files without suffix", "hidden": "hidden"}

# Gets the number of an image before it is read; data workers report what they do.
_report: Callable[[int], None] | None = None


class NoSplit(ValueError):
    """The data are there, but not this split of them."""


class ChangedTar(ValueError):
    """A tar is not the one that was listed: its images would be others, or unreadable."""


class Classes(Protocol):
    """What has class names: a listing or a data set."""

    @property
    def classes(self) -> list[str]: ...

    @property
    def path(self) -> str: ...

    def use_classes(self, classes: list[str]) -> None: ...

    def without_images(self) -> list[str]: ...


class Listed(Protocol):
    """What samples are made of: listed images, or pairs of images and masks."""

    @property
    def path(self) -> str: ...

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str: ...

    def read(self, i: int) -> bytes: ...

    def check_unchanged(self, i: int) -> None: ...


class ImageIndex:
    """Names, labels and bytes of n images; made by `build_index`.

    Attributes:
        path: what the user named.
        root: the folder that names are relative to.
        kind: the layout, in words.
        tars: paths of the tars that hold the images; empty for files.
        classes: class names, sorted, or in the order of their numbers; empty without labels. Images for
            validation may lack some of them.
        labels: (n,) int32, index into `classes`, or -1 without a label.
        ignored: number of images that are left out because they have no label.
        paired: whether labels lie beside the images of tars, as in WebDataset's form.
        left_out: numbers of files that are left out for other reasons, by kind (see listing.py).
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
        self.paired = len(arrays.get("paired", ())) > 0
        self.ignored = 0
        if labels:
            self.classes = unpack_names(arrays["classes"])
            # Loose images next to class folders have no label. They sort first, so a slice leaves them out.
            self.ignored = int(np.searchsorted(arrays["labels"], 0))
        self.left_out = unpack_left_out(arrays)
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
            # Times and sizes of the tars when they were listed.
            self._stamps = arrays["stamps"]
        self._digest = ""
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
        return self._read(i, writable=False)

    def read_writable(self, i: int) -> memoryview:
        """Read as `read` does, into writable memory: arrays need no copy then."""
        return self._read(i, writable=True)

    def _read(self, i: int, writable: bool) -> Any:
        if _report is not None:
            _report(i)
        if not self.tars:
            return _read_file(os.path.join(self.root, self.name(i)), writable)
        size = int(self._size[i])
        if not 0 <= size <= MAX_BYTES:
            raise OSError(f"{self.name(i)} in {self.tars[self._shard[i]]} {_wrong_size(size)}")
        # pread has no file position, so workers may share a file that was opened before a fork.
        file = self._tar(int(self._shard[i])).fileno()
        data: bytes | memoryview
        if writable:
            data = np.empty(size, np.uint8).data
            found = os.preadv(file, [data], int(self._offset[i]))
        else:
            data = os.pread(file, size, int(self._offset[i]))
            found = len(data)
        if found != size:
            raise OSError(f"{self.tars[self._shard[i]]} ends inside {self.name(i)}")
        return data

    def _tar(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            # A data set can have more shards than a process may open files.
            if len(self._files) >= MAX_OPEN_TARS:
                oldest = next(iter(self._files))
                self._files.pop(oldest).close()
            self._files[shard] = self._open_tar(shard)
        return self._files[shard]

    def _open_tar(self, shard: int) -> BinaryIO:
        """Open a tar. Raises ChangedTar if it has changed since it was listed, which may be days ago."""
        file = open_regular(self.tars[shard], buffering=0)
        try:
            self._check_tar(shard, file.fileno())
        except ChangedTar:
            file.close()
            raise
        return file

    def check_unchanged(self, i: int) -> None:
        """Raise ChangedTar if the tar of image i was removed, replaced or changed since it was listed.

        It is called for an image that cannot be read, as its tar may be the reason. Images in files of their
        own are not checked.
        """
        if not self.tars:
            return
        shard = int(self._shard[i])
        if shard in self._files:
            self._check_tar(shard, self._files[shard].fileno())
            return
        try:
            self._open_tar(shard).close()
        except FileNotFoundError:
            raise ChangedTar(
                f"{printable(self.tars[shard])} was removed since it was listed: restore it"
            ) from None

    def _check_tar(self, shard: int, descriptor: int) -> None:
        """Raise ChangedTar if an open tar is not the one that was listed."""
        now = stamp(descriptor)
        listed = tuple(self._stamps[shard].tolist())
        if now == listed:
            return
        # Many clusters delete old files, and users touch their data to keep it.
        if now[1] == listed[1] and self._has_listed_members(shard, descriptor):
            return
        raise ChangedTar(
            f"{printable(self.tars[shard])} was replaced or changed since it was listed: it had {listed[1]} "
            f"bytes, and has {now[1]}. Restore it, or start again to list it anew"
        )

    def _has_listed_members(self, shard: int, descriptor: int) -> bool:
        """Tell whether images lie where they are listed, from the headers of some that are evenly spread."""
        images = np.flatnonzero(self._shard == shard)
        for i in images[:: max(1, len(images) // PROBED_MEMBERS)]:
            # A header is one block, and the data follow.
            block = os.pread(descriptor, tarfile.BLOCKSIZE, int(self._offset[i]) - tarfile.BLOCKSIZE)
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return False
            if header.size != self._size[i]:
                return False
        return True

    def subset(self, images: np.ndarray) -> "ImageIndex":
        """Return an index of some of the images, which are named by their numbers, in that order."""
        part = copy.copy(self)
        names = [os.fsencode(self.name(i)) for i in images.tolist()]
        part._blob = np.frombuffer(b"".join(names), np.uint8)
        part._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        part._first_start = 0
        part.labels = self.labels[images]
        if self.tars:
            part._shard = self._shard[images]
            part._offset = self._offset[images]
            part._size = self._size[images]
        part._digest = ""
        part._files = {}
        return part

    def use_classes(self, classes: list[str]) -> None:
        """Number the labels as in `classes`, which may have more names than this index; see `classes`.

        Raises KeyError if a class of this index is not among them.
        """
        if classes == self.classes:
            return
        number = {name: i for i, name in enumerate(classes)}
        self.labels = np.array([number[name] for name in self.classes], np.int32)[self.labels]
        self.classes = list(classes)
        self._digest = ""

    def without_images(self) -> list[str]:
        """Return the names of the classes that have no image here."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return [name for name, count in zip(self.classes, counts) if count == 0]

    def digest(self) -> str:
        """Return a hash of names, order and labels; it is the same wherever the same images are listed.

        It is computed once: 1.3 M images have 50 MB of names and numbers.
        """
        if not self._digest:
            # Not of paths or times, which differ between nodes; nor of images that are left out.
            content = hashlib.sha256(self._blob[self._first_start :].data)
            for array in (self._ends - self._first_start, self.labels):
                content.update(np.ascontiguousarray(array).data)
            self._digest = content.hexdigest()
        return self._digest

    def summary(self) -> str:
        """Return one line: path, number of images and classes, layout."""
        classes = "no labels"
        if self.classes:
            classes = counted(len(self.classes), "class", "classes")
        ignored = ""
        if self.ignored:
            ignored = f"; {counted(self.ignored, 'image')} outside class folders ignored"
        return (
            f"{self.path}: {counted(len(self), 'image')}, {classes} ({self.kind}{ignored}{self._left_out()})"
        )

    def _left_out(self) -> str:
        """Say which files are left out: "; left out: 3 .txt, 2 hidden, 1 link"."""
        # A sort keeps the order of equal counts.
        kinds = sorted(self.left_out.items(), key=lambda pair: -pair[1])
        suffixes = [(kind, n) for kind, n in kinds if kind.startswith(".")]
        counts = [f"{n} {printable(kind)}" for kind, n in suffixes[:SHOWN_SUFFIXES]]
        others = sum(n for _, n in suffixes[SHOWN_SUFFIXES:]) + self.left_out[OTHER_SUFFIXES]
        if others:
            counts.append(f"{others} of other suffixes")
        counts += [
            counted(n, printable(kind), PLURALS.get(kind, ""))
            for kind, n in kinds
            if not kind.startswith(".") and kind != OTHER_SUFFIXES
        ]
        if not counts:
            return ""
        return f"; left out: {', '.join(counts)}"


def report_reads(report: Callable[[int], None]) -> None:
    """Let this process call `report` with the number of each image before it is read."""
    global _report
    _report = report


def _read_file(path: str, writable: bool) -> bytes | memoryview:
    """Return the content of a regular file; see `ImageIndex.read`."""
    descriptor = open_safely(path)
    try:
        left = regular_size(descriptor, path)
        if left > MAX_BYTES:
            raise OSError(f"{path} {_wrong_size(left)}")
        if writable:
            data = np.empty(left, np.uint8).data
            if os.readv(descriptor, [data]) == left:
                return data
            os.lseek(descriptor, 0, os.SEEK_SET)
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
    if writable:
        return memoryview(bytearray().join(parts))
    return b"".join(parts)


def _wrong_size(size: int) -> str:
    return f"claims {size} bytes, and an image may have up to {MAX_BYTES}"


def check_classes(train: Classes, val: Classes) -> None:
    """Give `val` the labels of `train`; it may lack images of some classes.

    Raises ValueError if it has classes that `train` does not have: no output would stand for them.
    """
    if set(val.classes) <= set(train.classes):
        val.use_classes(train.classes)
        return
    only_train = some_names(sorted(set(train.classes) - set(val.classes))) or "none"
    only_val = some_names(sorted(set(val.classes) - set(train.classes))) or "none"
    raise ValueError(
        f"{len(train.classes)} training and {len(val.classes)} validation classes in {train.path} differ; "
        f"only in training: {only_train}; only in validation: {only_val}. Name the class folders as in "
        "training, and remove those that training does not have."
    )


def describe_missing(val: Classes) -> str:
    """Say for which classes nothing can be evaluated; '' if there are images of all."""
    missing = val.without_images()
    if not missing:
        return ""
    seen = len(val.classes) - len(missing)
    verb = "have"
    if seen == 1:
        verb = "has"
    return (
        f"{seen} of {len(val.classes)} classes {verb} validation images: no accuracy for "
        f"{some_names(missing)}"
    )


def some_names(names: list[str], most: int = 5) -> str:
    """Return the first of many names, and how many there are."""
    more = ""
    if len(names) > most:
        more = f", ... ({len(names)} in all)"
    return ", ".join(map(printable, names[:most])) + more
