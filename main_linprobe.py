"""Probe frozen features: a classifier at a grid of learning rates in one pass, or k nearest neighbours.

    python main_linprobe.py --finetune RUN/checkpoint-last.pth --model vit_base_patch16 --data_path DIR
    python main_linprobe.py --finetune RUN/checkpoint-last.pth --model vit_base_patch16 --data_path DIR --knn

MAE's protocol (appendix A.1): BatchNorm without affine parameters and a linear layer on the class token, LARS, weak
augmentation. With --global_pool the mean of the patch tokens is probed after a LayerNorm without parameters: the random,
frozen norm that MAE's code puts there is no part of the encoder. Every learning rate of --lr_grid has its own head; the
backbone runs once for all of them.

--head second_order trains So-ViT's head on the frozen tokens instead, which is no linear probe and is not reported as one.
"""

import math
import sys
from argparse import Namespace

from util.flags.groups import (
    add_data_flags,
    add_eval_flags,
    add_head_flags,
    add_optim_flags,
    add_run_flags,
    ascending,
    channel_stats,
    compile_mode,
    pair,
)
from util.flags.parser import Parser, parse, run


def get_args_parser() -> Parser:
    p = Parser(description="Linear probing and kNN of frozen encoders", add_help=False)
    g = p.add_argument_group("model")
    g.add_argument(
        "--model", default="vit_large_patch16", help="the classifier that has the checkpoint's encoder"
    )
    g.add_argument(
        "--patch_size", default=None, type=int, nargs="+", metavar=("H", "W"), help="other than the model's"
    )
    g.add_argument("--finetune", default="", help="pretrained checkpoint whose encoder is probed")
    g.add_argument("--nb_classes", default=None, type=int, help="checked against the data, which decides")
    g.add_argument(
        "--pos_embed",
        default="auto",
        choices=["auto", "none", "sincos", "learned"],
        help="auto: as the checkpoint was pretrained",
    )
    g.add_argument(
        "--global_pool",
        dest="pool",
        action="store_const",
        const="avg",
        default=None,
        help="probe the mean of the patch tokens",
    )
    g.add_argument(
        "--cls_token", dest="pool", action="store_const", const="cls", help="probe the class token (default)"
    )
    add_head_flags(p, "linear (default), or So-ViT's on all tokens: a second-order probe")
    add_data_flags(p)
    p.add_argument("--crop_scale", default=[0.08, 1.0], type=float, nargs=2, metavar=("MIN", "MAX"))
    add_optim_flags(p, batch_size=512, epochs=90, blr=0.1, min_lr=0.0, weight_decay=0.0, warmup_epochs=10)
    p.add_argument(
        "--lr_grid",
        default=[0.1, 0.3, 1.0, 3.0, 10.0],
        type=float,
        nargs="+",
        help="factors of the learning rate, a head each; 1 alone is MAE's protocol",
    )
    p.add_argument(
        "--cached", action="store_true", help="compute features once, without augmentation, and train on them"
    )
    p.add_argument(
        "--knn", action="store_true", help="k nearest neighbours instead: k = 10, 20, 100, T = 0.07"
    )
    add_eval_flags(p)
    add_run_flags(p)
    return p


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a mistyped flag answer at once.
    ARGS = parse(get_args_parser())

import torch
import torch.nn.functional as F
from torch import nn

import engine
from backbones.heads import SECOND_ORDER_FLAGS, second_order_options
from backbones.registry import build_classifier, find, trained_options
from layers.probe import Probe, SecondOrderProbe, pool_tokens, pooled, pooled_and_patches
from util import dist
from util.data.datasets import TensorSamples, build_dataset
from util.data.loading.cache import cached
from util.data.loading.loader import eval_loader, train_loader
from util.data.sources.image_index import check_same_classes, some_names
from util.data.transforms import eval_transform, pretrain_transform
from util.evaluate import evaluation
from util.evaluate.accuracy import classification
from util.evaluate.effective_rank import RANK_IMAGES, effective_rank
from util.evaluate.knn import knn_accuracy
from util.run.checkpoint_manager import CheckpointManager
from util.run.log import Log
from util.run.plan import write_record
from util.train.amp import described, products, resolve_amp
from util.train.lr_sched import effective_lr, warmup_cosine
from util.train.optim import lars
from util.weights import checkpoint, transfer

LOST = 100  # times the loss of guessing


