"""Semantic segmentation: fine-tune an encoder, evaluate, or ask what its frozen patch tokens know.

    python main_segment.py --model vit_small_patch16 --data_path DIR --finetune RUN/checkpoint-last.pth
    python main_segment.py --data_path DIR --eval --resume SEG/checkpoint-best.pth
    python main_segment.py --model vit_small_patch16 --data_path DIR --finetune FILE --probe linear --controls
    python main_segment.py --model vit_small_patch16 --data_path DIR --finetune FILE --probe knn --controls
    python main_segment.py --data_path DIR --finetune RUN_A RUN_B RUN_C --probe logistic --output_dir OUT

DIR has images/{train,val} and masks/{train,val} with index PNGs of the same names, or train/ and val/ with
masks/ beside them; the layouts of ADE20K, VOC, Cityscapes and ImageNet-S are recognised as well. Without
--data_path it is the embedded demo set. docs/segments.md explains protocols and figures.

Fine-tuning follows the code of ImageNet-S, which SERE's authors use: a norm and one linear layer on the patch
tokens, and a loss on logits of twice their size.

A frozen probe is linear (BatchNorm without affine parameters and one linear layer for each rate of
--lr_grid), solves for such a map at a grid of penalties (--probe logistic), or retrieves the labels of the
nearest patches of the training images (--probe knn). With --controls the same probe also reads the position
of a patch alone, its raw pixels, a random encoder, and the tokens without and with their position: a score
means little without these. With several files after --finetune a probe reads one after the other, and makes
one table.

Exit codes: 0 done; 75 a signal stopped the run, its state is saved, and the same command continues it; 2
wrong input.
"""

import argparse
import copy
import functools
import os
import sys
import threading

from layers.sizes import classifier_names
from util.files.names import counted
from util.flags import ending
from util.flags.data_path import DataPath
from util.flags.groups import (
    OptimDefaults,
    add_data_flags,
    add_eval_flags,
    add_optim_flags,
    add_run_flags,
    ascending,
    channel_stats,
    compile_mode,
    pair,
)
from util.flags.numbers import BELOW_ONE, COUNT, FROM_ZERO, LAYER_DECAY, POSITIVE, SHARE, WHOLE, side
from util.flags.parser import Parser, answer_at_once, examples, given_in, parse, run


def get_args_parser() -> Parser:
    about = "Semantic segmentation by fine-tuned encoders and by probes of frozen ones"
    p = Parser(description=about, epilog=examples(__doc__), add_help=False)
    add_model_flags(p.add_argument_group("model"))
    add_data_flags(p, paths="folder or tar of images and masks, see docs/segments.md")
    add_mask_flags(p.add_argument_group("masks"))
    defaults = OptimDefaults(
        batch_size=64, epochs=50, blr=1e-3, min_lr=1e-6, weight_decay=0.05, warmup_epochs=5
    )
    add_optim_flags(p, defaults)
    add_run_flags(p)
    # The name in ImageNet-S's code.
    p.add_argument(
        "--saveckp_freq", dest="save_every_epochs", type=FROM_ZERO, default=20, help=argparse.SUPPRESS
    )
    add_augment_flags(p.add_argument_group("augmentation"))
    add_probe_flags(p.add_argument_group("frozen probes"))
    add_evaluation_flags(p.add_argument_group("evaluation"))
    return p


