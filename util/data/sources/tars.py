"""Uncompressed tars: where the bytes of their images lie.

A tar may come from anywhere. tarfile believes what a header says about sizes, so this module bounds what it
reads and checks where it goes.
"""

import errno
import functools
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from util.data.recognition import HEAD, is_image_name, is_of_system, starts_like_image, suffix_of
from util.data.sources.listing_cache import NO_SUFFIX
from util.data.sources.pairs import Label, label_bytes, read_label, split_key
from util.files.names import counted, printable
from util.files.regular import open_regular

COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".lz4", ".zip", ".7z")
# First bytes of gzip, bzip2, xz, zstd and zip.
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK")
BLOCK = 512
# Of one member: its header, and extended ones with long names and attributes.
MAX_HEADER_BYTES = 1 << 20
# Earlier versions of tarfile search a header of digits in quadratic time; a file name has at most 255.
MAX_DIGITS = 256
MAX_GLOBAL_FIELDS = 1000  # a tar has a comment or two for all members; tarfile keeps them
MAX_SHOWN = 40  # characters of a wrong value that an error shows
MAX_EXTENDED = 10  # headers before that of a member; a long name and a long link are two
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
SCANNED = 1 << 20  # bytes that are searched for a further tar at a time

LABEL_SUFFIXES = (".cls", ".json")  # of members with the labels of images

# Name, first byte and size of an image.
Place = tuple[bytes, int, int]


class ListedTar(NamedTuple):
    """The images in a tar.

    Attributes:
        places: of the images.
        labels: of the images, from other members; empty if there are none.
        left_out: how many files are left out, by kind (see listing.py). The members with labels are among
            them, by their suffixes.
    """

    places: list[Place]
    labels: list[Label | None]
    left_out: Counter[str]


def list_tar(path: str) -> ListedTar:
    """List the images in a tar, and the labels beside them; count the other files.

    A regular file without a suffix is an image if its first bytes are those of one.

    Further tars that were appended with `cat` are read as well. Of equal names the last one counts, as
    when a tar is unpacked. Raises ValueError, which names the tar, if it is compressed, damaged, cut off or
    not a regular file.
    """
    images = _Images()
    with _Headers(open_regular(path, buffering=0)) as file:
        try:
            for member in file.members():
                images.add(member, file)
        # Damaged headers raise many types: TarError, ValueError, OverflowError, RecursionError, ...
        except Exception as error:
            raise _unreadable(file, len(images.places), error) from error
    places = images.listed()
    return ListedTar(places, images.labels_of(places), images.left_out)


