"""What every benchmark needs: interleaved timing, medians with spread, peak memory, a record on disk, a table, the machine."""

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from util.dist.allocator import keep_freed_memory, return_freed_memory

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "pillow")


class Record:
    """What a benchmark has measured so far. With a path, the file holds it after every row, whatever ends the process.

    `results` is what a benchmark's `main` returns: lists of rows and single values, by name.
    """

    def __init__(self, path: str | None = None, head: dict | None = None):
        self.path = path
        self.head = head or {}
        self.results: dict[str, object] = {}

    def add(self, section: str, row: dict) -> None:
        """Append a row to the list of that name."""
        self.results.setdefault(section, []).append(row)
        self.write()

    def set(self, name: str, value: object) -> None:
        self.results[name] = value
        self.write()

    def write(self) -> None:
        if not self.path:
            return
        partial = f"{self.path}.partial"  # replaced as a whole: a process that is killed here leaves the file before
        Path(partial).write_text(json.dumps(self.head | dict(results=self.results), indent=1) + "\n")
        os.replace(partial, self.path)


def unless_out_of_memory(measure: Callable[[], dict]) -> dict:
    """What `measure` returns, or {"error": "out of memory"} where the GPU's did not suffice.

    Memory that it held is given back either way. So `measure` must create its model, and its caller must not keep it.
    """
    import torch

    try:
        found = measure()
    except torch.OutOfMemoryError:
        found = dict(error="out of memory")
    free_gpu_memory()
    return found


def free_gpu_memory() -> None:
    """Give back what nothing refers to any more; code that was compiled is forgotten, as it may refer to its model."""
    import torch

    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for(device) -> None:
    """Until the device has done what it was given; a CPU always has."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_device(name: str):
    """The device, with the precision of float32 products that training sets there (`util.dist.init`), for peers too."""
    import torch

    device = torch.device(name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    return device


def interleaved(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    prepare: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of every variant in every round.

    A round runs all variants once, each time in another order (rotated), so that a slow minute of a shared machine or
    a warm cache favours none. Ratios are to be formed within a round: see `ratio`.

    Args:
        warmup: unmeasured calls of each variant beforehand.
        clock: `time.perf_counter`, or `time.process_time` for the CPU time of all threads of this process.
        prepare: called with a variant's name before each of its calls, unmeasured.
    """
    seconds = {name: [] for name in variants}
    for name, call in variants.items():
        for _ in range(warmup):
            prepare(name)
            call()
    names = list(variants)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            prepare(name)
            start = clock()
            variants[name]()
            seconds[name].append(clock() - start)
    return seconds


def freed_memory(
    kept: Callable[[str], bool], calls: dict[str, Callable[[], object]]
) -> Callable[[str], None]:
    """A `prepare` for `interleaved`: variants for which `kept` is true run as our mains do on a CPU, which keep freed
    memory (util/dist/allocator.py), the others as glibc does by default. After a change a call settles what is held."""
    now: bool | None = None

    def prepare(name):
        nonlocal now
        if kept(name) is not now:
            now = kept(name)
            (keep_freed_memory if now else return_freed_memory)()
            trim()
            calls[name]()

    return prepare


def trim() -> None:
    """Give back what was freed but kept, where the C library can."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def clock_for(device_type: str) -> Callable[[], float]:
    """What ratios are formed of: wall time on a GPU; CPU time of all threads on a CPU, which others may be using too."""
    return time.process_time if device_type == "cpu" else time.perf_counter


def peak_memory(call: Callable[[], object], cuda: bool = False) -> float:
    """MiB that a call holds at its worst beyond what was held before it; on the CPU nan where the system is not Linux.

    On the CPU that is resident memory, of the allocator and of libraries too: call once before, and read it as an
    upper bound.
    """
    gc.collect()
    if cuda:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")

    def kib(name):
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    trim()  # what was freed but kept would hide what the call takes
    reset.write_text("5")  # VmHWM starts again
    before = kib("VmRSS:")
    call()
    return (kib("VmHWM:") - before) / 1024


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest value."""
    return dict(median=statistics.median(values), min=min(values), max=max(values))


def ratio(baseline: list[float], other: list[float]) -> dict[str, float]:
    """How many times faster `other` is: median, least and largest of the ratios within each round."""
    return spread([a / b for a, b in zip(baseline, other, strict=True)])


def ratio_of_medians(baseline: list[float], other: list[float]) -> dict[str, float]:
    """The same where rounds were not interleaved: medians, and the extremes that the two spreads allow."""
    return dict(
        median=statistics.median(baseline) / statistics.median(other),
        min=min(baseline) / max(other),
        max=max(baseline) / min(other),
    )


def shown(values: dict[str, float] | None, digits: int = 2) -> str:
    """`median [min..max]` of what `spread` and `ratio` return; nothing for None."""
    if values is None:
        return ""
    return "{median:.{d}f} [{min:.{d}f}..{max:.{d}f}]".format(d=digits, **values)


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table; the columns are the first row's keys, floats are shown with three digits after the point."""
    cells = [
        [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        for row in [dict.fromkeys(rows[0]), *rows]
    ]
    cells[0] = list(rows[0])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def machine() -> dict[str, object]:
    """Processor, cores, memory, accelerator, versions, commit (with "+" where files differ from it)."""
    torch = sys.modules.get("torch")  # a benchmark that does not use it should not pay for its import
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    return dict(
        machine=dict(
            cpu=_cpu(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            gpu=gpu,
            system=platform.platform(),
            load_1min=os.getloadavg()[0],
            threads=torch.get_num_threads() if torch else None,
        ),
        versions=dict(python=platform.python_version()) | {p: v for p in PACKAGES if (v := _version(p))},
        commit=_commit(),
    )


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    def git(*words):
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(
            git("status", "--porcelain", "--untracked-files=no")
        )
    except (OSError, subprocess.CalledProcessError):
        return None
