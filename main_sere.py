"""Pretrain by self-distillation with self-relations: SERE (Li et al. 2022) on iBOT (Zhou et al. 2022).

    torchrun --nproc_per_node 8 main_sere.py @recipes/sere_vit_small.args --data_path DIR --output_dir RUN
    python main_sere.py ... --sr_spatial 0 --sr_channel 0 --cls_weight 1 --patch_weight 1     # iBOT alone

The commands of SERE's README run unchanged: with `--arch`, flags have the names, meanings and defaults of
its main_sere.py (see util/flags/sere.py), and `--sere_exact` is on.

The checkpoint holds the student (`model`), the teacher and the centres. Fine-tuning and
probing take the teacher.

Exit codes: 0 all epochs are done; 75 a signal stopped the run, its state is saved, and the same command
continues it; 2 an error that its message explains.
"""

import argparse
import math
import sys

from layers.sizes import sere_names
from util.flags import sere
from util.flags.data_path import DataPath
from util.flags.early import check_model
from util.flags.groups import (
    OptimDefaults,
    add_data_flags,
    add_optim_flags,
    add_run_flags,
    add_self_relation_flags,
    ascending,
    channel_stats,
    compile_mode,
    pair,
)
from util.flags.numbers import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, number, side
from util.flags.parser import Parser, answer_at_once, examples, given_in, parse, run


def get_args_parser() -> Parser:
    p = Parser(description="iBOT and SERE pretraining", epilog=examples(__doc__), add_help=False)
    add_model_flags(p.add_argument_group("model"))
    add_loss_flags(p)
    # SERE has a weight called alpha.
    add_data_flags(p, alpha="image_alpha")
    add_crop_flags(p)
    defaults = OptimDefaults(
        batch_size=64,
        epochs=100,
        blr=5e-4,
        min_lr=1e-6,
        weight_decay=0.04,
        warmup_epochs=10,
        clip_grad=0.3,
        clip_help="largest norm of the gradient of each parameter; 0 turns clipping off",
    )
    add_optim_flags(p, defaults)
    p.add_argument(
        "--weight_decay_end", default=0.4, type=NOT_NEGATIVE, help="weight decay at the end of its cosine"
    )
    frozen = "keep the prototypes fixed that long"
    p.add_argument("--freeze_last_layer", default=1.0, type=NOT_NEGATIVE, metavar="EPOCHS", help=frozen)
    add_exact_flag(p)
    add_run_flags(p)
    # What --use_fp16 of SERE stands for: the precision on GPUs if --amp is auto.
    p.add_argument("--gpu_amp", default=None, choices=["fp32", "fp16"], help=argparse.SUPPRESS)
    p.translators.append(sere.translated)
    return p


def add_model_flags(g) -> None:
    names = f"that of the checkpoint if the run starts from one; one of {', '.join(sere_names())}"
    g.add_argument("--model", default="sere_vit_small_patch16", help=names)
    patch = "patch size, if other than the model's"
    g.add_argument("--patch_size", default=None, type=side, nargs="+", metavar=("H", "W"), help=patch)
    kinds = ["none", "sincos", "learned"]
    g.add_argument("--pos_embed", default="learned", choices=kinds, help="the encoder's positional embedding")
    depth = "stochastic depth of the student's last block"
    g.add_argument("--drop_path", default=0.1, type=BELOW_ONE, help=depth)
    prototypes = "number of prototypes, shared by class tokens and patches"
    g.add_argument("--out_dim", default=8192, type=number(2), help=prototypes)
    unit = "prototypes of unit length; without it each has a learned scale"
    g.add_argument("--norm_last_layer", default=True, action=argparse.BooleanOptionalAction, help=unit)
    own = "prototypes of their own for patches: in no head (shared), in the student's, or in both (own)"
    kinds = ["shared", "student", "own"]
    g.add_argument("--patch_prototypes", default="shared", choices=kinds, help=own)
    own = "number of the patches' own prototypes; --out_dim if not given"
    g.add_argument("--patch_out_dim", default=None, type=number(2), help=own)


