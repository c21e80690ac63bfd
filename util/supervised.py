"""Supervised training of a batch: erasing and mixing on the device, the loss with positional labels and a teacher, accuracy."""
import torch
import torch.nn.functional as F

from util.accuracy import classification


def make_criterion(smoothing: float, mixed: bool):
    """Cross-entropy with class indices and label smoothing, or with the soft targets that mixup makes."""
    return lambda logits, target: F.cross_entropy(logits.float(), target, label_smoothing=0.0 if mixed else smoothing)


def make_augment(args, num_classes: int, device: torch.device):
    """What happens to a batch on the device: random erasing, then mixup or cutmix -> (images, targets), and `mixed`."""
    from timm.data import Mixup
    from timm.data.random_erasing import RandomErasing

    erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device) if args.reprob > 0 else None
    mixup = None
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax:
        if args.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even --batch_size, found {args.batch_size}")
        mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
                      label_smoothing=args.smoothing, num_classes=num_classes)

    def augment(images, labels):
        if erase is not None:
            images = erase(images)
        return mixup(images, labels) if mixup is not None else (images, labels)

    return augment, mixup is not None


def make_loss_fn(augment, criterion, pos_label: str, pos_weight: float, teacher=None):
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
