"""ViT, DeiT and timm backbones under the classifier: same weights, same output as timm's; labels on top."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layers.contract import Heads
from layers.positional.pairs import relative_labels
from models_vit import DEIT_DISTILLED, MODELS, VIT

SMALL = dict(
    img_size=(16, 24), patch_size=(4, 4), dim=32, depth=3, num_heads=2, num_classes=5, head_init_std=0.02
)
TIMMS = dict(img_size=(16, 24), patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5)


def small(entry=VIT, **kwargs):
    torch.manual_seed(0)
    return entry(**SMALL | kwargs)


def shake(model: nn.Module) -> nn.Module:
    """Random numbers in every parameter: what starts at zero or one hides mistakes."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
    return model


def lr_scales(model: nn.Module, decay: float = 0.65) -> dict[str, float]:
    """timm's layer-wise scale of each parameter, by name."""
    from timm.optim import param_groups_layer_decay

    names = {id(p): n for n, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=decay)
    return {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}


def our_scales(model: nn.Module, decay: float = 0.65) -> dict[str, float]:
    return {n: decay ** (model.num_layers - model.layer_id(n)) for n, _ in model.named_parameters()}


@pytest.mark.parametrize("chans", [1, 4])
@pytest.mark.parametrize("pool, theirs", [("cls", "token"), ("avg", "avg")])
def test_vit_equals_timms(pool, theirs, chans):
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    ours = shake(small(pool=pool, in_chans=chans))
    reference = TimmViT(**TIMMS, in_chans=chans, global_pool=theirs)
    reference.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, chans, 16, 24)
    assert torch.allclose(ours(x), reference(x), atol=1e-5)
    assert ours.forward_features(x).shape == (3, 1 + 24, 32)
    assert torch.allclose(ours.forward_features(x), reference.forward_features(x), atol=1e-5)
    ours(x).square().sum().backward()
    reference(x).square().sum().backward()
    grads = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, grads[name].grad, atol=1e-4, rtol=1e-3), name


def test_distilled_equals_timms():
    from timm.models.deit import VisionTransformerDistilled

    ours = shake(small(DEIT_DISTILLED))
    reference = VisionTransformerDistilled(**TIMMS)
    reference.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 3, 16, 24)
    assert ours.num_prefix == 2 and ours.forward_features(x).shape == (3, 2 + 24, 32)
    assert torch.allclose(ours(x), reference(x), atol=1e-5)
    reference.set_distilled_training(True)
    for mine, theirs in zip(ours(x, distillation=True), reference.train()(x)):
        assert torch.allclose(mine, theirs, atol=1e-5)
    with pytest.raises(ValueError, match="distillation token"):
        small(DEIT_DISTILLED, pool="avg")


def test_distillation_and_positions_together():
    model = shake(small(DEIT_DISTILLED, pos_label="apl"))
    x = torch.randn(2, 3, 16, 24)
    (logits, dist_logits), losses = model(x, positions=True, distillation=True)
    mean, again = model(x, positions=True)
    assert torch.equal(mean, (logits + dist_logits) / 2) and not torch.allclose(logits, dist_logits)
    assert torch.equal(losses["position"], again["position"])
    # the label head reads patches only, neither of the two tokens before them
    seen = []
    model.pos_head.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(x, positions=True)
    assert torch.equal(seen[0], model.forward_features(x)[:, 2:])


@pytest.mark.parametrize("kind", ["avg", "cls", "distilled"])
def test_layer_decay_is_timms(kind):
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    if kind == "distilled":
        ours, theirs = small(DEIT_DISTILLED, pos_label="apl"), VisionTransformerDistilled(**TIMMS)
    else:
        ours = small(pool=kind, pos_label="apl")
        theirs = TimmViT(**TIMMS, global_pool="token" if kind == "cls" else "avg")
    mine, timms = our_scales(ours), lr_scales(theirs)
    assert {n for n in mine if not n.startswith("pos_head.")} == set(timms)
    for name, scale in mine.items():
        # timm puts the final norm, which only class-token models have, with the last block; MAE puts it with
        # the head.
        expected = 1.0 if name.startswith(("pos_head.", "norm.")) else timms[name]
        assert scale == pytest.approx(expected), name
    assert max(ours.layer_id(n) for n, _ in ours.named_parameters()) == ours.num_layers == 4
    assert ours.no_weight_decay() == theirs.no_weight_decay() & set(
        timms
    )  # timm's list is the same for all kinds


