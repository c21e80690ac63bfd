"""Fine-tuning and probing in whole runs: from a pretrained checkpoint to evaluation."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
import tiny  # noqa: F401 (registers mae_test and vit_test)
from backbones.registry import build_classifier
from backbones.teacher import build_teacher
from commands import accuracy, call, pretrained
from layers.pos_embed import sincos_2d
from util.data.sources.layouts import class_names
from util.weights import checkpoint


@pytest.fixture
def shapes(tmp_path):
    """Two classes that a linear model can tell apart, as PNGs with 1, 3 or 4 channels."""

    def make(mode: str, size=(28, 42)):
        rng = np.random.default_rng(0)
        for split, n in (("train", 20), ("val", 10)):
            for c, name in enumerate(("dark", "light")):
                folder = tmp_path / "data" / split / name
                folder.mkdir(parents=True)
                for i in range(n):
                    pixels = rng.integers(100 * c, 100 * c + 120, (*size, len(mode)), dtype=np.uint8)
                    Image.fromarray(pixels.squeeze(), mode).save(folder / f"{i}.png")
        return tmp_path / "data"

    return make


@pytest.mark.parametrize(
    "mode,patch,size", [("L", 8, (16, 24)), ("RGBA", 14, (28, 42)), ("RGB", 8, (24, 16))]
)
def test_rectangles_channels_and_patches_from_pretraining_to_evaluation(
    tmp_path, capsys, shapes, mode, patch, size
):
    common = [
        "--data_path",
        shapes(mode),
        "--input_size",
        *size,
        "--patch_size",
        patch,
        "--in_chans",
        len(mode),
        "--batch_size",
        8,
    ]
    if mode == "RGBA":
        common += ["--mean", *[0.5] * 4, "--std", *[0.25] * 4]
    checkpoint_file = pretrained(tmp_path, capsys, *common)
    augment = ["--aa", "", "--reprob", 0]
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "vit_test",
        *common,
        *augment,
        "--finetune",
        checkpoint_file,
        "--output_dir",
        tmp_path / "ft",
        "--epochs",
        6,
        "--lr",
        3e-3,
        "--warmup_epochs",
        1,
    )
    assert code == 0 and "labels apl" in text and "a new one, zero" in text, text
    assert float(accuracy(text)[-1]) == 100, "two plain classes are learned"
    code, evaluated = call(
        main_finetune,
        capsys,
        "--model",
        "vit_test",
        *common,
        "--eval",
        "--resume",
        tmp_path / "ft" / "checkpoint-last.pth",
    )
    assert code == 0 and accuracy(evaluated) == accuracy(text)[-1:]
    code, probed = call(
        main_linprobe,
        capsys,
        "--model",
        "vit_test",
        *common,
        "--finetune",
        checkpoint_file,
        "--knn",
        "--output_dir",
        tmp_path / "knn",
    )
    assert code == 0 and "kNN cls: k=10" in probed and "(40 training and 20 validation images" in probed


def test_a_new_positional_embedding_is_trained_where_the_encoder_is_frozen(tmp_path, capsys):
    for pos_embed, learns in (("none", True), ("sincos", False)):  # of the pretraining
        out = tmp_path / pos_embed
        file = pretrained(out, capsys, "--pos_embed", pos_embed)
        code, text = call(
            main_finetune,
            capsys,
            "--model",
            "vit_test",
            "--finetune",
            file,
            "--partial",
            0,
            "--output_dir",
            out,
        )
        assert code == 0, text
        state = checkpoint.load(str(out / "checkpoint-last.pth"))
        start = 0 if learns else sincos_2d(32, (4, 4))
        assert bool((state.model["pos_embed"] != start).any()) is learns


def test_images_are_as_the_checkpoint_has_learned_to_see_them(tmp_path, capsys, shapes):
    """--mean and --std are stored, and taken where none are given; another size is said."""
    common = ["--model", "vit_test", "--data_path", shapes("RGB"), "--batch_size", 8, "--output_dir"]
    stats = ["--mean", 0.9, 0.1, 0.5, "--std", 0.1, 0.2, 0.3]
    code, text = call(main_finetune, capsys, *common, tmp_path / "ft", *stats, "--aa", "", "--reprob", 0)
    assert code == 0, text
    last = str(tmp_path / "ft" / "checkpoint-last.pth")
    lines = [re.findall(r"\* Acc@1.*", text)[-1:]]
    for more in ([], stats, ["--mean", 0, 0, 0, "--std", 1, 1, 1]):
        code, text = call(main_finetune, capsys, *common, tmp_path / "no", "--eval", "--resume", last, *more)
        assert code == 0 and ("other than in training: mean" in text) == (more not in ([], stats)), text
        lines.append(re.findall(r"\* Acc@1.*", text))
    assert lines[0] == lines[1] == lines[2] != lines[3]
    code, text = call(
        main_finetune,
        capsys,
        *common,
        tmp_path / "no",
        "--eval",
        "--resume",
        last,
        "--pos_embed",
        "none",
        "--input_size",
        40,
    )
    assert code == 2 and "does not fit" in text
    file = pretrained(tmp_path, capsys, *stats)
    code, text = call(
        main_linprobe,
        capsys,
        "--model",
        "vit_test",
        "--finetune",
        file,
        "--knn",
        "--input_size",
        40,
        "--output_dir",
        tmp_path / "knn",
    )
    assert code == 0 and "(other than in training: input_size: [32] -> [40])" in text, text
    record = json.loads((tmp_path / "knn" / "run.json").read_text())["flags"]
    assert (record["mean"], record["std"]) == ([0.9, 0.1, 0.5], [0.1, 0.2, 0.3])


def test_the_labels_tokens_are_those_of_the_pretraining(tmp_path, capsys):
    code, text = call(
        main_pretrain,
        capsys,
        "--model",
        "mae_test",
        "--pos_label",
        "rpl",
        "--pos_tokens",
        "full",
        "--mask_ratio",
        0.5,
        "--output_dir",
        tmp_path / "pt",
    )
    assert code == 0, text
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "vit_test",
        "--finetune",
        tmp_path / "pt" / "checkpoint-last.pth",
        "--output_dir",
        tmp_path / "ft",
    )
    assert code == 0 and "pos_head" not in re.search(r"; new: (.*)", text)[1], text
    assert checkpoint.load(str(tmp_path / "ft" / "checkpoint-last.pth")).args["pos_tokens"] == "full"


def test_a_folder_that_holds_another_run_says_so(tmp_path, capsys):
    """MAE's --output_dir has a default, so that this happens."""
    file = pretrained(tmp_path, capsys)
    code, text = call(
        main_finetune, capsys, "--model", "vit_test", "--finetune", file, "--output_dir", tmp_path / "pt"
    )
    assert code == 2 and "is a full pretraining checkpoint" in text and "give another --output_dir" in text
    run = ["--model", "vit_test", "--output_dir", tmp_path / "ft"]
    assert call(main_finetune, capsys, *run, "--finetune", file)[0] == 0
    again = tmp_path / "again.pth"
    again.write_bytes(Path(file).read_bytes())
    code, text = call(main_finetune, capsys, *run, "--finetune", again)
    assert (
        code == 0
        and f"warning: --finetune {again} is not read: the run continues from its own weights" in text
    )
    again.unlink()
    assert call(main_finetune, capsys, *run, "--finetune", again)[0] == 0, "nor is it missed"
    code, text = call(
        main_finetune, capsys, *run, "--resume", tmp_path / "ft" / "checkpoint-last.pth", "--epochs", 2
    )
    assert code == 0 and "continuing" in text, (
        "layer decay is as it was, though --finetune was not given again"
    )


