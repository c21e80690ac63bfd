"""Pretrain by self-distillation with self-relations: SERE (Li et al. 2022) on iBOT (Zhou et al. 2022).

    torchrun --nproc_per_node 8 main_sere.py @recipes/sere_vit_small.args --data_path DIR --output_dir RUN
    python main_sere.py ... --sr_spatial 0 --sr_channel 0 --cls_weight 1 --patch_weight 1           # iBOT alone

The checkpoint holds the student (`model`), the teacher and the centres; what fine-tuning and probing take is the teacher.

Exit codes: 0 all epochs done, 75 stopped by a signal with the state saved (the same command goes on), 2 wrong input.
"""

import argparse
import sys

from util.flags.groups import (
    add_data_flags,
    add_optim_flags,
    add_run_flags,
    add_self_relation_flags,
    ascending,
    channel_stats,
    compile_mode,
    pair,
)
from util.flags.parser import BELOW_ONE, Parser, number, parse, run


def get_args_parser() -> Parser:
    p = Parser(description="iBOT and SERE pretraining", add_help=False)
    g = p.add_argument_group("model")
    g.add_argument("--model", default="sere_vit_small_patch16", help="a name in models_sere.MODELS")
    g.add_argument(
        "--patch_size", default=None, type=int, nargs="+", metavar=("H", "W"), help="other than the model's"
    )
    g.add_argument(
        "--pos_embed", default="learned", choices=["none", "sincos", "learned"], help="encoder's embedding"
    )
    g.add_argument(
        "--drop_path", default=0.1, type=BELOW_ONE, help="stochastic depth of the student's last block"
    )
    g.add_argument(
        "--out_dim", default=8192, type=number(2), help="prototypes, shared by class tokens and patches"
    )
    g.add_argument(
        "--norm_last_layer",
        default=True,
        action=argparse.BooleanOptionalAction,
        help="prototypes of unit length; else each has a learned scale",
    )
    g = p.add_argument_group("losses")
    g.add_argument("--cls_weight", default=1.65, type=float, help="weight of the class-token loss")
    g.add_argument("--patch_weight", default=1.65, type=float, help="weight of the masked-patch loss")
    add_self_relation_flags(p, spatial=0.2, channel=0.5)
    g.add_argument(
        "--warmup_teacher_temp", default=0.04, type=float, help="where the teacher's temperature starts"
    )
    g.add_argument("--teacher_temp", default=0.07, type=float, help="where its ramp ends")
    g.add_argument("--warmup_teacher_temp_epochs", default=30, type=float, help="length of the ramp")
    add_data_flags(p)
    p.add_argument(
        "--local_size",
        default=[96],
        type=int,
        nargs="+",
        metavar=("H", "W"),
        help="size of local crops, H [W]",
    )
    p.add_argument(
        "--local_crops_number", default=10, type=number(0), help="local crops per image; 0 for none"
    )
    p.add_argument(
        "--global_crops_scale",
        default=[0.4, 1.0],
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="area of the two global crops, as a share of the image",
    )
    p.add_argument("--local_crops_scale", default=[0.05, 0.4], type=float, nargs=2, metavar=("MIN", "MAX"))
    p.add_argument(
        "--pred_ratio",
        default=[0.0, 0.3],
        type=float,
        nargs="+",
        help="masked share; a crop draws one of them",
    )
    p.add_argument(
        "--pred_ratio_var", default=[0.0, 0.2], type=float, nargs="+", help="half width of each one's range"
    )
    add_optim_flags(
        p,
        batch_size=64,
        epochs=100,
        blr=5e-4,
        min_lr=1e-6,
        weight_decay=0.04,
        warmup_epochs=10,
        clip_grad=0.3,
        clip_help="largest gradient norm of each parameter by itself; 0 is off",
    )
    p.add_argument("--weight_decay_end", default=0.4, type=float, help="where the weight decay's cosine ends")
    p.add_argument(
        "--freeze_last_layer", default=1.0, type=float, metavar="EPOCHS", help="keep the prototypes that long"
    )
    add_run_flags(p)
    return p


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a mistyped flag answer at once.
    ARGS = parse(get_args_parser())

import math
from collections.abc import Callable

import torch

