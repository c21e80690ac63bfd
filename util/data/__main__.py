"""Measure, check and repack images.

python -m util.data stats PATH     mean and standard deviation per channel
python -m util.data check PATH     list unreadable images; exit code 1 if there are any
python -m util.data repack PATH TARGET [--long_side 500]     shards that are read faster; see util/data/sources/repack.py
"""

import os

import torch

from util.data.datasets import ImageDataset, _is_timms
from util.data.loading.loader import build_loader
from util.data.loading.samplers import EvalSampler
from util.data.sources.image_index import ImageIndex, build_index
from util.data.transforms import decode, eval_transform
from util.flags.parser import Parser, run


def get_args_parser() -> Parser:
    p = Parser(prog="python -m util.data", description=__doc__.partition("\n")[0])
    p.add_argument("command", choices=("stats", "check", "repack"))
    p.add_argument("path")
    p.add_argument("target", nargs="?", help="repack: the folder that gets <split>-*.tar")
    p.add_argument("--split", default="train")
    p.add_argument("--in_chans", type=int, default=3)
    p.add_argument("--images", type=int, default=2000, help="stats: how many images, evenly spread")
    p.add_argument(
        "--long_side", type=int, help="repack: shrink to it and encode anew; without it nothing is lost"
    )
    p.add_argument("--quality", type=int, default=90, help="repack: of images that are encoded anew")
    p.add_argument("--num_workers", "--workers", type=int, default=os.cpu_count())
    return p


def command(args) -> int:
    if (args.command == "repack") != (args.target is not None):
        raise ValueError("repack takes two paths, and the others one")
    if _is_timms(args.path):
        raise ValueError(
            f"{args.command} reads folders, tars and lists of files, not timm's readers ({args.path})"
        )
    if args.command == "repack":
        from util.data.sources.repack import repack

        repack(
            args.path,
            args.target,
            split=args.split,
            long_side=args.long_side,
            quality=args.quality,
            num_workers=args.num_workers,
        )
        return 0
    index = build_index(args.path, args.split, labels=False)
    print(index.summary())
    if args.command == "stats":
        return stats(index, args.in_chans, args.images)
    dataset = ImageDataset(index, eval_transform(8), in_chans=args.in_chans, evaluation=True)
    loader = build_loader(dataset, EvalSampler(len(index)), batch_size=64, num_workers=args.num_workers)
    bad = [i for batch in loader for i in batch["bad"]]
    print(*(f"unreadable: {index.name(i)}" for i in bad), sep="\n", end="\n" * bool(bad))
    print(f"{len(bad)} of {len(index)} images are unreadable")
    return int(bool(bad))


def stats(index: ImageIndex, in_chans: int, images: int) -> int:
    """Print --mean and --std of about `images` images of an index, spread over it; ValueError where none can be read."""
    if images < 1:
        raise ValueError(f"--images {images}: give at least 1")
    total, pixels = torch.zeros(2, in_chans, dtype=torch.float64), 0
    for i in range(0, len(index), max(1, len(index) // images)):
        try:
            image = decode(index.read(i), in_chans).double().div_(255).flatten(1)  # (C, H*W)
        except (OSError, ValueError) as error:
            print(f"left out: {index.name(i)} ({error})")
            continue
        total += torch.stack([image.sum(1), image.square().sum(1)])
        pixels += image.shape[1]
    if pixels == 0:
        raise ValueError(
            f"none of the images could be read with {in_chans} channels: give --in_chans as the images have it, "
            "or see what `check` says"
        )
    mean, square = total / pixels
    print(
        "--mean", *(f"{v:.4f}" for v in mean), "--std", *(f"{v:.4f}" for v in (square - mean.square()).sqrt())
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    return run(command, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
