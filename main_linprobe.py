"""Probe frozen features: a classifier at a grid of learning rates in one pass, or k nearest neighbours.

    python main_linprobe.py --finetune RUN/checkpoint-last.pth --model vit_base_patch16 --data_path DIR
    python main_linprobe.py --finetune RUN/checkpoint-last.pth --model vit_base_patch16 --data_path DIR --knn

MAE's protocol (appendix A.1, and its code): BatchNorm without affine parameters and a linear layer on the
class token, LARS, and MAE's own random crop, which is drawn once. With --global_pool a plain ViT is probed as
in MAE's code: a new LayerNorm (weights 1, biases 0, eps 1e-6), which is not trained, follows the mean of the
patch tokens of the last block, and the encoder's own final norm is left out. Other backbones, and DeiT's with
a distillation token, have no such form: there the mean of the tokens after their final norm is probed, after
a LayerNorm without parameters (eps 1e-5). Every learning rate of --lr_grid has its own head. The backbone
runs once for all of them; --lr_grid 1 is MAE's run.

--cached reads the same features of images without augmentation. --head second_order trains So-ViT's head on
the same pooled feature and the frozen, normalised tokens instead, with the same crop. It is not a linear
probe and is not reported as one. --knn reads the class token and the mean of the patch tokens, both after the
encoder's final norm.
"""

import argparse
import math
import sys