def add_loss_flags(p) -> None:
    g = p.add_argument_group("losses")
    g.add_argument("--cls_weight", default=1.65, type=NOT_NEGATIVE, help="weight of the class-token loss")
    g.add_argument("--patch_weight", default=1.65, type=NOT_NEGATIVE, help="weight of the masked-patch loss")
    add_self_relation_flags(p, spatial=0.2, channel=0.5)
    points = (
        "points in the overlap of two global crops, rows [columns]; one less than the patches if not given"
    )
    limits = ("ROWS", "COLUMNS")
    g.add_argument("--sr_points", default=None, type=number(1), nargs="+", metavar=limits, help=points)
    start = "the teacher's temperature at the start"
    g.add_argument("--warmup_teacher_temp", default=0.04, type=POSITIVE, help=start)
    g.add_argument(
        "--teacher_temp", default=0.07, type=POSITIVE, help="the teacher's temperature after its ramp"
    )
    g.add_argument("--warmup_teacher_temp_epochs", default=30, type=NOT_NEGATIVE, help="length of the ramp")
    start = "its temperature for patches at the start; --warmup_teacher_temp if not given"
    g.add_argument("--warmup_teacher_patch_temp", default=None, type=POSITIVE, help=start)
    end = "its temperature for patches after the ramp; --teacher_temp if not given"
    g.add_argument("--teacher_patch_temp", default=None, type=POSITIVE, help=end)


def add_exact_flag(p) -> None:
    # What still differs is listed in recipes/sere_vit_*.args.
    exact = (
        "follow the code of SERE's authors where this toolkit differs: decay of biases, tokens and prototype "
        "scales, initial weights, points on the edges of an overlap, pairs of crops without overlap, blur "
        "and embedding of local crops, block masks, centres that move once per update, temperatures per epoch"
    )
    p.add_argument("--sere_exact", default=False, action=argparse.BooleanOptionalAction, help=exact)


def add_crop_flags(p) -> None:
    size = "size of local crops, H [W]"
    p.add_argument("--local_size", default=[96], type=side, nargs="+", metavar=("H", "W"), help=size)
    p.add_argument(
        "--local_crops_number", default=10, type=number(0), help="local crops per image; 0 for none"
    )
    area = "area of the two global crops, as a share of the image"
    limits = ("MIN", "MAX")
    p.add_argument("--global_crops_scale", default=[0.4, 1.0], type=SHARE, nargs=2, metavar=limits, help=area)
    area = "area of the local crops, as a share of the image"
    p.add_argument("--local_crops_scale", default=[0.05, 0.4], type=SHARE, nargs=2, metavar=limits, help=area)
    ratio = "masked share of the patches; each crop draws one of them"
    p.add_argument("--pred_ratio", default=[0.0, 0.3], type=SHARE, nargs="+", help=ratio)
    width = "half width of the range around each of them"
    p.add_argument("--pred_ratio_var", default=[0.0, 0.2], type=SHARE, nargs="+", help=width)
    shape = "masked patches are rectangles, or drawn one by one"
    p.add_argument("--pred_shape", default="block", choices=["block", "rand"], help=shape)
    first = "epochs without masked patches at the start"
    p.add_argument("--pred_start_epoch", default=0, type=number(0), metavar="EPOCHS", help=first)


answer_at_once(__name__, get_args_parser())  # the imports below take seconds

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine import Objective, Session, Setup, fit
from layers.self_distillation import MomentumUpdate, copy_parameters
from models_sere import MODELS, SereStudent, SereTeacher, make_centres
from util import dist
from util.data.contract import Batches, Samples
from util.data.datasets import build_dataset
from util.data.formats import ReadSettings, depth_name
from util.data.loading.cache import cached
from util.data.loading.loader import device_batches, sample_batches, train_loader
from util.data.multicrop import Details, MultiCrop
from util.data.pixels import Pixels
from util.data.survey.ranges import kept_range, with_range
from util.data.transforms import eval_transform
from util.evaluate.effective_rank import RANK_IMAGES, log_ranks
from util.files.names import counted
from util.run.session import (
    STOPPED,
    check_and_print_continuing,
    describe_batch,
    effective_batch,
    join_ranks,
    open_budget,
)
from util.train.amp import resolve_amp
from util.train.lr_sched import cosine, effective_lr, ramp
from util.train.optim import adamw, clip_each, param_groups
from util.train.state import TrainState
from util.weights import checkpoint
from util.weights.defaults import as_stored
from util.weights.types import stored_flags


