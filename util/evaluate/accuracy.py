"""How well logits classify."""

import torch
import torch.nn.functional as F
from torch import Tensor


def classification(logits: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, classes), labels (B,) -> mean cross-entropy, {acc1, acc5 in percent, images}, over the readable images.

    A label of -1 is an image that cannot be read. Of equal logits, frequent in bf16, the earlier class is the better one, as
    for argmax, and nan is better than any number, so that a broken model is not right. Where there are no images, all
    but `images` is 0.
    """
    valid = label >= 0
    count = valid.sum()
    right = label.clamp(min=0)[:, None]
    own = logits.gather(1, right)
    earlier = torch.arange(logits.shape[1], device=logits.device) < right
    ahead = (~(logits <= own) | ((logits == own) & earlier)).sum(1)  # classes ahead of the right one
    loss = F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="sum") / count.clamp(min=1)
    accuracy = {f"acc{k}": 100.0 * ((ahead < k) & valid).sum() / count.clamp(min=1) for k in (1, 5)}
    return loss, accuracy | {"images": count}
