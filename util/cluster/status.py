"""The state of submitted runs, from their notes, their logs and SLURM."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.cluster.job import read_note
from util.cluster.job_dir import read_job_ids, read_points
from util.cluster.slurm import query
from util.report.tables import Table

HEADER = ["run", "state", "epoch", "last figures", "starts", "job", "folder or error"]
# The figures of log.txt that the table shows, if a run has them.
FIGURES = ("train_loss", "train_pixel", "train_position", "test_position", "test_acc1", "knn20_cls")
# An error message must not push the other columns off the screen.
ERROR_COLUMNS = 300


@dataclass(frozen=True)
class SlurmStates:
    """SLURM's view of some jobs: the state of those in the queue, and the final state of the others."""

    queued: Mapping[str, str]
    ended: Mapping[str, str]


def last_line(folder: Path) -> dict[str, Any]:
    """Read the last complete line of log.txt, {} before there is one."""
    path = folder / "log.txt"
    if not path.exists():
        return {}
    for line in reversed(path.read_text().splitlines()):
        # The last line may be incomplete: it is being written, or the run was killed.
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(line)
    return {}


def queue(job_ids: Sequence[str], required: bool = False) -> dict[str, str]:
    """Return SLURM's state of those jobs that have not ended.

    Raises ValueError if SLURM does not answer and the answer is `required`.
    """
    if not job_ids:
        return {}
    lines = query("squeue", "-h", "-r", "-o", "%i %T", "--me", required=required).splitlines()
    states = dict(line.split() for line in lines)
    # squeue lists all jobs of the user.
    return {job: states[job] for job in job_ids if job in states}


def final_states(job_ids: Sequence[str]) -> dict[str, str]:
    """Return the state in which jobs have ended, as SLURM's accounting has it."""
    if not job_ids:
        return {}
    # -X leaves out the steps of a job.
    text = query("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(job_ids))
    return dict(line.split("|", 1) for line in text.splitlines())


def state_of(note: Mapping[str, Any], queued: str, ended: str) -> str:
    """Return the state of a run in one word.

    Args:
        note: the note of its job, {} if there is none.
        queued: SLURM's state of the job while it is in the queue, else "".
        ended: SLURM's state of the job after its end, or "" if it is unknown.
    """
    noted = note.get("state", "")
    if queued == "PENDING":
        # A note of a pending job was written before the job was requeued.
        if noted and noted != "finished":
            return "requeued"
        return "pending"
    if queued:
        # SLURM takes a moment to clean up after a job that is done.
        if noted in ("finished", "failed"):
            return noted
        return queued.lower()
    if noted in ("finished", "failed", "stopped"):
        return noted
    if ended:
        # sacct says who cancelled a job: "CANCELLED by 0".
        return ended.split()[0].lower()
    return noted or "not submitted"


def run_names(job_dir: Path) -> list[str]:
    """Return the names of all runs of a job directory: each point, then its follow-ups.

    The name of a single run is "".
    """
    points = [point["name"] for point in read_points(job_dir)]
    submitted = list(read_job_ids(job_dir))
    # A sweep may share its folder with a single run, whose note then lies there as well.
    single = not submitted or "" in submitted or (job_dir / "job.json").exists()
    if not points and single:
        points = [""]
    names = []
    for point in points:
        follow_ups = [run for run in submitted if run != point and Path(run).parent == Path(point)]
        names += [point, *follow_ups]
    return names


def _row(job_dir: Path, run: str, job: str, slurm: SlurmStates) -> list[str]:
    """Make the row of a run for `status`. `job` is the ID of its latest job, "" if none was submitted."""
    folder = job_dir / run
    note = read_note(folder)
    line = last_line(folder)
    job = job or note.get("job", "")
    current = note
    # A job in the queue that has not started leaves the note of an earlier job in place.
    if job in slurm.queued and note.get("job") != job:
        current = {}
    state = state_of(current, slurm.queued.get(job, ""), slurm.ended.get(job, ""))
    epoch = "-"
    if "epoch" in line:
        epoch = str(line["epoch"] + 1)
    figures = [f"{name.removeprefix('train_')} {line[name]:.4g}" for name in FIGURES if name in line]
    place = str(folder)
    if state == "failed" and note.get("error"):
        place = note["error"].splitlines()[0][:ERROR_COLUMNS]
    return [run or ".", state, epoch, "  ".join(figures), str(note.get("starts", 0)), job, place]


def status(job_dir: Path) -> str:
    """Make a table of the runs of a job directory. Raises ValueError if nothing was submitted there."""
    if not any((job_dir / name).exists() for name in ("jobs.json", "sweep.json", "job.json")):
        raise ValueError(f"{job_dir} is not a job directory: nothing was submitted there (no jobs.json)")
    # Run -> its latest job; earlier ones have ended.
    latest = {run: jobs[-1] for run, jobs in read_job_ids(job_dir).items() if jobs}
    queued = queue(list(latest.values()))
    ended = final_states([job for job in latest.values() if job not in queued])
    slurm = SlurmStates(queued, ended)
    rows = [_row(job_dir, run, latest.get(run, ""), slurm) for run in run_names(job_dir)]
    return Table(HEADER, rows).text()