def check_flags(args) -> None:
    """ValueError for flags that contradict each other, before anything is read."""
    if not args.finetune:
        raise ValueError("--finetune FILE is needed: the pretrained checkpoint whose features are probed")
    if args.eval and (args.knn or args.dry_run or not args.resume):
        raise ValueError(
            "--eval needs --resume FILE, a trained probe beside the encoder of --finetune, and goes with neither "
            "--knn nor --dry_run"
        )
    if args.knn and args.dry_run:
        raise ValueError("--dry_run plans training, and --knn trains nothing: leave one of them out")
    if args.head == "second_order" and (args.knn or args.cached):
        raise ValueError(
            "--head second_order reads all tokens while it learns: it goes with neither --knn nor --cached"
        )
    if args.head != "second_order" and second_order_options(vars(args)):
        raise ValueError("--so_* flags belong to --head second_order, but the probe is linear")
    if args.strategy == "fsdp":
        raise ValueError(
            "--strategy fsdp shards what is trained, and a probe trains linear heads only: leave it out"
        )
    if compile_mode(args):
        raise ValueError(
            "--compile and --compile_mode compile what is trained, and a probe trains linear heads only: leave "
            "them out"
        )


def as_trained(args, before: dict):
    """The flags with what they leave open as `before`, the flags of the probe that is evaluated."""
    stored = {
        k: before[k]
        for k in ("pool", "pos_embed", "head", *SECOND_ORDER_FLAGS)
        if k in before and getattr(args, k) in (None, "auto")
    }
    if "lr_grid" in before:
        stored["lr_grid"] = before["lr_grid"]
    return Namespace(
        **vars(args) | {"pool": args.pool or "cls"} | {k: v for k, v in stored.items() if v is not None}
    )


def make_loss_fn(features):
    """Sum over heads: their gradients do not meet. `loss_head` is the lowest loss among them.

    A step of LARS grows with the weights, not with the gradient, so that a head at too high a rate grows without end. One
    that is LOST times worse than guessing learns no more, and cannot end the others with what is not a number.
    """

    def loss_fn(model, batch):
        logits = model(features(batch["image"]))  # (heads, B, classes)
        losses = torch.stack([F.cross_entropy(z.float(), batch["label"]) for z in logits])
        learns = losses.detach() < LOST * math.log(logits.shape[-1])
        return losses.where(learns, 0.0).sum(), {"loss_head": losses.detach().where(learns, math.inf).min()}

    return loss_fn


def make_eval_fn(features, names: list[str]):
    def eval_fn(model, batch):
        out = {}
        for name, logits in zip(names, model(features(batch["image"]))):
            loss, stats = classification(logits, batch["label"])
            out |= {f"acc{k}_{name}": stats[f"acc{k}"] for k in (1, 5)} | {
                f"loss_{name}": loss,
                "images": stats["images"],
            }
        return torch.zeros((), device=batch["label"].device), out

    return eval_fn


def evaluate(
    probe: nn.Module, features, names: list[str], kind: str, loader, where: dict
) -> dict[str, float]:
    """Accuracies of all heads over the validation images; prints MAE's line for the best one. `where` is as engine's."""
    stats = evaluation.evaluate(probe, make_eval_fn(features, names), loader, **where)
    best = max(names, key=lambda name: stats[f"acc1_{name}"])
    acc1, acc5 = stats[f"acc1_{best}"], stats[f"acc5_{best}"]
    dist.print_rank0(
        f"* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} {kind} at {best} on {stats['images']} of {len(loader.dataset)} images; "
        + "  ".join(f"{name} {stats[f'acc1_{name}']:.3f}" for name in names)
    )
    out = {
        "test_loss": stats[f"loss_{best}"],
        "test_acc1": acc1,
        "test_acc5": acc5,
        "n_parameters": sum(p.numel() for p in probe.parameters()) // len(names),
    }  # MAE's, of one head
    return out | {f"test_acc1_{name}": stats[f"acc1_{name}"] for name in names}


def load_backbone(args, state: checkpoint.Checkpoint, size, device):
    """The frozen encoder of --finetune, in evaluation mode; ViT's tokens all come after the final norm."""
    if find(args.model).own_positions:
        options = trained_options(state.args)  # how they embed positions, and what they pool, is their own
    else:
        # What the encoder learned with is what it is probed with. Pooling by class token keeps its final norm, for the
        # patch tokens too.
        options = {"pos_embed": "learned" if "pos_embed" in state.model else "none", "pool": "cls"}
        if embed := state.args.get("patch_embed"):
            options["patch_embed"] = embed
    if args.pos_embed != "auto":
        options["pos_embed"] = args.pos_embed
    if args.patch_size:
        options["patch_size"] = pair(args.patch_size, "--patch_size")
    model = build_classifier(args.model, img_size=size, in_chans=args.in_chans, num_classes=0, **options)
    note = transfer.init_encoder(model, state, "zero")
    dist.print_rank0(note)
    return model.to(device).eval().requires_grad_(False)


