"""Absolute labels (APL, Zhang et al. 2023, Sec. 3.1, Eq. 1-6): a token is classified into its cell.

Cells are numbered row by row.

Shapes: B batch, n tokens given, D width, h w the grid, L = h*w cells.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from layers.contract import Labels
from layers.positional.draws import Draws
from layers.positional.kind import LabelKind, accumulator


def apl_chance(grid: tuple[int, int]) -> tuple[float, float]:
    """(cross-entropy, accuracy) of a guessed cell: (ln L, 1/L)."""
    cells = grid[0] * grid[1]
    return math.log(cells), 1 / cells


class AbsoluteLabel(LabelKind):
    """First half of a token's channels -> Linear, GELU, Linear -> one of L cells.

    With `pos_tokens` "full" it reads the whole token.
    """

    name = "apl"
    of_cells = True

    def __init__(self, dim: int, grid: tuple[int, int], options: Labels):
        super().__init__(dim, grid, options)
        self.width = dim
        if options.pos_tokens == "half":
            self.width = dim // 2
        self.fc1 = nn.Linear(self.width, dim // 2)
        self.fc2 = nn.Linear(dim // 2, dim // 4)
        self.classifier = nn.Linear(dim // 4, grid[0] * grid[1])

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, L)."""
        hidden = F.gelu(self.fc1(tokens[..., : self.width]))  # (B, n, D/2)
        return self.classifier(self.fc2(hidden))

    def targets(self, ids: Tensor, draws: Draws | None) -> Tensor:
        """The labels of the cells `ids` (B, n): the cells themselves."""
        return ids

    def loss(self, tokens: Tensor, ids: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """(B, n, D), cells (B, n) -> mean cross-entropy in float32 (Eq. 5), accuracy."""
        labels = self.targets(ids, draws).flatten()  # (B*n,)
        logits = self.logits(tokens).flatten(0, 1)  # (B*n, L)
        loss = F.cross_entropy(logits.to(accumulator(logits.dtype)), labels)
        return loss, (logits.argmax(-1) == labels).float().mean()

    def chance(self, num_tokens: int) -> tuple[float, float]:
        """(ln L, 1/L), however many tokens are given."""
        return apl_chance(self.grid)
