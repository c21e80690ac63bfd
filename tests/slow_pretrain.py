"""main_pretrain with a very small model and steps of TEST_STEP seconds, so that tests can interrupt a job.

With TEST_HANG=n, the n-th step of the last rank never ends in the first start of the job.
"""

import os
import time

import torch

import main_pretrain
import tiny  # puts mae_test into the registry
from main_pretrain import get_args_parser
from util import dist


def slow(loss_fn):
    steps = []

    def slowed(model, batch):
        steps.append(batch)
        here = (str(len(steps)), os.environ.get("SLURM_RESTART_COUNT", "0"), dist.rank() + 1)
        if here == (os.environ.get("TEST_HANG"), "0", dist.world_size()):
            torch.futures.Future().wait()
        time.sleep(float(os.environ.get("TEST_STEP", 0)))
        return loss_fn(model, batch)

    return slowed


def main(args) -> int:
    tiny.wrap_loss(main_pretrain, slow)
    return main_pretrain.main(args)


if __name__ == "__main__":
    import sys

    from util.cluster.launch import launch
    from util.flags.parser import parse, run

    if "--direct" in sys.argv:  # as srun and torchrun start a main
        sys.argv.remove("--direct")
        sys.exit(run(main, parse(get_args_parser())))
    sys.exit(launch("slow_pretrain"))
