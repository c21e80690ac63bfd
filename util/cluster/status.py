"""The state of submitted runs, from their notes, their logs and SLURM."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from util.cluster.job import NOTE, read_note
from util.cluster.job_dir import is_local, read_job_ids, read_points
from util.cluster.slurm import query
from util.files.names import printable
from util.report.runs import Report, log_lines
from util.report.tables import Table

T = TypeVar("T")

HEADER = ["run", "state", "epoch", "last figures", "starts", "job", "folder or error"]
# The figures of log.txt that the table shows, if a run has them.
FIGURES = ("train_loss", "train_pixel", "train_position", "test_position", "test_acc1", "knn20_cls")
# An error message must not push the other columns off the screen.
ERROR_COLUMNS = 300
# Of a run that may still succeed. Its follow-ups wait for it.
HOPEFUL = (
    "finished",
    "pending",
    "requeued",
    "running",
    "completing",
    "configuring",
    "suspended",
    "preempted",
)


@dataclass(frozen=True)
class SlurmStates:
    """SLURM's view of some jobs: the state of those in the queue, and the final state of the others.

    `answers` says whether SLURM has answered: only then has a job that is not in the queue ended.
    """

    queued: Mapping[str, str]
    ended: Mapping[str, str]
    answers: bool = True


@dataclass
class JobDir:
    """A job directory as far as it can be read: its runs, their jobs, and what is damaged."""

    folder: Path
    job_ids: dict[str, list[str]] = field(default_factory=dict)
    points: list[str] = field(default_factory=list)  # names
    damage: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "JobDir":
        """Read the directory. Damaged files are noted in `damage`."""
        directory = cls(folder)
        directory.job_ids = directory.spared(lambda: read_job_ids(folder), {})
        no_points: list[dict[str, Any]] = []
        points = directory.spared(lambda: read_points(folder), no_points)
        directory.points = [point["name"] for point in points]
        return directory

    def spared(self, read: Callable[[], T], default: T) -> T:
        """Return what `read` returns, or the default if a file is damaged, which is noted."""
        try:
            return read()
        except (ValueError, OSError) as error:
            self.damage.append(str(error))
            return default

    def runs(self) -> list[str]:
        """Return the names of all runs: each point, then its follow-ups. The name of a single run is ""."""
        points = list(self.points)
        # A sweep may share its folder with a single run, whose note then lies there as well.
        single = not self.job_ids or "" in self.job_ids or (self.folder / NOTE).exists()
        if not points and self.damage:
            points = self._noted("")
        if not points and single:
            points = [""]
        names = []
        for point in points:
            follow_ups = [run for run in self.job_ids if run != point and Path(run).parent == Path(point)]
            if self.damage:
                follow_ups += [run for run in self._noted(point) if run not in (*points, *follow_ups)]
            names += [point, *follow_ups]
        return names

    def _noted(self, run: str) -> list[str]:
        """The runs below a run whose jobs have left a note, for damaged lists of runs."""
        return sorted(
            str(path.parent.relative_to(self.folder)) for path in (self.folder / run).glob(f"*/{NOTE}")
        )


def last_line(folder: Path, report: Report = lambda message: None) -> dict[str, Any]:
    """Read the last complete line of log.txt, {} before there is one. Damage goes to `report`."""
    path = folder / "log.txt"
    if not path.is_file():
        return {}
    # The last line may be incomplete: it is being written, or the run was killed.
    lines = log_lines(str(path), report)
    if not lines:
        return {}
    return lines[-1]


def queue(job_ids: Sequence[str], required: bool = False) -> dict[str, str]:
    """Return SLURM's state of those jobs that have not ended.

    Raises ValueError if SLURM does not answer and the answer is `required`.
    """
    if not job_ids:
        return {}
    lines = query("squeue", "-h", "-r", "-o", "%i %T", "--me", required=required).splitlines()
    states = dict(line.split() for line in lines if len(line.split()) == 2)
    # squeue lists all jobs of the user.
    return {job: states[job] for job in job_ids if job in states}


def final_states(job_ids: Sequence[str]) -> dict[str, str]:
    """Return the state in which jobs have ended, as SLURM's accounting has it."""
    if not job_ids:
        return {}
    # -X leaves out the steps of a job.
    text = query("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(job_ids))
    return dict(line.split("|", 1) for line in text.splitlines() if "|" in line)


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
    if ended.strip():
        # sacct says who cancelled a job: "CANCELLED by 0".
        return ended.split()[0].lower()
    return noted or "not submitted"


def _row(directory: JobDir, run: str, slurm: SlurmStates, states: dict[str, str]) -> list[str]:
    """Make the row of a run for `status`. Its state is added to `states`, for its follow-ups."""
    folder = directory.folder / run
    damage: list[str] = []
    no_line: dict[str, Any] = {}
    line = directory.spared(lambda: last_line(folder, damage.append), no_line)
    directory.damage += damage
    jobs = directory.job_ids.get(run, [])
    place = str(folder)
    try:
        note = read_note(folder)
    except (ValueError, OSError) as error:
        place = str(error)
        note = {}
        states[run] = "damaged"
    job = ([note.get("job", ""), *jobs])[-1]
    if run not in states:
        parent = ""
        if run not in directory.points:
            parent = states.get(str(Path(run).parent).removeprefix("."), "")
        states[run] = _state(note, jobs, slurm, parent)
    epoch = "-"
    if line:
        epoch = str(line["epoch"] + 1)
    figures = [f"{name.removeprefix('train_')} {line[name]:.4g}" for name in FIGURES if name in line]
    if states[run] == "failed" and note.get("error"):
        place = note["error"].splitlines()[0][:ERROR_COLUMNS]
    return [run or ".", states[run], epoch, "  ".join(figures), str(note.get("starts", 0)), job, place]


def _state(note: Mapping[str, Any], jobs: Sequence[str], slurm: SlurmStates, parent: str) -> str:
    """Return the state of a run in one word.

    Args:
        note: the note in its folder, {} if there is none.
        jobs: the IDs of its jobs, in the order of submission.
        slurm: SLURM's view of the latest one.
        parent: the state of the run that it follows, "" if there is none.
    """
    job = ""
    if jobs:
        job = jobs[-1]
    # A job that has not started leaves the note of an earlier job in place.
    if note.get("job") != job and (job in slurm.queued or note.get("job") in jobs):
        note = {}
    state = state_of(note, slurm.queued.get(job, ""), slurm.ended.get(job, ""))
    if state != "not submitted" or not job:
        return state
    # The job left the queue without a note, and accounting does not say why.
    if parent and parent not in (*HOPEFUL, "unknown") and slurm.answers:
        return "cancelled"
    return "unknown"


def status(job_dir: Path) -> str:
    """Make a table of the runs of a job directory, and name its damaged files below.

    Raises ValueError if nothing was submitted there.
    """
    if not any((job_dir / name).exists() for name in ("jobs.json", "sweep.json", NOTE)):
        hint = ""
        if "%j" in str(job_dir):
            hint = ". Write the ID of a job for %j"
        raise ValueError(
            f"{printable(job_dir)} is not a job directory: nothing was submitted there (no jobs.json){hint}"
        )
    directory = JobDir.read(job_dir)
    # Earlier jobs of a run have ended.
    latest = [jobs[-1] for jobs in directory.job_ids.values() if not is_local(job_dir, jobs[-1])]
    queued = directory.spared(lambda: queue(latest, required=True), None)
    answers = queued is not None and shutil.which("squeue") is not None
    queued = queued or {}
    ended = final_states([job for job in latest if job not in queued])
    slurm = SlurmStates(queued, ended, answers)
    states: dict[str, str] = {}
    rows = [_row(directory, run, slurm, states) for run in directory.runs()]
    lines = [Table(HEADER, rows).text()]
    return "\n".join(lines + [f"warning: {printable(message)}" for message in directory.damage])
