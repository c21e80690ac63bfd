"""When a run saves, which files it keeps, and which of two runs in one folder may write."""

import contextlib
import filecmp
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from util.files.atomic import read_json, replacing, sync_folder, write_json
from util.files.names import printable
from util.weights.checkpoint import NUMBERED, save_atomic
from util.weights.types import Checkpoint

OWNER = ".owner.json"
# What a killed run leaves of the files that it replaces as a whole, and of `dist.check_folder`. Other
# programs have files here, too.
PARTIAL = re.compile(
    r"(checkpoint-\w+\.pth|\.owner\.json|run\.json|log\.txt|bad_images\.txt|replay-step\d+\.json)"
    r"\.partial(-\w+)?|\.shared-[0-9a-f]{32}"
)


@dataclass(frozen=True)
class Owed:
    """What belongs to the save of an epoch's end after `checkpoint-last.pth` is written.

    `names` are the file's further names, and `keep` is the number of numbered files that stay; 0 keeps all.
    """

    epoch: int
    names: list[str]
    keep: int


class CheckpointManager:
    """Saves a run's state in `output_dir`. Only rank 0 may call its methods.

    `checkpoint-last.pth` is written every `save_minutes` (at the next log point), every `save_steps` updates,
    and at the end of every `save_every_epochs`-th epoch. That epoch and the last one also stay as
    `checkpoint-<epoch>.pth`, a hard link that needs no space until the next save. The newest `keep` of them
    are kept; 0 keeps all. Numbers above the current epoch are not this run's, and are left alone.

    A kill at any moment costs nothing: each name is replaced in one step, and the next start does what a
    killed save has left undone.

    A run that starts later in the same folder takes it over, and the earlier one stops at its next log point.
    So a rank 0 that survived a network failure cannot overwrite the files of its requeued job: of two starts
    of one SLURM job, the one with the higher SLURM_RESTART_COUNT owns the folder, in any order. A damaged
    owner file names no owner. The run that finds it becomes the owner: stopping instead would give a stray
    byte the power to end a run, and a later start still takes the folder over.
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
        self.claimed = False
        self.me = {
            "token": self.token,
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }

    def claim(self) -> None:
        """Become the folder's owner, and remove the partial files of killed runs.

        A damaged owner file is replaced, with a warning. Raises ValueError if the folder belongs to a later
        start of this job.
        """
        os.makedirs(self.dir, exist_ok=True)
        owner = self._owner()
        if owner is not None:
            self._refuse(owner, only_newer_restart=True)
        # Before the removal below: a run that has lost the folder then starts no new partial file.
        self._become_owner()
        for name in self._leftovers():
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.dir, name))

    def check_owner(self) -> None:
        """Raise ValueError if another run has taken the folder over.

        If the owner file is damaged, or was removed with the whole folder, this run becomes the owner again,
        with a warning. Raises OSError if the folder can be neither read nor made.
        """
        owner = self._owner()
        if owner is not None:
            self._refuse(owner)
            if owner["token"] != self.token:
                # The owner is an earlier start of this job. It must see that it has lost the folder.
                self._become_owner()
            return
        if self.claimed and not os.path.exists(self._owner_path):
            print(f"warning: {self.dir} or its {OWNER} was removed: it is made again", flush=True)
        self._become_owner()

    @property
    def last(self) -> str:
        """The path of the file that the next start continues."""
        return self._path("last")

    @property
    def _owner_path(self) -> str:
        return os.path.join(self.dir, OWNER)

    def _become_owner(self) -> None:
        os.makedirs(self.dir, exist_ok=True)
        write_json(self._owner_path, self.me)
        self.claimed = True

    def _owner(self) -> dict[str, Any] | None:
        """Return the owner; None if there is no owner file, or, with a warning, if it is damaged."""
        try:
            owner = read_json(self._owner_path, dict)
        except FileNotFoundError:
            return None
        except ValueError as error:
            print(f"warning: this run becomes the owner of {self.dir}, because {error}", flush=True)
            return None
        kinds = {"token": str, "host": str, "since": str, "job": str | None, "restart": int}
        wrong = [name for name, kind in kinds.items() if not isinstance(owner.get(name, b""), kind)]
        if not wrong:
            return owner
        print(
            f"warning: this run becomes the owner of {self.dir}, because {self._owner_path} does not name "
            f"one: its entry {wrong[0]} is missing or of another type",
            flush=True,
        )
        return None

    def _refuse(self, owner: Mapping[str, Any], only_newer_restart: bool = False) -> None:
        """Raise ValueError if the folder belongs to a run that takes precedence over this one."""
        if owner["token"] == self.token:
            return
        same_job = owner["job"] is not None and owner["job"] == self.me["job"]
        older = same_job and owner["restart"] < self.me["restart"]
        newer = same_job and owner["restart"] > self.me["restart"]
        if older or (only_newer_restart and not newer):
            return
        who = "a run"
        if owner["job"]:
            who = f"job {printable(owner['job'])}, restart {owner['restart']}"
        place = f"on {printable(owner['host'])} at {printable(owner['since'])}"
        raise ValueError(
            f"{self.dir} belongs to {who} that started later, {place}: "
            "this run stops without saving; give every run its own `output_dir`"
        )

    def _leftovers(self) -> list[str]:
        """Return the names of partial files that killed runs have left."""
        return [name for name in os.listdir(self.dir) if PARTIAL.fullmatch(name)]

    def time_due(self) -> bool:
        """Whether the time since the last save asks for one. Rank 0's clock decides."""
        return self.minutes > 0 and time.monotonic() - self.saved_at >= 60 * self.minutes

    def step_due(self, step: int) -> bool:
        """Whether a save is due after `step` updates; the same on every rank."""
        return self.steps > 0 and step % self.steps == 0

    def keeps(self, epoch: int) -> bool:
        """Whether the end of this 0-based epoch gets a numbered file: every N-th does, as in MAE."""
        return _is_kept(epoch, self.every)

    def save(self, state: dict, numbered: int | None = None, best: bool = False) -> str:
        """Write the state and return its path.

        Raises OSError if writing fails, and ValueError if the folder has a new owner.
        """
        self.check_owner()
        save_atomic(state, self.last, self.token)
        self.saved_at = time.monotonic()
        if numbered is not None:
            self._link(str(numbered))
        if best:
            self._link("best")
        self._retire(state.get("epoch", math.inf), self.keep)
        return self.last

    def owed(self, saved: Checkpoint) -> Owed | None:
        """Return what the run that wrote `saved` still had to do, if a kill came right after that.

        It follows from the flags that the file stores, which may have changed since. Only the folder's own
        last checkpoint counts, and only as an evaluated epoch's end: what is saved within an epoch, or before
        its evaluation, has no further names.
        """
        entries = saved.entries
        own = os.path.abspath(saved.path) == os.path.abspath(self.last)
        epoch = entries.get("epoch")
        updates = entries.get("updates_per_epoch")
        # MAE's own files have no number of updates.
        if not own or not isinstance(epoch, int) or not isinstance(updates, int):
            return None
        if entries.get("meters") or entries.get("step") != (epoch + 1) * updates:
            return None
        names = []
        last = epoch + 1 == _stored(saved, "epochs", 0)
        if last or _is_kept(epoch, _stored(saved, "save_every_epochs", self.every)):
            names.append(str(epoch))
        if entries.get("best_epoch") == epoch:
            names.append("best")
        # Files are removed only as far as the flags of then and of now agree.
        keeps = (_stored(saved, "keep", self.keep), self.keep)
        keep = 0
        if 0 not in keeps:
            keep = max(keeps)
        return Owed(epoch, names, keep)

    def is_behind(self, owed: Owed) -> bool:
        """Whether a kill has left something to make up for, or something to remove."""
        missing = [name for name in owed.names if not self._has(name)]
        return bool(missing or self._leftovers() or self._surplus(owed.epoch, owed.keep))

    def make_up(self, owed: Owed) -> None:
        """Do what a killed run owed to its last save, with a note. Raises OSError if writing fails."""
        for name in owed.names:
            if not self._has(name):
                self._link(name)
                print(f"{self._path(name)} was not made before a kill: it is made now", flush=True)
        self._retire(owed.epoch, owed.keep)

    def _path(self, name: str) -> str:
        return os.path.join(self.dir, f"checkpoint-{name}.pth")

    def _has(self, name: str) -> bool:
        """Whether the last checkpoint has this further name, as a link or as a copy."""
        path = self._path(name)
        if not os.path.exists(path):
            return False
        return os.path.samefile(self.last, path) or filecmp.cmp(self.last, path, shallow=False)

    def _link(self, name: str) -> None:
        """Give the last checkpoint a second name, in one step: a kill leaves the old file or the new one.

        Raises OSError, which names the file.
        """
        path = self._path(name)
        partial = f"{path}.partial-{self.token}"
        try:
            os.link(self.last, partial)
        except OSError:
            # Some file systems have no hard links.
            _copy(self.last, path)
            return
        try:
            os.replace(partial, path)
        finally:
            # A rename does nothing if both names are links to one file already.
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)
        sync_folder(self.dir)

    def _retire(self, epoch: float, keep: int) -> None:
        """Remove the numbered files up to `epoch` but the newest `keep`."""
        for name in self._surplus(epoch, keep):
            try:
                os.remove(os.path.join(self.dir, name))
            except FileNotFoundError:
                continue
            except OSError as error:
                print(f"warning: {error}; the file stays", flush=True)

    def _surplus(self, epoch: float, keep: int) -> list[str]:
        if keep <= 0:
            return []
        matches = [match for match in map(NUMBERED.fullmatch, os.listdir(self.dir)) if match]
        numbers = sorted(int(match[1]) for match in matches if int(match[1]) <= epoch)
        names = [os.path.basename(self._path(str(number))) for number in numbers[:-keep]]
        return [name for name in names if os.path.isfile(os.path.join(self.dir, name))]


def _is_kept(epoch: int, every: int) -> bool:
    return every > 0 and epoch % every == 0


def _stored(saved: Checkpoint, flag: str, otherwise: int) -> int:
    """Return the stored value of a flag that is a count; `otherwise` if the file does not store one."""
    value = saved.args.get(flag)
    if isinstance(value, int):
        return value
    return otherwise


def _copy(source: str, path: str) -> None:
    try:
        with open(source, "rb") as original, replacing(path, "wb") as copy:
            shutil.copyfileobj(original, copy, 1 << 24)
    except OSError as error:
        raise OSError(f"could not copy {source} to {path}: {error}") from error
