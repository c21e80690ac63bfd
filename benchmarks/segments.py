"""Dense features and linear probes: images per second against timm, and what a grid of rates costs.

    OMP_NUM_THREADS=1 python benchmarks/run.py segments --device cpu

Features are the normalised patch tokens of a frozen encoder, at a size other than 224. timm's model of the
same name with `dynamic_img_size` is the baseline. A step of a probe is the forward and backward pass of its
heads, with the loss at the size of the masks. Its features are computed in the same step, or were computed
before (cached).
"""

import argparse
from collections.abc import Callable
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
    ratio,
    shown,
    spread,
    table,
    wait_for,
)
from layers.segmentation import DenseProbe, patch_maps
from util.evaluate.segments.loss import losses_of_heads
from util.train.amp import autocast, resolve_amp

RATES = (1, 5)


def get_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    p = argparse.ArgumentParser(
        prog="run.py segments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="vit_small_patch16")
    p.add_argument("--timm", default="vit_small_patch16_224", help="the baseline")
    p.add_argument("--input_size", default=[352, 480], type=int, nargs=2, metavar=("H", "W"))
    p.add_argument("--batch_size", default=8, type=int)
    p.add_argument("--classes", default=11, type=int)
    p.add_argument("--rounds", default=7, type=int)
    p.add_argument("--device", default=default_device())
    p.add_argument("--amp", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    return p


def main(argv: list[str], record: Record) -> dict:
    """Measure features and steps, and print two tables."""
    args = get_parser().parse_args(argv)
    device = choose_device(args.device)
    amp = resolve_amp(args.amp, device)
    clock = clock_for(device.type)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, *args.input_size, device=device)
    encoders = build_encoders(args, device)

    def features(name: str) -> Callable[[], Tensor]:
        @torch.no_grad()
        def call() -> Tensor:
            with autocast(device, amp):
                maps = encoders[name](images)
            wait_for(device)
            return maps

        return call

    calls = {name: features(name) for name in encoders}
    seconds = interleaved(calls, args.rounds, clock=clock)
    first = next(iter(encoders))
    for name, times in seconds.items():
        speeds = spread([args.batch_size / t for t in times])
        record.add("features", dict(path=name, images_per_s=speeds, ratio=ratio(seconds[first], times)))
    maps = calls[args.model]().float()
    masks = torch.randint(-1, args.classes, (args.batch_size, *args.input_size), device=device)
    steps = {}
    for rates in RATES:
        step = probe_step(DenseProbe(maps.shape[1], args.classes, rates).to(device), masks, device)
        steps[f"cached, {rates} rates"] = lambda step=step: step(maps)
        steps[f"with features, {rates} rates"] = lambda step=step: step(calls[args.model]().float())
    seconds = interleaved(steps, args.rounds, clock=clock)
    for name, times in seconds.items():
        one = seconds[name.replace(f"{RATES[1]} rates", f"{RATES[0]} rates")]
        record.add(
            "steps", dict(step=name, ms=spread([1e3 * t for t in times]), of_one_rate=ratio(times, one))
        )
    print_tables(record.results)
    return record.results


def build_encoders(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return timm's features and ours: name -> images to tokens."""
    import timm

    own = build_classifier(
        args.model, img_size=tuple(args.input_size), num_classes=0, pos_embed="none", pool="cls"
    )
    own.to(device).eval()
    other: Any = timm.create_model(args.timm, dynamic_img_size=True, num_classes=0).to(device).eval()
    return {f"timm {args.timm}": other.forward_features, args.model: lambda images: patch_maps(own, images)}


def probe_step(probe: DenseProbe, masks: Tensor, device: torch.device) -> Callable[[Tensor], None]:
    """Return a function that makes the gradients of a probe from features (B, C, h, w)."""

    def step(maps: Tensor) -> None:
        losses_of_heads(probe(maps), masks, "pixels").sum().backward()
        wait_for(device)

    return step


def print_tables(results: dict) -> None:
    """Print the tables of features and of steps."""
    rows = [
        {
            "features": row["path"],
            "images/s": shown(row["images_per_s"]),
            "times the first": shown(row["ratio"]),
        }
        for row in results["features"]
    ]
    print(table(rows))
    rows = [
        {"step": row["step"], "ms": shown(row["ms"], 0), "times one rate": shown(row["of_one_rate"])}
        for row in results["steps"]
    ]
    print(f"\n{table(rows)}")
