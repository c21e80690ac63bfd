"""Measure, check and repack images.

python -m util.data stats PATH      # range, mean and standard deviation per channel, and a recipe of them
python -m util.data check PATH      # list unreadable images; exit code 1 if there are any
python -m util.data repack PATH TARGET [--long_side 500]
                                    # shards that load faster; see util/data/repacking/repack.py
"""

import argparse
import os
import re
from collections import Counter
from dataclasses import replace
from typing import Any

from util.files.cores import own_cores
from util.flags.groups import MAX_PIXELS, MAX_PIXELS_HELP, add_read_flags, is_timm_path
from util.flags.numbers import COUNT
from util.flags.parser import Parser, answer_at_once, run, with_flags

# Flags that errors about an image may name.
FLAGS = ("max_pixels", "in_chans", "channels", "range")
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
    p.add_argument("--in_chans", type=COUNT, default=3, help="number of channels")
    add_read_flags(p)
    p.add_argument("--images", type=COUNT, default=2000, help="stats: number of images, evenly spread")
    p.add_argument(
        "--recipe",
        metavar="FILE",
        help="stats: file that gets the flags, to be given as @FILE; NAME.args for a path PATH/NAME if not "
        "given, '' for none",
    )
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
from util.data.formats import ReadSettings
from util.data.loading.loader import build_loader
from util.data.loading.samplers import EvalSampler
from util.data.repacking.repack import repack
from util.data.seeding import epoch_and_index
from util.data.sources.image_index import ImageIndex
from util.data.sources.layouts import build_index
from util.data.survey.headers import spread, survey
from util.data.survey.ranges import SUGGESTED
from util.data.survey.values import Values
from util.data.transforms import eval_transform
from util.files.atomic import write_text
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
    read = ReadSettings.of(vars(args))
    if args.command == "stats":
        found = survey(index, read)
        dataset = ImageDataset(index, eval_transform(8), read=replace(read, depth=found.depth), found=found)
        print(dataset.summary())
        return print_stats(dataset, args.images, args.recipe)
    # A small crop takes least time.
    dataset = ImageDataset(index, eval_transform(8), read=read)
    print(index.summary())
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
    return f"{printable(index.name(i))}: {printable(with_flags(fault, FLAGS))}"


def print_stats(dataset: ImageDataset, images: int, recipe: str | None) -> int:
    """Print the flags of about `images` images, spread over the data set, and write a recipe; return 0.

    Raises ValueError if none of them can be read.
    """
    index = dataset.index
    numbers = spread(len(index), images)
    values = Values(dataset.read.in_chans, dataset.depth, len(numbers))
    left_out: Counter[str] = Counter()
    first: dict[str, tuple[str, str]] = {}
    for i in numbers:
        try:
            values.add(dataset.decoded(i))
        except (OSError, ValueError) as error:
            index.check_unchanged(i)
            why = _reason(str(error))
            # Sizes differ from file to file.
            reason = re.sub(r"\d+", "0", why)
            left_out[reason] += 1
            first.setdefault(reason, (index.name(i), why))
    for reason, count in left_out.most_common():
        name, why = first[reason]
        print(
            f"left out: {counted(count, 'image')}, as {printable(name)}: {printable(with_flags(why, FLAGS))}"
        )
    if not values.images:
        raise ValueError(
            f"no image could be read with {dataset.read.in_chans} channels: give --in_chans as the images "
            "have it, or see what `check` reports"
        )
    constant = values.constant()
    if constant:
        kept = [i for i in range(values.channels) if i not in constant]
        print(f"constant in all images: {_bands(dataset, constant)}; leave out by {_channels(dataset, kept)}")
    flags = _flags(dataset, values)
    print(*flags)
    _write_recipe(dataset, flags, recipe, values.images)
    return 0


def _reason(error: str) -> str:
    """Return what is wrong, without what differs from file to file: sizes and first bytes."""
    return error.partition("): ")[2] or error


def _flags(dataset: ImageDataset, values: Values) -> list[str]:
    """Return --range, --mean and --std, and what was given beside them, one flag each."""
    flags = []
    low, high = [0.0], [255.0]
    if dataset.depth != torch.uint8:
        ends = values.percentiles(SUGGESTED)
        low = [pair[0] for pair in ends]
        # A constant channel has no width, and needs one.
        high = [max(pair[1], _next(pair[0])) for pair in ends]
        flags.append(_flag("range", [bound for pair in zip(low, high) for bound in pair], "{:.6g}"))
    stats = values.stats(low, high)
    # The smallest number that four digits show: 0 is no width.
    return [
        *_given(dataset),
        *flags,
        _flag("mean", stats.mean, "{:.4f}"),
        _flag("std", [max(each, 1e-4) for each in stats.std], "{:.4f}"),
    ]


def _next(value: float) -> float:
    return value + max(1.0, abs(value)) * 1e-3


def _flag(name: str, values: list[Any], form: str = "{}") -> str:
    return f"--{name} {' '.join(form.format(value) for value in values)}"


def _given(dataset: ImageDataset) -> list[str]:
    """Return the flags by which the images were read, as far as they are not the defaults."""
    read = dataset.read
    flags = []
    if read.channels:
        if read.bands is not None:
            flags.append(_flag("in_chans", [read.bands]))
        flags.append(_flag("channels", list(read.channels)))
    elif read.in_chans != 3:
        flags.append(_flag("in_chans", [read.in_chans]))
    return flags


def _bands(dataset: ImageDataset, channels: list[int]) -> str:
    numbers = _numbers(dataset, channels)
    return f"{'band' if len(numbers) == 1 else 'bands'} {', '.join(map(str, numbers))}"


def _channels(dataset: ImageDataset, kept: list[int]) -> str:
    return _flag("channels", _numbers(dataset, kept))


def _numbers(dataset: ImageDataset, channels: list[int]) -> list[int]:
    """Return the numbers in the files of channels of the images."""
    if not dataset.read.channels:
        return channels
    return [dataset.read.channels[i] for i in channels]


def _write_recipe(dataset: ImageDataset, flags: list[str], recipe: str | None, images: int) -> None:
    """Write the flags to a recipe, unless its name is ''. An existing file of other flags is kept."""
    path = recipe
    if path is None:
        base = os.path.basename(os.path.abspath(dataset.index.path)) or "data"
        path = f"{base.removesuffix('.tar')}.args"
    if not path:
        return
    source = f"# Of {counted(images, 'image')} of {printable(dataset.index.path)}"
    text = "\n".join([source, *flags, ""])
    if recipe is None and os.path.exists(path):
        print(f"{printable(path)} exists and is kept: name another file by --recipe")
        return
    write_text(path, text, follow=True)
    print(f"written to {printable(path)}: give @{printable(path)} to a main")


def main(argv: list[str] | None = None) -> int:
    """Parse a command line and run its command."""
    return run(command, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
