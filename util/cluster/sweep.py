"""The runs of a sweep: their flags and folders, and the runs that follow each of them."""

import argparse
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NoReturn

from util.cluster.job import Job
from util.files import LAST_CHECKPOINT
from util.files.names import printable
from util.flags import early
from util.flags.parser import Parser, given_in, parser_of

FOLLOW_UPS = {"finetune": "main_finetune", "linprobe": "main_linprobe", "segment": "main_segment"}
# A follow-up takes these flags from its pretraining, if they are given there and not in its own flags. Others
# are those of the checkpoint, or of the machine that runs the job.
INHERITED = (
    "data_path",
    "input_size",
    "patch_size",
    "mean",
    "std",
    "alpha",
    "exif",
    "max_pixels",
    "data_timeout",
    "data_cache",
    "pos_tokens",
    "device",
    "num_workers",
    "seed",
)
# The layout of the data set: that of another one need not be the same.
LAYOUT = ("val_split", "val_share", "class_depth")
# Flags that cannot be swept, and why.
NOT_SWEPT = {
    "output_dir": "the launcher sets it: each point has its own folder in `job_dir`",
    "dry_run": "such a run trains nothing. The launcher has a flag of this name",
}
# The launcher sets these flags of a follow-up.
SET_FOR_FOLLOW_UPS = ("finetune", "resume", "output_dir")
# Of a folder, in bytes, on all common file systems.
LONGEST_NAME = 255


