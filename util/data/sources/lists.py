"""Lists of images: text files of one path per line, and tables (CSV, TSV) with a column of paths."""

import codecs
import csv
import os
from collections.abc import Iterator
from typing import NamedTuple

from util.data.sources.image_index import some_names
from util.data.sources.listing import composed
from util.files.names import printable
from util.files.regular import open_regular

MAX_LINE = 1 << 16  # bytes; the longest path of Linux has 4096
TABLES = (".csv", ".tsv")
# Names of columns in lower case. The first one that a table has is taken.
PATHS: tuple[str, ...] = (
    "path",
    "filepath",
    "file_path",
    "image_path",
    "img_path",
    "filename",
    "file_name",
    "file",
)
PATHS += ("image", "image_name", "img", "img_name", "image_id")
LABELS = ("label", "class", "class_name", "classname", "label_name", "category", "target", "labels")
SPLIT_COLUMNS = ("split", "subset", "set")
HEADER = "A table starts with a line such as path,label"


class Table(NamedTuple):
    """The rows of a table.

    Attributes:
        file: its path.
        names: path of each image, as it is written there.
        classes: class of each image, b"" without one; None if there is no column of labels.
        splits: split of each image; None if there is no column of splits.
        lines: number of the line of each image.
        columns: which columns were taken, in words.
    """

    file: str
    names: list[bytes]
    classes: list[bytes] | None
    splits: list[str] | None
    lines: list[int]
    columns: str

    def rows(self, split: str) -> "Table":
        """Return the rows of one split; all if there is no column of splits."""
        if self.splits is None:
            return self
        kept = [i for i, found in enumerate(self.splits) if found == split]
        classes = self.classes
        if classes is not None:
            classes = [classes[i] for i in kept]
        names = [self.names[i] for i in kept]
        lines = [self.lines[i] for i in kept]
        return self._replace(names=names, classes=classes, splits=[split] * len(kept), lines=lines)


# --- text files ---


def listed_paths(path: str) -> list[bytes]:
    """Return the lines of a text file without blank lines and comments."""
    lines = [line.strip() for line in text_lines(path)]
    return [line for line in lines if line and not line.startswith(b"#")]


def text_lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a text file without a byte order mark. Raises ValueError for a binary file."""
    with open_regular(path) as file:
        number = 0
        # A binary file without a line break would be read as a whole otherwise.
        while line := file.readline(MAX_LINE):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            # An image, for example, was given by mistake.
            if b"\0" in line or len(line) == MAX_LINE:
                raise ValueError(
                    f"{printable(path)} is not a folder, a .tar or a text file of one path per line: line "
                    f"{number} is binary or too long. Other formats of data sets are not read."
                )
            yield line


# --- tables ---


def table_beside(root: str) -> str:
    """Return the table of a split, `<root>.csv` or `<root>.tsv`; '' if there is none."""
    return next((root + suffix for suffix in TABLES if os.path.isfile(root + suffix)), "")


def names_paths(path: str) -> bool:
    """Tell whether the first line of a file is a header with a column of paths."""
    try:
        return _column(_header(path), PATHS) is not None
    except ValueError:
        # It is no text at all.
        return False


def is_plain_list(path: str) -> bool:
    """Tell whether a file is no table: its first line has one value, which names no column of paths."""
    return len(_header(path)) < 2 and not names_paths(path)


def read_table(path: str) -> Table:
    """Read a table. The order of its rows and of its columns does not matter.

    Raises ValueError, which names the line, for a header without a column of paths, a row of another length,
    and a path that is empty or listed twice.
    """
    shown = printable(path)
    header = _header(path)
    paths = _column(header, PATHS)
    if paths is None:
        found = some_names(header) or "nothing"
        raise ValueError(
            f"line 1 of {shown} names no column of paths: found {found}. {HEADER}; a column of paths is "
            f"named {', '.join(PATHS)}. Move a table that lists no images to another folder."
        )
    labels = _column(header, LABELS)
    splits = _column(header, SPLIT_COLUMNS)
    taken = [f"paths from `{header[paths]}`"]
    if labels is not None:
        taken.append(f"classes from `{header[labels]}`")
    if splits is not None:
        taken.append(f"splits from `{header[splits]}`")
    table = Table(path, [], [], [], [], ", ".join(taken))
    if labels is None:
        table = table._replace(classes=None)
    if splits is None:
        table = table._replace(splits=None)
    _fill(table, len(header), (paths, labels, splits))
    _check_paths(table)
    return table


def _fill(table: Table, width: int, columns: tuple[int, int | None, int | None]) -> None:
    """Append the rows of a table's file. Raises ValueError for a row of another length or without a path."""
    paths, labels, splits = columns
    rows = _rows(table.file)
    next(rows)
    for line, row in rows:
        if len(row) != width:
            raise ValueError(
                f"line {line} of {printable(table.file)} has {len(row)} values, and the header has "
                f'{width}: a value with a separator needs quotes, as in "a,b.jpg"'
            )
        if not row[paths]:
            raise ValueError(f"line {line} of {printable(table.file)} has no path")
        table.names.append(os.fsencode(os.path.normpath(row[paths])))
        table.lines.append(line)
        if labels is not None and table.classes is not None:
            table.classes.append(composed(os.fsencode(row[labels])))
        if splits is not None and table.splits is not None:
            table.splits.append(row[splits])


