"""The supervised loss, with positional labels and a teacher, and its evaluation."""
import torch
import torch.nn.functional as F

from util.accuracy import classification


def make_criterion(smoothing: float, mixed: bool):
    """Cross-entropy with class indices and label smoothing, or with the soft targets that mixup makes."""
    return lambda logits, target: F.cross_entropy(logits.float(), target, label_smoothing=0.0 if mixed else smoothing)


def make_loss_fn(augment, criterion, pos_label: str, pos_weight: float, teacher=None):
    """L_class + pos_weight * L_position (Zhang et al. 2023, Eq. 6) of a batch after `augment(images, labels)`.

    With a `teacher`, a classifier, L_class is the mean of the class token's loss and the distillation token's.
    """

    def loss_fn(model, batch):
        x, target = augment(batch["image"], batch["label"])
        terms = {}
        if teacher is None:
            out = model(x, positions=pos_label != "none")
        else:
            out = model(x, positions=pos_label != "none", distillation=True)
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
        logits, terms = model(batch["image"], positions=True) if positions else (model(batch["image"]), {})
        if columns is not None:
            logits = logits[:, columns]  # (B, outputs) -> (B, labels)
        if record is not None:
            record(batch, logits)
        loss, stats = classification(logits, batch["label"])
        return loss, terms | stats

    return eval_fn
