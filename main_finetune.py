"""Train classifiers: fine-tune a pretrained encoder, train from scratch, or evaluate.

    python main_finetune.py --finetune RUN/checkpoint-last.pth --model vit_base_patch16 --data_path DIR     # fine-tune
    python main_finetune.py --model swin_tiny --pos_label rpl --data_path DIR                               # from scratch
    python main_finetune.py --eval --resume FT/checkpoint-best.pth --model vit_base_patch16 --data_path DIR # evaluate

Positional embedding and positional labels are independent: L = L_class + pos_weight * L_position (Zhang et al. 2023,
Eq. 6). Labels stay the cells of the grid after augmentation; mixup and cutmix mix class targets only.

Exit codes: 0 done, 75 stopped by a signal with the state saved (the same command goes on), 2 wrong input.
"""

import os
import sys

from util.flags.groups import (
    add_augment_flags,
    add_data_flags,
    add_eval_flags,
    add_head_flags,
    add_optim_flags,
    add_position_flags,
    add_run_flags,
    ascending,
    channel_stats,
    compile_mode,
    pair,
)
from util.flags.parser import BELOW_ONE, SHARE, Parser, number, parse, run


def get_args_parser() -> Parser:
    p = Parser(
        description="Fine-tuning, training from scratch, and evaluation of classifiers", add_help=False
    )
    g = p.add_argument_group("model")
    g.add_argument(
        "--model", default="vit_large_patch16", help="vit_*, deit_*, swin_*, so_vit_*, or timm/NAME"
    )
    g.add_argument(
        "--patch_size", default=None, type=int, nargs="+", metavar=("H", "W"), help="other than the model's"
    )
    g.add_argument("--nb_classes", default=None, type=int, help="checked against the data, which decides")
    g.add_argument("--drop_path", default=0.1, type=BELOW_ONE, help="stochastic depth of the last block")
    g.add_argument(
        "--global_pool",
        dest="pool",
        action="store_const",
        const="avg",
        default=None,
        help="classify the mean of the patch tokens (default, but for DeiT, So-ViT and under second order)",
    )
    g.add_argument(
        "--cls_token", dest="pool", action="store_const", const="cls", help="classify the class token"
    )
    g.add_argument(
        "--patch_embed",
        default=None,
        choices=["linear", "conv"],
        help="of vit_*, deit_* (linear) and so_vit_* (conv); conv cannot start from a masked checkpoint",
    )
    g.add_argument(
        "--swin_merge_last", action="store_true", help="keep Swin's last patch merging (7x7 cells at 224)"
    )
    g.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="run each block again in backward: less memory, a fifth to a third more time",
    )
    add_position_flags(p, pos_embed="learned", pos_label="auto")
    p.add_argument(
        "--pos_embed_init",
        default="zero",
        choices=["zero", "sincos", "normal"],
        help="start of the positional embedding that a checkpoint lacks",
    )
    add_head_flags(p, "on any model; linear, but for so_vit_*; with --resume, the checkpoint's")
    add_data_flags(p)
    add_optim_flags(p, batch_size=64, epochs=50, blr=1e-3, min_lr=1e-6, weight_decay=0.05, warmup_epochs=5)
    add_run_flags(p)
    g = p.add_argument_group("fine-tuning")
    g.add_argument("--finetune", default="", help="pretrained checkpoint to start from")
    g.add_argument(
        "--layer_decay", default=0.75, type=SHARE, help="learning rate factor per layer, from the top down"
    )
    g.add_argument(
        "--partial", default=None, type=int, metavar="K", help="train the last K blocks and the heads only"
    )
    g.add_argument(
        "--ema", default=0.0, type=float, metavar="DECAY", help="evaluate a moving average of the weights"
    )
    g.add_argument(
        "--distill",
        default="",
        metavar="MODEL",
        help="teacher for DeiT's distillation token: timm/NAME, or any model with --distill_checkpoint",
    )
    g.add_argument(
        "--distill_checkpoint",
        default="",
        help="a checkpoint of main_finetune.py; timm's pretrained weights if not given",
    )
    add_augment_flags(p)
    g = p.add_argument_group("evaluation")
    add_eval_flags(g)
    g.add_argument(
        "--classes",
        default="",
        metavar="PATH",
        help="names of the model's outputs, for --eval on some of its classes: a list, or a folder with all of "
        "them; not needed for ImageNet's, nor for files that store them",
    )
    g.add_argument(
        "--crop_pct",
        default=None,
        type=number(0.05, kind=float),
        help="centre crop's share of the resized image",
    )
    g.add_argument("--predictions", default="", metavar="FILE", help="write a CSV line per validation image")
    return p


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a mistyped flag answer at once.
    ARGS = parse(get_args_parser())

