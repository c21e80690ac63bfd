"""The command-line parser: MAE's flags, recipe files, help with defaults, and errors in the user's terms.

This module imports nothing heavy, so that --help answers at once.
"""

import argparse
import difflib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from types import FrameType
from typing import Any, NoReturn

from util.files.names import printable, printable_lines
from util.flags import ending
from util.flags.recipes import Recipes


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Append the default to the help text of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # The help of a flag without a default says what happens without the flag; "(default:
        # None)" adds nothing.
        if action.default is None or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser that reads recipes, accepts dashes for underscores, and has no abbreviations.

    ``@file`` inserts the flags of a recipe. A recipe has one or more flags per line, and ``#`` starts a
    comment. Later flags override earlier ones. An unknown flag is an error that names the nearest known flag.
    """

    def __init__(self, **kwargs: Any):
        # An abbreviation in a script would change its meaning when a flag is added.
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("fromfile_prefix_chars", "@")
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(**kwargs)
        # Functions (parser, words) -> words that translate other programs' spellings. Parsers that have this
        # one as a parent inherit them with its flags.
        self.translators: list[Callable[[Parser, list[str]], list[str]]] = []
        for parent in kwargs.get("parents", ()):
            self.translators += getattr(parent, "translators", ())

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        """Split a line of a recipe into words, as a shell does."""
        return shlex.split(line, comments=True)

    def with_recipes(self, argv: list[str]) -> list[str]:
        """Replace each ``@file`` of a command line by the words of that recipe, which may include others.

        A recipe that cannot be read is an error, which names the file.
        """
        try:
            return Recipes(self.convert_arg_line_to_args).expanded(argv)
        except ValueError as error:
            self.error(str(error), usage=False)

    def error(self, message: str, usage: bool = True) -> NoReturn:
        """Print the usage, unless the flags are not to blame, and the message, and exit with code 2."""
        if usage:
            self.print_usage(sys.stderr)
        # The message repeats words of the command line, which may hold commands to the terminal.
        self.exit(2, f"{self.prog}: error: {printable_lines(message)}\n")

    # argparse calls this on every command line; its own version knows no nested files and no comments.
    def _read_args_from_files(self, arg_strings: list[str]) -> list[str]:
        words = self.with_recipes(arg_strings)
        for translate in self.translators:
            words = translate(self, words)
        return [self._underscored(word) for word in words]

    def _underscored(self, arg: str) -> str:
        """Spell a flag as it was added: --batch-size becomes --batch_size. Values stay as they are."""
        if not re.match(r"--[A-Za-z]", arg):
            return arg
        # The value of --flag=value may hold dashes of its own.
        name, equals, value = arg.partition("=")
        words = name[2:].replace("-", "_")
        # argparse.BooleanOptionalAction adds a prefix with a dash to a name with underscores.
        negated = f"--no-{words.removeprefix('no_')}"
        for spelling in (name, f"--{words}", negated):
            if spelling in self._option_string_actions:
                return spelling + equals + value
        return arg

    # Without argparse's overloads for other namespace classes, which nothing here uses.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a command line, sys.argv by default. An unknown flag ends the process with exit code 2."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._describe_unknown(printable(unknown[0].split("=")[0])))
        return parsed

    def _describe_unknown(self, flag: str) -> str:
        nearest = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.5)
        if nearest:
            return f"unknown flag {flag}; did you mean {nearest[0]}?"
        return f"unknown flag {flag}; see --help"


def number(least: float, most: float = float("inf"), kind: type = int) -> Callable[[str], float]:
    """Make an argparse type that accepts numbers of a kind from `least` to `most`, both included."""

    def read(text: str) -> float:
        value = kind(text)
        # A comparison with nan is False, so nan is refused.
        if least <= value <= most:
            return value
        allowed = f"must be {least} or more"
        if most < float("inf"):
            allowed = f"must lie between {least} and {most}"
        raise argparse.ArgumentTypeError(f"{allowed}, found {text}")

    read.__name__ = kind.__name__  # argparse prints it: "invalid int value"
    return read


COUNT = number(1)
SHARE = number(0, 1, float)
# Rates of dropout and of stochastic depth: 1 would drop everything and divide by zero.
BELOW_ONE = number(0, 0.999, float)


def with_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return a parser with --help: the given one if it has it already, else a `Parser` with the same flags.

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

    A script calls it as ``answer_at_once(__name__, get_args_parser())`` between its parser and the imports
    that take seconds. --help, an unknown flag and a wrong value then answer at once. The result is thrown
    away: the script parses again when it runs its main.
    """
    if name == "__main__":
        parse(parser)


def escape_undecodable_names() -> None:
    """Print file names that are not valid UTF-8 in escaped form, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        # Tests and notebooks replace the streams by objects that cannot be reconfigured.
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
# Flags of one command that errors of another may name. A file that main_finetune.py refuses, for example, may
# be a start for main_pretrain.py --init_from.
FLAGS_OF_OTHERS = frozenset(
    {"aa", "cls_token", "color_jitter", "finetune", "init_from", "input_size", "output_dir"}
    | {"pos_label", "resume", "sr_views"}
)


def with_flags(message: str, flags: Collection[str]) -> str:
    """Write `name` in backquotes as --name if it is one of `flags`, or of FLAGS_OF_OTHERS.

    Library code raises errors about its own parameters, which it puts in backquotes. A user of the command
    line knows them as flags, some under another name (see FLAG_OF). Other quoted words stay as they are.
    """

    def flag(match: re.Match) -> str:
        name = FLAG_OF.get(match[1], match[1])
        if name in flags or name in FLAGS_OF_OTHERS:
            return f"--{name}"
        return match[0]

    return re.sub(r"`([a-z_0-9]+)`", flag, message)


def describe(error: BaseException, flags: Collection[str]) -> str:
    """Return the message of an error for the user: parameters as flags, and no traceback of a data worker.

    Control characters, which names of files may hold, are escaped.
    """
    message = str(error)
    # A data worker puts its whole traceback into the message; the last line is "Type: message".
    if "Original Traceback" in message:
        last_line = message.strip().rpartition("\n")[2]
        message = last_line.partition(": ")[2] or message
    return printable_lines(with_flags(message, flags))


def _is_of_a_script(frame: FrameType) -> bool:
    """Whether code belongs to the script that Python was started with, and not to a session that goes on."""
    # Python and IPython set ps1 where a person types.
    interactive = bool(sys.flags.interactive) or hasattr(sys, "ps1")
    return frame.f_globals.get("__name__") == "__main__" and not interactive


def run(main: Callable[[argparse.Namespace], int], flags: argparse.Namespace) -> int:
    """Call a main with its parsed flags and return its exit code.

    Errors that the user can fix (ValueError, OSError) become one message on stderr and exit code
    2. Other errors are bugs and keep their traceback; so do all errors if the environment
    variable MAE_PL_TRACEBACK is set.

    A script that calls it passes the code to sys.exit. From the end of the training loop, or else of the
    main, it ignores signals other than SIGINT, so that a warning in its last second does not kill it.
    """
    escape_undecodable_names()
    try:
        with ending.exit_follows(_is_of_a_script(sys._getframe(1))):
            return main(flags)
    except (ValueError, OSError) as error:
        if os.environ.get("MAE_PL_TRACEBACK"):
            raise
        # The innermost frame, for those who report a bug.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        origin = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        print(
            f"error: {describe(error, vars(flags))}\n"
            f"(raised in {origin}; MAE_PL_TRACEBACK=1 shows the traceback)",
            file=sys.stderr,
            flush=True,
        )
        return 2
