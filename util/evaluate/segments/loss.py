"""The cross-entropy of maps of logits at the size of the masks.

Shapes: B images, K classes, (h, w) cells of a map of logits, (H, W) pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from util.data.segments.masks import IGNORED

# Bytes of the logits at the size of the masks that are made at a time. They stay in the processor's cache.
STRIP_BYTES = 1 << 20


def segment_loss(logits: Tensor, mask: Tensor, at: str, upsample: str = "bilinear") -> Tensor:
    """Return the mean cross-entropy of logits (B, K, h, w) over the pixels of masks (B, H, W) that count.

    At "pixels" the logits are brought to the size of the masks. At "twice" they are doubled in size, and the
    masks are brought to that size by the nearest pixel, as in ImageNet-S's code. Logits are resized
    as `upsample` says. A batch without any pixel that counts has the loss 0.
    """
    size = (mask.shape[-2], mask.shape[-1])
    if at == "twice":
        size = (2 * logits.shape[-2], 2 * logits.shape[-1])
        mask = F.interpolate(mask[:, None].float(), size=size, mode="nearest")[:, 0]
    elif _is_fused(logits, at, upsample):
        return PixelLoss.apply(logits.float(), mask.long())
    if upsample == "nearest":
        logits = F.interpolate(logits.float(), size=size, mode="nearest-exact")
    else:
        logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    target = mask.long()
    total = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
    return total / (target != IGNORED).sum().clamp(min=1)


def losses_of_heads(logits: Tensor, mask: Tensor, at: str, upsample: str = "bilinear") -> Tensor:
    """Return the loss (G,) of each of G maps of logits, (G, B, K, h, w); see `segment_loss`.

    At the size of the masks logits are large: in backward those of one map at a time are in memory.
    """
    if _is_fused(logits, at, upsample):
        return torch.stack([segment_loss(each, mask, at) for each in logits])
    losses = [checkpoint(segment_loss, each, mask, at, upsample, use_reentrant=False) for each in logits]
    return torch.stack(losses)


def _is_fused(logits: Tensor, at: str, upsample: str) -> bool:
    return at == "pixels" and upsample == "bilinear" and logits.device.type == "cpu"


class PixelLoss(Function):
    """The loss at "pixels" with bilinear logits, and its gradient in the same pass, in strips of rows.

    Logits of the size of the masks need memory, and on a CPU the time that it takes to read and write them:
    most of a probe's step. It is for the CPU: a GPU may round the matrix products to TF32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """Take float32 logits (B, K, h, w) and classes int64 (B, H, W), IGNORED or 0 to K - 1."""
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
        count = (target != IGNORED).sum().clamp(min=1)
        ctx.save_for_backward(gradient @ columns / count)
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the logits, of the loss's gradient."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None


def weights(cells: int, pixels: int) -> Tensor:
    """Return the matrix (pixels, cells) of a linear interpolation as `interpolate` makes it (align_corners
    false).
    """
    unit = torch.eye(cells)[None]  # (1, cells, cells)
    return F.interpolate(unit, size=pixels, mode="linear", align_corners=False)[0].t().contiguous()
