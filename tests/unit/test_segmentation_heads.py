"""Maps of patch features of all kinds of backbones, and heads for segmentation."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny  # noqa: F401 (registers vit_test)
from backbones.registry import build_classifier
from layers.probe import Probe
from layers.segmentation import DenseProbe, LinearHead, Segmenter, patch_maps
from util.train.optim import param_groups

SMALL = {"patch_size": (8, 8), "dim": 32, "depth": 3, "num_heads": 2}


def model(name: str, seed: int = 0, **options) -> nn.Module:
    """A model whose norms and biases differ from their initial values."""
    torch.manual_seed(seed)
    built = build_classifier(name, **{"num_classes": 0, "img_size": (32, 32)} | options)
    for p in built.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return built.eval()


def vit(**options) -> nn.Module:
    return model("vit_test", depth=3, **options)


BACKBONES = {
    "avg": lambda **o: vit(**o),
    "cls": lambda **o: vit(pool="cls", **o),
    "fixed positions": lambda **o: vit(pos_embed="sincos", **o),
    "no positions": lambda **o: vit(pos_embed="none", **o),
    "deit": lambda **o: model("deit_tiny_patch16", **SMALL, **o),
    "distilled": lambda **o: model("deit_tiny_distilled_patch16", **SMALL, **o),
    "so_vit": lambda **o: model("so_vit_7", second_order=None, **SMALL, **o),
}
TIMM = ["timm/vit_tiny_patch16_224", "timm/deit_tiny_distilled_patch16_224", "timm/deit3_small_patch16_224"]


# --- maps of features ---


@pytest.mark.parametrize("kind", BACKBONES)
def test_maps_of_the_last_layer_are_the_normalised_patch_tokens(kind):
    backbone = BACKBONES[kind](img_size=(24, 40))
    images = torch.randn(2, 3, 24, 40)
    tokens = backbone.forward_features(images)
    norm = backbone.norm if backbone.fc_norm is None else backbone.fc_norm
    maps = patch_maps(backbone, images)
    assert maps.shape == (2, 32, 3, 5)
    if backbone.fc_norm is not None:
        tokens = norm(tokens)
    for y in range(3):
        for x in range(5):
            token = tokens[:, backbone.num_prefix + 5 * y + x]
            assert torch.allclose(maps[:, :, y, x], token, atol=1e-6)
            # With the norm taken back, the token has zero mean and unit variance.
            plain = (maps[:, :, y, x] - norm.bias) / norm.weight
            assert torch.allclose(plain.mean(1), torch.zeros(2), atol=1e-4)
            assert torch.allclose(plain.var(1, unbiased=False), torch.ones(2), atol=1e-3)


@pytest.mark.parametrize("kind", BACKBONES)
def test_maps_of_several_layers_are_those_of_their_blocks(kind):
    backbone = BACKBONES[kind]()
    images = torch.randn(2, 3, 32, 32)
    outputs = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _module, _input, output: outputs.append(output))
    backbone.forward_features(images)
    outputs = outputs[: len(backbone.blocks)]
    norm = backbone.norm if backbone.fc_norm is None else backbone.fc_norm
    last = len(outputs) - 1
    maps = patch_maps(backbone, images, [last, 0, -2])
    expected = [norm(outputs[i])[:, backbone.num_prefix :] for i in (last, 0, last - 1)]
    assert torch.allclose(maps, torch.cat(expected, 2).transpose(1, 2).reshape(2, 96, 4, 4), atol=1e-6)
    assert torch.equal(maps[:, :32], patch_maps(backbone, images))
    assert torch.equal(patch_maps(backbone, images, [1, 1]).chunk(2, 1)[0], patch_maps(backbone, images, [1]))


@pytest.mark.parametrize("kind", ["avg", "cls", "fixed positions", "no positions", "distilled"])
def test_other_sizes_have_a_resized_embedding(kind):
    """As a model of that size with the same weights and the table resized by hand."""
    size = (48, 24)
    backbone = BACKBONES[kind]()
    weights = copy.deepcopy(backbone.state_dict())
    if "pos_embed" in weights:
        prefix, cells = weights["pos_embed"].split([backbone.num_prefix, 16], 1)
        cells = cells[0].T.reshape(1, 32, 4, 4)
        cells = F.interpolate(cells, size=(6, 3), mode="bicubic", align_corners=False)
        weights["pos_embed"] = torch.cat([prefix, cells.reshape(1, 32, 18).transpose(1, 2)], 1)
    other = BACKBONES[kind](img_size=size)
    other.load_state_dict(weights)
    images = torch.randn(2, 3, *size)
    for layers in (None, [0, 2]):
        assert torch.allclose(
            patch_maps(backbone, images, layers), patch_maps(other, images, layers), atol=1e-5
        )
    with pytest.raises(ValueError, match="height"):
        patch_maps(backbone, torch.zeros(1, 3, 20, 24))
    # Classification still takes images of its own size only.
    with pytest.raises(ValueError, match="channels, height, width"):
        backbone(images)


@pytest.mark.slow
# timm's distilled models have no other pooling.
@pytest.mark.parametrize("name, pool", [*((name, None) for name in TIMM), (TIMM[0], "avg"), (TIMM[2], "avg")])
def test_maps_of_timm(name, pool):
    import timm

    backbone = model(name, img_size=(64, 48), pool=pool)
    images = torch.randn(2, 3, 64, 48)
    before = backbone.forward_features(images)
    options = {"global_pool": pool} if pool else {}
    theirs = timm.create_model(
        name.removeprefix("timm/"), img_size=(64, 48), num_classes=0, dynamic_img_size=True, **options
    )
    theirs.load_state_dict(backbone.backbone.state_dict())
    theirs.eval()
    outputs = []
    theirs.blocks[4].register_forward_hook(lambda _module, _input, output: outputs.append(output))
    for size in ((64, 48), (32, 80)):
        x = torch.randn(2, 3, *size)
        grid = (size[0] // 16, size[1] // 16)
        tokens = theirs.fc_norm(theirs.forward_features(x))[:, theirs.num_prefix_tokens :]
        assert torch.allclose(patch_maps(backbone, x), tokens.transpose(1, 2).unflatten(2, grid), atol=1e-5)
        found = patch_maps(backbone, x, [-1, 4])
        assert torch.allclose(found[:, : backbone.dim], patch_maps(backbone, x), atol=1e-5)
        theirs.forward_features(x)
        norm = theirs.fc_norm if isinstance(theirs.norm, nn.Identity) else theirs.norm
        tokens = norm(outputs[-1])[:, theirs.num_prefix_tokens :]
        expected = tokens.transpose(1, 2).unflatten(2, grid)
        assert torch.allclose(found[:, backbone.dim :], expected, atol=1e-5)
    # Nothing about the model has changed.
    assert torch.equal(backbone.forward_features(images), before)
    with pytest.raises(ValueError, match="channels, height, width"):
        backbone.forward_features(torch.zeros(1, 3, 32, 80))


def test_swin_has_maps_of_its_last_layer():
    backbone = model("swin_pico", img_size=(64, 32))
    images = torch.randn(2, 3, 64, 32)
    maps = patch_maps(backbone, images)
    assert maps.shape == (2, backbone.dim, 8, 4)
    assert torch.equal(maps.flatten(2).transpose(1, 2), backbone.forward_features(images))
    with pytest.raises(ValueError, match="takes only images of 64x32 pixels, found 32x64"):
        patch_maps(backbone, torch.zeros(1, 3, 32, 64))
    with pytest.raises(ValueError, match="leave `layers` out"):
        patch_maps(backbone, images, [0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size, grid",
    [
        ("timm/nest_tiny", (64, 64), (4, 4)),
        ("timm/convnext_atto", (64, 96), (2, 3)),
        ("timm/resnet18", (70, 96), (3, 3)),
        ("timm/eva02_tiny_patch14_224", (28, 28), (2, 2)),
    ],
)
def test_maps_of_other_models_of_timm(name, size, grid):
    backbone = model(name, img_size=size)
    images = torch.randn(2, 3, *size)
    maps = patch_maps(backbone, images)
    assert maps.shape == (2, backbone.dim, *grid)
    assert torch.equal(
        maps.flatten(2).transpose(1, 2), backbone.label_tokens(backbone.forward_features(images))
    )
    # Convolutional models take other sizes, and see the same as a model that is built for them.
    if name in ("timm/convnext_atto", "timm/resnet18"):
        other = model(name, img_size=(128, 128))
        other.load_state_dict(backbone.state_dict())
        assert torch.allclose(patch_maps(other, images), maps, atol=1e-5)


@pytest.mark.parametrize("layers", [[3], [-4], [0, 7], []])
def test_layers_that_are_not_there_are_an_error(layers):
    with pytest.raises(ValueError, match="some of the 3 blocks, counted from 0 to 2"):
        patch_maps(vit(), torch.zeros(1, 3, 32, 32), layers)


# --- heads ---


def test_the_linear_head_is_imagenet_s():
    """A norm with eps 1e-6 of each token, then one linear map; weights of std 2e-5."""
    head = LinearHead(64, 200)
    assert 1.7e-5 < head.classify.weight.std() < 2.3e-5 and not head.classify.bias.any()
    assert head.norm.eps == 1e-6
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.bias)
    nn.init.normal_(head.classify.weight)
    x = torch.randn(2, 64, 3, 5)
    found = head(x)
    assert found.shape == (2, 200, 3, 5)
    token = x[1, :, 2, 4].double()
    token = (token - token.mean()) / (token.var(unbiased=False) + 1e-6).sqrt()
    token = token * head.norm.weight + head.norm.bias
    expected = head.classify.weight[:, :, 0, 0].double() @ token + head.classify.bias
    assert torch.allclose(found[1, :, 2, 4].double(), expected, atol=1e-4)


def test_a_fine_tuned_segmenter_is_imagenet_s():
    """Tokens of the last block go to the head without a final norm: MAE's norm is now the head's."""
    backbone = vit(num_classes=10)
    norm = backbone.fc_norm
    names = {name for name, _ in backbone.named_parameters()} - {"head.weight", "head.bias"}
    segmenter = Segmenter(backbone, 7).eval()
    assert segmenter.segment_head.norm is norm
    own = {name.removeprefix("backbone.") for name, _ in segmenter.named_parameters()}
    assert own == names - {"fc_norm.weight", "fc_norm.bias"} | {
        "segment_head.norm.weight",
        "segment_head.norm.bias",
        "segment_head.classify.weight",
        "segment_head.classify.bias",
    }
    nn.init.normal_(segmenter.segment_head.classify.weight)
    images = torch.randn(2, 3, 40, 24)
    tokens = backbone.forward_tokens(images)[:, 1:]  # before any norm
    logits = norm(tokens) @ segmenter.segment_head.classify.weight[:, :, 0, 0].T
    assert torch.allclose(segmenter(images), logits.transpose(1, 2).reshape(2, 7, 5, 3), atol=1e-5)


@pytest.mark.parametrize("kind", ["avg", "cls", "no positions", "distilled"])
@pytest.mark.parametrize("head", ["linear", "upernet", "dpt"])
def test_segmenters_learn_with_all_of_their_parameters(kind, head):
    if head != "linear":
        pytest.importorskip("segmentation_models_pytorch")
    backbone = BACKBONES[kind](num_classes=10)
    torch.manual_seed(0)
    segmenter = Segmenter(backbone, 5, head)
    last = [module for module in segmenter.segment_head.classify.modules() if isinstance(module, nn.Conv2d)][
        -1
    ]
    nn.init.normal_(last.weight)
    # A grid of 3 rows and 5 columns.
    logits = segmenter.train()(torch.randn(2, 3, 24, 40))
    finer = {"linear": 1, "upernet": 4, "dpt": 8}[head]
    assert logits.shape == (2, 5, 3 * finer, 5 * finer)
    logits.square().mean().backward()
    without = [name for name, p in segmenter.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_layer_decay_works_as_for_classifiers():
    """Every parameter of the backbone has the rate and the decay that it has in the classifier."""
    for build in (lambda: vit(num_classes=4), lambda: model("swin_pico", num_classes=4)):
        classifier = build()
        segmenter = Segmenter(build(), 5)

        def settings(part):
            names = {p: name for name, p in part.named_parameters()}
            values = {}
            groups = param_groups(part, 0.05, part.no_weight_decay(), 0.5, part.layer_id, part.num_layers)
            for group in groups:
                for p in group["params"]:
                    values[names[p]] = (group["lr_scale"], group["weight_decay"])
            return values

        expected, found = settings(classifier), settings(segmenter)
        for name, value in found.items():
            if name.startswith("segment_head."):
                assert value == (1.0, 0.05 if name == "segment_head.classify.weight" else 0.0)
            else:
                assert value == expected[name.removeprefix("backbone.")], name
        assert min(scale for scale, _ in found.values()) == 0.5**segmenter.num_layers


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        segmenter = Segmenter(vit(), 5).train()
        nn.init.normal_(segmenter.segment_head.classify.weight)
        segmenter.set_grad_checkpointing(recompute)
        assert segmenter.backbone.grad_checkpointing == recompute
        segmenter(torch.ones(1, 3, 32, 32)).square().sum().backward()
        gradients.append([p.grad for p in segmenter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_heads_that_cannot_be_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="one of linear, upernet, dpt, found 'fcn'"):
        Segmenter(vit(), 5, "fcn")
    with pytest.raises(ValueError, match="choose a plain ViT"):
        Segmenter(model("swin_pico"), 5, "upernet")
    # None makes the import fail, as if the package were not installed.
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.decoders.dpt.decoder", None)
    with pytest.raises(ValueError, match=r"dpt needs a package .* pip install segmentation-models-pytorch"):
        Segmenter(vit(), 5, "dpt")


# --- the probe ---


def test_the_dense_probe_is_the_probe_at_each_place():
    torch.manual_seed(0)
    dense, probe = DenseProbe(6, 4, heads=3), Probe(6, 4, heads=3)
    assert dense.state_dict().keys() == probe.state_dict().keys()
    for ours, theirs in zip(dense.head[1:], probe.head[1:]):
        assert 0.005 < ours.weight.std() < 0.02 and not ours.bias.any()
        theirs.weight.data = ours.weight.data[:, :, 0, 0]
        theirs.bias.data.normal_()
        ours.bias.data.copy_(theirs.bias)
    for train in (True, False):
        features = 5 + 3 * torch.randn(2, 6, 3, 4)
        found = dense.train(train)(features)
        expected = probe.train(train)(features.permute(0, 2, 3, 1).reshape(24, 6))  # (3, 24, 4)
        assert found.shape == (3, 2, 4, 3, 4) and found.dtype == torch.float32
        expected = expected.reshape(3, 2, 3, 4, 4).permute(0, 1, 4, 2, 3)
        assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(dense.head[0].running_var, probe.head[0].running_var)
    assert not list(dense.head[0].parameters())


def test_the_dense_probe_is_exact_under_autocast():
    probe = DenseProbe(6, 4, heads=1)
    features = torch.randn(2, 6, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = probe(features)
    assert found.dtype == torch.float32 and torch.equal(found, probe(features))
