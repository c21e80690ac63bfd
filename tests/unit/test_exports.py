"""Exports carry what is needed to use them: how images become the input, and whole programs."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import tiny  # noqa: F401 (registers mae_test and vit_test)
from backbones import registry
from backbones.registry import build_classifier
from backbones.swin import SWIN
from models_mae_pl import MODELS
from tools import convert
from tools.deploy import inputs, programs
from util.data.pixels import Pixels
from util.data.transforms import eval_transform
from util.weights.types import Checkpoint

MEAN = [0.4, 0.5, 0.6]
STD = [0.1, 0.2, 0.3]
# Half a grey level is what a library may round in another way, and one more what it may resize otherwise.
GREY_LEVELS = 1.5 / 255


def randomised(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # large enough for attention to matter
    return model.eval()


def saved(path, model, name, classes=None, **flags) -> str:
    """The model as a file of this toolkit, which knows mean and std."""
    stored = {
        "model": name,
        "pos_label": "none",
        "input_size": list(model.img_size),
        "in_chans": model.in_chans,
    }
    if model.in_chans == 3:
        stored |= {"mean": MEAN, "std": STD}
    file = {"model": model.state_dict(), "args": stored | flags, "epoch": 3}
    torch.save(file if classes is None else file | {"classes": classes}, path)
    return str(path)


def classifier(**options):
    usual = dict(img_size=(32, 32), num_classes=3, pos_embed="learned")
    return randomised(build_classifier("vit_test", **usual | options))


def smooth_image(channels: int, height: int, width: int) -> torch.Tensor:
    """uint8 (C, H, W) with edges and gradients, as photos have."""
    torch.manual_seed(1)
    coarse = torch.randint(256, (channels, height // 8, width // 8), dtype=torch.uint8)
    return v2.functional.resize(coarse, [height, width], antialias=True)


# -- transformers' processors --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "channels,flags", [(3, {}), (3, {"crop_pct": 1.0}), (1, {"mean": [0.3], "std": [0.2]})]
)
def test_the_processor_of_a_square_makes_the_pixels_of_evaluation(tmp_path, channels, flags):
    transformers = pytest.importorskip("transformers")

    flags = {"mean": MEAN, "std": STD} | flags
    facts = inputs.InputFacts.of(Checkpoint("c.pth", {}, flags), (32, 32), channels)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts.hf_processor()))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert list(processor.image_mean) == flags["mean"] and list(processor.image_std) == flags["std"]
    assert processor.crop_size["height"] == processor.crop_size["width"] == 32
    image = smooth_image(channels, 48, 80)
    expected = Pixels(tuple(flags["mean"]), tuple(flags["std"])).normalize(
        eval_transform(32, flags.get("crop_pct"))(image)
    )
    pixels = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == expected.shape
    assert (pixels - expected).abs().max() <= GREY_LEVELS / min(flags["std"])


def test_the_processor_of_a_rectangle_resizes_without_a_crop(tmp_path):
    transformers = pytest.importorskip("transformers")

    facts = inputs.InputFacts.of(Checkpoint("c.pth", {}, {"mean": MEAN, "std": STD}), (32, 48), 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts.hf_processor()))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.size["height"], processor.size["width"]) == (32, 48)
    image = smooth_image(3, 64, 64)
    whole = v2.functional.resize(image, [32, 48], v2.InterpolationMode.BICUBIC, antialias=True)
    expected = Pixels(tuple(MEAN), tuple(STD)).normalize(whole)
    pixels = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"][0]
    assert (pixels - expected).abs().max() <= GREY_LEVELS / min(STD)
    assert "resized to 32x48 without a crop" in facts.hf_note()


def test_a_hugging_face_folder_has_a_processor_if_one_can_be_described(tmp_path, capsys):
    pytest.importorskip("transformers")
    file = saved(tmp_path / "a.pth", MODELS["mae_test"](img_size=(32, 32)), "mae_test")
    convert.export(file, str(tmp_path / "hf"), "hf")
    config = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert config["image_mean"] == MEAN and config["size"] == {"shortest_edge": 36}
    assert "preprocessor_config.json: shorter side 36, centre crop 32x32" in capsys.readouterr().out
    for name, flags in (("deep", {"range": [0.0, 4095.0]}), ("bands", {"mean": [0.3] * 5, "std": [0.2] * 5})):
        model = MODELS["mae_test"](img_size=(32, 32), in_chans=len(flags.get("mean", MEAN)))
        convert.export(saved(tmp_path / "b.pth", model, "mae_test", **flags), str(tmp_path / name), "hf")
        assert "no preprocessor_config.json: its images are not 8-bit" in capsys.readouterr().out
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["config.json", "model.safetensors"]


# -- timm ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["folder", "file.pth"])
@pytest.mark.parametrize("size,eps", [((32, 32), 1e-6), ((32, 48), 1e-3)])
def test_timm_knows_the_images_of_an_export(tmp_path, capsys, name, size, eps):
    import timm

    ours = classifier(img_size=size, norm_eps=eps)
    file = saved(
        tmp_path / "a.pth", ours, "vit_test", ["owl", "bee", "cat"], layer_norm_eps=eps, pos_embed="learned"
    )
    convert.export(file, str(tmp_path / name), "timm")
    code = capsys.readouterr().out.splitlines()[1]
    theirs = eval(code, {"timm": timm, "torch": torch, "functools": __import__("functools")}).eval()
    config = timm.data.resolve_model_data_config(theirs)
    assert list(config["mean"]) == MEAN and list(config["std"]) == STD
    assert tuple(config["input_size"]) == (3, *size) and config["crop_pct"] == 224 / 256
    assert list(theirs.pretrained_cfg["label_names"]) == ["owl", "bee", "cat"]
    image = smooth_image(3, 48, 80)
    expected = Pixels(tuple(MEAN), tuple(STD)).normalize(eval_transform(size)(image))
    # timm 1.0.21 resizes for a rectangle by another filter than the configuration's.
    if size[0] == size[1]:
        pixels = timm.data.create_transform(**config)(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert (pixels - expected).abs().max() <= GREY_LEVELS / min(STD)
    with torch.no_grad():
        logits = theirs(expected[None])
        assert torch.allclose(logits, ours(expected[None]), atol=1e-5) and logits.std() > 0.01


def test_timm_keeps_other_channels_and_the_file_their_facts(tmp_path):
    import timm
    from safetensors import safe_open

    model = randomised(MODELS["mae_test"](img_size=(32, 32), in_chans=5, pos_embed="learned"))
    flags = {"mean": [0.1, 0.2, 0.3, 0.4, 0.5], "std": [0.2] * 5, "range": [0.0, 4095.0]}
    file = saved(tmp_path / "a.pth", model, "mae_test", pos_embed="learned", **flags)
    convert.export(file, str(tmp_path / "t"), "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    images = torch.randn(2, 5, 32, 32)
    with torch.no_grad():
        expected = model.forward_encoder(images, torch.arange(16).expand(2, -1))
        assert torch.allclose(theirs.forward_features(images), expected, atol=1e-5)
    convert.export(file, str(tmp_path / "t.safetensors"), "timm")
    with safe_open(tmp_path / "t.safetensors", "pt") as stored:
        assert json.loads(stored.metadata()["pretrained_cfg"])["mean"] == flags["mean"]
    assert json.loads((tmp_path / "t" / "config.json").read_text())["mae_pl_input"]["range"] == [0, 4095]
    with pytest.raises(
        ValueError, match=r"writes .safetensors or .pth or a folder, whose name has no suffix"
    ):
        convert.export(file, str(tmp_path / "t.onnx"), "timm")


def test_mean_and_std_that_are_not_stored_are_called_imagenets(tmp_path, capsys):
    file = saved(tmp_path / "a.pth", classifier(), "vit_test", mean=None, std=None)
    # A run without these flags has used ImageNet's.
    convert.export(file, str(tmp_path / "t.safetensors"), "timm")
    printed = capsys.readouterr().out
    assert "does not store" not in printed and "'mean': (0.485," in printed
    state = torch.load(file, weights_only=False)
    del state["args"]["mean"], state["args"]["std"]
    torch.save(state, file)
    convert.export(file, str(tmp_path / "u.safetensors"), "timm")
    printed = capsys.readouterr().out
    assert "does not store mean and std: ImageNet's are written" in printed and "'mean': (0.485," in printed


# -- programs ------------------------------------------------------------------------------------------------
def onnx_outputs(file, names, images):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == names
    return [torch.from_numpy(x) for x in session.run(names, {"images": images.numpy()})]


@pytest.mark.slow
def test_a_classifier_as_an_onnx_program(tmp_path, capsys):
    onnx = pytest.importorskip("onnx")

    ours = classifier(img_size=(32, 48), pos_label="apl")
    file = saved(tmp_path / "a.pth", ours, "vit_test", ["owl", "bee", "cat"], pos_embed="learned")
    out = tmp_path / "a.onnx"
    assert convert.export(file, str(out), "onnx") < 1e-5
    assert "for 1, 2 and 3 images" in capsys.readouterr().out
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 48)
        with torch.no_grad():
            expected = ours(images)
        (logits,) = onnx_outputs(out, ["logits"], images)
        assert torch.allclose(logits, expected, atol=1e-4) and logits.std() > 0.01
    model = onnx.load(out)
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert facts["mean"] == MEAN and facts["std"] == STD and facts["size"] == [32, 48]
    assert facts["classes"] == ["owl", "bee", "cat"] and facts["resize"] == [36, 54]
    assert not any("pos_head" in weight.name for weight in model.graph.initializer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.pth"]


@pytest.mark.slow
def test_an_encoder_as_an_onnx_program(tmp_path):
    pytest.importorskip("onnx")
    ours = randomised(MODELS["mae_test"](img_size=(32, 32), in_chans=1, depth=1, pos_label="apl"))
    file = saved(tmp_path / "a.pth", ours, "mae_test", pos_label="apl", range=[0.0, 4095.0])
    convert.export(file, str(tmp_path / "a.onnx"), "onnx")
    images = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        tokens = ours.forward_encoder(images, torch.arange(16).expand(4, -1))
    cls, patches = onnx_outputs(tmp_path / "a.onnx", ["cls", "patches"], images)
    assert torch.allclose(cls, tokens[:, 0], atol=1e-4) and torch.allclose(patches, tokens[:, 1:], atol=1e-4)


def program(path):
    """A program of torch.export, and its facts."""
    stored = {programs.FACTS: ""}
    module = torch.export.load(str(path), extra_files=stored).module()
    return module, json.loads(stored[programs.FACTS])


@pytest.mark.parametrize("kind", ["pretraining", "classifier", pytest.param("swin", marks=pytest.mark.slow)])
def test_programs_of_torch_export(tmp_path, monkeypatch, kind):
    if kind == "pretraining":
        ours = randomised(MODELS["mae_test"](img_size=(32, 32), pos_label="rpl"))
        file = saved(tmp_path / "a.pth", ours, "mae_test", pos_label="rpl")
    elif kind == "classifier":
        # Its tokens are normalised as `encoder` stores them, after the mean.
        ours = classifier(pool="avg", num_classes=3)
        convert.export(saved(tmp_path / "c.pth", ours, "vit_test"), str(tmp_path / "a.pth"), "encoder")
        file = str(tmp_path / "a.pth")
    else:
        entry = SWIN.override(window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2))
        monkeypatch.setitem(registry.MODELS, "swin_test", entry)
        ours = randomised(build_classifier("swin_test", img_size=(32, 32), num_classes=3))
        file = saved(tmp_path / "a.pth", ours, "swin_test")
    assert convert.export(file, str(tmp_path / "a.pt2"), "torchexport") < 1e-5
    module, facts = program(tmp_path / "a.pt2")
    assert facts["mean"] == MEAN and facts["size"] == [32, 32]
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        found = module(images)
        with torch.no_grad():
            if kind == "swin":
                expected = {"logits": ours(images)}
            elif kind == "pretraining":
                tokens = ours.forward_encoder(images, torch.arange(16).expand(batch, -1))
                expected = {"cls": tokens[:, 0], "patches": tokens[:, 1:]}
            else:
                tokens = ours.fc_norm(ours.forward_features(images))
                expected = {"cls": tokens[:, 0], "patches": tokens[:, 1:]}
        assert list(found) == list(expected) == facts["outputs"]
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-5), name


@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_a_program_that_differs_leaves_nothing_behind(tmp_path, monkeypatch, error):
    file = saved(tmp_path / "a.pth", classifier(), "vit_test")

    def wrong(program, facts, partial):
        open(partial, "w").close()

        def run(images):
            # In one of the batches only.
            return {name: value + error * (len(images) == 3) for name, value in program(images).items()}

        return run, "this program"

    monkeypatch.setitem(programs._WRITERS, "torchexport", wrong)
    with pytest.raises(ValueError, match=r"our model and this program differ by .*: nothing was written"):
        convert.export(file, str(tmp_path / "a.pt2"), "torchexport")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_what_cannot_be_a_program_is_refused_in_a_line(tmp_path, monkeypatch):
    file = saved(tmp_path / "a.pth", classifier(), "vit_test")
    with pytest.raises(ValueError, match=r"`to` onnx writes .onnx, found"):
        convert.export(file, str(tmp_path / "a.pt2"), "onnx")
    with pytest.raises(ValueError, match="`remove_position` needs `to` timm, found torchexport"):
        convert.export(file, str(tmp_path / "a.pt2"), "torchexport", remove_position="")
    torch.save({"model": {"layer.weight": torch.zeros(2)}, "args": {}}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="does not hold a plain Vision Transformer"):
        convert.export(str(tmp_path / "b.pth"), str(tmp_path / "a.pt2"), "torchexport")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ValueError, match=r'`to` onnx needs onnxscript, not installed here: pip install "\.\[onnx\]"'
    ):
        convert.export(file, str(tmp_path / "a.onnx"), "onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "b.pth"]


def test_without_onnx_runtime_a_line_says_that_nothing_was_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    ours = classifier()
    monkeypatch.setitem(
        programs._WRITERS,
        "onnx",
        lambda program, facts, partial: (_written(partial, program), "ONNX Runtime's"),
    )
    monkeypatch.setattr(programs, "_check_installed", lambda: None)
    convert.export(saved(tmp_path / "a.pth", ours, "vit_test"), str(tmp_path / "a.onnx"), "onnx")
    assert "not compared, because onnxruntime is not installed" in capsys.readouterr().out
    assert (tmp_path / "a.onnx").exists()


def _written(partial, program):
    """What the writer of ONNX does after the conversion."""
    np.zeros(1).tofile(partial)
    return programs._onnx_runner(program, partial)
