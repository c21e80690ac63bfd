"""What runs on every rank of a submitted job: a main with its flags, and a note of how it went.

Nothing here imports torch before the job is called. submitit listens to signals once it has loaded the job: a warning
that comes before, in the seconds that torch takes, would end the job for good instead of requeueing it.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
import uuid
from pathlib import Path

from util.flags.parser import Parser, escape_undecodable_names

NOTE = "job.json"


class Job:
    """A main and its flags; submitit pickles it, and calls it on every rank, again after each requeue.

    `folder` is the run's own: rank 0 notes there, in job.json, the state (running, finished, stopped, failed), the job's
    number and how often it was started. `%j` in the folder and the flags is the job's number.
    """

    def __init__(self, main: str, argv: list[str], folder: str):
        self.main, self.argv, self.folder = main, argv, folder

    def __call__(self) -> int:
        from util import dist

        escape_undecodable_names()
        number = os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")
        if "SUBMITIT_EXECUTOR" in os.environ:
            import submitit

            number = submitit.JobEnvironment().job_id
        if int(os.environ.get("SUBMITIT_LOCAL_NTASKS", 1)) > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        os.environ |= dist.slurm_ranks(os.environ)
        self.folder = self.folder.replace("%j", number)
        self.argv = [word.replace("%j", number) for word in self.argv]
        is_main = os.environ.get("RANK", "0") == "0"
        if is_main:
            old = read_note(self.folder)
            self.note(
                state="running",
                main=self.main,
                argv=self.argv,
                job=number,
                host=socket.gethostname(),
                starts=old.get("starts", 0) + 1,
                since=time.strftime("%Y-%m-%d %H:%M:%S"),
            )
        try:
            module = importlib.import_module(self.main)
            args = Parser(parents=[module.get_args_parser()], prog=self.main).parse_args(self.argv)
            code = module.main(args)
            if code not in (0, 75):
                raise RuntimeError(f"{self.main} ended with {code}")
        except BaseException as e:
            # Of several ranks that fail, the first tells why; the others often only miss it.
            if read_note(self.folder).get("state") != "failed":
                self.note(**read_note(self.folder) | {"state": "failed", "error": f"{type(e).__name__}: {e}"})
            raise
        if is_main:
            self.note(**read_note(self.folder) | {"state": "finished" if code == 0 else "stopped"})
        if code != 0:
            sys.exit(code)  # no result: submitit waits for the requeued job's
        if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            # The run is done. Without this a warning of the time limit that comes while Python shuts down, when handlers
            # are gone, kills the process, and SLURM calls the job failed.
            for warning in (signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(warning, signal.SIG_IGN)
        return code

    def checkpoint(self, *args):
        """What submitit starts again when a warning comes before the training loop listens: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def note(self, **state) -> None:
        os.makedirs(self.folder, exist_ok=True)
        partial = Path(self.folder, f"{NOTE}.{uuid.uuid4().hex}")
        partial.write_text(json.dumps(state, indent=1))
        os.replace(partial, Path(self.folder, NOTE))

    def ended(self, number: str) -> str:
        """The state of a job that has ended, one word; where it was killed and could not say so, it is noted as failed."""
        job = Job(self.main, self.argv, self.folder.replace("%j", number))
        note = read_note(job.folder)
        if note.get("state") == "running":
            note |= {"state": "failed", "error": "ended without a word: killed, by hand or for its memory"}
            job.note(**note)
        return note.get("state", "lost")

    def finished_before(self) -> bool:
        """Whether this very job, with these flags, has been done."""
        old = read_note(self.folder)
        return old.get("state") == "finished" and (old["main"], old["argv"]) == (self.main, self.argv)


def read_note(folder: str) -> dict:
    try:
        return json.loads(Path(folder, NOTE).read_text())
    except FileNotFoundError:
        return {}
