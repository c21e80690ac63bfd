"""Files that go to other libraries give the same outputs there."""
import pytest
import timm
import torch

import checkpoints
import tiny  # noqa: F401 (registers mae_test and vit_test)
from models import build_classifier
from models_mae_pl import MODELS
from util import checkpoint


def randomised(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # large enough for attention to matter
    return model.eval()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("pool,pos_embed,pos_label", [("avg", "learned", "apl"), ("cls", "sincos", "none"),
                                                      ("avg", "none", "rpl")])
def test_a_fine_tuned_model_gives_timm_the_same_logits(tmp_path, capsys, suffix, pool, pos_embed, pos_label):
    ours = randomised(build_classifier("vit_test", img_size=(32, 48), num_classes=7, pool=pool, pos_embed=pos_embed,
                                       pos_label=pos_label))
    file, out = str(tmp_path / "ours.pth"), str(tmp_path / f"out.{suffix}")
    torch.save({"model": ours.state_dict(), "args": {"model": "vit_test", "input_size": [32, 48]}}, file)
    assert checkpoints.export_timm(file, out) < 1e-4
    printed = capsys.readouterr().out
    theirs = eval(printed.splitlines()[1], {"timm": timm}).eval()  # the line that it tells the user to write
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)
        assert theirs(images).std() > 0.01


def test_a_pretrained_encoder_gives_timm_the_same_features(tmp_path):
    mae = randomised(MODELS["mae_test"](img_size=(32, 32), pos_embed="none"))
    file, out = str(tmp_path / "ours.pth"), str(tmp_path / "out.pth")
    torch.save({"model": mae.state_dict(), "args": {"model": "vit_test", "input_size": [32]}}, file)
    checkpoints.export_timm(file, out)
    theirs = timm.create_model("vit_base_patch16_224", checkpoint_path=out, img_size=32, patch_size=8, embed_dim=32, depth=2,
                               num_heads=2, num_classes=0, global_pool="token").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = mae.forward_encoder(images, torch.arange(16).expand(2, -1))
        assert torch.allclose(theirs.forward_features(images), expected, atol=1e-5)


def test_an_export_that_would_differ_is_refused(tmp_path, monkeypatch):
    ours = randomised(build_classifier("vit_test", img_size=(32, 32), num_classes=7))
    file, out = tmp_path / "ours.pth", tmp_path / "out.pth"
    torch.save({"model": ours.state_dict(), "args": {"model": "vit_test", "input_size": [32]}}, file)
    original = checkpoints.timm_weights

    def wrong(state, path):
        weights, options = original(state, path)
        return weights, options | {"num_heads": 4}

    monkeypatch.setattr(checkpoints, "timm_weights", wrong)
    with pytest.raises(ValueError, match="nothing was written"):
        checkpoints.export_timm(str(file), str(out))
    assert not out.exists()


def test_inspect_says_what_takes_a_file(tmp_path):
    file = str(tmp_path / "c.pth")
    mae = MODELS["mae_test"](img_size=(32, 32), pos_label="apl+rpl")
    torch.save({"model": mae.state_dict(), "args": {"model": "mae_test"}, "epoch": 3}, file)
    line = checkpoints.describe(file)
    assert "pretraining, --model mae_test" in line and "labels apl+rpl, without positional embedding, epoch 3" in line
    assert "main_finetune.py and main_linprobe.py --finetune" in line
    torch.save({"model": build_classifier("vit_test", img_size=(32, 32), num_classes=2).state_dict()}, file)
    line = checkpoints.describe(file)
    assert "classifier, no flags stored" in line and "with positional embedding" in line and "--eval" in line
    assert checkpoint.kind_of({"model": {"fc.weight": 1}}) == "unknown"
