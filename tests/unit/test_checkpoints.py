"""Exported files give the same outputs in other libraries and come back equal; broken files are refused."""

import argparse
import functools
import json
import pathlib
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import commands
import main_finetune
import main_linprobe
import main_pretrain
import tiny  # noqa: F401 (registers mae_test and vit_test)
from backbones.registry import build_classifier
from layers.pos_embed import sincos_2d
from models_mae_pl import MODELS, MaskedAutoencoderViT
from tools import convert, inspect
from tools import formats as conversions
from tools.stored_model import model_of
from util.data.pixels import Pixels
from util.flags.parser import parse, run
from util.train.setup import Setup
from util.weights import checkpoint, transfer
from util.weights.types import Checkpoint, kind_of


def randomised(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # large enough for attention to matter
    return model.eval()


def saved(path, model, **args) -> str:
    """The model as a file of this toolkit."""
    name = "vit_test"
    if isinstance(model, MaskedAutoencoderViT):
        name = "mae_test"
    defaults = {"model": name, "pos_label": "none", "input_size": list(model.img_size)}
    torch.save({"model": model.state_dict(), "args": defaults | args, "epoch": 3}, path)
    return str(path)


def noise_for(model):
    """Images, noise, and the cells that both MAE implementations keep for it."""
    images = torch.randn(2, model.in_chans, *model.img_size)
    noise = torch.rand(2, model.patch_embed.num_patches)  # (B, L)
    ids_keep = noise.argsort(1)[:, : int(noise.shape[1] * 0.25)]  # (B, n)
    return images, noise, ids_keep


# -- timm ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "pool,pos_embed,pos_label", [("avg", "learned", "apl"), ("cls", "sincos", "none"), ("avg", "none", "rpl")]
)
def test_a_fine_tuned_model_to_timm_and_back(tmp_path, capsys, suffix, pool, pos_embed, pos_label):
    import timm

    ours = randomised(
        build_classifier(
            "vit_test", img_size=(32, 48), num_classes=7, pool=pool, pos_embed=pos_embed, pos_label=pos_label
        )
    )
    file = saved(tmp_path / "ours.pth", ours)
    out = str(tmp_path / f"out.{suffix}")
    back = str(tmp_path / "back.pth")
    assert convert.export(file, out, "timm") < 1e-4
    # The second printed line is the code that loads the file.
    code = capsys.readouterr().out.splitlines()[1]
    theirs = eval(code, {"timm": timm}).eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)
        assert theirs(images).std() > 0.01
    square = randomised(
        build_classifier("vit_test", img_size=(32, 32), num_classes=7, pool=pool, pos_embed=pos_embed)
    )
    convert.export(saved(tmp_path / "square.pth", square, input_size=[32]), out, "timm")
    # A width of 32 is taken for one head.
    convert.import_file(out, back)
    weights = checkpoint.load(back).model
    assert all(torch.equal(v, weights[k]) for k, v in square.state_dict().items())
    assert kind_of(weights) == "classifier"


def test_a_pretrained_encoder_gives_timm_the_same_features(tmp_path):
    import timm

    mae = randomised(MODELS["mae_test"](img_size=(32, 32), pos_embed="none"))
    out = str(tmp_path / "out.pth")
    convert.export(saved(tmp_path / "ours.pth", mae), out, "timm")
    theirs = timm.create_model(
        "vit_base_patch16_224",
        checkpoint_path=out,
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        global_pool="token",
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = mae.forward_encoder(images, torch.arange(16).expand(2, -1))
        assert torch.allclose(theirs.forward_features(images), expected, atol=1e-5)


def test_a_file_written_by_timm_is_imported(tmp_path):
    import timm

    theirs = randomised(
        timm.create_model("vit_tiny_patch16_224", img_size=(32, 32), num_classes=0, in_chans=1)
    )
    file = tmp_path / "timm.pth"
    out = str(tmp_path / "ours.pth")
    torch.save({"state_dict": theirs.state_dict(), "arch": "vit_tiny_patch16_224"}, file)
    assert convert.import_file(str(file), out) < 1e-4
    state = checkpoint.load(out)
    assert state.args["model"] == "vit_tiny_patch16" and state.args["input_size"] == [32, 32]
    ours = build_classifier("vit_tiny_patch16", img_size=(32, 32), in_chans=1, pool="cls", num_classes=0)
    assert "positional embedding from the checkpoint" in transfer.init_encoder(ours, state, "zero")
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(images), theirs(images), atol=1e-5)


