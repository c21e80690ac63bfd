"""The toolkit from another folder, beside a user's own modules of the same names."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hubconf
import mae_pl
import models_mae_pl
from mae_pl.rooms import FILES, ROOMS, Rewritten, is_ours
from processes import FINETUNE, ROOT, here
from tools.encoder import load_encoder
from util.data.datasets import build_dataset
from util.data.transforms import eval_transform

OWN = """
import sys
{first}
import torch
encoder = torch.hub.load({root!r}, "encoder", checkpoint={file!r}, source="local")
{second}
import util, layers, models_vit
assert (util.NAME, layers.NAME, models_vit.NAME) == ("mine", "mine", "mine")
x = torch.linspace(0, 1, 3 * 40 * 50).reshape(3, 40, 50)
with torch.no_grad():
    found = encoder.features(encoder.transform(x)[None])
model = torch.hub.load({root!r}, "mae_vit_pico_patch8", source="local", img_size=32)
assert type(model).__module__ == "mae_pl.models_mae_pl"
import mae_pl, pickle
assert type(encoder) is type(mae_pl.encoder({file!r}))
again = pickle.loads(pickle.dumps(encoder))
assert torch.equal(again(encoder.transform(x)[None]), found["cls"])
# Modules that are imported when a function runs are the toolkit's, too.
mae_pl.model("timm/resnet18", num_classes=2)
assert util is sys.modules["util"] and util.NAME == "mine"
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("encoder")
    # A model of the toolkit itself: other programs do not know those of the tests.
    run = ["--model", "mae_vit_pico_patch8", "--epochs", 1, "--batch_size", 20]
    code, text = here(out, *run, "--mean", 0.4, 0.5, 0.6, "--std", 0.1, 0.2, 0.3)
    assert code == 0, text
    return out / "checkpoint-last.pth"


@pytest.mark.parametrize("order", ["mine first", "mine last"])
def test_own_modules_of_the_same_names_live_beside_it(trained, tmp_path, order):
    for name in ("util", "layers", "models_vit"):
        (tmp_path / f"{name}.py").write_text('NAME = "mine"\n')
    lines = ["import util, layers", ""]
    if order == "mine last":
        lines.reverse()
    code = OWN.format(root=str(ROOT), file=str(trained), first=lines[0], second=lines[1])
    (tmp_path / "own.py").write_text(code)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "own.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    encoder = load_encoder(trained)
    image = torch.linspace(0, 1, 3 * 40 * 50).reshape(3, 40, 50)
    expected = encoder.features(encoder.transform(image)[None])
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5)


