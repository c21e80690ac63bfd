"""Pictures of models show their predictions; charts and pages of runs show the figures of log.txt."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import tiny  # noqa: F401 (registers mae_test and vit_test)
import visualize
from backbones.registry import build_classifier
from models_mae_pl import MODELS
from processes import ROOT
from tools import draw
from util.data.formats import ReadSettings
from util.flags import early
from util.flags.parser import parse, run
from util.report import charts, runs
from util.report.aggregate import Aggregate, aggregate, student_quantile
from util.report.page import page
from util.report.tables import Table

CELLS = 16


def saved(path, model, **args) -> str:
    name = "vit_test"
    if hasattr(model, "decoder_blocks"):
        name = "mae_test"
    args = {
        "model": name,
        "pos_label": "apl",
        "input_size": [32, 32],
        "norm_pix_loss": False,
        "mask_ratio": 0.5,
    } | args
    torch.save({"model": model.state_dict(), "args": args}, path)
    return str(path)


def call(*argv) -> int:
    return run(visualize.main, visualize.get_args_parser().parse_args([str(a) for a in argv]))


# --- image files ---


def image_files(folder) -> list:
    """Four images of one grey level each."""
    paths = [folder / f"{level}.png" for level in (0, 60, 120, 240)]
    for path in paths:
        Image.new("RGB", (40, 40), (int(path.stem),) * 3).save(path)
    return paths


@pytest.mark.parametrize("command", ["reconstruct", "positions", "attention"])
def test_image_files_are_drawn(tmp_path, constant_answer, capsys, monkeypatch, command):
    paths = image_files(tmp_path)
    seen = []
    load = draw.load_images

    def recorded(model, *given, **options):
        batches, stats = load(model, *given, **options)
        batches = list(batches)
        seen.append(
            [
                round(level)
                for images, _ in batches
                for level in draw.as_pixels(images, stats, draw.Bands.of(3))[:, 9, 9, 0] * 255
            ]
        )
        return iter(batches), stats

    monkeypatch.setattr(draw, "load_images", recorded)
    out = tmp_path / "o.png"
    for named in (paths[2:3], paths[:2], paths * 2):
        assert call(command, constant_answer[1], out, "--data_path", *named) == 0, capsys.readouterr().err
        assert sorted(seen.pop()) == sorted(int(path.stem) for path in named), (
            "all of them, whatever --images"
        )
        assert out.exists()
    # FILE and OUT may follow, as before, also between other flags.
    for words in (
        ["--data_path", *paths[:2], constant_answer[1], out],
        ["--images", 4, "--data_path", *paths[:2], constant_answer[1], out],
        [constant_answer[1], "--data-path", *paths[:2], out, "--images", 4],
        ["--data_path", *paths[:2], "--images", 4, constant_answer[1], out],
        [f"--data_path={paths[0]}", constant_answer[1], out, "--images=4"],
    ):
        assert call(command, *words) == 0
        assert set(seen.pop()) <= {0, 60}
    assert call(command, constant_answer[1], out, "--data_path", *paths, "--images", 1) == 0
    assert len(seen.pop()) in (1, 4), "positions are measured on all"


def test_a_folder_may_come_before_the_file(tmp_path, constant_answer):
    image_files(tmp_path)
    (tmp_path / "x.tar").mkdir()
    for words in (
        ["--data_path", tmp_path, constant_answer[1]],
        [constant_answer[1], "--data_path", tmp_path],
    ):
        assert call("reconstruct", *words, tmp_path / "o.png") == 0


def test_wrong_image_files_are_one_line(tmp_path, constant_answer, capsys):
    good, *_ = image_files(tmp_path)
    (tmp_path / "bad.jpg").write_bytes(b"junk")
    for named, message in (
        ([tmp_path / "bad.jpg"], "bad.jpg cannot be read: not a readable image (4 bytes"),
        ([good, tmp_path / "bad.jpg"], "bad.jpg cannot be read: not a readable image (4 bytes"),
        ([good, tmp_path], f"any number of image files, and {tmp_path} is no image file"),
        ([tmp_path, tmp_path], "--data_path takes one folder"),
        ([good, ""], "and an empty path is no image file"),
    ):
        assert call("attention", constant_answer[1], tmp_path / "o.png", "--data_path", *named) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    for named in (["nowhere.png"], [good, "nowhere.png"]):
        flags = parse(
            visualize.get_args_parser(), ["attention", "F", "o.png", "--data_path", *map(str, named)]
        )
        with pytest.raises(ValueError, match=r"--data_path nowhere.png does not exist"):
            early.check("visualize.py", flags)


def test_errors_do_not_name_flags_of_other_commands(tmp_path, capsys):
    channels = MODELS["mae_test"](img_size=(32, 32), in_chans=5, pos_embed="none", pos_label="none")
    file = saved(tmp_path / "c.pth", channels, in_chans=5, pos_label="none")
    assert call("attention", file, tmp_path / "o.png") == 2
    error = capsys.readouterr().err
    assert "mean and std its 5 channels" in error and "--" not in error, error
    assert call("positions", file, tmp_path / "o.png") == 2
    assert "(`pos_label` none, or exported without it)" in capsys.readouterr().err
    assert call("curves", tmp_path / "o.png", tmp_path) == 2
    assert "give the `output_dir` of a run" in capsys.readouterr().err


@pytest.fixture
def constant_answer(tmp_path):
    """A masked autoencoder that predicts zeros as pixels, and cell 5 for every patch."""
    model = MODELS["mae_test"](img_size=(32, 32), pos_label="apl", pos_embed="none")
    with torch.no_grad():
        last = model.pos_head.apl.classifier
        for layer in (model.decoder_pred, last):
            layer.weight.zero_()
            layer.bias.zero_()
        last.bias[5] = 1.0
    return model, saved(tmp_path / "c.pth", model)


def test_positions_are_those_of_the_head(constant_answer, monkeypatch):
    _, file = constant_answer
    seen = {}
    monkeypatch.setattr(
        charts,
        "positions",
        lambda *args: seen.update(
            zip(("images", "target", "predicted", "cells", "confusions", "grid", "title"), args)
        ),
    )
    draw.positions(file, "", n=3, measure=40, mask_ratio=None)
    assert seen["images"].shape == (3, 32, 32, 3)
    # Half of 16 patches, as in training.
    assert seen["target"].shape == (3, 8)
    assert (seen["predicted"] == 5).all() and seen["cells"][1, 1] == 1 and np.nansum(seen["cells"]) == 1
    # Cell 5 is row 1, column 1.
    for _, shares, first in seen["confusions"]:
        assert (shares[:, 1] == 1).all() and shares.sum() == 4 and first == 0
    assert "absolute labels of 40 images, 8 of 16 patches visible: " in seen["title"]
    assert "chance 6.2 %" in seen["title"]


def test_relative_positions(tmp_path, monkeypatch):
    model = MODELS["mae_test"](img_size=(16, 24), pos_label="rpl")
    seen = []
    monkeypatch.setattr(charts, "positions", lambda *args: seen.extend(args))
    with torch.no_grad():
        last = model.pos_head.rpl.classifier
        last.weight.zero_()
        last.bias.zero_()
        # No offset: row 0, column 0.
        last.bias[(2 - 1) * 5 + 2] = 1.0
    draw.positions(saved(tmp_path / "r.pth", model, input_size=[16, 24], mask_ratio=0.0), "", 2, 10, None)
    assert seen[1].shape == (2, 0) and (seen[3] == 1 / 6).all(), "right for the pair of a patch with itself"
    assert [(table.shape, first) for _, table, first in seen[4]] == [((3, 3), -1), ((5, 5), -2)]
    assert (seen[4][0][1][:, 1] == 1).all() and (seen[4][1][1][:, 2] == 1).all()


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of the last picture drawn by `reconstruct`."""
    seen = {}

    def panel(images, mask, prediction, **options):
        seen.update(options, images=images, mask=mask, prediction=prediction)
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(draw, "reconstruction_panel", panel)
    return seen


