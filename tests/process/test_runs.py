"""Whole runs in real processes: kill and resume, ranks, accumulation, signals, non-finite losses."""

import csv
import json
import random
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from processes import FINETUNE, PRETRAIN, ROOT, assert_same, here, last, log_lines, ranks, start
from util.data.loading.samplers import EpochSampler

# 200 images in batches of 20 are 10 batches an epoch: three updates of 3 batches, and one batch left over.
# Sampled pairs draw random numbers inside the model.
RUN = ["--batch_size", 20, "--accum_iter", 3, "--epochs", 4, "--pos_label", "apl+rpl", "--rpl_pairs", 2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    code, text = here(out, *RUN)
    assert code == 0, text
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_at_random_steps_and_resume_is_bit_equal(uninterrupted, tmp_path, workers):
    """36 micro-steps in 12 updates, killed twice within a step; saved every update, then every second."""
    where = [random.choice((4, 5, 7, 8, 13)), random.randrange(4, 12)]  # the first leaves an epoch half done
    for call, save_steps in zip(where, (1, 2)):
        code, text = start(
            tmp_path,
            *RUN,
            "--num_workers",
            workers,
            "--save_steps",
            save_steps,
            TEST_SIGNAL=f"0:{call}:SIGKILL",
        )
        assert code == -signal.SIGKILL, (where, text)
    assert 2 <= last(tmp_path)["step"] <= 8, where
    code, text = start(tmp_path, *RUN, "--num_workers", workers)
    assert code == 0 and "continuing" in text, (where, text)
    assert_same(last(uninterrupted), last(tmp_path))
    assert log_lines(uninterrupted) == log_lines(tmp_path), "averages over interrupted epochs, too"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_signals_save_and_exit_with_75(uninterrupted, tmp_path, name):
    # The tenth micro-step is the fourth update's first.
    signal_at = f"0:9:{name}"
    if name == "SIGTERM":
        code, text = start(tmp_path, *RUN, TEST_SIGNAL=signal_at)
    else:
        # The code that a main returns is that of its process.
        code, text = here(tmp_path, *RUN, signal=signal_at)
    assert code == 75 and f"stopped by {name}" in text, text
    assert last(tmp_path)["step"] == 4, "the update was finished, and none was begun"
    if name == "SIGUSR1":
        code, text = here(tmp_path, *RUN)
        assert code == 0, text
        assert_same(last(uninterrupted), last(tmp_path))


def test_a_finished_run_is_left_alone(uninterrupted):
    before, log = last(uninterrupted), uninterrupted / "log.txt"
    ended = log.stat().st_mtime_ns
    code, text = here(uninterrupted, *RUN)
    assert code == 0 and "Epoch" not in text, text
    assert_same(before, last(uninterrupted))
    assert log.stat().st_mtime_ns == ended, "which is when the run ended"


ONE = ["--epochs", 2, "--pos_label", "apl+rpl", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    code, text = here(out, *ONE, "--batch_size", 48)
    assert code == 0, text
    return out


def test_two_ranks_equal_one(one_process, tmp_path):
    results = ranks(2, tmp_path, *ONE, "--batch_size", 24)
    assert [c for c, _ in results] == [0, 0], results
    assert_same(last(one_process), last(tmp_path), exact=False)
    for a, b in zip(log_lines(one_process), log_lines(tmp_path)):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5), "every rank's share is in the log"
    assert "rank 1 of 2: host" in results[1][1] and "Epoch" not in results[1][1]


def test_three_ranks_killed_and_resumed_are_bit_equal(tmp_path):
    """From three ranks on, the order in which their gradients are added matters."""
    flags = [*ONE, "--batch_size", 16, "--save_steps", 1]
    assert [c for c, _ in ranks(3, tmp_path / "whole", *flags)] == [0, 0, 0]
    ranks(3, tmp_path / "parts", *flags, TEST_SIGNAL="0:3:SIGKILL")
    assert last(tmp_path / "parts")["step"] == 3
    assert [c for c, _ in ranks(3, tmp_path / "parts", *flags)] == [0, 0, 0]
    assert_same(last(tmp_path / "whole"), last(tmp_path / "parts"))


def test_accumulation_equals_the_big_batch(one_process, tmp_path):
    code, text = here(tmp_path, *ONE, "--batch_size", 24, "--accum_iter", 2)
    assert code == 0, text
    assert_same(last(one_process), last(tmp_path), exact=False)


def test_steps_depend_on_the_effective_batch_alone(tmp_path):
    """A run may change from 2 batches of 80 images to two updates of 2 batches of 40, and back."""
    code, text = here(tmp_path / "whole", *ONE, "--batch_size", 80)
    assert code == 0, text
    code, text = here(tmp_path / "parts", *ONE, "--batch_size", 80, signal="0:2:SIGTERM")
    assert code == 75 and last(tmp_path / "parts")["step"] == 3, text
    code, text = here(tmp_path / "parts", *ONE, "--batch_size", 40, "--accum_iter", 2)
    assert code == 0 and "starts again" not in text, text
    assert last(tmp_path / "parts")["step"] == 4
    assert_same(last(tmp_path / "whole"), last(tmp_path / "parts"), exact=False)


def test_saves_by_steps_at_the_ends_of_epochs(tmp_path):
    flags = [*ONE, "--batch_size", 48, "--save_every_epochs", 0, "--save_minutes", 0]
    code, text = start(tmp_path, *flags, "--save_steps", 4, TEST_SIGNAL="0:5:SIGKILL")
    assert code == -signal.SIGKILL and last(tmp_path)["step"] == 4, "an epoch has four updates"


def test_a_signal_to_one_rank_stops_both_at_the_same_step(one_process, tmp_path):
    results = ranks(2, tmp_path, *ONE, "--batch_size", 24, TEST_SIGNAL="1:1:SIGUSR2")
    assert [c for c, _ in results] == [75, 75], results
    assert last(tmp_path)["step"] == 3, (
        "told in the second update, agreed on and left together after the third"
    )
    results = ranks(2, tmp_path, *ONE, "--batch_size", 24)
    assert [c for c, _ in results] == [0, 0], results
    assert_same(last(one_process), last(tmp_path), exact=False)


STUCK = """
import os, signal, threading, time, torch
from util.dist import StopSignal

def wait_in_a_collective():
    torch.futures.Future().wait()  # in C++, where no handler of Python's runs

threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2)).start()
threading.Timer(2.5, os._exit, (3,)).start()
class SlowlyWatched(StopSignal):
    def _watch(self, heard):
        super()._watch(heard)
        time.sleep(0.3)

with SlowlyWatched(patience=60):
    pass  # was left in time
left = [t for t in threading.enumerate() if "_watch" in t.name]
assert not left, "it would end together with Python and the process group"
with StopSignal(lambda left: print("left:", left.is_set(), flush=True), patience=0.5):
    wait_in_a_collective()
"""


def test_a_rank_that_does_not_stop_says_where_it_is():
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 3
    assert (
        "rank 0 has not stopped within 0.5 s of SIGUSR2" in done.stderr
        and done.stderr.count("not stopped") == 1
    )
    assert "in wait_in_a_collective" in done.stderr and done.stdout == "left: False\n", done.stderr


def test_nan_on_one_rank_stops_both_and_leaves_a_replay_file(tmp_path):
    results = ranks(
        2, tmp_path, *ONE, "--batch_size", 24, "--save_steps", 1, "--print_freq", 2, TEST_NAN="1:6"
    )
    for code, text in results:
        assert code == 2 and "Traceback" not in text, text
        assert "error: non-finite at step 6: loss = nan" in text, text
        assert "--clip_grad 1" in text and f"continues from {tmp_path}/checkpoint-last.pth" in text, text
    replay = json.loads((tmp_path / "replay-step6.json").read_text())
    sampler = EpochSampler(200, batch_size=24, world_size=2, seed=0)
    assert replay["epoch"] == 1 and replay["micro_batches"] == [sampler.global_batch(1, 2).tolist()]
    saved = last(tmp_path)
    assert saved["step"] == 6, "the last finite state is the one on disk"
    assert all(v.isfinite().all() for v in saved["model"].values())


def test_checkpoints_follow_maes_names_and_are_retired(uninterrupted):
    names = sorted(p.name for p in uninterrupted.glob("*.pth"))
    assert names == ["checkpoint-3.pth", "checkpoint-last.pth"], "--keep 1"
    saved = last(uninterrupted)
    assert {"model", "optimizer", "scaler", "epoch", "args"} <= saved.keys()
    assert saved["epoch"] == 3 and saved["step"] == 12 and saved["args"]["accum_iter"] == 3
    lines = log_lines(uninterrupted)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert {"train_lr", "train_loss", "train_pixel", "train_position", "chance_position"} <= lines[0].keys()
    loss = lines[-1]
    assert loss["train_loss"] == pytest.approx(loss["train_pixel"] + 0.5 * loss["train_position"], rel=1e-5)
    weights = torch.load(uninterrupted / "checkpoint-3.pth", weights_only=True)["model"]
    assert all(torch.equal(v, saved["model"][k]) for k, v in weights.items())


# All random parts of fine-tuning: RandAugment, erasing, mixup or cutmix, stochastic depth, sampled pairs.
FT = [
    "--batch_size",
    40,
    "--epochs",
    3,
    "--pos_label",
    "rpl",
    "--rpl_pairs",
    2,
    "--mixup",
    0.8,
    "--cutmix",
    1.0,
    "--drop_path",
    0.2,
    "--ema",
    0.9,
]


def test_fine_tuning_killed_and_resumed_is_bit_equal(tmp_path):
    code, text = here(tmp_path / "a", *FT, main=FINETUNE)
    assert code == 0, text
    code, text = start(
        tmp_path / "b",
        *FT,
        "--save_steps",
        1,
        main=FINETUNE,
        TEST_SIGNAL=f"0:{random.randrange(5, 14)}:SIGKILL",
    )
    assert code == -signal.SIGKILL, text
    code, text = start(tmp_path / "b", *FT, "--num_workers", 2, main=FINETUNE)
    assert code == 0 and "continuing" in text, text
    a, b = last(tmp_path / "a"), last(tmp_path / "b")
    assert_same(a, b)
    assert all(torch.equal(v, b["ema"][k]) for k, v in a["ema"].items()), "the moving average, too"
    assert any(not torch.equal(a["model"][k], a["ema"][f"module.{k}"]) for k in a["model"])
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b")
    assert (a["best"], a["best_epoch"]) == (b["best"], b["best_epoch"])


def test_evaluation_is_exact_on_two_ranks(tmp_path):
    """Every image once, with any number of ranks: 50 images in batches of 8 are 32 and 18, or 25 and 25."""
    code, text = here(tmp_path, *FT, main=FINETUNE)
    assert code == 0, text
    flags = ["--eval", "--resume", tmp_path / "checkpoint-last.pth", "--batch_size", 8]
    one, text = here(tmp_path, *flags, "--predictions", tmp_path / "one.csv", main=FINETUNE)
    assert one == 0, text
    two = ranks(2, tmp_path, *flags, "--predictions", tmp_path / "two.csv", main=FINETUNE)
    assert [c for c, _ in two] == [0, 0], two
    acc = [line for line in text.splitlines() if line.startswith("* Acc@1")]
    assert (
        acc == [line for line in two[0][1].splitlines() if line.startswith("* Acc@1")]
        and "on 50 of 50" in acc[0]
    )
    rows = (tmp_path / "one.csv").read_text()
    assert rows == (tmp_path / "two.csv").read_text() and len(rows.splitlines()) == 51
    share = sum(row.endswith(",1") for row in rows.splitlines()) / 50
    assert f"Acc@1 {100 * share:.3f}" in acc[0]
    # and it is what training reported for the same weights
    assert f"Acc@1 {log_lines(tmp_path)[-1]['test_acc1']:.3f}" in acc[0]


def test_the_mean_over_classes_is_exact_on_two_ranks(tmp_path):
    """Unequal classes in batches of unequal size, one class without images, and one unreadable image."""
    metrics = pytest.importorskip("sklearn.metrics")
    for split, counts in (("train", (4, 4, 4)), ("val", (7, 4, 0))):
        for c, count in enumerate(counts):
            folder = tmp_path / "d" / split / "abc"[c]
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (80 * c, 30 * i, 10 * i)).save(folder / f"{i}.png")
    (tmp_path / "d" / "val" / "b" / "1.png").write_bytes(b"junk")
    data = ["--data_path", tmp_path / "d", "--batch_size", 3]
    code, text = here(tmp_path / "run", *data, "--epochs", 1, "--lr", 0, main=FINETUNE)
    assert code == 0, text
    # A head that gives all answers.
    state = last(tmp_path / "run")
    torch.manual_seed(1)
    torch.nn.init.normal_(state["model"]["head.weight"])
    torch.save(state, tmp_path / "c.pth")
    flags = [*data, "--eval", "--resume", tmp_path / "c.pth", "--predictions", tmp_path / "p.csv"]
    one, text = here(tmp_path / "run", *flags, main=FINETUNE)
    two = ranks(2, tmp_path / "run", *flags, main=FINETUNE)
    assert [one, *(code for code, _ in two)] == [0, 0, 0], (text, two)
    (line,) = [line for line in text.splitlines() if line.startswith("* Acc@1")]
    assert line in two[0][1].splitlines() and "on 10 of 11 images" in line
    with open(tmp_path / "p.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] != "unreadable"]
    labels, answers = [row["label"] for row in rows], [row["prediction"] for row in rows]
    assert sorted(labels) == ["a"] * 7 + ["b"] * 3 and len(set(answers)) > 1
    recalls = metrics.recall_score(labels, answers, labels=["a", "b"], average=None)
    assert f" balanced {100 * recalls.mean():.3f} (2 of 3 classes) on " in line
    assert f"Acc@1 {100 * recalls.mean():.3f}" not in line, "the classes are not equally frequent"


def test_two_ranks_plan_together(tmp_path):
    for code, text in ranks(2, tmp_path / "run", "--dry_run", "--batch_size", 20, main=PRETRAIN):
        assert code == 0, text
        if "plan (" in text:
            assert "effective batch 20 x 1 x 2 = 40" in text and "5 per epoch, 40 images each" in text
            break
    else:
        pytest.fail("no rank printed the plan")
    assert not (tmp_path / "run").exists()
