"""Pretrain a masked autoencoder whose encoder has no positional embedding and learns positional labels
instead.

    python main_pretrain.py                                                                    # the demo set
    torchrun --nproc_per_node 8 main_pretrain.py @recipes/mae_pl_vit_base.args --data_path DIR --output_dir R

Exit codes: 0 all epochs are done, or the updates of --max_steps; 75 a signal stopped the run, its state is
saved, and the same command continues it; 2 an error that its message explains.
"""

import argparse
import os
import sys

from layers.sizes import mae_names
from util.flags.data_path import DataPath
from util.flags.early import check_model
from util.flags.groups import (
    OptimDefaults,
    add_data_flags,
    add_optim_flags,
    add_picture_bands,
    add_position_flags,
    add_run_flags,
    add_self_relation_flags,
    ascending,
    channel_stats,
    compile_mode,
    pair,
)
from util.flags.numbers import BELOW_ONE, SHARE, number, side
from util.flags.parser import Parser, answer_at_once, examples, given_in, parse, run


def get_args_parser() -> Parser:
    about = "MAE pretraining with positional labels"
    p = Parser(description=about, epilog=examples(__doc__), add_help=False)
    add_model_flags(p.add_argument_group("model"))
    add_position_flags(p, pos_embed="none", pos_label="apl")
    add_self_relation_flags(p, spatial=0.0, channel=0.0)
    views = "images of the relations' teacher: the whole image that the student sees masked, or another crop"
    p.add_argument("--sr_views", default="same", choices=["same", "two"], help=views)
    add_data_flags(p)
    area = "area of the random crop, as a share of the image"
    p.add_argument("--crop_scale", default=[0.2, 1.0], type=SHARE, nargs=2, metavar=("MIN", "MAX"), help=area)
    p.add_argument("--hflip", default=0.5, type=SHARE, help="probability of a left-right flip")
    flip = "probability of an upside-down flip"
    p.add_argument("--vflip", default=0.0, type=SHARE, metavar="PROB", help=flip)
    turn = "probability of a turn by 90, 180 or 270 degrees, for overhead and microscope images"
    p.add_argument("--rot90", default=0.0, type=SHARE, metavar="PROB", help=turn)
    dct = "decode large JPEGs at half size or less if the crop allows it: faster, slightly different pixels"
    p.add_argument("--dct_scaling", action="store_true", help=dct)
    defaults = OptimDefaults(
        batch_size=64, epochs=400, blr=1e-3, min_lr=0.0, weight_decay=0.05, warmup_epochs=40
    )
    add_optim_flags(p, defaults)
    add_run_flags(p)
    p.add_argument("--init_from", default="", help="weights to start from, with a fresh schedule")
    pictures = "evaluate and draw reconstructions every N epochs"
    p.add_argument("--picture_epochs", default=20, type=number(0), metavar="N", help=pictures)
    add_picture_bands(p)
    return p


def add_model_flags(g) -> None:
    names = f"that of the checkpoint if the run starts from one; one of {', '.join(mae_names())}"
    g.add_argument("--model", default="mae_vit_large_patch16", help=names)
    patch = "patch size, if other than the model's"
    g.add_argument("--patch_size", default=None, type=side, nargs="+", metavar=("H", "W"), help=patch)
    g.add_argument("--mask_ratio", default=0.75, type=BELOW_ONE, help="share of patches that are removed")
    normalise = "normalise the pixel targets by each patch's mean and variance"
    g.add_argument("--norm_pix_loss", action="store_true", help=normalise)
    recompute = "recompute each block in backward: less memory, a fifth to a third more time"
    g.add_argument("--grad_checkpointing", action="store_true", help=recompute)