import engine
from layers.self_distillation import MomentumUpdate, copy_parameters
from models_sere import MODELS, SereStudent, SereTeacher, make_centres
from util import dist
from util.data.datasets import build_dataset
from util.data.loading.cache import cached
from util.data.loading.loader import device_batches, sample_batches, train_loader
from util.data.multicrop import MultiCrop
from util.data.pixels import Pixels
from util.data.transforms import eval_transform
from util.evaluate.effective_rank import RANK_IMAGES, log_ranks
from util.run.checkpoint_manager import CheckpointManager
from util.run.log import Log
from util.train.amp import autocast, described, resolve_amp
from util.train.lr_sched import cosine, effective_lr, ramp, warmup_cosine
from util.train.optim import adamw, clip_each, param_groups
from util.weights import checkpoint


def build_model(args) -> SereStudent:
    if args.model not in MODELS:
        raise ValueError(f"--model {args.model} is unknown; there are {', '.join(MODELS)}")
    patch = {"patch_size": pair(args.patch_size, "--patch_size")} if args.patch_size else {}
    return MODELS[args.model](
        img_size=pair(args.input_size, "--input_size"),
        in_chans=args.in_chans,
        pos_embed=args.pos_embed,
        local_size=pair(args.local_size, "--local_size") if args.local_crops_number else None,
        drop_path=args.drop_path,
        out_dim=args.out_dim,
        norm_last_layer=args.norm_last_layer,
        sr_spatial=args.sr_spatial > 0,
        sr_channel=args.sr_channel > 0,
        sr_temp_spatial=args.sr_temp_spatial,
        sr_temp_channel=args.sr_temp_channel,
        **patch,
    )


def mask_ranges(args) -> list[tuple[float, float]]:
    """Ranges of the masked share, of which each global crop draws one."""
    if len(args.pred_ratio) != len(args.pred_ratio_var):
        raise ValueError(
            f"--pred_ratio has {len(args.pred_ratio)} values and --pred_ratio_var {len(args.pred_ratio_var)}: "
            "give a width for each"
        )
    ranges = [(ratio - width, ratio + width) for ratio, width in zip(args.pred_ratio, args.pred_ratio_var)]
    if any(not 0 <= low <= high <= 1 for low, high in ranges):
        raise ValueError(
            f"--pred_ratio and --pred_ratio_var give the ranges {ranges}: each must lie in [0, 1]"
        )
    return ranges


def schedules(args) -> Callable[[float], dict[str, float]]:
    """Epochs done -> the values of all schedules but the learning rate's, a pure function."""

    def at(done: float) -> dict[str, float]:
        return {
            "momentum": cosine(done, start=args.ema_momentum, end=1.0, total=args.epochs),
            "weight_decay": cosine(
                done, start=args.weight_decay, end=args.weight_decay_end, total=args.epochs
            ),
            "temperature": ramp(
                done,
                start=args.warmup_teacher_temp,
                end=args.teacher_temp,
                length=args.warmup_teacher_temp_epochs,
            ),
            "frozen": done < args.freeze_last_layer,
        }

    return at


def make_loss_fn(teacher: SereTeacher, centres, now: dict, weights: dict[str, float], most_masked: int):
    """L = sum of weight * loss (SERE's published weights: 1.65, 1.65, 0.2 and 0.5)."""

    def loss_fn(model, batch):
        mask = batch["mask"].flatten(0, 1)  # (B*2, L)
        # As many cells for every crop, so that nothing waits for the device to count them; surplus ones do not count.
        ids = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :most_masked]
        targets = teacher(batch["image"], ids, centres, now["temperature"])
        losses = model(batch["image"], batch["local"], batch["mask"], ids, batch["boxes"], targets)
        spread = torch.special.entr(targets["cls"]).sum(-1).mean()  # 0: all weight on one prototype
        return sum(weights[name] * value for name, value in losses.items()), losses | {
            "teacher_entropy": spread
        }

    return loss_fn


def chance_levels(model: SereStudent, args) -> dict[str, float]:
    """Losses of uniform distributions, by their names in the log; a crop without masked cells counts 0 in `patch`."""
    spread = math.log(args.out_dim)
    points = [2 * math.log(math.prod(model.points))]
    if args.local_crops_number:
        points.append(2 * args.local_crops_number * math.log(math.prod(model.local_grid)))
    return (
        {
            "cls": spread,
            "patch": spread * sum(r > 0 for r in args.pred_ratio) / len(args.pred_ratio),
            "teacher_entropy": spread,
        }
        | ({"sr_spatial": sum(points) / (2 + 2 * args.local_crops_number)} if args.sr_spatial else {})
        | ({"sr_channel": math.log(model.dim)} if args.sr_channel else {})
    )


