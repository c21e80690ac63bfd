"""Wrong input gives an error that says what to do, and nothing is lost."""

import argparse
import errno
import importlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import tarfile
import zipfile
from pathlib import Path, PosixPath, PurePosixPath

import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain
import main_sere
from commands import call
from layers.pos_embed import resize_pos_embed, sincos_2d
from models_mae_pl import MAE_VIT, MODELS
from processes import ROOT
from util import dist
from util.cluster.launch import launch
from util.dist import fsdp
from util.flags.groups import own_workers
from util.flags.parser import parse, run
from util.run import checkpoint_manager
from util.run.log import Log
from util.run.training_images import TrainingImages, compare
from util.weights import checkpoint
from util.weights.types import Checkpoint


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(
        MODELS,
        "mae_test",
        MAE_VIT.override(
            patch_size=(8, 8),
            dim=16,
            depth=1,
            num_heads=1,
            decoder_dim=16,
            decoder_depth=1,
            decoder_heads=1,
        ),
    )


def pretrain(tmp_path, capsys, *flags) -> tuple[int, str]:
    """Run main_pretrain -> exit code, all that it printed."""
    words = shlex.split(
        "--model mae_test --input_size 32 --batch_size 40 --epochs 1 --num_workers 0 --device cpu "
        "--picture_epochs 1000"
    )
    words += ["--output_dir", str(tmp_path / "run"), *map(str, flags)]
    try:
        code = run(main_pretrain.main, parse(main_pretrain.get_args_parser(), words))
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize(
    "flags,message",
    [
        (
            ["--input_size", 30],
            "image height 30 is not a multiple of the patch height 8: choose --input_size 24 or 32",
        ),
        (["--mask_ratio", 1.0], "argument --mask_ratio: must be at least 0 and less than 1, found 1.0"),
        (["--mask_ratio", 0.99], "--mask_ratio 0.99 leaves none of 16 patches visible"),
        (["--batch_size", 300], "200 images cannot fill one batch, --batch_size 300"),
        (["--accum_iter", 6], "--accum_iter 6 is longer than the epoch of 5 batches"),
        (
            ["--model", "mae_vit_bose_patch16"],
            "--model mae_vit_bose_patch16 is unknown; did you mean mae_vit_base_patch16",
        ),
        (["--in_chans", 4], "--mean needs 4 values for --in_chans 4"),
        (["--data_path", "nowhere"], "nowhere"),
        (["--resume", "missing.pth"], "no checkpoint at missing.pth"),
        (["--batch_size", 0], "argument --batch_size: must be 1 or more, found 0"),
        (["--clip_grad", -1], "argument --clip_grad: must be 0 or more, found -1"),
        (["--crop_scale", 1, 0.2], "--crop_scale takes the smallest and the largest share of an image"),
        (["--hflip", 1.5], "argument --hflip: must lie between 0 and 1, found 1.5"),
        (["--device", "toaster"], "argument --device: takes auto, cuda, cpu"),
        (["--dct_scaling", "--sr_spatial", 1, "--sr_views", "two"], "--dct_scaling crops one view"),
        (["--rot90", 0.5, "--sr_spatial", 1, "--sr_views", "two"], "leave out --vflip and --rot90"),
        (["--vflip", 0.5, "--sr_spatial", 1, "--sr_views", "two"], "leave out --vflip and --rot90"),
        (["--rot90", 0.5, "--cache_data", "device"], "give --cache_data memory, or leave --rot90 out"),
        (["--rot90", 2], "argument --rot90: must lie between 0 and 1, found 2"),
        (["--mask_ration", 0.5], "unknown flag --mask_ration; did you mean --mask_ratio?"),
        (["--batch", 8], "unknown flag --batch"),
        (["@no_such.args"], "there is no recipe no_such.args"),
        (["--pos_label", "abl"], "invalid choice: 'abl'"),
    ],
)
def test_wrong_flags_say_what_to_do(tmp_path, capsys, flags, message):
    code, text = pretrain(tmp_path, capsys, *flags)
    assert code == 2 and message in text, text
    assert not list(tmp_path.glob("run/*.pth"))