class Files(argparse.Action):
    """Stores one word as text, and several as a list."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if len(values) == 1:
            (values,) = values
        setattr(namespace, self.dest, values)


def add_model_flags(g) -> None:
    names = (
        f"that of the checkpoint if the run starts from one; {', '.join(classifier_names())}, or timm/NAME"
    )
    g.add_argument("--model", default="vit_large_patch16", help=names)
    patch = "patch size, if other than the model's"
    g.add_argument("--patch_size", default=None, type=side, nargs="+", metavar=("H", "W"), help=patch)
    encoder = (
        "pretrained encoder or classifier to fine-tune or probe: a file, a run's folder or an https address. "
        "With --probe there may be several, for a table with a row for each"
    )
    g.add_argument("--finetune", default="", nargs="+", action=Files, metavar="FILE", help=encoder)
    published = "start from the weights that timm publishes, with --model timm/NAME"
    g.add_argument("--pretrained", action="store_true", help=published)
    embedding = "positional embedding; auto: learned in fine-tuning, that of the checkpoint in a probe"
    kinds = ["auto", "none", "sincos", "learned"]
    g.add_argument("--pos_embed", default="auto", choices=kinds, help=embedding)
    start = "initial values of a positional embedding that the checkpoint lacks"
    g.add_argument("--pos_embed_init", default="zero", choices=["zero", "sincos", "normal"], help=start)
    heads = (
        "head that is fine-tuned with the encoder. linear reads the last layer; upernet and dpt read four, "
        "and need pip install segmentation-models-pytorch"
    )
    g.add_argument("--head", default="linear", choices=["linear", "upernet", "dpt"], help=heads)
    g.add_argument("--drop_path", default=0.1, type=BELOW_ONE, help="stochastic depth of the last block")
    decay = "learning rate factor per layer, from the top down"
    g.add_argument("--layer_decay", default=0.75, type=LAYER_DECAY, help=decay)
    recompute = "recompute each block in backward: less memory, a fifth to a third more time"
    g.add_argument("--grad_checkpointing", action="store_true", help=recompute)


def add_mask_flags(g) -> None:
    classes = (
        "number of classes; if not given that of the layout, or one more than the highest number in masks"
    )
    g.add_argument("--num_classes", default=None, type=COUNT, help=classes)
    # MAE's name.
    g.add_argument("--nb_classes", dest="num_classes", default=None, type=COUNT, help=argparse.SUPPRESS)
    ignored = (
        "number in the masks of pixels without a class, which count neither in training nor in evaluation; "
        "if not given that of the layout, or 255"
    )
    g.add_argument("--ignore_index", default=None, type=WHOLE, help=ignored)
    zero = "pixels of number 0 have no class, and the others are lowered by 1; if not given for ADE20K alone"
    g.add_argument("--reduce_zero_label", default=None, action=argparse.BooleanOptionalAction, help=zero)


def add_augment_flags(g) -> None:
    area = "area of the random crop, as a share of the image"
    g.add_argument(
        "--crop_scale", default=[0.14, 1.0], type=SHARE, nargs=2, metavar=("MIN", "MAX"), help=area
    )
    jitter = (
        "instead of --crop_scale: resize by a random factor of this range, as 0.5 2, and cut a window of "
        "--input_size"
    )
    g.add_argument(
        "--scale_jitter", default=None, type=POSITIVE, nargs=2, metavar=("MIN", "MAX"), help=jitter
    )
    g.add_argument("--hflip", default=0.5, type=SHARE, help="probability of a horizontal flip")
    g.add_argument("--vflip", default=0.0, type=SHARE, help="probability of a vertical flip")
    photo = (
        "colour jitter, grey and blur of ImageNet-S's code; if not given on in fine-tuning with RGB images, "
        "and off in probes"
    )
    g.add_argument("--photo", default=None, action=argparse.BooleanOptionalAction, help=photo)
    at = (
        "where the loss is taken. twice: at logits of twice their size, to which masks are reduced; pixels: "
        "at the size of the masks. If not given twice in fine-tuning, and pixels in probes"
    )
    g.add_argument("--loss_at", default=None, choices=["twice", "pixels"], help=at)


def add_probe_flags(g) -> None:
    kinds = (
        "freeze the encoder. linear trains a linear map of its patch tokens; logistic solves for it; "
        "knn gives a patch the labels of the nearest training patches. If not given the encoder is fine-tuned"
    )
    g.add_argument("--probe", default=None, choices=["linear", "logistic", "knn"], help=kinds)
    blocks = (
        "blocks whose patch tokens are joined, counted from 0, or from the end by -1; if not given the last"
    )
    g.add_argument("--layers", default=None, type=WHOLE, nargs="+", metavar="N", help=blocks)
    rows = (
        "print a row for each control beside that of the encoder: position alone, pixels, random encoder, "
        "tokens without and with their position"
    )
    g.add_argument("--controls", action="store_true", help=rows)
    grid = "factors of the learning rate of --probe linear; each has a head, and the best one is printed"
    g.add_argument("--lr_grid", default=[0.1, 0.3, 1.0, 3.0, 10.0], type=POSITIVE, nargs="+", help=grid)
    penalties = "inverse penalties C of --probe logistic, as scikit-learn has them; the best one is printed"
    tens = [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0]
    g.add_argument("--logistic_c", default=tens, type=POSITIVE, nargs="+", metavar="C", help=penalties)
    once = "--probe linear: compute features once, of whole images without augmentation, and train on them"
    g.add_argument("--cached", action="store_true", help=once)
    g.add_argument("--knn_k", default=30, type=COUNT, metavar="K", help="neighbours of --probe knn")
    g.add_argument(
        "--knn_temperature",
        default=0.02,
        type=POSITIVE,
        help="temperature of the softmax of similarities, by which the neighbours of --probe knn vote",
    )
    patches = (
        "most patches of training images that --probe knn remembers and --probe logistic learns from, drawn "
        "at random"
    )
    g.add_argument("--knn_memory", default=1024 * 1000, type=COUNT, metavar="N", help=patches)


def add_evaluation_flags(g) -> None:
    add_eval_flags(g)
    kinds = (
        "size of images in evaluation; masks keep theirs. short: shorter side of --eval_side, aspect kept; "
        "exact: --input_size; own: as they are. If not given short in fine-tuning, and exact in probes"
    )
    g.add_argument("--eval_images", default=None, choices=["short", "exact", "own"], help=kinds)
    short = "shorter side of --eval_images short; 256 / 224 of that of --input_size if not given"
    g.add_argument("--eval_side", default=None, type=side, metavar="N", help=short)
    window = "evaluate in overlapping windows of this size; the whole image at once if not given"
    g.add_argument("--window", default=None, type=side, nargs="+", metavar=("H", "W"), help=window)
    stride = "step from window to window; two thirds of --window if not given"
    g.add_argument("--stride", default=None, type=side, nargs="+", metavar=("H", "W"), help=stride)
    sizes = "how logits are brought to the size of the masks"
    g.add_argument("--upsample", default="bilinear", choices=["bilinear", "nearest"], help=sizes)
    largest = (
        "masks of more than N x N pixels get predictions of this longer side, which are then enlarged; 0 for "
        "no limit"
    )
    g.add_argument("--max_res", default=1000, type=FROM_ZERO, metavar="N", help=largest)
    g.add_argument(
        "--eval_freq",
        default=20,
        type=COUNT,
        metavar="N",
        help="evaluate after the first epoch, then after every N, and after the last",
    )
    counts = (
        "write the pixels of each validation image and class to image_counts.npz in --output_dir, from which "
        "intervals over images follow"
    )
    g.add_argument("--image_counts", action="store_true", help=counts)
    files = (
        "fine-tuning and its --eval: write a PNG of class numbers for each validation image to this folder"
    )
    g.add_argument("--predictions", default="", metavar="DIR", help=files)


answer_at_once(__name__, get_args_parser())  # the imports below take seconds

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from backbones.registry import MODELS, build_classifier, frozen_options, norm_options
from engine import Objective, Session, Setup, fit
from layers.classifier import Classifier
from layers.segmentation import Segmenter
from util import dist
from util.data.contract import Batches
from util.data.formats import ReadSettings
from util.data.loading.loader import eval_loader, some_samples, train_loader
from util.data.pixels import Pixels
from util.data.segments.dataset import SegmentDataset, build_segment_dataset, survey_masks
from util.data.segments.transforms import Joint, SegmentCrop, SegmentEval, SegmentResize
from util.data.segments.written import write_mask
from util.data.survey.ranges import check_same_depth, kept_range, with_range
from util.data.transforms import CropSettings
from util.dist import fsdp
from util.evaluate.position import PositionProjection
from util.evaluate.segments import image_counts, logistic
from util.evaluate.segments.figures import Figures, Protocol, check_windows
from util.evaluate.segments.grading import (
    DenseProbing,
    Evaluation,
    Schedule,
    describe,
    grade,
    known,
    predict_samples,
    print_table,
    stats_of,
)
from util.evaluate.segments.loss import segment_loss
from util.evaluate.segments.retrieval import Neighbours, remember, scores_of
from util.evaluate.segments.sources import (
    CONTROLS,
    ENCODER,
    CheckedBatches,
    Probes,
    Sources,
    cached_features,
    fit_projection,
    own_features,
)
from util.files.atomic import read_json
from util.report import comparison
from util.report.panels import Bands, save_png
from util.report.segments import SegmentView, segment_panel
from util.run.frozen import check_encoder
from util.run.guards import BadImages, survive_full_disk
from util.run.log import Log
from util.run.plan import write_record
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
from util.train.optim import adamw, param_groups
from util.train.state import TrainState
from util.weights import checkpoint, transfer
from util.weights.defaults import as_stored
from util.weights.types import Checkpoint, stored_eps, stored_flags
from util.weights.validate import shown

SHOWN = 4  # validation images in the picture of an evaluation


@dataclass
class Segmenting(Objective):
    """Training of a whole segmenter, which is evaluated after some epochs; the best one is noted."""

    model: nn.Module
    setup: Setup
    evaluation: Evaluation
    val_loader: Batches[SegmentDataset]
    loss_at: str
    schedule: Schedule
    predictions: str = ""
    log: Log = field(init=False)

    def loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        upsample = self.evaluation.protocol.upsample
        return segment_loss(model(batch["image"]), batch["mask"], self.loss_at, upsample), {}

    def after_epoch(self, epoch: int, state: TrainState) -> dict[str, float]:
        if not self.schedule.due(epoch):
            return {}
        with fsdp.gathered(self.model) as whole:
            figures = self.evaluate(whole)
            if dist.is_main() and self.log.output_dir:
                self.draw(whole, epoch, self.log.output_dir)
        miou = known(figures.miou)
        if state.best is None or miou > state.best:
            state.best = miou
            state.best_epoch = epoch
        dist.print_rank0(f"Max mIoU: {state.best:.2f}% (epoch {state.best_epoch})")
        stats = {
            "test_miou": miou,
            "test_miou_all": known(figures.miou_all),
            "test_pixel_accuracy": known(figures.pixel_accuracy),
        }
        self.log.scalars({f"perf/{name}": value for name, value in stats.items()}, epoch)
        return stats

    def evaluate(self, model: nn.Module) -> Figures:
        """Grade the model; print its figures and those of each class."""
        model.eval()
        dataset = self.val_loader.dataset

        def predictor(batch: dict) -> Tensor:
            return self.evaluation.logits(model, batch["image"])

        def record(number: int, predictions: Sequence[Tensor], mask: Tensor) -> None:
            if self.predictions:
                write_mask(self.predictions, dataset.name(number), predictions[0])

        figures = grade(predictor, ["model"], self.val_loader, self.evaluation, self.setup, record)["model"]
        dist.print_rank0(
            f"* mIoU {figures.miou:.3f} over all classes {figures.miou_all:.3f} pixel accuracy "
            f"{figures.pixel_accuracy:.3f} mean accuracy {figures.mean_accuracy:.3f} "
            f"on {counted(figures.images, 'image')}"
        )
        dist.print_rank0(f"IoU: {describe(figures, dataset.classes)}")
        return figures

    @cached_property
    def shown(self) -> list[dict]:
        """The validation images that pictures show."""
        return some_samples(self.val_loader.dataset, SHOWN)

    def draw(self, model: nn.Module, epoch: int, output_dir: str) -> None:
        """Write a picture of some validation images; nothing random is drawn."""
        setup = self.setup
        with setup.autocast():
            found = predict_samples(model, self.shown, self.evaluation, setup.pixels, setup.device)
        if not found:
            return
        bands = Bands.of(found[0].image.shape[1])
        views = [SegmentView(bands.shown(each.image)[0], each.mask, each.prediction) for each in found]
        panel = segment_panel(views, self.val_loader.dataset.classes)
        path = os.path.join(output_dir, "pictures", f"epoch-{epoch:04d}.png")
        with survive_full_disk():
            save_png(panel, path)
            print(f"picture: {path}", flush=True)
        self.log.picture("segments", panel, epoch)


@dataclass
class Start:
    """Where a run starts: the checkpoint that it continues or evaluates, the encoder of --finetune, or
    neither.

    `finetune` is the path of the encoder, also if a continued run no longer reads it.
    """

    resume: Checkpoint | None
    finetune: str
    pretrained: Checkpoint | None

    @property
    def trained(self) -> dict:
        """The flags of the training that the checkpoint stores; {} from scratch."""
        return stored_flags(self.resume or self.pretrained)

    @property
    def encoder(self) -> Checkpoint:
        """The checkpoint of the frozen encoder."""
        assert self.pretrained is not None, "`check_flags` asks for it"
        return self.pretrained


@dataclass(frozen=True)
class Data:
    """The loaders of a run: None for training images that it does not need.

    `train` has random crops, `whole` each training image once and resized. `val` has batches of one image.
    """

    val: Batches[SegmentDataset]
    train: Batches[SegmentDataset] | None = None
    whole: CheckedBatches | None = None


NO_ENCODER = "--probe needs --finetune FILE, the checkpoint whose patch tokens are read"
# Probes that leave no checkpoint to continue, and why.
AT_ONCE = {"knn": "trains nothing", "logistic": "solves for its weights at once"}
# Flags without which a trained segmenter or probe gives other figures. Those of its training count if they
# are not given.
AS_TRAINED = ("head", "layers", "lr_grid", "controls", "upsample", "window", "stride", "max_res")
# Flags that a trained probe cannot do without.
FIXED = ("layers", "lr_grid")


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that contradict each other, before anything is read."""
    compile_mode(args.compile, args.compile_mode, args.accum_iter)
    if args.eval and not args.resume:
        raise ValueError("--eval needs --resume FILE, the trained segmenter or probe to evaluate")
    if args.eval and args.dry_run:
        raise ValueError("--dry_run plans training, and --eval does not train: leave one of them out")
    # A probe is evaluated with its encoder, which its file does not hold.
    evaluated = args.eval and not args.probe
    if args.pretrained and (args.finetune or evaluated or not args.model.startswith("timm/")):
        raise ValueError(
            "--pretrained starts from timm's own weights for --model timm/NAME: leave it out with other "
            "models and --finetune, and to evaluate a segmenter"
        )
    if args.cache_data != "none":
        raise ValueError("--cache_data keeps images without their masks: leave it out here")
    check_several(args)
    check_written(args)
    check_probe_flags(args)


