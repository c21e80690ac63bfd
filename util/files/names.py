"""File names and other text of strangers, made safe for terminals, lists and tables."""

import os
import unicodedata

# Control, format (such as marks that reverse the direction of a text), line and paragraph separators.
_UNSAFE = ("Cc", "Cf", "Zl", "Zp")


def one_line(text: str) -> str:
    r"""Escape what could start a new line or command a terminal: ESC becomes \x1b, a newline \n.

    Bytes of a file name that are not valid UTF-8 stay as they are (surrogates), so that a list of names can
    be written with `errors="surrogateescape"`.
    """
    if text.isprintable():
        return text
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    category = unicodedata.category(character)
    # JSON may hold surrogates that stand for no byte. Those of bytes can be written.
    lone = category == "Cs" and not "\udc80" <= character <= "\udcff"
    if lone or category in _UNSAFE:
        return character.encode("unicode_escape").decode("ascii")
    return character


def printable(text: str | os.PathLike) -> str:
    r"""Escape a file name for messages: as `one_line`, and bytes that are not valid UTF-8 become \xff."""
    return os.fsencode(one_line(os.fsdecode(text))).decode(errors="backslashreplace")


def printable_lines(text: str) -> str:
    """Escape a message of several lines for a terminal; its line breaks and tabs stay."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: '1 image', '2 images'. `plural` is needed where it is no added s."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {plural or noun + 's'}"


def table_cell(text: str) -> str:
    """Escape a name for a CSV file: a spreadsheet would run a cell that starts like a formula.

    Such a cell gets an apostrophe in front, which spreadsheets take for "this is text".
    """
    text = one_line(text)
    if text.startswith(("=", "+", "-", "@")):
        return f"'{text}"
    return text
