"""Effective rank: the number of directions that features use. It shows a collapse."""

from collections.abc import Iterable

import torch
from torch import Tensor

from layers.contract import Backbone
from util import dist
from util.run.log import Log

RANK_IMAGES = 512  # enough images to see a collapse


def effective_rank(features: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of features (n, d), in [1, min(n, d)].

    Source: RankMe (Garrido et al. 2023, Eq. 1). 1 means that all images have the same features up to a
    factor; features that are all zero give nan. Reads the result from the device.
    """
    values = torch.linalg.svdvals(features.float())
    p = values / values.sum()
    return float(torch.special.entr(p).sum().exp())


@torch.no_grad()
def log_ranks(backbone: Backbone, batches: Iterable[dict], log: Log, epoch: int) -> dict[str, float]:
    """Return the effective ranks of the class token and of the mean patch token; print and log them.

    `batches` hold normalised images, `image` (B, C, H, W).
    """
    rows = []
    for batch in batches:
        tokens = backbone.forward_features(batch["image"])  # (B, prefix + L, C)
        patches = tokens[:, backbone.num_prefix :].mean(1)  # (B, C)
        rows.append(torch.stack([tokens[:, 0], patches]).float())  # (2, B, C)
    cls, mean = torch.cat(rows, dim=1)
    ranks = {"effective_rank_cls": effective_rank(cls), "effective_rank_avg": effective_rank(mean)}
    text = "  ".join(f"{name} {value:.1f}" for name, value in ranks.items())
    dist.print_rank0(f"* {text} of {min(cls.shape)} at most")
    log.scalars({f"perf/{name}": value for name, value in ranks.items()}, epoch)
    return ranks
