"""Tools that all benchmarks share: interleaved timing, spreads, peak memory, records, tables, the machine."""

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
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from util.dist.allocator import keep_freed_memory, return_freed_memory
from util.files.cores import own_cores
from util.report.tables import Table
from util.train.amp import EMULATED, relative_speed

Key = TypeVar("Key", bound=Hashable)
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "torchcodec", "timm", "transformers", "numpy", "pillow")
MIB = 2**20


class Record:
    """The figures that a benchmark has measured so far.

    With a path, the file is rewritten after every row, so a process that is killed leaves the rows before.

    Attributes:
        head: further values in the file, such as the machine.
        results: lists of rows and single values, by name. A benchmark's `main` returns it.
    """

    def __init__(self, path: str | None = None, head: dict | None = None):
        self.path = path
        self.head = head or {}
        # Values are plain (numbers, texts, lists, dictionaries), since they are written as JSON.
        self.results: dict = {}

    def add(self, section: str, row: dict) -> None:
        """Append a row to the list of that name."""
        self.results.setdefault(section, []).append(row)
        self.write()

    def set(self, name: str, value: object) -> None:
        """Store a single value under a name."""
        self.results[name] = value
        self.write()

    def write(self) -> None:
        """Rewrite the file; do nothing without a path."""
        if not self.path:
            return
        # The file is replaced as a whole. A process that is killed here leaves the previous version.
        partial = f"{self.path}.partial"
        Path(partial).write_text(json.dumps(self.head | dict(results=self.results), indent=1) + "\n")
        os.replace(partial, self.path)


def unless_out_of_memory(measure: Callable[[], dict]) -> dict:
    """Return the result of `measure`, or {"error": "out of memory"} if the GPU's memory did not suffice.

    The memory that it held is freed in both cases. So `measure` must create its model, and its caller must
    not hold a reference to it.
    """
    try:
        found = measure()
    except torch.OutOfMemoryError:
        found = dict(error="out of memory")
    # After the handler: while it runs, the exception's traceback still refers to the model.
    free_gpu_memory()
    return found


def free_gpu_memory() -> None:
    """Free all GPU memory that nothing refers to any more."""
    # Compiled code may refer to its model, so it is dropped first.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work. A CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def default_device() -> str:
    """Name of the default device: the GPU if there is one."""
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def choose_device(name: str) -> torch.device:
    """Return the device of that name, and set the precision of float32 products as training does
    (`util.dist.init`).

    Peers run with this setting too.
    """
    device = torch.device(name)
    if device.type == "cuda":
        # TF32.
        torch.set_float32_matmul_precision("high")
    return device


def default_amps(device: torch.device) -> list[str]:
    """Precisions that are measured by default: bf16 on a GPU, fp32 and bf16 on a CPU that has it."""
    if device.type == "cuda":
        return ["bf16"]
    if relative_speed(torch.bfloat16) < EMULATED:
        print("bf16 is left out, as this CPU emulates it; --amp fp32 bf16 measures both", flush=True)
        return ["fp32"]
    return ["fp32", "bf16"]


def groups(keys: list[Key], one_by_one: bool) -> list[list[Key]]:
    """Split variants into the groups that are interleaved: all in one, or each by itself."""
    if one_by_one:
        return [[key] for key in keys]
    return [keys]


def rotated(items: list[Key], turns: int) -> list[Key]:
    """The items in the same cyclic order, starting `turns` later."""
    start = turns % len(items)
    return items[start:] + items[:start]