def test_without_embedding_moving_patches_moves_tokens_only():
    model, order = shake(small(pos_embed="none")).eval(), torch.randperm(24)
    assert not [n for n in model.state_dict() if "pos_embed" in n]
    x = torch.randn(2, 3, 16, 24)
    cells = x.reshape(2, 3, 4, 4, 6, 4).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]  # (B, L, c, ph, pw)
    moved = cells.reshape(2, 4, 6, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 24)
    a, b = model.forward_features(x), model.forward_features(moved)
    assert torch.allclose(a[:, 1:][:, order], b[:, 1:], atol=1e-5) and torch.allclose(
        a[:, 0], b[:, 0], atol=1e-5
    )
    assert torch.allclose(model(x), model(moved), atol=1e-5)
    for kind in ("learned", "sincos"):
        placed = shake(small(pos_embed=kind)).eval()
        assert not torch.allclose(placed(x), placed(moved), atol=1e-3), kind


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("label", ["none", "apl", "rpl", "apl+rpl"])
def test_position_losses_are_the_heads_on_normalised_patches(label, pool):
    model = shake(small(pos_label=label, pool=pool))
    x = torch.randn(3, 3, 16, 24)
    logits, losses = model(x, positions=True)
    assert torch.equal(logits, model(x))
    if label == "none":
        assert losses == {} and model.chance() == {}
        return
    # From the blocks on, by hand.
    last = []
    model.blocks[-1].register_forward_hook(lambda m, args, out: last.append(out))
    model(x)
    norm = model.norm if pool == "cls" else model.fc_norm
    tokens = F.layer_norm(last[0][:, 1:], (32,), norm.weight, norm.bias, 1e-6)  # (B, 24, 32)
    expected = 0
    if "apl" in label:
        out = model.pos_head.apl.logits(tokens)
        expected += F.cross_entropy(out.flatten(0, 1), torch.arange(24).repeat(3))
    if "rpl" in label:
        cells = torch.arange(24)[None]
        out = model.pos_head.rpl.logits(tokens)
        expected += F.cross_entropy(
            out.flatten(0, 2), relative_labels((4, 6), cells, cells).flatten().repeat(3)
        )
    assert losses["position"].item() == pytest.approx(expected.item(), abs=1e-5)
    chance = model.chance()
    assert set(chance) == set(losses)
    if label == "apl":
        assert chance["position"] == pytest.approx(math.log(24))


def test_the_label_head_is_not_run_unless_asked():
    model = small(pos_label="apl+rpl")

    def refuse(*args):
        raise AssertionError("the label head ran")

    for module in model.pos_head.modules():
        module.register_forward_pre_hook(refuse)
    x = torch.randn(2, 3, 16, 24)
    model.train()(x)
    model.eval()(x)
    with pytest.raises(AssertionError, match="label head ran"):
        model(x, positions=True)


@pytest.mark.parametrize("entry", [VIT, DEIT_DISTILLED])
def test_labels_change_no_bit_of_the_rest(entry):
    plain, labelled = small(entry), small(entry, pos_label="apl+rpl")
    state = labelled.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state.pop(name)), name
    assert state and all(n.startswith("pos_head.") for n in state)
    x = torch.randn(2, 3, 16, 24)
    assert torch.equal(plain(x), labelled(x))


def test_head_starts_as_asked_and_may_be_absent():
    for std in (2e-5, 0.02):
        head = small(num_classes=500, head_init_std=std).head
        assert head.weight.std().item() == pytest.approx(std, rel=0.05) and not head.bias.any()
    x = torch.randn(2, 3, 16, 24)
    for pool in ("avg", "cls"):
        model = small(num_classes=0, pool=pool)
        assert model(x).shape == (2, 32) and not [n for n in model.state_dict() if n.startswith("head.")]
        assert torch.equal(model(x), model.pool_tokens(model.forward_features(x)))


