"""What only a GPU can show; skipped where there is none.

MAE_PL_REHEARSE=1 runs these tests on the CPU instead, so that a mistake in them does not cost time on a GPU.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from layers.contract import Labels
from layers.positional import pairs as positional
from layers.positional.head import PositionalHead
from layers.transformer import attention
from models_mae_pl import MAE_VIT, MaskedAutoencoderViT, random_masking, sample_noise
from processes import FINETUNE, PRETRAIN, SERE, last, log_lines, start
from util.data.datasets import build_dataset
from util.data.loading.loader import build_loader, device_batches
from util.data.loading.samplers import EpochSampler
from util.data.pixels import Pixels, normalize
from util.data.transforms import pretrain_transform
from util.dist import fsdp
from util.run.flops import synchronize
from util.train.amp import autocast
from util.train.optim import adamw, param_groups
from util.train.state import TrainState, apply_gradients

pytestmark = pytest.mark.gpu

REHEARSAL = "MAE_PL_REHEARSE" in os.environ
GPU = torch.device("cpu" if REHEARSAL else "cuda")
MEAN, STD = (0.5,) * 3, (0.25,) * 3


def test_masks_are_the_same_on_both_devices():
    keys = torch.randint(2**62, (64,))
    here, there = sample_noise(keys, 196), sample_noise(keys.to(GPU), 196)
    assert torch.equal(here, there.cpu())
    assert torch.equal(random_masking(here, 0.75), random_masking(there, 0.75).cpu())


@pytest.mark.parametrize("kind", ["apl", "rpl"])
def test_labels_on_the_gpu_equal_the_cpus(kind):
    torch.manual_seed(0)
    head = PositionalHead(64, (14, 14), Labels(kind)).double()
    x, ids = torch.randn(2, 49, 64, dtype=torch.float64), random_masking(torch.rand(2, 196), 0.75)
    outs = {}
    for device in ("cpu", GPU):
        head = head.to(device)
        head.zero_grad()
        out = head(x.to(device), ids.to(device))
        out["position"].backward()
        outs[device] = [out["position"].detach().cpu()] + [p.grad.cpu().clone() for p in head.parameters()]
    for a, b in zip(outs["cpu"], outs[GPU]):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_the_compiled_chunk_equals_the_eager_one(amp, monkeypatch):
    """Loss, right answers, and gradients of tokens and weights, over several chunks and a rest."""
    monkeypatch.setitem(positional.PAIRS_PER_CHUNK, GPU.type, 4 * 49 * 49)
    torch.manual_seed(0)
    head = PositionalHead(64, (14, 14), Labels("rpl")).to(GPU)
    for p in head.parameters():  # answers that are not all alike
        p.data.mul_(5)
    x = torch.randn(7, 49, 64, device=GPU)
    ids = random_masking(torch.rand(7, 196), 0.75).to(GPU)
    found = {}
    for form in ("compiled", "eager"):
        with monkeypatch.context() as patched:
            if form == "eager":
                patched.setattr(positional, "_chunk_on_cuda", positional._pair_chunk)
            tokens = x.clone().requires_grad_()
            head.zero_grad()
            with autocast(GPU, amp):
                out = head(tokens, ids)
            out["position"].backward()
            found[form] = [
                out["position"],
                out["position_acc"],
                tokens.grad,
                *(p.grad for p in head.parameters()),
            ]
    if not REHEARSAL:
        assert positional._compiled_chunk, "nothing was compiled"
    (loss, accuracy, *grads), (eager_loss, eager_accuracy, *eager_grads) = found.values()
    assert loss.item() == pytest.approx(eager_loss.item(), rel=1e-4)
    # Many bf16 logits are equal. The last bit of earlier sums then decides which is the largest.
    assert accuracy.item() == pytest.approx(eager_accuracy.item(), abs=1e-6 if amp == "fp32" else 5e-3)
    for name, a, b in zip(("tokens", *dict(head.named_parameters())), grads, eager_grads):
        error = ((a - b).norm() / b.norm()).item()
        print(f"{amp} gradient of {name}: relative difference {error:.1e}")
        assert error < (1e-4 if amp == "fp32" else 2e-2), name


def test_all_pairs_stay_within_their_memory():
    """14x14 cells, batch 128, bf16: all logits at once would be 7 GB."""
    head = PositionalHead(768, (14, 14), Labels("rpl")).to(GPU)
    x = torch.randn(2 if REHEARSAL else 128, 196, 768, device=GPU, requires_grad=True)
    before = memory("reset_peak_memory_stats", "memory_allocated")
    with autocast(GPU, "bf16"):
        loss = head(x)["position"]
    loss.backward()
    assert memory("max_memory_allocated") - before < 2**30
    assert x.grad.isfinite().all()


def memory(*names: str) -> int:
    """The last of some figures of torch.cuda, 0 in a rehearsal."""
    return 0 if REHEARSAL else [getattr(torch.cuda, name)() for name in names][-1]


def test_prefetched_batches_are_the_loaders():
    dataset = build_dataset(None, "train", pretrain_transform((32, 32)), labels=False)
    loader = build_loader(
        dataset,
        EpochSampler(len(dataset), batch_size=20),
        batch_size=20,
        num_workers=2,
        pin_memory=not REHEARSAL,
    )
    expected = [normalize(batch["image"], MEAN, STD) for batch in loader]
    found = [b["image"].cpu() for b in device_batches(loader, GPU, Pixels(MEAN, STD))]
    assert len(found) == len(expected) == 10
    for a, b in zip(expected, found):
        assert torch.allclose(a, b, atol=1e-6)


class Constant(Dataset):
    """Images of 10 MB whose pixels all equal the image's number."""

    exact_resume = True

    def __len__(self):
        return 120

    def __getitem__(self, item):
        i = item[1] if isinstance(item, tuple) else item
        side = 64 if REHEARSAL else 1870
        return dict(image=torch.full((3, side, side), i, dtype=torch.uint8), label=0, index=i, key=0, bad=[])


