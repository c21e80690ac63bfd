"""The table of one probe of several encoders: a row for each encoder, a column for each source of features.

The folder OUT has a folder for each encoder's run. OUT/table.json holds the rows of finished runs with the
flags and the file that they were made of, so that a stopped command goes on where it was. OUT/table.md shows
them.
"""

import dataclasses
import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from util.files import LAST_CHECKPOINT
from util.files.atomic import write_json, write_text
from util.files.names import printable
from util.report.runs import known_json, log_lines, print_damage
from util.report.tables import Table

FIGURE = "test_miou_"


@dataclass(frozen=True)
class Row:
    """A finished probe of an encoder.

    Attributes:
        figures: the mIoU of the best setting of each source, by its name.
        protocol: the line that says how they were measured.
        made_of: the flags of the probe, and what tells whether the encoder's file has changed.
    """

    figures: dict[str, float]
    protocol: str
    made_of: dict[str, Any]


def names_of(files: Sequence[str]) -> list[str]:
    """Return a name for each encoder: that of its file without suffix, or of the run whose last checkpoint it
    is.

    Names that are equal get those of the folders above in front. Raises ValueError if a file is named twice.
    """
    parts = [_parts(file) for file in files]
    # All runs have files of the same names.
    counts = [1 + part[-1].startswith("checkpoint") for part in parts]
    grown = True
    while grown:
        names = ["-".join(part[-count:]) for part, count in zip(parts, counts)]
        same = [names.count(name) > 1 for name in names]
        longer = [
            count + (doubled and count < len(part)) for count, doubled, part in zip(counts, same, parts)
        ]
        grown = longer != counts
        counts = longer
    if any(same):
        file = files[same.index(True)]
        raise ValueError(f"`finetune` names {printable(file)} twice: a table has one row for each encoder")
    return names


def _parts(file: str) -> list[str]:
    """The names of a file and of the folders above it, the last one without suffix, fit for a folder."""
    path = os.path.abspath(file)
    if "://" in file:
        path = urllib.parse.urlsplit(file).path
    parts = [part for part in path.split("/") if part]
    if parts[-1:] == [LAST_CHECKPOINT] and len(parts) > 1:
        parts = parts[:-1]
    elif parts and not os.path.isdir(path):
        parts[-1] = os.path.splitext(parts[-1])[0]
    return [re.sub(r"[^\w.+=-]", "_", part) for part in parts or ["encoder"]]


def stamp(file: str) -> list[int]:
    """Return size and time of a file, or of a run's last checkpoint; nothing for what is elsewhere."""
    for path in (os.path.join(file, LAST_CHECKPOINT), file):
        try:
            found = os.stat(path)
        except OSError:
            continue
        return [found.st_size, found.st_mtime_ns]
    return []


def read_rows(folder: str) -> dict[str, Row]:
    """Return the rows that a table's folder holds, by name; what is damaged is reported and left out."""
    rows = {}
    for name, value in known_json(os.path.join(folder, "table.json"), print_damage).items():
        try:
            rows[name] = Row(**value)
        except TypeError:
            print_damage(f"table.json of {folder}: the row {name} is damaged")
    return rows


def write_rows(folder: str, rows: Mapping[str, Row]) -> None:
    """Write table.json and table.md."""
    plain = {name: dataclasses.asdict(row) for name, row in rows.items()}
    write_json(os.path.join(folder, "table.json"), plain)
    parts = [f"{protocol}\n\n{table.markdown(padded=True)}\n" for protocol, table in tables(rows)]
    write_text(os.path.join(folder, "table.md"), "\n".join(parts))


def figures_of(folder: str, epoch: int, sources: Sequence[str]) -> dict[str, float]:
    """Return the figures that a run has last logged about an epoch, by source; {} if there are none."""
    path = os.path.join(folder, "log.txt")
    if not os.path.exists(path):
        return {}
    for line in reversed(log_lines(path)):
        found = {source: line[FIGURE + source] for source in sources if FIGURE + source in line}
        if line["epoch"] == epoch and found:
            return found
    return {}


def tables(rows: Mapping[str, Row]) -> list[tuple[str, Table]]:
    """Return a table for each protocol: figures of different ones cannot be compared."""
    found: dict[str, dict[str, Row]] = {}
    for name, row in rows.items():
        found.setdefault(row.protocol, {})[name] = row
    return [(protocol, _table(some)) for protocol, some in found.items()]


def _table(rows: Mapping[str, Row]) -> Table:
    sources = list(dict.fromkeys(source for row in rows.values() for source in row.figures))
    cells = [[name, *(_cell(row.figures.get(source)) for source in sources)] for name, row in rows.items()]
    return Table(["mIoU", *sources], cells)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}"
