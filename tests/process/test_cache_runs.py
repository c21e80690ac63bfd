"""Whole runs on cached images have the same bits as runs without a cache."""

import pytest
import torch

import main_finetune
import main_linprobe
import main_pretrain
import main_sere
import tiny
from processes import assert_same, last, log_lines
from util.flags.parser import parse, run

# On other processors torch rounds differently from PIL and the native library; see test_native.py.
SAME_BITS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

SMALL = ["--input_size", "32", "--batch_size", "40", "--epochs", "1", "--num_workers", "0", "--device", "cpu"]


def call(main, *flags) -> int:
    return run(main.main, parse(main.get_args_parser(), [*SMALL, *map(str, flags)]))


class Killed(BaseException):
    """An error that nothing catches."""


def test_a_killed_run_on_the_device_resumes_with_the_same_bits(tmp_path, monkeypatch, capsys):
    """Here the device is the CPU. It also ends with the bits of a run without a cache."""
    flags = ["--model", "mae_test", "--epochs", 2, "--picture_epochs", 1000, "--save_steps", 1, "--lr", 1e-2]
    device = ["--cache_data", "device"]
    calls = []

    def killing(loss_fn):
        def killed(model, batch):
            calls.append(batch)
            if len(calls) == 8:  # the third of five updates of the second epoch
                raise Killed
            return loss_fn(model, batch)

        return killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(main_pretrain, "fit", main_pretrain.fit)
        tiny.wrap_loss(main_pretrain, killing)
        call(main_pretrain, *flags, *device, "--output_dir", tmp_path / "parts")
    assert last(tmp_path / "parts")["step"] == 7
    assert call(main_pretrain, *flags, *device, "--num_workers", 1, "--output_dir", tmp_path / "parts") == 0
    assert "continuing" in capsys.readouterr().out
    assert call(main_pretrain, *flags, *device, "--output_dir", tmp_path / "whole") == 0
    assert_same(last(tmp_path / "whole"), last(tmp_path / "parts"))
    assert log_lines(tmp_path / "whole") == log_lines(tmp_path / "parts")
    assert call(main_pretrain, *flags, "--output_dir", tmp_path / "none") == 0
    assert_same(last(tmp_path / "whole"), last(tmp_path / "none"), exact=SAME_BITS)


MAINS = dict(pretrain=main_pretrain, finetune=main_finetune, linprobe=main_linprobe, sere=main_sere)


@pytest.fixture(scope="module")
def main_flags(tmp_path_factory) -> dict[str, list]:
    """Flags of a short run of each main; the probe needs the checkpoint of a pretraining."""
    pretrained = tmp_path_factory.mktemp("pretrained")
    flags = dict(
        pretrain=["--model", "mae_test", "--picture_epochs", 1],
        finetune=["--model", "vit_test"],
        linprobe=["--model", "vit_test", "--finetune", pretrained / "checkpoint-last.pth"],
        sere=["--model", "sere_test", "--local_size", 16, "--local_crops_number", 1, "--out_dim", 32],
    )
    assert call(main_pretrain, *flags["pretrain"], "--output_dir", pretrained) == 0
    return flags


@pytest.mark.parametrize("name", list(MAINS))
def test_every_main_has_the_same_bits_from_memory(tmp_path, main_flags, name):
    for where in ("none", "memory"):
        flags = [*main_flags[name], "--output_dir", tmp_path / where, "--cache_data", where]
        assert call(MAINS[name], *flags) == 0
    assert_same(last(tmp_path / "none"), last(tmp_path / "memory"))


def test_mains_refuse_the_device_with_advice(tmp_path, main_flags, capsys):
    refused = ["--cache_data", "device", "--output_dir", tmp_path / "device"]
    for name in ("finetune", "sere"):
        assert call(MAINS[name], *main_flags[name], *refused) == 2
        assert "give --cache_data memory" in capsys.readouterr().err
    two = ["--sr_spatial", 0.2, "--sr_views", "two"]
    assert call(main_pretrain, *main_flags["pretrain"], *two, *refused) == 2
    assert "--sr_views same" in capsys.readouterr().err
    for more in ([], ["--eval", "--resume", tmp_path / "device" / "checkpoint-last.pth"]):
        assert call(main_finetune, *main_flags["finetune"], "--aa", "", *refused, *more) == 0, "as advised"


@pytest.mark.parametrize("more", [[], ["--knn"]])
def test_the_probe_takes_images_from_the_device(tmp_path, main_flags, more):
    flags = [*main_flags["linprobe"], "--cache_data", "device", *more, "--output_dir", tmp_path]
    assert call(main_linprobe, *flags) == 0
