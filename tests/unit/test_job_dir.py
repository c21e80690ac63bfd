"""The small files of a job directory: written as a whole, damaged ones named, and the other runs spared."""

import json
import os
import threading
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest

from util.cluster import job_dir, status
from util.cluster.job import Job, known_note, read_note, write_note
from util.cluster.job_dir import add_job_ids, is_local, read_job_ids, write_flags, write_sweep
from util.cluster.launch import launch
from util.cluster.local import LocalPool
from util.cluster.sweep import Point

# Not JSON, or JSON of another type.
DAMAGED = ["", "{", "[]", "5", '"text"', "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\0\xff"]


def point(folder: Path, name: str) -> Point:
    return Point(name, {"seed": 0}, "main_pretrain", [], str(folder / name))


@pytest.fixture
def no_slurm(monkeypatch):
    """A machine without SLURM."""
    monkeypatch.setattr("util.cluster.slurm.shutil.which", lambda name: None)


@pytest.fixture
def answers(monkeypatch):
    """What SLURM's commands answer, by their names. Accounting is down."""
    texts = {"squeue": "", "sacct": ""}
    monkeypatch.setattr(status, "query", lambda command, *words, **options: texts[command])
    monkeypatch.setattr("util.cluster.status.shutil.which", lambda name: name)
    return texts


def table(folder: Path) -> dict[str, list[str]]:
    """Run -> its columns in the table of `status`, and "warning" -> the warnings below it."""
    lines = status.status(folder).splitlines()[1:]
    rows = {line.split()[0]: line.split(maxsplit=1)[1].split() for line in lines if "warning:" not in line}
    return rows | {"warning": [line for line in lines if line.startswith("warning:")]}


@pytest.fixture
def sweep(tmp_path, no_slurm):
    """Two finished runs with follow-ups, as a launcher leaves them."""
    points = [point(tmp_path, name) for name in ("seed=0", "seed=1")]
    write_sweep(tmp_path, points, [], {"seed": ["0", "1"]})
    write_flags(points)
    for i, run in enumerate(("seed=0", "seed=0/linprobe", "seed=1", "seed=1/linprobe")):
        add_job_ids(tmp_path, {run: str(i)})
        write_note(tmp_path / run, {"state": "finished", "job": str(i), "starts": 1})
        (tmp_path / run / "log.txt").write_text('{"epoch": 0, "train_loss": 0.25}\n')
    return tmp_path


FINISHED = ["finished", "1", "loss", "0.25", "1"]


def test_the_files_of_a_sweep_are_whole_and_no_other_files_are_left(sweep):
    assert {p.name for p in sweep.iterdir()} == {"seed=0", "seed=1", "jobs.json", "sweep.json", ".sweep.lock"}
    assert {p.name for p in (sweep / "seed=0").iterdir()} == {"flags.json", "job.json", "log.txt", "linprobe"}
    assert json.loads((sweep / "seed=0" / "flags.json").read_text()) == {"seed": 0}
    rows = table(sweep)
    assert len(rows) == 5 and rows["warning"] == []
    assert all(rows[run][:5] == FINISHED for run in rows if run != "warning")


@pytest.mark.parametrize("name", ["jobs.json", "sweep.json", "flags.json", "job.json"])
def test_a_full_disk_leaves_the_old_file(sweep, monkeypatch, name):
    folder = sweep
    if name in ("flags.json", "job.json"):
        folder = sweep / "seed=0"
    before = (folder / name).read_bytes()
    names = sorted(os.listdir(folder))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writers = {
        "jobs.json": lambda: add_job_ids(sweep, {"seed=0": "9"}),
        "sweep.json": lambda: write_sweep(sweep, [point(sweep, "seed=2")], [], {}),
        "flags.json": lambda: write_flags([point(sweep, "seed=0")]),
        "job.json": lambda: write_note(folder, {"state": "running"}),
    }
    with pytest.raises(OSError, match="No space left"):
        writers[name]()
    assert (folder / name).read_bytes() == before and sorted(os.listdir(folder)) == names


def test_a_full_disk_does_not_hide_how_a_run_went(tmp_path, monkeypatch, capsys):
    import main_linprobe

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(main_linprobe, "main", lambda args: 0)
    monkeypatch.setattr("util.cluster.job.write_json", full)
    assert Job("main_linprobe", [], str(tmp_path))() == 0
    assert "the state of the run is not noted: [Errno 28] No space left" in capsys.readouterr().err


