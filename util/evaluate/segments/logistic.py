"""Logistic regression on patches: one problem for each source of features and each penalty (CAPI, 2025).

A linear probe that is trained by gradient steps depends on rates and epochs. These problems are convex, and
each has one solution.

Shapes: n patches, d features, K classes, S strengths, B images, (h, w) patches of an image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from util import dist
from util.data.contract import Batches
from util.data.loading.memory import available_memory
from util.data.segments.dataset import SegmentDataset
from util.evaluate.segments.patch_memory import PatchMemory
from util.evaluate.segments.sources import Probes, Sources, training_patches
from util.train.setup import Setup

# Largest entry of the gradient at which a problem counts as solved: that of scikit-learn. Products in float32
# do not get far below it.
TOLERANCE = 1e-4
MOST_UPDATES = 1000
# Rows that are read at a time, and bytes of their logits.
_ROWS = 65536
_LOGIT_BYTES = 64 * 2**20


class PatchSample(PatchMemory):
    """A `PatchMemory` that keeps features as they are: their length may tell something."""

    unit_length = False


def sample_patches(
    sources: Sources, loader: Batches[SegmentDataset], setup: Setup, capacity: int, seed: int
) -> PatchSample:
    """Return a random sample of the patches of all training images, the same on all ranks.

    Its features are those of all sources, one behind the other. Patches whose pixels are all ignored are left
    out. The loader has each image once, of one size, and masks of that size. Raises ValueError if no patch
    counts, and if the sample does not fit into the memory of the host.
    """
    widths = sources.widths()
    width = sum(widths)
    classes = len(loader.dataset.classes)
    cells = sources.backbone.grid[0] * sources.backbone.grid[1]
    capacity = min(capacity, cells * len(loader.dataset))
    # One source at a time is copied.
    needed = 4 * ((width + classes) * (capacity + capacity // 8) + (max(widths) + classes) * capacity)
    left = available_memory()
    if setup.device.type == "cpu" and needed > left:
        raise ValueError(
            f"{capacity} patches of {width} features would take {needed / 1e9:.1f} GB, and {left / 1e9:.1f} "
            "GB are left: lower `knn_memory`, or leave `controls` out"
        )
    # Shares of pixels need not be exact in float16, and then they would not add up to 1.
    exact = torch.float32
    sample = PatchSample(width, classes, capacity, setup.device, None, seed, False, label_dtype=exact)
    for maps, labels, numbers in training_patches(sources, loader, setup):
        sample.add(maps, labels, numbers)
    sample.gather()
    if not len(sample):
        raise ValueError("there is nothing to learn: all pixels of the training masks are ignored")
    return sample


@dataclass(frozen=True)
class Solution:
    """The solution of one problem: weights (K, d) and biases (K,) in float64, for standardised features.

    Attributes:
        updates: the number of updates that it took.
        slope: the largest entry of the gradient, in absolute value.
    """

    weight: Tensor
    bias: Tensor
    updates: int
    slope: float


def solve(
    features: Tensor,
    labels: Tensor,
    strengths: Sequence[float],
    tolerance: float = TOLERANCE,
    most: int = MOST_UPDATES,
) -> list[Solution]:
    """Return the solution for each of the inverse penalties `strengths` (S,), in this order.

    Minimised is the mean cross-entropy of features (n, d) with soft labels (n, K), whose rows add up to 1,
    plus ||W||^2 / (2 C n) with the strength C. Biases are not penalised. With hard labels it is the problem
    of scikit-learn's LogisticRegression(C=C). L-BFGS starts at the solution before, so rising strengths are
    the fastest. Updates end at a gradient of `tolerance`, where rounding hides any progress, or after `most`.
    """
    # With the patches of a class side by side, which is faster on a CPU.
    columns = labels.t().contiguous()
    weights = torch.zeros(labels.shape[1], features.shape[1] + 1, dtype=torch.float64)
    found = []
    for strength in strengths:
        problem = Problem(features, columns, 1 / (strength * len(features)))
        updates = problem.descend(weights, tolerance, most)
        slope = float(problem(weights)[1].abs().max())
        found.append(Solution(weights[:, :-1].clone(), weights[:, -1].clone(), updates, slope))
    return found


@dataclass(frozen=True)
class Problem:
    """A loss of weights (K, d + 1) float64 on the CPU, the last of them biases, and its gradient.

    Features are (n, d) and soft labels (K, n). Products have the precision of the features; their sums over
    chunks of patches are float64. The optimizer's few vectors stay on the CPU, because some devices have no
    float64.
    """

    features: Tensor
    labels: Tensor
    penalty: float

    def __call__(self, weights: Tensor) -> tuple[float, Tensor]:
        """Return the loss and the gradient (K, d + 1)."""
        weight = weights[:, :-1].to(self.features)
        bias = weights[:, -1].to(self.features)
        gradient = torch.zeros_like(weights)
        losses = []
        rows = max(1, min(_ROWS, _LOGIT_BYTES // (4 * len(weights))))
        for x, y in zip(self.features.split(rows), self.labels.split(rows, dim=1)):
            logits = torch.addmm(bias[:, None], weight, x.t())  # (K, rows)
            log_sum = logits.logsumexp(0)
            losses.append(log_sum - (y * logits).sum(0))
            # The gradient of a patch's logits is its probabilities, less its labels.
            slope = logits.sub_(log_sum).exp_().sub_(y)
            gradient[:, :-1] += (slope @ x).cpu()
            gradient[:, -1] += slope.sum(1).cpu()
        gradient /= len(self.features)
        gradient[:, :-1] += self.penalty * weights[:, :-1]
        # The line search compares losses that are nearly equal.
        mean = float(torch.cat(losses).cpu().double().mean())
        return mean + self.penalty / 2 * float(weights[:, :-1].square().sum()), gradient

    def descend(self, weights: Tensor, tolerance: float, most: int) -> int:
        """Bring weights (K, d + 1) to the lowest loss, in place; return the number of updates."""
        optimizer = torch.optim.LBFGS(
            [weights],
            max_iter=most,
            max_eval=10 * most,
            tolerance_grad=tolerance,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def loss() -> float:
            value, weights.grad = self(weights)
            return value

        optimizer.step(loss)
        weights.grad = None
        return optimizer.state[weights]["n_iter"]


@torch.no_grad()
def fit_probes(sources: Sources, sample: PatchSample, strengths: Sequence[float]) -> tuple[Probes, list[str]]:
    """Return a head for each source and each of the rising strengths, the same on all ranks, and a note for
    each source about the updates that they took.

    Each rank solves the problems of some sources.
    """
    widths = sources.widths()
    labels = sample.labels
    probes = Probes(widths, labels.shape[1], len(strengths), sources.projection)
    probes = probes.to(labels.device).eval().requires_grad_(False)
    parts = sample.features.split(widths, dim=1)
    notes: dict[str, str] = {}
    for i, (name, dense) in enumerate(zip(sources.names, probes.dense)):
        if i % dist.world_size() == dist.rank():
            solutions = _solve_source(dense, parts[i], labels, strengths)
            notes[name] = f"{name}: {describe(strengths, solutions)}"
        else:
            for value in _values(dense):
                value.zero_()
    # A sum of one number and zeros is exact.
    for dense in probes.dense:
        for value in _values(dense):
            dist.sum_over_ranks(value)
    for of_rank in dist.gather_objects(notes):
        notes |= of_rank
    return probes, [notes[name] for name in sources.names]


def _values(dense: Any) -> list[Tensor]:
    """The mean and the variance of a `DenseProbe`, and the weights and biases of its heads."""
    norm, *heads = dense.head
    return [norm.running_mean, norm.running_var, *(p.data for head in heads for p in head.parameters())]


def _solve_source(dense: Any, features: Tensor, labels: Tensor, strengths: Sequence[float]) -> list[Solution]:
    """Write the solutions for the features (n, d) of a source into its `DenseProbe`, and return them."""
    mean, variance, *heads = _values(dense)
    mean.copy_(_mean(features, lambda x: x))
    variance.copy_(_mean(features, lambda x: (x - mean).square()))
    # As the probe does it.
    scaled = (features - mean).div_((variance + dense.head[0].eps).sqrt())
    # TF32 is too coarse for the gradients that end the search.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(features.device.type, enabled=False):
            solutions = solve(scaled, labels, strengths)
    finally:
        torch.set_float32_matmul_precision(precision)
    for weight, bias, solution in zip(heads[::2], heads[1::2], solutions):
        weight.copy_(solution.weight[:, :, None, None])
        bias.copy_(solution.bias)
    return solutions


def _mean(features: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean (d,) float64 over patches of a function of features (n, d)."""
    sums = [function(x).sum(0).cpu().double() for x in features.split(_ROWS)]
    return torch.stack(sums).sum(0) / len(features)


def describe(strengths: Sequence[float], solutions: Sequence[Solution]) -> str:
    """Return the number of updates at each strength as text, and which problems are not solved."""
    parts = []
    for strength, solution in zip(strengths, solutions):
        text = f"C {strength:g} {solution.updates}"
        if solution.slope > TOLERANCE:
            text += f" (not converged: gradient {solution.slope:.1e})"
        parts.append(text)
    return f"updates at {', '.join(parts)}"


def logits_of(sources: Sources, probes: Probes) -> Callable[[Tensor], Tensor]:
    """Return a function from images (B, C, H, W) to the logits of all heads, (B, G * K, h, w)."""
    return lambda images: probes(sources(images)).transpose(0, 1).flatten(1, 2)
