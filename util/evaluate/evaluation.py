"""Means and features over a whole data set, whatever the number of ranks: each readable image counts once."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from util import dist
from util.data.loading.loader import device_batches
from util.data.pixels import Pixels
from util.train.amp import autocast


@torch.no_grad()
def evaluate(
    model: nn.Module, loss_fn: Callable, loader, *, device, mean, std, amp: str = "fp32"
) -> dict[str, float]:
    """Means of loss_fn's terms over all readable images of all ranks, each counted once, and `images`, how many they are.

    Batches weigh by their size, or by the term `images` where loss_fn returns one.
    """
    model.eval()
    exact = torch.float32 if device.type == "mps" else torch.float64
    zero = torch.zeros((), dtype=exact, device=device)
    sums: dict[str, Tensor] = {}
    unreadable = 0
    for batch in device_batches(loader, device, Pixels(mean, std)):
        if bad := set(batch["bad"]):  # black stand-ins
            keep = [at for at, i in enumerate(batch["index"].tolist()) if i not in bad]
            batch = {k: v[keep] if torch.is_tensor(v) else v for k, v in batch.items()}
            unreadable += len(bad)
            if not keep:
                continue
        with autocast(device, amp):
            loss, terms = loss_fn(model, batch)
        terms = {"loss": loss} | terms
        n = terms.pop(
            "images", len(batch["image"])
        )  # a number, not a tensor: making one waits for the device
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.to(exact) * n
        sums["images"] = sums.get("images", zero) + n
    names = sorted(set().union(*dist.gather_objects(set(sums))))  # a rank may have no images at all
    if not names:
        raise ValueError(
            f"none of the {len(loader.dataset)} images to evaluate on can be decoded: "
            "python -m util.data check lists them"
        )
    totals = dist.sum_over_ranks(torch.stack([sums.get(k, zero) for k in names])).tolist()
    out = dict(zip(names, totals))
    count = out.pop("images")
    if unreadable := sum(dist.gather_objects(unreadable)):
        dist.print_rank0(f"warning: {unreadable} images cannot be decoded and are left out of the evaluation")
    return {k: v / max(count, 1) for k, v in out.items()} | {"images": int(count)}


@torch.no_grad()
def features(
    function: Callable[[Tensor], Tensor], loader, *, device, mean, std, amp: str = "fp32", gather: bool = True
) -> tuple[Tensor, Tensor]:
    """Features (n, d) and labels (n,) of all readable images, in the data set's order, on `device`.

    `function` maps a batch of normalised images to (B, d). With `gather` every rank gets the images of all ranks.
    """
    n, x = len(loader.dataset), torch.empty(0)
    y = torch.zeros(n, dtype=torch.int64, device=device)  # label + 1; 0 is an image of another rank, or none
    for batch in device_batches(loader, device, Pixels(mean, std)):
        with autocast(device, amp):
            rows = function(batch["image"]).float()
        if not len(x):  # in place from the start: for ImageNet a second copy would be gigabytes
            x = rows.new_zeros(n, rows.shape[1])
        x[batch["index"]], y[batch["index"]] = rows, batch["label"] + 1
    width = max(dist.gather_objects(x.shape[-1]))
    x = x if len(x) else torch.zeros(n, width, device=device)  # fewer images than ranks
    if gather:
        x, y = dist.sum_over_ranks(x), dist.sum_over_ranks(y)
    return (x, y - 1) if (y > 0).all() else (x[y > 0], y[y > 0] - 1)