@pytest.mark.parametrize("content", [*DAMAGED, '{"seed=0": "7"}', '{"seed=0": [7]}', '{"../x": ["7"]}'])
def test_damaged_job_ids_are_never_overwritten(tmp_path, content):
    """Without the IDs, queued runs would be submitted a second time."""
    path = tmp_path / "jobs.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"jobs 8 are submitted, but not noted: {path} "):
        add_job_ids(tmp_path, {"seed=0": "8"})
    with pytest.raises(ValueError, match=r"jobs\.json"):
        LocalPool(
            resources=type("R", (), {"ngpus": 0, "timeout": 1, "max_parallel": 1}), job_dir=str(tmp_path)
        )
    assert path.read_text() == content


@pytest.mark.parametrize(
    "content", [*DAMAGED, "{}", '{"points": [5]}', '{"points": [{"name": "..", "flags": {}}]}']
)
def test_a_damaged_sweep_is_never_overwritten(tmp_path, content):
    path = tmp_path / "sweep.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path} "):
        write_sweep(tmp_path, [point(tmp_path, "seed=1")], [], {})
    assert path.read_text() == content


def test_launchers_that_write_at_once_keep_each_others_jobs(tmp_path):
    def launcher(run: int) -> None:
        for job in range(10):
            add_job_ids(tmp_path, {f"seed={run}": str(job)})

    launchers = [threading.Thread(target=launcher, args=(run,)) for run in range(4)]
    for each in launchers:
        each.start()
    for each in launchers:
        each.join()
    assert read_job_ids(tmp_path) == {f"seed={run}": [str(i) for i in range(10)] for run in range(4)}


@pytest.mark.parametrize("content", [*DAMAGED, '{"seed=0": "7"}'])
def test_status_shows_all_runs_if_job_ids_are_damaged(sweep, content):
    (sweep / "jobs.json").write_text(content)
    rows = table(sweep)
    (warning,) = rows.pop("warning")
    assert str(sweep / "jobs.json") in warning
    assert list(rows) == ["seed=0", "seed=0/linprobe", "seed=1", "seed=1/linprobe"]
    assert all(row[:5] == FINISHED for row in rows.values())


@pytest.mark.parametrize("content", [*DAMAGED, "{}", '{"points": {}}', '{"points": [{"name": "a"}]}'])
def test_status_shows_all_runs_if_the_sweep_is_damaged(sweep, content):
    (sweep / "sweep.json").write_text(content)
    rows = table(sweep)
    (warning,) = rows.pop("warning")
    assert str(sweep / "sweep.json") in warning
    assert list(rows) == ["seed=0", "seed=0/linprobe", "seed=1", "seed=1/linprobe"]


@pytest.mark.parametrize(
    "content", [*DAMAGED, '{"state": 5}', '{"state": "finished", "argv": 3}', '{"starts": "1"}']
)
def test_status_names_a_damaged_note_in_the_row_of_its_run(sweep, content):
    path = sweep / "seed=0" / "job.json"
    path.write_text(content)
    rows = table(sweep)
    assert rows["seed=0"][0] == "damaged" and str(path) in rows["seed=0"]
    assert rows["seed=1"][:5] == FINISHED and rows["warning"] == []
    with pytest.raises(ValueError, match=f"{path} "):
        read_note(path.parent)


def test_a_run_with_a_damaged_note_starts_again_and_says_why(tmp_path, monkeypatch, capsys):
    import main_linprobe

    monkeypatch.setattr(main_linprobe, "main", lambda args: 0)
    (tmp_path / "job.json").write_text("[]")
    job = Job("main_linprobe", [], str(tmp_path))
    assert not job.is_finished() and known_note(tmp_path) == {}
    warning = capsys.readouterr().err
    assert str(tmp_path / "job.json") in warning and warning.count("\n") == 1
    assert job() == 0 and job.is_finished() and read_note(tmp_path)["starts"] == 1


@pytest.mark.parametrize(
    "line",
    ["[]", "5", '{"train_loss": 1}', '{"epoch": "0"}', '{"epoch": 1, "train_loss": "NaN"}', '{"epoch": -1}']
    + [
        '{"epoch": 1, "train_loss": ' + "9" * 400 + "}",
        '{"epoch": ' + "9" * 5000 + "}",
        "[" * 100_000,
        "\xff",
    ],
)
def test_status_names_damaged_lines_of_a_log(sweep, line):
    path = sweep / "seed=0" / "log.txt"
    path.write_text(path.read_text() + line + "\n")
    rows = table(sweep)
    (warning,) = rows["warning"]
    assert warning.startswith(
        f"warning: {path} has damaged lines, which are left out (1, the first is line 2: "
    )
    assert rows["seed=0"][:5] == rows["seed=1"][:5] == FINISHED


