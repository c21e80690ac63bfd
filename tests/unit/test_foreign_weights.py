"""Weights as other programs write them: wrapped, nested, of two models, in folders, at addresses."""

import argparse
import hashlib
import http.server
import os
import pickle
import threading
import urllib.error
import webbrowser
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import checkpoints
import main_finetune
import main_linprobe
import main_pretrain
import main_segment
import tiny  # noqa: F401 (registers mae_test and vit_test)
from backbones.registry import build_classifier
from commands import accuracy, call
from models_mae_pl import MODELS
from processes import log_lines
from tools import inspect
from tools.draw import load_model
from util.data.datasets import build_class_dataset
from util.data.transforms import eval_transform
from util.dist import fsdp
from util.flags.groups import IMAGENET_MEAN, IMAGENET_STD
from util.flags.parser import parse, run
from util.train.optim import param_groups
from util.weights import locate, transfer
from util.weights.architecture import architecture
from util.weights.checkpoint import changed_flags, load_for_evaluation, load_strict
from util.weights.files import load
from util.weights.types import Checkpoint


def weights_of(name: str = "vit_test", **options) -> dict:
    torch.manual_seed(3)
    model = build_classifier(name, **{"img_size": (32, 32), "num_classes": 0, "pool": "cls"} | options)
    return {k: torch.randn_like(v) for k, v in model.state_dict().items()}


def prefixed(weights: dict, prefix: str) -> dict:
    return {prefix + name: weight for name, weight in weights.items()}


def inside(weights: dict) -> dict:
    """As if each block and its attention had been compiled, and checkpointed within FSDP."""
    return {
        name.replace("blocks.0.", "blocks.0._orig_mod._fsdp_wrapped_module.").replace(
            "attn.", "attn._checkpoint_wrapped_module."
        ): weight
        for name, weight in weights.items()
    }


def found(tmp_path, content) -> dict:
    torch.save(content, tmp_path / "c.pth")
    return load(str(tmp_path / "c.pth")).model


def check_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


# -- prefixes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"model": prefixed(w, "_orig_mod.")},
        lambda w: {"model": prefixed(w, "module._orig_mod.")},
        lambda w: {"model": prefixed(w, "_orig_mod.module.")},
        lambda w: {"state_dict": prefixed(w, "model.module._orig_mod."), "epoch": 1},
        lambda w: {"state_dict": prefixed(w, "model."), "pytorch-lightning_version": "2.5"},
        lambda w: {"module": w, "dp_world_size": 8},
        lambda w: {"module": prefixed(w, "module.model."), "optimizer": None},
        lambda w: {"model": {"module": {"state_dict": w}}},
        lambda w: prefixed(w, "module."),
        lambda w: {"model_state_dict": prefixed(w, "net.")},
        lambda w: {"model": inside(w)},
        lambda w: {"model": prefixed(inside(w), "module._orig_mod.")},
        # torch.optim.swa_utils.AveragedModel's, and a loss with a state.
        lambda w: {"model": prefixed(w, "module.") | {"n_averaged": torch.tensor(3)}},
        lambda w: {"state_dict": prefixed(w, "model.") | {"criterion.weight": torch.ones(5)}},
    ],
)
def test_wrapped_weights_have_their_own_names(tmp_path, wrap):
    expected = weights_of()
    check_equal(found(tmp_path, wrap(expected)), expected)


def test_heads_and_decoders_beside_a_wrapped_backbone_stay(tmp_path):
    for expected in (weights_of(num_classes=5), MODELS["mae_test"](img_size=(32, 32)).state_dict()):
        beside = ("head.", "decoder_", "mask_token", "pos_head.")
        wrapped = {name if name.startswith(beside) else f"model.{name}": w for name, w in expected.items()}
        check_equal(found(tmp_path, {"state_dict": wrapped}), expected)


def test_a_classifier_of_lightnings_is_a_start_and_evaluated(tmp_path):
    expected = weights_of(num_classes=5, pool="avg")
    named = {name if name.startswith("head.") else f"backbone.{name}": w for name, w in expected.items()}
    torch.save({"state_dict": prefixed(named, "model.")}, tmp_path / "c.pth")
    file = load(str(tmp_path / "c.pth"))
    for use in (lambda m: transfer.init_encoder(m, file, "zero", list("abcde")), load_evaluated(file)):
        model = build_classifier("vit_test", img_size=(32, 32), num_classes=5)
        use(model)
        check_equal(model.state_dict(), expected)
    torch.save(
        {"model": named | {"norm.weight": torch.ones(32), "backbone.norm.weight": torch.ones(32)}},
        tmp_path / "c.pth",
    )
    file = load(str(tmp_path / "c.pth"))
    with pytest.raises(ValueError, match=r"c\.pth does not fit .* a weight is there twice"):
        transfer.init_encoder(model, file, "zero")
    with pytest.raises(ValueError, match=r"c\.pth does not fit this model: a weight is there twice"):
        load_for_evaluation(model, file)


def load_evaluated(file: Checkpoint):
    return lambda model: load_for_evaluation(model, file)


def test_what_is_left_out_is_named(tmp_path):
    torch.save(
        {"model": prefixed(weights_of(), "model.") | {"criterion.a": torch.ones(1)}}, tmp_path / "c.pth"
    )
    assert load(str(tmp_path / "c.pth")).origin == "criterion.a left out"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda w: prefixed(w, "module.") | {"norm.weight": torch.ones(32)}, "has weights twice"),
        (lambda w: prefixed(w, "_orig_mod.") | {"norm.weight": torch.ones(32)}, "has weights twice"),
        (lambda w: w | {"module.norm.weight": torch.ones(32)}, "has weights twice"),
        (
            lambda w: prefixed(w, "model.") | prefixed(w, "ema_model."),
            "holds several models, under the prefixes 'model.' and 'ema_model.'",
        ),
        (
            lambda w: prefixed(w, "net.") | prefixed(w, "average.module."),
            "holds several models, under the prefixes 'net.' and 'average.'",
        ),
        (lambda w: prefixed(w, "module.") | {"module.x": [1]}, "'model.module.x' is a list"),
        (lambda w: prefixed(w, "module.") | {"module.x": torch.tensor(torch.nan)}, "nan or infinite"),
    ],
)
def test_ambiguous_and_damaged_weights_are_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=r"c\.pth") as error:
        found(tmp_path, {"model": make(weights_of())})
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_nesting_has_an_end(tmp_path):
    content: dict = weights_of()
    for _ in range(40):
        content = {"model": content}
    with pytest.raises(ValueError, match=r"'(model\.){8}model' is a dict"):
        found(tmp_path, content)


