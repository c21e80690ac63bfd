"""SERE's own command lines, and `--sere_exact`: settings against a table, behaviour against slow oracles."""

import argparse
import itertools
import math
import os
import random
import shlex

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import main_sere
import tiny
from layers.self_distillation import Centre, copy_parameters
from layers.self_relation import edge_points, sample_tokens, spatial_relation
from models_sere import SereTeacher, make_centres
from processes import SERE_BASE as BASE
from processes import SERE_SMALL as SMALL
from util.cluster import sweep
from util.cluster.launch import launch
from util.data import multicrop
from util.data.multicrop import Details, MultiCrop
from util.flags import sere
from util.flags.parser import parse, with_help

# What both commands train with, as published.
BOTH = {
    "input_size": [224],
    "local_size": [96],
    "patch_size": [16],
    "in_chans": 3,
    "pos_embed": "learned",
    "drop_path": 0.1,
    "out_dim": 8192,
    "patch_prototypes": "shared",
    "cls_weight": pytest.approx(1.65),
    "patch_weight": pytest.approx(1.65),
    "sr_spatial": 0.2,
    "sr_channel": 0.5,
    "sr_temp_spatial": 0.5,
    "sr_temp_channel": 0.1,
    "sr_points": [13, 13],
    "ema_momentum": 0.996,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.07,
    "warmup_teacher_patch_temp": 0.04,
    "teacher_patch_temp": 0.07,
    "local_crops_number": 10,
    "pred_ratio": [0.0, 0.3],
    "pred_ratio_var": [0.0, 0.2],
    "pred_shape": "block",
    "pred_start_epoch": 0,
    "batch_size": 128,
    "accum_iter": 1,
    "epochs": 100,
    "warmup_epochs": 10,
    "lr": None,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 0.3,
    "save_every_epochs": 10,
    "num_workers": 6,
    "seed": 0,
    "amp": "auto",
    "gpu_amp": "fp16",
    "sere_exact": True,
    "data_path": "TRAIN",
    "output_dir": "OUT",
    "resume": "",
    "dist_url": "env://",
}
OWN = {
    SMALL: {
        "model": "sere_vit_small_patch16",
        "norm_last_layer": False,
        "freeze_last_layer": 1,
        "blr": 5e-4,
        "min_lr": 1e-6,
        "warmup_teacher_temp_epochs": 30,
        "global_crops_scale": [0.4, 1.0],
        "local_crops_scale": [0.05, 0.4],
    },
    BASE: {
        "model": "sere_vit_base_patch16",
        "norm_last_layer": True,
        "freeze_last_layer": 3,
        "blr": 7.5e-4,
        "min_lr": 2e-6,
        "warmup_teacher_temp_epochs": 50,
        "global_crops_scale": [0.32, 1.0],
        "local_crops_scale": [0.05, 0.32],
    },
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    random.seed(0)


def settings(line: str) -> dict:
    return vars(parse(main_sere.get_args_parser(), shlex.split(line)))


def refusal(line: str, capsys) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(SystemExit, match="2"):
        settings(line)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: " in error, error
    return error.partition("error: ")[2].strip()


# --- the commands


@pytest.mark.parametrize("command", [SMALL, BASE], ids=["small", "base"])
def test_the_commands_of_the_readme_have_the_published_settings(command):
    found = settings(command)
    expected = BOTH | OWN[command]
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("command", [SMALL, BASE], ids=["small", "base"])
def test_what_the_commands_build(command):
    args = argparse.Namespace(**settings(command))
    with torch.device("meta"):
        student = main_sere.build_model(args)
        objective = main_sere.build_objective(args, student, torch.device("meta"))
    small = command is SMALL
    assert (student.dim, student.trunk.num_heads) == ((384, 6) if small else (768, 12))
    assert student.exact and student.points == (13, 13) and student.local_grid == (6, 6)
    assert student.ibot_head.prototypes.shape == (8192, 256) and student.ibot_head.patch_prototypes is None
    assert student.ibot_head.scale.requires_grad == small
    assert objective.weights == pytest.approx(dict(cls=1.65, patch=1.65, sr_spatial=0.2, sr_channel=0.5))
    assert objective.most_masked == 98 and objective.clip_grad == 0.3
    assert all(centre.once_per_step for centre in objective.centres.values())
    at, last = objective.schedules, 29 if small else 49
    assert (at.temperature(0.9), at.temperature(last), at.momentum(0)) == pytest.approx((0.04, 0.07, 0.996))
    assert at.temperature(last - 1) < 0.0695 and at.patch_temperature(last) == pytest.approx(0.07)
    assert at.frozen(last) is False and at.frozen(0.5 if small else 2.5) and at.masks(0)


def test_schedules_of_patches_come_from_their_flags():
    flags = "--warmup_teacher_patch_temp 0.02 --teacher_patch_temp 0.06 --pred_start_epoch 2"
    args = argparse.Namespace(**settings(f"{SMALL} {flags}"))
    with torch.device("meta"):
        at = main_sere.build_objective(args, main_sere.build_model(args), torch.device("meta")).schedules
    assert at.patch_temperature(2) == 0.02 and at.patch_temperature(31) == pytest.approx(0.06)
    assert at.temperature(31) == pytest.approx(0.07) and not at.masks(1.9)


@pytest.mark.parametrize("command", [SMALL, BASE], ids=["small", "base"])
def test_the_recipes_have_the_settings_of_the_commands(command):
    name = "small" if command is SMALL else "base"
    recipe = settings(f"@{os.path.dirname(main_sere.__file__)}/recipes/sere_vit_{name}.args")
    # Of the machine, not of the method; the precision is named in the recipe.
    other = {"data_path", "output_dir", "num_workers", "save_every_epochs", "gpu_amp"}
    # Not given; the model chooses the same.
    chosen = {"patch_size", "sr_points", "warmup_teacher_patch_temp", "teacher_patch_temp"}
    found = settings(command)
    different = {key for key, value in found.items() if recipe[key] != pytest.approx(value, abs=0)}
    assert different <= other | chosen, different
    assert all(recipe[key] is None for key in chosen)


def test_the_order_of_the_flags_does_not_matter_and_the_last_value_wins():
    words = shlex.split(SMALL)
    moved = shlex.join(words[2:] + ["--arch=vit_small"])
    assert settings(moved) == settings(SMALL)
    found = settings(f"--lr 1e-3 {SMALL} --batch-size-per-gpu=7 --alpha 1 --epochs 3 --epochs 4")
    assert (found["blr"], found["batch_size"], found["epochs"]) == (1e-3, 7, 4)
    # torch.distributed.launch spells it with a dash.
    assert settings(f"--local-rank=1 {SMALL}")["local_rank"] == 1
    assert found["cls_weight"] == (4 - 1 - 0.5) / 2
    # Flags that only this toolkit has follow SERE's.
    found = settings(f"--input_size 32 --batch_size 5 --no-sere_exact --amp bf16 {SMALL} --cls_weight 3")
    assert (found["input_size"], found["batch_size"], found["cls_weight"]) == ([32], 5, 3.0)
    assert found["sere_exact"] is False and found["amp"] == "bf16"


def test_defaults_with_arch_are_seres():
    found = settings("--arch vit_tiny")
    expected = {
        "model": "sere_vit_tiny_patch16",
        "teacher_temp": 0.04,
        "clip_grad": 3.0,
        "local_crops_number": 0,
        "global_crops_scale": [0.14, 1.0],
        "pred_ratio": [0.3],
        "pred_ratio_var": [0.0],
        "save_every_epochs": 40,
        "output_dir": ".",
        "batch_size": 128,
        "sr_spatial": 1.0,
        "sr_channel": 1.0,
        "cls_weight": 1.0,
        "patch_weight": 1.0,
        "patch_prototypes": "student",
        "norm_last_layer": True,
    }
    assert {name: found[name] for name in expected} == expected
    # And those without are ours.
    assert settings("")["teacher_temp"] == 0.07 and not settings("")["sere_exact"]


# --- every flag. A value, and what it changes, or that it is not built.

A = "--arch vit_small --out_dim 8192"
ACTS: dict[str, list[tuple[str, dict]]] = {
    "arch": [
        ("vit_large", {"model": "sere_vit_large_patch16"}),
        ("vit_tiny", {"model": "sere_vit_tiny_patch16"}),
    ],
    "patch_size": [("8", {"patch_size": [8]})],
    "window_size": [("7", {})],
    "out_dim": [("64", {"out_dim": 64})],
    "patch_out_dim": [
        ("64 --shared_head_teacher off", {"patch_out_dim": 64, "patch_prototypes": "own"}),
        ("8192", {}),
    ],
    "shared_head": [("On", {"patch_prototypes": "shared"})],
    "shared_head_teacher": [("0", {"patch_out_dim": 8192, "patch_prototypes": "own"})],
    "norm_last_layer": [("false", {"norm_last_layer": False}), ("TRUE", {}), ("", {})],
    "momentum_teacher": [("0.99", {"ema_momentum": 0.99})],
    "norm_in_head": [("None", {})],
    "act_in_head": [("gelu", {})],
    "use_masked_im_modeling": [("1", {})],
    "pred_ratio": [
        ("0.1 0.5", {"pred_ratio": [0.1, 0.5], "pred_ratio_var": [0.0, 0.0]}),
        ("0.2", {"pred_ratio": [0.2]}),
    ],
    "pred_ratio_var": [("0.1", {"pred_ratio_var": [0.1]})],
    "pred_shape": [("rand", {"pred_shape": "rand"})],
    "pred_start_epoch": [("3", {"pred_start_epoch": 3})],
    "lambda1": [("2", {"cls_weight": 2.0})],
    "lambda2": [("0", {"patch_weight": 0.0})],
    "warmup_teacher_temp": [("0.03", {"warmup_teacher_temp": 0.03})],
    "teacher_temp": [("0.05", {"teacher_temp": 0.05})],
    "warmup_teacher_patch_temp": [("0.03", {"warmup_teacher_patch_temp": 0.03})],
    "teacher_patch_temp": [("0.05", {"teacher_patch_temp": 0.05})],
    "warmup_teacher_temp_epochs": [("5", {"warmup_teacher_temp_epochs": 5})],
    "use_fp16": [("false", {"gpu_amp": "fp32"})],
    "weight_decay": [("0.1", {"weight_decay": 0.1})],
    "weight_decay_end": [("0.1", {"weight_decay_end": 0.1})],
    "clip_grad": [("0", {"clip_grad": 0.0})],
    "batch_size_per_gpu": [("32", {"batch_size": 32})],
    "epochs": [("7", {"epochs": 7})],
    "freeze_last_layer": [("3", {"freeze_last_layer": 3.0})],
    "lr": [("0.001", {"blr": 0.001})],
    "warmup_epochs": [("0", {"warmup_epochs": 0.0})],
    "min_lr": [("1e-5", {"min_lr": 1e-5})],
    "optimizer": [("adamw", {})],
    "load_from": [("checkpoint.pth", {"resume": "./checkpoint.pth"})],
    "drop_path": [("0.2", {"drop_path": 0.2})],
    "accum_iter": [("4", {"accum_iter": 4})],
    "global_crops_number": [("2", {})],
    "global_crops_scale": [("0.3 1", {"global_crops_scale": [0.3, 1.0]})],
    "local_crops_number": [("8", {"local_crops_number": 8})],
    "local_crops_scale": [("0.1 0.3", {"local_crops_scale": [0.1, 0.3]})],
    "data_path": [("D", {"data_path": "D"})],
    "output_dir": [("O", {"output_dir": "O"})],
    "saveckp_freq": [("0", {"save_every_epochs": 0})],
    "seed": [("5", {"seed": 5})],
    "num_workers": [("3", {"num_workers": 3})],
    "dist_url": [("tcp://host:1", {"dist_url": "tcp://host:1"})],
    "local_rank": [("1", {"local_rank": 1})],
    "overlap_size": [("7 7", {"sr_points": [7, 7]})],
    "alpha": [("0.2", {"sr_spatial": 0.2, "cls_weight": 1.4, "patch_weight": 1.4})],
    "beta": [("3", {"sr_channel": 3.0, "cls_weight": 0.0, "patch_weight": 0.0})],
    "temperature_pixel": [("0.4", {"sr_temp_spatial": 0.4})],
    "temperature_channel": [("0.2", {"sr_temp_channel": 0.2})],
}
REFUSED = {
    "arch": "swin_tiny",
    "window_size": "14",
    "patch_out_dim": "64",
    "shared_head": "true --shared_head_teacher false",
    "norm_in_head": "bn",
    "act_in_head": "relu",
    "use_masked_im_modeling": "false",
    "pred_shape": "column",
    "optimizer": "sgd",
    "global_crops_number": "3",
    "overlap_size": "13 7",
}


def test_the_table_has_all_53_flags():
    assert ACTS.keys() == sere.FLAGS.keys() and len(ACTS) == 53 and REFUSED.keys() <= ACTS.keys()


@pytest.mark.parametrize("name", ACTS)
def test_every_flag_acts(name):
    before = settings(A)
    for value, changes in ACTS[name]:
        after = settings(f"{A} --{name} {value}")
        changed = {key: value for key, value in after.items() if before[key] != value}
        assert changed == {key: pytest.approx(x) for key, x in changes.items()}, value


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_is_not_built_is_named(name, capsys):
    message = refusal(f"{A} --{name} {REFUSED[name]}", capsys)
    assert message.startswith(f"--{name} {REFUSED[name]}") and "is not supported" in message, message


def test_the_advice_of_a_refusal_works(capsys):
    message = refusal(f"{SMALL} --use_masked_im_modeling false", capsys)
    advice = message.partition(": ")[2].partition(" trains")[0]
    found = settings(f"{SMALL} {advice}")
    assert main_sere.mask_ranges(argparse.Namespace(**found)) == [(0.0, 0.0)] and not found["patch_weight"]
    message = refusal(f"{A} --patch_out_dim 64", capsys)
    found = settings(f"{A} --patch_out_dim 64 {message.partition(', or ')[2]}")
    assert (found["patch_prototypes"], found["patch_out_dim"]) == ("own", 64)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--shared_head maybe", "--shared_head: takes true or false, found maybe"),
        ("--lr fast", "--lr: takes a number, found 'fast'"),
        ("--batch_size_per_gpu 0", "--batch_size_per_gpu: must be 1 or more, found 0"),
        ("--alpha 3 --beta 2", "--alpha 3 and --beta 2 give the other losses a negative weight"),
        (
            "--global_crops_scale 0.4",
            "--global_crops_scale: needs 2 values, such as --global_crops_scale 0.14 1.0",
        ),
        ("--temperature_pixel 0", "--temperature_pixel: must be greater than 0, found 0"),
        ("@recipes/sere_vit_small.args", "--arch and --model, in a recipe perhaps"),
        ("--batch-size_per_gp 3", "unknown flag --batch-size_per_gp; did you mean --batch_size_per_gpu?"),
    ],
)
def test_a_wrong_value_is_one_line_with_seres_name(flags, says, capsys):
    assert says in refusal(f"{A} {flags}", capsys)


