"""Mistakes in starting a run: one line with what was found and what to do, exit code 2, and nothing left.

The lines are asserted by their facts, not by their words. Advice is followed where that is possible.
"""

import contextlib
import errno
import io
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
import main_sere
import tiny
from commands import call
from models_mae_pl import num_visible
from processes import ROOT, log_lines
from util import dist
from util.dist import group
from util.flags.data_path import DataPath
from util.flags.parser import parse
from util.run import session
from util.run.session import MAY_CHANGE
from util.weights import checkpoint
from util.weights.types import Checkpoint

DEMO = str(ROOT / "data" / "demo")
PRETRAIN = ["--model", "mae_test", "--warmup_epochs", 0, "--picture_epochs", 9, "--batch_size", 100]
FINETUNE = ["--model", "vit_test", "--warmup_epochs", 0, "--batch_size", 100, "--aa", ""]


def refused(capsys, main, *flags) -> str:
    """Run a main that must refuse its flags -> the line that says why."""
    code, text = call(main, capsys, *flags)
    assert code == 2 and "Traceback" not in text, text
    before, found, line = text.partition("error: ")
    assert found, before
    return line.splitlines()[0]


# -- The default folder.
@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """A folder in which a run without --output_dir has trained."""
    place = tmp_path_factory.mktemp("default")
    folder = str(place / "output_dir")
    flags = f"--input_size 32 --num_workers 0 --device cpu --epochs 1 --data_path {DEMO}".split()
    words = [*map(str, PRETRAIN), *flags, "--output_dir", folder]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main_pretrain.main(parse(main_pretrain.get_args_parser(), words)) == 0
    return place