def test_unwrapping_copies_nothing(tmp_path):
    """The file's storages are those of the result, and the second model's are free."""
    w = weights_of()
    content = {"student": prefixed(w, "module.backbone."), "teacher": prefixed(w, "backbone."), "epoch": 2}
    torch.save(content, tmp_path / "c.pth")
    state = load(str(tmp_path / "c.pth"))
    assert state.entries.keys() == {"epoch"}
    assert all(
        state.encoder_weights()[name].data_ptr() == state.model[f"backbone.{name}"].data_ptr() for name in w
    )


# -- students and teachers -----------------------------------------------------------------------------------
def heads(values: float) -> dict:
    names = ("mlp.0.weight", "mlp.0.bias", "last_layer.weight_g", "last_layer.weight_v")
    return {f"head.{name}": torch.full((3, 2), values) for name in names}


def relation_heads() -> dict:
    """Of SERE, which are parts of the backbone."""
    out = {}
    for head in ("channel_sere", "pixel_sere", "channel_sere_local", "pixel_sere_local"):
        out |= {
            f"{head}.projection.0.weight": torch.ones(32),
            f"{head}.projection.0.running_mean": torch.ones(32),
        }
        out |= {
            f"{head}.predictor.0.weight": torch.ones(32, 32, 1, 1),
            f"{head}.predictor.1.bias": torch.ones(32),
        }
    return out


def sere_file(teacher: dict, student: dict) -> dict:
    """What the published code of SERE writes."""
    backbone = student | relation_heads() | {"masked_embed": torch.zeros(1, 32)}
    return {
        "student": prefixed(prefixed(backbone, "backbone.") | heads(1.0), "module."),
        "teacher": prefixed(teacher | relation_heads(), "backbone.") | heads(2.0),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", patch_size=8, lr=5e-4, global_crops_scale=(0.4, 1.0)),
        "ibot_loss": {"center": torch.zeros(1, 4), "center2": torch.zeros(1, 1, 4)},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }


def dino_file(teacher: dict, student: dict) -> dict:
    """What DINO writes; iBOT adds the mask embedding and a second layer of prototypes."""
    return sere_file(teacher, student) | {
        "student": prefixed(prefixed(student, "backbone.") | heads(1.0), "module."),
        "teacher": prefixed(teacher | {"masked_embed": torch.zeros(1, 32)}, "module.backbone.") | heads(2.0),
    }


LAYOUTS = {
    "SERE": (sere_file, "the teacher's weights; new"),
    "DINO": (dino_file, "the teacher's weights; new"),
    "a published backbone of SERE": (lambda t, s: t | relation_heads(), "new"),
    "a backbone of iBOT": (lambda t, s: {"state_dict": t | {"masked_embed": torch.zeros(1, 32)}}, "new"),
    "Lightning": (
        lambda t, s: {
            "state_dict": prefixed(prefixed(s, "backbone.") | heads(1.0), "student.")
            | prefixed(prefixed(t, "backbone.") | heads(2.0), "teacher.")
            | {"criterion.center": torch.zeros(4)}
        },
        "the teacher's weights; criterion.center left out; new",
    ),
    "a student alone": (
        lambda t, s: {"student": prefixed(t, "module.backbone.")},
        "the student's weights; new",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["vit_test", "timm"])
def test_the_teacher_of_another_program_is_an_encoder(tmp_path, layout, name):
    make, note = LAYOUTS[layout]
    if name == "timm":
        size, name = (160, 160), "timm/test_vit"
        teacher = {k.removeprefix("backbone."): v for k, v in weights_of(name, img_size=size).items()}
    else:
        size = (32, 32)
        teacher = weights_of()
    student = {k: torch.zeros_like(v) for k, v in teacher.items()}
    torch.save(make(teacher, student), tmp_path / "c.pth")
    model = build_classifier(name, img_size=size, num_classes=5, pool="cls")
    found = transfer.init_encoder(model, load(str(tmp_path / "c.pth")), "zero", list("abcde"))
    found = found.replace("positional embedding from the checkpoint; ", "")
    assert note in found and not found.startswith("of a classifier")
    own = model.state_dict()
    prefix = "backbone." if "timm" in name else ""
    assert all(torch.equal(own[prefix + k], v) for k, v in teacher.items())


def test_a_file_of_sere_goes_straight_into_fine_tuning_and_import(tmp_path, capsys):
    teacher = weights_of()
    torch.save(sere_file(teacher, weights_of()), tmp_path / "checkpoint.pth")
    file = str(tmp_path / "checkpoint.pth")
    flags = ["--model", "vit_test", "--lr", 0, "--output_dir", tmp_path / "run"]
    code, text = call(main_finetune, capsys, *flags, "--cls_token", "--finetune", file)
    assert code == 0 and f"encoder from {file}; the teacher's weights" in text, text
    saved = load(str(tmp_path / "run")).model
    assert all(torch.equal(saved[k], v) for k, v in teacher.items())
    text = inspect.describe(file)
    assert "the authors' code of SERE" in text and "read        the teacher's weights" in text
    commands = ["import", file, str(tmp_path / "out.pth")]
    assert run(checkpoints.main, checkpoints.get_args_parser().parse_args(commands)) == 0
    check_equal(load(str(tmp_path / "out.pth")).model, teacher)


@pytest.mark.parametrize("layout", ["DINO", "Lightning", "a published backbone of SERE"])
def test_neighbours_in_the_features_of_another_programs_teacher(tmp_path, capsys, layout):
    """The encoder is probed with its positional embedding, which the file has under another name."""
    teacher = weights_of()
    torch.save({"model": teacher}, tmp_path / "ours.pth")
    torch.save(LAYOUTS[layout][0](teacher, weights_of()), tmp_path / "theirs.pth")
    lines = []
    for name in ("ours", "theirs"):
        flags = ["--model", "vit_test", "--knn", "--output_dir", tmp_path / name]
        code, text = call(main_linprobe, capsys, *flags, "--finetune", tmp_path / f"{name}.pth")
        assert code == 0, text
        lines.append([line for line in text.splitlines() if line.startswith("* kNN")])
    assert lines[0] == lines[1] and len(lines[0]) == 2


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda w: w * torch.nan, "nan or infinite"),
        (lambda w: w.to_sparse(), "sparse"),
        (lambda w: w[:1].expand(10**9, *w.shape[1:]), "fewer numbers"),
        (lambda w: w.to(torch.complex64), "complex64"),
    ],
)
def test_weights_of_other_programs_are_checked_like_ours(tmp_path, layout, make, message):
    teacher = weights_of()
    broken = LAYOUTS[layout][0](teacher | {"norm.weight": make(teacher["norm.weight"])}, weights_of())
    torch.save(broken, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=message) as error:
        load(str(tmp_path / "c.pth"))
    assert "c.pth" in str(error.value) and len(str(error.value).splitlines()) == 1


