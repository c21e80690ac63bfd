"""Which run may write into an output folder, what a kill leaves there, and the ranks of a SLURM step."""

import errno
import json
import os
import shutil

import pytest
import torch

from processes import last
from small_run import Classify, contents, small_run
from util import dist
from util.run.checkpoint_manager import OWNER, CheckpointManager
from util.weights.checkpoint import save_atomic
from util.weights.files import load


def keeper(folder, monkeypatch, job=None, restart=None):
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restart)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    return CheckpointManager(str(folder))


def value(folder) -> int:
    return last(folder)["model"]["x"].item()


def state(x: int) -> dict:
    return {"model": {"x": torch.tensor(x)}}


def test_a_later_run_takes_the_folder_over(tmp_path, monkeypatch):
    first, second = keeper(tmp_path, monkeypatch), keeper(tmp_path, monkeypatch)
    first.claim()
    first.save(state(1))
    second.claim()
    with pytest.raises(
        ValueError, match=r"belongs to a run that started later, on .*: this run stops without saving"
    ):
        first.save(state(2))
    assert value(tmp_path) == 1
    second.save(state(3))
    assert value(tmp_path) == 3


def test_of_one_job_the_higher_restart_owns_the_folder_whichever_comes_last(tmp_path, monkeypatch):
    lost, requeued = keeper(tmp_path, monkeypatch, 7), keeper(tmp_path, monkeypatch, 7, 1)
    requeued.claim()
    with pytest.raises(ValueError, match="job 7, restart 1"):
        lost.claim()
    requeued.save(state(1))
    with pytest.raises(ValueError, match="job 7, restart 1"):
        lost.save(state(2))
    assert value(tmp_path) == 1
    # Even if the lost one's claim has slipped in between.
    (tmp_path / OWNER).write_text(json.dumps(lost.me))
    requeued.save(state(3))
    assert value(tmp_path) == 3
    with pytest.raises(ValueError, match="job 7, restart 1"):
        lost.check_owner()


def test_another_job_takes_over_and_leftovers_go(tmp_path, monkeypatch):
    old, new = keeper(tmp_path, monkeypatch, 7, 3), keeper(tmp_path, monkeypatch, 8)
    old.claim()
    (tmp_path / "checkpoint-last.pth.partial-abc").write_bytes(b"half")
    (tmp_path / f".shared-{'0a' * 16}").write_bytes(b"")
    new.claim()
    assert sorted(p.name for p in tmp_path.iterdir()) == [OWNER]
    with pytest.raises(ValueError, match="job 8, restart 0"):
        old.save(state(1))


def test_a_claim_leaves_the_files_of_other_programs(tmp_path, monkeypatch):
    """A launcher may be writing jobs.json beside the run."""
    (tmp_path / "jobs.json.partial-abc").write_text("half")
    keeper(tmp_path, monkeypatch).claim()
    assert sorted(p.name for p in tmp_path.iterdir()) == [OWNER, "jobs.json.partial-abc"]