# -- Hugging Face --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "pos_embed,norm_pix,init", [("sincos", True, "zero"), ("none", False, "zero"), ("none", False, "sincos")]
)
def test_a_masked_autoencoder_to_hugging_face_and_back(tmp_path, pos_embed, norm_pix, init):
    ours = randomised(
        MODELS["mae_test"](img_size=(32, 32), pos_embed=pos_embed, norm_pix_loss=norm_pix, in_chans=1)
    )
    file = saved(tmp_path / "a.pth", ours, norm_pix_loss=norm_pix)
    out = str(tmp_path / "hf")
    assert convert.export(file, out, "hf", init) < 1e-4
    # A new sine-cosine table is not the one that the encoder was trained with.
    keeps_embedding = init == "zero" or pos_embed != "none"
    check_transformers_outputs(ours, out, keeps_embedding)
    back = str(tmp_path / "b.pth")
    assert convert.import_file(out, back) < 1e-4
    state = checkpoint.load(back)
    assert state.args["norm_pix_loss"] is norm_pix and state.args["num_heads"] == 2
    weights = ours.state_dict()
    common = state.model.keys() & weights.keys()
    assert all(torch.equal(state.model[k], weights[k]) for k in common)
    assert weights.keys() - common == {k for k in weights if k.startswith("pos_head.")}


@pytest.mark.parametrize("form", ["parts", "bin"])
def test_a_folder_of_parts_or_of_the_older_format_is_imported(tmp_path, form):
    folder = tmp_path / "hf"
    convert.export(
        saved(tmp_path / "a.pth", randomised(MODELS["mae_test"](img_size=(32, 32)))), str(folder), "hf"
    )
    whole = folder / "model.safetensors"
    weights = load_file(whole)
    expected = conversions.read(str(folder)).model
    if form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
        given = folder / "pytorch_model.bin"
    else:
        names = sorted(weights)
        for part in (0, 1):
            given = folder / f"model-0000{part + 1}-of-00002.safetensors"
            save_file({name: weights[name] for name in names[part::2]}, given)
    whole.unlink()
    found = conversions.read(str(folder)).model
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    # The file alone comes with the command for its folder.
    with pytest.raises(ValueError, match=f"python checkpoints.py import {folder} {folder}.pth, and give"):
        conversions.read(str(given))
    if form != "bin":
        given.unlink()
        with pytest.raises(ValueError, match="it lacks 1 of the 2 parts"):
            conversions.read(str(folder))


def check_transformers_outputs(ours, folder, expect_equal: bool):
    """Compare predictions, masks and losses with those of the model in a Hugging Face folder."""
    transformers = pytest.importorskip("transformers")

    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
    images, noise, ids_keep = noise_for(ours)
    with torch.no_grad():
        losses, pred, mask = ours(images, ids_keep=ids_keep)
        answer = theirs(images, noise=noise)
    assert torch.equal(mask, answer.mask)
    assert torch.allclose(pred, answer.logits, atol=1e-4) == expect_equal
    if expect_equal:
        assert torch.allclose(losses["pixel"], answer.loss, atol=1e-4), "target and norm_pix_loss agree"


@pytest.mark.parametrize("name", ["swin_pico", "so_vit_7", "timm/nest_tiny", "vit_test"])
def test_a_classifier_starts_another(name):
    """From one data set to the next: without its head, unless the classes are the same."""
    torch.manual_seed(0)
    first, second = (
        build_classifier(name, img_size=(64, 64), num_classes=n, pos_label="apl") for n in (7, 7)
    )
    new = {k: v.clone() for k, v in second.state_dict().items()}
    names = list("abcdefg")
    file = Checkpoint("x.pth", first.state_dict(), classes=names)
    note = transfer.init_encoder(second, file, "zero", list("hijklmn"))
    assert "from a classifier, without its head" in note and "new: head" in note
    for k, v in second.state_dict().items():
        assert torch.equal(v, new[k] if k.startswith("head") else first.state_dict()[k]), k
    note = transfer.init_encoder(second, file, "zero", names)
    assert "with its head, which has the same classes; " in note and "new: nothing" in note
    assert all(torch.equal(v, first.state_dict()[k]) for k, v in second.state_dict().items())