# -- folders and addresses -----------------------------------------------------------------------------------
def test_a_folder_means_its_last_checkpoint(tmp_path, capsys):
    """At each flag that takes a checkpoint."""
    model = MODELS["mae_test"](img_size=(32, 32))
    (tmp_path / "pt").mkdir()
    torch.save({"model": model.state_dict(), "args": {}}, tmp_path / "pt" / "checkpoint-last.pth")
    folder = str(tmp_path / "pt")
    flags = ["--lr", 0, "--output_dir", tmp_path / "a"]
    code, text = call(main_pretrain, capsys, "--model", "mae_test", "--init_from", folder, *flags)
    assert code == 0 and f"weights from {folder}" in text, text
    code, text = call(main_linprobe, capsys, "--model", "vit_test", "--finetune", folder, "--knn", *flags)
    assert code == 0 and f"encoder from {folder}" in text, text
    code, text = call(
        main_pretrain,
        capsys,
        "--model",
        "mae_test",
        "--resume",
        tmp_path / "a",
        "--output_dir",
        tmp_path / "b",
    )
    assert code == 0 and f"continuing {tmp_path / 'a' / 'checkpoint-last.pth'}" in text, text
    assert torch.equal(load_model(folder)[0].cls_token, model.cls_token)
    assert inspect.describe(folder).startswith(folder) and "sha256" in inspect.describe(folder)
    export = ["export", folder, str(tmp_path / "e.pth"), "--to", "encoder"]
    assert run(checkpoints.main, checkpoints.get_args_parser().parse_args(export)) == 0


def test_a_folder_without_a_last_checkpoint_lists_its_files(tmp_path):
    (tmp_path / "checkpoint-3.pth").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"without checkpoint-last\.pth.*give one of its files, checkpoint-3\.pth"
    ):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Hugging Face's save_pretrained.* checkpoints\.py import"):
        load(str(tmp_path))


@pytest.fixture
def server(tmp_path):
    """The address of a web server that serves tmp_path/web, and the paths that were asked for."""
    (tmp_path / "web").mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "web"))

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()


