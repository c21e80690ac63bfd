"""Life of a job under SLURM: requeueing it when it stops or hangs, and waiting when it loses a node."""

import contextlib
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

# torch and util.dist are imported inside of the functions that a job calls: submitting needs neither.
if TYPE_CHECKING:
    from util import dist


def job_id(environ: Mapping[str, str] = os.environ) -> str:
    """Return the ID of this job, "" outside of SLURM: 12, or 12_3 for a task of an array.

    The number in SLURM_JOB_ID is not enough: for the last task of an array it also names the whole array.
    """
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def query(*command: str, required: bool = False) -> str:
    """Run a SLURM command and return its output, "" if it is not installed or fails.

    Raises ValueError if it is installed and fails, and the answer is `required`.
    """
    # Local runs, and their status, need no SLURM.
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    if required:
        # The last line of several has the cause.
        reason = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"SLURM does not answer {command[0]} ({reason}): try again")
    return ""


@contextlib.contextmanager
def submission_errors() -> Iterator[None]:
    """Turn a refusal of sbatch into a ValueError with its message."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        yield
    # The latter if submitit does not find a job ID in what sbatch prints.
    except (FailedJobError, FailedSubmissionError) as error:
        lines = (line.removeprefix("sbatch: error: ").strip() for line in str(error).splitlines())
        message = "; ".join(filter(None, lines))
        raise ValueError(f"SLURM refuses the job: {message}") from error


def check_shared(job_dir: str) -> None:
    """Raise ValueError if `job_dir` lies in the memory of this machine, which other nodes cannot see."""
    # Linux only. Elsewhere nothing is checked.
    if not os.path.exists("/proc/mounts"):
        return
    with open("/proc/mounts") as f:
        mounts = [tuple(line.split()[1:3]) for line in f]
    path = os.path.realpath(job_dir)
    around = [(place, kind) for place, kind in mounts if os.path.commonpath([place, path]) == place]
    # The deepest mount point around the folder is its file system.
    place, kind = max(around, key=lambda mount: len(mount[0]), default=("", ""))
    if kind in ("tmpfs", "ramfs"):
        raise ValueError(
            f"`job_dir` {job_dir} lies in the memory of this machine ({kind} at {place}), which other nodes "
            "cannot see: choose a folder that all nodes mount"
        )


def requeue(tries: int = 5) -> None:
    """Requeue this job if SLURM considers it running, and print what was done. Outside of SLURM do nothing.

    A running job was warned of its time limit or of preemption. A job that is being cancelled, or that is
    requeued already, is left alone. SLURM itself refuses a job that was submitted with --no-requeue.

    A busy controller does not answer ("Socket timed out"). The request is therefore made up to `tries` times,
    for half a minute of the two minutes that the warning leaves.
    """
    job = job_id()
    if not job:
        return
    result = ""
    for attempt in range(tries):
        # 2, 4, 8 and 16 seconds: half a minute in all.
        if attempt:
            time.sleep(2**attempt)
        # %T is the full name of the state.
        state = query("squeue", "-h", "-j", job, "-o", "%T")
        if state != "RUNNING":
            result = f"job {job} does not requeue itself: its state is {state or 'unknown to squeue'}"
            # An empty state may be a controller that is busy; any other state is an answer.
            if state or shutil.which("squeue") is None:
                break
            continue
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        # SLURM may kill scontrol together with the job (a negative code), and that is not a failure.
        if done.returncode <= 0:
            result = f"job {job} is requeued and continues from here"
            break
        result = f"scontrol requeue {job}: {done.stderr.strip()}; submit the same command again to continue"
    print(result, flush=True)


def time_left(job: str) -> float | None:
    """Return the seconds until SLURM ends a job, or None if there is no limit or no answer."""
    answer = query("squeue", "-h", "-j", job, "-o", "%L")
    # [days-][hours:]minutes:seconds
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", answer)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()


def requeue_at_the_limit(left: threading.Event, margin: float = 30) -> None:
    """Requeue a job that hangs, `margin` seconds before its time limit. It then starts from its last save.

    A run that does not stop within seconds of a warning hangs, or is in a long evaluation. Either way the
    time limit would end the job for good. Rank 0 polls SLURM until then, or until the run has stopped by
    itself, which sets `left`.
    """
    from util import dist

    # Three seconds between queries do not burden the controller, and are short against the margin.
    while dist.is_main() and job_id() and not left.wait(3):
        seconds = time_left(job_id())
        if seconds is not None and seconds <= margin:
            requeue()
            return


def _is_lost_connection(error: RuntimeError) -> bool:
    import torch

    if isinstance(error, torch.distributed.DistBackendError):
        return True
    # gloo raises a plain RuntimeError.
    message = str(error)
    return "closed by peer" in message or "reset by peer" in message


@contextlib.contextmanager
def lost_peers(stop: "dist.StopSignal", minutes: float = 10) -> Iterator[None]:
    """Delay the failure of a rank that has lost its connection to another one until SLURM has decided.

    If the other node has died, SLURM notices it after its SlurmdTimeout and requeues the job, but
    only if the job has not failed before. If only a process has died there, `srun --kill-on-bad-exit`
    ends this process too.
    """
    try:
        yield
    except RuntimeError as error:
        # On a single node no other node can be lost.
        several_nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) > 1
        if several_nodes and _is_lost_connection(error):
            from util import dist

            cause = str(error).splitlines()[0]
            print(
                f"rank {dist.rank()} has lost its connection ({cause}): waiting up to {minutes:g} minutes "
                "for SLURM to end or to requeue this job",
                flush=True,
            )
            end = time.monotonic() + 60 * minutes
            # SLURM sends a signal when it ends or requeues the job, which sets `received`.
            while time.monotonic() < end and stop.received is None:
                time.sleep(1)
        raise
