"""What has become of submitted runs: their notes, their logs, and what SLURM says."""

import contextlib
import json
from pathlib import Path

from util.cluster.job import read_note
from util.cluster.slurm import ask

SHOWN = ("train_loss", "train_pixel", "train_position", "test_position", "test_acc1", "knn20_cls")


def job_ids(job_dir: Path) -> dict[str, list[str]]:
    """Run -> the jobs submitted for it, in their order."""
    path = job_dir / "jobs.json"
    return json.loads(path.read_text()) if path.exists() else {}


def last_line(folder: Path) -> dict:
    """The last epoch's line of log.txt, {} before there is one. A line that is being written, or was cut off, is none."""
    path = folder / "log.txt"
    for line in reversed(path.read_text().splitlines() if path.exists() else []):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(line)
    return {}


def queue(ids: list[str], must: bool = False) -> dict[str, str]:
    """Job -> SLURM's state of it, for those that it has not ended yet; with `must` a ValueError where SLURM does not say."""
    lines = ask("squeue", "-h", "-r", "-o", "%i %T", "--me", must=must).splitlines() if ids else []
    return {k: v for k, v in map(str.split, lines) if k in set(ids)}


def ended(ids: list[str]) -> dict[str, str]:
    """Job -> how it ended, as accounting has it."""
    text = ask("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(ids)) if ids else ""
    return dict(line.split("|", 1) for line in text.splitlines())


def state_of(note: dict, queued: str, end: str) -> str:
    """One word for a run: its own note where it says how it ended, else SLURM's."""
    if queued and queued != "PENDING" and note.get("state") in ("finished", "failed"):
        return note["state"]  # SLURM is still tidying up
    if queued:
        return (
            queued.lower()
            if queued != "PENDING" or not note
            else "requeued"
            if note["state"] != "finished"
            else "pending"
        )
    if note.get("state") in ("finished", "failed", "stopped"):
        return note["state"]
    if end:
        return end.split()[0].lower()
    return note.get("state", "not submitted")


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def run_names(job_dir: Path) -> list[str]:
    """All runs of a job directory, '' for its own: points, then what follows each."""
    plan = job_dir / "sweep.json"
    points = [p["name"] for p in json.loads(plan.read_text())["points"]] if plan.exists() else []
    submitted = list(job_ids(job_dir))
    if not points and (not submitted or "" in submitted or (job_dir / "job.json").exists()):
        points = [""]
    follow = {name: [s for s in submitted if s != name and Path(s).parent == Path(name)] for name in points}
    return [n for name in points for n in [name, *follow[name]]]


def status(job_dir: Path) -> str:
    """A table of a job directory's runs. Raises ValueError where nothing was submitted."""
    if not any((job_dir / name).exists() for name in ("jobs.json", "sweep.json", "job.json")):
        raise ValueError(f"{job_dir} is no job directory: nothing was submitted there (no jobs.json)")
    submitted = job_ids(job_dir)
    latest = {name: ids[-1] for name, ids in submitted.items() if ids}
    queued = queue(list(latest.values()))
    ends = ended([i for i in latest.values() if i not in queued])
    rows = [["run", "state", "epoch", "last figures", "starts", "job", "folder or error"]]
    for name in run_names(job_dir):
        folder = job_dir / name
        note, line, job = read_note(str(folder)), last_line(folder), latest.get(name, "")
        job = job or note.get("job", "")
        stale = job in queued and note.get("job") != job  # of an earlier job: this one has not begun
        state = state_of({} if stale else note, queued.get(job, ""), ends.get(job, ""))
        epoch = str(line["epoch"] + 1) if "epoch" in line else "-"
        figures = "  ".join(f"{k.removeprefix('train_')} {line[k]:.4g}" for k in SHOWN if k in line)
        rows.append(
            [
                name or ".",
                state,
                epoch,
                figures,
                str(note.get("starts", 0)),
                job,
                note["error"].splitlines()[0][:300]
                if state == "failed" and note.get("error")
                else str(folder),
            ]
        )
    return table(rows)