@dataclass(frozen=True)
class Schedules:
    """Momentum, weight decay, temperatures and freezing as pure functions of the epochs done.

    Temperatures of patches are those of class tokens if they are None. `unmasked_epochs` is the number of
    epochs without masked patches; their temperature rises after that. With `by_epoch` temperatures are
    constant within an epoch, as in DINO's code.
    """

    epochs: int
    first_momentum: float
    first_weight_decay: float
    last_weight_decay: float
    first_temperature: float
    last_temperature: float
    ramp_epochs: float
    frozen_epochs: float
    first_patch_temperature: float | None = None
    last_patch_temperature: float | None = None
    unmasked_epochs: float = 0.0
    by_epoch: bool = False

    def momentum(self, done: float) -> float:
        return cosine(done, start=self.first_momentum, end=1.0, total=self.epochs)

    def weight_decay(self, done: float) -> float:
        return cosine(done, start=self.first_weight_decay, end=self.last_weight_decay, total=self.epochs)

    def temperature(self, done: float) -> float:
        return self._ramp(done, self.first_temperature, self.last_temperature)

    def patch_temperature(self, done: float) -> float:
        first = self.first_patch_temperature
        if first is None:
            first = self.first_temperature
        last = self.last_patch_temperature
        if last is None:
            last = self.last_temperature
        return self._ramp(max(0.0, done - self.unmasked_epochs), first, last)

    def _ramp(self, done: float, first: float, last: float) -> float:
        if not self.by_epoch:
            return ramp(done, start=first, end=last, length=self.ramp_epochs)
        # The last epoch of the ramp has the last temperature.
        epoch = int(done)
        if epoch == 0 and self.ramp_epochs >= 1:
            return first
        return ramp(epoch, start=first, end=last, length=self.ramp_epochs - 1)

    def masks(self, done: float) -> bool:
        """Whether patches are masked already."""
        return done >= self.unmasked_epochs

    def frozen(self, done: float) -> bool:
        """Whether the prototypes do not learn yet."""
        return done < self.frozen_epochs


@dataclass
class SelfDistillation(Objective):
    """L = sum of weight * loss: class tokens, masked patches, and relations (1.65, 1.65, 0.2 and 0.5 in
    SERE).

    `most_masked` is the largest number of masked cells that a crop can have.
    """

    student: SereStudent
    teacher: SereTeacher
    centres: nn.ModuleDict
    weights: dict[str, float]
    most_masked: int
    schedules: Schedules
    clip_grad: float = 0.0
    ranks: "Ranks | None" = None

    def __post_init__(self):
        self.done = 0.0
        self._update = MomentumUpdate(self.teacher, self.student)

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        """Schedule the weight decay of an optimizer's groups, except that biases and norms have no decay.

        Groups are remembered by number: loading a checkpoint replaces the optimizer's group dictionaries.
        """
        self.optimizer = optimizer
        self.decayed = [i for i, group in enumerate(optimizer.param_groups) if group["weight_decay"]]

    def loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.schedules.masks(self.done):
            batch = batch | {"mask": torch.zeros_like(batch["mask"])}
        mask = batch["mask"].flatten(0, 1)  # (B*2, L)
        # Every crop gets the same number of cells, so that nothing waits for the device to count them.
        # Surplus cells are not masked and do not count.
        ids = mask.byte().argsort(dim=1, descending=True, stable=True)[:, : self.most_masked]
        temperatures = self.schedules.temperature(self.done), self.schedules.patch_temperature(self.done)
        targets = self.teacher(batch["image"], ids, self.centres, *temperatures)
        losses = model(batch["image"], batch["local"], batch["mask"], ids, batch["boxes"], targets)
        # 0 means that the teacher puts all weight on one prototype.
        entropy = torch.special.entr(targets["cls"]).sum(-1).mean()
        loss = sum(self.weights[name] * value for name, value in losses.items())
        return loss, losses | {"teacher_entropy": entropy}

    def before_update(self, done: float) -> None:
        self.done = done
        weight_decay = self.schedules.weight_decay(done)
        for i in self.decayed:
            self.optimizer.param_groups[i]["weight_decay"] = weight_decay

    def before_step(self) -> None:
        if self.clip_grad:
            groups = self.optimizer.param_groups
            clip_each([p for group in groups for p in group["params"]], self.clip_grad)
        if self.schedules.frozen(self.done):
            for p in self.student.ibot_head.last_layer():
                p.grad = None

    def after_step(self, step: int) -> None:
        self._update(self.schedules.momentum(self.done))
        centre: Any
        for centre in self.centres.values():
            centre.step()

    def after_epoch(self, epoch: int, state: TrainState) -> dict[str, float]:
        if self.ranks is None or not dist.is_main():
            return {}
        return self.ranks.run(self.teacher, epoch)

    def state(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher, "centres": self.centres}


@dataclass
class Ranks:
    """Effective ranks of the teacher's features on training images without augmentation. They show a
    collapse.
    """

    setup: Setup
    session: Session
    dataset: Samples
    batch_size: int

    def run(self, teacher: SereTeacher, epoch: int) -> dict[str, float]:
        samples = sample_batches(self.dataset, RANK_IMAGES, self.batch_size)
        batches = device_batches(samples, self.setup.device, self.setup.pixels)
        with self.setup.autocast():
            ranks = log_ranks(teacher, batches, self.session.log, epoch)
        return {f"test_{name}": value for name, value in ranks.items()}


