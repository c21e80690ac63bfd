"""Relative positional labels over all pairs: time and memory against the obvious form, and as a share of a training step.

    python benchmarks/run.py rpl                              14x14 cells, width 768; batches that fit 6 GB on a CPU
    python benchmarks/run.py rpl --device cuda --naive_batch 16 --batch_sizes 128 256 --step_batch 128

On a GPU a row that does not fit into its memory says so, and the others follow.
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.step import Step
from benchmarks.timing import (
    Record,
    choose_device,
    clock_for,
    freed_memory,
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
from layers.positional.pairs import relative_labels
from models_mae_pl import MODELS
from models_vit import MODELS as CLASSIFIERS
from util.train.amp import autocast

GRID, DIM, VISIBLE = (14, 14), 768, 49


def naive(head, x, ids):
    """Equations 7-9 as written: every pair concatenated, the MLP on each, the mean cross-entropy."""
    n, half = x.shape[1], x.shape[2] // 2
    pairs = torch.cat(
        [x[:, :, None, :half].expand(-1, n, n, -1), x[:, None, :, half:].expand(-1, n, n, -1)], -1
    )
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
        wait_for(x.device)

    return run


def swept(head, x, ids):
    return head(x, ids)["position"]


FORMS = {"obvious": naive, "swept": swept}


def measure_forms(keys, batch, rounds, device) -> dict:
    """{"rows": one for each (form, amp) in `keys`}, interleaved."""
    head = PositionalHead(DIM, GRID, Labels("rpl")).to(device)
    calls = {(form, amp): call(FORMS[form], head, batch, 196, amp, device) for form, amp in keys}
    settle = freed_memory(lambda key: key[0] == "swept", calls)
    seconds = interleaved(calls, rounds, clock=clock_for(device.type), prepare=settle)
    rows = []
    for (form, amp), s in seconds.items():
        settle((form, amp))
        rows.append(
            dict(
                form=form,
                amp=amp,
                batch_size=batch,
                ms=spread([1e3 * t for t in s]),
                round_seconds=s,
                peak_mib=peak_memory(calls[form, amp], device.type == "cuda"),
            )
        )
    if device.type == "cpu":
        settle(("swept", keys[0][1]))  # as in all that follows
    return dict(rows=rows)


def against_naive(amps, batch, rounds, device, record):
    """The obvious form needs some 0.7 GB an image in float32, so that only a small batch of it is run.

    On a GPU one form is measured after the other: if one does not fit into memory, the other remains.
    """
    keys = [(form, amp) for amp in amps for form in FORMS]
    one_by_one = device.type == "cuda"
    for group in [[key] for key in keys] if one_by_one else [keys]:
        found = unless_out_of_memory(lambda group=group: measure_forms(group, batch, rounds, device))
        if "rows" not in found:
            found = dict(rows=[dict(form=form, amp=amp, batch_size=batch, **found) for form, amp in group])
        for row in found["rows"]:
            record.add("forms", row)
    form_ratio = ratio_of_medians if one_by_one else ratio
    good = {(r["form"], r["amp"]): r for r in record.results["forms"] if "error" not in r}
    for (_, amp), row in good.items():
        if other := good.get(("obvious", amp)):
            row["times_obvious"] = form_ratio(other["round_seconds"], row["round_seconds"])
    record.write()


def memory(amps, batches, device, record):
    """What the swept form takes at growing batches, the gradient of its input (B, 196, 768) included."""
    head = PositionalHead(DIM, GRID, Labels("rpl")).to(device)

    def measure(amp, batch):
        run = call(swept, head, batch, 196, amp, device)
        if batch == batches[0]:
            run()
        return dict(peak_mib=peak_memory(run, device.type == "cuda"))

    for amp in amps:
        for batch in batches:
            found = unless_out_of_memory(lambda amp=amp, batch=batch: measure(amp, batch))
            record.add(
                "memory", dict(amp=amp, batch_size=batch, input_mib=batch * 196 * DIM * 4 / 2**20, **found)
            )


def measure_shares(name, amp, batch, rounds, device) -> dict:
    """{"rows": all pairs and 8 of them} against the step of a ViT-B/16, as an MAE or a classifier."""
    images = torch.randn(batch, 3, 224, 224, device=device)
    if name == "MAE":
        model, tokens = MODELS["mae_vit_base_patch16"](pos_label="none").to(device), VISIBLE
        step = Step(model, lambda x: model(x, want_pred=False)[0]["pixel"], images, amp)
    else:
        model, tokens = CLASSIFIERS["vit_base_patch16"]().to(device), 196
        target = torch.zeros(batch, dtype=torch.int64, device=device)
        step = Step(model, lambda x: F.cross_entropy(model(x).float(), target), images, amp)
    calls = {"step": step}
    for pairs in (0, 8):
        head = PositionalHead(DIM, GRID, Labels("rpl", rpl_pairs=pairs)).to(device)
        calls[pairs] = call(swept, head, batch, tokens, amp, device)
    seconds = interleaved(calls, rounds, clock=clock_for(device.type))
    step_mib = peak_memory(calls["step"], device.type == "cuda")
    return dict(
        rows=[
            dict(
                model=name,
                amp=amp,
                tokens=tokens,
                pairs=pairs or "all",
                batch_size=batch,
                ms=spread([1e3 * t for t in seconds[pairs]]),
                step_ms=spread([1e3 * t for t in seconds["step"]]),
                share=ratio(seconds[pairs], seconds["step"]),
                peak_mib=peak_memory(calls[pairs], device.type == "cuda"),
                step_mib=step_mib,
            )
            for pairs in (0, 8)
        ]
    )


def shares(amps, batch, rounds, device, record):
    """Heads against the step that they are added to: 49 visible tokens in MAE, 196 in a classifier."""
    for amp in amps:
        for name in ("MAE", "classifier"):
            found = unless_out_of_memory(
                lambda name=name, amp=amp: measure_shares(name, amp, batch, rounds, device)
            )
            if "rows" not in found:
                found = dict(rows=[dict(model=name, amp=amp, batch_size=batch, **found)])
            for row in found["rows"]:
                record.add("shares", row)


def mib(row, name="peak_mib"):
    """As text; empty where the row has no such figure, nan where the system does not tell."""
    return f"{row[name]:.0f}" if name in row else ""


def main(argv, record: Record | None = None) -> dict:
    parser = argparse.ArgumentParser(prog="run.py rpl", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--amp", nargs="+", choices=["fp32", "bf16", "fp16"], help="fp32 and bf16 on a CPU, bf16 on a GPU"
    )
    parser.add_argument(
        "--naive_batch", type=int, default=2, help="batch of the comparison with the obvious form"
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[2, 8, 32], help="of the memory table")
    parser.add_argument("--step_batch", type=int, default=4, help="batch of the shares of a step")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    device, record = choose_device(args.device), record or Record()
    amps = args.amp or (["bf16"] if device.type == "cuda" else ["fp32", "bf16"])
    torch.manual_seed(0)
    print("times are wall time on a GPU, and CPU time of all threads on a CPU")
    results = record.results
    against_naive(amps, args.naive_batch, args.rounds, device, record)
    print(
        f"\nall 38,416 pairs of 196 tokens, forward and backward, batch {args.naive_batch}, median [min..max]"
    )
    print(
        table(
            [
                dict(
                    form=r["form"],
                    amp=r["amp"],
                    ms=r.get("error") or shown(r["ms"]),
                    **{"times obvious": shown(r.get("times_obvious")), "peak MiB": mib(r)},
                )
                for r in results["forms"]
            ]
        ),
        flush=True,
    )
    memory(amps, args.batch_sizes, device, record)
    print("\nswept, growing batches")
    print(
        table(
            [
                dict(
                    amp=r["amp"],
                    batch=r["batch_size"],
                    **{
                        "peak MiB": r.get("error") or mib(r),
                        "input and as much again for its gradient, MiB": round(2 * r["input_mib"]),
                    },
                )
                for r in results["memory"]
            ]
        ),
        flush=True,
    )
    shares(amps, args.step_batch, args.rounds, device, record)
    print(f"\nas a share of a ViT-B/16 step without labels, batch {args.step_batch}")
    print(table([share_line(r) for r in results["shares"]]))
    return results


def share_line(row):
    line = dict(model=row["model"], amp=row["amp"], tokens=row.get("tokens", ""), pairs=row.get("pairs", ""))
    if "error" in row:
        return line | {"ms": row["error"], "step ms": "", "% of the step": "", "peak MiB": "", "step's": ""}
    percent = {k: 100 * v for k, v in row["share"].items()}
    return line | {
        "ms": shown(row["ms"]),
        "step ms": shown(row["step_ms"]),
        "% of the step": shown(percent, 1),
        "peak MiB": mib(row),
        "step's": mib(row, "step_mib"),
    }
