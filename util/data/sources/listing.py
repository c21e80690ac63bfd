"""Listings of images as a few numpy arrays, from folders and uncompressed tars.

A listing is a dictionary of arrays:

    names      one blob of bytes
    ends       where each name ends in it
    labels     number of the class, which is the first folder of the name, or -1
    classes    their sorted names, in Unicode's composed form (NFC)
    kinds, left_out    what was left out, and how many of it; see below
    shard, offset, size    of each image, in tars only
    paired, fault    in tars only: one element if the labels lie beside the images, and why they are unusable
    stamped, stamps        the files or folders that were listed, with their times and sizes

A file is an image if its suffix says so. One without a suffix is an image if its first bytes are those of
one: DICOM files and downloads often have none. What else is found is counted by kind:

    .txt       a suffix that no image has, in lower case
    file without suffix    its first bytes are not those of an image
    hidden     a file or folder whose name begins with a dot; what such a folder holds is not counted
    link       a symbolic link in a tar, a hard link there to nothing that is listed, and a link to nothing
    looping link           to a folder above
    special file           a pipe, a socket or a device
    sparse file, unsafe name, earlier version    of tars only
    other      rare suffixes together

Folders are not counted. Nor is what belongs to this project and to operating systems: see `is_of_system`.
"""

import contextlib
import errno
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from util.data.recognition import HEAD, is_image_name, is_of_system, starts_like_image, suffix_of
from util.data.sources.listing_cache import (
    NO_SUFFIX,
    TAR_ARRAYS,
    Listing,
    load_listing,
    pack_left_out,
    pack_names,
    save_listing,
    stamp,
    unpack_names,
)
from util.data.sources.pairs import Label, Pairs, as_pairs
from util.data.sources.tars import LABEL_SUFFIXES, list_tar
from util.files.names import printable
from util.files.regular import open_regular

CACHE_FOLDERS_ABOVE = 20_000  # images; listing a smaller folder is faster than checking a cache of it
# Files without a suffix of one folder that are looked at. If they are all images, or none is, so are the
# others: a look opens a file, which takes a millisecond on some network file systems.
LOOKED_AT = 32
MAX_WAYS = 1000  # by which links may lead to the same folder

# What an entry of a folder is, beside kinds of what is left out.
IMAGE = "image"
FOLDER = "folder"


class _Folder(NamedTuple):
    """A folder that is to be listed.

    Attributes:
        prefix: of its images' names: b"", b"class/", b"class/deeper/".
        above: the folders that hold it, as (device, inode).
    """

    prefix: bytes
    above: frozenset[tuple[int, int]]


class _Tree:
    """The images of a folder, and the folders in it.

    Attributes:
        pending: folders that are to be listed.
        ways: how often each folder was reached.
    """

    def __init__(self, root: str):
        self.root = root
        self.names: list[bytes] = []
        self.folders: list[bytes] = []
        self.stamps: list[tuple[int, int]] = []
        self.left_out: Counter[str] = Counter()
        self.pending = [_Folder(b"", frozenset())]
        self.ways: Counter[tuple[int, int]] = Counter()

    def list_next(self) -> None:
        """List one folder. Raises OSError."""
        prefix, above = self.pending.pop()
        path = self.path(prefix)
        status = os.stat(path)  # before listing: a change during it invalidates the cache
        place = status.st_dev, status.st_ino
        # A link to a folder above, as dataset tools leave them, would lead around until the path is too long.
        if place in above:
            self.left_out["looping link"] += 1
            return
        self.ways[place] += 1
        if self.ways[place] > MAX_WAYS:
            raise ValueError(f"links lead to {self.shown(prefix)} in more than {MAX_WAYS} ways: remove some")
        self.folders.append(prefix.rstrip(b"/") or b".")
        self.stamps.append((status.st_mtime_ns, status.st_size))
        unclear = []
        with os.scandir(path) as entries:
            for entry in entries:
                kind = _kind(entry)
                if kind == IMAGE:
                    self.names.append(prefix + entry.name)
                elif kind == FOLDER:
                    self.pending.append(_Folder(prefix + entry.name + b"/", above | {place}))
                elif kind == NO_SUFFIX:
                    unclear.append(entry.name)
                elif kind:
                    self.left_out[kind] += 1
        images = _images_without_suffix(path, sorted(unclear))
        self.names += [prefix + name for name in images]
        self.left_out[NO_SUFFIX] += len(unclear) - len(images)

    def path(self, prefix: bytes) -> bytes:
        return os.path.join(os.fsencode(self.root), prefix)

    def shown(self, prefix: bytes) -> str:
        return printable(os.fsdecode(self.path(prefix)))


