"""The claims of the positional-label paper, tested by experiments over several seeds.

    python -m evidence list                             # experiments, numbers of runs, claims and verdicts
    python -m evidence run mae supervised_vit --data DIR --results OWN
                                                        # data: DIR/mini_imagenet20/{train,val}.tar
    python -m evidence run mae --data DIR --missing     # only the runs that results/mae.json does not have
    python -m evidence collect mae                      # runs/evidence/mae -> evidence/results/mae.json, logs
    python -m evidence write                            # evidence/results -> the tables of RESULTS.md

An experiment is a recipe, evidence/recipes/NAME.args: the flags of a main, a --sweep over seeds and
settings, and follow-up runs. `run` gives it to the launcher of sweeps with --cluster local, and does not
repeat finished runs. Flags after -- go to the launcher and the main: `-- --cluster slurm --ngpus 1
--device cuda`, `-- --epochs 20`. On SLURM, use `collect` when the jobs are done. evidence/results has the
results of this project, run with --device cpu. Runs of other flags are not mixed with them: --results OWN
is a folder for yours.
"""

import argparse
import os
import shlex
import sys

from evidence.claims import CLAIMS
from evidence.experiments import EXPERIMENTS, HERE, recipe
from evidence.launch import launcher_words, main_flags, missing_points, run_experiments
from evidence.page import blocks, filled
from evidence.records import check_same_flags, collect_experiment, load, load_one
from evidence.statistics import combined_verdict
from util.files.atomic import write_text
from util.files.names import printable
from util.flags.parser import Parser, run
from util.report.runs import print_damage


def get_args_parser() -> Parser:
    """The parser of the command line up to `--`."""
    p = Parser(
        prog="python -m evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("command", choices=["list", "run", "collect", "write"])
    # Checked in `main`: argparse's choices do not accept an empty list of names.
    p.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}")
    p.add_argument("--data", default="", help="folder that holds the folders of the data sets")
    p.add_argument("--runs", default="runs/evidence", help="folder for the runs")
    p.add_argument("--results", default=os.path.join(HERE, "results"), help="folder of results and logs")
    p.add_argument("--page", default=os.path.join(os.path.dirname(HERE), "RESULTS.md"))
    p.add_argument(
        "--missing", action="store_true", help="run only what NAME.json in --results does not have"
    )
    p.add_argument("--max_parallel", default=1, type=int, help="runs at a time")
    return p


def main(args: argparse.Namespace, extra: list[str]) -> int:
    """Carry out a command; `extra` are the words after `--`. Raises ValueError for unknown or missing
    names.
    """
    unknown = [name for name in args.names if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such experiment; there are {', '.join(EXPERIMENTS)}")
    if args.command in ("run", "collect") and not args.names:
        raise ValueError(f"{args.command} which experiment? There are {', '.join(EXPERIMENTS)}")
    if args.command == "run":
        return run_command(args, extra)
    if args.command == "collect":
        return collect_command(args.names, args.runs, args.results)
    if args.command == "list":
        return list_command(args.results)
    return write_command(args.results, args.page)


def run_command(args: argparse.Namespace, extra: list[str]) -> int:
    """Run experiments and collect their results, if they run here and now."""
    if not args.data:
        raise ValueError("--data DIR: the folder that holds mini_imagenet20 and cifar10")
    command_lines = {}
    for name in args.names:
        path = os.path.join(args.results, f"{name}.json")
        before = load_one(path)
        # The launcher's own flag for some points of a sweep.
        only: list[str] = []
        if args.missing and before:
            points = missing_points(name, before)
            if not points:
                print(printable(f"{name}: {os.path.join(args.results, name)}.json has all runs"))
                continue
            only = ["--only", *points]
        words = launcher_words(name, args.data, args.runs, args.max_parallel, [*only, *extra])
        command_lines[name] = words
        if "--dry_run" not in extra:
            # Now, not after hours of training.
            check_same_flags(path, before, main_flags(words), shlex.join(recipe(name)))
    # One experiment that fails does not stop the others.
    failed = run_experiments(command_lines, args.max_parallel)
    if failed:
        print(f"failed: {', '.join(failed)}; their logs are named above", file=sys.stderr)
        return 1
    if "--dry_run" in extra or "slurm" in extra:
        # There is nothing to collect, or not yet.
        return 0
    return collect_command(list(command_lines), args.runs, args.results)


def collect_command(names: list[str], runs: str, results: str) -> int:
    """Write the results of experiments. Raises ValueError for those that cannot be collected, after the
    others.
    """
    refused = []
    for name in names:
        try:
            collect_experiment(name, runs, results)
        except (ValueError, OSError) as e:
            # The other experiments are collected all the same.
            refused.append(f"{name}: {e}")
    if refused:
        raise ValueError("\n".join(refused))
    return 0


def list_command(folder: str) -> int:
    """Print each experiment with its number of runs, and each claim with its verdict.

    Damaged files are named and left out.
    """
    results = load(folder, print_damage)
    for name, experiment in EXPERIMENTS.items():
        state = "not run"
        if name in results:
            state = f"{len(results[name]['runs'])} runs"
        print(f"{name:18} {experiment.title}: {state}")
    # Of a mixed verdict, the parts are on the page.
    for letter, (claim, contrasts) in CLAIMS.items():
        print(f"{letter}  {combined_verdict([c.verdict(results) for c in contrasts])}: {claim}")
    return 0


def write_command(results: str, page: str) -> int:
    """Write the tables of the page anew. Raises ValueError for damaged results: the page would lose them."""
    with open(page) as f:
        text = filled(f.read(), blocks(load(results), results))
    write_text(page, text)
    print(printable(f"wrote {page}"))
    return 0


if __name__ == "__main__":
    # Words after -- belong to the launcher and to the main.
    words = sys.argv[1:]
    extra: list[str] = []
    if "--" in words:
        split = words.index("--")
        extra = words[split + 1 :]
        words = words[:split]
    sys.exit(run(lambda args: main(args, extra), get_args_parser().parse_args(words)))
