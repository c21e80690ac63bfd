"""So-ViT: its head against slow obvious forms, its models against the published table."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import main_finetune
import tiny  # noqa: F401 (registers mae_test and vit_test)
from backbones.registry import build_classifier
from backbones.so_vit import MODELS
from commands import call
from layers.conv_embed import ConvTokenEmbed
from layers.probe import SecondOrderProbe, pooled_and_patches
from layers.second_order import (
    SecondOrder,
    SecondOrderHead,
    SecondOrderPooling,
    cross_covariance,
    largest_singular_value,
    singular_value_power,
)
from util.train.optim import WeightAverage, param_groups
from util.weights import checkpoint

torch.manual_seed(0)


def matrices(*shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random numbers in every parameter and statistic: what starts at zero or one hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)
    for b in model.buffers():
        if b.is_floating_point():
            b.add_(torch.rand(b.shape, generator=generator) * 0.3)
    return model


# --- the normalisation
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha,iters", [(0.5, 1), (0.3, 1), (0.5, 7), (1.0, 1)])
def test_scale_law(alpha, iters):
    a, w = matrices(3, 2, 8, 5), matrices(8)
    for c in (1e-3, 0.7, 40.0):
        expected = c**alpha * singular_value_power(a, w, alpha, iters)
        assert torch.allclose(singular_value_power(c * a, w, alpha, iters), expected, rtol=1e-10)
    assert torch.allclose(
        singular_value_power(a, 5.0 * w, alpha, iters), singular_value_power(a, w, alpha, iters)
    )


@pytest.mark.parametrize("shape", [(4, 8, 5), (3, 5, 8)])
def test_many_iterations_are_the_exact_singular_value(shape):
    u, _, vt = torch.linalg.svd(matrices(*shape), full_matrices=False)
    s = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    a = u * s @ vt
    assert torch.allclose(singular_value_power(a, matrices(shape[1]), 0.5, 50), a / math.sqrt(5), rtol=1e-9)
    # one triplet: So-ViT's formula written out; its largest part by the power, the rest by a constant
    first = s[0] * u[..., :1] @ vt[..., :1, :]
    written_out = s[0] ** 0.5 * u[..., :1] @ vt[..., :1, :] + (a - first) / s[0] ** 0.5
    assert torch.allclose(singular_value_power(a, matrices(shape[1]), 0.5, 50), written_out, rtol=1e-9)


def test_the_estimate_grows_with_iterations_and_stays_below():
    a, w = matrices(64, 48, 24), matrices(48)
    top = torch.linalg.matrix_norm(a, ord=2)
    shares = [(largest_singular_value(a, w, n).flatten() / top) for n in (1, 2, 5, 20)]
    assert all(s.max() <= 1 + 1e-9 for s in shares)
    means = [s.mean().item() for s in shares]
    assert means == sorted(means) and 0.6 < means[0] < 0.85 and means[-1] > 0.97, means
    # one iteration, step by step
    u = a[0].T @ w / (a[0].T @ w).norm()
    assert largest_singular_value(a, w, 1)[0].item() == pytest.approx((a[0] @ u).norm().item(), rel=1e-12)


@pytest.mark.parametrize("iters", [1, 3])
def test_gradients_in_float64(iters):
    a, w = matrices(2, 4, 3).requires_grad_(), matrices(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: singular_value_power(a, w, 0.5, iters), (a, w))
    p, q = matrices(2, 6, 4).requires_grad_(), matrices(2, 6, 3).mul(2).requires_grad_()
    assert torch.autograd.gradcheck(cross_covariance, (p, q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-9])
def test_no_contrast_has_finite_gradients(dtype, scale):
    a = (matrices(2, 6, 4).to(dtype) * scale).requires_grad_()
    w = matrices(6).to(dtype).requires_grad_()
    for iters in (1, 4):
        y = singular_value_power(a, w, 0.5, iters)
        grads = torch.autograd.grad(y.sum(), (a, w))
        assert y.isfinite().all() and all(g.isfinite().all() for g in grads)
        assert scale or not y.any()


# --- pooling and head
# -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("d1,d2", [(5, 3), (3, 5)])
def test_cross_covariance_is_numpys(d1, d2):
    np = pytest.importorskip("numpy")
    p, q = matrices(2, 7, d1) + 3, matrices(2, 7, d2 * 2)[..., d2:] - 1
    for b in range(2):
        both = np.cov(np.concatenate([p[b].numpy(), q[b].numpy()], 1).T, bias=True)
        assert np.allclose(cross_covariance(p, q)[b].numpy(), both[:d1, d1:])


def slow_pooling(pool: SecondOrderPooling, tokens: torch.Tensor) -> torch.Tensor:
    """A convolution, a batch norm and a ReLU for each projection of each head; covariances image by image."""
    (d1, d2), H, (B, N) = pool.dims, pool.heads, tokens.shape[:2]
    image = tokens.transpose(1, 2).unsqueeze(-1)  # (B, C, N, 1)
    rows = iter(pool.project.weight.split([d1] * H + [d2] * H))
    stats = iter(
        zip(
            *(
                x.split([d1] * H + [d2] * H)
                for x in (pool.norm.running_mean, pool.norm.running_var, pool.norm.weight, pool.norm.bias)
            )
        )
    )
    maps = [
        F.batch_norm(F.conv2d(image, w[:, :, None, None]), *next(stats), eps=1e-5).relu().squeeze(-1)
        for w in rows
    ]
    out = []
    for b in range(B):
        parts = []
        for h in range(H):
            p, q = maps[h][b], maps[H + h][b]  # (d, N)
            p, q = p - p.mean(1, keepdim=True), q - q.mean(1, keepdim=True)
            a = sum(torch.outer(p[:, n], q[:, n]) for n in range(N)) / N
            u = a.T @ pool.start / (a.T @ pool.start).norm()
            parts.append((a / (a @ u).norm() ** (1 - pool.alpha)).flatten())
        out.append(torch.cat(parts))
    return torch.stack(out)


@pytest.mark.parametrize("dims,heads", [((5, 3), 1), ((3, 4), 2)])
def test_pooling_against_the_slow_form(dims, heads):
    pool = shaken(SecondOrderPooling(12, dims, heads, alpha=0.4)).eval()
    tokens = matrices(3, 9, 12, dtype=torch.float32)
    found = pool(tokens)
    assert found.shape == (3, pool.width) and pool.width == heads * dims[0] * dims[1]
    assert torch.allclose(found, slow_pooling(pool, tokens), atol=1e-5) and found.std() > 0.01
    moved = pool(tokens[:, torch.randperm(9)])
    assert torch.allclose(moved, found, atol=1e-5), "tokens have no order here"


def test_projections_start_as_layers_of_their_own():
    torch.manual_seed(0)
    weight = SecondOrderPooling(400, (96, 24), heads=2).project.weight
    for part, width in zip(weight.split([192, 48]), (192, 48)):
        assert part.std().item() == pytest.approx(math.sqrt(2 / width), rel=0.03)


def test_batch_statistics_are_over_images_and_tokens():
    pool = SecondOrderPooling(6, (4, 2))
    tokens = matrices(5, 7, 6, dtype=torch.float32)
    pool.train()(tokens)
    x = pool.project(tokens).flatten(0, 1)
    assert torch.allclose(pool.norm.running_mean, 0.1 * x.mean(0), atol=1e-6)


def test_low_precision_pools_in_float32():
    pool = shaken(SecondOrderPooling(12, (5, 3))).eval()
    tokens = matrices(3, 9, 12, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = pool(tokens)
        from_bf16 = pool(tokens.bfloat16())
    assert low.dtype == torch.float32 and torch.equal(low, pool(tokens))
    assert torch.equal(from_bf16, pool(tokens.bfloat16().float()))
    assert pool.double()(tokens.double()).dtype == torch.float64


def test_fusions():
    torch.manual_seed(0)
    tokens, feature = matrices(4, 9, 12, dtype=torch.float32), matrices(4, 7, dtype=torch.float32)
    heads = {
        f: shaken(SecondOrderHead(12, 7, 5, 0.02, SecondOrder(dims=(4, 3), fusion=f))).eval()
        for f in ("sum", "concat", "visual")
    }
    added, joined, visual = heads.values()
    y = added.pool(tokens)
    by_hand = (
        y @ added.fc_visual.weight.T
        + added.fc_visual.bias
        + feature @ added.fc_class.weight.T
        + added.fc_class.bias
    )
    assert torch.allclose(added(tokens, feature), by_hand, atol=1e-6)
    assert torch.equal(visual(tokens, feature), visual.fc_visual(visual.pool(tokens)))
    # one layer on both features can say what the sum of two says, and the other way round
    joined.pool.load_state_dict(added.pool.state_dict())
    joined.fc.weight.data = torch.cat([added.fc_class.weight, added.fc_visual.weight], 1).data
    joined.fc.bias.data = (added.fc_class.bias + added.fc_visual.bias).data
    assert torch.allclose(joined(tokens, feature), by_hand, atol=1e-6)
    keys = {f: {k.split(".")[0] for k in h.state_dict()} - {"pool"} for f, h in heads.items()}
    assert keys == {"sum": {"fc_visual", "fc_class"}, "concat": {"fc"}, "visual": {"fc_visual"}}
    assert all(
        checkpoint.kind_of({f"head.{k}": v for k, v in h.state_dict().items()}) == "classifier"
        for h in heads.values()
    )


def test_dropout_falls_on_the_second_order_feature():
    head = SecondOrderHead(12, 7, 5, 0.02, SecondOrder(dims=(4, 3), dropout=0.5))
    seen = []
    head.fc_visual.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    head.fc_class.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    head.train()(matrices(4, 9, 12, dtype=torch.float32), matrices(4, 7, dtype=torch.float32))
    assert 0.2 < (seen[0] == 0).float().mean() < 0.9 and (seen[1] != 0).all()


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(fusion="both"), "`fusion` takes one of sum, concat, visual, found 'both'"),
        (dict(alpha=0.0), "`alpha` takes a power above 0"),
        (dict(dropout=1.0), "`dropout` takes a share"),
        (dict(iters=0), "`iters` 0"),
        (dict(heads=0), "`heads` 0"),
        (dict(dims=(8, 0)), "`dims` 8 0"),
    ],
)
def test_heads_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        SecondOrderHead(8, 8, 2, 0.02, SecondOrder(**options))


# --- the embedding
# ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "size,patch,chans", [((32, 48), 16, 3), ((48, 16), 16, 1), ((24, 32), 8, 4), ((384, 384), 16, 3)]
)
def test_the_embedding_keeps_the_grid(size, patch, chans):
    embed = ConvTokenEmbed(size, (patch, patch), chans, 12).eval()
    assert embed.grid == (size[0] // patch, size[1] // patch)
    with torch.no_grad():
        tokens = embed(torch.randn(1, chans, *size))
    assert tokens.shape == (1, embed.grid[0] * embed.grid[1], 12)


@pytest.mark.parametrize("patch", [16, 8])
def test_a_token_sees_33_pixels(patch):
    """Row-major, and each token around its cell: which pixels change it."""
    embed = ConvTokenEmbed((96, 128), (patch, patch), 1, 4).double().eval()
    image = torch.randn(1, 1, 96, 128, dtype=torch.float64, requires_grad=True)
    row, column = 3, 4
    token = embed(image)[0, row * embed.grid[1] + column]
    seen = torch.autograd.grad(token.sum(), image)[0][0, 0] != 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    for found, at in ((rows, row * patch), (columns, column * patch)):
        # pooling and strides start at the cell's first pixel; max pooling passes the gradient of a few pixels
        # only
        assert at - 16 <= found.min() <= at - 10 and at + 10 <= found.max() <= at + 16, (
            found.min(),
            found.max(),
            at,
        )


def test_the_embedding_says_what_does_not_fit():
    with pytest.raises(ValueError, match="`patch_size` 16 or 8, found 14x14"):
        ConvTokenEmbed((28, 28), (14, 14), 3, 8)
    with pytest.raises(ValueError, match=r"height 40 is not a multiple .* choose `img_size` 32 or 48"):
        ConvTokenEmbed((40, 32), (16, 16), 3, 8)
    with pytest.raises(ValueError, match="`img_size` and `in_chans`"):
        ConvTokenEmbed((32, 32), (16, 16), 3, 8)(torch.zeros(1, 1, 32, 32))


# --- the models
# -------------------------------------------------------------------------------------------------------
# Parameters in millions without the fixed embedding (all, blocks, head) and multiply-adds in 1e9 at 224 px,
# measured on the authors' code.
TABLE = {
    "so_vit_7": (5.53, 3.68, 1.43, 1.42),
    "so_vit_10": (7.11, 5.26, 1.43, 1.79),
    "so_vit_14": (24.64, 20.69, 3.50, 5.05),
    "so_vit_19": (43.80, 38.21, 5.12, 8.75),
}


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_published_size(name):
    for _ in range(2):  # building one leaves the next alone
        model = MODELS[name](pool=None).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as count, sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(1, 3, 224, 224))
        found = (millions(model), millions(model.blocks), millions(model.head), count.get_total_flops() / 2e9)
        assert found == pytest.approx(TABLE[name], rel=0.01)
        assert model.head.dropout.p == (0.5 if name in ("so_vit_14", "so_vit_19") else 0)
        if name in ("so_vit_14", "so_vit_19"):
            break  # once is enough for the large ones: they share the builder


def test_blocks_are_timms():
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    ours = shaken(
        MODELS["so_vit_7"](img_size=(32, 48), patch_embed="linear", second_order=None, num_classes=5)
    ).eval()
    theirs = TimmViT(
        img_size=(32, 48),
        patch_size=16,
        embed_dim=256,
        depth=7,
        num_heads=4,
        mlp_ratio=2,
        qkv_bias=False,
        num_classes=5,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 48)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(ours.forward_features(x), theirs.forward_features(x), atol=1e-5)


def test_the_sinusoid_counts_the_class_token_as_position_0():
    model = MODELS["so_vit_7"](img_size=(32, 48))
    table = model.pos_embed
    assert table.shape == (1, 7, 256) and not table.requires_grad
    for position in (0, 1, 6):
        for i in (0, 5, 127):
            angle = position / 10000 ** (2 * i / 256)
            assert table[0, position, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[0, position, 128 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert MODELS["so_vit_7"](img_size=(32, 48), pos_embed="none").pos_embed is None


@pytest.mark.parametrize("size,patch", [((384, 384), 16), ((32, 80), 16), ((24, 40), 8)])
def test_other_sizes_train_in_every_part(size, patch):
    torch.manual_seed(0)
    model = MODELS["so_vit_7"](
        img_size=size, patch_size=(patch, patch), num_classes=5, depth=2, pos_label="apl"
    )
    logits, losses = model(torch.randn(2, 3, *size), positions=True)
    (F.cross_entropy(logits, torch.tensor([1, 4])) + losses["position"]).backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or (p.grad.isfinite().all() and p.grad.any()), name


def test_what_a_name_says_can_be_overridden_piece_by_piece():
    head = MODELS["so_vit_14"](img_size=(32, 32), depth=1, second_order={"heads": 2, "dims": (6, 4)}).head
    assert (head.pool.dims, head.pool.heads, head.dropout.p) == ((6, 4), 2, 0.5)
    twin = MODELS["so_vit_14"](img_size=(32, 32), depth=1, second_order=None)
    assert isinstance(twin.head, nn.Linear)
    again = MODELS["so_vit_14"](img_size=(32, 32), depth=1).head
    assert (again.pool.dims, again.pool.heads) == ((64, 48), 1)
    assert millions(twin) == pytest.approx(
        millions(MODELS["so_vit_14"](img_size=(32, 32), depth=1)) - 3.50 + 0.385, abs=0.01
    )


# --- on every backbone
# ------------------------------------------------------------------------------------------------
BACKBONES = [
    ("vit_test", (32, 48), {}),
    ("vit_test", (32, 48), {"pool": "avg"}),
    ("vit_test", (32, 48), {"patch_embed": "conv"}),
    ("deit_tiny_patch16", (32, 48), {"depth": 2}),
    ("deit_tiny_distilled_patch16", (32, 48), {"depth": 2}),
    ("swin_tiny", (64, 96), {"depths": (1, 1, 1, 1)}),
    ("so_vit_7", (32, 48), {"depth": 2}),
    ("timm/nest_tiny", (64, 64), {}),
    ("timm/deit3_small_patch16_224", (32, 48), {}),
    ("timm/convnext_atto", (64, 96), {}),
]


@pytest.mark.parametrize("name,size,options", BACKBONES, ids=lambda x: str(x))
def test_the_head_on_every_backbone(name, size, options):
    torch.manual_seed(0)
    model = build_classifier(
        name,
        img_size=size,
        num_classes=5,
        head_init_std=0.02,
        pos_label="apl",
        second_order={"dims": (6, 4)},
        **{"pool": None} | options,
    )
    x = torch.randn(2, 3, *size)
    logits, losses = shaken(model).eval()(x, positions=True)
    with torch.no_grad():
        tokens = model.forward_features(x)
        read, feature = model.label_tokens(tokens), model.pool_tokens(tokens)
        if model.num_prefix and options.get("pool") != "avg":
            assert torch.equal(feature, tokens[:, 0]), (
                "the class token is what the second-order feature is fused with"
            )
        assert torch.allclose(read.mean(-1), torch.zeros(1), atol=0.5) and read.shape[1] == math.prod(
            model.grid
        )
        expected = model.head(read, feature)
        if "distilled" in name:
            expected = (expected + model.head_dist(tokens[:, 1])) / 2
        assert torch.allclose(logits, expected, atol=1e-6) and torch.equal(logits, model(x))
    F.cross_entropy(model.train()(x, positions=True)[0], torch.tensor([1, 4])).backward()
    for n, p in model.head.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), n
    # the head learns at the full rate under layer decay, its vectors are not decayed
    groups = param_groups(model, 0.05, model.no_weight_decay(), 0.75, model.layer_id, model.num_layers)
    found = {id(p): g for g in groups for p in g["params"]}
    for n, p in model.named_parameters():
        if n.startswith("head."):
            assert found[id(p)]["lr_scale"] == 1, n
            assert (found[id(p)]["weight_decay"] == 0) == (p.ndim == 1), n
    assert checkpoint.kind_of(model.state_dict()) == "classifier"


def test_a_linear_head_is_what_it_was():
    """No random number is drawn, and no operation added, by what a second-order head needs."""
    torch.manual_seed(3)
    model = build_classifier("vit_test", img_size=(32, 32), num_classes=5, head_init_std=0.02)
    x = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(x)
    assert torch.equal(model(x), model.head(model.fc_norm(tokens[:, 1:].mean(1))))
    torch.manual_seed(3)
    other = build_classifier(
        "vit_test", img_size=(32, 32), num_classes=5, head_init_std=0.02, second_order={}
    )
    for n, p in other.named_parameters():
        if not n.startswith(("head.", "norm.")):
            assert torch.equal(p, model.get_parameter(n)), n


@pytest.mark.parametrize(
    "flags,message",
    [
        (
            ["--head", "second_order", "--patch_size", 32],
            "relates patch tokens, but the last grid of this model is 1x1",
        ),
        (["--so_dims", 8, 4], "--so_dims belongs to --head second_order"),
        (
            ["--model", "so_vit_7", "--head", "linear", "--so_iters", 2],
            "--so_iters belongs to --head second_order",
        ),
        (["--model", "swin_tiny", "--patch_embed", "conv"], "swin_tiny has its own embedding"),
        (
            ["--model", "vit_huge_patch14", "--patch_embed", "conv", "--input_size", 28],
            "works at --patch_size 16 or 8",
        ),
    ],
)
def test_wrong_flags_say_what_to_do(tmp_path, capsys, flags, message):
    code, text = call(main_finetune, capsys, "--model", "vit_test", *flags, "--output_dir", tmp_path)
    assert code == 2 and message in text, text


def test_the_probe_reads_frozen_tokens_after_the_norm():
    vit = shaken(build_classifier("vit_test", img_size=(32, 32), num_classes=0, pool="cls")).eval()
    x = torch.randn(2, 3, 32, 32)
    tokens = pooled_and_patches(vit, x, "cls")
    assert torch.equal(tokens, vit.forward_features(x)) and not tokens.requires_grad
    probe = SecondOrderProbe(32, 5, 2, SecondOrder(dims=(6, 4))).eval()
    feature = probe.head[0](tokens[:, 0])
    assert torch.equal(probe(tokens), torch.stack([h(tokens[:, 1:], feature) for h in probe.head[1:]]))


# --- the moving average
# -----------------------------------------------------------------------------------------------
class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("index", torch.arange(100))
        self.register_buffer("mask", torch.tensor([True, False]))


def test_the_average_takes_batch_statistics_along_and_leaves_integers_alone():
    live = Counted()
    ema, by_hand = WeightAverage(live, 0.9), None
    for step in range(30):
        live.train()
        live.norm(matrices(8, 3, dtype=torch.float32) * (step + 1))
        live.norm.weight.data.fill_(float(step))
        ema.update_parameters(live)
        now = {k: v.clone().double() for k, v in live.state_dict().items() if v.is_floating_point()}
        by_hand = now if by_hand is None else {k: 0.9 * by_hand[k] + 0.1 * v for k, v in now.items()}
    for k, v in by_hand.items():
        assert torch.allclose(ema.module.state_dict()[k].double(), v, rtol=1e-4), k
    assert torch.equal(ema.module.index, torch.arange(100)), (
        "a rounded-down index table would point elsewhere"
    )
    assert torch.equal(ema.module.mask, live.mask) and ema.module.norm.num_batches_tracked == 30
