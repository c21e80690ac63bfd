"""Relative labels (RPL, Zhang et al. 2023, Sec. 3.2, Eq. 7-9): a pair is classified into its offset.

Shapes: B batch, n tokens given (all of the grid, or the visible ones), D width, h w the grid, L = h*w cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.contract import Labels
from layers.positional import pairs
from layers.positional.draws import Draws
from layers.positional.kind import LabelKind
from layers.positional.pairs import num_offsets


def rpl_chance(grid: tuple[int, int], num_tokens: int) -> tuple[float, float]:
    """(cross-entropy, accuracy) of the best constant answer for all pairs of `num_tokens` random cells."""
    h, w = grid
    cells = h * w
    if cells == 1:
        return 0.0, 1.0
    # Offsets are not equally frequent: (dr, dc) occurs (h-|dr|)(w-|dc|) times, and 1/n of all pairs have
    # i = j.
    rows = h - torch.arange(-h + 1, h).abs().double()  # (2h-1,)
    cols = w - torch.arange(-w + 1, w).abs().double()  # (2w-1,)
    prior = rows[:, None] * cols[None, :] / (cells * (cells - 1)) * (1 - 1 / num_tokens)  # (2h-1, 2w-1)
    prior[h - 1, w - 1] = 1 / num_tokens
    # A single token has no pair but i = j.
    prior = prior[prior > 0]
    return float(-(prior * prior.log()).sum()), float(prior.max())


class RelativeLabel(LabelKind):
    """First half of token i and second half of token j -> Linear, GELU, Linear -> one of the offsets.

    The first linear layer of a concatenated pair is the sum of two projections of single tokens. There is no
    nonlinearity between the last two linear layers, so they act as one matrix. Both rewritings are exact.
    With `rpl_pairs` N, the queries of an image share N partners drawn in each step, an unbiased estimate of
    Eq. 9; 0 takes all ordered pairs, those with i = j included.
    """

    name = "rpl"
    relative = True

    def __init__(self, dim: int, grid: tuple[int, int], options: Labels):
        super().__init__(dim, grid, options)
        self.pairs = options.rpl_pairs
        self.half_tokens = options.pos_tokens == "half"
        width = 2 * dim
        if self.half_tokens:
            width = dim
        self.fc1 = nn.Linear(width, dim // 2)
        self.fc2 = nn.Linear(dim // 2, dim // 2)
        self.classifier = nn.Linear(dim // 2, num_offsets(grid))

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, D) -> the query's and the key's part of the first linear layer, (B, n, D/2) each.

        The bias is in the query's part.
        """
        split = self.fc1.in_features // 2
        left = tokens
        right = tokens
        if self.half_tokens:
            left = tokens[..., :split]  # (B, n, D/2)
            right = tokens[..., -split:]  # (B, n, D/2)
        q = F.linear(left, self.fc1.weight[:, :split], self.fc1.bias)
        return q, F.linear(right, self.fc1.weight[:, split:])

    def merged(self) -> tuple[Tensor, Tensor]:
        """The second linear layer and the classifier as one matrix (offsets, D/2) and one bias (offsets,)."""
        with torch.autocast(self.fc2.weight.device.type, enabled=False):
            weight = self.classifier.weight @ self.fc2.weight
            return weight, self.classifier.bias + self.classifier.weight @ self.fc2.bias

    def logits(self, tokens: Tensor) -> Tensor:
        """All pairs at once, (B, n, D) -> (B, n, n, offsets): too much memory for training."""
        q, k = self.project(tokens)
        weight, bias = self.merged()
        return F.linear(F.gelu(q[:, :, None] + k[:, None]), weight.to(q.dtype), bias.to(q.dtype))

    def loss(self, tokens: Tensor, ids: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """(B, n, D), cells (B, n) -> mean cross-entropy in float32 (Eq. 9), accuracy."""
        q, k = self.project(tokens)
        key_ids = ids
        if self.training and 0 < self.pairs < tokens.shape[1]:
            # One draw of partners serves all queries of an image: each query's partners are uniform, and keys
            # need no gather per query.
            drawn = torch.rand(ids.shape, device=tokens.device).argsort(dim=1)[:, : self.pairs]  # (B, N)
            k = k.gather(1, drawn.unsqueeze(-1).expand(-1, -1, k.shape[-1]))  # (B, N, D/2)
            key_ids = ids.gather(1, drawn)  # (B, N)
        weight, bias = self.merged()
        return pairs.pair_loss(q, k, weight, bias, self.grid, ids, key_ids)

    def chance(self, num_tokens: int) -> tuple[float, float]:
        """Chance level for all pairs of `num_tokens` random cells."""
        return rpl_chance(self.grid, num_tokens)