@pytest.mark.parametrize(
    "pool, stored, classes, kept",
    [
        ("avg", None, 5, True),
        ("cls", None, 5, False),
        ("avg", None, 4, False),
        ("avg", list("abcde"), 5, True),
        ("avg", list("abcdf"), 5, False),
    ],
)
def test_a_head_goes_on_where_classes_and_pooling_agree(pool, stored, classes, kept):
    first = randomised(build_classifier("vit_test", img_size=(32, 32), num_classes=5))
    second = build_classifier("vit_test", img_size=(48, 48), num_classes=classes, pool=pool)
    file = Checkpoint("x.pth", first.state_dict(), {"input_size": [32], "patch_size": [8]}, stored)
    note = transfer.init_encoder(second, file, "zero", list("abcde")[:classes])
    assert ("with its head" in note) == kept and "resized from (4, 4) to (6, 6)" in note
    assert (
        second.head.weight.shape == first.head.weight.shape
        and torch.equal(second.head.weight, first.head.weight)
    ) == kept
    norm = second.fc_norm if pool == "avg" else second.norm
    assert torch.equal(norm.weight, first.fc_norm.weight), "the last norm goes along in both places"


def test_flags_that_differ_in_form_only_are_no_change():
    old = {"input_size": 224, "mean": None, "in_chans": 3}  # as MAE stores them
    assert (
        checkpoint.other_than_trained(
            Checkpoint("x.pth", {}, old), {"input_size": [224], "mean": [0.5], "in_chans": 3}
        )
        == ""
    )
    assert "input_size: 224 -> [192]" in checkpoint.other_than_trained(
        Checkpoint("x.pth", {}, old), {"input_size": [192], "in_chans": 3}
    )


def test_an_unknown_target_stays_unknown(tmp_path, capsys):
    mae = MODELS["mae_test"](img_size=(32, 32), pos_embed="sincos", pos_label="none")
    torch.save({"model": mae.state_dict()}, tmp_path / "a.pth")  # MAE's released files have weights alone
    convert.import_file(str(tmp_path / "a.pth"), str(tmp_path / "b.pth"))
    assert "norm_pix_loss" not in checkpoint.load(str(tmp_path / "b.pth")).args
    assert "target not stored" in capsys.readouterr().out
    convert.export(str(tmp_path / "b.pth"), str(tmp_path / "hf"), "hf")
    assert "does not say whether its target was normalised" in capsys.readouterr().out


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_a_folder_written_by_transformers_is_imported(tmp_path, eps):
    transformers = pytest.importorskip("transformers")

    config = transformers.ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=24,
        patch_size=8,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        layer_norm_eps=eps,
    )
    theirs = randomised(transformers.ViTMAEForPreTraining(config))
    theirs.save_pretrained(tmp_path / "hf")
    assert convert.import_file(str(tmp_path / "hf"), str(tmp_path / "ours.pth")) < 1e-4
    ours = model_of(checkpoint.load(str(tmp_path / "ours.pth")))
    images = torch.randn(2, 3, 24, 24)
    noise = torch.rand(2, 9)
    ids_keep = noise.argsort(1)[:, :2]
    with torch.no_grad():
        assert torch.allclose(
            ours(images, ids_keep=ids_keep)[1], theirs(images, noise=noise).logits, atol=1e-4
        )


