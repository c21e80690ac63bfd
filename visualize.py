"""Pictures of models, and charts and pages of runs.

    python visualize.py reconstruct FILE OUT.png     # original | masked | reconstruction | predicted positions
    python visualize.py positions FILE OUT.png       # arrows, accuracy per cell, confusion of rows and columns
    python visualize.py attention FILE OUT.png       # where the class token of the last block looks
    python visualize.py curves OUT.png RUN...        # losses and accuracies over epochs, with the level of guessing
                       [--reference RUN...]          # behind them, in grey, runs to compare with: is mine healthy?
    python visualize.py sweep DIR OUT.png            # a metric against the flag that was swept, and OUT.md, its table
    python visualize.py report DIR [OUT.html]        # all of a run or a sweep in one page that needs no other file

FILE holds a masked autoencoder, a ViT or a DeiT, of this toolkit's or MAE's; the images are --data_path's, the embedded
demo's if not given.
"""

import argparse
import os
import sys

from util.flags.parser import Parser, run


def get_args_parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, parser_class=argparse.ArgumentParser)
    for name, help_text in (
        ("reconstruct", "draw what the decoder makes of the visible patches"),
        ("positions", "draw what the label head says"),
        ("attention", "draw where the class token looks"),
    ):
        c = commands.add_parser(name, help=help_text)
        c.add_argument("file")
        c.add_argument("out")
        c.add_argument(
            "--data_path", default="", help="folder, tar or list of images; the embedded demo set if empty"
        )
        c.add_argument("--images", default=4, type=int, help="images to draw")
        if name != "attention":
            c.add_argument("--mask_ratio", default=None, type=float, help="as in training if not given")
        if name == "positions":
            c.add_argument(
                "--measure", default=1000, type=int, help="images over which accuracies are measured"
            )
    c = commands.choices["reconstruct"]
    c.add_argument(
        "--stats",
        default="true",
        choices=["true", "visible"],
        help="norm-pix models predict no brightness and contrast: show them with each patch's own (ground truth, "
        "which the title says), or with those of the visible patches",
    )
    c.add_argument(
        "--norm_pix_loss", action="store_true", help="the target was normalised, for files that do not say"
    )
    c = commands.add_parser("curves", help="plot log.txt of runs")
    c.add_argument("out")
    c.add_argument("runs", nargs="*")
    c.add_argument(
        "--reference",
        default=[],
        nargs="+",
        metavar="RUN",
        help="runs, or folders of runs, drawn in grey behind: evidence/results/NAME/... are this project's",
    )
    c = commands.add_parser("sweep", help="plot a metric against what was swept")
    c.add_argument("dir")
    c.add_argument("out")
    c.add_argument(
        "--flag",
        default=None,
        help="the swept flag to plot against; the first that is not the seed if not given",
    )
    c.add_argument("--metric", default=None, help="a name in log.txt; the first usual one if not given")
    c = commands.add_parser("report", help="write a page")
    c.add_argument("dir")
    c.add_argument("out", nargs="?", help="DIR/report.html if not given")
    c.add_argument("--metric", nargs="+", default=None, help="for sweeps: names in log.txt")
    return p


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a mistyped flag answer at once.
    ARGS = get_args_parser().parse_args()

from tools.draw import attention, positions, read_runs, reconstruct, sweep
from util.report import charts
from util.report import page as report
from util.report.panels import save_png


def main(args) -> int:
    for name in ("images", "measure"):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: there must be at least 1")
    if args.command == "reconstruct":
        save_png(
            reconstruct(
                args.file, args.data_path, args.images, args.mask_ratio, args.stats, args.norm_pix_loss
            ),
            args.out,
        )
    elif args.command == "positions":
        charts.save(
            positions(args.file, args.data_path, args.images, args.measure, args.mask_ratio), args.out
        )
    elif args.command == "attention":
        charts.save(attention(args.file, args.data_path, args.images), args.out)
    elif args.command == "curves":
        charts.save(charts.curves(read_runs(args.runs), read_runs(args.reference)), args.out)
    elif args.command == "sweep":
        sweep(args.dir, args.out, args.flag, args.metric)
    else:
        args.out = args.out or os.path.join(args.dir, "report.html")
        text = report.page(args.dir, args.metric)
        with open(args.out, "w") as f:
            f.write(text)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, ARGS))
