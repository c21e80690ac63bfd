"""What a run writes beside its checkpoints: no kill, full disk, second run or strange name damages it."""

import csv
import errno
import json
import math
import os
import re
import shutil
import signal
from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine
import small_run as small_run_module
import visualize
from small_run import Classify, contents, lines, samples, small_run
from tools import draw
from util import dist
from util.data.loading.samplers import EpochSampler
from util.evaluate.supervised import first_classes
from util.report import charts
from util.run import plan
from util.run.checkpoint_manager import CheckpointManager
from util.run.guards import BadImages, NonFiniteLoss, write_replay
from util.run.log import Log, write_predictions
from util.weights.checkpoint import save_atomic
from util.weights.files import load


class Killed(BaseException):
    pass


def killed(*args):
    raise Killed


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- Stops and resumes.
def terminated_in(update: int) -> Classify:
    """An objective whose run gets SIGTERM within an update."""

    def hook(now):
        if now == update:
            os.kill(os.getpid(), signal.SIGTERM)

    return Classify((1.0, 2.0), in_update=hook)


@pytest.mark.parametrize("update", [3, 4, 8])
def test_a_stop_changes_neither_the_log_nor_the_stored_rate(tmp_path, update):
    """Updates 4 and 8 are the last ones of their epochs: then the evaluation alone is missing."""
    assert small_run(tmp_path / "whole", Classify((1.0, 2.0)))
    assert not small_run(tmp_path / "parts", terminated_in(update))
    assert small_run(tmp_path / "parts", Classify((1.0, 2.0)))
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    for line in lines(tmp_path / "parts"):
        assert line["img_per_s"] > 0 and 0 < line["data_wait"] < 1 and line["mfu"] > 0, "of the whole epoch"


def test_schedules_are_those_of_the_last_update_where_only_the_evaluation_is_missing(tmp_path, monkeypatch):
    seen = []
    assert not small_run(tmp_path, terminated_in(4))
    objective = Classify((1.0, 2.0), in_evaluation=lambda epoch: seen.append("evaluation"))
    monkeypatch.setattr(objective, "before_update", seen.append)
    small_run(tmp_path, objective)
    assert seen == [0.75, "evaluation", 1.0, 1.25, 1.5, 1.75, "evaluation"]


def test_the_speed_of_an_epoch_counts_all_its_updates(tmp_path):
    """Four images an update in ten seconds, half of them waiting, before a stop; then as many again."""
    log = Log(str(tmp_path))
    log.peak_flops = 8.0
    costs = {"cost_images": 8, "cost_seconds": 20.0, "cost_waited": 10.0, "cost_flops": 16.0}
    log.start_epoch(0, 1, 2, 2, 4, {"loss": 4.0, "steps": 2} | costs)
    line = log.end_epoch({})
    assert line == {"train_loss": 2.0, "epoch": 0, "img_per_s": 0.4, "data_wait": 0.5, "mfu": 10.0}
    # A checkpoint of an earlier version has no costs.
    log.start_epoch(0, 1, 2, 2, 4, {"loss": 4.0, "steps": 2})
    assert log.end_epoch({}) == {"train_loss": 2.0, "epoch": 0}


def test_a_stream_that_ends_early_is_evaluated_after_a_stop_at_its_end(tmp_path, monkeypatch):
    """Without a log point in the epoch its sums were not stored, and its line was never written."""
    plain = engine.Run.batches

    def three(run, epoch, skip=0):
        yield from islice(plain(run, epoch, skip), 3)
        if epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine.Run, "batches", three)
    assert not small_run(tmp_path, Classify((1.0, 2.0)), print_freq=100)
    assert small_run(tmp_path, Classify((1.0, 2.0)), print_freq=100)
    assert [line["epoch"] for line in lines(tmp_path)] == [0, 1]
    assert lines(tmp_path)[0]["train_lr"] == pytest.approx(0.01 * (0 + 0.25 + 0.5) / 3)