answer_at_once(__name__, get_args_parser())  # the imports below take seconds

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from engine import Objective, Session, Setup, fit
from layers.positional import label_choices
from layers.positional.draws import draws_of
from layers.self_distillation import MomentumUpdate, copy_parameters
from models_mae_pl import (
    MODELS,
    MaskedAutoencoderViT,
    RelationTeacher,
    random_masking,
    sample_noise,
    total,
)
from util import dist
from util.data.contract import Batches, Samples
from util.data.datasets import build_dataset
from util.data.formats import ReadSettings
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
from util.data.survey.ranges import check_same_depth, kept_range, with_range
from util.data.transforms import eval_transform, pretrain_transform
from util.dist import fsdp
from util.evaluate.effective_rank import RANK_IMAGES, log_ranks
from util.evaluate.passes import mean_terms
from util.files.names import counted
from util.report.panels import (
    Bands,
    PredictedPositions,
    reconstruction_panel,
    save_png,
    unnormalize_patches,
)
from util.run.guards import survive_full_disk
from util.run.session import (
    STOPPED,
    check_and_print_continuing,
    describe_batch,
    effective_batch,
    join_ranks,
    open_budget,
)
from util.train.amp import resolve_amp
from util.train.lr_sched import cosine, effective_lr
from util.train.objective import LossFunction
from util.train.optim import adamw, param_groups
from util.train.state import TrainState
from util.weights import checkpoint, transfer
from util.weights.defaults import as_stored
from util.weights.types import Checkpoint, stored_eps, stored_flags


class Relations:
    """SERE's losses between visible tokens, learned from a moving average of the model that sees whole
    images.

    `weights` maps `sr_spatial` and `sr_channel` to the weights of their losses. The average's momentum rises
    from `momentum` to 1 over `epochs`.
    """

    def __init__(self, model: MaskedAutoencoderViT, weights: dict[str, float], momentum: float, epochs: int):
        device = model.cls_token.device
        self.teacher = copy_parameters(RelationTeacher(model).to(device), model)
        self.weights = weights
        self.first_momentum = momentum
        self.momentum = momentum
        self.epochs = epochs
        self._update = MomentumUpdate(self.teacher, model)

    def targets(self, batch: dict) -> dict[str, Tensor]:
        """Return what the teacher sees in the image, or in its second crop if the batch has one."""
        if "second" in batch:
            return self.teacher(batch["second"]) | {"boxes": batch["boxes"]}
        return self.teacher(batch["image"])

    def set_momentum(self, done: float) -> None:
        self.momentum = cosine(done, start=self.first_momentum, end=1.0, total=self.epochs)

    def follow(self) -> None:
        self._update(self.momentum)


@dataclass
class Start:
    """Where a run starts: the checkpoint that it continues, or weights for a fresh schedule, or neither."""

    resume: Checkpoint | None
    weights: Checkpoint | None

    @property
    def saved(self) -> Checkpoint | None:
        """The checkpoint of either kind."""
        return self.resume or self.weights

    @property
    def trained(self) -> dict:
        """The flags that the checkpoint stores; {} from scratch."""
        return stored_flags(self.saved)


