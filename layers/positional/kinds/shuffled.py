"""Shuffled labels, a control for absolute ones: each image's cells are permuted, so labels name no place.

What a head of these labels learns, and what they do to the encoder, comes from a classification loss as such,
and not from positions.

Shapes: B batch, n tokens given, D width, h w the grid, L = h*w cells.
"""

from torch import Tensor

from layers.contract import Labels
from layers.positional.draws import Draws, label_keys, permutations, seed_bits
from layers.positional.kinds.apl import AbsoluteLabel


class ShuffledLabel(AbsoluteLabel):
    """Absolute labels after a permutation of the cells that each image draws anew in each epoch.

    The permutation is a function of (seed, epoch, index). Without memory of the draws no prediction is better
    than chance, ln L.
    """

    name = "shuffled"
    # Its targets are permuted cells: a picture of them would show nothing.
    of_cells = False

    def keys(self, draws: Draws) -> Tensor:
        """(B,) int64, the keys of the images' permutations."""
        return label_keys(draws.key)

    def targets(self, ids: Tensor, draws: Draws | None) -> Tensor:
        """The permuted numbers of the cells `ids`, (B, n); raises ValueError without `draws`."""
        if draws is None:
            raise ValueError(
                f"labels `{self.name}` need the images' `draws`, found none: pass draws_of(batch)"
            )
        cells = self.grid[0] * self.grid[1]
        return permutations(self.keys(draws), cells).gather(1, ids)


class FixedShuffledLabel(ShuffledLabel):
    """Absolute labels after a permutation of the cells that each image keeps for good.

    The permutation is a function of (seed, index). Only a model that recognises the single image can predict
    the labels. A stream of images has no index (it is -1), so all of its images share one permutation.
    """

    name = "shuffled_fixed"

    def __init__(self, dim: int, grid: tuple[int, int], options: Labels):
        super().__init__(dim, grid, options)
        self.salt = seed_bits(options.seed)

    def keys(self, draws: Draws) -> Tensor:
        """(B,) int64, the keys of the images' permutations."""
        return draws.image ^ self.salt