def test_recipes_dashes_and_order_of_flags(tmp_path):
    recipe = tmp_path / "r.args"
    recipe.write_text(
        "# a comment\n--epochs 7 --mask-ratio 0.6  # two on a line\n\n"
        "--input_size 96 128\n--output_dir 'a b'\n"
    )
    args = parse(
        main_pretrain.get_args_parser(), [f"@{recipe}", "--epochs", "9", "--batch-size=5", "--no-pin-mem"]
    )
    assert (args.epochs, args.mask_ratio, args.input_size, args.output_dir) == (9, 0.6, [96, 128], "a b")
    assert args.batch_size == 5 and args.pin_mem is False
    # argparse's own name mixes dashes and underscores.
    for no in ("--no-norm_last_layer", "--no-norm-last-layer", "--no_norm_last_layer"):
        assert parse(main_sere.get_args_parser(), [no]).norm_last_layer is False
    args = parse(
        main_pretrain.get_args_parser(), ["--output_dir", "with-dash", "--local-rank", "0", "--no_pin_mem"]
    )
    assert args.output_dir == "with-dash" and args.local_rank == 0 and args.pin_mem is False


def test_maes_optimizer_goes_on_where_the_fused_one_keeps_its_steps():
    """MAE's AdamW counts the steps of a parameter on the CPU, the fused one on the parameter's device."""
    model = torch.nn.Linear(2, 2)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(2)).sum().backward()
    theirs.step()
    ours = torch.optim.AdamW(model.to("meta").parameters(), lr=2e-3)
    ours.param_groups[0]["fused"] = True  # the meta device, in place of a GPU, has no fused step
    fsdp.load_optimizer(ours, theirs.state_dict())
    assert all(s["step"].device.type == "meta" for s in ours.state.values())
    assert ours.param_groups[0]["fused"] is True and ours.param_groups[0]["lr"] == 2e-3


def test_an_incomplete_line_of_the_log_does_not_stop_a_run(tmp_path, capsys):
    """A full disk or a lost node leaves such a line."""
    pretrain(tmp_path, capsys, "--epochs", 2)
    log = tmp_path / "run" / "log.txt"
    log.write_text(log.read_text() + '{"train_loss": 0.3')
    code, text = pretrain(tmp_path, capsys, "--epochs", 3)
    assert code == 0, text
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [0, 1, 2]


