"""A dry run measures, predicts and writes nothing; run.json records what a run was."""

import contextlib
import json
import os
import re

import pytest
import torch
from torch import nn

import engine
import main_finetune
import main_linprobe
import main_pretrain
import tiny  # noqa: F401 (registers mae_test and vit_test)
from models_mae_pl import MODELS
from util.flags.parser import parse, run
from util.run import plan

COMMON = [
    "--input_size",
    "32",
    "--batch_size",
    "40",
    "--epochs",
    "3",
    "--num_workers",
    "0",
    "--device",
    "cpu",
]


def call(main, *flags) -> int:
    return run(main.main, parse(main.get_args_parser(), [*COMMON, *map(str, flags)]))


def everything_below(folder) -> dict:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_the_plan_of_a_pretraining(tmp_path, capsys):
    flags = [
        "--model",
        "mae_test",
        "--accum_iter",
        2,
        "--save_every_epochs",
        1,
        "--keep",
        2,
        "--output_dir",
        tmp_path / "run",
    ]
    assert call(main_pretrain, *flags, "--dry_run") == 0
    text = capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "nothing is written"
    parameters = sum(p.numel() for p in MODELS["mae_test"](img_size=(32, 32)).parameters())
    for part in (
        "200 images",
        "effective batch 40 x 2 x 1 = 80",
        "2 per epoch, 80 images each; 6 to go of 3 x 2",
        f"model        {parameters / 1e6:.2f} M parameters",
        "step 0: there is no checkpoint to continue",
        "2 numbered checkpoints of",
    ):
        assert part in text, text
    rate, seconds = map(float, re.search(r"([\d.]+) images/s, ([\d.]+) s per update", text).groups())
    assert rate == pytest.approx(80 / seconds, rel=0.1)
    assert call(main_pretrain, *flags, "--epochs", 1) == 0
    before = everything_below(tmp_path)
    size = (tmp_path / "run" / "checkpoint-last.pth").stat().st_size / 2**20
    capsys.readouterr()
    assert call(main_pretrain, *flags, "--dry_run") == 0
    text = capsys.readouterr().out
    assert everything_below(tmp_path) == before, "nothing is touched"
    assert "4 to go of 3 x 2" in text and "checkpoint-last.pth at step 2" in text
    foretold = float(re.search(r"numbered checkpoints of ([\d.]+) MB", text)[1])
    assert foretold == pytest.approx(size, abs=0.15), "the checkpoint is as large as foretold"


def test_the_plans_of_the_other_mains(tmp_path, capsys):
    flags = ["--model", "vit_test", "--output_dir", tmp_path / "f", "--save_every_epochs", 0]
    assert call(main_finetune, *flags, "--dry_run") == 0
    text = capsys.readouterr().out
    assert (
        "10 classes" in text
        and "5 per epoch, 40 images each; 15 to go" in text
        and "1 numbered checkpoint of" in text
    )
    torch.save({"model": MODELS["mae_test"](img_size=(32, 32)).state_dict()}, tmp_path / "p.pth")
    probe = [
        "--model",
        "vit_test",
        "--finetune",
        tmp_path / "p.pth",
        "--dry_run",
        "--output_dir",
        tmp_path / "l",
    ]
    assert call(main_linprobe, *probe) == 0
    text = capsys.readouterr().out
    assert "5 per epoch, 40 images each; 15 to go" in text, text
    assert [p.name for p in tmp_path.iterdir()] == ["p.pth"], "nothing is written"
    assert (
        call(main_linprobe, *probe, "--knn") == 2
        and call(main_finetune, "--eval", "--resume", "x", "--dry_run") == 2
    )
    errors = capsys.readouterr().err
    assert "--knn trains nothing" in errors and "--eval does not train" in errors


def test_operations_are_counted_and_time_is_shared_out():
    layer = nn.Linear(64, 32)
    clock = []

    def step(stream, counter):
        batch = next(stream)
        clock.append(batch["image"])
        with counter or contextlib.nullcontext():
            layer(batch["image"].flatten(1)).sum().backward()
        return 0.0

    batches = [{"image": torch.full((8, 1, 8, 8), 3.0)}, {"image": torch.zeros(8, 1, 8, 8)}]
    m = plan.measure(step, lambda epoch: iter(batches), torch.device("cpu"), torch.float32, lambda: 7.0)
    assert m.flops == 2 * 8 * 64 * 32 * 2, "forward and the weights' gradient; the images want none"
    assert m.sample_mean == [3.0] and m.sample_std == [0.0] and m.memory_mb == 7
    assert len(clock) == plan.WARMUP + plan.STEPS, "epoch after epoch"
    assert m.utilisation == m.flops / m.seconds / m.peak_flops and m.peak_flops > 1e8


def test_the_plan_reports_images_as_they_are_before_mixup():
    """timm's Mixup and random erasing change a batch in place."""

    def step(stream, counter):
        next(stream)["image"].mul_(0.5)
        return 0.0

    def batches(epoch):
        yield {"image": torch.full((8, 1, 8, 8), 3.0)}

    assert plan.measure(step, batches, torch.device("cpu"), torch.float32, lambda: 7.0).sample_mean == [3.0]


def test_sizes_on_the_disk():
    optimizer = {"state": {0: [torch.zeros(2**17, dtype=torch.float64)]}}
    assert plan.size_mb({"model": {"w": torch.zeros(2**18)}, "optimizer": optimizer, "epoch": 3}) == 2.0


def test_run_json_says_what_a_run_was(tmp_path, capsys):
    flags = ["--model", "mae_test", "--output_dir", tmp_path / "run", "--picture_epochs", 100]
    assert call(main_pretrain, *flags, "--epochs", 1) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["flags"]["model"] == "mae_test" and record["flags"]["mask_ratio"] == 0.75
    resolved = record["resolved"]
    assert (
        resolved["effective_batch"] == 40 and resolved["updates_per_epoch"] == 5 and resolved["images"] == 200
    )
    assert (
        resolved["lr"] == pytest.approx(1e-3 * 40 / 256)
        and resolved["amp"] == "fp32"
        and resolved["device"] == "cpu"
    )
    assert (
        record["versions"]["torch"] == torch.__version__.split("+")[0]
        and record["devices"]
        and record["host"]
    )
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", record["commit"])
    assert call(main_pretrain, *flags, "--epochs", 2) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["flags"]["epochs"] == 2 and "at step 5" in record["resolved"]["start"]
    assert [earlier["resolved"]["start"][:6] for earlier in record["earlier_starts"]] == ["step 0"]


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    plan.write_record(str(tmp_path / "file" / "run"), {}, {})
    assert "could not be written" in capsys.readouterr().out
    (tmp_path / "file").unlink()
    (tmp_path / "run.json").write_text("{damaged")
    plan.write_record(str(tmp_path), {"a": 1}, {})
    assert json.loads((tmp_path / "run.json").read_text())["flags"] == {"a": 1}
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_run_that_is_done_writes_no_new_record(tmp_path):
    flags = ["--model", "mae_test", "--output_dir", tmp_path / "run", "--epochs", 1, "--picture_epochs", 100]
    assert call(main_pretrain, *flags) == 0
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert call(main_pretrain, *flags) == 0 and (tmp_path / "run" / "run.json").read_bytes() == before
    assert engine.plan is plan