def _kind(entry: os.DirEntry) -> str:
    """Return what an entry of a folder is: IMAGE, FOLDER, or a kind of what is left out; '' for nothing."""
    name = entry.name
    if name.startswith(b"."):
        return "" if is_of_system(name) else "hidden"
    if is_folder(entry):
        return "" if is_of_system(name) else FOLDER
    # Also a link that leads nowhere: as an image it is reported when it is read.
    if is_image_name(name):
        return IMAGE
    if is_of_system(name):
        return ""
    return suffix_of(name) or _kind_without_suffix(entry)


def _kind_without_suffix(entry: os.DirEntry) -> str:
    with contextlib.suppress(OSError):
        if entry.is_file():
            return NO_SUFFIX
    # Of a link that leads to a pipe, too, and of one that leads nowhere.
    if entry.is_symlink():
        return "link"
    return "special file"


def _images_without_suffix(folder: bytes, names: list[bytes]) -> list[bytes]:
    """Return those of a folder's files without a suffix that are images.

    Of many files LOOKED_AT are looked at, evenly spread. If only some of them are images, each file is.
    """
    some = names
    if len(names) > LOOKED_AT:
        some = [names[k * len(names) // LOOKED_AT] for k in range(LOOKED_AT)]
    images = [name for name in some if _starts_like_image(os.path.join(folder, name))]
    if len(some) == len(names) or not images:
        return images
    if len(images) == len(some):
        return names
    return [name for name in names if _starts_like_image(os.path.join(folder, name))]


def _starts_like_image(path: bytes) -> bool:
    # What cannot be opened is left out and counted.
    with contextlib.suppress(OSError), open_regular(os.fsdecode(path), buffering=0) as file:
        return starts_like_image(file.read(HEAD))
    return False


def list_folder(root: str, cache: str) -> Listing:
    """List the images in `root` at any depth, and count what else is there. Hidden folders are not entered.

    The listing of a large folder is saved in the file `cache`. Raises ValueError, which names the
    folder, if a folder cannot be listed.
    """
    tree = _Tree(root)
    while tree.pending:
        prefix = tree.pending[-1].prefix
        try:
            tree.list_next()
        except OSError as error:
            # A folder can vanish while others are listed, or be closed to this user.
            raise ValueError(f"{tree.shown(prefix)} cannot be listed: {error.strerror}") from error
    # Also the folders without images: they count as classes, and are reported as empty.
    arrays = from_names(tree.names, {f.partition(b"/")[0] for f in tree.folders[1:]})
    arrays |= dict(
        stamped=pack_names(tree.folders),
        stamps=np.array(tree.stamps, np.int64),
    ) | pack_left_out(tree.left_out)
    if len(tree.names) > CACHE_FOLDERS_ABOVE:
        save_listing(cache, root, arrays)
    return arrays


def is_folder(entry: os.DirEntry) -> bool:
    """Tell whether an entry is a folder or a link to one. A link to itself is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def list_tars(tars: list[str], cache: str) -> Listing:
    """List the images in the tars of one folder; the file `cache` is used if the tars have not changed since.

    Raises ValueError for a tar that is compressed, damaged or not a regular file.
    """
    base = os.path.dirname(os.path.abspath(tars[0]))
    stamped = [os.path.basename(tar) for tar in tars]
    # The stamps would prove that the listed tars are unchanged, not that they are the same tars.
    cached = load_listing(cache, base, stamped)
    if cached is not None:
        return cached
    stamps = np.array([stamp(t) for t in tars], np.int64)
    names: list[bytes] = []
    shards: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    labels: list[Label | None] = []
    left_out: Counter[str] = Counter()
    for shard, path in enumerate(tars):
        listed = list_tar(path)
        left_out += listed.left_out
        # Most tars have no labels, and then nothing is kept for them.
        if listed.labels:
            labels += [None] * (len(names) - len(labels)) + listed.labels
        for name, offset, size in listed.places:
            names.append(name)
            shards.append(shard)
            offsets.append(offset)
            sizes.append(size)
    columns: dict[str, Any] = dict(
        shard=np.array(shards, np.int32),
        offset=np.array(offsets, np.int64),
        size=np.array(sizes, np.int64),
    )
    pairs = None
    if labels:
        labels += [None] * (len(names) - len(labels))
        pairs = as_pairs(names, shards, labels, tars)
    if pairs is None:
        arrays = from_names(names, **columns) | _paired([], "")
    else:
        left_out["extra image"] = len(names) - len(pairs.kept)
        for suffix in LABEL_SUFFIXES:
            del left_out[suffix]
        arrays = _from_pairs(names, pairs, columns)
    packed = pack_names([os.fsencode(name) for name in stamped])
    arrays |= dict(stamped=packed, stamps=stamps) | pack_left_out(left_out)
    save_listing(cache, base, arrays)
    return arrays


def _from_pairs(names: list[bytes], pairs: Pairs, columns: dict[str, Any]) -> Listing:
    """Return the arrays of tars in WebDataset's form; the order is that of names, not of classes."""
    kept = np.array(pairs.kept, np.int64)
    columns = {key: values[kept] for key, values in columns.items()}
    labels = np.array(pairs.labels, np.int32)
    arrays = from_names([names[i] for i in pairs.kept], own_labels=labels, **columns)
    arrays["labels"] = arrays.pop("own_labels")
    arrays["classes"] = pack_names(pairs.classes)
    return arrays | _paired([1], pairs.fault)


def _paired(paired: list[int], fault: str) -> Listing:
    return dict(paired=np.array(paired, np.uint8), fault=np.frombuffer(fault.encode(), np.uint8))


def from_names(
    names: list[bytes],
    folders: Collection[bytes] = (),
    *,
    sort: bool = True,
    depth: int = 1,
    classes: Sequence[bytes | None] | None = None,
    **columns: np.ndarray,
) -> Listing:
    """Make the arrays of a listing from names.

    Args:
        folders: further classes, which hold no images.
        sort: whether to order the names as torchvision's ImageFolder does.
        depth: how many folders of a name make up its class.
        classes: the class of each name; if None, its folders name the class.
        columns: further arrays with one value per name, which are put in the same order.
    """
    if classes is None:
        classes = [class_of(name, depth) for name in names]
    # Once per class, as there may be a million names.
    forms = {name: name and composed(name) for name in set(classes)}
    owners = [forms[name] for name in classes]
    positions = list(range(len(names)))
    if sort:
        positions.sort(key=lambda i: _order(names[i], owners[i]))
    order = np.array(positions, np.int64)
    known = sorted({name for name in owners if name is not None} | set(map(composed, folders)))
    number: dict[bytes | None, int] = {name: i for i, name in enumerate(known)}
    labels = [number.get(owners[i], -1) for i in positions]
    return dict(
        **_joined([names[i] for i in positions]),
        labels=np.array(labels, np.int32),
        classes=pack_names(known),
        **{key: values[order] for key, values in columns.items()},
    )


def _joined(names: list[bytes]) -> Listing:
    return dict(
        names=np.frombuffer(b"".join(names), np.uint8),
        ends=np.cumsum([len(name) for name in names], dtype=np.int64),
    )


def names_in(arrays: Listing) -> list[bytes]:
    """Return the names of a listing, in its order."""
    blob = arrays["names"].tobytes()
    ends = arrays["ends"].tolist()
    return [blob[start:end] for start, end in zip([0, *ends], ends)]


def with_class_depth(arrays: Listing, depth: int) -> Listing:
    """Return a listing in which the first `depth` folders make up the class of an image."""
    columns = {name: arrays[name] for name in TAR_ARRAYS if name in arrays}
    folders: set[bytes] = set()
    # What was listed are tars, or else folders, of which empty ones count as classes.
    if not columns:
        listed = map(os.fsencode, unpack_names(arrays["stamped"]))
        owners = (class_of(folder + b"/", depth) for folder in listed if folder != b".")
        folders = {owner for owner in owners if owner is not None}
    # mypy takes the columns for any of the other arguments.
    made = from_names(names_in(arrays), folders, depth=depth, **columns)  # type: ignore[arg-type]
    return arrays | made


def selected(arrays: Listing, images: np.ndarray) -> Listing:
    """Return a listing of some images: `images` are their numbers."""
    names = names_in(arrays)
    columns = {name: arrays[name][images] for name in ("labels", *TAR_ARRAYS) if name in arrays}
    return arrays | _joined([names[i] for i in images.tolist()]) | columns


def class_of(name: bytes, depth: int = 1) -> bytes | None:
    """Return the first `depth` folders of an image's name; None for an image that lies in fewer."""
    end = -1
    for _ in range(depth):
        end = name.find(b"/", end + 1)
        if end < 0:
            return None
    return name[:end]


def composed(name: bytes) -> bytes:
    """Return a name in Unicode's composed form: archives of macOS hold names in the decomposed one."""
    if name.isascii():
        return name
    return os.fsencode(unicodedata.normalize("NFC", os.fsdecode(name)))


def _order(name: bytes, owner: bytes | None) -> tuple[bytes, bytes, bytes]:
    """Return the sort key of ImageFolder, which differs from plain path order: nested folders come last."""
    folder, _, file = name.rpartition(b"/")
    return owner or b"", folder, file
