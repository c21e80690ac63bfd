"""Living under SLURM: requeueing a job that stops or hangs, outliving a lost node, and a check of the cluster.

srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python -m util.cluster.check --output_dir DIR --data_path DIR
"""

import contextlib
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator

import torch

from util import dist


def job_id(environ=os.environ) -> str:
    """This job as `scontrol` and `squeue` name it, '' outside of SLURM: 12, or 12_3 for a task of an array.

    A task's own number will not do: that of an array's last task is also the name of the whole array.
    """
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def ask(*command: str, must: bool = False) -> str:
    """Output of a SLURM command, '' where it is not installed or fails; with `must` a failure is a ValueError."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and must:
        raise ValueError(f"SLURM does not answer {command[0]} ({done.stderr.strip()}): try again")
    return done.stdout.strip() if done.returncode == 0 else ""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What sbatch refuses becomes a ValueError with its words."""
    from submitit.core.utils import FailedJobError

    try:
        yield
    except FailedJobError as e:
        raise ValueError(f"SLURM refuses the job: {' '.join(str(e).split())}") from e


def check_shared(job_dir: str) -> None:
    """ValueError if the nodes of a cluster cannot share `job_dir` because it lies in this machine's memory."""
    if not os.path.exists("/proc/mounts"):
        return
    with open("/proc/mounts") as f:
        mounts = [(line.split()[1], line.split()[2]) for line in f]
    inside = [m for m in mounts if os.path.commonpath([m[0], os.path.realpath(job_dir)]) == m[0]]
    where, kind = max(inside, key=lambda m: len(m[0]), default=("", ""))
    if kind in ("tmpfs", "ramfs"):
        raise ValueError(
            f"--job_dir {job_dir} lies in this machine's memory ({kind} at {where}), which no node sees: choose a "
            "folder that all nodes mount"
        )


def requeue(tries: int = 5) -> None:
    """Have this job start again, if it is a SLURM job that SLURM itself considers running.

    Then it was warned of its time limit or of preemption. A job that is being cancelled, or requeued already, is left
    alone; so is one that was submitted with --no-requeue, by SLURM itself. A busy controller leaves requests unanswered
    ("Socket timed out"), so they are made up to `tries` times, for half a minute of the two that the warning leaves.
    """
    job = job_id()
    if not job:
        return
    for i in range(tries):
        time.sleep(2**i if i else 0)
        state = ask("squeue", "-h", "-j", job, "-o", "%T")
        why = f"job {job} is {state or 'unknown to squeue here'}: not requeued by itself"
        if state == "RUNNING":
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
            # The requeue may end scontrol too, with everything else in the job, and that is no failure.
            if done.returncode <= 0:
                why = f"job {job} is requeued and goes on from here"
                break
            why = f"scontrol requeue {job}: {done.stderr.strip()}; submit the same command again to go on"
        elif state or shutil.which("squeue") is None:
            break
    print(why, flush=True)


def time_left(job: str) -> float | None:
    """Seconds until SLURM ends the job; None where it does not say, or never will."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", ask("squeue", "-h", "-j", job, "-o", "%L"))
    if found is None:
        return None
    days, hours, minutes, seconds = (int(x or 0) for x in found.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def requeue_at_the_limit(left: threading.Event, margin: float = 30) -> None:
    """Have a job that hangs start again from its last save, `margin` seconds before its time limit would end it for good.

    Of a long evaluation nobody can tell that it does not hang, and it has lost its job as well. Rank 0 asks, until the
    event says that it has stopped by itself.
    """
    while dist.is_main() and job_id() and not left.wait(3):
        seconds = time_left(job_id())
        if seconds is not None and seconds <= margin:
            requeue()
            return


@contextlib.contextmanager
def lost_peers(stop: dist.StopSignal, minutes: float = 10) -> Iterator[None]:
    """Within it, a rank whose connection to another one breaks waits for SLURM's verdict instead of failing at once.

    If the other node has died, SLURM notices after its SlurmdTimeout and requeues the job, but not if the job has failed
    before. If only a process has died there, `srun --kill-on-bad-exit` ends this one too.
    """
    try:
        yield
    except RuntimeError as e:
        broken = (
            isinstance(e, torch.distributed.DistBackendError)
            or "closed by peer" in str(e)
            or "reset by peer" in str(e)
        )
        if broken and int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) > 1:
            print(
                f"rank {dist.rank()} has lost its connection ({str(e).splitlines()[0]}): waiting up to {minutes:g} minutes "
                "for SLURM to end or to requeue this job",
                flush=True,
            )
            end = time.monotonic() + 60 * minutes
            while time.monotonic() < end and stop.received is None:
                time.sleep(1)
        raise
