"""From JPEGs to uint8 crops: images per second and core against torchvision's ImageFolder + PIL, alone and in a loader.

    python benchmarks/run.py data --data_path photos.tar        a tar or a folder of JPEGs; the demo's without it
    python benchmarks/run.py data --data_path photos.tar --endurance 20      whether memory grows

After the loader's rows the last ones add the way to the device, as in training: on a GPU batches are pinned, copied
beside other work and normalised there.
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

from benchmarks.timing import Record, choose_device, interleaved, ratio, shown, spread, table, wait_for
from util.data import native
from util.data.datasets import DEMO, ImageDataset
from util.data.loading.loader import build_loader, device_batches
from util.data.loading.samplers import EpochSampler
from util.data.pixels import Pixels
from util.data.sources import repack
from util.data.sources.layouts import build_index
from util.data.transforms import pretrain_transform
from util.flags.groups import IMAGENET_MEAN, IMAGENET_STD

SIZE = 224
BASELINE = "torchvision ImageFolder + PIL, float32"
WITHOUT_LIBRARY, NATIVE = "torchvision.io + v2, uint8 (without the library)", "native, original files"


class WithoutNative(ImageDataset):
    """The same samples where the library was not built."""

    def __getitem__(self, item):
        library, native.library = native.library, lambda: None
        try:
            return super().__getitem__(item)
        finally:
            native.library = library


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
    pil = tv.Compose(
        [
            tv.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    pil_uint8 = tv.Compose([*pil.transforms[:2], tv.PILToTensor()])
    made = {
        BASELINE: ImageFolder(os.path.join(folder, "train"), pil),
        "the same, uint8": ImageFolder(os.path.join(folder, "train"), pil_uint8),
    }
    files, crop = build_index(folder), pretrain_transform(SIZE)
    made[WITHOUT_LIBRARY] = WithoutNative(files, crop)
    if not native.library():
        print(f"the rest needs the native library: `{native.BUILD}` ({native.describe()})")
        return made
    made[NATIVE] = ImageDataset(files, crop)
    made["native, original files, DCT scaling"] = ImageDataset(
        files, pretrain_transform(SIZE, dct_scaling=True)
    )
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
    return [
        dict(
            path=k,
            ms=spread([t / images * 1e3 for t in s]),
            images_per_s=spread([images / t for t in s]),
            ratio=ratio(seconds[BASELINE], s),
        )
        for k, s in seconds.items()
    ]


def shuffled(dataset, batches, batch_size, workers):
    """Positions in the data set for so many batches, and for those that workers prepare ahead."""
    order = torch.randperm((batches + 2 * workers) * batch_size, generator=torch.Generator().manual_seed(0))
    return order.remainder(len(dataset)).tolist()


def in_a_loader(sets, rounds, batches, batch_size, workers, record):
    """Shuffled batches from worker processes, collated: images per second of wall time, and CPU time of all processes.

    On a machine that others use too, only the CPU time says what a path costs. The record has all rows after each path.
    """
    names = [k for k in sets if "DCT" not in k]
    wall, cpu = ({k: [] for k in names} for _ in range(2))
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            dataset = sets[name]
            sampler = shuffled(dataset, batches, batch_size, workers)
            make = torch.utils.data.DataLoader if isinstance(dataset, ImageFolder) else build_loader
            batch_iterator = iter(make(dataset, sampler=sampler, batch_size=batch_size, num_workers=workers))
            for _ in range(workers):  # the workers' start
                next(batch_iterator)
            start, used = time.perf_counter(), cpu_seconds()
            for _ in range(batches):
                next(batch_iterator)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(max(cpu_seconds() - used, 1 / os.sysconf("SC_CLK_TCK")))  # it counts ticks
            del batch_iterator
            record.set("loader", loader_rows(wall, cpu, batches * batch_size))


def loader_rows(wall, cpu, images):
    """Rows of the paths measured so far; a ratio is of the rounds that the path and the baseline have both run."""
    rows = []
    for name in wall:
        n = min(len(wall[name]), len(wall[BASELINE]))
        if n:
            rows.append(
                dict(
                    path=name,
                    images_per_s=spread([images / t for t in wall[name]]),
                    ratio=ratio(wall[BASELINE][:n], wall[name][:n]),
                    cpu_ms=spread([t / images * 1e3 for t in cpu[name]]),
                    cpu_ratio=ratio(cpu[BASELINE][:n], cpu[name][:n]),
                )
            )
    return rows


def onto_device(dataset, rounds, batches, batch_size, workers, device):
    """Images per second in each round, of batches that are normalised on the device (loader.device_batches)."""
    rates = []
    for _ in range(rounds):
        sampler = shuffled(dataset, batches, batch_size, workers)
        loader = build_loader(
            dataset, sampler, batch_size=batch_size, num_workers=workers, pin_memory=device.type == "cuda"
        )
        stream = device_batches(loader, device, Pixels(IMAGENET_MEAN, IMAGENET_STD))
        for _ in range(workers):  # the workers' start
            next(stream)
        wait_for(device)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        wait_for(device)
        rates.append(batches * batch_size / (time.perf_counter() - start))
        stream.close()
        del stream, loader
    return rates


def cpu_seconds():
    """User and system time of this process and its running children."""
    ticks = 0
    for pid in [os.getpid(), *(p.pid for p in multiprocessing.active_children())]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory():
    """MiB of this process and of its workers together: resident, and what no other process shares (private pages)."""
    found = {}
    for who, pids in dict(
        parent=[os.getpid()], workers=[p.pid for p in multiprocessing.active_children()]
    ).items():
        lines = [
            line.split()
            for pid in pids
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        ]
        for what, names in dict(resident=["Rss:"], unique=["Private_Clean:", "Private_Dirty:"]).items():
            found[f"{who} {what}"] = sum(int(size) for name, size, *_ in lines if name in names) / 1024
    return found


def slope(images, mib):
    """Least squares, MiB per 100,000 images."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (images, mib))
    x, y = x - x.mean(), y - y.mean()
    return 1e5 * float((x @ y) / (x @ x))


