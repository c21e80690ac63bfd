"""So-ViT in whole runs: from a masked checkpoint, resumed, on two ranks, as a teacher, as a probe."""

import csv

import pytest
import torch

import main_finetune
import main_linprobe
import tiny  # noqa: F401 (registers mae_test and vit_test)
from backbones import registry as models
from backbones.so_vit import MODELS
from backbones.teacher import build_teacher
from commands import accuracy, call, pretrained
from processes import FINETUNE, assert_same, last, log_lines, ranks, start
from util.weights import checkpoint

# --- whole runs
# -------------------------------------------------------------------------------------------------------
SECOND_ORDER = ["--head", "second_order", "--so_dims", 6, 4, "--so_heads", 2, "--so_dropout", 0.1]


def stored(folder) -> dict:
    return torch.load(folder / "checkpoint-last.pth", weights_only=True)


def test_from_a_masked_checkpoint_to_evaluation(tmp_path, capsys):
    file, out = pretrained(tmp_path, capsys), tmp_path / "ft"
    command = [
        "--model",
        "vit_test",
        "--finetune",
        file,
        *SECOND_ORDER,
        "--ema",
        0.5,
        "--lr",
        3e-3,
        "--warmup_epochs",
        0,
        "--output_dir",
        out,
    ]
    code, text = call(main_finetune, capsys, *command, "--epochs", 2)
    assert code == 0 and "second_order head" in text and "labels apl" in text and "new: head" in text, text
    state = stored(out)
    pool = state["model"]["head.pool.project.weight"]
    assert (
        pool.shape == (2 * (6 + 4), 32)
        and "norm.weight" in state["model"]
        and "fc_norm.weight" not in state["model"]
    )
    assert [state["args"][k] for k in ("head", "so_dims", "so_heads", "so_fusion")] == [
        "second_order",
        [6, 4],
        2,
        None,
    ]

    # evaluation builds the head from the file, and evaluates the average
    evaluate = ["--model", "vit_test", "--eval", "--resume", out / "checkpoint-last.pth"]
    code, evaluated = call(main_finetune, capsys, *evaluate)
    assert code == 0 and "the moving average of its weights" in evaluated
    assert accuracy(evaluated) == accuracy(text)[-1:], "the average is what training reports"
    code, again = call(main_finetune, capsys, *evaluate, "--head", "second_order")
    assert code == 0 and accuracy(again) == accuracy(evaluated)
    code, wrong = call(main_finetune, capsys, *evaluate, "--head", "linear")
    assert (
        code == 2 and "was trained with --head second_order, found --head linear: leave --head out" in wrong
    )
    code, wrong = call(main_finetune, capsys, *evaluate, "--so_dims", 6, 5)
    assert code == 2 and "head.pool.project.weight is (20, 32), not (22, 32)" in wrong

    # the same command goes on; so does another folder from the file, without saying which head
    code, text = call(main_finetune, capsys, *command, "--epochs", 3)
    assert (
        code == 0 and "continuing" in text and "head:" not in text and stored(out)["step"] > state["step"]
    ), text
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "vit_test",
        "--resume",
        out / "checkpoint-last.pth",
        "--finetune",
        file,
        "--ema",
        0.5,
        "--epochs",
        4,
        "--output_dir",
        tmp_path / "on",
    )
    assert code == 0 and "so_dims:" not in text and stored(tmp_path / "on")["args"]["so_dims"] == [6, 4]


def test_what_ranks_evaluate_is_what_they_save(tmp_path, capsys):
    """Each rank sees its own batches; the statistics of rank 0 are saved, and must be those of all
    figures."""
    outs = ranks(
        2,
        tmp_path,
        *SECOND_ORDER,
        "--ema",
        0.5,
        "--epochs",
        1,
        "--batch_size",
        20,
        "--predictions",
        tmp_path / "ranks.csv",
        main=FINETUNE,
    )
    assert [code for code, _ in outs] == [0, 0], outs[0][1]
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "vit_test",
        "--eval",
        "--resume",
        tmp_path / "checkpoint-last.pth",
        "--predictions",
        tmp_path / "alone.csv",
    )
    assert code == 0, text
    trained, alone = (list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("ranks", "alone"))
    assert len(alone) == 50 and [row["image"] for row in trained] == [row["image"] for row in alone]
    for row, other in zip(trained, alone):
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=5e-6), row


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, capsys):
    """Batch statistics, their moving average and the dropout of the head too."""
    run = [
        "--model",
        "vit_test",
        "--lr",
        1e-2,
        "--warmup_epochs",
        1,
        *SECOND_ORDER,
        "--ema",
        0.9,
        "--epochs",
        2,
    ]
    code, text = call(main_finetune, capsys, *run, "--output_dir", tmp_path / "whole")
    assert code == 0, text
    code, text = start(tmp_path / "parts", *run, "--batch_size", 40, main=FINETUNE, TEST_SIGNAL="0:6:SIGTERM")
    assert code == 75 and last(tmp_path / "parts")["step"] == 7, text
    code, text = call(main_finetune, capsys, *run, "--output_dir", tmp_path / "parts")
    assert code == 0 and "continuing" in text, text
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert_same(whole, parts)
    assert all(torch.equal(v, parts["ema"][k]) for k, v in whole["ema"].items())