def check_several(args: argparse.Namespace) -> None:
    """Raise ValueError if a command with several encoders cannot make a table of them."""
    if isinstance(args.finetune, str):
        return
    if not args.probe:
        raise ValueError("several files of --finetune make a table of probes: give --probe, or one file")
    if any((args.eval, args.resume, args.dry_run, args.max_steps)):
        raise ValueError(
            "several files of --finetune are probed one after the other: leave --eval, --resume, --dry_run "
            "and --max_steps out, or give one file"
        )
    if not args.output_dir:
        raise ValueError("several files of --finetune need --output_dir, where each one has a folder")
    comparison.names_of(args.finetune)


def check_written(args: argparse.Namespace) -> None:
    """Raise ValueError if counts have no folder, or if predictions might replace the masks or the images."""
    if args.image_counts and not args.output_dir:
        raise ValueError("--image_counts needs --output_dir DIR, the folder of its file")
    if not args.predictions:
        return
    if args.probe:
        raise ValueError("--predictions are those of a fine-tuned segmenter: leave it out with --probe")
    folder, data = (os.path.join(os.path.realpath(path), "") for path in (args.predictions, args.data_path))
    if args.data_path and folder.startswith(data):
        raise ValueError(
            "--predictions lies in --data_path, whose masks it might replace: give another folder"
        )


