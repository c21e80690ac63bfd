"""Run `python -m util.cluster.check`. The old name, `python -m util.slurm check`, stays for one release."""

import sys

from util.cluster.check import get_args_parser, main
from util.flags.parser import parse, run

if __name__ == "__main__":
    words = sys.argv[1:]
    # The only command that there was.
    if words[:1] == ["check"]:
        words = words[1:]
    sys.exit(run(main, parse(get_args_parser(), words)))
