"""Measure, check and repack images.

python -m util.data stats PATH      # mean and standard deviation per channel
python -m util.data check PATH      # list unreadable images; exit code 1 if there are any
python -m util.data repack PATH TARGET [--long_side 500]
                                    # shards that load faster; see util/data/sources/repack.py
"""

import argparse
import os

import torch

from util.data.datasets import ImageDataset
from util.data.formats import decode
from util.data.loading.loader import build_loader
from util.data.loading.samplers import EvalSampler
from util.data.sources.image_index import ImageIndex
from util.data.sources.layouts import build_index
from util.data.sources.repack import repack
from util.data.timm_datasets import is_timm_path
from util.data.transforms import eval_transform
from util.flags.parser import Parser, run


def get_args_parser() -> Parser:
    """Return the parser of `python -m util.data`."""
    p = Parser(prog="python -m util.data", description=__doc__.partition("\n")[0])
    p.add_argument("command", choices=("stats", "check", "repack"))
    p.add_argument("path")
    p.add_argument("target", nargs="?", help="repack: folder that gets <split>-*.tar")
    p.add_argument("--split", default="train")
    p.add_argument("--in_chans", type=int, default=3)
    p.add_argument("--images", type=int, default=2000, help="stats: number of images, evenly spread")
    p.add_argument(
        "--long_side", type=int, help="repack: shrink images to it and encode them anew; lossless without it"
    )
    p.add_argument("--quality", type=int, default=90, help="repack: of images that are encoded anew")
    p.add_argument("--num_workers", "--workers", type=int, default=os.cpu_count())
    return p


def command(args: argparse.Namespace) -> int:
    """Run one command; return its exit code."""
    if (args.command == "repack") != (args.target is not None):
        raise ValueError("repack takes two paths, and the other commands take one")
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
        )
        return 0
    # Without labels loose images count as well.
    index = build_index(args.path, args.split, labels=False)
    print(index.summary())
    if args.command == "stats":
        return print_stats(index, args.in_chans, args.images)
    return print_unreadable(index, args.in_chans, args.num_workers)


def print_unreadable(index: ImageIndex, in_chans: int, num_workers: int) -> int:
    """Print the names of unreadable images; return 1 if there are any, and 0 otherwise."""
    # In evaluation no other image replaces an unreadable one. A small crop takes least time.
    dataset = ImageDataset(index, eval_transform(8), in_chans=in_chans, evaluation=True)
    loader = build_loader(dataset, EvalSampler(len(index)), batch_size=64, num_workers=num_workers)
    bad = [i for batch in loader for i in batch["bad"]]
    for i in bad:
        print(f"unreadable: {index.name(i)}")
    print(f"{len(bad)} of {len(index)} images are unreadable")
    return int(bool(bad))


def print_stats(index: ImageIndex, in_chans: int, images: int) -> int:
    """Print --mean and --std of about `images` images, spread evenly over the index; return 0.

    Raises ValueError if none of them can be read.
    """
    if images < 1:
        raise ValueError(f"--images {images}: give at least 1")
    # Sums of values and of squares per channel, and the number of pixels.
    total = torch.zeros(2, in_chans, dtype=torch.float64)
    pixels = 0
    # Spread evenly, as images of a class lie one after the other.
    for i in range(0, len(index), max(1, len(index) // images)):
        try:
            image = decode(index.read(i), in_chans).double().div_(255).flatten(1)  # (C, H, W) -> (C, H*W)
        except (OSError, ValueError) as error:
            print(f"left out: {index.name(i)} ({error})")
            continue
        total += torch.stack([image.sum(1), image.square().sum(1)])
        pixels += image.shape[1]
    # For example grey .npy files without --in_chans 1.
    if pixels == 0:
        raise ValueError(
            f"no image could be read with {in_chans} channels: give --in_chans as the images have it, "
            "or see what `check` reports"
        )
    mean, square = total / pixels
    # The difference of two large numbers: float64 keeps enough digits.
    std = (square - mean.square()).sqrt()
    print("--mean", *(f"{v:.4f}" for v in mean), "--std", *(f"{v:.4f}" for v in std))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse a command line and run its command."""
    return run(command, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