def build_model(args: argparse.Namespace) -> SereStudent:
    check_model("main_sere", args.model, list(MODELS))
    options: dict[str, Any] = {}
    if args.patch_size:
        options["patch_size"] = pair(args.patch_size, "--patch_size")
    if args.local_crops_number:
        options["local_size"] = pair(args.local_size, "--local_size")
    else:
        options["local_size"] = None
    if args.sr_points:
        options["points"] = pair(args.sr_points, "--sr_points")
    return MODELS[args.model](
        img_size=pair(args.input_size, "--input_size"),
        in_chans=args.in_chans,
        pos_embed=args.pos_embed,
        drop_path=args.drop_path,
        out_dim=args.out_dim,
        norm_last_layer=args.norm_last_layer,
        patch_prototypes=args.patch_prototypes,
        patch_out_dim=args.patch_out_dim or 0,
        exact=args.sere_exact,
        sr_spatial=args.sr_spatial > 0,
        sr_channel=args.sr_channel > 0,
        sr_temp_spatial=args.sr_temp_spatial,
        sr_temp_channel=args.sr_temp_channel,
        **options,
    )


def mask_ranges(args: argparse.Namespace) -> list[tuple[float, float]]:
    """Return the ranges of the masked share; each global crop draws one of them."""
    if len(args.pred_ratio) != len(args.pred_ratio_var):
        raise ValueError(
            f"--pred_ratio has {len(args.pred_ratio)} values and --pred_ratio_var "
            f"{len(args.pred_ratio_var)}: give a width for each"
        )
    ranges = [(ratio - width, ratio + width) for ratio, width in zip(args.pred_ratio, args.pred_ratio_var)]
    if any(not 0 <= low <= high <= 1 for low, high in ranges):
        raise ValueError(
            f"--pred_ratio and --pred_ratio_var give the ranges {ranges}: each must lie in [0, 1]"
        )
    return ranges


def build_objective(args: argparse.Namespace, student: SereStudent, device: torch.device) -> SelfDistillation:
    """Build the teacher, which starts as a copy of the student, the centres, and the schedules."""
    teacher = copy_parameters(SereTeacher(student).to(device), student)
    weights = {
        "cls": args.cls_weight,
        "patch": args.patch_weight,
        "sr_spatial": args.sr_spatial,
        "sr_channel": args.sr_channel,
    }
    most = max(high for _, high in mask_ranges(args))
    schedules = Schedules(
        args.epochs,
        args.ema_momentum,
        args.weight_decay,
        args.weight_decay_end,
        args.warmup_teacher_temp,
        args.teacher_temp,
        args.warmup_teacher_temp_epochs,
        args.freeze_last_layer,
        args.warmup_teacher_patch_temp,
        args.teacher_patch_temp,
        args.pred_start_epoch,
        by_epoch=args.sere_exact,
    )
    patch_out_dim = student.prototypes.of_patches(teacher=True)
    return SelfDistillation(
        student,
        teacher,
        make_centres(args.out_dim, patch_out_dim, once_per_step=args.sere_exact).to(device),
        weights,
        max(1, int(most * student.patch_embed.num_patches)),
        schedules,
        args.clip_grad,
    )


def chance_levels(args: argparse.Namespace, model: SereStudent) -> dict[str, float]:
    """Return the losses of uniform distributions, by their names in the log."""
    uniform = math.log(args.out_dim)
    patch = math.log(model.prototypes.of_patches(teacher=True) or args.out_dim)
    # A crop without masked cells counts 0 in the patch loss.
    masked = sum(ratio > 0 for ratio in args.pred_ratio) / len(args.pred_ratio)
    chance = {"cls": uniform, "patch": patch * masked, "teacher_entropy": uniform}
    if args.sr_spatial:
        # Two maps of global crops, and each local crop against both global ones.
        maps = 2 * math.log(math.prod(model.points))
        if model.local_grid is not None:
            maps += 2 * args.local_crops_number * math.log(math.prod(model.local_grid))
        chance["sr_spatial"] = maps / (2 + 2 * args.local_crops_number)
    if args.sr_channel:
        chance["sr_channel"] = math.log(model.dim)
    return chance


