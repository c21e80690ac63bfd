"""What stops or spares a run: losses that are not finite, images that cannot be read, a full disk."""

import contextlib
import errno
import json
import math
import os

from util import dist


class NonFiniteLoss(RuntimeError):
    """Raised on every rank at the first log point after a non-finite value; `.step` is the update that made it."""

    def __init__(self, step: int, values: dict[str, float]):
        self.step, self.values = step, values
        bad = ", ".join(f"{k} = {v}" for k, v in values.items() if not math.isfinite(v))
        super().__init__(f"non-finite at step {step}: {bad}")


@contextlib.contextmanager
def survive_full_disk():
    """What is only reported must not end a run, on one rank while the others wait: a note instead."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"warning: {e}; training goes on", flush=True)


class BadImages:
    """Images that could not be decoded: counted once each, listed in bad_images.txt, an error above a share."""

    def __init__(self, dataset, output_dir: str | None, max_share: float):
        self.dataset, self.dir, self.max_share = dataset, output_dir, max_share
        self.new: set[int] = set()
        self.known: set[int] = set()

    def add(self, indices) -> None:
        self.new.update(indices)

    def check(self) -> None:
        """At a log point, on all ranks together."""
        new = set().union(*dist.gather_objects(self.new)) - self.known
        self.new = set()
        if not new:
            return
        self.known |= new
        names = [self.dataset.index.name(i) for i in sorted(new)]
        if dist.is_main():
            latest = os.fsencode(names[-1]).decode(errors="backslashreplace")  # names of files may be no text
            print(
                f"warning: {len(self.known)} images cannot be decoded and are skipped, the latest: {latest}",
                flush=True,
            )
            if self.dir:
                path = os.path.join(self.dir, "bad_images.txt")
                with survive_full_disk(), open(path, "a+", errors="surrogateescape") as f:
                    f.seek(0)
                    listed = set(f.read().splitlines())  # before a restart
                    f.writelines(name + "\n" for name in names if name not in listed)
        share = len(self.known) / len(self.dataset)
        if share > self.max_share:
            where = os.path.join(self.dir or "", "bad_images.txt")
            raise ValueError(
                f"{len(self.known)} of {len(self.dataset)} images ({share:.1%}) cannot be decoded, more "
                f"than --max_bad_images {self.max_share}: mend or remove them, they are listed in {where}"
            )


def write_replay(
    output_dir: str | None,
    error: NonFiniteLoss,
    sampler,
    epoch: int,
    updates: int,
    accum_iter: int,
    seed: int,
) -> None:
    """Leave what is needed to see the failing step again: seeds and the image indices of all its micro-batches."""
    if not dist.is_main() or not output_dir or not hasattr(sampler, "global_batch"):
        return
    first = (error.step - epoch * updates) * accum_iter
    replay = {
        "step": error.step,
        "epoch": epoch,
        "seed": seed,
        "world_size": dist.world_size(),
        "values": {k: str(v) for k, v in error.values.items()},
        "micro_batches": [
            [int(i) for i in sampler.global_batch(epoch, m)] for m in range(first, first + accum_iter)
        ],
        "how": "the same command resumes from checkpoint-last.pth and reaches the same step with the same data, "
        "augmentation and masks; rank r of W gets the r-th of W equal parts of each micro-batch",
    }
    path = os.path.join(output_dir, f"replay-step{error.step}.json")
    with survive_full_disk(), open(path, "w") as f:
        json.dump(replay, f, indent=1)
        print(f"wrote {path}", flush=True)
