"""Swin: unmodified parts against timm's, windows against written-out attention, the paper's changes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.swin import (
    MODELS,
    SWIN,
    PatchMerging,
    SwinBlock,
    SwinTransformer,
    window_merge,
    window_partition,
)
from layers.transformer import attention

SMALL = dict(
    img_size=(32, 48),
    patch_size=(2, 2),
    embed_dim=16,
    depths=(1, 2, 2, 2),
    num_heads=(1, 2, 4, 8),
    window_size=3,
    num_classes=5,
    head_init_std=0.02,
)


def small(**kwargs) -> SwinTransformer:
    torch.manual_seed(0)
    return SWIN(**SMALL | kwargs)


def shake(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model


def timms(**kwargs) -> nn.Module:
    """timm's Swin without relative position bias."""
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(num_classes=5, drop_path_rate=0.0, **kwargs)
    for name, p in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.zeros_(p)
    return model


@pytest.mark.parametrize("img, chans, window", [((112, 224), 4, 7), ((96, 192), 3, 6), ((64, 64), 1, 4)])
def test_unmodified_swin_equals_timms(img, chans, window):
    """112x224 has grids of 28x56, 14x28, 7x14 (shifted one way only), 4x7; 96x192 ends with 3x6."""
    shared = dict(
        in_chans=chans, embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=window
    )
    ours = SWIN(
        img_size=img,
        patch_size=(4, 4),
        merge_last=True,
        pos_embed="none",
        num_classes=5,
        head_init_std=0.02,
        **shared,
    )
    reference = timms(img_size=img, patch_size=4, **shared)
    if reference.layers[-1].blocks[0].input_resolution[0] < img[0] / 32:
        pytest.skip("this timm takes an odd grid's half as rounded down, where its own merging pads it")
    shake(ours)
    names = {n: n.replace("head.", "head.fc.") for n in ours.state_dict()}
    missing, extra = reference.load_state_dict(
        {names[n]: p for n, p in ours.state_dict().items()}, strict=False
    )
    assert not extra and all(n.endswith("relative_position_bias_table") for n in missing), "keys are timm's"
    assert any(any(b.shift) for stage in ours.layers for b in stage.blocks)
    for mine, theirs in zip(ours.layers, reference.layers):
        for a, b in zip(mine.blocks, theirs.blocks):
            assert (a.window, a.shift) == (tuple(b.window_size), tuple(b.shift_size))

    x = torch.randn(2, chans, *img)
    assert torch.allclose(ours.forward_features(x), reference.forward_features(x).flatten(1, 2), atol=1e-5)
    assert torch.allclose(ours(x), reference(x), atol=1e-5)
    ours(x).square().sum().backward()
    reference(x).square().sum().backward()
    grads = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        expected = grads[names[name]].grad
        assert torch.allclose(p.grad, expected, atol=1e-4 * max(1, expected.abs().max().item())), name


def written_out(block: SwinBlock, x: torch.Tensor) -> torch.Tensor:
    """Attention of each token over the tokens of its window and of the same side of the border, one by one.

    Windows shifted by s are the cells of floor((i - s) / window): those that stick out of the image are
    separate.
    """
    B, H, W, C = x.shape
    heads, d = block.attn.num_heads, C // block.attn.num_heads
    q, k, v = (
        block.attn.qkv(x).reshape(B, H * W, 3, heads, d).permute(2, 0, 3, 1, 4)
    )  # (B, heads, H*W, d) each
    rows, cols = torch.arange(H * W) // W, torch.arange(H * W) % W
    cell = [
        ((r - block.shift[0]) // block.window[0], (c - block.shift[1]) // block.window[1])
        for r, c in zip(rows.tolist(), cols.tolist())
    ]
    out = torch.zeros(B, heads, H * W, d)
    for i in range(H * W):
        together = [j for j in range(H * W) if cell[j] == cell[i]]
        weights = (q[:, :, i : i + 1] @ k[:, :, together].transpose(-2, -1) / math.sqrt(d)).softmax(-1)
        out[:, :, i] = (weights @ v[:, :, together])[:, :, 0]
    return block.attn.proj(out.transpose(1, 2).reshape(B, H, W, C))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    "grid, window",
    [
        ((8, 8), (4, 4)),
        ((6, 9), (3, 3)),
        ((5, 7), (4, 3)),
        ((3, 8), (4, 3)),
        ((2, 3), (7, 7)),
    ],
)
def test_windows_equal_attention_written_out(grid, window, shifted):
    """Also where the window does not divide the grid: padding is seen by no token."""
    torch.manual_seed(0)
    block = SwinBlock(8, 2, grid, window, shifted, cpe=False, mlp_ratio=1.0, drop_path=0.0)
    shake(block)
    x = torch.randn(2, *grid, 8)
    assert torch.allclose(block.window_attention(x), written_out(block, x), atol=1e-5)
    covered = all(w >= g for w, g in zip(window, grid))
    assert any(block.shift) == (shifted and not covered)