def test_a_full_disk_under_pictures_and_logs_does_not_end_a_run(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(main_pretrain, "save_png", full)
    code, text = pretrain(tmp_path, capsys, "--picture_epochs", 1)
    assert code == 0 and text.count("warning: [Errno 28]") == 1 and "picture:" not in text, text
    (tmp_path / "log.txt").symlink_to("/dev/full")
    Log(str(tmp_path)).write_line({"epoch": 0})
    assert "warning: [Errno 28]" in capsys.readouterr().out


def test_a_full_disk_under_tensorboard_does_not_end_a_run(tmp_path, capsys, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("add_scalar", "add_image", "flush"):
        monkeypatch.setattr(SummaryWriter, name, full)
    code, text = pretrain(tmp_path, capsys, "--picture_epochs", 1)
    assert code == 0 and text.count("no more TensorBoard files are written") == 1, text
    assert (tmp_path / "run" / "checkpoint-0.pth").exists()


def test_a_missing_val_set_is_skipped_and_a_broken_one_is_an_error(tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(ROOT / "data" / "demo", data)
    with open(data / "val.tar", "r+b") as f:
        f.truncate(30_000)
    code, text = pretrain(tmp_path, capsys, "--data_path", data)
    assert code == 2 and "val.tar" in text and not (tmp_path / "run" / "log.txt").exists(), text
    (data / "val.tar").unlink()
    monkeypatch.setattr(dist, "gather_objects", lambda obj: [obj, not obj] if obj is True else [obj])
    code, text = pretrain(tmp_path, capsys, "--data_path", data)
    assert code == 2 and "some nodes find val images" in text, text


def test_an_error_in_a_data_worker_is_one_line(tmp_path, capsys):
    code, text = pretrain(
        tmp_path, capsys, "--in_chans", 2, "--mean", 0.5, 0.5, "--std", 0.5, 0.5, "--num_workers", 1
    )
    assert code == 2 and "Traceback" not in text.partition("error: ")[2], text


def test_maes_defaults():
    """facebookresearch/mae's pretraining defaults, by its names."""
    args = vars(parse(main_pretrain.get_args_parser(), []))
    expected = dict(
        batch_size=64,
        epochs=400,
        accum_iter=1,
        model="mae_vit_large_patch16",
        input_size=[224],
        mask_ratio=0.75,
        norm_pix_loss=False,
        weight_decay=0.05,
        lr=None,
        blr=1e-3,
        min_lr=0.0,
        warmup_epochs=40,
        output_dir="./output_dir",
        # The GPU if there is one; MAE's "cuda" needs one.
        device="auto",
        seed=0,
        resume="",
        # MAE's 10, and not more than there are cores.
        num_workers=own_workers(),
        pin_mem=True,
        local_rank=-1,
        dist_on_itp=False,
        dist_url="env://",
    )
    assert {k: args[k] for k in expected} == expected
    assert args["pos_embed"] == "none" and args["pos_label"] == "apl" and args["pos_weight"] == 0.5


@pytest.mark.parametrize(
    "main,launcher_flags,flags",
    [
        (
            "main_pretrain",
            "--nodes 8 --use_volta32",
            "--batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss "
            "--mask_ratio 0.75 --epochs 800 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05",
        ),
        (
            "main_finetune",
            "--nodes 4",
            "--batch_size 32 --model vit_base_patch16 --finetune F --epochs 100 --blr 5e-4 "
            "--layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 --mixup 0.8 --cutmix 1.0 --reprob 0.25 "
            "--dist_eval",
        ),
        (
            "main_linprobe",
            "--nodes 4",
            "--batch_size 512 --model vit_base_patch16 --cls_token --finetune F --epochs 90 --blr 0.1 "
            "--weight_decay 0.0 --dist_eval",
        ),
        (
            "main_finetune",
            "",
            "--eval --resume F --model vit_base_patch16 --batch_size 16 --nb_classes 1000 --global_pool",
        ),
        (
            "main_linprobe",
            "",
            "--eval --resume F --model vit_base_patch16 --start_epoch 0 --nb_classes 1000 --no_pin_mem",
        ),
    ],
)
def test_maes_commands(tmp_path, capsys, main, launcher_flags, flags):
    """The commands that facebookresearch/mae documents parse here flag by flag, also with submitit."""
    args = parse(importlib.import_module(main).get_args_parser(), shlex.split(flags))
    for flag, value in re.findall(r"--(\w+)(?: ([^-]\S*))?", flags):
        if flag in ("cls_token", "global_pool"):
            assert args.pool == {"cls_token": "cls", "global_pool": "avg"}[flag]
        elif flag == "no_pin_mem":
            assert args.pin_mem is False
        else:
            parsed = getattr(args, flag)
            expected = True
            if value:
                expected = type(parsed)(value)
            assert parsed == expected, flag
    if launcher_flags:
        job_dir = tmp_path / "job"
        words = shlex.split(f"{launcher_flags} {flags} --job_dir {job_dir} --data_path D --dry_run")
        assert launch(main, words) == 0
        assert "nodes=" + launcher_flags.split()[1] in capsys.readouterr().out


class Code:
    def __reduce__(self):
        return exec, ("open('/nonexistent/owned', 'w')",)


def test_checkpoints_that_must_not_load(tmp_path, capsys):
    path = tmp_path / "c.pth"
    torch.save({"model": {}, "args": Code()}, path)
    with pytest.raises(ValueError, match=r"loading it would run code; it asks for .*exec"):
        checkpoint.load(str(path))
    with open(path, "wb") as f:
        pickle.dump({"model": Code()}, f)
    with pytest.raises(ValueError, match=r"cannot|code|not a checkpoint"):
        checkpoint.load(str(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        checkpoint.load(str(path))
    torch.save({"model": {"w": torch.randn(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="truncated"):
        checkpoint.load(str(path))
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        checkpoint.load(str(path))


# The module of the classes in Python up to 3.12, and in 3.13.
@pytest.mark.parametrize("home", ["pathlib", "pathlib._local"])
def test_maes_own_files_load(tmp_path, monkeypatch, home):
    """MAE pickles an argparse.Namespace, its submitit runs with a PosixPath inside."""
    path = tmp_path / "fb.pth"
    args = argparse.Namespace(
        model="mae_vit_base_patch16", lr=1e-3, job_dir=Path("a") / "b", norm_pix_loss=True
    )
    torch.save({"model": {"w": torch.ones(2)}, "args": args, "epoch": 799}, path)
    for c in (PosixPath, PurePosixPath, Path):
        monkeypatch.setattr(c, "__module__", home)
    state = checkpoint.load(str(path))
    assert state.args == {
        "model": "mae_vit_base_patch16",
        "lr": 1e-3,
        "job_dir": "a/b",
        "norm_pix_loss": True,
    }
    assert state.epoch == 799 and state.model["w"].sum() == 2


def maes_groups(model) -> tuple[dict, dict]:
    """The trained parameters of a model in the order of timm's groups: first those without weight decay."""
    plain = {}
    decayed = {}
    for name, p in model.named_parameters():
        if p.requires_grad and (p.ndim == 1 or name.endswith(".bias")):
            plain[name] = p
        elif p.requires_grad:
            decayed[name] = p
    return plain, decayed


def test_maes_own_training_state_continues(tmp_path, capsys):
    """The optimizer's moments go to the parameters that they were computed for."""
    model = MODELS["mae_test"](img_size=(32, 32), pos_embed="sincos", pos_label="none")
    plain, decayed = maes_groups(model)
    assert {"cls_token", "mask_token"} <= decayed.keys()
    parameters = [*plain.values(), *decayed.values()]
    groups = [
        {"params": list(plain.values()), "weight_decay": 0.0},
        {"params": list(decayed.values()), "weight_decay": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 0,
        "scaler": {},
        "args": argparse.Namespace(model="mae_test", input_size=32),
    }
    torch.save(content, tmp_path / "fb.pth")
    flags = shlex.split("--pos_embed sincos --pos_label none --epochs 2 --lr 0 --weight_decay 0.3")
    code, text = pretrain(tmp_path, capsys, "--resume", tmp_path / "fb.pth", *flags)
    assert code == 0, text
    saved = checkpoint.load(str(tmp_path / "run" / "checkpoint-last.pth"))
    assert [g["weight_decay"] for g in saved.entries["optimizer"]["param_groups"]] == [0.0, 0.3], (
        "the new flags"
    )
    state = saved.entries["optimizer"]["state"]
    assert len(state) == len(parameters)
    assert all(state[i]["exp_avg"].shape == p.shape for i, p in enumerate(parameters))
    assert {int(s["step"]) for s in state.values()} == {6}, "one step of MAE's, five new ones"


@pytest.mark.parametrize(
    "before,flags,note",
    [
        (
            ["--pos_embed", "sincos", "--pos_label", "none"],
            ["--pos_embed", "sincos", "--pos_label", "apl"],
            "new: pos_head",
        ),
        (["--pos_embed", "sincos"], ["--pos_embed", "sincos", "--input_size", 48], "new: pos_head"),
        (
            ["--pos_embed", "sincos", "--pos_label", "none"],
            ["--pos_label", "none"],
            "its positional embedding is left out",
        ),
        (
            ["--pos_embed", "learned", "--pos_label", "none"],
            ["--pos_embed", "learned", "--pos_label", "none", "--input_size", 48],
            "new: nothing",
        ),
        ([], ["--sr_spatial", 0.2], "new: sr_spatial"),
    ],
)
def test_weights_of_another_pretraining_are_a_start(tmp_path, capsys, before, flags, note):
    assert pretrain(tmp_path, capsys, *before)[0] == 0
    first = tmp_path / "first.pth"
    first.write_bytes((tmp_path / "run" / "checkpoint-last.pth").read_bytes())
    more = ["--lr", 0, "--output_dir", tmp_path / "second"]
    code, text = pretrain(tmp_path, capsys, "--init_from", first, *flags, *more)
    assert code == 0 and f"fresh schedule; {note}" in text, text
    a = checkpoint.load(str(first)).model
    b = checkpoint.load(str(tmp_path / "second" / "checkpoint-last.pth")).model
    same = [k for k in b if not k.startswith(("pos_head.", "sr_")) and not k.endswith("pos_embed")]
    assert same and all(torch.equal(a[k], b[k]) for k in same)
    check_pos_embed(a, b, learned="learned" in flags)


def check_pos_embed(a: dict, b: dict, learned: bool) -> None:
    """The embedding of `b` fits its own grid: a learned one is resized, a fixed one computed anew."""
    if learned:
        assert torch.equal(b["pos_embed"], resize_pos_embed(a["pos_embed"], (4, 4), (6, 6)))
    elif "pos_embed" in b:
        side = int((b["pos_embed"].shape[1] - 1) ** 0.5)  # (1, 1 + L, C)
        assert torch.equal(b["pos_embed"], sincos_2d(16, (side, side)))


def test_another_architecture_is_named_and_nothing_is_overwritten(tmp_path, capsys):
    assert pretrain(tmp_path, capsys)[0] == 0
    before = (tmp_path / "run" / "checkpoint-last.pth").read_bytes()
    code, text = pretrain(tmp_path, capsys, "--pos_label", "rpl", "--epochs", 2)
    assert code == 2 and "--pos_label apl, not with --pos_embed none --pos_label rpl" in text, text
    code, text = pretrain(tmp_path, capsys, "--patch_size", 16, "--epochs", 2)
    assert code == 2 and "made with --model mae_test" in text and "patches of 8x8" in text, text
    assert (tmp_path / "run" / "checkpoint-last.pth").read_bytes() == before


def test_changed_flags_are_printed_when_a_run_continues(tmp_path, capsys):
    assert pretrain(tmp_path, capsys)[0] == 0
    code, text = pretrain(tmp_path, capsys, "--epochs", 2, "--mask_ratio", 0.5, "--num_workers", 1)
    assert code == 0 and "with changed flags (epochs: 1 -> 2; mask_ratio: 0.75 -> 0.5)" in text
    assert checkpoint.load(str(tmp_path / "run" / "checkpoint-last.pth")).epoch == 1


def colours(root, classes: list[str], each: int) -> Path:
    """A folder of training images, `each` in every class."""
    for c, name in enumerate(classes):
        (root / "train" / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            colour = (60 * c, 20 * i, 100)
            Image.new("RGB", (32, 32), colour).save(root / "train" / name / f"{i}.png")
    return root


def test_a_run_does_not_go_on_with_other_images_by_itself(tmp_path, capsys):
    before = colours(tmp_path / "d", ["a", "b"], 4)
    last = tmp_path / "run" / "checkpoint-last.pth"

    def train(data, epochs, *more):
        flags = ["--data_path", data, "--batch_size", 2, "--epochs", epochs, *more]
        return pretrain(tmp_path, capsys, *flags)

    assert train(before, 1)[0] == 0
    stored = checkpoint.load(str(last)).entries["training_images"]
    assert (stored["path"], stored["images"], len(stored["digest"])) == (str(before), 8, 64)
    saved = last.read_bytes()
    # More files in the same folder, other names in another one, and as many images of other names there.
    found = f"error: training images changed: 8 images of {before} before, "
    other = colours(tmp_path / "e", ["x", "y"], 4)
    for data, now in ((colours(tmp_path / "g", ["a", "b"], 5), "10 images of"), (other, "8 images of")):
        code, text = train(data, 2)
        assert code == 2 and f"{found}{now} {data} now: " in text and "by --allow_other_data" in text, text
        assert last.read_bytes() == saved
    (before / "train" / "a" / "3.png").rename(before / "train" / "a" / "4.png")
    code, text = train(before, 2, "--dry_run")
    assert code == 2 and f"{found}8 images of {before} now, with other names or labels: " in text, text
    (before / "train" / "a" / "4.png").rename(before / "train" / "a" / "3.png")
    # The same images elsewhere, as on a node's own disk.
    copied = Path(shutil.copytree(before, tmp_path / "node" / "d"))
    code, text = train(copied, 2)
    assert code == 0 and f"the training images are the same, now in {copied}\n" in text, text
    code, text = train(copied, 3)
    assert code == 0 and not re.search("images (changed|are)", text), text
    # Other images are taken when that is asked for, and from then on they are the run's own.
    code, text = train(other, 4, "--allow_other_data")
    assert code == 0 and f"warning: training images changed: 8 images of {copied} before, " in text, text
    assert "the new images and their order" in text and "changed flags (epochs: 3 -> 4)" in text
    code, text = train(other, 5)
    assert code == 0 and not re.search("images (changed|are)", text) and "Epoch: [4]" in text, text
    # A checkpoint of an earlier version.
    state = torch.load(last, weights_only=True)
    del state["training_images"]
    torch.save(state, last)
    code, text = train(before, 6)
    assert code == 0 and "does not say which images it was trained on" in text, text


@pytest.mark.parametrize(
    "stored",
    [
        None,
        [],
        {},
        {"path": 3, "images": 8, "digest": ""},
        {"path": "p" * 5000, "images": 8, "digest": ""},
        {"path": "p", "images": True, "digest": ""},
        {"path": "p", "images": -1, "digest": ""},
        {"path": "p", "images": 10**30, "digest": ""},
        {"path": "p", "images": 8, "digest": 1},
    ],
)
def test_a_damaged_note_of_the_images_is_none(stored):
    start = Checkpoint("c.pth", {}, entries={"training_images": stored})
    assert TrainingImages.stored_in(start) is None
    note = compare(start, TrainingImages("D", 8, "0"), allowed=False)
    assert note == (
        "c.pth does not say which images it was trained on, so they cannot be compared with 8 images of D"
    )


@pytest.mark.parametrize(
    "before, now, problem",
    [
        (("hfids/a", None), ("hfids/a", None), None),
        (("wds/a=/x", None), ("wds/a=/y", None), "only name and number were compared"),
        (("torch/a=/x", 8), ("torch/a=/y", 8), "only name and number were compared"),
        (("hfids/a", None), ("hfids/b", None), "the stream hfids/a before, the stream hfids/b now"),
        (("torch/a=/x", 8), ("torch/a=/x", 9), "8 images of torch/a=/x before, 9 images of torch/a=/x now"),
        (("hfds/a\x1b[1m", 8), ("hfds/b", 8), "8 images of hfds/a\\x1b[1m before"),
    ],
)
def test_images_of_timms_readers_are_compared_by_name_and_number(before, now, problem):
    start = Checkpoint("c.pth", {}, entries={"training_images": TrainingImages(*before, "").to_dict()})
    if problem and "only" not in problem:
        with pytest.raises(ValueError, match=re.escape(problem)):
            compare(start, TrainingImages(*now, ""), allowed=False)
        return
    note = compare(start, TrainingImages(*now, ""), allowed=False)
    assert (problem in note) if problem else note == ""
    with pytest.raises(ValueError, match="training images changed"):
        compare(start, TrainingImages(*now, "0123"), allowed=False)


def test_the_order_of_starting_points(tmp_path, capsys):
    assert pretrain(tmp_path, capsys)[0] == 0
    first = str(tmp_path / "first.pth")
    (tmp_path / "run" / "checkpoint-last.pth").rename(first)
    (tmp_path / "run" / "checkpoint-0.pth").unlink()
    weights = torch.load(first, weights_only=True)["model"]
    _, text = pretrain(tmp_path, capsys, "--init_from", first, "--lr", 0)
    assert f"weights from {first}, fresh schedule" in text and "Epoch: [0]" in text
    again = torch.load(tmp_path / "run" / "checkpoint-last.pth", weights_only=True)
    assert all(torch.equal(v, again["model"][k]) for k, v in weights.items()), "lr 0 leaves the given weights"
    _, text = pretrain(tmp_path, capsys, "--resume", first, "--init_from", first, "--epochs", 2)
    assert "continuing" in text and "run/checkpoint-last.pth" in text, "the run's own comes first"
    for p in (tmp_path / "run").glob("*.pth"):
        p.unlink()
    _, text = pretrain(tmp_path, capsys, "--resume", first, "--init_from", first, "--epochs", 2)
    assert f"continuing {first}" in text and "Epoch: [1]" in text and "Epoch: [0]" not in text


@pytest.mark.parametrize(
    "flags",
    [
        ["--pos_label", "rpl"],
        ["--pos_label", "none", "--pos_embed", "sincos"],
        ["--pos_label", "apl", "--norm_pix_loss"],
        ["--mask_ratio", 0],
    ],
)
def test_every_kind_of_run_draws_its_picture(tmp_path, capsys, flags):
    code, text = pretrain(tmp_path, capsys, *flags)
    assert code == 0 and "picture: " in text and "* 50 val images" in text, text
    picture = Image.open(tmp_path / "run" / "pictures" / "epoch-0000.png")
    # Absolute labels, the default, have a column of their own.
    absolute = "apl" in flags or "--pos_label" not in flags
    assert round(picture.width / 198) == 3 + absolute


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = str(tmp_path / "c.pth")
    checkpoint.save_atomic({"model": {"w": torch.ones(3)}}, path)
    real = torch.save

    def full(state, f):
        real(state, f)
        f.truncate(100)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match=r"No space left.*c\.pth is intact"):
        checkpoint.save_atomic({"model": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert torch.equal(checkpoint.load(path).model["w"], torch.ones(3)), "the old file is whole"
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"], "nothing partial is left"


def test_a_full_disk_in_mid_run_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    real = checkpoint.save_atomic
    calls = []

    def sometimes_full(state, path, writer):
        calls.append(state["step"])
        if state["step"] == 2:
            raise OSError("could not save: No space left on device")
        real(state, path, writer)

    monkeypatch.setattr(checkpoint_manager, "save_atomic", sometimes_full)
    code, text = pretrain(tmp_path, capsys, "--save_steps", 2)
    assert code == 0 and calls == [2, 4, 5] and "training continues and the next save tries again" in text


def make_tar(path, images: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in images.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("bad,limit,code", [(1, 0.05, 0), (3, 0.05, 2)])
def test_undecodable_images_are_skipped_listed_and_bounded(tmp_path, capsys, bad, limit, code):
    images = {}
    for i in range(40):
        out = io.BytesIO()
        Image.new("RGB", (40, 40), (i * 6, 90, 200 - i)).save(out, "JPEG")
        images[f"c/{i:03d}.jpg"] = out.getvalue()
        if i < bad:
            images[f"c/{i:03d}.jpg"] = b"\xff\xd8 not an image"
    make_tar(tmp_path / "train.tar", images)
    found, text = pretrain(
        tmp_path, capsys, "--data_path", tmp_path, "--batch_size", 20, "--max_bad_images", limit
    )
    assert found == code, text
    listed = (tmp_path / "run" / "bad_images.txt").read_text().split()
    # In the order in which log points found them.
    assert sorted(Path(name).name for name in listed) == [f"{i:03d}.jpg" for i in range(bad)]
    if code:
        assert re.search(r"3 of 40 images \(7.5%\) cannot be decoded, more than --max_bad_images 0.05", text)
    else:
        assert "skipping 1 image that cannot be decoded" in text


def test_a_zip_that_is_not_a_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as z:
        z.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"is a zip file that holds readme\.txt"):
        checkpoint.load(str(tmp_path / "c.pth"))


def test_a_folder_that_timm_reads_is_continued(tmp_path, capsys):
    """What is stored of its images can be loaded again."""
    for i in range(10):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (i, 0, 0)).save(path)
    flags = ["--data_path", f"torch/image_folder={tmp_path / 'images'}", "--batch_size", 5]
    for epochs in (1, 2):
        code, text = pretrain(tmp_path, capsys, *flags, "--epochs", epochs)
        assert code == 0, text
    assert "continuing" in text
    saved = checkpoint.load(str(tmp_path / "run" / "checkpoint-last.pth"))
    assert saved.entries["training_images"] == {"path": flags[1], "images": 10, "digest": ""}
    assert saved.classes is None
    # A classifier stores the names of its outputs, too.
    given = ["--model", "vit_test", "--output_dir", tmp_path / "ft", "--aa", ""]
    code, text = call(main_finetune, capsys, *given, *flags)
    assert code == 0, text
    assert checkpoint.load(str(tmp_path / "ft" / "checkpoint-last.pth")).classes == ["a", "b"]


def test_a_stream_of_timms_trains_and_resumes_by_epoch(tmp_path, capsys, monkeypatch):
    import timm.data
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset):
        epochs = []

        def __len__(self):
            return 45  # ten more than the stream holds

        def __iter__(self):
            return ((Image.new("RGB", (40, 40), (i, 0, 0)), 0) for i in range(35))

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    monkeypatch.setattr(timm.data, "create_dataset", lambda *args, **kwargs: Stream())
    flags = ["--data_path", "hfids/somebody/pictures", "--batch_size", 10, "--print_freq", 1]
    code, text = pretrain(tmp_path, capsys, *flags, "--epochs", 2)
    assert code == 0 and "a stream: a run resumes at whole epochs only" in text, text
    assert Stream.epochs == [0, 1]
    assert text.count("Epoch: [1]") == 3, "four batches were announced, three came"
    code, text = pretrain(tmp_path, capsys, *flags, "--epochs", 3)
    assert code == 0 and Stream.epochs == [0, 1, 2], text
    code, text = pretrain(tmp_path, capsys, *flags, "--epochs", 4, "--data_path", "hfids/somebody/others")
    assert code == 2 and "the stream hfids/somebody/pictures before, the stream hfids/somebody/o" in text
    # A stop within the last epoch: its updates and its averages are discarded.
    last = tmp_path / "run" / "checkpoint-last.pth"
    stopped = checkpoint.load(str(last))
    torch.save(stopped.to_dict() | {"step": 10, "meters": {"loss": 900.0, "steps": 2}, "epoch": 1}, last)
    code, text = pretrain(tmp_path, capsys, *flags, "--epochs", 3)
    assert code == 0 and "the unfinished epoch starts again" in text, text
    assert re.findall(r"Epoch: \[2\]  \[(\d)/4\]", text) == ["1", "2", "3"], text
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert json.loads(lines[-1])["train_loss"] < 9