def test_conv_embedding_and_masking_do_not_meet(tmp_path, capsys):
    file = pretrained(tmp_path, capsys)
    for model in (["vit_test", "--patch_embed", "conv"], ["so_vit_7"]):
        code, text = call(
            main_finetune, capsys, "--model", *model, "--finetune", file, "--output_dir", tmp_path / "a"
        )
        assert (
            code == 2
            and "--patch_embed conv cannot start from" in text
            and "sees 33x33 pixels, including masked ones" in text
        ), text


def test_a_trained_so_vit_starts_another_run(tmp_path, capsys, monkeypatch):

    monkeypatch.setitem(models.MODELS, "so_vit_7", MODELS["so_vit_7"].override(depth=1))
    flags = ["--model", "so_vit_7", "--epochs", 1]
    code, text = call(main_finetune, capsys, *flags, "--output_dir", tmp_path / "a")
    assert code == 0, text
    code, text = call(
        main_finetune,
        capsys,
        *flags,
        "--finetune",
        tmp_path / "a" / "checkpoint-last.pth",
        "--output_dir",
        tmp_path / "b",
    )
    assert code == 0 and "from a classifier, with its head, which has the same classes" in text, text


def test_so_vit_trains_and_is_evaluated_by_its_name(tmp_path, capsys, monkeypatch):

    monkeypatch.setitem(models.MODELS, "so_vit_7", MODELS["so_vit_7"].override(depth=1))
    for head, keys in (
        ([], {"fc_class", "fc_visual", "pool"}),
        (["--head", "linear"], {"weight", "bias"}),
        (["--so_fusion", "concat", "--patch_embed", "linear", "--pos_label", "rpl"], {"fc", "pool"}),
    ):
        out = tmp_path / "-".join(["run", *head[1:2]])
        code, text = call(main_finetune, capsys, "--model", "so_vit_7", *head, "--output_dir", out)
        assert code == 0 and "PE sincos" in text, text
        assert {k.split(".")[1] for k in stored(out)["model"] if k.startswith("head.")} == keys
        code, evaluated = call(
            main_finetune, capsys, "--model", "so_vit_7", "--eval", "--resume", out / "checkpoint-last.pth"
        )
        assert code == 0 and accuracy(evaluated) == accuracy(text)[-1:], evaluated


def test_a_teacher_with_a_second_order_head(tmp_path, capsys):
    code, text = call(main_finetune, capsys, "--model", "vit_test", *SECOND_ORDER, "--output_dir", tmp_path)
    assert code == 0, text
    teacher = build_teacher(
        "vit_test",
        str(tmp_path / "checkpoint-last.pth"),
        classes=stored(tmp_path)["classes"],
        img_size=(32, 32),
        in_chans=3,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    ).model
    assert (
        torch.equal(teacher.head.pool.start, stored(tmp_path)["model"]["head.pool.start"])
        and teacher.head.pool.heads == 2
    )


def test_the_probe_says_that_it_is_of_second_order(tmp_path, capsys):
    file = pretrained(tmp_path, capsys)
    for pool in ("--cls_token", "--global_pool"):
        code, text = call(
            main_linprobe,
            capsys,
            "--model",
            "vit_test",
            "--finetune",
            file,
            *SECOND_ORDER,
            pool,
            "--epochs",
            12,
            "--blr",
            40,
            "--lr_grid",
            1,
            3,
            "--warmup_epochs",
            0,
            "--output_dir",
            tmp_path / pool,
        )
        assert code == 0 and "second-order probe of vit_test" in text and "linear" not in text, text
        assert "second-order probe at lr" in text and len(accuracy(text)) == 12, text
        losses = [line["train_loss_head"] for line in log_lines(tmp_path / pool)]
        assert losses[-1] < losses[0] - 0.3, losses  # ten classes: 2.3 without learning
        model = stored(tmp_path / pool)["model"]
        assert model["head.2.pool.norm.running_mean"].abs().sum() > 0 and "head.0.weight" not in model
        assert not torch.equal(model["head.1.fc_visual.weight"], model["head.2.fc_visual.weight"])
        assert checkpoint.kind_of(model) == "probe"
    for flags, message in (
        (["--cached", *SECOND_ORDER], "does not work with --knn or --cached"),
        (["--so_iters", 2], "--so_* flags belong to --head second_order"),
    ):
        code, text = call(
            main_linprobe, capsys, "--model", "vit_test", "--finetune", file, *flags, "--output_dir", tmp_path
        )
        assert code == 2 and message in text, text