def endurance(dataset, minutes, workers, batch_size, reads=20):
    """Memory while images are loaded for `minutes`, epoch after epoch; slopes leave the first fifth out, the warm-up."""
    sampler = EpochSampler(len(dataset), batch_size=min(batch_size, len(dataset)), seed=0)
    loader = build_loader(dataset, sampler, batch_size=sampler.batch_size, num_workers=workers)
    start, rows, images, epoch = time.monotonic(), [], 0, 0
    while len(rows) < reads:
        sampler.set_position(epoch)
        for batch in loader:
            images += len(batch["image"])
            if len(rows) < reads and time.monotonic() - start >= 60 * minutes * (len(rows) + 1) / reads:
                rows.append(dict(images=images, epoch=epoch) | memory())
        epoch += 1
    kept = rows[len(rows) // 5 :]
    return dict(
        rows=rows,
        mib_per_100k={
            k: slope([r["images"] for r in kept], [r[k] for r in kept])
            for k in rows[0]
            if k not in ("images", "epoch")
        },
    )


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py data", description=__doc__.partition("\n")[0])
    parser.add_argument("--data_path", default=DEMO, help="JPEGs, as for training")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=200, help="per round and path")
    parser.add_argument(
        "--batches", type=int, default=6, help="per round and path in the loader; 0 leaves the loader out"
    )
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument(
        "--endurance",
        type=float,
        default=0,
        metavar="MINUTES",
        help="instead: memory while the loader runs for so long",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="of the last rows, in which batches go there; decoding is the CPU's work",
    )
    return parser


def main(argv, record: Record | None = None) -> dict:
    args, record = get_parser().parse_args(argv), record or Record()
    device = choose_device(args.device)
    if args.endurance:
        dataset = ImageDataset(build_index(args.data_path, labels=False), pretrain_transform(SIZE))
        found = endurance(dataset, args.endurance, args.num_workers, args.batch_size)
        print(
            f"{len(dataset)} images of {args.data_path}, {native.describe()}, {args.num_workers} workers; MiB"
        )
        print(
            table(
                [
                    {k: v if isinstance(v, int) else f"{v:.1f}" for k, v in row.items()}
                    for row in found["rows"]
                ]
            )
        )
        print(
            "MiB per 100,000 images after the first fifth: "
            + ", ".join(f"{k} {v:+.1f}" for k, v in found["mib_per_100k"].items())
        )
        record.set("images", len(dataset))
        record.set("endurance", found)
        return record.results
    with tempfile.TemporaryDirectory() as scratch:
        sets = datasets(args.data_path, scratch)
        native_or_not = sets.get(NATIVE, sets[WITHOUT_LIBRARY])
        index = native_or_not.index
        sizes = (
            torch.tensor([Image.open(io.BytesIO(index.read(i))).size for i in range(len(index))])
            .float()
            .mean(0)
            .tolist()
        )
        print(f"\n{len(index)} images, mean {sizes[0]:.0f} x {sizes[1]:.0f}")
        record.set("images", len(index))
        record.set("mean_size", sizes)
        record.set("per_core", per_core(sets, args.rounds, args.images))
        results = record.results
        print(f"\none core, one thread; {args.rounds} rounds of {args.images} images, median [min..max]")
        print(
            table(
                [
                    dict(
                        path=r["path"],
                        **{
                            "ms/image (CPU)": shown(r["ms"]),
                            "images/s": shown(r["images_per_s"], 0),
                            "times the first": shown(r["ratio"]),
                        },
                    )
                    for r in results["per_core"]
                ]
            )
        )
        if args.batches:
            in_a_loader(sets, args.rounds, args.batches, args.batch_size, args.num_workers, record)
            print(f"\nDataLoader, {args.num_workers} workers, batches of {args.batch_size}, wall time")
            print(
                table(
                    [
                        dict(
                            path=r["path"],
                            **{
                                "images/s": shown(r["images_per_s"], 0),
                                "times the first": shown(r["ratio"]),
                                "ms/image (CPU, all)": shown(r["cpu_ms"]),
                                "of CPU": shown(r["cpu_ratio"]),
                            },
                        )
                        for r in results["loader"]
                    ]
                ),
                flush=True,
            )
            for name in [k for k in (NATIVE, "native, shards of long side 500") if k in sets] or [
                WITHOUT_LIBRARY
            ]:
                rates = onto_device(
                    sets[name], args.rounds, args.batches, args.batch_size, args.num_workers, device
                )
                record.add("device", dict(path=name, device=device.type, images_per_s=spread(rates)))
            print(f"\nthe same with the way to the device ({device.type}), normalised there, wall time")
            print(
                table(
                    [
                        dict(path=r["path"], **{"images/s": shown(r["images_per_s"], 0)})
                        for r in results["device"]
                    ]
                )
            )
    return results
