"""main_pretrain with a very small model and steps of TEST_STEP seconds: a job that lasts long enough to be interrupted."""
import os
import time

import main_pretrain
import tiny  # noqa: F401  (puts mae_test into the registry)
from main_pretrain import get_args_parser


def main(args) -> int:
    make_loss_fn = main_pretrain.make_loss_fn

    def slow(*a):
        loss_fn = make_loss_fn(*a)

        def slowed(model, batch):
            time.sleep(float(os.environ.get("TEST_STEP", 0)))
            return loss_fn(model, batch)

        return slowed

    main_pretrain.make_loss_fn = slow
    return main_pretrain.main(args)


if __name__ == "__main__":
    import sys

    from util.args import parse, run
    from util.launch import launch

    if "--direct" in sys.argv:  # as srun and torchrun start a main
        sys.argv.remove("--direct")
        sys.exit(run(main, parse(get_args_parser())))
    sys.exit(launch("slow_pretrain"))