def interleaved(
    variants: Mapping[Key, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    prepare: Callable[[Key], object] = lambda key: None,
) -> dict[Key, list[float]]:
    """Seconds of every variant in every round.

    A round runs all variants once, each time in another (rotated) order. So a slow minute of a shared machine
    or a warm cache does not favour one of them. Ratios should be formed within a round: see `ratio`.

    Args:
        warmup: unmeasured calls of each variant beforehand.
        clock: `time.perf_counter`, or `time.process_time` for the CPU time of all threads of this process.
        prepare: called with a variant's key before each of its calls, unmeasured.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in variants}
    # The first call of a variant allocates and loads what later ones find ready.
    for key, call in variants.items():
        for _ in range(warmup):
            prepare(key)
            call()
    keys = list(variants)
    for i in range(rounds):
        for key in rotated(keys, i):
            prepare(key)
            start = clock()
            variants[key]()
            seconds[key].append(clock() - start)
    return seconds


def freed_memory(
    kept: Callable[[Key], bool], calls: Mapping[Key, Callable[[], object]]
) -> Callable[[Key], None]:
    """Make a `prepare` for `interleaved` that switches how the process treats freed memory.

    Variants for which `kept` is true run as our mains do on a CPU: freed memory stays in the process
    (util/dist/allocator.py). The others run with glibc's default. After a switch one of `calls` runs
    unmeasured, so that the process holds the memory that it needs.
    """
    # None: unknown, so the first call of `prepare` always switches.
    now: bool | None = None

    def prepare(key: Key) -> None:
        nonlocal now
        wanted = kept(key)
        if wanted is now:
            return
        now = wanted
        if wanted:
            keep_freed_memory()
        else:
            return_freed_memory()
        trim()
        calls[key]()

    return prepare


def trim() -> None:
    """Return freed memory to the system, if the C library can."""
    # glibc has it; musl and macOS do not.
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)


def clock_for(device_type: str) -> Callable[[], float]:
    """Clock for ratios: wall time on a GPU, CPU time of all threads on a CPU."""
    # Other processes may use the same CPU, and wall time would measure them too.
    if device_type == "cpu":
        return time.process_time
    return time.perf_counter


def peak_memory(call: Callable[[], object], cuda: bool = False) -> float:
    """Largest memory in MiB that a call holds in addition to what was held before it.

    On a CPU this is resident memory, which includes the allocator's and the libraries': run the call once
    before, and read the figure as an upper bound. It is nan on systems other than Linux.
    """
    # Garbage that is collected during the call would lower the figure.
    gc.collect()
    if cuda:
        return peak_gpu_memory(call)
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    # Memory that was freed but kept would hide what the call takes.
    trim()
    # 5 resets the peak, VmHWM.
    reset.write_text("5")
    before = status_kib("VmRSS")
    call()
    return (status_kib("VmHWM") - before) / 1024


def peak_gpu_memory(call: Callable[[], object]) -> float:
    """Largest memory in MiB that a call allocates on the GPU in addition to what was allocated before it."""
    # The host runs ahead of the GPU: earlier work must be finished before the counters are read.
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def kept_for_backward(forward: Callable[[], Tensor], inputs: list[Tensor]) -> int:
    """Bytes that the graph of `forward` keeps for backward, without `inputs`. Each storage counts once."""
    excluded = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        # Views of a tensor share its storage.
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        loss = forward()
    # The graph lives as long as the loss: until here, no storage was freed and its address used again.
    del loss
    return sum(kept.values())


def status_kib(name: str) -> int:
    """A memory figure of this process from /proc, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest value."""
    return dict(median=statistics.median(values), min=min(values), max=max(values))


def ratio(baseline: list[float], other: list[float]) -> dict[str, float]:
    """How many times faster `other` is: median, least and largest of the ratios within each round."""
    return spread([a / b for a, b in zip(baseline, other, strict=True)])


def ratio_of_medians(baseline: list[float], other: list[float]) -> dict[str, float]:
    """How many times faster `other` is, for rounds that were not interleaved.

    The least and the largest value are the extremes that the two spreads allow.
    """
    return dict(
        median=statistics.median(baseline) / statistics.median(other),
        min=min(baseline) / max(other),
        max=max(baseline) / min(other),
    )


def shown(values: dict[str, float] | None, digits: int = 2) -> str:
    """A result of `spread` or `ratio` as `median [min..max]`; an empty text for None."""
    if values is None:
        return ""
    return "{median:.{d}f} [{min:.{d}f}..{max:.{d}f}]".format(d=digits, **values)


def cell(value: object) -> str:
    """Text of a table's cell; floats have three decimal places."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)


def table(rows: list[dict]) -> str:
    """A Markdown table. The keys of the first row are the columns."""
    cells = [[cell(value) for value in row.values()] for row in rows]
    # Padded, so that the table can be read as plain text too.
    return Table(list(rows[0]), cells).markdown(padded=True)


def machine() -> dict[str, object]:
    """Processor, cores, memory, accelerator, versions, and the commit as `_commit` gives it."""
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    # A package that is missing is left out.
    versions = {package: _version(package) for package in PACKAGES}
    installed = {package: version for package, version in versions.items() if version}
    return dict(
        machine=dict(
            cpu=_cpu(),
            cores=own_cores(),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            gpu=gpu,
            system=platform.platform(),
            load_1min=os.getloadavg()[0],
            threads=torch.get_num_threads(),
        ),
        versions=dict(python=platform.python_version()) | installed,
        commit=_commit(),
    )


def _cpu() -> str:
    """Name of the processor."""
    try:
        # `platform.processor()` is empty or only the architecture on most Linux systems.
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    """Output of a git command in this checkout."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _commit() -> str | None:
    """Commit of this checkout, with "+" if tracked files differ from it; None without git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        if _git("status", "--porcelain", "--untracked-files=no"):
            commit += "+"
        return commit
    except (OSError, subprocess.CalledProcessError):
        return None
