"""The runs of a sweep: which there are, their flags and directories, and the runs that follow each."""

import argparse
import importlib
import os
import re
import shlex
from dataclasses import dataclass, field
from itertools import product

from util.cluster.job import Job
from util.flags.parser import Parser

FOLLOW_UPS = {"finetune": "main_finetune", "linprobe": "main_linprobe"}
# What a follow-up takes over from the pretraining that it follows, unless its own flags say otherwise.
INHERITED = (
    "data_path",
    "input_size",
    "patch_size",
    "in_chans",
    "mean",
    "std",
    "pos_tokens",
    "device",
    "num_workers",
    "seed",
)


@dataclass
class Point:
    """One run: the flags that set it apart, all flags of its main, its directory, and what follows it."""

    name: str  # as a path below the job directory; '' for a single run
    flags: dict
    main: str
    argv: list[str]
    folder: str
    then: list["Point"] = field(default_factory=list)

    def job(self) -> Job:
        return Job(self.main, self.argv, self.folder)


def plan(main: str, rest: list[str], sweep: list[str], chain: list[str], job_dir: str) -> list[Point]:
    """All runs that are asked for, each checked by its main's own parser before anything is submitted.

    `rest` are the main's flags, `sweep` the words FLAG=A,B,C, `chain` the words --then MAIN FLAGS [--then ...].
    """
    swept = parse_sweep(sweep)
    if (swept or chain) and "%j" in job_dir:
        raise ValueError(
            "--sweep and --then need a --job_dir that is known before the jobs are: leave out %j"
        )
    points = []
    for values in product(*swept.values()):
        flags = {
            name: value for names, together in zip(swept, values) for name, value in apart(names, together)
        }
        name = re.sub(r"[^\w.+=,-]", "_", ",".join(f"{k}={v}" for k, v in flags.items()))
        folder = os.path.join(job_dir, name) if name else job_dir
        argv = rest
        for flag, value in flags.items():
            argv = with_flag(main, argv, flag, value)
        argv = [*argv, "--output_dir", folder]  # in a job directory, as MAE's
        args, switches = parse_main(main, argv), actions(main)
        parsed = {k: getattr(args, switches[f"--{k}"].dest) for k in flags}
        points.append(Point(name, parsed, main, argv, folder, follow_ups(args, chain, name, folder)))
    names = [p.name for p in points]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--sweep names a point twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}"
        )
    return points


def parse_sweep(words: list[str]) -> dict[str, list[str]]:
    """["mask_ratio=0.5,0.75", "seed=0,1"] -> {"mask_ratio": ["0.5", "0.75"], "seed": ["0", "1"]}.

    Flags that move together stay one entry, which `apart` takes apart: "hflip+vflip=0+0,0.5+0.5".
    """
    swept = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not values:
            raise ValueError(f"--sweep takes FLAG=A,B,C, found {word!r}")
        swept[name.lstrip("-").replace("-", "_")] = values.split(",")
    return swept


def apart(names: str, values: str) -> list[tuple[str, str]]:
    """("hflip+vflip", "0.5+0") -> [("hflip", "0.5"), ("vflip", "0")]; a single flag keeps its value, "apl+rpl" too."""
    flags = names.split("+")
    if len(flags) == 1:
        return [(names, values)]
    if len(values.split("+")) != len(flags):
        raise ValueError(
            f"--sweep {names}={values}: {len(flags)} flags move together, so each value needs {len(flags)} parts, "
            "joined by +"
        )
    return list(zip(flags, values.split("+")))


class _Strict(Parser):
    """A parser whose errors are ValueErrors: the flags in question are not the ones that were typed."""

    def error(self, message: str):
        raise ValueError(f"{self.prog}: {message}")


def parse_main(main: str, argv: list[str]) -> argparse.Namespace:
    """A main's flags; ValueError where they are wrong."""
    return _Strict(parents=[importlib.import_module(main).get_args_parser()], prog=main).parse_args(argv)


def check_flags(main: str, rest: list[str]) -> list[str]:
    """Of a main's flags those that the check of the cluster has too."""
    args = parse_main(main, rest)
    return [w for k in ("data_path", "device") if getattr(args, k) for w in (f"--{k}", str(getattr(args, k)))]


def given_to(main: str, argv: list[str]) -> set[str]:
    """The flags (their attributes) that a command line gives, be it to their defaults."""
    parser = _Strict(parents=[importlib.import_module(main).get_args_parser()], prog=main)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def actions(main: str) -> dict[str, argparse.Action]:
    return Parser(parents=[importlib.import_module(main).get_args_parser()])._option_string_actions


def with_flag(main: str, argv: list[str], name: str, value: str) -> list[str]:
    """A command line and --name value after it; true and false for flags without a value; a list's values by spaces."""
    action = actions(main).get(f"--{name}")
    if action is None or action.nargs != 0:
        return [*argv, f"--{name}", *shlex.split(value)]
    if value not in ("true", "false"):
        raise ValueError(f"--sweep {name}: --{name} takes no value; sweep over true,false")
    if isinstance(action, argparse.BooleanOptionalAction):
        return [*argv, f"--{name}" if value == "true" else f"--no-{name}"]
    # No word takes such a switch back, so that a recipe's must go.
    argv = [word for word in argv if word.replace("-", "_") != f"--{name}".replace("-", "_")]
    return [*argv, f"--{name}"] if value == "true" else argv


def follow_ups(args: argparse.Namespace, chain: list[str], run: str, folder: str) -> list[Point]:
    """--then MAIN FLAGS [--then ...] -> a run each, on the last checkpoint of the run in `folder`."""
    parts: list[list[str]] = []
    for word in chain:
        if word == "--then":
            parts.append([])
        else:
            parts[-1].append(word)
    points = []
    for part in parts:
        if not part or part[0] not in FOLLOW_UPS:
            raise ValueError(
                f"--then is followed by {' or '.join(FOLLOW_UPS)} and its flags, found "
                + (" ".join(part) or "nothing")
            )
        main = FOLLOW_UPS[part[0]]
        given, known = given_to(main, part[1:]), vars(parse_main(main, []))
        inherited = {
            k: getattr(args, k) for k in INHERITED if k in known and hasattr(args, k) and k not in given
        }
        if "model" not in given:
            inherited["model"] = re.sub(r"^(mae|sere)_|_dec512d8b$", "", args.model)
        words = [
            w
            for k, v in inherited.items()
            if v not in (None, "")
            for w in (f"--{k}", *map(str, v if isinstance(v, (list, tuple)) else [v]))
        ]
        before = sum(p.main == main for p in points)
        name = f"{part[0]}-{before + 1}" if before else part[0]
        out = os.path.join(folder, name)
        argv = [
            *words,
            *part[1:],
            "--finetune",
            os.path.join(folder, "checkpoint-last.pth"),
            "--output_dir",
            out,
        ]
        parse_main(main, argv)
        points.append(Point(os.path.join(run, name), {}, main, argv, out))
    return points
