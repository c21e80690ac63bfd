"""Submissions to a SLURM that shell scripts imitate: limits, refusals, and what reaches the sbatch script."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from util.cluster import slurm_jobs, sweep
from util.cluster.job_dir import is_local
from util.cluster.launch import launch

RUN = shlex.split("--model mae_vit_nano_patch8 --input_size 16 --device cpu --num_workers 0 --epochs 1")
# Keeps each script, and prints the ID of a job until $LIMIT jobs are submitted.
SBATCH = """
n=$(ls {scripts} | wc -l)
[ $n -lt ${{LIMIT:-1000}} ] || {{ echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }}
cp "$1" {scripts}/$n.sh
echo Submitted batch job $((n + 100))
"""
SCONTROL = 'echo "MaxArraySize            = ${ARRAYS:-1001}"; echo "MaxJobCount             = ${JOBS:-10000}"'


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """Put imitations of SLURM's commands on PATH -> the folder of the submitted scripts."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    commands = tmp_path / "bin"
    commands.mkdir()
    texts = {
        "sbatch": SBATCH.format(scripts=scripts),
        "scontrol": SCONTROL,
        "squeue": "",
        "sacct": "",
        "srun": "",
    }
    for name, text in texts.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    return scripts


def options(fake: Path) -> list[dict[str, str]]:
    """The options of sbatch in each submitted script, in order."""
    paths = sorted(fake.iterdir(), key=lambda path: int(path.stem))
    return [dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", path.read_text(), re.M)) for path in paths]


def points(folder: Path) -> list[Path]:
    return sorted(folder.glob("seed=*"))


def test_more_points_than_an_array_may_have_are_several_arrays(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("ARRAYS", "4")
    command = [*RUN, "--job_dir", str(tmp_path / "jobs"), "--sweep", "seed=0,1,2,3,4,5,6,7,8"]
    assert launch("main_pretrain", [*command, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert (
        "#SBATCH --array=0-3%4\n" in shown and "with 4 more points" in shown and "with 1 more points" in shown
    )
    assert launch("main_pretrain", command) == 0
    assert [each.get("array") for each in options(fake)] == ["0-3%4", "0-3%4", None]
    assert all("dependency" not in each for each in options(fake))
    job_ids = json.loads((tmp_path / "jobs" / "jobs.json").read_text())
    assert [job_ids[f"seed={i}"] for i in (0, 3, 4, 7, 8)] == [
        ["100_0"],
        ["100_3"],
        ["101_0"],
        ["101_3"],
        ["102"],
    ]
    assert all((folder / "flags.json").exists() for folder in points(tmp_path / "jobs"))
    assert not any(is_local(tmp_path / "jobs", jobs[0]) for jobs in job_ids.values())


def test_a_limit_on_parallel_runs_holds_over_several_arrays(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("ARRAYS", "3")
    flags = shlex.split("--sweep seed=0,1,2,3,4,5,6 --max_parallel 2 --slurm dependency=after:5 qos=low")
    assert launch("main_pretrain", [*RUN, "--job_dir", str(tmp_path / "jobs"), *flags]) == 0
    scripts = options(fake)
    assert [each.get("array") for each in scripts] == ["0-2%2", "0-2%2", None]
    assert [each["dependency"] for each in scripts] == ["after:5", "afterany:100", "afterany:101"]
    assert [each["qos"] for each in scripts] == ["low"] * 3


def test_more_jobs_than_the_cluster_holds_are_refused_before_anything_is_written(
    tmp_path, fake, monkeypatch, capsys
):
    monkeypatch.setenv("JOBS", "5")
    flags = shlex.split("--sweep seed=0,1,2 --then linprobe --knn")
    assert launch("main_pretrain", [*RUN, "--job_dir", str(tmp_path / "jobs"), *flags]) == 2
    error = capsys.readouterr().err
    assert "makes 6 jobs, but the cluster holds 5 at a time (its MaxJobCount)" in error and "--only" in error
    assert not (tmp_path / "jobs").exists() and options(fake) == []


def test_a_refused_submission_leaves_no_folders(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("LIMIT", "0")
    folder = tmp_path / "jobs"
    command = [*RUN, "--job_dir", str(folder), "--sweep", "seed=0,1,2"]
    assert launch("main_pretrain", command) == 2
    error = capsys.readouterr().err
    assert "SLURM refuses the job" in error and "QOSMaxSubmitJobPerUserLimit" in error
    assert (
        points(folder) == [] and list(folder.glob("**/*.pkl")) == [] and not (folder / "jobs.json").exists()
    )
    # The same command again submits all of them.
    monkeypatch.setenv("LIMIT", "9")
    assert launch("main_pretrain", command) == 0
    assert len(points(folder)) == 3 and [each["array"] for each in options(fake)] == ["0-2%3"]


def test_what_is_submitted_before_a_refusal_is_not_submitted_again(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("ARRAYS", "2")
    monkeypatch.setenv("LIMIT", "1")
    folder = tmp_path / "jobs"
    command = [*RUN, "--job_dir", str(folder), "--sweep", "seed=0,1,2,3"]
    assert launch("main_pretrain", command) == 2
    assert "2 jobs are submitted; the same command again submits the others" in capsys.readouterr().err
    assert [path.name for path in points(folder)] == ["seed=0", "seed=1"]
    assert len(list(folder.glob("submitit/*/*.pkl"))) == 2 and list(folder.glob("submitit/*.pkl")) == []
    monkeypatch.setenv("LIMIT", "9")
    (fake.parent / "bin" / "squeue").write_text("#!/bin/sh\necho 100_0 RUNNING; echo 100_1 PENDING\n")
    assert launch("main_pretrain", command) == 0
    assert capsys.readouterr().out.count("queued, not submitted again") == 2
    assert list(json.loads((folder / "jobs.json").read_text())) == [f"seed={i}" for i in range(4)]


@pytest.mark.parametrize("content", ["[]", "{", '{"seed=0": "7"}'])
def test_nothing_is_submitted_over_damaged_job_ids(tmp_path, fake, capsys, content):
    path = tmp_path / "jobs" / "jobs.json"
    path.parent.mkdir()
    path.write_text(content)
    command = [*RUN, "--job_dir", str(path.parent), "--sweep", "seed=0,1"]
    for cluster in ("slurm", "local"):
        assert launch("main_pretrain", [*command, "--cluster", cluster]) == 2
        assert f"error: {path} " in capsys.readouterr().err
    assert path.read_text() == content and options(fake) == []


def test_a_follow_up_waits_for_its_run_whatever_else_jobs_wait_for(tmp_path, fake):
    flags = shlex.split("--slurm dependency=after:5 --then linprobe --knn")
    assert launch("main_pretrain", [*RUN, "--job_dir", str(tmp_path / "jobs"), *flags]) == 0
    first, second = options(fake)
    assert first["dependency"] == "after:5" and second["dependency"] == "afterok:100"
    assert second["kill-on-invalid-dep"] == "yes"


def test_a_machine_without_slurm_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slurm_jobs.shutil, "which", lambda name: None)
    assert launch("main_pretrain", [*RUN, "--job_dir", str(tmp_path / "jobs"), "--sweep", "seed=0,1"]) == 2
    assert "has no SLURM (no sbatch and srun on PATH): give --cluster local" in capsys.readouterr().err
    assert not (tmp_path / "jobs").exists()


NEWLINE = "a\n#SBATCH --wrap=evil"


@pytest.mark.parametrize(
    "flag", ["--job_dir", "--partition", "--qos", "--account", "--constraint", "--comment"]
)
@pytest.mark.parametrize("text", [NEWLINE, "a\rb", "a\x1b[31m", "a\u2028b", "a\u202eb", "a\x85b"])
def test_texts_cannot_add_lines_to_the_script(tmp_path, fake, monkeypatch, capsys, flag, text):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--dry_run"]):
        assert launch("main_pretrain", [*RUN, "--job_dir", "jobs", flag, text, *more]) == 2
        error = capsys.readouterr().err
        assert f"{flag} holds a line break or another control character" in error
        assert error.splitlines()[0].isprintable()
    assert options(fake) == [] and sorted(os.listdir(tmp_path)) == ["bin", "scripts"]


@pytest.mark.parametrize(
    "word, message",
    [
        (f"exclude={NEWLINE}", "--slurm exclude holds a line break"),
        (f"x\n#SBATCH --wrap={NEWLINE}", "takes options of sbatch such as exclude=node7, found x\\n#SBATCH"),
        ("=node7", "takes options of sbatch"),
        ("Exclude=1", "takes options of sbatch"),
        ("a b=1", "takes options of sbatch"),
        ("array=0-9", "--slurm array: the launcher sets this option itself"),
        ("output=x", "--slurm output: the launcher sets this option itself"),
        ("open-mode=truncate", "--slurm open-mode: the launcher sets this option itself"),
        ("parsable", "--slurm parsable: sbatch would not report a job"),
        ("test-only", "--slurm test-only: sbatch would not report a job"),
    ],
)
def test_only_options_of_sbatch_reach_the_script(tmp_path, fake, capsys, word, message):
    assert launch("main_pretrain", [*RUN, "--job_dir", str(tmp_path / "jobs"), "--slurm", word]) == 2
    assert message in capsys.readouterr().err
    assert options(fake) == [] and not (tmp_path / "jobs").exists()


def test_texts_of_several_words_reach_sbatch_as_they_are(tmp_path, fake):
    words = ["--comment", "it's $HOME `id` #1", "--slurm", "mail-user=a b", "exclusive"]
    assert launch("main_pretrain", [*RUN, "--job_dir", str(tmp_path / "a b"), *words]) == 0
    (script,) = options(fake)
    assert shlex.split(script["comment"]) == ["it's $HOME `id` #1"]
    assert shlex.split(script["mail-user"]) == ["a b"] and script["exclusive"] == ""
    assert shlex.split(script["output"]) == [f"{tmp_path}/a b/submitit/%j/%j_0_log.out"]


@pytest.mark.parametrize("name, pattern", [("%A", "%A"), ("50%%", "%%"), ("%8j", "%8j"), ("a\\b", "\\")])
def test_patterns_that_sbatch_would_replace_are_refused(tmp_path, fake, capsys, name, pattern):
    assert launch("main_pretrain", [*RUN, "--job_dir", str(tmp_path / name)]) == 2
    assert f"{pattern} has a meaning for sbatch" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "words",
    ["--nodes 0", "--ngpus -1", "--timeout 0", "--max_parallel -1", "--mem_gb nan", "--cpus_per_task 0"],
)
def test_counts_of_resources_are_checked(words, capsys):
    """With a negative number of slots, runs on this machine would wait for ever."""
    with pytest.raises(SystemExit, match="2"):
        launch("main_pretrain", shlex.split(f"--dry_run {words}"))
    assert "must" in capsys.readouterr().err


# The IDs, because a test with "slurm" in its name needs a cluster.
@pytest.mark.parametrize("cluster", ["slurm", "local", "debug"], ids=["jobs", "processes", "here"])
def test_no_folder_is_named_after_a_placeholder(tmp_path, fake, monkeypatch, capsys, cluster):
    import main_pretrain

    monkeypatch.setattr(main_pretrain, "main", lambda args: 0)
    monkeypatch.setattr("util.cluster.local.POLL_SECONDS", 0.01)
    flags = ["--cluster", cluster, "--job_dir", str(tmp_path / "jobs" / "run-%j")]
    if cluster == "local":
        # The process imports nothing of this test: wrong data end it at once.
        flags += ["--ngpus", "0", "--data_path", str(tmp_path / "none")]
    expected = {"slurm": ["run-100"], "debug": [f"run-{os.getpid()}"]}
    assert launch("main_pretrain", [*RUN, *flags]) == int(cluster == "local")
    # submitit keeps a link to the script of a job beside its folder.
    names = [path.name for path in (tmp_path / "jobs").glob("[!.]*") if path.name != "submitit"]
    assert all(re.fullmatch(r"run-\d+|\d+", name) for name in names), names
    assert len(names) == 1 and expected.get(cluster, names) == names
    assert not list(tmp_path.glob("**/*%j*"))
    assert "%j" not in capsys.readouterr().out


def test_a_dry_run_explains_placeholders(tmp_path, capsys):
    flags = ["--cluster", "local", "--job_dir", str(tmp_path / "%j"), "--dry_run"]
    assert launch("main_pretrain", [*RUN, *flags]) == 0
    assert "# %j stands for the ID of the job: replace it" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def plan(*words: str, chain: str = "", job_dir: str = "/jobs") -> list[sweep.Point]:
    return sweep.plan("main_pretrain", RUN, list(words), shlex.split(chain), job_dir)


def test_equal_points_are_one():
    (point,) = plan("lr=1e-3,0.001", "mask_ratio=.75,0.75", chain="--then linprobe --knn")
    assert point.name == "lr=1e-3,mask_ratio=.75" and len(point.then) == 1
    assert point.equal == [
        f"lr={a},mask_ratio={b}" for a, b in (("1e-3", "0.75"), ("0.001", ".75"), ("0.001", "0.75"))
    ]
    assert [p.name for p in plan("seed=0,1,00,+1,1", "norm_pix_loss=true,true")] == [
        f"seed={seed},norm_pix_loss=true" for seed in (0, 1)
    ]
    assert [p.name for p in plan("crop_scale=0.2 1,0.2 1.0,0.20 1")] == ["crop_scale=0.2_1"]


def test_equal_points_are_printed_and_can_be_selected(tmp_path, capsys):
    flags = ["--job_dir", str(tmp_path), "--cluster", "local", "--dry_run", "--sweep", "lr=1e-3,0.001,2"]
    assert launch("main_pretrain", [*RUN, *flags, "--only", "lr=0.001"]) == 0
    shown = capsys.readouterr().out
    assert "lr=1e-3: stands for equal points too, lr=0.001\n" in shown
    assert shown.count("python main_pretrain.py") == 1 and "--lr 1e-3 " in shown


@pytest.mark.parametrize(
    "words, message",
    [
        (["help=true"], "`sweep` help: the flag cannot be swept, it prints a text, and nothing runs"),
        (["h=true"], "`sweep` h: the flag cannot be swept, it prints a text, and nothing runs"),
        (["--output-dir=a,b"], "`sweep` output_dir: the flag cannot be swept, the launcher sets it"),
        (["lr+output_dir=1+a"], "`sweep` output_dir: the flag cannot be swept"),
        (["dry_run=true"], "`sweep` dry_run: the flag cannot be swept, such a run trains nothing"),
        (["version=1"], "unknown flag --version"),
        (["seed=1", "seed=2"], "has two lists of values for seed"),
        (["seed=1", "lr+seed=1+2"], "has two lists of values for seed"),
        (["lr=1e-3 --help"], "`sweep` lr=1e-3 --help: --help is no value, but a flag or a recipe"),
        (["lr=1 -h"], "lr=1 -h: -h is no value"),
        (["lr=@recipe"], "@recipe is no value"),
        (["data_path=it's"], "`sweep` data_path=it's: the value has an open quote"),
        ([f"data_path={'x' * 250}"], "a folder of 260 bytes, but file systems allow 255"),
        (["data_path=a/b,a_b"], "names a point twice: data_path=a_b"),
    ],
)
def test_flags_that_cannot_be_swept_are_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(*words)


@pytest.mark.parametrize("flag", ["--finetune x", "--resume x", "--output-dir x", "--output_dir=x"])
def test_flags_that_the_launcher_sets_are_refused_for_follow_ups(flag):
    with pytest.raises(ValueError, match=r"`then` linprobe sets `\w+`, which the launcher sets"):
        plan(chain=f"--then linprobe {flag}")
    with pytest.raises(ValueError, match=r"its flags are those of python main_finetune.py --help"):
        plan(chain="--then linprobe --then finetune --help")


@pytest.mark.parametrize("before", [[], ["--then", "finetune"]])
def test_a_recipe_that_cannot_be_read_is_one_line_anywhere(tmp_path, capsys, before):
    recipe = tmp_path / "quote.args"
    recipe.write_text('--epochs 3\n--model "x\n')
    with pytest.raises(SystemExit, match="2"):
        launch("main_pretrain", [*before, f"@{recipe}"])
    error = capsys.readouterr().err
    assert error.endswith(
        f"error: recipe {recipe}, line 2: an open quote. Close it, or put a backslash before it\n"
    )
    assert error.count("\n") == 1


def test_an_empty_status_submits_nothing(tmp_path, fake, monkeypatch, capsys):
    """Such as that of an unset variable."""
    monkeypatch.chdir(tmp_path)
    for words in (["--status", ""], ["--status="]):
        assert launch("main_pretrain", [*RUN, *words]) == 2
        assert "--status is empty: give the job directory" in capsys.readouterr().err
    assert options(fake) == [] and not (tmp_path / "jobs").exists()


def test_a_newline_in_a_swept_value_is_not_in_the_name(tmp_path):
    (point,) = plan("data_path='a\n#SBATCH \x1b'")
    assert point.name == "data_path=_a__SBATCH___" and point.flags == {"data_path": "a\n#SBATCH \x1b"}
