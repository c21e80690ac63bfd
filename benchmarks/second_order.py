"""What the second-order head costs: time and memory of a training step against the linear head on the same backbone.

    python benchmarks/run.py second_order --device cuda --amp bf16 --batch_size 128

Steps of all heads take turns, so that what else runs on the machine hits them alike; medians of wall time, on a single
CPU thread (OMP_NUM_THREADS=1) of processor time. "head" is the head's own forward and backward pass on fixed tokens: on
a noisy machine its share of the step says more than the difference of two steps. Memory: what the forward pass keeps for
backward, each storage counted once, and weights, gradients and AdamW's state; on a GPU also the allocator's peak.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from backbones.registry import build_classifier
from benchmarks.timing import Record, choose_device, unless_out_of_memory, wait_for
from util.train.amp import autocast, resolve_amp
from util.train.optim import adamw, param_groups

# Name -> keywords of SecondOrderHead, None for the linear head. Widths of So-ViT-7/10, So-ViT-14, and SoT-Small's heads.
HEADS = {
    "linear": None,
    "48x24": {},
    "64x48": {"dims": (64, 48)},
    "6 x 24x24": {"dims": (24, 24), "heads": 6},
}


def get_args_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="run.py second_order", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="vit_small_patch16")
    p.add_argument("--input_size", default=224, type=int)
    p.add_argument("--batch_size", default=128, type=int)
    p.add_argument("--classes", default=1000, type=int)
    p.add_argument("--steps", default=10, type=int, help="timed steps of each head, after two that are not")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--amp", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    return p


class Step:
    """A model with one of the heads, and its training step."""

    def __init__(self, args, second_order: dict | None):
        torch.manual_seed(0)
        self.device = choose_device(args.device)
        self.amp = resolve_amp(args.amp, self.device)
        self.model = build_classifier(
            args.model,
            img_size=(args.input_size,) * 2,
            num_classes=args.classes,
            pool="cls",
            head_init_std=0.02,
            second_order=second_order,
        ).to(self.device)
        self.optimizer = adamw(param_groups(self.model, 0.05), 1e-4, (0.9, 0.999))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self.images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=self.device)
        self.labels = torch.randint(args.classes, (args.batch_size,), device=self.device)
        with torch.no_grad(), autocast(self.device, self.amp):
            self.tokens = self.model.forward_features(self.images)

    def loss(self) -> torch.Tensor:
        with autocast(self.device, self.amp):
            return F.cross_entropy(self.model(self.images).float(), self.labels)

    def whole(self) -> None:
        self.scaler.scale(self.loss()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def head(self) -> None:
        tokens = self.tokens.detach().requires_grad_()  # the backbone's gradient comes from here
        with autocast(self.device, self.amp):
            loss = F.cross_entropy(self.model.class_logits(tokens).float(), self.labels)
        self.scaler.scale(loss).backward()
        self.model.zero_grad(set_to_none=True)

    def seconds(self, work) -> float:
        # One thread on a CPU is timed by the processor's time, which other processes do not lengthen.
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        wait_for(self.device)
        start = clock()
        work()
        wait_for(self.device)
        return clock() - start

    def memory(self) -> dict[str, float]:
        """MiB: kept for backward, weights with gradients and AdamW's moments, and on a GPU the peak of a step."""
        kept, own = {}, {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def count(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with saved_tensors_hooks(count, lambda x: x):
            loss = self.loss()
        del loss
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        out = {"kept_mib": sum(kept.values()) / 2**20, "weights_mib": 4 * weights / 2**20}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.whole()
            out["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        return out


def measure(args, record: Record) -> dict[str, dict]:
    """{head: {parameters, kept_mib, weights_mib, [peak_mib], step_ms, head_ms, and the ranges of both}}.

    Where all heads at once do not fit into memory there are no times, as these are taken in turns.
    """
    rows = {}
    for name, options in HEADS.items():  # one model at a time
        rows[name] = unless_out_of_memory(lambda options=options: Step(args, options).memory())
        record.set("heads", rows)
    times = unless_out_of_memory(lambda: measure_times(args))
    for name, row in rows.items():
        row |= times.get(name, times)
    record.set("heads", rows)
    return rows


def measure_times(args) -> dict[str, dict]:
    """The rows' times, of all heads in turns, and their numbers of parameters."""
    steps = {name: Step(args, options) for name, options in HEADS.items()}
    times = {name: {"step": [], "head": []} for name in HEADS}
    for i in range(args.steps + 2):
        for name, step in steps.items():
            for what, work in (("step", step.whole), ("head", step.head)):
                seconds = step.seconds(work)
                if i >= 2:
                    times[name][what].append(1e3 * seconds)
    rows = {}
    for name in HEADS:
        row = rows[name] = {"parameters": sum(p.numel() for p in steps[name].model.parameters())}
        for what, values in times[name].items():
            row |= {f"{what}_ms": statistics.median(values), f"{what}_ms_range": [min(values), max(values)]}
    return rows


def table(rows: dict[str, dict]) -> str:
    """Times in ms (median), what a head adds to the linear head's step, and memory in MiB."""
    if any("error" in row for row in rows.values()):
        return "\n".join(f"{name:>12} {row}" for name, row in rows.items())
    base, memory = rows["linear"], "peak_mib" if "peak_mib" in rows["linear"] else "kept_mib"
    lines = [
        f"{'head':>12} {'M params':>9} {'step':>9} {'added':>7} {'head':>8} {'added':>7} {memory:>9} {'added':>7} "
        f"{'weights':>8}"
    ]
    for name, row in rows.items():
        added = [
            100 * (row["step_ms"] / base["step_ms"] - 1),
            100 * (row["head_ms"] - base["head_ms"]) / base["step_ms"],
            100 * (row[memory] / base[memory] - 1),
        ]
        lines.append(
            f"{name:>12} {row['parameters'] / 1e6:9.2f} {row['step_ms']:9.1f} {added[0]:+6.1f}% {row['head_ms']:8.2f} "
            f"{added[1]:+6.1f}% {row[memory]:9.0f} {added[2]:+6.1f}% {row['weights_mib']:8.0f}"
        )
    return "\n".join(lines)


def main(argv, record: Record | None = None) -> dict:
    args, record = get_args_parser().parse_args(argv), record or Record()
    rows = measure(args, record)
    where = torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else "CPU"
    print(
        f"{args.model}, {args.input_size} px, batch {args.batch_size}, {args.amp} on {where}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}\n{table(rows)}"
    )
    return record.results