def main(args) -> int:
    device = dist.init(args.device, args.dist_backend, args.dist_timeout, args.local_rank)
    amp = resolve_amp(args.amp, device)
    compiling = compile_mode(args)
    size, (mean, std) = pair(args.input_size, "--input_size"), channel_stats(args)
    if args.output_dir and not args.dry_run:
        dist.make_shared_folder(args.output_dir)
    if args.strategy == "fsdp":
        raise ValueError(
            "--strategy fsdp is for runs without a teacher, which averages whole parameters: leave it out"
        )

    # Model, teacher, losses
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    model = build_model(args).to(device)
    teacher = copy_parameters(SereTeacher(model).to(device), model)
    move_teacher = MomentumUpdate(teacher, model)
    centres = make_centres(args.out_dim).to(device)
    now, schedule = {}, schedules(args)
    ranges = mask_ranges(args)
    most_masked = max(1, int(max(high for _, high in ranges) * model.patch_embed.num_patches))
    weights = {
        "cls": args.cls_weight,
        "patch": args.patch_weight,
        "sr_spatial": args.sr_spatial,
        "sr_channel": args.sr_channel,
    }
    loss_fn = make_loss_fn(teacher, centres, now, weights, most_masked)

    # Data
    crops = MultiCrop(
        size,
        pair(args.local_size, "--local_size"),
        args.local_crops_number,
        model.grid,
        global_scale=ascending(args.global_crops_scale, "--global_crops_scale"),
        local_scale=ascending(args.local_crops_scale, "--local_crops_scale"),
        mask_ratios=ranges,
    )
    data = dict(in_chans=args.in_chans, seed=args.seed, labels=False)
    train = build_dataset(args.data_path, "train", crops, **data)
    dist.print_rank0(train.summary())
    loader = train_loader(
        train,
        batch_size=args.batch_size,
        seed=args.seed,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
    )
    loader = cached(loader, args.cache_data, device)
    shown = build_dataset(args.data_path, "train", eval_transform(size), **data)

    # Optimizer
    batch = args.batch_size * args.accum_iter * dist.world_size()
    lr = effective_lr(args.lr, args.blr, batch)
    groups = param_groups(model, 1.0, model.no_weight_decay())
    decayed = [i for i, group in enumerate(groups) if group["weight_decay"]]
    optimizer = adamw(groups, lr, betas=(0.9, 0.999))
    trained = [p for group in groups for p in group["params"]]
    dist.print_rank0(
        f"{args.model}: {sum(p.numel() for p in trained) / 1e6:.1f} M trained parameters; "
        f"{described(amp, device)} on {device}; effective batch {args.batch_size} x {args.accum_iter} x "
        f"{dist.world_size()} = {batch}, lr {lr:.3g}"
    )

    plain = checkpoint.plain_flags(vars(args))
    resume = checkpoint.continue_from(args.output_dir, args.resume, plain)
    if resume is None:
        dist.print_rank0("starting from scratch")
    log_dir = None if args.dry_run else args.log_dir or args.output_dir
    log = Log(args.output_dir, log_dir, args.print_freq, chance_levels(model, args))
    keeper = None
    if args.output_dir:
        keeper = CheckpointManager(
            args.output_dir, args.save_every_epochs, args.save_minutes, args.save_steps, args.keep
        )

    def before_update(done: float) -> None:
        now.update(schedule(done))
        for i in decayed:
            optimizer.param_groups[i]["weight_decay"] = now["weight_decay"]

    def before_step() -> None:
        if args.clip_grad:
            clip_each(trained, args.clip_grad)
        if now["frozen"]:
            for p in model.ibot_head.last_layer():
                p.grad = None

    def after_epoch(epoch: int, state) -> dict[str, float]:
        if not dist.is_main():
            return {}
        batches = device_batches(
            sample_batches(shown, RANK_IMAGES, args.batch_size), device, Pixels(mean, std)
        )
        with autocast(device, amp):
            return {f"test_{k}": v for k, v in log_ranks(teacher, batches, log, epoch).items()}

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
        resume=resume,
        seed=args.seed,
        accum_iter=args.accum_iter,
        amp=amp,
        compile_mode=compiling,
        max_bad_images=args.max_bad_images,
        before_update=before_update,
        before_step=before_step,
        after_step=lambda step: move_teacher(now["momentum"]),
        after_epoch=after_epoch,
        extras={"teacher": teacher, "centres": centres},
        dry_run=args.dry_run,
    )
    dist.shutdown()
    return 0 if finished else 75


if __name__ == "__main__":
    sys.exit(run(main, ARGS))
