"""SERE's spatial loss: features sampled before the relation is formed, against the paper's order, after it.

    python benchmarks/run.py self_relation [--device cuda] [--batch 4]

Two global and ten local crops. Time of forward and backward, and memory that the forward
pass keeps for backward.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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
from layers.self_relation import overlap_points, sample_tokens, spatial_loss, spatial_relation

# Grids of the token maps, and of the sampled points of a pair of global crops. A pair with a local crop has
# as many points as the local crop has tokens.
GLOBAL = (14, 14)
LOCAL = (6, 6)
POINTS = (13, 13)
# Numbers of crops.
GLOBALS = 2
LOCALS = 10
TEACHER_TEMPERATURE = 0.5


@dataclass(frozen=True)
class Views:
    """Token maps of all crops: of the student (B, N, C) each, of the teacher for global crops, and the boxes.

    `boxes` (B, views, 5) are those of `layers.self_relation`.
    """

    student: list[Tensor]
    teacher: list[Tensor]
    boxes: Tensor
    heads: int


@dataclass(frozen=True)
class Pair:
    """A teacher view and a student view, by index, and the same points (B, S, 2) in each of them."""

    teacher: int
    student: int
    teacher_points: Tensor
    student_points: Tensor

    @property
    def student_grid(self) -> tuple[int, int]:
        """Grid of the student's tokens."""
        if self.student < GLOBALS:
            return GLOBAL
        return LOCAL


def pairs(boxes: Tensor) -> Iterator[Pair]:
    """All pairs of a teacher view with another student view."""
    for t in range(GLOBALS):
        for s in range(boxes.shape[1]):
            if s == t:
                continue
            size = LOCAL
            if s < GLOBALS:
                size = POINTS
            student_points, teacher_points, _ = overlap_points(boxes[:, s], boxes[:, t], size)
            yield Pair(t, s, teacher_points, student_points)


def features_first(views: Views) -> Tensor:
    """The loss in our order: features are sampled, then related."""
    losses = []
    for pair in pairs(views.boxes):
        student = sample_tokens(views.student[pair.student], pair.student_grid, pair.student_points)
        teacher = sample_tokens(views.teacher[pair.teacher], GLOBAL, pair.teacher_points)
        losses.append(spatial_loss(student, teacher, views.heads))
    return torch.stack(losses).mean()


def sample_axis(relation: Tensor, grid: tuple[int, int], points: Tensor) -> Tensor:
    """Sample (B, heads, n, h*w) bilinearly along the last axis at points (B, S, 2) -> (B, heads, n, S)."""
    B, heads, n, _ = relation.shape
    maps = relation.reshape(B, heads * n, *grid)
    grid_points = points[:, :, None]  # (B, S, 1, 2)
    out = F.grid_sample(maps, grid_points, padding_mode="border", align_corners=False)  # (B, heads*n, S, 1)
    return out.reshape(B, heads, n, -1)


def sample_relation(relation: Tensor, grid: tuple[int, int], points: Tensor) -> Tensor:
    """Sample a relation (B, heads, N, N) along both axes -> (B, heads, S, S)."""
    keys = sample_axis(relation, grid, points)  # (B, heads, N, S)
    return sample_axis(keys.transpose(2, 3), grid, points).transpose(2, 3)  # (B, heads, S, S)


