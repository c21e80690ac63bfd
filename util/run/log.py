"""The log of a run: console lines or a progress bar, log.txt (one JSON object per epoch), and TensorBoard.

Step metrics stay on the device, unread, until a log point. There they are averaged over ranks in one
collective, so that nothing waits for the device in between and every rank sees the same numbers.
"""

import csv
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from util import dist
from util.files.atomic import append_line, replacing, write_text
from util.files.names import printable, table_cell
from util.run.guards import NonFiniteLoss, make_again, survive_full_disk
from util.run.tensorboard import Board

if TYPE_CHECKING:
    # Needed at a terminal only.
    from tqdm import tqdm


# Sums in `Log.meters` that are not of metrics: images, seconds, and seconds spent waiting for data; and the
# model's operations, if they are counted.
COSTS = ("cost_images", "cost_seconds", "cost_waited")
FLOPS = "cost_flops"


@dataclass(frozen=True)
class Interval:
    """The updates between two log points: their number, seconds, seconds spent waiting for data, and last
    rate.
    """

    updates: int
    seconds: float
    waited: float
    lr: float


class Log:
    """Collects step metrics and writes them out.

    `board` is TensorBoard's writer on rank 0, which `open` makes, or None. `chance` holds the chance levels
    of the metrics that have one; they are printed after these and written to log.txt. `loss_tag` is the
    loss's name in TensorBoard, where MAE's names differ: train_loss in pretraining, loss in fine-tuning.

    `meters` are the sums of the unfinished epoch, of metrics and of its costs (see COSTS). A checkpoint
    stores them, so that an interrupted epoch reports the same averages as an uninterrupted one. With
    `peak_flops`, the device's measured rate, and `image_flops`, the model's operations per image, which the
    run's first update counts, speed is also reported as `mfu`, a percentage of that rate.
    """

    def __init__(
        self,
        output_dir: str | None,
        log_dir: str | None = None,
        print_freq: int = 20,
        chance: dict[str, float] | None = None,
        loss_tag: str = "train_loss",
    ):
        self.output_dir = output_dir
        self.print_freq = print_freq
        self.chance = chance or {}
        self.loss_tag = loss_tag
        self.log_dir = log_dir
        self.board: Board | None = None
        self.peak_flops: float | None = None
        self.image_flops: float | None = None
        self.meters: dict[str, float] = {}
        self._bar: tqdm | None = None
        # (step, names, values on the device, learning rate) of the updates since the last log point
        self._steps: list[tuple[int, list[str], torch.Tensor, float]] = []
        self._waited = 0.0
        self._has_reported = False

    def open(self, epoch: int, step: int, updates: int) -> None:
        """Continue the files of earlier starts of the run, at `epoch` and after `step` updates.

        What they wrote about later updates is dropped, because the run makes these updates again.
        """
        self.truncate(epoch)
        if dist.is_main() and self.log_dir:
            whole, part = divmod(step, updates)
            purged = 0
            if step:
                purged = _x(whole, part / updates) + 1
            self.board = Board(self.log_dir, purged)

    def truncate(self, epoch: int) -> None:
        """Drop the lines of log.txt from `epoch` on, and what a kill or a full disk has cut off."""
        path = os.path.join(self.output_dir or "", "log.txt")
        # A device would not end.
        if not (self.output_dir and dist.is_main() and os.path.isfile(path)):
            return
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as f:
            lines = f.readlines()
        earlier = [line.removesuffix("\n") + "\n" for line in lines if _epoch_of(line) < epoch]
        # A file that stays as it is keeps its modification time.
        if earlier != lines:
            with survive_full_disk():
                write_text(path, "".join(earlier))

    def start_epoch(
        self,
        epoch: int,
        epochs: int,
        first: int,
        updates: int,
        images_per_update: int,
        meters: dict[str, float] | None = None,
    ) -> None:
        """Begin at update `first` of `updates`; `meters` are the sums of the updates before it."""
        self.epoch = epoch
        self.epochs = epochs
        self.updates = updates
        self.images = images_per_update
        self.done = first
        self.meters = dict(meters or {})
        self._epoch_first = first
        self._epoch_start = time.monotonic()
        self._since = self._epoch_start
        # A progress bar for people at a terminal; lines for files.
        if dist.is_main() and sys.stdout.isatty():
            from tqdm import tqdm

            title = f"epoch {epoch + 1}/{epochs}"
            self._bar = tqdm(
                total=updates, initial=first, desc=title, unit="step", dynamic_ncols=True, leave=False
            )

    def step(self, step: int, metrics: dict[str, torch.Tensor], lr: float, waited: float) -> None:
        """Note the metrics of update `step`, device scalars that are not read here."""
        values = torch.stack([value.detach().float().reshape(()) for value in metrics.values()])  # (metrics,)
        self._steps.append((step, list(metrics), values, lr))
        self._waited += waited
        self.done += 1
        if self._bar is not None:
            self._bar.update()

    @property
    def due(self) -> bool:
        """Whether this update is a log point; the same on every rank.

        The first update of each start is one, so that people see at once that the run is under way.
        """
        return not self._has_reported or self.done == self.updates or self.done % self.print_freq == 0

    @property
    def wants_flops(self) -> bool:
        return self.peak_flops is not None and self.image_flops is None

    def speed(self, images: float, seconds: float, waited: float) -> dict[str, float]:
        """Return images per second of all ranks, the share of time spent waiting for data, and `mfu` in % if
        known.
        """
        seconds = max(seconds, 1e-9)
        speed = {"img_per_s": images / seconds, "data_wait": waited / seconds}
        if self.peak_flops and self.image_flops is not None:
            speed["mfu"] = self._utilisation(images * self.image_flops, seconds)
        return speed

    def _utilisation(self, flops: float, seconds: float) -> float:
        assert self.peak_flops is not None
        return 100 * flops / (seconds * self.peak_flops * dist.world_size())

    def flush(self) -> None:
        """Read the noted metrics, on all ranks together; raise NonFiniteLoss on all if a value is not
        finite.
        """
        if not self._steps:
            return
        # One collective and one copy to the host for all updates since the last log point.
        table = dist.mean_over_ranks(torch.stack([values for _, _, values, _ in self._steps]))
        rows = table.cpu().double().tolist()  # (steps, metrics)
        last: dict[str, float] = {}
        for (step, names, _, lr), row in zip(self._steps, rows):
            last = dict(zip(names, row))
            if not all(map(math.isfinite, row)):
                self._steps.clear()
                raise NonFiniteLoss(step, last)
            self._add(last | {"lr": lr, "steps": 1})
        now = time.monotonic()
        interval = Interval(len(self._steps), now - self._since, self._waited, self._steps[-1][3])
        images = interval.updates * self.images
        self._add(dict(zip(COSTS, (images, interval.seconds, interval.waited))))
        if self.image_flops is not None:
            self._add({FLOPS: images * self.image_flops})
        self._steps = []
        self._since = now
        self._waited = 0.0
        self._has_reported = True
        if dist.is_main():
            self._report(last, interval)

    def _add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.meters[name] = self.meters.get(name, 0) + value

    def _report(self, last: dict[str, float], interval: Interval) -> None:
        speed = self.speed(interval.updates * self.images, interval.seconds, interval.waited)
        self._report_to_board(last, interval.lr, speed)
        if self._bar is not None:
            data = f"data {100 * interval.waited / interval.seconds:.0f}%"
            rate = f"{speed['img_per_s']:.0f} img/s"
            self._bar.set_postfix_str(f"loss {last['loss']:.4f} {rate} {data} eta {self._time_left()}")
            if self.done < self.updates:
                return
            # The epoch's last log point is a line that stays.
            self._bar.close()
            self._bar = None
        print(self._line(last, interval, speed), flush=True)

    def _report_to_board(self, last: dict[str, float], lr: float, speed: dict[str, float]) -> None:
        if self.board is None:
            return
        x = _x(self.epoch, self.done / self.updates)
        self.board.scalar(self.loss_tag, last["loss"], x)
        self.board.scalar("lr", lr, x)
        for name in last.keys() - {"loss"}:
            self.board.scalar(f"train/{name}", last[name], x)
        for name, value in speed.items():
            self.board.scalar(f"speed/{name}", value, x)

    def _line(self, last: dict[str, float], interval: Interval, speed: dict[str, float]) -> str:
        """Return MAE's line, with the terms, chance levels, rate and share of time spent waiting for data."""
        width = len(str(self.updates))
        share = 100 * interval.waited / interval.seconds
        rate = f"img/s: {speed['img_per_s']:.1f}"
        if "mfu" in speed:
            rate += f" (mfu {speed['mfu']:.0f}%)"
        memory = f"max mem: {peak_memory_mb():.0f}"
        if reserved := reserved_memory_mb():
            memory += f" (reserved {reserved:.0f})"
        parts = [
            f"Epoch: [{self.epoch}]",
            f"[{self.done:{width}d}/{self.updates}]",
            f"eta: {self._time_left()}",
            f"lr: {interval.lr:.6f}",
            *self._terms(last),
            f"time: {interval.seconds / interval.updates:.4f}",
            f"data: {interval.waited / interval.updates:.4f} ({share:.0f}%)",
            rate,
            memory,
        ]
        return "  ".join(parts)

    def _terms(self, last: dict[str, float]) -> list[str]:
        """Return a text for each metric: its last value, the epoch's average, and the chance level."""
        average = self.averages()
        terms = []
        for name, value in last.items():
            beside = f"{average[name]:.4f}"
            if name in self.chance:
                beside += f", chance {self.chance[name]:.4f}"
            terms.append(f"{name}: {value:.4f} ({beside})")
        return terms

    def _time_left(self) -> str:
        """Return the time to the end of the run at this epoch's speed, as [days, ]hours:minutes:seconds."""
        left = self.updates * (self.epochs - self.epoch) - self.done
        done = max(1, self.done - self._epoch_first)
        seconds = left * (time.monotonic() - self._epoch_start) / done
        return str(timedelta(seconds=int(seconds)))

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        """Show figures of an epoch's end in TensorBoard."""
        if self.board is not None:
            for name, value in values.items():
                self.board.scalar(name, value, _x(epoch + 1))

    def picture(self, name: str, image, epoch: int) -> None:
        """Show a picture (H, W, 3) uint8 in TensorBoard."""
        if self.board is not None:
            self.board.image(name, image, _x(epoch + 1))

    def averages(self) -> dict[str, float]:
        """Return the means over the updates of the epoch so far."""
        steps = self.meters.get("steps", 0)
        if not steps:
            return {}
        sums = {"steps", FLOPS, *COSTS}
        return {name: total / steps for name, total in self.meters.items() if name not in sums}

    def end_epoch(self, extra: dict[str, float]) -> dict[str, float]:
        """Write the epoch's line of log.txt: MAE's names first (train_lr, train_loss, epoch), then ours.

        It comes after those of earlier epochs: what else stands there is another run's, which has lost this
        folder, or was cut off by a full disk.
        """
        line = {f"train_{name}": value for name, value in self.averages().items()}
        line |= extra | {"epoch": self.epoch}
        line |= {f"chance_{name}": value for name, value in self.chance.items()}
        line |= self._epoch_speed()
        self.meters = {}
        self.truncate(self.epoch)
        self.write_line(line)
        return line

    def _epoch_speed(self) -> dict[str, float]:
        """Return the speed of the whole epoch, with what earlier starts of the run have trained of it."""
        images, seconds, waited = (self.meters.get(name, 0.0) for name in COSTS)
        if not seconds:
            # A checkpoint of an earlier version has no costs of its updates.
            return {}
        speed = self.speed(images, seconds, waited)
        if self.peak_flops and FLOPS in self.meters:
            speed["mfu"] = self._utilisation(self.meters[FLOPS], seconds)
        return speed

    def write_line(self, line: dict[str, float]) -> None:
        """Append one JSON object to log.txt, on a line of its own whatever the file ends with."""
        if not dist.is_main():
            return
        if self.board is not None:
            self.board.flush()
        if self.output_dir:
            path = os.path.join(self.output_dir, "log.txt")
            with survive_full_disk():
                make_again(self.output_dir)
                text = json.dumps(line)
                if _is_cut_off(path):
                    text = f"\n{text}"
                append_line(path, text)


def _x(epoch: int, part: float = 0.0) -> int:
    """Return a point of time on MAE's x axis: thousandths of an epoch, comparable across batch sizes."""
    return int((epoch + part) * 1000)


def _epoch_of(line: str) -> float:
    """Return the epoch of a line of log.txt; infinity for a line that a full disk or a lost node has cut
    off, or that is not of a run.
    """
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    if isinstance(epoch, (int, float)):
        return epoch
    return math.inf


def _is_cut_off(path: str) -> bool:
    """Whether the last line of a file has no end, because a kill or a full disk has cut it off."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return False
    with open(path, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read() != b"\n"


def write_predictions(path: str, rows: Sequence[tuple[int, int, int, float]], index) -> None:
    """Write a CSV line per image: name, label, predicted class, probability, and whether it is correct.

    Names are escaped so that a spreadsheet takes none for a formula. Bytes that are not valid UTF-8 stay.

    `rows` are (image, label, predicted class, probability), numbers in the data set's order. A label of -1 is
    an image that could not be decoded.
    """
    make_again(os.path.dirname(os.path.abspath(path)))
    # The same partial name each time: the next table replaces what a kill has left of this one.
    with replacing(path, writer="table", follow=True) as f:
        writer = csv.writer(f)
        writer.writerow(["image", "label", "prediction", "probability", "correct"])
        for image, label, predicted, probability in rows:
            name = "unreadable"
            if label >= 0:
                name = index.classes[label]
            names = [table_cell(text) for text in (index.name(image), name, index.classes[predicted])]
            writer.writerow([*names, f"{probability:.6f}", int(label == predicted)])
    print(f"wrote {len(rows)} predictions to {printable(path)}", flush=True)


def reserved_memory_mb() -> float:
    """Return the most memory that CUDA's allocator has held, in MB; 0 without CUDA.

    It includes free blocks, which other processes cannot use.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**20
    return 0.0


def peak_memory_mb() -> float:
    """Return the peak memory of this process in MB: allocated memory on CUDA, resident memory otherwise; 0 on
    Windows, which does not say it.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    if sys.platform == "darwin":
        return peak / 2**20
    return peak / 2**10
