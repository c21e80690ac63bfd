"""The command lines of SERE's own main_sere.py (MCG-NKU/SERE), translated into those of ours.

With `--arch` a command line is one of SERE's: flags have its names, meanings and defaults. Flags that only
this toolkit has may follow, and win. Without `--arch` a name that only SERE has is an error that names our
flag.

This module imports nothing heavy, so that --help answers at once.
"""

import argparse
import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from util.flags.numbers import BELOW_ONE, COUNT, NOT_NEGATIVE, POSITIVE, SHARE, number
from util.flags.parser import Parser

WORDS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
_FROM_ZERO = number(0)


def word(text: str) -> bool:
    """An argparse type: a word of WORDS, in any case."""
    if text.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"takes true or false, found {text}")
    return WORDS[text.lower()]


@dataclass(frozen=True)
class Flag:
    """A flag of SERE's.

    Attributes:
        kind: reads a value, as `type` in argparse.
        default: SERE's default.
        nargs: as in argparse.
        ours: our flag for the same value. "" if there is none, or if other flags decide the value too.
    """

    kind: Callable[[str], Any]
    default: Any
    nargs: int | str | None = None
    ours: str = ""


FLAGS: dict[str, Flag] = {
    # Model
    "arch": Flag(str, None),
    "patch_size": Flag(COUNT, 16, ours="patch_size"),
    "window_size": Flag(int, 7),
    "drop_path": Flag(BELOW_ONE, 0.1, ours="drop_path"),
    "use_masked_im_modeling": Flag(word, True),
    # Head
    "out_dim": Flag(number(2), 8192, ours="out_dim"),
    "patch_out_dim": Flag(number(2), None),
    "shared_head": Flag(word, False),
    "shared_head_teacher": Flag(word, True),
    # Without a value it is our flag of the same name.
    "norm_last_layer": Flag(word, True, nargs="?"),
    "norm_in_head": Flag(str, None),
    "act_in_head": Flag(str, "gelu"),
    # Masks
    "pred_ratio": Flag(SHARE, [0.3], nargs="+", ours="pred_ratio"),
    "pred_ratio_var": Flag(SHARE, [0.0], nargs="+", ours="pred_ratio_var"),
    "pred_shape": Flag(str, "block", ours="pred_shape"),
    "pred_start_epoch": Flag(_FROM_ZERO, 0, ours="pred_start_epoch"),
    # Losses
    "lambda1": Flag(NOT_NEGATIVE, 1.0),
    "lambda2": Flag(NOT_NEGATIVE, 1.0),
    "alpha": Flag(NOT_NEGATIVE, 1.0, ours="sr_spatial"),
    "beta": Flag(NOT_NEGATIVE, 1.0, ours="sr_channel"),
    "temperature_pixel": Flag(POSITIVE, 0.5, ours="sr_temp_spatial"),
    "temperature_channel": Flag(POSITIVE, 0.1, ours="sr_temp_channel"),
    "overlap_size": Flag(COUNT, [13, 13], nargs="+"),
    # Teacher
    "momentum_teacher": Flag(SHARE, 0.996, ours="ema_momentum"),
    "warmup_teacher_temp": Flag(POSITIVE, 0.04, ours="warmup_teacher_temp"),
    "teacher_temp": Flag(POSITIVE, 0.04, ours="teacher_temp"),
    "warmup_teacher_patch_temp": Flag(POSITIVE, 0.04, ours="warmup_teacher_patch_temp"),
    "teacher_patch_temp": Flag(POSITIVE, 0.07, ours="teacher_patch_temp"),
    "warmup_teacher_temp_epochs": Flag(_FROM_ZERO, 30, ours="warmup_teacher_temp_epochs"),
    # Optimisation
    "batch_size_per_gpu": Flag(COUNT, 128, ours="batch_size"),
    "epochs": Flag(COUNT, 100, ours="epochs"),
    "accum_iter": Flag(COUNT, 1, ours="accum_iter"),
    "optimizer": Flag(str, "adamw"),
    # Per 256 images.
    "lr": Flag(NOT_NEGATIVE, 5e-4, ours="blr"),
    "min_lr": Flag(NOT_NEGATIVE, 1e-6, ours="min_lr"),
    "warmup_epochs": Flag(_FROM_ZERO, 10, ours="warmup_epochs"),
    "weight_decay": Flag(NOT_NEGATIVE, 0.04, ours="weight_decay"),
    "weight_decay_end": Flag(NOT_NEGATIVE, 0.4, ours="weight_decay_end"),
    "clip_grad": Flag(NOT_NEGATIVE, 3.0, ours="clip_grad"),
    "freeze_last_layer": Flag(_FROM_ZERO, 1, ours="freeze_last_layer"),
    "use_fp16": Flag(word, True),
    # Crops
    "global_crops_number": Flag(int, 2),
    "global_crops_scale": Flag(SHARE, [0.14, 1.0], nargs=2, ours="global_crops_scale"),
    "local_crops_number": Flag(_FROM_ZERO, 0, ours="local_crops_number"),
    "local_crops_scale": Flag(SHARE, [0.05, 0.4], nargs=2, ours="local_crops_scale"),
    # Run. A default of None leaves the value to our own default.
    "data_path": Flag(str, None, ours="data_path"),
    "output_dir": Flag(str, ".", ours="output_dir"),
    "saveckp_freq": Flag(_FROM_ZERO, 40, ours="save_every_epochs"),
    "load_from": Flag(str, None),
    "seed": Flag(int, 0, ours="seed"),
    "num_workers": Flag(_FROM_ZERO, None, ours="num_workers"),
    "dist_url": Flag(str, None, ours="dist_url"),
    "local_rank": Flag(int, None, ours="local_rank"),
}
# The models of `--arch`, without the size of the patches.
MODELS = {f"vit_{size}": f"sere_vit_{size}_patch16" for size in ("tiny", "small", "base", "large")}
# The only values that we have, and what stands in the way of others.
BUILT: dict[str, tuple[Sequence[Any], str]] = {
    "arch": (tuple(MODELS), f"there are {', '.join(MODELS)}"),
    "window_size": ((7,), "it is for Swin, and the models of --arch have no windows"),
    "use_masked_im_modeling": (
        (True,),
        "--pred_ratio 0 --pred_ratio_var 0 --lambda2 0 trains without masks",
    ),
    "norm_in_head": ((None, "None", "none", ""), "the projection head has no norm; leave the flag out"),
    "act_in_head": (("gelu",), "the projection head has GELU; leave the flag out"),
    "pred_shape": (("block", "rand"), "masks are block or rand"),
    "optimizer": (("adamw",), "the optimizer is adamw"),
    "global_crops_number": ((2,), "the losses compare 2 global crops"),
}
# What our command lines have instead of a name that only SERE has. Names without an entry have nothing.
INSTEAD = {
    "batch_size_per_gpu": "--batch_size",
    "momentum_teacher": "--ema_momentum",
    "alpha": "--sr_spatial",
    "beta": "--sr_channel",
    "temperature_pixel": "--sr_temp_spatial",
    "temperature_channel": "--sr_temp_channel",
    "overlap_size": "--sr_points",
    "lambda1": "--cls_weight",
    "lambda2": "--patch_weight",
    "shared_head": "--patch_prototypes",
    "shared_head_teacher": "--patch_prototypes",
    "use_fp16": "--amp",
    "saveckp_freq": "--save_every_epochs",
    "load_from": "--resume",
}