@pytest.mark.parametrize(
    "img, patch, chans, grid",
    [
        ((24, 40), (8, 8), 1, (3, 5)),
        ((42, 28), (14, 14), 4, (3, 2)),
        ((12, 40), (4, 8), 5, (3, 5)),
    ],
)
def test_rectangles_channels_and_patches(img, patch, chans, grid):
    model = small(img_size=img, patch_size=patch, in_chans=chans, pos_label="apl+rpl")
    assert model.grid == grid and model.dim == 32
    logits, losses = model(torch.randn(2, chans, *img), positions=True)
    assert logits.shape == (2, 5) and losses["position"].isfinite()
    with pytest.raises(ValueError, match=r"give the same \S+_size\S? and \S+in_chans"):
        model(torch.randn(2, chans, img[1], img[0]))


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="avg, cls, found 'map'"):
        small(pool="map")
    with pytest.raises(ValueError, match=r"grid of this model is 1x1.*larger `img_size`"):
        small(img_size=(4, 4), pos_label="rpl")
    with pytest.raises(ValueError, match="none, sincos, learned"):
        small(pos_embed="rope")


TIMM_NAMES = {
    f"{a}_{s}_patch{p}": f"{a}_{s}_patch{p}_224"
    for a, s, p in [
        ("vit", "tiny", 16),
        ("vit", "small", 16),
        ("vit", "base", 16),
        ("vit", "large", 16),
        ("vit", "huge", 14),
        ("vit", "small", 8),
        ("vit", "base", 8),
        ("deit", "tiny", 16),
        ("deit", "small", 16),
        ("deit", "base", 16),
    ]
}
TIMM_NAMES |= {
    f"deit_{s}_distilled_patch16": f"deit_{s}_distilled_patch16_224" for s in ("tiny", "small", "base")
}
SMALL_MODELS = {"vit_nano_patch8", "vit_nano_patch4", "vit_tiny_patch16", "deit_tiny_distilled_patch16"}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_registered_model_builds(name):
    """Without memory; where timm has a model of that name, with its parameters."""
    import timm

    patch = int(name.rsplit("patch", 1)[1])
    with torch.device("meta"):
        model = MODELS[name](
            img_size=(224 // 16 * patch,) * 2 if patch < 8 else (224, 224), pool=None, pos_label="apl"
        )
        assert model.pool == ("cls" if name.startswith("deit") else "avg") and model.patch_size == (
            patch,
            patch,
        )
        if name in TIMM_NAMES:
            pool = "token" if model.pool == "cls" else "avg"
            theirs = timm.create_model(TIMM_NAMES[name], num_classes=1000, global_pool=pool)
            shapes = {n: p.shape for n, p in model.state_dict().items() if not n.startswith("pos_head.")}
            assert shapes == {n: p.shape for n, p in theirs.state_dict().items()}
            assert model.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
        if name == "vit_base_patch16":
            head = sum(p.numel() for p in model.pos_head.parameters())
            assert head == 259_588, "the authors' head on a 14x14 grid"


def test_arguments_override_the_name():
    model = MODELS["deit_small_patch16"](
        img_size=(32, 16), patch_size=(8, 4), depth=1, dim=24, pool="avg", in_chans=2
    )
    assert (len(model.blocks), model.dim, model.pool, model.grid) == (1, 24, "avg", (4, 4))
    assert model.patch_embed.proj.weight.shape == (24, 2, 8, 4)


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_small_models_have_finite_gradients_everywhere(name):
    patch = int(name.rsplit("patch", 1)[1])
    torch.manual_seed(0)
    model = MODELS[name](
        img_size=(3 * patch, 2 * patch), num_classes=7, pos_label="apl+rpl", head_init_std=0.02, drop_path=0.1
    )
    logits, losses = model.eval()(torch.randn(2, 3, 3 * patch, 2 * patch), positions=True)
    (F.cross_entropy(logits, torch.tensor([1, 5])) + 0.5 * losses["position"]).backward()
    for n, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, n
    rates = [getattr(b.drop_path, "rate", 0.0) for b in model.blocks]
    assert rates == pytest.approx([0.1 * i / (len(rates) - 1) for i in range(len(rates))])


# --- timm backbones
# --------------------------------------------------------------------------------------------------- name,
# image, channels, layout, grid, prefix; sizes are small, and rectangles where the architecture allows them
BACKBONES = [
    ("nest_tiny", (64, 64), 1, "NCHW", (4, 4), 0),
    ("nest_tiny_jx", (64, 64), 3, "NCHW", (4, 4), 0),
    ("swin_tiny_patch4_window7_224", (64, 96), 3, "NHWC", (2, 3), 0),
    ("deit3_small_patch16_224", (32, 48), 4, "NLC", (2, 3), 1),
    ("resnet18", (64, 96), 1, "NCHW", (2, 3), 0),
    ("convnext_atto", (64, 96), 3, "NCHW", (2, 3), 0),
]


@pytest.fixture(scope="module", params=BACKBONES, ids=lambda b: b[0])
def backbone(request):
    from backbones.timm import timm_entry

    name, img, chans, *_ = request.param
    torch.manual_seed(0)
    model = timm_entry(f"timm/{name}")(
        img_size=img, in_chans=chans, num_classes=5, pos_label="apl", head_init_std=0.02
    )
    return model.eval(), request.param


def test_timm_backbone_is_timms_with_our_heads(backbone):
    model, (name, img, chans, layout, grid, prefix) = backbone
    assert (model.layout, model.grid, model.num_prefix) == (layout, grid, prefix)
    x = torch.randn(2, chans, *img)
    with torch.no_grad():
        tokens = model.forward_features(x)
        raw = model.backbone.forward_features(x)
        assert tokens.shape == (2, prefix + grid[0] * grid[1], model.dim)
        for cell in range(grid[0] * grid[1]):
            r, c = divmod(cell, grid[1])
            place = {"NLC": (..., prefix + cell, slice(None)), "NCHW": (..., r, c)}
            place["NHWC"] = (..., r, c, slice(None))
            assert torch.equal(tokens[:, prefix + cell], raw[place[layout]]), "row-major"
        logits, losses = model(x, positions=True)
        read = model.label_tokens(tokens)
        expected = F.cross_entropy(
            model.pos_head.apl.logits(read).flatten(0, 1), torch.arange(read.shape[1]).repeat(2)
        )
        assert losses["position"].item() == pytest.approx(expected.item(), abs=1e-5)
        assert torch.equal(logits, model(x))
        if name == "convnext_atto":  # the one here that normalises after pooling
            norm = model.backbone.head.norm
            assert torch.allclose(
                read, F.layer_norm(tokens, (model.dim,), norm.weight, norm.bias, norm.eps), atol=1e-5
            )
        else:
            assert torch.equal(read, tokens[:, prefix:])
        # timm's own classifier in place of ours
        model.backbone.reset_classifier(5)
        try:
            head = [
                m
                for n, m in model.backbone.named_modules()
                if isinstance(m, nn.Linear) and m.out_features == 5
            ]
            head[0].load_state_dict(model.head.state_dict())
            assert torch.allclose(model.backbone(x), logits, atol=1e-5)
        finally:
            model.backbone.reset_classifier(0)


def test_timm_layer_decay_is_timms(backbone):
    model, (name, *_) = backbone
    model.backbone.reset_classifier(5)
    try:
        timms = lr_scales(model.backbone)
    finally:
        model.backbone.reset_classifier(0)
    mine = our_scales(model)
    for n, scale in mine.items():
        expected = timms[n.removeprefix("backbone.")] if n.startswith("backbone.") else 1.0
        assert scale == pytest.approx(expected), n
    assert len(set(mine.values())) == model.num_layers + 1 > 4
    listed = getattr(model.backbone, "no_weight_decay", set)()
    assert model.no_weight_decay() == {f"backbone.{n}" for n in listed}


def test_timm_backbone_does_not_drop_paths_unless_told(backbone):
    """NesT drops up to half of its paths by default."""
    model, _ = backbone
    assert not [m for m in model.modules() if getattr(m, "drop_prob", 0)]
    assert model.training is False


def test_dry_run_leaves_batch_statistics_and_mode_alone():
    from backbones.timm import timm_entry

    model = timm_entry("resnet18")(img_size=(32, 64), num_classes=3)
    assert all(m.training for m in model.modules()) and model.grid == (1, 2)
    assert model.backbone.bn1.num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"found \(3, 64, 32\)"):
        model(torch.zeros(1, 3, 64, 32))