@pytest.fixture
def in_default(default_run, tmp_path, monkeypatch):
    shutil.copytree(default_run, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here" / "output_dir"


MANY = ["--seed", 1, "--mask_ratio", 0.5, "--model", "mae_vit_pico_patch8"]
MANY += ["--pos_embed", "sincos", "--pos_label", "none"]


@pytest.mark.parametrize(
    "flags, facts",
    [
        (["--model", "mae_vit_pico_patch8"], ["model: mae_test -> mae_vit_pico_patch8"]),
        (["--input_size", 40], ["input_size: [32] -> [40]"]),
        (["--mask_ratio", 0.5], ["mask_ratio: 0.75 -> 0.5"]),
        (["--norm_pix_loss"], ["norm_pix_loss: False -> True"]),
        (
            ["--pos_embed", "sincos", "--pos_label", "none"],
            ["pos_embed: none -> sincos", "pos_label: apl -> none"],
        ),
        (["--seed", 1], ["seed: 0 -> 1"]),
        (["--data_path", ""], [f"data_path: {DEMO} -> the demo set"]),
        (["--resume", "other.pth"], ["resume: other.pth"]),
        (["--mask_ratio", 0.5, "--epochs", 2, "--dry_run"], ["mask_ratio: 0.75 -> 0.5"]),
        (
            ["--seed", 1, "--mask_ratio", 0.5, "--model", "mae_vit_pico_patch8"],
            ["(model: mae_test -> mae_vit_pico_patch8; mask_ratio: 0.75 -> 0.5; seed: 0 -> 1)"],
        ),
        (
            [*MANY, "--norm_pix_loss", "--pos_weight", 0.1, "--pos_tokens", "full"],
            ["(model: mae_test", "norm_pix_loss", "and 2 more)"],
        ),
    ],
)
def test_another_run_does_not_continue_the_one_in_the_default_folder(in_default, capsys, flags, facts):
    before = (in_default / "checkpoint-last.pth").read_bytes()
    line = refused(capsys, main_pretrain, *PRETRAIN, "--data_path", DEMO, *flags)
    for fact in [*facts, "./output_dir/checkpoint-last.pth", "its own --output_dir"]:
        assert fact in line
    assert (in_default / "checkpoint-last.pth").read_bytes() == before and len(log_lines(in_default)) == 1
    # The remedy, once.
    if flags[0] == "--input_size":
        new = [*PRETRAIN, "--data_path", DEMO, *flags, "--output_dir", "new"]
        assert call(main_pretrain, capsys, *new)[0] == 0
        assert len(log_lines("new")) == 1


def test_the_default_folder_continues_with_another_schedule_and_spelling(in_default, capsys):
    os.symlink(DEMO, "link")
    same = ["--data_path", "link", "--resume", "output_dir/checkpoint-0.pth", "--print_freq", 7]
    # The files are links to one another.
    flags = [*PRETRAIN, *same, "--epochs", 2, "--lr", 1e-4, "--warmup_epochs", 1, "--batch_size", 50]
    os.remove("output_dir/checkpoint-0.pth")
    os.symlink("checkpoint-last.pth", "output_dir/checkpoint-0.pth")
    code, text = call(main_pretrain, capsys, *flags)
    assert code == 0 and "continuing ./output_dir/checkpoint-last.pth with changed flags" in text, text
    assert len(log_lines(in_default)) == 2
    # The folder stands for its last checkpoint.
    code, text = call(main_pretrain, capsys, *flags, "--resume", "output_dir")
    assert code == 0 and "all epochs (2) are done" in text, text


def test_a_folder_given_by_hand_continues_with_changed_flags(in_default, capsys):
    flags = [*PRETRAIN, "--epochs", 2, "--mask_ratio", 0.5, "--output_dir", "output_dir"]
    code, text = call(main_pretrain, capsys, *flags)
    assert code == 0 and "mask_ratio: 0.75 -> 0.5" in text and "is not read" not in text, text
    code, text = call(main_pretrain, capsys, *flags, "--resume", "none.pth")
    assert code == 0 and "warning: --resume none.pth is not read" in text, text
    # What cannot be loaded stays an error.
    line = refused(capsys, main_pretrain, *flags, "--epochs", 3, "--model", "mae_vit_pico_patch8")
    assert "does not fit this model" in line and "another --output_dir" in line


def test_fine_tuning_does_not_continue_pretraining(in_default, capsys):
    """The two commands of a beginner, both without --output_dir."""
    start = ["--finetune", "output_dir/checkpoint-last.pth"]
    line = refused(capsys, main_finetune, *FINETUNE, *start)
    assert "model: mae_test -> vit_test" in line and "--output_dir" in line
    code, text = call(main_finetune, capsys, *FINETUNE, *start, "--output_dir", "ft")
    assert code == 0 and "encoder from output_dir/checkpoint-last.pth" in text, text


def test_a_probe_learns_of_another_run_in_its_folder_before_it_computes_features(
    in_default, capsys, monkeypatch
):
    monkeypatch.setattr(main_linprobe, "extract_features", lambda *args: pytest.fail("features are computed"))
    start = ["--finetune", "output_dir/checkpoint-last.pth", "--cached", "--model", "vit_test"]
    line = refused(capsys, main_linprobe, *start, "--data_path", DEMO)
    assert "model: mae_test -> vit_test" in line and "its own --output_dir" in line


def test_a_segmenting_probe_learns_of_another_run_before_it_computes_features(
    in_default, capsys, monkeypatch
):
    monkeypatch.setattr(main_segment, "own_features", lambda *args: pytest.fail("features are computed"))
    start = ["--finetune", "output_dir/checkpoint-last.pth", "--cached", "--probe", "linear"]
    line = refused(capsys, main_segment, *start, "--model", "vit_test")
    assert "model: mae_test -> vit_test" in line and "its own --output_dir" in line


def test_flags_that_may_change_exist():
    flags = {a.dest for main in (main_pretrain, main_finetune) for a in main.get_args_parser()._actions}
    assert flags >= MAY_CHANGE and not MAY_CHANGE & checkpoint.HARMLESS


# -- Nothing is left.
@pytest.mark.parametrize(
    "main, flags, fact",
    [
        (main_pretrain, ["--mask_ratio", 0.99], "0.99"),
        (main_pretrain, ["--accum_iter", 6], "--accum_iter 6"),
        (main_pretrain, ["--batch_size", 300], "to 200"),
        (main_pretrain, ["--data_path", "nowhere"], "nowhere"),
        (main_pretrain, ["--resume", "missing.pth"], "missing.pth"),
        (main_finetune, ["--finetune", "missing.pth"], "missing.pth"),
        (main_finetune, ["--nb_classes", 3], "--nb_classes 3"),
        (main_finetune, ["--mixup", 0.8, "--batch_size", 25], "--batch_size, found 25"),
        (main_finetune, ["--predictions", "."], "--predictions . is a folder"),
    ],
)
def test_a_refused_run_leaves_no_folder(tmp_path, monkeypatch, capsys, main, flags, fact):
    monkeypatch.chdir(tmp_path)
    base = PRETRAIN if main is main_pretrain else FINETUNE
    for folder in ([], ["--output_dir", "a/b"]):
        assert fact in refused(capsys, main, *base, *flags, *folder)
        assert not os.listdir(tmp_path)


def test_an_evaluation_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(main_finetune, capsys, *FINETUNE, "--output_dir", "ft")[0] == 0
    before = sorted(tmp_path.rglob("*"))
    code, text = call(main_finetune, capsys, *FINETUNE, "--eval", "--resume", "ft/checkpoint-last.pth")
    assert code == 0 and "Acc@1" in text, text
    assert sorted(tmp_path.rglob("*")) == before


# -- Folders that cannot be written.
def failing(number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    "place, patched, facts",
    [
        ("file", None, ["file is a file"]),
        ("file/run", None, ["file is a file"]),
        ("new/run", ("open", failing(errno.EROFS)), ["Read-only file system"]),
        ("run", ("open", failing(errno.EACCES)), ["Permission denied"]),
        ("run", ("fsync", failing(errno.ENOSPC)), ["No space left on device"]),
    ],
)
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys, place, patched, facts):
    (tmp_path / "file").write_text("")
    if patched:
        name, fail = patched
        # The other calls of open, by data sets for example, go on.
        monkeypatch.setattr(group if name == "open" else os, name, fail, raising=False)
    line = refused(capsys, main_pretrain, *PRETRAIN, "--output_dir", tmp_path / place)
    for fact in [*facts, str(tmp_path / place), "another --output_dir"]:
        assert fact in line
    assert os.listdir(tmp_path) == ["file"], "and no file of the check"