@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_a_trial_stops_after_its_updates_and_continues_bit_for_bit(tmp_path, capsys, steps):
    """Update 4 is the last one of an epoch, which is then logged. No epoch is saved as the best."""
    objective = Classify()
    settings = dict(save_every_epochs=0, print_freq=100)
    assert small_run(tmp_path / "whole", Classify(), **settings)
    capsys.readouterr()
    assert small_run(tmp_path / "parts", objective, max_steps=steps, **settings), "no signal: exit code 0"
    assert objective.updates == steps
    assert f"stopped after {steps} of 8 updates, as --max_steps {steps} says" in capsys.readouterr().out
    saved = torch.load(tmp_path / "parts" / "checkpoint-last.pth", weights_only=True)
    assert (saved["step"], saved["epoch"]) == (steps, steps // 4 - 1)
    log = tmp_path / "parts" / "log.txt"
    assert log.exists() == (steps >= 4), "the line of a whole epoch"
    # Once more, nothing is left to do; fewer updates than are done are no reason to train either.
    for again in (steps, 1):
        assert small_run(tmp_path / "parts", objective, max_steps=again, **settings)
        assert f"stopped after {steps} of 8 updates" in capsys.readouterr().out
    assert objective.updates == steps
    assert small_run(tmp_path / "parts", Classify(), **settings)
    assert "stopped" not in capsys.readouterr().out
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_a_trial_makes_up_for_a_missing_evaluation(tmp_path, capsys):
    assert small_run(tmp_path / "whole", Classify((1.0, 2.0)))
    assert not small_run(tmp_path / "parts", terminated_in(4))
    assert small_run(tmp_path / "parts", Classify((1.0, 2.0)), max_steps=4)
    assert [line["test_acc1"] for line in lines(tmp_path / "parts")] == [1.0]
    assert small_run(tmp_path / "parts", Classify((1.0, 2.0)), max_steps=8)
    assert capsys.readouterr().out.count("stopped after") == 1, "8 updates are the whole run"
    assert contents(tmp_path / "whole")["log.txt"] == contents(tmp_path / "parts")["log.txt"]


def test_a_signal_in_the_last_update_of_a_trial_is_a_stop(tmp_path, capsys):
    assert not small_run(tmp_path, terminated_in(3), max_steps=3), "a scheduler starts the job again"
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out


def test_the_first_line_comes_at_the_first_update_of_each_start(tmp_path, capsys):
    assert not small_run(tmp_path, terminated_in(2), print_freq=3)
    assert re.findall(r"\[0\]  \[(\d)/4\]", capsys.readouterr().out) == ["1", "2"]
    assert small_run(tmp_path, print_freq=3)
    text = capsys.readouterr().out
    assert re.findall(r"\[0\]  \[(\d)/4\]", text) == ["3", "4"]
    assert re.findall(r"\[1\]  \[(\d)/4\]", text) == ["3", "4"], "the run is known to be under way"


# -- Values that are not finite.
@dataclass
class Diverging(Classify):
    diverges_in: int = 0

    def loss(self, model, batch):
        loss, terms = super().loss(model, batch)
        if self.updates == self.diverges_in:
            loss = loss * math.nan
        return loss, terms


@pytest.mark.parametrize(
    "update, settings, amp, facts, absent",
    [
        (1, {}, "fp32", ["step 0", "`mean`", "`std`"], ["lr", "`amp`"]),
        (1, {}, "bf16", ["`amp` fp32"], ["lr"]),
        (2, {}, "fp32", ["step 1", "`lr`", "`blr`", "`clip_grad`", "starts again"], ["`amp`", "mean"]),
        (7, {}, "fp16", ["step 6", "`amp` bf16 or fp32", "continues", "checkpoint-last.pth"], ["mean"]),
        (7, {"clip_grad": 1.0}, "bf16", ["`lr`", "`amp` fp32"], ["`clip_grad`"]),
    ],
)
def test_a_value_that_is_not_finite_stops_with_advice(
    tmp_path, monkeypatch, update, settings, amp, facts, absent
):
    monkeypatch.setattr(small_run_module, "SETUP", replace(small_run_module.SETUP, amp=amp))
    with pytest.raises(ValueError) as caught:
        small_run(tmp_path, Diverging(diverges_in=update), print_freq=1, **settings)
    message = str(caught.value)
    assert "\n" not in message and "loss = nan" in message
    for fact in facts:
        assert fact in message
    for fact in absent:
        assert fact not in message
    assert (tmp_path / f"replay-step{update - 1}.json").exists()


# -- log.txt.
def test_a_kill_while_log_txt_is_cut_loses_nothing(tmp_path, monkeypatch):
    text = "".join(json.dumps({"epoch": epoch, "train_loss": 1.0}) + "\n" for epoch in range(3))
    (tmp_path / "log.txt").write_text(text)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        Log(str(tmp_path)).truncate(1)
    assert (tmp_path / "log.txt").read_text() == text
    Log(str(tmp_path)).truncate(1)
    assert [line["epoch"] for line in lines(tmp_path)] == [0]


def test_a_full_disk_while_log_txt_is_cut_ends_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1}\n')
    monkeypatch.setattr(os, "fsync", full)
    Log(str(tmp_path)).truncate(1)
    assert "warning: [Errno 28]" in capsys.readouterr().out
    assert len(lines(tmp_path)) == 2 and os.listdir(tmp_path) == ["log.txt"]


