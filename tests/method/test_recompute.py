"""--grad_checkpointing: the same numbers, with fewer tensors kept."""

from collections import Counter

import pytest
import torch

from backbones.registry import build_classifier
from backbones.swin import SWIN
from models_mae_pl import MAE_VIT
from models_vit import VIT

SMALL = dict(img_size=(32, 32), patch_size=(8, 8))


def mae():
    model = MAE_VIT(
        **SMALL,
        dim=32,
        depth=3,
        num_heads=2,
        decoder_dim=32,
        decoder_depth=2,
        decoder_heads=2,
        pos_label="apl+rpl",
    )

    def loss(images):
        losses, _, _ = model(images, want_pred=False)
        return losses["pixel"] + losses["position"]

    return model, loss


def classifier(model):
    def loss(images):
        logits, positions = model(images, positions=True)
        return logits.square().mean() + positions["position"]

    return model, loss


MAKERS = {
    "mae": mae,
    "vit": lambda: classifier(
        VIT(
            **SMALL,
            dim=32,
            depth=4,
            num_heads=2,
            drop_path=0.5,
            num_classes=5,
            head_init_std=0.02,
            pos_label="apl",
        )
    ),
    "swin": lambda: classifier(
        SWIN(
            img_size=(32, 32),
            embed_dim=8,
            depths=(2, 2),
            num_heads=(1, 2),
            window_size=4,
            drop_path=0.5,
            num_classes=5,
            head_init_std=0.02,
            pos_label="apl",
        )
    ),
    "timm": lambda: classifier(
        build_classifier(
            "timm/vit_tiny_patch16_224",
            img_size=(32, 32),
            drop_path=0.5,
            num_classes=5,
            head_init_std=0.02,
            pos_label="apl",
        )
    ),
}


def gradients_and_kept_bytes(maker, recompute, amp=False):
    torch.manual_seed(0)
    model, loss_fn = maker()
    if recompute:
        model.set_grad_checkpointing()
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(1)
    images = torch.randn(4, 3, 32, 32)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=amp),
    ):
        loss = loss_fn(images)
    loss.backward()
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    after = torch.rand(3)  # later draws must not depend on the second run either
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return gradients, loss.detach(), after, sum(kept.values()) - weights


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_the_same_numbers(name, amp):
    """Bit for bit, drop path's draws included; and the blocks' inner tensors are really not kept."""
    plain, loss, after, kept = gradients_and_kept_bytes(MAKERS[name], False, amp)
    again, same_loss, same_after, kept_again = gradients_and_kept_bytes(MAKERS[name], True, amp)
    assert torch.equal(loss, same_loss) and torch.equal(after, same_after)
    for n, g in plain.items():
        assert torch.equal(g, again[n]), n
    assert any(g.abs().max() > 0 for g in plain.values())
    assert kept_again < 0.6 * kept, f"{kept_again} of {kept} bytes"


@pytest.mark.parametrize("name", MAKERS)
def test_every_block_runs_again(name):
    """Encoder's and decoder's, each once more."""
    torch.manual_seed(0)
    model, loss_fn = MAKERS[name]()
    model.set_grad_checkpointing()
    calls = Counter()
    blocks = [n for n, m in model.named_modules() if type(m).__name__.endswith("Block")]
    for n in blocks:
        model.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: calls.update([n]))
    loss_fn(torch.randn(2, 3, 32, 32)).backward()
    assert calls == dict.fromkeys(blocks, 2) and len(blocks) >= 4


def test_nothing_is_recomputed_without_gradients():
    torch.manual_seed(0)
    model = VIT(**SMALL, dim=32, depth=2, num_heads=2)
    model.set_grad_checkpointing()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert len(calls) == 1
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert len(calls) == 3, "once forward, once more in backward"


def test_timm_models_without_it_say_so():
    model = build_classifier("timm/resnest14d", img_size=(32, 32), num_classes=2)
    model.backbone = torch.nn.Identity()  # has no such method
    with pytest.raises(ValueError, match="leave `grad_checkpointing` out"):
        model.set_grad_checkpointing()
