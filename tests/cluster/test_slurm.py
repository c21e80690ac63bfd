"""The launchers on a real cluster of two nodes: interrupted runs end with the weights of uninterrupted ones.

The tests need `sbatch`, two nodes with two tasks each, and a temporary folder that the nodes share
(--basetemp). The test of a lost node needs two more commands: MAE_PL_TEST_CRASH kills the second node,
MAE_PL_TEST_REVIVE restores it. One worker must run all tests (`--dist loadfile`), as they share the cluster.
"""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from processes import ROOT, assert_same, last, log_lines
from util.cluster.job import read_note

pytestmark = pytest.mark.slurm
PYTHON = [sys.executable, "-u"]
SLOW = [*PYTHON, str(ROOT / "tests" / "slow_pretrain.py")]
CLUSTER = ["--nodes", "2", "--ngpus", "2", "--cpus_per_task", "1", "--mem_gb", "2", "--timeout", "30"]
# 5 steps an epoch on 4 ranks.
RUN = shlex.split(
    "--model mae_test --input_size 32 --pos_label apl+rpl --batch_size 10 --lr 1e-2 --warmup_epochs 1 "
    "--picture_epochs 1000 --print_freq 1 --save_every_epochs 100 --num_workers 1 --device cpu"
)
STEPS = 120


def call(*command, check: bool = True, **env) -> str:
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | env,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit(folder, *flags, step: float = 0.0, hang: int = -1) -> str:
    """Submit a run -> the ID of its job."""
    text = call(*SLOW, *CLUSTER, "--job_dir", folder, *flags, TEST_STEP=str(step), TEST_HANG=str(hang))
    return re.search(r"job (\d+)", text)[1]


def wait(what: str, look, seconds: float = 180, until=bool):
    """Wait until `until(look())` is true, and return what look() saw. The error says what it saw last."""
    end = time.monotonic() + seconds
    while True:
        seen = look()
        if until(seen):
            return seen
        if time.monotonic() > end:
            shown = call("squeue", check=False)
            raise TimeoutError(f"not within {seconds:g} s: {what}; the last state seen is {seen!r}\n{shown}")
        time.sleep(0.3)


def state(job: str) -> str:
    """SLURM's state of a job. A requeued job is released from its waiting time."""
    states = call("squeue", "-h", "-r", "--states=all", "-o", "%T", "-j", job, check=False).split()
    if "PENDING" in states:
        call("scontrol", "update", f"jobid={job}", "starttime=now", check=False)
    return (states or ["GONE"])[0]


BAD = ("FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")


def completed(folder, job: str, seconds: float = 120) -> None:
    """Wait until SLURM, too, counts a job as done. That it failed is said at once."""

    def look() -> str:
        current = state(job)
        assert current not in BAD, f"job {job} is {current}\n{ends(folder)}"
        return current

    wait(f"SLURM counts job {job} as completed", look, seconds, until=("COMPLETED", "GONE").__contains__)


def finished(folder, job: str, seconds: float = 240) -> None:
    """Wait until a run has noted its end, and until SLURM counts its job as completed."""

    def look() -> tuple[str, str]:
        current = state(job)
        assert current not in BAD, f"job {job} is {current}\n{ends(folder)}"
        return current, read_note(folder).get("state", "without a note")

    try:
        wait(f"{folder} finished", look, seconds, until=lambda seen: seen[1] == "finished")
    except TimeoutError as e:
        call("scancel", "--signal=USR2", job, check=False)
        time.sleep(40)  # ranks that hang print their stack after 25 s
        raise AssertionError(f"{e}\n{ends(folder)}") from None
    completed(folder, job)


def outputs(folder) -> list[str]:
    return [p.read_text() for p in sorted(Path(folder).glob("submitit/*/*_log.out"))]


def output(folder) -> str:
    return "\n".join(outputs(folder))


def ends(folder) -> str:
    """The end of each rank's output."""
    return "\n".join(text[-3000:] for text in outputs(folder))


def reach(folder, step: int) -> None:
    """Wait until a run has done that many steps."""

    def steps() -> int:
        text = output(folder)
        done = [(int(e), int(s)) for e, s in re.findall(r"Epoch: \[(\d+)\]  \[(\d+)/5\]", text)]
        epoch, in_epoch = (done or [(0, 0)])[-1]
        return 5 * epoch + in_epoch

    wait(f"step {step} of {folder}", steps, until=lambda seen: seen >= step)


