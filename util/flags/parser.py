"""Command lines: MAE's flags, files of flags, and help that works. Imports nothing heavy: --help answers at once."""

import argparse
import difflib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Collection


class Parser(argparse.ArgumentParser):
    """ArgumentParser without abbreviations; dashes and underscores are equal; an unknown flag names the nearest.

    ``@file`` inserts the flags of a recipe: one or more per line, ``#`` starts a comment; later flags win.
    """

    def __init__(self, **kwargs):
        kwargs = {
            "allow_abbrev": False,
            "fromfile_prefix_chars": "@",
            "formatter_class": argparse.ArgumentDefaultsHelpFormatter,
        } | kwargs
        super().__init__(**kwargs)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def with_recipes(self, argv: list[str]) -> list[str]:
        """The words of a command line with each ``@file`` replaced by its flags, as they stand there."""
        words = []
        for a in argv:
            if not a.startswith("@"):
                words.append(a)
            elif not os.path.isfile(a[1:]):
                self.error(f"there is no recipe {a[1:]}; see recipes/*.args")
            else:
                with open(a[1:]) as f:
                    words += self.with_recipes(
                        [word for line in f for word in self.convert_arg_line_to_args(line)]
                    )
        return words

    def _read_args_from_files(self, arg_strings: list[str]) -> list[str]:
        return [self._underscored(a) for a in self.with_recipes(arg_strings)]

    def _underscored(self, arg: str) -> str:
        """--batch-size is --batch_size; values are left alone."""
        if not re.match(r"--[A-Za-z]", arg):
            return arg
        name, eq, value = arg.partition("=")
        words = name[2:].replace("-", "_")
        spellings = (
            name,
            f"--{words}",
            f"--no-{words.removeprefix('no_')}",
        )  # the last of argparse.BooleanOptionalAction
        return next((s for s in spellings if s in self._option_string_actions), name) + eq + value

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        out, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.5)
            self.error(f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        return out


def number(least: float, most: float = float("inf"), kind: type = int) -> Callable[[str], float]:
    """An argparse type: a number from `least` to `most`."""

    def read(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text} is not " + (f"from {least} to {most}" if most < float("inf") else f"{least} or more")
            )
        return value

    read.__name__ = kind.__name__  # argparse's "invalid int value"
    return read


COUNT, SHARE = number(1), number(0, 1, float)


BELOW_ONE = number(0, 0.999, float)


def with_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A parser with --help: the given one if it has it already, else a `Parser` with the same flags.

    Mains make their parsers with add_help=False, because the launchers use them as parents of another parser.
    """
    if parser.add_help:
        return parser
    return Parser(parents=[parser], description=parser.description)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line, sys.argv by default, with the parser of a main. It has --help in any case."""
    return with_help(parser).parse_args(argv)


def answer_at_once(name: str, parser: argparse.ArgumentParser) -> None:
    """Parse the command line before the heavy imports of a script, if the script is run and not imported.

    A script calls it as ``answer_at_once(__name__, get_args_parser())`` between its parser and the imports that take
    seconds. --help, an unknown flag and a wrong value then answer at once. The result is thrown away: the
    script parses again when it runs its main.
    """
    if name == "__main__":
        parse(parser)


def accept_odd_names() -> None:
    """Names of files may be no text, and are printed all the same."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# Parameters of library code that have another name on the command line.
FLAG_OF = {
    "img_size": "input_size",
    "auto_augment": "aa",
    "dims": "so_dims",
    "heads": "so_heads",
    "fusion": "so_fusion",
    "alpha": "so_alpha",
    "iters": "so_iters",
    "dropout": "so_dropout",
    "second_order": "head",
    "references": "reference",
}


def with_flags(message: str, flags: Collection[str]) -> str:
    """Say --name for each `name` in backquotes that is a flag.

    Library code raises errors about its own parameters, which it puts in backquotes. A user of the command line knows
    them as flags, some under another name. Other quoted words stay as they are.
    """

    def flag(match: re.Match) -> str:
        name = FLAG_OF.get(match[1], match[1])
        return f"--{name}" if name in flags else match[0]

    return re.sub(r"`([a-z_0-9]+)`", flag, message)


def run(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Call a main; what the user can mend (ValueError, OSError) is one line on stderr and exit code 2."""
    accept_odd_names()
    try:
        return main(args)
    except (ValueError, OSError) as e:
        if os.environ.get("MAE_PL_TRACEBACK"):
            raise
        frame, told = traceback.extract_tb(e.__traceback__)[-1], str(e)
        if "Original Traceback" in told:  # of a data worker: its last line is the error
            told = told.strip().rpartition("\n")[2].partition(": ")[2] or told
        told = with_flags(told, vars(args))
        print(
            f"error: {told}\n(raised in {os.path.basename(frame.filename)}:{frame.lineno}; MAE_PL_TRACEBACK=1 shows "
            "the traceback)",
            file=sys.stderr,
            flush=True,
        )
        return 2