def test_an_address_is_downloaded_once_and_checked(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    address, asked = server
    expected = weights_of()
    torch.save({"model": expected}, tmp_path / "web" / "a.pth")
    for _ in range(2):
        state = load(f"{address}/a.pth?download=true")
        check_equal(state.model, expected)
    assert len(asked) == 1 and state.path.startswith(str(tmp_path / "hub" / "checkpoints"))
    assert os.path.basename(state.path) == "a.pth"
    # The name of another address is another file.
    (tmp_path / "web" / "other").mkdir()
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "web" / "other" / "a.pth")
    assert load(f"{address}/other/a.pth").model.keys() == {"w"}
    # torch.hub's names with a part of the SHA-256.
    content = (tmp_path / "web" / "a.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "web" / f"b-{digest[:8]}.pth").write_bytes(content)
    (tmp_path / "web" / "b-01234567.pth").write_bytes(content)
    load(f"{address}/b-{digest[:8]}.pth")
    with pytest.raises(ValueError, match=f"its SHA-256 begins with {digest[:8]}"):
        load(f"{address}/b-01234567.pth")
    left = [name for _, _, names in os.walk(tmp_path / "hub") for name in names]
    assert sorted(left) == ["a.pth", "a.pth", f"b-{digest[:8]}.pth"], "nothing of the refused file is left"


@pytest.mark.parametrize(
    "address, message",
    [
        ("http://127.0.0.1:9/a.pth", "cannot download http://127.0.0.1:9/a.pth ("),
        ("SERVER/none.pth", "404"),
        ("SERVER/short.pth", "bytes came"),
        ("https://", "does not end with the name of a file"),
        ("https:///a.pth", "no host given"),
        ("http://example.org/a.pth", "is not encrypted"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(tmp_path, server, monkeypatch, capsys, address, message):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "web" / "short.pth").write_bytes(b"x" * 99)
    real = http.server.BaseHTTPRequestHandler.send_header

    def send_header(self, name, value):
        longer = name == "Content-Length" and self.path.endswith("short.pth")
        real(self, name, "199" if longer else value)

    monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "send_header", send_header)
    flags = ["--model", "vit_test", "--output_dir", tmp_path / "run"]
    code, text = call(main_finetune, capsys, *flags, "--finetune", address.replace("SERVER", server[0]))
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], text
    assert not (tmp_path / "hub").exists() or not list((tmp_path / "hub").rglob("*.pth*"))


def test_a_run_continues_from_an_address(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    flags = ["--model", "mae_test", "--picture_epochs", 9]
    assert call(main_pretrain, capsys, *flags, "--output_dir", tmp_path / "web" / "run")[0] == 0
    code, text = call(
        main_pretrain, capsys, *flags, "--epochs", 2, "--output_dir", tmp_path / "two",
        "--resume", f"{server[0]}/run/checkpoint-last.pth",
    )  # fmt: skip
    assert code == 0 and "Epoch: [1]" in text and "Epoch: [0]" not in text, text


def test_ranks_that_share_a_folder_download_once(tmp_path, monkeypatch):
    """The others wait for rank 0; a host with another folder has a download of its own."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    downloads = []
    monkeypatch.setattr(locate, "_download", lambda address, path: downloads.append(path))
    monkeypatch.setattr(locate.dist, "is_main", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    answers = iter([[""], [""], [True, False]])
    monkeypatch.setattr(locate.dist, "gather_objects", lambda value: next(answers))
    with pytest.raises(ValueError, match="some nodes do not see"):
        locate.located("https://a.b/c.pth")
    assert not downloads
    monkeypatch.setenv("LOCAL_RANK", "0")
    answers = iter([[""], [""], [True, True]])
    assert locate.located("https://a.b/c.pth") == downloads[0]
    answers = iter([["no network"]])
    with pytest.raises(ValueError, match="no network"):
        locate.located("https://a.b/d.pth")


# -- MAE's probes --------------------------------------------------------------------------------------------
def maes_probe(pool: str, classes: int) -> tuple[dict, torch.nn.Module]:
    """The state dict of a probed model as MAE's main_linprobe.py writes it, and the encoder."""
    torch.manual_seed(5)
    encoder = build_classifier("vit_test", img_size=(32, 32), num_classes=0, pool=pool).eval()
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    probe = {
        "head.0.running_mean": torch.randn(32),
        "head.0.running_var": torch.rand(32) + 0.2,
        "head.0.num_batches_tracked": torch.tensor(5),
        "head.1.weight": torch.randn(classes, 32),
        "head.1.bias": torch.randn(classes),
    }
    return encoder.state_dict() | probe, encoder


def by_hand(encoder, weights: dict, pool: str) -> tuple[float, float]:
    """Accuracy and loss on the demo set's validation images, with all layers of the probe written out."""
    data = build_class_dataset("", "val", eval_transform((32, 32)), evaluation=True, seed=0)
    images = torch.stack([data[i]["image"] for i in range(len(data))]) / 255
    labels = torch.tensor([data[i]["label"] for i in range(len(data))])
    shape = (3, 1, 1)
    images = (images - torch.tensor(IMAGENET_MEAN).view(shape)) / torch.tensor(IMAGENET_STD).view(shape)
    with torch.no_grad():
        tokens = encoder.forward_features(images)
        feature = tokens[:, 0]
        if pool == "avg":
            mean = tokens[:, 1:].mean(1)
            mean = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, False, keepdim=True) + 1e-6).sqrt()
            feature = mean * encoder.fc_norm.weight + encoder.fc_norm.bias
        x = (feature - weights["head.0.running_mean"]) / (weights["head.0.running_var"] + 1e-6).sqrt()
        logits = x @ weights["head.1.weight"].T + weights["head.1.bias"]
    loss = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()
    return 100 * float((logits.argmax(1) == labels).float().mean()), float(loss)


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_maes_probe_is_evaluated_without_a_file_of_its_encoder(tmp_path, capsys, monkeypatch, pool):
    weights, encoder = maes_probe(pool, 10)
    expected, loss = by_hand(encoder, weights, pool)
    figures = []
    evaluate = main_linprobe.Probing.evaluate
    monkeypatch.setattr(main_linprobe.Probing, "evaluate", lambda self: figures.append(evaluate(self)))
    args = argparse.Namespace(
        model="vit_test",
        input_size=32,
        global_pool=pool == "avg",
        finetune="/a/b.pth",
        lr=0.1,
        nb_classes=1000,
    )
    content = {"model": weights, "optimizer": {"state": {}}, "epoch": 89, "scaler": {}, "args": args}
    torch.save(content, tmp_path / "checkpoint-89.pth")
    flags = ["--model", "vit_test", "--eval", "--resume", tmp_path / "checkpoint-89.pth"]
    code, text = call(main_linprobe, capsys, *flags)
    assert code == 0 and accuracy(text) == [f"{expected:.3f}"], text
    assert figures[0]["test_loss"] == pytest.approx(loss, rel=1e-4)
    assert f"encoder from {tmp_path / 'checkpoint-89.pth'}" in text and "other than in training" not in text
    other = {"cls": "--global_pool", "avg": "--cls_token"}[pool]
    code, text = call(main_linprobe, capsys, *flags, other)
    assert code == 2 and "give that flag, or neither" in text
    # It is checked as every other file is.
    weights["head.0.running_var"][3] = torch.nan
    torch.save(content, tmp_path / "checkpoint-89.pth")
    code, text = call(main_linprobe, capsys, *flags)
    assert code == 2 and "head.0.running_var' is a tensor with nan" in text


def test_our_own_probes_go_on_as_before(tmp_path, capsys):
    torch.save({"model": weights_of()}, tmp_path / "e.pth")
    flags = ["--model", "vit_test", "--output_dir", tmp_path / "p", "--lr_grid", 1, 3]
    code, text = call(main_linprobe, capsys, *flags, "--finetune", tmp_path / "e.pth")
    assert code == 0, text
    again = ["--model", "vit_test", "--eval", "--resume", tmp_path / "p"]
    code, other = call(main_linprobe, capsys, *again, "--finetune", tmp_path / "e.pth")
    assert code == 0 and accuracy(other) == accuracy(text)[-1:]
    code, other = call(main_linprobe, capsys, *again)
    assert code == 2 and "holds the heads of a probe alone: give the encoder, too, by --finetune" in other


def test_a_fine_tuned_classifier_is_probed_as_its_encoder(tmp_path, capsys):
    """The norm after the mean normalises each token, as `export --to encoder` writes it."""
    classifier = weights_of(num_classes=7, pool="avg")
    torch.save({"model": classifier, "args": {}}, tmp_path / "c.pth")
    encoder = {k.replace("fc_norm", "norm"): v for k, v in classifier.items() if not k.startswith("head")}
    torch.save({"model": encoder, "args": {}}, tmp_path / "e.pth")
    lines = []
    for name in ("c", "e"):
        flags = ["--model", "vit_test", "--knn", "--output_dir", tmp_path / name]
        code, text = call(main_linprobe, capsys, *flags, "--finetune", tmp_path / f"{name}.pth")
        assert code == 0 and ("without its head" in text) == (name == "c"), text
        lines.append([line for line in text.splitlines() if line.startswith("* kNN")])
    assert lines[0] == lines[1] and len(lines[0]) == 2


