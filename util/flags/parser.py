"""The command-line parser: MAE's flags, recipe files, help with defaults, and errors in the user's terms.

This module imports nothing heavy, so that --help answers at once.
"""

import argparse
import difflib
import importlib
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

from util.files.names import printable, printable_lines
from util.flags import early, ending
from util.flags.groups import settle_channels
from util.flags.numbers import FINITE, WHOLE
from util.flags.recipes import Recipes

# Flags that most runs give, in the order in which --help shows them, before all others.
COMMON = (
    "job_dir",
    "cluster",
    "nodes",
    "ngpus",
    "timeout",
    "partition",
    "sweep",
    "arch",
    "model",
    "data_path",
    "output_dir",
    "finetune",
    "pretrained",
    "resume",
    "eval",
    "init_from",
    "knn",
    "mask_ratio",
    "pos_embed",
    "pos_label",
    "input_size",
    "nb_classes",
    "batch_size",
    "epochs",
    "warmup_epochs",
    "blr",
    "lr",
    "device",
    "amp",
    "num_workers",
    "seed",
    "dry_run",
    "max_steps",
)
# Values in the examples of an error, for flags that have no default to show.
EXAMPLES = {"lr": "1e-3", "data_path": "~/imagenet"}
EXAMPLES |= dict.fromkeys(("finetune", "resume", "init_from"), "RUN/checkpoint-last.pth")
# Other programs' flags for the number of neighbours.
NEIGHBOURS = ("--k", "--knn_k", "--nb_knn")
# Flags of submitit_*.py.
OF_LAUNCHERS = (
    "--job_dir",
    "--cluster",
    "--nodes",
    "--ngpus",
    "--partition",
    "--sweep",
    "--then",
    "--status",
)
# Words of a help text that say what happens without the flag.
SAYS_DEFAULT = re.compile(r"not given|if other than|\bdefault\b")


class Flags(argparse.Namespace):
    """Parsed flags. `given` are the names of those that the command line sets, be it to their defaults.

    `options` are the names of the flags that the command has, without dashes. Words without a flag, such as a
    path that comes first, have none. Both are slots, and so they are not among `vars(flags)`.
    """

    __slots__ = ("given", "options")
    given: frozenset[str]
    options: frozenset[str]


def given_in(flags: argparse.Namespace) -> frozenset[str]:
    """Return the names of the flags that a command line sets; all of them if no `Parser` made the flags."""
    return getattr(flags, "given", frozenset(vars(flags)))


