"""Listings on disk, which are used again while the files or folders that were listed have not changed.

A cache is an .npz file. Everyone who can write beside the data can change it, so it is checked before it
is used. A damaged one is ignored.
"""

import contextlib
import hashlib
import io
import os
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from util.files.atomic import replacing
from util.files.regular import open_regular

Listing = dict[str, np.ndarray]
# A younger file may change again without getting another time: file systems round times.
SETTLED_AFTER = 2e9  # ns
FORMAT = 4  # of the cache; files of other formats are not used
MAX_CACHE_BYTES = 2 << 30  # about 40 million images
# Kinds of what a listing leaves out; suffixes are others. See util/data/sources/listing.py.
NO_SUFFIX = "file without suffix"
OTHER_SUFFIXES = "other"
MAX_KINDS = 100
MAX_KIND = 40  # characters
# Type and dimensions of the arrays; see util/data/sources/listing.py.
ARRAYS: dict[str, tuple[Any, int]] = {
    "names": (np.uint8, 1),
    "ends": (np.int64, 1),
    "labels": (np.int32, 1),
    "classes": (np.uint8, 1),
    "kinds": (np.uint8, 1),
    "left_out": (np.int64, 1),
    "stamped": (np.uint8, 1),
    "stamps": (np.int64, 2),
}
TAR_ARRAYS: dict[str, tuple[Any, int]] = {
    "shard": (np.int32, 1),
    "offset": (np.int64, 1),
    "size": (np.int64, 1),
}
# Of tars, beside the images.
PAIR_ARRAYS: dict[str, tuple[Any, int]] = {
    "paired": (np.uint8, 1),
    "fault": (np.uint8, 1),
}


def pack_names(names: Sequence[bytes]) -> np.ndarray:
    """Join names to one array of bytes."""
    return np.frombuffer(b"\0".join(names), np.uint8)


def unpack_names(blob: np.ndarray) -> list[str]:
    """Split what `pack_names` has joined."""
    if not len(blob):
        return []
    return [os.fsdecode(name) for name in blob.tobytes().split(b"\0")]


def pack_left_out(left_out: Counter[str]) -> Listing:
    """Return the arrays of what is left out, by kind. Suffixes beyond MAX_KINDS become one kind."""
    # Counters keep zeros. Equal counts are in the order of their names.
    found = sorted(((kind, n) for kind, n in left_out.items() if n), key=lambda pair: (-pair[1], pair[0]))
    reasons = {kind: n for kind, n in found if not kind.startswith(".")}
    suffixes = [(kind, n) for kind, n in found if kind.startswith(".")]
    most = MAX_KINDS - len(reasons) - 1
    kinds = dict(suffixes[:most]) | reasons
    others = sum(n for _, n in suffixes[most:])
    if others:
        kinds[OTHER_SUFFIXES] = others
    return dict(
        kinds=pack_names([kind.encode() for kind in kinds]),
        left_out=np.array(list(kinds.values()), np.int64),
    )


def unpack_left_out(arrays: Listing) -> Counter[str]:
    """Return what `pack_left_out` has packed; nothing for a listing that was made from names alone."""
    if "kinds" not in arrays:
        return Counter()
    return Counter(dict(zip(unpack_names(arrays["kinds"]), arrays["left_out"].tolist())))


def stamp(path: str | bytes | int) -> tuple[int, int]:
    """Return the modification time in nanoseconds and the size in bytes of a path or an open file."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


# --- reading ---


def load_listing(cache: str, base: str, tars: Sequence[str] = ()) -> Listing | None:
    """Load a listing; None unless every file or folder under `base` that was listed is unchanged.

    Args:
        tars: names of the tars under `base` that must be listed; without any, it must list the folder `base`.
    """
    for path in (cache, _user_cache(cache)):
        # The file may be absent, damaged in any way, or from another version.
        with contextlib.suppress(Exception):
            arrays = _read(path)
            _check(arrays, tars)
            stamps = [stamp(os.path.join(base, name)) for name in unpack_names(arrays["stamped"])]
            if np.array_equal(arrays["stamps"], np.array(stamps, np.int64)):
                return arrays
    return None


def _read(path: str) -> Listing:
    """Read the arrays of an .npz file, each with its checksum. Raises many types of errors."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _require(archive.comment == _seal(members), "seal")
        # Before anything is read: small files can be unpacked to gigabytes.
        size = os.fstat(file.fileno()).st_size
        _require(size <= MAX_CACHE_BYTES, "size")
        _require(sum(member.file_size for member in members) <= size, "size of the arrays")
        _require(all(member.compress_type == zipfile.ZIP_STORED for member in members), "compression")
        return {member.filename.removesuffix(".npy"): _array(archive.read(member)) for member in members}


def _seal(members: list[zipfile.ZipInfo]) -> bytes:
    """Return the format's number and a hash of the names, sizes and CRC-32s of all arrays.

    zipfile compares the CRC-32s with the arrays, so that the arrays need not be hashed.
    """
    content = repr(sorted((member.filename, member.file_size, member.CRC) for member in members))
    return f"listing {FORMAT} {hashlib.sha256(content.encode()).hexdigest()}".encode()