from layers.sizes import classifier_names
from util.flags import early
from util.flags.data_path import DataPath
from util.flags.groups import (
    OptimDefaults,
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
from util.flags.numbers import COUNT, POSITIVE, SHARE, number, side
from util.flags.parser import Parser, answer_at_once, examples, given_in, parse, run

# Values of `probe_protocol`, which is stored like a flag. Probes without it had torchvision's crop and the
# mean of normalised tokens.
MAES = "mae"
EARLIER = "earlier"
CROP_PCT = number(0.05, 2, float)  # as in fine-tuning


def get_args_parser() -> Parser:
    about = "Linear probing and kNN of frozen encoders"
    p = Parser(description=about, epilog=examples(__doc__), add_help=False)
    p.set_defaults(probe_protocol=MAES)
    add_model_flags(p.add_argument_group("model"))
    add_head_flags(p, "linear (default), or So-ViT's on all tokens: a second-order probe")
    add_data_flags(p)
    area = "area of the random crop, as a share of the image"
    p.add_argument(
        "--crop_scale", default=[0.08, 1.0], type=SHARE, nargs=2, metavar=("MIN", "MAX"), help=area
    )
    defaults = OptimDefaults(
        batch_size=512, epochs=90, blr=0.1, min_lr=0.0, weight_decay=0.0, warmup_epochs=10
    )
    add_optim_flags(p, defaults)
    grid = "factors of the learning rate, with a head each; 1 alone is MAE's protocol"
    p.add_argument("--lr_grid", default=[0.1, 0.3, 1.0, 3.0, 10.0], type=POSITIVE, nargs="+", help=grid)
    cached_help = "compute features once, without augmentation, and train on them"
    p.add_argument("--cached", action="store_true", help=cached_help)
    neighbours = "k nearest neighbours instead: k = 10, 20, 100, temperature 0.07"
    p.add_argument("--knn", action="store_true", help=neighbours)
    add_eval_flags(p)
    crop = (
        "side of the centre crop of features that are computed once and of evaluation, as a share of the "
        "resized image; if not given, with --eval that of the probe, else 0.875 up to 224 and 1 above"
    )
    p.add_argument("--crop_pct", default=None, type=CROP_PCT, help=crop)
    add_run_flags(p)
    return p


def add_model_flags(g) -> None:
    names = f"the classifier that has the checkpoint's encoder: {', '.join(classifier_names())}, or timm/NAME"
    g.add_argument("--model", default="vit_large_patch16", help=names)
    patch = "patch size, if other than the model's"
    g.add_argument("--patch_size", default=None, type=side, nargs="+", metavar=("H", "W"), help=patch)
    g.add_argument("--finetune", default="", help="pretrained checkpoint whose encoder is probed")
    published = "probe the weights that timm publishes, with --model timm/NAME"
    g.add_argument("--pretrained", action="store_true", help=published)
    g.add_argument(
        "--nb_classes",
        default=None,
        type=COUNT,
        help="number of classes, if the data must have as many; any if not given",
    )
    kinds = ["auto", "none", "sincos", "learned"]
    g.add_argument(
        "--pos_embed", default="auto", choices=kinds, help="auto: as the checkpoint was pretrained"
    )
    average = "probe the mean of the patch tokens"
    g.add_argument(
        "--global_pool", dest="pool", action="store_const", const="avg", default=None, help=average
    )
    token = "probe the class token (default)"
    g.add_argument("--cls_token", dest="pool", action="store_const", const="cls", help=token)


answer_at_once(__name__, get_args_parser())  # the imports below take seconds

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.heads import SECOND_ORDER_FLAGS, second_order_options
from backbones.registry import MODELS, build_classifier, find, frozen_options
from engine import Objective, Session, Setup, fit
from layers.classifier import Classifier
from layers.probe import Probe, SecondOrderProbe, pool_tokens, pooled, pooled_and_patches
from layers.second_order import SecondOrder
from models_vit import VisionTransformer
from util import dist
from util.data.contract import Batches, ClassSamples
from util.data.datasets import TensorSamples, build_class_dataset
from util.data.formats import ReadSettings
from util.data.loading.cache import cached
from util.data.loading.loader import eval_loader, train_loader
from util.data.pixels import Pixels
from util.data.sources.image_index import check_classes, describe_missing, some_names
from util.data.sources.layouts import training_classes
from util.data.survey.ranges import check_same_depth, kept_range, with_range
from util.data.transforms import eval_transform, pretrain_transform, probe_transform
from util.evaluate.accuracy import Recalls, classification
from util.evaluate.effective_rank import RANK_IMAGES, effective_rank
from util.evaluate.knn import NEIGHBOURS, knn_correct
from util.evaluate.passes import extract_features, mean_terms
from util.files.names import counted, printable
from util.run.frozen import check_encoder
from util.run.log import Log
from util.run.plan import write_record
from util.run.session import STOPPED, check_and_print_continuing, effective_batch, join_ranks, open_budget
from util.train.amp import products, resolve_amp
from util.train.lr_sched import effective_lr
from util.train.optim import lars
from util.train.state import TrainState
from util.weights import checkpoint, transfer
from util.weights.defaults import as_stored
from util.weights.types import Checkpoint, stored_flags

LOST = 100  # times the chance level of the loss


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that contradict each other, before anything is read."""
    check_encoder_flags(args)
    if args.eval and (args.knn or args.dry_run or not args.resume):
        raise ValueError(
            "--eval needs --resume FILE, a trained probe, and the encoder of --finetune unless the file "
            "holds it, as MAE's do; it does not work with --knn or --dry_run"
        )
    if args.knn and args.dry_run:
        raise ValueError("--dry_run plans training, and --knn trains nothing: leave one of them out")
    if args.strategy == "fsdp":
        raise ValueError(
            "--strategy fsdp shards what is trained, and a probe trains linear heads only: leave it out"
        )
    if compile_mode(args.compile, args.compile_mode, args.accum_iter):
        raise ValueError(
            "--compile and --compile_mode compile what is trained, and a probe trains linear heads only: "
            "leave them out"
        )
    check_head_flags(args)
    check_data_flags(args)


def check_encoder_flags(args: argparse.Namespace) -> None:
    if args.pretrained and (args.finetune or not args.model.startswith("timm/")):
        raise ValueError(
            "--pretrained probes timm's own weights of --model timm/NAME: leave it out with other models and "
            "--finetune"
        )
    if not (args.finetune or args.pretrained or args.eval):
        raise ValueError(early.no_encoder(args.model))


def check_data_flags(args: argparse.Namespace) -> None:
    # Features that are computed once are read in batches, but only heads learn from batches of more than one.
    if args.batch_size < 2 and not (args.knn or args.eval):
        raise ValueError(
            "--batch_size 1: the BatchNorm of a probe needs at least 2 images per rank and micro-step, also "
            "with --accum_iter: give --batch_size 2 or more"
        )


def check_head_flags(args: argparse.Namespace) -> None:
    if args.head == "second_order":
        if args.knn or args.cached:
            raise ValueError(
                "--head second_order reads all tokens while it learns, so it does not work with --knn or "
                "--cached: leave them out"
            )
    elif second_order_options(vars(args)):
        raise ValueError("--so_* flags belong to --head second_order: give it, or leave them out")


def as_trained(args: argparse.Namespace, start: Checkpoint | None) -> argparse.Namespace:
    """Return the flags; with --eval, those that are not given are those of the training of the probe."""
    before: dict[str, Any] = {}
    if args.eval:
        before = checkpoint.to_evaluate(start).args
    if args.eval and start is not None and start.is_whole_probe:
        before = before | maes_choices(start, args.pool)
    resolved = {"pool": args.pool or "cls", "probe_protocol": protocol_of(start)}
    if args.pretrained:
        resolved["finetune"] = args.model
    resolved["range"] = kept_range(args.range, stored_flags(start))
    check_stored_crop(args, before)
    for name in ("pool", "pos_embed", "head", "crop_pct", *SECOND_ORDER_FLAGS):
        if before.get(name) is not None and getattr(args, name) in (None, "auto"):
            resolved[name] = before[name]
    # Each rate has its own head, so the grid must be the trained one.
    if before.get("lr_grid") is not None:
        resolved["lr_grid"] = before["lr_grid"]
    return argparse.Namespace(**vars(args) | resolved)


def check_stored_crop(args: argparse.Namespace, before: dict[str, Any]) -> None:
    """Raise ValueError if the crop of a trained probe is needed and is none."""
    if args.crop_pct is not None or before.get("crop_pct") is None:
        return
    try:
        CROP_PCT(str(before["crop_pct"]))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{args.resume} stores a damaged crop_pct ({error}): give --crop_pct") from None


def maes_choices(saved: Checkpoint, pool: str | None) -> dict[str, Any]:
    """Return the choices that a probe file of MAE's shows: one head, on the mean if there is a norm after it.

    Raises ValueError if another `pool` is given.
    """
    own = "avg" if "fc_norm.weight" in saved.model else "cls"
    if pool not in (None, own):
        flag = {"avg": "--global_pool", "cls": "--cls_token"}[own]
        raise ValueError(f"{saved.path} is a probe with {flag}: give that flag, or neither")
    return {"pool": own, "lr_grid": [1.0]}


def probed_encoder(args: argparse.Namespace, start: Checkpoint | None) -> Checkpoint:
    """Return the checkpoint of the frozen encoder: --finetune, the weights that timm publishes, or a probe
    file of MAE's, which holds it.
    """
    if args.eval and checkpoint.to_evaluate(start).is_whole_probe:
        return checkpoint.to_evaluate(start)
    if args.pretrained:
        # timm takes seconds to import.
        from backbones.timm import published_checkpoint

        return published_checkpoint(args.model)
    if not args.finetune:
        start = checkpoint.to_evaluate(start)
        before = printable(str(start.args.get("finetune")))
        remedy = f"--finetune FILE (it was {before})"
        if before.startswith("timm/"):
            remedy = f"--pretrained --model {before}"
        raise ValueError(f"{start.path} holds the heads of a probe alone: give the encoder, too, by {remedy}")
    pretrained = checkpoint.load(args.finetune)
    pretrained.drop_optimizer()
    return pretrained


def protocol_of(start: Checkpoint | None) -> str:
    """Return the protocol of a trained probe, or of a new one."""
    trained = stored_flags(start)
    # MAE's own files store neither of the two.
    if "probe_protocol" in trained or "lr_grid" not in trained:
        return trained.get("probe_protocol", MAES)
    return EARLIER


def keep_protocol(args: argparse.Namespace) -> None:
    """Print what differs from MAE's protocol in a probe that was trained before it was followed.

    Raises ValueError if such a probe cannot be continued as it began.
    """
    if args.probe_protocol != EARLIER:
        return
    if args.weight_decay > 0 and not args.eval:
        raise ValueError(
            f"--weight_decay {args.weight_decay:g} had another form in the version that began this probe: "
            "train anew in another --output_dir"
        )
    kept = []
    if args.pool == "avg" and takes_maes_norm(args.model):
        kept.append("reads the mean of the tokens after the encoder's final norm")
    if not (args.eval or args.cached):
        kept.append("trains on torchvision's random crops")
    if kept:
        dist.print_rank0(
            f"this probe {' and '.join(kept)}, as the version that began it did; for MAE's protocol train "
            "anew in another --output_dir"
        )


def follows_mae(args: argparse.Namespace) -> bool:
    """Whether the average of a probe is pooled as in MAE. kNN reads all poolings from one pass."""
    return not args.knn and args.probe_protocol == MAES and takes_maes_norm(args.model)


def takes_maes_norm(model: str) -> bool:
    """Whether MAE's global pooling exists for a model: a plain ViT with one class token."""
    entry = find(model)
    plain = isinstance(entry.build, type) and issubclass(entry.build, VisionTransformer)
    return plain and not entry.distillation


@dataclass(frozen=True)
class Features:
    """What the heads learn from: pooled features of the frozen backbone, and all tokens if `patches`."""

    backbone: Classifier
    pool: str
    patches: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        if self.patches:
            return pooled_and_patches(self.backbone, images, self.pool)
        return pooled(self.backbone, images, self.pool)


@dataclass
class Probing(Objective):
    """Sum of the heads' cross-entropies. Heads share no parameters, so each one learns as if it were alone.

    `features` maps a batch's images to what the heads take. `names` are those of the heads,
    by their learning rates.
    """

    probe: Probe | SecondOrderProbe
    features: Callable[[Tensor], Tensor]
    names: list[str]
    kind: str
    setup: Setup
    val_loader: Batches[ClassSamples]
    log: Log = field(init=False)

    def loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss; `loss_head` is the lowest loss among the heads.

        A step of LARS grows with the weights, not with the gradient, so that a head at too high a rate grows
        without end. A head whose loss exceeds LOST times the chance level stops learning, so that its
        overflow cannot stop the others.
        """
        logits = model(self.features(batch["image"]))  # (heads, B, classes)
        losses = torch.stack([F.cross_entropy(head.float(), batch["label"]) for head in logits])
        learns = losses.detach() < LOST * math.log(logits.shape[-1])
        lowest = losses.detach().where(learns, math.inf).min()
        return losses.where(learns, 0.0).sum(), {"loss_head": lowest}

    def after_epoch(self, epoch: int, state: TrainState) -> dict[str, float]:
        stats = self.evaluate()
        if state.best is None or stats["test_acc1"] > state.best:
            state.best = stats["test_acc1"]
            state.best_epoch = epoch
        # MAE's names in TensorBoard, and the mean over classes.
        names = [name for name in ("test_acc1", "test_acc5", "test_balanced_acc1") if name in stats]
        self.log.scalars({f"perf/{name}": stats[name] for name in names}, epoch)
        return stats

    def evaluate(self) -> dict[str, float]:
        """Return the accuracies of all heads on the validation images; print MAE's line for the best one.

        The mean over classes, of those that have images, is the best head's; there is none for one class.
        """
        classes = len(self.val_loader.dataset.classes)
        recalls = Recalls(classes, self.setup.device, len(self.names))
        terms = partial(self.evaluation_terms, recalls=recalls)
        stats = mean_terms(self.probe, terms, self.val_loader, self.setup)
        best = max(self.names, key=lambda name: stats[f"acc1_{name}"])
        acc1 = stats[f"acc1_{best}"]
        acc5 = stats[f"acc5_{best}"]
        text = f"* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}"
        figures = {"test_loss": stats[f"loss_{best}"], "test_acc1": acc1, "test_acc5": acc5}
        recalls.reduce()
        if means := recalls.balanced():
            mean = means[self.names.index(best)]
            figures["test_balanced_acc1"] = mean.accuracy
            text += f" {mean}"
        heads = "  ".join(f"{name} {stats[f'acc1_{name}']:.3f}" for name in self.names)
        images = f"{stats['images']} of {len(self.val_loader.dataset)} images"
        dist.print_rank0(f"{text} {self.kind} at {best} on {images}; {heads}")
        # MAE counts the parameters of one head.
        parameters = sum(p.numel() for p in self.probe.parameters()) // len(self.names)
        figures["n_parameters"] = parameters
        return figures | {f"test_acc1_{name}": stats[f"acc1_{name}"] for name in self.names}

    def evaluation_terms(
        self, model: nn.Module, batch: dict, recalls: Recalls
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms: dict[str, Tensor] = {}
        for head, logits in enumerate(model(self.features(batch["image"]))):
            name = self.names[head]
            loss, stats = classification(logits, batch["label"], recalls, head)
            terms |= {f"acc{k}_{name}": stats[f"acc{k}"] for k in (1, 5)}
            terms |= {f"loss_{name}": loss, "images": stats["images"]}
        return torch.zeros((), device=batch["label"].device), terms


def load_backbone(args: argparse.Namespace, state: Checkpoint, setup: Setup, flags: dict) -> Classifier:
    """Return the frozen encoder of --finetune in evaluation mode.

    Its tokens come after the final norm, unless a plain ViT is pooled as in MAE: then a new norm follows the
    mean.
    """
    options = frozen_options(args.model, state, args.pos_embed)
    if args.pool == "avg" and follows_mae(args):
        options["pool"] = "avg"
    if args.patch_size:
        options["patch_size"] = pair(args.patch_size, "--patch_size")
    # A distillation token that the file lacks is a random one, and must be the same at each start.
    torch.manual_seed(0)
    model = build_classifier(
        args.model, img_size=setup.size, in_chans=args.in_chans, num_classes=0, **options
    )
    dist.print_rank0(transfer.init_encoder(model, state, "zero"))
    dist.print_rank0(f"encoder from {state.path}{checkpoint.other_than_trained(state, flags)}")
    if args.pool == "cls" and not model.num_prefix:
        raise ValueError(f"--model {args.model} has no class token: probe it with --global_pool")
    return model.to(setup.device).eval().requires_grad_(False)


def use_trained_classes(data: ClassSamples, saved: Checkpoint, source: DataPath) -> None:
    """Give the validation images the labels of a trained probe, of whose classes they may have some.

    Raises ValueError if they have a class that the probe does not know.
    """
    classes = saved.classes
    if classes is None:
        # MAE's files do not name the outputs, and the training images may.
        trained = dist.compute_on_main(lambda: training_classes(source))
        classes = data.classes
        if set(classes) < set(trained):
            classes = trained
    if not set(data.classes) <= set(classes):
        raise ValueError(
            f"{saved.path} was trained on the classes {some_names(classes)}, the data have "
            f"{some_names(data.classes)}: give the data that it was trained on"
        )
    data.use_classes(classes)


def check_number_of_classes(args: argparse.Namespace, data: ClassSamples) -> None:
    """Print for which classes nothing is evaluated. Raises ValueError for one class, and for another number
    than --nb_classes.
    """
    if len(data.classes) < 2:
        raise ValueError(
            f"--data_path {printable(data.path)} has one class only ({some_names(data.classes)}): "
            "a classifier needs at least two class folders"
        )
    if args.nb_classes not in (None, len(data.classes)):
        raise ValueError(
            f"--nb_classes {args.nb_classes}, but {data.path} has "
            f"{counted(len(data.classes), 'class folder')}: leave --nb_classes out, or check the path"
        )
    if missing := describe_missing(data):
        dist.print_rank0(missing)


def describe_evaluation(args: argparse.Namespace, val: ClassSamples, setup: Setup) -> None:
    share = ""
    if args.crop_pct is not None:
        share = f": centre crop {setup.size[0]}x{setup.size[1]} of {args.crop_pct:.3f}"
    dist.print_rank0(f"evaluation on {val.summary()}{share}")


def check_not_a_stream(args: argparse.Namespace, val: ClassSamples) -> None:
    if args.cached and not val.exact_resume:
        raise ValueError(
            f"--cached keeps features by the numbers of images, and {printable(val.path)} is a stream, which "
            "has none: leave --cached out"
        )


def build_data(
    args: argparse.Namespace, setup: Setup, trained: dict, start: Checkpoint | None = None
) -> tuple[Batches[ClassSamples] | None, Batches[ClassSamples], Setup]:
    """Return the training loader, the validation loader, and the setup with the range of their values.

    Both loaders have the same classes. Training images are augmented unless features are computed once. There
    is no training loader for --eval; the classes are those of `start` then. `trained` are the flags of the
    encoder's training.
    """
    once = args.knn or args.cached
    source = DataPath.from_flags(args)
    options = dict(read=ReadSettings.of(vars(args)), seed=args.seed, nb_classes=args.nb_classes)
    whole = eval_transform(setup.size, args.crop_pct)
    val = build_class_dataset(source, "val", whole, evaluation=True, **options)
    describe_evaluation(args, val, setup)
    check_not_a_stream(args, val)
    pin_memory = args.pin_mem and setup.device.type == "cuda"
    loading = dict(
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        pin_memory=pin_memory,
        data_timeout=args.data_timeout,
    )
    ranged = dict(given=args.range, scaled=bool(args.mean and args.std), trained=trained)
    if args.eval:
        use_trained_classes(val, checkpoint.to_evaluate(start), source)
        check_number_of_classes(args, val)
        setup = replace(setup, pixels=with_range(setup.pixels, val, **ranged))
        return None, cached(eval_loader(val, **loading), args.cache_data, setup.device), setup
    transform: Callable = whole
    if not once:
        scale = ascending(args.crop_scale, "--crop_scale")
        transform = probe_transform(setup.size, scale)
        if args.probe_protocol == EARLIER:
            transform = pretrain_transform(setup.size, scale)
    train = build_class_dataset(source, "train", transform, evaluation=once, **options)
    check_classes(train, val)
    check_number_of_classes(args, val)
    dist.print_rank0(f"training on {train.summary()}")
    setup = replace(setup, pixels=with_range(setup.pixels, train, **ranged))
    check_same_depth(train, val, args.range)
    val_loader = cached(eval_loader(val, **loading), args.cache_data, setup.device)
    if once:
        loader = eval_loader(train, **loading)
    else:
        loader = train_loader(train, seed=args.seed, **loading)
    return cached(loader, args.cache_data, setup.device), val_loader, setup


def seen_by_heads(start: Checkpoint | None) -> dict[str, Any]:
    """Return as flags how trained heads have seen images, which may differ from how the encoder has."""
    own = stored_flags(start)
    found = {name: own[name] for name in ("mean", "std") if own.get(name)}
    # None counts, too: a range of None is that of 8-bit images, whatever the encoder was trained on.
    names = ("range", "image_depth", "channels", "bands", "alpha", "exif")
    return found | {name: own[name] for name in names if name in own}


def features_loader(
    args: argparse.Namespace, objective: Probing, loader: Batches[ClassSamples], shuffle: bool
) -> Batches[ClassSamples]:
    """Return a loader over features that are computed once, instead of images."""
    x, y = extract_features(objective.features, loader, objective.setup)
    samples = TensorSamples(x.cpu(), y.cpu(), getattr(loader.dataset, "index", loader.dataset))
    # Workers would only copy tensors from one process to another.
    loading = dict(batch_size=args.batch_size, num_workers=0, pin_memory=False)
    if shuffle:
        return train_loader(samples, seed=args.seed, **loading)
    return eval_loader(samples, **loading)


def cache_features(
    args: argparse.Namespace, objective: Probing, loader: Batches[ClassSamples]
) -> Batches[ClassSamples]:
    """Compute all features once. Return the training loader over them; the objective evaluates on them,
    too.
    """
    train = features_loader(args, objective, loader, shuffle=True)
    cache_validation_features(args, objective)
    return train


def cache_validation_features(args: argparse.Namespace, objective: Probing) -> None:
    """Compute the features of the validation images once, and let the objective evaluate on them."""
    objective.val_loader = features_loader(args, objective, objective.val_loader, shuffle=False)
    # From here on batches hold features.
    objective.features = nn.Identity()


def run_knn(
    args: argparse.Namespace,
    backbone: Classifier,
    loader: Batches[ClassSamples],
    val_loader: Batches[ClassSamples],
    setup: Setup,
    flags: dict,
) -> int:
    """Classify by the nearest neighbours of the class token and of the mean patch token; write log.txt and
    run.json.
    """
    write_record(args.output_dir, flags, {"device": str(setup.device), "amp": setup.amp})
    pools = ["avg"]
    if backbone.num_prefix:
        pools = ["cls", "avg"]

    def features(images: Tensor) -> Tensor:
        # All poolings from one pass.
        tokens = backbone.forward_features(images)
        return torch.cat([pool_tokens(tokens, backbone.num_prefix, pool) for pool in pools], dim=1)

    bank, bank_labels = extract_features(features, loader, setup)
    queries, labels = extract_features(features, val_loader, setup, gather=False)
    if len(bank) < max(NEIGHBOURS):
        dist.print_rank0(f"there are {len(bank)} training images: kNN with a larger k takes all of them")
    num_classes = len(loader.dataset.classes)
    stats: dict[str, float] = {}
    for pool, queries_of_pool, bank_of_pool in zip(
        pools, queries.chunk(len(pools), 1), bank.chunk(len(pools), 1)
    ):
        correct = knn_correct(queries_of_pool, labels, bank_of_pool, bank_labels, num_classes)
        recalls = Recalls(num_classes, setup.device, len(correct))
        for head, right in enumerate(correct.values()):
            recalls.add(right, labels, head)
        stats |= report_knn(pool, list(correct), recalls, bank_of_pool, setup)
    Log(args.output_dir).write_line(stats | {"epoch": 0})
    dist.shutdown()
    return 0


def report_knn(pool: str, ks: list[int], recalls: Recalls, bank: Tensor, setup: Setup) -> dict[str, float]:
    """Return and print accuracies over all ranks, and the effective rank of the training features.

    `recalls` has a head for each of `ks`.
    """
    recalls.reduce()
    balanced = recalls.balanced()
    stats = {f"knn{k}_{pool}": accuracy for k, accuracy in zip(ks, recalls.accuracies())}
    stats |= {f"balanced_knn{k}_{pool}": mean.accuracy for k, mean in zip(ks, balanced)}
    # Some images, spread over the data set and so over all classes.
    some = min(RANK_IMAGES, len(bank))
    rank = effective_rank(bank[torch.arange(some) * len(bank) // some])
    accuracies = "  ".join(f"k={k} {stats[f'knn{k}_{pool}']:.3f} {mean}" for k, mean in zip(ks, balanced))
    dist.print_rank0(
        f"* kNN {pool}: {accuracies}  ({len(bank)} training and {recalls.images} validation images; "
        f"effective rank {rank:.1f} of {bank.shape[1]}; features in {setup.precision}, "
        f"similarities in {products(setup.device)})"
    )
    return stats | {f"effective_rank_{pool}": rank}


def build_objective(
    args: argparse.Namespace, backbone: Classifier, setup: Setup, val_loader: Batches[ClassSamples]
) -> Probing:
    """Build a head for each learning rate."""
    num_classes = len(val_loader.dataset.classes)
    heads = len(args.lr_grid)
    names = [f"lr{scale:g}" for scale in args.lr_grid]
    second_order = args.head == "second_order"
    features = Features(backbone, args.pool, patches=second_order)
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    probe: Probe | SecondOrderProbe
    if second_order:
        kind = "second-order probe"
        options = SecondOrder(**second_order_options(vars(args)))
        probe = SecondOrderProbe(backbone.dim, num_classes, heads, options)
    else:
        kind = "linear probe"
        probe = Probe(backbone.dim, num_classes, heads)
    return Probing(probe.to(setup.device), features, names, kind, setup, val_loader)


def evaluate_checkpoint(args: argparse.Namespace, objective: Probing, saved: Checkpoint, flags: dict) -> int:
    """Evaluate the trained probe --resume; nothing is trained."""
    if args.cached:
        cache_validation_features(args, objective)
    changed = checkpoint.other_than_trained(saved, flags, ("model", "finetune", "pool", "crop_pct"))
    dist.print_rank0(f"evaluating {args.resume}{changed}")
    heads = saved
    if saved.is_whole_probe:
        # The encoder is loaded already.
        heads = replace(saved, model={k: v for k, v in saved.model.items() if k.startswith("head.")})
    checkpoint.load_strict(objective.probe, heads)
    objective.evaluate()
    dist.shutdown()
    return 0


def find_start(args: argparse.Namespace) -> Checkpoint | None:
    """Return the probe to continue or to evaluate."""
    output_dir = args.output_dir
    if args.eval or args.knn:
        output_dir = ""
    return checkpoint.load_start(output_dir, args.resume)


def main(given: argparse.Namespace) -> int:
    check_flags(given)
    device = join_ranks(given)
    start = find_start(given)
    args = as_trained(given, start)
    pretrained = probed_encoder(args, start)
    pretrained.args |= seen_by_heads(start)
    args = argparse.Namespace(**as_stored(vars(args), given_in(given), pretrained, MODELS))
    keep_protocol(args)
    pixels = Pixels(*channel_stats(args.in_chans, args.mean, args.std, pretrained.args))
    setup = Setup(device, resolve_amp(args.amp, device), pair(args.input_size, "--input_size"), pixels)
    flags = checkpoint.plain_flags(vars(args)) | {"mean": list(pixels.mean), "std": list(pixels.std)}
    if args.output_dir and not (args.eval or args.dry_run):
        dist.check_folder(args.output_dir)

    # Data, frozen encoder, heads
    loader, val_loader, setup = build_data(args, setup, pretrained.args, start)
    flags |= setup.pixels.flags(val_loader.dataset.depth)
    backbone = load_backbone(args, pretrained, setup, flags)
    flags["encoder"] = check_encoder(backbone, start, args.finetune, setup.size)
    del pretrained  # its memory is needed
    if loader is None:  # --eval
        objective = build_objective(args, backbone, setup, val_loader)
        return evaluate_checkpoint(args, objective, checkpoint.to_evaluate(start), flags)
    if args.knn:
        return run_knn(args, backbone, loader, val_loader, setup, flags)
    objective = build_objective(args, backbone, setup, val_loader)
    if start is not None:
        check_and_print_continuing(args, start, flags)
    if args.cached:
        loader = cache_features(args, objective, loader)

    # Optimizer
    lr = effective_lr(args.lr, args.blr, effective_batch(args))
    optimizer = lars(objective.probe.head[1:], args.lr_grid, lr, args.weight_decay)
    grid = ", ".join(f"{scale:g}" for scale in args.lr_grid)
    dist.print_rank0(
        f"{objective.kind} of {args.model}, {args.pool} features of width {backbone.dim}; {setup}; "
        f"effective batch {effective_batch(args)}, lr {lr:.3g} x {grid}"
    )
    session = Session.open(args, flags, start, loss_tag="loss")
    objective.log = session.log
    finished = fit(objective.probe, objective, optimizer, loader, setup, open_budget(args, lr), session)
    dist.shutdown()
    return 0 if finished else STOPPED


if __name__ == "__main__":
    sys.exit(run(main, parse(get_args_parser())))