DAMAGED = {
    "empty": "",
    "cut off": '{"token": "ab',
    "a list": "[]",
    "no token": '{"host": "n1", "since": "", "job": null, "restart": 0}',
    "a number for a job": '{"token": "t", "host": "n1", "since": "", "job": 7, "restart": 0}',
    "a word for a number": '{"token": "t", "host": "n1", "since": "", "job": "7", "restart": "x"}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_owner_file_names_nobody(tmp_path, monkeypatch, capsys, content):
    """It ends neither a start nor a save, and later starts take the folder over as always."""
    first, second = keeper(tmp_path, monkeypatch, 7), keeper(tmp_path, monkeypatch, 8)
    (tmp_path / OWNER).write_text(content)
    first.claim()
    text = capsys.readouterr().out
    assert text.count("warning") == 1 and str(tmp_path / OWNER) in text and "becomes the owner" in text
    assert json.loads((tmp_path / OWNER).read_text())["job"] == "7"
    (tmp_path / OWNER).write_text(content)
    first.save(state(1))
    assert str(tmp_path / OWNER) in capsys.readouterr().out
    second.claim()
    with pytest.raises(ValueError, match="job 8"):
        first.save(state(2))
    assert value(tmp_path) == 1


def test_an_owners_name_cannot_command_a_terminal(tmp_path, monkeypatch):
    run = keeper(tmp_path, monkeypatch)
    owner = run.me | {"token": "t", "host": "n1\x1b[2J\n", "job": "7\r"}
    (tmp_path / OWNER).write_text(json.dumps(owner))
    with pytest.raises(ValueError, match=r"job 7\\r, restart 0 .* on n1\\x1b\[2J\\n at"):
        run.save(state(1))


def test_a_removed_folder_is_made_again_by_a_save(tmp_path, monkeypatch, capsys):
    run = keeper(tmp_path / "run", monkeypatch)
    run.claim()
    shutil.rmtree(tmp_path / "run")
    run.save(state(1), numbered=0, best=True)
    assert capsys.readouterr().out.count("was removed: it is made again") == 1
    names = sorted(os.listdir(tmp_path / "run"))
    assert names == [OWNER, "checkpoint-0.pth", "checkpoint-best.pth", "checkpoint-last.pth"]
    with pytest.raises(ValueError, match="belongs to a run"):
        keeper(tmp_path / "run", monkeypatch).save(state(2))


# -- Kills. A killed process makes no further call, not even those that would clean up.
class Killed(BaseException):
    pass


class Executioner:
    """Lets the process die before one of its system calls, counted from `armed` on."""

    def __init__(self, patch: pytest.MonkeyPatch, call: int):
        self.left = call
        self.armed = self.dead = False
        places = [(os, name) for name in ("link", "replace", "remove", "fsync")]
        for place, name in [*places, (shutil, "copyfileobj"), (torch, "save")]:
            patch.setattr(place, name, self.watched(getattr(place, name)))

    def watched(self, function):
        def call(*args, **kwargs):
            if self.armed and self.left == 0:
                self.dead = True
            if self.dead:
                raise Killed
            self.left -= self.armed
            return function(*args, **kwargs)

        return call

    def arm(self, *_) -> None:
        self.armed = True


def no_links(*args):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_a_kill_between_any_two_calls_loses_nothing(tmp_path, monkeypatch, links):
    """From the first evaluation to the end; each of two saves has a best, a numbered and a retired file."""
    # A process that is killed leaves what it has written, synchronised or not.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    accuracies = (1.0, 2.0)
    small_run(tmp_path / "whole", Classify(accuracies), keep=1)
    whole = contents(tmp_path / "whole")
    names = [OWNER, "checkpoint-1.pth", "checkpoint-best.pth", "checkpoint-last.pth", "log.txt", "run.json"]
    assert list(whole) == names
    assert whole["checkpoint-best.pth"] == whole["checkpoint-1.pth"] == whole["checkpoint-last.pth"]
    for call in range(100):
        folder = tmp_path / str(call)
        with pytest.MonkeyPatch.context() as patch:
            executioner = Executioner(patch, call)
            try:
                small_run(folder, Classify(accuracies, in_evaluation=executioner.arm), keep=1)
            except Killed:
                pass
            else:
                break
        small_run(folder, Classify(accuracies), keep=1)
        assert contents(folder) == whole, f"killed before call {call}"
    # The log line, and writing, naming and retiring.
    assert call > 20


def test_a_best_and_a_numbered_file_are_there_at_any_time(tmp_path, monkeypatch):
    """The old one or the new one: a kill between a removal and a link lost it for good."""
    seen = []
    plain = dict(link=os.link, remove=os.remove, replace=os.replace)

    def watch(name):
        def call(*args):
            seen.append((tmp_path / "checkpoint-best.pth").exists())
            return plain[name](*args)

        return call

    run = keeper(tmp_path, monkeypatch)
    run.claim()
    run.save(state(1), best=True)
    for name in plain:
        monkeypatch.setattr(os, name, watch(name))
    run.save(state(2), best=True)
    assert len(seen) >= 3 and all(seen)
    assert load(str(tmp_path / "checkpoint-best.pth")).model["x"].item() == 2


def test_two_names_of_one_file_are_linked_without_a_rest(tmp_path, monkeypatch):
    """POSIX: a rename of one link to another of the same file does nothing, and leaves both."""
    run = keeper(tmp_path, monkeypatch)
    run.claim()
    run.save(state(1), best=True)
    run._link("best")
    assert sorted(p.name for p in tmp_path.iterdir()) == [OWNER, "checkpoint-best.pth", "checkpoint-last.pth"]
    assert os.path.samefile(tmp_path / "checkpoint-best.pth", tmp_path / "checkpoint-last.pth")


def test_without_hard_links_a_failed_copy_keeps_the_old_file(tmp_path, monkeypatch):
    def half(source, copy, *_):
        copy.write(source.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", no_links)
    run = keeper(tmp_path, monkeypatch)
    run.claim()
    run.save(state(1), best=True)
    monkeypatch.setattr(shutil, "copyfileobj", half)
    with pytest.raises(
        OSError, match=r"could not copy .*checkpoint-last\.pth to .*checkpoint-best\.pth: .*space"
    ):
        run.save(state(2), best=True)
    assert load(str(tmp_path / "checkpoint-best.pth")).model["x"].item() == 1
    assert not list(tmp_path.glob("*.partial*"))


def stop_in(update: int):
    def hook(now):
        if now == update:
            raise KeyboardInterrupt

    return Classify((1.0, 2.0), in_update=hook)


def test_a_checkpoint_within_an_epoch_gets_no_further_name(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path, stop_in(7), save_steps=1, save_every_epochs=0)
    assert last(tmp_path)["step"] == 6
    os.remove(tmp_path / "checkpoint-best.pth")
    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path, stop_in(1), save_every_epochs=1)
    assert not list(tmp_path.glob("checkpoint-[0-9b]*")), "its epochs' ends are over, or have not come"


def test_the_flags_of_a_killed_run_decide_what_is_made_up_for(tmp_path, monkeypatch, capsys):
    """A finished run is complete again, and a second look changes nothing."""
    small_run(tmp_path, Classify((2.0, 1.0)), save_every_epochs=1, keep=1)
    os.remove(tmp_path / "checkpoint-1.pth")
    save_atomic({"model": {}}, str(tmp_path / "checkpoint-0.pth"))
    (tmp_path / "checkpoint-best.pth.partial-abc").write_bytes(b"half")
    # Reading it may change the time of its last access.
    best = (tmp_path / "checkpoint-best.pth").stat()
    small_run(tmp_path, Classify((2.0, 1.0)), save_every_epochs=0, keep=1)
    text = capsys.readouterr().out
    assert "checkpoint-1.pth was not made before a kill: it is made now" in text and "nothing to do" in text
    names = [OWNER, "checkpoint-1.pth", "checkpoint-best.pth", "checkpoint-last.pth", "log.txt", "run.json"]
    assert list(contents(tmp_path)) == names
    now = (tmp_path / "checkpoint-best.pth").stat()
    assert (now.st_ino, now.st_mtime_ns) == (best.st_ino, best.st_mtime_ns), "it is of an earlier epoch"
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    small_run(tmp_path, Classify((2.0, 1.0)), save_every_epochs=0, keep=1)
    assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before


def test_nothing_is_retired_that_both_starts_would_keep(tmp_path):
    small_run(tmp_path, keep=1)
    for epoch in (0, 5):
        save_atomic({"model": {}}, str(tmp_path / f"checkpoint-{epoch}.pth"))
    small_run(tmp_path, keep=0)
    assert (tmp_path / "checkpoint-0.pth").exists()
    small_run(tmp_path, keep=2)
    assert (tmp_path / "checkpoint-0.pth").exists() and (tmp_path / "checkpoint-5.pth").exists()


def test_foreign_numbered_files_neither_stop_a_save_nor_take_its_place(tmp_path, monkeypatch, capsys):
    run = keeper(tmp_path, monkeypatch)
    run.claim()
    run.keep = 1
    foreign = [
        "checkpoint-999999999999.pth",
        "checkpoint-007.pth",
        "checkpoint-\u0663.pth",
        "checkpoint-1.pth.bak",
    ]
    for name in foreign:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "checkpoint-2.pth").mkdir()
    for epoch in (3, 4):
        run.save(state(epoch) | {"epoch": epoch}, numbered=epoch)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {*foreign, "checkpoint-2.pth", "checkpoint-4.pth", "checkpoint-last.pth", OWNER}
    assert "warning" not in capsys.readouterr().out


