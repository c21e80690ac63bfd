"""The parts that run in float32 under autocast, with every positional embedding.

Otherwise encoders would be compared at unequal precision.
"""

import pytest
import torch
import torch.nn.functional as F

from backbones.registry import build_classifier
from layers.self_distillation import class_loss, patch_loss
from layers.vit import POS_EMBED_KINDS
from models_mae_pl import MODELS as MAE
from models_mae_pl import random_masking
from models_sere import MODELS as SERE
from models_sere import SereTeacher, make_centres
from util.data.multicrop import MultiCrop
from util.train.amp import described

SMALL = dict(img_size=(32, 32), patch_size=(8, 8))


def streams(model, call, blocks) -> list[torch.dtype]:
    """Dtypes of each block's input and the last one's output, in a training step under autocast to bf16."""
    seen = []
    hooks = [b.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype)) for b in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        call(model.train())
    for hook in hooks:
        hook.remove()
    assert len(seen) > len(blocks)
    return seen


def sere_step(model):
    crops = MultiCrop(
        (32, 32),
        (16, 16),
        2,
        model.grid,
        global_scale=(0.4, 1.0),
        local_scale=(0.1, 0.4),
        mask_ratios=[(0.1, 0.3)],
    )
    torch.manual_seed(0)
    views = [crops(torch.randint(256, (3, 48, 48), dtype=torch.uint8)) for _ in range(2)]
    batch = {name: torch.stack([v[name] for v in views]) for name in views[0]}
    images, local, mask = batch["image"] / 255, batch["local"] / 255, batch["mask"]
    ids = mask.flatten(0, 1).byte().argsort(1, descending=True)[:, :4]
    targets = SereTeacher(model)(images, ids, make_centres(24), 0.05)
    return model(images, local, mask, ids, batch["boxes"], targets)


def mae_step(model):
    return model(torch.rand(2, 3, 32, 32), ids_keep=random_masking(torch.rand(2, 16), 0.5))


def classify(model):
    return model(torch.rand(2, 3, 32, 32), positions=True)


@pytest.mark.parametrize("pos_embed", POS_EMBED_KINDS)
@pytest.mark.parametrize("name", ["mae", "vit", "deit", "deit_distilled", "so_vit", "sere"])
def test_the_residual_stream_is_float32(name, pos_embed):
    if name == "mae":
        model, call = MAE["mae_vit_pico_patch8"](**SMALL, pos_embed=pos_embed, pos_label="apl+rpl"), mae_step
    elif name == "sere":
        model = SERE["sere_vit_pico_patch8"](**SMALL, pos_embed=pos_embed, local_size=(16, 16), out_dim=24)
        call = sere_step
    else:
        full = {
            "vit": "vit_pico_patch8",
            "deit": "deit_pico_patch8",
            "deit_distilled": "deit_pico_distilled_patch8",
            "so_vit": "so_vit_7",
        }[name]
        sizes = dict(img_size=(32, 32)) if name == "so_vit" else SMALL
        model = build_classifier(
            full, **sizes, num_classes=5, pos_embed=pos_embed, pos_label="apl", drop_path=0.1
        )
        call = classify
    found = streams(model, call, [*model.blocks, *getattr(model, "decoder_blocks", [])])
    assert set(found) == {torch.float32}, found


@pytest.fixture
def cudas_layer_norm(monkeypatch):
    """On CUDA autocast runs layer norms in float32, on a CPU in what comes in."""
    plain = F.layer_norm

    def layer_norm(x, *args, **kwargs):
        return plain(x.float(), *args, **kwargs)

    monkeypatch.setattr(F, "layer_norm", layer_norm)


def test_swins_streams_do_not_depend_on_its_positional_encoding(cudas_layer_norm):
    """The first stage is float32; patch merging makes the later ones bf16, as in timm and Swin."""
    found = {}
    for pos_embed in ("none", "learned"):
        model = build_classifier(
            "swin_tiny", img_size=(32, 32), num_classes=5, pos_embed=pos_embed, pos_label="apl"
        )
        blocks = [block for stage in model.layers for block in stage.blocks]
        found[pos_embed] = streams(model, classify, blocks)
    assert found["none"] == found["learned"]
    assert found["none"][:2] == [torch.float32] * 2


@pytest.mark.parametrize("loss", ["class", "patch"])
def test_logits_are_float32_before_the_temperature(loss):
    """bf16 logits of the losses of DINO and iBOT give what their float32 copies give."""
    torch.manual_seed(0)
    logits = (10 * torch.randn(3, 4, 50)).bfloat16()
    target = torch.randn(3, 2 if loss == "class" else 4, 50).softmax(-1)
    masked = torch.rand(3, 4) < 0.5
    found, expected = (
        (class_loss(x, target) if loss == "class" else patch_loss(x, target, masked))
        for x in (logits, logits.float())
    )
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize(
    "device, amp, precision, expected",
    [
        ("cuda", "fp32", "high", "fp32 with TF32 products"),
        ("cuda", "fp32", "highest", "fp32"),
        ("cuda", "bf16", "high", "bf16"),
        ("cpu", "fp32", "high", "fp32"),
    ],
)
def test_the_output_names_tf32(device, amp, precision, expected):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert described(amp, torch.device(device)) == expected
    finally:
        torch.set_float32_matmul_precision(before)