def test_control_characters_do_not_reach_the_terminal(sweep):
    note = {"state": "failed", "error": "ValueError: \x1b[31m\u202e\x9b", "job": "\x1b"}
    write_note(sweep / "seed=0", note)
    (sweep / "jobs.json").write_text('{"a\\u001b": ["7"]}')
    shown = status.status(sweep)
    assert "ValueError: \\x1b[31m\\u202e\\x9b" in shown and "a\\x1b" in shown
    assert all(character == "\n" or character.isprintable() for character in shown)


@pytest.mark.parametrize("parent", ["failed", "stopped", "damaged"])
def test_a_follow_up_of_a_failed_run_is_cancelled_while_accounting_is_down(tmp_path, answers, parent):
    add_job_ids(tmp_path, {"": "7"})
    add_job_ids(tmp_path, {"linprobe": "8"})
    write_note(tmp_path, {"state": parent, "job": "7", "starts": 1})
    if parent == "damaged":
        (tmp_path / "job.json").write_text("[]")
    assert [table(tmp_path)[run][0] for run in (".", "linprobe")] == [parent, "cancelled"]
    # In the queue, it may still start.
    answers["squeue"] = "8 PENDING"
    assert table(tmp_path)["linprobe"][0] == "pending"
    # Accounting knows better.
    answers["squeue"] = ""
    answers["sacct"] = "8|TIMEOUT"
    assert table(tmp_path)["linprobe"][0] == "timeout"


def test_a_follow_up_is_cancelled_although_an_earlier_one_has_finished(tmp_path, answers):
    add_job_ids(tmp_path, {"": "9", "linprobe": "8"})
    add_job_ids(tmp_path, {"linprobe": "10"})
    write_note(tmp_path, {"state": "failed", "job": "9"})
    write_note(tmp_path / "linprobe", {"state": "finished", "job": "8"})
    assert table(tmp_path)["linprobe"][0] == "cancelled"


@pytest.mark.parametrize("parent", ["finished", "running"])
def test_a_follow_up_that_may_have_started_is_not_called_cancelled(tmp_path, answers, parent):
    add_job_ids(tmp_path, {"": "7", "linprobe": "8"})
    write_note(tmp_path, {"state": parent, "job": "7"})
    assert table(tmp_path)["linprobe"][0] == "unknown"


def test_nothing_is_called_cancelled_while_slurm_does_not_answer(tmp_path, monkeypatch):
    def no_answer(command, *words, required=False):
        if required:
            raise ValueError("SLURM does not answer squeue (timed out): try again")
        return ""

    monkeypatch.setattr(status, "query", no_answer)
    monkeypatch.setattr("util.cluster.status.shutil.which", lambda name: name)
    add_job_ids(tmp_path, {"": "7", "linprobe": "8"})
    write_note(tmp_path, {"state": "failed", "job": "7"})
    rows = table(tmp_path)
    assert rows["linprobe"][0] == "unknown" and "SLURM does not answer squeue" in rows["warning"][0]


def test_the_process_id_stands_for_a_job_id(tmp_path, monkeypatch):
    """SUBMITIT_LOCAL_NTASKS without an executor, and a folder that is named after the job."""
    import main_linprobe

    for name in ("SUBMITIT_EXECUTOR", "SUBMITIT_LOCAL_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SUBMITIT_LOCAL_NTASKS", "2")
    monkeypatch.setattr(main_linprobe, "main", lambda args: 0)
    job = Job("main_linprobe", ["--log_dir", str(tmp_path / "tb-%j")], str(tmp_path / "%j"))
    assert job() == 0
    folder = tmp_path / str(os.getpid())
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert read_note(folder)["argv"] == ["--log_dir", str(tmp_path / f"tb-{os.getpid()}")]
    # The flags of the same command hold %j again.
    assert Job("main_linprobe", ["--log_dir", str(tmp_path / "tb-%j")], str(folder)).is_finished()


def test_status_of_a_folder_named_after_a_job_asks_for_the_id(tmp_path):
    with pytest.raises(ValueError, match=r"nothing was submitted there .* Write the ID of a job for %j"):
        status.status(tmp_path / "%j")


