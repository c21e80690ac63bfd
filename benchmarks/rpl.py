"""Relative positional labels: time and memory against the obvious form, and as a share of a step.

    python benchmarks/run.py rpl                  14x14 cells, width 768; batches that fit 6 GB on a CPU
    python benchmarks/run.py rpl --device cuda --naive_batch 16 --batch_sizes 128 256 --step_batch 128

On a GPU a row that does not fit into the memory says so, and the others follow.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step import Step
from benchmarks.timing import (
    Record,
    choose_device,
    clock_for,
    default_amps,
    default_device,
    freed_memory,
    groups,
    interleaved,
    peak_memory,
    ratio,
    ratio_of_medians,
    shown,
    spread,
    table,
    unless_out_of_memory,
    wait_for,
)
from layers.contract import Labels
from layers.positional.head import PositionalHead
from layers.positional.kinds.rpl import RelativeLabel
from layers.positional.pairs import relative_labels
from models_mae_pl import MODELS
from models_vit import MODELS as CLASSIFIERS
from util.train.amp import autocast

# A ViT-B/16 at 224 pixels.
GRID = (14, 14)
DIM = 768
# Tokens: all, and those that an MAE sees at mask ratio 0.75.
ALL = 196
VISIBLE = 49

LossFn = Callable[[PositionalHead, Tensor, Tensor], Tensor]
# A form in a precision.
Key = tuple[str, str]


def naive(head: PositionalHead, x: Tensor, ids: Tensor) -> Tensor:
    """Equations 7 to 9 as written: all pairs concatenated, the MLP on each, the mean cross-entropy."""
    n = x.shape[1]
    half = x.shape[2] // 2
    first = x[:, :, None, :half].expand(-1, n, n, -1)
    second = x[:, None, :, half:].expand(-1, n, n, -1)
    pairs = torch.cat([first, second], -1)  # (B, n, n, C)
    rpl = next(kind for kind in head.kinds.values() if isinstance(kind, RelativeLabel))
    logits = rpl.classifier(rpl.fc2(F.gelu(rpl.fc1(pairs))))  # (B, n, n, offsets)
    return F.cross_entropy(logits.flatten(0, 2).float(), relative_labels(GRID, ids, ids).flatten())


def swept(head: PositionalHead, x: Tensor, ids: Tensor) -> Tensor:
    """The form of our models, which goes through the pairs in chunks."""
    return head(x, ids)["position"]


FORMS: dict[str, LossFn] = {"obvious": naive, "swept": swept}


@dataclass(frozen=True)
class Batch:
    """Size, precision and device of the tokens that a head reads."""

    images: int
    tokens: int
    amp: str
    device: torch.device

    def call(self, loss_fn: LossFn, head: PositionalHead) -> Callable[[], None]:
        """Forward and backward of a loss on random tokens of random cells, without an optimizer."""
        x = torch.randn(self.images, self.tokens, DIM, device=self.device, requires_grad=True)
        cells = torch.rand(self.images, GRID[0] * GRID[1], device=self.device)
        ids = cells.argsort(1)[:, : self.tokens]  # (B, n)

        def run() -> None:
            # Otherwise each call would add to the gradients of the last one.
            x.grad = None
            head.zero_grad()
            with autocast(x.device, self.amp):
                loss = loss_fn(head, x, ids)
            loss.backward()
            wait_for(x.device)

        return run


def new_head(device: torch.device, pairs: int = 0) -> PositionalHead:
    """A head for relative labels over so many pairs an image; 0 means all pairs."""
    return PositionalHead(DIM, GRID, Labels("rpl", rpl_pairs=pairs)).to(device)


def measure_forms(keys: list[Key], batch: int, rounds: int, device: torch.device) -> dict:
    """{"rows": one for each key}, with all keys interleaved."""
    head = new_head(device)
    calls = {(form, amp): Batch(batch, ALL, amp, device).call(FORMS[form], head) for form, amp in keys}
    # The obvious form runs as one would write it, with glibc's default.
    settle = freed_memory(lambda key: key[0] == "swept", calls)
    seconds = interleaved(calls, rounds, clock=clock_for(device.type), prepare=settle)
    rows = []
    for (form, amp), times in seconds.items():
        settle((form, amp))
        rows.append(
            dict(
                form=form,
                amp=amp,
                batch_size=batch,
                ms=spread([1e3 * t for t in times]),
                round_seconds=times,
                peak_mib=peak_memory(calls[form, amp], device.type == "cuda"),
            )
        )
    if device.type == "cpu":
        # All later measurements keep freed memory.
        settle(("swept", keys[0][1]))
    return dict(rows=rows)


def against_naive(amps: list[str], batch: int, rounds: int, device: torch.device, record: Record) -> None:
    """Record both forms for a small batch: the obvious one needs about 0.7 GB an image in float32."""
    keys = [(form, amp) for amp in amps for form in FORMS]
    # On a GPU one form may not fit into memory. The other is then measured all the same.
    one_by_one = device.type == "cuda"
    for group in groups(keys, one_by_one):
        found = unless_out_of_memory(partial(measure_forms, group, batch, rounds, device))
        if "rows" not in found:
            # No figures, but rows that say why.
            found = dict(rows=[dict(form=form, amp=amp, batch_size=batch, **found) for form, amp in group])
        for row in found["rows"]:
            record.add("forms", row)
    add_ratios(record.results["forms"], within_rounds=not one_by_one)
    record.write()


def add_ratios(rows: list[dict], within_rounds: bool) -> None:
    """Add to each row how many times faster it is than the obvious form in the same precision."""
    form_ratio = ratio_of_medians
    if within_rounds:
        form_ratio = ratio
    good = {(row["form"], row["amp"]): row for row in rows if "error" not in row}
    for (_, amp), row in good.items():
        other = good.get(("obvious", amp))
        if other:
            row["times_obvious"] = form_ratio(other["round_seconds"], row["round_seconds"])


def memory(amps: list[str], batches: list[int], device: torch.device, record: Record) -> None:
    """Record the memory of the swept form at growing batches, and of its input's gradient."""
    # The same head for all batches, so that its weights do not count.
    head = new_head(device)

    def measure(amp: str, images: int) -> dict:
        run = Batch(images, ALL, amp, device).call(swept, head)
        # The first call allocates what stays, such as the gradients of the weights.
        if images == batches[0]:
            run()
        return dict(peak_mib=peak_memory(run, device.type == "cuda"))

    for amp in amps:
        for batch in batches:
            found = unless_out_of_memory(partial(measure, amp, batch))
            # The input is float32.
            input_mib = batch * ALL * DIM * 4 / 2**20
            record.add("memory", dict(amp=amp, batch_size=batch, input_mib=input_mib, **found))


