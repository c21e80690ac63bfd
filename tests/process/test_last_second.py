"""A signal in a run's last second does not change the exit code: schedulers call a killed run failed."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from processes import ROOT, TINY, environment, last
from util.cluster.job import Job, read_note

pytestmark = pytest.mark.slow
RUN = ["--model", "mae_test", "--input_size", 32, "--batch_size", 50, "--epochs", 1, "--warmup_epochs", 0]
RUN += ["--picture_epochs", 1, "--print_freq", 1, "--num_workers", 1, "--device", "cpu"]
WARNINGS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1)


def start(*command, **env) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return subprocess.Popen([str(c) for c in command], **pipes, env=environment(PYTHONPATH=path, **env))


def read_until(process: subprocess.Popen, words: str) -> str:
    """Read the output up to the line with these words."""
    text = ""
    for line in process.stdout:
        text += line
        if words in line:
            return text
    raise AssertionError(f"{words} is not in\n{text}")


def warn_until_the_end(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    """Send each process a signal every few milliseconds until it is gone -> exit codes, output."""
    sent = 0
    while any([p.poll() is None for p in processes]):
        for p in processes:
            # It does nothing to a process whose end has been noticed.
            p.send_signal(WARNINGS[sent % 3])
        sent += 1
        time.sleep(0.002)
    assert sent > 3
    return [(p.returncode, p.stdout.read()) for p in processes]


def test_finished_ranks_exit_with_0(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [*TINY, "main_pretrain", *RUN, "--output_dir", tmp_path]
    group = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = [start(*command, RANK=r, LOCAL_RANK=r, **group) for r in range(2)]
    read_until(ranks[0], "picture:")
    ends = warn_until_the_end(*ranks)
    assert [code for code, _ in ends] == [0, 0], ends
    assert last(tmp_path)["step"] == 2 and not any("stopped by" in text for _, text in ends)


def test_a_stopped_run_exits_with_75(tmp_path):
    run = start(*TINY, "main_pretrain", *RUN, "--epochs", 100, "--output_dir", tmp_path)
    read_until(run, "Epoch: [0]")
    ((code, text),) = warn_until_the_end(run)
    assert code == 75 and text.count("state saved") == 1, text


def submitted(tmp_path, *flags) -> subprocess.Popen:
    """A task of a submitit job, as the executors start it."""
    from submitit.core.utils import DelayedSubmission

    argv = [str(word) for word in [*RUN, *flags, "--output_dir", tmp_path]]
    DelayedSubmission(Job("slow_pretrain", argv, str(tmp_path))).dump(tmp_path / "7_submitted.pkl")
    names = {"EXECUTOR": "local", "LOCAL_JOB_ID": 7, "LOCAL_NTASKS": 1, "LOCAL_GLOBALID": 0}
    env = {f"SUBMITIT_{name}": value for name, value in names.items()}
    return start(sys.executable, "-u", "-m", "submitit.core._submit", tmp_path, TEST_STEP=0.02, **env)


def test_a_finished_job_is_neither_killed_nor_requeued(tmp_path):
    task = submitted(tmp_path)
    read_until(task, "picture:")
    ((code, text),) = warn_until_the_end(task)
    assert code == 0 and "Exiting after successful completion" in text, text
    assert "Caught signal" not in text and read_note(tmp_path)["state"] == "finished", text
    assert list(tmp_path.glob("7_*result.pkl")), text


def test_a_stopped_job_exits_with_75(tmp_path):
    task = submitted(tmp_path, "--epochs", 100)
    read_until(task, "Epoch: [0]")
    ((code, text),) = warn_until_the_end(task)
    assert code == 75 and "Caught signal" not in text, text
    assert read_note(tmp_path)["state"] == "stopped", text