def test_reconstruct_draws_the_prediction(constant_answer, drawn, tmp_path):
    assert call("reconstruct", constant_answer[1], tmp_path / "a.png", "--mask_ratio", 0.75) == 0
    # Zeros are the mean colour, up to 8 bits.
    grey = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    assert torch.allclose(drawn["prediction"], grey.expand(4, 3, 32, 32), atol=0.5 / 255 + 1e-6)
    assert drawn["titles"][1] == "reconstruction" and drawn["mask"].sum(1).eq(12).all()
    assert (drawn["positions"].predicted == 5).all() and drawn["positions"].target.shape == (4, 4)


def test_a_reconstruction_names_its_statistics(constant_answer, drawn, tmp_path):
    model, file = constant_answer
    assert call("reconstruct", file, tmp_path / "a.png", "--norm_pix_loss") == 0
    assert drawn["titles"][1] == "reconstruction (uses ground-truth patch mean/std)"
    # Zeros are each patch's own mean over pixels and channels.
    means = model.patchify(drawn["images"]).unflatten(-1, (64, 3)).mean((2, 3))  # (N, L)
    filled = model.patchify(drawn["prediction"]).unflatten(-1, (64, 3))
    assert torch.allclose(filled.std(2), torch.zeros(4, 16, 3), atol=1e-4)
    assert (filled.mean((2, 3)) - means).abs().max() < 0.05

    assert call("reconstruct", file, tmp_path / "a.png", "--norm_pix_loss", "--stats", "visible") == 0
    assert drawn["titles"][1] == "reconstruction (mean/std of visible patches)"
    flat = model.patchify(drawn["prediction"]).unflatten(-1, (64, 3))
    # One brightness for the whole image.
    assert torch.allclose(flat, flat[:, :1, :1].expand_as(flat), atol=1e-6)


