"""--strategy fsdp computes what ddp computes, and both write and read the same checkpoints."""

import pytest
import torch

from processes import FINETUNE, last, log_lines, ranks, start
from util.dist import fsdp

# 10 steps of a global batch of 20: the demo set has 200 images.
TEN_STEPS = ["--pos_label", "apl+rpl", "--epochs", 1, "--batch_size", 10, "--lr", "1e-3"]
FSDP = ["--strategy", "fsdp"]


def run_ranks(n, output_dir, *flags, **kwargs):
    """Train on `n` ranks, all of which must succeed."""
    results = ranks(n, output_dir, *flags, **kwargs)
    assert all(code == 0 for code, _ in results), results[0][1][-3000:] + results[-1][1][-3000:]
    return results


def assert_close(a: dict, b: dict) -> None:
    """Check that two checkpoints are equal up to rounding.

    The bias of the keys is left out: softmax does not depend on it, so its gradient is only rounding, which
    Adam amplifies.
    """
    assert (a["step"], a["epoch"]) == (b["step"], b["epoch"]) and a["model"].keys() == b["model"].keys()
    for k, v in a["model"].items():
        if not k.endswith("qkv.bias"):
            assert torch.allclose(v, b["model"][k], atol=5e-5), (k, (v - b["model"][k]).abs().max())


@pytest.mark.parametrize("main", ["pretrain", "finetune"])
def test_fsdp_is_ddp(main, tmp_path):
    flags = TEN_STEPS + ["--clip_grad", 0.5, "--accum_iter", 2, "--batch_size", 5]
    kwargs = {}
    if main == "finetune":
        kwargs["main"] = FINETUNE
        flags += ["--drop_path", 0, "--reprob", 0, "--aa", ""]
    run_ranks(2, tmp_path / "ddp", *flags, **kwargs)
    run_ranks(2, tmp_path / "fsdp", *flags, *FSDP, **kwargs)
    for a, b in zip(log_lines(tmp_path / "ddp"), log_lines(tmp_path / "fsdp"), strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k] == pytest.approx(b[k], abs=1e-5), k
    a = last(tmp_path / "ddp")
    b = last(tmp_path / "fsdp")
    assert_close(a, b)
    assert a.keys() == b.keys() and a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for i, state in a["optimizer"]["state"].items():
        for k, v in state.items():
            assert torch.allclose(v, b["optimizer"]["state"][i][k], atol=1e-5), (i, k)


def test_strategy_and_ranks_may_change_between_saves(tmp_path):
    """10 steps of a global batch of 20 in one run, and in two with other ranks and strategies."""
    run_ranks(2, tmp_path / "whole", *TEN_STEPS)
    changes = {
        "fsdp 2 -> ddp 4": (FSDP, 4, []),
        "ddp 2 -> fsdp 4": ([], 4, FSDP),
        "fsdp 2 -> alone": (FSDP, 1, []),
    }
    for name, (first, n, second) in changes.items():
        folder = tmp_path / name.replace(" ", "_")
        stopped = ranks(2, folder, *TEN_STEPS, *first, TEST_SIGNAL="0:3:SIGTERM")
        assert [code for code, _ in stopped] == [75, 75], stopped[0][1][-3000:]
        assert 0 < last(folder)["step"] < 10
        flags = [*TEN_STEPS, "--batch_size", 20 // n, *second]
        if n == 1:
            code, text = start(folder, *flags)
            assert code == 0, text
        else:
            run_ranks(n, folder, *flags)
        assert_close(last(tmp_path / "whole"), last(folder))


def test_one_process_and_float16_are_refused(tmp_path):
    code, text = start(tmp_path / "a", *TEN_STEPS, *FSDP)
    assert code == 2 and "there is only one: start several" in text
    results = ranks(2, tmp_path / "b", *TEN_STEPS, *FSDP, "--amp", "fp16")
    assert all(code == 2 and "needs --amp bf16 or fp32" in text for code, text in results)


def test_whole_and_gathered_leave_plain_models_alone():
    model = torch.nn.Linear(2, 2)
    assert fsdp.whole({"a": [1, {"b": model.weight}]}) == {"a": [1, {"b": model.weight}]}
    assert not fsdp.is_sharded(model)
    with fsdp.gathered(model) as same:
        assert same is model


def test_blocks_within_blocks_are_sharded_first(monkeypatch):
    """FSDP requires it. timm's MobileViT has such blocks."""

    class InnerBlock(torch.nn.Module):
        pass

    class OuterBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = InnerBlock()

    seen = []
    model = torch.nn.Sequential(OuterBlock())
    monkeypatch.setattr(
        "torch.distributed.fsdp.fully_shard",
        lambda module, mesh: seen.append(type(module).__name__) or module,
    )
    monkeypatch.setattr("torch.distributed.init_device_mesh", lambda *args: None)
    monkeypatch.setattr(fsdp.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(fsdp.dist, "world_size", lambda: 2)
    fsdp.shard(model, torch.device("cpu"), "fp32")
    assert seen == ["InnerBlock", "OuterBlock", "Sequential"]
    assert fsdp.is_sharded(model)
    # Nothing of it is part of the model.
    assert vars(model).keys() == vars(torch.nn.Sequential()).keys()


@pytest.mark.parametrize(
    "sizes, message", [((3, 1), "same groups in another order"), ((2, 2), "set `layer_decay`")]
)
def test_another_optimizers_groups_are_refused(sizes, message):
    def optimizer(*sizes):
        return torch.optim.AdamW(
            [{"params": [torch.nn.Parameter(torch.ones(1)) for _ in range(n)]} for n in sizes]
        )

    with pytest.raises(ValueError, match=message):
        fsdp.load_optimizer(optimizer(1, 3), optimizer(*sizes).state_dict())
