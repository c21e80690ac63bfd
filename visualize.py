"""Pictures of models, and charts and pages of runs.

    python visualize.py reconstruct FILE OUT.png   # original | masked | reconstruction | predicted positions
    python visualize.py positions FILE OUT.png     # arrows, accuracy per cell, confusion of rows and columns
    python visualize.py attention FILE OUT.png     # attention of the class token in the last block
    python visualize.py position_audit FILE... OUT.png   # what patch tokens of each layer know of their place
    python visualize.py pca FILE OUT.png           # principal components of patch tokens as colours
    python visualize.py neighbours FILE OUT.png    # the nearest patches in other images
    python visualize.py segments FILE OUT.png --data_path DIR      # image | truth | prediction | error
    python visualize.py curves OUT.png RUN...      # losses and accuracies over epochs, with chance levels
                       [--reference RUN...]        # other runs to compare with, in grey behind them
    python visualize.py sweep DIR OUT.png          # a metric against the swept flag, and its table in OUT.md
    python visualize.py report DIR [OUT.html]      # a run or a sweep as one page that needs no other file

FILE holds a masked autoencoder, a ViT or a DeiT of this toolkit or of MAE; position_audit, pca and neighbours
take every other backbone, too, and timm/NAME; segments takes a segmenter of main_segment.py. The images come
from --data_path, a data set or image files, or from the embedded demo set if it is not given. segments draws
validation images with masks.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable

from util.flags.data_path import DataPath
from util.flags.groups import add_picture_bands, add_range_flag, add_val_split
from util.flags.parser import Parser, answer_at_once, parse, run

# The usual formats of matplotlib.
CHARTS = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".eps", ".tif", ".tiff", ".webp")


def get_args_parser() -> Parser:
    """The parser of all commands."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(
        dest="command",
        required=True,
        metavar="reconstruct|positions|attention|position_audit|pca|neighbours|segments|curves|sweep|report",
    )
    add_model_commands(commands)
    add_feature_commands(commands)
    add_segment_command(commands)
    add_run_commands(commands)
    return p


def ending(suffixes: tuple[str, ...], order: str) -> Callable[[str], str]:
    """A type of argparse: the name of a file of these formats. `order` is that of the arguments."""

    def checked(path: str) -> str:
        if not path.lower().endswith(suffixes) or os.path.isdir(path):
            raise argparse.ArgumentTypeError(
                f"takes a file that ends with {', '.join(suffixes)}, found {path}; the order is {order}"
            )
        return path

    return checked


