"""From JPEGs to uint8 crops: images per second and core against torchvision's ImageFolder + PIL, alone and in a loader.

    python benchmarks/run.py data --data_path photos.tar        a tar or a folder of JPEGs; the demo's without it
    python benchmarks/run.py data --data_path photos.tar --minutes 20      and whether memory grows
"""
import argparse
import io
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder

from benchmarks.timing import interleaved, ratio, shown, spread, table
from util import native, repack
from util.datasets import DEMO, EpochSampler, ImageDataset, build_loader
from util.image_index import build_index
from util.transforms import IMAGENET_MEAN, IMAGENET_STD, pretrain_transform

SIZE = 224
BASELINE = "torchvision ImageFolder + PIL, float32"


class WithoutNative(ImageDataset):
    """The same samples where the library was not built."""

    def _crops_jpegs(self):
        return False


def unpack(index, folder):
    """As a class folder for ImageFolder, whatever the source's layout."""
    folder = Path(folder, "train")
    for i in range(len(index)):
        name = Path(index.name(i))
        path = folder / (name if len(name.parts) > 1 else Path("all", name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(index.read(i))
    return str(folder.parent)


def datasets(data_path, scratch):
    """Name -> data set; the baseline first. Shards are made in `scratch`."""
    folder = unpack(build_index(data_path, labels=False), scratch)
    pil = tv.Compose([tv.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=tv.InterpolationMode.BICUBIC),
                      tv.RandomHorizontalFlip(), tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    pil_uint8 = tv.Compose([*pil.transforms[:2], tv.PILToTensor()])
    made = {BASELINE: ImageFolder(os.path.join(folder, "train"), pil),
            "the same, uint8": ImageFolder(os.path.join(folder, "train"), pil_uint8)}
    files, crop = build_index(folder), pretrain_transform(SIZE)
    made["torchvision.io + v2, uint8 (without the library)"] = WithoutNative(files, crop)
    if not native.library():
        print(f"the rest needs the native library: `{native.BUILD}` ({native.describe()})")
        return made
    made["native, original files"] = ImageDataset(files, crop)
    made["native, original files, DCT scaling"] = ImageDataset(files, pretrain_transform(SIZE, dct_scaling=True))
    for name, bound in (("lossless shards", None), ("shards of long side 500", 500)):
        target = os.path.join(scratch, name.replace(" ", "_"))
        repack.repack(folder, target, long_side=bound, num_workers=2)
        made[f"native, {name}"] = ImageDataset(build_index(target), crop)
    return made


def per_core(sets, rounds, images):
    """One thread of this process; seconds are the CPU time of all its threads."""
    def whole(dataset):
        def call():
            for i in range(images):
                dataset[i % len(dataset)]
        return call
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = interleaved({k: whole(d) for k, d in sets.items()}, rounds, clock=time.process_time)
    torch.set_num_threads(before)
    return [dict(path=k, ms=spread([t / images * 1e3 for t in s]), images_per_s=spread([images / t for t in s]),
                 ratio=ratio(seconds[BASELINE], s)) for k, s in seconds.items()]


def in_a_loader(sets, rounds, batches, batch_size, workers):
    """Shuffled batches from worker processes, collated: images per second of wall time, and CPU time of all processes.

    On a machine that others use too, only the CPU time says what a path costs.
    """
    names = [k for k in sets if "DCT" not in k]
    wall, cpu = ({k: [] for k in names} for _ in range(2))
    order = torch.randperm((batches + 2 * workers) * batch_size, generator=torch.Generator().manual_seed(0))
    for i in range(rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            dataset = sets[name]
            sampler = order.remainder(len(dataset)).tolist()
            make = torch.utils.data.DataLoader if isinstance(dataset, ImageFolder) else build_loader
            batch_iterator = iter(make(dataset, sampler=sampler, batch_size=batch_size, num_workers=workers))
            for _ in range(workers):  # the workers' start
                next(batch_iterator)
            start, used = time.perf_counter(), cpu_seconds()
            for _ in range(batches):
                next(batch_iterator)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(cpu_seconds() - used)
            del batch_iterator
    images = batches * batch_size
    return [dict(path=k, images_per_s=spread([images / t for t in wall[k]]), ratio=ratio(wall[BASELINE], wall[k]),
                 cpu_ms=spread([t / images * 1e3 for t in cpu[k]]), cpu_ratio=ratio(cpu[BASELINE], cpu[k])) for k in names]


def cpu_seconds():
    """User and system time of this process and its running children."""
    ticks = 0
    for pid in [os.getpid(), *(p.pid for p in multiprocessing.active_children())]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident():
    """MiB of this process and its children, shared pages counted in proportion."""
    total = 0
    for pid in [os.getpid(), *(p.pid for p in multiprocessing.active_children())]:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def growth(dataset, minutes, workers):
    """MiB over a run of `minutes`, read ten times."""
    sampler = EpochSampler(len(dataset), batch_size=min(50, len(dataset)), seed=0)
    loader = build_loader(dataset, sampler, batch_size=sampler.batch_size, num_workers=workers)
    start, read, images, epoch = time.time(), [], 0, 0
    while len(read) < 10:
        sampler.set_position(epoch)
        for batch in loader:
            images += len(batch["image"])
            if time.time() - start > (len(read) + 1) * minutes * 6:
                read.append(resident())
        epoch += 1
    return dict(images=images, mib=read, grown_after_first_tenth=read[-1] - read[0])


def main(argv) -> dict:
    parser = argparse.ArgumentParser(prog="run.py data", description=__doc__.partition("\n")[0])
    parser.add_argument("--data_path", default=DEMO, help="JPEGs, as for training")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=200, help="per round and path")
    parser.add_argument("--batches", type=int, default=6, help="per round and path in the loader; 0 leaves the loader out")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=0, help="of the run that watches memory")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        sets = datasets(args.data_path, scratch)
        native_or_not = sets.get("native, original files", sets["torchvision.io + v2, uint8 (without the library)"])
        index = native_or_not.index
        sizes = torch.tensor([Image.open(io.BytesIO(index.read(i))).size for i in range(len(index))]).float().mean(0).tolist()
        print(f"\n{len(index)} images, mean {sizes[0]:.0f} x {sizes[1]:.0f}")
        results = dict(images=len(index), mean_size=sizes, per_core=per_core(sets, args.rounds, args.images))
        print(f"\none core, one thread; {args.rounds} rounds of {args.images} images, median [min..max]")
        print(table([dict(path=r["path"], **{"ms/image (CPU)": shown(r["ms"]), "images/s": shown(r["images_per_s"], 0),
                                             "times the first": shown(r["ratio"])}) for r in results["per_core"]]))
        if args.batches:
            results["loader"] = in_a_loader(sets, args.rounds, args.batches, args.batch_size, args.num_workers)
            print(f"\nDataLoader, {args.num_workers} workers, batches of {args.batch_size}, wall time")
            print(table([dict(path=r["path"], **{"images/s": shown(r["images_per_s"], 0), "times the first": shown(r["ratio"]),
                                                 "ms/image (CPU, all)": shown(r["cpu_ms"]), "of CPU": shown(r["cpu_ratio"])})
                         for r in results["loader"]]))
        if args.minutes:
            results["memory"] = growth(native_or_not, args.minutes, args.num_workers)
            print("\nmemory, MiB: " + " ".join(f"{m:.0f}" for m in results["memory"]["mib"])
                  + f"  ({results['memory']['images']} images)")
    return results