import torch

import engine
from backbones.heads import head_options, resolve_head
from backbones.registry import build_classifier, find, freeze_all_but, known_classes
from backbones.teacher import build_teacher
from util import dist
from util.data.datasets import build_dataset
from util.data.loading.cache import cached
from util.data.loading.loader import eval_loader, train_loader
from util.data.sources.image_index import ImageIndex, check_same_classes, class_names, some_names
from util.data.transforms import eval_transform, finetune_transform
from util.dist import fsdp
from util.evaluate.supervised import evaluate, make_augment, make_criterion, make_loss_fn
from util.run.checkpoint_manager import CheckpointManager
from util.run.log import Log
from util.train.amp import described, resolve_amp
from util.train.lr_sched import effective_lr, warmup_cosine
from util.train.optim import WeightAverage, adamw, param_groups
from util.weights import checkpoint, transfer

# What make_augment takes of the flags.
BATCH_FLAGS = (
    "batch_size",
    "reprob",
    "remode",
    "recount",
    "mixup",
    "cutmix",
    "cutmix_minmax",
    "mixup_prob",
    "mixup_switch_prob",
    "mixup_mode",
    "smoothing",
)


def check_flags(args) -> None:
    """ValueError for flags that contradict each other, before anything is read."""
    if args.eval and not args.resume:
        raise ValueError("--eval needs --resume FILE, the fine-tuned checkpoint to evaluate")
    if args.eval and args.dry_run:
        raise ValueError("--dry_run plans training, and --eval is none: leave one of them out")
    if args.classes and not args.eval:
        raise ValueError(
            "--classes names the outputs of a model for --eval; in training the data's class folders do"
        )
    if args.distill and not find(args.model).distillation:
        raise ValueError(
            f"--distill needs a model with a distillation token (deit_*_distilled_patch16), found {args.model}"
        )
    if args.swin_merge_last and "merge_last" not in find(args.model).options:
        raise ValueError(
            f"--swin_merge_last belongs to swin_tiny, swin_small and swin_base, not to {args.model}"
        )
    if args.predictions and not os.path.isdir(os.path.dirname(os.path.abspath(args.predictions))):
        raise ValueError(f"--predictions {args.predictions}: there is no such folder")
    if not args.eval and args.cache_data == "device" and (args.aa or args.color_jitter):
        raise ValueError(
            "--cache_data device cuts one crop of an image and flips it, and RandAugment and colour jitter do "
            "more: give --cache_data memory, or --aa '' without --color_jitter"
        )
    if args.ema and args.strategy == "fsdp":
        raise ValueError(
            "--ema keeps a whole copy of the weights and is not made for --strategy fsdp: drop one of them"
        )


def build_data(args, size, mean, device):
    """Training loader (None for --eval) and validation loader over the same classes."""
    common = dict(in_chans=args.in_chans, seed=args.seed)
    val = build_dataset(args.data_path, "val", eval_transform(size, args.crop_pct), evaluation=True, **common)
    if not hasattr(val, "index"):
        raise ValueError(
            f"--data_path {args.data_path}: timm's readers serve pretraining only; a classifier needs class "
            "folders or tars"
        )
    loading = dict(
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
    )
    val_loader = cached(eval_loader(val, **loading), args.cache_data, device)
    classes = val.index.classes
    crop = args.crop_pct or (224 / 256 if min(size) <= 224 else 1.0)
    dist.print_rank0(
        f"evaluation on {val.summary()}: centre crop {size[0]}x{size[1]} of {crop:.3f}, bicubic, classes in the order "
        f"{', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''}"
    )
    if args.eval:
        return None, val_loader
    augment = dict(
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        hflip=args.hflip,
        vflip=args.vflip,
        crop_scale=ascending(args.crop_scale, "--crop_scale"),
        mean=mean,
    )
    train = build_dataset(
        args.data_path, "train", finetune_transform(size, in_chans=args.in_chans, **augment), **common
    )
    check_same_classes(train.index, val.index)
    dist.print_rank0(f"training on {train.summary()}")
    return cached(train_loader(train, seed=args.seed, **loading), args.cache_data, device), val_loader


def resolve_labels(args, before: dict) -> dict[str, str]:
    """--pos_label auto: the checkpoint's own, in `before`, when fine-tuning or going on, else none.

    --pos_tokens, if not given, are the checkpoint's as well: its label head has learned from these.
    """
    label = "none" if args.eval else before.get("pos_label", "none")
    return {
        "pos_label": label if args.pos_label == "auto" else args.pos_label,
        "pos_tokens": args.pos_tokens or before.get("pos_tokens") or "half",
    }


