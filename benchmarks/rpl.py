"""Relative positional labels over all pairs: time and memory against the obvious form, and as a share of a training step.

    python benchmarks/run.py rpl                              14x14 cells, width 768; batches that fit 6 GB on a CPU
    python benchmarks/run.py rpl --device cuda --batch_sizes 16 32 64 128
"""
import argparse

import torch
import torch.nn.functional as F

from benchmarks.step import Step
from benchmarks.timing import clock_for, freed_memory, interleaved, peak_memory, ratio, shown, spread, table
from layers.positional import PositionalHead, relative_labels
from models_mae_pl import MODELS
from models_vit import MODELS as CLASSIFIERS
from util.amp import autocast

GRID, DIM, VISIBLE = (14, 14), 768, 49


def naive(head, x, ids):
    """Equations 7-9 as written: every pair concatenated, the MLP on each, the mean cross-entropy."""
    n, half = x.shape[1], x.shape[2] // 2
    pairs = torch.cat([x[:, :, None, :half].expand(-1, n, n, -1), x[:, None, :, half:].expand(-1, n, n, -1)], -1)
    logits = head.rpl.classifier(head.rpl.fc2(F.gelu(head.rpl.fc1(pairs))))  # (B, n, n, offsets)
    return F.cross_entropy(logits.flatten(0, 2).float(), relative_labels(GRID, ids, ids).flatten())


def call(loss_fn, head, batch, tokens, amp, device):
    """Forward and backward of a loss on random tokens of random cells, without an optimizer."""
    x = torch.randn(batch, tokens, DIM, device=device, requires_grad=True)
    ids = torch.rand(batch, GRID[0] * GRID[1], device=device).argsort(1)[:, :tokens]

    def run():
        x.grad = None
        head.zero_grad()
        with autocast(x.device, amp):
            loss = loss_fn(head, x, ids)
        loss.backward()
        if x.is_cuda:
            torch.cuda.synchronize()
    return run


def swept(head, x, ids):
    return head(x, ids)["position"]


def against_naive(amps, batch, rounds, device):
    """The obvious form needs some 0.7 GB an image in float32, so that only a small batch of it is run."""
    head = PositionalHead(DIM, GRID, "rpl").to(device)
    calls = {(form, amp): call(f, head, batch, 196, amp, device)
             for amp in amps for form, f in (("obvious", naive), ("swept", swept))}
    settle = freed_memory(lambda key: key[0] == "swept", calls)
    seconds = interleaved(calls, rounds, clock=clock_for(device.type), prepare=settle)
    rows = []
    for (form, amp), s in seconds.items():
        settle((form, amp))
        rows.append(dict(form=form, amp=amp, batch_size=batch, ms=spread([1e3 * t for t in s]),
                         times_obvious=ratio(seconds["obvious", amp], s),
                         peak_mib=peak_memory(calls[form, amp], device.type == "cuda")))
    settle(("swept", amps[0]))  # as in all that follows
    return rows


def memory(amps, batches, device):
    """What the swept form takes at growing batches, the gradient of its input (B, 196, 768) included."""
    head, rows = PositionalHead(DIM, GRID, "rpl").to(device), []
    for amp in amps:
        for batch in batches:
            run = call(swept, head, batch, 196, amp, device)
            if batch == batches[0]:
                run()
            rows.append(dict(amp=amp, batch_size=batch, peak_mib=peak_memory(run, device.type == "cuda"),
                             input_mib=batch * 196 * DIM * 4 / 2**20))
    return rows


def shares(amps, batch, rounds, device):
    """Heads against the step that they are added to: 49 visible tokens in MAE, 196 in a classifier."""
    rows = []
    images = torch.randn(batch, 3, 224, 224, device=device)
    target = torch.zeros(batch, dtype=torch.int64, device=device)
    mae = MODELS["mae_vit_base_patch16"](pos_label="none").to(device)
    vit = CLASSIFIERS["vit_base_patch16"]().to(device)
    steps = {"MAE": (mae, lambda x: mae(x, want_pred=False)[0]["pixel"], VISIBLE),
             "classifier": (vit, lambda x: F.cross_entropy(vit(x).float(), target), 196)}
    for amp in amps:
        for name, (model, loss_fn, tokens) in steps.items():
            calls = {"step": Step(model, loss_fn, images, amp)}
            for pairs in (0, 8):
                head = PositionalHead(DIM, GRID, "rpl", rpl_pairs=pairs).to(device)
                calls[pairs] = call(swept, head, batch, tokens, amp, device)
            seconds = interleaved(calls, rounds, clock=clock_for(device.type))
            step_mib = peak_memory(calls["step"], device.type == "cuda")
            for pairs in (0, 8):
                rows.append(dict(
                    model=name, amp=amp, tokens=tokens, pairs=pairs or "all", batch_size=batch,
                    ms=spread([1e3 * t for t in seconds[pairs]]), step_ms=spread([1e3 * t for t in seconds["step"]]),
                    share=ratio(seconds[pairs], seconds["step"]),
                    peak_mib=peak_memory(calls[pairs], device.type == "cuda"), step_mib=step_mib))
    return rows


def main(argv) -> dict:
    parser = argparse.ArgumentParser(prog="run.py rpl", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--naive_batch", type=int, default=2, help="batch of the comparison with the obvious form")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[2, 8, 32], help="of the memory table")
    parser.add_argument("--step_batch", type=int, default=4, help="batch of the shares of a step")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.manual_seed(0)
    print("times are wall time on a GPU, and CPU time of all threads on a CPU")
    results = dict(forms=against_naive(args.amp, args.naive_batch, args.rounds, device))
    print(f"\nall 38,416 pairs of 196 tokens, forward and backward, batch {args.naive_batch}, median [min..max]")
    print(table([dict(form=r["form"], amp=r["amp"], ms=shown(r["ms"], 0), **{
        "times obvious": shown(r["times_obvious"]), "peak MiB": round(r["peak_mib"])}) for r in results["forms"]]))
    results["memory"] = memory(args.amp, args.batch_sizes, device)
    print("\nswept, growing batches")
    print(table([dict(amp=r["amp"], batch=r["batch_size"], **{
        "peak MiB": round(r["peak_mib"]), "input and as much again for its gradient, MiB": round(2 * r["input_mib"])})
        for r in results["memory"]]))
    results["shares"] = shares(args.amp, args.step_batch, args.rounds, device)
    print(f"\nas a share of a ViT-B/16 step without labels, batch {args.step_batch}")
    print(table([dict(model=r["model"], amp=r["amp"], tokens=r["tokens"], pairs=r["pairs"], ms=shown(r["ms"], 0), **{
        "step ms": shown(r["step_ms"], 0), "% of the step": shown({k: 100 * v for k, v in r["share"].items()}, 1),
        "peak MiB": round(r["peak_mib"]), "step's": round(r["step_mib"])}) for r in results["shares"]]))
    return results
