"""The launcher behind submitit_*.py: single jobs, sweeps as job arrays, follow-up jobs, and their status.

A job directory holds `submitit/` (scripts and logs), `jobs.json` (the submitted jobs), and the files of the
run. In a sweep, each point has its own folder there, named after its flags. `sweep.json` lists all points.
"""

import argparse
import dataclasses
import itertools
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from util.cluster import slurm
from util.cluster.job import Resources
from util.cluster.job_dir import write_flags, write_sweep
from util.cluster.local import check_gpus, run_here, run_locally
from util.cluster.slurm_jobs import check_limits, preview, submit_to_slurm
from util.cluster.status import status
from util.cluster.sweep import Point, check_flags, parse_sweep, plan
from util.files import LAST_CHECKPOINT
from util.files.names import one_line, printable
from util.flags.numbers import COUNT, number
from util.flags.parser import Parser, examples, parser_of, run

# Options of sbatch that the launcher depends on: with another value, it would lose sight of its jobs.
SET_BY_LAUNCHER = {"array", "output", "error", "open_mode"}
# With these, sbatch submits nothing, or does not print the job's ID.
NO_SUBMISSION = {"help", "usage", "version", "test_only", "parsable", "quiet", "wrap"}
# Words of the command line that become lines of the sbatch script.
TEXTS = ("job_dir", "partition", "qos", "account", "constraint", "comment")


def whole_minutes(text: str) -> int:
    """Read a number of minutes: the argparse type of --timeout."""
    if not re.fullmatch(r"[+-]?\d+", text):
        raise argparse.ArgumentTypeError(
            f"takes whole minutes, found {text!r}; an hour has 60, and a day 1440"
        )
    return int(COUNT(text))


