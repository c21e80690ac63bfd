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
from util.data.survey.ranges import SUGGESTED, written
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
    found = survey(index, read)
    # As a main reads them: in one depth. A small crop takes least time.
    dataset = ImageDataset(index, eval_transform(8), read=replace(read, depth=found.depth), found=found)
    print(dataset.summary())
    if args.command == "stats":
        return print_stats(dataset, args.images, args.recipe)
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
    folder = os.path.dirname(recipe or "")
    if folder and not os.path.isdir(folder):
        raise ValueError(f"--recipe: there is no folder {printable(folder)}")
    index = dataset.index
    numbers = spread(len(index), images)
    values = Values(dataset.read.in_chans, dataset.depth, len(numbers))
    left_out: Counter[str] = Counter()
    example: dict[str, tuple[str, str]] = {}
    for i in numbers:
        try:
            values.add(dataset.decoded(i))
        except (OSError, ValueError) as error:
            index.check_unchanged(i)
            reason = _reason(error)
            kind = _kind(reason)
            left_out[kind] += 1
            example.setdefault(kind, (index.name(i), reason))
    for kind, count in left_out.most_common():
        name, reason = example[kind]
        why = printable(with_flags(reason, FLAGS))
        print(f"left out: {counted(count, 'image')}, as {printable(name)}: {why}")
    if not values.images:
        raise ValueError(
            f"no image could be read with {dataset.read.in_chans} channels: give --in_chans as the images "
            "have it, or see what `check` reports"
        )
    kept = _kept_channels(dataset, values)
    flags = _flags(dataset, values, kept)
    print(*flags)
    _write_recipe(dataset, flags, recipe, values.images)
    return 0


def _reason(error: Exception) -> str:
    """Return what is wrong, without the file's size and first bytes."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path
    return str(error).partition("): ")[2] or str(error)


def _kind(reason: str) -> str:
    """Return a reason without what else may differ from file to file: numbers, and bytes in quotes."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|-?\d[\d.]*", "#", reason)


def _kept_channels(dataset: ImageDataset, values: Values) -> list[int]:
    """Return the channels that the recipe has, and print which are constant.

    Those are left out of it, unless `channels` asks for them: their standard deviation is 0, and one image
    that differs would become very large values. Grey and RGB of 8 bits are kept whole.
    """
    every = list(range(values.channels))
    constant = values.constant()
    usual = dataset.depth == torch.uint8 and values.channels in (1, 3)
    if not constant or usual:
        return every
    where = f"constant in {counted(values.images, 'image')}"
    bands = _bands(dataset, constant)
    if dataset.read.channels:
        print(f"{where}: {bands}, which --channels could leave out")
        return every
    if len(constant) == len(every):
        print(f"{where}: {bands}, so that there is nothing to learn from")
        return every
    print(f"{where}: {bands}, left out by --channels")
    return [i for i in every if i not in constant]


def _flags(dataset: ImageDataset, values: Values, kept: list[int]) -> list[str]:
    """Return --range, --mean and --std of the channels `kept`, and how the images are read, one flag each."""
    flags = []
    low = [0.0]
    high = [255.0]
    if dataset.depth != torch.uint8:
        ends = [written(*pair) for pair in values.percentiles(SUGGESTED)]
        low = [float(pair[0]) for pair in ends]
        high = [float(pair[1]) for pair in ends]
        flags.append(_flag("range", [bound for i in kept for bound in ends[i]]))
    stats = values.stats(low, high)
    # The smallest number that four digits show: 0 is no width.
    return [
        *_given(dataset, kept),
        *flags,
        _flag("mean", [stats.mean[i] for i in kept], "{:.4f}"),
        _flag("std", [max(stats.std[i], 1e-4) for i in kept], "{:.4f}"),
    ]


def _flag(name: str, values: list[Any], form: str = "{}") -> str:
    return f"--{name} {' '.join(form.format(value) for value in values)}"


def _given(dataset: ImageDataset, kept: list[int]) -> list[str]:
    """Return the flags by which the channels `kept` are read, as far as they are not the defaults."""
    read = dataset.read
    flags = []
    channels = list(read.channels)
    bands = read.bands
    if len(kept) < read.in_chans:
        channels = kept
        bands = read.in_chans
    if channels:
        if bands is not None:
            flags.append(_flag("in_chans", [bands]))
        flags.append(_flag("channels", channels))
    elif read.in_chans != 3:
        flags.append(_flag("in_chans", [read.in_chans]))
    if read.transparency != "drop":
        flags.append(_flag("alpha", [read.transparency]))
    if read.exif != "ignore":
        flags.append(_flag("exif", [read.exif]))
    return flags


def _bands(dataset: ImageDataset, channels: list[int]) -> str:
    """Name channels of the images by the numbers of their bands in the files."""
    numbers = channels
    if dataset.read.channels:
        numbers = [dataset.read.channels[i] for i in channels]
    word = "bands"
    if len(numbers) == 1:
        word = "band"
    return f"{word} {', '.join(map(str, numbers))}"


def _write_recipe(dataset: ImageDataset, flags: list[str], recipe: str | None, images: int) -> None:
    """Write the flags to a recipe, unless its name is ''.

    An existing file with other content is kept. Raises ValueError if it is the one that `recipe` names.
    """
    path = recipe
    if path is None:
        base = os.path.basename(os.path.abspath(dataset.index.path)) or "data"
        path = f"{base.removesuffix('.tar')}.args"
    if not path:
        return
    source = f"# Of {counted(images, 'image')} of {printable(dataset.index.path)}"
    text = "\n".join([source, *flags, ""])
    if os.path.exists(path) and not _holds(path, text):
        kept = f"{printable(path)} exists and is kept: remove it, or name another file by --recipe"
        # A script that named the file would go on with other values.
        if recipe is not None:
            raise ValueError(kept)
        print(kept)
        return
    try:
        write_text(path, text, follow=True)
    except OSError as error:
        # Nobody asked for the file, and the flags are printed.
        if recipe is not None:
            raise
        print(f"no recipe is written: {printable(str(error))}")
        return
    print(f"written to {printable(path)}: give @{printable(path)} to a main")


def _holds(path: str, text: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(text.encode()) + 1) == text.encode()


def main(argv: list[str] | None = None) -> int:
    """Parse a command line and run its command."""
    return run(command, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