def flag_names(flags: argparse.Namespace) -> Collection[str]:
    """Return the names that errors of a command may write as flags."""
    return getattr(flags, "options", vars(flags))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Append the default to the help text of each flag that has one; keep the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default in ("", []):
            # Most of these say what happens without the flag.
            if action.help and action.option_strings and not SAYS_DEFAULT.search(action.help):
                return f"{action.help} (default: none)"
            return action.help
        if isinstance(action.default, list):
            # As a command line has them.
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
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
        # Flags without limits of their own refuse nan and inf, too.
        self.register("type", int, WHOLE)
        self.register("type", float, FINITE)
        # A word such as -1e-3 is a value, which its flag may refuse, and not a flag.
        self._negative_number_matcher = re.compile(r"-\.?\d")
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
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """Print the message, without a usage that would hide it, and exit with code 2."""
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
            action = self._option_string_actions.get(spelling)
            if action is None:
                continue
            if equals and action.nargs == 0:
                self.error(_takes_none(spelling, value))
            return spelling + equals + value
        return arg

    # Without argparse's overloads for other namespace classes, which nothing here uses.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a command line, sys.argv by default. An unknown flag ends the process with exit code 2."""
        if args is None:
            args = sys.argv[1:]
        parsed, unknown = self.parse_known_args(args, namespace or Flags())
        if unknown:
            self.error(self._describe_unknown(unknown[0], args))
        if isinstance(parsed, Flags):
            parsed.given = self._given_by(args)
            parsed.options = self._options_of(parsed)
            try:
                settle_channels(parsed)
            except ValueError as error:
                self.error(str(error))
        return parsed

    def _options_of(self, parsed: argparse.Namespace) -> frozenset[str]:
        """The names of the flags of this command line's command."""
        names = {name[2:] for name in self._option_string_actions if name.startswith("--")}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names |= action.choices[vars(parsed)[action.dest]]._options_of(parsed)
        return frozenset(names)

    def _given_by(self, args: Sequence[str]) -> frozenset[str]:
        """The names of the flags that a command line sets, which must be a right one."""
        actions = list(self._actions)
        for action in self._actions:
            # The flags of a command.
            if isinstance(action, argparse._SubParsersAction):
                actions += [own for command in action.choices.values() for own in command._actions]
        # argparse would read the value of an optional word, such as a path, from the text of SUPPRESS.
        defaults = [(action, action.default) for action in actions if action.option_strings]
        try:
            # Without defaults, only the flags of the command line become attributes.
            for action, _ in defaults:
                action.default = argparse.SUPPRESS
            return frozenset(vars(self.parse_known_args(args)[0]))
        finally:
            for action, default in defaults:
                action.default = default

    def format_help(self) -> str:
        """Return the text of --help: a line of usage, examples, what most runs give, and the other flags."""
        known = {action.dest: action for action in self._actions if action.help != argparse.SUPPRESS}
        first = [known[name] for name in COMMON if name in known]
        if len(first) < 5:
            # Commands with few flags, and those with commands of their own.
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        formatter.add_usage("%(prog)s [flags] [@recipe ...]", self._actions, [], None)
        formatter.add_text(self.epilog)
        formatter.start_section("flags that most runs give")
        formatter.add_arguments(first)
        formatter.end_section()
        # What has no group of its own comes last.
        for group in sorted(self._action_groups, key=lambda group: group is self._optionals):
            formatter.start_section(group.title)
            formatter.add_arguments([each for each in group._group_actions if each not in first])
            formatter.end_section()
        return formatter.format_help()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            names = [str(choice) for choice in action.choices or ()]
            near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentError(action, f"{error.message}{hint}") from None

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            raise argparse.ArgumentError(action, _needs_values(action)) from None

    def _describe_unknown(self, word: str, args: Sequence[str]) -> str:
        """Say what is wrong with a word of the command line `args` that the parser does not know."""
        flag = printable(word.partition("=")[0])
        if not flag.startswith("-"):
            return self._describe_word(word, flag, args)
        if flag in NEIGHBOURS and "--knn" in self._option_string_actions:
            return f"unknown flag {flag}; --knn takes no number, it gives the accuracy for k = 10, 20 and 100"
        nearest = difflib.get_close_matches(flag, self._known_flags(), n=1, cutoff=0.5)
        others = ""
        if "--output_dir" in self._option_string_actions:
            others = _scripts_with(flag)
        # A flag of another script is no misspelt one, unless only a letter or two differ.
        if others and not difflib.get_close_matches(flag, nearest, n=1, cutoff=0.9):
            return f"unknown flag {flag}; {others} it"
        if nearest:
            return f"unknown flag {flag}; did you mean {nearest[0]}?"
        return f"unknown flag {flag}; see --help"

    def _describe_word(self, word: str, shown: str, args: Sequence[str]) -> str:
        """Say what is wrong with a word that is no flag; `shown` is its printable form."""
        words = self._read_args_from_files(list(args))
        for before, following in itertools.pairwise(words):
            action = self._option_string_actions.get(before)
            if following == word and action is not None and action.nargs == 0:
                return _takes_none(before, shown)
        hint = "see --help"
        if "--data_path" in self._option_string_actions and os.path.exists(shown):
            hint = "--data_path takes one path: give a folder of images"
        return f"{shown} belongs to no flag; {hint}"

    def _known_flags(self) -> list[str]:
        """Return the flags of this parser and of its commands, which do not know the words left over."""
        known = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    known += command._option_string_actions
        return known


def _scripts_with(flag: str) -> str:
    """The scripts that have a flag, with their verb, such as 'main_sere.py has'; '' if there are none."""
    name = "--" + flag.lstrip("-").replace("-", "_")
    if name in OF_LAUNCHERS:
        return "submitit_*.py have"
    scripts = [f"{main}.py" for main in early.MODELS if name in parser_of(main)._option_string_actions]
    if len(scripts) < 2:
        return "".join(f"{script} has" for script in scripts)
    return f"{', '.join(scripts[:-1])} and {scripts[-1]} have"


def _takes_none(flag: str, found: str) -> str:
    return f"{flag} takes no value, found {found}: give the flag alone, or leave it out"


def _needs_values(action: argparse.Action) -> str:
    """Say which values a flag needs that has none: its choices, its default or another example."""
    flag = action.option_strings[-1]
    count = action.nargs if isinstance(action.nargs, int) else 1
    needs = "a value" if count == 1 else f"{count} values"
    if action.choices:
        *others, last = map(str, action.choices)
        return f"needs {needs}: {', '.join(others)} or {last}"
    example = action.default
    if example in (None, "", []):
        example = EXAMPLES.get(action.dest)
    if example is None:
        # How --help writes the values.
        names = action.metavar or "VALUE"
        return f"needs {needs}: {flag} {names if isinstance(names, str) else ' '.join(names)}"
    if not isinstance(example, list):
        example = [example]
    return f"needs {needs}, such as {flag} {' '.join(map(str, example))}"


def with_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return a parser with --help: the given one if it has it already, else a `Parser` with the same flags.

    Mains make their parsers with add_help=False, because the launchers use them as parents of another parser.
    """
    if parser.add_help:
        return parser
    return Parser(parents=[parser], description=parser.description, epilog=parser.epilog)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line, sys.argv by default, with the parser of a main. It has --help in any case."""
    return with_help(parser).parse_args(argv)


