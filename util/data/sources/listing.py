"""Listings of images as a few numpy arrays, from folders and uncompressed tars.

A listing is a dictionary of arrays:

    names      one blob of bytes
    ends       where each name ends in it
    labels     number of the class, which is the first folder of the name, or -1
    classes    their sorted names
    shard, offset, size    of each image, in tars only
    stamped, stamps        the files or folders that were listed, with their times and sizes
"""

import os
import tarfile
from collections.abc import Collection

import numpy as np

from util.data.formats import IMAGE_SUFFIXES
from util.data.sources.listing_cache import Listing, load_listing, pack_names, save_listing, stamp

COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".lz4", ".zip", ".7z")
# First bytes of gzip, bzip2, xz, zstd and zip.
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK")
CACHE_FOLDERS_ABOVE = 20_000  # images; listing a smaller folder is faster than checking a cache of it


def list_folder(root: str, cache: str) -> Listing:
    """List the images in `root` at any depth; hidden files and folders are skipped.

    The listing of a large folder is saved in the file `cache`.
    """
    names: list[bytes] = []
    folders: list[bytes] = []
    stamps = []
    pending = [b""]
    while pending:
        prefix = pending.pop()  # b"", b"class/", b"class/deeper/"
        folder = os.path.join(os.fsencode(root), prefix)
        folders.append(prefix.rstrip(b"/") or b".")
        stamps.append(stamp(folder))  # before listing: a change during it invalidates the cache
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    pending.append(prefix + entry.name + b"/")
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    names.append(prefix + entry.name)
    # Also the folders without images: they count as classes, and are reported as empty.
    arrays = from_names(names, {f.partition(b"/")[0] for f in folders[1:]})
    arrays |= dict(stamped=pack_names(folders), stamps=np.array(stamps, np.int64))
    if len(names) > CACHE_FOLDERS_ABOVE:
        save_listing(cache, root, arrays)
    return arrays


def list_tars(tars: list[str], cache: str) -> Listing:
    """List the images in the tars of one folder; the file `cache` is used if the tars have not changed since.

    Raises ValueError for a tar that is compressed or damaged.
    """
    base = os.path.dirname(os.path.abspath(tars[0]))
    stamped = pack_names([os.path.basename(os.fsencode(t)) for t in tars])
    cached = load_listing(cache, base)
    # The stamps prove that the listed tars are unchanged, not that they are the same tars.
    if cached is not None and np.array_equal(cached["stamped"], stamped):
        return cached
    stamps = np.array([stamp(t) for t in tars], np.int64)
    names: list[bytes] = []
    shards: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    for shard, path in enumerate(tars):
        for name, offset, size in _tar_members(path):
            names.append(name)
            shards.append(shard)
            offsets.append(offset)
            sizes.append(size)
    arrays = from_names(
        names,
        shard=np.array(shards, np.int32),
        offset=np.array(offsets, np.int64),
        size=np.array(sizes, np.int64),
    )
    arrays |= dict(stamped=stamped, stamps=stamps)
    save_listing(cache, base, arrays)
    return arrays


def from_names(
    names: list[bytes], folders: Collection[bytes] = (), sort: bool = True, **columns: np.ndarray
) -> Listing:
    """Make the arrays of a listing from names.

    Args:
        folders: further classes, which hold no images.
        sort: whether to order the names as torchvision's ImageFolder does.
        columns: further arrays with one value per name, which are put in the same order.
    """
    positions = list(range(len(names)))
    if sort:
        positions.sort(key=lambda i: _order(names[i]))
    order = np.array(positions, np.int64)
    ordered = [names[i] for i in positions]
    # A name without a folder has no class.
    first_folders = [name.partition(b"/")[0] if b"/" in name else None for name in ordered]
    classes = sorted({f for f in first_folders if f is not None} | set(folders))
    number: dict[bytes | None, int] = {name: i for i, name in enumerate(classes)}
    labels = [number.get(folder, -1) for folder in first_folders]
    return dict(
        names=np.frombuffer(b"".join(ordered), np.uint8),
        ends=np.cumsum([len(name) for name in ordered], dtype=np.int64),
        labels=np.array(labels, np.int32),
        classes=pack_names(classes),
        **{key: values[order] for key, values in columns.items()},
    )


def _order(name: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the sort key of ImageFolder, which differs from plain path order: nested folders come last."""
    folder, _, file = name.rpartition(b"/")
    return folder.partition(b"/")[0], folder, file


# --- tars ---


def _member_name(name: str) -> bytes:
    """Return a member's name without a leading `./`, or `/`, which `tar -P` writes."""
    return os.fsencode(os.path.normpath(name).lstrip("/"))


def _is_image(name: bytes) -> bool:
    hidden = name.startswith(b".") or b"/." in name
    return not hidden and name.lower().endswith(IMAGE_SUFFIXES)


def _tar_members(path: str) -> list[tuple[bytes, int, int]]:
    """Return (name, offset, size) of each image in an uncompressed tar."""
    places: dict[bytes, tuple[int, int]] = {}
    links = []
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile would keep all members: gigabytes for a large set.
                tar.members.clear()  # type: ignore[attr-defined]
                name = _member_name(member.name)
                if not _is_image(name):
                    continue
                if member.islnk():  # tar stores a further name of a file as a link to the first
                    links.append((name, _member_name(member.linkname)))
                elif member.isreg() and not member.issparse():
                    places[name] = member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        raise _unreadable_tar(path, error) from error
    _check_end(path, end, len(places))
    places |= {name: places[target] for name, target in links if target in places}
    return [(name, *place) for name, place in places.items()]


def _unreadable_tar(path: str, error: tarfile.TarError) -> ValueError:
    """Return the error for a file that tarfile refuses."""
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic.startswith(COMPRESSED_MAGIC):
        return compressed_error(path)
    return ValueError(f"{path} is not a tar, or is damaged or cut off ({error})")


def _check_end(path: str, end: int, images: int) -> None:
    """Raise ValueError unless zeros follow the last member: tarfile takes a damaged header for the end."""
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(512).strip(b"\0"):
            raise ValueError(f"{path} is damaged at byte {end}, after {images} images: copy it again")


def compressed_error(path: str) -> ValueError:
    """Return the error for an archive that would have to be unpacked for every image."""
    return ValueError(
        f"{path} is compressed, so single images cannot be read from it. Unpack it once, for example "
        "with `gunzip <file>.tar.gz` or `unzip`, and give the .tar or the folder."
    )
