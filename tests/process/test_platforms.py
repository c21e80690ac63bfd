"""Systems other than Linux, imitated: what Windows lacks is taken away before anything is imported."""

import subprocess
import sys

import pytest

from processes import ROOT, environment, last
from util.dist.stop import StopSignal
from util.flags import ending
from util.run import log

# What Windows does not have, of what this toolkit uses elsewhere. torch itself still sees Linux.
RUN = """
import os, signal, sys
import multiprocessing, multiprocessing.popen_fork, subprocess, torch
for name in ("resource", "fcntl"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGKILL", "SIGBUS", "setitimer", "pthread_sigmask"):
    delattr(signal, name)
for name in ("sched_getaffinity", "preadv", "set_blocking", "sysconf"):
    delattr(os, name)
import main_finetune, main_linprobe, main_pretrain, main_sere, checkpoints, visualize
from util.cluster import job, job_dir, launch
from util.flags.parser import parse, run
sys.exit(run(main_pretrain.main, parse(main_pretrain.get_args_parser(), sys.argv[1:])))
"""


def test_a_run_needs_nothing_that_windows_lacks(tmp_path):
    flags = (
        "--model mae_vit_pico_patch8 --input_size 16 --batch_size 40 --epochs 1 --num_workers 0 --device cpu"
    )
    done = subprocess.run(
        [sys.executable, "-c", RUN, *flags.split(), "--cache_data", "memory", "--output_dir", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert last(tmp_path)["epoch"] == 0


def test_signals_that_a_system_does_not_have_are_left_out():
    assert ending.known_signals("SIGINT", "SIGNONE", "SIGTERM") == (2, 15)
    assert [s.name for s in StopSignal.SIGNALS] == ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]


@pytest.mark.parametrize("system, mb", [("linux", 2048), ("darwin", 2)])
def test_peak_memory_is_in_mb_on_every_system(monkeypatch, system, mb):
    """macOS counts it in bytes, Linux in KiB."""
    import resource
    from types import SimpleNamespace

    monkeypatch.setattr(log.sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2 * 2**20))
    monkeypatch.setattr(log.torch.cuda, "is_available", lambda: False)
    assert log.peak_memory_mb() == mb
    monkeypatch.setitem(sys.modules, "resource", None)
    assert log.peak_memory_mb() == 0