class _SereParser(Parser):
    """A parser of SERE's flags, whose errors are those of the parser that it translates for."""

    def __init__(self, outer: Parser):
        super().__init__(add_help=False, prog=outer.prog)
        self.outer = outer
        for name, flag in FLAGS.items():
            constant = {"?": True}.get(str(flag.nargs))
            self.add_argument(
                f"--{name}", type=flag.kind, default=flag.default, nargs=flag.nargs, const=constant
            )

    def error(self, message: str) -> NoReturn:
        self.outer.error(message)


def translated(parser: Parser, words: list[str]) -> list[str]:
    """Translate the words of a command line of SERE's into ours; words of other flags stay as they are.

    A command line without `--arch` is ours and stays as it is. Errors are those of `parser`.
    """
    names = [_name(text) for text in words]
    if "arch" not in names:
        _refuse_spellings(parser, words)
        return words
    given, ours = _SereParser(parser).parse_known_args(words)
    _check_known(parser, ours)
    try:
        if "model" in names:
            raise ValueError(
                "--arch and --model, in a recipe perhaps, both name the model: leave one out. With --arch, "
                "flags have SERE's meanings, so recipes of this toolkit do not go with it"
            )
        _check_built(given)
        return [*_our_words(given), *ours]
    except ValueError as error:
        parser.error(str(error))


