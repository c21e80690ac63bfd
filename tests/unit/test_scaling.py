"""The scaling simulation against timelines worked out by hand, and the figures that it starts from."""

import json
from dataclasses import astuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scaling
from benchmarks.scaling import (
    Cluster,
    Measured,
    Micro,
    Network,
    Unit,
    ddp_seconds,
    fsdp_seconds,
    plan,
    sent_bytes,
)
from benchmarks.step import MASK_RATIO, TimmMAE, training_flops
from models_mae_pl import MAE_VIT, MODELS

MB = 2**20
FREE = Network(node=float("inf"), card=float("inf"), latency=0.0)


def test_collectives_go_through_the_node_then_through_the_cards():
    network = Network(node=100.0, card=10.0, latency=1.0)
    assert network.half(800.0, 1) == 0
    assert network.half(800.0, 2) == 1 / 2 * 8 + 1
    assert network.half(800.0, 8) == 7 / 8 * 8 + 3
    # Four nodes: 7/8 of it within the node, then three quarters of this GPU's eighth through its card; five
    # hops.
    assert network.half(800.0, 32) == 7 + 3 / 4 * 100 / 10 + 5


def test_ddp_hides_communication_behind_backward():
    """Layers of 40, 30 and 30 MiB. Backward takes 10 s in shares 0.2, 0.3, 0.5; a MiB takes 0.2 s."""
    layers = [Unit(40 * MB, 0.2), Unit(30 * MB, 0.3), Unit(30 * MB, 0.5)]
    # An all-reduce on two GPUs takes 2 * 1/2 * size / 5 MiB.
    network = Network(node=5 * MB, card=1.0, latency=0.0)
    # Forward ends at 5. Last layer's gradients at 10, sent 10..16; the middle's at 13, sent 16..22; the
    # first's at 15, sent 22..30; the optimizer takes 1.
    assert ddp_seconds(layers, Micro(5.0, 10.0), 1.0, network, 2) == pytest.approx(31.0)
    assert ddp_seconds(layers, Micro(5.0, 10.0), 1.0, FREE, 2) == pytest.approx(16.0)
    # A second micro-step adds computing only.
    assert ddp_seconds(layers, Micro(5.0, 10.0, 2), 1.0, network, 2) == pytest.approx(46.0)


def test_ddp_fills_buckets_in_reverse_order():
    """The first bucket closes at 1 MiB, later ones at 25 MiB, and the rest goes at the end."""
    layers = [Unit(2 * MB, 0.25), Unit(24 * MB, 0.25), Unit(2 * MB, 0.25), Unit(MB, 0.25)]
    # An all-reduce takes 20 s for any size.
    latency = Network(node=float("inf"), card=1.0, latency=10.0)
    # Gradients at 1, 2, 3, 4: buckets close at 1 (1 MiB), 3 (26 MiB) and 4 (2 MiB) -> 1..21, 21..41, 41..61.
    assert ddp_seconds(layers, Micro(0.0, 4.0), 0.0, latency, 2) == pytest.approx(61.0)


def test_fsdp_gathers_one_layer_ahead():
    """Two layers. On two GPUs a gather or scatter takes 2 s, forward 3 s and backward 6 s per layer."""
    layers = [Unit(20.0, 0.5), Unit(20.0, 0.5)]
    network = Network(node=5.0, card=1.0, latency=0.0)  # 1/2 * 20 / 5
    # Forward: gather 0..2; compute 2..5 during the next gather 2..4; compute 5..8. Backward: gather of layer
    # 2 8..10, seen by all; compute 10..16 during the gather of layer 1 10..12; compute 16..22 during the
    # scatter of layer 2 16..18; scatter of layer 1 22..24; half an optimizer of 4.
    assert fsdp_seconds(layers, Micro(6.0, 12.0), 4.0, network, 2) == pytest.approx(26.0)
    assert fsdp_seconds(layers, Micro(6.0, 12.0), 4.0, FREE, 2) == pytest.approx(20.0)


def test_a_slow_network_bounds_both():
    layers = [Unit(10.0, 0.5)] * 2
    slow = Network(node=0.001, card=0.001, latency=0.0)
    assert ddp_seconds(layers, Micro(0.1, 0.2), 0, slow, 8) == pytest.approx(2 * 7 / 8 * 20 / 0.001, rel=1e-3)
    assert fsdp_seconds(layers, Micro(0.1, 0.2), 0, slow, 8) == pytest.approx(
        3 * 7 / 8 * 20 / 0.001, rel=1e-3
    )


