"""Evaluation: feature extraction against the bare forward pass, a grid of probes against one, and k nearest neighbours.

    python benchmarks/run.py evaluation                            ViT-B/16, small enough for a CPU
    python benchmarks/run.py evaluation --device cuda --batch_size 256 --batches 20 --queries 50000 --bank 1281167

Images are uint8 batches in memory: how fast they come from disk is `run.py data`'s business.
"""

import argparse

import torch

from backbones.registry import build_classifier
from benchmarks.timing import (
    Record,
    choose_device,
    clock_for,
    interleaved,
    peak_memory,
    ratio,
    shown,
    spread,
    table,
    unless_out_of_memory,
    wait_for,
)
from layers.probe import Probe, pooled
from main_linprobe import make_loss_fn
from util.data.pixels import normalize
from util.evaluate import evaluation
from util.evaluate.knn import nearest
from util.flags.groups import IMAGENET_MEAN, IMAGENET_STD
from util.train.amp import autocast, resolve_amp
from util.train.optim import lars

GRID = (0.1, 0.3, 1.0, 3.0, 10.0)  # main_linprobe.py's
GOALS = 50_000, 1_281_167  # queries and bank of ImageNet-1K


class InMemory(list):
    """Batches that are there, in place of a loader."""

    @property
    def dataset(self):
        return range(sum(len(batch["index"]) for batch in self))


def in_memory(batches: int, batch_size: int, classes: int) -> InMemory:
    generator = torch.Generator().manual_seed(0)
    return InMemory(
        dict(
            image=torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8, generator=generator),
            label=torch.randint(classes, (batch_size,), generator=generator),
            index=torch.arange(i * batch_size, (i + 1) * batch_size),
        )
        for i in range(batches)
    )


def extraction(backbone, batches, amp, rounds, device) -> dict:
    """evaluation.features (copy, normalise, forward, collect, order) against the forward pass on images that are there."""
    ready = [normalize(b["image"].to(device), IMAGENET_MEAN, IMAGENET_STD) for b in batches]

    @torch.no_grad()
    def bare():
        for images in ready:
            with autocast(device, amp):
                pooled(backbone, images, "cls")
        wait_for(device)

    def whole():
        evaluation.features(
            lambda x: pooled(backbone, x, "cls"),
            batches,
            device=device,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            amp=amp,
        )
        wait_for(device)

    seconds = interleaved({"forward": bare, "features": whole}, rounds, clock=clock_for(device.type))
    images = sum(len(b["image"]) for b in batches)
    return dict(
        forward=spread([images / t for t in seconds["forward"]]),
        features=spread([images / t for t in seconds["features"]]),
        share=ratio(seconds["forward"], seconds["features"]),
    )


def probe_step(heads, features, batches, classes, amp, device, width):
    """Training steps of a probe, as main_linprobe.py takes them."""
    probe = Probe(width, classes, heads).to(device)
    optimizer = lars(probe.head[1:], [1.0] * heads, 0.1, 0.0)
    loss_fn = make_loss_fn(features)

    def step():
        for batch in batches:
            with autocast(device, amp):
                loss, _ = loss_fn(probe, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait_for(device)

    return step


def probing(backbone, batches, classes, amp, rounds, device) -> dict:
    """Seconds of five rates against one, with the frozen encoder in every step, and on features computed before."""
    ready = [
        b
        | {
            "image": normalize(b["image"].to(device), IMAGENET_MEAN, IMAGENET_STD),
            "label": b["label"].to(device),
        }
        for b in batches
    ]
    stored = [b | {"image": pooled(backbone, b["image"], "cls").float()} for b in ready]
    out = {}
    for kind, function, data in (
        ("encoder in the step", lambda x: pooled(backbone, x, "cls"), ready),
        ("cached features", lambda x: x, stored),
    ):
        calls = {
            heads: probe_step(heads, function, data, classes, amp, device, backbone.dim)
            for heads in (1, len(GRID))
        }
        seconds = interleaved(calls, rounds, clock=clock_for(device.type))
        out[kind] = dict(
            one=spread(seconds[1]),
            grid=spread(seconds[len(GRID)]),
            ratio=ratio(seconds[len(GRID)], seconds[1]),
        )
    return out


def neighbours(queries, bank, width, rounds, device) -> dict:
    """k = 100 of every query; time is proportional to queries x bank, memory beyond the features is not."""
    q, b = torch.randn(queries, width, device=device), torch.randn(bank, width, device=device)

    def call():
        nearest(q, b, 100)
        wait_for(device)

    seconds = spread(interleaved({"": call}, rounds)[""])
    factor = GOALS[0] * GOALS[1] / (queries * bank)
    peak = peak_memory(call, device.type == "cuda")
    return dict(
        queries=queries,
        bank=bank,
        seconds=seconds,
        factor=factor,
        peak_mib=peak,
        features_mib=(queries + bank) * width * 4 / 2**20,
        imagenet_minutes=seconds["median"] * factor / 60,
        imagenet_gib=(sum(GOALS) * width * 4 + GOALS[0] * 100 * 12) / 2**30 + peak / 1024,
    )


def main(argv, record: Record | None = None) -> dict:
    parser = argparse.ArgumentParser(prog="run.py evaluation", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=2048, help="of the nearest neighbours")
    parser.add_argument("--bank", type=int, default=131_072)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    device, record = choose_device(args.device), record or Record()
    amp = resolve_amp(args.amp, device)
    torch.manual_seed(0)
    backbone = build_classifier(args.model, num_classes=0, pool="cls").to(device).eval().requires_grad_(False)
    batches = in_memory(args.batches, args.batch_size, args.classes)
    print(
        f"{args.model}, {amp}, {args.batches} batches of {args.batch_size}, {args.rounds} rounds, median [min..max]; "
        "wall time on a GPU and for kNN, else CPU time of all threads"
    )
    parts = dict(
        extraction=lambda: extraction(backbone, batches, amp, args.rounds, device),
        probing=lambda: probing(backbone, batches, args.classes, amp, args.rounds, device),
        neighbours=lambda: neighbours(args.queries, args.bank, backbone.dim, min(args.rounds, 3), device),
    )
    show = dict(
        extraction=show_extraction,
        probing=lambda found: show_probing(found, args.classes),
        neighbours=show_neighbours,
    )
    for name, measure in parts.items():
        record.set(name, unless_out_of_memory(measure))
        if "error" in record.results[name]:
            print(f"{name}: {record.results[name]['error']}")
        else:
            show[name](record.results[name])
        print(flush=True)
    return record.results


def show_extraction(found):
    print(
        table(
            [
                {"feature extraction": "forward alone", "img/s": shown(found["forward"], 1), "share": ""},
                {
                    "feature extraction": "evaluation.features",
                    "img/s": shown(found["features"], 1),
                    "share": shown(found["share"]),
                },
            ]
        )
    )


def show_probing(found, classes):
    print(
        table(
            [
                {
                    f"probes, {classes} classes": kind,
                    "one rate, s": shown(r["one"]),
                    f"{len(GRID)} rates, s": shown(r["grid"]),
                    "ratio": shown(r["ratio"]),
                }
                for kind, r in found.items()
            ]
        )
    )


def show_neighbours(knn):
    print(
        f"kNN, k = 100: {knn['queries']} x {knn['bank']} in {shown(knn['seconds'])} s, {knn['peak_mib']:.0f} MiB beside "
        f"{knn['features_mib']:.0f} MiB of features; {GOALS[0]} x {GOALS[1]}, extrapolated: "
        f"{knn['imagenet_minutes']:.1f} minutes, {knn['imagenet_gib']:.1f} GiB"
    )
