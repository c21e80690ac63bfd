"""Start-up: --help, the listing of 1.3 million files and its cache, and what the listing costs each worker.

python benchmarks/run.py startup              generates a folder of empty files (1.3 million inodes) and removes it
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.timing import ROOT, Record, spread, table
from util.data.datasets import ImageDataset
from util.data.pixels import normalize
from util.data.sources.layouts import build_index


def help_seconds(rounds):
    """Wall time of `--help` of each main."""
    found = {}
    for main_file in sorted(ROOT.glob("main_*.py")):
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            subprocess.run([sys.executable, str(main_file), "--help"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        found[main_file.name] = spread(seconds)
    return found


def generate(folder, files, classes):
    """ImageNet's names without its images."""
    for c in range(classes):
        path = os.path.join(folder, "train", f"n{c:08d}")
        os.makedirs(path)
        for k in range(c, files, classes):
            os.close(os.open(os.path.join(path, f"n{c:08d}_{k}.JPEG"), os.O_CREAT | os.O_WRONLY))


def start_seconds(folder):
    """In a new process, as a run does it: (seconds of build_index, MiB of memory that it added)."""
    code = (
        "import sys, time; from util.data.sources.layouts import build_index\n"
        "def mib(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20\n"
        "before, start = mib(), time.perf_counter(); index = build_index(sys.argv[1])\n"
        "print(time.perf_counter() - start, mib() - before, len(index))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, folder], cwd=ROOT, check=True, capture_output=True, text=True
    )
    out = out.stdout.split()
    return float(out[0]), float(out[1]), int(out[2])


class Names(ImageDataset):
    """Samples that touch the listing as reading an image does, without an image."""

    def __getitem__(self, item):
        return len(self.index.name(item)) + int(self.index.labels[item])


def worker_mib(index, workers, touched):
    """Private (unshared, dirty) memory of each worker after it has looked up `touched` images' names."""
    dataset = Names(index, normalize)
    order = torch.randint(len(index), (touched,), generator=torch.Generator().manual_seed(0)).tolist()
    loader = torch.utils.data.DataLoader(dataset, batch_size=1000, sampler=order, num_workers=workers)
    batches, private = iter(loader), []
    for i, _ in enumerate(batches):
        if i == len(loader) - workers - 2:
            for process in multiprocessing.active_children():
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                private.append(
                    next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024
                )
    return statistics.median(private)


def main(argv, record: Record | None = None) -> dict:
    parser = argparse.ArgumentParser(prog="run.py startup", description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=1_300_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--scratch", help="where to generate the files (default: the system's temporary folder)"
    )
    args, record = parser.parse_args(argv), record or Record()
    record.set("help", help_seconds(args.rounds))
    results = record.results
    print(
        table(
            [
                dict(command=f"{k} --help", **{"s, median": v["median"], "min": v["min"], "max": v["max"]})
                for k, v in results["help"].items()
            ]
        )
    )
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        generate(folder, args.files, args.classes)
        time.sleep(2.5)  # a folder that was just changed is not cached
        first = start_seconds(folder)
        again = [start_seconds(folder) for _ in range(args.rounds)]
        cache = sum(p.stat().st_size for p in Path(folder, ".index").iterdir()) / 2**20
        index = build_index(folder)
        small = build_index(str(ROOT / "data" / "demo"))
        results |= dict(
            files=first[2],
            first_start_s=first[0],
            second_start_s=spread([s for s, _, _ in again]),
            index_mib=again[0][1],
            cache_mib=cache,
        )
        record.write()
        workers = {k: worker_mib(i, 2, 20_000) for k, i in (("demo set", small), ("listing", index))}
        record.set("worker_private_mib", workers)
    second = results["second_start_s"]
    print(
        f"\n{first[2]} files: first start {first[0]:.2f} s, from the cache {second['median']:.2f} s "
        f"[{second['min']:.2f}..{second['max']:.2f}]; cache {cache:.0f} MiB, in memory {again[0][1]:.0f} MiB"
    )
    print(
        f"private memory of a loader worker: {workers['listing']:.0f} MiB, with the demo set's listing "
        f"{workers['demo set']:.0f} MiB"
    )
    return results
