"""What only a GPU can show; skipped where there is none."""
import pytest
import torch

from layers.positional import PositionalHead
from models_mae_pl import random_masking, sample_noise
from processes import last, log_lines, start
from util.datasets import build_dataset
from util.loader import build_loader, device_batches
from util.samplers import EpochSampler
from util.transforms import normalize, pretrain_transform

pytestmark = pytest.mark.gpu


def test_masks_are_the_same_on_both_devices():
    keys = torch.randint(2**62, (64,))
    here, there = sample_noise(keys, 196), sample_noise(keys.cuda(), 196)
    assert torch.equal(here, there.cpu())
    assert torch.equal(random_masking(here, 0.75), random_masking(there, 0.75).cpu())


@pytest.mark.parametrize("kind", ["apl", "rpl"])
def test_labels_on_the_gpu_equal_the_cpus(kind):
    torch.manual_seed(0)
    head = PositionalHead(64, (14, 14), kind).double()
    x, ids = torch.randn(2, 49, 64, dtype=torch.float64), random_masking(torch.rand(2, 196), 0.75)
    outs = {}
    for device in ("cpu", "cuda"):
        head = head.to(device)
        head.zero_grad()
        out = head(x.to(device), ids.to(device))
        out["position"].backward()
        outs[device] = [out["position"].detach().cpu()] + [p.grad.cpu() for p in head.parameters()]
    for a, b in zip(outs["cpu"], outs["cuda"]):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_all_pairs_stay_within_their_memory():
    """14x14 cells, batch 128, bf16: all logits at once would be 7 GB."""
    head = PositionalHead(768, (14, 14), "rpl").cuda()
    x = torch.randn(128, 196, 768, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        loss = head(x)["position"]
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30
    assert x.grad.isfinite().all()


def test_prefetched_batches_are_the_loaders(tmp_path):
    dataset = build_dataset(None, "train", pretrain_transform((32, 32)), labels=False)
    loader = build_loader(dataset, EpochSampler(len(dataset), batch_size=20), batch_size=20, num_workers=2, pin_memory=True)
    mean, std = (0.5,) * 3, (0.25,) * 3
    expected = [normalize(batch["image"], mean, std) for batch in loader]
    found = [b["image"].cpu() for b in device_batches(loader, torch.device("cuda"), mean, std)]
    assert len(found) == len(expected) == 10
    for a, b in zip(expected, found):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("flags", [["--amp", "bf16"], ["--amp", "fp16"], ["--amp", "bf16", "--compile"]])
def test_a_run_learns_and_continues(tmp_path, flags):
    run = ["--device", "cuda", "--batch_size", 40, "--pos_label", "apl+rpl", *flags]
    code, text = start(tmp_path, *run, "--epochs", 3)
    assert code == 0, text
    code, text = start(tmp_path, *run, "--epochs", 6)
    assert code == 0 and "continuing" in text, text
    lines = log_lines(tmp_path)
    assert [line["epoch"] for line in lines] == list(range(6))
    assert lines[-1]["train_pixel"] < 0.9 * lines[0]["train_pixel"]
    assert all(v.isfinite().all() for v in last(tmp_path)["model"].values())