@dataclass
class Point:
    """One run: its swept flags, all flags of its main, its folder, and its follow-ups.

    `equal` are the names of points with the same flags, such as lr=0.001 and lr=1e-3, for which it stands.
    """

    name: str  # a path below the job directory; "" for a single run
    flags: dict[str, Any]  # the swept flags with their parsed values
    main: str
    argv: list[str]
    folder: str
    then: list["Point"] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What messages call the run: its name, or the folder of a single run."""
        return self.name or self.folder

    def job(self) -> Job:
        """Make the job that runs this point."""
        return Job(self.main, self.argv, self.folder)


def plan(main: str, rest: list[str], sweep: list[str], chain: list[str], job_dir: str) -> list[Point]:
    """Plan all runs of a command. The parser of each main checks its flags before anything is submitted.

    Args:
        main: module name of the main.
        rest: flags of the main that all points share.
        sweep: words FLAG=A,B,C.
        chain: words --then MAIN FLAGS [--then ...].
        job_dir: folder of all runs.

    Points of equal flags are one: the first, which lists the others.

    Raises ValueError if a flag or a value is wrong, or if different points have the same name.
    """
    swept = parse_sweep(sweep)
    if (swept or chain) and "%j" in job_dir:
        raise ValueError("`sweep` and `then` need a `job_dir` that is known at submission: leave out %j")
    _check_swept(main, swept)
    # Flags as text -> the point that has them.
    points: dict[str, Point] = {}
    # The last flag varies fastest.
    for values in product(*swept.values()):
        flags: dict[str, str] = {}
        for names, value in zip(swept, values):
            flags |= apart(names, value)
        point, settings = _make_point(main, rest, flags, chain, job_dir)
        first = points.setdefault(settings, point)
        if first is not point:
            first.equal.append(point.name)
    # Different values may give the same name, because special characters are replaced.
    count = Counter(point.name for point in points.values())
    twice = sorted(name for name in count if count[name] > 1)
    if twice:
        raise ValueError(f"`sweep` names a point twice: {', '.join(twice)}")
    return list(points.values())


def _check_swept(main: str, swept: Mapping[str, list[str]]) -> None:
    """Raise ValueError for flags that cannot be swept, or that are swept twice."""
    known = actions(main)
    flags = [flag for names in swept for flag in names.split("+")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise ValueError(f"`sweep` has two lists of values for {printable(flag)}: give one")
        reason = NOT_SWEPT.get(flag)
        for action in (known.get(f"--{flag}"), known.get(f"-{flag}")):
            if isinstance(action, (argparse._HelpAction, argparse._VersionAction)):
                reason = "it prints a text, and nothing runs"
        if reason:
            raise ValueError(f"`sweep` {printable(flag)}: the flag cannot be swept, {reason}")


def _make_point(
    main: str, rest: list[str], flags: dict[str, str], chain: list[str], job_dir: str
) -> tuple[Point, str]:
    """Make a point, and a text that is the same for points of the same flags."""
    name = ",".join(f"{flag}={value}" for flag, value in flags.items())
    # Values may hold spaces, slashes and quotes, which have no place in a folder's name.
    name = re.sub(r"[^\w.+=,-]", "_", name)
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise ValueError(
            f"`sweep` names a point {name[:60]}..., a folder of {len(os.fsencode(name))} bytes, but file "
            f"systems allow {LONGEST_NAME}: sweep fewer flags at a time"
        )
    folder = job_dir
    if name:
        folder = os.path.join(job_dir, name)
    argv = rest
    for flag, value in flags.items():
        argv = with_flag(main, argv, flag, value)
    # The job directory overrides --output_dir, as in MAE.
    argv = [*argv, "--output_dir", folder]
    parsed = vars(parse_main(main, argv))
    given = given_to(main, argv)
    # No command line sets `bands`: it follows from other flags.
    handed_on = {name: value for name, value in parsed.items() if name in given or name == "bands"}
    switches = actions(main)
    # Switches such as --cls_token store their value under another name.
    values = {flag: _parsed(parsed, switches.get(f"--{flag}"), text) for flag, text in flags.items()}
    settings = repr(sorted((parsed | {"output_dir": ""}).items()))
    then = follow_ups(handed_on, chain, name, folder)
    return Point(name, values, main, argv, folder, then), settings


def _parsed(parsed: Mapping[str, Any], action: argparse.Action | None, text: str) -> Any:
    """Return the parsed value of a swept flag, or its text if the parser translates it into another flag.

    `parsed` has the flags that the command line sets.
    """
    # A flag of another program may have the name of one of ours. A switch without a value may store None.
    if action is None or action.dest not in parsed:
        return text
    if action.nargs != 0 and parsed[action.dest] is None:
        return text
    return parsed[action.dest]


def parse_sweep(words: list[str]) -> dict[str, list[str]]:
    """Parse ["mask_ratio=0.5,0.75", "seed=0,1"] to {"mask_ratio": ["0.5", "0.75"], "seed": ["0", "1"]}.

    Flags that move together stay one entry, which `apart` takes apart: "hflip+vflip=0+0,0.5+0.5". Raises
    ValueError for other words, and for a flag that is named twice.
    """
    swept: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not values:
            raise ValueError(f"`sweep` takes FLAG=A,B,C, found {word!r}")
        # As on the command line, dashes and underscores are equal.
        flag = name.lstrip("-").replace("-", "_")
        if flag in swept:
            raise ValueError(f"`sweep` has two lists of values for {printable(flag)}: give one")
        swept[flag] = values.split(",")
    return swept


def apart(names: str, values: str) -> dict[str, str]:
    """Split flags that move together: ("hflip+vflip", "0.5+0") gives {"hflip": "0.5", "vflip": "0"}.

    Raises ValueError if there is not one value for each flag.
    """
    flags = names.split("+")
    # The value of a single flag may hold a plus itself, as in pos_label=apl+rpl.
    if len(flags) == 1:
        return {names: values}
    parts = values.split("+")
    if len(parts) != len(flags):
        text = printable(f"{names}={values}")
        raise ValueError(
            f"`sweep` {text}: {len(flags)} flags move together, so each value needs {len(flags)} "
            "parts, joined by +"
        )
    return dict(zip(flags, parts))


class _Strict(Parser):
    """A parser that raises ValueError instead of printing its usage and exiting.

    The user did not type all of these words, so the usage would not help.
    """

    def error(self, message: str, usage: bool = True) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")


def _strict_parser(main: str) -> _Strict:
    return _Strict(parents=[parser_of(main)], prog=main)


def parse_main(main: str, argv: list[str]) -> argparse.Namespace:
    """Parse the flags of a main. Raises ValueError if they are wrong."""
    flags = _strict_parser(main).parse_args(argv)
    if "model" in vars(flags):
        early.check_model(main, flags.model)
    early.check_given(flags)
    return flags


def check_flags(main: str, rest: list[str]) -> list[str]:
    """Select those flags of a main that the check of the cluster has too."""
    flags = vars(parse_main(main, rest))
    given = given_to(main, rest)
    words = []
    for name in ("data_path", "device"):
        if name in given and flags[name]:
            words += [f"--{name}", str(flags[name])]
    return words


def given_to(main: str, argv: list[str]) -> set[str]:
    """Return the flags (as attributes) that a command line sets, even if to their defaults."""
    return set(given_in(parse_main(main, argv)))


def actions(main: str) -> dict[str, argparse.Action]:
    """Return argparse's action for each flag of a main."""
    return Parser(parents=[parser_of(main)])._option_string_actions


def with_flag(main: str, argv: list[str], name: str, value: str) -> list[str]:
    """Append --name value to a command line.

    The values of a list are separated by spaces. A flag without a value is set by true and removed by false.
    Raises ValueError if such a flag has another value, or if the value would add more flags.
    """
    action = actions(main).get(f"--{name}")
    # The parser reports an unknown flag later, and names the nearest one.
    if action is None or action.nargs != 0:
        return [*argv, f"--{name}", *_value_words(name, value)]
    if value not in ("true", "false"):
        raise ValueError(f"`sweep` {name}: the flag takes no value; sweep over true,false")
    if isinstance(action, argparse.BooleanOptionalAction):
        if value == "false":
            name = f"no-{name}"
        return [*argv, f"--{name}"]
    # No flag reverts such a switch, so the one of a recipe must be removed.
    argv = [word for word in argv if word.replace("-", "_") != f"--{name}".replace("-", "_")]
    if value == "true":
        argv.append(f"--{name}")
    return argv


