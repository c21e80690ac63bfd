"""Pretrain a masked autoencoder whose encoder has no positional embedding and learns positional labels instead.

    python main_pretrain.py                                                       # the demo set
    torchrun --nproc_per_node 8 main_pretrain.py @recipes/mae_pl_vit_base.args --data_path DIR --output_dir RUN

Exit codes: 0 all epochs done, 75 stopped by a signal with the state saved (the same command goes on), 2 wrong input.
"""

import os
import sys

from util.flags.groups import (
    add_data_flags,
    add_optim_flags,
    add_position_flags,
    add_run_flags,
    add_self_relation_flags,
    ascending,
    channel_stats,
    compile_mode,
    pair,
)
from util.flags.parser import SHARE, Parser, parse, run


def get_args_parser() -> Parser:
    p = Parser(description="MAE pretraining with positional labels", add_help=False)
    g = p.add_argument_group("model")
    g.add_argument("--model", default="mae_vit_large_patch16", help="a name in models_mae_pl.MODELS")
    g.add_argument(
        "--patch_size", default=None, type=int, nargs="+", metavar=("H", "W"), help="other than the model's"
    )
    g.add_argument("--mask_ratio", default=0.75, type=float, help="share of patches that are removed")
    g.add_argument(
        "--norm_pix_loss", action="store_true", help="normalise the target by each patch's mean and variance"
    )
    g.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="run each block again in backward: less memory, a fifth to a third more time",
    )
    add_position_flags(p, pos_embed="none", pos_label="apl")
    add_self_relation_flags(p, spatial=0.0, channel=0.0)
    p.add_argument(
        "--sr_views",
        default="same",
        choices=["same", "two"],
        help="the teacher sees the whole image of which the student sees a part, or another crop",
    )
    add_data_flags(p)
    p.add_argument(
        "--crop_scale",
        default=[0.2, 1.0],
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="area of the random crop, as a share of the image",
    )
    p.add_argument("--hflip", default=0.5, type=SHARE, help="chance of a left-right flip")
    p.add_argument(
        "--dct_scaling",
        action="store_true",
        help="decode large JPEGs at a half or less where the crop allows it: faster, not exactly the same pixels",
    )
    add_optim_flags(p, batch_size=64, epochs=400, blr=1e-3, min_lr=0.0, weight_decay=0.05, warmup_epochs=40)
    add_run_flags(p)
    p.add_argument("--init_from", default="", help="weights to start from, with a fresh schedule")
    p.add_argument(
        "--picture_epochs", default=20, type=int, help="evaluate and draw reconstructions every N epochs"
    )
    return p


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a mistyped flag answer at once.
    ARGS = parse(get_args_parser())

import torch

import engine
from layers.positional.draws import draws_of
from layers.self_distillation import MomentumUpdate, copy_parameters
from models_mae_pl import MODELS, MaskedAutoencoderViT, RelationTeacher, random_masking, sample_noise
from util import dist
from util.data.datasets import build_dataset
from util.data.loading.cache import cached
from util.data.loading.loader import (
    collate,
    device_batches,
    eval_loader,
    sample_batches,
    some_samples,
    train_loader,
)
from util.data.multicrop import TwoViews
from util.data.pixels import Pixels
from util.data.sources.image_index import NoSplit
from util.data.transforms import eval_transform, pretrain_transform, unnormalize
from util.dist import fsdp
from util.evaluate import evaluation
from util.evaluate.effective_rank import RANK_IMAGES, log_ranks
from util.report.panels import reconstruction_panel, save_png, unnormalize_patches
from util.run.checkpoint_manager import CheckpointManager
from util.run.guards import survive_full_disk
from util.run.log import Log
from util.train.amp import autocast, described, resolve_amp
from util.train.lr_sched import cosine, effective_lr, warmup_cosine
from util.train.optim import adamw, param_groups
from util.weights import checkpoint, transfer


def build_model(args) -> MaskedAutoencoderViT:
    if args.model not in MODELS:
        raise ValueError(f"--model {args.model} is unknown; there are {', '.join(MODELS)}")
    patch = {"patch_size": pair(args.patch_size, "--patch_size")} if args.patch_size else {}
    return MODELS[args.model](
        img_size=pair(args.input_size, "--input_size"),
        in_chans=args.in_chans,
        norm_pix_loss=args.norm_pix_loss,
        pos_embed=args.pos_embed,
        pos_label=args.pos_label,
        pos_tokens=args.pos_tokens,
        rpl_pairs=args.rpl_pairs,
        label_seed=args.seed,
        sr_spatial=args.sr_spatial > 0,
        sr_channel=args.sr_channel > 0,
        sr_temp_spatial=args.sr_temp_spatial,
        sr_temp_channel=args.sr_temp_channel,
        **patch,
    )


