"""The position audit of files, principal components and neighbours: what is measured and what is drawn."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

import tiny  # noqa: F401 (registers mae_test and vit_test)
import visualize
from backbones.registry import build_classifier
from layers.transformer import run_blocks
from models_mae_pl import MODELS
from tools import convert, draw, features, patches
from util.data.pixels import Pixels
from util.data.transforms import eval_transform
from util.flags.parser import run
from util.report import features as drawn

TIMM_VIT = "timm/vit_tiny_patch16_224"


def call(*argv) -> int:
    return run(visualize.main, visualize.get_args_parser().parse_args([str(a) for a in argv]))


def saved(path, model, name, **args) -> str:
    torch.save({"model": model.state_dict(), "args": {"model": name, "input_size": [32, 32]} | args}, path)
    return str(path)


def mae(pos_embed="none", **options):
    torch.manual_seed(0)
    return MODELS["mae_test"](img_size=(32, 32), pos_label="none", pos_embed=pos_embed, **options).eval()


def noise_images(folder, n=48):
    """Images of independent pixels, which show nothing of where a patch is."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


# --- tokens of layers


def plain_layers(model, images):
    """The layers of a ViT, by running its parts one after the other."""
    table = model.pos_embed
    x = model.patch_embed(images)
    prefix = torch.cat([getattr(model, name) for name in model.prefix_names], 1)
    x = torch.cat([prefix.expand(len(x), -1, -1), x], 1)
    if table is not None:
        x = x + table
    layers = [x]
    for block in model.blocks:
        layers.append(run_blocks([block], layers[-1]))
    return [F.layer_norm(x[:, prefix.shape[1] :], x.shape[-1:]) for x in layers]


@pytest.mark.parametrize(
    "model",
    [
        mae(),
        mae("sincos"),
        build_classifier("vit_test", img_size=(16, 24), num_classes=3, pool="avg", pos_embed="learned"),
        build_classifier("vit_test", img_size=(16, 24), num_classes=0, pool="cls", pos_embed="none"),
        build_classifier("deit_tiny_distilled_patch16", img_size=(32, 48), num_classes=0),
    ],
    ids=["mae", "mae with positions", "vit avg", "vit cls", "distilled"],
)
def test_layers_of_plain_models(model):
    images = torch.randn(2, 3, *model.img_size)
    found = features.layer_tokens(model.eval(), images)
    expected = plain_layers(model, images)
    assert len(found) == len(model.blocks) + 1 == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours.shape == (2, model.grid[0] * model.grid[1], model.dim)
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
    assert features.layer_numbers(model, len(found)) == list(range(len(found)))


def test_layers_of_a_masked_autoencoder_are_those_of_its_encoder():
    model = mae("sincos")
    images = torch.randn(2, 3, 32, 32)
    latent = model.forward_encoder(images, torch.arange(16).expand(2, -1))[:, 1:]
    # The final norm of a new model has weights 1 and biases 0.
    assert torch.allclose(features.last_tokens(model, images), latent, atol=1e-4)


