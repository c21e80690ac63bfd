"""python -m evidence: see evidence/cli.py."""

import sys

from evidence.cli import get_args_parser, main
from util.flags.parser import run

if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    sys.exit(run(lambda args: main(args, words[cut + 1 :]), get_args_parser().parse_args(words[:cut])))