def note_states(*folders) -> list[str]:
    """The states that runs have noted."""
    return [read_note(folder).get("state", "without a note") for folder in folders]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = submit(folder, *RUN, "--epochs", STEPS // 5)
    shown = call("scontrol", "show", "job", job)
    assert (
        re.search(r"TresPerNode=(gres[:/])?gpu:2", shown) and "NumNodes=2" in shown and "NumTasks=4" in shown
    ), shown
    finished(folder, job)
    assert len(log_lines(folder)) == STEPS // 5 and read_note(folder)["starts"] == 1
    return folder


def assert_equal_runs(uninterrupted, folder) -> None:
    assert_same(last(uninterrupted), last(folder))
    assert log_lines(uninterrupted) == log_lines(folder)
    assert read_note(folder)["starts"] >= 2 and "continuing" in output(folder)


def test_requeued_from_outside_at_a_random_moment(uninterrupted, tmp_path):
    job = submit(tmp_path, *RUN, "--epochs", STEPS // 5, "--save_steps", 7, step=0.2)
    reach(tmp_path, random.randrange(10, 60))
    call("scontrol", "requeue", job)
    finished(tmp_path, job)
    assert_equal_runs(uninterrupted, tmp_path)


def test_a_real_time_out(uninterrupted, tmp_path):
    """SLURM checks the time every 30 s, and warns at the last check before the margin: after 30 to 60 s."""
    limit = shlex.split("--timeout 2 --slurm signal=USR2@60")
    job = submit(tmp_path, *RUN, "--epochs", STEPS // 5, *limit, step=0.6)
    finished(tmp_path, job, 500)
    text = output(tmp_path)
    assert "stopped by SIGUSR2" in text and f"job {job} is requeued and continues from here" in text, ends(
        tmp_path
    )
    assert_equal_runs(uninterrupted, tmp_path)


def test_warnings_in_the_last_second_do_not_fail_a_job(tmp_path):
    """They come after the run has asked for signals for the last time, until SLURM has no step left."""
    job = submit(tmp_path, *RUN, "--epochs", 1, "--picture_epochs", 1)
    wait("picture", lambda: ends(tmp_path), until=lambda text: "picture:" in text)

    def warned() -> str:
        call("scancel", "--signal=USR2", job, check=False)
        call("scancel", "--signal=TERM", job, check=False)
        return state(job)

    wait("the end", warned, 120, until=lambda seen: seen not in ("RUNNING", "COMPLETING"))
    finished(tmp_path, job, 30)
    assert read_note(tmp_path)["starts"] == 1 and "Caught signal" not in output(tmp_path), ends(tmp_path)


def test_a_job_that_hangs_is_requeued_before_its_time_limit(uninterrupted, tmp_path):
    """One rank waits for ever, and the others for it, in collectives where Python runs no signal handler."""
    limit = shlex.split("--save_steps 7 --timeout 2 --slurm signal=USR2@60")
    job = submit(tmp_path, *RUN, "--epochs", STEPS // 5, *limit, hang=9)
    finished(tmp_path, job, 300)
    assert_equal_runs(uninterrupted, tmp_path)
    text = output(tmp_path)
    # SLURM sends a warning again when a busy node did not confirm it, so a rank may report twice.
    reports = ["has not stopped within 25 s of SIGUSR2" in rank for rank in outputs(tmp_path)]
    assert f"job {job} is requeued" in text and reports.count(True) == 4, ends(tmp_path)
    assert "slow_pretrain.py" in text and "torch.futures.Future().wait()" in text, "the line that hangs"


def test_a_warning_before_torch_is_imported(tmp_path):
    """It comes as soon as submitit has loaded the job, before the training loop handles signals."""
    job = submit(tmp_path, *RUN, "--epochs", "1")
    wait("four ranks", lambda: output(tmp_path).count("Loading pickle"), until=lambda ranks: ranks == 4)
    call("scancel", "--signal=USR2", job)
    finished(tmp_path, job)
    assert "Caught signal SIGUSR2" in output(tmp_path) and len(log_lines(tmp_path)) == 1


@pytest.mark.skipif(
    not os.environ.get("MAE_PL_TEST_CRASH"), reason="no command that kills a node (MAE_PL_TEST_CRASH)"
)
def test_a_node_is_lost(uninterrupted, tmp_path):
    job = submit(tmp_path, *RUN, "--epochs", STEPS // 5, "--save_steps", 4, step=0.2)
    reach(tmp_path, random.randrange(10, 60))
    subprocess.run(os.environ["MAE_PL_TEST_CRASH"], shell=True, check=True)
    try:
        wait("SLURM has given the job up", lambda: state(job), 120, until=lambda seen: seen != "RUNNING")
    finally:
        subprocess.run(os.environ["MAE_PL_TEST_REVIVE"], shell=True, check=True, capture_output=True)
    finished(tmp_path, job)
    assert_equal_runs(uninterrupted, tmp_path)


BATCH = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node={tasks} --cpus-per-task=1 --mem=2G --time=30 --requeue --open-mode=append
#SBATCH --output={folder}/submitit/batch/0_log.out --signal={signal}@60
srun --kill-on-bad-exit=1 {command}
"""
TORCHRUN = (
    "bash -c '{python} -m torch.distributed.run --nnodes 2 --nproc_per_node 2 --rdzv_backend c10d "
    "--rdzv_id $SLURM_JOB_ID "
    "--rdzv_endpoint $(scontrol show hostnames $SLURM_JOB_NODELIST | head -1):29511 {main}'"
)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_plain_batch_scripts_requeue_themselves(uninterrupted, tmp_path, launcher):
    (tmp_path / "submitit" / "batch").mkdir(parents=True)
    flags = [*RUN, "--epochs", STEPS // 5, "--output_dir", tmp_path]
    main = " ".join(map(str, [*SLOW[2:], "--direct", *flags]))
    signal = {"srun": "USR2", "torchrun": "TERM"}[launcher]
    command = f"{PYTHON[0]} -u {main}"
    if launcher == "torchrun":
        command = TORCHRUN.format(python=PYTHON[0], main=main)
    script = tmp_path / "run.sh"
    tasks = {"srun": 2, "torchrun": 1}[launcher]
    script.write_text(BATCH.format(folder=tmp_path, tasks=tasks, signal=signal, command=command))
    job = re.search(r"job (\d+)", call("sbatch", script, TEST_STEP="0.15"))[1]
    reach(tmp_path, random.randrange(10, 50))
    call("scancel", f"--signal={signal}", job)
    wait("requeued", lambda: ends(tmp_path), 60, until=lambda text: "is requeued" in text)
    completed(tmp_path, job, 180)
    assert_same(last(uninterrupted), last(tmp_path))
    assert log_lines(uninterrupted) == log_lines(tmp_path) and "continuing" in output(tmp_path)


def test_cancelled_jobs_stay_cancelled(tmp_path):
    job = submit(tmp_path, *RUN, "--epochs", 100, step=0.2)
    reach(tmp_path, 3)
    call("scancel", job)
    wait("cancelled", lambda: state(job), 60, until=lambda seen: seen == "CANCELLED")
    time.sleep(3)
    assert state(job) == "CANCELLED" and "is requeued" not in output(tmp_path)
    assert last(tmp_path)["step"] >= 3, "what was learned is kept"
    assert re.search(r"^\.\s+(stopped|cancelled)", call(*SLOW, "--status", tmp_path), re.M)


def sweep_with_a_bad_point(folder) -> tuple[list, list[str], Path]:
    """The command of a sweep of four points, their names, and the checkpoint that makes one of them fail."""
    flags = shlex.split("--epochs 2 --nodes 1 --ngpus 1 --sweep mask_ratio=0.5,0.75 seed=0,1")
    points = [f"mask_ratio={m},seed={s}" for m in (0.5, 0.75) for s in (0, 1)]
    bad = folder / points[2] / "checkpoint-last.pth"
    bad.parent.mkdir()
    bad.write_bytes(b"")
    return [*SLOW, *CLUSTER, "--job_dir", folder, *RUN, *flags], points, bad


def test_sweep_with_a_failing_point_that_is_submitted_again(tmp_path):
    command, points, bad = sweep_with_a_bad_point(tmp_path)
    text = call(*command)
    assert len(set(re.findall(r"job (\d+)_\d", text))) == 1, "one array"
    folders = [tmp_path / p for p in points]
    ended = {"finished", "failed"}
    wait("all points", lambda: note_states(*folders), until=lambda seen: ended.issuperset(seen))
    shown = call(*SLOW, "--status", tmp_path)
    states = dict(re.findall(r"^(mask\S+)\s+(\w+)", shown, re.M))
    assert states == dict.fromkeys(points, "finished") | {points[2]: "failed"}
    assert "is empty: the run that wrote it was interrupted" in shown
    flags = json.loads((tmp_path / points[1] / "flags.json").read_text())
    assert flags == {"mask_ratio": 0.5, "seed": 1}
    bad.unlink()
    text = call(*command)
    assert text.count("finished, not submitted again") == 3 and len(re.findall(r": job \d+", text)) == 1, text
    wait("the repaired point", lambda: note_states(bad.parent), until=lambda seen: seen == ["finished"])
    assert [len(log_lines(tmp_path / p)) for p in points] == [2, 2, 2, 2]


def test_pretraining_and_follow_ups(tmp_path):
    launcher = [*PYTHON, str(ROOT / "submitit_pretrain.py")]
    run = shlex.split("--epochs 1 --batch_size 50 --nodes 1 --ngpus 1 --sweep pos_label=apl,none")
    chain = shlex.split(
        "--then finetune --epochs 1 --batch_size 100 --warmup_epochs 0 --then linprobe --knn --batch_size 100"
    )
    model = ["--model", "mae_vit_nano_patch8"]
    command = [*launcher, *CLUSTER, "--job_dir", tmp_path, *RUN, *model, *run, *chain]
    text = call(*command)
    jobs = dict(re.findall(r"^(\S+): job (\S+?),? ", text, re.M))
    assert len(jobs) == 6, text
    shown = call("scontrol", "show", "job", jobs["pos_label=apl/finetune"])
    assert f"Dependency=afterok:{jobs['pos_label=apl']}" in shown or "JobState=RUNNING" in shown, shown
    text = call(*command)
    assert text.count("not submitted again") == 6 and not re.search(r": job \d", text), text
    for run in jobs:
        wait(
            f"{run} done",
            lambda run=run: note_states(tmp_path / run),
            240,
            until=lambda seen: seen == ["finished"],
        )
    assert "encoder from" in output(tmp_path)
    status = call(*launcher, "--status", tmp_path)
    assert len(re.findall(r"^pos_label\S+\s+finished", status, re.M)) == 6, status
    assert "knn20" in status and "test_acc1" in status, status


def test_the_follow_up_of_a_failed_run_is_cancelled(tmp_path):
    (tmp_path / "checkpoint-last.pth").write_bytes(b"")
    launcher = [*PYTHON, str(ROOT / "submitit_pretrain.py")]
    flags = shlex.split(
        "--model mae_vit_nano_patch8 --epochs 1 --nodes 1 --ngpus 1 --then finetune --epochs 1"
    )
    text = call(*launcher, *CLUSTER, "--job_dir", tmp_path, *RUN, *flags)
    after = re.search(r"finetune: job (\d+)", text)[1]
    wait("cancelled", lambda: state(after), 90, until=("CANCELLED", "GONE").__contains__)


def test_check(tmp_path):
    launcher = [*PYTHON, str(ROOT / "submitit_pretrain.py")]
    text = call(*launcher, *CLUSTER, "--job_dir", tmp_path / "%j", "--device", "cpu", "--check")
    folder = tmp_path / re.search(r"job (\d+)", text)[1]

    def outputs_of_ranks() -> str:
        return "".join(map(output, folder.glob("check-*")))

    text = wait("four ranks", outputs_of_ranks, until=lambda text: text.count("200 images") == 4)
    assert [p.name for p in tmp_path.glob("[!.]*")] == [folder.name], "%j is the ID of the job"
    assert "is shared by all 4 ranks" in text and re.search(r"all-reduce over 4 ranks: .* GB/s", text)
    nodes = set(re.findall(r"^rank \d: (\w+), cpu", text, re.M))
    assert nodes == {"node1", "node2"} or not shutil.which("sinfo")


def test_more_gpus_than_a_node_has_are_refused(tmp_path):
    text = call(*SLOW, *CLUSTER, "--job_dir", tmp_path, *RUN, "--ngpus", "3", check=False)
    assert "node configuration is not available" in text