def check_probe_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that fine-tuning or a probe does not have."""
    if not args.probe:
        for name in ("layers", "controls", "cached"):
            if getattr(args, name):
                raise ValueError(
                    f"--{name} belongs to --probe: fine-tuning reads the patch tokens of the last layer"
                )
        check_geometry(args)
        return
    # The file of a trained probe names its encoder.
    if not (args.finetune or args.pretrained or args.resume):
        raise ValueError(NO_ENCODER)
    if args.probe in AT_ONCE and any((args.eval, args.dry_run, args.cached, args.resume)):
        raise ValueError(
            f"--probe {args.probe} {AT_ONCE[args.probe]}: leave --eval, --resume, --dry_run and --cached out"
        )
    check_frozen(args)
    check_geometry(args)


def check_frozen(args: argparse.Namespace) -> None:
    """Raise ValueError for flags of the training of an encoder, which a probe does not train."""
    for name in ("head", "drop_path", "layer_decay", "grad_checkpointing"):
        if name in given_in(args):
            raise ValueError(f"--{name} belongs to fine-tuning: leave it out with --probe")
    if args.strategy == "fsdp" or compile_mode(args.compile, args.compile_mode, args.accum_iter):
        raise ValueError("a probe trains linear heads only: leave --strategy fsdp and --compile out")


def check_geometry(args: argparse.Namespace) -> None:
    """Raise ValueError if images cannot be read as they are to be evaluated."""
    if args.stride and not args.window:
        raise ValueError("--stride is the step between windows: give --window, too")
    if not args.probe:
        return
    if args.cached and args.window:
        raise ValueError("--cached keeps features of whole images, and --window reads parts: leave one out")
    resized = args.eval_images in (None, "exact")
    if args.cached and not resized:
        raise ValueError("--cached keeps features of images that are resized: leave --eval_images out")
    if args.controls and not resized and not args.window:
        raise ValueError("--controls need one grid of positions: leave --eval_images out, or give --window")


def find_start(args: argparse.Namespace) -> Start:
    """Return the run's own last checkpoint, --resume, or the encoder of --finetune."""
    output_dir = args.output_dir
    if args.eval or args.probe in AT_ONCE:
        output_dir = ""
    resume = checkpoint.load_start(output_dir, args.resume)
    finetune = args.finetune or stored_flags(resume).get("finetune", "")
    # The encoder of a probe is read at each start.
    if not (args.probe or resume is None):
        return Start(resume, finetune, None)
    if args.pretrained:
        # timm takes seconds to import.
        from backbones.timm import published_checkpoint

        return Start(resume, args.model, published_checkpoint(args.model))
    pretrained = None
    if not args.finetune and finetune.startswith("timm/"):
        place = checkpoint.to_evaluate(resume).path
        raise ValueError(
            f"{place} was trained on timm's own weights: give --pretrained --model {finetune}, too"
        )
    if finetune:
        pretrained = checkpoint.load(finetune)
        pretrained.drop_optimizer()
    if args.probe and pretrained is None:
        raise ValueError(NO_ENCODER)
    return Start(resume, finetune, pretrained)


