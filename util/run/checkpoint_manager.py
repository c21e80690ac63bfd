"""When a run saves, which files it keeps, and which of two runs in one folder may write."""

import json
import os
import re
import shutil
import socket
import time
import uuid

from util.weights.checkpoint import LAST, save_atomic

OWNER = ".owner.json"
PARTIAL = re.compile(r"\.partial(-\w+)?$")
NUMBERED = re.compile(r"checkpoint-(\d+)\.pth$")


class CheckpointManager:
    """Saves a run's state in `output_dir`. Only rank 0 may call its methods.

    `checkpoint-last.pth` is written every `save_minutes` (at the next log point), every `save_steps` updates,
    and at the end of every `save_every_epochs`-th epoch. That epoch and the last one also stay as
    `checkpoint-<epoch>.pth`, a hard link that needs no space until the next save. The newest `keep` of them
    are kept; 0 keeps all.

    A run that starts later in the same folder takes it over, and the earlier one stops at its next save. So a
    rank 0 that survived a network failure cannot overwrite the files of its requeued job: of two starts of
    one SLURM job, the one with the higher SLURM_RESTART_COUNT owns the folder, in any order.
    """

    def __init__(
        self,
        output_dir: str,
        save_every_epochs: int = 20,
        save_minutes: float = 30,
        save_steps: int = 0,
        keep: int = 0,
    ):
        self.dir = output_dir
        self.every = save_every_epochs
        self.minutes = save_minutes
        self.steps = save_steps
        self.keep = keep
        self.saved_at = time.monotonic()
        self.token = uuid.uuid4().hex
        self.me = {
            "token": self.token,
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }

    def claim(self) -> None:
        """Become the folder's owner, and remove the partial files of killed runs."""
        os.makedirs(self.dir, exist_ok=True)
        self._refuse(self._owner(), only_newer_restart=True)
        for name in os.listdir(self.dir):
            if PARTIAL.search(name):
                os.remove(os.path.join(self.dir, name))
        # Written under another name and renamed: a reader sees the old owner or the new one, never
        # half a file.
        partial = os.path.join(self.dir, f"{OWNER}.partial-{self.me['token']}")
        with open(partial, "w") as f:
            json.dump(self.me, f)
        os.replace(partial, os.path.join(self.dir, OWNER))

    def _owner(self) -> dict:
        try:
            with open(os.path.join(self.dir, OWNER)) as f:
                return json.load(f)
        except FileNotFoundError:
            return self.me

    def _refuse(self, owner: dict, only_newer_restart: bool = False) -> None:
        """Raise ValueError if the folder belongs to a run that takes precedence over this one."""
        if owner["token"] == self.me["token"]:
            return
        same_job = owner["job"] is not None and owner["job"] == self.me["job"]
        older = same_job and owner["restart"] < self.me["restart"]
        newer = same_job and owner["restart"] > self.me["restart"]
        if older or (only_newer_restart and not newer):
            return
        who = "a run"
        if owner["job"]:
            who = f"job {owner['job']}, restart {owner['restart']}"
        raise ValueError(
            f"{self.dir} belongs to {who} that started later, on {owner['host']} at {owner['since']}: "
            "this run stops without saving; give every run its own `output_dir`"
        )

    def time_due(self) -> bool:
        """Whether the time since the last save asks for one. Rank 0's clock decides."""
        return self.minutes > 0 and time.monotonic() - self.saved_at >= 60 * self.minutes

    def step_due(self, step: int) -> bool:
        """Whether a save is due after `step` updates; the same on every rank."""
        return self.steps > 0 and step % self.steps == 0

    def keeps(self, epoch: int) -> bool:
        """Whether the end of this 0-based epoch gets a numbered file: every N-th does, as in MAE."""
        return self.every > 0 and epoch % self.every == 0

    def save(self, state: dict, numbered: int | None = None, best: bool = False) -> str:
        """Write the state and return its path.

        Raises OSError if writing fails, and ValueError if the folder has a new owner.
        """
        os.makedirs(self.dir, exist_ok=True)
        self._refuse(self._owner())
        last = os.path.join(self.dir, LAST)
        save_atomic(state, last, self.token)
        self.saved_at = time.monotonic()
        if numbered is not None:
            self._link(last, str(numbered))
        if best:
            self._link(last, "best")
        self._retire()
        return last

    def _link(self, last: str, name: str) -> None:
        """Give the last checkpoint a second name."""
        path = os.path.join(self.dir, f"checkpoint-{name}.pth")
        if os.path.exists(path):
            os.remove(path)
        try:
            os.link(last, path)
        except OSError:
            # Some file systems have no hard links.
            shutil.copyfile(last, path)

    def _retire(self) -> None:
        """Remove all numbered files but the newest `keep`."""
        if self.keep <= 0:
            return
        matches = [match for match in map(NUMBERED.match, os.listdir(self.dir)) if match]
        matches.sort(key=lambda match: int(match[1]))
        for match in matches[: -self.keep]:
            os.remove(os.path.join(self.dir, match[0]))