def test_a_line_that_was_cut_off_never_joins_the_next(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text('{"epoch": 0}\n{"epoch": 1, "train_lo')
    Log(str(tmp_path)).write_line({"epoch": 1})
    assert path.read_text().splitlines() == ['{"epoch": 0}', '{"epoch": 1, "train_lo', '{"epoch": 1}']
    log = Log(str(tmp_path))
    path.write_text('{"epoch": 0}\n{"epoch": 1, "train_lo')
    log.start_epoch(1, 2, 0, 1, 8)
    log.end_epoch({})
    assert lines(tmp_path) == [{"epoch": 0}, {"epoch": 1}]
    # Only the end of the line was lost.
    path.write_text('{"epoch": 0}')
    log.end_epoch({})
    assert lines(tmp_path) == [{"epoch": 0}, {"epoch": 1}]


def test_lines_that_are_not_of_a_run_are_dropped_and_others_keep_their_bytes(tmp_path):
    path = tmp_path / "log.txt"
    kept = b'{"epoch": 0, "name": "caf\xe9 \x85\xc2\x85"}\n'
    foreign = [b"5", b"[]", b"\xff\xfe", b'{"epoch": "x"}', b'{"epoch": null}', b"[" * 100_000, b"{}"]
    path.write_bytes(kept + b"\n".join(foreign) + b"\n")
    Log(str(tmp_path)).truncate(3)
    assert path.read_bytes() == kept


# -- Two runs in one folder.
def taken_over_in(folder, update=0, epoch=-1) -> Classify:
    """An objective whose run loses its folder within an update, or during the evaluation of an epoch."""

    def in_update(now):
        if now == update:
            CheckpointManager(str(folder)).claim()

    def in_evaluation(now):
        if now == epoch:
            CheckpointManager(str(folder)).claim()

    return Classify((1.0, 2.0), in_update, in_evaluation)


@pytest.mark.parametrize("where", [dict(update=5), dict(update=8), dict(epoch=1)])
def test_a_run_that_lost_its_folder_writes_no_more_there(tmp_path, where):
    """It stops as it does at a save: at a log point, or between the evaluation and its line."""
    folder = tmp_path / "run"
    objective = taken_over_in(folder, **where)
    seen = {}

    def loses(now, hook=objective.in_update):
        hook(now)
        seen.update({p.name: p.stat().st_size for p in folder.glob("events*")})

    objective.in_update = loses
    with pytest.raises(ValueError, match=r"belongs to a run that started later, .* stops without saving"):
        small_run(folder, objective, log_dir=str(folder), save_every_epochs=0)
    assert [line["epoch"] for line in lines(folder)] == [0]
    if "update" in where:
        assert {p.name: p.stat().st_size for p in folder.glob("events*")} == seen


def test_a_refused_start_leaves_the_log_alone(tmp_path, monkeypatch):
    """A rank 0 that comes back after its job was requeued cut the log of the new start."""
    small_run(tmp_path, epochs=1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    CheckpointManager(str(tmp_path)).claim()
    with open(tmp_path / "log.txt", "a") as f:
        f.write('{"epoch": 1}\n')
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(ValueError, match="job 7, restart 1"):
        small_run(tmp_path, epochs=2, log_dir=str(tmp_path))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_line_of_another_run_that_came_late_is_dropped(tmp_path):
    """Between a run's last look at the owner and its line there is a moment."""

    def late(epoch):
        with open(tmp_path / "log.txt", "a") as f:
            f.write(json.dumps({"epoch": epoch, "train_loss": "of the other run"}) + "\n")

    small_run(tmp_path, Classify((1.0, 2.0), in_evaluation=late))
    assert [(line["epoch"], line["test_acc1"]) for line in lines(tmp_path)] == [(0, 1.0), (1, 2.0)]


# -- A removed folder.
def test_a_run_makes_a_removed_folder_again(tmp_path, capsys):
    folder = tmp_path / "run"

    def remove(update):
        if update == 5:
            shutil.rmtree(folder)

    assert small_run(folder, Classify((1.0, 2.0), remove), log_dir=str(folder))
    assert capsys.readouterr().out.count("was removed") == 2, "once of the folder, once of TensorBoard's file"
    assert [line["epoch"] for line in lines(folder)] == [1]
    assert load(str(folder / "checkpoint-last.pth")).step == 8
    assert [event.step for event in scalars(folder)] == [1500, 2000]
    names = {p.name.partition(".out")[0] for p in folder.iterdir()}
    expected = {".owner.json", "checkpoint-1.pth", "checkpoint-best.pth", "checkpoint-last.pth", "events"}
    assert names == expected | {"log.txt"}


def test_each_report_makes_the_folder_again(tmp_path, capsys):
    folder = tmp_path / "run"
    index = SimpleNamespace(name=str, classes=["c"])
    bad = BadImages(samples(), str(folder), 1.0)
    bad.add([3])
    error = NonFiniteLoss(1, {"loss": float("nan")})
    reports = [
        lambda: Log(str(folder)).write_line({"epoch": 0}),
        bad.check,
        lambda: write_replay(str(folder), error, EpochSampler(8, batch_size=2), 0, 4, 1, 0),
        lambda: write_predictions(str(folder / "p.csv"), [(0, 0, 0, 0.5)], index),
    ]
    for report, name in zip(reports, ("log.txt", "bad_images.txt", "replay-step1.json", "p.csv")):
        report()
        assert os.listdir(folder) == [name]
        assert f"warning: {folder} was removed: it is made again" in capsys.readouterr().out
        shutil.rmtree(folder)


# -- TensorBoard.
def scalars(folder, tag="train_loss") -> list:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Scalars(tag)


def logged_run(folder, objective=None, **options) -> None:
    """A run with TensorBoard. Its file sorts after those before it, as if a second had passed."""
    before = set(folder.glob("events*"))
    small_run(folder, objective, log_dir=str(folder), **options)
    for path in set(folder.glob("events*")) - before:
        path.rename(folder / f"events.out.tfevents.{len(before):010d}")


def test_tensorboard_that_cannot_start_ends_nothing(tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    (tmp_path / "file").write_text("")
    assert small_run(tmp_path / "a", log_dir=str(tmp_path / "file" / "tb"))
    assert capsys.readouterr().out.count("no more TensorBoard files are written") == 1
    monkeypatch.setattr(SummaryWriter, "__init__", full)
    assert small_run(tmp_path / "b", log_dir=str(tmp_path / "b"))
    text = capsys.readouterr().out
    assert text.count("no more TensorBoard files are written") == 1 and "No space left" in text
    assert len(lines(tmp_path / "b")) == 2


def test_going_back_hides_the_later_points(tmp_path):
    logged_run(tmp_path)
    first = scalars(tmp_path)
    shutil.copy(tmp_path / "checkpoint-0.pth", tmp_path / "checkpoint-last.pth")
    logged_run(tmp_path, print_freq=1)
    second = scalars(tmp_path)
    assert [event.step for event in first] == [250, 500, 1000, 1500, 2000], "the first update, too"
    assert [event.step for event in second] == [250, 500, 1000, 1250, 1500, 1750, 2000], "each point once"
    assert [event.value for event in second][-1] == first[-1].value


def test_a_stop_hides_no_point(tmp_path):
    logged_run(tmp_path / "whole", print_freq=1)
    for update in (4, 3):
        logged_run(tmp_path / "parts", terminated_in(update), print_freq=1)
    logged_run(tmp_path / "parts", print_freq=1)
    whole, parts = (
        [(event.step, event.value) for event in scalars(tmp_path / name)] for name in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 8


def test_a_start_from_nothing_hides_the_points_of_an_earlier_one(tmp_path):
    logged_run(tmp_path)
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    logged_run(tmp_path, print_freq=4)
    assert [event.step for event in scalars(tmp_path)] == [250, 1000, 2000]


# -- Small files.
@pytest.mark.parametrize(
    "before, kept",
    [
        ("", 0),
        ("{damaged", 0),
        ("[1]", 0),
        ("null", 0),
        ('{"started": "then", "earlier_starts": 5}', 1),
        ('{"started": "then", "earlier_starts": [{"host": "a"}]}', 2),
    ],
)
def test_a_damaged_or_foreign_run_json_is_replaced(tmp_path, capsys, before, kept):
    path = tmp_path / "run.json"
    path.write_text(before)
    plan.write_record(str(tmp_path), {"a": 1}, {})
    record = json.loads(path.read_text())
    assert record["flags"] == {"a": 1} and len(record["earlier_starts"]) == kept
    if kept:
        assert record["earlier_starts"][-1] == {"started": "then"}
    else:
        assert f"warning: earlier starts of the run are not recorded: {path}" in capsys.readouterr().out


def test_a_kill_leaves_the_old_record_table_and_checkpoint(tmp_path, monkeypatch):
    index = SimpleNamespace(name=str, classes=["c"])
    writers = {
        "run.json": lambda: plan.write_record(str(tmp_path), {}, {}),
        "p.csv": lambda: write_predictions(str(tmp_path / "p.csv"), [(0, 0, 0, 0.5)], index),
        "c.pth": lambda: save_atomic({"model": {}}, str(tmp_path / "c.pth"), "w"),
        "bad_images.txt": lambda: BadImages(samples(), str(tmp_path), 1.0)._list(["a.jpg", "b.jpg"]),
    }
    monkeypatch.setattr(os, "replace", killed)
    for name, write in writers.items():
        (tmp_path / name).write_text("a.jpg\n")
        with pytest.raises(Killed):
            write()
        assert (tmp_path / name).read_text() == "a.jpg\n"
    assert sorted(os.listdir(tmp_path)) == sorted(writers)


def test_a_pipe_takes_a_table_as_before(tmp_path):
    """/dev/stdout is no file that could be replaced."""
    read, write = os.pipe()
    write_predictions(f"/dev/fd/{write}", [(7, 0, 0, 0.5)], SimpleNamespace(name=str, classes=["c"]))
    os.close(write)
    with open(read) as pipe:
        assert pipe.read().splitlines()[1:] == ["7,c,c,0.500000,1"]


def test_pages_and_tables_of_runs_are_replaced_as_a_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visualize, "page", lambda folder, metric: os.fsdecode(b"caf\xe9"))
    args = dict(command="report", dir=str(tmp_path), out=None, metric=None)
    visualize.main(Namespace(**args))
    assert (tmp_path / "report.html").read_bytes() == b"caf\xe9"
    for seed in (0, 1):
        run = tmp_path / "sweep" / f"seed={seed}\x1b[2J"
        run.mkdir(parents=True)
        (run / "flags.json").write_text(json.dumps({"seed": f"{seed}\x1b[2J"}))
        (run / "log.txt").write_text('{"epoch": 0, "train_loss": 1.0}\n')
    monkeypatch.setattr(charts, "save", lambda figure, out: out)
    draw.sweep(str(tmp_path / "sweep"), str(tmp_path / "out.png"), None, None)
    table = (tmp_path / "out.md").read_text()
    assert "train_loss" in table
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        draw.sweep(str(tmp_path / "sweep"), str(tmp_path / "out.png"), None, None)
    with pytest.raises(Killed):
        visualize.main(Namespace(**args))
    assert (tmp_path / "out.md").read_text() == table
    assert (tmp_path / "report.html").read_bytes() == b"caf\xe9"


# -- Names of strangers.
HOSTILE = [
    "c/plain.jpg",
    "c/two\nlines.jpg",
    "c/\x1b[2Jgone\r.jpg",
    "=HYPERLINK(0)/+1.jpg",
    os.fsdecode(b"c/caf\xe9.jpg"),
    "c/a\u2028b\u202e.jpg",
]
SAFE = [
    b"c/plain.jpg",
    b"c/two\\nlines.jpg",
    b"c/\\x1b[2Jgone\\r.jpg",
    b"=HYPERLINK(0)/+1.jpg",
    b"c/caf\xe9.jpg",
    b"c/a\\u2028b\\u202e.jpg",
]


def test_bad_images_are_listed_a_name_a_line_and_once(tmp_path, capsys):
    data = samples(HOSTILE.__getitem__)
    for start in range(2):
        bad = BadImages(data, str(tmp_path), 1.0)
        bad.add([1, 0])
        bad.check()
        bad.add(range(len(HOSTILE) - start))
        bad.check()
    listed = (tmp_path / "bad_images.txt").read_bytes()
    assert listed == b"".join(SAFE[i] + b"\n" for i in range(6))
    text = capsys.readouterr().out
    assert text.count("\n") == 4 and "the latest: c/two\\nlines.jpg\n" in text
    assert "the latest: c/caf\\xe9.jpg\n" in text and "\x1b" not in text
    # A list of an earlier version that a full disk has cut off.
    (tmp_path / "bad_images.txt").write_bytes(b"c/pl")
    bad = BadImages(data, str(tmp_path), 1.0)
    bad.add([0])
    bad.check()
    assert (tmp_path / "bad_images.txt").read_bytes() == b"c/pl\nc/plain.jpg\n"


def test_a_table_of_predictions_has_a_row_an_image_and_no_formulas(tmp_path):
    classes = ["=cmd()", "b\nc\x1b"]
    index = SimpleNamespace(name=HOSTILE.__getitem__, classes=classes)
    rows = [(i, i % 2, 1 - i % 2, 0.5) for i in range(len(HOSTILE))]
    write_predictions(str(tmp_path / "p.csv"), rows, index)
    content = (tmp_path / "p.csv").read_bytes()
    assert len(content.splitlines()) == 7 and b"\x1b" not in content
    with open(tmp_path / "p.csv", newline="", encoding="utf-8", errors="surrogateescape") as f:
        table = list(csv.reader(f))[1:]
    assert [os.fsencode(row[0]) for row in table] == [*SAFE[:3], b"'" + SAFE[3], *SAFE[4:]]
    assert table[0][1:3] == ["'=cmd()", "b\\nc\\x1b"]


def test_what_rank_0_prints_cannot_command_a_terminal(capsys):
    dist.print_rank0("plan\n\tsteps \x1b[2J\x9b1A" + os.fsdecode(b"caf\xe9"))
    assert capsys.readouterr().out == "plan\n\tsteps \\x1b[2J\\x9b1Acaf\\xe9\n"
    assert first_classes(["a\nb", "c\x1b"]) == "a\\nb, c\\x1b"
    assert first_classes(["a", "b", "c", "d"]) == "a, b, c, ..."


def test_checkpoints_with_strange_flags_owe_what_the_run_would_do(tmp_path):
    manager = CheckpointManager(str(tmp_path), save_every_epochs=2, keep=3)
    place = dict(epoch=2, step=12, updates_per_epoch=4, best_epoch=2, meters={})

    def owed(args=(), **entries):
        save_atomic(
            {"model": {"w": torch.zeros(1)}, "args": dict(args)} | place | entries, manager._path("last")
        )
        return manager.owed(load(manager._path("last")))

    assert owed() == owed(dict(save_every_epochs="x", keep=None, epochs=[3])) != None  # noqa: E711
    assert (owed().names, owed().keep) == (["2", "best"], 3)
    assert owed(dict(save_every_epochs=4, epochs=4, keep=1)).names == ["best"]
    assert owed(dict(save_every_epochs=4, epochs=3, keep=5), best_epoch=1).names == ["2"]
    assert [owed(dict(keep=keep)).keep for keep in (0, 1, 5)] == [0, 3, 5]
    # Within an epoch, before an evaluation, and MAE's own files, which have no step.
    assert owed(step=13, meters={"loss": 1.0}) is None and owed(meters={"loss": 1.0}) is None
    assert owed(step=None) is None and owed(updates_per_epoch=None) is None
    other = CheckpointManager(str(tmp_path / "other"))
    assert other.owed(load(manager._path("last"))) is None, "the file of another folder"