def test_ranks_hear_of_a_folder_that_rank_0_cannot_write(tmp_path, monkeypatch):
    """Another rank gets rank 0's problem, and does not write itself."""
    monkeypatch.setattr(group, "is_main", lambda: False)
    monkeypatch.setattr(
        group, "gather_objects", lambda value: [("", "Read-only file system in /there"), value]
    )
    with pytest.raises(ValueError, match="Read-only file system in /there"):
        dist.check_folder(str(tmp_path / "run"))
    assert not os.listdir(tmp_path)


def test_a_host_that_does_not_see_the_folder_is_named(tmp_path, monkeypatch):
    answers = []

    def gathered(value):
        answers.append(value)
        if len(answers) == 1:
            return [value, ("", "")]
        return [value, ("node7", False)]

    monkeypatch.setattr(group, "gather_objects", gathered)
    with pytest.raises(ValueError, match="node7 cannot see"):
        dist.check_folder(str(tmp_path / "new" / "run"))
    assert answers[1][1] is True and not os.listdir(tmp_path)


def test_what_takes_long_is_computed_on_rank_0_only(monkeypatch):
    assert dist.compute_on_main(lambda: 7) == 7
    # Errors of any type, also those without a message.
    for function, message in (
        (lambda: 1 // 0, "integer division.*by zero"),
        (lambda: next(iter(())), "StopIteration"),
    ):
        with pytest.raises(ValueError, match=message):
            dist.compute_on_main(function)
    monkeypatch.setattr(group, "is_main", lambda: False)
    monkeypatch.setattr(group, "gather_objects", lambda mine: [(7, ""), mine])
    assert dist.compute_on_main(lambda: pytest.fail("this is not rank 0")) == 7
    monkeypatch.setattr(group, "gather_objects", lambda mine: [(None, "gone"), mine])
    with pytest.raises(ValueError, match=r"^gone$"):
        dist.compute_on_main(lambda: pytest.fail("this is not rank 0"))


@pytest.mark.parametrize("main", [main_finetune, main_linprobe])
def test_classes_of_training_are_read_on_rank_0_only(monkeypatch, main):
    """The images to evaluate lack a class, and the file does not name its outputs."""
    monkeypatch.setattr(main, "training_classes", lambda source: pytest.fail("this is not rank 0"))
    monkeypatch.setattr(group, "is_main", lambda: False)
    monkeypatch.setattr(group, "gather_objects", lambda mine: [(["a", "b", "c"], ""), mine])
    used = []
    data = SimpleNamespace(
        classes=["a", "c"], path="x", use_classes=used.append, without_images=lambda: ["b"]
    )
    saved = Checkpoint("x.pth", {"head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3)}, {})
    if main is main_finetune:
        assert main.evaluated_classes(saved, data, DataPath("D"), None) == ["a", "b", "c"]
    else:
        main.use_trained_classes(data, saved, DataPath("D"))
    assert used == [["a", "b", "c"]]


# -- Values that are not finite, and too little memory.
def test_the_advice_on_a_run_that_diverges_helps(tmp_path, capsys):
    flags = [*PRETRAIN, "--epochs", 2, "--output_dir", tmp_path / "run"]
    line = refused(capsys, main_pretrain, *flags, "--lr", 1e30)
    for fact in ("step 1", "loss = nan", "--lr", "--blr", "--clip_grad 1", "starts again"):
        assert fact in line
    code, text = call(main_pretrain, capsys, *flags, "--lr", 1e-4, "--clip_grad", 1)
    assert code == 0 and len(log_lines(tmp_path / "run")) == 2, text


def test_pixels_that_are_not_finite_are_not_blamed_on_the_learning_rate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main_pretrain, "fit", main_pretrain.fit)
    tiny.disturb(main_pretrain, "0:0", None)
    line = refused(capsys, main_pretrain, *PRETRAIN, "--output_dir", tmp_path / "run")
    assert "step 0" in line and "--mean" in line and "--std" in line and "--lr" not in line


def test_too_little_memory_names_the_batch(tmp_path, capsys, monkeypatch):
    def wrap(loss):
        def starved(model, batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has 5 GiB.")

        return starved

    monkeypatch.setattr(main_pretrain, "fit", main_pretrain.fit)
    tiny.wrap_loss(main_pretrain, wrap)
    for more in ([], ["--dry_run"]):
        line = refused(capsys, main_pretrain, *PRETRAIN, "--output_dir", tmp_path / "run", *more)
        assert "CUDA out of memory" in line and "--batch_size (now 100)" in line and "--accum_iter" in line


# -- Odd numbers of images.
def images(folder, *names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (40 * number, 90, 200)).save(path)


def test_mask_ratio_0_warns(tmp_path, capsys):
    flags = [*PRETRAIN, "--mask_ratio", 0, "--output_dir", ""]
    code, text = call(main_pretrain, capsys, *flags)
    assert code == 0 and "warning: --mask_ratio 0" in text and "only the other losses" in text, text
    code, text = call(main_pretrain, capsys, *flags, "--pos_label", "none")
    assert code == 0 and "nothing is learned" in text, text
    text = call(main_pretrain, capsys, *PRETRAIN, "--output_dir", "")[1]
    assert "--mask_ratio" not in text and "warning: --output_dir is empty" in text, text


def test_one_image_trains_and_no_image_is_an_error(tmp_path, capsys):
    images(tmp_path / "one", "a.png")
    flags = [*PRETRAIN, "--output_dir", tmp_path / "run"]
    line = refused(capsys, main_pretrain, *flags, "--data_path", tmp_path / "one")
    assert "1 image " in line and "--batch_size to 1" in line
    code, text = call(main_pretrain, capsys, *flags, "--data_path", tmp_path / "one", "--batch_size", 1)
    assert code == 0, text
    (tmp_path / "none").mkdir()
    assert "no images" in refused(capsys, main_pretrain, *flags, "--data_path", tmp_path / "none")


def test_a_batch_of_one_trains_a_classifier(tmp_path, capsys):
    images(tmp_path / "data", "train/a/0.png", "train/b/1.png", "val/a/2.png", "val/b/3.png")
    flags = [*FINETUNE, "--data_path", tmp_path / "data", "--output_dir", tmp_path / "run"]
    line = refused(capsys, main_finetune, *flags)
    assert "2 images" in line and "--batch_size to 2" in line
    line = refused(capsys, main_finetune, *flags, "--batch_size", 1, "--mixup", 0.8)
    assert "even --batch_size, found 1" in line
    assert call(main_finetune, capsys, *flags, "--batch_size", 1)[0] == 0
    shutil.rmtree(tmp_path / "run")
    assert call(main_finetune, capsys, *flags, "--batch_size", 2, "--mixup", 0.8, "--cutmix", 1)[0] == 0


def test_the_highest_mask_ratio_is_named():
    for patches in [*range(2, 300), 784, 1024, 4096]:
        with pytest.raises(ValueError) as error:
            num_visible(patches, 0.9999)
        most = float(re.search(r"give (\S+) or less", str(error.value))[1])
        assert num_visible(patches, most) == 1, patches
        with pytest.raises(ValueError):
            num_visible(patches, most + 0.00011)


# -- Schedules.
@pytest.mark.parametrize("main", [main_pretrain, main_finetune, main_linprobe, main_sere])
def test_a_warm_up_longer_than_the_run_warns_once(main, capsys):
    def warnings(*words):
        session.open_budget(parse(main.get_args_parser(), list(words)), 0.4)
        return capsys.readouterr().out.splitlines()

    long = ["--data_path", "x", "--warmup_epochs", "40", "--epochs", "10"]
    (line,) = warnings(*long)
    for fact in ("warning: ", "--warmup_epochs 40", "--epochs 10", "25% of 0.4", "--warmup_epochs 1"):
        assert fact in line
    for words in (["--epochs", "1"], [*long, "--max_steps", "2"], [*long, "--epochs", "40"], long[:2]):
        assert not warnings(*words), words


# -- What a run shows.
def test_tensorboard_has_the_validation_figures_of_pretraining(tmp_path, capsys):
    code, text = call(main_pretrain, capsys, *PRETRAIN, "--output_dir", tmp_path)
    assert code == 0, text
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (line,) = log_lines(tmp_path)
    figures = {name: value for name, value in line.items() if name.startswith("test_")}
    assert {"test_loss", "test_pixel", "test_position", "test_position_acc"} <= figures.keys()
    for name, value in figures.items():
        (point,) = events.Scalars(f"perf/{name}")
        assert (point.step, point.value) == (1000, pytest.approx(value, rel=1e-6))