# --- without --arch

ONLY_WITH_ARCH = sorted(sere.FLAGS.keys() - settings("").keys() - {"arch"})


def test_flags_of_both_programs_are_ours_without_arch():
    found = settings("--lr 1e-3 --epochs 5 --norm_last_layer --data_path D --local-rank 1")
    assert (found["lr"], found["blr"], found["epochs"]) == (1e-3, 5e-4, 5)
    assert found["norm_last_layer"] is True and found["local_rank"] == 1
    assert settings("--no-norm_last_layer")["norm_last_layer"] is False
    assert len(ONLY_WITH_ARCH) == 20


@pytest.mark.parametrize("name", ONLY_WITH_ARCH)
def test_a_flag_that_only_sere_has_says_what_to_do(name, capsys):
    message = refusal(f"--{name} 1", capsys)
    assert f"--{name} is a flag of SERE's, which needs --arch" in message
    instead = sere.INSTEAD.get(name)
    if instead:
        assert message.endswith(instead) and f"--{instead[2:]}" in with_help_text()
    assert f"--{name} " not in with_help_text(), "SERE's spellings are not in --help"


def with_help_text() -> str:
    return with_help(main_sere.get_args_parser()).format_help()


def test_words_for_a_switch_need_arch(capsys):
    message = refusal("--norm_last_layer false", capsys)
    assert "--arch" in message and "--no-norm_last_layer" in message
    assert "--sere_exact" in with_help_text() and "--arch" not in with_help_text()


