"""SERE's spatial loss with two global and ten local crops: features sampled before the relation is made, against the
relation made and then sampled, which is the paper's order. Time of forward and backward, and memory kept for backward.

    python benchmarks/run.py self_relation [--device cuda] [--batch 4]
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.timing import Record, choose_device, unless_out_of_memory, wait_for
from layers.self_relation import overlap_points, sample_tokens, spatial_loss, spatial_relation

GLOBAL, LOCAL, POINTS, LOCALS = (14, 14), (6, 6), (13, 13), 10


def pairs(boxes):
    """(teacher view, student view, points in the student's crop, points in the teacher's) of every pair, each (B, S, 2)."""
    for t in range(2):
        for s in range(boxes.shape[1]):
            if s != t:
                mine, theirs, _ = overlap_points(boxes[:, s], boxes[:, t], POINTS if s < 2 else LOCAL)
                yield t, s, mine, theirs


def features_first(student, teacher, boxes, heads):
    losses = []
    for t, s, mine, theirs in pairs(boxes):
        own = sample_tokens(student[s], GLOBAL if s < 2 else LOCAL, mine)
        losses.append(spatial_loss(own, sample_tokens(teacher[t], GLOBAL, theirs), heads))
    return torch.stack(losses).mean()


def sample_axis(relation, grid, points):
    """(B, heads, n, h*w) and points (B, S, 2) -> (B, heads, n, S), bilinear along the last axis."""
    B, heads, n, _ = relation.shape
    maps = relation.reshape(B, heads * n, *grid)
    out = F.grid_sample(
        maps, points[:, :, None], padding_mode="border", align_corners=False
    )  # (B, heads*n, S, 1)
    return out.reshape(B, heads, n, -1)


def sample_relation(relation, grid, points):
    keys = sample_axis(relation, grid, points)  # (B, heads, N, S)
    return sample_axis(keys.transpose(2, 3), grid, points).transpose(2, 3)  # (B, heads, S, S)


def relation_first(student, teacher, boxes, heads):
    own, taught = (
        [spatial_relation(x, heads) for x in student],
        [spatial_relation(x, heads).detach() for x in teacher],
    )
    losses = []
    for t, s, mine, theirs in pairs(boxes):
        logits = sample_relation(own[s], GLOBAL if s < 2 else LOCAL, mine)
        target = sample_relation(taught[t], GLOBAL, theirs) / 0.5
        losses.append(-(target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean((1, 2)))
    return torch.stack(losses).mean()


def kept_for_backward(function, *inputs) -> float:
    """Megabytes of distinct tensors that the graph of `function` holds beside its inputs."""
    known, kept = {x.untyped_storage().data_ptr() for xs in inputs[:2] for x in xs}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = function(*inputs)
    del loss
    return sum(kept.values()) / 2**20


def seconds(function, device, repeats: int, *inputs) -> list[float]:
    """Forward and backward, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function(*inputs).backward()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def measure(name, function, device, repeats, inputs) -> dict:
    times = seconds(function, device, repeats, *inputs)
    return {
        "form": name,
        "ms_median": 1e3 * statistics.median(times),
        "ms_min": 1e3 * min(times),
        "ms_max": 1e3 * max(times),
        "kept_mb": kept_for_backward(function, *inputs),
    }


def main(argv, record: Record | None = None) -> dict:
    p = argparse.ArgumentParser(
        prog="run.py self_relation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--dim", type=int, default=384)
    p.add_argument("--heads", type=int, default=6)
    p.add_argument("--repeats", type=int, default=10)
    args, record = p.parse_args(argv), record or Record()
    torch.manual_seed(0)
    device, B = choose_device(args.device), args.batch
    student = [
        torch.randn(B, h * w, args.dim, device=device, requires_grad=True)
        for h, w in [GLOBAL] * 2 + [LOCAL] * LOCALS
    ]
    teacher = [torch.randn(B, GLOBAL[0] * GLOBAL[1], args.dim, device=device) for _ in range(2)]
    side = torch.tensor([[300.0, 250.0]] * 2 + [[120.0, 100.0]] * LOCALS).expand(B, -1, -1)
    corner = torch.rand(B, 2 + LOCALS, 2) * torch.tensor([200.0, 125.0])
    boxes = torch.cat([corner, side, torch.rand(B, 2 + LOCALS, 1).round()], -1).to(device)
    inputs = (student, teacher, boxes, args.heads)

    values = [float(f(*inputs).detach()) for f in (features_first, relation_first)]
    tolerance = 1e-2 if device.type == "cuda" else 1e-4  # products in TF32
    assert abs(values[0] - values[1]) < tolerance, values
    record.results |= {"batch": B, "dim": args.dim, "heads": args.heads, "device": device.type}
    for name, function in (
        ("features sampled, then related", features_first),
        ("related, then sampled", relation_first),
    ):
        found = unless_out_of_memory(
            lambda name=name, function=function: measure(name, function, device, args.repeats, inputs)
        )
        record.add("rows", {"form": name} | found)
    print(
        f"batch {B}, 2 global 14x14 and {LOCALS} local 6x6 maps of {args.dim} channels, {args.heads} heads, {device.type}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; losses differ by {abs(values[0] - values[1]):.1g}"
    )
    print(f"{'form':32} {'median ms':>10} {'min':>8} {'max':>8} {'kept MB':>9}")
    for r in record.results["rows"]:
        if "error" in r:
            print(f"{r['form']:32} {r['error']}")
            continue
        print(
            f"{r['form']:32} {r['ms_median']:10.1f} {r['ms_min']:8.1f} {r['ms_max']:8.1f} {r['kept_mb']:9.1f}"
        )
    return record.results