def settled(args: argparse.Namespace, start: Start) -> argparse.Namespace:
    """Return the flags, with those of the checkpoint and of the protocol where they are not given."""
    given = given_in(args)
    saved = start.resume or start.pretrained
    args = argparse.Namespace(**as_stored(vars(args), given, saved, MODELS))
    if start.resume is not None:
        args.range = kept_range(args.range, start.trained)
        follow_training(args, given, start.resume)
    usual: dict[str, Any] = {"loss_at": "twice", "eval_images": "short"}
    if args.probe:
        usual = {"loss_at": "pixels", "eval_images": "exact"}
    usual["eval_side"] = round(min(args.input_size) * 256 / 224)
    for name, value in usual.items():
        if getattr(args, name) is None:
            # An evaluation follows the training.
            setattr(args, name, stored_flags(start.resume).get(name, value))
    check_geometry(args)
    return args


def follow_training(args: argparse.Namespace, given: Collection[str], resume: Checkpoint) -> None:
    """Give a trained segmenter or probe the flags of its training that are not given.

    Raises ValueError for flags with which a probe would read other features than in its training, or give
    its figures other names.
    """
    # Other files are refused when their weights are loaded.
    if resume.kind not in ("segmenter", "dense probe"):
        return
    stored = resume.args
    fixed: list[str] = []
    if resume.kind == "dense probe":
        fixed = list(FIXED)
        if stored.get("controls"):
            fixed.append("seed")  # of the random encoder
    for name in {*AS_TRAINED, *fixed} & stored.keys() - set(given):
        setattr(args, name, stored[name])
    for name in fixed:
        if name in stored and getattr(args, name) != stored[name]:
            raise ValueError(
                f"{resume.path} was trained with another --{name} ({shown(str(stored[name]))}): leave it out"
            )


# --- data


def build_data(args: argparse.Namespace, setup: Setup, start: Start) -> tuple[Data, Setup]:
    """Return the loaders, and the setup with the range of the images."""
    source = DataPath.from_flags(args)
    masks = mask_settings(args, start)
    options: dict[str, Any] = dict(read=ReadSettings.of(vars(args)), seed=args.seed)
    loading = dict(
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and setup.device.type == "cuda",
        data_timeout=args.data_timeout,
    )
    ranged = dict(given=args.range, scaled=bool(args.mean and args.std), trained=start.trained)
    train = whole = None
    if not args.eval:
        resized = SegmentResize(setup.size)
        once = build_segment_dataset(source, "train", resized, masks=masks, evaluation=True, **options)
        dist.print_rank0(f"training on {once.summary()}")
        dist.print_rank0(str(dist.compute_on_main(lambda: survey_masks(once))))
        masks = vars(once.settings)  # validation may lack the highest class
        if args.photo is None:
            plain = once.depth == torch.uint8 and args.in_chans == 3 and not args.channels
            args.photo = plain and not args.probe
        unreadable = BadImages(once, args.output_dir, args.max_bad_images)
        whole = CheckedBatches(eval_loader(once, batch_size=args.batch_size, **loading), unreadable)
    # Images to evaluate on, and their masks, have sizes of their own.
    transform = evaluation_transform(args, setup)
    val = build_segment_dataset(source, "val", transform, masks=masks, evaluation=True, **options)
    dist.print_rank0(f"evaluation on {val.summary()}")
    if start.resume is not None:
        val.check_classes(start.resume.classes, start.resume.path)
    val_loader = eval_loader(val, batch_size=1, **loading)
    if whole is None:
        return Data(val_loader), replace(setup, pixels=with_range(setup.pixels, val, **ranged))
    setup = replace(setup, pixels=with_range(setup.pixels, whole.dataset, **ranged))
    check_same_depth(whole.dataset, val, args.range)
    if args.probe not in AT_ONCE:
        crops = build_segment_dataset(source, "train", augmentation(args, setup), masks=masks, **options)
        train = train_loader(crops, seed=args.seed, batch_size=args.batch_size, **loading)
    return Data(val_loader, train, whole), setup


def mask_settings(args: argparse.Namespace, start: Start) -> dict[str, Any]:
    """Return what the flags, or else the checkpoint, say about masks; the layout decides on the rest."""
    found: dict[str, Any] = {}
    for name in ("num_classes", "ignore_index", "reduce_zero_label"):
        value = getattr(args, name)
        if value is None:
            value = stored_flags(start.resume).get(name)
        if value is not None:
            found[name] = value
    return found


def evaluation_transform(args: argparse.Namespace, setup: Setup) -> Joint:
    if args.eval_images == "exact":
        return SegmentEval(setup.size)
    if args.eval_images == "short":
        return SegmentEval(short_side=args.eval_side)
    return SegmentEval()


def augmentation(args: argparse.Namespace, setup: Setup) -> SegmentCrop:
    crop = CropSettings(ascending(args.crop_scale, "--crop_scale"), hflip=args.hflip, vflip=args.vflip)
    jitter = tuple(args.scale_jitter) if args.scale_jitter else None
    return SegmentCrop(setup.size, crop, jitter, args.photo)


