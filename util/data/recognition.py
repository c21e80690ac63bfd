"""Which files are images: by the suffix of their names, or by their first bytes if they have none."""

import re

from util.data import formats
from util.data.formats import HEAD, IMAGE_SUFFIXES

__all__ = ["HEAD", "is_image_name", "is_of_system", "starts_like_image", "suffix_of"]

# Of saved listings, which lie beside tars.
OWN_SUFFIXES = (b".index.npz",)
# What this project and operating systems leave in folders of images. Nobody misses them.
SYSTEM_NAMES = (
    b".index",
    b".ds_store",
    b"thumbs.db",
    b"ehthumbs.db",
    b"desktop.ini",
    b"__macosx",
    b"@eadir",
    b"lost+found",
    b"$recycle.bin",
    b"system volume information",
)
SYSTEM_PREFIXES = (b"._", b".repack-", b".nfs", b".trash", b".fseventsd", b".spotlight-")
# A letter must be among them: 1.2.840.113619 and 2024.06.01 are names without a suffix.
_SUFFIX = re.compile(rb"\.(?=[a-z0-9]*[a-z])[a-z0-9]{1,10}\Z")


def is_image_name(name: bytes) -> bool:
    """Tell whether a file is an image by the suffix of its name or path."""
    lower = name.lower()
    return lower.endswith(IMAGE_SUFFIXES) and not lower.endswith(OWN_SUFFIXES)


def suffix_of(name: bytes) -> str:
    """Return the suffix of a file in lower case, with its dot: letters and digits; '' without one."""
    file = name.rpartition(b"/")[2].lower()
    found = _SUFFIX.search(file)
    # What begins with a dot is hidden, and has no suffix by that.
    if found is None or found.start() == 0:
        return ""
    return found[0].decode("ascii")


def is_of_system(name: bytes) -> bool:
    """Tell whether a path is of a file or folder of this project or an operating system, or lies in one."""
    parts = name.lower().split(b"/")
    return parts[-1].endswith(OWN_SUFFIXES) or any(
        part in SYSTEM_NAMES or part.startswith(SYSTEM_PREFIXES) for part in parts
    )


def starts_like_image(head: bytes) -> bool:
    """Tell whether the first HEAD bytes of a file are those of an image."""
    return any(kind.starts(head) for kind in formats.FORMATS)
