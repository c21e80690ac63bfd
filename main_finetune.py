"""Train classifiers: fine-tune a pretrained encoder, train from scratch, or evaluate.

    python main_finetune.py --model vit_base_patch16 --data_path DIR --finetune RUN/checkpoint-last.pth
    python main_finetune.py --model vit_base_patch16 --data_path DIR --eval --resume FT/checkpoint-best.pth
    python main_finetune.py --model swin_tiny --data_path DIR --pos_label rpl              # from scratch

Positional embedding and positional labels are independent: L = L_class + pos_weight * L_position
(Zhang et al. 2023, Eq. 6). Labels stay the cells of the grid after augmentation. Mixup and CutMix
mix class targets only.

Exit codes: 0 done; 75 a signal stopped the run, its state is saved, and the same command continues it; 2
wrong input.
"""

import argparse
import os
import sys

from layers.sizes import classifier_names
from util.flags.data_path import DataPath
from util.flags.groups import (
    OptimDefaults,
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
from util.flags.numbers import BELOW_ONE, COUNT, LAYER_DECAY, number, side
from util.flags.parser import Parser, answer_at_once, examples, given_in, parse, run


def get_args_parser() -> Parser:
    about = "Fine-tuning, training from scratch, and evaluation of classifiers"
    p = Parser(description=about, epilog=examples(__doc__), add_help=False)
    add_model_flags(p.add_argument_group("model"))
    add_position_flags(p, pos_embed="learned", pos_label="auto")
    start = "initial values of a positional embedding that the checkpoint lacks"
    p.add_argument("--pos_embed_init", default="zero", choices=["zero", "sincos", "normal"], help=start)
    add_head_flags(p, "class head of any model; if not given the model's, or with --resume the checkpoint's")
    add_data_flags(p)
    defaults = OptimDefaults(
        batch_size=64, epochs=50, blr=1e-3, min_lr=1e-6, weight_decay=0.05, warmup_epochs=5
    )
    add_optim_flags(p, defaults)
    add_run_flags(p)
    add_finetuning_flags(p.add_argument_group("fine-tuning"))
    add_augment_flags(p)
    g = p.add_argument_group("evaluation")
    add_eval_flags(g)
    classes = (
        "names of the model's outputs, for --eval on some of its classes: a list, or a folder with all of "
        "them; not needed for ImageNet's classes, nor for files that store the names"
    )
    g.add_argument("--classes", default="", metavar="PATH", help=classes)
    crop = "side of the centre crop, as a share of the resized image; if not given 0.875 up to 224, else 1"
    g.add_argument("--crop_pct", default=None, type=number(0.05, 2, float), help=crop)
    g.add_argument("--predictions", default="", metavar="FILE", help="write a CSV line per validation image")
    return p


def add_model_flags(g) -> None:
    names = (
        f"that of the checkpoint if the run starts from one; {', '.join(classifier_names())}, or timm/NAME"
    )
    g.add_argument("--model", default="vit_large_patch16", help=names)
    patch = "patch size, if other than the model's"
    g.add_argument("--patch_size", default=None, type=side, nargs="+", metavar=("H", "W"), help=patch)
    g.add_argument(
        "--nb_classes",
        default=None,
        type=COUNT,
        help="number of classes, if the data must have as many; any if not given",
    )
    g.add_argument("--drop_path", default=0.1, type=BELOW_ONE, help="stochastic depth of the last block")
    average = (
        "classify the mean of the patch tokens (default, except for DeiT, So-ViT and second-order heads)"
    )
    g.add_argument(
        "--global_pool", dest="pool", action="store_const", const="avg", default=None, help=average
    )
    g.add_argument(
        "--cls_token", dest="pool", action="store_const", const="cls", help="classify the class token"
    )
    embed = (
        "patch embedding of vit_* and deit_* (linear by default) and so_vit_* (conv); conv cannot start "
        "from a masked autoencoder"
    )
    g.add_argument("--patch_embed", default=None, choices=["linear", "conv"], help=embed)
    merge = "keep Swin's last patch merging (7x7 cells at 224)"
    g.add_argument("--swin_merge_last", action="store_true", help=merge)
    recompute = "recompute each block in backward: less memory, a fifth to a third more time"
    g.add_argument("--grad_checkpointing", action="store_true", help=recompute)


def add_finetuning_flags(g) -> None:
    encoder = "pretrained encoder or classifier to start from: a file, a run's folder or an https address"
    g.add_argument("--finetune", default="", help=encoder)
    published = "start from the weights that timm publishes, with --model timm/NAME"
    g.add_argument("--pretrained", action="store_true", help=published)
    decay = "learning rate factor per layer, from the top down; if not given 0.75, and 1 without --finetune"
    g.add_argument("--layer_decay", default=None, type=LAYER_DECAY, help=decay)
    partial = "train only the last K blocks and the heads"
    g.add_argument("--partial", default=None, type=number(0), metavar="K", help=partial)
    average = "evaluate a moving average of the weights"
    g.add_argument("--ema", default=0.0, type=BELOW_ONE, metavar="DECAY", help=average)
    teacher = "teacher for DeiT's distillation token: timm/NAME, or any model with --distill_checkpoint"
    g.add_argument("--distill", default="", metavar="MODEL", help=teacher)
    weights = "a checkpoint of main_finetune.py; timm's pretrained weights if not given"
    g.add_argument("--distill_checkpoint", default="", help=weights)


answer_at_once(__name__, get_args_parser())  # the imports below take seconds

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from backbones.heads import head_options, resolve_head
from backbones.registry import (
    MODELS,
    build_classifier,
    find,
    freeze_all_but,
    known_classes,
    norm_options,
)
from backbones.teacher import build_teacher
from engine import Objective, Session, Setup, fit
from layers.classifier import Classifier
from util import dist
from util.data.contract import Batches, ClassSamples
from util.data.datasets import build_class_dataset
from util.data.formats import ReadSettings
from util.data.loading.cache import cached
from util.data.loading.loader import eval_loader, train_loader
from util.data.pixels import Pixels
from util.data.sources.image_index import check_classes, describe_missing, some_names
from util.data.sources.layouts import class_names, training_classes
from util.data.survey.ranges import check_same_depth, kept_range, with_range
from util.data.transforms import CropSettings, eval_transform, finetune_transform
from util.dist import fsdp
from util.evaluate.supervised import evaluate, first_classes
from util.files.names import counted, printable
from util.run.log import Log
from util.run.session import (
    STOPPED,
    check_and_print_continuing,
    describe_batch,
    effective_batch,
    join_ranks,
    open_budget,
)
from util.train.amp import resolve_amp
from util.train.lr_sched import effective_lr
from util.train.optim import WeightAverage, adamw, param_groups
from util.train.state import TrainState
from util.train.supervised import BatchAugmentation, Erasing, Mixing, SupervisedLoss
from util.weights import checkpoint, transfer
from util.weights.defaults import as_stored
from util.weights.types import Checkpoint, stored_eps, stored_flags

MAES_LAYER_DECAY = 0.75


@dataclass
class Start:
    """Where a run starts: the checkpoint that it continues or evaluates, the encoder that it fine-tunes, or
    neither.

    `finetune` is the path of the encoder, also if a continued run no longer reads it. `new_parameters` are
    those that the encoder's file lacks; they are trained even with --partial.
    """

    resume: Checkpoint | None
    finetune: str
    pretrained: Checkpoint | None
    new_parameters: list[str]

    @property
    def trained(self) -> dict:
        """The flags of the training that the checkpoint stores; {} from scratch."""
        return stored_flags(self.resume or self.pretrained)


@dataclass(frozen=True)
class Choices:
    """Settings that flags may leave open: classes in the order of the outputs, labels, and head."""

    classes: list[str]
    labels: dict[str, str]
    head: dict

    @property
    def positions(self) -> bool:
        return self.labels["pos_label"] != "none"


@dataclass
class Finetuning(Objective):
    """Supervised training of a classifier, which is evaluated after each epoch; the best epoch is noted."""

    model: nn.Module
    supervised: SupervisedLoss
    setup: Setup
    choices: Choices
    val_loader: Batches[ClassSamples]
    predictions: str = ""
    average: WeightAverage | None = None
    frozen_norms: list[nn.Module] = field(default_factory=list)
    log: Log = field(init=False)

    def loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        return self.supervised(model, batch)

    def before_update(self, done: float) -> None:
        # The engine puts the whole model into training mode at the start of an epoch.
        for norm in self.frozen_norms:
            norm.eval()

    def after_step(self, step: int) -> None:
        if self.average is not None:
            self.average.update_parameters(self.model)

    def after_epoch(self, epoch: int, state: TrainState) -> dict[str, float]:
        evaluated = self.model
        if self.average is not None:
            evaluated = self.average.module
        with fsdp.gathered(evaluated) as whole:
            stats = self.evaluate(whole)
        if state.best is None or stats["acc1"] > state.best:
            state.best = stats["acc1"]
            state.best_epoch = epoch
        dist.print_rank0(f"Max accuracy: {state.best:.2f}% (epoch {state.best_epoch})")
        # MAE's names in TensorBoard, and the mean over classes.
        names = [name for name in ("acc1", "acc5", "loss", "balanced_acc1") if name in stats]
        self.log.scalars({f"perf/test_{name}": stats[name] for name in names}, epoch)
        figures = {f"test_{name}": value for name, value in stats.items() if name != "images"}
        return figures | {"n_parameters": trained_parameters(self.model)}

    def state(self) -> dict[str, nn.Module]:
        if self.average is None:
            return {}
        return {"ema": self.average}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        classes = self.choices.classes
        return evaluate(model, self.val_loader, classes, self.setup, self.choices.positions, self.predictions)


def trained_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that contradict each other, before anything is read."""
    compile_mode(args.compile, args.compile_mode, args.accum_iter)
    check_evaluation_flags(args)
    if args.pretrained and (args.finetune or args.eval or not args.model.startswith("timm/")):
        raise ValueError(
            "--pretrained starts a training of --model timm/NAME from timm's own weights: leave it out with "
            "other models, --finetune and --eval"
        )
    if args.ema and args.strategy == "fsdp":
        raise ValueError(
            "--ema keeps a whole copy of the weights and does not work with --strategy fsdp: leave one out"
        )
    richer = args.aa or args.color_jitter
    if not args.eval and args.cache_data == "device" and richer:
        raise ValueError(
            "--cache_data device cuts one crop of an image and flips it; RandAugment and colour jitter do "
            "more: give --cache_data memory, or --aa '' without --color_jitter"
        )


def check_model_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that the model, which may be that of a checkpoint, does not take."""
    if args.distill and not find(args.model).distillation:
        raise ValueError(
            f"--distill needs a model with a distillation token (deit_*_distilled_patch16), found "
            f"{args.model}"
        )
    if args.swin_merge_last and "merge_last" not in find(args.model).options:
        raise ValueError(
            f"--swin_merge_last belongs to swin_tiny, swin_small and swin_base, not to {args.model}: "
            "leave it out"
        )


def check_evaluation_flags(args: argparse.Namespace) -> None:
    if args.eval and not args.resume:
        raise ValueError("--eval needs --resume FILE, the fine-tuned checkpoint to evaluate")
    if args.eval and args.dry_run:
        raise ValueError("--dry_run plans training, and --eval does not train: leave one of them out")
    if args.classes and not args.eval:
        raise ValueError(
            "--classes names the outputs of a model for --eval; in training, class folders do: leave it out"
        )
    folder = os.path.dirname(os.path.abspath(args.predictions))
    if args.predictions and not os.path.isdir(folder):
        raise ValueError(f"--predictions {args.predictions}: there is no such folder, make it first")
    if os.path.isdir(args.predictions):
        raise ValueError(f"--predictions {args.predictions} is a folder: name a file in it, such as p.csv")


def find_start(args: argparse.Namespace) -> Start:
    """Return the run's own last checkpoint, --resume, or the encoder of --finetune."""
    output_dir = args.output_dir
    if args.eval:
        output_dir = ""
    resume = checkpoint.load_start(output_dir, args.resume)
    before = stored_flags(resume)
    # Layer decay, and which parameters are trained, depend on whether there was an encoder.
    finetune = args.finetune or before.get("finetune", "")
    new_parameters = before.get("new_parameters")
    pretrained = None
    # Older checkpoints do not store the new parameters. They are then read from the encoder's file.
    needed = resume is None or (args.partial is not None and new_parameters is None)
    if args.pretrained and not finetune:
        finetune = args.model
    if finetune and needed:
        pretrained = load_encoder(finetune, args.pretrained)
    if new_parameters is None:
        new_parameters = sorted(transfer.new_parameters(pretrained))
    return Start(resume, finetune, pretrained, new_parameters)


def settled(args: argparse.Namespace, start: Start) -> argparse.Namespace:
    """Return the flags, with the model and the image size of the checkpoint where they are not given."""
    saved = start.resume or start.pretrained
    args = argparse.Namespace(**as_stored(vars(args), given_in(args), saved, MODELS))
    check_model_flags(args)
    if start.resume is not None:
        args.range = kept_range(args.range, start.trained)
    return args


def load_encoder(finetune: str, published: bool) -> Checkpoint:
    """Return the checkpoint of --finetune, or with --pretrained the weights that timm publishes."""
    if published:
        # timm takes seconds to import.
        from backbones.timm import published_checkpoint

        return published_checkpoint(finetune)
    pretrained = checkpoint.load(finetune)
    pretrained.drop_optimizer()
    return pretrained


def build_data(
    args: argparse.Namespace, setup: Setup, trained: dict
) -> tuple[Batches[ClassSamples] | None, Batches[ClassSamples], Setup]:
    """Return the training loader (None for --eval), the validation loader, and the setup with their range.

    Both loaders have the same classes. `trained` are the flags of the checkpoint that the run starts from.
    """
    source = DataPath.from_flags(args)
    options = dict(read=ReadSettings.of(vars(args)), seed=args.seed, nb_classes=args.nb_classes)
    transform = eval_transform(setup.size, args.crop_pct)
    val = build_class_dataset(source, "val", transform, evaluation=True, **options)
    pin_memory = args.pin_mem and setup.device.type == "cuda"
    loading = dict(
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        pin_memory=pin_memory,
        data_timeout=args.data_timeout,
    )
    ranged = dict(given=args.range, scaled=bool(args.mean and args.std), trained=trained)
    if args.predictions and not val.exact_resume:
        raise ValueError(
            f"--predictions lists images by name, and those of a stream ({printable(val.path)}) have none: "
            "leave it out"
        )
    if args.eval:
        describe_evaluation(val, setup.size, args.crop_pct)
        setup = replace(setup, pixels=with_range(setup.pixels, val, **ranged))
        return None, cached(eval_loader(val, **loading), args.cache_data, setup.device), setup
    augment = finetune_transform(
        setup.size,
        in_chans=args.in_chans,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        crop=CropSettings(ascending(args.crop_scale, "--crop_scale"), hflip=args.hflip, vflip=args.vflip),
        mean=setup.pixels.mean,
    )
    train = build_class_dataset(source, "train", augment, **options)
    check_classes(train, val)
    describe_evaluation(val, setup.size, args.crop_pct)
    if len(train.classes) == 1:
        only = some_names(train.classes)
        dist.print_rank0(f"warning: --data_path has one class only ({only}): every answer is right")
    dist.print_rank0(f"training on {train.summary()}")
    setup = replace(setup, pixels=with_range(setup.pixels, train, **ranged))
    check_same_depth(train, val, args.range)
    # Decoded only now, as the checks above take less time.
    val_loader = cached(eval_loader(val, **loading), args.cache_data, setup.device)
    loader = cached(train_loader(train, seed=args.seed, **loading), args.cache_data, setup.device)
    return loader, val_loader, setup


def describe_evaluation(val: ClassSamples, size: tuple[int, int], crop_pct: float | None) -> None:
    """Print on which crops of which images the model is evaluated."""
    share = crop_pct
    if not share:
        share = 1.0
        if min(size) <= 224:
            share = 224 / 256
    dist.print_rank0(
        f"evaluation on {val.summary()}: centre crop {size[0]}x{size[1]} of {share:.3f}, bicubic, "
        f"classes in the order {first_classes(val.classes)}"
    )
    print_missing(val)


def print_missing(val: ClassSamples) -> None:
    """Print for which classes there are no images to evaluate on."""
    if missing := describe_missing(val):
        dist.print_rank0(missing)


def resolve(args: argparse.Namespace, start: Start, data: ClassSamples) -> Choices:
    """Resolve what the flags leave open, from the checkpoint at the start and from the data."""
    classes = resolve_classes(args, start, data)
    labels = resolve_labels(args, start.trained)
    return Choices(classes, labels, resolve_head(vars(args), args.model, start.resume))


def resolve_labels(args: argparse.Namespace, trained: dict) -> dict[str, str]:
    """Return --pos_label and --pos_tokens.

    --pos_label auto is the checkpoint's label in fine-tuning and resuming, and none from scratch and for
    evaluation. --pos_tokens, if not given, is the checkpoint's as well, because its label head has learned
    from these channels.
    """
    label = args.pos_label
    if label == "auto":
        label = "none"
        if not args.eval:
            label = trained.get("pos_label", "none")
    return {"pos_label": label, "pos_tokens": args.pos_tokens or trained.get("pos_tokens") or "half"}


def resolve_classes(args: argparse.Namespace, start: Start, data: ClassSamples) -> list[str]:
    """Return the classes in the order of the outputs: the data's, or those of the checkpoint to evaluate."""
    classes = data.classes
    place = data.path
    kind = "class folder"
    if args.eval:
        given = None
        if args.classes:
            given = class_names(DataPath(args.classes, class_depth=args.class_depth))
        saved = checkpoint.to_evaluate(start.resume)
        place = saved.path
        kind = "output"
        classes = evaluated_classes(saved, data, DataPath.from_flags(args), given)
    elif start.resume is not None and start.resume.classes not in (None, classes):
        raise ValueError(
            f"{start.resume.path} was trained on the classes {some_names(start.resume.classes)}, the data "
            f"have {some_names(classes)}: give the data that it was made with, or another --output_dir"
        )
    if args.nb_classes not in (None, len(classes)):
        raise ValueError(
            f"--nb_classes {args.nb_classes}, but {place} has {counted(len(classes), kind)}: leave "
            "--nb_classes out, or check the path"
        )
    return classes


def evaluated_classes(
    saved: Checkpoint, data: ClassSamples, source: DataPath, given: list[str] | None
) -> list[str]:
    """Return the classes in the order of the outputs of the checkpoint to evaluate.

    If the data's training images have just these classes, the validation images may lack some, and all
    outputs compete as they did in training. Other data may have some of the classes only, and the answer is
    the best of these.
    """
    classes = data.classes
    trained = dist.compute_on_main(lambda: training_classes(source))
    if not set(classes) < set(trained):
        return known_classes(saved, classes, given)
    if not (given or saved.classes):
        # The file does not name its outputs, and the training images may.
        classes = trained
    known = known_classes(saved, classes, given)
    if set(known) == set(trained):
        data.use_classes(trained)
        print_missing(data)
    return known


def check_convolutional_start(pretrained: Checkpoint) -> None:
    """Raise ValueError if an encoder without a convolutional patch embedding should start one that has it."""
    if "patch_embed.stem.0.weight" not in pretrained.model:
        raise ValueError(
            f"--patch_embed conv cannot start from {pretrained.path}: its encoder learned from patches that "
            "were embedded one by one, most of them masked; a token of this embedding sees 33x33 pixels, "
            "including masked ones. Leave --finetune out, or choose --patch_embed linear"
        )


def build_model(args: argparse.Namespace, setup: Setup, choices: Choices, start: Start) -> Classifier:
    """Build the classifier; its weights are loaded by `load_weights`."""
    options = head_options(args.model, choices.head) | norm_options(args.model, start.trained)
    if choices.head["patch_embed"] == "conv" and start.pretrained is not None:
        check_convolutional_start(start.pretrained)
    pool = args.pool
    if args.eval and not pool:
        pool = checkpoint.to_evaluate(start.resume).args.get("pool")
    if pool:
        options["pool"] = pool
    if args.patch_size:
        options["patch_size"] = pair(args.patch_size, "--patch_size")
    if args.swin_merge_last:
        options["merge_last"] = True
    # MAE starts the head of a pretrained encoder near zero.
    head_init_std = 0.02
    if start.finetune:
        head_init_std = 2e-5
    return build_classifier(
        args.model,
        img_size=setup.size,
        in_chans=args.in_chans,
        num_classes=len(choices.classes),
        drop_path=args.drop_path,
        pos_embed=args.pos_embed,
        rpl_pairs=args.rpl_pairs,
        label_seed=args.seed,
        head_init_std=head_init_std,
        **choices.labels,
        **options,
    ).to(setup.device)


def load_weights(
    args: argparse.Namespace, model: Classifier, start: Start, flags: dict, classes: list[str]
) -> None:
    """Load the encoder of --finetune, if a new run has one; print a line about the start."""
    if start.resume is not None:
        check_and_print_continuing(args, start.resume, flags)
    elif start.pretrained is None:
        dist.print_rank0("starting from scratch")
    else:
        note = transfer.init_encoder(model, start.pretrained, args.pos_embed_init, classes)
        changed = checkpoint.other_than_trained(start.pretrained, flags)
        dist.print_rank0(f"encoder from {start.finetune}; {note}{changed}")
    start.pretrained = None  # its memory is needed
    if args.grad_checkpointing:
        model.set_grad_checkpointing()


def freeze(args: argparse.Namespace, model: Classifier, start: Start) -> list[nn.Module]:
    """Freeze what --partial does not train; return the frozen batch norms."""
    if args.partial is None:
        return []
    return freeze_all_but(model, args.partial, keep=set(start.new_parameters))


def evaluate_checkpoint(
    args: argparse.Namespace,
    model: Classifier,
    setup: Setup,
    choices: Choices,
    start: Start,
    val_loader: Batches[ClassSamples],
) -> int:
    """Evaluate --resume; nothing is trained."""
    saved = checkpoint.to_evaluate(start.resume)
    fitted, resized = transfer.fit_for_evaluation(model, saved)
    checkpoint.load_for_evaluation(model, fitted)
    text = f"evaluating {saved.path} in {setup.precision}"
    if saved.ema is not None:
        text += ", the moving average of its weights"
    if resized:
        text += f", {resized}"
    changed = checkpoint.other_than_trained(saved, flags_to_store(args, start, setup, choices))
    dist.print_rank0(text + changed)
    evaluate(model, val_loader, choices.classes, setup, choices.positions, args.predictions)
    dist.shutdown()
    return 0


def build_objective(
    args: argparse.Namespace,
    model: Classifier,
    setup: Setup,
    choices: Choices,
    val_loader: Batches[ClassSamples],
) -> Finetuning:
    """Build the loss, and the moving average if there is one."""
    erasing = Erasing(args.reprob, args.remode, args.recount)
    mixing = Mixing(
        args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode
    )
    augment = BatchAugmentation(len(choices.classes), args.smoothing, erasing, mixing, setup.device)
    augment.check(args.batch_size)
    supervised = SupervisedLoss(augment, args.smoothing, choices.positions, args.pos_weight)
    if args.distill:
        supervised.teacher = build_teacher(
            args.distill,
            args.distill_checkpoint,
            classes=choices.classes,
            img_size=setup.size,
            in_chans=args.in_chans,
            mean=setup.pixels.mean,
            std=setup.pixels.std,
            value_range=setup.pixels.range,
        ).to(setup.device)
    return Finetuning(model, supervised, setup, choices, val_loader, args.predictions)


def build_optimizer(
    args: argparse.Namespace, model: Classifier, start: Start, lr: float
) -> torch.optim.Optimizer:
    """Return AdamW. Layer decay belongs to fine-tuning; without it, it must be asked for."""
    layer_decay = layer_decay_of(args, start)
    groups = param_groups(
        model,
        args.weight_decay,
        model.no_weight_decay(),
        layer_decay,
        model.layer_id,
        model.num_layers,
        by_layer=has_groups_by_layer(start.resume),
    )
    check_layer_decay(layer_decay, groups, start.resume)
    return adamw(groups, lr, betas=(0.9, 0.999))


def layer_decay_of(args: argparse.Namespace, start: Start) -> float:
    """Return --layer_decay, or if it is not given MAE's in fine-tuning and none from scratch."""
    if args.layer_decay is not None:
        return args.layer_decay
    return MAES_LAYER_DECAY if start.finetune else 1.0


def check_layer_decay(layer_decay: float, groups: list[dict], resume: Checkpoint | None) -> None:
    """Raise ValueError if layer decay needs more parameter groups than the continued optimizer has."""
    if resume is None or not resume.entries.get("optimizer") or has_groups_by_layer(resume):
        return
    if resume.kind in ("pretraining", "self-distillation"):
        # `load_strict` says what to do with such a file.
        return
    if len(groups) > 2:
        raise ValueError(
            f"--layer_decay {layer_decay:g}: {resume.path} was trained without layer decay, and its "
            "optimizer has no groups for layers: give --layer_decay 1, or start anew from its weights with "
            "--finetune and another --output_dir"
        )


def has_groups_by_layer(resume: Checkpoint | None) -> bool:
    """Whether the continued optimizer has groups for each layer: MAE's has them without layer decay, too."""
    if resume is None:
        return False
    # Anything else in the file is refused when the state is loaded.
    groups = (resume.entries.get("optimizer") or {}).get("param_groups")
    return isinstance(groups, list) and len(groups) > 2


def flags_to_store(args: argparse.Namespace, start: Start, setup: Setup, choices: Choices) -> dict:
    """Return the flags that checkpoints store, with what became of those that were left open."""
    resolved = {
        "finetune": start.finetune,
        "layer_decay": layer_decay_of(args, start),
        "new_parameters": start.new_parameters,
        "mean": list(setup.pixels.mean),
        "std": list(setup.pixels.std),
    }
    kept = stored_eps(start.trained)
    return checkpoint.plain_flags(vars(args)) | resolved | kept | choices.labels | choices.head


def main(args: argparse.Namespace) -> int:
    check_flags(args)
    device = join_ranks(args)
    if args.output_dir and not (args.eval or args.dry_run):
        dist.check_folder(args.output_dir)

    # Data, as the encoder has learned to see them
    start = find_start(args)
    args = settled(args, start)
    pixels = Pixels(*channel_stats(args.in_chans, args.mean, args.std, start.trained))
    setup = Setup(device, resolve_amp(args.amp, device), pair(args.input_size, "--input_size"), pixels)
    loader, val_loader, setup = build_data(args, setup, start.trained)
    choices = resolve(args, start, val_loader.dataset)

    # Model and loss
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    model = build_model(args, setup, choices, start)
    if loader is None:  # --eval
        return evaluate_checkpoint(args, model, setup, choices, start, val_loader)
    flags = flags_to_store(args, start, setup, choices) | setup.pixels.flags(val_loader.dataset.depth)
    load_weights(args, model, start, flags, choices.classes)
    frozen_norms = freeze(args, model, start)
    if args.strategy == "fsdp":
        fsdp.shard(model, device, setup.amp)
    objective = build_objective(args, model, setup, choices, val_loader)
    objective.frozen_norms = frozen_norms
    if args.ema:
        objective.average = WeightAverage(model, args.ema)

    # Optimizer
    lr = effective_lr(args.lr, args.blr, effective_batch(args))
    optimizer = build_optimizer(args, model, start, lr)
    dist.print_rank0(
        f"{args.model}: {trained_parameters(model) / 1e6:.2f} M trained parameters, "
        f"{counted(len(choices.classes), 'class', 'classes')}, {choices.head['head']} head, "
        f"PE {model.trunk.pos_embed}, labels {choices.labels['pos_label']}; "
        f"{setup}; {describe_batch(args, lr)}"
    )

    session = Session.open(args, flags, start.resume, model.chance(), loss_tag="loss")
    objective.log = session.log
    finished = fit(model, objective, optimizer, loader, setup, open_budget(args, lr), session)
    dist.shutdown()
    return 0 if finished else STOPPED


if __name__ == "__main__":
    sys.exit(run(main, parse(get_args_parser())))