def test_a_file_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, capsys):
    run = keeper(tmp_path, monkeypatch)
    run.claim()
    run.keep = 1
    for epoch in (0, 1):
        run.save(state(epoch) | {"epoch": epoch}, numbered=epoch)
    monkeypatch.setattr(os, "remove", no_links)
    monkeypatch.setattr(os, "link", os.symlink)
    run._retire(5, 0)
    save_atomic(state(2), str(tmp_path / "checkpoint-2.pth"))
    run._retire(5, 1)
    assert "Operation not permitted; the file stays" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-1.pth").exists()


NODELISTS = {
    "node1": "node1",
    "node[1-4,7],gpu2": "node1",
    "gpu-a[003-010]": "gpu-a003",
    "a1,b2": "a1",
    "r[1-2]n[03,05]": "r1n03",
    "n[5]": "n5",
}


@pytest.mark.parametrize("nodelist", NODELISTS)
def test_first_host(nodelist):
    assert dist.first_host(nodelist) == NODELISTS[nodelist]


def test_ranks_of_an_srun_step():
    step = {
        "SLURM_JOB_ID": "5",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "n[1-2]",
    }
    found = dist.slurm_ranks(step)
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "n1"}
    assert 10000 <= int(port) < 30000
    ports = {port} | {
        dist.slurm_ranks(step | other)["MASTER_PORT"]
        for other in ({"SLURM_JOB_ID": "6"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"})
    }
    assert len(ports) == 4, "each job, step and restart meets at its own port"
    assert dist.slurm_ranks(step | {"RANK": "0"}) == {}, "torchrun within srun has the last word"
    batch = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert dist.slurm_ranks(batch) == {} == dist.slurm_ranks({}), "a batch script is one process"