def constant_batches():
    loader = build_loader(
        Constant(), list(range(120)), batch_size=10, num_workers=2, pin_memory=not REHEARSAL
    )
    return device_batches(loader, GPU, Pixels(MEAN, STD))


def test_a_batch_is_not_overwritten_while_it_is_used():
    """Kernels that wait behind long work read batches of 100 MB while the next copies run."""
    a = torch.randn(*([64] if REHEARSAL else [8192]) * 2, device=GPU)
    means, extremes = [], []
    for batch in constant_batches():
        for _ in range(3):
            a = (a @ a).mul_(1e-2).clamp_(-1, 1)
        pixels = (batch["image"] * 0.25 + 0.5) * 255  # as before the normalisation
        means.append(pixels.double().mean())
        extremes.append(torch.stack([pixels.min(), pixels.max()]))
        del batch, pixels
    expected = torch.arange(120.0).reshape(12, 10)
    assert torch.allclose(torch.stack(means).cpu(), expected.double().mean(1), atol=1e-3)
    assert torch.allclose(
        torch.stack(extremes).cpu(), torch.stack([expected[:, 0], expected[:, -1]], 1), atol=1e-2
    )


def test_passes_do_not_strand_memory():
    """As much is reserved after twelve passes over the data as after three."""
    reserved = []
    for _ in range(12):
        for batch in constant_batches():
            batch["image"].sum()
        synchronize(GPU)
        reserved.append(memory("memory_reserved"))
    print("reserved MB after each pass:", [r >> 20 for r in reserved])
    assert reserved[2] == reserved[11]


NO_WAITS = [
    (PRETRAIN, ["--pos_label", "apl+rpl"]),
    (PRETRAIN, ["--sr_spatial", "0.5", "--sr_channel", "0.5"]),
    (FINETUNE, ["--pos_label", "apl", "--mixup", "0.8", "--ema", "0.99", "--drop_path", "0.1"]),
    (FINETUNE, ["--cutmix", "1", "--clip_grad", "1", "--accum_iter", "2", "--aa", ""]),
    (FINETUNE, ["--cache_data", "device", "--aa", ""]),
    (SERE, []),
]


@pytest.mark.parametrize(
    "main, flags", NO_WAITS, ids=["labels", "relations", "mixup_ema", "cutmix_accum", "cached", "sere"]
)
def test_no_update_waits_for_the_device(tmp_path, main, flags):
    mode = {} if REHEARSAL else {"TEST_SYNC": "error"}
    code, text = start(
        tmp_path,
        "--device",
        GPU.type,
        "--amp",
        "bf16",
        "--batch_size",
        40,
        "--epochs",
        2,
        *flags,
        main=main,
        **mode,
    )
    assert code == 0, text