def make_loss_fn(num_patches: int, mask_ratio: float, pos_weight: float, teacher=None, relation_weights=None):
    """L = pixel + pos_weight * position (MAE Eq. 1; positional labels Sec. 3.3, Eq. 6).

    With a teacher also relation_weights[name] * losses[name] for `sr_spatial` and `sr_channel` (SERE).
    """

    def loss_fn(model, batch):
        # The mask is the sample's own, as its crop is: the same on any number of ranks, workers and resumes.
        ids_keep = random_masking(sample_noise(batch["key"], num_patches), mask_ratio)
        targets = {}
        if teacher is not None and "second" in batch:
            targets = {"relation_targets": teacher(batch["second"]) | {"boxes": batch["boxes"]}}
        elif teacher is not None:
            targets = {"relation_targets": teacher(batch["image"])}
        losses, _, _ = model(
            batch["image"], ids_keep=ids_keep, want_pred=False, draws=draws_of(batch), **targets
        )
        loss = losses["pixel"]
        if "position" in losses:
            loss = loss + pos_weight * losses["position"]
        if teacher is not None:
            loss = loss + sum(relation_weights[name] * losses[name] for name in relation_weights)
        return loss, losses

    return loss_fn


def follow_model(teacher: RelationTeacher, model: MaskedAutoencoderViT, momentum: float, epochs: int) -> dict:
    """What `engine.fit` needs to keep a teacher: its average moves after each update, ever slower."""
    now, update = {}, MomentumUpdate(teacher, model)
    return dict(
        before_update=lambda done: now.update(momentum=cosine(done, start=momentum, end=1.0, total=epochs)),
        after_step=lambda step: update(now["momentum"]),
        extras={"teacher": teacher},
    )


def evaluate(model, loss_fn, loader, chance: dict[str, float], **options) -> dict[str, float]:
    """The losses on the validation images, printed beside the level of guessing; `options` are evaluation.evaluate's."""
    stats = evaluation.evaluate(model, loss_fn, loader, **options)
    images = stats.pop("images")
    dist.print_rank0(
        f"* {images} val images  "
        + "  ".join(
            f"{k} {v:.4f}" + (f" (chance {chance[k]:.4f})" if k in chance else "") for k, v in stats.items()
        )
    )
    return stats


@torch.no_grad()
def draw(model, images, keys, mask_ratio: float, mean, std):
    """Original | masked | reconstruction | predicted positions, one row per image -> (H, W, 3) uint8."""
    model.eval()
    L = model.patch_embed.num_patches
    ids_keep = random_masking(sample_noise(keys, L), mask_ratio)
    pred, mask = model.predict(images, ids_keep)
    pred = pred.float()
    if model.norm_pix_loss:
        pred = unnormalize_patches(pred, model.patchify(images))
    cells = None
    if model.pos_head is not None and model.pos_head.absolute is not None:
        tokens = model.forward_encoder(images, ids_keep)[:, 1:]
        cells = model.pos_head.absolute.logits(tokens).argmax(-1)
    return reconstruction_panel(
        unnormalize(images, mean, std) / 255,
        mask,
        unnormalize(model.unpatchify(pred), mean, std) / 255,
        patch_size=model.patch_size,
        grid=model.grid,
        visible_ids=None if cells is None else ids_keep,
        predicted_cells=cells,
        reconstruction_title="reconstruction (true patch mean/std)"
        if model.norm_pix_loss
        else "reconstruction",
    )


def build_data(args, size, device, two_views: bool):
    """Training loader, and validation loader or None."""
    data = dict(in_chans=args.in_chans, seed=args.seed, labels=False)
    if two_views and args.dct_scaling:
        raise ValueError(
            "--dct_scaling crops one view and does not go with --sr_views two: leave one of them out"
        )
    crop = size, ascending(args.crop_scale, "--crop_scale"), args.hflip
    augment = TwoViews(*crop) if two_views else pretrain_transform(*crop, dct_scaling=args.dct_scaling)
    train = build_dataset(args.data_path, "train", augment, **data)
    dist.print_rank0(train.summary())
    loading = dict(
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
    )
    loader = cached(train_loader(train, seed=args.seed, **loading), args.cache_data, device)
    try:
        val = build_dataset(args.data_path, "val", eval_transform(size), evaluation=True, **data)
    except NoSplit:
        val = None
    if len(set(dist.gather_objects(val is None))) > 1:
        raise ValueError(
            f"some ranks find val images in {args.data_path}, and some do not: copy the data to the nodes again"
        )
    if val is None:
        dist.print_rank0(
            "no val images beside the training images: pictures show training images, nothing is evaluated"
        )
        return loader, None
    return loader, cached(eval_loader(val, **loading), args.cache_data, device)


