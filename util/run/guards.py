"""Guards of a run: non-finite losses stop it, undecodable images are counted, a full disk is survived."""

import contextlib
import errno
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

from util import dist
from util.files.atomic import write_json, write_text
from util.files.names import counted, one_line, printable


class NonFiniteLoss(ValueError):
    """Raised on every rank at the first log point after a non-finite value; `step` is the update that made
    it.
    """

    def __init__(self, step: int, values: dict[str, float], advice: str = ""):
        self.step = step
        self.values = values
        bad = ", ".join(f"{k} = {v}" for k, v in values.items() if not math.isfinite(v))
        message = f"non-finite at step {step}: {bad}"
        if advice:
            message += f": {advice}"
        super().__init__(message)

    def with_advice(self, amp: str, clip_grad: float | None, start: str) -> "NonFiniteLoss":
        """Return the same error with what may help.

        Args:
            amp: the precision of the run, "fp32", "bf16" or "fp16".
            clip_grad: the largest gradient norm; None and 0 mean no clipping.
            start: a phrase that says where the next start of the run begins.
        """
        wider = {"fp16": "bf16 or fp32", "bf16": "fp32"}.get(amp)
        if self.step == 0:
            remedies = ["no update came before, so check the pixel values, `mean` and `std`"]
        else:
            remedies = ["lower the learning rate (`lr` or `blr`)"]
            if not clip_grad:
                remedies.append("clip gradients (`clip_grad` 1)")
        if wider:
            remedies.append(f"train in `amp` {wider}")
        advice = " or ".join(remedies)
        if self.step > 0:
            advice += f"; the run then {start}"
        return NonFiniteLoss(self.step, self.values, advice)


@contextlib.contextmanager
def survive_full_disk() -> Iterator[None]:
    """Report a full disk and continue.

    A report that cannot be written must not end a run, least of all on one rank while the others wait for it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"warning: {error}; training continues", flush=True)


def make_again(folder: str) -> None:
    """Make a run's folder again, with a warning, if someone has removed it. Raises OSError if that fails."""
    if not os.path.isdir(folder):
        os.makedirs(folder, exist_ok=True)
        print(f"warning: {folder} was removed: it is made again, and training continues", flush=True)


class BadImages:
    """Images that could not be decoded: counted once each, listed in bad_images.txt, an error above a share.

    The list has a name a line. Characters that would start a new line or command a terminal are escaped.
    """

    def __init__(self, dataset: Any, output_dir: str | None, max_share: float):
        self.dataset = dataset
        self.dir = output_dir
        self.max_share = max_share
        self.new: set[int] = set()
        self.known: set[int] = set()

    def add(self, indices: Iterable[int]) -> None:
        """Note images of this rank; nothing is compared with other ranks before `check`."""
        self.new.update(indices)

    def check(self) -> None:
        """Exchange new images between ranks, at a log point, on all ranks together.

        Raises ValueError if the share of bad images is too large.
        """
        new = set().union(*dist.gather_objects(self.new)) - self.known
        self.new = set()
        if not new:
            return
        self.known |= new
        names = [self.dataset.index.name(i) for i in sorted(new)]
        if dist.is_main():
            count = counted(len(self.known), "image")
            latest = printable(self._with_reason(max(new)))
            print(f"warning: skipping {count} that cannot be decoded, the latest: {latest}", flush=True)
            self._list([one_line(name) for name in names])
        share = len(self.known) / len(self.dataset)
        if share > self.max_share:
            path = os.path.join(self.dir or "", "bad_images.txt")
            example = printable(self._with_reason(max(self.known)))
            raise ValueError(
                f"{len(self.known)} of {len(self.dataset)} images ({share:.1%}) cannot be decoded, more than "
                f"`max_bad_images` {self.max_share}: repair or remove them, they are listed in {path}; "
                f"one is {example}"
            )

    def _with_reason(self, number: int) -> str:
        """An image's name, and why it cannot be read: an image with a mask may be sound, and the mask not."""
        name = self.dataset.index.name(number)
        # Other libraries' readers do not tell, and a file may be whole again.
        reason = ""
        if hasattr(self.dataset, "fault"):
            reason = self.dataset.fault(number)
        return f"{name}: {reason}" if reason else name

    def _list(self, names: list[str]) -> None:
        """Add to bad_images.txt the names that earlier starts of the run have not listed."""
        if not self.dir:
            return
        path = os.path.join(self.dir, "bad_images.txt")
        with survive_full_disk():
            make_again(self.dir)
            listed = _lines(path)
            known = set(listed)
            new = [name for name in names if name not in known]
            if new:
                write_text(path, "".join(name + "\n" for name in [*listed, *new]))


def _lines(path: str) -> list[str]:
    """Return the lines of a list of names; none if there is no such file."""
    try:
        # File names may hold bytes that are not valid UTF-8. Other characters than \n end no line.
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as f:
            return [line for line in f.read().split("\n") if line]
    except FileNotFoundError:
        return []


def write_replay(
    output_dir: str | None,
    error: NonFiniteLoss,
    sampler: Any,
    epoch: int,
    updates: int,
    accum_iter: int,
    seed: int,
) -> None:
    """Write what is needed to repeat the failing step: its seed and the images of all its micro-batches."""
    if not dist.is_main() or not output_dir or not hasattr(sampler, "global_batch"):
        return
    first = (error.step - epoch * updates) * accum_iter
    batches = [sampler.global_batch(epoch, micro) for micro in range(first, first + accum_iter)]
    replay = {
        "step": error.step,
        "epoch": epoch,
        "seed": seed,
        "world_size": dist.world_size(),
        "values": {name: str(value) for name, value in error.values.items()},
        "micro_batches": [[int(index) for index in batch] for batch in batches],
        "how": "the same command resumes from checkpoint-last.pth and reaches the same step with the same "
        "data, augmentation and masks; rank r of W gets the r-th of W equal parts of each micro-batch",
    }
    path = os.path.join(output_dir, f"replay-step{error.step}.json")
    with survive_full_disk():
        make_again(output_dir)
        write_json(path, replay)
        print(f"wrote {path}", flush=True)
