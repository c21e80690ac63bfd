"""The mains with very small models in their registries: what the tests of whole processes run.

    python tests/tiny.py main_pretrain --model mae_test ...

MAE_TEST_NAN="rank:step" poisons the pretraining loss of one rank at one step.
"""
import importlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import main_pretrain
import models
import models_mae_pl
from models_vit import VisionTransformer
from util import dist
from util.args import parse, run

ENCODER = dict(patch_size=(8, 8), dim=32, depth=2, num_heads=2)


def mae_test(**kwargs):
    return models_mae_pl.MaskedAutoencoderViT(**ENCODER | dict(decoder_dim=32, decoder_depth=1, decoder_heads=2) | kwargs)


def vit_test(**kwargs):
    return VisionTransformer(**ENCODER | kwargs)


models_mae_pl.MODELS["mae_test"] = mae_test
models.MODELS["vit_test"] = vit_test


def poison(rank: int, step: int) -> None:
    original = main_pretrain.make_loss_fn

    def make_loss_fn(*args):
        loss_fn, calls = original(*args), []

        def poisoned(model, batch):
            loss, terms = loss_fn(model, batch)
            calls.append(0)
            return (loss * float("nan") if dist.rank() == rank and len(calls) == step + 1 else loss), terms

        return poisoned

    main_pretrain.make_loss_fn = make_loss_fn


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "MAE_TEST_NAN" in os.environ:
        poison(*map(int, os.environ["MAE_TEST_NAN"].split(":")))
    main = importlib.import_module(sys.argv[1])
    sys.exit(run(main.main, parse(main.get_args_parser(), sys.argv[2:])))
