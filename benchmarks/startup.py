"""Start-up: --help, the listing of 1.3 million files and its cache, and a worker's memory for it.

    python benchmarks/run.py startup

It generates a folder of empty files (1.3 million inodes) and removes it.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import ROOT, Record, shown, spread, table
from util.data.datasets import ImageDataset
from util.data.pixels import normalize
from util.data.sources.layouts import build_index

# Run in a new process with a folder as its argument. statm counts pages.
START = """
import os, sys, time
from util.data.sources.layouts import build_index

def mib():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

before = mib()
start = time.perf_counter()
index = build_index(sys.argv[1])
print(time.perf_counter() - start, mib() - before, len(index))
"""


def help_seconds(rounds: int) -> dict[str, dict[str, float]]:
    """Wall time of `--help` of each main."""
    found = {}
    for main_file in sorted(ROOT.glob("main_*.py")):
        seconds = []
        for _ in range(rounds):
            # A new process each time: Python's start and all imports count.
            start = time.perf_counter()
            subprocess.run([sys.executable, str(main_file), "--help"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        found[main_file.name] = spread(seconds)
    return found


def generate(folder: str, files: int, classes: int) -> None:
    """Create empty files with names as in ImageNet."""
    for c in range(classes):
        path = os.path.join(folder, "train", f"n{c:08d}")
        os.makedirs(path)
        # Classes get equal shares of the files.
        for k in range(c, files, classes):
            name = os.path.join(path, f"n{c:08d}_{k}.JPEG")
            # Without Python's file objects, which take several times as long.
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY))


@dataclass(frozen=True)
class Start:
    """Seconds of `build_index`, MiB of memory that it adds, and the number of files."""

    seconds: float
    mib: float
    files: int


def start_once(folder: str) -> Start:
    """List a folder in a new process, as a run does."""
    command = [sys.executable, "-c", START, folder]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    seconds, mib, files = done.stdout.split()
    return Start(float(seconds), float(mib), int(files))


class Names(ImageDataset):
    """Samples that use the listing as reading an image does, but read no image."""

    def __getitem__(self, item):
        return len(self.index.name(item)) + int(self.index.labels[item])


def worker_mib(index, workers: int, touched: int) -> float:
    """Private memory of a worker in MiB after the workers have looked up `touched` names, as a median."""
    # Reading an entry of a Python list would copy its page in the worker; arrays stay shared.
    dataset = Names(index, normalize)
    order = torch.randint(len(index), (touched,), generator=torch.Generator().manual_seed(0)).tolist()
    loader = torch.utils.data.DataLoader(dataset, batch_size=1000, sampler=order, num_workers=workers)
    private: list[float] = []
    # Read shortly before the end, while all workers still run.
    last = len(loader) - workers - 2
    for i, _ in enumerate(iter(loader)):
        if i == last:
            pids = [process.pid for process in multiprocessing.active_children()]
            private = [private_mib(pid) for pid in pids if pid is not None]
    return statistics.median(private)


def private_mib(pid: int) -> float:
    """Memory of a process in MiB that it has written and shares with no other process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup has no Private_Dirty")


def get_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    parser = argparse.ArgumentParser(prog="run.py startup", description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=1_300_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--scratch", help="where to generate the files (default: the system's temporary folder)"
    )
    return parser


def measure_listing(folder: str, rounds: int, record: Record) -> None:
    """Record the listing of a folder: time, memory and cache, and the memory in workers."""
    # The first start writes the cache, the others read it.
    first = start_once(folder)
    again = [start_once(folder) for _ in range(rounds)]
    cache = sum(path.stat().st_size for path in Path(folder, ".index").iterdir()) / 2**20
    record.results |= dict(
        files=first.files,
        first_start_s=first.seconds,
        second_start_s=spread([start.seconds for start in again]),
        index_mib=again[0].mib,
        cache_mib=cache,
    )
    record.write()
    # The demo set shows the memory of a worker without a listing.
    listings = {"demo set": build_index(str(ROOT / "data" / "demo")), "listing": build_index(folder)}
    workers = {name: worker_mib(index, 2, 20_000) for name, index in listings.items()}
    record.set("worker_private_mib", workers)


def main(argv: list[str], record: Record | None = None) -> dict:
    """Measure and print start-up times and the listing's memory. Returns the figures."""
    args = get_parser().parse_args(argv)
    record = record or Record()
    results = record.results
    record.set("help", help_seconds(args.rounds))
    lines = [
        {"command": f"{name} --help", "s, median": v["median"], "min": v["min"], "max": v["max"]}
        for name, v in results["help"].items()
    ]
    print(table(lines))
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        generate(folder, args.files, args.classes)
        # The listing of a folder that has just changed is not cached.
        time.sleep(2.5)
        measure_listing(folder, args.rounds, record)
    second = results["second_start_s"]
    workers = results["worker_private_mib"]
    print(
        f"\n{results['files']} files: first start {results['first_start_s']:.2f} s, "
        f"from the cache {shown(second)} s; "
        f"cache {results['cache_mib']:.0f} MiB, in memory {results['index_mib']:.0f} MiB"
    )
    print(
        f"private memory of a loader worker: {workers['listing']:.0f} MiB, with the demo set's listing "
        f"{workers['demo set']:.0f} MiB"
    )
    return results