class _ParserOnly(BaseException):
    """Ends the import of a main after its parser is made."""

    def __init__(self, parser: argparse.ArgumentParser):
        super().__init__()
        self.parser = parser


# The module whose parser is wanted without the rest of it.
_wanted = ""


def answer_at_once(name: str, parser: argparse.ArgumentParser) -> None:
    """Check the command line before the heavy imports of a script, if the script is run and not imported.

    A script calls it as ``answer_at_once(__name__, get_args_parser())`` between its parser and the imports
    that take seconds. --help, an unknown flag, a wrong value, and what `early.check` refuses, then answer at
    once. The result is thrown away: the script parses again when it runs its main.
    """
    if name == _wanted:
        raise _ParserOnly(parser)
    if name == "__main__":
        complete = with_help(parser)
        flags = complete.parse_args()
        try:
            early.check(os.path.basename(sys.argv[0]), flags)
        except (ValueError, OSError) as error:
            complete.exit(2, f"error: {describe(error, flag_names(flags))}\n")


def parser_of(main: str) -> argparse.ArgumentParser:
    """Return the parser of a main, by the name of its module, without the heavy imports of that module."""
    global _wanted
    if main in sys.modules:
        return sys.modules[main].get_args_parser()
    _wanted = main
    try:
        module = importlib.import_module(main)
    except _ParserOnly as found:
        return found.parser
    finally:
        _wanted = ""
    return module.get_args_parser()


def examples(docstring: str | None) -> str:
    """Return the commands of a script's docstring as the examples of --help; '' if there are none."""
    lines: list[str] = []
    goes_on = False
    for line in (docstring or "").splitlines():
        command = line.strip().startswith(("python ", "torchrun "))
        if command:
            lines.append(f"  {line.strip()}")
        elif goes_on:
            lines.append(f"      {line.strip()}")
        goes_on = (command or goes_on) and line.endswith("\\")
    if not lines:
        return ""
    return "\n".join(["examples:", *lines])


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
    "transparency": "alpha",
    "iters": "so_iters",
    "dropout": "so_dropout",
    "second_order": "head",
    "references": "reference",
}
# Flags whose values are stored under another name: parsed flags without `options` show that name only.
STORED_AS = {"cls_token": "pool", "global_pool": "pool"}


def with_flags(message: str, flags: Collection[str]) -> str:
    """Write `name` in backquotes as --name if it is one of `flags`, or if a script stands before it.

    Library code raises errors about its own parameters, which it puts in backquotes. A user of the command
    line knows them as flags, some under another name (see FLAG_OF). A command that has no such flag shows
    the parameter as it is, unless the advice is to run another script: "main_pretrain.py `init_from`".
    """

    def flag(match: re.Match) -> str:
        script, word = match.groups(default="")
        name = FLAG_OF.get(word, word)
        if script or name in flags or STORED_AS.get(name) in flags:
            return f"{script}--{name}"
        return match[0]

    return re.sub(r"(main_[a-z]+\.py )?`([a-z_0-9]+)`", flag, message)


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


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU, or the system, had no memory left."""
    # torch's class cannot be named here, as this module does not import torch.
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _memory_advice(error: RuntimeError, flags: Mapping[str, Any]) -> str:
    remedies = []
    if flags.get("batch_size", 1) > 1:
        smaller = f"lower --batch_size (now {flags['batch_size']})"
        if not (flags.get("eval") or flags.get("knn")):
            smaller += " and raise --accum_iter by the same factor"
        remedies.append(smaller)
    if flags.get("grad_checkpointing") is False:
        remedies.append("give --grad_checkpointing")
    # The first two sentences say how much was asked for; the others are about the allocator.
    sentences = str(error).strip().splitlines()[0].split(". ")[:2]
    cause = printable_lines(". ".join(sentences))
    advice = " or ".join(remedies) or "use a device with more, or a smaller model"
    return f"no memory is left ({cause}): {advice}"


def run(main: Callable[[argparse.Namespace], int], flags: argparse.Namespace) -> int:
    """Call a main with its parsed flags and return its exit code.

    Errors that the user can fix (ValueError, OSError) become one message on stderr and exit code
    2. Other errors are bugs and keep their traceback; so do all errors if the environment
    variable MAE_PL_TRACEBACK is set.

    A script that calls it passes the code to sys.exit. From the end of the training loop, or else of the
    main, it ignores signals other than SIGINT, so that a warning in its last second does not kill it.
    """
    escape_undecodable_names()
    early.announce(flags)
    try:
        with ending.exit_follows(_is_of_a_script(sys._getframe(1))):
            return main(flags)
    except (ValueError, OSError) as error:
        if os.environ.get("MAE_PL_TRACEBACK"):
            raise
        print(f"error: {describe(error, flag_names(flags))}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if os.environ.get("MAE_PL_TRACEBACK") or not _is_out_of_memory(error):
            raise
        print(f"error: {_memory_advice(error, vars(flags))}", file=sys.stderr, flush=True)
        return 2