def resolve_classes(args, saved: checkpoint.Checkpoint | None, data: ImageIndex) -> list[str]:
    """The model's classes in the order of its outputs: the data's, or those of the checkpoint that is evaluated."""
    classes = data.classes
    if args.eval:
        classes = known_classes(saved, classes, class_names(args.classes) if args.classes else None)
    elif saved is not None and saved.classes not in (None, classes):
        raise ValueError(
            f"{saved.path} was trained on the classes {some_names(saved.classes)}, the data have "
            f"{some_names(classes)}: give the data that it was made with, or another --output_dir"
        )
    if args.nb_classes not in (None, len(classes)):
        raise ValueError(
            f"--nb_classes {args.nb_classes}, but {saved.path if args.eval else data.path} has {len(classes)} "
            f"{'outputs' if args.eval else 'class folders'}: leave --nb_classes out, or check the path"
        )
    return classes


def build_model(
    args,
    size,
    num_classes: int,
    labels: dict,
    head: dict,
    before: dict,
    pretrained: checkpoint.Checkpoint | None,
):
    options = head_options(args.model, head) | dict(
        img_size=size,
        in_chans=args.in_chans,
        num_classes=num_classes,
        drop_path=args.drop_path,
        pos_embed=args.pos_embed,
        rpl_pairs=args.rpl_pairs,
        label_seed=args.seed,
        **labels,
        # MAE starts the head of a pretrained encoder near zero; from scratch it starts as everywhere.
        head_init_std=2e-5 if args.finetune else 0.02,
    )
    if (
        pretrained is not None
        and head["patch_embed"] == "conv"
        and "patch_embed.stem.0.weight" not in pretrained.model
    ):
        raise ValueError(
            f"--patch_embed conv cannot start from {args.finetune}: its encoder learned from patches that were "
            "embedded one by one, most of them masked, and a token of this embedding sees 33x33 pixels, masked "
            "ones among them. Leave --finetune out, or take --patch_embed linear"
        )
    if pool := args.pool or (before.get("pool") if args.eval else None):
        options["pool"] = pool
    if args.patch_size:
        options["patch_size"] = pair(args.patch_size, "--patch_size")
    if args.swin_merge_last:
        options["merge_last"] = True
    return build_classifier(args.model, **options)


def start_weights(args, model, pretrained: checkpoint.Checkpoint | None, plain: dict) -> None:
    """The encoder of --finetune, or none; one line says which."""
    if pretrained is None:
        dist.print_rank0("starting from scratch")
        return
    dist.print_rank0(
        f"encoder from {args.finetune}{checkpoint.other_than_trained(pretrained, plain)}; "
        + transfer.init_encoder(model, pretrained, args.pos_embed_init)
    )


def build_optimizer(args, model, batch: int) -> torch.optim.Optimizer:
    """AdamW for an effective batch. Layer decay belongs to fine-tuning; from scratch all layers learn alike."""
    groups = param_groups(
        model,
        args.weight_decay,
        model.no_weight_decay(),
        args.layer_decay if args.finetune else 1.0,
        model.layer_id,
        model.num_layers,
    )
    return adamw(groups, effective_lr(args.lr, args.blr, batch), betas=(0.9, 0.999))