def relation_first(views: Views) -> Tensor:
    """The loss in the paper's order: features are related, then the relation is sampled."""
    # Each map has one relation, which all its pairs sample.
    student = [spatial_relation(x, views.heads) for x in views.student]
    teacher = [spatial_relation(x, views.heads).detach() for x in views.teacher]
    losses = []
    for pair in pairs(views.boxes):
        logits = sample_relation(student[pair.student], pair.student_grid, pair.student_points)
        target = sample_relation(teacher[pair.teacher], GLOBAL, pair.teacher_points) / TEACHER_TEMPERATURE
        losses.append(-(target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean((1, 2)))
    return torch.stack(losses).mean()


FORMS: dict[str, Callable[[Views], Tensor]] = {
    "features sampled, then related": features_first,
    "related, then sampled": relation_first,
}


def seconds(form: Callable[[Views], Tensor], views: Views, repeats: int) -> list[float]:
    """Seconds of forward and backward, after one warm-up."""
    # Gradients add up in the tokens, which costs the same in both forms.
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        form(views).backward()
        wait_for(views.boxes.device)
        times.append(time.perf_counter() - start)
    return times[1:]


def measure(name: str, views: Views, repeats: int) -> dict:
    """A row for a form: milliseconds, and MiB that it keeps for backward."""
    form = FORMS[name]
    times = seconds(form, views, repeats)
    kept = kept_for_backward(lambda: form(views), [*views.student, *views.teacher])
    return {
        "form": name,
        "ms_median": 1e3 * statistics.median(times),
        "ms_min": 1e3 * min(times),
        "ms_max": 1e3 * max(times),
        "kept_mb": kept / MIB,
    }


def random_views(batch: int, dim: int, heads: int, device: torch.device) -> Views:
    """Random tokens, and random crops that overlap."""
    grids = [GLOBAL] * GLOBALS + [LOCAL] * LOCALS
    student = [torch.randn(batch, h * w, dim, device=device, requires_grad=True) for h, w in grids]
    teacher = [torch.randn(batch, GLOBAL[0] * GLOBAL[1], dim, device=device) for _ in range(GLOBALS)]
    # Pixels of the source image. Corners are closer to each other than a crop is wide.
    sides = [[300.0, 250.0]] * GLOBALS + [[120.0, 100.0]] * LOCALS
    side = torch.tensor(sides).expand(batch, -1, -1)
    corner = torch.rand(batch, GLOBALS + LOCALS, 2) * torch.tensor([200.0, 125.0])
    flipped = torch.rand(batch, GLOBALS + LOCALS, 1).round()
    boxes = torch.cat([corner, side, flipped], -1).to(device)  # (B, views, 5)
    return Views(student, teacher, boxes, heads)


def difference(views: Views) -> float:
    """Difference of the losses of both forms. It is an error if rounding does not explain it."""
    # Both forms compute the same function: sampling is linear.
    losses = [float(form(views).detach()) for form in FORMS.values()]
    tolerance = 1e-4
    # Products in TF32 on a GPU.
    if views.boxes.is_cuda:
        tolerance = 1e-2
    found = abs(losses[0] - losses[1])
    assert found < tolerance, losses
    return found


def shown_row(row: dict) -> dict[str, str]:
    """A row of the printed table."""
    line = dict.fromkeys(("form", "median ms", "min", "max", "kept MiB"), "")
    line["form"] = row["form"]
    if "error" in row:
        line["median ms"] = row["error"]
        return line
    line["median ms"] = f"{row['ms_median']:.1f}"
    line["min"] = f"{row['ms_min']:.1f}"
    line["max"] = f"{row['ms_max']:.1f}"
    line["kept MiB"] = f"{row['kept_mb']:.1f}"
    return line


def get_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    p = argparse.ArgumentParser(
        prog="run.py self_relation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default=default_device())
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--dim", type=int, default=384)
    p.add_argument("--heads", type=int, default=6)
    p.add_argument("--repeats", type=int, default=10)
    return p


def main(argv: list[str], record: Record | None = None) -> dict:
    """Measure and print both forms. Returns the figures."""
    args = get_parser().parse_args(argv)
    record = record or Record()
    torch.manual_seed(0)
    device = choose_device(args.device)
    views = random_views(args.batch, args.dim, args.heads, device)
    differ = difference(views)
    record.results |= {"batch": args.batch, "dim": args.dim, "heads": args.heads, "device": device.type}
    for name in FORMS:
        found = unless_out_of_memory(partial(measure, name, views, args.repeats))
        record.add("rows", {"form": name} | found)
    print(
        f"batch {args.batch}, {GLOBALS} global 14x14 and {LOCALS} local 6x6 maps of {args.dim} channels, "
        f"{args.heads} heads, {device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"losses differ by {differ:.1g}"
    )
    print(table([shown_row(row) for row in record.results["rows"]]))
    return record.results