def test_statistics_of_visible_patches():
    patches = torch.arange(24.0).reshape(1, 4, 6)
    out = draw.visible_stats_patches(
        torch.tensor([-1.0, 0, 1]).expand(1, 4, 3), patches[..., :3], torch.tensor([[0, 2]])
    )
    # Visible patches are 0, 1, 2 and 12, 13, 14: mean 7, and each has a standard deviation of 1.
    assert torch.allclose(out, torch.tensor([6.0, 7, 8]).expand(1, 4, 3), atol=1e-5)


def test_attention_is_that_of_the_model():
    torch.manual_seed(0)
    model = build_classifier("vit_test", img_size=(16, 24), num_classes=3, pool="cls").eval()
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        maps = draw.class_attention(model, images)
        assert maps.shape == (2, 2, 6)
        attn = model.blocks[-1].attn
        x = []
        attn.register_forward_pre_hook(lambda module, inputs: x.append(inputs[0]))
        out = []
        attn.register_forward_hook(lambda module, inputs, output: out.append(output))
        model(images)
        values = attn.qkv(x[0])[..., 64:].reshape(2, 7, 2, 16)  # (B, N, heads, 16)
        # The class token attends to itself too.
        to_itself = (1 - maps.sum(-1))[..., None] * values[:, 0]
        mixed = to_itself + torch.einsum("bhl,blhd->bhd", maps, values[:, 1:])
        assert torch.allclose(attn.proj(mixed.flatten(1)), out[0][:, 0], atol=1e-5)


def test_all_samples_of_a_stream_are_used(constant_answer, monkeypatch):
    """Samples of a stream have no index of their own."""
    model, _ = constant_answer
    samples = [
        {"image": torch.full((3, 32, 32), i, dtype=torch.uint8), "label": 0, "index": -1, "key": i, "bad": []}
        for i in range(7)
    ]
    stream = SimpleNamespace(depth=torch.uint8, read=ReadSettings())
    monkeypatch.setattr(draw, "build_dataset", lambda *args, **options: stream)
    monkeypatch.setattr(draw, "some_samples", lambda dataset, n: samples[:n])
    batches, _ = draw.load_images(model, {}, "wds/x", first=2, n=7)
    assert [keys.tolist() for _, keys in batches] == [[0, 3], [1, 2, 4, 5, 6]]


