"""Defaults that depend on where a run is: the checkpoint that it starts from, and the machine."""

import argparse
import os
import shlex

import pytest
import torch
from PIL import Image

import engine
import main_finetune
import main_linprobe
import main_pretrain
import models_mae_pl
import models_sere
from backbones import registry
from benchmarks import timing
from layers import sizes
from util.cluster import slurm_jobs, sweep
from util.cluster.job import Resources
from util.data import __main__ as data_commands
from util.dist.device import choose_device
from util.files.cores import own_cores
from util.flags.groups import own_workers
from util.flags.parser import given_in, parse, run
from util.run import plan
from util.train import amp
from util.weights import archive
from util.weights.defaults import as_stored, known_flags
from util.weights.types import Checkpoint

CPU = torch.device("cpu")


def stored(built=None, /, **flags) -> Checkpoint:
    """A checkpoint with these flags and the weights of a model, if one is built."""
    return Checkpoint("x.pth", {} if built is None else built.state_dict(), flags)


# --- names


def test_the_names_of_command_lines_are_those_of_the_registries():
    # Other tests register models whose names end in _test.
    def names(registered):
        return [name for name in registered if not name.endswith("_test")]

    assert sizes.mae_names() == names(models_mae_pl.MODELS)
    assert sizes.sere_names() == names(models_sere.MODELS)
    assert sizes.classifier_names() == names(registry.MODELS)


# --- the checkpoint


@pytest.mark.parametrize(
    "name, models, expected",
    [
        ("mae_vit_base_patch16", registry.MODELS, "vit_base_patch16"),
        ("mae_vit_base_patch16_dec512d8b", registry.MODELS, "vit_base_patch16"),
        ("sere_vit_small_patch16", registry.MODELS, "vit_small_patch16"),
        ("so_vit_7", registry.MODELS, "so_vit_7"),
        ("timm/swin_tiny_patch4_window7_224", registry.MODELS, "timm/swin_tiny_patch4_window7_224"),
        ("vit_base_patch16", models_mae_pl.MODELS, "mae_vit_base_patch16"),
        ("mae_vit_base_patch16_dec512d8b", models_mae_pl.MODELS, "mae_vit_base_patch16_dec512d8b"),
        # A masked autoencoder of these does not exist, and timm's own names are not ours.
        ("swin_tiny", models_mae_pl.MODELS, None),
        ("timm/vit_base_patch16_224", models_mae_pl.MODELS, None),
        ("vit_base_patch16_224", registry.MODELS, None),
    ],
)
def test_a_model_is_known_by_the_name_that_a_checkpoint_stores(name, models, expected):
    assert known_flags(stored(model=name), models).get("model") == expected


def test_a_checkpoint_without_flags_is_known_by_its_weights():
    mae = models_mae_pl.MODELS["mae_vit_pico_patch8"](img_size=(32, 32), in_chans=2, pos_embed="sincos")
    expected = {"model": "vit_pico_patch8", "input_size": [32], "in_chans": 2}
    assert known_flags(stored(mae), registry.MODELS) == expected
    # As in the files of DINO, iBOT and SERE.
    apart = stored(mae)
    apart.model = {f"backbone.{k}": v for k, v in apart.model.items()} | {"head.mlp.0.bias": torch.zeros(4)}
    assert known_flags(apart, registry.MODELS) == expected
    # A patch that no model of this size has, and images that are not square: only flags say both.
    other = registry.MODELS["vit_pico_patch4"](img_size=(20, 40), patch_size=(10, 5), num_classes=2)
    known = known_flags(stored(other, input_size=[20, 40]), registry.MODELS)
    assert known == {
        "model": "vit_pico_patch8",
        "input_size": [20, 40],
        "in_chans": 3,
        "patch_size": [10, 5],
    }
    assert (
        known_flags(stored(mae, model="mae_vit_nano_patch4"), registry.MODELS)["model"] == "vit_nano_patch4"
    )


def test_sizes_that_other_programs_store_are_not_taken():
    # timm stores (channels, height, width).
    assert known_flags(stored(input_size=[3, 224, 224]), registry.MODELS) == {}
    assert known_flags(stored(in_chans="3", patch_size=10**8), registry.MODELS) == {}
    assert known_flags(stored(input_size=384), registry.MODELS) == {"input_size": [384]}


