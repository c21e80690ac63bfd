"""From JPEGs to uint8 crops: images per second and core against torchvision's ImageFolder with PIL.

    python benchmarks/run.py data --data_path photos.tar                     a tar or a folder of JPEGs
    python benchmarks/run.py data --data_path photos.tar --endurance 20      whether memory grows

The default is the demo set. Arrays of 16 and 32 bits, made for the purpose, are measured against a memory map
of the same bytes. The data paths are measured in a single thread, then in a loader with workers.
The last rows add the way to the device, as in training: on a GPU batches are pinned, copied during other
work, and normalised there.
"""

import argparse
import io
import math
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder

from benchmarks.timing import (
    Record,
    choose_device,
    default_device,
    interleaved,
    ratio,
    rotated,
    shown,
    spread,
    table,
    wait_for,
)
from util.data import native
from util.data.datasets import DEMO, ImageDataset, build_dataset
from util.data.formats import ReadSettings, jpeg, open_image
from util.data.formats.pil import decode_by_pil
from util.data.loading.loader import build_loader, device_batches
from util.data.loading.samplers import EpochSampler
from util.data.pixels import Pixels
from util.data.repacking import repack
from util.data.sources.layouts import build_index
from util.data.transforms import pretrain_transform
from util.flags.groups import IMAGENET_MEAN, IMAGENET_STD

SIZE = 224
BASELINE = "torchvision ImageFolder + PIL, float32"
WITHOUT_LIBRARY = "{} + v2, uint8 (without the library)"
# Type and (C, H, W) of the arrays that are measured, so many of each.
ARRAYS = tuple((dtype, shape) for dtype in ("uint16", "float32") for shape in ((3, 256, 256), (13, 128, 128)))
ARRAY_FILES = 64
NATIVE = "native, original files"
BOUNDED = "native, shards of long side 500"
# Clock ticks per second of the CPU times in /proc.
TICKS = os.sysconf("SC_CLK_TCK")


@lru_cache
def jpeg_decoder(name: str) -> jpeg.Decoder | None:
    """The decoder of that name, if it is installed."""
    if name == "PIL":
        return jpeg.Decoder(name, decode_by_pil)
    return jpeg.usable(name)


class WithoutNative(ImageDataset):
    """The same samples, decoded as on a machine without the native library, by `decoder`."""

    decoder = "PIL"

    def __getitem__(self, item):
        # Replaced for each sample: other data sets of this process still use the library.
        library = native.library
        general = jpeg.decoder
        native.library = lambda: None
        jpeg.decoder = lambda: jpeg_decoder(self.decoder)  # type: ignore[assignment]
        try:
            return super().__getitem__(item)
        finally:
            native.library = library
            jpeg.decoder = general


class Whole:
    """A transform that changes nothing, and draws nothing as our own do."""

    def crop_jpeg(self, data: bytes, key: int | None = None, max_pixels: int = 0) -> None:
        """Every image is decoded."""

    def __call__(self, image: torch.Tensor, key: int | None = None) -> torch.Tensor:
        return image


def unpack(index, folder: str) -> str:
    """Write the images as class folders for ImageFolder, from any layout. Returns their parent folder."""
    train = Path(folder, "train")
    for i in range(len(index)):
        name = Path(index.name(i))
        if len(name.parts) == 1:
            # ImageFolder needs a class.
            name = Path("all", name)
        path = train / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(index.read(i))
    return str(train.parent)


# A data set of torchvision's or of this toolkit's.
ImageSet: TypeAlias = ImageFolder | ImageDataset


