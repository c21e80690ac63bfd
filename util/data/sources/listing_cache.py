"""Listings on disk, which are used again while the files or folders that were listed have not changed."""

import contextlib
import hashlib
import os
import time
import uuid
import zipfile

import numpy as np

Listing = dict[str, np.ndarray]
# A younger file may change again without getting another time: file systems round times.
SETTLED_AFTER = 2e9  # ns


def pack_names(names: list[bytes]) -> np.ndarray:
    """Join names to one array of bytes."""
    return np.frombuffer(b"\0".join(names), np.uint8)


def unpack_names(blob: np.ndarray) -> list[str]:
    """Split what `pack_names` has joined."""
    if not len(blob):
        return []
    return [os.fsdecode(name) for name in blob.tobytes().split(b"\0")]


def stamp(path: str | bytes) -> tuple[int, int]:
    """Return the modification time in nanoseconds and the size in bytes."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def load_listing(cache: str, base: str) -> Listing | None:
    """Load a listing; None unless every file or folder under `base` that was listed is unchanged."""
    for path in (cache, _user_cache(cache)):
        # The file may be absent, damaged, or from another version.
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            stamps = [stamp(os.path.join(base, name)) for name in unpack_names(arrays["stamped"])]
            if np.array_equal(arrays["stamps"], np.array(stamps, np.int64)):
                return arrays
    return None


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
    """Write the file `cache` and its folder, and tell whether that was possible."""
    temporary = f"{cache}.{uuid.uuid4().hex}.tmp"  # many ranks may write at once
    folder = os.path.dirname(os.path.abspath(cache))
    try:
        if not _is_writable(folder):
            return False
        if not os.path.isdir(folder):
            os.mkdir(folder)
            # A new folder changes the time of its parent, which may be a listed one.
            if os.path.dirname(folder) == os.path.abspath(base):
                arrays["stamps"][0] = stamp(base)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, cache)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        return False


def _is_writable(folder: str) -> bool:
    """Tell whether a folder, or its parent if it does not exist yet, is open for writing.

    The mode counts, not the access: root could write to a folder that its owner has closed.
    """
    if not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return bool(os.stat(folder).st_mode & 0o222)
