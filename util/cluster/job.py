"""A submitted job: the callable that runs a main on every rank, and the note of its state.

Nothing here imports torch before the job is called. submitit handles signals once it has loaded the job. If
the import of torch came first, a warning that arrives within those seconds would end the job for good instead
of requeueing it.
"""

import functools
import importlib
import os
import socket
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.files.atomic import read_json, write_json
from util.files.names import printable
from util.flags import early, ending
from util.flags.parser import Parser, describe, escape_undecodable_names, flag_names

# Jobs import the mains from this checkout.
ROOT = Path(__file__).resolve().parents[2]
NOTE = "job.json"
# What a note may hold, and of which type it is.
NOTED = {"state": str, "main": str, "argv": list, "job": str, "host": str, "starts": int, "error": str}
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
            known_flags = flag_names(flags)
            early.announce(flags)
            code = module.main(flags)
            if code not in (0, STOPPED):
                raise RuntimeError(f"{self.main} ended with exit code {code}")
            return code
        except BaseException as error:
            # The first of several failing ranks has the cause; the others often only lose their
            # connection to it.
            if known_note(self.folder).get("state") != "failed":
                message = f"{type(error).__name__}: {describe(error, known_flags)}"
                self._note_state("failed", message)
            raise

    def _note_start(self, job_id: str) -> None:
        starts = known_note(self.folder).get("starts", 0)
        note = {
            "state": "running",
            "main": self.main,
            "argv": self.argv,
            "job": job_id,
            "host": socket.gethostname(),
            "starts": starts + 1,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._write_note(note)

    def _note_state(self, state: str, error: str | None = None) -> None:
        note = known_note(self.folder) | {"state": state}
        if error is not None:
            note["error"] = error
        self._write_note(note)

    def _write_note(self, note: Mapping[str, Any]) -> None:
        try:
            write_note(self.folder, note)
        except OSError as error:
            # A full disk, for example. It must not hide how the run went.
            print(printable(f"the state of the run is not noted: {error}"), file=sys.stderr, flush=True)

    def final_state(self, job_id: str) -> str:
        """Return the state of a job that has ended: finished, stopped, failed, or lost if it left no note.

        A job that was killed could not note it. Its note is corrected to failed.
        """
        job = Job(self.main, self.argv, self.folder.replace("%j", job_id))
        if known_note(job.folder).get("state") == "running":
            job._note_state("failed", "the process ended without an error: killed, by hand or for its memory")
        return known_note(job.folder).get("state", "lost")

    def is_finished(self) -> bool:
        """Whether a job of this main with exactly these flags has finished in this folder."""
        note = known_note(self.folder)
        if note.get("state") != "finished":
            return False
        argv = [word.replace("%j", note.get("job", "")) for word in self.argv]
        return (note.get("main"), note.get("argv")) == (self.main, argv)


def _join_ranks() -> str:
    """Set the variables of torch.distributed from those of submitit, and return the job ID.

    Without submitit, the process ID stands for it, as in local runs.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return os.environ.get("SUBMITIT_LOCAL_JOB_ID") or str(os.getpid())
    # A run within this process has no such variable, and does not need submitit.
    import submitit

    if int(os.environ.get("SUBMITIT_LOCAL_NTASKS", 1)) > 1:
        # All processes of a node see all its GPUs, as under torchrun.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    return submitit.JobEnvironment().job_id


def read_note(folder: str | Path) -> dict[str, Any]:
    """Read the note of the job that runs or ran in a folder, {} if there is none.

    Raises ValueError, which names the file, if it is damaged.
    """
    path = Path(folder, NOTE)
    try:
        note = read_json(path, dict)
    except FileNotFoundError:
        return {}
    for name, kind in NOTED.items():
        if name in note and not isinstance(note[name], kind):
            raise ValueError(
                f"{path} is damaged: its `{name}` is a {type(note[name]).__name__}, not a {kind.__name__}. "
                "Restore it, or remove it"
            )
    return note


def known_note(folder: str | Path) -> dict[str, Any]:
    """Read a note as `read_note` does. A damaged one counts as none, and the reason is printed once.

    A run that has finished already ends at once when it is started again, and replaces the note.
    """
    try:
        return read_note(folder)
    except (ValueError, OSError) as error:
        _warn(f"{error}; without it, the run counts as not finished")
        return {}


@functools.cache
def _warn(message: str) -> None:
    print(printable(message), file=sys.stderr, flush=True)


def write_note(folder: str | Path, note: Mapping[str, Any]) -> None:
    """Write the note of a job. Several ranks may note a failure at the same time."""
    os.makedirs(folder, exist_ok=True)
    write_json(Path(folder, NOTE), note)