def main(args) -> int:
    check_flags(args)
    compiling = compile_mode(args)
    device = dist.init(args.device, args.dist_backend, args.dist_timeout, args.local_rank)
    amp = resolve_amp(args.amp, device)
    if args.output_dir and not (args.eval or args.dry_run):
        dist.make_shared_folder(args.output_dir)

    # Where to start: own last checkpoint, --resume, --finetune, scratch
    plain = checkpoint.plain_flags(vars(args))
    saved = checkpoint.load_start("" if args.eval else args.output_dir, args.resume)
    before = checkpoint.stored_flags(saved)
    args.finetune = args.finetune or before.get(
        "finetune", ""
    )  # layer decay and what is trained depend on it
    new = before.get(
        "new_parameters"
    )  # which stay trained with --partial; the encoder's file tells, where it is read
    pretrained = None
    if args.finetune and (saved is None or (args.partial is not None and new is None)):
        pretrained = checkpoint.load(args.finetune)
        pretrained.drop_optimizer()
    new = sorted(transfer.new_parameters(pretrained)) if new is None else new
    plain |= {"finetune": args.finetune, "new_parameters": new}

    # Data: images as the encoder has learned to see them
    size = pair(args.input_size, "--input_size")
    mean, std = channel_stats(args, checkpoint.stored_flags(saved or pretrained))
    plain |= {"mean": list(mean), "std": list(std)}
    loader, val_loader = build_data(args, size, mean, device)

    # Model
    classes = resolve_classes(args, saved, val_loader.dataset.index)
    num_classes = len(classes)
    labels = resolve_labels(args, checkpoint.stored_flags(saved or pretrained))
    pos_label = labels["pos_label"]
    head = resolve_head(vars(args), args.model, saved)
    plain |= labels | head
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    model = build_model(args, size, num_classes, labels, head, before, pretrained).to(device)
    evaluation = dict(
        positions=pos_label != "none",
        device=device,
        mean=mean,
        std=std,
        amp=amp,
        predictions=args.predictions,
    )
    if args.eval:
        checkpoint.load_for_evaluation(model, saved)
        average = ", the moving average of its weights" if saved.ema is not None else ""
        dist.print_rank0(
            f"evaluating {args.resume} in {described(amp, device)}{average}"
            + checkpoint.other_than_trained(saved, plain)
        )
        evaluate(model, val_loader, classes, **evaluation)
        dist.shutdown()
        return 0
    if saved is not None:
        checkpoint.print_continuing(saved, plain)
    else:
        start_weights(args, model, pretrained, plain)
    if args.partial is not None:
        freeze_all_but(model, args.partial, keep=set(new))
    pretrained = None  # its memory is needed
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.strategy == "fsdp":
        fsdp.shard(model, device, amp)

    # Loss
    augment, mixed = make_augment(num_classes, device, **{name: getattr(args, name) for name in BATCH_FLAGS})
    teacher = (
        build_teacher(
            args.distill,
            args.distill_checkpoint,
            classes=classes,
            img_size=size,
            in_chans=args.in_chans,
            mean=mean,
            std=std,
        ).to(device)
        if args.distill
        else None
    )
    loss_fn = make_loss_fn(
        augment, make_criterion(args.smoothing, mixed), pos_label, args.pos_weight, teacher
    )

    # Optimizer and what is kept
    batch = args.batch_size * args.accum_iter * dist.world_size()
    optimizer = build_optimizer(args, model, batch)
    lr = optimizer.defaults["lr"]
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dist.print_rank0(
        f"{args.model}: {parameters / 1e6:.2f} M trained parameters, {num_classes} classes, {head['head']} head, "
        f"PE {model.trunk.pos_embed}, labels {pos_label}; "
        f"{described(amp, device)} on {device}; effective batch {args.batch_size} x {args.accum_iter} x "
        f"{dist.world_size()} = {batch}, lr {lr:.3g}"
    )

    extras, after_step = {}, None
    if args.ema:
        ema = WeightAverage(model, args.ema)
        extras, after_step = {"ema": ema}, lambda step: ema.update_parameters(model)
    log_dir = None if args.dry_run else args.log_dir or args.output_dir
    log = Log(args.output_dir, log_dir, args.print_freq, model.chance(), loss_tag="loss")
    keeper = None
    if args.output_dir:
        keeper = CheckpointManager(
            args.output_dir, args.save_every_epochs, args.save_minutes, args.save_steps, args.keep
        )

    def after_epoch(epoch: int, state) -> dict[str, float]:
        with fsdp.gathered(ema.module if args.ema else model) as whole:
            stats = evaluate(whole, val_loader, classes, **evaluation)
        if state.best is None or stats["acc1"] > state.best:
            state.best, state.best_epoch = stats["acc1"], epoch
        dist.print_rank0(f"Max accuracy: {state.best:.2f}% (epoch {state.best_epoch})")
        log.scalars({f"perf/test_{k}": stats[k] for k in ("acc1", "acc5", "loss")}, epoch)
        return {f"test_{k}": v for k, v in stats.items() if k != "images"} | {"n_parameters": parameters}

    finished = engine.fit(
        model,
        loss_fn,
        optimizer,
        loader,
        epochs=args.epochs,
        device=device,
        mean=mean,
        std=std,
        log=log,
        keeper=keeper,
        lr_at=lambda done: warmup_cosine(
            done, lr=lr, min_lr=args.min_lr, warmup=args.warmup_epochs, total=args.epochs
        ),
        args=plain,
        resume=saved,
        seed=args.seed,
        accum_iter=args.accum_iter,
        clip_grad=args.clip_grad,
        amp=amp,
        compile_mode=compiling,
        max_bad_images=args.max_bad_images,
        after_step=after_step,
        after_epoch=after_epoch,
        extras=extras,
        dry_run=args.dry_run,
    )
    dist.shutdown()
    return 0 if finished else 75


if __name__ == "__main__":
    sys.exit(run(main, ARGS))
