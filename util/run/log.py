"""What a run says: console lines or a progress bar, log.txt (one JSON object per epoch), TensorBoard.

Step metrics stay on the device, unread, until a log point; there they are averaged over ranks in one collective, so
that nothing waits for the device in between and every rank sees the same numbers.
"""

import csv
import json
import math
import os
import resource
import sys
import time

import torch

from util import dist
from util.run.guards import NonFiniteLoss, survive_full_disk
from util.run.tensorboard import Board


class Log:
    """Collects step metrics and writes them out; `board` is TensorBoard's on rank 0, or None.

    `chance` holds the level of guessing for metrics that have one; it is printed beside them and written to log.txt.
    `meters` are the sums of the unfinished epoch: a checkpoint takes them along, so that an interrupted epoch reports
    the same averages as an uninterrupted one. With `peak_flops`, a device's measured rate, and `image_flops`, the model's
    work on an image, which the run's first update counts, speed is also reported as `mfu`, a percentage of that rate.
    """

    def __init__(
        self,
        output_dir: str | None,
        log_dir: str | None = None,
        print_freq: int = 20,
        chance: dict[str, float] | None = None,
        loss_tag: str = "train_loss",
    ):
        self.output_dir, self.print_freq, self.chance = output_dir, print_freq, chance or {}
        self.loss_tag = (
            loss_tag  # MAE's TensorBoard names differ: train_loss in pretraining, loss in fine-tuning
        )
        self._bar = None
        self.board = Board(log_dir) if dist.is_main() and log_dir else None
        self.peak_flops: float | None = None
        self.image_flops: float | None = None
        self.meters: dict[str, float] = {}
        self._steps: list[tuple[int, list[str], torch.Tensor, float]] = []
        self._wait = 0.0
        self._total_wait = self._total_seconds = 0.0

    def truncate(self, epoch: int) -> None:
        """Drop the lines of log.txt from `epoch` on: a resumed run writes them again."""
        path = os.path.join(self.output_dir or "", "log.txt")
        if self.output_dir and dist.is_main() and os.path.exists(path):
            with open(path) as f:
                lines = f.readlines()
            kept = [line for line in lines if _epoch_of(line) < epoch]
            if len(kept) < len(lines):  # a run that is done keeps the time of its end
                with open(path, "w") as f:
                    f.writelines(kept)

    def start_epoch(
        self,
        epoch: int,
        epochs: int,
        first: int,
        updates: int,
        images_per_update: int,
        meters: dict[str, float] | None = None,
    ) -> None:
        self.epoch, self.epochs, self.updates, self.images = epoch, epochs, updates, images_per_update
        self.done = first
        self.meters = dict(meters or {})
        self._since = self._epoch_start = time.monotonic()
        self._epoch_first = first
        if dist.is_main() and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=updates,
                initial=first,
                desc=f"epoch {epoch + 1}/{epochs}",
                unit="step",
                dynamic_ncols=True,
                leave=False,
            )

    def step(self, step: int, metrics: dict[str, torch.Tensor], lr: float, waited: float) -> None:
        """Note the metrics of update `step` (device scalars, not read here)."""
        names = list(metrics)
        values = torch.stack([v.detach().float().reshape(()) for v in metrics.values()])
        self._steps.append((step, names, values, lr))
        self._wait += waited
        self.done += 1
        if self._bar is not None:
            self._bar.update()

    @property
    def due(self) -> bool:
        """Whether this update is a log point; the same on every rank."""
        return self.done == self.updates or self.done % self.print_freq == 0

    @property
    def wants_flops(self) -> bool:
        return self.peak_flops is not None and self.image_flops is None

    def speed(self, images: float, seconds: float, waited: float) -> dict[str, float]:
        """Images per second of all ranks, the share of time spent waiting for data, and `mfu` in % where it is known."""
        seconds = max(seconds, 1e-9)
        out = {"img_per_s": images / seconds, "data_wait": waited / seconds}
        if self.peak_flops and self.image_flops is not None:
            out["mfu"] = 100 * out["img_per_s"] * self.image_flops / (self.peak_flops * dist.world_size())
        return out

    def flush(self) -> None:
        """Read what was noted, on all ranks together; raise NonFiniteLoss on all of them if anything is not finite."""
        if not self._steps:
            return
        table = (
            dist.mean_over_ranks(torch.stack([s[2] for s in self._steps])).cpu().double()
        )  # (steps, metrics)
        for (step, names, _, lr), row in zip(self._steps, table.tolist()):
            values = dict(zip(names, row))
            if not all(map(math.isfinite, row)):
                self._steps.clear()
                raise NonFiniteLoss(step, values)
            for name, value in (values | {"lr": lr}).items():
                self.meters[name] = self.meters.get(name, 0.0) + value
            self.meters["steps"] = self.meters.get("steps", 0) + 1
        steps, self._steps = self._steps, []
        now = time.monotonic()
        seconds, wait = now - self._since, self._wait
        self._since, self._wait = now, 0.0
        self._total_seconds += seconds
        self._total_wait += wait
        if dist.is_main():
            self._report(values, steps[-1][3], len(steps), seconds, wait)

    def _report(self, last: dict[str, float], lr: float, steps: int, seconds: float, wait: float) -> None:
        """MAE's line, with the terms, chance levels, rate and share of time spent waiting for data."""
        average = self.averages()
        speed = self.speed(steps * self.images, seconds, wait)
        rate = speed["img_per_s"]
        left = self.updates * (self.epochs - self.epoch) - self.done
        eta = left * (time.monotonic() - self._epoch_start) / max(1, self.done - self._epoch_first)
        terms = [
            f"{k}: {v:.4f} ({average[k]:.4f}{f', chance {self.chance[k]:.4f}' if k in self.chance else ''})"
            for k, v in last.items()
        ]
        if self.board is not None:
            x = int(
                (self.epoch + self.done / self.updates) * 1000
            )  # MAE's x axis: comparable across batch sizes
            self.board.scalar(self.loss_tag, last["loss"], x)
            self.board.scalar("lr", lr, x)
            for name in last.keys() - {"loss"}:
                self.board.scalar(f"train/{name}", last[name], x)
            for name, value in speed.items():
                self.board.scalar(f"speed/{name}", value, x)
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {last['loss']:.4f} {rate:.0f} img/s data {100 * wait / seconds:.0f}% eta {duration(eta)}"
            )
            if self.done < self.updates:
                return
            self._bar.close()
            self._bar = None
        width = len(str(self.updates))
        reserved = f" (reserved {mb:.0f})" if (mb := reserved_memory_mb()) else ""
        print(
            f"Epoch: [{self.epoch}]  [{self.done:{width}d}/{self.updates}]  eta: {duration(eta)}  lr: {lr:.6f}  "
            + "  ".join(terms)
            + f"  time: {seconds / steps:.4f}  data: {wait / steps:.4f} ({100 * wait / seconds:.0f}%)"
            + f"  img/s: {rate:.1f}"
            + (f" (mfu {speed['mfu']:.0f}%)" if "mfu" in speed else "")
            + f"  max mem: {peak_memory_mb():.0f}"
            + reserved,
            flush=True,
        )

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        """Show figures of an epoch's end in TensorBoard."""
        if self.board is not None:
            for name, value in values.items():
                self.board.scalar(name, value, (epoch + 1) * 1000)

    def picture(self, name: str, image, epoch: int) -> None:
        """Show a (H, W, 3) uint8 picture in TensorBoard."""
        if self.board is not None:
            self.board.image(name, image, (epoch + 1) * 1000)

    def averages(self) -> dict[str, float]:
        """Means over the updates of the epoch so far."""
        steps = self.meters.get("steps", 0)
        return {k: v / steps for k, v in self.meters.items() if k != "steps"} if steps else {}

    def end_epoch(self, extra: dict[str, float]) -> dict[str, float]:
        """Write the epoch's line of log.txt: MAE's names first (train_lr, train_loss, epoch), then ours."""
        line = {f"train_{k}": v for k, v in self.averages().items()} | extra | {"epoch": self.epoch}
        line |= {f"chance_{k}": v for k, v in self.chance.items()}
        line |= self.speed(
            (self.done - self._epoch_first) * self.images, self._total_seconds, self._total_wait
        )
        self._total_wait = self._total_seconds = 0.0
        self.meters = {}
        self.write_line(line)
        return line

    def write_line(self, line: dict[str, float]) -> None:
        """Append one JSON object to log.txt."""
        if dist.is_main():
            if self.board is not None:
                self.board.flush()
            if self.output_dir:
                with survive_full_disk(), open(os.path.join(self.output_dir, "log.txt"), "a") as f:
                    f.write(json.dumps(line) + "\n")