def test_bytes_and_micro_steps():
    assert sent_bytes(80.0, 8, "ddp") == 140 and sent_bytes(80.0, 8, "fsdp", micro_steps=2) == 350
    assert sent_bytes(80.0, 1, "ddp") == 0
    assert plan(256, 4096, 1) == (16, 256)
    assert plan(256, 4096, 64) == (1, 64)
    assert plan(100, 4096, 8) == (6, 4096 / 48)


def test_table_from_a_step_file(tmp_path):
    """One GPU: rate and hours follow from the step alone; eight with a free network: eight times that."""
    row = dict(
        model="mae_vit_tiny_patch16",
        variant="ours, MAE",
        amp="bf16",
        batch_size=10,
        seconds=dict(median=1.1),
        forward=dict(median=0.2),
        backward=dict(median=0.6),
        optimizer=dict(median=0.1),
    )
    path = tmp_path / "step.json"
    path.write_text(json.dumps(dict(results=dict(rows=[row]))))
    measured = scaling.read_measured(str(path), "mae_vit_tiny_patch16", "bf16")
    assert astuple(measured) == pytest.approx((0.1, 10, 0.1, 0.25))
    cluster = Cluster(FREE, global_batch=80, images_per_core=5.0)
    measured = Measured(per_image=0.1, batch=10, optimizer=0.1, forward_share=0.25)
    one = scaling.simulate("mae_vit_tiny_patch16", measured, cluster, 1, "ddp")
    assert one["images_per_s"] == pytest.approx(80 / 8.1)
    assert one["data_cores"] == pytest.approx(80 / 8.1 / 5)
    assert one["hours_400"] == pytest.approx(400 * 1_281_167 * 8.1 / 80 / 3600)
    assert one["efficiency"] == pytest.approx(1)
    eight = scaling.simulate("mae_vit_tiny_patch16", measured, cluster, 8, "ddp")
    assert eight["images_per_s"] == pytest.approx(80 / 1.1) and eight["micro_steps"] == 1
    with pytest.raises(SystemExit, match="has no 'ours, MAE'"):
        scaling.read_measured(str(path), "mae_vit_tiny_patch16", "fp32")


def test_units_are_the_whole_model():
    layers = scaling.units("mae_vit_tiny_patch16")
    model = MODELS["mae_vit_tiny_patch16"](pos_embed="sincos", pos_label="none")
    weights = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(u.share for u in layers) == pytest.approx(1)
    # Without the last norms and the tokens.
    assert sum(u.size for u in layers) == pytest.approx(weights, rel=1e-3)


@pytest.fixture
def pair():
    """Our model, and the peer of timm blocks with the same weights."""
    torch.manual_seed(0)
    ours = MAE_VIT(
        img_size=(64, 64),
        patch_size=(8, 8),
        dim=48,
        depth=2,
        num_heads=3,
        decoder_dim=32,
        decoder_depth=2,
        decoder_heads=2,
        norm_pix_loss=True,
        pos_embed="sincos",
        pos_label="none",
    )
    peer = TimmMAE(ours)
    for block in (*peer.blocks, *peer.decoder_blocks):
        # timm's default is 1e-5.
        block.norm1.eps = block.norm2.eps = 1e-6
    peer.load_state_dict(ours.state_dict())
    return ours, peer


def test_the_peer_does_the_same_work(pair):
    """Same masks, same loss, same gradients: the two differ in speed only."""
    ours, peer = pair
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    mine = ours(images, MASK_RATIO, want_pred=False)[0]["pixel"]
    torch.manual_seed(1)
    theirs = peer(images)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    mine.backward()
    theirs.backward()
    for name, p in peer.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, ours.get_parameter(name).grad, atol=1e-5), name


def test_flops_are_those_that_run(pair):
    """torch counts the products of a step. In bf16 attention is two plain products, which it can count."""
    ours, _ = pair
    counter = FlopCounterMode(display=False)
    with counter, torch.autocast("cpu", torch.bfloat16):
        loss = ours(torch.randn(1, 3, 64, 64), MASK_RATIO, want_pred=False)[0]["pixel"]
        loss.backward()
    # Backward of the very first product stops at the weights: pixels need no gradient.
    first = 2 * 16 * 192 * 48
    assert counter.get_total_flops() == training_flops(ours) - first
