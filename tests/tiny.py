"""The mains with very small models in their registries: what the tests of whole processes run.

    python tests/tiny.py main_pretrain --model mae_test ...

TEST_SYNC=error makes every update after the first two fail where it waits for the GPU.
TEST_NAN="rank:call" makes the loss of one rank nan in one call. TEST_SIGNAL="rank:call:SIGKILL" sends
a signal to one rank in one call: in the middle of a step, whatever the speed of the machine.
"""

import importlib
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import models_mae_pl
import models_sere
from backbones import registry as models
from models_vit import VIT
from util import dist
from util.flags.parser import parse, run

ENCODER = dict(patch_size=(8, 8), dim=32, depth=2, num_heads=2)


mae_test = models_mae_pl.MAE_VIT.override(**ENCODER, decoder_dim=32, decoder_depth=1, decoder_heads=2)
vit_test = VIT.override(**ENCODER)
sere_test = models_sere.SERE.override(**ENCODER, head_hidden=64)

models_mae_pl.MODELS["mae_test"] = mae_test
models_sere.MODELS["sere_test"] = sere_test
models.MODELS["vit_test"] = vit_test


def wrap_loss(main, wrap) -> None:
    """Let a main train with the loss `wrap(objective.loss)`."""
    fit = main.fit

    def wrapped_fit(model, objective, *rest):
        objective.loss = wrap(objective.loss)
        return fit(model, objective, *rest)

    main.fit = wrapped_fit


def disturb(main, nan: str | None, kill: str | None) -> None:
    """Poison a main's loss, or send this process a signal, on one rank in the n-th call of the process."""
    calls = []

    def wrap(loss_fn):
        def disturbed(model, batch):
            loss, terms = loss_fn(model, batch)
            here = f"{dist.rank()}:{len(calls)}"
            calls.append(here)
            if kill and kill.startswith(here + ":"):
                os.kill(os.getpid(), getattr(signal, kill.split(":")[2]))
            if nan == here:
                loss = loss * float("nan")
            return loss, terms

        return disturbed

    wrap_loss(main, wrap)


def forbid_waiting(mode: str) -> None:
    """Set torch.cuda.set_sync_debug_mode from the third update on: "error" makes waiting for the device fail.

    The first two updates may wait: they make handles and constants.
    """
    import engine

    plain, updates = engine.train_one_update, []

    def watched(*args):
        updates.append(1)
        torch.cuda.set_sync_debug_mode(mode if len(updates) > 2 else "default")
        try:
            return plain(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.train_one_update = watched


if __name__ == "__main__":
    torch.set_num_threads(1)
    if mode := os.environ.get("TEST_SYNC"):
        forbid_waiting(mode)
    main = importlib.import_module(sys.argv[1])
    disturb(main, os.environ.get("TEST_NAN"), os.environ.get("TEST_SIGNAL"))
    sys.exit(run(main.main, parse(main.get_args_parser(), sys.argv[2:])))