def baselines(folder: str) -> dict[str, ImageSet]:
    """ImageFolder with PIL: name -> data set."""
    augment = [
        tv.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=tv.InterpolationMode.BICUBIC),
        tv.RandomHorizontalFlip(),
    ]
    pil = tv.Compose([*augment, tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    # Without the conversion to float32, which our paths leave to the device.
    pil_uint8 = tv.Compose([*augment, tv.PILToTensor()])
    images = os.path.join(folder, "train")
    return {BASELINE: ImageFolder(images, pil), "the same, uint8": ImageFolder(images, pil_uint8)}


def datasets(data_path: str, scratch: str) -> dict[str, ImageSet]:
    """Name -> data set, the baseline first. Shards are made in the folder `scratch`."""
    folder = unpack(build_index(data_path, labels=False), scratch)
    made = baselines(folder)
    files = build_index(folder)
    crop = pretrain_transform(SIZE)
    for decoder in decoders():
        made[WITHOUT_LIBRARY.format(decoder)] = general = WithoutNative(files, crop)
        general.decoder = decoder
    if not native.library():
        print(f"the other paths need the native library: `{native.BUILD}` ({native.describe()})")
        return made
    made[NATIVE] = ImageDataset(files, crop)
    scaled = pretrain_transform(SIZE, dct_scaling=True)
    made["native, original files, DCT scaling"] = ImageDataset(files, scaled)
    # The long side in pixels; None keeps the size of the images.
    for name, bound in (("lossless shards", None), ("shards of long side 500", 500)):
        target = os.path.join(scratch, name.replace(" ", "_"))
        repack.repack(folder, target, long_side=bound, num_workers=2)
        made[f"native, {name}"] = ImageDataset(build_index(target), crop)
    return made


def decoders() -> list[str]:
    """Names of the decoders of JPEGs that are installed, the one in use first."""
    return [name for name in (*jpeg.LIBRARIES, "PIL") if jpeg_decoder(name)]


def general_path() -> str:
    """Name of the path that a machine without the native library takes."""
    return WITHOUT_LIBRARY.format(decoders()[0])


def own_paths(sets: dict[str, ImageSet]) -> dict[str, ImageDataset]:
    """The data sets of this toolkit, without torchvision's."""
    return {name: dataset for name, dataset in sets.items() if isinstance(dataset, ImageDataset)}


def read_images(dataset: ImageSet, images: int) -> Callable[[], None]:
    """A function that reads so many images, from the first again after the last."""

    def call() -> None:
        for i in range(images):
            dataset[i % len(dataset)]

    return call


def per_core(sets: dict[str, ImageSet], rounds: int, images: int) -> list[dict]:
    """Rows of all paths in one thread of this process; seconds are CPU time."""
    calls = {name: read_images(dataset, images) for name, dataset in sets.items()}
    # A loader's worker has one thread, too.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = interleaved(calls, rounds, clock=time.process_time)
    torch.set_num_threads(before)
    # Without the library there is no such path.
    library = seconds.get(NATIVE)
    return [
        dict(
            path=name,
            ms=spread([t / images * 1e3 for t in times]),
            images_per_s=spread([images / t for t in times]),
            ratio=ratio(seconds[BASELINE], times),
            of_native=library and ratio(library, times),
        )
        for name, times in seconds.items()
    ]


def write_arrays(path: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Write a tar of .npy files (C, H, W) of random values."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(ARRAY_FILES):
            file = io.BytesIO()
            np.save(file, (generator.random(shape) * 60000).astype(dtype))
            member = tarfile.TarInfo(f"{i:03}.npy")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)


def mapped_arrays(path: str, dtype: str, shape: tuple[int, ...]) -> Callable[[], None]:
    """A function that copies all arrays of a tar from a memory map of it, and checks nothing."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with tarfile.open(path) as tar:
        # The values are the last bytes of a file.
        starts = [member.offset_data + member.size - size for member in tar]
    mapped = np.memmap(path, np.uint8, "r")

    def call() -> None:
        for start in starts:
            torch.from_numpy(np.array(mapped[start : start + size].view(dtype).reshape(shape)))

    return call


def array_row(folder: str, dtype: str, shape: tuple[int, ...], rounds: int) -> dict:
    """Row of arrays of one kind, read and decoded through `ImageDataset` and from a memory map; CPU time."""
    path = os.path.join(folder, f"{dtype}_{shape[0]}.tar")
    write_arrays(path, dtype, shape)
    dataset = build_dataset(path, "train", Whole(), read=ReadSettings(shape[0]), labels=False)
    assert isinstance(dataset, ImageDataset)
    calls = {"map": mapped_arrays(path, dtype, shape), "data set": read_images(dataset, ARRAY_FILES)}
    seconds = interleaved(calls, rounds, clock=time.process_time)
    size = ARRAY_FILES * math.prod(shape) * np.dtype(dtype).itemsize
    return dict(
        arrays=f"{dtype} {shape}",
        bytes_per_s=spread([size / t for t in seconds["data set"]]),
        map_bytes_per_s=spread([size / t for t in seconds["map"]]),
        ratio=ratio(seconds["map"], seconds["data set"]),
    )


@dataclass(frozen=True)
class Loading:
    """How a loader is measured: rounds of `batches` batches, read by `workers` processes."""

    rounds: int
    batches: int
    batch_size: int
    workers: int

    @property
    def images(self) -> int:
        """Images of a round."""
        return self.batches * self.batch_size

    def order(self, dataset: ImageSet) -> list[int]:
        """Shuffled positions in the data set for one round."""
        # Each worker prepares two batches ahead.
        positions = (self.batches + 2 * self.workers) * self.batch_size
        order = torch.randperm(positions, generator=torch.Generator().manual_seed(0))
        return order.remainder(len(dataset)).tolist()


def loader_of(dataset: ImageSet, loading: Loading) -> DataLoader:
    """The loader of a path: torch's own for the baselines, else the one of our mains."""
    # A list of positions serves as a sampler.
    order = loading.order(dataset)
    size = loading.batch_size
    if isinstance(dataset, ImageFolder):
        return DataLoader(dataset, sampler=order, batch_size=size, num_workers=loading.workers)
    return build_loader(dataset, sampler=order, batch_size=size, num_workers=loading.workers)


def timed_round(dataset: ImageSet, loading: Loading) -> tuple[float, float]:
    """Seconds of one round in a loader: wall time, and CPU time of all processes."""
    batches = iter(loader_of(dataset, loading))
    # The start of the workers is not measured.
    for _ in range(loading.workers):
        next(batches)
    used = cpu_seconds()
    start = time.perf_counter()
    for _ in range(loading.batches):
        next(batches)
    wall = time.perf_counter() - start
    # CPU time counts in ticks. At least one: ratios divide by it.
    return wall, max(cpu_seconds() - used, 1 / TICKS)


def in_a_loader(sets: dict[str, ImageSet], loading: Loading, record: Record) -> None:
    """Measure shuffled and collated batches from worker processes, and record a row for each path.

    On a machine that others use too, only the CPU time is the cost of a path.
    """
    # DCT scaling hardly differs from full decoding.
    general = {WITHOUT_LIBRARY.format(name) for name in decoders()} - {general_path()}
    names = [name for name in sets if "DCT" not in name and name not in general]
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for i in range(loading.rounds):
        for name in rotated(names, i):
            wall_seconds, used_seconds = timed_round(sets[name], loading)
            # Every round is recorded, so that a run that is killed leaves rows.
            wall[name].append(wall_seconds)
            cpu[name].append(used_seconds)
            record.set("loader", loader_rows(wall, cpu, loading.images))


def loader_rows(wall: dict[str, list[float]], cpu: dict[str, list[float]], images: int) -> list[dict]:
    """Rows of the paths that were measured so far, from their seconds in each round."""
    rows = []
    for name in wall:
        # Ratios need rounds that both the path and the baseline have finished.
        n = min(len(wall[name]), len(wall[BASELINE]))
        if not n:
            continue
        row = dict(
            path=name,
            images_per_s=spread([images / t for t in wall[name]]),
            ratio=ratio(wall[BASELINE][:n], wall[name][:n]),
            cpu_ms=spread([t / images * 1e3 for t in cpu[name]]),
            cpu_ratio=ratio(cpu[BASELINE][:n], cpu[name][:n]),
        )
        rows.append(row)
    return rows


def onto_device(dataset: ImageDataset, loading: Loading, device: torch.device) -> list[float]:
    """Images per second in each round, of batches that are normalised on the device (`device_batches`)."""
    # Paths are not interleaved here, as no ratio is formed.
    rates = []
    for _ in range(loading.rounds):
        loader = build_loader(
            dataset,
            loading.order(dataset),
            batch_size=loading.batch_size,
            num_workers=loading.workers,
            pin_memory=device.type == "cuda",
        )
        stream = device_batches(loader, device, Pixels(IMAGENET_MEAN, IMAGENET_STD))
        # The start of the workers is not measured.
        for _ in range(loading.workers):
            next(stream)
        wait_for(device)
        start = time.perf_counter()
        for _ in range(loading.batches):
            next(stream)
        wait_for(device)
        rates.append(loading.images / (time.perf_counter() - start))
        # The workers must end before those of the next round start.
        stream.close()
        del stream, loader
    return rates


def worker_pids() -> list[int]:
    """Process ids of the running workers."""
    pids = [process.pid for process in multiprocessing.active_children()]
    # A process that has not started has none.
    return [pid for pid in pids if pid is not None]


def cpu_seconds() -> float:
    """User and system time of this process and its running children."""
    ticks = 0
    for pid in [os.getpid(), *worker_pids()]:
        # The name of the process, in parentheses, may contain spaces. After it, fields 11 and 12 are utime
        # and stime.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def mapped_mib(pids: list[int], names: set[str]) -> float:
    """Sum of some fields of /proc/PID/smaps_rollup over processes, in MiB."""
    kib = 0
    for pid in pids:
        # The first line is the range of addresses.
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, size, *_ = line.split()
            if name in names:
                kib += int(size)
    return kib / 1024


def memory() -> dict[str, float]:
    """MiB of this process and of all its workers: resident, and unique (pages of one process only)."""
    found = {}
    for who, pids in (("parent", [os.getpid()]), ("workers", worker_pids())):
        found[f"{who} resident"] = mapped_mib(pids, {"Rss:"})
        found[f"{who} unique"] = mapped_mib(pids, {"Private_Clean:", "Private_Dirty:"})
    return found


def slope(images: list[int], mib: list[float]) -> float:
    """Slope of memory over images by least squares, in MiB per 100,000 images."""
    # float64: products of counts and MiB are large, their differences small.
    x = torch.tensor(images, dtype=torch.float64)
    y = torch.tensor(mib, dtype=torch.float64)
    x = x - x.mean()
    y = y - y.mean()
    return 1e5 * float((x @ y) / (x @ x))


def endurance(dataset: ImageDataset, minutes: float, workers: int, batch_size: int, reads: int = 20) -> dict:
    """Memory while images are loaded for so many minutes, epoch after epoch, read `reads` times.

    The slopes leave out the first fifth, in which processes warm up.
    """
    sampler = EpochSampler(len(dataset), batch_size=min(batch_size, len(dataset)), seed=0)
    loader = build_loader(dataset, sampler, batch_size=sampler.batch_size, num_workers=workers)
    start = time.monotonic()
    rows: list[dict] = []
    # Images read so far.
    images = 0
    epoch = 0
    while len(rows) < reads:
        sampler.set_position(epoch)
        # An epoch is always finished, as in training.
        for batch in loader:
            images += len(batch["image"])
            due = 60 * minutes * (len(rows) + 1) / reads
            if len(rows) < reads and time.monotonic() - start >= due:
                rows.append(dict(images=images, epoch=epoch) | memory())
        epoch += 1
    return dict(rows=rows, mib_per_100k=slopes(rows[len(rows) // 5 :]))


def slopes(rows: list[dict]) -> dict[str, float]:
    """Slope of each memory figure of the rows, in MiB per 100,000 images."""
    images = [row["images"] for row in rows]
    names = [name for name in rows[0] if name not in ("images", "epoch")]
    return {name: slope(images, [row[name] for row in rows]) for name in names}


def get_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
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
        help="measure memory instead, while the loader runs for so long",
    )
    parser.add_argument(
        "--device",
        default=default_device(),
        help="destination of the batches in the last rows; decoding always runs on the CPU",
    )
    return parser


def run_endurance(args: argparse.Namespace, record: Record) -> None:
    """Measure and print the memory of a long run."""
    # Labels are not needed, so the images may lie in one folder.
    dataset = ImageDataset(build_index(args.data_path, labels=False), pretrain_transform(SIZE))
    found = endurance(dataset, args.endurance, args.num_workers, args.batch_size)
    workers = f"{args.num_workers} workers"
    print(f"{len(dataset)} images of {args.data_path}, {native.describe()}, {workers}; MiB")
    print(table([endurance_line(row) for row in found["rows"]]))
    slopes = ", ".join(f"{name} {value:+.1f}" for name, value in found["mib_per_100k"].items())
    print(f"MiB per 100,000 images after the first fifth: {slopes}")
    record.set("images", len(dataset))
    record.set("endurance", found)


def endurance_line(row: dict) -> dict[str, object]:
    """A row of the printed table: counts as they are, MiB with one decimal place."""
    line = {}
    for name, value in row.items():
        line[name] = value
        if isinstance(value, float):
            line[name] = f"{value:.1f}"
    return line


def mean_size(index) -> list[float]:
    """Mean width and height of the images in pixels."""
    sizes = [open_image(index.read(i)).size for i in range(len(index))]
    return torch.tensor(sizes).float().mean(0).tolist()


def run_one_core(sets: dict[str, ImageSet], args: argparse.Namespace, record: Record) -> None:
    """Measure and print all paths in one thread."""
    rows = per_core(sets, args.rounds, args.images)
    record.set("per_core", rows)
    print(f"\none core, one thread; {args.rounds} rounds of {args.images} images, median [min..max]")
    lines = [
        {
            "path": row["path"],
            "ms/image (CPU)": shown(row["ms"]),
            "images/s": shown(row["images_per_s"], 0),
            "times the first": shown(row["ratio"]),
            "times the library": shown(row["of_native"]),
        }
        for row in rows
    ]
    print(table(lines))


def run_arrays(scratch: str, rounds: int, record: Record) -> None:
    """Measure and print arrays of more than 8 bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype, shape in ARRAYS:
        record.add("arrays", array_row(scratch, dtype, shape, rounds))
    torch.set_num_threads(before)
    print(f"\n.npy files in a tar, one thread, CPU time; {rounds} rounds of {ARRAY_FILES} files")
    lines = [
        {
            "arrays": row["arrays"],
            "GB/s": shown({name: rate / 1e9 for name, rate in row["bytes_per_s"].items()}),
            "GB/s, memory map": shown({name: rate / 1e9 for name, rate in row["map_bytes_per_s"].items()}),
            "times the map": shown(row["ratio"]),
        }
        for row in record.results["arrays"]
    ]
    print(table(lines), flush=True)


def run_loader(sets: dict[str, ImageSet], loading: Loading, record: Record) -> None:
    """Measure and print all paths in a loader."""
    in_a_loader(sets, loading, record)
    print(f"\nDataLoader, {loading.workers} workers, batches of {loading.batch_size}, wall time")
    lines = [
        {
            "path": row["path"],
            "images/s": shown(row["images_per_s"], 0),
            "times the first": shown(row["ratio"]),
            "ms/image (CPU, all)": shown(row["cpu_ms"]),
            "of CPU": shown(row["cpu_ratio"]),
        }
        for row in record.results["loader"]
    ]
    print(table(lines), flush=True)


def run_device(sets: dict[str, ImageSet], loading: Loading, device: torch.device, record: Record) -> None:
    """Measure and print the fastest paths on their way to the device."""
    # Without the library neither of them exists.
    paths = own_paths(sets)
    names = [name for name in (NATIVE, BOUNDED) if name in paths]
    for name in names or [general_path()]:
        rates = onto_device(paths[name], loading, device)
        record.add("device", dict(path=name, device=device.type, images_per_s=spread(rates)))
    print(f"\nthe same with the way to the device ({device.type}), normalised there, wall time")
    rows = record.results["device"]
    print(table([{"path": row["path"], "images/s": shown(row["images_per_s"], 0)} for row in rows]))


def main(argv: list[str], record: Record | None = None) -> dict:
    """Measure data paths, or with --endurance the memory of a long run. Returns the figures."""
    args = get_parser().parse_args(argv)
    record = record or Record()
    device = choose_device(args.device)
    if args.endurance:
        run_endurance(args, record)
        return record.results
    loading = Loading(args.rounds, args.batches, args.batch_size, args.num_workers)
    with tempfile.TemporaryDirectory() as scratch:
        sets = datasets(args.data_path, scratch)
        paths = own_paths(sets)
        index = paths[general_path()].index
        width, height = mean_size(index)
        print(f"\n{len(index)} images, mean {width:.0f} x {height:.0f}")
        record.set("images", len(index))
        record.set("mean_size", [width, height])
        run_one_core(sets, args, record)
        run_arrays(scratch, args.rounds, record)
        if args.batches:
            run_loader(sets, loading, record)
            run_device(sets, loading, device, record)
    return record.results