def _value_words(name: str, value: str) -> list[str]:
    text = printable(f"{name}={value}")
    try:
        words = shlex.split(value)
    except ValueError:
        raise ValueError(f"`sweep` {text}: the value has an open quote") from None
    for word in words:
        # Numbers may be negative.
        if re.match("--|-[A-Za-z]|@", word):
            raise ValueError(f"`sweep` {text}: {printable(word)} is no value, but a flag or a recipe")
    return words


def follow_ups(flags: Mapping[str, Any], chain: list[str], run: str, folder: str) -> list[Point]:
    """Plan the follow-ups of a run, each on its last checkpoint.

    Args:
        flags: those flags of the run that its command line sets, and `bands`.
        chain: words --then MAIN FLAGS [--then ...].
        run: name of the run.
        folder: folder of the run.

    Raises ValueError if a flag is wrong, or is one that the launcher sets.
    """
    points: list[Point] = []
    for part in _split_chain(chain):
        kind = part[0]
        main = FOLLOW_UPS[kind]
        _check_follow_up(kind, part[1:])
        earlier = sum(point.main == main for point in points)
        name = kind
        if earlier:
            name = f"{kind}-{earlier + 1}"
        output_dir = os.path.join(folder, name)
        checkpoint = os.path.join(folder, LAST_CHECKPOINT)
        argv = [*_inherited(flags, main, part[1:]), *part[1:]]
        argv += ["--finetune", checkpoint, "--output_dir", output_dir]
        # Wrong flags are an error now, and not when the pretraining has finished.
        parse_main(main, argv)
        points.append(Point(os.path.join(run, name), {}, main, argv, output_dir))
    return points


def _check_follow_up(kind: str, words: list[str]) -> None:
    main = FOLLOW_UPS[kind]
    if "--help" in words or "-h" in words:
        raise ValueError(f"`then` {kind}: its flags are those of python {main}.py --help")
    for name in SET_FOR_FOLLOW_UPS:
        if name in given_to(main, words):
            raise ValueError(
                f"`then` {kind} sets `{name}`, which the launcher sets: a follow-up starts from the last "
                "checkpoint of its run, and its folder is in that of the run"
            )


def _split_chain(chain: list[str]) -> list[list[str]]:
    """Split --then MAIN FLAGS [--then ...] into a list [MAIN, FLAGS] for each follow-up."""
    parts: list[list[str]] = []
    # The first word is --then.
    for word in chain:
        if word == "--then":
            parts.append([])
        else:
            parts[-1].append(word)
    for part in parts:
        if not part or part[0] not in FOLLOW_UPS:
            mains = " or ".join(FOLLOW_UPS)
            found = printable(" ".join(part)) or "nothing"
            raise ValueError(f"`then` must be followed by {mains} and its flags, found {found}")
    return parts


def _inherited(flags: Mapping[str, Any], main: str, own: Sequence[str]) -> list[str]:
    """Return the flags that a follow-up takes from its run. Its own flags, `own`, take precedence."""
    given = given_to(main, list(own))
    accepted = vars(parse_main(main, []))
    # main_sere.py has another name for it.
    flags = {"alpha": flags.get("image_alpha"), **flags}
    names = (*INHERITED, *_layout(given))
    inherited = {name: flags.get(name) for name in names if name in accepted and name not in given}
    inherited |= _channels(flags, given)
    if "model" not in given and "model" in flags:
        # mae_vit_base_patch16_dec512d8b and sere_vit_base_patch16 have the encoder of vit_base_patch16.
        inherited["model"] = re.sub(r"^(mae|sere)_|_dec512d8b$", "", flags["model"])
    words = []
    for name, value in inherited.items():
        if value in (None, ""):
            continue
        if not isinstance(value, (list, tuple)):
            value = [value]
        words += [f"--{name}", *map(str, value)]
    return words


def _layout(given: Collection[str]) -> Sequence[str]:
    """Return the flags of LAYOUT that suit what a follow-up sets itself."""
    if "data_path" in given:
        return ()
    # Images of a split and images that are held out exclude each other.
    if {"val_split", "val_share"} & set(given):
        return ("class_depth",)
    return LAYOUT


def _channels(flags: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return the bands that a follow-up takes from its run: `channels`, and `in_chans` as a user gives it.

    Beside `channels` it is the number of bands in the files, and without them that of the model's channels.
    `given` are the flags that the follow-up sets itself.
    """
    channels = flags.get("channels")
    bands = flags.get("bands")
    if not channels:
        bands = flags.get("in_chans")
    # Beside `channels`, `in_chans` always counts as given; one that is comes later and takes precedence.
    if "channels" in given:
        # Other files may have another number of bands.
        return {} if "data_path" in given else {"in_chans": bands}
    if "in_chans" in given:
        return {}
    return {"channels": channels, "in_chans": bands}