def test_layers_of_timm_models():
    model = build_classifier(TIMM_VIT, img_size=(32, 48), num_classes=0).eval()
    images = torch.randn(2, 3, 32, 48)
    found = features.layer_tokens(model, images)
    body = model.backbone
    x = body._pos_embed(body.patch_embed(images))
    layers = [x]
    for block in body.blocks:
        layers.append(block(layers[-1]))
    for ours, theirs in zip(found, layers, strict=True):
        assert torch.allclose(ours, F.layer_norm(theirs[:, 1:], (192,)), atol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny", "timm/resnet18", "timm/efficientnet_b0"])
def test_other_backbones_have_their_last_layer(name):
    """EfficientNet has `blocks`, too, whose outputs are no tokens."""
    model = build_classifier(name, img_size=(64, 64), num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    (found,) = features.layer_tokens(model, images)
    expected = model.label_tokens(model.forward_features(images))
    assert torch.allclose(found, F.layer_norm(expected, expected.shape[-1:]), atol=1e-5)
    assert features.layer_numbers(model, 1)[0] == model.num_layers - 1 > 3


@pytest.mark.slow
def test_backbones_of_files(tmp_path):
    images = torch.randn(2, 3, 32, 32)
    for name, options in (
        ("vit_test", {"num_classes": 3}),
        ("swin_tiny", {"num_classes": 3}),
        (TIMM_VIT, {"num_classes": 3}),
        ("timm/resnet18", {"num_classes": 0}),
        ("so_vit_7", {"num_classes": 3}),
    ):
        model = build_classifier(name, img_size=(32, 32), **options).eval()
        args = {"patch_embed": "conv"} if name == "so_vit_7" else {}
        loaded, _ = features.load_backbone(saved(tmp_path / "c.pth", model, name, **args))
        found = features.layer_tokens(loaded, images)
        for ours, theirs in zip(found, features.layer_tokens(model, images), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5), name
    torch.save({"model": {"layer.weight": torch.ones(2)}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not store the name of its model"):
        features.load_backbone(str(tmp_path / "w.pth"))


# --- images


def test_a_stream_of_images_has_fixed_numbers():
    class Data:
        bad = (3,)

        def __len__(self):
            return 40

        def __getitem__(self, i):
            image = torch.full((3, 2, 2), i, dtype=torch.uint8)
            return {
                "image": image,
                "label": 0,
                "index": i,
                "key": i,
                "bad": [i] if i // 2 in self.bad else [],
            }

    stream = features.ImageStream(Data(), Pixels((0.0,), (1 / 255,)), 20, torch.device("cpu"))
    numbers = {}
    for found, images in stream.numbered():
        numbers |= dict(zip(found, images[:, 0, 0, 0].round().int().tolist()))
    assert numbers == {i: 2 * i for i in range(20) if i != 3}
    assert stream.note() == "left out 1 image that cannot be read"
    odd = torch.cat(list(stream.batches(lambda number: number % 2 == 1)))[:, 0, 0, 0]
    assert odd.round().int().tolist() == [2 * i for i in range(1, 20, 2) if i != 3]


# --- the audit


def test_an_audit_measures_and_draws_its_files(tmp_path, capsys, monkeypatch):
    seen = []
    chart = drawn.position_audit
    monkeypatch.setattr(drawn, "position_audit", lambda *given: seen.append(given) or chart(*given))
    folder = noise_images(tmp_path / "noise", 120)
    without = saved(tmp_path / "none.pth", mae(), "mae_test")
    model = mae("sincos")
    # Noise is louder than a new model's embedding.
    model.pos_embed.data *= 5
    with_positions = saved(tmp_path / "sincos.pth", model, "mae_test")
    out = tmp_path / "a.png"
    words = [without, with_positions, out, "--data_path", folder, "--json", tmp_path / "a.json"]
    assert call("position_audit", *words) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "a.json").read_text())
    blind, aware = record["files"]
    assert (blind["images"], blind["held_out"], blind["chance"], blind["grid"]) == (90, 30, 6.25, [4, 4])
    assert [layer["layer"] for layer in blind["layers"]] == [0, 1, 2]
    for layer in blind["layers"]:
        assert abs(layer["row_r2"]) < 0.1 and abs(layer["column_r2"]) < 0.1
        assert abs(layer["explained"]) < 0.01 and layer["cell_accuracy"] < 15
    first = aware["layers"][0]
    assert first["row_r2"] > 0.8 and first["column_r2"] > 0.8 and first["cell_accuracy"] > 60
    assert first["explained"] > 0.1
    (curves, title), *_ = seen
    assert "on 90 images" in title and "on 30 others" in title
    # The legend has the part of a path that tells a file apart.
    assert [curve.name for curve in curves] == ["none", "sincos"]
    for curve, file in zip(curves, record["files"], strict=True):
        assert curve.chance == 6.25 and list(curve.layers) == [0, 1, 2]
        assert list(curve.row_r2) == [layer["row_r2"] for layer in file["layers"]]
        assert list(curve.explained) == [100 * layer["explained"] for layer in file["layers"]]
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith(with_positions))
    assert row[1:6] == ["0", f"{first['row_r2']:.3f}", f"{first['column_r2']:.3f}"] + [
        f"{first['cell_accuracy']:.1f}",
        "6.2",
    ]
    assert np.asarray(Image.open(out).convert("RGB")).std() > 5


def test_audits_that_are_refused(tmp_path, capsys):
    file = saved(tmp_path / "c.pth", mae(), "mae_test")
    for words, message in (
        ([file, "o.png", "--images", 3], "holds out every 4th image"),
        ([file, "o.png", "--images", 0], "--images 0: there must be at least 1"),
        ([tmp_path / "none.pth", "o.png"], "none.pth"),
    ):
        assert call("position_audit", *words) == 2
        assert message in capsys.readouterr().err
    one = MODELS["mae_test"](img_size=(8, 8), pos_label="none", pos_embed="none")
    assert call("position_audit", saved(tmp_path / "1.pth", one, "mae_test", input_size=[8, 8]), "o.png") == 2
    assert "a grid of one cell" in capsys.readouterr().err


def test_figures_that_do_not_exist_are_null(tmp_path, capsys):
    model = MODELS["mae_test"](img_size=(8, 32), pos_label="none", pos_embed="none").eval()
    file = saved(tmp_path / "c.pth", model, "mae_test", input_size=[8, 32])
    out = tmp_path / "o.png"
    assert call("position_audit", file, out, "--images", 40, "--json", tmp_path / "a.json") == 0
    (found,) = json.loads((tmp_path / "a.json").read_text())["files"]
    assert found["grid"] == [1, 4] and found["layers"][0]["row_r2"] is None
    assert found["layers"][0]["column_r2"] is not None
    row = capsys.readouterr().out.splitlines()[-2].split()
    assert row[2] == "-"


def test_a_chart_of_an_audit_shows_its_values():
    curves = [
        drawn.PositionCurve("a", [0, 1], [0.1, 0.2], [0.3, 0.4], [10, 20], [1, 2], 6.25),
        drawn.PositionCurve("_b", [1], [0.5], [0.6], [30], [3], 2.0),
    ]
    axes = drawn.position_audit(curves, "t").axes
    names = ("row_r2", "column_r2", "cell_accuracy", "explained")
    for panel, name in zip(axes, names, strict=True):
        plotted = [line for line in panel.lines if line.get_linestyle() == "-"]
        assert [list(line.get_ydata()) for line in plotted] == [getattr(curve, name) for curve in curves]
        assert [list(line.get_xdata()) for line in plotted] == [[0, 1], [1]]
        levels = {line.get_ydata()[0] for line in panel.lines if line.get_linestyle() == "--"}
        assert levels == ({6.25, 2.0} if name == "cell_accuracy" else {0.0})


# --- export without positions


def row_r2(tokens):
    """R^2 of the row on held-out images, by ordinary least squares, for tokens (n, 16, C)."""
    rows = np.tile(np.arange(16) // 4, len(tokens) // 2)
    train, held_out = (part.flatten(0, 1).double().numpy() for part in (tokens[::2], tokens[1::2]))
    return r2_score(rows, LinearRegression().fit(train, rows).predict(held_out))


@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
def test_an_export_has_no_positions(tmp_path, kind, capsys):
    """The norm of this classifier follows its average."""
    if kind == "autoencoder":
        model, name = mae("sincos"), "mae_test"
    else:
        torch.manual_seed(0)
        options = {"num_classes": 3, "pool": "avg", "pos_embed": "sincos"}
        model, name = build_classifier("vit_test", img_size=(32, 32), **options).eval(), "vit_test"
    model.pos_embed.data *= 5
    for norm in (model.norm, getattr(model, "fc_norm", None)):
        if isinstance(norm, torch.nn.LayerNorm):
            torch.nn.init.uniform_(norm.weight, 0.5, 2)
            torch.nn.init.normal_(norm.bias)
    file = saved(tmp_path / "c.pth", model, name)
    folder = noise_images(tmp_path / "noise", 240)
    out = tmp_path / "o.pth"
    convert.export(file, str(out), "timm", remove_position=str(folder))
    lines = capsys.readouterr().out.splitlines()
    removed = int(re.match(r"position is in (\d+) of 32 directions.* on 240 images", lines[0])[1])
    assert 2 <= removed <= 15
    call_of_timm = lines[3].partition(f"checkpoint_path='{out}', ")[2]
    options = eval(f"dict({call_of_timm}")
    theirs = timm.create_model("vit_base_patch16_224", checkpoint_path=str(out), **options).eval()
    stream = features.ImageStream.open(model, {}, str(folder), 240)
    with torch.no_grad():
        images = torch.cat(list(stream.batches()))
        before = theirs.forward_features(images)[:, 1:]
        after = theirs.head(before)
        plain = model.forward_features(images)
        expected = model.label_tokens(plain) if kind == "classifier" else plain[:, 1:]
    assert torch.allclose(before, expected, atol=1e-4)
    assert row_r2(before) > 0.8 and row_r2(after) < 0.05
    # The head changes nothing but these directions.
    difference = torch.linalg.svdvals((after - before).flatten(0, 1).double())
    assert (difference > 1e-3 * difference[0]).sum() == removed


def test_exports_without_positions_that_are_refused(tmp_path):
    file = saved(tmp_path / "c.pth", mae(), "mae_test")
    with pytest.raises(ValueError, match="`remove_position` needs `to` timm, found encoder: the projection"):
        convert.export(file, str(tmp_path / "o.pth"), "encoder", remove_position="")
    assert not (tmp_path / "o.pth").exists()


# --- principal components


def test_components_are_those_of_scikit_learn():
    tokens = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    scores, shares = patches.principal_components(tokens)
    model = PCA(3).fit(tokens.double().numpy())
    theirs = model.transform(tokens.double().numpy())
    signs = np.sign(model.components_[range(3), np.abs(model.components_).argmax(1)])
    np.testing.assert_allclose(scores, theirs * signs, atol=1e-9)
    np.testing.assert_allclose(shares, model.explained_variance_ratio_, atol=1e-12)
    narrow, shares = patches.principal_components(tokens[:, :2])
    assert narrow.shape == (50, 3) and (narrow[:, 2] == 0).all() and sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(4))
def test_otsus_threshold_is_that_of_all_cuts(seed):
    values = torch.randn(40, generator=torch.Generator().manual_seed(seed)).double()
    values[:15] += 3
    values = (values * 4).round() / 4
    found = patches.otsu(values)

    def within(cut):
        sides = values[values > cut], values[values <= cut]
        return sum(len(side) * float(side.var(correction=0)) for side in sides)

    cuts = values.unique()[:-1]
    best = min(map(within, cuts))
    assert within(found) == pytest.approx(best, abs=1e-9)
    assert patches.otsu(torch.full((5,), 2.0)) == 2


def test_colours_span_what_is_shown():
    scores = torch.stack([torch.arange(101.0), -torch.arange(101.0), torch.zeros(101)], 1).double()
    shown = torch.arange(101) <= 100
    found = patches.colours(scores, shown)
    assert found[50].tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert found[1].tolist() == pytest.approx([0, 1, 0.5]) and found[99].tolist() == pytest.approx(
        [1, 0, 0.5]
    )
    some = patches.colours(scores, torch.arange(101) > 50)
    assert (some[:51] == 0).all() and some[75, 0] == pytest.approx(0.49, abs=0.02)


def bright_centre(folder, n=3):
    """Grey images whose four central patches of 8 pixels are white."""
    folder.mkdir()
    for i in range(n):
        pixels = np.full((32, 32, 3), 40 + i, np.uint8)
        pixels[8:24, 8:24] = 230
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_the_border_is_not(tmp_path, monkeypatch, sign):
    """Whatever the sign of the component that the decomposition returns."""
    seen = {}
    chart = drawn.components
    monkeypatch.setattr(drawn, "components", lambda *given: seen.update(maps=given[1]) or chart(*given))
    plain = patches.principal_components

    def signed(tokens):
        scores, shares = plain(tokens)
        return scores * sign, shares

    monkeypatch.setattr(patches, "principal_components", signed)
    file = saved(tmp_path / "c.pth", mae(), "mae_test")
    words = [file, tmp_path / "o.png", "--data_path", bright_centre(tmp_path / "d")]
    assert call("pca", *words, "--foreground") == 0
    lit = seen["maps"].max(-1) > 0
    expected = np.zeros((3, 4, 4), bool)
    expected[:, 1:3, 1:3] = True
    assert (lit == expected).all()
    assert call("pca", *words) == 0
    centre, border = seen["maps"][:, 1:3, 1:3, 0], seen["maps"][:, 0, :, 0]
    assert abs(centre.mean() - border.mean()) > 0.9
    assert np.asarray(Image.open(tmp_path / "o.png").convert("RGB")).std() > 5


def test_the_sign_of_grids_without_an_inside():
    assert patches.border_sign(torch.randn(2, 2, 5)) == 1
    values = torch.zeros(1, 3, 3)
    values[0, 1, 1] = -1
    assert patches.border_sign(values) == -1 and patches.border_sign(-values) == 1


# --- neighbours


def test_a_search_finds_the_nearest_patches_of_other_images():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(11, 6, 5, generator=draw)
    own = torch.tensor([2, 2, 7])
    queries = F.normalize(torch.randn(3, 5, generator=draw), dim=-1)
    search = patches.Search(queries, own, k=4)
    for start in (0, 4, 8):
        numbers = list(range(start, min(start + 4, 11)))
        search.add(tokens[numbers], numbers, np.arange(start, start + len(numbers)))
    similarity = torch.cosine_similarity(queries[:, None, None], tokens[None], dim=-1)  # (q, images, L)
    for query in range(3):
        expected = sorted(
            (
                (float(values.max()), image, int(values.argmax()))
                for image, values in enumerate(similarity[query])
                if image != own[query]
            ),
            reverse=True,
        )[:4]
        found = search.found(query)
        assert [row[1:] for row in found] == [row[1:] for row in expected]
        assert [row[0] for row in found] == pytest.approx([row[0] for row in expected], abs=1e-6)
    assert search.pixels.keys() == set(search.image.flatten().tolist())
    assert all(search.pixels[number] == number for number in search.pixels)


def test_a_search_of_its_own_image_alone_finds_nothing():
    search = patches.Search(torch.eye(3)[:1], torch.tensor([0]))
    search.add(torch.randn(2, 4, 3), [0, 1], np.zeros(2))
    assert [row[1] for row in search.found(0)] == [1]


def test_neighbours_are_drawn_where_they_are(tmp_path, monkeypatch, capsys):
    """A patch of stripes is in another cell of each image, on backgrounds of noise."""
    # The whole image, so that patches keep their pixels.
    monkeypatch.setattr(draw, "eval_transform", lambda size: eval_transform(size, 1.0))
    seen = {}
    chart = drawn.neighbours
    monkeypatch.setattr(
        drawn,
        "neighbours",
        lambda rows, grid, title: seen.update(rows=rows, title=title) or chart(rows, grid, title),
    )
    folder = tmp_path / "d"
    folder.mkdir()
    rng = np.random.default_rng(0)
    stripes = np.indices((8, 8))[1][..., None] % 2 * np.array([255, 255, 0])
    places = {0: 10, 1: 3, 2: 12}
    for i, cell in places.items():
        pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        top, left = cell // 4 * 8, cell % 4 * 8
        pixels[top : top + 8, left : left + 8] = stripes
        Image.fromarray(pixels).save(folder / f"{i}.png")
    # Without blocks' mixing, tokens are those of the patches.
    model = mae()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
    file = saved(tmp_path / "c.pth", model, "mae_test")
    assert call("neighbours", file, tmp_path / "o.png", "--data_path", folder, "--images", 1) == 0
    rows = seen["rows"]
    assert [row[0].cell for row in rows] == [10, 5, 15]
    query, *found = rows[0]
    assert sorted(view.cell for view in found) == [3, 12]
    for view in found:
        top, left = view.cell // 4 * 8, view.cell % 4 * 8
        np.testing.assert_allclose(view.image[top : top + 8, left : left + 8] * 255, stripes, atol=1)
        assert view.text.startswith("1.00, cell ")
    assert "nearest patches in 3 images" in seen["title"] and "chance 6.2 %" in seen["title"]
    only = folder / "0.png"
    assert call("neighbours", file, tmp_path / "o.png", "--data_path", only) == 2
    assert "there are none: give more images" in capsys.readouterr().err


def test_query_cells():
    assert patches.query_cells((14, 14)) == [7 * 14 + 7, 3 * 14 + 3, 10 * 14 + 10]
    assert patches.query_cells((1, 1)) == [0]
    assert patches.query_cells((2, 6)) == [6 + 3, 1, 6 + 4]


def test_windows_lie_within_the_image():
    for grid, size in (((14, 14), (224, 224)), ((3, 9), (24, 72)), ((7, 7), (112, 112))):
        cell_height, cell_width = size[0] / grid[0], size[1] / grid[1]
        for cell in range(grid[0] * grid[1]):
            top, bottom, left, right = drawn.window(cell, grid, size)
            row, column = divmod(cell, grid[1])
            assert 0 <= top <= row * cell_height < bottom <= size[0]
            assert 0 <= left <= column * cell_width < right <= size[1]
            assert (bottom - top, right - left) == (
                min(grid[0], 5) * cell_height,
                min(grid[1], 5) * cell_width,
            )
    assert drawn.window(7 * 14 + 7, (14, 14), (224, 224)) == (80, 160, 80, 160)


def test_a_drawn_patch_has_its_frame():
    image = np.zeros((32, 48, 3))
    view = SimpleNamespace(image=image, cell=9, text="t")
    query, other = drawn.neighbours([[view, view]], (4, 6), "title").axes
    for panel in (query, other):
        (frame,) = panel.patches
        assert frame.get_bbox().bounds == (3 * 8, 1 * 8, 8, 8)
    assert query.get_xlim() == (0, 48)
    assert other.get_xlim() == (8, 48) and other.get_ylim() == (32, 0)
