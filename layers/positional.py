"""Positional labels: tokens learn to say where they come from (Zhang et al., AAAI 2023, arXiv 2206.04981).

Absolute labels (APL, Eq. 1-6): a token is classified into its cell of the grid. Relative labels (RPL, Eq. 7-9): every
ordered pair of tokens is classified into its 2-D offset. Cells are numbered row by row.

Shapes: B batch, n tokens given (all of the grid, or the visible ones), D width, h w the grid, L = h*w cells.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Pairs whose logits exist at one time. On a 14x14 grid that is about 190 MB in float32 on a GPU, which wants large
# kernels; a CPU is faster where a chunk (8 MB) stays near its cache, and holds all 49 x 49 pairs of an MAE's image
# (benchmarks/README.md).
PAIRS_PER_CHUNK = {"cpu": 2_560, "cuda": 65_536}


def offset_codes(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """(L,) int64 codes c with relative label y_ij = c[i] - c[j] + (h-1)*(2w-1) + (w-1).

    The label is linear in rows and columns, so that one number per cell replaces an L x L table of labels.
    """
    h, w = grid
    cell = torch.arange(h * w, device=device)
    return cell.div(w, rounding_mode="floor") * (2 * w - 1) + cell % w


def num_offsets(grid: tuple[int, int]) -> int:
    """Number of relative labels, (2h-1)*(2w-1)."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def relative_labels(grid: tuple[int, int], query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Offset label of each ordered pair (Eq. 8): cells (B, n) and (B, m) -> (B, n, m) int64."""
    codes = offset_codes(grid, query_ids.device)
    centre = (num_offsets(grid) - 1) // 2  # the label of i == j
    return codes[query_ids][:, :, None] - codes[key_ids][:, None, :] + centre


def apl_chance(grid: tuple[int, int]) -> tuple[float, float]:
    """(cross-entropy, accuracy) of guessing a cell: (ln L, 1/L)."""
    cells = grid[0] * grid[1]
    return math.log(cells), 1 / cells


def rpl_chance(grid: tuple[int, int], num_tokens: int) -> tuple[float, float]:
    """(cross-entropy, accuracy) of the best constant answer for all pairs of `num_tokens` randomly kept cells.

    Offsets are not equally frequent: (dr, dc) occurs (h-|dr|)(w-|dc|) times, and the pairs i = j are 1/n of all.
    """
    (h, w), n = grid, num_tokens
    cells = h * w
    if cells == 1:
        return 0.0, 1.0
    rows = h - torch.arange(-h + 1, h).abs().double()
    cols = w - torch.arange(-w + 1, w).abs().double()
    prior = rows[:, None] * cols[None, :] / (cells * (cells - 1)) * (1 - 1 / n)
    prior[h - 1, w - 1] = 1 / n
    prior = prior[prior > 0]  # n = 1 leaves nothing but i = j
    return float(-(prior * prior.log()).sum()), float(prior.max())


