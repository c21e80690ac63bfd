"""Records, registry entries and label kinds: what callers of models may rely on."""

import subprocess
import sys

import pytest
import torch

import models_mae_pl
import models_sere
import models_vit
from backbones.registry import MODELS, build_classifier, find
from layers.contract import Heads, Trunk
from layers.positional import head, label_choices, label_names
from layers.positional.kinds.apl import AbsoluteLabel
from models_mae_pl import MAE_VIT
from processes import ROOT

SMALL = dict(img_size=(16, 16), patch_size=(4, 4), dim=16, depth=1, num_heads=2)
DECODER = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2)


def test_models_keep_their_records():
    model = MODELS["vit_pico_patch8"](img_size=(16, 24), pos_label="rpl", num_classes=5)
    assert model.trunk == Trunk(
        img_size=(16, 24), patch_size=(8, 8), dim=96, depth=4, num_heads=3, pos_embed="learned"
    )
    assert model.heads == Heads(pos_label="rpl", num_classes=5, pool="avg"), (
        "with the pooling that was chosen"
    )
    assert MODELS["vit_pico_patch8"].options["img_size"] == (224, 224), "the entry is left alone"


@pytest.mark.parametrize("name", ["vit_pico_patch8", "swin_tiny", "so_vit_7", "timm/resnet18"])
def test_an_option_that_a_model_does_not_take_is_named(name):
    with pytest.raises(ValueError, match="does not take `colour`, `shape`; its options are img_size"):
        build_classifier(name, shape=1, img_size=(32, 32), colour=2)


def test_entries_say_what_their_models_take():
    def names(having) -> set[str]:
        return {name for name, entry in MODELS.items() if having(entry)}

    swin = {"swin_pico", "swin_tiny", "swin_small", "swin_base"}
    assert names(lambda entry: "merge_last" in entry.options) == swin
    assert names(lambda entry: entry.own_positions) == swin and find("timm/nest_tiny").own_positions
    assert names(lambda entry: "patch_embed" not in entry.options) == swin
    distilled = {f"deit_{size}_distilled_patch{patch}" for size, patch in zip(*DEIT)}
    assert names(lambda entry: entry.distillation) == distilled
    so_vit = {"so_vit_7", "so_vit_10", "so_vit_14", "so_vit_19"}
    assert names(lambda entry: entry.options["second_order"] is not None) == so_vit
    assert names(lambda entry: entry.options.get("patch_embed") == "conv") == so_vit


DEIT = ("pico", "tiny", "small", "base"), (8, 16, 16, 16)


def test_teachers_have_their_students_sizes():
    student = MAE_VIT(**SMALL, **DECODER, mlp_ratio=3.0, sr_spatial=True)
    teacher = models_mae_pl.RelationTeacher(student)
    assert teacher.trunk == student.trunk and teacher.sr_channel is None
    sere = models_sere.SERE(**SMALL, mlp_ratio=3.0, out_dim=8, head_hidden=8, local_size=None)
    assert models_sere.SereTeacher(sere).blocks[0].mlp.fc1.out_features == 48
    assert models_sere.SereTeacher(sere).trunk.drop_path == 0, "a teacher drops no paths"


def test_masking_refuses_an_embedding_that_sees_masked_pixels():
    with pytest.raises(ValueError, match="masking needs the linear `patch_embed`"):
        MAE_VIT(img_size=(32, 32), patch_embed="conv")


@pytest.mark.slow  # starts a process
def test_names_of_labels_come_without_torch():
    code = "import sys, layers.positional as p; print(p.label_names(), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f"{label_names()} False"
    assert tuple(head.LABELS) == label_names() and label_names()[:2] == ("apl", "rpl")
    assert {"none", "apl", "rpl", "apl+rpl"} <= set(label_choices())


class Blinded(AbsoluteLabel):
    """A kind that hides the visible patches from the encoder."""

    name = "blinded"

    def before(self, tokens, ids_keep, draws=None):
        return torch.zeros_like(tokens)


def test_a_kind_may_change_what_the_encoder_reads(monkeypatch):
    monkeypatch.setitem(head.LABELS, "blinded", Blinded)
    torch.manual_seed(0)
    model = MAE_VIT(**SMALL, **DECODER, pos_label="blinded").eval()
    ids_keep = torch.arange(8).expand(2, -1)
    with torch.no_grad():
        tokens = model.forward_encoder(torch.randn(2, 3, 16, 16), ids_keep)
    assert torch.allclose(tokens[0], tokens[1]), "the images cannot be distinguished"
    assert "pos_head.blinded.fc1.weight" in model.state_dict()
    with pytest.raises(ValueError, match="only pretraining supports"):
        models_vit.VIT(**SMALL, pos_label="blinded")