def _name(text: str) -> str:
    """The name of a flag, "" for a value."""
    if not text.startswith("--"):
        return ""
    return text[2:].partition("=")[0].replace("-", "_")


def _refuse_spellings(parser: Parser, words: list[str]) -> None:
    for text, following in zip(words, [*words[1:], ""]):
        name = _name(text)
        if name == "norm_last_layer" and following.lower() in WORDS:
            parser.error(
                "--norm_last_layer takes a value only with SERE's --arch: here it is --norm_last_layer or "
                "--no-norm_last_layer",
            )
        if name not in FLAGS or f"--{name}" in parser._option_string_actions:
            continue
        instead = INSTEAD.get(name)
        if instead:
            message = f"--{name} is a flag of SERE's, which needs --arch: without --arch it is {instead}"
        else:
            message = f"--{name} is a flag of SERE's, which needs --arch, such as --arch vit_small"
        parser.error(message)


def _check_known(parser: Parser, words: list[str]) -> None:
    """Refuse a flag that neither program has; the nearest name may be SERE's."""
    known = [*parser._option_string_actions, *(f"--{name}" for name in FLAGS)]
    for text in words:
        flag = parser._underscored(text).partition("=")[0]
        if _name(text) and flag not in known:
            nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0.5) or ["--help"]
            parser.error(f"unknown flag {flag}; did you mean {nearest[0]}?")


def _check_built(given: argparse.Namespace) -> None:
    """Raise ValueError for a value that we do not have."""
    for name, (values, reason) in BUILT.items():
        value = getattr(given, name)
        if value not in values:
            shown = {False: "false"}.get(value, value)
            raise ValueError(f"--{name} {shown} is not supported: {reason}")
    size = given.overlap_size
    if len(size) != 2 or size[0] != size[1]:
        raise ValueError(
            f"--overlap_size {' '.join(map(str, size))} is not supported: queries and keys have the same "
            "points, so give the same number twice"
        )
    if given.alpha + given.beta > 4:
        raise ValueError(
            f"--alpha {given.alpha:g} and --beta {given.beta:g} give the other losses a negative weight, "
            "(4 - alpha - beta) / 2: their sum may be at most 4"
        )


def _our_words(given: argparse.Namespace) -> Iterator[str]:
    yield from ("--sere_exact", "--model", MODELS[given.arch])
    if len(given.pred_ratio_var) == 1:
        given.pred_ratio_var = given.pred_ratio_var * len(given.pred_ratio)
    for name, flag in FLAGS.items():
        value = getattr(given, name)
        if flag.ours and value is not None:
            yield from _words(flag.ours, value)
    yield from _words("sr_points", given.overlap_size)
    # The relations take their share from the other losses.
    base = (4 - given.alpha - given.beta) / 2
    yield from _words("cls_weight", base * given.lambda1)
    yield from _words("patch_weight", base * given.lambda2)
    yield from _words("norm_last_layer", given.norm_last_layer)
    yield from _prototype_words(given)
    precision = {True: "fp16", False: "fp32"}
    yield from _words("gpu_amp", precision[given.use_fp16])
    if given.load_from:
        yield from _words("resume", os.path.join(given.output_dir, given.load_from))


def _prototype_words(given: argparse.Namespace) -> Iterator[str]:
    """Translate the two heads that may be shared. Raises ValueError for what cannot train."""
    if given.shared_head and not given.shared_head_teacher:
        raise ValueError(
            "--shared_head true --shared_head_teacher false is not supported: the student has no "
            "prototypes of patches, so the teacher's would never learn"
        )
    number_of = given.patch_out_dim
    if not given.shared_head_teacher:
        yield from _words("patch_prototypes", "own")
        yield from _words("patch_out_dim", number_of or 8192)
        return
    if number_of not in (None, given.out_dim):
        raise ValueError(
            f"--patch_out_dim {number_of} is not supported with --out_dim {given.out_dim} and a shared head "
            "of the teacher: give the same number, or --shared_head false --shared_head_teacher false"
        )
    kind = "student"
    if given.shared_head:
        kind = "shared"
    yield from _words("patch_prototypes", kind)


def _words(name: str, value: Any) -> list[str]:
    """A flag of ours with its value."""
    if value is True:
        return [f"--{name}"]
    if value is False:
        return [f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]