def main(args) -> int:
    device = dist.init(args.device, args.dist_backend, args.dist_timeout, args.local_rank)
    amp = resolve_amp(args.amp, device)
    compiling = compile_mode(args)
    size, (mean, std) = pair(args.input_size, "--input_size"), channel_stats(args)
    if args.output_dir and not args.dry_run:
        dist.make_shared_folder(args.output_dir)

    # Data
    relations = {
        name: w for name, w in (("sr_spatial", args.sr_spatial), ("sr_channel", args.sr_channel)) if w > 0
    }
    loader, val_loader = build_data(args, size, device, two_views=bool(relations) and args.sr_views == "two")

    # Model and loss
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    model = build_model(args).to(device)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.strategy == "fsdp":
        if relations:
            raise ValueError(
                "--strategy fsdp does not go with --sr_spatial and --sr_channel: their teacher averages whole "
                "parameters; leave it out"
            )
        fsdp.shard(model, device, amp)
    L = model.patch_embed.num_patches
    chance = model.chance(args.mask_ratio)  # also refuses a mask ratio that leaves nothing visible
    teacher = copy_parameters(RelationTeacher(model).to(device), model) if relations else None
    loss_fn = make_loss_fn(L, args.mask_ratio, args.pos_weight, teacher, relations)
    # Relations are normalised by the batch of all ranks, and ranks may have unequal shares of the validation images.
    eval_loss_fn = loss_fn if teacher is None else make_loss_fn(L, args.mask_ratio, args.pos_weight)

    # Optimizer
    batch = args.batch_size * args.accum_iter * dist.world_size()
    lr = effective_lr(args.lr, args.blr, batch)
    # As MAE: class and mask token are decayed in pretraining, and MAE's own files continue.
    optimizer = adamw(param_groups(model, args.weight_decay), lr, betas=(0.9, 0.95))
    dist.print_rank0(
        f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {L} patches; "
        f"{described(amp, device)} on {device}; effective batch {args.batch_size} x {args.accum_iter} x "
        f"{dist.world_size()} = {batch}, lr {lr:.3g}"
    )

    # Where to start: the run's own last checkpoint, --resume, --init_from, scratch
    plain = checkpoint.plain_flags(vars(args))
    resume = checkpoint.continue_from(args.output_dir, args.resume, plain)
    if resume is None and args.init_from:
        note = transfer.init_from(model, checkpoint.load(args.init_from))
        if teacher is not None:
            copy_parameters(teacher, model)
        dist.print_rank0(f"weights from {args.init_from}, fresh schedule; {note}")
    elif resume is None:
        dist.print_rank0("starting from scratch")

    log_dir = None if args.dry_run else args.log_dir or args.output_dir
    log = Log(args.output_dir, log_dir, args.print_freq, chance)
    keeper = None
    if args.output_dir:
        keeper = CheckpointManager(
            args.output_dir, args.save_every_epochs, args.save_minutes, args.save_steps, args.keep
        )
    shown_set = (val_loader or loader).dataset
    shown = some_samples(shown_set, 4)

    def after_epoch(epoch: int, state) -> dict[str, float]:
        if epoch + 1 < args.epochs and (args.picture_epochs < 1 or (epoch + 1) % args.picture_epochs):
            return {}
        with fsdp.gathered(model) as whole:
            stats = {}
            if val_loader is not None:
                stats = evaluate(
                    whole, eval_loss_fn, val_loader, chance, device=device, mean=mean, std=std, amp=amp
                )
            if teacher is not None:
                batches = device_batches(
                    sample_batches(shown_set, RANK_IMAGES, args.batch_size), device, Pixels(mean, std)
                )
                with autocast(device, amp):
                    stats |= log_ranks(whole, batches, log, epoch)
            if dist.is_main() and args.output_dir:
                images = next(device_batches([collate(shown)], device, Pixels(mean, std)))
                panel = draw(whole, images["image"], images["key"], args.mask_ratio, mean, std)
                path = os.path.join(args.output_dir, "pictures", f"epoch-{epoch:04d}.png")
                with survive_full_disk():
                    save_png(panel, path)
                    print(f"picture: {path}", flush=True)
                log.picture("reconstruction", panel, epoch)
        return {f"test_{k}": v for k, v in stats.items()}

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
        clip_grad=args.clip_grad,
        amp=amp,
        compile_mode=compiling,
        max_bad_images=args.max_bad_images,
        dry_run=args.dry_run,
        after_epoch=after_epoch,
        **(follow_model(teacher, model, args.ema_momentum, args.epochs) if teacher is not None else {}),
    )
    dist.shutdown()
    return 0 if finished else 75


if __name__ == "__main__":
    sys.exit(run(main, ARGS))
