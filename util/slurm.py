"""Run `python -m util.cluster.check`. The old name, `python -m util.slurm check`, stays for one release."""

import sys

from util.cluster.check import get_args_parser, main
from util.flags.parser import parse, run

if __name__ == "__main__":
    # The only command that there was.
    if sys.argv[1:2] != ["check"]:
        sys.exit("usage: srun ... python -m util.slurm check FLAGS (now python -m util.cluster.check FLAGS)")
    sys.exit(run(main, parse(get_args_parser(), sys.argv[2:])))