@pytest.mark.parametrize("command", ["positions", "attention", "reconstruct"])
def test_pictures_of_every_kind_are_drawn(constant_answer, tmp_path, command):
    out = tmp_path / "new" / f"{command}.png"
    assert call(command, constant_answer[1], out, "--images", 2) == 0
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert min(pixels.shape[:2]) > 100 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_relation_heads_are_ignored(constant_answer, tmp_path):
    state = torch.load(constant_answer[1], weights_only=True)
    state["model"]["sr_spatial.norm.weight"] = torch.ones(4)
    torch.save(state, tmp_path / "sr.pth")
    assert call("reconstruct", tmp_path / "sr.pth", tmp_path / "o.png", "--images", 1) == 0


def test_wrong_files_are_refused(tmp_path, capsys):
    plain = saved(tmp_path / "p.pth", MODELS["mae_test"](img_size=(32, 32), pos_label="none"))
    vit = saved(tmp_path / "v.pth", build_classifier("vit_test", img_size=(32, 32), num_classes=2))
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "w.pth")
    for argv, message in (
        (["positions", plain], "has no label head"),
        (["reconstruct", vit], "has no decoder"),
        (["attention", tmp_path / "w.pth"], "which cannot be drawn"),
        (["attention", plain, "--data_path", tmp_path / "none"], "none"),
        (["attention", plain, "--images", 0], "--images 0: there must be at least 1"),
    ):
        assert call(argv[0], argv[1], tmp_path / "o.png", *argv[2:]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()


def make_run(folder, values, flags=None, name="test_position", chance=4.0, **args):
    folder.mkdir(parents=True)
    lines = [
        {"train_loss": 9.0, "train_position": v + 0.1, name: v, "epoch": i, "chance_position": chance}
        for i, v in enumerate(values)
    ]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"train_lo')
    if flags is not None:
        (folder / "flags.json").write_text(json.dumps(flags))
    if args:
        torch.save({"model": {}, "args": args}, folder / "checkpoint-last.pth")


@pytest.fixture
def sweep(tmp_path):
    """Two mask ratios with three seeds and one seed; a third ratio has not started."""
    folder = tmp_path / "sweep"
    points = [(0.5, 0, 2.0), (0.5, 1, 3.0), (0.5, 2, 4.0), (0.9, 0, 5.0)]
    for ratio, seed, value in points:
        make_run(
            folder / f"mask_ratio={ratio},seed={seed}", [9.0, value], {"mask_ratio": ratio, "seed": seed}
        )
    names = [f"mask_ratio={r},seed={s}" for r, s, _ in points] + ["mask_ratio=0.95,seed=0"]
    (folder / "sweep.json").write_text(
        json.dumps(
            {
                "main": "main_pretrain",
                "flags": [],
                "sweep": {"mask_ratio": [0.5, 0.9, 0.95], "seed": [0, 1, 2]},
                "points": [{"name": n, "flags": {}} for n in names],
            }
        )
    )
    return folder


def test_seeds_of_a_point_are_put_together(sweep, tmp_path, capsys):
    records, swept, missing = runs.read_sweep(str(sweep))
    assert swept == ["mask_ratio", "seed"] and missing == ["mask_ratio=0.95,seed=0"]
    (rows,) = aggregate(records, "mask_ratio", "test_position").values()
    assert [(row.x, row.mean) for row in rows] == [(0.5, 3.0), (0.9, 5.0)]
    assert rows[0].interval == pytest.approx(4.302653 * 1 / math.sqrt(3)) and rows[1].interval is None
    assert call("sweep", sweep, tmp_path / "s.png") == 0
    table = (tmp_path / "s.md").read_text()
    assert "| 0.5 | 3.0000 | ± 2.4841 | 2.0000, 3.0000, 4.0000 |" in table
    assert "| 0.9 | 5.0000 | one seed | 5.0000 |" in table
    assert "test_position (chance 4.0000)" in table
    assert "no figures yet: mask_ratio=0.95,seed=0" in capsys.readouterr().out


def test_flags_that_were_swept_together_are_separate(tmp_path):
    for h, v in ((0.0, 0.0), (0.5, 0.5)):
        make_run(tmp_path / "s" / f"hflip={h},vflip={v}", [2.0], {"hflip": h, "vflip": v})
    (tmp_path / "s" / "sweep.json").write_text(
        json.dumps({"sweep": {"hflip+vflip": ["0+0", "0.5+0.5"]}, "points": []})
    )
    records, swept, _ = runs.read_sweep(str(tmp_path / "s"))
    assert swept == ["hflip", "vflip"] and [r.point for r in records] == [
        "hflip 0.0, vflip 0.0",
        "hflip 0.5, vflip 0.5",
    ]


def test_runs_that_differ_by_their_seed_alone_are_one_point(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / "s" / f"seed={seed}", [2.0], {"seed": seed})
    assert [r.point for r in runs.read_sweep(str(tmp_path / "s"))[0]] == ["s", "s"]


def test_flags_come_from_checkpoints_if_nothing_was_noted(tmp_path):
    for ratio in (0.25, 0.75):
        make_run(tmp_path / "s" / f"r{ratio}", [ratio], mask_ratio=ratio, lr=1e-3, output_dir=f"/x/{ratio}")
    records, swept, missing = runs.read_sweep(str(tmp_path / "s"))
    assert swept == ["mask_ratio"] and missing == []
    assert [r.flags for r in records] == [{"mask_ratio": 0.25}, {"mask_ratio": 0.75}]


def test_unrelated_runs_in_one_folder_are_compared_by_name(tmp_path):
    """Six flags differ, and no file says that they were swept."""
    for i, name in enumerate(("first", "second")):
        make_run(tmp_path / "s" / name, [2.0 + i], **{f"flag{k}": i for k in range(6)}, seed=i)
    records, swept, missing = runs.read_sweep(str(tmp_path / "s"))
    assert [r.point for r in records] == ["first", "second"] and (swept, missing) == (["run"], [])
    assert call("sweep", tmp_path / "s", tmp_path / "s.png", "--metric", "test_position") == 0
    assert "| first | 2.0000 | one seed | 2.0000 |\n| second | 3.0000 |" in (tmp_path / "s.md").read_text()
    # Not twice in a table.
    assert page(str(tmp_path / "s")).count("<th>run</th>") == 1 + len(runs.metrics_of(records))


def test_noted_flags_count_as_swept_however_many_they_are(tmp_path):
    for name in ("first", "second"):
        make_run(tmp_path / "s" / name, [2.0])
        (tmp_path / "s" / name / "flags.json").write_text(json.dumps({f"flag{k}": name for k in range(6)}))
    assert runs.read_sweep(str(tmp_path / "s"))[1] == [f"flag{k}" for k in range(6)]


def test_other_swept_flags_make_separate_lines(tmp_path):
    for weight in (0.0, 1.0):
        for label in ("apl", "rpl"):
            make_run(
                tmp_path / "s" / f"{weight}{label}", [weight], {"pos_weight": weight, "pos_label": label}
            )
    records, *_ = runs.read_sweep(str(tmp_path / "s"))
    groups = aggregate(records, "pos_weight", "test_position")
    assert {k: [row.x for row in rows] for k, rows in groups.items()} == {
        "pos_label apl": [0, 1],
        "pos_label rpl": [0, 1],
    }
    groups = aggregate(records, "pos_label", "test_position")
    assert [row.x for row in groups["pos_weight 0.0"]] == ["apl", "rpl"]
    figure = charts.sweep(groups, "pos_label", "test_position", None)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["apl", "rpl"]


def test_follow_up_runs_count_for_their_point(tmp_path):
    for weight in (0.0, 0.5):
        make_run(tmp_path / "s" / f"w{weight}", [3.0], {"pos_weight": weight})
        make_run(tmp_path / "s" / f"w{weight}" / "finetune", [10.0, 20.0 + weight], name="test_acc1")
    records = runs.read_sweep(str(tmp_path / "s")).runs
    assert len(records) == 2 and runs.metrics_of(records)[0] == "finetune/test_acc1"
    (rows,) = aggregate(records, "pos_weight", "finetune/test_acc1").values()
    assert [row.mean for row in rows] == [20.0, 20.5] and records[0].last("test_position") == 3.0


def test_runs_of_the_same_name_in_two_folders_are_two_points(tmp_path):
    for experiment in ("a", "b"):
        for name in ("finetune", "probe" + experiment):
            (tmp_path / experiment / name).mkdir(parents=True)
            (tmp_path / experiment / name / "log.txt").write_text(
                '{"epoch": 0, "train_loss": 1.0, "test_acc1": 2.0}\n'
            )
    single = draw.read_runs([str(tmp_path / e / "finetune") for e in "ab"])
    assert [r.point for r in single] == ["a/finetune", "b/finetune"]
    swept = draw.read_runs([str(tmp_path / e) for e in "ab"])
    assert {r.point for r in swept} == {"a: finetune", "b: finetune", "probea", "probeb"}
    inside = draw.read_runs([str(tmp_path / "a"), str(tmp_path / "a" / "finetune")])
    assert [r.point for r in inside] == ["a: finetune", "probea", "a/finetune"]
    assert [r.point for r in draw.read_runs([str(tmp_path / "a")])] == ["finetune", "probea"]


def test_more_points_than_colours_look_different(sweep):
    record = runs.read_run(str(sweep / "mask_ratio=0.9,seed=0"))
    figure = charts.curves([replace(record, point=str(i)) for i in range(20)])
    looks = {(line.get_color(), line.get_marker()) for line in figure.legends[0].get_lines()}
    assert len(looks) == 20


def test_long_names_below_a_chart_do_not_overlap():
    for names, rotation in ((["apl", "rpl"], 0), ([f"a_long_name_{i}" for i in range(9)], 90)):
        rows = [Aggregate(name, (1.0,)) for name in names]
        labels = charts.sweep({"": rows}, "run", "test_acc1", None).axes[0].get_xticklabels()
        assert [(label.get_text(), label.get_rotation()) for label in labels] == [
            (name, rotation) for name in names
        ]


def test_curves_show_the_log_and_chance(sweep):
    record = runs.read_run(str(sweep / "mask_ratio=0.9,seed=0"))
    axes = charts.curves([record]).axes[0]
    lines = {line.get_linestyle(): line for line in axes.lines}
    assert axes.get_title() == "position" and list(lines["--"].get_ydata()) == [9.0, 5.0]
    assert list(lines["-"].get_ydata()) == [9.1, 5.1] and list(lines["-"].get_xdata()) == [1, 2]
    assert lines[":"].get_ydata()[0] == 4.0


def test_ticks_are_the_values_themselves():
    """Accuracies of 91.2501 and 91.2504 are no distances from 9.125e1."""
    figures = [charts.sweep({"": [Aggregate(x, (91.2500 + x / 1e4,)) for x in (1, 2, 4)]}, "x", "y", None)]
    log = [{"epoch": i, "train_position": 91.25 + i / 1e4, "test_position": 91.26} for i in range(3)]
    figures.append(charts.curves([runs.RunRecord("a", ".", {}, log)]))
    for figure in figures:
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert axes.yaxis.get_offset_text().get_text() == ""
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert all(label.startswith("91.2") for label in labels) and len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    "figures, flags, unread",
    [
        ({"train_pixel": 1.0, "train_sr_spatial": 2.0}, {}, True),
        ({"train_cls": 1.0}, {"cls_weight": 1.65}, False),
        ({"train_cls": 1.0}, {}, False),
        ({"train_cls": 1.0}, {"cls_weight": 0.0}, True),
    ],
)
def test_the_rank_of_a_token_that_no_loss_reads_says_so(figures, flags, unread):
    log = [{"epoch": 0, "test_effective_rank_cls": 3.0, "test_effective_rank_avg": 4.0} | figures]
    titles = [axes.get_title() for axes in charts.curves([runs.RunRecord("a", ".", flags, log)]).axes]
    assert ("effective_rank_cls (no loss reads this token)" in titles) == unread
    assert ("effective_rank_cls" in titles) != unread and "effective_rank_avg" in titles


