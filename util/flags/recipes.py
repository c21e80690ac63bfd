"""Recipes: text files with flags, which a command line includes by @file.

This module imports nothing heavy, so that --help answers at once.
"""

import difflib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from util.files.names import printable
from util.files.regular import open_regular

# Recipes have a few kB. Files that include each other twice and more would otherwise grow without an end.
MAX_BYTES = 2**20  # of all recipes together
MAX_FILES = 200  # each inclusion counts
MAX_DEPTH = 20
# The folder of the mains.
HOME = Path(__file__).resolve().parents[2]


class Recipes:
    """Replaces each @file of a command line by the words of that recipe, which may include others.

    `split` makes the words of a line.
    """

    def __init__(self, split: Callable[[str], list[str]]):
        self.split = split
        self.bytes_left = MAX_BYTES
        self.files_left = MAX_FILES

    def expanded(self, words: Sequence[str], includers: tuple[str, ...] = ()) -> list[str]:
        """Return the words with those of all recipes. `includers` are the recipes that hold the words.

        Raises ValueError, which names the file, for a recipe that does not exist, is not a regular text file,
        is too large, has an open quote, or includes itself.
        """
        all_words: list[str] = []
        for word in words:
            if not word.startswith("@"):
                all_words.append(word)
                continue
            path = found(word[1:])
            self._check(path, includers)
            for number, line in enumerate(self._lines(path), start=1):
                try:
                    parts = self.split(line.rstrip("\n"))
                except ValueError as error:
                    raise ValueError(f"recipe {printable(path)}, line {number}: {_reason(error)}") from None
                all_words += self.expanded(parts, (*includers, path))
        return all_words

    def _check(self, path: str, includers: tuple[str, ...]) -> None:
        chain = " -> ".join(printable(each) for each in (*includers, path))
        # Links may give a file several names.
        if os.path.realpath(path) in map(os.path.realpath, includers):
            raise ValueError(f"recipe {printable(path)} includes itself: {chain}")
        if len(includers) >= MAX_DEPTH:
            raise ValueError(f"recipes include each other more than {MAX_DEPTH} deep: {chain}")
        self.files_left -= 1
        if self.files_left < 0:
            raise ValueError(
                f"recipe {printable(path)} is one too many: a command line may include {MAX_FILES} ({chain})"
            )

    def _lines(self, path: str) -> list[str]:
        name = printable(path)
        data = self._read(path)
        if b"\0" in data:
            raise ValueError(f"recipe {name} is not a text file: it holds zero bytes")
        try:
            # Some editors put a byte order mark in front.
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            number = data.count(b"\n", 0, error.start) + 1
            raise ValueError(
                f"recipe {name} is not a text file in UTF-8: line {number} has the byte "
                f"0x{data[error.start]:02x}"
            ) from None
        # As in a text file, \r\n ends a line too.
        return io.StringIO(text, newline=None).readlines()

    def _read(self, path: str) -> bytes:
        name = printable(path)
        try:
            with open_regular(path) as file:
                data = file.read(self.bytes_left + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"there is no recipe {name}{_hint(path)}") from None
        except IsADirectoryError:
            raise ValueError(f"recipe {name} is a folder: give a file, such as recipes/*.args") from None
        except OSError as error:
            # Python's own message would quote the name once more.
            raise ValueError(f"recipe {name} cannot be read: {error.strerror or error}") from None
        self.bytes_left -= len(data)
        if self.bytes_left < 0:
            raise ValueError(
                f"recipe {name} is too large: all recipes of a command line may have {MAX_BYTES} bytes"
            )
        return data


def found(path: str) -> str:
    """Return where a recipe is: relative to the working directory, or else to the folder of the mains."""
    beside = os.path.join(HOME, path)
    if os.path.lexists(path) or not os.path.lexists(beside):
        return path
    return beside


def _hint(path: str) -> str:
    """The recipe of this toolkit with the most similar name, or where they are."""
    names = sorted(each.name for each in (HOME / "recipes").glob("*.args"))
    name = os.path.basename(path)
    near = difflib.get_close_matches(name, names, n=1) or [n for n in names if n == f"{name}.args"]
    if near:
        return f"; did you mean @recipes/{near[0]}?"
    return "; see recipes/*.args"


def _reason(error: ValueError) -> str:
    if "quotation" in str(error):
        return "an open quote. Close it, or put a backslash before it"
    return "a backslash at the end. Remove it: a recipe has whole flags on each line"
