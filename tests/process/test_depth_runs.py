"""Whole runs on images of more than 8 bits: a CT series of 12 bits, and 13 bands of float32."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import visualize
from processes import COMMON, FINETUNE, PRETRAIN, assert_same, here, last, log_lines
from util import dist
from util.data import __main__ as data_commands
from util.data.datasets import build_dataset
from util.data.formats import ReadSettings
from util.data.survey.ranges import settle_range
from util.flags.parser import parse, run

PROBE = ["main_linprobe", "--model", "vit_test", *COMMON]
SERE = ["main_sere", "--model", "sere_test", "--local_size", "16", "--out_dim", "32", *COMMON]
FORK = multiprocessing.get_context("fork")
SMALL = ("--batch_size", 8, "--warmup_epochs", 0)


def slices(form, dtype=np.uint16):
    """A CT slice of one of two classes, in values of 12 bits; int16 is in Hounsfield units."""
    rows, columns = np.mgrid[:40, :36]

    def values(label, number):
        draws = np.random.default_rng(2 * number + label)
        body = 900 * (np.hypot(rows - 20, columns - 18) < 17) + draws.normal(0, 20, rows.shape)
        lesion = np.hypot(rows - 12 - 3 * number % 14, columns - 10 - 5 * number % 15) < 6
        found = body + (900 if label else -500) * lesion + 100
        if dtype == np.int16:
            found -= 1024
            return np.clip(found, -1024, 3071).round().astype(dtype)
        return np.clip(found, 0, 4095).round().astype(dtype)

    def write(path, label, number):
        if form == "png":
            Image.fromarray(values(label, number)).save(f"{path}.png")
        else:
            np.save(f"{path}.npy", values(label, number))

    return write


def bands(path, label, number):
    """13 bands of very different sizes; the last but one is constant."""
    draws = np.random.default_rng(2 * number + label)
    values = draws.normal(0.2, 0.04, (36, 40, 13)) * 10.0 ** np.linspace(-2, 3, 13)
    values[8:24, 8:24] *= 1 + label
    values[..., 11] = -9999
    np.save(f"{path}.npy", values.astype(np.float32))


def folder(root, write):
    """16 training and 8 validation images of two classes."""
    for split, count in (("train", 8), ("val", 4)):
        for label in (0, 1):
            place = Path(root, split, f"class{label}")
            place.mkdir(parents=True)
            for number in range(count):
                write(place / f"{number:02d}", label, number + 100 * (split == "val"))
    return root


def tars(source, target):
    target.mkdir()
    for split in ("train", "val"):
        with tarfile.open(target / f"{split}.tar", "w") as tar:
            for path in sorted((source / split).rglob("*.*")):
                tar.add(path, path.relative_to(source / split))
    return target


def listed(source, target):
    """A list has one split."""
    target.mkdir()
    names = [str(path) for path in sorted((source / "train").rglob("*.*"))]
    (target / "train.txt").write_text("\n".join(names) + "\n")
    return target / "train.txt"


def table(source, target):
    """A table of all splits with labels."""
    target.mkdir()
    files = sorted(source.rglob("class*/*.*"))
    rows = [f"{path},{path.parent.name},{path.parent.parent.name}" for path in files]
    (target / "all.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    return target / "all.csv"


def ok(result):
    code, out = result
    assert code == 0, out
    return out


def done(module, *words):
    """Run a command that is no training."""
    parser = module.get_args_parser()
    assert run(module.main, parse(parser, list(map(str, words)))) == 0


def accuracy(out):
    return re.findall(r"Acc@1 [\d.]+ Acc@5 [\d.]+(?: loss [\d.]+)?", out)[-1]


CASES = {
    "uint16": (slices("png"), ["--in_chans", 1], 0),
    "int16": (slices("npy", np.int16), ["--in_chans", 1], -1024),
    "float32": (bands, ["--in_chans", 13], None),
}


@pytest.mark.parametrize("depth", CASES)
def test_from_files_to_an_exported_model(tmp_path, monkeypatch, capsys, depth):
    monkeypatch.chdir(tmp_path)
    write, chans, lowest = CASES[depth]
    source = folder(tmp_path / "set", write)
    assert data_commands.main(["stats", "set", *map(str, chans)]) == 0
    given = ["@set.args"]

    # Pretraining, the same from all layouts.
    layouts = {"folder": source, "tar": tars(source, tmp_path / "tar")}
    layouts["list"] = listed(source, tmp_path / "list")
    layouts["table"] = table(source, tmp_path / "table")
    losses = {}
    for name, path in layouts.items():
        ok(here(tmp_path / name / "run", "--data_path", path, *given, "--epochs", 1, *SMALL))
        losses[name] = log_lines(tmp_path / name / "run")[0]
    assert losses["folder"] == losses["tar"] == losses["table"] and "test_pixel" in losses["tar"]
    assert losses["list"].items() <= losses["tar"].items() and 0.2 < losses["list"]["train_pixel"] < 3
    pretrained = tmp_path / "folder" / "run"
    flags = last(pretrained)["args"]
    if depth == "float32":
        assert flags["in_chans"] == 12 and flags["channels"] == [*range(11), 12] and flags["bands"] == 13
        assert len(flags["range"]) == 24
    else:
        low, high = flags["range"]
        assert lowest <= low < lowest + 100 and lowest + 1800 < high < lowest + 2500

    # Fine-tuning, and evaluation of it, with what the checkpoint stores.
    data = ["--data_path", source]
    tuned = tmp_path / "tuned"
    tune = ["--finetune", pretrained, "--aa", "", "--epochs", 2, *SMALL]
    out = ok(here(tuned, *data, *tune, main=FINETUNE))
    ok(here(tmp_path / "tuned2", "--data_path", layouts["table"], *tune, main=FINETUNE))
    assert log_lines(tuned) == log_lines(tmp_path / "tuned2")
    assert "range" not in out.partition("other than in training")[2]
    assert last(tuned)["args"]["range"] == flags["range"]
    evaluated = ok(
        here(tmp_path / "e", *data, "--eval", "--resume", tuned / "checkpoint-last.pth", main=FINETUNE)
    )
    assert "other than in training" not in evaluated and "values as in the checkpoint: " in evaluated
    resumed = ["--eval", "--resume", tuned / "checkpoint-last.pth"]
    wrong = ok(here("e", *data, *resumed, "--range", -5000, 9000, main=FINETUNE))
    assert accuracy(wrong) != accuracy(evaluated) and "range: " in wrong, "the figures show a wrong range"
    for other in ([layouts["tar"], "--cache_data", "device"], [layouts["tar"]], [layouts["table"]]):
        again = ok(here("e", "--data_path", *other, *resumed, main=FINETUNE))
        assert accuracy(again) == accuracy(evaluated)

    # Probes.
    probe = tmp_path / "probe"
    ok(here(probe, *data, "--finetune", pretrained, "--epochs", 1, *SMALL, main=PROBE))
    assert last(probe)["args"]["range"] == flags["range"]
    trained = [*data, "--finetune", pretrained, "--eval", "--resume", probe / "checkpoint-last.pth"]
    assert "Acc@1" in ok(here("e", *trained, main=PROBE))
    assert "kNN" in ok(here("k", *data, "--finetune", pretrained, "--knn", main=PROBE))

    # Pictures are neither black nor white.
    done(visualize, "reconstruct", pretrained, "r.png", "--data_path", source, "--images", 2)
    pixels = np.asarray(Image.open("r.png").convert("RGB"))
    original = pixels[40:200, 12:190]
    assert 40 < original.mean() < 200 and original.std() > 20 and len(np.unique(original)) > 40

    # Other libraries' formats, and back.
    capsys.readouterr()
    for to, name in (("safetensors", "s.safetensors"), ("mae", "m.pth"), ("timm", "t.safetensors")):
        done(checkpoints, "export", tuned, name, "--to", to)
        printed = capsys.readouterr().out
        assert (to == "safetensors") or "the model's images are not 8-bit RGB: range" in printed
        resumed = name
        if to == "timm":
            done(checkpoints, "import", name, "i.pth")
            resumed = "i.pth"
            capsys.readouterr()
        out = ok(here("e", *data, "--eval", "--resume", resumed, "--classes", source, main=FINETUNE))
        assert accuracy(out) == accuracy(evaluated)
    done(checkpoints, "inspect", tuned)
    assert re.search(
        rf"input +range {flags['range'][0]:.6g} {flags['range'][1]:.6g}", capsys.readouterr().out
    )


def test_a_killed_run_of_16_bits_resumes_bit_equal(tmp_path):
    source = folder(tmp_path / "set", slices("png"))
    given = ["--data_path", source, "--in_chans", 1, "--range", "p1", "p99", "--epochs", 3, *SMALL]
    given += ["--save_steps", 1]
    ok(here(tmp_path / "whole", *given))
    # A copy of this process, which has torch already.
    options = dict(signal="0:3:SIGKILL")
    killed = FORK.Process(target=here, args=(tmp_path / "killed", *given), kwargs=options)
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL and last(tmp_path / "killed")["step"] < 6
    ok(here(tmp_path / "killed", *given))
    assert_same(last(tmp_path / "whole"), last(tmp_path / "killed"))
    assert last(tmp_path / "killed")["args"]["range"] == last(tmp_path / "whole")["args"]["range"]


def settle(rank, port, source, bounds, out):
    """What one of two ranks answers: the range of images, or the error."""
    ours = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in ours.items()})
    dist.init("cpu")
    dataset = build_dataset(source, "train", None, read=ReadSettings(1), labels=False)
    if rank == 1:
        # Only the first rank looks at values.
        dataset.decoded = None
    answers = []
    for given in bounds:
        try:
            answers.append(settle_range(dataset, given, scaled=False))
        except ValueError as error:
            answers.append(str(error))
    # On one host the files are others.
    dataset.read = replace(dataset.read, depth=[torch.uint16, torch.uint8][rank])
    with pytest.raises(ValueError, match=r"images of different depths in .*set \(uint16, uint8\)"):
        settle_range(dataset, None, scaled=False)
    dist.shutdown()
    Path(out, f"{rank}.json").write_text(json.dumps(answers))


def test_two_ranks_settle_on_one_range(tmp_path):
    source = folder(tmp_path / "set", slices("png"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bounds = [None, ["p1", "p99"], ["p0", "p0.0001"], [0, 100]]
    both = [FORK.Process(target=settle, args=(rank, port, source, bounds, tmp_path)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    answers, others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert answers == others
    assert "uint16, with values from 0 to 1956 in 16 images of 16" in answers[0]
    assert "give `range` 42 1940 (percentiles 0.1 and 99.9)" in answers[0]
    values = np.concatenate([np.asarray(Image.open(p)) for p in (source / "train").rglob("*.png")], None)
    assert answers[1] == np.percentile(values, [1, 99], method="inverted_cdf")[:, None].tolist()
    assert "is empty in channel 0" in answers[2] and answers[3] == [[0], [100]]


def test_augmentations_of_depth(tmp_path):
    source = folder(tmp_path / "set", slices("png"))
    data = ["--data_path", source, "--in_chans", 1, "--range", 0, 2500, "--epochs", 1, *SMALL]
    for flags, message in (
        (
            [],
            "--aa and --color_jitter change the colours of 8-bit images, and these are uint16: turn both off",
        ),
        (["--aa", "", "--color_jitter", 0.4], "--aa and --color_jitter change the colours of 8-bit images"),
    ):
        code, out = here(tmp_path / "f", *data, *flags, main=FINETUNE)
        assert code == 2 and message in out and "Epoch" not in out, out
    many = folder(tmp_path / "many", bands)
    stats = ["--in_chans", 13, "--range", 0, 100, "--mean", *[0.5] * 13, "--std", *[0.3] * 13]
    code, out = here(tmp_path / "m", "--data_path", many, *stats, *data[7:], main=FINETUNE)
    assert code == 2 and "work on 1 or 3 channels, not on 13: turn both off (--aa ''" in out, out
    assert "Epoch" not in out
    mixed = ["--mixup", 0.8, "--cutmix", 1.0, "--reprob", 0.5]
    ok(here(tmp_path / "f", *data, "--aa", "", *mixed, main=FINETUNE))
    assert np.isfinite(log_lines(tmp_path / "f")[0]["train_loss"])
    assert all(torch.isfinite(weight).all() for weight in last(tmp_path / "f")["model"].values())
    out = ok(here(tmp_path / "s", *data, main=SERE))
    first_lines = out.partition("Epoch")[0]
    assert "colour changes (jitter, grey, solarisation) are left out" in first_lines
    assert "1 channel of uint16" in first_lines


def test_depths_that_do_not_fit_are_refused(tmp_path):
    deep = folder(tmp_path / "deep", slices("png"))
    data = ["--in_chans", 1, "--epochs", 1, *SMALL]
    ok(here(tmp_path / "p", "--data_path", deep, *data, "--range", 0, 2500))
    plain = tmp_path / "plain"
    for path in deep.rglob("*.png"):
        target = plain / path.relative_to(deep)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(Image.open(path)) // 16).astype(np.uint8)).save(target)
    for main, more in ((FINETUNE, ["--aa", ""]), (PROBE, []), (PROBE, ["--knn"])):
        given = ["--data_path", plain, "--finetune", tmp_path / "p", *SMALL, *more]
        code, out = here(tmp_path / "x", *given, main=main)
        assert code == 2 and "images of uint16 with values in --range 0 and 2500, and those of" in out, out
    ok(here(tmp_path / "k", *given, "--range", 0, 255, main=PROBE))
    # Heads that have seen images otherwise than the encoder has are evaluated as they were trained.
    probe = tmp_path / "q"
    first = ok(here(probe, *given[:-1], "--range", 0, 255, "--epochs", 1, main=PROBE))
    again = ok(here("e", *given[:-1], "--eval", "--resume", probe / "checkpoint-last.pth", main=PROBE))
    assert re.findall(r"Acc@1 .*", first)[-1] == re.findall(r"Acc@1 .*", again)[-1]
    # One split of another depth than the other.
    mixed = tmp_path / "mixed"
    shutil.copytree(deep / "train", mixed / "train")
    shutil.copytree(plain / "val", mixed / "val")
    for main, more in ((PRETRAIN, []), (FINETUNE, ["--aa", ""]), (PROBE, ["--finetune", tmp_path / "p"])):
        code, out = here(tmp_path / "x", "--data_path", mixed, *SMALL, *more, *data[:2], main=main)
        assert code == 2 and ("one range does not fit both" in out or "give --range" in out), out
    code, out = here(tmp_path / "x", "--data_path", mixed, "--finetune", tmp_path / "p", *SMALL, main=PROBE)
    assert code == 2 and "training images are uint16 and the validation images uint8" in out, out