def test_windows_are_cut_and_put_back():
    x = torch.arange(2 * 4 * 6).reshape(2, 4, 6, 1).float()
    windows = window_partition(x, (2, 3))
    assert windows.shape == (2 * 4, 6, 1)
    assert windows[1, :, 0].tolist() == [3, 4, 5, 9, 10, 11], (
        "the second window of the first image is at its right"
    )
    assert torch.equal(window_merge(windows, (2, 3), (4, 6)), x)


def test_cost_and_shape_of_the_modified_swin_tiny():
    """6.68 GMAC, and 196 tokens of 768 channels with 24 heads in the last stage, which attend to each
    other."""

    def macs(**kwargs):
        with torch.device("meta"):
            model, x = MODELS["swin_tiny"](**kwargs).eval(), torch.zeros(1, 3, 224, 224)
        seen = []
        for block in model.layers[3].blocks:
            block.attn.register_forward_pre_hook(lambda m, args: seen.append((m.num_heads, args)))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        return counter.get_total_flops() / 2e9, sum(p.numel() for p in model.parameters()), seen, model

    cost, params, seen, model = macs()
    assert cost == pytest.approx(6.68, rel=0.01)
    assert model.grid == (14, 14) and model.dim == 768
    assert [(heads, args[0].shape, args[1]) for heads, args in seen] == [(24, (1, 196, 768), None)] * 2
    assert [b.window for b in model.layers[2].blocks] == [(7, 7)] * 6 and model.layers[2].blocks[1].shift == (
        3,
        3,
    )

    plain_cost, plain_params, *_ = macs(pos_embed="none")
    assert params - plain_params == 44_160 and cost - plain_cost == pytest.approx(0.015, rel=0.05)

    merged_cost, merged_params, _, merged = macs(pos_embed="none", merge_last=True)
    assert merged_cost == pytest.approx(4.49, rel=0.01) and merged.grid == (7, 7) and merged.dim == 768
    assert merged_params == 28_288_354 - 23_322, "Swin-T's published size less its bias tables"
    transition = {"norm.weight": (384,), "norm.bias": (384,), "reduction.weight": (768, 384)}
    assert {n: tuple(p.shape) for n, p in model.layers[3].downsample.named_parameters()} == transition


@pytest.mark.parametrize("name, width, gmac", [("swin_small", 768, None), ("swin_base", 1024, 19.3)])
def test_larger_swins_build(name, width, gmac):
    with torch.device("meta"):
        model, x = MODELS[name](pos_label="apl+rpl", pool=None).eval(), torch.zeros(1, 3, 224, 224)
        assert MODELS[name](embed_dim=48, depths=(1, 1, 1, 1)).dim == 384, "arguments override the name"
    assert model.dim == width and model.grid == (14, 14) and len(model.layers[2].blocks) == 18
    if gmac:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize("merge_last", [False, True])
def test_the_last_stage_attends_globally(merge_last):
    """Which tokens of the last stage reach a corner of it; windows of 2 would let through only some."""
    model = shake(small(window_size=2, pos_embed="none", merge_last=merge_last, img_size=(64, 96)))
    block = model.layers[3].blocks[0]
    assert model.grid == ((4, 6) if merge_last else (8, 12))
    x = torch.randn(1, *model.grid, 128, requires_grad=True)
    block.window_attention(x)[0, 0, 0].sum().backward()
    reached = x.grad[0].abs().amax(-1) > 0
    assert reached.sum() == (4 if merge_last else 8 * 12)
    assert all(b.mask is None for b in model.layers[3].blocks) or merge_last


def test_transition_without_merging_keeps_each_token_apart():
    torch.manual_seed(0)
    keep = shake(PatchMerging(8, merge=False))
    x = torch.randn(2, 3, 5, 8)
    expected = F.layer_norm(x, (8,), keep.norm.weight, keep.norm.bias, 1e-5) @ keep.reduction.weight.T
    assert torch.allclose(keep(x), expected, atol=1e-5) and keep(x).shape == (2, 3, 5, 16)


def test_conditional_encoding_opens_every_block():
    model = small()
    blocks = [b for stage in model.layers for b in stage.blocks]
    for block in blocks:
        assert block.cpe.groups == block.cpe.out_channels == block.norm1.weight.shape[0]
    block = blocks[1]
    order = []
    block.cpe.register_forward_hook(lambda m, args, out: order.append("cpe"))
    block.norm1.register_forward_hook(lambda m, args, out: order.append(args[0]))
    x = torch.randn(2, *block.grid, 32)
    block(x)
    image = x.permute(0, 3, 1, 2)
    expected = image + F.conv2d(image, block.cpe.weight, block.cpe.bias, padding=1, groups=32)
    assert order[0] == "cpe" and torch.allclose(order[1], expected.permute(0, 2, 3, 1), atol=1e-5)
    plain = small(pos_embed="none").state_dict()
    assert set(plain) == {n for n in model.state_dict() if ".cpe." not in n}


