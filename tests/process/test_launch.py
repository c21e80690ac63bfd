"""The launchers without a cluster: planning, local runs, follow-ups, status, and the errors."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from layers.sizes import classifier_names
from processes import ROOT, environment, log_lines
from util.cluster import slurm, sweep
from util.cluster.job import Job, read_note, write_note
from util.cluster.job_dir import is_local, locked, read_job_ids
from util.cluster.launch import launch, report_stale
from util.cluster.status import last_line, state_of, status
from util.flags import ending
from util.flags.parser import given_in
from util.weights.defaults import as_stored
from util.weights.types import Checkpoint

TINY_MODEL = shlex.split(
    "--model mae_vit_nano_patch8 --input_size 16 --device cpu --num_workers 0 --epochs 1 --batch_size 100 "
    "--warmup_epochs 0 --picture_epochs 1000"
)


def launcher(*argv, main="pretrain") -> tuple[int, str]:
    """Run submitit_*.py as a process -> exit code, output."""
    done = subprocess.run(
        [sys.executable, f"submitit_{main}.py", *map(str, argv)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def plan(*rest, words=(), chain=(), job_dir="/jobs"):
    return sweep.plan("main_pretrain", list(rest), list(words), list(chain), job_dir)


def test_every_combination_with_its_own_directory_and_types():
    points = plan(
        "--seed", "5", words=["mask_ratio=0.5,0.75", "norm-pix-loss=true,false", "crop_scale=0.2 1.0"]
    )
    assert [p.name for p in points] == [
        f"mask_ratio={m},norm_pix_loss={n},crop_scale=0.2_1.0"
        for m in ("0.5", "0.75")
        for n in ("true", "false")
    ]
    assert points[2].flags == {"mask_ratio": 0.75, "norm_pix_loss": True, "crop_scale": [0.2, 1.0]}
    words = shlex.split("--seed 5 --mask_ratio 0.75 --norm_pix_loss --crop_scale 0.2 1.0 --output_dir")
    assert points[2].argv == [*words, points[2].folder]
    assert points[2].folder == "/jobs/" + points[2].name
    alone = plan("--seed", "5")
    assert [(p.name, p.folder) for p in alone] == [("", "/jobs")]


@pytest.mark.parametrize(
    "main, rest, switch, dest, values",
    [
        # As a recipe sets it.
        ("main_pretrain", ["--norm-pix-loss"], "norm_pix_loss", "norm_pix_loss", [True, False]),
        # On by default.
        ("main_sere", [], "norm_last_layer", "norm_last_layer", [True, False]),
        ("main_linprobe", ["--global_pool"], "global_pool", "pool", ["avg", None]),
    ],
)
def test_switches_are_swept_off_too(main, rest, switch, dest, values):
    points = sweep.plan(main, rest, [f"{switch}=true,false"], [], "/jobs")
    parsed = [getattr(sweep.parse_main(main, p.argv), dest) for p in points]
    assert parsed == [p.flags[switch] for p in points] == values


def test_flags_that_move_together():
    points = plan(words=["sr_spatial+sr_channel=0+0,0.2+0.5", "pos_label=apl+rpl,none"])
    assert [p.name for p in points] == [
        f"sr_spatial={s},sr_channel={c},pos_label={label}"
        for s, c in (("0", "0"), ("0.2", "0.5"))
        for label in ("apl+rpl", "none")
    ]
    assert points[2].flags == {"sr_spatial": 0.2, "sr_channel": 0.5, "pos_label": "apl+rpl"}
    with pytest.raises(ValueError, match=re.escape("sr_spatial+sr_channel=0.2: 2 flags move together")):
        plan(words=["sr_spatial+sr_channel=0+0,0.2"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["mask_ration=0.5"], "unknown flag --mask_ration; did you mean --mask_ratio"),
        (["mask_ratio=0.5,x"], "--mask_ratio: takes a number, found 'x'"),
        (["pos_label=apl,abc"], "invalid choice: 'abc'"),
        (["norm_pix_loss=1,0"], "sweep over true,false"),
        (["mask_ratio"], "FLAG=A,B,C"),
        (["data_path=a/b,a_b"], "names a point twice: data_path=a_b"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_starts(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(words=words)


def test_follow_ups_inherit_model_and_data():
    rest = shlex.split("--model mae_vit_base_patch16_dec512d8b --data_path D --input_size 96 64")
    chain = shlex.split("--then finetune --epochs 3 --then linprobe --knn --data_path E --then finetune")
    (p,) = plan(*rest, chain=chain)
    assert [(x.name, x.main) for x in p.then] == [
        ("finetune", "main_finetune"),
        ("linprobe", "main_linprobe"),
        ("finetune-2", "main_finetune"),
    ]
    args = sweep.parse_main("main_finetune", p.then[0].argv)
    assert (args.model, args.data_path) == ("vit_base_patch16", "D")
    assert (args.input_size, args.epochs) == ([96, 64], 3)
    assert args.finetune == "/jobs/checkpoint-last.pth" and args.output_dir == "/jobs/finetune"
    assert sweep.parse_main("main_linprobe", p.then[1].argv).data_path == "E"


def test_wrong_follow_ups_are_refused():
    with pytest.raises(ValueError, match="leave out %j"):
        plan(words=["seed=1,2"], job_dir="/jobs/%j")
    with pytest.raises(ValueError, match="finetune or linprobe"):
        plan(chain=["--then", "evaluate"])
    with pytest.raises(ValueError, match="unknown flag --epoch; did you mean --epochs"):
        plan(chain=["--then", "finetune", "--epoch", "3"])


def test_follow_ups_have_the_seed_of_their_run():
    points = plan(words=["seed=3,4"], chain=["--then", "finetune", "--then", "linprobe", "--seed", "7"])
    seeds = [[sweep.parse_main(x.main, x.argv).seed for x in p.then] for p in points]
    assert seeds == [[3, 7], [4, 7]]


def test_flags_of_a_follow_up_take_precedence_even_if_they_are_the_defaults():
    rest = shlex.split("--input_size 128 --patch_size 32 --pos_tokens full --seed 3 --output_dir elsewhere")
    chain = shlex.split("--then finetune --input_size 224 --seed 0 --model vit_large_patch16 --then linprobe")
    (p,) = plan(*rest, chain=chain)
    first, second = (sweep.parse_main(x.main, x.argv) for x in p.then)
    assert (first.input_size, first.seed, first.model) == ([224], 0, "vit_large_patch16")
    assert (first.patch_size, first.pos_tokens) == ([32], "full")
    assert (second.patch_size, second.input_size) == ([32], [128])
    assert first.finetune == second.finetune == "/jobs/checkpoint-last.pth"
    assert sweep.parse_main("main_pretrain", p.argv).output_dir == "/jobs", "where the follow-ups look for it"


@pytest.mark.parametrize(
    "given, own, channels, in_chans, bands",
    [
        # Alone, and with the number of bands in the files.
        ("--channels 2 1 0", "", [2, 1, 0], 3, None),
        ("--channels 7 2 0 --in_chans 10", "", [7, 2, 0], 3, 10),
        # The checkpoint says how many: the flags of its run need not.
        ("", "", [7, 2, 0], 3, 10),
        ("--in_chans 4", "", None, 4, None),
        ("--channels 7 2 0 --in_chans 10", "--channels 1 2 3 4", [1, 2, 3, 4], 4, 10),
        ("--channels 7 2 0 --in_chans 10", "--channels 1 2 --data_path E", [1, 2], 2, None),
        ("--channels 7 2 0 --in_chans 10", "--channels 0 5 --in_chans 6", [0, 5], 2, 6),
        ("--channels 7 2 0 --in_chans 10", "--in_chans 5", None, 5, None),
        ("--in_chans 4", "--channels 0 1 2", [0, 1, 2], 3, 4),
    ],
)
@pytest.mark.parametrize("kind", ["finetune", "linprobe"])
def test_follow_ups_read_the_bands_of_their_run(given, own, channels, in_chans, bands, kind):
    (p,) = plan("--model", "mae_vit_pico_patch8", *given.split(), chain=["--then", kind, *own.split()])
    stored = vars(sweep.parse_main("main_pretrain", p.argv))
    if not given:
        # The run takes them from a checkpoint of its own.
        stored |= dict(in_chans=in_chans, channels=channels, bands=bands)
    flags = sweep.parse_main(p.then[0].main, p.then[0].argv)
    settled = as_stored(vars(flags), given_in(flags), Checkpoint("x.pth", {}, stored), classifier_names())
    assert (settled["channels"], settled["in_chans"], settled["bands"]) == (channels, in_chans, bands)
    assert settled["model"] == "vit_pico_patch8"


def test_follow_ups_take_what_their_run_took_from_a_checkpoint():
    """A run with `init_from` has the model and the size of that checkpoint, and not the defaults."""
    (p,) = plan("--init_from", "x.pth", chain=["--then", "finetune"])
    stored = dict(model="mae_vit_pico_patch8", input_size=[32], in_chans=4, alpha="white", exif="apply")
    flags = sweep.parse_main("main_finetune", p.then[0].argv)
    settled = as_stored(vars(flags), given_in(flags), Checkpoint("x.pth", {}, stored), classifier_names())
    assert stored | {"model": "vit_pico_patch8"} == {name: settled[name] for name in stored}


def test_follow_ups_read_images_as_their_run_does():
    rest = shlex.split("--data_path D --val_split valid --class_depth 2 --exif apply --data_cache C")
    (p,) = plan(*rest, "--alpha", "white", chain=["--then", "finetune", "--then", "linprobe"])
    for point in p.then:
        flags = sweep.parse_main(point.main, point.argv)
        assert (flags.data_path, flags.val_split, flags.class_depth) == ("D", "valid", 2)
        assert (flags.exif, flags.alpha, flags.data_cache) == ("apply", "white", "C")
        # The values that become 0 and 1 are in the checkpoint.
        assert flags.range is None
    chain = shlex.split("--then finetune --data_path E --then finetune --val_share 0.2 --then linprobe")
    (p,) = plan("--data_path", "D", "--val_share", "0.1", "--class_depth", "2", chain=chain)
    layouts = [sweep.parse_main(x.main, x.argv) for x in p.then]
    assert [(x.data_path, x.val_share, x.class_depth) for x in layouts] == [
        ("E", 0.0, None),
        ("D", 0.2, 2),
        ("D", 0.1, 2),
    ]
    (p,) = plan(*rest, chain=["--then", "finetune", "--val_share", "0.2"])
    assert sweep.parse_main("main_finetune", p.then[0].argv).val_split == "val"
    # SERE has a weight called alpha.
    (p,) = sweep.plan("main_sere", ["--image_alpha", "black"], [], ["--then", "linprobe"], "/jobs")
    assert sweep.parse_main("main_linprobe", p.then[0].argv).alpha == "black"


def test_follow_ups_of_sere_have_its_encoder():
    (p,) = sweep.plan(
        "main_sere", ["--model", "sere_vit_pico_patch8"], [], ["--then", "linprobe", "--knn"], "/jobs"
    )
    assert sweep.parse_main("main_linprobe", p.then[0].argv).model == "vit_pico_patch8"


def test_a_recipe_may_hold_the_sweep_and_the_follow_ups(tmp_path, capsys):
    recipe = tmp_path / "all.args"
    recipe.with_name("model.args").write_text("--model mae_vit_pico_patch8  # of another recipe\n")
    recipe.write_text(
        f"@{recipe.with_name('model.args')}\n--sweep seed=0,1\n--then linprobe --knn --no-pin_mem\n"
    )
    assert launch("main_pretrain", ["--dry_run", "--cluster", "local", "--job_dir", "J", f"@{recipe}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("python main_pretrain.py --model mae_vit_pico_patch8") == 2
    model = "--model vit_pico_patch8"
    probes = re.findall(rf"python main_linprobe.py --seed [01] {model} --knn --no-pin_mem --finetune", shown)
    assert len(probes) == 2


def test_flags_after_a_recipe_belong_to_the_main_and_not_to_its_last_follow_up(tmp_path, capsys):
    recipe = tmp_path / "all.args"
    recipe.write_text("--model mae_vit_pico_patch8 --epochs 4\n--then finetune --epochs 2\n")
    words = ["--dry_run", "--cluster", "local", "--job_dir", "J", f"@{recipe}"]
    words += shlex.split("--epochs 7 --data_path D --then linprobe --epochs 3")
    assert launch("main_pretrain", words) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert [w[1] for w in shown] == ["main_pretrain.py", "main_finetune.py", "main_linprobe.py"]
    last = [[w[i + 1] for i, word in enumerate(w) if word == "--epochs"][-1] for w in shown]
    assert last == ["7", "2", "3"] and all("D" in w for w in shown)
    with pytest.raises(SystemExit):
        launch("main_pretrain", ["--dry_run", "--then=linprobe"])
    assert "--then takes words" in capsys.readouterr().err


def test_a_switch_of_the_main_is_turned_off(capsys):
    words = shlex.split("--dry_run --cluster local --job_dir J --no-norm_last_layer")
    assert launch("main_sere", words) == 0
    assert "--no-norm_last_layer" in capsys.readouterr().out


def test_a_check_can_be_repeated_and_is_not_a_run(tmp_path):
    chain = shlex.split("--sweep seed=0,1 --then linprobe --knn")
    command = ["--cluster", "debug", "--job_dir", tmp_path, *TINY_MODEL, *chain]
    for _ in range(2):
        code, text = launcher("--check", *command)
        assert code == 0 and "200 images" in text and "not run again" not in text, text
        time.sleep(1)  # its folder is named after the second
    assert len(list(tmp_path.glob("check-*"))) == 2 and not (tmp_path / "jobs.json").exists()


def test_in_this_process_runs_need_no_submitit_and_share_a_folder(tmp_path):
    """Two launchers at once, each with its own points, where the import of submitit fails."""
    (tmp_path / "without" / "submitit").mkdir(parents=True)
    (tmp_path / "without" / "submitit" / "__init__.py").write_text("raise ImportError('not installed')")
    path = os.pathsep.join([str(tmp_path / "without"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "submitit_pretrain.py", "--cluster", "debug"]
    command += ["--job_dir", str(tmp_path / "jobs"), *TINY_MODEL]
    processes = [
        subprocess.Popen(
            [*command, "--sweep", f"seed={seed}"],
            cwd=ROOT,
            env=environment(PYTHONPATH=path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in (0, 1)
    ]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    points = json.loads((tmp_path / "jobs" / "sweep.json").read_text())["points"]
    assert sorted(point["name"] for point in points) == ["seed=0", "seed=1"]
    assert all((tmp_path / "jobs" / name / "checkpoint-last.pth").exists() for name in ("seed=0", "seed=1"))


def test_a_locked_folder_keeps_others_out(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    with locked(path), open(path, "w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(path, "w") as other:  # free again
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(path):
        pass


def test_the_last_line_of_a_log_may_be_incomplete(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 0.5}\n{"train_lo')
    assert last_line(tmp_path) == {"epoch": 0, "train_loss": 0.5}
    (tmp_path / "log.txt").write_text('{"train_lo')
    assert last_line(tmp_path) == {}


def states_of(folder) -> dict[str, str]:
    """Point or follow-up -> its state in the table of --status."""
    return dict(re.findall(r"^(mask\S+)\s+(\w+)", launcher("--status", folder)[1], re.M))


def test_a_local_sweep_with_a_failure_and_follow_ups(tmp_path):
    """Two points at a time; one fails, is repaired, and runs alone."""
    command = ["--cluster", "local", "--ngpus", 0, "--job_dir", tmp_path, *TINY_MODEL]
    command += shlex.split("--max_parallel 2 --sweep mask_ratio=0.5,0.75")
    command += shlex.split("--then linprobe --knn --batch_size 100")
    bad = tmp_path / "mask_ratio=0.75" / "checkpoint-last.pth"
    bad.parent.mkdir()
    bad.write_bytes(b"")
    code, text = launcher(*command)
    assert code == 1, text
    states = {"mask_ratio=0.5": "finished", "mask_ratio=0.5/linprobe": "finished"}
    assert states_of(tmp_path) == states | {"mask_ratio=0.75": "failed"}
    shown = launcher("--status", tmp_path)[1]
    assert "is empty" in shown and "knn20_cls" in shown
    bad.unlink()
    code, text = launcher(*command)
    assert code == 0 and text.count("finished, not run again") == 2, text
    states |= {"mask_ratio=0.75": "finished", "mask_ratio=0.75/linprobe": "finished"}
    assert states_of(tmp_path) == states
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert saved["points"] == [{"name": f"mask_ratio={m}", "flags": {"mask_ratio": m}} for m in (0.5, 0.75)]
    assert len(log_lines(tmp_path / "mask_ratio=0.75")) == 1


def test_only_names_points_of_the_sweep(tmp_path, capfd):
    flags = ["--cluster", "local", "--job_dir", str(tmp_path), "--dry_run", "--sweep", "seed=1,2"]
    assert launch("main_pretrain", [*flags, "--only", "seed=2"]) == 0
    assert capfd.readouterr().out.count("python main_pretrain.py") == 1
    assert launch("main_pretrain", [*flags, "--only", "seed=3"]) == 2
    assert "--only seed=3: no such point; there are seed=1 seed=2" in capfd.readouterr().err


def test_two_local_processes_are_two_ranks(tmp_path):
    code, text = launcher(
        "--cluster", "local", "--ngpus", 2, "--job_dir", tmp_path, *TINY_MODEL, "--batch_size", 50
    )
    log = "".join(p.read_text() for p in tmp_path.glob("submitit/*/*_log.out"))
    assert code == 0 and "rank 1 of 2" in log and "= 100, lr" in log, text + log
    assert is_local(tmp_path, read_job_ids(tmp_path)[""][0])


def test_dry_run_prints_the_script_and_leaves_nothing(tmp_path):
    options = shlex.split(
        "--nodes 3 --ngpus 4 --timeout 90 --qos high --slurm exclude=node7 exclusive --mem_gb 100 "
        "--sweep seed=1,2 --dry_run"
    )
    code, text = launcher("--job_dir", tmp_path / "jobs", *TINY_MODEL, *options)
    assert code == 0, text
    for line in (
        "--nodes=3",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=90",
        "--qos=high",
        "--exclude=node7",
        "--exclusive",
        "--mem=100GB",
        "--array=0-1%2",
        "--requeue",
        "--signal=USR2@120",
    ):
        assert f"#SBATCH {line}\n" in text, line
    assert "--kill-on-bad-exit=1" in text and text.count("python main_pretrain.py") == 2
    assert not (tmp_path / "jobs").exists()


def test_a_folder_without_runs_has_no_status(tmp_path):
    code, text = launcher("--status", tmp_path)
    assert code == 2 and "is not a job directory" in text


@pytest.mark.parametrize(
    "noted, queued, end, word",
    [
        ("", "PENDING", "", "pending"),
        ("running", "PENDING", "", "requeued"),
        ("running", "RUNNING", "", "running"),
        ("finished", "COMPLETING", "", "finished"),
        ("failed", "RUNNING", "", "failed"),
        ("stopped", "RUNNING", "", "running"),
        ("stopped", "PENDING", "", "requeued"),
        ("running", "", "NODE_FAIL", "node_fail"),
        ("running", "", "CANCELLED by 0", "cancelled"),
        ("finished", "", "COMPLETED", "finished"),
        ("failed", "", "FAILED", "failed"),
        ("", "", "", "not submitted"),
    ],
)
def test_state_of_a_run(noted, queued, end, word):
    note = {}
    if noted:
        note["state"] = noted
    assert state_of(note, queued, end) == word


def test_a_job_notes_how_it_went(tmp_path, monkeypatch):
    import main_linprobe

    monkeypatch.setattr(main_linprobe, "main", lambda args: 0)
    job = Job("main_linprobe", ["--seed", "3"], str(tmp_path))
    assert not job.is_finished() and job() == 0 and job.is_finished()
    assert not Job("main_linprobe", ["--seed", "4"], str(tmp_path)).is_finished(), "other flags: another run"
    monkeypatch.setattr(main_linprobe, "main", lambda args: 75)
    with pytest.raises(SystemExit, match="75"):
        job()
    assert read_note(tmp_path)["state"] == "stopped" and read_note(tmp_path)["starts"] == 2

    def broken(args):
        raise ValueError("`data_path` is empty")

    monkeypatch.setattr(main_linprobe, "main", broken)
    with pytest.raises(ValueError):
        job()
    assert read_note(tmp_path)["state"] == "failed"
    assert read_note(tmp_path)["error"] == "ValueError: --data_path is empty", "in the user's terms"
    assert status(tmp_path).splitlines()[1].split()[:2] == [".", "failed"]


def test_a_warning_after_the_end_of_a_run_is_ignored(tmp_path, monkeypatch):
    """Python has no handlers while it shuts down: a warning would kill a job whose run is done."""
    import submitit

    import main_linprobe

    warnings = {number: signal.getsignal(number) for number in ending.IGNORED}
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: SimpleNamespace(job_id="7"))
    cases = [("", 0, False), ("", 75, False), ("local", 0, True), ("slurm", 0, True), ("slurm", 75, True)]
    # A job that fails must not need a SIGKILL if it hangs as it exits.
    cases.append(("slurm", 3, False))
    for executor, code, ignored in cases:
        if executor:
            monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
        monkeypatch.setattr(main_linprobe, "main", lambda args, code=code: code)
        try:
            with contextlib.suppress(SystemExit, RuntimeError):
                Job("main_linprobe", [], str(tmp_path))()
            for number in warnings:
                assert (signal.getsignal(number) == signal.SIG_IGN) == ignored, (executor, code)
        finally:
            for number, handler in warnings.items():
                signal.signal(number, handler)


def test_requeue_asks_slurm_first(monkeypatch, capsys):
    asked = []
    states = ["COMPLETING\n", "RUNNING\n"]

    def answer(command, **options):
        asked.append(command)
        output = ""
        if command[0] == "squeue":
            output = states.pop(0)
        return subprocess.CompletedProcess(command, 0, output, "")

    monkeypatch.setattr(slurm.subprocess, "run", answer)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    slurm.requeue()
    assert asked == [], "no job, no question"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    slurm.requeue()
    assert [c[0] for c in asked] == ["squeue"] and "does not requeue itself" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    slurm.requeue()
    assert asked[-1] == ["scontrol", "requeue", "12_3"], "12 is also the name of the whole array"


def test_requeue_asks_a_busy_controller_again(monkeypatch, capsys):
    running = ("squeue", 0, "RUNNING\n")
    answers = [("squeue", 1, ""), running, ("scontrol", 1, ""), running, ("scontrol", 0, "")]

    def answer(command, **k):
        name, code, text = answers.pop(0)
        assert command[0] == name
        return subprocess.CompletedProcess(command, code, text, "Socket timed out")

    monkeypatch.setattr(slurm.subprocess, "run", answer)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    slurm.requeue()
    assert answers == [] and capsys.readouterr().out == "job 12 is requeued and continues from here\n"
    answers += 5 * [("squeue", 1, "")]
    slurm.requeue()
    assert (
        answers == [] and "does not requeue itself: its state is unknown to squeue" in capsys.readouterr().out
    )
    answers += 5 * [running, ("scontrol", 1, "")]
    slurm.requeue()
    assert answers == [] and "Socket timed out; submit the same command again" in capsys.readouterr().out


def test_a_job_that_hangs_is_requeued_shortly_before_its_time_limit(monkeypatch, capsys):
    waits = []
    answers = ["", "UNLIMITED", "1-00:00:20", "1:00:20", "1:20", "0:31", "0:30", "RUNNING"]
    monkeypatch.setattr(slurm, "query", lambda *command: answers.pop(0))
    monkeypatch.setattr(
        slurm.subprocess, "run", lambda command, **k: subprocess.CompletedProcess(command, 0, "", "")
    )

    class Left(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return self.is_set()

    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    slurm.requeue_at_the_limit(Left())
    assert waits == [], "there is no job"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    slurm.requeue_at_the_limit(Left())
    assert answers == [] and capsys.readouterr().out == "job 12 is requeued and continues from here\n"
    stopped = Left()
    stopped.set()
    slurm.requeue_at_the_limit(stopped)
    assert capsys.readouterr().out == ""


def test_a_preview_is_asked_for_anywhere(tmp_path, capsys):
    """At the end of a command it would otherwise belong to the last follow-up, and all runs would start."""
    flags = ["--job_dir", str(tmp_path / "jobs"), *shlex.split("--sweep seed=0,1 --then linprobe --knn")]
    assert launch("main_pretrain", [*TINY_MODEL, *flags, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.count("python main_linprobe.py") == 2 and "#SBATCH" in text
    assert not (tmp_path / "jobs").exists()


def test_nothing_is_submitted_while_slurm_does_not_answer(tmp_path, monkeypatch, capfd):
    """Otherwise runs in the queue would be submitted again."""
    (tmp_path / "jobs.json").write_text(json.dumps({"": ["7"]}))
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        slurm.subprocess, "run", lambda command, **k: subprocess.CompletedProcess(command, 1, "", "timed out")
    )
    assert launch("main_pretrain", [*TINY_MODEL, "--job_dir", str(tmp_path)]) == 2
    assert "SLURM does not answer scontrol (timed out)" in capfd.readouterr().err


def test_submitted_jobs_are_noted_before_slurm_refuses_more(tmp_path, monkeypatch, capfd):
    """For example a limit on jobs. The same command again then submits only the rest."""
    bin_ = tmp_path / "bin"
    calls = tmp_path / "calls"
    bin_.mkdir()
    sbatch = (
        f"echo x >> {calls}\nn=$(wc -l < {calls})\n[ $n -le 2 ] || {{ echo QOSMaxSubmit >&2; exit 1; }}\n"
        "echo Submitted batch job $n"
    )
    for name, text in (("sbatch", sbatch), ("squeue", ""), ("srun", ""), ("scontrol", "")):
        (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_), prepend=":")
    folder = tmp_path / "jobs"
    chain = shlex.split("--sweep seed=0 --then linprobe --knn --then linprobe")
    assert launch("main_pretrain", [*TINY_MODEL, "--job_dir", str(folder), *chain]) == 2
    message = capfd.readouterr().err
    assert "SLURM refuses the job: " in message and "QOSMaxSubmit" in message
    assert list(json.loads((folder / "jobs.json").read_text())) == ["seed=0", "seed=0/linprobe"]


def test_a_local_run_that_was_killed_is_noted_as_failed(tmp_path):
    job = Job("main_pretrain", [], str(tmp_path))
    assert job.final_state("1") == "lost"
    write_note(tmp_path, {"state": "running", "starts": 1})
    assert job.final_state("1") == "failed" and "killed" in read_note(tmp_path)["error"]
    write_note(tmp_path, {"state": "finished"})
    assert job.final_state("1") == "finished"


def test_follow_ups_of_an_earlier_checkpoint_are_named(tmp_path, capsys):
    points = sweep.plan("main_pretrain", TINY_MODEL, [], ["--then", "linprobe", "--knn"], str(tmp_path))
    then = points[0].then[0]
    (tmp_path / "checkpoint-last.pth").touch()
    for job in (points[0].job(), then.job()):
        write_note(job.folder, {"state": "finished", "main": job.main, "argv": job.argv})
    report_stale(points)
    assert capsys.readouterr().out == ""
    os.utime(tmp_path / "checkpoint-last.pth", (time.time() + 9, time.time() + 9))
    report_stale(points)
    assert f"{then.folder}: used an earlier checkpoint" in capsys.readouterr().out


def test_two_ranks_meet_at_maes_address():
    """One rank by --dist_on_itp, the other one by --world_size: both by --dist_url."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    usual = dict(dist_url=url, dist_on_itp=False, world_size=None, start_epoch=None)
    usual |= dict(device="cpu", dist_backend=None, dist_timeout=1, local_rank=-1)
    code = (
        "import json, sys; from types import SimpleNamespace; from util import dist\n"
        "from util.run.session import join_ranks\n"
        "join_ranks(SimpleNamespace(**json.loads(sys.argv[1])))\n"
        "print(dist.rank(), dist.world_size(), sum(dist.gather_objects(10 + dist.rank())))\n"
        "dist.shutdown()"
    )
    mpi = {f"OMPI_COMM_WORLD_{name}": value for name, value in (("RANK", 0), ("SIZE", 2), ("LOCAL_RANK", 0))}
    starts = [({"dist_on_itp": True}, mpi), ({"world_size": 2}, {"RANK": "1"})]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(usual | given)],
            env=environment(**variables),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for given, variables in starts
    ]
    lines = [p.communicate(timeout=100)[0].splitlines() for p in processes]
    assert [text[-1] for text in lines] == ["0 2 21", "1 2 21"]
