"""Supervised training: what happens to its batches, its loss with positional labels and a teacher, and its evaluation."""

import torch
import torch.nn.functional as F

from layers.positional.draws import draws_of
from util import dist
from util.evaluate import evaluation
from util.evaluate.accuracy import classification
from util.run.log import write_predictions


def make_augment(
    num_classes: int,
    device: torch.device,
    *,
    batch_size: int,
    reprob: float,
    remode: str,
    recount: int,
    mixup: float,
    cutmix: float,
    cutmix_minmax: list[float] | None,
    mixup_prob: float,
    mixup_switch_prob: float,
    mixup_mode: str,
    smoothing: float,
):
    """What happens to a batch on the device, by timm: random erasing, then mixup or cutmix.

    Returns `augment(images, labels) -> (images, targets)`, and whether it mixes: targets are then soft, (B, num_classes).
    Raises ValueError for an odd batch, whose images cannot be mixed in pairs.
    """
    from timm.data import Mixup
    from timm.data.random_erasing import RandomErasing

    erase = RandomErasing(reprob, mode=remode, max_count=recount, device=device) if reprob > 0 else None
    mix = None
    if mixup > 0 or cutmix > 0 or cutmix_minmax:
        if batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even --batch_size, found {batch_size}")
        mix = Mixup(
            mixup,
            cutmix,
            cutmix_minmax,
            mixup_prob,
            mixup_switch_prob,
            mixup_mode,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )

    def augment(images, labels):
        if erase is not None:
            images = erase(images)
        return mix(images, labels) if mix is not None else (images, labels)

    return augment, mix is not None


def make_criterion(smoothing: float, mixed: bool):
    """Cross-entropy with class indices and label smoothing, or with the soft targets that mixup makes."""
    return lambda logits, target: F.cross_entropy(
        logits.float(), target, label_smoothing=0.0 if mixed else smoothing
    )


def make_loss_fn(augment, criterion, pos_label: str, pos_weight: float, teacher=None):
    """L_class + pos_weight * L_position (Zhang et al. 2023, Eq. 6) of a batch after `augment(images, labels)`.

    With a `teacher`, a classifier, L_class is the mean of the class token's loss and the distillation token's.
    """

    def loss_fn(model, batch):
        x, target = augment(batch["image"], batch["label"])
        terms = {}
        options = {"positions": True, "draws": draws_of(batch)} if pos_label != "none" else {}
        if teacher is None:
            out = model(x, **options)
        else:
            out = model(x, **options, distillation=True)
        logits, positions = out if pos_label != "none" else (out, {})
        if teacher is not None:
            # Hard distillation (Touvron et al. 2021, Eq. 3): the distillation token learns the teacher's answer.
            logits, from_teacher = logits
            with torch.no_grad():
                answer = teacher(x).argmax(-1)
            terms["distill"] = F.cross_entropy(from_teacher.float(), answer)
            terms["class"] = criterion(logits, target)
            loss = (terms["class"] + terms["distill"]) / 2
        else:
            loss = terms["class"] = criterion(logits, target)
        if positions:
            loss = loss + pos_weight * positions["position"]
        return loss, terms | positions

    return loss_fn


def make_eval_fn(positions: bool, record=None, columns=None):
    """Accuracy in percent and loss over the readable images of a batch; `record(batch, logits)` sees each batch.

    `columns` are the model's outputs that belong to the labels 0, 1, ..., where these are not all of its outputs in order.
    """

    def eval_fn(model, batch):
        if positions:
            logits, terms = model(batch["image"], positions=True, draws=draws_of(batch))
        else:
            logits, terms = model(batch["image"]), {}
        if columns is not None:
            logits = logits[:, columns]  # (B, outputs) -> (B, labels)
        if record is not None:
            record(batch, logits)
        loss, stats = classification(logits, batch["label"])
        return loss, terms | stats

    return eval_fn


def evaluate(
    model, loader, classes: list[str], *, positions: bool, device, mean, std, amp: str, predictions: str = ""
) -> dict[str, float]:
    """Exact on any number of ranks; prints MAE's line and what it was measured on, writes `predictions` if that is a path.

    `classes` are those of the model's outputs; the data may have some of them, and answers are then among these.
    """
    rows, data, columns = [], loader.dataset.index.classes, None
    if data != classes:
        dist.print_rank0(
            f"the data have {len(data)} of the model's {len(classes)} classes: its answer is the best of these"
        )
        number = {name: i for i, name in enumerate(classes)}
        columns = torch.tensor([number[name] for name in data], device=device)

    def record(batch, logits):
        top = logits.float().softmax(-1).max(-1)
        rows.extend(
            zip(batch["index"].tolist(), batch["label"].tolist(), top.indices.tolist(), top.values.tolist())
        )

    eval_fn = make_eval_fn(positions, record if predictions else None, columns)
    stats = evaluation.evaluate(model, eval_fn, loader, device=device, mean=mean, std=std, amp=amp)
    dist.print_rank0(
        f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}"
        + (f" position {stats['position']:.4f} acc {stats['position_acc']:.4f}" if positions else "")
        + f" on {stats['images']} of {len(loader.dataset)} images"
    )
    if predictions:
        all_rows = sorted(row for rows in dist.gather_objects(rows) for row in rows)
        if dist.is_main():
            write_predictions(predictions, all_rows, loader.dataset.index)
    return stats
