"""Which run may write into an output folder, and the ranks of a SLURM step."""

import json

import pytest
import torch

from processes import last
from util import dist
from util.run.checkpoint_manager import OWNER, CheckpointManager


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


def test_another_job_takes_over_and_leftovers_go(tmp_path, monkeypatch):
    old, new = keeper(tmp_path, monkeypatch, 7, 3), keeper(tmp_path, monkeypatch, 8)
    old.claim()
    (tmp_path / "checkpoint-last.pth.partial-abc").write_bytes(b"half")
    new.claim()
    assert sorted(p.name for p in tmp_path.iterdir()) == [OWNER]
    with pytest.raises(ValueError, match="job 8, restart 0"):
        old.save(state(1))


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