class _Images:
    """The images among the members of a tar."""

    def __init__(self) -> None:
        self.places: dict[bytes, tuple[int, int]] = {}
        self.links: list[tuple[bytes, bytes]] = []
        self.left_out: Counter[str] = Counter()
        # Once each, as a folder lists them: hidden files, and hidden folders without what they hold.
        self.hidden: set[bytes] = set()
        # By suffix, then key. Equal labels are one object: there are many images of a class.
        self.labels: dict[bytes, dict[bytes, Label]] = {b".cls": {}, b".json": {}}
        self.known: dict[Label, Label] = {}

    def add(self, member: tarfile.TarInfo, file: "_Headers") -> None:
        name = _member_name(member.name)
        if member.isreg() and label_bytes(name) and not _is_hidden(name):
            self.add_label(name, member, file)
        if not _is_image(name) and not self._is_other_image(name, member, file):
            return
        if member.isdir():
            return
        if member.islnk():  # tar stores a further name of a file as a link to the first
            self.links.append((name, _member_name(member.linkname)))
        elif member.issym():
            self.left_out["link"] += 1
        elif member.issparse():
            self.left_out["sparse file"] += 1
        elif not member.isreg():
            self.left_out["special file"] += 1
        else:
            self.left_out["earlier version"] += name in self.places
            self.places[name] = member.offset_data, member.size

    def add_label(self, name: bytes, member: tarfile.TarInfo, file: "_Headers") -> None:
        data = None
        if member.size <= label_bytes(name):
            data = file.content(member)
        label = read_label(name, data)
        key, suffix = split_key(name)
        self.labels[suffix].pop(key, None)
        if label is not None:
            self.labels[suffix][key] = self.known.setdefault(label, label)

    def labels_of(self, places: list[Place]) -> list[Label | None]:
        """Return the labels of images, those of .cls before those of .json; nothing if there are none."""
        labels = self.labels[b".json"] | self.labels[b".cls"]
        if not labels:
            return []
        return [labels.get(split_key(name)[0]) for name, _, _ in places]

    def _is_other_image(self, name: bytes, member: tarfile.TarInfo, file: io.BufferedReader) -> bool:
        """Tell whether a member may be an image though its name does not say so; count it if not."""
        if member.isdir() or is_of_system(name):
            return False
        suffix = suffix_of(name)
        if name.startswith(b"../") or b"\0" in name:
            self.left_out["unsafe name" if is_image_name(name) else suffix or NO_SUFFIX] += 1
            return False
        if _is_hidden(name):
            self.hidden.add(_hidden_part(name))
            self.left_out["hidden"] = len(self.hidden)
            return False
        if suffix:
            self.left_out[suffix] += 1
            return False
        # What is no regular file is counted as that.
        if not member.isreg() or member.issparse():
            return True
        # The block after the header is in memory in most cases.
        if starts_like_image(os.pread(file.fileno(), min(HEAD, member.size), member.offset_data)):
            return True
        self.left_out[NO_SUFFIX] += 1
        return False

    def listed(self) -> list[Place]:
        """Return all images; call it once, after the last `add`."""
        self.left_out["link"] += sum(target not in self.places for _, target in self.links)
        self.places |= {name: self.places[target] for name, target in self.links if target in self.places}
        return [(name, *place) for name, place in self.places.items()]


def _member_name(name: str) -> bytes:
    """Return a member's name without a leading `./`, or `/`, which `tar -P` writes."""
    return os.fsencode(os.path.normpath(name).lstrip("/"))


def _is_hidden(name: bytes) -> bool:
    return name.startswith(b".") or b"/." in name


def _hidden_part(name: bytes) -> bytes:
    """Return a path up to its first hidden part: a/.git of a/.git/x."""
    start = name.find(b"/.") + 1
    if name.startswith(b"."):
        start = 0
    end = name.find(b"/", start)
    if end < 0:
        return name
    return name[:end]


def _is_image(name: bytes) -> bool:
    if _is_hidden(name) or not is_image_name(name) or b"\0" in name:
        return False
    return not _is_system_folder(name.rpartition(b"/")[0])


@functools.lru_cache(maxsize=1 << 12)
def _is_system_folder(folder: bytes) -> bool:
    return is_of_system(folder)