def test_another_epsilon_of_the_layer_norms_goes_along(tmp_path, capsys):
    """Into the imported file, the models that are made of it, and back; MAE's models cannot have it."""
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")

    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        layer_norm_eps=0.5,
    )
    theirs = randomised(transformers.ViTModel(config, add_pooling_layer=False))
    theirs.save_pretrained(tmp_path / "hf")
    file = str(tmp_path / "a.pth")
    assert convert.import_file(str(tmp_path / "hf"), file) < 1e-4
    state = checkpoint.load(file)
    assert state.args["layer_norm_eps"] == 0.5
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        assert torch.allclose(model_of(state).forward_features(images), expected, atol=1e-4)
        flags = ["--model", "vit_test", "--finetune", file, "--input_size", "32", "--device", "cpu"]
        args = parse(main_linprobe.get_args_parser(), flags)
        setup = Setup(torch.device("cpu"), "fp32", (32, 32), Pixels((0.5,) * 3, (0.5,) * 3))
        probed = main_linprobe.load_backbone(args, state, setup, {})
        assert torch.allclose(probed.forward_features(images), expected, atol=1e-4)
    capsys.readouterr()
    convert.export(file, str(tmp_path / "t.pth"), "timm")
    code = capsys.readouterr().out.splitlines()[1]
    model = eval(code, {"timm": timm, "torch": torch, "functools": functools}).eval()
    with torch.no_grad():
        assert torch.allclose(model.forward_features(images), expected, atol=1e-4)
    convert.export(file, str(tmp_path / "back"), "hf")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["layer_norm_eps"] == 0.5
    with pytest.raises(ValueError, match=r"layer_norm_eps 1e-06 instead of 0\.5"):
        convert.export(file, str(tmp_path / "m.pth"), "mae")


def test_runs_keep_the_epsilon_of_their_start(tmp_path, capsys):
    mae = randomised(MODELS["mae_test"](img_size=(32, 32), pos_label="none", norm_eps=0.5))
    with torch.no_grad():
        mae.decoder_pos_embed.copy_(sincos_2d(32, (4, 4)))
    file = saved(tmp_path / "a.pth", mae, layer_norm_eps=0.5)
    images = torch.randn(2, 3, 32, 32)
    cells = torch.arange(16).expand(2, -1)
    with torch.no_grad():
        expected = mae(images, ids_keep=cells[:, :4])[1]
        assert torch.allclose(model_of(checkpoint.load(file))(images, ids_keep=cells[:, :4])[1], expected)
    flags = ["--model", "mae_test", "--pos_label", "none", "--lr", "0", "--picture_epochs", "9"]
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    start(main_pretrain, capsys, *flags, "--init_from", file, "--output_dir", first)
    start(main_pretrain, capsys, *flags, "--resume", first, "--output_dir", second, "--epochs", "2")
    with torch.no_grad():
        again = model_of(checkpoint.load(second))
        assert torch.allclose(again(images, ids_keep=cells[:, :4])[1], expected)
        latent = mae.forward_encoder(images, cells)
    flags = ["--model", "vit_test", "--cls_token", "--lr", "0"]
    start(main_finetune, capsys, *flags, "--finetune", second, "--output_dir", str(tmp_path / "ft"))
    tuned = checkpoint.load(str(tmp_path / "ft"))
    assert tuned.args["layer_norm_eps"] == 0.5
    with torch.no_grad():
        assert torch.allclose(model_of(tuned).forward_features(images), latent, atol=1e-5)
    start(main_finetune, capsys, *flags, "--output_dir", str(tmp_path / "ft"), "--epochs", "2")
    assert checkpoint.load(str(tmp_path / "ft")).args["layer_norm_eps"] == 0.5


def start(main, capsys, *flags) -> None:
    """Run a main, whose model must have layer norms of the epsilon 0.5."""
    fit = main.fit

    def checked(model, *rest):
        assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {0.5}
        return fit(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "fit", checked)
        code, text = commands.call(main, capsys, *flags)
    assert code == 0, text


@pytest.mark.parametrize("classes", [0, 5])
def test_vit_to_hugging_face_and_back(tmp_path, classes):
    transformers = pytest.importorskip("transformers")

    # One of the cases is a rectangle.
    size = (32, 32) if classes else (32, 48)
    ours = randomised(
        build_classifier("vit_test", img_size=size, num_classes=classes, pool="cls", pos_embed="learned")
    )
    out = str(tmp_path / "hf")
    back = str(tmp_path / "b.pth")
    assert convert.export(saved(tmp_path / "a.pth", ours), out, "hf") < 1e-4
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        if classes:
            theirs = transformers.ViTForImageClassification.from_pretrained(out).eval()(images).logits
        else:
            theirs = (
                transformers.ViTModel.from_pretrained(out, add_pooling_layer=False)
                .eval()(images)
                .last_hidden_state[:, 0]
            )
        assert torch.allclose(theirs, ours(images), atol=1e-4)
    convert.import_file(out, back)
    assert all(torch.equal(v, checkpoint.load(back).model[k]) for k, v in ours.state_dict().items())


