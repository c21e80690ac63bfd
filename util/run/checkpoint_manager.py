"""When a run saves, which files it keeps, and that no second run writes between them."""

import json
import os
import re
import shutil
import socket
import time
import uuid

from util.weights.checkpoint import LAST, save_atomic

OWNER = ".owner.json"


class CheckpointManager:
    """Saves a run's state in `output_dir`. Only rank 0 may call its methods.

    `checkpoint-last.pth` is written every `save_minutes` (at the next log point), every `save_steps` updates, and at
    the end of every `save_every_epochs`-th epoch; the latter, and the last epoch, also stay as
    `checkpoint-<epoch>.pth` (a hard link: it costs no space until the next save), the newest `keep` of them (0: all).

    A run that is started later in the same folder takes it over, and the earlier one stops at its next save. So a rank 0
    that a lost network has kept alive cannot overwrite what its requeued job has written: of two starts of one SLURM job
    the one with the higher SLURM_RESTART_COUNT owns the folder, whichever comes last.
    """

    def __init__(
        self,
        output_dir: str,
        save_every_epochs: int = 20,
        save_minutes: float = 30,
        save_steps: int = 0,
        keep: int = 0,
    ):
        self.dir, self.every, self.minutes, self.steps = (
            output_dir,
            save_every_epochs,
            save_minutes,
            save_steps,
        )
        self.keep, self.saved_at = keep, time.monotonic()
        self.me = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }

    def claim(self) -> None:
        """Become the folder's owner and remove what killed runs have left half written."""
        os.makedirs(self.dir, exist_ok=True)
        self._refuse(self._owner(), only_newer_restart=True)
        for name in os.listdir(self.dir):
            if re.search(r"\.partial(-\w+)?$", name):
                os.remove(os.path.join(self.dir, name))
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
        same_job = owner["job"] is not None and owner["job"] == self.me["job"]
        older = same_job and owner["restart"] < self.me["restart"]
        newer = same_job and owner["restart"] > self.me["restart"]
        if owner["token"] == self.me["token"] or older or (only_newer_restart and not newer):
            return
        who = f"job {owner['job']}, restart {owner['restart']}" if owner["job"] else "a run"
        raise ValueError(
            f"{self.dir} belongs to {who} that was started on {owner['host']} at {owner['since']}, after this "
            "one: this one stops without saving; give every run its own --output_dir"
        )

    def time_due(self) -> bool:
        """Whether the time since the last save asks for one; on rank 0, whose clock decides."""
        return self.minutes > 0 and time.monotonic() - self.saved_at >= 60 * self.minutes

    def step_due(self, step: int) -> bool:
        return self.steps > 0 and step % self.steps == 0

    def keeps(self, epoch: int) -> bool:
        """Whether the end of this 0-based epoch gets a numbered file: MAE's rule, every N-th."""
        return self.every > 0 and epoch % self.every == 0

    def save(self, state: dict, numbered: int | None = None, best: bool = False) -> str:
        """Write the state; raises OSError when that fails, ValueError when the folder has a new owner."""
        os.makedirs(self.dir, exist_ok=True)
        self._refuse(self._owner())
        last = os.path.join(self.dir, LAST)
        save_atomic(state, last, self.me["token"])
        self.saved_at = time.monotonic()
        for name in [str(numbered)] * (numbered is not None) + ["best"] * best:
            path = os.path.join(self.dir, f"checkpoint-{name}.pth")
            if os.path.exists(path):
                os.remove(path)
            try:
                os.link(last, path)
            except OSError:  # a file system without hard links
                shutil.copyfile(last, path)
        self._retire()
        return last

    def _retire(self) -> None:
        numbered = re.compile(r"checkpoint-(\d+)\.pth$")
        found = sorted((int(m[1]), m[0]) for m in map(numbered.match, os.listdir(self.dir)) if m)
        for _, name in found[: -self.keep] if self.keep > 0 else []:
            os.remove(os.path.join(self.dir, name))
