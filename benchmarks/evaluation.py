"""Evaluation: feature extraction against the forward pass alone, a grid of probes, nearest neighbours.

    python benchmarks/run.py evaluation                            ViT-B/16, small enough for a CPU
    python benchmarks/run.py evaluation --device cuda --batch_size 256 --batches 20 \\
        --queries 50000 --bank 1281167                             on a GPU

Images are uint8 batches in memory. `run.py data` measures how fast they come from disk.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbones.registry import build_classifier
from benchmarks.timing import (
    Record,
    choose_device,
    clock_for,
    default_device,
    interleaved,
    peak_memory,
    ratio,
    shown,
    spread,
    table,
    unless_out_of_memory,
    wait_for,
)
from layers.classifier import Classifier
from layers.probe import Probe, pooled
from main_linprobe import Probing
from util.data.pixels import Pixels
from util.evaluate.knn import nearest
from util.evaluate.passes import extract_features
from util.flags.groups import IMAGENET_MEAN, IMAGENET_STD
from util.train.amp import autocast, resolve_amp
from util.train.optim import lars
from util.train.setup import Setup

# The learning rates that main_linprobe.py tries by default.
GRID = (0.1, 0.3, 1.0, 3.0, 10.0)
# Queries and bank of ImageNet-1K: its validation and training images.
IMAGENET_QUERIES = 50_000
IMAGENET_BANK = 1_281_167
NEIGHBOURS = 100


class InMemory(list):
    """Batches in memory, which stand for a loader."""

    @property
    def dataset(self) -> range:
        """A data set of the right length."""
        return range(sum(len(batch["index"]) for batch in self))


def in_memory(batches: int, batch_size: int, classes: int) -> InMemory:
    """Random uint8 images (B, 3, 224, 224) with random labels, the same in every run."""
    # uint8, as a loader gives them: normalisation is part of feature extraction.
    generator = torch.Generator().manual_seed(0)
    return InMemory(
        dict(
            image=torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8, generator=generator),
            label=torch.randint(classes, (batch_size,), generator=generator),
            index=torch.arange(i * batch_size, (i + 1) * batch_size),
        )
        for i in range(batches)
    )


@dataclass(frozen=True)
class Bench:
    """The frozen encoder, its images, and how it is measured."""

    backbone: Classifier
    batches: Any  # an `InMemory`, which offers of a loader only what `extract_features` reads
    classes: int
    amp: str
    rounds: int
    device: torch.device

    @property
    def setup(self) -> Setup:
        return Setup(self.device, self.amp, (224, 224), Pixels(IMAGENET_MEAN, IMAGENET_STD))

    def features(self, images: Tensor) -> Tensor:
        """Class tokens (B, C) of normalised images."""
        return pooled(self.backbone, images, "cls")

    def normalized(self, batch: dict) -> Tensor:
        """The images of a batch, normalised, on the device."""
        return self.setup.pixels.normalize(batch["image"].to(self.device))


def extraction(bench: Bench) -> dict:
    """Images per second of `extract_features` and of the forward pass on images that are on the device.

    In addition to the forward pass, `extract_features` copies, normalises, collects and sorts.
    """
    # Ready on the device, so that `forward` measures nothing but the encoder.
    ready = [bench.normalized(batch) for batch in bench.batches]

    @torch.no_grad()
    def forward() -> None:
        for images in ready:
            with autocast(bench.device, bench.amp):
                bench.features(images)
        wait_for(bench.device)

    def whole() -> None:
        extract_features(bench.features, bench.batches, bench.setup)
        wait_for(bench.device)

    # The share is the rate of extraction relative to the forward pass.
    calls = {"forward": forward, "features": whole}
    seconds = interleaved(calls, bench.rounds, clock=clock_for(bench.device.type))
    images = len(bench.batches.dataset)
    return dict(
        forward=spread([images / t for t in seconds["forward"]]),
        features=spread([images / t for t in seconds["features"]]),
        share=ratio(seconds["forward"], seconds["features"]),
    )


def probe_step(
    bench: Bench, heads: int, function: Callable[[Tensor], Tensor], batches: list[dict]
) -> Callable[[], None]:
    """Training steps of a probe, as main_linprobe.py takes them; `function` maps images to features."""
    probe = Probe(bench.backbone.dim, bench.classes, heads).to(bench.device)
    # The rates do not change the cost.
    optimizer = lars(probe.head[1:], [1.0] * heads, 0.1, 0.0)
    names = [str(head) for head in range(heads)]
    loss_fn = Probing(probe, function, names, "linear probe", bench.setup, val_loader=bench.batches).loss

    def step() -> None:
        for batch in batches:
            with autocast(bench.device, bench.amp):
                loss, _ = loss_fn(probe, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait_for(bench.device)

    return step


def probing(bench: Bench) -> dict:
    """Seconds of a probe at five learning rates and at one.

    They are measured with the frozen encoder in every step, and on features that were computed before.
    """
    ready = [
        batch | {"image": bench.normalized(batch), "label": batch["label"].to(bench.device)}
        for batch in bench.batches
    ]
    # main_linprobe.py --cached stores features in place of the images, in float32.
    stored = [batch | {"image": bench.features(batch["image"]).float()} for batch in ready]
    found = {}
    for kind, function, data in (
        ("encoder in the step", bench.features, ready),
        ("cached features", lambda x: x, stored),
    ):
        # All heads of a grid learn in one step.
        calls = {heads: probe_step(bench, heads, function, data) for heads in (1, len(GRID))}
        seconds = interleaved(calls, bench.rounds, clock=clock_for(bench.device.type))
        found[kind] = dict(
            one=spread(seconds[1]),
            grid=spread(seconds[len(GRID)]),
            ratio=ratio(seconds[len(GRID)], seconds[1]),
        )
    return found


def neighbours(queries: int, bank: int, width: int, rounds: int, device: torch.device) -> dict:
    """Seconds and memory of a nearest-neighbour search, and both extrapolated to ImageNet."""
    # Random features: the search takes the same time for any.
    query_features = torch.randn(queries, width, device=device)
    bank_features = torch.randn(bank, width, device=device)

    def call() -> None:
        nearest(query_features, bank_features, NEIGHBOURS)
        wait_for(device)

    # Nothing to compare with: a single variant.
    seconds = spread(interleaved({"": call}, rounds)[""])
    peak = peak_memory(call, device.type == "cuda")
    # Time is proportional to queries x bank. Memory beyond features and results does not depend on them, as
    # the search works in chunks.
    factor = IMAGENET_QUERIES * IMAGENET_BANK / (queries * bank)
    # float32 features; of each neighbour an int64 index and a float32 similarity.
    features_bytes = (IMAGENET_QUERIES + IMAGENET_BANK) * width * 4
    results_bytes = IMAGENET_QUERIES * NEIGHBOURS * 12
    return dict(
        queries=queries,
        bank=bank,
        seconds=seconds,
        factor=factor,
        peak_mib=peak,
        features_mib=(queries + bank) * width * 4 / 2**20,
        imagenet_minutes=seconds["median"] * factor / 60,
        imagenet_gib=(features_bytes + results_bytes) / 2**30 + peak / 1024,
    )


def get_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    parser = argparse.ArgumentParser(prog="run.py evaluation", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--amp", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=2048, help="of the nearest-neighbour search")
    parser.add_argument("--bank", type=int, default=131_072, help="features that are searched")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def main(argv: list[str], record: Record | None = None) -> dict:
    """Measure and print feature extraction, probes and nearest neighbours. Returns the figures."""
    args = get_parser().parse_args(argv)
    record = record or Record()
    device = choose_device(args.device)
    amp = resolve_amp(args.amp, device)
    # Figures do not depend on the weights, so random ones serve.
    torch.manual_seed(0)
    backbone = build_classifier(args.model, num_classes=0, pool="cls").to(device).eval().requires_grad_(False)
    batches = in_memory(args.batches, args.batch_size, args.classes)
    bench = Bench(backbone, batches, args.classes, amp, args.rounds, device)
    print(
        f"{args.model}, {amp}, {args.batches} batches of {args.batch_size}, {args.rounds} rounds, median "
        "[min..max]; wall time on a GPU and for kNN, else CPU time of all threads"
    )
    # Name -> how it is measured, how it is printed. A part that does not fit into memory does not
    # stop the others.
    knn_rounds = min(args.rounds, 3)
    parts: dict[str, tuple[Callable[[], dict], Callable[[dict], str]]] = {
        "extraction": (lambda: extraction(bench), extraction_text),
        "probing": (lambda: probing(bench), lambda found: probing_text(found, args.classes)),
        "neighbours": (
            lambda: neighbours(args.queries, args.bank, backbone.dim, knn_rounds, device),
            neighbours_text,
        ),
    }
    for name, (measure, text) in parts.items():
        found = unless_out_of_memory(measure)
        record.set(name, found)
        if "error" in found:
            print(f"{name}: {found['error']}\n", flush=True)
        else:
            print(f"{text(found)}\n", flush=True)
    return record.results


def extraction_text(found: dict) -> str:
    """The printed table of feature extraction."""
    alone = {"feature extraction": "forward alone", "img/s": shown(found["forward"], 1), "share": ""}
    whole = {
        "feature extraction": "extract_features",
        "img/s": shown(found["features"], 1),
        "share": shown(found["share"]),
    }
    return table([alone, whole])


def probing_text(found: dict, classes: int) -> str:
    """The printed table of probes."""
    lines = [
        {
            f"probes, {classes} classes": kind,
            "one rate, s": shown(row["one"]),
            f"{len(GRID)} rates, s": shown(row["grid"]),
            "ratio": shown(row["ratio"]),
        }
        for kind, row in found.items()
    ]
    return table(lines)


def neighbours_text(knn: dict) -> str:
    """The printed line of the nearest-neighbour search."""
    return (
        f"kNN, k = {NEIGHBOURS}: {knn['queries']} x {knn['bank']} in {shown(knn['seconds'])} s, "
        f"{knn['peak_mib']:.0f} MiB in addition to {knn['features_mib']:.0f} MiB of features; "
        f"{IMAGENET_QUERIES} x {IMAGENET_BANK}, extrapolated: {knn['imagenet_minutes']:.1f} minutes, "
        f"{knn['imagenet_gib']:.1f} GiB"
    )