def test_timm_embedding_can_be_removed_where_it_is_a_parameter():
    from backbones.timm import timm_entry

    model = timm_entry("deit3_small_patch16_224")(
        img_size=(32, 48),
        num_classes=3,
        pos_embed="none",
        head_init_std=0.02,
        drop_path=0.2,
    ).eval()
    assert max(getattr(m, "drop_prob", 0) or 0 for m in model.modules()) == pytest.approx(0.2)
    table = model.backbone.pos_embed
    assert not table.any() and not table.requires_grad
    x = torch.randn(1, 3, 32, 48)
    assert torch.allclose(model(x), model(x.roll((16, 16), dims=(2, 3))), atol=1e-5)
    for name, why in (
        ("swin_tiny_patch4_window7_224", "relative_position"),
        ("resnet18", "no parameter pos_embed"),
        ("eva02_tiny_patch14_224", "in rope"),
    ):
        with pytest.raises(ValueError, match=f"`pos_embed` none.*{why}"):
            timm_entry(name)(img_size=(56, 56), pos_embed="none")


def test_timm_models_that_do_not_fit_say_why():
    from backbones.timm import timm_entry

    for name, kwargs, why in (
        ("resnet1", {}, "near: resnet18"),
        ("nest_tiny", dict(img_size=(64, 96)), "square"),
        ("resnet18", dict(patch_size=(4, 4)), "does not take `patch_size`"),
        ("resnet18", dict(pool="cls"), "token"),
        ("vgg11", dict(drop_path=0.1), "does not take `drop_path`"),
        ("resnet18", dict(pool="map"), "avg, cls"),
        ("resnet18", dict(img_size=(32, 32), pos_label="apl"), "grid of this model is 1x1"),
    ):
        with pytest.raises(ValueError, match=why):
            timm_entry(name)(**kwargs)