def add_model_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the commands that draw a model: they share the file, the images and the mask ratio."""
    reconstruct = commands.add_parser(
        "reconstruct", help="draw the decoder's prediction from the visible patches"
    )
    positions = commands.add_parser("positions", help="draw the predictions of the label head")
    attention = commands.add_parser("attention", help="draw where the class token looks")
    for command in (reconstruct, positions, attention):
        suffixes: tuple[str, ...] = CHARTS
        if command is reconstruct:
            suffixes = (".png",)
        add_image_flags(command, suffixes)
    # Attention is that of whole images.
    for command in (reconstruct, positions):
        command.add_argument("--mask_ratio", default=None, type=float, help="as in training if not given")
    positions.add_argument(
        "--measure", default=1000, type=int, help="number of images over which accuracies are measured"
    )
    reconstruct.add_argument(
        "--stats",
        default="true",
        choices=["true", "visible"],
        help="a model with a normalised target does not predict brightness and contrast: show those of each "
        "patch (the ground truth, as the title then says), or those of the visible patches",
    )
    reconstruct.add_argument(
        "--norm_pix_loss",
        action="store_true",
        help="the target was normalised; for files that do not say whether it was",
    )


def add_image_flags(command: Parser, suffixes: tuple[str, ...] = CHARTS) -> None:
    """Add FILE, OUT, and the images that a picture of one model shows."""
    # Positional, because both are required.
    command.add_argument("file", metavar="FILE", help="a checkpoint, or a run's folder")
    command.add_argument(
        "out", metavar="OUT", type=ending(suffixes, "FILE OUT.png"), help="the picture to write"
    )
    command.add_argument(
        "--data_path",
        default="",
        nargs="+",
        metavar="PATH",
        help="folder, tar or list of images, or image files; not given: the demo set",
    )
    add_val_split(command)
    command.translators.append(images_last)
    count = "number of images to draw; if not given 4, or all files that --data_path names"
    command.add_argument("--images", default=None, type=int, help=count)
    add_picture_bands(command)
    add_range_flag(command)


def add_feature_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the commands that show the patch tokens of backbones."""
    pca = commands.add_parser("pca", help="draw the principal components of patch tokens as colours")
    add_image_flags(pca)
    pca.add_argument(
        "--foreground",
        action="store_true",
        help="black where the first component is not above Otsu's threshold; its sign is the one that puts "
        "the border of the images below it",
    )
    neighbours = commands.add_parser("neighbours", help="draw the nearest patches in other images")
    add_image_flags(neighbours)
    neighbours.add_argument("--bank", default=500, type=int, help="number of images that are searched")
    audit = commands.add_parser(
        "position_audit", help="measure what single patch tokens know about their position, layer by layer"
    )
    audit.add_argument("files", nargs="+", metavar="FILE", help="checkpoints, runs' folders, or timm/NAME")
    audit.add_argument(
        "out", metavar="OUT", type=ending(CHARTS, "FILE... OUT.png"), help="the picture to write"
    )
    audit.add_argument(
        "--data_path",
        default="",
        metavar="PATH",
        help="folder, tar or list of images; not given: the demo set",
    )
    add_val_split(audit)
    count = "number of images, every fourth of which is held out and measured"
    audit.add_argument("--images", default=1000, type=int, help=count)
    audit.add_argument("--json", default="", metavar="FILE", help="write the figures to this file, too")
    add_range_flag(audit)


