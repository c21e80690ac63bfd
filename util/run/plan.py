"""What a run will cost, measured over a few steps before it begins; and run.json, which says what a run was."""

import contextlib
import json
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
from util.run.flops import FlopCounter, matmul_rate, synchronize

WARMUP, STEPS, SECONDS = (
    2,
    8,
    20.0,
)  # updates before the clock starts, updates measured, and when to measure fewer
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class Measured:
    """One update of this rank: seconds, those of them spent waiting for data, floating-point operations; and the
    device's rate at a large matrix product, its peak memory, and mean and std of the first batch after normalisation."""

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


def measure(
    step: Callable[[Iterator[dict], FlopCounter | None], float],
    batches: Callable[[int], Iterator[dict]],
    device: torch.device,
    dtype: torch.dtype,
    memory_mb: Callable[[], float],
) -> Measured:
    """Run `step(stream, counter) -> seconds waited for data` a few times on `batches(epoch)`, epoch after epoch."""
    samples = []

    def stream():
        epoch = 0
        while True:
            for batch in batches(epoch):
                if not samples:
                    # A copy: mixup and random erasing change the batch in place.
                    samples.append(batch["image"].detach().float().clone())
                yield batch
            epoch += 1

    endless = stream()
    counter = FlopCounter()
    step(endless, counter)
    for _ in range(WARMUP - 1):
        step(endless, None)
    done = waited = 0
    synchronize(device)
    begin = time.monotonic()
    # The number of steps must be the same on every rank: they wait for each other within a step.
    first = step(endless, None)
    synchronize(device)
    one = dist.gather_objects(time.monotonic() - begin)[0]
    waited, done = first, 1
    while done < min(STEPS, max(1, SECONDS / one)):
        waited += step(endless, None)
        done += 1
    synchronize(device)
    seconds = (time.monotonic() - begin) / done
    memory = memory_mb()
    dims = [
        d for d in range(samples[0].dim()) if d != samples[0].dim() - 3
    ]  # (B, C, H, W), or (B, crops, C, H, W)
    std, mean = torch.std_mean(samples[0], dim=dims)
    return Measured(
        seconds,
        waited / done,
        float(counter.total),
        matmul_rate(device, dtype),
        memory,
        mean.tolist(),
        std.tolist(),
    )


def size_mb(*states: dict) -> float:
    """Megabytes of all tensors in nested dictionaries and lists."""

    def count(x):
        if torch.is_tensor(x):
            return x.numel() * x.element_size()
        if isinstance(x, dict):
            return sum(map(count, x.values()))
        return sum(map(count, x)) if isinstance(x, (list, tuple)) else 0

    return sum(map(count, states)) / 2**20


def describe(
    m: Measured,
    *,
    model: nn.Module,
    device: torch.device,
    amp: str,
    images_per_update: int,
    updates: int,
    epochs: int,
    step: int,
    start: str,
    saved_mb: float,
    kept: int,
    folder: str | None,
) -> str:
    """The plan as text: a line each for data, steps, model, speed, time, disk, and where the run would start."""
    left = max(0, epochs * updates - step)
    seconds, mb = left * m.seconds, saved_mb * (kept + 2 * (kept > 0))
    there = next((p for p in parents(folder or ".") if os.path.isdir(p)), ".")
    numbers = [
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad or not trained) / 1e6:.2f} M"
        for trained in (False, True)
    ]
    wait = 100 * m.waited / m.seconds
    lines = {
        "samples": f"after normalisation mean {listed(m.sample_mean)}, std {listed(m.sample_std)} (0 and 1 fit the data)",
        "steps": f"{updates} per epoch, {images_per_update} images each; {left} to go of {epochs} x {updates}",
        "model": f"{numbers[0]} parameters, {numbers[1]} trained; {m.flops / 1e9:.3g} GFLOP per update and rank",
        "memory": f"{m.memory_mb:.0f} MB at most {'on the GPU' if device.type == 'cuda' else 'in the process'}, and workers",
        "speed": f"{images_per_update / m.seconds:.1f} images/s, {m.seconds:.3f} s per update, {wait:.0f} % of it waiting for "
        "data" + (": data-bound, more --num_workers may help" if wait > 30 else ""),
        "utilisation": f"{100 * m.utilisation:.0f} % of the {m.peak_flops / 1e9:.4g} GFLOP/s of a matrix product in {amp} on "
        f"{device}, measured here",
        "time": f"{seconds / 3600:.2f} hours for what is left, evaluation not counted",
        "disk": f"{mb:.0f} MB at most: {kept} numbered checkpoints of {saved_mb:.1f} MB, the last, and one that is being "
        f"written; {shutil.disk_usage(there).free / 2**20:.0f} MB are free",
        "start": start,
    }
    return "\n".join(
        ["plan (nothing is written):", *(f"  {name:<12} {text}" for name, text in lines.items())]
    )


def listed(values: list[float]) -> str:
    return " ".join(f"{v:.2f}" for v in values[:4]) + (" ..." if len(values) > 4 else "")


def parents(path: str) -> Iterator[str]:
    """A path, its folder, that one's folder, ..."""
    path = os.path.abspath(path)
    yield path
    while os.path.dirname(path) != path:
        path = os.path.dirname(path)
        yield path


def write_record(folder: str | None, flags: dict, resolved: dict) -> None:
    """run.json: flags, what became of them, versions, commit, host, devices; earlier starts of the run are kept.

    A disk that is full, or a folder that is gone, must not end a run here: it is a note.
    """
    if not folder or not dist.is_main():
        return
    path, earlier = os.path.join(folder, "run.json"), []
    with contextlib.suppress(OSError, ValueError, KeyError):
        with open(path) as f:
            before = json.load(f)
        earlier = [
            *before["earlier_starts"],
            {k: before[k] for k in ("started", "host", "commit", "resolved")},
        ]
    record = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "host": socket.gethostname(),
        "commit": commit(),
        "flags": flags,
        "resolved": resolved,
        "versions": versions(),
        "devices": devices(),
        "earlier_starts": earlier,
    }
    try:
        with open(path + ".partial", "w") as f:
            json.dump(record, f, indent=1)
        os.replace(path + ".partial", path)
    except OSError as e:
        print(f"warning: could not write {path}: {e}", flush=True)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def devices() -> list[str]:
    """The GPUs that this process sees, else the processor."""
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    name = platform.processor() or platform.machine()
    with (
        contextlib.suppress(OSError, StopIteration),
        open("/proc/cpuinfo") as f,
    ):  # Linux knows more than platform says
        name = next(line.partition(":")[2].strip() for line in f if line.startswith("model name"))
    return [f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]


def commit() -> str | None:
    """The code's git commit, with a + where files differ from it; None outside a repository or without git."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        said = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None