def test_names_of_files_are_locked_while_they_change(tmp_path, monkeypatch):
    locks = []
    real = job_dir.locked
    monkeypatch.setattr(job_dir, "locked", lambda path: locks.append(path.name) or real(path))
    add_job_ids(tmp_path, {"": "1"})
    write_sweep(tmp_path, [point(tmp_path, "seed=0")], [], {})
    assert locks == [".sweep.lock"] * 2


def test_local_jobs_are_not_looked_up_in_slurm(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(status, "query", lambda *words, **options: asked.append(words[0]) or "")
    add_job_ids(tmp_path, {"": "7", "linprobe": "8"})
    write_note(tmp_path, {"state": "finished", "job": "7"})
    for job in "78":
        (tmp_path / "submitit" / job).mkdir(parents=True)
        (tmp_path / "submitit" / job / f"{job}_submitted.pkl").touch()
    assert table(tmp_path)["."][0] == "finished" and not asked
    # With one of SLURM among them.
    (tmp_path / "submitit" / "8" / "8_submission.sh").touch()
    assert [is_local(tmp_path, job) for job in ("7", "8", "9")] == [True, False, False]
    table(tmp_path)
    assert asked == ["squeue", "sacct"]


def test_slurm_without_a_configuration_is_no_slurm(tmp_path, monkeypatch, capsys):
    answers = {"config": "scontrol: fatal: Could not establish a configuration source"}
    monkeypatch.setattr("util.cluster.slurm.shutil.which", lambda name: name)
    monkeypatch.setattr(
        "util.cluster.slurm.subprocess.run",
        lambda command, **options: CompletedProcess(command, 1, "", answers[command[-1]]),
    )
    command = ["--job_dir", str(tmp_path / "a"), "--data_path", str(tmp_path)]
    assert launch("main_pretrain", command) == 2
    error = capsys.readouterr().err
    assert "no SLURM" in error and "--cluster local" in error and "again" not in error
    # A busy controller may answer later.
    answers["config"] = "slurm_load_ctl_conf error: Socket timed out"
    assert launch("main_pretrain", command) == 2
    error = capsys.readouterr().err
    assert error.index("try again") < error.index("--cluster local")


@pytest.mark.parametrize(
    "words", [["--job_dir", "A", "--output_dir", "./A/"], ["--job_dir=%j", "--output-dir=%j"]]
)
def test_the_same_folder_may_be_named_twice(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    command = ["--cluster", "local", "--dry_run", "--data_path", str(tmp_path), *words]
    assert launch("main_pretrain", command) == 0
    out = capsys.readouterr().out
    assert f"--output_dir {tmp_path}" in out and "note: " not in out
    # SERE's own flags have a default, which is not given.
    assert launch("main_sere", [*command[:5], "--arch", "vit_small", "--job_dir", "A"]) == 0


@pytest.mark.parametrize("words, noted", [(["--job_dir", "A", "@r.args"], True), (["--output_dir="], False)])
def test_a_recipe_may_name_another_folder(tmp_path, monkeypatch, capsys, words, noted):
    monkeypatch.chdir(tmp_path)
    Path("r.args").write_text("--output_dir B")
    # As a try of a command for many nodes.
    command = [*words, "--nodes", "2", "--cluster", "debug", "--dry_run", "--data_path", str(tmp_path)]
    assert launch("main_pretrain", command) == 0
    out = capsys.readouterr().out
    assert ("note: --output_dir B is not used: a submitted run writes to --job_dir A\n" in out) == noted
    assert f"--output_dir {tmp_path}" in out and "/B" not in out


@pytest.mark.parametrize("sweep", [[], ["--sweep", "seed=0,1"]])
def test_more_processes_than_gpus_are_refused_before_they_start(tmp_path, monkeypatch, capsys, sweep):
    started = []
    pool = SimpleNamespace(run=lambda chains: 0)
    monkeypatch.setattr("util.cluster.local.LocalPool", lambda *words: started.append(words) or pool)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    command = ["--cluster", "local", "--job_dir", str(tmp_path / "a"), "--data_path", str(tmp_path)]
    command += sweep
    assert launch("main_pretrain", [*command, "--ngpus", "3"]) == 2
    error = capsys.readouterr().err
    assert "--ngpus 3 needs 3 GPUs" in error and "torch sees 2" in error and "--device cpu" in error
    assert not started and not os.listdir(tmp_path)
    for words in (["--ngpus", "2"], ["--ngpus", "3", "--device", "cpu"], []):
        assert launch("main_pretrain", [*command, *words]) == 0
    assert len(started) == 3