def add_segment_command(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command that draws the predictions of a segmenter."""
    segments = commands.add_parser("segments", help="draw the predictions of a segmenter beside the masks")
    segments.add_argument("file", metavar="FILE", help="a checkpoint of main_segment.py, or a run's folder")
    segments.add_argument(
        "out", metavar="OUT", type=ending((".png",), "FILE OUT.png"), help="the picture to write"
    )
    segments.add_argument(
        "--data_path",
        default="",
        metavar="DIR",
        help="images with masks, as main_segment.py takes them; the embedded demo set if not given. The "
        "validation images are drawn",
    )
    add_val_split(segments)
    segments.add_argument("--images", default=4, type=int, help="number of images, spread evenly")
    add_picture_bands(segments)
    add_range_flag(segments)


def images_last(parser: Parser, words: list[str]) -> list[str]:
    """Move the paths of --data_path to the end: argparse would take a FILE and OUT that follow for images."""
    flag = next((word for word in words if word in ("--data_path", "--data-path")), None)
    if flag is None:
        return words
    start = words.index(flag) + 1
    paths = list(itertools.takewhile(lambda word: not word.startswith("--"), words[start:]))
    others = words[: start - 1] + words[start + len(paths) :]
    missing = 2 - _positionals(parser, others)
    if not 0 < missing < len(paths):
        return words
    return [*others, *paths[-missing:], flag, *paths[:-missing]]


def _positionals(parser: Parser, words: list[str]) -> int:
    """The number of words that are neither flags nor their values."""
    found = 0
    values = 0
    for word in words:
        action = parser._option_string_actions.get("--" + word[2:].replace("-", "_"))
        if word.startswith("--"):
            values = int(action is not None and action.nargs != 0 and "=" not in word)
        elif values:
            values -= 1
        else:
            found += 1
    return found


def add_run_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the commands that draw runs and sweeps."""
    curves = commands.add_parser("curves", help="plot log.txt of runs")
    # The picture comes first here, since there may be any number of runs.
    curves.add_argument(
        "out", metavar="OUT", type=ending(CHARTS, "OUT.png RUN..."), help="the picture to write"
    )
    curves.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs, each with a log.txt")
    curves.add_argument(
        "--reference",
        default=[],
        nargs="+",
        metavar="RUN",
        help="runs or folders of runs to draw in grey behind; evidence/results/NAME has runs of this project",
    )
    sweep = commands.add_parser("sweep", help="plot a metric against a swept flag")
    sweep.add_argument("dir", metavar="DIR", help="a folder of runs")
    sweep.add_argument("out", metavar="OUT", type=ending(CHARTS, "DIR OUT.png"), help="the picture to write")
    sweep.add_argument(
        "--flag",
        default=None,
        help="the swept flag to plot against; the first one that is not the seed if not given",
    )
    sweep.add_argument("--metric", default=None, help="a name in log.txt; the first usual one if not given")
    report = commands.add_parser("report", help="write a page about a run or a sweep")
    report.add_argument("dir", metavar="DIR", help="the folder of a run, or of runs")
    report.add_argument(
        "out",
        nargs="?",
        metavar="OUT",
        type=ending((".html", ".htm"), "DIR OUT.html"),
        help="DIR/report.html if not given",
    )
    report.add_argument("--metric", nargs="+", default=None, help="for sweeps: names in log.txt")


answer_at_once(__name__, get_args_parser())  # the imports below take seconds

from tools.draw import Display, attention, positions, read_runs, reconstruct, sweep
from tools.patches import neighbours, pca
from tools.position import chart, position_audit, record
from tools.segments import segments
from util.files.atomic import write_json, write_text
from util.report import charts
from util.report.page import page
from util.report.panels import save_png


def settle_images(args: argparse.Namespace) -> None:
    """Resolve --images, and a single path of --data_path. Raises ValueError for a number of images below 1.

    Commands without one of these flags pass.
    """
    paths = getattr(args, "data_path", "")
    if getattr(args, "images", 1) is None:
        args.images = 4
        if isinstance(paths, list):
            args.images = max(4, len(paths))
    if isinstance(paths, list) and len(paths) == 1:
        args.data_path = paths[0]
    if isinstance(getattr(args, "data_path", None), str):
        args.data_path = DataPath(args.data_path, args.val_split)
    for name in ("images", "measure", "bank"):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: there must be at least 1")


def draw_model(args: argparse.Namespace) -> None:
    """Draw a model's predictions or tokens."""
    settle_images(args)
    display = Display(getattr(args, "picture_bands", None), args.range)
    if args.command == "position_audit":
        audits = position_audit(args.files, args.data_path, args.images, display)
        if args.json:
            write_json(args.json, record(audits))
        charts.save(chart(audits), args.out)
        return
    shown = args.file, args.data_path, args.images
    if args.command == "reconstruct":
        picture = reconstruct(*shown, args.mask_ratio, args.stats, args.norm_pix_loss, display)
        save_png(picture, args.out)
        return
    if args.command == "segments":
        save_png(segments(*shown, display), args.out)
        return
    if args.command == "positions":
        figure = positions(*shown, args.measure, args.mask_ratio, display)
    elif args.command == "attention":
        figure = attention(*shown, display)
    elif args.command == "pca":
        figure = pca(*shown, args.foreground, display)
    else:
        figure = neighbours(*shown, args.bank, display)
    charts.save(figure, args.out)


def main(args: argparse.Namespace) -> int:
    """Draw what the command asks for."""
    out = args.out
    if args.command == "curves":
        charts.save(charts.curves(read_runs(args.runs), read_runs(args.reference)), out)
    elif args.command == "sweep":
        sweep(args.dir, out, args.flag, args.metric)
    elif args.command == "report":
        out = out or os.path.join(args.dir, "report.html")
        text = page(args.dir, args.metric)
        write_text(out, text, follow=True)
    else:
        draw_model(args)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, parse(get_args_parser())))