def build_data(
    args: argparse.Namespace, setup: Setup, grid: tuple[int, int], trained: dict
) -> tuple[Batches[Samples], Samples, Setup]:
    """Return the loader of multi-crop batches, the images without augmentation, and the setup.

    The setup gets the range of the values. `trained` are the flags of the checkpoint that the run continues.
    """
    crops = MultiCrop(
        setup.size,
        pair(args.local_size, "--local_size"),
        args.local_crops_number,
        grid,
        global_scale=ascending(args.global_crops_scale, "--global_crops_scale"),
        local_scale=ascending(args.local_crops_scale, "--local_crops_scale"),
        mask_ratios=mask_ranges(args),
        details=Details(args.pred_shape, args.sere_exact),
    )
    source = DataPath.from_flags(args)
    options = dict(read=ReadSettings.of(vars(args)), seed=args.seed, labels=False)
    train = build_dataset(source, "train", crops, **options)
    dist.print_rank0(train.summary())
    if args.in_chans != 3 or train.depth != torch.uint8:
        dist.print_rank0(
            "colour changes (jitter, grey, solarisation) are left out: they are for 8-bit RGB, and these "
            f"images have {counted(args.in_chans, 'channel')} of {depth_name(train.depth)}"
        )
    scaled = bool(args.mean and args.std)
    setup = replace(setup, pixels=with_range(setup.pixels, train, args.range, scaled, trained))
    pin_memory = args.pin_mem and setup.device.type == "cuda"
    loader = train_loader(
        train,
        batch_size=args.batch_size,
        seed=args.seed,
        num_workers=args.num_workers,
        pin_memory=pin_memory,
        data_timeout=args.data_timeout,
    )
    plain = build_dataset(source, "train", eval_transform(setup.size), **options)
    return cached(loader, args.cache_data, setup.device), plain, setup


def precision(args: argparse.Namespace, device: torch.device) -> str:
    """Resolve --amp, or --use_fp16 of SERE's command, on a device."""
    if args.amp != "auto" or args.gpu_amp is None:
        return resolve_amp(args.amp, device)
    if device.type == "cuda":
        return args.gpu_amp
    if args.gpu_amp == "fp16":
        dist.print_rank0(
            f"--use_fp16 true applies to GPUs only: this run computes in float32 on {device.type}"
        )
    return "fp32"


def optimizer_groups(args: argparse.Namespace, model: SereStudent) -> list[dict]:
    # Weight decay is 1 here to mark the groups that are decayed; its schedule sets the value
    # before each update.
    if args.sere_exact:
        return model.published_groups(1.0)
    return param_groups(model, 1.0, model.no_weight_decay())


def main(args: argparse.Namespace) -> int:
    compile_mode(args.compile, args.compile_mode, args.accum_iter)
    device = join_ranks(args)
    start = checkpoint.load_start(args.output_dir, args.resume)
    args = argparse.Namespace(**as_stored(vars(args), given_in(args), start, MODELS))
    args.range = kept_range(args.range, stored_flags(start))
    pixels = Pixels(*channel_stats(args.in_chans, args.mean, args.std))
    setup = Setup(device, precision(args, device), pair(args.input_size, "--input_size"), pixels)
    if args.output_dir and not args.dry_run:
        dist.check_folder(args.output_dir)
    if args.strategy == "fsdp":
        raise ValueError(
            "--strategy fsdp is for runs without a teacher, which averages whole parameters: leave it out"
        )

    # Student, teacher, data
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    model = build_model(args).to(device)
    objective = build_objective(args, model, device)
    loader, plain, setup = build_data(args, setup, model.grid, stored_flags(start))
    vars(args).update(setup.pixels.flags(loader.dataset.depth))

    # Optimizer
    lr = effective_lr(args.lr, args.blr, effective_batch(args))
    optimizer = adamw(optimizer_groups(args, model), lr, betas=(0.9, 0.999))
    objective.use(optimizer)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    dist.print_rank0(
        f"{args.model}: {trained / 1e6:.1f} M trained parameters; {setup}; {describe_batch(args, lr)}"
    )

    flags = checkpoint.plain_flags(vars(args))
    if start is None:
        dist.print_rank0("starting from scratch")
    else:
        check_and_print_continuing(args, start, flags)
    session = Session.open(args, flags, start, chance_levels(args, model))
    objective.ranks = Ranks(setup, session, plain, args.batch_size)
    # Gradients are clipped in `before_step`, each parameter by itself.
    budget = replace(open_budget(args, lr), clip_grad=None)
    finished = fit(model, objective, optimizer, loader, setup, budget, session)
    dist.shutdown()
    return 0 if finished else STOPPED


if __name__ == "__main__":
    sys.exit(run(main, parse(get_args_parser())))