def build_evaluation(args: argparse.Namespace, setup: Setup, backbone: Classifier, val: SegmentDataset):
    """Return how predictions are graded, and print it in one line."""
    images = {
        "exact": f"resized to {setup.size[0]}x{setup.size[1]}",
        "short": f"shorter side {args.eval_side}",
        "own": "as it is",
    }
    patch = cell(setup, backbone)
    if args.eval_images != "exact" and not args.window:
        images[args.eval_images] += f", cut to multiples of {patch[0]}x{patch[1]}"
    window = stride = None
    if args.window:
        window = pair(args.window, "--window")
        stride = (max(1, 2 * window[0] // 3), max(1, 2 * window[1] // 3))
    if args.stride:
        stride = pair(args.stride, "--stride")
    protocol = Protocol(
        image=images[args.eval_images],
        window=window,
        stride=stride,
        upsample=args.upsample,
        ignore=val.settings.ignore_index,
        classes=len(val.classes),
        reduce_zero_label=val.settings.reduce_zero_label,
        max_res=args.max_res or None,
    )
    check_sizes(args, protocol, setup, backbone)
    dist.print_rank0(str(protocol))
    if args.controls and window:
        dist.print_rank0("the position of a patch is that within its window")
    counts_file = os.path.join(args.output_dir, image_counts.FILE) if args.image_counts else ""
    return Evaluation(protocol, patch, counts_file)


def check_sizes(args: argparse.Namespace, protocol: Protocol, setup: Setup, backbone: Classifier) -> None:
    """Raise ValueError if the encoder cannot read images as they are evaluated: before it is trained."""
    patch = cell(setup, backbone)
    window = protocol.window
    if window is not None:
        check_windows(window, protocol.stride or window, patch)
        if args.controls and window != setup.size:
            size = f"{setup.size[0]} {setup.size[1]}"
            raise ValueError(f"--controls need one grid of positions, that of --input_size: --window {size}")
    # Any other size shows whether there is only one.
    other = window or (setup.size[0] + patch[0], setup.size[1] + patch[1])
    if window is None and args.eval_images == "exact":
        return
    try:
        backbone.grid_of(other)
    except ValueError:
        size = f"{setup.size[0]} {setup.size[1]}"
        raise ValueError(
            f"--model {args.model} reads images of one size: give --eval_images exact, or --window {size}"
        ) from None


def cell(setup: Setup, backbone: Classifier) -> tuple[int, int]:
    """The pixels of a patch token."""
    return setup.size[0] // backbone.grid[0], setup.size[1] // backbone.grid[1]


# --- models


def build_backbone(args: argparse.Namespace, setup: Setup, start: Start) -> Classifier:
    """Build the encoder without a class head; its weights are random."""
    if args.probe:
        options = frozen_options(args.model, start.encoder, args.pos_embed)
    else:
        options = norm_options(args.model, start.trained) | {"drop_path": args.drop_path}
        options["pos_embed"] = args.pos_embed
        if args.pos_embed == "auto":
            options["pos_embed"] = stored_embedding(start)
    if args.patch_size:
        options["patch_size"] = pair(args.patch_size, "--patch_size")
    return build_classifier(args.model, img_size=setup.size, in_chans=args.in_chans, num_classes=0, **options)


def stored_embedding(start: Start) -> str:
    """The positional embedding of a continued segmenter; fine-tuning adds a learned one."""
    stored = stored_flags(start.resume).get("pos_embed", "auto")
    return "learned" if stored == "auto" else stored


def load_encoder(args: argparse.Namespace, backbone: Classifier, start: Start, flags: dict) -> None:
    """Load the encoder of --finetune into a new run or a probe; print a line about it."""
    if start.pretrained is None:
        if start.resume is None:
            dist.print_rank0("starting from scratch")
        return
    note = transfer.init_encoder(backbone, start.pretrained, "zero" if args.probe else args.pos_embed_init)
    changed = checkpoint.other_than_trained(start.pretrained, flags)
    dist.print_rank0(f"encoder from {start.finetune}; {note}{changed}")
    start.pretrained = None  # its memory is needed


def flags_to_store(args: argparse.Namespace, start: Start, setup: Setup, evaluation: Evaluation) -> dict:
    """Return the flags that checkpoints store, with what became of those that were left open."""
    protocol = evaluation.protocol
    resolved = {
        "finetune": start.finetune,
        "num_classes": protocol.classes,
        "ignore_index": protocol.ignore,
        "reduce_zero_label": protocol.reduce_zero_label,
        "mean": list(setup.pixels.mean),
        "std": list(setup.pixels.std),
        "protocol": protocol.to_dict(),
    }
    return checkpoint.plain_flags(vars(args)) | resolved | stored_eps(start.trained)


# --- fine-tuning


def run_finetuning(args: argparse.Namespace, start: Start, data: Data, setup: Setup) -> int:
    """Train the segmenter, or evaluate it."""
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    backbone = build_backbone(args, setup, start)
    classes = len(data.val.dataset.classes)
    evaluation = build_evaluation(args, setup, backbone, data.val.dataset)
    flags = flags_to_store(args, start, setup, evaluation) | setup.pixels.flags(data.val.dataset.depth)
    load_encoder(args, backbone, start, flags)
    model = Segmenter(backbone, classes, args.head).to(setup.device)
    schedule = Schedule(args.eval_freq, args.epochs)
    objective = Segmenting(model, setup, evaluation, data.val, args.loss_at, schedule, args.predictions)
    if data.train is None:  # --eval
        return evaluate_checkpoint(objective, checkpoint.to_evaluate(start.resume))
    if start.resume is not None:
        check_and_print_continuing(args, start.resume, flags)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.strategy == "fsdp":
        fsdp.shard(model, setup.device, setup.amp)
    lr = effective_lr(args.lr, args.blr, effective_batch(args))
    groups = param_groups(
        model, args.weight_decay, model.no_weight_decay(), args.layer_decay, model.layer_id, model.num_layers
    )
    trained = sum(p.numel() for p in model.parameters())
    dist.print_rank0(
        f"{args.model}: {trained / 1e6:.2f} M trained parameters, "
        f"{counted(classes, 'class', 'classes')}, {args.head} head, "
        f"PE {backbone.trunk.pos_embed}; {setup}; {describe_batch(args, lr)}"
    )
    session = Session.open(args, flags, start.resume, loss_tag="loss")
    objective.log = session.log
    optimizer = adamw(groups, lr, betas=(0.9, 0.999))
    finished = fit(model, objective, optimizer, data.train, setup, open_budget(args, lr), session)
    return 0 if finished else STOPPED


def evaluate_checkpoint(objective: Segmenting, saved: Checkpoint) -> int:
    """Evaluate --resume; nothing is trained."""
    checkpoint.load_strict(objective.model, saved)
    dist.print_rank0(f"evaluating {saved.path} in {objective.setup.precision}")
    objective.evaluate(objective.model)
    return 0


# --- frozen probes


def build_sources(args: argparse.Namespace, setup: Setup, start: Start, data: Data) -> Sources:
    """Build the frozen encoder, and the controls beside it."""
    # Parameters that the file lacks must be the same at each start.
    torch.manual_seed(0)
    backbone = frozen(build_backbone(args, setup, start), setup)
    if not args.controls:
        load_encoder(args, backbone, start, {})
        return Sources((ENCODER,), backbone, cell(setup, backbone), args.layers)
    torch.manual_seed(args.seed)
    random = frozen(build_backbone(args, setup, start), setup)
    load_encoder(args, backbone, start, {})
    sources = Sources((ENCODER, *CONTROLS), backbone, cell(setup, backbone), args.layers, random)
    return replace(sources, projection=find_projection(start.resume, sources, data, setup))


def frozen(backbone: Classifier, setup: Setup) -> Classifier:
    return backbone.to(setup.device).eval().requires_grad_(False)


def find_projection(
    resume: Checkpoint | None, sources: Sources, data: Data, setup: Setup
) -> PositionProjection:
    """Return the projection of trained probes, or fit one to the training images."""
    stored = {} if resume is None else resume.model
    if "projection_basis" in stored:
        mean, basis = stored["projection_mean"], stored["projection_basis"]
        return PositionProjection(mean.to(setup.device), basis.to(setup.device))
    if data.whole is None:
        raise ValueError("--controls: the probe was trained without them, so leave the flag out")
    projection = fit_projection(sources, data.whole, setup)
    width = len(projection.mean)
    dist.print_rank0(f"without_position: {projection.basis.shape[1]} of {width} directions are removed")
    return projection


def run_linear_probe(args: argparse.Namespace, start: Start, data: Data, setup: Setup) -> int:
    """Train a linear map of each source of features at each rate, or evaluate trained ones."""
    resume = start.resume
    sources = build_sources(args, setup, start, data)
    evaluation = build_evaluation(args, setup, sources.backbone, data.val.dataset)
    flags = flags_to_store(args, start, setup, evaluation) | setup.pixels.flags(data.val.dataset.depth)
    flags["encoder"] = check_encoder(sources.backbone, resume, start.finetune, setup.size)
    objective = build_probing(args, sources, setup, evaluation, data)
    if resume is not None and data.train is not None:
        check_and_print_continuing(args, resume, flags)
    if args.cached:
        objective.val_loader = own_features(sources, data.val, setup)
    if data.train is None:  # --eval
        checkpoint.load_strict(objective.probes, checkpoint.to_evaluate(resume))
        objective.evaluate()
        return 0
    loader = data.train
    if args.cached and data.whole is not None:
        loader = feature_loader(args, cached_features(sources, data.whole, setup))
    lr = effective_lr(args.lr, args.blr, effective_batch(args))
    groups = [
        {"params": heads, "lr_scale": scale, "weight_decay": args.weight_decay}
        for scale, heads in zip(args.lr_grid, objective.probes.by_head())
    ]
    grid = ", ".join(f"{scale:g}" for scale in args.lr_grid)
    dist.print_rank0(
        f"linear probe of {args.model}, {', '.join(sources.names)}; {setup}; "
        f"{describe_batch(args, lr)} x {grid}"
    )
    session = Session.open(args, flags, resume, loss_tag="loss")
    objective.log = session.log
    optimizer = adamw(groups, lr, betas=(0.9, 0.999))
    finished = fit(objective.probes, objective, optimizer, loader, setup, open_budget(args, lr), session)
    return 0 if finished else STOPPED


def build_probing(
    args: argparse.Namespace, sources: Sources, setup: Setup, evaluation: Evaluation, data: Data
) -> DenseProbing:
    """Build a head for each source of features and each learning rate."""
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    classes = len(data.val.dataset.classes)
    probes = Probes(sources.widths(), classes, len(args.lr_grid), sources.projection).to(setup.device)
    names = [f"{source}/lr{scale:g}" for source in sources.names for scale in args.lr_grid]
    schedule = Schedule(args.eval_freq, args.epochs)
    return DenseProbing(probes, sources, names, setup, evaluation, data.val, args.loss_at, schedule)


def feature_loader(args: argparse.Namespace, samples: SegmentDataset) -> Batches[SegmentDataset]:
    # Workers would only copy tensors from one process to another.
    return train_loader(samples, batch_size=args.batch_size, seed=args.seed, num_workers=0, pin_memory=False)


def run_at_once(args: argparse.Namespace, start: Start, data: Data, setup: Setup) -> int:
    """Probe by retrieval or by logistic regression, without epochs; write log.txt and run.json."""
    assert data.whole is not None
    sources = build_sources(args, setup, start, data)
    evaluation = build_evaluation(args, setup, sources.backbone, data.val.dataset)
    flags = flags_to_store(args, start, setup, evaluation)
    write_record(args.output_dir, flags, {"device": str(setup.device), "amp": setup.amp})
    found = {"knn": retrieval, "logistic": regression}[args.probe]
    names, scores = found(args, sources, data.whole, setup)

    def predictor(batch: dict) -> Tensor:
        return evaluation.logits(scores, batch["image"])

    figures = grade(predictor, names, data.val, evaluation, setup)
    print_table(figures, data.val.dataset.classes)
    stats = stats_of(figures)
    Log(args.output_dir).write_line({"test_miou": stats[f"test_miou_{ENCODER}"]} | stats | {"epoch": 0})
    return 0


def retrieval(
    args: argparse.Namespace, sources: Sources, whole: CheckedBatches, setup: Setup
) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """Remember patches; return names, and a function from images to the scores that neighbours give."""
    neighbours = Neighbours(args.knn_k, args.knn_temperature, args.knn_memory, args.seed)
    memories = remember(sources, whole, setup, neighbours)
    dist.print_rank0(
        f"{len(memories[0])} patches of {counted(whole.readable, 'training image')} are remembered"
    )
    return [neighbours.name(source) for source in sources.names], scores_of(sources, memories, neighbours)


def regression(
    args: argparse.Namespace, sources: Sources, whole: CheckedBatches, setup: Setup
) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """Solve for linear maps at all penalties; return names, and a function from images to their logits."""
    strengths = sorted(set(args.logistic_c))
    sample = logistic.sample_patches(sources, whole, setup, args.knn_memory, args.seed)
    images = counted(whole.readable, "training image")
    dist.print_rank0(
        f"logistic regression on {len(sample)} patches of {images}; of "
        f"{counted(len(strengths), 'penalty', 'penalties')} the best one on the validation images is printed"
    )
    probes, notes = logistic.fit_probes(sources, sample, strengths)
    for note in notes:
        dist.print_rank0(note)
    names = [f"{source}/C{strength:g}" for source in sources.names for strength in strengths]
    return names, logistic.logits_of(sources, probes)


# --- one encoder or several


def run_several(given: argparse.Namespace, device: torch.device) -> int:
    """Probe one encoder after the other, except those that are done; write and print the table of all."""
    names = comparison.names_of(given.finetune)
    done = dist.compute_on_main(lambda: rows_done(given, names))
    # The exit does not follow the first training, so signals must not be ignored after it.
    with ending.exit_follows(False), dist.StopSignal(patience=threading.TIMEOUT_MAX) as stop:
        for name, file in zip(names, given.finetune):
            if name in done:
                dist.print_rank0(f"{name} is done already: its row is that of {given.output_dir}/table.json")
                continue
            if stop.agreed(now=True):
                dist.print_rank0("stopped between two encoders: the same command continues")
                return STOPPED
            dist.print_rank0(f"--- {name}")
            one = of_encoder(given, name, file)
            # Before the probe: the file of a run that goes on may change meanwhile.
            made_of = made_of_flags(given, file)
            code = run_one(one, device)
            if code:
                return code
            done[name] = dist.compute_on_main(functools.partial(row_of, one, made_of))
            dist.compute_on_main(functools.partial(write_table, given.output_dir, names, done))
    for protocol, table in comparison.tables({name: done[name] for name in names}):
        dist.print_rank0(f"{protocol}\n{table.text()}")
    return 0


def of_encoder(given: argparse.Namespace, name: str, file: str) -> argparse.Namespace:
    """Return the flags of the probe of one encoder, with folders of its own."""
    # A copy knows what the command line has given.
    one = copy.copy(given)
    one.finetune = file
    one.output_dir = os.path.join(given.output_dir, name)
    if given.log_dir:
        one.log_dir = os.path.join(given.log_dir, name)
    return one


def rows_done(given: argparse.Namespace, names: list[str]) -> dict[str, comparison.Row]:
    """Return the rows of the encoders whose probe has finished with these flags."""
    rows = comparison.read_rows(given.output_dir)
    made_of = {name: made_of_flags(given, file) for name, file in zip(names, given.finetune)}
    return {name: row for name, row in rows.items() if row.made_of == made_of.get(name)}


def made_of_flags(given: argparse.Namespace, file: str) -> dict[str, Any]:
    """Return what decides on the figures of an encoder: the flags, and whether its file has changed."""
    left_out = checkpoint.HARMLESS - {"data_path"} | {"finetune"}
    flags = {name: value for name, value in vars(given).items() if name not in left_out}
    return {"file": file, "stamp": comparison.stamp(file), "flags": checkpoint.plain_flags(flags)}


def row_of(args: argparse.Namespace, made_of: dict[str, Any]) -> comparison.Row:
    """Return the row of a finished probe, from the files of its run; raise ValueError if they lack it."""
    last = 0
    if args.probe == "linear":
        last = args.epochs - 1
    figures = comparison.figures_of(args.output_dir, last, (ENCODER, *CONTROLS))
    if not figures:
        raise ValueError(f"{args.output_dir}/log.txt has no figures of epoch {last}: remove the folder")
    record = read_json(os.path.join(args.output_dir, "run.json"), dict)
    return comparison.Row(figures, str(Protocol(**record["flags"]["protocol"])), made_of)


def write_table(folder: str, names: list[str], done: dict[str, comparison.Row]) -> None:
    with survive_full_disk():
        comparison.write_rows(folder, {name: done[name] for name in names if name in done})


def main(given: argparse.Namespace) -> int:
    check_flags(given)
    device = join_ranks(given)
    if isinstance(given.finetune, str):
        code = run_one(given, device)
    else:
        code = run_several(given, device)
    dist.shutdown()
    return code


def run_one(given: argparse.Namespace, device: torch.device) -> int:
    """Fine-tune or probe one encoder, or evaluate; return the exit code."""
    written = given.image_counts or not given.eval
    if given.output_dir and written and not given.dry_run:
        dist.check_folder(given.output_dir)
    start = find_start(given)
    args = settled(given, start)
    pixels = Pixels(*channel_stats(args.in_chans, args.mean, args.std, start.trained))
    setup = Setup(device, resolve_amp(args.amp, device), pair(args.input_size, "--input_size"), pixels)
    data, setup = build_data(args, setup, start)
    if args.probe in AT_ONCE:
        return run_at_once(args, start, data, setup)
    if args.probe == "linear":
        return run_linear_probe(args, start, data, setup)
    return run_finetuning(args, start, data, setup)


if __name__ == "__main__":
    sys.exit(run(main, parse(get_args_parser())))