def _array(data: bytes) -> np.ndarray:
    """Return the array in an .npy file, without copying it and without pickles."""
    file = io.BytesIO(data)
    _require(np.lib.format.read_magic(file) == (1, 0), "version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def _require(condition: bool | np.bool_, what: str) -> None:
    if not condition:
        raise ValueError(f"damaged: {what}")


# --- checking ---


def _check(arrays: Listing, tars: Sequence[str]) -> None:
    """Raise ValueError unless arrays are a listing of these tars, or of a folder, that can be used safely.

    The checks of a million names take some milliseconds.
    """
    kinds = ARRAYS
    if tars:
        kinds = ARRAYS | TAR_ARRAYS | PAIR_ARRAYS
    _require({name: (array.dtype, array.ndim) for name, array in arrays.items()} == kinds, "types")
    images = len(arrays["ends"])
    _require(images > 0, "length")
    _require(all(len(arrays[name]) == images for name in ("labels", *TAR_ARRAYS) if name in arrays), "length")
    _check_left_out(unpack_names(arrays["kinds"]), arrays["left_out"])
    stamped = unpack_names(arrays["stamped"])
    _require(arrays["stamps"].shape == (len(stamped), 2), "stamps")
    _check_names(arrays["names"], arrays["ends"])
    _check_labels(arrays["labels"], unpack_names(arrays["classes"]), len(arrays.get("paired", ())) > 0)
    if tars:
        _require(len(arrays["paired"]) <= 1, "paired")
        _require(len(arrays["paired"]) == 1 or not len(arrays["fault"]), "fault")
        _require(stamped == list(tars), "stamped")
        _check_places(arrays["shard"], arrays["offset"], arrays["size"], arrays["stamps"][:, 1])
    else:
        _require(stamped[0] == ".", "stamped")


def _check_names(names: np.ndarray, ends: np.ndarray) -> None:
    """Raise ValueError for names that are empty or no file's."""
    # Names with .. are not looked for: who can forge them here can also put links among the images.
    _require(ends[0] > 0 and ends[-1] == len(names) and bool((ends[1:] > ends[:-1]).all()), "ends")
    _require(names.min() > 0, "names")


def _check_labels(labels: np.ndarray, classes: list[str], paired: bool) -> None:
    _require(labels.min() >= -1 and labels.max() < len(classes), "labels")
    # Images in folders are sorted by class, those without one first. Of pairs all have a label, or none has.
    in_order = bool((labels[1:] >= labels[:-1]).all())
    _require(in_order or (paired and labels.min() >= 0), "labels")
    _require(all(classes) and len(set(classes)) == len(classes), "classes")


def _check_left_out(kinds: list[str], counts: np.ndarray) -> None:
    _require(len(kinds) == len(counts) == len(set(kinds)) and len(kinds) <= MAX_KINDS, "left_out")
    _require(bool((counts > 0).all()) and all(0 < len(kind) <= MAX_KIND for kind in kinds), "left_out")


def _check_places(shard: np.ndarray, offset: np.ndarray, size: np.ndarray, totals: np.ndarray) -> None:
    _require(shard.min() >= 0 and shard.max() < len(totals), "shard")
    _require(offset.min() >= 0 and size.min() >= 0, "offset")
    # Not the sum of both, which may overflow.
    _require(bool((size <= totals[shard] - offset).all()), "size")


# --- writing ---


def save_listing(cache: str, base: str, arrays: Listing) -> None:
    """Write a listing atomically to `cache`, next to the images, or else to the user's cache.

    Nothing is written for an empty listing and for one that was changed just now. The images are listed again
    next time if neither place is writable.
    """
    if not len(arrays["ends"]) or time.time_ns() - arrays["stamps"][:, 0].max() < SETTLED_AFTER:
        return
    # Beside the images all users of the data share it.
    if _saved(cache, base, arrays):
        return
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(_user_cache(cache)), exist_ok=True)
        _saved(_user_cache(cache), base, arrays)


def _user_cache(cache: str) -> str:
    """Return where a listing goes if the images' folder is read-only, as a cluster's copy of ImageNet."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(os.path.join("~", ".cache"))
    name = hashlib.sha256(os.fsencode(os.path.abspath(cache))).hexdigest()[:32]
    return os.path.join(home, "mae_pl", name + ".npz")


def _saved(cache: str, base: str, arrays: Listing) -> bool:
    """Write the file `cache` and its folder; return whether that was possible."""
    folder = os.path.dirname(os.path.abspath(cache))
    try:
        if not _is_writable(folder):
            return False
        if not os.path.isdir(folder):
            os.mkdir(folder)
            # A new folder changes the time of its parent, which may be a listed one.
            if os.path.dirname(folder) == os.path.abspath(base):
                arrays["stamps"][0] = stamp(base)
        # Many ranks may write at once.
        with replacing(cache, "wb") as file:
            _write(file, arrays)
        return True
    except OSError:
        return False


def _write(file: Any, arrays: Listing) -> None:
    """Write what np.savez would write, and the seal."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
        archive.comment = _seal(archive.infolist())


def _is_writable(folder: str) -> bool:
    """Tell whether a folder, or its parent if it does not exist yet, is open for writing.

    The mode counts, not the access: root could write to a folder that its owner has closed.
    """
    if not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return bool(os.stat(folder).st_mode & 0o222)
