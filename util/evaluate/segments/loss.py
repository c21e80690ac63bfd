"""The cross-entropy of maps of logits at the size of the masks.

Shapes: B images, K classes, (h, w) cells of a map of logits, (H, W) pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from util import dist
from util.data.segments.masks import IGNORED

# Bytes of the logits at the size of the masks that are made at a time. They stay in the processor's cache.
STRIP_BYTES = 1 << 20


def segment_loss(logits: Tensor, mask: Tensor, at: str, upsample: str = "bilinear") -> Tensor:
    """Return the mean cross-entropy of logits (B, K, h, w) over the pixels of masks (B, H, W) that count.

    At "pixels" the logits are brought to the size of the masks. At "twice" they are doubled in size, and the
    masks are brought to that size by the nearest pixel, as in ImageNet-S's code. Logits are resized
    as `upsample` says. A batch without any pixel that counts has the loss 0.

    The mean is that of all ranks, which must call this together: the mean of their losses weights each pixel
    alike, however many count on a rank.
    """
    (loss,) = losses_of_heads(logits[None], mask, at, upsample)
    return loss


def losses_of_heads(logits: Tensor, mask: Tensor, at: str, upsample: str = "bilinear") -> Tensor:
    """Return the loss (G,) of each of G maps of logits, (G, B, K, h, w); see `segment_loss`.

    At the size of the masks logits are large: in backward those of one map at a time are in memory.
    """
    if at == "twice":
        size = (2 * logits.shape[-2], 2 * logits.shape[-1])
        mask = F.interpolate(mask[:, None].float(), size=size, mode="nearest")[:, 0]
    target = mask.long()
    count = counted_pixels(target)
    if upsample == "bilinear" and logits.device.type == "cpu":
        losses = [PixelLoss.apply(each.float(), target, count) for each in logits]
    elif len(logits) == 1:
        losses = [_loss(logits[0], target, count, upsample)]
    else:
        losses = [checkpoint(_loss, each, target, count, upsample, use_reentrant=False) for each in logits]
    return torch.stack(losses)


def counted_pixels(target: Tensor) -> Tensor:
    """Return the number of pixels that count, the mean over the ranks; at least one counts on all of them."""
    count = (target != IGNORED).sum()
    ranks = dist.world_size()
    if ranks == 1:
        return count.clamp(min=1)
    return dist.sum_over_ranks(count).clamp(min=1) / ranks


def _loss(logits: Tensor, target: Tensor, count: Tensor, upsample: str) -> Tensor:
    size = (target.shape[-2], target.shape[-1])
    if upsample == "nearest":
        logits = F.interpolate(logits.float(), size=size, mode="nearest-exact")
    else:
        logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum") / count


class PixelLoss(Function):
    """The loss of bilinear logits at the size of the targets, and its gradient in the same pass, in strips.

    Logits of the size of the masks need memory, and on a CPU the time that it takes to read and write them:
    most of a probe's step. It is for the CPU: a GPU may round the matrix products to TF32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, count: Tensor) -> Tensor:
        """Take float32 logits (B, K, h, w), classes int64 (B, H, W), IGNORED or 0 to K - 1, and the number of
        pixels by which the sum is divided.
        """
        height, width = target.shape[-2:]
        rows = weights(logits.shape[2], height)  # (H, h)
        columns = weights(logits.shape[3], width)  # (W, w)
        wide = logits @ columns.t()  # (B, K, h, W)
        gradient = torch.zeros_like(wide)
        total = torch.zeros((), dtype=torch.float64)
        strip = max(1, STRIP_BYTES // (4 * wide[:, :, 0].numel()))
        for part, classes in zip(rows.split(strip), target.split(strip, dim=1)):
            counted = (classes != IGNORED)[:, None]  # (B, 1, strip, W)
            picked = classes.clamp(min=0)[:, None]
            pixels = part @ wide  # (B, K, strip, W)
            log_sum = pixels.logsumexp(1, keepdim=True)
            total += ((log_sum - pixels.gather(1, picked)) * counted).double().sum()
            # The gradient of a pixel is its probabilities, less 1 for its class.
            slope = pixels.sub_(log_sum).exp_()
            slope.scatter_add_(1, picked, torch.full_like(log_sum, -1))
            gradient += part.t() @ slope.mul_(counted)
        ctx.save_for_backward(gradient @ columns / count)
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the logits, of the loss's gradient."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def weights(cells: int, pixels: int) -> Tensor:
    """Return the matrix (pixels, cells) of a linear interpolation as `interpolate` makes it (align_corners
    false).
    """
    unit = torch.eye(cells)[None]  # (1, cells, cells)
    return F.interpolate(unit, size=pixels, mode="linear", align_corners=False)[0].t().contiguous()
