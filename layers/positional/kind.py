"""The contract of a label kind. To add a kind, add a file with a subclass to `kinds/`; nothing else changes.

Shapes: B batch, n tokens given (all of the grid, or the visible ones), D width, h w the grid, L = h*w cells.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from layers.contract import Labels
from layers.positional.draws import Draws


class LabelKind(nn.Module):
    """One kind of positional label: a classifier on tokens, its loss, and its chance level.

    A subclass sets `name` as a string literal, which is its value of `pos_label` and the prefix of its
    state-dict keys, and defines `loss`, `logits` and `chance`.

    Attributes:
        name: the name of the kind.
        relative: whether `logits` are about the offsets of pairs of tokens, (B, n, n, offsets).
        of_cells: whether `logits` are about the cells of the tokens, (B, n, L). Pictures draw predicted cells
            and offsets. A kind with other targets sets neither, and is not drawn.
    """

    name: ClassVar[str]
    relative: ClassVar[bool] = False
    of_cells: ClassVar[bool] = False

    def __init__(self, dim: int, grid: tuple[int, int], options: Labels):
        super().__init__()
        self.grid = grid
        self.options = options

    def logits(self, tokens: Tensor) -> Tensor:
        """Patch tokens after the final norm (B, n, D) -> logits, for pictures and tests."""
        raise NotImplementedError

    def loss(self, tokens: Tensor, ids: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Tokens after the final norm (B, n, D) and their cells (B, n) -> mean loss in float32, accuracy."""
        raise NotImplementedError

    def chance(self, num_tokens: int) -> tuple[float, float]:
        """(cross-entropy, accuracy) of the best constant answer for `num_tokens` random cells of an image."""
        raise NotImplementedError

    def before(self, tokens: Tensor, ids_keep: Tensor, draws: Draws | None = None) -> Tensor:
        """Embedded visible patches (B, n, D) and their cells (B, n) -> the tokens that the encoder reads.

        The identity by default. A kind may change the tokens, e.g. add embeddings to some of them.
        """
        return tokens


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The precision in which losses and gradients are summed: float32, or float64 for float64."""
    if dtype == torch.float64:
        return torch.float64
    return torch.float32