# --- folders, launchers, devices


def test_the_training_folder_or_its_parent_is_read(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        path = tmp_path / "images" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(path)
    setup = main_sere.Setup(torch.device("cpu"), "fp32", (32, 32), main_sere.Pixels((0.5,) * 3, (0.5,) * 3))
    for folder in (tmp_path / "images", tmp_path / "images" / "train"):
        args = settings(f"--arch vit_tiny --data_path {folder} --batch_size_per_gpu 1 --num_workers 0")
        loader, *_ = main_sere.build_data(argparse.Namespace(**args), setup, (2, 2), {})
        assert len(loader.dataset) == 3
    assert loader.dataset.transform.details == Details("block", exact=True)
    args = settings(f"--data_path {folder} --batch_size 1 --num_workers 0 --pred_shape rand")
    loader, *_ = main_sere.build_data(argparse.Namespace(**args), setup, (2, 2), {})
    assert loader.dataset.transform.details == Details("rand", exact=False)


def test_a_checkpoint_to_load_lies_in_the_output_folder():
    assert settings(f"{SMALL} --load_from checkpoint0010.pth")["resume"] == "OUT/checkpoint0010.pth"
    assert settings(f"{SMALL} --load_from /else/c.pth")["resume"] == "/else/c.pth"


def test_half_precision_is_for_gpus(capsys):
    def resolved(line: str, device: str) -> str:
        return main_sere.precision(argparse.Namespace(**settings(line)), torch.device(device))

    assert resolved(SMALL, "cuda") == "fp16"
    assert capsys.readouterr().out == ""
    assert resolved(SMALL, "cpu") == "fp32"
    assert "computes in float32 on cpu" in capsys.readouterr().out
    assert resolved(f"{SMALL} --use_fp16 false", "cuda") == "fp32"
    assert resolved(f"{SMALL} --amp bf16", "cpu") == "bf16", "our flag wins"
    assert resolved("", "cpu") == "fp32"


def test_the_launcher_takes_the_same_command(capsys):
    words = shlex.split(f"--dry_run --cluster local --job_dir OUT --nodes 1 {SMALL}")
    assert launch("main_sere", words) == 0
    shown = capsys.readouterr().out
    assert "python main_sere.py --arch vit_small" in shown and "--alpha 0.2" in shown
    points = sweep.plan("main_sere", ["--arch", "vit_tiny"], ["alpha+lr=0.1+1e-3,0.2+2e-3"], [], "/jobs")
    assert [p.flags for p in points] == [dict(alpha="0.1", lr="1e-3"), dict(alpha="0.2", lr="2e-3")]
    parsed = [sweep.parse_main("main_sere", p.argv) for p in points]
    assert [(p.sr_spatial, p.blr, p.output_dir) for p in parsed] == [
        (0.1, 1e-3, points[0].folder),
        (0.2, 2e-3, points[1].folder),
    ]


# --- --sere_exact: weights

SIZE, LOCAL, GRID = (32, 48), (16, 32), (4, 6)


def student(**options):
    defaults = dict(img_size=SIZE, local_size=LOCAL, out_dim=24, drop_path=0.0, exact=True)
    return tiny.sere_test(**{**defaults, **options})


def test_only_the_weights_of_norms_are_not_decayed():
    model = student(norm_last_layer=False, patch_prototypes="own", depth=1)
    args = argparse.Namespace(sere_exact=True)
    undecayed, decayed = main_sere.optimizer_groups(args, model)
    names = {id(p): name for name, p in model.named_parameters()}
    heads = ("sr_spatial", "sr_spatial_local", "sr_channel", "sr_channel_local")
    norms = {"blocks.0.norm1.weight", "blocks.0.norm2.weight", "norm.weight"}
    norms |= {f"{head}.{norm}.weight" for head in heads for norm in ("norm", "predictor_norm")}
    assert {names[id(p)] for p in undecayed["params"]} == norms and undecayed["weight_decay"] == 0
    found = {names[id(p)] for p in decayed["params"]}
    table = [
        "cls_token",
        "pos_embed",
        "mask_token",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "blocks.0.norm1.bias",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.qkv.bias",
        "blocks.0.attn.proj.weight",
        "blocks.0.attn.proj.bias",
        "blocks.0.norm2.bias",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc1.bias",
        "blocks.0.mlp.fc2.weight",
        "blocks.0.mlp.fc2.bias",
        "norm.bias",
        "ibot_head.mlp.0.weight",
        "ibot_head.mlp.0.bias",
        "ibot_head.mlp.2.weight",
        "ibot_head.mlp.2.bias",
        "ibot_head.mlp.4.weight",
        "ibot_head.mlp.4.bias",
        "ibot_head.prototypes",
        "ibot_head.scale",
        "ibot_head.patch_prototypes",
        "ibot_head.patch_scale",
    ]
    table += [
        f"{head}.{name}"
        for head in heads
        for name in ("norm.bias", "predictor.weight", "predictor_norm.bias")
    ]
    assert found == set(table) and decayed["weight_decay"] == 1.0
    # Fixed scales are in no group, and without the flag tokens and biases are not decayed.
    model = student(depth=1)
    every = [p for group in main_sere.optimizer_groups(args, model) for p in group["params"]]
    assert not any(p is model.ibot_head.scale for p in every)
    args.sere_exact = False
    undecayed, _ = main_sere.optimizer_groups(args, model)
    assert any(p is model.cls_token for p in undecayed["params"])


def test_initial_weights_are_the_published_ones():
    model = student(dim=192, num_heads=3, depth=2, patch_size=(16, 16))
    linear = [m for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 8
    for module in [*linear, *model.ibot_head.mlp[::2]]:
        assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
        assert not module.bias.any()
    assert float(model.cls_token.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert float(model.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not model.mask_token.any() and (model.ibot_head.scale == 1).all()

    def is_uniform(x, bound):
        largest = float(x.detach().abs().max())
        return largest <= bound and largest > 0.95 * bound and x.std() > 0.5 * bound

    # torch's default: up to 1 / sqrt(fan in).
    assert is_uniform(model.patch_embed.proj.weight, 768**-0.5)
    assert is_uniform(model.patch_embed.proj.bias, 768**-0.5)
    assert is_uniform(model.sr_channel_local.predictor.weight, 192**-0.5)
    assert is_uniform(model.ibot_head.prototypes, 256**-0.5)
    # Without the flag linear layers have Xavier's limits.
    usual = student(dim=192, num_heads=3, depth=1, exact=False)
    assert is_uniform(usual.blocks[0].attn.proj.weight, (6 / 384) ** 0.5)


def cubic(x: float) -> float:
    """The kernel of bicubic interpolation (Keys 1981) with a = -0.75."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * (x**3 - 5 * x**2 + 8 * x - 4)
    return 0.0


def stretched(new: int, old: int) -> torch.Tensor:
    """Weights (new, old) of a bicubic interpolation by the factor (new + 0.1) / old, as in DINO."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        place = (i + 0.5) * old / (new + 0.1) - 0.5
        for k in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[i, min(max(k, 0), old - 1)] += cubic(place - k)
    return weights


@pytest.mark.parametrize("exact", [True, False])
def test_the_embedding_of_local_crops_is_stretched_as_in_dino(exact):
    model = student(exact=exact)
    table = model.pos_embed.detach()
    cells = table[0, 1:].double().view(*GRID, -1)
    expected = torch.einsum("ih,jw,hwc->ijc", stretched(2, 4), stretched(4, 6), cells).flatten(0, 1)
    found = model.resized_pos_embed(table, (2, 4))
    assert torch.equal(found[:, 0], table[:, 0])
    assert torch.allclose(found[0, 1:].double(), expected, atol=1e-7) == exact
    assert torch.equal(model.resized_pos_embed(table, GRID), table), "that of global crops is not touched"
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    images = torch.zeros(1, 3, *LOCAL)
    model.forward_tokens(images)
    patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    assert torch.allclose(seen[0][:, 1:], patches + found[:, 1:], atol=1e-6), "and the trunk uses it"


# --- --sere_exact: spatial relations


def published_points(a, b, size):
    """Points of an overlap in two boxes (x, y, w, h, flipped) -> two (1, S, S, 2), or all -2."""
    x0, x1 = max(a[0], b[0]), min(a[0] + a[2], b[0] + b[2])
    y0, y1 = max(a[1], b[1]), min(a[1] + a[3], b[1] + b[3])
    grids = []
    for x, y, w, h, flipped in (a, b):
        grid = torch.full((1, *size, 2), -2.0, dtype=torch.float64)
        if x0 < x1 and y0 < y1:
            for i, j in itertools.product(range(size[0]), range(size[1])):
                u = (x0 + (x1 - x0) * j / (size[1] - 1) - x) / w
                v = (y0 + (y1 - y0) * i / (size[0] - 1) - y) / h
                grid[0, i, j] = torch.tensor([2 * (1 - u if flipped else u) - 1, 2 * v - 1])
        grids.append(grid)
    return grids


def sampled_relation(tokens, cells, grid, heads):
    """The relation (heads, S, S) of tokens (N, C), sampled along its keys and then along its queries."""
    N, d = len(tokens), tokens.shape[1] // heads
    out = []
    for h in range(heads):
        part = tokens[:, h * d : (h + 1) * d].double()
        relation = part @ part.T / math.sqrt(d)  # (N, N)
        maps = relation.view(1, N, *cells)
        keys = F.grid_sample(maps, grid, align_corners=False).flatten(2)[0]  # (N, S)
        maps = keys.T.reshape(1, -1, *cells)  # a map of queries for each key
        out.append(F.grid_sample(maps, grid, align_corners=False).flatten(2)[0].T)  # (S queries, S keys)
    return torch.stack(out)


def random_boxes(count: int) -> list[list[float]]:
    """Boxes of whole pixels in an image of 100 x 80, some of them far apart, some flipped."""
    boxes = []
    for _ in range(count):
        w, h = random.randint(5, 60), random.randint(5, 50)
        boxes.append([random.randint(0, 100 - w), random.randint(0, 80 - h), w, h, random.randint(0, 1)])
    return boxes


def test_the_relation_of_samples_is_the_sample_of_the_relation_of_two_boxes():
    cells, size, heads = (4, 6), (3, 5), 2
    empty = flipped = 0
    for _ in range(60):
        a, b = random_boxes(2)
        grids = published_points(a, b, size)
        *points, share = edge_points(torch.tensor(a).float(), torch.tensor(b).float(), size)
        assert (share > 0) == (grids[0][0, 0, 0, 0] != -2)
        empty += int(share == 0)
        flipped += a[4] != b[4]
        for at, grid in zip(points, grids):
            tokens = torch.randn(24, 8)
            expected = sampled_relation(tokens, cells, grid, heads)
            found = spatial_relation(sample_tokens(tokens[None], cells, at[None], "zeros"), heads)[0]
            assert torch.allclose(found.double(), expected, atol=2e-5)
    assert empty > 5 and flipped > 5


def test_the_spatial_loss_counts_all_pairs_and_has_zeros_outside():
    model = student(sr_channel=False)
    B, V, heads = 4, 5, 2
    boxes = torch.tensor([random_boxes(V) for _ in range(B)]).float()
    tokens = torch.randn(B * 2, 24, 32)
    local = torch.randn(B * (V - 2), 8, 32)
    teacher = torch.randn(B * 2, 24, 32)
    found = model.spatial(tokens, local, boxes, teacher)

    own = model.sr_spatial(tokens).view(B, 2, 24, 32)
    small = model.sr_spatial_local(local).view(B, V - 2, 8, 32)
    taught = teacher.view(B, 2, 24, 32)
    terms, empty = [], 0
    for t, s in itertools.product(range(2), range(V)):
        if t == s:
            continue
        per_image = []
        for i in range(B):
            size, cells, mine = ((3, 5), GRID, own[i, s]) if s < 2 else ((2, 4), (2, 4), small[i, s - 2])
            a, b = boxes[i, s].tolist(), boxes[i, t].tolist()
            at, at_teacher = published_points(a, b, size)
            p = (sampled_relation(taught[i, t], GRID, at_teacher, heads) / 0.5).softmax(-1)
            q = sampled_relation(mine, cells, at, heads).log_softmax(-1)
            per_image.append(-(p * q).sum(-1).mean())
            empty += at[0, 0, 0, 0] == -2
        terms.append(torch.stack(per_image).mean())
    assert len(terms) == 2 + 2 * (V - 2) and empty > 3
    assert float(found.detach()) == pytest.approx(float(torch.stack(terms).mean().detach()), abs=2e-5)


# --- --sere_exact: centres, temperatures


def batch_of(B=3, num_local=2, details=multicrop.USUAL):
    crops = MultiCrop(
        SIZE,
        LOCAL,
        num_local,
        GRID,
        global_scale=(0.4, 1.0),
        local_scale=(0.1, 0.4),
        mask_ratios=[(0.2, 0.5)],
        details=details,
    )
    samples = [crops(torch.randint(256, (3, 60, 90), dtype=torch.uint8)) for _ in range(B)]
    batch = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    return batch | {name: batch[name] / 255 - 0.5 for name in ("image", "local")}


def objective_of(model, **changes):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.ndim > 1 else p + torch.randn_like(p) * 0.1)
    teacher = copy_parameters(SereTeacher(model), model)
    centres = make_centres(24, model.prototypes.of_patches(teacher=True), once_per_step=model.exact)
    given = dict(by_epoch=model.exact) | changes
    schedules = main_sere.Schedules(4, 0.9, 0.1, 0.1, 0.05, 0.08, 2, 0, **given)
    weights = dict(cls=1, patch=1, sr_spatial=1, sr_channel=1)
    return main_sere.SelfDistillation(model, teacher, centres, weights, 12, schedules)


@pytest.mark.parametrize("exact", [True, False])
def test_centres_move_once_per_update(exact):
    objective = objective_of(student(exact=exact))
    teacher, centres = objective.teacher, objective.centres
    assert set(centres.state_dict()) == {"cls.mean", "patch.mean"}, "names of stored tensors do not change"
    # What undoes an unfinished update copies buffers.
    assert {"cls.collected", "patch.batches"} <= dict(centres.named_buffers()).keys()
    means = {"cls": torch.zeros(24), "patch": torch.zeros(24)}
    for _ in range(2):  # updates
        logits = {"cls": [], "patch": []}
        for _ in range(3):  # micro-batches
            batch = batch_of()
            before = {name: centre.mean.clone() for name, centre in centres.items()}
            objective.loss(objective.student, batch)
            tokens = teacher.norm(teacher.forward_tokens(batch["image"].flatten(0, 1)))
            every = teacher.ibot_head(tokens)
            logits["cls"].append(every[:, 0].mean(0))
            logits["patch"].append(every[:, 1:].mean((0, 1)))
            for name, centre in centres.items():
                assert torch.equal(centre.mean, before[name]) == exact
        objective.after_step(0)
        for name, centre in centres.items():
            means[name] = 0.9 * means[name] + 0.1 * torch.stack(logits[name]).mean(0)
            assert torch.allclose(centre.mean, means[name], atol=1e-5) == exact
            assert not centre.collected.any() and not centre.batches


def test_a_usual_centre_has_no_steps():
    centre = Centre(3)
    centre.update(torch.ones(3))
    before = centre.mean.clone()
    centre.step()
    assert torch.equal(before, centre.mean) and torch.allclose(before, torch.full((3,), 0.1))


@pytest.mark.parametrize("ramp, start, epochs", [(4, 0, 9), (30, 0, 30), (3, 2, 9), (1, 0, 3), (0, 0, 3)])
def test_temperatures_are_constant_within_an_epoch(ramp, start, epochs):
    at = main_sere.Schedules(
        epochs, 0.9, 0.1, 0.1, 0.04, 0.07, ramp, 0, 0.03, 0.05, unmasked_epochs=start, by_epoch=True
    )
    cls = np.concatenate([np.linspace(0.04, 0.07, ramp), np.full(epochs, 0.07)])
    patch = np.concatenate([np.full(start, 0.03), np.linspace(0.03, 0.05, ramp), np.full(epochs, 0.05)])
    for epoch in range(epochs):
        for part in (0, 0.5, 0.999):
            assert at.temperature(epoch + part) == pytest.approx(cls[epoch])
            assert at.patch_temperature(epoch + part) == pytest.approx(patch[epoch])
        assert at.masks(epoch) == (epoch >= start)


def test_patches_have_temperatures_of_their_own():
    objective = objective_of(student(), first_patch_temperature=0.2, last_patch_temperature=0.3)
    batch = batch_of()
    objective.done = 2.5
    ids = torch.arange(24).expand(6, 24)
    taught = objective.teacher(
        batch["image"],
        ids,
        objective.centres,
        objective.schedules.temperature(2.5),
        objective.schedules.patch_temperature(2.5),
    )
    tokens = objective.teacher.norm(objective.teacher.forward_tokens(batch["image"].flatten(0, 1)))
    every = objective.teacher.ibot_head(tokens)
    assert torch.allclose(taught["cls"].flatten(0, 1), (every[:, 0] / 0.08).softmax(-1), atol=1e-5)
    assert torch.allclose(taught["patch"], (every[:, 1:] / 0.3).softmax(-1), atol=1e-5)
    # The objective passes both.
    seen = []
    forward = objective.teacher.forward
    objective.teacher.forward = lambda *given: seen.append(given[3:]) or forward(*given)
    objective.loss(objective.student, batch)
    assert seen == [(0.08, 0.3)]


def test_no_patch_is_masked_before_its_epoch():
    objective = objective_of(student(), unmasked_epochs=2)
    batch = batch_of()
    unmasked = batch | {"mask": torch.zeros_like(batch["mask"])}
    losses = {}
    for done, given in ((1.9, batch), (2.0, batch), (2.0, unmasked)):
        objective.done = done
        losses[done, given is batch] = objective.loss(objective.student, given)[1]
    assert losses[1.9, True]["patch"] == 0 and losses[2.0, True]["patch"] > 0
    channel = {key: float(value["sr_channel"].detach()) for key, value in losses.items()}
    assert channel[1.9, True] == pytest.approx(channel[2.0, False])
    assert channel[2.0, True] != pytest.approx(channel[2.0, False])


# --- prototypes of patches


@pytest.mark.parametrize("kind, teachers", [("student", 24), ("own", 40)])
def test_patches_may_have_prototypes_of_their_own(kind, teachers):
    extra = {"patch_out_dim": 40} if kind == "own" else {}
    objective = objective_of(student(patch_prototypes=kind, **extra))
    model, teacher = objective.student, objective.teacher
    assert objective.centres["patch"].mean.shape == (teachers,)
    batch = batch_of()
    loss, losses = objective.loss(model, batch)
    objective.after_step(0)

    def logits(head, unit, mine):
        directions, scale = (
            (head.patch_prototypes, head.patch_scale) if mine else (head.prototypes, head.scale)
        )
        return torch.stack([(unit * d).sum(-1) / d.norm() * s for d, s in zip(directions, scale)], -1)

    images, mask = batch["image"].flatten(0, 1), batch["mask"].flatten(0, 1)
    s = model.norm(model.forward_tokens(images, mask, model.mask_token))[:, 1:]
    before = copy_parameters(SereTeacher(model), model)  # the first update starts from equal weights
    t = before.norm(before.forward_tokens(images))[:, 1:]
    target = (logits(before.ibot_head, before.ibot_head.project(t), kind == "own") / 0.05).softmax(-1)
    error = -(target * (logits(model.ibot_head, model.ibot_head.project(s), True) / 0.1).log_softmax(-1))
    expected = torch.stack([e[m].mean() for e, m in zip(error.sum(-1), mask)]).mean()
    assert float(losses["patch"].detach()) == pytest.approx(float(expected.detach()), abs=1e-4)
    loss.backward()
    assert model.ibot_head.patch_prototypes.grad.abs().sum() > 0
    assert any(p is model.ibot_head.patch_prototypes for p in model.ibot_head.last_layer()), "frozen at first"
    assert (teacher.ibot_head.patch_prototypes is not None) == (kind == "own")


def test_another_number_of_prototypes_needs_heads_of_their_own():
    with pytest.raises(ValueError, match="only with `patch_prototypes` own"):
        student(patch_prototypes="student", patch_out_dim=40)
    with pytest.raises(ValueError, match="takes one of shared, student, own, found 'both'"):
        student(patch_prototypes="both")


# --- --sere_exact: crops and masks


@pytest.mark.parametrize("exact", [True, False])
def test_blurs_of_all_crops_have_the_same_range_in_pixels(exact, monkeypatch):
    seen = []
    monkeypatch.setattr(multicrop.F, "gaussian_blur", lambda crop, size, sigma: seen.append(sigma[0]) or crop)
    # Every crop is blurred, at the two ends of the range.
    for end in (0, 1):
        monkeypatch.setattr(multicrop.random, "random", lambda: 0.0)
        monkeypatch.setattr(multicrop.random, "uniform", lambda low, high, end=end: (low, high)[end])
        crops = MultiCrop(
            (224, 224),
            (96, 96),
            1,
            (14, 14),
            global_scale=(0.4, 1.0),
            local_scale=(0.1, 0.4),
            mask_ratios=[(0.0, 0.0)],
            details=Details(exact=exact),
        )
        crops(torch.zeros(3, 300, 300, dtype=torch.uint8))
    small = 1.0 if exact else 96 / 224
    assert seen == pytest.approx([0.1, 0.1, 0.1 * small, 2.0, 2.0, 2.0 * small])


def uniform_calls(monkeypatch, values) -> list:
    """Let random.uniform return the given values, and return the list of its later arguments."""
    calls, draws = [], iter(values)
    monkeypatch.setattr(multicrop.random, "uniform", lambda *ends: calls.append(ends) or next(draws))
    return calls


def test_block_masks_have_the_limits_of_the_published_code(monkeypatch):
    # Areas and logarithms of aspects. 14 rows do not fit 14 rows; 0.3 * 196 = 58.8 cells are wanted.
    calls = uniform_calls(monkeypatch, [14 * 4, math.log(14 / 4), 49.0, 0.0, 9.0, 0.0, *[100.0, 0.0] * 10])
    mask = multicrop.block_mask((14, 14), 0.3, published=True)
    areas = calls[::2]
    assert areas[:2] == [(16, pytest.approx(58.8))] * 2, "the first rectangle was as high as the grid"
    assert areas[2] == (16, pytest.approx(9.8)), "below the smallest area the range is reversed"
    assert areas[3][1] <= 9.8 and len(areas) == 13, "ten misses in a row end the mask"
    assert mask[:14].sum() in range(49, 59)
    calls = uniform_calls(monkeypatch, [14 * 4, math.log(14 / 4), *[100.0, 0.0] * 10])
    assert int(multicrop.block_mask((14, 14), 0.3).sum()) == 56, "usually a rectangle may be as high"
    assert calls[0] == (16, 58)


def test_masks_of_the_published_code_are_blocks_up_to_the_ratio():
    sizes = [int(multicrop.block_mask((14, 14), 0.3, published=True).sum()) for _ in range(60)]
    assert max(sizes) <= 58 and sum(sizes) / 60 > 48
    assert not multicrop.block_mask((14, 14), 0.0, published=True).any()
    assert int(multicrop.block_mask((2, 2), 0.5, published=True).sum()) <= 2


def test_scattered_masks_have_the_ratio_and_lie_anywhere():
    masks = torch.stack([multicrop.scattered_mask((4, 6), 0.3) for _ in range(400)])
    assert (masks.flatten(1).sum(1) == 7).all(), "0.3 * 24 cells, rounded down"
    assert (masks.float().mean(0) - 7 / 24).abs().max() < 0.1


@pytest.mark.parametrize("shape, exact", [("block", False), ("block", True), ("rand", False)])
def test_crops_have_the_masks_that_were_asked_for(shape, exact, monkeypatch):
    made = []
    for name in ("block_mask", "scattered_mask"):

        def mask(grid, ratio, published=False, name=name):
            made.append((name, published))
            return torch.zeros(grid).bool()

        monkeypatch.setattr(multicrop, name, mask)
    batch_of(1, 1, Details(shape, exact))
    expected = {"rand": ("scattered_mask", False), "block": ("block_mask", exact)}
    assert made == [expected[shape]] * 2
