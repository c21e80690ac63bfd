"""Learning rates against the written-out rule, and precisions."""

import math

import pytest
import torch

from util.train.amp import resolve_amp
from util.train.lr_sched import effective_lr, set_lr, warmup_cosine


def test_warmup_then_half_cosine():
    schedule = dict(lr=2.0, min_lr=0.5, warmup=4, total=20)
    assert [warmup_cosine(e, **schedule) for e in (0, 1, 2.5, 4)] == [0, 0.5, 1.25, 2.0]
    for e in (5, 12, 19.25):
        assert warmup_cosine(e, **schedule) == pytest.approx(
            0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * (e - 4) / 16))
        )
    assert warmup_cosine(12, **schedule) == pytest.approx(1.25) and warmup_cosine(20, **schedule) == 0.5
    assert warmup_cosine(30, **schedule) == 0.5, "a run that continues past the end stays there"
    assert warmup_cosine(0, lr=2.0, min_lr=0.0, warmup=0, total=10) == 2.0


def test_base_rates_scale_with_the_batch():
    assert effective_lr(None, 1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert effective_lr(0.0, 1.5e-4, 4096) == 0.0 and effective_lr(0.3, 1.5e-4, 4096) == 0.3


def test_auto_precision_is_bfloat16_only_where_the_gpu_has_it(monkeypatch):
    """PyTorch counts emulation as support: on a V100 it would be slow."""
    for native, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, n=native: n or including_emulation,
        )
        assert resolve_amp("auto", torch.device("cuda")) == expected
    assert [resolve_amp(amp, torch.device("cpu")) for amp in ("auto", "fp16")] == ["fp32", "fp16"]


def test_groups_keep_their_scale():
    w = torch.nn.Parameter(torch.zeros(1))
    v = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [w], "lr_scale": 0.25}, {"params": [v]}], lr=1.0)
    for lr in (2.0, 4.0):  # from the given rate each time, not from the last one
        set_lr(optimizer, lr)
        assert [g["lr"] for g in optimizer.param_groups] == [0.25 * lr, lr]
