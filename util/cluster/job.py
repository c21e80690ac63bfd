"""A submitted job: the callable that runs a main on every rank, and the note of its state.

Nothing here imports torch before the job is called. submitit handles signals once it has loaded the job. If
the import of torch came first, a warning that arrives within those seconds would end the job for good instead
of requeueing it.
"""

import importlib
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.flags import ending
from util.flags.parser import Parser, describe, escape_undecodable_names

# Jobs import the mains from this checkout.
ROOT = Path(__file__).resolve().parents[2]
NOTE = "job.json"
# A main returns it if a signal has stopped the run and its state is saved (EX_TEMPFAIL of sysexits.h).
STOPPED = 75


@dataclass(frozen=True)
class Resources:
    """What a job asks of the cluster. None leaves the choice to the launcher or to the cluster."""

    nodes: int = 1
    ngpus: int | None = None  # per node, as many as processes; 0 is one process on the CPU
    timeout: int = 4320  # minutes until SLURM's warning
    cpus_per_task: int | None = None
    mem_gb: float | None = None  # per node
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    constraint: str | None = None
    comment: str | None = None
    # More options of sbatch. An empty value stands for an option without a value.
    sbatch: Mapping[str, str] = field(default_factory=dict)
    max_parallel: int | None = None  # runs at a time


class Job:
    """A main and its flags. submitit pickles the job and calls it on every rank, again after each requeue.

    `folder` is that of the run. Rank 0 keeps a note there, job.json: the state (running, finished, stopped or
    failed), the job ID and the number of starts. `%j` in the folder and in the flags stands for the job ID.
    """

    def __init__(self, main: str, argv: list[str], folder: str):
        self.main = main
        self.argv = argv
        self.folder = folder

    def __call__(self) -> int:
        """Run the main and return 0. A stopped run exits with STOPPED, a failed one raises its error.

        In a process of submitit, signals are ignored as soon as the run has finished or stopped. submitit
        would requeue a finished job for them, or one that has requeued itself.
        """
        from util import dist

        escape_undecodable_names()
        job_id = _join_ranks()
        os.environ |= dist.slurm_ranks(os.environ)
        self.folder = self.folder.replace("%j", job_id)
        self.argv = [word.replace("%j", job_id) for word in self.argv]
        is_main = os.environ.get("RANK", "0") == "0"
        if is_main:
            self._note_start(job_id)
        # A run within the launcher's process has no such variable. Others may follow it there.
        with ending.exit_follows("SUBMITIT_EXECUTOR" in os.environ):
            code = self._run_main()
        if code != 0:
            if is_main:
                self._note_state("stopped")
            # A return value would be the job's result, and submitit would not wait for the requeued job.
            sys.exit(code)
        if is_main:
            self._note_state("finished")
        return code

    def checkpoint(self, *args: Any) -> Any:
        """Return what submitit starts again if a warning comes before the training loop handles signals."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _run_main(self) -> int:
        known_flags: Collection[str] = ()
        try:
            module = importlib.import_module(self.main)
            parser = Parser(parents=[module.get_args_parser()], prog=self.main)
            flags = parser.parse_args(self.argv)
            known_flags = vars(flags)
            code = module.main(flags)
            if code not in (0, STOPPED):
                raise RuntimeError(f"{self.main} ended with exit code {code}")
            return code
        except BaseException as error:
            # The first of several failing ranks has the cause; the others often only lose their
            # connection to it.
            if read_note(self.folder).get("state") != "failed":
                message = f"{type(error).__name__}: {describe(error, known_flags)}"
                self._note_state("failed", message)
            raise

    def _note_start(self, job_id: str) -> None:
        starts = read_note(self.folder).get("starts", 0)
        note = {
            "state": "running",
            "main": self.main,
            "argv": self.argv,
            "job": job_id,
            "host": socket.gethostname(),
            "starts": starts + 1,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        write_note(self.folder, note)

    def _note_state(self, state: str, error: str | None = None) -> None:
        note = read_note(self.folder) | {"state": state}
        if error is not None:
            note["error"] = error
        write_note(self.folder, note)

    def final_state(self, job_id: str) -> str:
        """Return the state of a job that has ended: finished, stopped, failed, or lost if it left no note.

        A job that was killed could not note it. Its note is corrected to failed.
        """
        job = Job(self.main, self.argv, self.folder.replace("%j", job_id))
        if read_note(job.folder).get("state") == "running":
            job._note_state("failed", "the process ended without an error: killed, by hand or for its memory")
        return read_note(job.folder).get("state", "lost")

    def is_finished(self) -> bool:
        """Whether a job of this main with exactly these flags has finished in this folder."""
        note = read_note(self.folder)
        if note.get("state") != "finished":
            return False
        return (note["main"], note["argv"]) == (self.main, self.argv)


def _join_ranks() -> str:
    """Set the variables of torch.distributed from those of submitit, and return the job ID ("" without
    submitit).
    """
    job_id = os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return job_id
    # A run within this process has no such variable, and does not need submitit.
    import submitit

    if int(os.environ.get("SUBMITIT_LOCAL_NTASKS", 1)) > 1:
        # All processes of a node see all its GPUs, as under torchrun.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    return submitit.JobEnvironment().job_id


def read_note(folder: str | Path) -> dict[str, Any]:
    """Read the note of the job that runs or ran in a folder, {} if there is none."""
    try:
        return json.loads(Path(folder, NOTE).read_text())
    except FileNotFoundError:
        return {}


def write_note(folder: str | Path, note: Mapping[str, Any]) -> None:
    """Write the note of a job. A reader finds the old note or the new one, never a part."""
    os.makedirs(folder, exist_ok=True)
    # Several ranks may note a failure at the same time.
    partial = Path(folder, f"{NOTE}.{uuid.uuid4().hex}")
    partial.write_text(json.dumps(note, indent=1))
    os.replace(partial, Path(folder, NOTE))
