"""The files of a job directory: jobs.json, sweep.json and the flags.json of each point."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from util.cluster.sweep import Point


def read_job_ids(folder: Path) -> dict[str, list[str]]:
    """Read the IDs of the jobs that were submitted for each run, in the order of submission."""
    path = folder / "jobs.json"
    if not path.exists():
        return {}
    return json.loads(path.read_text())


def write_job_ids(folder: Path, job_ids: dict[str, list[str]]) -> None:
    """Write the IDs of the jobs that were submitted for each run."""
    # A single run has no folder before its job starts.
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(job_ids, indent=1))


def read_points(folder: Path) -> list[dict[str, Any]]:
    """Read the names and the flags of the points of a sweep, [] if there is no sweep."""
    path = folder / "sweep.json"
    if not path.exists():
        return []
    return json.loads(path.read_text())["points"]


def write_sweep(folder: Path, points: Sequence[Point], flags: list[str], swept: dict[str, list[str]]) -> None:
    """Write sweep.json, and flags.json of each point. A job directory of a single run has neither.

    Args:
        folder: the job directory.
        points: the points of this submission. Points of earlier submissions stay in the file.
        flags: the flags of the main that all points share.
        swept: the values of each swept flag.
    """
    if not any(point.name for point in points):
        return
    for point in points:
        os.makedirs(point.folder, exist_ok=True)
        Path(point.folder, "flags.json").write_text(json.dumps(point.flags))
    # Points of this submission replace those of the same name.
    new = [{"name": point.name, "flags": point.flags} for point in points]
    new_names = {point.name for point in points}
    path = folder / "sweep.json"
    with locked(folder / ".sweep.lock"):
        earlier = [point for point in read_points(folder) if point["name"] not in new_names]
        content = {"main": points[0].main, "flags": flags, "sweep": swept, "points": earlier + new}
        # A reader finds the old file or the new one, never a part.
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1))
        os.replace(partial, path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the block: several launchers may start at once in one folder.

    It does nothing on file systems without locks.
    """
    with open(path, "w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Closing the file releases the lock.
        yield