def test_a_given_flag_wins_even_if_it_is_the_default(capsys):
    checkpoint = stored(model="mae_vit_base_patch16", input_size=[64])
    parser = main_finetune.get_args_parser()
    flags = parse(parser, ["--input_size", "224"])
    assert given_in(flags) == {"input_size"} and "given" not in vars(flags)
    settled = as_stored(vars(flags), given_in(flags), checkpoint, registry.MODELS)
    assert (settled["model"], settled["input_size"]) == ("vit_base_patch16", [224])
    assert capsys.readouterr().out == "taken from x.pth: model vit_base_patch16\n"
    # Without a checkpoint, MAE's defaults stay, and nothing is printed.
    assert as_stored(vars(flags), given_in(flags), None, registry.MODELS) == vars(flags)
    assert flags.model == "vit_large_patch16" and capsys.readouterr().out == ""
    # Flags that no parser of ours made, as in a notebook, are all given.
    made = argparse.Namespace(model="vit_tiny_patch16", input_size=[32])
    assert as_stored(vars(made), given_in(made), checkpoint, registry.MODELS) == vars(made)


def test_every_main_takes_model_and_size_from_its_start(tmp_path, capsys, monkeypatch):
    # Measuring the machine and asking git take longer than the runs.
    monkeypatch.setattr(engine, "peak_flops", lambda *args: 1e9)
    monkeypatch.setattr(plan, "commit", lambda: None)
    monkeypatch.setattr(plan, "versions", dict)
    monkeypatch.chdir(tmp_path)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 16), (90 * i, 40, 200)).save(tmp_path / "data" / name / f"{i}.png")
    common = shlex.split("--data_path data --num_workers 0 --device cpu --epochs 1 --batch_size 4")

    def call(main, *flags) -> str:
        code = run(main.main, parse(main.get_args_parser(), [*common, *flags]))
        out = capsys.readouterr()
        assert code == 0, out.err
        return out.out

    made = ["--model", "mae_vit_pico_patch8", "--input_size", "16", "32", "--patch_size", "8", "16"]
    call(main_pretrain, *made, "--output_dir", "mae")
    start = "mae/checkpoint-last.pth"
    line = f"taken from {start}: model vit_pico_patch8, input_size 16 32, patch_size 8 16"
    assert line in call(main_finetune, "--finetune", start, "--output_dir", "ft")
    assert line in call(main_linprobe, "--finetune", start, "--output_dir", "probe", "--knn")
    evaluated = call(main_finetune, "--eval", "--resume", "ft/checkpoint-last.pth")
    assert (
        "taken from ft/checkpoint-last.pth: model vit_pico_patch8, input_size 16 32, patch_size 8 16"
        in evaluated
    )
    # The run's own checkpoint, and weights for a fresh schedule.
    again = call(main_pretrain, "--output_dir", "mae", "--epochs", "2")
    assert f"taken from {start}: model mae_vit_pico_patch8, input_size 16 32" in again
    assert "continuing" in again and "model:" not in again
    fresh = call(main_pretrain, "--output_dir", "fresh", "--init_from", start)
    assert "model mae_vit_pico_patch8" in fresh
    saved = torch.load("fresh/checkpoint-last.pth", weights_only=True)["args"]
    assert saved["model"] == "mae_vit_pico_patch8" and saved["input_size"] == [16, 32]


# --- the machine