@pytest.mark.parametrize(
    "pos_embed,pos_label",
    [
        ("none", "none"),
        ("learned", "none"),
        ("none", "apl"),
        ("none", "rpl"),
        ("learned", "apl"),
        ("sincos", "rpl"),
        ("none", "apl+rpl"),
    ],
)
def test_embedding_and_labels_are_independent(tmp_path, capsys, pos_embed, pos_label):
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "vit_test",
        "--pos_embed",
        pos_embed,
        "--pos_label",
        pos_label,
        "--output_dir",
        tmp_path,
    )
    assert code == 0, text
    keys = checkpoint.load(str(tmp_path / "checkpoint-last.pth")).model.keys()
    assert ("pos_embed" in keys) == (pos_embed != "none")
    assert {k.split(".")[1] for k in keys if k.startswith("pos_head.")} == set(pos_label.split("+")) - {
        "none"
    }
    assert ("position_acc" in text) == (pos_label != "none")


def test_a_teacher_of_ours_and_a_student_without_the_token(tmp_path, capsys):
    code, text = call(main_finetune, capsys, "--model", "vit_test", "--output_dir", tmp_path / "teacher")
    assert code == 0, text
    flags = ["--distill", "vit_test", "--distill_checkpoint", tmp_path / "teacher" / "checkpoint-last.pth"]
    code, text = call(main_finetune, capsys, "--model", "vit_test", *flags, "--output_dir", tmp_path / "a")
    assert code == 2 and "needs a model with a distillation token" in text
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "deit_tiny_distilled_patch16",
        *flags,
        "--pos_label",
        "apl",
        "--output_dir",
        tmp_path / "b",
    )
    assert code == 0 and "distill:" in text and "position:" in text, text