def add_cluster_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of the launcher itself."""
    _add_job_flags(p.add_argument_group("cluster"))
    _add_resource_flags(p.add_argument_group("resources"))
    _add_sweep_flags(p.add_argument_group("sweeps"))


def _add_job_flags(g: argparse._ArgumentGroup) -> None:
    # With the time in its name, each submission has a folder of its own. A fixed name continues its runs.
    g.add_argument(
        "--job_dir",
        default="jobs/%t",
        help="shared folder of logs and checkpoints; a run in it is continued; "
        "%%t: time of submission, %%j: ID of the job",
    )
    g.add_argument(
        "--cluster",
        default="slurm",
        choices=["slurm", "local", "debug"],
        help="slurm; local: processes on this machine, without SLURM; debug: in this process",
    )
    g.add_argument(
        "--dry_run", action="store_true", help="print the sbatch script and the flags, and submit nothing"
    )
    g.add_argument(
        "--check", action="store_true", help="check the cluster instead: ranks, shared folder, data"
    )
    g.add_argument("--status", default=None, metavar="DIR", help="print the state of a job directory's runs")


def _add_resource_flags(g: argparse._ArgumentGroup) -> None:
    defaults = Resources()
    g.add_argument("--nodes", default=defaults.nodes, type=COUNT, help="number of nodes")
    g.add_argument(
        "--ngpus",
        default=None,
        type=number(0),
        help="GPUs, and processes, per node; 0 is one process on the CPU. If not given: 8 under SLURM, else "
        "all GPUs of this machine",
    )
    # A requeued job continues its run, so a run may last longer than one job.
    g.add_argument(
        "--timeout",
        default=defaults.timeout,
        type=whole_minutes,
        help="minutes until SLURM's warning and the requeue",
    )
    g.add_argument("--cpus_per_task", default=None, type=COUNT, help="--num_workers + 1 if not given")
    g.add_argument("--mem_gb", default=None, type=number(0.001, 1e6, float), help="memory per node in GB")
    g.add_argument("--partition", default=None, help="partition; the default one of the cluster if not given")
    g.add_argument("--qos", default=None, help="quality of service")
    g.add_argument("--account", default=None, help="account that is charged")
    g.add_argument("--constraint", default=None, help="features that the nodes must have")
    g.add_argument("--comment", default=None, help="comment of the job")
    # MAE's flag.
    g.add_argument(
        "--use_volta32", dest="constraint", action="store_const", const="volta32gb", help=argparse.SUPPRESS
    )
    g.add_argument(
        "--slurm",
        default=[],
        nargs="+",
        metavar="KEY=VALUE",
        help="more options of sbatch: exclude=node7 signal=USR2@300 exclusive",
    )
    g.add_argument(
        "--max_parallel",
        default=None,
        type=COUNT,
        help="points of a sweep at a time; if not given all under SLURM, and 1 otherwise",
    )


def _add_sweep_flags(g: argparse._ArgumentGroup) -> None:
    # Points are named after their values, so that a repeated or extended sweep recognises them.
    g.add_argument(
        "--sweep",
        default=[],
        nargs="+",
        metavar="FLAG=A,B,C",
        help="one run for each combination; F+G=A+B,C+D for flags that move together. The same command again "
        "submits the runs that are neither finished nor queued",
    )
    g.add_argument("--only", default=[], nargs="+", metavar="POINT", help="only these points of the sweep")
    g.add_argument(
        "--then",
        default=None,
        metavar="MAIN FLAGS",
        help="last on the command line: finetune, linprobe or segment and its flags, for the checkpoint of "
        "each run; may be repeated",
    )


@dataclass(frozen=True)
class Request:
    """What a command line asks the launcher to do."""

    main: str  # module name
    flags: list[str]  # of the main
    job_dir: str
    cluster: str
    resources: Resources
    sweep: list[str] = field(default_factory=list)  # words FLAG=A,B,C
    only: list[str] = field(default_factory=list)  # names of points
    chain: list[str] = field(default_factory=list)  # words --then MAIN FLAGS [--then ...]
    dry_run: bool = False


def launch(main: str, argv: list[str] | None = None, about: str | None = None) -> int:
    """Submit the runs of a command line of submitit_*.py, or print their status. Returns the exit code.

    Args:
        main: module name of the main.
        argv: the command line, sys.argv by default.
        about: the docstring of the script, whose commands are the examples of --help.
    """
    if argv is None:
        argv = sys.argv[1:]
    words, chain = with_chain(argv)
    everything = Parser(
        parents=[parser_of(main)],
        # The launcher's --dry_run replaces that of the main.
        conflict_handler="resolve",
        description=f"{main}.py on a cluster, through submitit",
        epilog=examples(about),
    )
    add_cluster_flags(everything)
    # All flags are parsed together first, so that --help lists them and an unknown flag is an error.
    all_flags = everything.parse_args(words)
    cluster = Parser(add_help=False)
    add_cluster_flags(cluster)
    # The other flags belong to the main.
    own, rest = cluster.parse_known_args(words)

    def act(_: argparse.Namespace) -> int:
        if own.status is not None:
            # An unset variable of a shell must not submit a run.
            if not own.status:
                raise ValueError("--status is empty: give the job directory")
            print(status(Path(own.status)))
            return 0
        request = _make_request(main, rest, chain, own)
        _check_output_dir(rest, _typed(argv), own.job_dir, "job_dir" in all_flags.given)
        return submit(request)

    return run(act, all_flags)


def with_chain(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the flags of launcher and main, and --then with all that follows.

    Recipes are replaced by their words. A recipe that ends in --then keeps it to itself: the flags after such
    a recipe belong to the main. --dry_run belongs to the launcher wherever it stands, so that it can be
    appended to any command.
    """
    parser = Parser(add_help=False)
    if "--status" in argv:
        # The command that submitted the runs, with --status DIR appended, shows their status.
        start = argv.index("--status")
        return argv[start : start + 2], []
    words: list[str] = []
    chain: list[str] = []
    for i, word in enumerate(argv):
        if word.startswith("--then="):
            parser.error(f"{word}: --then takes words, --then {word.partition('=')[2]} ...")
        if word == "--then":
            chain += parser.with_recipes(argv[i:])
            return _with_previews(words, chain)
        expanded = parser.with_recipes([word])
        start = len(expanded)
        if "--then" in expanded:
            start = expanded.index("--then")
        words += expanded[:start]
        chain += expanded[start:]
    return _with_previews(words, chain)


def _with_previews(words: list[str], chain: list[str]) -> tuple[list[str], list[str]]:
    """Move --dry_run from the flags of the last follow-up to those of the launcher."""
    # The dry run of a follow-up alone would have no use: its checkpoint does not exist yet.
    previews = [word for word in chain if word in ("--dry_run", "--dry-run")]
    return words + previews, [word for word in chain if word not in previews]


