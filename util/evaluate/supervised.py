"""Evaluation of classifiers: accuracy, loss, position terms, and a table of predictions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from layers.positional.draws import draws_of
from util import dist
from util.data.contract import Batches, ClassSamples
from util.evaluate.accuracy import Recalls, classification
from util.evaluate.passes import mean_terms
from util.files.names import printable
from util.run.log import write_predictions
from util.train.objective import LossFunction
from util.train.setup import Setup


def make_eval_fn(
    positions: bool,
    record: Callable[[dict, Tensor], None] | None = None,
    columns: Tensor | None = None,
    recalls: Recalls | None = None,
) -> LossFunction:
    """Return a function (model, batch) -> (loss, terms) for `mean_terms`: accuracies in percent, and position
    terms.

    `record(batch, logits)` sees each batch. `columns` are the model's outputs for the labels 0, 1, ... if
    these are not all of its outputs in order. `recalls` counts the images of each label.
    """

    def eval_fn(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        terms: dict[str, Tensor] = {}
        if positions:
            logits, terms = model(batch["image"], positions=True, draws=draws_of(batch))
        else:
            logits = model(batch["image"])
        if columns is not None:
            logits = logits[:, columns]  # (B, outputs) -> (B, labels)
        if record is not None:
            record(batch, logits)
        loss, stats = classification(logits, batch["label"], recalls)
        return loss, terms | stats

    return eval_fn


def evaluate(
    model: nn.Module,
    loader: Batches[ClassSamples],
    classes: list[str],
    setup: Setup,
    positions: bool,
    predictions: str = "",
) -> dict[str, float]:
    """Return accuracies, loss and position terms, exact on any number of ranks; print MAE's line.

    `balanced_acc1` is the mean over classes, of those that have images; there is none for one class.
    `classes` are the classes of the model's outputs. The data may have only some of them; the prediction is
    then the best of these. `predictions` is the path of a CSV file to write, or ''.
    """
    rows: list[tuple[int, int, int, float]] = []

    def record(batch: dict, logits: Tensor) -> None:
        top = logits.float().softmax(-1).max(-1)
        columns = (batch["index"], batch["label"], top.indices, top.values)
        rows.extend(zip(*(column.tolist() for column in columns)))

    columns = _columns(loader.dataset.classes, classes, setup.device)
    recalls = Recalls(len(loader.dataset.classes), setup.device)
    if predictions:
        eval_fn = make_eval_fn(positions, record, columns, recalls)
    else:
        # Without a table nothing is read from the device until the end.
        eval_fn = make_eval_fn(positions, None, columns, recalls)
    stats = mean_terms(model, eval_fn, loader, setup)
    text = f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}"
    recalls.reduce()
    for mean in recalls.balanced():
        stats["balanced_acc1"] = mean.accuracy
        text += f" {mean}"
    if positions:
        text += f" position {stats['position']:.4f} acc {stats['position_acc']:.4f}"
    dist.print_rank0(f"{text} on {stats['images']} of {len(loader.dataset)} images")
    if predictions:
        all_rows = sorted(row for part in dist.gather_objects(rows) for row in part)
        if dist.is_main():
            write_predictions(predictions, all_rows, loader.dataset)
    return stats


def first_classes(names: list[str], most: int = 3) -> str:
    """Return the first names as text for a message. They are names of folders, which may hold anything."""
    text = ", ".join(map(printable, names[:most]))
    if len(names) > most:
        text += ", ..."
    return text


def _columns(data: list[str], classes: list[str], device: torch.device) -> Tensor | None:
    """Return the model's outputs for the classes of the data; None if these are all outputs in order."""
    if data == classes:
        return None
    dist.print_rank0(
        f"the data have {len(data)} of the model's {len(classes)} classes: predictions are the best of these"
    )
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[name] for name in data], device=device)
