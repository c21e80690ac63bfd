"""Submitting mains through submitit: single jobs, sweeps as job arrays, follow-up jobs, and what has become of them.

A job directory holds `submitit/` (scripts and logs), `jobs.json` (what was submitted), and a run's own files. In a sweep
each point has a directory of its own there, named after its flags, and `sweep.json` names them all.
"""

import argparse
import contextlib
import fcntl
import importlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from util.cluster import slurm
from util.cluster.status import job_ids, queue, status
from util.cluster.sweep import Point, check_flags, parse_main, parse_sweep, plan
from util.flags.parser import Parser, run

ROOT = Path(__file__).resolve().parents[2]


def add_cluster_flags(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("cluster")
    g.add_argument(
        "--job_dir",
        default="jobs/%t",
        help="shared folder of logs and checkpoints; a run in it is continued; "
        "%%t: time of submission, %%j: the job's number",
    )
    g.add_argument(
        "--cluster",
        default="slurm",
        choices=["slurm", "local", "debug"],
        help="local: processes on this machine; debug: in this process",
    )
    g.add_argument(
        "--ngpus",
        default=None,
        type=int,
        help="GPUs, and processes, per node: 8 under SLURM, all that there are "
        "on this machine; 0 is one process on the CPU",
    )
    g.add_argument("--nodes", default=1, type=int)
    g.add_argument("--timeout", default=4320, type=int, help="minutes until SLURM's warning and the requeue")
    g.add_argument("--partition", default=None, help="the cluster's default if not given")
    g.add_argument("--qos", default=None)
    g.add_argument("--account", default=None)
    g.add_argument("--constraint", default=None)
    g.add_argument("--comment", default=None)
    g.add_argument(
        "--use_volta32", dest="constraint", action="store_const", const="volta32gb", help=argparse.SUPPRESS
    )
    g.add_argument("--mem_gb", default=None, type=float, help="memory per node")
    g.add_argument("--cpus_per_task", default=None, type=int, help="--num_workers and one if not given")
    g.add_argument(
        "--slurm",
        default=[],
        nargs="+",
        metavar="KEY=VALUE",
        help="more of sbatch's options: exclude=node7 signal=USR2@300 exclusive",
    )
    g.add_argument(
        "--max_parallel", default=None, type=int, help="points of a sweep at a time: all under SLURM, else 1"
    )
    g.add_argument(
        "--dry_run", action="store_true", help="print the sbatch script and the flags, and submit nothing"
    )
    g.add_argument(
        "--check", action="store_true", help="check the cluster instead: ranks, shared folder, data"
    )
    g = p.add_argument_group("sweeps")
    g.add_argument(
        "--sweep",
        default=[],
        nargs="+",
        metavar="FLAG=A,B,C",
        help="one run for each combination, F+G=A+B,C+D for flags that move together; the same command again "
        "submits what is neither done nor queued",
    )
    g.add_argument("--only", default=[], nargs="+", metavar="POINT", help="of the sweep, these points only")
    g.add_argument(
        "--status", default="", metavar="DIR", help="print what has become of a job directory's runs"
    )
    g.add_argument(
        "--then",
        default=None,
        metavar="MAIN FLAGS",
        help="last: finetune or linprobe and its flags, for the checkpoint of each run; may be repeated",
    )


def launch(main: str, argv: list[str] | None = None) -> int:
    """What submitit_*.py do: parse the cluster's flags and the main's, submit -> exit code."""
    argv, chain = with_chain(sys.argv[1:] if argv is None else argv)
    module = importlib.import_module(main)
    everything = Parser(
        parents=[module.get_args_parser()],
        conflict_handler="resolve",
        description=f"{main}.py on a cluster, through submitit",
    )
    add_cluster_flags(everything)
    cluster = Parser(add_help=False)
    add_cluster_flags(cluster)
    everything.parse_args(argv)  # --help, and errors that know all flags
    opts, rest = cluster.parse_known_args(argv)
    return run(lambda opts: submit(main, opts, rest, chain), opts)


def with_chain(argv: list[str]) -> tuple[list[str], list[str]]:
    """A command line with its recipes as (flags of the cluster and of the main, --then and all that belongs to it).

    A recipe that ends in --then keeps that to itself: flags that the command line gives behind the recipe are the main's.
    --dry_run is the launcher's wherever it stands: at the end of a command it asks for a preview of all of it.
    """
    parser = Parser(add_help=False)
    if "--status" in argv:  # which the rest of the command that submitted the runs does not change
        return argv[argv.index("--status") :][:2], []
    words, chain = [], []
    for i, word in enumerate(argv):
        if word.startswith("--then="):
            parser.error(f"{word}: --then takes words, --then {word.partition('=')[2]} ...")
        if word == "--then":
            chain += parser.with_recipes(argv[i:])
            asked = [w for w in chain if w in ("--dry_run", "--dry-run")]
            return words + asked, [w for w in chain if w not in asked]
        expanded = parser.with_recipes([word])
        first = expanded.index("--then") if "--then" in expanded else len(expanded)
        words += expanded[:first]
        chain += expanded[first:]
    return words, chain


def submit(main: str, opts, rest: list[str], chain: list[str]) -> int:
    if opts.status:
        print(status(Path(opts.status)))
        return 0
    now = time.strftime("%Y%m%d-%H%M%S")
    job_dir = os.path.abspath(opts.job_dir.replace("%t", now))
    if (
        opts.check
    ):  # a job of its own: it is no run of this folder, and is made again whenever it is asked for
        main, rest, chain, opts.sweep, opts.only = "util.cluster.check", check_flags(main, rest), [], [], []
        job_dir = os.path.join(job_dir, f"check-{now}")
    points = plan(main, rest, opts.sweep, chain, job_dir)
    if opts.only:
        unknown = set(opts.only) - {p.name for p in points}
        if unknown:
            raise ValueError(
                f"--only {' '.join(sorted(unknown))}: no such point; there are {' '.join(p.name for p in points)}"
            )
        points = [p for p in points if p.name in opts.only]
    if opts.cluster == "slurm":
        slurm.check_shared(job_dir)
    if opts.dry_run:
        return show(points, opts, job_dir)
    write_plan(points, opts, rest, job_dir)
    say_stale(points)
    return {"slurm": to_slurm, "local": run_locally, "debug": run_here}[opts.cluster](points, opts, job_dir)


def say_stale(points: list[Point]) -> None:
    """Name the follow-ups that were done on an earlier state of their run: they are kept as they are."""
    for p in points:
        last, again = Path(p.folder, "checkpoint-last.pth"), not p.job().finished_before()
        for each in (each for each in p.then if each.job().finished_before() and last.exists()):
            if again or last.stat().st_mtime > Path(each.folder, "job.json").stat().st_mtime:
                print(
                    f"{each.folder}: done on an earlier checkpoint of the run; remove that folder to have it done anew"
                )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the block: launchers may start side by side in one folder.

    It does nothing on file systems without locks.
    """
    with open(path, "w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_plan(points: list[Point], opts, rest: list[str], job_dir: str) -> None:
    """sweep.json, and flags.json of each point, for --status and for plots."""
    if not any(p.name for p in points):
        return
    for p in points:
        os.makedirs(p.folder, exist_ok=True)
        Path(p.folder, "flags.json").write_text(json.dumps(p.flags))
    path = Path(job_dir, "sweep.json")
    new = [{"name": p.name, "flags": p.flags} for p in points]
    with locked(Path(job_dir, ".sweep.lock")):
        known = json.loads(path.read_text())["points"] if path.exists() else []
        kept = [k for k in known if k["name"] not in {n["name"] for n in new}]
        partial = path.with_suffix(
            ".partial"
        )  # a reader finds the old file or the new one, and never half of one
        partial.write_text(
            json.dumps(
                {
                    "main": points[0].main,
                    "flags": rest,
                    "sweep": parse_sweep(opts.sweep),
                    "points": kept + new,
                },
                indent=1,
            )
        )
        os.replace(partial, path)


def sbatch_options(points: list[Point], opts) -> dict:
    """The options of a job in submitit's names."""
    args = parse_main(points[0].main, points[0].argv)
    ngpus = 8 if opts.ngpus is None else opts.ngpus
    cpus = opts.cpus_per_task or getattr(args, "num_workers", 0) + 1
    extra = dict(word.partition("=")[::2] for word in opts.slurm)
    options = dict(
        job_name=points[0].main.removeprefix("main_").removeprefix("util.cluster."),
        time=opts.timeout,
        nodes=opts.nodes,
        ntasks_per_node=max(1, ngpus),
        gpus_per_node=ngpus or None,
        cpus_per_task=cpus,
        partition=opts.partition,
        qos=opts.qos,
        account=opts.account,
        constraint=opts.constraint,
        comment=opts.comment,
        mem=opts.mem_gb and f"{opts.mem_gb:g}GB",
        # Time for the slowest step, and for writing the checkpoint of a huge model.
        signal_delay_s=120,
        stderr_to_stdout=True,
        # Without it, ranks that are left alone hang until the time limit. srun does not take sbatch's cpus over by itself.
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
        setup=[f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"],
        array_parallelism=opts.max_parallel or len(points),
        additional_parameters={"requeue": True} | {k: v or True for k, v in extra.items()},
    )
    return {k: v for k, v in options.items() if v is not None}


def show(points: list[Point], opts, job_dir: str) -> int:
    """--dry_run: the script, and the flags of every run."""
    if opts.cluster == "slurm":
        print(
            slurm_executor(points, opts, job_dir, preview=True)._make_submission_file_text(
                "python -m submitit.core._submit " + shlex.quote(job_dir + "/submitit"), "preview"
            )
        )
    for p in points:
        for each in (p, *p.then):
            print(f"# {each.name or each.folder}\npython {each.main}.py {shlex.join(each.argv)}")
    return 0


def slurm_executor(points: list[Point], opts, job_dir: str, preview: bool = False):
    """submitit's executor with the job's options; a preview needs no SLURM on this machine."""
    import submitit

    class Preview(submitit.SlurmExecutor):
        affinity = classmethod(lambda cls: 1)

    executor = (Preview if preview else submitit.SlurmExecutor)(
        folder=os.path.join(job_dir, "submitit", "%j")
    )
    executor.update_parameters(**sbatch_options(points, opts))
    if preview and len(points) > 1:
        executor.parameters["map_count"] = len(points)
    return executor


def to_slurm(points: list[Point], opts, job_dir: str) -> int:
    """Submit what is neither done nor queued: one array, and the follow-ups behind their points."""
    submitted = job_ids(Path(job_dir))
    queued = queue(
        [ids[-1] for ids in submitted.values()], must=True
    )  # else what runs would be submitted again
    wanted = []
    for p in points:
        state = (
            "queued"
            if submitted.get(p.name, [""])[-1] in queued
            else p.job().finished_before() and "finished"
        )
        if state:
            print(f"{p.name or p.folder}: {state}, not submitted again")
        else:
            wanted.append(p)
    executor = slurm_executor(wanted or points, opts, job_dir)
    with slurm.refusals(), executor.batch():
        jobs = [executor.submit(p.job()) for p in wanted]
    for p, job in zip(wanted, jobs):
        submitted.setdefault(p.name, []).append(job.job_id)
        print(f"{p.name or p.folder}: job {job.job_id}, log {job.paths.stdout}")
    job_dir = job_dir.replace("%j", jobs[0].job_id) if jobs else job_dir
    note_jobs(Path(job_dir), submitted)
    for p in points:
        waiting = p not in wanted and submitted.get(p.name, [""])[-1] in queued
        for each in p.then:
            # What follows a job of now must be submitted anew: SLURM has cancelled it with the job that failed before.
            if p not in wanted and submitted.get(each.name, [""])[-1] in queued:
                print(f"{each.name}: queued, not submitted again")
            elif p not in wanted and not waiting and each.job().finished_before():
                print(f"{each.name}: finished, not submitted again")
            else:
                submit_after(
                    submitted[p.name][-1] if p in wanted or waiting else "", each, opts, job_dir, submitted
                )
    print(f"status: python {os.path.basename(sys.argv[0])} --status {job_dir}")
    return 0


def submit_after(before: str, p: Point, opts, job_dir: str, submitted: dict[str, list[str]]) -> None:
    """A follow-up in a job of its own, which starts once the job `before` has ended well ('': at once)."""
    executor = slurm_executor([p], opts, job_dir)
    if before:
        extra = executor.parameters["additional_parameters"] | {"kill-on-invalid-dep": "yes"}
        executor.update_parameters(dependency=f"afterok:{before}", additional_parameters=extra)
    with slurm.refusals():
        job = executor.submit(p.job())
    submitted.setdefault(p.name, []).append(job.job_id)
    note_jobs(Path(job_dir), submitted)  # at once: SLURM may refuse the next
    print(
        f"{p.name}: job {job.job_id}" + (f" after {before}" if before else "") + f", log {job.paths.stdout}"
    )


def note_jobs(folder: Path, submitted: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(submitted, indent=1))


def run_here(points: list[Point], opts, job_dir: str) -> int:
    """One after the other, in this process -> the first exit code that is not 0."""
    for p in points:
        for each in (p, *p.then):
            if each.job().finished_before():
                print(f"{each.folder}: finished, not run again")
                continue
            try:
                each.job()()
            except SystemExit as e:
                return e.code
    return 0


def run_locally(points: list[Point], opts, job_dir: str) -> int:
    """In processes on this machine, `max_parallel` runs at a time, each with GPUs of its own -> 1 if some failed."""
    import submitit
    import torch

    if opts.nodes > 1:
        raise ValueError(f"--nodes {opts.nodes}: --cluster local has one node, this machine")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ngpus = torch.cuda.device_count() if opts.ngpus is None else opts.ngpus
    executor = submitit.LocalExecutor(folder=os.path.join(job_dir, "submitit", "%j"))
    slots: list[tuple[Point, list[Point], submitit.Job] | None] = [None] * (opts.max_parallel or 1)
    waiting = [[p, *p.then] for p in points]  # each list runs in its order, and ends when one fails
    submitted, failed = job_ids(Path(job_dir)), 0

    def begin(slot: int, chain: list[Point]) -> None:
        while chain and chain[0].job().finished_before():
            print(f"{chain.pop(0).folder}: finished, not run again", flush=True)
        if not chain:
            return
        first, gpus = ngpus * slot, torch.cuda.device_count()
        executor.update_parameters(
            timeout_min=opts.timeout,
            tasks_per_node=max(1, ngpus),
            gpus_per_node=ngpus,
            stderr_to_stdout=True,
            visible_gpus=tuple((first + i) % max(1, gpus) for i in range(ngpus)),
        )
        job = executor.submit(chain[0].job())
        submitted.setdefault(chain[0].name, []).append(job.job_id)
        note_jobs(Path(job_dir), submitted)
        print(f"{chain[0].folder}: running, log {job.paths.stdout}", flush=True)
        slots[slot] = (chain[0], chain[1:], job)

    while waiting or any(slots):
        for i, busy in enumerate(slots):
            if busy is not None and busy[2].done():
                point, rest, job = busy
                slots[i], state = None, point.job().ended(job.job_id)
                print(f"{point.folder}: {state}", flush=True)
                failed += state != "finished"
                if state == "finished":
                    begin(i, rest)
            while slots[i] is None and waiting:
                begin(i, waiting.pop(0))
        time.sleep(0.2)
    return int(failed > 0)
