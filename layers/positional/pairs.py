"""The loss of relative labels, which never holds the logits of all pairs (Zhang et al. 2023, Eq. 7-9).

Shapes: B batch, n queries and m keys of an image, H hidden width, h w the grid, L = h*w cells; b images and r
    queries
of a chunk.
"""

import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.positional.kind import accumulator

# Pairs whose logits exist at the same time. On a 14x14 grid they take about 190 MB in float32 on a GPU, which
# needs large kernels. A CPU is faster if a chunk (8 MB) stays near its cache; a chunk then holds all 49 x 49
# pairs of an image in masked pretraining (benchmarks/README.md).
PAIRS_PER_CHUNK = {"cpu": 2_560, "cuda": 65_536}


def offset_codes(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """(L,) int64 codes c for which the relative label is y_ij = c[i] - c[j] + (h-1)*(2w-1) + (w-1).

    The label is linear in rows and columns, so one number per cell replaces an L x L table of labels.
    """
    h, w = grid
    cell = torch.arange(h * w, device=device)  # (L,)
    return cell.div(w, rounding_mode="floor") * (2 * w - 1) + cell % w


def num_offsets(grid: tuple[int, int]) -> int:
    """Number of relative labels, (2h-1)*(2w-1)."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def relative_labels(grid: tuple[int, int], query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Offset label of each ordered pair (Eq. 8): cells (B, n) and (B, m) -> (B, n, m) int64."""
    return PairLabels.of(grid, query_ids, key_ids).part(slice(None), slice(None))


class PairLabels(NamedTuple):
    """The offset labels of all pairs of a batch in factored form.

    Attributes:
        query_codes: (B, n) codes of the queries' cells.
        key_codes: (B, m) codes of the keys' cells.
        centre: the label of a pair with i = j.
    """

    query_codes: Tensor
    key_codes: Tensor
    centre: int

    @classmethod
    def of(cls, grid: tuple[int, int], query_ids: Tensor, key_ids: Tensor) -> "PairLabels":
        """The labels for cells (B, n) and (B, m)."""
        codes = offset_codes(grid, query_ids.device)
        return cls(codes[query_ids], codes[key_ids], (num_offsets(grid) - 1) // 2)

    def part(self, images: slice, rows: slice) -> Tensor:
        """The labels of some images and some of their queries, (b, r, m)."""
        return self.query_codes[images, rows][:, :, None] - self.key_codes[images][:, None, :] + self.centre


class _SweptPairLoss(torch.autograd.Function):
    """Sum of -log p(y_ij) over pairs, and the number of correct predictions.

    One sweep over chunks of pairs computes the loss and the gradients together: g = gelu(q_i + k_j), logits =
    g W^T + b, d_logits = softmax - onehot. Only the finished gradients are kept for backward. They are in
    float32, even if the products are not, and unscaled: a mean over B*n*m pairs inside the sweep
    would underflow in float16.
    """

    @staticmethod
    def forward(ctx, q, k, weight, bias, labels: PairLabels, with_grad: bool):
        n = q.shape[1]
        m = k.shape[1]
        offsets = len(weight)
        # (2h-1)(2w-1) is odd, which slows products down; classes of probability zero make it a
        # multiple of 16.
        weight = F.pad(weight, (0, 0, 0, -offsets % 16))
        bias = F.pad(bias, (0, -offsets % 16), value=-math.inf)
        loss = torch.zeros((), device=q.device, dtype=accumulator(q.dtype))
        right = torch.zeros((), device=q.device, dtype=torch.int64)
        grads: list[Tensor] = []
        if with_grad:
            grads = [torch.zeros_like(t, dtype=accumulator(t.dtype)) for t in (q, k, weight, bias)]
        run_chunk: Callable[..., tuple[Tensor, ...]] = _pair_chunk
        if q.is_cuda:
            run_chunk = _chunk_on_cuda
        for images, rows in _chunks(len(q), n, m, q.device):
            label = labels.part(images, rows).flatten()  # (b*r*m,)
            chunk = run_chunk(q[images, rows], k[images], weight, bias, label, with_grad)
            loss += chunk[0]
            right += chunk[1]
            if with_grad:
                grads[0][images, rows] += chunk[2]
                grads[1][images] += chunk[3]
                grads[2] += chunk[4]
                grads[3] += chunk[5]
        # The gradients of the padding are dropped.
        ctx.save_for_backward(*grads[:2], *(grad[:offsets] for grad in grads[2:]))
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx, d_loss, _):
        dq, dk, dw, db = (grad * d_loss for grad in ctx.saved_tensors)
        return dq, dk, dw, db, None, None


def _chunks(batch: int, n: int, m: int, device: torch.device) -> list[tuple[slice, slice]]:
    """Slices of images and of queries that divide B*n*m pairs into chunks of at most PAIRS_PER_CHUNK."""
    # Every accelerator has the large chunks.
    pairs = PAIRS_PER_CHUNK["cuda"]
    if device.type == "cpu":
        pairs = PAIRS_PER_CHUNK["cpu"]
    images = images_per_chunk(batch, max(1, pairs // (n * m)), even=device.type == "cuda")
    # A single image may have more pairs than a chunk holds: then its queries are divided, too.
    rows = min(n, max(1, pairs // m))
    return [
        (slice(i, i + images), slice(r, r + rows)) for i in range(0, batch, images) for r in range(0, n, rows)
    ]


def _pair_chunk(q, k, weight, bias, label, with_grad):
    """One chunk: q (b, r, H), k (b, m, H), label (b*r*m,) -> sum of losses, number of correct predictions.

    With `with_grad`, the gradients of q, k, W and b follow.
    """
    b, r, hidden = q.shape
    m = k.shape[1]
    pre = (q[:, :, None] + k[:, None]).reshape(-1, hidden)  # (b*r*m, H)
    g = F.gelu(pre)
    logits = F.linear(g, weight, bias).to(accumulator(q.dtype))  # (b*r*m, offsets)
    top, answer = logits.max(dim=-1, keepdim=True)  # (b*r*m, 1)
    right = (answer[:, 0] == label).sum()
    # In place from here: apart from products, a sweep spends its time on memory and memory traffic.
    logits = logits.sub_(top)
    target = logits.gather(1, label[:, None])  # (b*r*m, 1)
    z = logits.exp_().sum(-1, keepdim=True)  # (b*r*m, 1)
    loss = (z.log() - target).sum()
    if not with_grad:
        return loss, right
    # The softmax.
    d_logits = logits.div_(z)
    if torch.compiler.is_compiling():
        # A comparison fuses with its neighbours, a scatter does not.
        classes = torch.arange(logits.shape[1], device=logits.device)
        d_logits = d_logits - (classes == label[:, None]).to(logits.dtype)
    else:
        d_logits.scatter_add_(1, label[:, None], d_logits.new_full((len(label), 1), -1.0))
    db = d_logits.sum(0)  # (offsets,)
    d_logits = d_logits.to(g.dtype)
    dw = d_logits.t() @ g  # (offsets, H)
    # Each large tensor is freed as soon as it is no longer needed.
    del g
    d_g = d_logits @ weight  # (b*r*m, H)
    del logits, d_logits
    d_pre = torch.ops.aten.gelu_backward(d_g, pre).reshape(b, r, m, hidden)
    acc = accumulator(q.dtype)
    return loss, right, d_pre.sum(2, dtype=acc), d_pre.sum(1, dtype=acc), dw, db


def images_per_chunk(batch: int, most: int, even: bool) -> int:
    """Number of images whose pairs make a chunk, at most `most`.

    With `even` it is the largest number that divides the batch, unless that is less than half of `most`:
    chunks of the same shape are compiled once.
    """
    most = min(most, batch)
    if not even:
        return most
    divisor = max((i for i in range(1, most + 1) if batch % i == 0), default=1)
    if 2 * divisor >= most:
        return divisor
    return most


# Made at the first call on CUDA; False after compiling has failed.
_compiled_chunk: Callable[..., tuple[Tensor, ...]] | Literal[False] | None = None


def _chunk_on_cuda(q, k, weight, bias, label, with_grad):
    """`_pair_chunk`, compiled; if compiling fails, it warns once and runs eagerly.

    Pointwise work and reductions fuse, so that a float32 copy of bf16 logits never reaches the device's
    memory. The loop over chunks stays in Python. Chunks without gradients, which evaluation has in many
    shapes, run eagerly: each shape would be compiled.
    """
    global _compiled_chunk
    if with_grad and _compiled_chunk is None:
        _compiled_chunk = torch.compile(_pair_chunk, dynamic=False)
    if with_grad and _compiled_chunk:
        try:
            return _compiled_chunk(q, k, weight, bias, label, with_grad)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, no Triton: the types are many
            _compiled_chunk = False
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"relative labels run uncompiled, and slower: torch.compile failed ({reason})", stacklevel=2
            )
    return _pair_chunk(q, k, weight, bias, label, with_grad)


# Dynamo would unroll the loop over chunks into the graph: thousands of nodes, and minutes of compiling.
@torch.compiler.disable
def pair_loss(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    query_ids: Tensor,
    key_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of gelu(q_i + k_j) W^T + b over all pairs (Eq. 9), and accuracy.

    q (B, n, H), k (B, m, H), W (offsets, H), b (offsets,); cells query_ids (B, n), key_ids (B, m). The memory
    in addition to the gradients of the inputs does not grow with B, n or m.
    """
    labels = PairLabels.of(grid, query_ids, key_ids)
    with_grad = torch.is_grad_enabled()
    with torch.autocast(q.device.type, enabled=False):
        loss, right = _SweptPairLoss.apply(
            q, k.to(q.dtype), weight.to(q.dtype), bias.to(q.dtype), labels, with_grad
        )
    pairs = q.shape[0] * q.shape[1] * k.shape[1]
    return loss / pairs, right / pairs
