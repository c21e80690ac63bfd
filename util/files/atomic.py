"""Write files so that a reader, or a crash, finds the old file or the new one, never a part."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from typing import IO, Any, TypeVar

from util.files.regular import open_regular, open_safely

T = TypeVar("T")


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike, mode: str = "w", writer: str = "", follow: bool = False
) -> Iterator[IO]:
    """Open a new file that takes the name `path` when the block has ended without an error.

    The content is on the disk before the name is, so that a crash of the machine leaves the old file or the
    whole new one. After an error nothing is left behind. A killed process leaves `<path>.partial-<writer>`;
    without a `writer` each call makes up its own.

    Args:
        path: the file to replace. Its folder must exist.
        mode: "w" for UTF-8 text, in which file names may hold any bytes; "wb" for bytes.
        writer: a name that no other process uses at the same time.
        follow: for paths that a user names. A link stays a link, and the file that it leads to is replaced.
            Pipes and terminals, such as /dev/stdout, are written to.

    Raises OSError, for example on a full disk.
    """
    options: dict[str, Any] = {}
    if "b" not in mode:
        options = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    if follow and os.path.exists(path) and not os.path.isfile(path):
        # A pipe that nobody reads is an error, and is not waited for.
        with open(path, mode, opener=open_safely, **options) as file:
            os.set_blocking(file.fileno(), True)
            yield file
        return
    if follow:
        path = os.path.realpath(path)
    partial = f"{os.fspath(path)}.partial-{writer or uuid.uuid4().hex}"
    try:
        with open(partial, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
    sync_folder(os.path.dirname(path))


def sync_folder(folder: str | os.PathLike) -> None:
    """Write the names in a folder to the disk; some file systems cannot, and then nothing happens."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike, text: str, follow: bool = False) -> None:
    """Replace a text file; see `replacing`."""
    with replacing(path, follow=follow) as file:
        file.write(text)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Replace a JSON file; see `replacing`."""
    # As one string: an error in a value must not come after half of the file is written.
    write_text(path, json.dumps(value, indent=1) + "\n")


def append_line(path: str | os.PathLike, line: str) -> None:
    """Append a line to a text file; it is on the disk when the function returns."""
    with open(path, "a", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: str | os.PathLike, kind: type[T]) -> T:
    """Read a JSON file that holds a value of the type `kind`, such as dict.

    Raises FileNotFoundError if there is no file, and ValueError, which names the file, if it is damaged,
    holds something else, or is a pipe.
    """
    # A pipe would be waited for.
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file: remove it")
    try:
        with open_regular(os.fspath(path)) as file:
            value = json.loads(file.read())
    # Damaged UTF-8 is a ValueError as well. Brackets a million deep exceed Python's stack.
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        if not os.path.getsize(path):
            reason = "it is empty"
        raise ValueError(f"{path} is damaged, it is not JSON: {reason}. Restore it, or remove it") from None
    if not isinstance(value, kind):
        raise ValueError(
            f"{path} holds a JSON {type(value).__name__} where a {kind.__name__} is expected: it is damaged, "
            "or the file of another program. Restore it, or remove it"
        )
    return value