def test_the_transform_is_that_of_the_mains(trained, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a/1.png", "a/2.png"):
        path = tmp_path / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    encoder = load_encoder(trained)
    assert (encoder.transform.pixels.mean, encoder.transform.pixels.std) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    dataset = build_dataset(str(tmp_path), "val", eval_transform(encoder.img_size))
    expected = encoder.transform.pixels.normalize(dataset[1]["image"])
    path = tmp_path / "val" / "a/2.png"
    image = Image.open(path)
    array = np.array(image)
    tensor = torch.as_tensor(array).permute(2, 0, 1)
    for given in (path, str(path), image, array, tensor, np.ascontiguousarray(tensor)):
        assert torch.equal(encoder.transform(given), expected)
    grey = encoder.transform(array[..., :1])
    assert torch.equal(grey, encoder.transform(array[..., 0])) and grey.shape == expected.shape
    # As torchvision's ToTensor gives them; other floats are resized without rounding.
    assert torch.equal(encoder.transform(tensor / 255), expected)
    smooth = torch.full((3, 50, 70), 0.3333)
    assert float(encoder.transform(smooth)[0].mean()) == pytest.approx((0.3333 - 0.4) / 0.1, abs=1e-4)
    mean = (
        expected * torch.tensor([0.1, 0.2, 0.3])[:, None, None] + torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    ).mean()
    assert float(mean) == pytest.approx(array.mean() / 255, abs=0.05)


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((40, 40, 4), np.uint8), "sees 3 channels, and the image has 40"),
        (np.zeros((1, 3, 40, 40), np.uint8), "give one image at a time"),
        (np.full((40, 40, 3), 128.0), "between 0 and 1 for this model of 8-bit images, found 128"),
        (np.zeros((40, 40, 3), np.uint16), "trained on images of 8 bits"),
        (np.array(["text"]), "no pixels"),
        (np.zeros((0, 5, 3), np.uint8), "give one image at a time"),
        (np.full((40, 40, 3), np.nan), "between 0 and 1 .*, found nan"),
    ],
)
def test_images_that_do_not_fit_are_refused(trained, image, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(trained).transform(image)


def test_features_are_the_tokens_of_the_backbone_at_any_size(trained):
    encoder = load_encoder(trained)
    images = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    found = encoder.features(images)
    tokens = encoder.backbone.forward_any_size(images)
    grid = encoder.grid_of(images)
    assert found["patches"].shape == (2, grid[0] * grid[1], encoder.dim)
    assert torch.equal(found["patches"], tokens[:, 1:]) and torch.equal(found["cls"], tokens[:, 0])
    torch.testing.assert_close(found["mean"], tokens[:, 1:].mean(1))
    assert torch.equal(encoder(images), found["cls"])
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training


def test_a_classifier_has_its_classes_and_logits(tmp_path, trained):
    run = ["--model", "vit_pico_patch8", "--epochs", 1, "--finetune", trained]
    code, text = here(tmp_path, *run, main=FINETUNE)
    assert code == 0, text
    found = mae_pl.classifier(tmp_path)
    images = torch.randn(2, 3, *found.model.img_size)
    assert len(found.classes) == found(images).shape[1] > 1
    # As an encoder it has the same tokens, which are normalised before the mean here and after it there.
    encoder = mae_pl.encoder(tmp_path)
    tokens = found.model.forward_features(images)
    torch.testing.assert_close(encoder.features(images)["patches"], found.model.label_tokens(tokens))
    with pytest.raises(ValueError, match="classifier"):
        mae_pl.classifier(trained)


def test_the_total_loss_is_that_of_pretraining():
    losses = {"pixel": torch.tensor(2.0), "position": torch.tensor(3.0), "position_acc": torch.tensor(0.5)}
    assert (
        float(mae_pl.total(losses, 0.25)) == 2.75 and float(mae_pl.total({"pixel": losses["pixel"]})) == 2.0
    )


def test_one_number_stands_for_a_square():
    models = [mae_pl.model("mae_vit_pico_patch8", img_size=size) for size in (64, (64, 64))]
    assert models[0].trunk == models[1].trunk and models[0].img_size == (64, 64)
    assert hubconf.vit_tiny_patch16(img_size=32, patch_size=8, num_classes=3).grid == (4, 4)
    with pytest.raises(ValueError, match="does not take `image_size`"):
        mae_pl.model("mae_vit_pico_patch8", image_size=64)
    assert {"mae_vit_base_patch16", "swin_tiny", "vit_base_patch16"} <= {*mae_pl.names()}
    with pytest.raises(ValueError, match="did you mean mae_vit_base_patch16"):
        mae_pl.model("mae_vit_bse_patch16")
    # The tests add a model of their own.
    assert {*models_mae_pl.MODELS} - {"mae_test"} <= {*mae_pl.names()} <= {*dir(hubconf)}


def test_all_modules_of_the_checkout_are_rewritten():
    ours = {
        path.stem for path in Path(ROOT).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    named = {name for name in ours if is_ours(name)}
    assert ours - named == {"mae_pl", "hubconf"}, "a new module at the top belongs into mae_pl/rooms.py"
    assert {name for name in ROOMS if "_" not in name} <= ours
    assert all(any(name.startswith(start) for name in ours) for start in FILES)


@pytest.mark.parametrize(
    "code, rewritten",
    [
        ("from util.files import names", "from mae_pl.util.files import names"),
        ("from utility import names", "from utility import names"),
        ("from . import util", "from . import util"),
        ("import models_vit", "import mae_pl.models_vit\nfrom mae_pl import models_vit"),
        ("import util.files as f, os", "import os\nimport mae_pl.util.files as f"),
        ("import util.files", "import mae_pl.util.files\nfrom mae_pl import util"),
    ],
)
def test_imports_are_rewritten(code, rewritten):
    tree = Rewritten().visit(ast.parse(code))
    assert ast.unparse(ast.fix_missing_locations(tree)) == rewritten


def test_a_classifier_of_another_backbone_is_found_by_its_name(tmp_path):
    run = ["--model", "swin_pico", "--input_size", 64, "--epochs", 1, "--batch_size", 20]
    code, text = here(tmp_path, *run, main=FINETUNE)
    assert code == 0, text
    found = mae_pl.classifier(tmp_path)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    weights = torch.load(tmp_path / "checkpoint-last.pth")["model"]
    pooled = found.model.pool_tokens(found.model.forward_features(images))
    expected = pooled @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(found(images), expected)
    features = mae_pl.encoder(tmp_path).features(images)
    assert features["cls"] is None
    torch.testing.assert_close(features["mean"], pooled, rtol=1e-4, atol=1e-5)