def _check_texts(flags: argparse.Namespace) -> None:
    """Raise ValueError for texts that would add lines to the sbatch script, or move the logs."""
    for name in TEXTS:
        text = getattr(flags, name) or ""
        if one_line(text) != text:
            raise ValueError(
                f"--{name} holds a line break or another control character, which it may not: "
                f"{printable(text)}"
            )
    if not flags.job_dir:
        raise ValueError("--job_dir is empty: give the folder of the runs")
    # sbatch replaces many patterns in the names of logs: %x, %10j, %%, and a backslash turns that off.
    pattern = re.search(r"\\|%\d*[A-Za-z%]", re.sub("%[tj]", "", flags.job_dir))
    if pattern and flags.cluster == "slurm":
        raise ValueError(
            f"--job_dir {flags.job_dir}: {pattern[0]} has a meaning for sbatch, and the logs would lie "
            "elsewhere. Only %t and %j are replaced"
        )


def _typed(argv: list[str]) -> list[str]:
    """The words of a command line that are neither recipes nor flags of follow-ups."""
    return [word for word in itertools.takewhile("--then".__ne__, argv) if not word.startswith("@")]


def _output_dir(words: list[str]) -> str | None:
    flag = Parser(add_help=False)
    flag.add_argument("--output_dir")
    return flag.parse_known_args(words)[0].output_dir


def _check_output_dir(rest: list[str], typed: list[str], job_dir: str, given: bool) -> None:
    """Raise ValueError if --output_dir names another folder than `job_dir`, to which submitted runs write.

    Args:
        rest: the flags of the main, with those of recipes. A recipe may name another folder, which a given
            `job_dir` replaces, as in MAE's launcher.
        typed: the words of the command line without recipes.
        job_dir: the launcher's folder.
        given: whether the command line names it.
    """
    other = _output_dir(rest)
    if not other or os.path.abspath(other) == os.path.abspath(job_dir):
        return
    shown = printable(shlex.quote(other))
    if not given:
        raise ValueError(
            f"a submitted run writes to --job_dir: give --job_dir {shown} instead of --output_dir {shown}"
        )
    if _output_dir(typed) == other:
        raise ValueError(
            f"--output_dir {shown} and --job_dir {printable(job_dir)} are two folders, and a submitted run "
            "writes to --job_dir: leave --output_dir out"
        )
    print(f"note: --output_dir {shown} is not used: a submitted run writes to --job_dir {printable(job_dir)}")


def _sbatch_options(words: list[str]) -> dict[str, str]:
    """Split the words KEY=VALUE of --slurm. KEY alone gives an empty value.

    Raises ValueError for what is not an option, and for options that the launcher depends on.
    """
    options = {}
    for word in words:
        key, _, value = word.partition("=")
        name = key.replace("-", "_")
        if not re.fullmatch("[a-z][a-z0-9_]*", name):
            raise ValueError(
                f"--slurm takes options of sbatch such as exclude=node7, found {printable(word)}"
            )
        if one_line(value) != value:
            raise ValueError(
                f"--slurm {name} holds a line break or another control character, which it may not: "
                f"{printable(value)}"
            )
        if name in SET_BY_LAUNCHER:
            raise ValueError(f"--slurm {key}: the launcher sets this option itself, leave it out")
        if name in NO_SUBMISSION:
            raise ValueError(f"--slurm {key}: sbatch would not report a job, leave the option out")
        options[name] = value
    return options