def _epoch_of(line: str) -> float:
    """Of a line of log.txt; infinite for one that a full disk or a lost node has cut off."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError):
        return math.inf


def write_predictions(path: str, rows: list[tuple[int, int, int, float]], index) -> None:
    """A CSV line per image: name, label, prediction (class names), probability; rows as (image, label, class, p)."""
    with open(path, "w", newline="", errors="surrogateescape") as f:  # names of files may be no text
        out = csv.writer(f)
        out.writerow(["image", "label", "prediction", "probability", "correct"])
        for i, label, predicted, p in rows:
            known = index.classes[label] if label >= 0 else "unreadable"
            out.writerow(
                [index.name(i), known, index.classes[predicted], f"{p:.6f}", int(label == predicted)]
            )
    print(f"wrote {len(rows)} predictions to {path}", flush=True)


def duration(seconds: float) -> str:
    seconds = int(seconds)
    days, rest = divmod(seconds, 86400)
    return (
        f"{days} day{'s' * (days > 1)}, " if days else ""
    ) + f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def reserved_memory_mb() -> float:
    """Most memory that CUDA's allocator has held, free blocks included, which other processes cannot have; 0 without CUDA."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**20
    return 0.0


def peak_memory_mb() -> float:
    """Peak memory of this process: the device's allocator on CUDA, resident memory otherwise."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