def test_a_teacher_is_what_its_file_says(tmp_path, capsys):
    """Its own classes, pooling, embedding and normalisation, none of which the student's flags say."""
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "vit_test",
        "--cls_token",
        "--pos_embed",
        "none",
        "--mean",
        0.5,
        0.4,
        0.3,
        "--std",
        0.2,
        0.3,
        0.4,
        "--output_dir",
        tmp_path,
    )
    assert code == 0, text
    file = tmp_path / "checkpoint-last.pth"
    saved = checkpoint.load(str(file))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    options = dict(img_size=(32, 32), in_chans=3, mean=mean, std=std)
    teacher = build_teacher("vit_test", str(file), classes=saved.classes, **options)
    model = build_classifier(
        "vit_test", img_size=(32, 32), num_classes=10, pool="cls", pos_embed="none"
    ).eval()
    model.load_state_dict(saved.model)
    pixels = torch.rand(2, 3, 32, 32)
    by = lambda m, s: (pixels - torch.tensor(m)[:, None, None]) / torch.tensor(s)[:, None, None]  # noqa: E731
    assert torch.allclose(teacher(by(mean, std)), model(by((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))), atol=1e-5)
    with pytest.raises(
        ValueError, match=r"`distill_checkpoint` .* knows the classes .*, the data have .*: fine-tune"
    ):
        build_teacher("vit_test", str(file), classes=saved.classes[::-1], **options)
    with pytest.raises(
        ValueError, match="trained with `range` 0 255, and the student has 0 4095: train both"
    ):
        build_teacher("vit_test", str(file), classes=saved.classes, value_range=[0.0, 4095.0], **options)


def test_classes_are_stored_and_compared(tmp_path, capsys, shapes):
    common = [
        "--model",
        "vit_test",
        "--data_path",
        shapes("RGB"),
        "--batch_size",
        8,
        "--output_dir",
        tmp_path / "run",
    ]
    assert call(main_finetune, capsys, *common)[0] == 0
    assert checkpoint.load(str(tmp_path / "run" / "checkpoint-last.pth")).classes == ["dark", "light"]
    for split in ("train", "val"):  # as many classes, and others
        (tmp_path / "data" / split / "light").rename(tmp_path / "data" / split / "bright")
    code, text = call(main_finetune, capsys, *common, "--epochs", 2)
    assert code == 2 and "was trained on the classes dark, light, the data have bright, dark" in text
    code, text = call(
        main_finetune, capsys, *common, "--eval", "--resume", tmp_path / "run" / "checkpoint-last.pth"
    )
    assert code == 2 and "knows dark, light, and the data have bright in addition" in text
    code, text = call(main_finetune, capsys, *common, "--classes", tmp_path / "data")
    assert code == 2 and "--classes names the outputs of a model for --eval" in text
    listed = tmp_path / "twice.txt"
    listed.write_text("a\nb\na\n")
    with pytest.raises(ValueError, match="lists classes twice: a"):
        class_names(listed)
    assert class_names(tmp_path / "data") == class_names(tmp_path / "data" / "train") == ["bright", "dark"]


def test_validation_images_under_another_name_or_held_out(tmp_path, capsys, shapes):
    """In each main that reads them; what was given is stored."""
    data = shapes("RGB")
    (data / "val").rename(data / "test")
    named = ["--data_path", data, "--val_split", "test"]
    shared = ["--data_path", data / "train", "--val_share", 0.1]
    for number, (flags, train, val) in enumerate(((named, 40, 20), (shared, 36, 4))):
        encoder = pretrained(tmp_path / str(number), capsys, "--batch_size", 8, *flags)
        assert checkpoint.load(str(encoder)).args["val_share"] == (0, 0.1)[number]
        model = ["--model", "vit_test", "--batch_size", 8, *flags]
        for main in (main_finetune, main_linprobe):
            run = [*model, "--finetune", encoder, "--output_dir", tmp_path / f"{main.__name__}{number}"]
            code, text = call(main, capsys, *run, "--epochs", 1)
            assert code == 0, text
            assert re.search(rf"evaluation on \S+: {val} images, 2 classes", text), text
            assert re.search(rf"training on \S+: {train} images, 2 classes", text), text
    code, text = call(main_finetune, capsys, "--model", "vit_test", "--data_path", data)
    assert code == 2 and "Rename test to val, or give --val_split test." in text


def test_each_learning_rate_of_the_probe_is_on_its_own(tmp_path, capsys):
    """A head trained in the grid equals the same head trained alone."""
    file = pretrained(tmp_path, capsys)
    heads = {}
    for name, grid in (("alone", [1]), ("first", [1, 5])):
        code, text = call(
            main_linprobe,
            capsys,
            "--model",
            "vit_test",
            "--finetune",
            file,
            "--output_dir",
            tmp_path / name,
            "--lr_grid",
            *grid,
            "--epochs",
            2,
            "--warmup_epochs",
            0,
            "--blr",
            1,
        )
        assert code == 0, text
        heads[name] = checkpoint.load(str(tmp_path / name / "checkpoint-last.pth")).model
    assert torch.equal(heads["alone"]["head.1.weight"], heads["first"]["head.1.weight"])
    assert not torch.equal(heads["first"]["head.1.weight"], heads["first"]["head.2.weight"])
    assert heads["alone"]["head.0.running_mean"].abs().sum() > 0
    assert "head.0.weight" not in heads["alone"], "standardisation has no parameters"


