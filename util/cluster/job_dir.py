"""The files of a job directory: jobs.json, sweep.json and the flags.json of each point.

Damaged files are refused by name, and never overwritten: with jobs.json, the IDs of queued jobs would be
lost, and the runs would be submitted a second time.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from util.cluster.sweep import Point
from util.files.atomic import read_json, write_json
from util.report.runs import is_run_name, read_plan

# One launcher at a time changes jobs.json and sweep.json.
LOCK = ".sweep.lock"


def read_job_ids(folder: Path) -> dict[str, list[str]]:
    """Read the IDs of the jobs that were submitted for each run, in the order of submission.

    Raises ValueError, which names the file, if it is damaged.
    """
    path = folder / "jobs.json"
    try:
        job_ids = read_json(path, dict)
    except FileNotFoundError:
        return {}
    for run, jobs in job_ids.items():
        if not is_run_name(run) or not isinstance(jobs, list) or not all(map(_is_job_id, jobs)):
            raise ValueError(
                f"{path} does not list the IDs of jobs for its entry {run!r}: it is damaged, or the file of "
                "another program. Restore it, or remove it when none of its jobs is in the queue"
            )
    return {run: jobs for run, jobs in job_ids.items() if jobs}


def _is_job_id(job: object) -> bool:
    return isinstance(job, str) and re.fullmatch(r"\d+(_\d+)?", job) is not None


def is_local(folder: Path, job: str) -> bool:
    """Whether `cluster` local has started a job, which SLURM then does not know.

    submitit stores each job, and with a job of SLURM its sbatch script. Of an array only the first task has
    it, but such an ID has an underscore.
    """
    stored = folder / "submitit" / job / job
    is_stored = os.path.exists(f"{stored}_submitted.pkl")
    return is_stored and "_" not in job and not os.path.exists(f"{stored}_submission.sh")


def add_job_ids(folder: Path, new: Mapping[str, str]) -> None:
    """Append the ID of a new job to those of each run. Other launchers may do so at the same time.

    Raises ValueError, which names the file and the jobs, if jobs.json is damaged.
    """
    # A single run has no folder before its job starts.
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK):
        try:
            job_ids = read_job_ids(folder)
        except ValueError as error:
            raise ValueError(
                f"jobs {', '.join(new.values())} are submitted, but not noted: {error}"
            ) from None
        for run, job in new.items():
            job_ids.setdefault(run, []).append(job)
        write_json(folder / "jobs.json", job_ids)


def read_points(folder: Path) -> list[dict[str, Any]]:
    """Read the names and the flags of the points of a sweep, [] if there is no sweep.

    Raises ValueError, which names the file, if it is damaged.
    """
    return read_plan(folder).get("points", [])


def write_sweep(folder: Path, points: Sequence[Point], flags: list[str], swept: dict[str, list[str]]) -> None:
    """Write sweep.json. A job directory of a single run has none.

    Args:
        folder: the job directory.
        points: the points of this submission. Points of earlier submissions stay in the file.
        flags: the flags of the main that all points share.
        swept: the values of each swept flag.

    Raises ValueError, which names the file, if an earlier sweep.json is damaged.
    """
    if not any(point.name for point in points):
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Points of this submission replace those of the same name.
    new = [{"name": point.name, "flags": point.flags} for point in points]
    new_names = {point.name for point in points}
    with locked(folder / LOCK):
        earlier = [point for point in read_points(folder) if point["name"] not in new_names]
        content = {"main": points[0].main, "flags": flags, "sweep": swept, "points": earlier + new}
        write_json(folder / "sweep.json", content)


def write_flags(points: Sequence[Point]) -> None:
    """Make the folder of each point of a sweep, and write its flags.json for reports."""
    for point in points:
        if point.name:
            os.makedirs(point.folder, exist_ok=True)
            write_json(Path(point.folder, "flags.json"), point.flags)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the block: several launchers may start at once in one folder.

    It does nothing on Windows, and on file systems without locks.
    """
    with open(path, "w") as lock:
        # Windows does not have the module.
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        # Closing the file releases the lock.
        yield
