"""Inspect checkpoints, and convert them from one library to another.

    python checkpoints.py inspect FILE...                # kind, architecture, epoch, sha256, commands
    python checkpoints.py export FILE OUT --to encoder   # or mae, timm, hf (a folder), safetensors,
                                                         # onnx, torchexport
    python checkpoints.py import FILE OUT                # from MAE, timm, Hugging Face (a folder), DINO, SERE

FILE may also be a run's folder, which stands for its checkpoint-last.pth, or an https address.

Export and import run both models on the same images and print the largest difference between their outputs.
They write nothing if it is above 1e-4. Label heads and the optimizer are left out.

onnx and torchexport are whole programs. They take any number of normalised images. A classifier returns
`logits`, an encoder `cls` and `patches`.
"""

import argparse
import sys
from collections.abc import Callable

from util.files.names import printable_lines
from util.flags.parser import Parser, run

FILE = "a checkpoint, a run's folder, which stands for its checkpoint-last.pth, or an https address"
FORMATS = ("encoder", "mae", "timm", "hf", "safetensors", "onnx", "torchexport")


def get_args_parser() -> Parser:
    """The parser of the three commands."""
    # The raw formatter keeps the lines of the examples above.
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="inspect|export|import")
    inspect = commands.add_parser(
        "inspect",
        help="print what files hold",
        description="Print what files hold: kind, architecture, epoch, sha256, and which commands take them.",
        epilog=_example("inspect runs/pretrain/checkpoint-last.pth"),
    )
    inspect.add_argument("files", nargs="+", metavar="FILE", help=FILE)
    export = commands.add_parser(
        "export",
        help="write weights for another library",
        description="Write weights for another library, after a comparison of both models' outputs.",
        epilog=_example("export runs/finetune vit.safetensors --to timm"),
    )
    export.add_argument("file", metavar="FILE", help=FILE)
    export.add_argument(
        "out",
        metavar="OUT",
        help="encoder, mae: .pth; safetensors: .safetensors; timm: .pth, .safetensors, or a new folder, "
        "which holds mean and std of the images, too; hf: a new folder; onnx: .onnx; torchexport: .pt2",
    )
    export.add_argument("--to", choices=FORMATS, default="timm", help="the format to write")
    export.add_argument(
        "--pos_embed_init",
        choices=["zero", "sincos"],
        default="zero",
        help="the positional embedding of a checkpoint without one, which mae, timm and hf need; zero "
        "computes the same as none",
    )
    export.add_argument(
        "--remove_position",
        default=None,
        metavar="DATA",
        help="with --to timm, write the encoder with a head that projects out of a token what tells its "
        "position on the images of DATA; '' is the demo set",
    )
    into = commands.add_parser(
        "import",
        help="write a file of this toolkit from another library's",
        description="Write a file of this toolkit from one of MAE, timm, Hugging Face, DINO, iBOT or SERE.",
        epilog=_example("import facebook_vit_mae_base mae_base.pth"),
    )
    into.add_argument("file", metavar="FILE", help="a .pth or .safetensors file, or a Hugging Face folder")
    into.add_argument("out", metavar="OUT", help="the file to write, .pth")
    return p


def _example(words: str) -> str:
    return f"example:\n  python checkpoints.py {words}"


def inspect(files: list[str], describe: Callable[[str], str]) -> int:
    """Print what each file is; returns exit code 2 if one of them cannot be read, and 0 otherwise."""
    code = 0
    for path in files:
        try:
            print(printable_lines(describe(path)), flush=True)
        except (ValueError, OSError) as error:
            # The other files are described all the same.
            if len(files) == 1:
                raise
            print(f"error: {printable_lines(str(error))}", file=sys.stderr, flush=True)
            code = 2
    return code


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    # Imported here because they take seconds: --help and mistyped flags answer at once.
    from tools.convert import export, import_file
    from tools.inspect import describe

    if args.command == "inspect":
        return inspect(args.files, describe)
    if args.command == "export":
        export(args.file, args.out, args.to, args.pos_embed_init, args.remove_position)
    else:
        import_file(args.file, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser().parse_args()))