def step_without_labels(name: str, amp: str, images: Tensor) -> Step:
    """The training step of a ViT-B/16 as an MAE or a classifier."""
    if name == "MAE":
        mae = MODELS["mae_vit_base_patch16"](pos_label="none").to(images.device)
        return Step(mae, lambda x: mae(x, want_pred=False)[0]["pixel"], images, amp)
    classifier = CLASSIFIERS["vit_base_patch16"]().to(images.device)
    target = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return Step(classifier, lambda x: F.cross_entropy(classifier(x).float(), target), images, amp)


# Tokens whose pairs are labelled: the visible ones of an MAE, all of a classifier.
TOKENS = {"MAE": VISIBLE, "classifier": ALL}


def measure_shares(name: str, amp: str, batch: int, rounds: int, device: torch.device) -> dict:
    """{"rows": the head over all pairs, and over 8 of them} relative to the step of a ViT-B/16."""
    # The step and both heads take turns.
    step = step_without_labels(name, amp, torch.randn(batch, 3, 224, 224, device=device))
    tokens = Batch(batch, TOKENS[name], amp, device)
    heads: dict[str | int, Callable[[], None]] = {
        pairs: tokens.call(swept, new_head(device, pairs)) for pairs in (0, 8)
    }
    calls: dict[str | int, Callable[[], object]] = {"step": step, **heads}
    seconds = interleaved(calls, rounds, clock=clock_for(device.type))
    step_mib = peak_memory(step, device.type == "cuda")
    rows = [
        dict(
            model=name,
            amp=amp,
            tokens=tokens.tokens,
            pairs=pairs or "all",
            batch_size=batch,
            ms=spread([1e3 * t for t in seconds[pairs]]),
            step_ms=spread([1e3 * t for t in seconds["step"]]),
            share=ratio(seconds[pairs], seconds["step"]),
            peak_mib=peak_memory(call, device.type == "cuda"),
            step_mib=step_mib,
        )
        for pairs, call in heads.items()
    ]
    return dict(rows=rows)