class Features(nn.Module):
    """A backbone that gives what it is told."""

    def __init__(self, out, **attributes):
        super().__init__()
        self.out = out
        self.__dict__ |= attributes

    def forward_features(self, x):
        return self.out

    def forward_head(self, x, pre_logits):
        return x.flatten(1)


def test_a_class_token_that_timm_does_not_count_is_found():
    from backbones.timm import TimmClassifier, TimmTrunk

    backbone = Features(torch.randn(1, 7, 8), cls_token=torch.zeros(1))
    model = TimmClassifier(backbone, TimmTrunk(img_size=(32, 48)), Heads(num_classes=2))
    assert (model.num_prefix, model.grid, model.layout) == (1, (2, 3), "NLC")
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 2)
    assert model.num_layers == model.layer_id("head.weight") == 1, (
        "without groups, all of the backbone is layer 0"
    )


def test_features_without_a_grid_are_refused():
    from backbones.timm import dry_run, token_grid, token_layout

    for out in (torch.zeros(1, 64), [torch.zeros(1, 4, 8)]):
        with pytest.raises(ValueError, match="no grid of tokens"):
            dry_run(Features(out), (32, 32), 3)
    odd = torch.zeros(1, 17, 8)
    with pytest.raises(ValueError, match=r"17 tokens .* form no grid on an image of 32x32; tried 2x2, 4x4"):
        token_grid(odd, "NLC", 0, (32, 32), Features(odd, feature_info=[{"reduction": 16}]))
    assert token_grid(odd, "NLC", 1, (32, 32), Features(odd)) == (4, 4)
    assert token_grid(torch.zeros(1, 8, 5), "NLC", 0, (64, 32), Features(odd)) == (4, 2), (
        "the image's proportions"
    )
    with pytest.raises(ValueError, match="cannot find the channels"):
        token_layout(torch.zeros(1, 5, 6, 7), Features(odd, num_features=8))
    assert token_layout(torch.zeros(1, 5, 6, 7), Features(odd, num_features=7)) == "NHWC"
