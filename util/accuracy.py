"""How well logits classify."""
import torch.nn.functional as F
from torch import Tensor


def classification(logits: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, classes), labels (B,) -> mean cross-entropy, {acc1, acc5 in percent, images}, over the readable images.

    A label of -1 is an image that cannot be read. A class is among the best k if fewer than k have a higher logit; where there
    are no images, all but `images` is 0.
    """
    valid = label >= 0
    count = valid.sum()
    ahead = (logits > logits.gather(1, label.clamp(min=0)[:, None])).sum(1)  # classes ahead of the right one
    loss = F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="sum") / count.clamp(min=1)
    right = {f"acc{k}": 100.0 * ((ahead < k) & valid).sum() / count.clamp(min=1) for k in (1, 5)}
    return loss, right | {"images": count}