def test_data_workers_are_the_cores_of_a_rank(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for cores, ranks, expected in ((1, "", 1), (4, "", 4), (64, "", 10), (64, "8", 8), (4, "8", 1)):
        monkeypatch.setattr("util.flags.groups.own_cores", lambda n=cores: n)
        if ranks:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert own_workers() == expected
        assert parse(main_pretrain.get_args_parser(), []).num_workers == expected
        assert parse(main_pretrain.get_args_parser(), ["--num_workers", "31"]).num_workers == 31


@pytest.mark.parametrize(
    "text, cores",
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("20000 100000\n", 1),
        ("6400000 100000\n", 8),
        ("max 100000\n", 8),
        ("damaged", 8),
        (None, 8),
    ],
)
def test_a_container_has_its_share_of_the_cores(tmp_path, monkeypatch, text, cores):
    """`docker run --cpus 2` limits the time on all cores, and leaves the affinity as it is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    limit = tmp_path / "cpu.max"
    if text is not None:
        limit.write_text(text)
    assert own_cores(str(limit)) == cores


def test_all_counts_of_cores_are_those_of_the_process(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for module in ("util.flags.groups", "util.weights.archive", "util.run.plan", "util.data.__main__"):
        monkeypatch.setattr(f"{module}.own_cores", lambda: 3)
    assert own_workers() == archive._num_threads() == 3
    assert data_commands.get_args_parser().parse_args(["stats", "x"]).num_workers == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert " 3 cores" in plan.devices()[0]


def test_a_job_gets_cores_for_workers_that_this_machine_would_not_have(tmp_path, monkeypatch):
    """The machine that submits often has other cores than the nodes."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})

    def cpus(*flags: str) -> int:
        points = sweep.plan("main_pretrain", list(flags), [], [], str(tmp_path))
        return slurm_jobs.sbatch_options(points, Resources())["cpus_per_task"]

    assert cpus() == 11 and cpus("--num_workers", "3") == 4
    # A follow-up uses its own machine as well, unless the run was told otherwise.
    for flags, inherited in (([], False), (["--num_workers", "3", "--device", "cpu"], True)):
        (point,) = sweep.plan("main_pretrain", flags, [], ["--then", "linprobe"], str(tmp_path))
        words = point.then[0].argv
        assert ("--num_workers" in words) == ("--device" in words) == inherited


def test_the_device_is_a_gpu_only_if_there_is_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0, 1) == CPU and "running on the CPU" in capsys.readouterr().out
    assert choose_device("cpu", 0, 4) == CPU and capsys.readouterr().out == ""
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"`device` {name}: .*leave `device` out"):
            choose_device(name, 0, 1)
    # Ranks must not end up on different kinds of device.
    monkeypatch.setenv("RANK", "1")
    for name in ("auto", "cuda"):
        with pytest.raises(ValueError, match="rank 1 sees no CUDA device"):
            choose_device(name, 1, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("auto", 2, 4) == choose_device("cuda", 2, 4) == torch.device("cuda", 2)
    assert choose_device("cuda:3", 0, 1) == torch.device("cuda", 3)
    with pytest.raises(ValueError, match=r"process 5 on .* torch sees 4\. Start at most 4 processes"):
        choose_device("cuda", 4, 8)
    with pytest.raises(ValueError, match="`device` cuda:4: 4 GPUs are visible"):
        choose_device("cuda:4", 0, 1)
    for kind in ("mps", "xpu"):
        with pytest.raises(ValueError, match=f"`device` {kind}: .*leave `device` out"):
            choose_device(kind, 0, 1)


def test_a_precision_that_the_cpu_emulates_is_told(monkeypatch, capsys):
    monkeypatch.setattr(amp, "relative_speed", lambda dtype: {torch.bfloat16: 0.02}.get(dtype, 0.7))
    assert amp.resolve_amp("bf16", CPU) == "bf16"
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and "warning" in text and "bf16" in text and " 50 times" in text
    for name, device in (("fp16", CPU), ("fp32", CPU), ("auto", CPU), ("bf16", torch.device("cuda"))):
        amp.resolve_amp(name, device)
    assert capsys.readouterr().out == ""


def test_benchmarks_leave_out_a_precision_that_the_cpu_emulates(monkeypatch, capsys):
    for speed, expected, lines in ((1.7, ["fp32", "bf16"], 0), (0.02, ["fp32"], 1)):
        monkeypatch.setattr(timing, "relative_speed", lambda dtype, speed=speed: speed)
        assert timing.default_amps(CPU) == expected
        text = capsys.readouterr().out
        assert text.count("\n") == lines and ("bf16 is left out" in text) == bool(lines)
    assert timing.default_amps(torch.device("cuda")) == ["bf16"]


def test_the_speed_of_a_precision_is_that_of_its_products(monkeypatch):
    """fp32 against itself is 1; the shortest of several times counts, so that other processes matter less."""
    assert 1 / 3 < amp.relative_speed(torch.float32) < 3
    seconds = iter([1.0, 2.0, 5.0, 5.5, 7.0, 7.25, 9.0, 10.0])
    monkeypatch.setattr(amp.time, "perf_counter", lambda: next(seconds))
    assert amp._seconds(torch.ones(1, 1)) == 0.25
