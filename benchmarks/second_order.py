"""Cost of the second-order head: time and memory of a training step, against the linear head's.

    python benchmarks/run.py second_order --device cuda --amp bf16 --batch_size 128

The steps of all heads take turns, so that other work on the machine affects them alike. Times are medians: of
wall time, or of CPU time on a single CPU thread (OMP_NUM_THREADS=1). "head" is the forward and backward pass
of the head alone, on fixed tokens. On a noisy machine its share of the step is more precise than the
difference of two steps. Memory is what the forward pass keeps for backward, each storage counted once, and
weights, gradients and AdamW's state; on a GPU also the allocator's peak.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.registry import build_classifier
from benchmarks.timing import (
    MIB,
    Record,
    choose_device,
    default_device,
    kept_for_backward,
    table,
    unless_out_of_memory,
    wait_for,
)
from layers.classifier import Classifier
from util.train.amp import autocast, resolve_amp
from util.train.optim import adamw, param_groups

# Name -> keywords of the second-order head, None for the linear head. The widths are those of So-ViT-7 and
# So-ViT-10, of So-ViT-14, and of SoT-Small's heads.
HEADS: dict[str, dict | None] = {
    "linear": None,
    "48x24": {},
    "64x48": {"dims": (64, 48)},
    "6 x 24x24": {"dims": (24, 24), "heads": 6},
}
# Unmeasured steps.
WARMUP = 2


def get_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    p = argparse.ArgumentParser(
        prog="run.py second_order", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="vit_small_patch16")
    p.add_argument("--input_size", default=224, type=int)
    p.add_argument("--batch_size", default=128, type=int)
    p.add_argument("--classes", default=1000, type=int)
    p.add_argument("--steps", default=10, type=int, help="timed steps of each head, after two that are not")
    p.add_argument("--device", default=default_device())
    p.add_argument("--amp", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    return p


@dataclass(frozen=True)
class Setup:
    """What all heads are measured with: the backbone, its images, and where it runs."""

    model: str
    input_size: int
    batch_size: int
    classes: int
    amp: str
    device: torch.device

    def build(self, second_order: dict | None) -> Classifier:
        """The backbone with a head."""
        model = build_classifier(
            self.model,
            img_size=(self.input_size, self.input_size),
            num_classes=self.classes,
            pool="cls",
            head_init_std=0.02,
            second_order=second_order,
        )
        return model.to(self.device)


class Step:
    """A model with one of the heads, and its training step."""

    def __init__(self, setup: Setup, second_order: dict | None):
        # All heads see the same weights, images and labels.
        torch.manual_seed(0)
        self.device = setup.device
        self.amp = setup.amp
        self.model = setup.build(second_order)
        # As in fine-tuning.
        self.optimizer = adamw(param_groups(self.model, 0.05), 1e-4, (0.9, 0.999))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        size = (setup.batch_size, 3, setup.input_size, setup.input_size)
        self.images = torch.randn(size, device=self.device)
        self.labels = torch.randint(setup.classes, (setup.batch_size,), device=self.device)
        # Fixed input of the head alone.
        with torch.no_grad(), autocast(self.device, self.amp):
            self.tokens = self.model.forward_features(self.images)

    def loss(self) -> Tensor:
        """The loss of the whole model."""
        with autocast(self.device, self.amp):
            return F.cross_entropy(self.model(self.images).float(), self.labels)

    def whole(self) -> None:
        """A training step."""
        self.scaler.scale(self.loss()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def head(self) -> None:
        """Forward and backward pass of the head alone."""
        # With the gradient that the backbone would get.
        tokens = self.tokens.detach().requires_grad_()
        with autocast(self.device, self.amp):
            loss = F.cross_entropy(self.model.class_logits(tokens).float(), self.labels)
        self.scaler.scale(loss).backward()
        self.model.zero_grad(set_to_none=True)

    def seconds(self, work: Callable[[], None]) -> float:
        """Seconds of a piece of work."""
        clock = time.perf_counter
        # Other processes do not lengthen the CPU time of a single thread. Several threads also wait
        # for each other.
        if self.device.type == "cpu" and torch.get_num_threads() == 1:
            clock = time.process_time
        wait_for(self.device)
        start = clock()
        work()
        wait_for(self.device)
        return clock() - start

    def memory(self) -> dict[str, float]:
        """MiB kept for backward, of weights with gradients and moments, and on a GPU the peak of a step."""
        kept = kept_for_backward(self.loss, list(self.model.parameters()))
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        # Weights, gradients, and AdamW's two moments.
        figures = {"kept_mib": kept / MIB, "weights_mib": 4 * weights / MIB}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.whole()
            figures["peak_mib"] = torch.cuda.max_memory_allocated() / MIB
        return figures


def measure_memory(setup: Setup, options: dict | None) -> dict[str, float]:
    """`Step.memory` of a model with such a head, which is freed afterwards."""
    return Step(setup, options).memory()


def measure(setup: Setup, steps: int, record: Record) -> dict[str, dict]:
    """{head: {parameters, kept_mib, weights_mib, [peak_mib], step_ms, head_ms, and the ranges of both}}.

    Times are missing if all heads together do not fit into memory, as they are taken in turns.
    """
    rows = {}
    # Memory is measured with one model at a time.
    for name, options in HEADS.items():
        rows[name] = unless_out_of_memory(partial(measure_memory, setup, options))
        record.set("heads", rows)
    times = unless_out_of_memory(lambda: measure_times(setup, steps))
    for name, row in rows.items():
        row |= times.get(name, times)
    record.set("heads", rows)
    return rows


def measure_times(setup: Setup, count: int) -> dict[str, dict]:
    """Times of `count` steps of all heads in turns, and their numbers of parameters."""
    steps = {name: Step(setup, options) for name, options in HEADS.items()}
    times: dict[str, dict[str, list[float]]] = {name: {"step": [], "head": []} for name in HEADS}
    for _ in range(WARMUP + count):
        for name, step in steps.items():
            times[name]["step"].append(1e3 * step.seconds(step.whole))
            times[name]["head"].append(1e3 * step.seconds(step.head))
    rows = {}
    for name, step in steps.items():
        row: dict = {"parameters": sum(p.numel() for p in step.model.parameters())}
        for what, values in times[name].items():
            measured = values[WARMUP:]
            row[f"{what}_ms"] = statistics.median(measured)
            row[f"{what}_ms_range"] = [min(measured), max(measured)]
        rows[name] = row
    return rows


def shown_rows(rows: dict[str, dict]) -> list[dict[str, str]]:
    """The printed table: times in ms (median), memory in MiB, and what a head adds to the linear one."""
    if any("error" in row for row in rows.values()):
        return [{"head": name, "": str(row)} for name, row in rows.items()]
    # A head's time is compared with the linear head's, and its difference given as a share of the whole step.
    base = rows["linear"]
    # The peak on a GPU, else what is kept for backward.
    memory = "kept_mib"
    if "peak_mib" in base:
        memory = "peak_mib"
    return [
        {
            "head": name,
            "M params": f"{row['parameters'] / 1e6:.2f}",
            "step": f"{row['step_ms']:.1f}",
            "step, added": f"{100 * (row['step_ms'] / base['step_ms'] - 1):+.1f}%",
            "head alone": f"{row['head_ms']:.2f}",
            "head, added": f"{100 * (row['head_ms'] - base['head_ms']) / base['step_ms']:+.1f}%",
            memory: f"{row[memory]:.0f}",
            "memory, added": f"{100 * (row[memory] / base[memory] - 1):+.1f}%",
            "weights": f"{row['weights_mib']:.0f}",
        }
        for name, row in rows.items()
    ]


def main(argv: list[str], record: Record | None = None) -> dict:
    """Measure and print all heads. Returns the figures."""
    args = get_parser().parse_args(argv)
    record = record or Record()
    device = choose_device(args.device)
    amp = resolve_amp(args.amp, device)
    setup = Setup(args.model, args.input_size, args.batch_size, args.classes, amp, device)
    rows = measure(setup, args.steps, record)
    where = "CPU"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(
        f"{args.model}, {args.input_size} px, batch {args.batch_size}, {args.amp} on {where}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n{table(shown_rows(rows))}"
    )
    return record.results
