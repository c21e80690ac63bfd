"""Runs that stop at the end of an epoch, or whose evaluation fails, continue with the same bits."""

import json
import math

import pytest

import main_finetune
import main_pretrain
import main_sere
import tiny
from commands import call
from processes import assert_same, last, log_lines


def interrupted(monkeypatch, capsys, main, signal: str, *flags) -> str:
    """Run a main that gets a signal in one of its updates, "rank:call:NAME", and stops -> its output."""
    with monkeypatch.context() as patch:
        patch.setattr(main, "fit", main.fit)  # and back again
        tiny.disturb(main, None, signal)
        code, text = call(main, capsys, *flags)
    assert code == 75, text
    return text


PRETRAIN = ["--model", "mae_test", "--lr", 1e-2, "--warmup_epochs", 1, "--save_every_epochs", 1, "--keep", 1]


def test_a_stop_at_an_epochs_end_comes_before_its_evaluation(tmp_path, capsys, monkeypatch):
    """Evaluation may last longer than the time between a scheduler's warning and its kill."""
    flags = [*PRETRAIN, "--epochs", 2, "--batch_size", 50, "--picture_epochs", 1]
    code, text = call(main_pretrain, capsys, *flags, "--output_dir", tmp_path / "whole")
    assert code == 0, text
    flags += ["--output_dir", tmp_path / "parts"]
    # There are four updates in an epoch: this is its last.
    text = interrupted(monkeypatch, capsys, main_pretrain, "0:3:SIGUSR2", *flags)
    assert "val images" not in text, text
    assert last(tmp_path / "parts")["step"] == 4 and not (tmp_path / "parts" / "log.txt").exists()
    code, text = call(main_pretrain, capsys, *flags)
    assert code == 0 and text.count("val images") == 2, text
    assert_same(last(tmp_path / "whole"), last(tmp_path / "parts"))
    assert log_lines(tmp_path / "whole") == log_lines(tmp_path / "parts")


MAINS = {
    "pretrain": (main_pretrain, ["--model", "mae_test", "--picture_epochs", 1]),
    "finetune": (main_finetune, ["--model", "vit_test", "--ema", 0.9]),
    "sere": (
        main_sere,
        ["--model", "sere_test", "--local_size", 16, "--local_crops_number", 1, "--out_dim", 32],
    ),
}


@pytest.mark.parametrize("name", MAINS)
def test_a_stop_in_the_last_update_of_an_epoch_changes_nothing(tmp_path, capsys, monkeypatch, name):
    """The learning rate and SERE's weight decay, which a checkpoint stores, and the names in log.txt."""
    main, flags = MAINS[name]
    flags = [*flags, "--batch_size", 100, "--epochs", 2, "--lr", 1e-2, "--warmup_epochs", 1]
    call(main, capsys, *flags, "--output_dir", tmp_path / "whole")
    for update in (1, 3):  # the last ones of the two epochs, as the first start counts them
        folder = tmp_path / str(update)
        interrupted(monkeypatch, capsys, main, f"0:{update}:SIGTERM", *flags, "--output_dir", folder)
        assert last(folder)["step"] == update + 1
        assert call(main, capsys, *flags, "--output_dir", folder)[0] == 0
        assert_same(last(tmp_path / "whole"), last(folder))
        assert (
            last(tmp_path / "whole")["optimizer"]["param_groups"] == last(folder)["optimizer"]["param_groups"]
        )
        assert log_lines(tmp_path / "whole") == log_lines(folder)
        whole, parts = (
            [list(json.loads(line)) for line in (tmp_path / place / "log.txt").read_text().splitlines()]
            for place in ("whole", str(update))
        )
        assert whole == parts, "names and their order, those of speeds too"


def test_a_failing_evaluation_does_not_cost_the_epoch(tmp_path, capsys):
    flags = [*PRETRAIN, "--epochs", 2, "--batch_size", 50, "--picture_epochs", 1, "--output_dir"]
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "pictures").write_text("a file where the folder should be")
    code, text = call(main_pretrain, capsys, *flags, tmp_path / "parts")
    assert code == 2 and last(tmp_path / "parts")["step"] == 4, text
    (tmp_path / "parts" / "pictures").unlink()
    for place in ("parts", "whole"):
        code, text = call(main_pretrain, capsys, *flags, tmp_path / place)
        assert code == 0, text
    assert_same(last(tmp_path / "whole"), last(tmp_path / "parts"))


@pytest.mark.parametrize("kind", ["shuffled", "shuffled_fixed"])
def test_a_run_stops_and_continues_bit_for_bit(tmp_path, capsys, monkeypatch, kind):
    command = [*PRETRAIN, "--epochs", 2, "--pos_label", kind, "--output_dir"]
    code, text = call(main_pretrain, capsys, *command, tmp_path / "whole")
    assert code == 0 and "chance 2.7726" in text, text
    interrupted(monkeypatch, capsys, main_pretrain, "0:6:SIGTERM", *command, tmp_path / "parts")
    code, text = call(main_pretrain, capsys, *command, tmp_path / "parts")
    assert code == 0 and "continuing" in text, text
    assert_same(last(tmp_path / "whole"), last(tmp_path / "parts"))
    assert log_lines(tmp_path / "whole")[-1]["test_position"] == pytest.approx(math.log(16), abs=0.1)