# -- runs of facebookresearch/mae that go on here ------------------------------------------------------------
# What its parsers store for the flags that its README gives, as of the published code.
COMMON = dict(
    batch_size=40, epochs=1, accum_iter=1, model="mae_test", input_size=32, weight_decay=0.05, lr=1.5e-4,
    min_lr=0.0, warmup_epochs=40, data_path="/datasets/imagenet", output_dir="./output_dir", device="cuda",
    log_dir="./output_dir", seed=0, resume="", start_epoch=0, num_workers=10, pin_mem=True, world_size=8,
    local_rank=0, dist_on_itp=False, dist_url="env://", distributed=True, rank=0, gpu=0, dist_backend="nccl",
)  # fmt: skip
PRETRAINED = COMMON | dict(mask_ratio=0.75, norm_pix_loss=False, blr=1e-3)
FINE_TUNED = COMMON | dict(
    blr=5e-4, model="vit_test", drop_path=0.1, clip_grad=None, layer_decay=1.0, min_lr=1e-6, warmup_epochs=5,
    color_jitter=None, aa="rand-m9-mstd0.5-inc1", smoothing=0.1, reprob=0.25, remode="pixel", recount=1,
    resplit=False, mixup=0, cutmix=0, cutmix_minmax=None, mixup_prob=1.0, mixup_switch_prob=0.5,
    mixup_mode="batch", finetune="/runs/mae_pretrain_vit_base.pth", global_pool=True, nb_classes=10,
    eval=False, dist_eval=True,
)  # fmt: skip


def groups_by_layer(model, depth: int) -> list[dict]:
    """MAE's groups of fine-tuning, in its order: the first parameter of a group decides where it comes."""
    groups: dict = {}
    for name, p in model.named_parameters():
        layer = depth + 1
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        decayed = p.ndim > 1 and name not in ("cls_token", "pos_embed")
        group = {"params": [], "weight_decay": 0.05 * decayed, "lr_scale": 1.0}
        groups.setdefault((layer, decayed), group)["params"].append(p)
    return list(groups.values())


def maes_run(model, groups: list[dict], flags: dict) -> dict:
    """A checkpoint of MAE's after an epoch; the moments of a parameter are its number among the names."""
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for i, (_, p) in enumerate(model.named_parameters()):
        if p.requires_grad:
            optimizer.state[p] = {
                "step": torch.tensor(3.0),
                "exp_avg": torch.full_like(p, i),
                "exp_avg_sq": torch.full_like(p, i),
            }
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 0,
        "scaler": {},
        "args": argparse.Namespace(**flags),
    }


@pytest.mark.parametrize("decay", ["1", "0.75"])
def test_a_fine_tuning_of_maes_goes_on_with_its_moments(tmp_path, capsys, decay):
    model = build_classifier("vit_test", img_size=(32, 32), num_classes=10)
    content = maes_run(model, groups_by_layer(model, 2), FINE_TUNED | {"layer_decay": float(decay)})
    torch.save(content, tmp_path / "checkpoint-0.pth")
    resume = load(str(tmp_path / "checkpoint-0.pth"))
    flags = ["--model", "vit_test", "--layer_decay", decay]
    args = parse(main_finetune.get_args_parser(), flags)
    start = main_finetune.Start(resume, resume.args["finetune"], None, [])
    optimizer = main_finetune.build_optimizer(args, model, start, 1e-3)
    fsdp.load_optimizer(optimizer, resume.entries["optimizer"])
    for i, (name, p) in enumerate(model.named_parameters()):
        assert (optimizer.state[p]["exp_avg"] == i).all(), name
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {float(decay) ** i for i in range(4)}
    more = ["--resume", tmp_path / "checkpoint-0.pth", "--output_dir", tmp_path / "run", "--epochs", 1]
    code, text = call(main_finetune, capsys, *flags, "--blr", 5e-4, *more)
    assert code == 0 and "continuing" in text and "changed flags" not in text, text
    assert "not read" not in text


def test_a_pretraining_of_maes_goes_on_without_false_alarms(tmp_path, capsys):
    model = MODELS["mae_test"](img_size=(32, 32), pos_embed="sincos", pos_label="none")
    groups = param_groups(model, 0.05)
    torch.save(maes_run(model, groups, PRETRAINED), tmp_path / "checkpoint-0.pth")
    flags = ["--model", "mae_test", "--pos_embed", "sincos", "--pos_label", "none", "--warmup_epochs", 40]
    more = [
        "--resume",
        tmp_path / "checkpoint-0.pth",
        "--output_dir",
        tmp_path / "run",
        "--picture_epochs",
        9,
    ]
    code, text = call(main_pretrain, capsys, *flags, *more)
    assert code == 0 and "continuing" in text and "changed flags" not in text, text
    code, text = call(main_pretrain, capsys, *flags, *more, "--mask_ratio", 0.5, "--blr", 2e-3)
    assert "with changed flags (blr: 0.001 -> 0.002; mask_ratio: 0.75 -> 0.5)" in text


@pytest.mark.parametrize(
    "old, new, same",
    [
        ({"mixup": 0}, {"mixup": 0.0}, True),
        ({"input_size": 224}, {"input_size": [224, 224]}, True),
        ({"input_size": [224, 192]}, {"input_size": [192, 224]}, False),
        ({"clip_grad": 1.0}, {"clip_grad": None}, False),
        ({"clip_grad": None}, {"clip_grad": 3.0}, False),
        ({"lr": 6e-4}, {"lr": None}, True),
        ({"lr": 6e-4}, {"lr": 1e-3}, False),
        ({"norm_pix_loss": True}, {"norm_pix_loss": False}, False),
        ({"aa": ""}, {"aa": None}, True),
        ({"pool": "avg"}, {"pool": "cls"}, False),
    ],
)
def test_what_counts_as_a_changed_flag(old, new, same):
    assert (not changed_flags(old, new)) == same