def shares(amps: list[str], batch: int, rounds: int, device: torch.device, record: Record) -> None:
    """Record the heads' shares of the step that they are added to."""
    for amp in amps:
        for name in TOKENS:
            found = unless_out_of_memory(partial(measure_shares, name, amp, batch, rounds, device))
            if "rows" not in found:
                found = dict(rows=[dict(model=name, amp=amp, batch_size=batch, **found)])
            for row in found["rows"]:
                record.add("shares", row)


def mib(row: dict, name: str = "peak_mib") -> str:
    """A figure in MiB as text: empty if the row does not have it, nan if the system does not report it."""
    if name not in row:
        return ""
    return f"{row[name]:.0f}"


def form_line(row: dict) -> dict[str, object]:
    """A line of the printed table of forms."""
    return {
        "form": row["form"],
        "amp": row["amp"],
        "ms": row.get("error") or shown(row["ms"]),
        "times obvious": shown(row.get("times_obvious")),
        "peak MiB": mib(row),
    }


def memory_line(row: dict) -> dict[str, object]:
    """A line of the printed table of growing batches."""
    return {
        "amp": row["amp"],
        "batch": row["batch_size"],
        "peak MiB": row.get("error") or mib(row),
        "input and its gradient, MiB": round(2 * row["input_mib"]),
    }


def share_line(row: dict) -> dict[str, object]:
    """A line of the printed table of shares."""
    line = dict(model=row["model"], amp=row["amp"], tokens=row.get("tokens", ""), pairs=row.get("pairs", ""))
    line["ms"] = row.get("error") or shown(row["ms"])
    line["step ms"] = shown(row.get("step_ms"))
    line["% of the step"] = ""
    if "share" in row:
        percent = {name: 100 * value for name, value in row["share"].items()}
        line["% of the step"] = shown(percent, 1)
    line["peak MiB"] = mib(row)
    line["step's"] = mib(row, "step_mib")
    return line


def get_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    parser = argparse.ArgumentParser(prog="run.py rpl", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default=default_device())
    parser.add_argument(
        "--amp", nargs="+", choices=["fp32", "bf16", "fp16"], help="fp32 and bf16 on a CPU, bf16 on a GPU"
    )
    parser.add_argument(
        "--naive_batch", type=int, default=2, help="batch of the comparison with the obvious form"
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[2, 8, 32], help="of the memory table")
    parser.add_argument("--step_batch", type=int, default=4, help="batch of the shares of a step")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def main(argv: list[str], record: Record | None = None) -> dict:
    """Measure and print the forms, their memory, and their share of a step. Returns the figures."""
    args = get_parser().parse_args(argv)
    record = record or Record()
    results = record.results
    device = choose_device(args.device)
    amps = args.amp or default_amps(device)
    # The tokens and cells are random, and the same in every run.
    torch.manual_seed(0)
    print("times are wall time on a GPU, and CPU time of all threads on a CPU")

    against_naive(amps, args.naive_batch, args.rounds, device, record)
    title = f"all 38,416 pairs of {ALL} tokens, forward and backward, batch {args.naive_batch}"
    print(f"\n{title}, median [min..max]")
    print(table([form_line(row) for row in results["forms"]]), flush=True)

    memory(amps, args.batch_sizes, device, record)
    print("\nswept, growing batches")
    print(table([memory_line(row) for row in results["memory"]]), flush=True)

    shares(amps, args.step_batch, args.rounds, device, record)
    print(f"\nas a share of a ViT-B/16 step without labels, batch {args.step_batch}")
    print(table([share_line(row) for row in results["shares"]]))
    return results