def test_names_of_classes_go_along(tmp_path):
    transformers = pytest.importorskip("transformers")

    ours = build_classifier("vit_test", img_size=(32, 32), num_classes=3, pool="cls")
    names = ["owl", "bee", "cat"]
    file = saved(tmp_path / "a.pth", ours)
    torch.save(torch.load(file, weights_only=True) | {"classes": names}, file)
    for to, out in (("safetensors", "b.safetensors"), ("mae", "c.pth"), ("hf", "d")):
        convert.export(file, str(tmp_path / out), to)
        if to == "hf":
            config = transformers.ViTForImageClassification.from_pretrained(tmp_path / out).config
            assert config.id2label == dict(enumerate(names)) and config.label2id["cat"] == 2
        else:
            assert checkpoint.load(str(tmp_path / out)).classes == names
    assert "class names owl, bee, cat" in inspect.describe(file)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: MODELS["mae_test"](img_size=(32, 48)), "ViTMAE takes square images"),
        (
            lambda: build_classifier("vit_test", img_size=(32, 32), num_classes=5),
            "classifies the mean of the patch tokens",
        ),
        (
            lambda: build_classifier("deit_tiny_distilled_patch16", img_size=(32, 32), num_classes=5),
            "has a distillation token",
        ),
        (
            lambda: build_classifier("swin_tiny", img_size=(64, 64), num_classes=5),
            "does not hold a plain Vision Transformer",
        ),
    ],
)
def test_what_hugging_face_cannot_hold_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        convert.export(saved(tmp_path / "a.pth", make()), str(tmp_path / "hf"), "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"], "nothing is left"


# -- MAE, encoder, safetensors -------------------------------------------------------------------------------
def test_mae_files_out_and_in(tmp_path):
    ours = randomised(MODELS["mae_test"](img_size=(32, 32), pos_label="apl"))
    out = str(tmp_path / "mae.pth")
    back = str(tmp_path / "back.pth")
    assert convert.export(saved(tmp_path / "a.pth", ours, pos_label="apl"), out, "mae") < 1e-6
    weights = torch.load(out, weights_only=True)["model"]
    plain = MODELS["mae_test"](img_size=(32, 32), pos_embed="sincos", pos_label="none")
    assert weights.keys() == plain.state_dict().keys() and not weights["pos_embed"].any()
    # As facebookresearch/mae saves it: a Namespace, and under submitit a PosixPath in it.
    args = argparse.Namespace(
        model="mae_test", input_size=32, norm_pix_loss=True, output_dir=pathlib.PosixPath("/runs/1")
    )
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 9, "scaler": {}, "args": args}, out)
    assert convert.import_file(out, back) < 1e-4
    state = checkpoint.load(back)
    assert (
        all(torch.equal(weights[k], v) for k, v in state.model.items())
        and state.args["norm_pix_loss"] is True
    )
    with pytest.raises(ValueError, match="file of this toolkit already"):
        convert.import_file(back, str(tmp_path / "c.pth"))


def test_encoder_and_safetensors(tmp_path):
    ours = randomised(MODELS["mae_test"](img_size=(32, 48), pos_label="apl+rpl"))
    file = saved(tmp_path / "a.pth", ours, pos_label="apl+rpl")
    out = str(tmp_path / "out.safetensors")
    assert convert.export(file, out, "safetensors") == 0
    state = checkpoint.load(out)
    assert state.kind == "pretraining" and state.args["input_size"] == [32, 48]
    assert not any(k.startswith("pos_head.") for k in state.model)
    assert convert.export(out, str(tmp_path / "e.pth"), "encoder") < 1e-5
    state = checkpoint.load(str(tmp_path / "e.pth"))
    assert state.kind == "encoder" and "pos_embed" not in state.model
    model = build_classifier("vit_test", img_size=(32, 48), num_classes=0, pool="cls", pos_embed="none")
    transfer.init_encoder(model, state, "zero")
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = ours.forward_encoder(images, torch.arange(24).expand(2, -1))
        assert torch.allclose(model.eval().forward_features(images), expected, atol=1e-5)


