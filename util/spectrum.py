"""How many directions features use: the measure that shows a collapse."""
import torch
from torch import Tensor


def effective_rank(features: Tensor) -> float:
    """Features (n, d) -> exp of the entropy of their normalised singular values, in [1, min(n, d)] (RankMe, Garrido et
    al. 2023, Eq. 1).

    1 means that all images have the same features up to a factor. Reads the result from the device; nan for zeros.
    """
    values = torch.linalg.svdvals(features.float())
    p = values / values.sum()
    return float(torch.special.entr(p).sum().exp())