def test_attention_of_a_token_that_no_loss_reads_says_so(tmp_path):
    sizes = dict(img_size=(32, 32))
    models = {
        "mae": MODELS["mae_test"](**sizes),
        "avg": build_classifier("vit_test", num_classes=2, pool="avg", **sizes),
        "cls": build_classifier("vit_test", num_classes=2, pool="cls", **sizes),
    }
    titles = {
        name: draw.attention(saved(tmp_path / f"{name}.pth", model), "", 1).get_suptitle()
        for name, model in models.items()
    }
    unread = [name for name, title in titles.items() if "class token (no loss reads it)" in title]
    assert unread == ["mae", "avg"] and all(title.endswith("own largest") for title in titles.values())


def test_references_are_grey_and_behind(sweep, tmp_path):
    record = runs.read_run(str(sweep / "mask_ratio=0.9,seed=0"))
    seeds = draw.read_runs([str(sweep)])
    figure = charts.curves([record], [s for s in seeds if s.point == "mask_ratio 0.5"])
    lines = [
        (line.get_color(), line.get_ydata()[-1])
        for line in figure.axes[0].lines
        if line.get_linestyle() == "--"
    ]
    first = charts.COLOURS[0]
    assert [colour for colour, _ in lines] == [charts.BEHIND] * (len(lines) - 1) + [first] and len(lines) > 1
    assert lines[-1] == (first, 5.0) and all(y != 5.0 for _, y in lines[:-1])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "mask_ratio=0.9,seed=0",
        "reference: mask_ratio 0.5",
    ]


