"""Listings of images as a few numpy arrays, from folders and uncompressed tars, and their cache on disk.

A listing is a dictionary: names (one blob of bytes), ends (where each name ends in it), labels (number of the class, the
first folder of the name, or -1), classes (their sorted names); of tars also shard, offset and size of each image; and
`stamped` with `stamps`, the files or folders it was made from with their times and sizes, by which a cache is checked.
"""

import contextlib
import hashlib
import os
import tarfile
import time
import uuid
import zipfile

import numpy as np

IMAGE_SUFFIXES = (
    b".jpg",
    b".jpeg",
    b".png",
    b".webp",
    b".bmp",
    b".tif",
    b".tiff",
    b".ppm",
    b".pgm",
    b".gif",
    b".npy",
)
COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".lz4", ".zip", ".7z")
CACHE_FOLDERS_ABOVE = 20_000  # images; a smaller folder is listed faster than a cache of it is worth


def list_folder(root: str, cache: str) -> dict[str, np.ndarray]:
    """The images in `root` at any depth, hidden ones left out; a large folder's listing is saved in the file `cache`."""
    names, folders, stamps, pending = [], [], [], [b""]
    while pending:
        prefix = pending.pop()  # b"", b"class/", b"class/deeper/"
        folder = os.path.join(os.fsencode(root), prefix)
        folders.append(prefix.rstrip(b"/") or b".")
        stamps.append(_stamp(folder))  # before listing: a change during it invalidates the cache
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    pending.append(prefix + entry.name + b"/")
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    names.append(prefix + entry.name)
    arrays = from_names(names, {f.partition(b"/")[0] for f in folders[1:]})
    arrays |= dict(stamped=_pack_names(folders), stamps=np.array(stamps, np.int64))
    if len(names) > CACHE_FOLDERS_ABOVE:
        _save_cache(cache, root, arrays)
    return arrays


def list_tars(tars: list[str], cache: str) -> dict[str, np.ndarray]:
    """The images in tars of one folder, from the file `cache` where it holds these tars as they are now."""
    base = os.path.dirname(os.path.abspath(tars[0]))
    stamped = _pack_names([os.path.basename(os.fsencode(t)) for t in tars])
    arrays = load_cache(cache, base)
    if arrays is not None and np.array_equal(arrays["stamped"], stamped):
        return arrays
    stamps = np.array([_stamp(t) for t in tars], np.int64)
    names, columns = [], dict(shard=[], offset=[], size=[])
    for shard, path in enumerate(tars):
        for name, offset, size in _tar_members(path):
            names.append(name)
            for column, value in zip(columns.values(), (shard, offset, size)):
                column.append(value)
    arrays = from_names(
        names, **{k: np.array(v, np.int32 if k == "shard" else np.int64) for k, v in columns.items()}
    )
    arrays |= dict(stamped=stamped, stamps=stamps)
    _save_cache(cache, base, arrays)
    return arrays


def from_names(names: list[bytes], folders=(), sort: bool = True, **columns) -> dict[str, np.ndarray]:
    """Names -> the arrays of a listing. `folders` adds classes that hold nothing. `columns`: one value each."""
    order = sorted(range(len(names)), key=lambda i: _order(names[i])) if sort else range(len(names))
    names = [names[i] for i in order]
    firsts = [name.partition(b"/")[0] if b"/" in name else None for name in names]
    classes = sorted({f for f in firsts if f is not None} | set(folders))
    number = {None: -1} | {name: i for i, name in enumerate(classes)}
    return dict(
        names=np.frombuffer(b"".join(names), np.uint8),
        ends=np.cumsum([len(n) for n in names], dtype=np.int64),
        labels=np.array([number[f] for f in firsts], np.int32),
        classes=_pack_names(classes),
        **{k: np.asarray(v)[np.asarray(order, np.int64)] for k, v in columns.items()},
    )


