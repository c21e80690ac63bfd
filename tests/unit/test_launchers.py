"""Ranks that other launchers than torchrun describe, and MAE's flags for them."""

import os
import re
from types import SimpleNamespace

import pytest

from util import dist
from util.run.session import join_ranks

OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "MASTER_ADDR": "host7",
    "MASTER_PORT": "1234",
}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host7", "MASTER_PORT": "1234"}
ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_open_mpis_variables_are_torchruns():
    assert OPENMPI | dist.openmpi_ranks(OPENMPI) == OPENMPI | TORCHRUN
    del (variables := dict(OPENMPI))["OMPI_COMM_WORLD_SIZE"]
    with pytest.raises(ValueError, match=r"no OMPI_COMM_WORLD_SIZE: .* mpirun"):
        dist.openmpi_ranks(variables)


@pytest.mark.parametrize(
    "environ, url, ranks, found, note",
    [
        ({}, "env://", None, {}, ""),
        ({}, "env://", 1, {}, ""),  # MAE's default
        ({}, "env://", 4, {}, "`world_size` 4 has no effect: .* does not know its rank"),
        ({}, "tcp://h:1", 1, {}, "`dist_url` tcp://h:1 has no effect: this process runs alone"),
        (TORCHRUN, "env://", 8, {}, ""),
        (TORCHRUN, "env://", 4, {}, "`world_size` 4 has no effect: .* 8 processes"),
        (TORCHRUN, "tcp://10.0.0.1:29500", None, ADDRESS, ""),
        (TORCHRUN, "tcp://[fe80::1]:29500", None, ADDRESS | {"MASTER_ADDR": "fe80::1"}, ""),
        (
            TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"},
            "tcp://10.0.0.1:29500",
            None,
            {},
            "`dist_url` .* has no effect: torchrun",
        ),
        # A rank that someone has set by hand.
        ({"RANK": "1"}, "tcp://10.0.0.1:29500", 4, ADDRESS | {"WORLD_SIZE": "4"}, ""),
    ],
)
def test_maes_flags_of_ranks_act_or_say_that_they_do_not(environ, url, ranks, found, note):
    variables, notes = dist.flag_ranks(environ, url, ranks)
    assert variables == found
    assert len(notes) == bool(note)
    assert re.search(note, "".join(notes))


@pytest.mark.parametrize("url", ["file:///shared/file", "tcp://host", "tcp://:1", "tcp://a:b", "host:1"])
def test_addresses_that_are_none(url):
    with pytest.raises(ValueError, match="`dist_url` takes env:// or tcp://HOST:PORT"):
        dist.flag_ranks({}, url, None)


def flags(**given) -> SimpleNamespace:
    usual = dict(dist_on_itp=False, dist_url="env://", world_size=None, start_epoch=None, local_rank=-1)
    return SimpleNamespace(**usual | dict(device="cpu", dist_backend=None, dist_timeout=30) | given)


def test_a_start_epoch_says_that_it_has_no_effect(capsys):
    join_ranks(flags(start_epoch=0, world_size=1))
    assert capsys.readouterr().out == ""
    join_ranks(flags(start_epoch=7))
    assert "--start_epoch 7 has no effect: a new run starts at epoch 0" in capsys.readouterr().out


def test_ranks_without_an_address_are_told_what_is_missing(monkeypatch):
    for name in (*TORCHRUN, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"RANK": "1", "MASTER_PORT": "1"})
    with pytest.raises(ValueError, match=r"rank 1 of 2: .* no MASTER_ADDR, rank 0's host .*`dist_url`"):
        join_ranks(flags(world_size=2))


def test_several_processes_without_a_rank_are_told_so(monkeypatch):
    environ = {
        name: value for name, value in os.environ.items() if name not in (*TORCHRUN, "SLURM_STEP_NUM_TASKS")
    }
    monkeypatch.setattr(os, "environ", environ | {"WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match=r"WORLD_SIZE 2 and no RANK: .* torchrun .*unset WORLD_SIZE"):
        join_ranks(flags())
    assert not dist.is_initialized()