def test_references_alone_are_drawn_as_runs(sweep, tmp_path):
    assert call("curves", tmp_path / "a.png", sweep / "mask_ratio=0.9,seed=0", "--reference", sweep) == 0
    assert call("curves", tmp_path / "b.png", "--reference", sweep) == 0
    assert Image.open(tmp_path / "a.png").size[0] == Image.open(tmp_path / "b.png").size[0]
    assert call("curves", tmp_path / "c.png") == 2


def test_a_report_is_one_page_without_links(sweep, tmp_path):
    Image.new("RGB", (8, 8)).save((sweep / "mask_ratio=0.9,seed=0").joinpath("p.png"))
    (sweep / "mask_ratio=0.9,seed=0" / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(sweep / "mask_ratio=0.9,seed=0" / "pictures" / "epoch-0001.png")
    assert call("report", sweep) == 0
    text = (sweep / "report.html").read_text()
    links = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", text)
    assert links and all(link.startswith("data:image/") for link in links)
    assert "<script" not in text and "@import" not in text
    assert sum(link.startswith("data:image/png") for link in links) == 1
    tables = text.count("<table>")
    assert tables == 3 and text.count("<div class=wide><table>") == tables, "wide tables scroll"
    assert ".wide{overflow-x:auto" in text
    for words in (
        "test_position against mask_ratio",
        "± 2.4841",
        "no figures yet: mask_ratio=0.95,seed=0",
        "mask_ratio=0.5,seed=2",
        "sweep.json",
    ):
        assert words in text


def test_a_run_has_a_report_too(sweep, tmp_path):
    assert call("report", sweep / "mask_ratio=0.5,seed=0", tmp_path / "one.html") == 0
    assert "<h1>Run mask_ratio=0.5,seed=0</h1>" in (tmp_path / "one.html").read_text()


def test_names_are_escaped(tmp_path):
    make_run(tmp_path / "<b>x", [1.0], {"model": "<script>alert(1)</script>"})
    assert "<script" not in page(str(tmp_path / "<b>x"))


@pytest.mark.parametrize(
    "argv,message",
    [
        (["curves", "OUT", "DIR/none"], "has no log.txt"),
        (["report", "DIR"], "has no log.txt"),
        (["sweep", "DIR", "OUT"], "holds no runs"),
        (
            ["sweep", "DIR/sweep", "OUT", "--metric", "acc"],
            "no run has a metric acc; the metrics are chance_position, epoch",
        ),
        (["sweep", "DIR/sweep", "OUT", "--flag", "lr"], "--flag lr was not swept"),
        (["curves", "OUT", "DIR/empty"], "the run has not finished an epoch yet"),
        (["curves", "OUT"], "give folders with a log.txt, or --reference"),
    ],
)
def test_folders_without_runs_are_refused(sweep, tmp_path, capsys, argv, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.txt").write_text("")
    if message == "has no log.txt" and argv[0] == "report":
        (tmp_path / "bare").mkdir()
        argv = ["report", "DIR/bare"]
    if message == "holds no runs":
        argv = ["sweep", "DIR/empty", "OUT"]
    argv = [a.replace("DIR", str(tmp_path)).replace("OUT", str(tmp_path / "o.png")) for a in argv]
    assert call(*argv) == 2
    assert message in capsys.readouterr().err


def test_a_table_is_written_as_markdown_html_and_text():
    table = Table(["run", "loss"], [["a|b", "1.5"], ["<c>", "10"]])
    assert table.markdown() == "| run | loss |\n|---|---|\n| a\\|b | 1.5 |\n| <c> | 10 |"
    assert table.markdown(padded=True).splitlines() == [
        "| run  | loss |",
        "|------|------|",
        "| a\\|b | 1.5  |",
        "| <c>  | 10   |",
    ]
    assert table.html() == (
        "<table><tr><th>run</th><th>loss</th></tr><tr><td>a|b</td><td>1.5</td></tr>"
        "<tr><td>&lt;c&gt;</td><td>10</td></tr></table>"
    )
    assert table.text() == "run  loss\na|b  1.5\n<c>  10"


@pytest.mark.parametrize(
    "degrees,quantile",
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_of_students_t_are_those_of_the_printed_table(degrees, quantile):
    """Abramowitz and Stegun, Table 26.10."""
    assert round(student_quantile(degrees), 3) == quantile


@pytest.mark.parametrize("label", ["shuffled", "shuffled_fixed"])
def test_labels_that_are_not_cells_are_not_drawn_as_cells(tmp_path, label):
    model = MODELS["mae_test"](img_size=(32, 32), pos_label=label)
    assert model.pos_head.absolute is None
    file = saved(tmp_path / "s.pth", model, input_size=[32], pos_label=label)
    with pytest.raises(ValueError, match=f"the labels {label} are neither cells nor offsets"):
        draw.positions(file, "", 2, 10, None)


@pytest.mark.parametrize(
    "words,facts",
    [
        ("reconstruct DIR/c.pth DIR/o.jpg", ".png o.jpg"),
        ("positions DIR/c.pth DIR/o.xyz", ".png .pdf .svg o.xyz"),
        ("attention DIR/o.png DIR/c.pth", ".png c.pth FILE"),
        ("curves DIR DIR/o.png", ".png OUT.png RUN..."),
        ("sweep DIR/o.png DIR", ".png DIR OUT.png"),
        ("report DIR DIR/o.pdf", ".html o.pdf"),
    ],
)
def test_other_formats_are_refused_before_a_model_is_read(tmp_path, capsys, words, facts):
    with pytest.raises(SystemExit) as end:
        call(*words.replace("DIR/", f"{tmp_path}/").replace("DIR", str(tmp_path)).split())
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.count("\n") == 1
    assert all(fact in text for fact in facts.split()), text
    assert not list(tmp_path.iterdir())


def test_a_log_stands_for_its_run(sweep, tmp_path):
    run = next((tmp_path / "sweep").glob("*/log.txt"))
    (by_log,), (by_folder,) = draw.read_runs([str(run)]), draw.read_runs([str(run.parent)])
    assert by_log == by_folder


def test_flags_of_a_command_that_are_left_out_count_as_left_out():
    """Their defaults are those of a parser within the parser."""
    words = ["positions", str(ROOT / "README.md"), "o.png", "--images", "2"]
    flags = parse(visualize.get_args_parser(), words)
    assert flags.given == {"command", "file", "out", "images"} and flags.data_path == "" and flags.images == 2
    early.check("visualize.py", flags)
    flags = parse(visualize.get_args_parser(), [*words, "--data_path", ""])
    with pytest.raises(ValueError, match="--data_path is empty"):
        early.check("visualize.py", flags)
