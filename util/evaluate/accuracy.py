"""Accuracy and loss of logits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def classification(logits: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean cross-entropy and {acc1, acc5 in percent, images} over the readable images.

    Takes logits (B, classes) and labels (B,); a label of -1 marks an image that could not be decoded. Of
    equal logits, which are frequent in bf16, the earlier class counts as the better one, as for argmax. A nan
    counts as better than any number, so that a broken model is never correct. Without readable images all
    values are 0.
    """
    valid = label >= 0
    count = valid.sum()
    target = label.clamp(min=0)[:, None]  # (B, 1)
    logit = logits.gather(1, target)  # (B, 1)
    earlier = torch.arange(logits.shape[1], device=logits.device) < target  # (B, classes)
    # `~(a <= b)` instead of `a > b`: it is true for nan.
    ahead = (~(logits <= logit) | ((logits == logit) & earlier)).sum(
        1
    )  # (B,) classes ahead of the correct one
    loss = F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="sum") / count.clamp(min=1)
    stats = {f"acc{k}": 100.0 * ((ahead < k) & valid).sum() / count.clamp(min=1) for k in (1, 5)}
    return loss, stats | {"images": count}