def test_no_update_of_a_probe_waits_for_the_device(tmp_path):
    run = ["--device", GPU.type, "--batch_size", 40, "--epochs", 2]
    code, text = start(tmp_path / "mae", *run)
    assert code == 0, text
    probe = ["main_linprobe", *FINETUNE[1:], "--finetune", str(tmp_path / "mae" / "checkpoint-last.pth")]
    code, text = start(tmp_path / "probe", *run, main=probe, **({} if REHEARSAL else {"TEST_SYNC": "error"}))
    assert code == 0, text


@pytest.mark.parametrize(
    "flags",
    [
        ["--amp", "bf16"],
        ["--amp", "fp16"],
        ["--amp", "bf16", "--compile"],
        ["--amp", "bf16", "--compile_mode", "reduce-overhead"],
    ],
    ids=["bf16", "fp16", "compiled", "graphs"],
)
def test_a_run_learns_and_continues(tmp_path, flags):
    run = ["--device", GPU.type, "--batch_size", 40, "--pos_label", "apl+rpl", *flags]
    code, text = start(tmp_path, *run, "--epochs", 3)
    assert code == 0, text
    code, text = start(tmp_path, *run, "--epochs", 6)
    assert code == 0 and "continuing" in text, text
    lines = log_lines(tmp_path)
    assert [line["epoch"] for line in lines] == list(range(6))
    assert lines[-1]["train_pixel"] < 0.9 * lines[0]["train_pixel"]
    assert all(v.isfinite().all() for v in last(tmp_path)["model"].values())


def small_mae() -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    encoder = dict(img_size=(32, 32), patch_size=(8, 8), dim=64, depth=2, num_heads=2)
    return MAE_VIT(**encoder, decoder_dim=32, decoder_depth=1, decoder_heads=2).to(GPU)


def trained(model, steps: int = 5) -> list[float]:
    """Losses of some steps on one batch."""
    optimizer = adamw(param_groups(model, 0.05), 1e-3, (0.9, 0.95))
    state = TrainState(model, optimizer, torch.amp.GradScaler(GPU.type, enabled=False))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 32, 32, generator=generator).to(GPU)
    ids = random_masking(torch.rand(8, 16, generator=generator), 0.5).to(GPU)
    losses = []
    for _ in range(steps):
        terms, _, _ = model(images, ids_keep=ids, want_pred=False)
        loss = terms["pixel"] + terms["position"]
        loss.backward()
        apply_gradients(state, 1.0)
        losses.append(loss.item())
    return losses


def test_sharded_training_on_one_rank_equals_plain_training():
    store, backend = torch.distributed.HashStore(), "gloo" if REHEARSAL else "nccl"
    plain = trained(small_mae())
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        model = fsdp.shard(small_mae(), GPU, "fp32")
        sharded = trained(model)
        with fsdp.gathered(model) as whole:
            assert whole.blocks[0].mlp.fc1.weight.shape == (256, 64)
    finally:
        torch.distributed.destroy_process_group()
    assert sharded == pytest.approx(plain, rel=1e-4)
    assert plain[-1] < plain[0]


def test_an_overflow_in_float16_skips_the_step():
    model = small_mae()
    optimizer = adamw(param_groups(model, 0.05), 1e-3, (0.9, 0.95))
    scaler = torch.amp.GradScaler(GPU.type, init_scale=2.0**30)
    state = TrainState(model, optimizer, scaler)
    before = [p.detach().clone() for p in model.parameters()]
    images = 1e3 * torch.randn(8, 3, 32, 32, device=GPU)
    with autocast(GPU, "fp16"):
        loss = model(images, want_pred=False)[0]["pixel"]
    scaler.scale(loss).backward()
    norm = apply_gradients(state, None)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert scaler.get_scale() == 2.0**29 and norm.isfinite()


def test_the_attention_kernel_that_is_chosen():
    """Prints which of PyTorch's kernels runs ViT-B's attention; in bf16 it must be a fused one."""
    q, k, v = (
        torch.randn(8, 12, 50, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        F.scaled_dot_product_attention(q, k, v) if REHEARSAL else attention(q, k, v)
    names = [event.key for event in profile.key_averages() if "attention" in event.key]
    print(f"attention in bf16: {', '.join(sorted(names))}")
    assert any(kind in name for name in names for kind in ("flash", "efficient", "cudnn")), names