def test_the_encoder_of_a_classifier_keeps_its_norm(tmp_path):
    ours = randomised(build_classifier("vit_test", img_size=(32, 32), num_classes=7, pool="avg"))
    convert.export(saved(tmp_path / "a.pth", ours), str(tmp_path / "e.pth"), "encoder")
    encoder = model_of(checkpoint.load(str(tmp_path / "e.pth")))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(
            encoder.forward_features(images), ours.fc_norm(ours.forward_features(images)), atol=1e-5
        )


def test_a_conversion_that_would_differ_is_refused(tmp_path, monkeypatch):
    file = saved(tmp_path / "a.pth", randomised(MODELS["mae_test"](img_size=(32, 32))))
    options = conversions.timm_options
    monkeypatch.setattr(convert, "timm_options", lambda *a: options(*a) | {"num_heads": 4})
    with pytest.raises(
        ValueError, match=r"our model and timm's VisionTransformer differ by .* nothing was written"
    ):
        convert.export(file, str(tmp_path / "out.pth"), "timm")
    monkeypatch.setattr(conversions, "_QKV", ("key", "query", "value"))
    with pytest.raises(ValueError, match="transformers' ViTMAEForPreTraining differ by"):
        convert.export(file, str(tmp_path / "out"), "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_without_transformers_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    file = saved(tmp_path / "a.pth", MODELS["mae_test"](img_size=(32, 32)))
    with pytest.raises(ValueError, match=r"pip install \"\.\[hf\]\""):
        convert.export(file, str(tmp_path / "out"), "hf")


def test_the_teacher_of_a_self_distillation_run_is_exported(tmp_path):
    teacher, student = (
        build_classifier("vit_test", img_size=(32, 32), num_classes=0, pool="cls") for _ in range(2)
    )
    extra = {"ibot_head.mlp.0.weight": torch.ones(2), "mask_token": torch.zeros(1, 1, 32)}
    torch.save(
        {
            "model": student.state_dict() | extra,
            "teacher": teacher.state_dict() | extra,
            "args": {"model": "vit_test", "input_size": [32]},
        },
        tmp_path / "s.pth",
    )
    assert convert.export(str(tmp_path / "s.pth"), str(tmp_path / "e.pth"), "encoder") < 1e-6
    weights = checkpoint.load(str(tmp_path / "e.pth")).model
    assert weights.keys() == teacher.state_dict().keys()
    assert all(torch.equal(v, weights[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize(
    "to, name", [("mae", "m.pth"), ("safetensors", "s.safetensors"), ("encoder", "e.pth")]
)
def test_the_moving_average_is_exported_if_a_run_kept_one(tmp_path, to, name):
    raw, average = (
        randomised(build_classifier("vit_test", img_size=(32, 32), num_classes=5)) for _ in range(2)
    )
    for p in average.parameters():
        p.data.mul_(0.5)
    ema = {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in average.state_dict().items()}
    path = str(tmp_path / "run.pth")
    torch.save(
        {
            "model": raw.state_dict(),
            "ema": ema,
            "args": {"model": "vit_test", "input_size": [32]},
            "epoch": 3,
        },
        path,
    )
    assert convert.export(path, str(tmp_path / name), to) < 1e-5
    weights = checkpoint.load(str(tmp_path / name)).model
    expected = average.state_dict()
    # An exported encoder has the norm after the mean as its final norm.
    expected |= {k.replace("fc_norm.", "norm."): v for k, v in expected.items()}
    assert all(torch.equal(v, expected[k]) for k, v in weights.items())
    assert all(torch.equal(v, expected[k]) for k, v in model_of(checkpoint.load(path)).state_dict().items())
    assert "a moving average" in inspect.describe(path)


# -- inspect -------------------------------------------------------------------------------------------------
def test_inspect_describes_a_file_and_names_the_commands_that_take_it(tmp_path):
    mae = MODELS["mae_test"](img_size=(32, 48), pos_label="apl+rpl")
    file = saved(tmp_path / "c.pth", mae, pos_label="apl+rpl", norm_pix_loss=True)
    text = inspect.describe(file)
    for part in (
        "a full pretraining checkpoint (encoder and decoder), norm-pix target; this toolkit's",
        "mae_test: 2 blocks of width 32, 2 heads; decoder 1 blocks of width 32, 2 heads",
        "32x48 pixels, 3 channels, patches of 8x8",
        "without positional embedding, labels apl+rpl",
        "epoch       3",
        "main_pretrain.py --init_from; main_segment.py, main_finetune.py and main_linprobe.py --finetune",
    ):
        assert part in text, text
    assert f"{sum(v.numel() for v in mae.state_dict().values()) / 1e6:.2f} M" in text
    import hashlib

    assert hashlib.sha256((tmp_path / "c.pth").read_bytes()).hexdigest() in text
    torch.save(torch.load(file) | {"epoch": -1, "step": 9}, file)
    assert "epoch       before the end of the first one (step 9)" in inspect.describe(file)
    text = inspect.describe(
        saved(tmp_path / "f.pth", build_classifier("vit_test", img_size=(32, 32), num_classes=2))
    )
    assert "a fine-tuned classifier" in text and "2, from the mean patch token" in text
    assert "main_finetune.py --eval --resume;" in text


@pytest.mark.parametrize(
    "weights,entry,kind",
    [
        (
            {"vit.encoder.layer.0.attention.attention.query.weight": torch.ones(2)},
            "model",
            "a Hugging Face file",
        ),
        ({"module.backbone.cls_token": torch.ones(1, 1, 8)}, "teacher", "code of SERE, iBOT or DINO"),
        (
            {"head.0.running_mean": torch.ones(2), "head.1.weight": torch.ones(3, 2)},
            "model",
            "a linear probe",
        ),
        ({"conv1.weight": torch.ones(2)}, "state_dict", "no command here knows"),
        (
            {"ibot_head.last.weight": torch.ones(2), "blocks.0.norm1.weight": torch.ones(2)},
            "model",
            "a checkpoint of main_sere.py",
        ),
        (
            {"head.fc.weight": torch.ones(2), "head.pool.start": torch.ones(2)},
            "model",
            "So-ViT      second-order head",
        ),
    ],
)
def test_inspect_knows_foreign_files(tmp_path, weights, entry, kind):
    torch.save({entry: weights, "epoch": 1}, tmp_path / "c.pth")
    assert kind in inspect.describe(str(tmp_path / "c.pth"))


# -- files that must not load, and the wrong kind at each flag -----------------------------------------------
class Code:
    """An object whose pickle runs code."""

    def __reduce__(self):
        return exec, ("open('/nonexistent/owned', 'w')",)


def broken_files(folder) -> dict[str, str]:
    """Files that every main must refuse -> a part of the error."""
    torch.save({"model": {"w": torch.randn(1000)}}, folder / "truncated.pth")
    (folder / "truncated.pth").write_bytes((folder / "truncated.pth").read_bytes()[:2000])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("abc")
    (folder / "page.pth").write_text("<html>not found</html>")
    torch.save({"model": {}, "args": Code()}, folder / "malicious.pth")
    with open(folder / "malicious-pickle.pth", "wb") as f:
        pickle.dump({"model": Code()}, f)
    (folder / "truncated.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    torch.save({"model": {"conv1.weight": torch.ones(2)}}, folder / "resnet.pth")
    return {
        "text.pth": "text.pth is a text file",
        "page.pth": "page.pth is ",
        "truncated.pth": "truncated.pth is truncated",
        "empty.pth": "empty.pth is empty",
        "malicious.pth": "loading it would run code; it asks for builtins.exec",
        "malicious-pickle.pth": "loading it would run code; it asks for builtins.exec",
        "truncated.safetensors": "truncated.safetensors is truncated or not a safetensors file",
        "resnet.pth": "no command here knows",
        "missing.pth": "no checkpoint at",
    }


FLAGS = [
    (main_pretrain, "--init_from", []),
    (main_pretrain, "--resume", []),
    (main_finetune, "--finetune", []),
    (main_finetune, "--resume", []),
    (main_finetune, "--resume", ["--eval"]),
    (main_linprobe, "--finetune", []),
]


def call(main, tmp_path, capsys, *flags) -> str:
    """Run a main that must refuse its flags, and return its error."""
    model = "vit_test"
    if main is main_pretrain:
        model = "mae_test"
    base = [
        "--model",
        model,
        "--input_size",
        "32",
        "--batch_size",
        "40",
        "--epochs",
        "1",
        "--num_workers",
        "0",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert run(main.main, parse(main.get_args_parser(), [*base, *flags])) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("main,flag,more", FLAGS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_every_main_refuses_broken_files_each_with_its_error(tmp_path, capsys, main, flag, more):
    for name, message in broken_files(tmp_path).items():
        error = call(main, tmp_path, capsys, flag, str(tmp_path / name), *more)
        assert message in error, f"{name}: {error}"


@pytest.mark.parametrize(
    "main,flag,more,kind,message",
    [
        (
            main_pretrain,
            "--resume",
            [],
            "classifier",
            "a fine-tuned classifier, not a full pretraining checkpoint (encoder and "
            "decoder): it is for main_finetune.py --resume",
        ),
        (
            main_pretrain,
            "--init_from",
            [],
            "encoder",
            "it is for main_segment.py, main_finetune.py and main_linprobe.py --finetune",
        ),
        (main_finetune, "--finetune", [], "huggingface", "it is for checkpoints.py import"),
        (
            main_finetune,
            "--resume",
            [],
            "pretraining",
            "it is for main_pretrain.py --resume or --init_from; main_segment.py, main_finetune.py and "
            "main_linprobe.py --finetune",
        ),
        (main_finetune, "--resume", ["--eval"], "pretraining", "main_linprobe.py --finetune"),
        (main_finetune, "--finetune", [], "other_size", "the encoder in"),
        (main_linprobe, "--finetune", [], "probe", "it is for main_linprobe.py --resume"),
        (main_pretrain, "--init_from", [], "other_size", "does not fit this model: "),
    ],
    ids=str,
)
def test_the_wrong_kind_names_the_right_flag(tmp_path, capsys, main, flag, more, kind, message):
    vit = dict(img_size=(32, 32), num_classes=0, pool="cls")
    state = {
        "classifier": lambda: build_classifier("vit_test", **vit | {"num_classes": 5}).state_dict(),
        "encoder": lambda: build_classifier("vit_test", **vit).state_dict(),
        "pretraining": lambda: MODELS["mae_test"](img_size=(32, 32)).state_dict(),
        "other_size": lambda: MODELS["mae_test"](img_size=(32, 32), dim=48).state_dict(),
        "huggingface": lambda: {"encoder.layer.0.attention.attention.query.weight": torch.ones(2)},
        "probe": lambda: {"head.0.running_mean": torch.ones(2), "head.1.weight": torch.ones(3, 2)},
    }[kind]()
    torch.save({"model": state}, tmp_path / "x.pth")
    assert message in call(main, tmp_path, capsys, flag, str(tmp_path / "x.pth"), *more)


def test_the_command_line(tmp_path, capsys):
    file = saved(tmp_path / "a.pth", randomised(MODELS["mae_test"](img_size=(32, 32))))
    for argv, code in (
        (["inspect", file], 0),
        # One that cannot be read does not hide the others.
        (["inspect", str(tmp_path / "absent.pth"), file], 2),
        (["export", file, str(tmp_path / "b.bin"), "--to", "mae"], 2),
        (["export", file, file, "--to", "mae"], 2),
        (["import", str(tmp_path), str(tmp_path / "c.pth")], 2),
    ):
        assert run(checkpoints.main, checkpoints.get_args_parser().parse_args(argv)) == code
    printed = capsys.readouterr()
    assert (
        "--to mae writes .pth, found" in printed.err and f"{file} exists: choose another name" in printed.err
    )
    assert "lacks config.json and model.safetensors" in printed.err and printed.out.count("sha256") == 2
    assert "error: no checkpoint at" in printed.err
    assert json.loads(json.dumps(checkpoint.load(file).args))["model"] == "mae_test"


def test_an_evaluation_needs_a_checkpoint():
    saved = Checkpoint("x.pth", {})
    assert checkpoint.to_evaluate(saved) is saved
    with pytest.raises(ValueError, match="`eval` needs `resume`"):
        checkpoint.to_evaluate(None)