def build_data(args, size, device):
    """Training loader (augmented unless features are computed once; None for --eval), and validation loader."""
    once = args.knn or args.cached
    val = build_dataset(
        args.data_path, "val", eval_transform(size), in_chans=args.in_chans, seed=args.seed, evaluation=True
    )
    dist.print_rank0(f"evaluation on {val.summary()}")
    if args.nb_classes is not None and args.nb_classes != len(val.index.classes):
        raise ValueError(
            f"--nb_classes {args.nb_classes}, but there are {len(val.index.classes)} class folders"
        )
    loading = dict(
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
    )
    val_loader = cached(eval_loader(val, **loading), args.cache_data, device)
    if args.eval:
        return None, val_loader
    transform = (
        eval_transform(size) if once else pretrain_transform(size, ascending(args.crop_scale, "--crop_scale"))
    )
    train = build_dataset(
        args.data_path, "train", transform, in_chans=args.in_chans, seed=args.seed, evaluation=once
    )
    check_same_classes(train.index, val.index)
    dist.print_rank0(f"training on {train.summary()}")
    loader = eval_loader(train, **loading) if once else train_loader(train, seed=args.seed, **loading)
    return cached(loader, args.cache_data, device), val_loader


def run_knn(args, backbone, train_loader, val_loader, device, amp, mean, std) -> dict[str, float]:
    """Accuracy of the nearest neighbours of the class token and of the mean patch token, exact over all ranks."""
    pools = ("cls", "avg") if backbone.num_prefix else ("avg",)

    def features(images):  # all poolings from one pass
        tokens = backbone.forward_features(images)
        return torch.cat([pool_tokens(tokens, backbone.num_prefix, pool) for pool in pools], dim=1)

    options = dict(device=device, mean=mean, std=std, amp=amp)
    bank, bank_labels = evaluation.features(features, train_loader, **options)
    own, own_labels = evaluation.features(features, val_loader, gather=False, **options)
    classes, out = len(train_loader.dataset.index.classes), {}
    for pool, queries, known in zip(pools, own.chunk(len(pools), 1), bank.chunk(len(pools), 1)):
        right = knn_accuracy(queries, own_labels, known, bank_labels, classes)
        counts = dist.sum_over_ranks(
            torch.stack([*right.values(), torch.tensor(len(own), device=own.device)])
        ).tolist()
        out |= {f"knn{k}_{pool}": 100 * n / counts[-1] for k, n in zip(right, counts)}
        spread = (
            torch.arange(min(RANK_IMAGES, len(known))) * len(known) // min(RANK_IMAGES, len(known))
        )  # over all classes
        out[f"effective_rank_{pool}"] = effective_rank(known[spread])
        dist.print_rank0(
            f"* kNN {pool}: "
            + "  ".join(f"k={k} {out[f'knn{k}_{pool}']:.3f}" for k in right)
            + f"  ({len(bank)} training and {counts[-1]} validation images; effective rank "
            f"{out[f'effective_rank_{pool}']:.1f} of {known.shape[1]}; features in {described(amp, device)}, "
            f"similarities in {products(device)})"
        )
    return out