def _order(name):
    folder, _, file = name.rpartition(b"/")
    return (
        folder.partition(b"/")[0],
        folder,
        file,
    )  # as ImageFolder: not plain path order, nested folders come last


def unpack_names(blob: np.ndarray) -> list[str]:
    return [os.fsdecode(n) for n in blob.tobytes().split(b"\0")] if len(blob) else []


def _pack_names(names):
    return np.frombuffer(b"\0".join(names), np.uint8)


def _member_name(name):
    return os.fsencode(os.path.normpath(name).lstrip("/"))


def _tar_members(path):
    """(name, offset, size) of each image in an uncompressed tar; names without a leading `./` or, from `tar -P`, `/`."""
    found, links = {}, []
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep them all: gigabytes for a large set
                name = _member_name(member.name)
                if name.startswith(b".") or b"/." in name or not name.lower().endswith(IMAGE_SUFFIXES):
                    continue
                if member.islnk():  # tar stores the second name of a file as a link to the first
                    links.append((name, _member_name(member.linkname)))
                elif member.isreg() and not member.issparse():
                    found[name] = member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        with open(path, "rb") as file:
            magic = file.read(6)
        if magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK")):
            raise compressed_error(path) from error
        raise ValueError(f"{path} is not a tar, or is damaged or cut off ({error})") from error
    with open(path, "rb") as file:  # tarfile takes a damaged header for the end of the archive
        file.seek(end)
        if file.read(512).strip(b"\0"):
            raise ValueError(f"{path} is damaged at byte {end}, after {len(found)} images: copy it again")
    found |= {name: found[target] for name, target in links if target in found}
    return [(name, *place) for name, place in found.items()]


def compressed_error(path: str) -> ValueError:
    """The error for an archive that would have to be unpacked for every image."""
    return ValueError(
        f"{path} is compressed, so single images cannot be read from it. Unpack it once, for example "
        "with `gunzip <file>.tar.gz` or `unzip`, and give the .tar or the folder."
    )


# --- the cache ---


def load_cache(cache: str, base: str) -> dict[str, np.ndarray] | None:
    """The cached arrays if every file or folder under `base` that they were made from is unchanged, else None."""
    for path in (cache, _elsewhere(cache)):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            stamps = [_stamp(os.path.join(base, name)) for name in unpack_names(arrays["stamped"])]
            if np.array_equal(arrays["stamps"], np.array(stamps, np.int64)):
                return arrays
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # absent, from another version or damaged
    return None


def _elsewhere(cache):
    """Where the listing of a folder goes that is not the user's to write in, as a cluster's copy of ImageNet."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(os.path.join("~", ".cache"))
    return os.path.join(
        home, "mae_pl", hashlib.sha256(os.fsencode(os.path.abspath(cache))).hexdigest()[:32] + ".npz"
    )


def _save_cache(cache, base, arrays):
    """Write atomically, beside the images or else in the user's cache; where neither goes, they are listed again next time."""
    if not len(arrays["ends"]) or time.time_ns() - arrays["stamps"][:, 0].max() < 2e9:
        return  # perhaps still being filled, and file systems round times: a later change could go unseen
    if _saved(cache, base, arrays):
        return
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(_elsewhere(cache)), exist_ok=True)
        _saved(_elsewhere(cache), base, arrays)


def _saved(cache, base, arrays) -> bool:
    temporary = f"{cache}.{uuid.uuid4().hex}.tmp"  # many ranks may write at once
    try:
        folder = os.path.dirname(os.path.abspath(cache))
        if not os.stat(folder if os.path.isdir(folder) else os.path.dirname(folder)).st_mode & 0o222:
            return False  # root could write all the same, but the owner closed it
        if not os.path.isdir(folder):
            os.mkdir(folder)  # this changes the time of `base` if `base` is its parent
            if os.path.dirname(folder) == os.path.abspath(base):
                arrays["stamps"][0] = _stamp(base)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, cache)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        return False


def _stamp(path):
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size