class _SweptPairLoss(torch.autograd.Function):
    """Sum of -log p(y_ij) over pairs, and the number of right answers, without ever holding all logits.

    One sweep over chunks of pairs forms loss and gradients together: g = gelu(q_i + k_j), logits = g W^T + b,
    d_logits = softmax - onehot. Nothing is kept for backward but the finished gradients, in float32 whatever the
    precision of the products, and unscaled: a mean over B*n*m pairs inside would underflow in float16.
    """

    @staticmethod
    def forward(ctx, q, k, weight, bias, query_codes, key_codes, centre, with_grad):
        B, n, hidden = q.shape
        m, offsets = k.shape[1], len(weight)
        # (2h-1)(2w-1) is odd, which slows products down; classes of probability zero make it a multiple of 16.
        weight = F.pad(weight, (0, 0, 0, -offsets % 16))
        bias = F.pad(bias, (0, -offsets % 16), value=-math.inf)
        loss = torch.zeros((), device=q.device, dtype=_accumulator(q.dtype))
        right = torch.zeros((), device=q.device, dtype=torch.int64)
        grads = (
            [torch.zeros_like(t, dtype=_accumulator(t.dtype)) for t in (q, k, weight, bias)]
            if with_grad
            else []
        )
        pairs = PAIRS_PER_CHUNK["cpu" if q.device.type == "cpu" else "cuda"]
        images = images_per_chunk(B, max(1, pairs // (n * m)), even=q.is_cuda)
        run_chunk = _chunk_on_cuda if q.is_cuda else _pair_chunk
        rows = n if n * m <= pairs else max(1, pairs // m)
        for i in range(0, B, images):
            for r in range(0, n, rows):
                part = slice(i, i + images), slice(r, r + rows)
                label = query_codes[part][:, :, None] - key_codes[part[0]][:, None, :] + centre
                chunk = run_chunk(q[part], k[part[0]], weight, bias, label.flatten(), with_grad)
                loss += chunk[0]
                right += chunk[1]
                if with_grad:
                    grads[0][part] += chunk[2]
                    grads[1][part[0]] += chunk[3]
                    grads[2] += chunk[4]
                    grads[3] += chunk[5]
        ctx.save_for_backward(*(g[:offsets] if i > 1 else g for i, g in enumerate(grads)))
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx, d_loss, _):
        dq, dk, dw, db = (g * d_loss for g in ctx.saved_tensors)
        return dq, dk, dw, db, None, None, None, None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pair_chunk(q, k, weight, bias, label, with_grad):
    """One chunk: q (b, r, H), k (b, m, H), label (b*r*m,) -> loss sum, number right[, gradients of q, k, W, b]."""
    b, r, hidden = q.shape
    m = k.shape[1]
    pre = (q[:, :, None] + k[:, None]).reshape(-1, hidden)  # (b*r*m, H)
    g = F.gelu(pre)
    logits = F.linear(g, weight, bias).to(_accumulator(q.dtype))  # (b*r*m, offsets)
    top, answer = logits.max(dim=-1, keepdim=True)
    right = (answer[:, 0] == label).sum()
    logits = logits.sub_(
        top
    )  # from here in place: memory, and its traffic, is what a sweep spends beside products
    target = logits.gather(1, label[:, None])
    z = logits.exp_().sum(-1, keepdim=True)
    loss = (z.log() - target).sum()
    if not with_grad:
        return loss, right
    d_logits = logits.div_(z)  # softmax
    if torch.compiler.is_compiling():  # a comparison fuses with what is around it, a scatter does not
        d_logits = d_logits - (torch.arange(logits.shape[1], device=logits.device) == label[:, None]).to(
            logits.dtype
        )
    else:
        d_logits.scatter_add_(1, label[:, None], d_logits.new_full((len(label), 1), -1.0))
    db = d_logits.sum(0)
    d_logits = d_logits.to(g.dtype)
    dw = d_logits.t() @ g
    del g
    d_g = d_logits @ weight
    del logits, d_logits  # of these tensors no more live at one time than must
    d_pre = torch.ops.aten.gelu_backward(d_g, pre).reshape(b, r, m, hidden)
    acc = _accumulator(q.dtype)
    return loss, right, d_pre.sum(2, dtype=acc), d_pre.sum(1, dtype=acc), dw, db


def images_per_chunk(batch: int, most: int, even: bool) -> int:
    """Images whose pairs make a chunk, at most `most`. With `even` it is the largest number that divides the batch, unless
    that is less than half of `most`: chunks of one shape are compiled once."""
    most = min(most, batch)
    if not even:
        return most
    divisor = next((i for i in range(most, 0, -1) if batch % i == 0), 1)
    return divisor if 2 * divisor >= most else most


_compiled_chunk = None  # made at the first call on CUDA; False where compiling has failed


def _chunk_on_cuda(q, k, weight, bias, label, with_grad):
    """`_pair_chunk`, compiled: its pointwise work and its reductions fuse, so that a float32 copy of bf16 logits never
    reaches the device's memory. The loop over chunks stays Python.

    Chunks without gradients are those of evaluation, of many shapes, each of which would be compiled: they stay eager.
    Where nothing can be compiled, a warning, and eager.
    """
    global _compiled_chunk
    if with_grad and _compiled_chunk is None:
        _compiled_chunk = torch.compile(_pair_chunk, dynamic=False)
    if with_grad and _compiled_chunk:
        try:
            return _compiled_chunk(q, k, weight, bias, label, with_grad)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, no Triton: many types
            _compiled_chunk = False
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"relative labels run uncompiled, and slower: torch.compile failed ({reason})", stacklevel=2
            )
    return _pair_chunk(q, k, weight, bias, label, with_grad)


@torch.compiler.disable  # its loop over chunks would be unrolled into the graph: thousands of nodes, minutes of compiling
def pair_loss(q: Tensor, k: Tensor, weight: Tensor, bias: Tensor, grid, query_ids: Tensor, key_ids: Tensor):
    """Mean cross-entropy of gelu(q_i + k_j) W^T + b against the offset labels of all pairs (Eq. 9), and accuracy.

    q (B, n, H), k (B, m, H), W (offsets, H), b (offsets,); cells query_ids (B, n), key_ids (B, m).
    Memory beyond the gradients of the inputs does not grow with B, n or m.
    """
    codes = offset_codes(grid, q.device)
    centre = (num_offsets(grid) - 1) // 2
    with torch.autocast(q.device.type, enabled=False):
        loss, right = _SweptPairLoss.apply(
            q,
            k.to(q.dtype),
            weight.to(q.dtype),
            bias.to(q.dtype),
            codes[query_ids],
            codes[key_ids],
            centre,
            torch.is_grad_enabled(),
        )
    pairs = q.shape[0] * q.shape[1] * k.shape[1]
    return loss / pairs, right / pairs


class AbsoluteLabel(nn.Module):
    """APL (Sec. 3.1): first half of a token's channels -> Linear, GELU, Linear -> one of L cells.

    ``tokens="full"`` reads the whole token.
    """

    def __init__(self, dim: int, grid: tuple[int, int], tokens: str = "half"):
        super().__init__()
        self.grid, self.width = grid, dim // 2 if tokens == "half" else dim
        self.fc1 = nn.Linear(self.width, dim // 2)
        self.fc2 = nn.Linear(dim // 2, dim // 4)
        self.classifier = nn.Linear(dim // 4, grid[0] * grid[1])

    def logits(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, L)."""
        return self.classifier(self.fc2(F.gelu(self.fc1(x[..., : self.width]))))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, D), cells (B, n) -> mean cross-entropy in float32 (Eq. 5), accuracy."""
        logits = self.logits(x).flatten(0, 1)
        loss = F.cross_entropy(logits.to(_accumulator(logits.dtype)), ids.flatten())
        return loss, (logits.argmax(-1) == ids.flatten()).float().mean()


class RelativeLabel(nn.Module):
    """RPL (Sec. 3.2): first half of token i and second half of token j -> Linear, GELU, Linear -> one of the offsets.

    The first linear of a concatenated pair is the sum of two per-token projections, and nothing nonlinear stands
    between the last two linears, so that they act as one matrix; both are exact. ``pairs=N`` draws N partners per
    image and step for its queries, an unbiased estimate of Eq. 9; 0 takes all ordered pairs, i = j included.
    """

    def __init__(self, dim: int, grid: tuple[int, int], tokens: str = "half", pairs: int = 0):
        super().__init__()
        self.grid, self.pairs, self.half = grid, pairs, tokens == "half"
        self.fc1 = nn.Linear(dim if self.half else 2 * dim, dim // 2)
        self.fc2 = nn.Linear(dim // 2, dim // 2)
        self.classifier = nn.Linear(dim // 2, num_offsets(grid))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, D) -> query and key parts of the first linear, (B, n, D/2) each; the bias is in the query's."""
        split = self.fc1.in_features // 2
        left, right = (x[..., :split], x[..., -split:]) if self.half else (x, x)
        q = F.linear(left, self.fc1.weight[:, :split], self.fc1.bias)
        return q, F.linear(right, self.fc1.weight[:, split:])

    def merged(self) -> tuple[Tensor, Tensor]:
        """The second linear and the classifier as one matrix (offsets, D/2) and bias."""
        with torch.autocast(self.fc2.weight.device.type, enabled=False):
            weight = self.classifier.weight @ self.fc2.weight
            return weight, self.classifier.bias + self.classifier.weight @ self.fc2.bias

    def logits(self, x: Tensor) -> Tensor:
        """All pairs at once, (B, n, D) -> (B, n, n, offsets): for pictures and tests, not for training."""
        q, k = self.project(x)
        weight, bias = self.merged()
        return F.linear(F.gelu(q[:, :, None] + k[:, None]), weight.to(q.dtype), bias.to(q.dtype))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, D), cells (B, n) -> mean cross-entropy in float32 (Eq. 9), accuracy."""
        q, k = self.project(x)
        key_ids = ids
        if self.training and 0 < self.pairs < x.shape[1]:
            # One draw of partners serves all queries of an image: each query's partners are uniform, and keys need
            # no gather per query.
            drawn = torch.rand(ids.shape, device=x.device).argsort(dim=1)[:, : self.pairs]  # (B, N)
            k = k.gather(1, drawn.unsqueeze(-1).expand(-1, -1, k.shape[-1]))
            key_ids = ids.gather(1, drawn)
        weight, bias = self.merged()
        return pair_loss(q, k, weight, bias, self.grid, ids, key_ids)


class PositionalHead(nn.Module):
    """The label heads of a model: ``kind`` is 'apl', 'rpl' or 'apl+rpl'; with both, the losses are added.

    ``head(tokens, ids)`` takes patch tokens after the final norm (B, n, D) and their cells (B, n) and returns
    {name: scalar}: `position`, `position_acc`, and with both kinds the parts `apl`, `apl_acc`, `rpl`, `rpl_acc`.
    `ids` None means all cells in order.
    """

    def __init__(self, dim: int, grid: tuple[int, int], kind: str, tokens: str = "half", rpl_pairs: int = 0):
        super().__init__()
        kinds = kind.split("+")
        if not kinds or set(kinds) - {"apl", "rpl"} or len(set(kinds)) < len(kinds):
            raise ValueError(f"--pos_label takes none, apl, rpl or apl+rpl, found {kind!r}")
        if tokens not in ("half", "full"):
            raise ValueError(f"--pos_tokens takes half or full, found {tokens!r}")
        if dim % 4:
            raise ValueError(f"positional labels need a token width that is a multiple of 4, found {dim}")
        self.grid = grid
        if "apl" in kinds:
            self.apl = AbsoluteLabel(dim, grid, tokens)
        if "rpl" in kinds:
            self.rpl = RelativeLabel(dim, grid, tokens, rpl_pairs)
        self.apply(_init_head)

    @property
    def kinds(self) -> list[str]:
        return [name for name, _ in self.named_children()]

    def forward(self, x: Tensor, ids: Tensor | None = None) -> dict[str, Tensor]:
        if ids is None:
            ids = torch.arange(self.grid[0] * self.grid[1], device=x.device).expand(x.shape[0], -1)
        if x.shape[:2] != ids.shape:
            raise ValueError(f"tokens {tuple(x.shape)} and cells {tuple(ids.shape)} do not belong together")
        parts = {kind: getattr(self, kind)(x, ids) for kind in self.kinds}
        return _combine(parts)

    def chance(self, num_tokens: int) -> dict[str, float]:
        """Levels of guessing, by the names that `forward` returns, for `num_tokens` random cells."""
        parts = {
            kind: apl_chance(self.grid) if kind == "apl" else rpl_chance(self.grid, num_tokens)
            for kind in self.kinds
        }
        return _combine(parts)


def _combine(parts: dict) -> dict:
    """{kind: (loss, accuracy)} -> the summed loss and the mean accuracy, then the parts where there are several."""
    losses, accs = zip(*parts.values())
    out = {"position": sum(losses), "position_acc": sum(accs) / len(accs)}
    if len(parts) > 1:
        for kind, (loss, acc) in parts.items():
            out |= {kind: loss, f"{kind}_acc": acc}
    return out


def _init_head(module: nn.Module) -> None:
    """Truncated normal 0.02 and zero biases, as in the authors' Swin and the paper's reference code."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