def test_layer_ids_are_timms():
    from timm.optim import param_groups_layer_decay

    ours = small(merge_last=True, pos_embed="none", pos_label="apl")
    reference = timms(
        img_size=(32, 48),
        patch_size=2,
        embed_dim=16,
        depths=(1, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=3,
    )
    names = {id(p): n for n, p in reference.named_parameters()}
    groups = param_groups_layer_decay(reference, layer_decay=0.5)
    scales = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    for name, _ in ours.named_parameters():
        if not name.startswith(("pos_head.", "norm.")):  # timm puts the final norm with the last block
            expected = scales[name.replace("head.", "head.fc.")]
            assert 0.5 ** (ours.num_layers - ours.layer_id(name)) == pytest.approx(expected), name
    assert ours.layer_id("norm.weight") == ours.layer_id("pos_head.apl.fc1.weight") == ours.num_layers == 8
    assert ours.layer_id("layers.2.blocks.1.cpe.weight") == 5 and ours.no_weight_decay() == set()


@pytest.mark.parametrize(
    "img, patch, chans, grid",
    [
        ((64, 64), (2, 2), 3, (8, 8)),
        ((64, 64), (4, 4), 1, (4, 4)),
        ((40, 72), (4, 4), 4, (3, 5)),
        ((36, 20), (2, 4), 3, (5, 2)),
    ],
)
@pytest.mark.parametrize("merge_last", [False, True])
def test_sizes_that_windows_do_not_divide(img, patch, chans, grid, merge_last):
    model = small(
        img_size=img,
        patch_size=patch,
        in_chans=chans,
        window_size=7,
        merge_last=merge_last,
        pos_label="apl+rpl",
    )
    assert model.grid == (tuple(-(-g // 2) for g in grid) if merge_last else grid)
    x = torch.randn(2, chans, *img)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, model.grid[0] * model.grid[1], model.dim) and model.num_prefix == 0
    logits, losses = model(x, positions=True)
    assert torch.allclose(logits, model.head(tokens.mean(1)), atol=1e-6)
    by_hand = model.pos_head(tokens, torch.arange(tokens.shape[1]).expand(2, -1))
    assert losses["position"].item() == pytest.approx(by_hand["position"].item(), abs=1e-6)
    (logits.square().mean() + losses["position"]).backward()
    for n, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, n


def test_rows_and_columns_keep_their_place():
    """A change in one corner of a wide image changes that corner's token the most."""
    model = shake(
        small(img_size=(32, 64), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), pos_label="apl")
    ).eval()
    x = torch.randn(1, 3, 32, 64)
    for r, c in ((0, 7), (3, 0), (2, 5)):
        y = x.clone()
        y[:, :, r * 8 : r * 8 + 8, c * 8 : c * 8 + 8] += 3 * torch.randn(1, 3, 8, 8)
        change = (model.forward_features(y) - model.forward_features(x))[0].norm(dim=-1)
        assert change.argmax().item() == r * 8 + c


def test_swin_tiny_trains_on_small_images_and_labels_change_nothing():
    def tiny(label):
        torch.manual_seed(0)
        return MODELS["swin_tiny"](
            img_size=(32, 32),
            patch_size=(2, 2),
            num_classes=7,
            pos_label=label,
            drop_path=0.2,
            window_size=4,
            head_init_std=0.02,
        )

    plain, model = tiny("none").state_dict(), tiny("apl+rpl")
    for name, value in plain.items():
        assert torch.equal(value, model.state_dict()[name]), name
    rates = [getattr(b.drop_path, "rate", 0.0) for stage in model.layers for b in stage.blocks]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    logits, losses = model.eval()(torch.randn(2, 3, 32, 32), positions=True)
    (F.cross_entropy(logits, torch.tensor([1, 5])) + 0.5 * losses["position"]).backward()
    for n, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, n


def test_masked_attention_in_low_precision():
    """On the CPU it is written out where gradients are wanted; masks must hold there too."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 2, 6, 8)
    mask = torch.rand(4, 1, 6, 6) > 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    expected, low = attention(q, k, v, mask), attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert torch.allclose(low.float(), expected, atol=0.05)
    v[0, :, 0] += 100  # who sees token 0 of the first window?
    assert torch.equal((attention(q, k, v, mask) - expected)[0].abs().amax((0, 2)) > 1e-3, mask[0, 0, :, 0])
    assert torch.equal(
        (attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask) - low)[0].abs().amax((0, 2)) > 0.5,
        mask[0, 0, :, 0],
    )
    model, x = small(img_size=(40, 48)), torch.randn(2, 3, 40, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), model(x), atol=0.05)


def test_there_is_no_class_token():
    with pytest.raises(ValueError, match="SwinTransformer has no class token"):
        small(pool="cls")
    with pytest.raises(ValueError, match=r"found \(3, 48, 32\)"):
        small()(torch.randn(1, 3, 48, 32))