@dataclass
class Pretraining(Objective):
    """L = pixel + pos_weight * position (MAE Eq. 1; positional labels Sec. 3.3, Eq. 6), and SERE's relation
    losses.
    """

    model: MaskedAutoencoderViT
    mask_ratio: float
    pos_weight: float
    relations: Relations | None = None
    evaluation: "Evaluation | None" = None

    def loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        if self.relations is None:
            return self.reconstruction_loss(model, batch)
        loss, losses = self.reconstruction_loss(model, batch, self.relations.targets(batch))
        return loss + sum(weight * losses[name] for name, weight in self.relations.weights.items()), losses

    def reconstruction_loss(
        self, model: nn.Module, batch: dict, relation_targets: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss without relations; with targets for them, their losses are among the terms."""
        # The mask is a function of the sample's key, as its crop is: it does not depend on ranks,
        # workers or resumes.
        noise = sample_noise(batch["key"], self.model.patch_embed.num_patches)
        ids_keep = random_masking(noise, self.mask_ratio)
        losses, _, _ = model(
            batch["image"],
            ids_keep=ids_keep,
            want_pred=False,
            relation_targets=relation_targets,
            draws=draws_of(batch),
        )
        return total(losses, self.pos_weight), losses

    def before_update(self, done: float) -> None:
        if self.relations is not None:
            self.relations.set_momentum(done)

    def after_step(self, step: int) -> None:
        if self.relations is not None:
            self.relations.follow()

    def after_epoch(self, epoch: int, state: TrainState) -> dict[str, float]:
        if self.evaluation is None or not self.evaluation.due(epoch):
            return {}
        return self.evaluation.run(self, epoch)

    def state(self) -> dict[str, nn.Module]:
        if self.relations is None:
            return {}
        return {"teacher": self.relations.teacher}


@dataclass
class Evaluation:
    """Losses on the validation images, effective ranks, and a picture of reconstructions, every `every`
    epochs.
    """

    setup: Setup
    session: Session
    loader: Batches[Samples]  # of the training images, which are shown if there are no validation images
    val_loader: Batches[Samples] | None
    every: int
    epochs: int
    bands: Bands
    shown: list[dict] = field(init=False)

    def __post_init__(self):
        self.shown = some_samples(self.shown_set, 4)

    @property
    def shown_set(self) -> Samples:
        return (self.val_loader or self.loader).dataset

    def due(self, epoch: int) -> bool:
        return epoch + 1 == self.epochs or (self.every >= 1 and (epoch + 1) % self.every == 0)

    def run(self, objective: Pretraining, epoch: int) -> dict[str, float]:
        """Return the figures of log.txt and write the picture."""
        stats: dict[str, float] = {}
        log = self.session.log
        with fsdp.gathered(objective.model) as whole:
            if self.val_loader is not None:
                # Without relations: they are normalised by the batch of all ranks, and ranks may have
                # unequal shares of these images.
                stats = self.losses(whole, objective.reconstruction_loss, self.val_loader)
                log.scalars({f"perf/test_{name}": value for name, value in stats.items()}, epoch)
            if objective.relations is not None:
                stats |= self.ranks(whole, epoch)
            if dist.is_main() and log.output_dir:
                self.draw(whole, objective.mask_ratio, epoch, log.output_dir)
        return {f"test_{name}": value for name, value in stats.items()}

    def losses(
        self, model: MaskedAutoencoderViT, loss_fn: LossFunction, val_loader: Batches[Samples]
    ) -> dict[str, float]:
        """Return the losses on the validation images; print them with their chance levels."""
        stats = mean_terms(model, loss_fn, val_loader, self.setup)
        images = stats.pop("images")
        terms = []
        for name, value in stats.items():
            terms.append(f"{name} {value:.4f}")
            if name in self.session.log.chance:
                terms[-1] += f" (chance {self.session.log.chance[name]:.4f})"
        dist.print_rank0(f"* {counted(int(images), 'val image')}  " + "  ".join(terms))
        return stats

    def ranks(self, model: MaskedAutoencoderViT, epoch: int) -> dict[str, float]:
        samples = sample_batches(self.shown_set, RANK_IMAGES, self.loader.batch_size)
        batches = device_batches(samples, self.setup.device, self.setup.pixels)
        with self.setup.autocast():
            return log_ranks(model, batches, self.session.log, epoch)

    def draw(self, model: MaskedAutoencoderViT, mask_ratio: float, epoch: int, output_dir: str) -> None:
        batch = next(device_batches([collate(self.shown)], self.setup.device, self.setup.pixels))
        panel = draw(model, batch["image"], batch["key"], mask_ratio, self.setup.pixels, self.bands)
        path = os.path.join(output_dir, "pictures", f"epoch-{epoch:04d}.png")
        with survive_full_disk():
            save_png(panel, path)
            print(f"picture: {path}", flush=True)
        self.session.log.picture("reconstruction", panel, epoch)


@torch.no_grad()
def draw(
    model: MaskedAutoencoderViT,
    images: Tensor,
    keys: Tensor,
    mask_ratio: float,
    pixels: Pixels,
    bands: Bands,
) -> np.ndarray:
    """Return a picture (H, W, 3) uint8 of original, masked image, reconstruction and predicted positions, a
    row each.
    """
    model.eval()
    ids_keep = random_masking(sample_noise(keys, model.patch_embed.num_patches), mask_ratio)  # (B, n)
    pred, mask = model.predict(images, ids_keep)
    pred = pred.float()
    title = "reconstruction"
    if model.norm_pix_loss:
        # Such a model predicts neither brightness nor contrast of a patch. The picture takes the true ones.
        pred = unnormalize_patches(pred, model.patchify(images))
        title = "reconstruction (true patch mean/std)"
    positions = None
    if model.pos_head is not None and model.pos_head.absolute is not None:
        tokens = model.forward_encoder(images, ids_keep)[:, 1:]  # (B, n, C)
        positions = PredictedPositions(ids_keep, model.pos_head.absolute.logits(tokens).argmax(-1))
    return reconstruction_panel(
        bands.shown(pixels.unnormalize(images)) / 255,
        mask,
        bands.shown(pixels.unnormalize(model.unpatchify(pred))) / 255,
        patch_size=model.patch_size,
        positions=positions,
        titles=(f"original{bands.note}", title),
    )


def build_model(args: argparse.Namespace, device: torch.device) -> MaskedAutoencoderViT:
    check_model("main_pretrain", args.model, list(MODELS))
    options = {}
    if args.patch_size:
        options["patch_size"] = pair(args.patch_size, "--patch_size")
    model = MODELS[args.model](
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
        **options,
    ).to(device)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def relation_weights(args: argparse.Namespace) -> dict[str, float]:
    """Return the weights of the relation losses that are on."""
    weights = {"sr_spatial": args.sr_spatial, "sr_channel": args.sr_channel}
    return {name: weight for name, weight in weights.items() if weight > 0}


EMBEDDINGS = {
    "none": "no positional embedding in the encoder",
    "sincos": "MAE's fixed positional embedding",
    "learned": "a learned positional embedding",
}


def describe_method(args: argparse.Namespace) -> str:
    """Return a line on what the encoder learns, and on the flags of plain MAE; '' if this is plain MAE."""
    plain = "--pos_embed sincos --pos_label none"
    parts = [EMBEDDINGS[args.pos_embed]]
    if args.pos_label == "none":
        parts.append("no positional labels")
    else:
        parts.append(f"positional labels {args.pos_label} of weight {args.pos_weight:g}")
    if relations := relation_weights(args):
        parts += [f"{name} {weight:g}" for name, weight in relations.items()]
        plain += " --sr_spatial 0 --sr_channel 0"
    elif (args.pos_embed, args.pos_label) == ("sincos", "none"):
        return ""
    return f"method: {', '.join(parts)}; plain MAE is {plain}"


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that contradict each other, before anything is read."""
    compile_mode(args.compile, args.compile_mode, args.accum_iter)
    relations = relation_weights(args)
    if args.strategy == "fsdp" and relations:
        raise ValueError(
            "--strategy fsdp does not work with --sr_spatial and --sr_channel, whose teacher averages whole "
            "parameters: leave it out"
        )
    if args.dct_scaling and relations and args.sr_views == "two":
        raise ValueError(
            "--dct_scaling crops one view and does not work with --sr_views two: leave one of them out"
        )
    if (args.vflip or args.rot90) and relations and args.sr_views == "two":
        raise ValueError(
            "--sr_views two follows left-right flips of its crops only: leave out --vflip and --rot90, or "
            "give --sr_views same"
        )
    if args.rot90 and args.cache_data == "device":
        raise ValueError(
            "--cache_data device cuts and flips crops and does not turn them: give --cache_data memory, or "
            "leave --rot90 out"
        )


def warn_of_nothing_to_predict(args: argparse.Namespace) -> None:
    """Print a warning if no patch is removed, so that no pixel is predicted."""
    if args.mask_ratio > 0:
        return
    others = "only the other losses are learned"
    if args.pos_label == "none" and not relation_weights(args):
        others = "and nothing is learned, as there is no other loss"
    dist.print_rank0(
        f"warning: --mask_ratio {args.mask_ratio:g} removes no patch: no pixel is predicted, {others}; "
        "MAE's ratio is 0.75"
    )


def build_data(
    args: argparse.Namespace, setup: Setup, trained: dict
) -> tuple[Batches[Samples], Batches[Samples] | None, Setup]:
    """Return the training loader, the validation loader or None, and the setup with the range of values.

    `trained` are the flags of the checkpoint that the run starts from.
    """
    source = DataPath.from_flags(args)
    options = dict(read=ReadSettings.of(vars(args)), seed=args.seed, labels=False)
    crop = setup.size, ascending(args.crop_scale, "--crop_scale"), args.hflip
    augment: Callable
    if relation_weights(args) and args.sr_views == "two":
        augment = TwoViews(*crop)
    else:
        augment = pretrain_transform(*crop, args.vflip, rot90=args.rot90, dct_scaling=args.dct_scaling)
    train = build_dataset(source, "train", augment, **options)
    dist.print_rank0(train.summary())
    scaled = bool(args.mean and args.std)
    setup = replace(setup, pixels=with_range(setup.pixels, train, args.range, scaled, trained))
    pin_memory = args.pin_mem and setup.device.type == "cuda"
    loading = dict(
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        pin_memory=pin_memory,
        data_timeout=args.data_timeout,
    )
    try:
        val = build_dataset(source, "val", eval_transform(setup.size), evaluation=True, **options)
    except NoSplit:
        val = None
    if len(set(dist.gather_objects(val is None))) > 1:
        raise ValueError(
            f"some nodes find val images in {args.data_path}, and some do not: copy the data to the nodes "
            "again"
        )
    if val is not None:
        check_same_depth(train, val, args.range)
    loader = cached(train_loader(train, seed=args.seed, **loading), args.cache_data, setup.device)
    if val is None:
        dist.print_rank0(
            "there are no val images: pictures show training images, and nothing is evaluated. "
            "--val_split NAME takes them from another folder"
        )
        return loader, None, setup
    return loader, cached(eval_loader(val, **loading), args.cache_data, setup.device), setup


def read_start(args: argparse.Namespace) -> Start:
    """Read the checkpoint to continue, the run's own or --resume, or else --init_from, if given."""
    resume = checkpoint.load_start(args.output_dir, args.resume)
    weights = None
    if resume is None and args.init_from:
        weights = checkpoint.load(args.init_from)
        weights.drop_optimizer()
    return Start(resume, weights)


def load_start(args: argparse.Namespace, flags: dict, objective: Pretraining, start: Start) -> None:
    """Print how the run starts; load the weights of --init_from, if it starts from them."""
    if start.resume is not None:
        check_and_print_continuing(args, start.resume, flags)
        check_method(args, start.resume)
        keep_norm_eps(objective, start.resume, flags)
        return
    if start.weights is None:
        dist.print_rank0("starting from scratch")
        return
    note = transfer.init_from(objective.model, start.weights)
    keep_norm_eps(objective, start.weights, flags)
    start.weights = None  # its memory is needed
    if objective.relations is not None:
        copy_parameters(objective.relations.teacher, objective.model)
    dist.print_rank0(f"weights from {args.init_from}, fresh schedule; {note}")


def keep_norm_eps(objective: Pretraining, source: Checkpoint, flags: dict) -> None:
    """Give model and teacher the epsilon that the weights were trained with, and store it in this run."""
    for name, eps in stored_eps(source.args).items():
        flags[name] = eps
        objective.model.set_norm_eps(eps)
        if objective.relations is not None:
            objective.relations.teacher.set_norm_eps(eps)


def check_method(args: argparse.Namespace, start: Checkpoint) -> None:
    """Raise ValueError, with the flags that fit, if a pretrained file has other embeddings or labels."""
    fitting = trained_method(start)
    changed = [name for name, value in fitting.items() if getattr(args, name) != value]
    # `load_strict` explains other kinds of files.
    if start.kind != "pretraining" or not changed:
        return
    flags = " ".join(f"--{name} {value}" for name, value in fitting.items())
    found = " ".join(f"--{name} {getattr(args, name)}" for name in fitting)
    text = f"{start.path} was pretrained with {flags}, not with {found}"
    if start.entries.get("optimizer") is not None:
        raise ValueError(
            f"{text}: give these flags to continue it, or start from its weights with --init_from "
            f"{start.path} and another --output_dir"
        )
    raise ValueError(
        f"{text}, and holds no optimizer state to continue with: start from its weights with --init_from "
        f"{start.path} in place of --resume, and with {flags} for its own method"
    )


def trained_method(start: Checkpoint) -> dict[str, str]:
    """Return --pos_embed and --pos_label of a pretrained file, as far as they are known.

    MAE's own files do not store them: they have its fixed embedding and no label heads.
    """
    found = {}
    if "pos_embed" not in start.model:
        found["pos_embed"] = "none"
    elif start.args.get("pos_embed", "sincos") in tuple(EMBEDDINGS):
        found["pos_embed"] = start.args.get("pos_embed", "sincos")
    if not any(name.startswith("pos_head.") for name in start.model):
        found["pos_label"] = "none"
    elif start.args.get("pos_label") in label_choices():
        found["pos_label"] = start.args["pos_label"]
    return found


def main(args: argparse.Namespace) -> int:
    check_flags(args)
    device = join_ranks(args)
    if method := describe_method(args):
        dist.print_rank0(method)
    if args.output_dir and not args.dry_run:
        dist.check_folder(args.output_dir)
    start = read_start(args)
    args = argparse.Namespace(**as_stored(vars(args), given_in(args), start.saved, MODELS))
    if start.resume is not None:
        args.range = kept_range(args.range, start.trained)
    pixels = Pixels(*channel_stats(args.in_chans, args.mean, args.std))
    bands = Bands.of(args.in_chans, args.picture_bands)
    setup = Setup(device, resolve_amp(args.amp, device), pair(args.input_size, "--input_size"), pixels)
    loader, val_loader, setup = build_data(args, setup, start.trained)
    vars(args).update(setup.pixels.flags(loader.dataset.depth))

    # Model and loss
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    model = build_model(args, device)
    if args.strategy == "fsdp":
        fsdp.shard(model, device, setup.amp)
    chance = model.chance(args.mask_ratio)  # also refuses a mask ratio that leaves nothing visible
    warn_of_nothing_to_predict(args)
    objective = Pretraining(model, args.mask_ratio, args.pos_weight)
    if weights := relation_weights(args):
        objective.relations = Relations(model, weights, args.ema_momentum, args.epochs)

    # Optimizer
    lr = effective_lr(args.lr, args.blr, effective_batch(args))
    # Class and mask token are decayed as in MAE, so that MAE's files continue with the same groups.
    optimizer = adamw(param_groups(model, args.weight_decay), lr, betas=(0.9, 0.95))
    dist.print_rank0(
        f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{counted(model.patch_embed.num_patches, 'patch', 'patches')}; {setup}; {describe_batch(args, lr)}"
    )

    flags = checkpoint.plain_flags(vars(args))
    load_start(args, flags, objective, start)
    session = Session.open(args, flags, start.resume, chance)
    every = args.picture_epochs
    objective.evaluation = Evaluation(setup, session, loader, val_loader, every, args.epochs, bands)
    finished = fit(model, objective, optimizer, loader, setup, open_budget(args, lr), session)
    dist.shutdown()
    return 0 if finished else STOPPED


if __name__ == "__main__":
    sys.exit(run(main, parse(get_args_parser())))