# -- what is refused -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, words",
    [
        ("beit_base_patch16_224", ["LayerScale", "relative position biases", "separate biases of queries"]),
        ("vit_small_patch14_reg4_dinov2", ["LayerScale", "register tokens"]),
        ("eva02_base_patch14_224", ["a gated or normalised MLP"]),
    ],
)
def test_parts_of_other_models_are_called_by_their_names(tmp_path, name, words):
    import timm

    with torch.device("meta"):
        names = timm.create_model(name, num_classes=0).state_dict().keys()
    weights = {name: torch.ones(1) for name in names}
    weights |= {"patch_embed.proj.weight": torch.ones(32, 3, 8, 8)}
    weights |= {"blocks.0.attn.qkv.weight": torch.ones(96, 32)}
    torch.save(weights, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="does not hold a plain Vision Transformer: it has") as error:
        architecture(load(str(tmp_path / "c.pth")))
    assert all(word in str(error.value) for word in words) and "So-ViT" not in str(error.value)
    model = build_classifier("vit_test", img_size=(32, 32), num_classes=5)
    with pytest.raises(ValueError, match="choose the model that it was made with, a timm/NAME") as error:
        transfer.init_encoder(model, load(str(tmp_path / "c.pth")), "zero")
    assert words[0] in str(error.value) and len(str(error.value)) < 900


def test_a_run_does_not_go_on_at_another_size(tmp_path, capsys):
    """The advice works when it is followed: the head goes on, the moments start anew."""
    flags = ["--model", "vit_test", "--finetune", ""]
    assert call(main_finetune, capsys, *flags, "--output_dir", tmp_path / "a")[0] == 0
    flags += ["--input_size", 48]
    code, text = call(main_finetune, capsys, *flags, "--epochs", 2, "--output_dir", tmp_path / "a")
    advice = (
        f"start a new one, in another --output_dir, with --finetune {tmp_path / 'a' / 'checkpoint-last.pth'}"
    )
    assert code == 2 and "is of another image size: a run" in text and advice in text
    assert "pos_embed is (1, 17, 32)" in text
    code, text = call(
        main_finetune, capsys, *flags, "--output_dir", tmp_path / "b", "--lr", 0,
        "--finetune", tmp_path / "a" / "checkpoint-last.pth",
    )  # fmt: skip
    assert code == 0 and "with its head, which has the same classes" in text, text
    first, second = load(str(tmp_path / "a")), load(str(tmp_path / "b"))
    assert torch.equal(first.model["head.weight"], second.model["head.weight"]) and second.epoch == 0
    flags = ["--model", "mae_test", "--pos_label", "none"]
    assert call(main_pretrain, capsys, *flags, "--output_dir", tmp_path / "c")[0] == 0
    more = ["--epochs", 2, "--output_dir", tmp_path / "c", "--input_size", 48]
    code, text = call(main_pretrain, capsys, *flags, *more)
    assert code == 2 and "with --init_from" in text


def test_a_classifier_is_evaluated_at_another_size(tmp_path, capsys):
    model = build_classifier("vit_test", img_size=(32, 32), num_classes=10)
    with torch.no_grad():
        model.pos_embed.normal_()
        model.head.weight.normal_()
    args = {"model": "vit_test", "input_size": [32], "patch_size": [8]}
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "c.pth")
    larger = build_classifier("vit_test", img_size=(48, 40), num_classes=10)
    expected = model.state_dict()
    cells = expected["pos_embed"][0, 1:].T.reshape(1, 32, 4, 4)
    cells = torch.nn.functional.interpolate(cells, (6, 5), mode="bicubic", align_corners=False)
    expected["pos_embed"] = torch.cat([expected["pos_embed"][:, :1], cells.flatten(2).transpose(1, 2)], 1)
    fitted, note = transfer.fit_for_evaluation(larger, load(str(tmp_path / "c.pth")))
    assert note == "positional embedding resized from (4, 4) to (6, 5)"
    assert torch.allclose(fitted.model["pos_embed"], expected["pos_embed"], atol=1e-6)
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "vit_test",
        "--eval",
        "--resume",
        tmp_path / "c.pth",
        "--input_size",
        48,
    )
    assert code == 0 and "positional embedding resized from (4, 4) to (6, 6) (other than in training" in text


# -- timm ----------------------------------------------------------------------------------------------------
def timms(name: str, **options):
    """A model of timm's with large random weights."""
    import timm

    torch.manual_seed(7)
    model = timm.create_model(name, **options).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize(
    "name",
    # A class token; the mean, LayerScale and registers; channels last and first; a classifier called fc.
    ["test_vit", "test_vit2", "test_vit3", "test_mambaout", "test_convnext", "test_resnet"],
)
def test_timms_own_file_starts_timms_model(tmp_path, name):
    theirs = timms(name, num_classes=6)
    torch.save(theirs.state_dict(), tmp_path / "c.pth")
    size = theirs.pretrained_cfg["input_size"][1:]
    names = list("abcdef")
    file = load(str(tmp_path / "c.pth"))
    ours = build_classifier(f"timm/{name}", img_size=size, num_classes=6).eval()
    note = transfer.init_encoder(ours, file, "zero", names)
    assert "has 6 outputs, whose classes the file does not name" in note and "new: nothing" in note
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)
        other = build_classifier(f"timm/{name}", img_size=size, num_classes=5).eval()
        note = transfer.init_encoder(other, file, "zero", names[:5])
        assert "without its head" in note and "new: head" in note
        features = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        pooled = other.pool_tokens(other.forward_features(images))
        assert torch.allclose(pooled, features, atol=1e-5)


def test_timms_file_at_another_size_and_of_grey_images(tmp_path):
    import timm

    theirs = timms("test_vit2", num_classes=3)
    torch.save({"state_dict": prefixed(theirs.state_dict(), "module.")}, tmp_path / "c.pth")
    ours = build_classifier("timm/test_vit2", img_size=(96, 128), in_chans=1, num_classes=3)
    transfer.init_encoder(ours, load(str(tmp_path / "c.pth")), "zero", list("abc"))
    # As timm itself does with published weights.
    expected = timm.create_model("test_vit2", img_size=(96, 128), in_chans=1, num_classes=3).eval()
    weights = theirs.state_dict()
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].sum(1, keepdim=True)
    expected.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(weights, expected))
    images = torch.randn(2, 1, 96, 128)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(images), expected(images), atol=1e-5)
    # And our own file of that model, for evaluation.
    ours = build_classifier("timm/test_vit2", img_size=(96, 96), in_chans=1, num_classes=3)
    transfer.init_encoder(ours, load(str(tmp_path / "c.pth")), "zero", list("abc"))
    torch.save({"model": ours.state_dict(), "args": {}}, tmp_path / "ours.pth")
    larger = build_classifier("timm/test_vit2", img_size=(128, 128), in_chans=1, num_classes=3).eval()
    load_for_evaluation(larger, load(str(tmp_path / "ours.pth")))
    again = timm.create_model("test_vit2", img_size=(128, 128), in_chans=1, num_classes=3).eval()
    weights = {name.removeprefix("backbone."): weight for name, weight in ours.state_dict().items()}
    again.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(weights, again))
    images = torch.randn(2, 1, 128, 128)
    with torch.no_grad():
        assert torch.allclose(larger(images), again(images), atol=1e-5)


