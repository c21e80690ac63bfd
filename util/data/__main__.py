"""Measure, check and repack images.

python -m util.data stats PATH      # mean and standard deviation per channel
python -m util.data check PATH      # list unreadable images; exit code 1 if there are any
python -m util.data repack PATH TARGET [--long_side 500]
                                    # shards that load faster; see util/data/sources/repack.py
"""

import argparse
import os

from util.files.cores import own_cores
from util.flags.groups import MAX_PIXELS, MAX_PIXELS_HELP, is_timm_path
from util.flags.numbers import COUNT
from util.flags.parser import Parser, answer_at_once, run, with_flags

COMMANDS = ("stats", "check", "repack")


def command_name(text: str) -> str:
    """Read the name of a command: the argparse type of the first word."""
    if text not in COMMANDS and os.path.exists(text):
        raise argparse.ArgumentTypeError(
            f"{text} is a path, and a command comes before it: {', '.join(COMMANDS)}"
        )
    return text


def get_args_parser() -> Parser:
    """Return the parser of `python -m util.data`."""
    p = Parser(prog="python -m util.data", description=__doc__.partition("\n")[0])
    p.add_argument("command", type=command_name, choices=COMMANDS)
    p.add_argument("path")
    p.add_argument("target", nargs="?", help="repack: folder that gets <split>-*.tar")
    p.add_argument("--split", default="train")
    p.add_argument("--in_chans", type=int, default=3)
    p.add_argument("--images", type=int, default=2000, help="stats: number of images, evenly spread")
    p.add_argument(
        "--long_side", type=int, help="repack: shrink images to it and encode them anew; lossless without it"
    )
    p.add_argument("--quality", type=int, default=90, help="repack: of images that are encoded anew")
    p.add_argument("--max_pixels", type=COUNT, default=MAX_PIXELS, metavar="N", help=MAX_PIXELS_HELP)
    p.add_argument("--num_workers", "--workers", type=int, default=own_cores())
    return p


answer_at_once(__name__, get_args_parser())  # the imports below take seconds

import torch

from util.data.contract import Samples
from util.data.datasets import ImageDataset
from util.data.formats import decode
from util.data.loading.loader import build_loader
from util.data.loading.samplers import EvalSampler
from util.data.seeding import epoch_and_index
from util.data.sources.image_index import ImageIndex
from util.data.sources.layouts import build_index
from util.data.sources.repack import repack
from util.data.transforms import eval_transform
from util.files.names import counted, printable


def command(args: argparse.Namespace) -> int:
    """Run one command; return its exit code."""
    if args.command == "repack" and args.target is None:
        raise ValueError(f"repack {args.path}: name a second path, the folder that gets the shards")
    if args.command != "repack" and args.target is not None:
        raise ValueError(f"{args.command} takes one path, found {args.path} and {args.target}")
    if is_timm_path(args.path):
        raise ValueError(
            f"{args.command} reads folders, tars and lists of files, not timm's readers ({args.path})"
        )
    if args.command == "repack":
        repack(
            args.path,
            args.target,
            split=args.split,
            long_side=args.long_side,
            quality=args.quality,
            num_workers=args.num_workers,
            max_pixels=args.max_pixels,
        )
        return 0
    # Without labels loose images count as well.
    index = build_index(args.path, args.split, labels=False)
    print(index.summary())
    # A small crop takes least time.
    dataset = ImageDataset(index, eval_transform(8), in_chans=args.in_chans, max_pixels=args.max_pixels)
    if args.command == "stats":
        return print_stats(dataset, args.images)
    return print_unreadable(dataset, args.num_workers)


class Faults(Samples):
    """Why the images of a data set cannot be read: `fault`, '' if nothing is wrong."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        _, i = epoch_and_index(item)
        return dict(index=i, fault=self.dataset.fault(i), bad=[])


def print_unreadable(dataset: ImageDataset, num_workers: int) -> int:
    """Print the unreadable images and the reasons; return 1 if there are any, and 0 otherwise."""
    index = dataset.index
    loader = build_loader(Faults(dataset), EvalSampler(len(index)), batch_size=64, num_workers=num_workers)
    bad = 0
    for batch in loader:
        for i, fault in zip(batch["index"].tolist(), batch["fault"]):
            if fault:
                bad += 1
                print(f"unreadable: {_described(index, i, fault)}", flush=True)
    print(f"{bad} of {counted(len(index), 'image')} unreadable")
    return int(bad > 0)


def _described(index: ImageIndex, i: int, fault: str) -> str:
    # Both may hold text of whoever made the file.
    return f"{printable(index.name(i))}: {printable(with_flags(fault, ['max_pixels']))}"


def print_stats(dataset: ImageDataset, images: int) -> int:
    """Print --mean and --std of about `images` images, spread evenly over the data set; return 0.

    Raises ValueError if none of them can be read.
    """
    if images < 1:
        raise ValueError(f"--images {images}: give at least 1")
    index = dataset.index
    in_chans = dataset.in_chans
    # How often each channel has each value. Sums of floats would take eight times the memory of an image.
    counts = torch.zeros(in_chans, 256, dtype=torch.int64)
    # Spread evenly, as images of a class lie one after the other.
    for i in range(0, len(index), max(1, len(index) // images)):
        try:
            image = decode(index.read(i), in_chans, dataset.max_pixels)
        except (OSError, ValueError) as error:
            index.check_unchanged(i)
            print(f"left out: {_described(index, i, str(error))}")
            continue
        counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in image])
    pixels = int(counts[0].sum())
    # For example grey .npy files without --in_chans 1.
    if pixels == 0:
        raise ValueError(
            f"no image could be read with {in_chans} channels: give --in_chans as the images have it, "
            "or see what `check` reports"
        )
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = counts.double() / pixels
    mean = shares @ values
    square = shares @ values.square()
    # The difference of two large numbers: float64 keeps enough digits.
    std = (square - mean.square()).sqrt()
    print("--mean", *(f"{v:.4f}" for v in mean), "--std", *(f"{v:.4f}" for v in std))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse a command line and run its command."""
    return run(command, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