class _Headers(io.BufferedReader):
    """A tar, of which tarfile reads the headers. Reading more than one member can have raises ValueError.

    Attributes:
        size: of the tar in bytes.
        at: the byte where the next member should begin.
        left: bytes that may be read for this member.
    """

    def __init__(self, raw: io.RawIOBase):
        super().__init__(raw)
        self.size = os.fstat(raw.fileno()).st_size
        self.at = 0
        self.left = MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self.left:
            raise ValueError(f"its headers are larger than {MAX_HEADER_BYTES} bytes")
        self.left -= size
        data = super().read(size)
        if size > BLOCK and max(map(len, re.findall(rb"[0-9]+", data)), default=0) > MAX_DIGITS:
            raise ValueError(f"its headers hold a number of more than {MAX_DIGITS} digits")
        return data

    def content(self, member: tarfile.TarInfo) -> bytes:
        """Return the data of a small member; most of them are in the buffer already."""
        self.seek(member.offset_data)
        return super().read(member.size)

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Yield the members of the tar, and of those that follow its end-of-archive mark."""
        start: int | None = 0
        while start is not None:
            self.seek(start)
            self.at = start
            self.left = MAX_HEADER_BYTES
            with tarfile.open(fileobj=self, mode="r:") as tar:
                yield from self._members_of_one(tar)
            start = self._next_tar()

    def _members_of_one(self, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        while (member := tar.next()) is not None:
            # tarfile would keep all members: gigabytes for a large set.
            tar.members.clear()  # type: ignore[attr-defined]
            if len(tar.pax_headers) > MAX_GLOBAL_FIELDS:
                raise ValueError(f"it has more than {MAX_GLOBAL_FIELDS} fields for all members")
            self._check_size(member, tar.offset)
            yield member
            self.at = tar.offset
            self.left = MAX_HEADER_BYTES

    def _check_size(self, member: tarfile.TarInfo, end: int) -> None:
        """Raise ValueError for a member whose content does not lie before `end`, or ends outside the tar."""
        words = member.pax_headers.get("size", "0")
        try:
            int(words)
        except ValueError:
            # tarfile takes it for 0, and what follows for a header.
            raise ValueError(
                f"{printable(member.name)} has a size of {printable(words[:MAX_SHOWN])!r}"
            ) from None
        size = member.size
        if member.issparse():
            # A sparse member has the size of the unpacked file, and other images do not depend on it.
            size = end - member.offset_data
        inside = member.offset < end <= self.size
        # A negative size would lead back to the same header for ever. A size of an attribute for sparse files
        # is no size of what is stored.
        fits = not member.isreg() or 0 <= size <= end - member.offset_data
        if inside and fits:
            return
        last = end if inside and size >= 0 else self.size
        left = last - member.offset_data
        raise ValueError(f"{printable(member.name)} has a size of {size} bytes, and {left} bytes follow")

    def name_at(self) -> str:
        """Return the name in the header of the member at `at`; '' if there is none."""
        at = self.at
        # Extended headers, of other names, come before it.
        for _ in range(MAX_EXTENDED):
            try:
                header = tarfile.TarInfo.frombuf(
                    os.pread(self.fileno(), BLOCK, at), "utf-8", "surrogateescape"
                )
            except tarfile.HeaderError:
                return ""
            if header.type not in EXTENDED:
                return header.name
            at += BLOCK + -(-header.size // BLOCK) * BLOCK
            if not 0 <= at < self.size:
                return ""
        return ""

    def _next_tar(self) -> int | None:
        """Return where a further tar begins after the zeros at `at`; None if nothing follows.

        Raises ValueError if there are no zeros: tarfile takes a damaged header for the end.
        """
        first = os.pread(self.fileno(), BLOCK, self.at)
        if first.strip(b"\0"):
            raise ValueError("neither a header nor the end is there")
        return _next_data(self.name, self.at, self.size)


def _next_data(path: str, at: int, end: int) -> int | None:
    """Return the first byte from `at` on that is not zero; None if there is none."""
    # Its own open file, because seeking would confuse a buffered one.
    with open_regular(path, buffering=0) as file:
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)  # holes can be terabytes
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return None
            zeros_and_more = os.pread(file.fileno(), SCANNED, at)
            data = zeros_and_more.lstrip(b"\0")
            at += len(zeros_and_more) - len(data)
            if data:
                return at
            # The file was cut off meanwhile.
            if not zeros_and_more:
                return None
    return None


def _unreadable(file: _Headers, images: int, error: Exception) -> ValueError:
    """Return the error for a file that tarfile refuses."""
    path = printable(file.name)
    if os.pread(file.fileno(), 6, 0).startswith(COMPRESSED_MAGIC):
        return compressed_error(path)
    reason = str(error) or type(error).__name__
    name = printable(file.name_at())
    # What tarfile raises names no member.
    if name and name not in reason:
        reason = f"{reason}, in the headers of {name}"
    if file.at == 0:
        return ValueError(f"{path} is not a tar, or is damaged or cut off ({reason})")
    return ValueError(
        f"{path} is damaged at byte {file.at}, after {counted(images, 'image')}: {reason}. Copy it again"
    )


def compressed_error(path: str) -> ValueError:
    """Return the error for an archive that would have to be unpacked for every image."""
    return ValueError(
        f"{path} is compressed, so single images cannot be read from it. Unpack it once, for example "
        "with `gunzip <file>.tar.gz` or `unzip`, and give the .tar or the folder."
    )