def _check_paths(table: Table) -> None:
    """Raise ValueError for a path that is listed twice, also if the splits differ."""
    first: dict[bytes, int] = {}
    for name, line in zip(table.names, table.lines):
        before = first.setdefault(name, line)
        if before != line:
            raise ValueError(
                f"line {line} of {printable(table.file)} lists {printable(os.fsdecode(name))} again, after "
                f"line {before}: a table has one line per image"
            )


def check_labels(table: Table) -> None:
    """Raise ValueError unless each row has a label."""
    shown = printable(table.file)
    if table.classes is None:
        raise ValueError(
            f"{shown} has no column of labels ({table.columns}), which a classifier needs. {HEADER}; a "
            f"column of labels is named {', '.join(LABELS)}."
        )
    for owner, line in zip(table.classes, table.lines):
        if not owner:
            raise ValueError(f"line {line} of {shown} has an empty label: fill it, or remove the line")


def folder_of(table: Table) -> str:
    """Return the folder that the paths of a table are relative to.

    It is the table's own, or images/ or the split's folder in it, whichever holds the first image. Raises
    ValueError if none does: to check all would take minutes on a network file system.
    """
    here = os.path.dirname(os.path.abspath(table.file))
    stem = os.path.splitext(os.path.basename(table.file))[0]
    for folder in (here, os.path.join(here, "images"), os.path.join(here, stem)):
        if os.path.isfile(os.path.join(folder, os.fsdecode(table.names[0]))):
            return folder
    raise ValueError(
        f"line {table.lines[0]} of {printable(table.file)} names {printable(os.fsdecode(table.names[0]))}, "
        "which does not exist: paths are relative to the table's folder, or to images/ there, and have "
        "suffixes"
    )


def _header(path: str) -> list[str]:
    """Return the names of a table's columns."""
    return next((row for _, row in _rows(path)), [])


def _column(header: list[str], names: tuple[str, ...]) -> int | None:
    """Return the number of the column that has the first of some names; None if there is none."""
    plain = [name.lower().replace(" ", "_").replace("-", "_") for name in header]
    return next((plain.index(name) for name in names if name in plain), None)


def _rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the line and the values of each row that is not blank.

    Values are separated by what the first line has most of: commas, semicolons or tabs. Raises ValueError for
    what the csv module cannot read.
    """
    lines = (os.fsdecode(line) for line in text_lines(path))
    first = next(lines, "")
    separator = max(",;\t", key=first.count)
    reader = csv.reader(_with_first(first, lines), delimiter=separator, strict=True)
    try:
        for row in reader:
            values = [value.strip() for value in row]
            if any(values):
                yield reader.line_num, values
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {printable(path)} cannot be read: {error}") from error


def _with_first(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines
