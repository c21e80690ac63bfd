"""A run's cost, measured over a few updates before it begins; and run.json, the record of a run."""

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import nn

from util import dist
from util.files.atomic import read_json, write_json
from util.files.cores import own_cores
from util.files.names import counted
from util.run.checkpoint_manager import CheckpointManager
from util.run.flops import FlopCounter, matmul_rate, synchronize

WARMUP = 2  # updates before the clock starts: the first ones create handles and fill caches
STEPS = 8  # updates that are measured
SECONDS = 20.0  # fewer updates are measured if they would take longer
DATA_BOUND = 30  # percent of the time spent waiting for data, above which more workers are suggested
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class Measured:
    """One update of this rank.

    `seconds` is its duration, `waited` the part spent waiting for data, `flops` its floating-point
    operations. `peak_flops` is the device's rate at a large matrix product. `sample_mean` and `sample_std`
    are per channel, of the first batch after normalisation.
    """

    seconds: float
    waited: float
    flops: float
    peak_flops: float
    memory_mb: float
    sample_mean: list[float]
    sample_std: list[float]

    @property
    def utilisation(self) -> float:
        """Share of the measured peak that the model's operations use, data and optimizer included."""
        return self.flops / self.seconds / self.peak_flops


@dataclass(frozen=True)
class PlannedRun:
    """The run that a dry run describes: `updates` per epoch, `step` updates done, and the size of a
    checkpoint.
    """

    epochs: int
    updates: int
    step: int
    images_per_update: int
    start: str
    saved_mb: float
    checkpoints: CheckpointManager | None

    @property
    def updates_left(self) -> int:
        return max(0, self.epochs * self.updates - self.step)

    @property
    def kept(self) -> int:
        """Number of numbered checkpoints that the folder holds at the end."""
        if self.checkpoints is None:
            return 0
        # The last epoch is always kept.
        numbered = {epoch for epoch in range(self.epochs) if self.checkpoints.keeps(epoch)} | {
            self.epochs - 1
        }
        return min(len(numbered), self.checkpoints.keep or len(numbered))


def measure(
    step: Callable[[Iterator[dict], FlopCounter | None], float],
    batches: Callable[[int], Iterator[dict]],
    device: torch.device,
    dtype: torch.dtype,
    memory_mb: Callable[[], float],
) -> Measured:
    """Run a few updates and return what one costs.

    `step(stream, counter)` runs one update and returns the seconds that it waited for data. `batches(epoch)`
    yields the batches of an epoch; epochs follow each other until enough updates are measured.
    """
    first_images: list[torch.Tensor] = []

    def endless() -> Iterator[dict]:
        epoch = 0
        while True:
            for batch in batches(epoch):
                if not first_images:
                    # A copy, because mixup and random erasing change the batch in place.
                    first_images.append(batch["image"].detach().float().clone())
                yield batch
            epoch += 1

    stream = endless()
    counter = FlopCounter()
    step(stream, counter)
    for _ in range(WARMUP - 1):
        step(stream, None)
    synchronize(device)
    begin = time.monotonic()
    waited = step(stream, None)
    synchronize(device)
    # Ranks wait for each other within an update, so all must measure as many: rank 0's first update decides.
    seconds_of_one = dist.gather_objects(time.monotonic() - begin)[0]
    steps = 1
    while steps < min(STEPS, max(1, SECONDS / seconds_of_one)):
        waited += step(stream, None)
        steps += 1
    synchronize(device)
    seconds = (time.monotonic() - begin) / steps
    # Before the matrix product below, which needs memory of its own.
    memory = memory_mb()
    mean, std = _channel_statistics(first_images[0])
    rate = matmul_rate(device, dtype)
    return Measured(seconds, waited / steps, float(counter.total), rate, memory, mean, std)


def _channel_statistics(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of images (B, C, H, W) or (B, crops, C, H, W)."""
    channel = images.dim() - 3
    others = [d for d in range(images.dim()) if d != channel]
    std, mean = torch.std_mean(images, dim=others)
    return mean.tolist(), std.tolist()


def size_mb(state) -> float:
    """Return the megabytes of all tensors in nested dictionaries and lists."""
    return _bytes(state) / 2**20


def _bytes(state) -> int:
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(_bytes, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(_bytes, state))
    return 0


def describe(measured: Measured, run: PlannedRun, model: nn.Module, device: torch.device, amp: str) -> str:
    """Return the plan as text: a line each for data, steps, model, speed, time, disk, and the start."""
    lines = {
        "samples": _samples(measured),
        "steps": f"{run.updates} per epoch, {counted(run.images_per_update, 'image')} each; "
        f"{run.updates_left} to go of {run.epochs} x {run.updates}",
        "model": _model_size(model) + f"; {measured.flops / 1e9:.3g} GFLOP per update and rank",
        "memory": _memory(measured, device),
        "speed": _speed(measured, run),
        "utilisation": f"{100 * measured.utilisation:.0f} % of the {measured.peak_flops / 1e9:.4g} GFLOP/s "
        f"of a matrix product in {amp} on {device}, measured here",
        "time": f"{run.updates_left * measured.seconds / 3600:.2f} hours to the end, without evaluation",
        "disk": _disk(run),
        "start": run.start,
    }
    return "\n".join(
        ["plan (nothing is written):", *(f"  {name:<12} {text}" for name, text in lines.items())]
    )


def _samples(measured: Measured) -> str:
    mean = _listed(measured.sample_mean)
    std = _listed(measured.sample_std)
    return f"after normalisation mean {mean}, std {std} (0 and 1 fit the data)"


def _model_size(model: nn.Module) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{parameters / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained"


def _memory(measured: Measured, device: torch.device) -> str:
    place = "in the process"
    if device.type == "cuda":
        place = "on the GPU"
    return f"{measured.memory_mb:.0f} MB at most {place}, and workers"


def _speed(measured: Measured, run: PlannedRun) -> str:
    rate = run.images_per_update / measured.seconds
    wait = 100 * measured.waited / measured.seconds
    text = f"{rate:.1f} images/s, {measured.seconds:.3f} s per update, {wait:.0f} % of it waiting for data"
    if wait > DATA_BOUND:
        text += ": data-bound, more `num_workers` may help"
    return text


def _disk(run: PlannedRun) -> str:
    folder = "."
    copies = 0
    if run.checkpoints is not None:
        folder = run.checkpoints.dir
        # Besides the numbered ones: the last checkpoint, and one that is being written.
        copies = run.kept + 2
    # The folder may not exist yet. Its nearest existing parent is on the same disk.
    existing = next((path for path in _with_parents(folder) if os.path.isdir(path)), ".")
    free = shutil.disk_usage(existing).free / 2**20
    return (
        f"{run.saved_mb * copies:.0f} MB at most: {counted(run.kept, 'numbered checkpoint')} of "
        f"{run.saved_mb:.1f} MB, "
        f"the last, and one that is being written; {free:.0f} MB are free"
    )


def _listed(values: list[float]) -> str:
    """Return up to four values as text, and an ellipsis for the rest."""
    text = " ".join(f"{value:.2f}" for value in values[:4])
    if len(values) > 4:
        text += " ..."
    return text


def _with_parents(path: str) -> Iterator[str]:
    """Yield a path, its folder, the folder of that, and so on."""
    path = os.path.abspath(path)
    yield path
    while os.path.dirname(path) != path:
        path = os.path.dirname(path)
        yield path


def write_record(folder: str | None, flags: dict, resolved: dict) -> None:
    """Write run.json: flags, what became of them, versions, commit, host and devices.

    Earlier starts of the run are kept in it. The folder is made if it is missing. A full disk is only
    reported: it must not end a run here.
    """
    if not folder or not dist.is_main():
        return
    path = os.path.join(folder, "run.json")
    record = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "host": socket.gethostname(),
        "commit": commit(),
        "flags": flags,
        "resolved": resolved,
        "versions": versions(),
        "devices": devices(),
        "earlier_starts": _earlier_starts(path),
    }
    try:
        os.makedirs(folder, exist_ok=True)
        write_json(path, record)
    except OSError as error:
        print(f"warning: {path} could not be written: {error}", flush=True)


def _earlier_starts(path: str) -> list[dict]:
    """Return the starts that an existing run.json lists, and its own.

    A file that is damaged, or of another program, lists none; a warning names it. Entries that it lacks are
    left out.
    """
    try:
        before = read_json(path, dict)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        print(f"warning: earlier starts of the run are not recorded: {error}", flush=True)
        return []
    earlier = before.get("earlier_starts")
    if not isinstance(earlier, list):
        earlier = []
    return [*earlier, {k: before[k] for k in ("started", "host", "commit", "resolved") if k in before}]


def versions() -> dict[str, str]:
    """Return the versions of Python, of the main packages, and of CUDA if there is one."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    if torch.version.cuda:
        installed["cuda"] = torch.version.cuda
    return installed


def devices() -> list[str]:
    """Return the names of the GPUs that this process sees, or else of the processor."""
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    name = platform.processor() or platform.machine()
    # On Linux /proc/cpuinfo names the model, which `platform` does not.
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as f:
        name = next(line.partition(":")[2].strip() for line in f if line.startswith("model name"))
    return [f"{name}, {own_cores()} cores, {torch.get_num_threads()} threads"]


def commit() -> str | None:
    """Return the code's git commit, with a + if files differ from it; None outside a repository or without
    git.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