def _make_request(main: str, rest: list[str], chain: list[str], flags: argparse.Namespace) -> Request:
    _check_texts(flags)
    # Both %t and the folder of a check use it.
    now = time.strftime("%Y%m%d-%H%M%S")
    resources = Resources(
        nodes=flags.nodes,
        ngpus=flags.ngpus,
        timeout=flags.timeout,
        cpus_per_task=flags.cpus_per_task,
        mem_gb=flags.mem_gb,
        partition=flags.partition,
        qos=flags.qos,
        account=flags.account,
        constraint=flags.constraint,
        comment=flags.comment,
        sbatch=_sbatch_options(flags.slurm),
        max_parallel=flags.max_parallel,
    )
    job_dir = os.path.abspath(flags.job_dir.replace("%t", now))
    if flags.cluster == "debug":
        # There is no job. As in local runs, the process ID stands for its ID.
        job_dir = job_dir.replace("%j", str(os.getpid()))
    request = Request(
        main=main,
        flags=rest,
        job_dir=job_dir,
        cluster=flags.cluster,
        resources=resources,
        sweep=flags.sweep,
        only=flags.only,
        chain=chain,
        dry_run=flags.dry_run,
    )
    if flags.check:
        return _as_check(request, now)
    return request


def _as_check(request: Request, now: str) -> Request:
    """Turn a request into a check of the cluster.

    The check is not a run of the job directory. It has its own folder, named after the time, so that it can
    be repeated.
    """
    return dataclasses.replace(
        request,
        main="util.cluster.check",
        flags=check_flags(request.main, request.flags),
        job_dir=os.path.join(request.job_dir, f"check-{now}"),
        sweep=[],
        only=[],
        chain=[],
    )


def submit(request: Request) -> int:
    """Plan and submit the runs of a request, or print them for a dry run. Returns the exit code.

    Raises ValueError if a flag is wrong, a point does not exist, or SLURM refuses a job.
    """
    # All flags are parsed here, so that a typo is found now and not after hours in the queue.
    if request.cluster == "local" and request.resources.nodes > 1:
        raise ValueError(
            f"`nodes` is {request.resources.nodes}, but `cluster` local has one node, this machine: leave "
            "`nodes` out"
        )
    points = plan(request.main, request.flags, request.sweep, request.chain, request.job_dir)
    points = _select(points, request.only)
    # A job whose folder does not exist on its node fails without a log.
    if request.cluster == "slurm":
        slurm.check_shared(request.job_dir)
    _print_equal(points)
    if request.dry_run:
        _print_plan(points, request)
        return 0
    if request.cluster == "slurm":
        check_limits(points)
    elif request.cluster == "local":
        check_gpus(points, request.resources.ngpus)
    write_sweep(Path(request.job_dir), points, request.flags, parse_sweep(request.sweep))
    report_stale(points)
    if request.cluster == "slurm":
        return submit_to_slurm(points, request.resources, request.job_dir)
    write_flags(points)
    if request.cluster == "local":
        return run_locally(points, request.resources, request.job_dir)
    return run_here(points)


def _print_equal(points: list[Point]) -> None:
    for point in points:
        if point.equal:
            print(f"{point.name}: stands for equal points too, {' '.join(point.equal)}")


def _select(points: list[Point], only: list[str]) -> list[Point]:
    if not only:
        return points
    known = {name for point in points for name in (point.name, *point.equal)}
    unknown = sorted(set(only) - known)
    if unknown:
        names = " ".join(point.name for point in points)
        raise ValueError(f"`only` {' '.join(unknown)}: no such point; there are {names}")
    return [point for point in points if {point.name, *point.equal} & set(only)]


def _print_plan(points: list[Point], request: Request) -> None:
    """Print the sbatch script, and the command of every run."""
    if request.cluster == "slurm":
        print(preview(points, request.resources, request.job_dir))
    for point in points:
        for each in (point, *point.then):
            print(f"# {printable(each.label)}\npython {each.main}.py {printable(shlex.join(each.argv))}")
            if any("%j" in word for word in each.argv):
                print("# %j stands for the ID of the job: replace it before you run the command by hand")


def report_stale(points: list[Point]) -> None:
    """Print which finished follow-ups used an earlier checkpoint of their run. They are not run again."""
    for point in points:
        checkpoint = Path(point.folder, LAST_CHECKPOINT)
        if not checkpoint.exists():
            continue
        runs_again = not point.job().is_finished()
        for follow_up in point.then:
            if not follow_up.job().is_finished():
                continue
            # The note was last written when the follow-up finished.
            noted = Path(follow_up.folder, "job.json").stat().st_mtime
            if runs_again or checkpoint.stat().st_mtime > noted:
                print(
                    f"{follow_up.folder}: used an earlier checkpoint of the run; remove the folder to run it "
                    "again"
                )
