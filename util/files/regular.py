"""Opens regular files only. Opening a pipe would wait for its other end, and a device has no end."""

import os
import stat
from typing import Any

from util.files.names import printable

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_safely(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a file of any kind without waiting, and return its descriptor; an `opener` for `open`."""
    # Windows has none of these. A terminal must not become the one that controls this process.
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    return os.open(path, flags)


def regular_size(descriptor: int, path: str) -> int:
    """Return the size in bytes of an open file. Raises OSError, which names `path`, if it is not regular."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a special file")
        raise OSError(f"{printable(path)} is {kind}, not a regular file")
    return found.st_size


def open_regular(path: str, buffering: int = -1) -> Any:
    """Open a regular file for reading bytes. Raises OSError for a pipe, a device and the like."""
    file = open(path, "rb", buffering, opener=open_safely)  # noqa: SIM115 (the caller closes it)
    try:
        regular_size(file.fileno(), path)
    except OSError:
        file.close()
        raise
    return file