def test_a_run_that_went_on_from_a_fine_tuned_one_goes_on_itself(tmp_path, capsys):
    """The encoder's file is no flag of its own any more, and layer decay stays."""
    file = pretrained(tmp_path, capsys)
    first = ["--model", "vit_test", "--finetune", file, "--output_dir", tmp_path / "a"]
    assert call(main_finetune, capsys, *first)[0] == 0
    then = [
        "--model",
        "vit_test",
        "--resume",
        tmp_path / "a" / "checkpoint-last.pth",
        "--output_dir",
        tmp_path / "b",
    ]
    for epochs in (2, 3):
        code, text = call(main_finetune, capsys, *then, "--epochs", epochs)
        assert code == 0 and f"Epoch: [{epochs - 1}]" in text, text
    groups = [
        len(checkpoint.load(str(tmp_path / x / "checkpoint-last.pth")).entries["optimizer"]["param_groups"])
        for x in "ab"
    ]
    assert groups[0] == groups[1] > 2


def test_cached_features_are_the_backbones(tmp_path, capsys):
    file = pretrained(tmp_path, capsys)
    for pool in ("--cls_token", "--global_pool"):
        code, text = call(
            main_linprobe,
            capsys,
            "--model",
            "vit_test",
            "--finetune",
            file,
            "--output_dir",
            tmp_path / pool,
            "--cached",
            pool,
            "--epochs",
            30,
            "--blr",
            1,
        )
        assert code == 0 and float(accuracy(text)[-1]) > 20, (
            text
        )  # ten classes; the demo scenes differ in colour


@pytest.mark.parametrize("head", ["linear", "second_order"])
def test_a_trained_probe_is_evaluated_again(tmp_path, capsys, head):
    file = pretrained(tmp_path, capsys)
    common = ["--model", "vit_test", "--finetune", file]
    more = ["--so_alpha", 0.1] if head == "second_order" else []
    code, text = call(
        main_linprobe,
        capsys,
        *common,
        "--output_dir",
        tmp_path / "lp",
        "--lr_grid",
        1,
        30,
        "--blr",
        1,
        "--warmup_epochs",
        0,
        "--global_pool",
        "--head",
        head,
        *more,
    )
    assert code == 0, text
    # grid, pooling and head are the probe's own; an --output_dir is neither read nor written
    code, again = call(
        main_linprobe,
        capsys,
        *common,
        "--eval",
        "--resume",
        tmp_path / "lp" / "checkpoint-last.pth",
        "--output_dir",
        tmp_path / "none",
    )
    lines = [re.findall(r"\* Acc@1.*", t) for t in (text, again)]
    line = json.loads((tmp_path / "lp" / "log.txt").read_text().splitlines()[-1])
    assert {
        "train_lr",
        "train_loss",
        "test_loss",
        "test_acc1",
        "test_acc5",
        "epoch",
        "n_parameters",
    } <= line.keys(), "MAE's"
    assert line["n_parameters"] == 32 * 10 + 10 or head == "second_order"
    assert code == 0 and len(lines[1]) == 1 and lines[1] == lines[0][-1:], again
    assert not (tmp_path / "none").exists()
    code, text = call(main_linprobe, capsys, *common, "--eval")
    assert code == 2 and "--eval needs --resume FILE, a trained probe" in text
    code, text = call(main_linprobe, capsys, *common, "--eval", "--resume", file)
    assert code == 2 and "is a full pretraining checkpoint" in text


def test_the_probe_uses_timms_lars(tmp_path, capsys, monkeypatch):
    lars = pytest.importorskip("timm.optim")
    made = []

    class Spy(lars.Lars):
        def __init__(self, groups, **kwargs):
            made.append(kwargs | {"scales": [g["lr_scale"] for g in groups]})
            super().__init__(groups, **kwargs)

    monkeypatch.setattr(lars, "Lars", Spy)
    code, text = call(
        main_linprobe,
        capsys,
        "--model",
        "vit_test",
        "--finetune",
        pretrained(tmp_path, capsys),
        "--output_dir",
        tmp_path / "lp",
    )
    assert code == 0, text
    assert made == [
        dict(
            lr=0.1 * 40 / 256,
            momentum=0.9,
            trust_coeff=0.001,
            scales=[0.1, 0.1, 0.3, 0.3, 1.0, 1.0, 3.0, 3.0, 10.0, 10.0],
        )
    ]
