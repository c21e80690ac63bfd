"""Passes over a whole data set on any number of ranks: mean terms and features. Each readable image counts
once.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from util import dist
from util.data.contract import Batches, Samples
from util.data.loading.loader import device_batches
from util.evaluate.accuracy import exact_dtype
from util.files.names import counted
from util.train.objective import LossFunction
from util.train.setup import Setup


@torch.no_grad()
def mean_terms(
    model: nn.Module, loss_fn: LossFunction, loader: Batches[Samples], setup: Setup
) -> dict[str, float]:
    """Return the means of loss_fn's terms over all readable images of all ranks, and `images`, their number.

    `loss_fn(model, batch)` returns (loss, {name: scalar tensor}). Batches are weighted by their size, or by
    the term `images` if loss_fn returns one. Raises ValueError if no image can be decoded.
    """
    model.eval()
    exact = exact_dtype(setup.device)
    zero = torch.zeros((), dtype=exact, device=setup.device)
    sums: dict[str, Tensor] = {}
    unreadable = 0
    for loaded in device_batches(loader, setup.device, setup.pixels):
        unreadable += len(set(loaded["bad"]))
        batch = _readable(loaded)
        if batch is None:
            continue
        with setup.autocast():
            loss, terms = loss_fn(model, batch)
        terms = {"loss": loss} | terms
        # A number, not a tensor: making a tensor waits for the device.
        images = terms.pop("images", len(batch["image"]))
        for name, value in terms.items():
            sums[name] = sums.get(name, zero) + value.to(exact) * images
        sums["images"] = sums.get("images", zero) + images
    unreadable = sum(dist.gather_objects(unreadable))
    # A rank may have no images at all, and then it has no sums.
    names = sorted(set().union(*dist.gather_objects(set(sums))))
    if not names:
        raise ValueError(
            f"none of the {counted(len(loader.dataset), 'image')} to evaluate on can be decoded: "
            "python -m util.data check lists them"
        )
    totals = dist.sum_over_ranks(torch.stack([sums.get(name, zero) for name in names])).tolist()
    means = dict(zip(names, totals))
    count = means.pop("images")
    if unreadable:
        left_out = counted(int(unreadable), "image")
        dist.print_rank0(f"warning: the evaluation leaves out {left_out} that cannot be decoded")
    return {name: total / max(count, 1) for name, total in means.items()} | {"images": int(count)}


def _readable(batch: dict) -> dict | None:
    """Return the batch without the black images that stand in for undecodable ones; None if nothing is
    left.
    """
    bad = set(batch["bad"])
    if not bad:
        return batch
    rows = [row for row, index in enumerate(batch["index"].tolist()) if index not in bad]
    if not rows:
        return None
    tensors = {name: value[rows] for name, value in batch.items() if torch.is_tensor(value)}
    return batch | tensors


@torch.no_grad()
def extract_features(
    function: Callable[[Tensor], Tensor], loader: Batches[Samples], setup: Setup, gather: bool = True
) -> tuple[Tensor, Tensor]:
    """Return features (n, d) and labels (n,) of all readable images, in the data set's order, on the device.

    `function` maps a batch of normalised images to (B, d). With `gather` every rank gets the
    images of all ranks. Those of a stream are in the order in which they come, rank by rank.
    """
    if not loader.dataset.exact_resume:
        return _features_of_stream(function, loader, setup, gather)
    n = len(loader.dataset)
    features: Tensor | None = None
    # Labels are stored plus one: 0 marks an image of another rank, or an undecodable one.
    labels = torch.zeros(n, dtype=torch.int64, device=setup.device)
    for batch in device_batches(loader, setup.device, setup.pixels):
        with setup.autocast():
            rows = function(batch["image"]).float()
        if features is None:
            # In place from the start: a second copy would need gigabytes for ImageNet.
            features = rows.new_zeros(n, rows.shape[1])
        features[batch["index"]] = rows
        labels[batch["index"]] = batch["label"] + 1
    if features is None:
        features = torch.empty(0)
    width = max(dist.gather_objects(features.shape[-1]))
    if not len(features):  # this rank has no images
        features = torch.zeros(n, width, device=setup.device)
    if gather:
        # Each row is zero on all ranks but one.
        features = dist.sum_over_ranks(features)
        labels = dist.sum_over_ranks(labels)
    readable = labels > 0
    if readable.all():
        return features, labels - 1
    return features[readable], labels[readable] - 1


def _features_of_stream(
    function: Callable[[Tensor], Tensor], loader: Batches[Samples], setup: Setup, gather: bool
) -> tuple[Tensor, Tensor]:
    """Return what `extract_features` does, for samples without numbers, of which there may be any count."""
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in device_batches(loader, setup.device, setup.pixels):
        with setup.autocast():
            rows.append(function(batch["image"]).float())
        labels.append(batch["label"])
    counts = dist.gather_objects(sum(map(len, labels)))
    widths = dist.gather_objects(rows[0].shape[1] if rows else 0)
    if not sum(counts):
        raise ValueError(f"no image of {loader.dataset.summary()} can be decoded")
    features = torch.cat([torch.zeros(0, max(widths), device=setup.device), *rows])  # (own images, d)
    own = torch.cat([torch.zeros(0, dtype=torch.int64, device=setup.device), *labels])
    if not gather:
        return features, own
    # Each row is zero on all ranks but one.
    first = sum(counts[: dist.rank()])
    all_features = features.new_zeros(sum(counts), max(widths))
    all_labels = own.new_zeros(sum(counts))
    all_features[first : first + len(own)] = features
    all_labels[first : first + len(own)] = own
    return dist.sum_over_ranks(all_features), dist.sum_over_ranks(all_labels)