def test_a_masked_autoencoder_starts_timms_model():
    import timm

    mae = MODELS["mae_vit_tiny_patch16"](img_size=(32, 32), pos_embed="sincos")
    file = Checkpoint("x.pth", mae.state_dict())
    ours = build_classifier("timm/vit_tiny_patch16_224", img_size=(32, 32), num_classes=4)
    transfer.init_encoder(ours, file, "zero", list("abcd"))
    weights = {k: v for k, v in file.encoder_weights().items() if not k.startswith("pos_head.")}
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=(32, 32), num_classes=0).eval()
    theirs.load_state_dict(weights)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = ours.eval().pool_tokens(ours.forward_features(images))
        assert torch.allclose(found, theirs(images), atol=1e-5)


def test_another_models_file_is_refused_in_one_line(tmp_path):
    torch.save(timms("test_resnet").state_dict(), tmp_path / "c.pth")
    for name in ("timm/test_vit", "timm/test_convnext", "vit_test", "swin_pico"):
        model = build_classifier(name, img_size=(64, 64), num_classes=4)
        with pytest.raises(ValueError, match=r"c\.pth") as error:
            transfer.init_encoder(model, load(str(tmp_path / "c.pth")), "zero")
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 600


def test_timms_published_weights_are_a_start(tmp_path, monkeypatch, capsys):
    import backbones.timm as models

    published = timms("test_vit")
    monkeypatch.setattr(models, "_check_reachable", lambda repository: None)
    real = models.timm.create_model
    monkeypatch.setattr(
        models.timm,
        "create_model",
        lambda *a, pretrained=False, **k: published if pretrained else real(*a, **k),
    )
    flags = ["--model", "timm/test_vit", "--lr", 0, "--output_dir", tmp_path / "run"]
    code, text = call(main_finetune, capsys, *flags, "--pretrained")
    assert code == 0 and "encoder from timm/test_vit; " in text and "new: head" in text, text
    saved = load(str(tmp_path / "run"))
    assert torch.equal(saved.model["backbone.cls_token"], published.cls_token)
    assert (
        saved.args["mean"] == list(published.pretrained_cfg["mean"])
        and saved.args["finetune"] == "timm/test_vit"
    )
    # A requeued job repeats the flags.
    code, text = call(main_finetune, capsys, *flags, "--pretrained", "--epochs", 2)
    assert code == 0 and "continuing" in text and "not read" not in text, text
    code, text = call(main_finetune, capsys, "--model", "vit_test", "--pretrained")
    assert code == 2 and "--pretrained starts a training of --model timm/NAME" in text


def test_timms_published_weights_are_probed(tmp_path, monkeypatch, capsys):
    import backbones.timm as models

    published = timms("test_vit")
    torch.save(published.state_dict(), tmp_path / "saved.pth")
    monkeypatch.setattr(models, "published_model", lambda name: published)
    base = ["--model", "timm/test_vit", "--cached", "--lr_grid", 1]
    code, text = call(main_linprobe, capsys, *base, "--pretrained", "--output_dir", tmp_path / "run")
    assert code == 0 and "encoder from timm/test_vit" in text, text
    # The same as from a file with the same weights and statistics.
    config = published.pretrained_cfg
    own = ["--mean", *config["mean"], "--std", *config["std"], "--finetune", tmp_path / "saved.pth"]
    code, text = call(main_linprobe, capsys, *base, *own, "--output_dir", tmp_path / "file")
    assert code == 0, text
    found, expected = (log_lines(tmp_path / name)[0] for name in ("run", "file"))
    accuracies = [name for name in found if name.startswith(("train_loss", "test_"))]
    assert len(accuracies) > 3 and all(found[name] == expected[name] for name in accuracies)
    trained = tmp_path / "run" / "checkpoint-last.pth"
    code, text = call(main_linprobe, capsys, *base, "--eval", "--resume", trained)
    assert code == 2 and "by --pretrained --model timm/test_vit" in text
    code, text = call(main_linprobe, capsys, *base, "--eval", "--resume", trained, "--pretrained")
    assert code == 0 and f"* Acc@1 {found['test_acc1']:.3f}" in text, text
    # Heads belong to their encoder.
    with torch.no_grad():
        published.cls_token += 1
    code, text = call(main_linprobe, capsys, *base, "--eval", "--resume", trained, "--pretrained")
    assert code == 2 and "holds heads for another encoder than timm/test_vit" in text
    code, text = call(main_linprobe, capsys, "--model", "vit_test", "--pretrained")
    assert code == 2 and "--pretrained probes timm's own weights of --model timm/NAME" in text


def test_a_segmenting_probe_of_published_weights_asks_for_them_again(monkeypatch):
    saved = Checkpoint("r.pth", {}, {"finetune": "timm/test_vit"})
    monkeypatch.setattr(main_segment.checkpoint, "load_start", lambda *paths: saved)
    words = ["--probe", "linear", "--eval", "--resume", "r.pth"]
    with pytest.raises(ValueError, match=r"r\.pth was .* give --pretrained --model timm/test_vit"):
        main_segment.find_start(parse(main_segment.get_args_parser(), words))


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, capsys, tmp_path):
    import backbones.timm as models

    def unreachable(address, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(models.urllib.request, "urlopen", unreachable)
    flags = ["--model", "timm/test_vit", "--input_size", 160, "--output_dir", tmp_path / "run"]
    code, text = call(main_finetune, capsys, *flags, "--pretrained")
    assert code == 2 and "does not answer: no route to host" in text and "give the file as --finetune" in text
    with pytest.raises(ValueError, match="there are none"):
        models.published_model("vit_base_patch16_xp_224")


# -- files of other kinds ------------------------------------------------------------------------------------
def zipped(path, *names) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"content")


