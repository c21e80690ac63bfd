"""Tables of text cells, written as Markdown, as HTML or as aligned plain text."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from util.files.names import printable


@dataclass(frozen=True)
class Table:
    """A header, and rows with the same number of cells. Cells are plain text; the writers escape them.

    Names of runs are in cells. Line breaks and other control characters in them become visible.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self, padded: bool = False) -> str:
        """The table in Markdown; with `padded`, the columns of the source are aligned too."""
        lines = [[_markdown(cell) for cell in line] for line in (self.header, *self.rows)]
        if not padded:
            rule = "|" + "---|" * len(self.header)
            head, *body = [f"| {' | '.join(cells)} |" for cells in lines]
            return "\n".join([head, rule, *body])
        widths = _widths(lines)
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        head, *body = [f"| {' | '.join(_padded(cells, widths))} |" for cells in lines]
        return "\n".join([head, rule, *body])

    def html(self) -> str:
        """The table as one HTML element."""
        head = "".join(f"<th>{html.escape(printable(cell))}</th>" for cell in self.header)
        body = "".join(f"<tr>{_html_cells(row)}</tr>" for row in self.rows)
        return f"<table><tr>{head}</tr>{body}</table>"

    def text(self) -> str:
        """The table in aligned columns, two spaces apart, for a terminal."""
        # Blanks at the end of a line would wrap in a narrow terminal.
        lines = [[printable(cell) for cell in line] for line in (self.header, *self.rows)]
        widths = _widths(lines)
        return "\n".join("  ".join(_padded(cells, widths)).rstrip() for cells in lines)


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    # Of each column, in characters.
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _padded(cells: Sequence[str], widths: list[int]) -> list[str]:
    return [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]


def _html_cells(row: Sequence[str]) -> str:
    return "".join(f"<td>{html.escape(printable(cell))}</td>" for cell in row)


def _markdown(cell: str) -> str:
    # A vertical bar would end the cell, and a backslash before it would undo its escape.
    return printable(cell).replace("\\", "\\\\").replace("|", "\\|")