def main(args) -> int:
    check_flags(args)
    device = dist.init(args.device, args.dist_backend, args.dist_timeout, args.local_rank)
    resume = checkpoint.load_start("" if args.eval or args.knn else args.output_dir, args.resume)
    args = as_trained(args, resume.args if args.eval else {})
    second_order = args.head == "second_order"
    amp = resolve_amp(args.amp, device)
    pretrained = checkpoint.load(args.finetune)
    pretrained.drop_optimizer()
    size, (mean, std) = pair(args.input_size, "--input_size"), channel_stats(args, pretrained.args)
    plain = checkpoint.plain_flags(vars(args)) | {"mean": list(mean), "std": list(std)}
    if args.output_dir and not (args.eval or args.dry_run):
        dist.make_shared_folder(args.output_dir)
    train_loader, val_loader = build_data(args, size, device)
    num_classes = len(val_loader.dataset.index.classes)
    backbone = load_backbone(args, pretrained, size, device)
    dist.print_rank0(f"encoder from {args.finetune}{checkpoint.other_than_trained(pretrained, plain)}")
    pretrained = None  # its memory is needed
    if args.pool == "cls" and not backbone.num_prefix:
        raise ValueError(f"--model {args.model} has no class token: probe it with --global_pool")

    if args.knn:
        write_record(args.output_dir, plain, {"device": str(device), "amp": amp})
        stats = run_knn(args, backbone, train_loader, val_loader, device, amp, mean, std)
        Log(args.output_dir).write_line(stats | {"epoch": 0})
        dist.shutdown()
        return 0

    def features(images):
        return (pooled_and_patches if second_order else pooled)(backbone, images, args.pool)

    if args.cached:
        train_loader, val_loader = (
            loader and cache(loader, features, args, device, amp, mean, std, loader is train_loader)
            for loader in (train_loader, val_loader)
        )

        def features(cached):
            return cached

    # Heads
    lr_grid = args.lr_grid
    torch.manual_seed(args.seed)
    if second_order:
        probe = SecondOrderProbe(
            backbone.dim, num_classes, len(lr_grid), second_order_options(vars(args))
        ).to(device)
    else:
        probe = Probe(backbone.dim, num_classes, len(lr_grid)).to(device)
    kind, names = (
        "second-order probe" if second_order else "linear probe",
        [f"lr{scale:g}" for scale in lr_grid],
    )

    where = dict(device=device, mean=mean, std=std, amp=amp)
    if args.eval:
        dist.print_rank0(
            f"evaluating {args.resume}{checkpoint.other_than_trained(resume, plain, ('model', 'finetune', 'pool'))}"
        )
        classes = val_loader.dataset.index.classes
        if resume.classes not in (None, classes):
            raise ValueError(
                f"{args.resume} was trained on the classes {some_names(resume.classes)}, the data have "
                f"{some_names(classes)}"
            )
        checkpoint.load_strict(probe, resume)
        evaluate(probe, features, names, kind, val_loader, where)
        dist.shutdown()
        return 0

    # LARS
    batch = args.batch_size * args.accum_iter * dist.world_size()
    lr = effective_lr(args.lr, args.blr, batch)
    optimizer = lars(probe.head[1:], lr_grid, lr, args.weight_decay)
    dist.print_rank0(
        f"{kind} of {args.model}, {args.pool} features of width {backbone.dim}; "
        f"{described(amp, device)} on {device}; effective batch {batch}, lr {lr:.3g} x "
        f"{', '.join(f'{s:g}' for s in lr_grid)}"
    )
    if resume:
        checkpoint.print_continuing(resume, plain)
    log_dir = None if args.dry_run else args.log_dir or args.output_dir
    log = Log(args.output_dir, log_dir, args.print_freq, loss_tag="loss")
    keeper = None
    if args.output_dir:
        keeper = CheckpointManager(
            args.output_dir, args.save_every_epochs, args.save_minutes, args.save_steps, args.keep
        )

    def after_epoch(epoch: int, state) -> dict[str, float]:
        stats = evaluate(probe, features, names, kind, val_loader, where)
        if state.best is None or stats["test_acc1"] > state.best:
            state.best, state.best_epoch = stats["test_acc1"], epoch
        log.scalars({f"perf/{name}": stats[name] for name in ("test_acc1", "test_acc5")}, epoch)
        return stats

    finished = engine.fit(
        probe,
        make_loss_fn(features),
        optimizer,
        train_loader,
        **where,
        epochs=args.epochs,
        log=log,
        keeper=keeper,
        args=plain,
        resume=resume,
        seed=args.seed,
        accum_iter=args.accum_iter,
        clip_grad=args.clip_grad,
        max_bad_images=args.max_bad_images,
        dry_run=args.dry_run,
        after_epoch=after_epoch,
        lr_at=lambda done: warmup_cosine(
            done, lr=lr, min_lr=args.min_lr, warmup=args.warmup_epochs, total=args.epochs
        ),
    )
    dist.shutdown()
    return 0 if finished else 75


def cache(loader, features, args, device, amp, mean, std, shuffle: bool):
    """A loader over features that are computed once, instead of images."""
    x, y = evaluation.features(features, loader, device=device, mean=mean, std=std, amp=amp)
    samples = TensorSamples(x.cpu(), y.cpu(), loader.dataset.index)
    loading = dict(batch_size=args.batch_size, num_workers=0, pin_memory=False)
    return train_loader(samples, seed=args.seed, **loading) if shuffle else eval_loader(samples, **loading)


if __name__ == "__main__":
    sys.exit(run(main, ARGS))