@pytest.mark.parametrize(
    "name,content,facts",
    [
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS, git lfs pull"),
        ("a.safetensors", b"<!DOCTYPE html>", "web page, download"),
        ("log.txt", b'{"epoch": 0}\n', "text file, whole.pth"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', "text file"),
        ("a.onnx", b"\x08\x07", "ONNX, torch.save(model.state_dict()"),
        ("a.pth", b"\x08\x07\x12\x07pytorch\x1a\x052.0.0", "ONNX"),
        ("a.ckpt.data-00000-of-00001", b"\x80\x02", "TensorFlow"),
        ("a.npy", b"\x93NUMPY\x01\x00", "NumPy"),
        ("a.h5", b"\x89HDF\r\n", "HDF5"),
        ("a.npz", ["Transformer/a.npy"], "NumPy, timm.create_model"),
        ("a.zip", ["run/log.txt"], "zip, run/log.txt, unpack"),
        ("a.pth", b"\x1f\x8b\x08", "compressed, unpack"),
        ("a.tar", b"a".ljust(257, b"\0") + b"ustar", "tar, unpack"),
        ("a.pth", bytes(600), "zeros, whole.pth"),
        ("a.pth", b"\xff" * 600, "torch.save, safetensors, whole.pth"),
        ("a.pth", b"", "empty, whole.pth"),
        ("a.pth", b"PK\x03\x04" + bytes(600), "truncated, whole.pth"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, name, content, facts):
    """The remedy stands beside it, such as a whole checkpoint of the folder, and not one that is cut off."""
    torch.save({"w": torch.ones(1)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-30])
    if isinstance(content, list):
        zipped(tmp_path / name, *content)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as refused:
        load(str(tmp_path / name))
    text = str(refused.value)
    assert all(fact in text for fact in facts.split(", ")) and "\n" not in text, text
    assert name in text and "cut.pth" not in text


def whole_model(folder) -> None:
    torch.save({"model": nn.Sequential(nn.Linear(2, 1))}, folder / "a.pth")


def script(folder) -> None:
    torch.jit.script(nn.Sequential(nn.Linear(2, 1))).save(folder / "a.pth")


def arrays(folder) -> None:
    torch.save({"0.weight": np.ones((1, 2)), "0.bias": np.ones(1)}, folder / "a.pth")


def pickled(folder) -> None:
    with open(folder / "a.pth", "wb") as file:
        pickle.dump({"model": dict(nn.Sequential(nn.Linear(2, 1)).state_dict())}, file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("write", [whole_model, script, arrays, pickled])
def test_a_file_that_asks_for_code_is_refused_without_a_warning(tmp_path, write, recwarn):
    write(tmp_path)
    recwarn.clear()
    with pytest.raises(ValueError, match=r"if you trust.*state_dict\(\), (FILE|NEW)\)"):
        load(str(tmp_path / "a.pth"))
    assert not recwarn.list


class Hostile:
    """A pickle of it asks for a function that runs commands."""

    def __reduce__(self):
        return webbrowser.open, ("file:///nothing",)


def test_the_names_that_matter_come_first(tmp_path):
    harmless = [nn.Conv2d(1, 1, 1), nn.GELU(), nn.LayerNorm(1), nn.Dropout(), nn.ReLU(), nn.Tanh(), nn.SiLU()]
    torch.save({"model": [*harmless, Hostile()]}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"asks for webbrowser\.open, torch"):
        load(str(tmp_path / "a.pth"))


def test_the_format_is_that_of_the_content(tmp_path):
    weights = weights_of()
    save_file(weights, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "b.safetensors")
    check_equal(load(str(tmp_path / "a.pth")).model, weights)
    check_equal(load(str(tmp_path / "b.safetensors")).model, weights)


@pytest.mark.parametrize("content", [[1], torch.ones(2)], ids=["list", "tensor"])
def test_what_is_no_dictionary_says_how_to_save_one(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"not a dictionary.*torch\.save\(model\.state_dict\(\), FILE\)"):
        load(str(tmp_path / "a.pth"))


def test_a_classifier_is_no_start_of_a_pretraining_in_any_folder(tmp_path):
    torch.save({"model": weights_of(num_classes=2)}, tmp_path / "checkpoint-last.pth")
    with pytest.raises(ValueError, match="a fine-tuned classifier") as refused:
        transfer.init_from(MODELS["mae_test"](img_size=(32, 32)), load(str(tmp_path)))
    assert "output_dir" not in str(refused.value)


def test_a_classifier_of_other_classes_is_no_run_to_continue(tmp_path):
    torch.save({"model": weights_of(num_classes=2)}, tmp_path / "a.pth")
    model = build_classifier("vit_test", img_size=(32, 32), num_classes=5, pool="cls")
    with pytest.raises(ValueError, match=r"has 2 classes, and the data have 5.*`finetune`"):
        load_strict(model, load(str(tmp_path / "a.pth")))


def test_a_size_that_no_model_has_is_named(tmp_path):
    torch.save({"model": weights_of(dim=48)}, tmp_path / "a.pth")
    model = build_classifier("vit_test", img_size=(32, 32), num_classes=0, pool="cls")
    with pytest.raises(ValueError, match=r"its size \(2 blocks of width 48, patches of 8x8\)"):
        transfer.init_encoder(model, load(str(tmp_path / "a.pth")), "zero")


def test_a_stored_name_is_no_advice_unless_there_is_such_a_model(tmp_path):
    """Names in a file are a stranger's words: they are shown on one line, and never as a command."""
    name = "mae_vit_base\x1b[2J\nerror: none"
    stored = MODELS["mae_test"](img_size=(32, 32)).state_dict()
    torch.save({"model": stored, "args": {"model": name}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no model here has its size") as refused:
        load_strict(MODELS["mae_vit_pico_patch8"](img_size=(32, 32)), load(str(tmp_path / "a.pth")))
    text = str(refused.value)
    assert "give --model" not in text and "give `model`" not in text and "timm" not in text, text
    assert "\n" not in text and "\x1b" not in text
