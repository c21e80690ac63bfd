"""How many directions features use: the measure that shows a collapse."""

import torch
from torch import Tensor, nn

from util import dist

RANK_IMAGES = 512  # are enough to see a collapse


def effective_rank(features: Tensor) -> float:
    """Features (n, d) -> exp of the entropy of their normalised singular values, in [1, min(n, d)] (RankMe, Garrido et
    al. 2023, Eq. 1).

    1 means that all images have the same features up to a factor. Reads the result from the device; nan for zeros.
    """
    values = torch.linalg.svdvals(features.float())
    p = values / values.sum()
    return float(torch.special.entr(p).sum().exp())


@torch.no_grad()
def log_ranks(backbone: nn.Module, batches, log, epoch: int) -> dict[str, float]:
    """Effective ranks of the class token and of the mean patch token of normalised images, `image` in each batch; printed,
    and shown in the log's TensorBoard."""
    rows = []
    for batch in batches:
        tokens = backbone.forward_features(batch["image"])  # (B, prefix + L, C)
        rows.append(torch.stack([tokens[:, 0], tokens[:, backbone.num_prefix :].mean(1)]).float())
    cls, mean = torch.cat(rows, dim=1)
    ranks = {"effective_rank_cls": effective_rank(cls), "effective_rank_avg": effective_rank(mean)}
    dist.print_rank0(
        "* " + "  ".join(f"{k} {v:.1f}" for k, v in ranks.items()) + f" of {min(cls.shape)} at most"
    )
    log.scalars({f"perf/{k}": v for k, v in ranks.items()}, epoch)
    return ranks
