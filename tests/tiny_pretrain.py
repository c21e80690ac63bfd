"""main_pretrain.py with a very small model in the registry: what the tests of whole processes run.

MAE_TEST_NAN="rank:step" poisons the loss of one rank at one step.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

torch.set_num_threads(1)

import main_pretrain
from models_mae_pl import MODELS, MaskedAutoencoderViT
from util import dist
from util.args import parse, run


def mae_test(**kwargs):
    return MaskedAutoencoderViT(**(dict(patch_size=(8, 8), dim=32, depth=2, num_heads=2, decoder_dim=32,
                                        decoder_depth=1, decoder_heads=2) | kwargs))


MODELS["mae_test"] = mae_test

if "MAE_TEST_NAN" in os.environ:
    rank, step = map(int, os.environ["MAE_TEST_NAN"].split(":"))
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
    sys.exit(run(main_pretrain.main, parse(main_pretrain.get_args_parser())))
