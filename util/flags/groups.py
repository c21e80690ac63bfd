"""The groups of flags that the mains share, and the conversions that several mains need.

Names and defaults are MAE's where MAE has the flag. This module imports nothing heavy, so that --help answers
at once.
"""

import argparse
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from layers.positional import label_choices
from util.files.cores import own_cores
from util.flags.data_path import VAL_SPLIT
from util.flags.numbers import (
    BELOW_ONE,
    COUNT,
    EPOCHS,
    FROM_ZERO,
    MINUTES,
    NOT_NEGATIVE,
    PIXEL_MEAN,
    PIXEL_STD,
    POSITIVE,
    SEED,
    SHARE,
    bound,
    number,
    side,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# For grey images: the average of the three channels.
GREY_MEAN = (0.449,)
GREY_STD = (0.226,)

# Pixels that an image may have. Decoding and augmenting it takes up to 9 bytes for each of them.
MAX_PIXELS = 100_000_000
MAX_PIXELS_HELP = (
    "pixels (height x width) that an image may have; one with more counts as unreadable and is not decoded. "
    "An image of the default size takes up to 0.9 GB per worker. Pillow's own limit does not apply"
)

# Before the slash of a data_path that timm reads.
TIMM_READERS = ("hfds", "hfids", "wds", "tfds", "torch")
DATA_TIMEOUT = 5  # minutes that a batch may take

MOST_WORKERS = 10
# Kinds of devices; a number may follow.
DEVICES = ("cuda", "cpu", "mps", "xpu")
OUTPUT_DIR = "./output_dir"  # the folder of a run that is not given one

# Modes of torch.compile.
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs", "reduce-overhead")


def is_timm_path(data_path: str) -> bool:
    """Tell whether a path has the form <reader>/<name>[=<root>] and is not an existing file."""
    reader, slash, _ = data_path.partition("/")
    # An existing folder has priority, e.g. ./torch/train.
    return bool(slash) and reader.lower() in TIMM_READERS and not os.path.exists(data_path)


def is_remote_path(data_path: str) -> bool:
    """Tell whether a path is an address in an object store, as s3://bucket/folder; web pages are none."""
    scheme, separator, _ = data_path.partition("://")
    return bool(separator) and scheme.isalnum() and scheme not in ("http", "https")


def own_workers() -> int:
    """Return the default number of data workers: the cores of this rank, and at most 10.

    10 is MAE's number, for a GPU server. More workers than cores slow a run down.
    """
    cores = own_cores()
    # torchrun's ranks share the cores of their node.
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    if ranks.isdigit():
        cores //= max(1, int(ranks))
    return max(1, min(MOST_WORKERS, cores))


def device_name(text: str) -> str:
    """Read the name of a device: the argparse type of --device."""
    if re.fullmatch(rf"auto|({'|'.join(DEVICES)})(:\d+)?", text):
        return text
    raise argparse.ArgumentTypeError(
        f"takes auto, {', '.join(DEVICES)} or cuda:N, found {text!r}; {_meant_device(text)}"
    )


def _meant_device(text: str) -> str:
    """Say what a wrong name of a device may have meant."""
    if "," in text:
        return "a run on several GPUs is started by torchrun --nproc_per_node N"
    kind = text.lower().rstrip("0123456789")
    index = text[len(kind) :]
    kind = kind.removesuffix(":")
    meant = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "apple": "mps", "metal": "mps"}
    if index:
        meant[""] = "cuda"
    # So strict that tpu is not taken for xpu.
    near = [meant[kind]] if kind in meant else difflib.get_close_matches(kind, DEVICES, n=1, cutoff=0.7)
    if not near:
        return "auto is a GPU where torch sees one, and else the CPU"
    return f"did you mean {':'.join(filter(None, (*near, index)))}?"


def add_data_flags(
    p: argparse.ArgumentParser, alpha: str = "alpha", paths: str = "folder, tar file or list of paths"
) -> None:
    """Add the flags that say which images are read, and how.

    `alpha` names the one about transparency, and `paths` says what `data_path` may be.
    """
    g = p.add_argument_group("data")
    g.add_argument(
        "--data_path",
        default="",
        type=str,
        help=f"{paths}; the embedded demo set if not given",
    )
    _add_layout_flags(g)
    g.add_argument(
        "--data_cache",
        default="",
        metavar="DIR",
        help="folder for tars that --data_path names in a store, as s3://bucket/folder: each is downloaded "
        "once; if not given ~/.cache/mae_pl/shards, or the one of $XDG_CACHE_HOME",
    )
    g.add_argument(
        "--input_size",
        default=[224],
        type=side,
        nargs="+",
        metavar=("H", "W"),
        help="image size, H [W]; that of the checkpoint if the run starts from one",
    )
    _add_channel_flags(g, alpha)
    _add_loading_flags(g)
    _add_unreadable_flags(g)


def _add_layout_flags(g: argparse._ArgumentGroup) -> None:
    add_val_split(g)
    g.add_argument(
        "--val_share",
        default=0.0,
        type=BELOW_ONE,
        metavar="P",
        help="for data without validation images: share of the training images of each class that is held "
        "out for validation. The images' names decide, so that every run holds out the same; 0 for none",
    )
    g.add_argument(
        "--class_depth",
        default=None,
        type=COUNT,
        metavar="N",
        help="a class is named by the first N folders of an image's path; 1 if not given",
    )


def add_val_split(g: argparse._ActionsContainer) -> None:
    """Add the flag that names the validation images to a parser or a group."""
    g.add_argument(
        "--val_split",
        default=VAL_SPLIT,
        metavar="NAME",
        help="name of the validation images: the folder NAME/, NAME.tar, NAME-*.tar or NAME.csv beside train",
    )


def _add_loading_flags(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        "--num_workers",
        default=own_workers(),
        type=number(0),
        help="data loading processes per rank; the cores that a rank has if not given, and at most "
        f"{MOST_WORKERS}",
    )
    g.add_argument(
        "--data_timeout",
        default=DATA_TIMEOUT,
        type=MINUTES,
        help="minutes that a batch may take before the run saves its state and ends; 0 waits for ever. "
        "Without data loading processes a file system that hangs is not noticed",
    )
    g.add_argument(
        "--pin_mem",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="page-locked host memory for faster copies to a GPU",
    )
    # MAE's spelling. BooleanOptionalAction adds --no-pin_mem only.
    g.add_argument("--no_pin_mem", dest="pin_mem", action="store_false", help=argparse.SUPPRESS)
    g.add_argument(
        "--cache_data",
        default="none",
        choices=["none", "memory", "device"],
        help="decode each image once and keep it; every rank keeps the whole set. memory: samples "
        "are bit-identical to those without a cache. device: images are cropped on the device, a value "
        "may be one grey level off where an image shrinks a lot, and fine-tuning needs --aa ''",
    )


def _add_unreadable_flags(g: argparse._ArgumentGroup) -> None:
    # Bad images are skipped. A large share of them points to a wrong path or a broken copy.
    g.add_argument(
        "--max_bad_images",
        default=0.01,
        type=SHARE,
        help="stop if more than this share of the images cannot be decoded",
    )
    g.add_argument(
        "--max_pixels",
        default=MAX_PIXELS,
        type=COUNT,
        metavar="N",
        help=MAX_PIXELS_HELP,
    )


def add_read_flags(g: Any, alpha: str = "alpha") -> None:
    """Add the flags that say how the bytes of a file become channels; for `alpha` see `add_data_flags`."""
    g.add_argument(
        "--channels",
        default=None,
        type=FROM_ZERO,
        nargs="+",
        metavar="N",
        help="bands of the files that the model sees, counted from 0 and in this order, as 3 2 1; all if not "
        "given. --in_chans beside it says how many bands the files have",
    )
    g.add_argument(
        f"--{alpha}",
        default="drop",
        choices=["drop", "white", "black"],
        help="what becomes of transparency: drop shows the colours under it, as torchvision does; white and "
        "black lay images on a background. With --in_chans 4 it is the fourth channel",
    )
    g.add_argument(
        "--exif",
        default="ignore",
        choices=["ignore", "apply"],
        help="apply turns photos as their EXIF orientation says; ignore leaves them as stored, as "
        "torchvision does",
    )


def add_range_flag(g: Any) -> None:
    """Add the flag that says which values of images become 0 and 1."""
    g.add_argument(
        "--range",
        default=None,
        type=bound,
        nargs="+",
        metavar="V",
        help="LOW HIGH: the values that become 0 and 1 before --mean and --std; others are clipped. A pair "
        "for each channel is allowed, and so are percentiles of a sample, as p1 p99. 0 255 for 8-bit images; "
        "deeper ones need it; that of the checkpoint if the run starts from one",
    )


def add_picture_bands(p: Any) -> None:
    """Add the flag that says which channels pictures show."""
    p.add_argument(
        "--picture_bands",
        default=None,
        type=FROM_ZERO,
        nargs="+",
        metavar="N",
        help="channels of the model that pictures show, counted from 0: one as grey, or three as red, green "
        "and blue; if not given the first one of 1 and 2 channels, and the first three of more",
    )


def settle_channels(flags: argparse.Namespace) -> None:
    """Set `in_chans` to the number of --channels, and `bands` to that of the files, as far as it is known.

    Raises ValueError if a number of bands does not hold all channels.
    """
    if not hasattr(flags, "channels"):
        return
    flags.bands = None
    if not flags.channels:
        return
    count = len(flags.channels)
    if "in_chans" in flags.given and flags.in_chans != count:
        if flags.in_chans <= max(flags.channels):
            raise ValueError(
                f"--channels {' '.join(map(str, flags.channels))}: the highest is {flags.in_chans - 1} for "
                f"--in_chans {flags.in_chans}, as they are counted from 0"
            )
        flags.bands = flags.in_chans
    flags.in_chans = count
    # A checkpoint's number of channels does not replace it.
    flags.given |= {"in_chans"}


def _add_channel_flags(g: argparse._ArgumentGroup, alpha: str) -> None:
    g.add_argument(
        "--in_chans",
        default=3,
        type=COUNT,
        help="image channels; those of the checkpoint if the run starts from one",
    )
    # Statistics are those of pixel values scaled to [0, 1], as in torchvision.
    g.add_argument(
        "--mean",
        default=None,
        type=PIXEL_MEAN,
        nargs="+",
        help="mean of each channel, or one for all, of values in [0, 1]; if not given that of the "
        "checkpoint, or else ImageNet's for 1 and 3 channels",
    )
    g.add_argument(
        "--std",
        default=None,
        type=PIXEL_STD,
        nargs="+",
        help="standard deviation of each channel, of values in [0, 1]; as the mean if not given",
    )
    add_range_flag(g)
    add_read_flags(g, alpha)


class OptimDefaults(NamedTuple):
    """The defaults of a main's optimisation flags."""

    batch_size: int
    epochs: int
    blr: float
    min_lr: float
    weight_decay: float
    warmup_epochs: int
    clip_grad: float | None = None
    clip_help: str = "largest norm of the gradient; not clipped if not given"


def add_optim_flags(p: argparse.ArgumentParser, defaults: OptimDefaults) -> None:
    """Add the flags of the optimizer and of its schedule."""
    g = p.add_argument_group("optimisation")
    g.add_argument(
        "--batch_size",
        default=defaults.batch_size,
        type=COUNT,
        help="images per rank (one process, one GPU) and micro-step",
    )
    g.add_argument("--epochs", default=defaults.epochs, type=EPOCHS, help="epochs of the whole schedule")
    # The optimizer sees batch_size * accum_iter * ranks images per step.
    g.add_argument("--accum_iter", default=1, type=COUNT, help="micro-steps per optimizer step")
    # Biases, norms and other vectors are exempt, as in timm.
    g.add_argument("--weight_decay", default=defaults.weight_decay, type=NOT_NEGATIVE, help="weight decay")
    g.add_argument("--lr", default=None, type=NOT_NEGATIVE, help="absolute learning rate; overrides --blr")
    # The linear scaling rule of Goyal et al. 2017 (arXiv 1706.02677), as in MAE.
    g.add_argument(
        "--blr",
        default=defaults.blr,
        type=NOT_NEGATIVE,
        help="base learning rate: lr = blr * batch_size * accum_iter * ranks / 256",
    )
    g.add_argument(
        "--min_lr", default=defaults.min_lr, type=NOT_NEGATIVE, help="learning rate at the end of the cosine"
    )
    g.add_argument(
        "--warmup_epochs",
        default=defaults.warmup_epochs,
        type=NOT_NEGATIVE,
        help="epochs in which the learning rate rises from 0",
    )
    g.add_argument("--clip_grad", default=defaults.clip_grad, type=NOT_NEGATIVE, help=defaults.clip_help)


def add_position_flags(p: argparse.ArgumentParser, *, pos_embed: str, pos_label: str) -> None:
    """Add the flags of the positional embedding and of the positional labels, with the given defaults.

    `pos_label` is a kind of label, or "auto" for a main that can take the labels over from a checkpoint.
    """
    g = p.add_argument_group("positional embedding and labels")
    g.add_argument(
        "--pos_embed",
        default=pos_embed,
        choices=["none", "sincos", "learned"],
        help="positional embedding of the encoder",
    )
    labels = list(label_choices())
    label_help = "positional labels that the tokens learn: none, a kind, or two kinds"
    tokens: str | None = "half"
    tokens_help = "share of the channels that the label head reads"
    if pos_label == "auto":
        labels = ["auto", *labels]
        label_help += "; auto: those of the checkpoint, none from scratch"
        # The checkpoint decides; without one it is half, as in pretraining.
        tokens = None
        tokens_help += "; that of the checkpoint if not given, half from scratch"
    g.add_argument("--pos_label", default=pos_label, choices=labels, help=label_help)
    g.add_argument(
        "--pos_weight", default=0.5, type=NOT_NEGATIVE, help="weight of the label loss (lambda in the paper)"
    )
    g.add_argument("--pos_tokens", default=tokens, choices=["half", "full"], help=tokens_help)
    # The number of pairs is the square of the number of tokens. A random subset gives an unbiased loss.
    g.add_argument(
        "--rpl_pairs",
        default=0,
        type=number(0),
        metavar="N",
        help="RPL partners per query and step; 0 takes all pairs",
    )


def add_head_flags(p: argparse.ArgumentParser, model_help: str) -> None:
    """Add the flags of the class head. A flag that is not given keeps the model's own setting."""
    # None stands for "not given", so that the defaults of So-ViT can differ from those of a plain ViT.
    g = p.add_argument_group("class head (the model decides what is not given)")
    g.add_argument("--head", default=None, choices=["linear", "second_order"], help=model_help)
    g.add_argument(
        "--so_dims",
        default=None,
        type=COUNT,
        nargs=2,
        metavar=("D1", "D2"),
        help="widths of the two projections; 48 24 if not given, wider in so_vit_14 and so_vit_19",
    )
    g.add_argument(
        "--so_heads",
        default=None,
        type=COUNT,
        metavar="N",
        help="number of cross-covariances, each of that size; 1 if not given",
    )
    g.add_argument(
        "--so_fusion",
        default=None,
        choices=["sum", "concat", "visual"],
        help="fusion with the class token or pooled feature. sum: sum of the logits, if not given; "
        "concat: one layer on both; visual: second-order feature alone",
    )
    g.add_argument(
        "--so_alpha",
        default=None,
        type=number(0, 1, float, above=True),
        metavar="A",
        help="exponent of the largest singular value; 0.5 if not given",
    )
    g.add_argument(
        "--so_iters",
        default=None,
        type=COUNT,
        metavar="N",
        help="power iterations that estimate the largest singular value; 1 if not given",
    )
    g.add_argument(
        "--so_dropout",
        default=None,
        type=BELOW_ONE,
        metavar="P",
        help="dropout of the second-order feature; 0 if not given, 0.5 in so_vit_14 and so_vit_19",
    )


def add_self_relation_flags(p: argparse.ArgumentParser, *, spatial: float, channel: float) -> None:
    """Add the flags of SERE's losses and of the momentum teacher, with the given default weights."""
    g = p.add_argument_group("self-relation (SERE) and its momentum teacher")
    g.add_argument(
        "--sr_spatial",
        default=spatial,
        type=NOT_NEGATIVE,
        metavar="W",
        help="weight of the loss on spatial relations; 0 turns it off",
    )
    g.add_argument(
        "--sr_channel",
        default=channel,
        type=NOT_NEGATIVE,
        metavar="W",
        help="weight of the loss on channel relations; 0 turns it off",
    )
    # Temperatures of Li et al. 2022, as published for iBOT.
    g.add_argument(
        "--sr_temp_spatial", default=0.5, type=POSITIVE, help="temperature of the teacher's spatial relations"
    )
    g.add_argument(
        "--sr_temp_channel", default=0.1, type=POSITIVE, help="temperature of the teacher's channel relations"
    )
    # A cosine takes the momentum to 1, where the teacher stands still.
    g.add_argument(
        "--ema_momentum",
        default=0.996,
        type=SHARE,
        help="momentum of the teacher at the start; it rises to 1",
    )


def add_augment_flags(p: argparse.ArgumentParser) -> None:
    """Add the augmentation flags of supervised training, with the names and defaults of MAE and timm."""
    g = p.add_argument_group("augmentation")
    # MAE's policy: magnitude 9 with a standard deviation of 0.5. Strengths grow with the magnitude (inc1).
    g.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy of timm; '' for none")
    # timm ignores colour jitter if there is an AutoAugment policy.
    g.add_argument(
        "--color_jitter", default=None, type=NOT_NEGATIVE, help="strength of colour jitter; needs --aa ''"
    )
    g.add_argument(
        "--crop_scale",
        default=[0.08, 1.0],
        type=SHARE,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="area of the random crop, as a share of the image",
    )
    g.add_argument("--hflip", default=0.5, type=SHARE, help="probability of a horizontal flip")
    g.add_argument("--vflip", default=0.0, type=SHARE, help="probability of a vertical flip")
    g.add_argument("--reprob", default=0.25, type=SHARE, help="probability of random erasing")
    g.add_argument(
        "--remode", default="pixel", choices=["const", "rand", "pixel"], help="fill of erased rectangles"
    )
    g.add_argument("--recount", default=1, type=COUNT, help="erased rectangles per image")
    # MAE has the flag, but does not use it either.
    g.add_argument("--resplit", action="store_true", help=argparse.SUPPRESS)
    # Applied to mixed labels too.
    g.add_argument("--smoothing", default=0.1, type=SHARE, help="label smoothing")
    _add_mixup_flags(g)


def _add_mixup_flags(g: argparse._ArgumentGroup) -> None:
    # Alpha is the parameter of the Beta distribution that the mixing ratio is drawn from.
    g.add_argument("--mixup", default=0.0, type=NOT_NEGATIVE, help="alpha of mixup; 0 turns it off")
    g.add_argument("--cutmix", default=0.0, type=NOT_NEGATIVE, help="alpha of cutmix; 0 turns it off")
    g.add_argument(
        "--cutmix_minmax",
        default=None,
        type=SHARE,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="range of cutmix's box, as a share of the image's sides; overrides the alpha of cutmix",
    )
    g.add_argument(
        "--mixup_prob", default=1.0, type=SHARE, help="probability of mixup or cutmix, if one is on"
    )
    g.add_argument(
        "--mixup_switch_prob", default=0.5, type=SHARE, help="probability of cutmix, if both are on"
    )
    g.add_argument(
        "--mixup_mode",
        default="batch",
        choices=["batch", "pair", "elem"],
        help="images that share a draw of the mixing ratio",
    )


def add_run_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of every run: output, device, precision, checkpoints and ranks."""
    g = p.add_argument_group("run")
    _add_output_flags(g)
    _add_device_flags(g)
    _add_saving_flags(g)
    _add_rank_flags(p.add_argument_group("ranks: processes, one for each GPU (torchrun sets them)"))


def _add_output_flags(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        "--output_dir",
        default=OUTPUT_DIR,
        help="folder of checkpoints and log.txt; a run in it is continued",
    )
    g.add_argument("--log_dir", default=None, help="folder of TensorBoard files; --output_dir if not given")
    # The host waits for the device at log points only.
    g.add_argument("--print_freq", default=20, type=COUNT, help="updates between log points")
    g.add_argument(
        "--max_steps",
        default=None,
        type=COUNT,
        metavar="N",
        help="for a trial: save and stop after N updates of the schedule; without it the run continues",
    )
    g.add_argument(
        "--dry_run",
        action="store_true",
        help="measure a few steps; print data, speed, memory, hours, disk space and starting point; "
        "write nothing",
    )


def _add_device_flags(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        "--device",
        default="auto",
        type=device_name,
        help="auto is cuda where there is a GPU, else cpu; mps is Apple's GPU",
    )
    # Draws are functions of the seed and of the place in the run, so that a resumed run has the same ones.
    g.add_argument("--seed", default=0, type=SEED, help="seed of all random draws")
    # fp16 needs loss scaling; bf16 has the range of fp32 and does not.
    g.add_argument(
        "--amp",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="precision; auto: bf16 on GPUs that support it, else fp16; fp32 on the CPU",
    )
    g.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    g.add_argument(
        "--compile_mode",
        default="default",
        choices=COMPILE_MODES,
        help="mode of torch.compile; any other than default implies --compile",
    )


def _add_saving_flags(g: argparse._ArgumentGroup) -> None:
    # A requeued job starts with the same command. Its own last checkpoint is then newer than this one.
    g.add_argument(
        "--resume",
        default="",
        help="checkpoint to continue from, if --output_dir has no checkpoint-last.pth",
    )
    # The order of the samples is that of the list of images.
    g.add_argument(
        "--allow_other_data",
        action="store_true",
        help="continue a run although its training images have changed; its order of samples changes, too",
    )
    g.add_argument(
        "--save_every_epochs",
        default=20,
        type=number(0),
        help="epochs between numbered checkpoints; 0 for none",
    )
    g.add_argument(
        "--save_minutes",
        default=30,
        type=MINUTES,
        help="minutes between saves of checkpoint-last.pth",
    )
    g.add_argument(
        "--save_steps",
        default=0,
        type=number(0),
        help="updates between saves of checkpoint-last.pth; 0 for none",
    )
    # A checkpoint of ViT-H with its optimizer state has about 8 GB.
    g.add_argument(
        "--keep",
        default=0,
        type=number(0),
        help="how many numbered checkpoints to keep, the newest ones; 0 keeps all",
    )


def _add_rank_flags(g: argparse._ArgumentGroup) -> None:
    # DDP keeps a full copy per rank, which is faster wherever it fits.
    g.add_argument(
        "--strategy",
        default="ddp",
        choices=["ddp", "fsdp"],
        help="fsdp shards parameters and optimizer state over the ranks, for models that do not fit on "
        "one device",
    )
    # gloo works on GPUs too, but copies through the host.
    g.add_argument(
        "--dist_backend",
        default=None,
        help="backend of torch.distributed; if not given nccl on GPUs, gloo elsewhere",
    )
    g.add_argument(
        "--dist_timeout",
        default=30,
        type=MINUTES,
        help="minutes that a rank waits for the others",
    )
    # torchrun and SLURM set the rank in the environment; the older torch.distributed.launch passes this flag.
    g.add_argument("--local_rank", default=-1, type=int, help="rank on this node, set by older launchers")
    # MAE's flags. The launcher usually says all this; what has no effect says so (see `join_ranks`).
    g.add_argument("--world_size", default=None, type=int, help=argparse.SUPPRESS)
    g.add_argument("--start_epoch", default=None, type=int, help=argparse.SUPPRESS)
    g.add_argument("--dist_url", default="env://", help=argparse.SUPPRESS)
    g.add_argument("--dist_on_itp", action="store_true", help=argparse.SUPPRESS)


def add_eval_flags(g: argparse._ActionsContainer) -> None:
    """Add the flags of an evaluation without training to a parser or a group."""
    g.add_argument("--eval", action="store_true", help="evaluate the checkpoint of --resume and stop")
    # A flag of MAE's that has no effect here: evaluation uses all ranks, and its figures are exact.
    g.add_argument("--dist_eval", action="store_true", help=argparse.SUPPRESS)


def compile_mode(requested: bool, mode: str, accum_iter: int) -> str | None:
    """Return the mode in which torch.compile compiles the model, or None if the model is not compiled.

    Args:
        requested: the value of --compile. A mode other than "default" implies it.
        mode: one of COMPILE_MODES.
        accum_iter: forward and backward passes per optimizer step.

    Raises ValueError if CUDA graphs are combined with gradient accumulation.
    """
    # "reduce-overhead" replays CUDA graphs, whose output buffers the next call overwrites.
    if mode == "reduce-overhead" and accum_iter > 1:
        raise ValueError(
            "--compile_mode reduce-overhead replays CUDA graphs, which overwrite the results of the previous "
            f"batch, but --accum_iter {accum_iter} still needs them: use --compile alone, or --accum_iter 1"
        )
    if requested or mode != "default":
        return mode
    return None


def pair(values: Sequence[int], flag: str) -> tuple[int, int]:
    """Convert [H] or [H, W] to (H, W). Raises ValueError, naming `flag`, if it is neither."""
    if len(values) not in (1, 2) or min(values) < 1:
        listed = " ".join(map(str, values))
        raise ValueError(f"{flag} takes one or two positive numbers, H [W], found {listed}")
    return values[0], values[-1]


def ascending(values: Sequence[float], flag: str) -> tuple[float, float]:
    """Convert [MIN, MAX], two shares of an image, to a tuple.

    Raises ValueError, naming `flag`, unless 0 < MIN <= MAX <= 1.
    """
    smallest, largest = values
    if not 0 < smallest <= largest <= 1:
        raise ValueError(
            f"{flag} takes the smallest and the largest share of an image, greater than 0 and at most 1, "
            f"found {smallest:g} {largest:g}"
        )
    return smallest, largest


def channel_stats(
    in_chans: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    trained_with: Mapping[str, Any] | None = None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Choose the mean and the standard deviation of each channel, of pixel values in [0, 1].

    A value that is not given is that of the checkpoint, or else ImageNet's for 3 channels and its
    mean for 1 channel.

    Args:
        in_chans: number of channels.
        mean: one value per channel, or None.
        std: one value per channel, or None.
        trained_with: the flags that a checkpoint was trained with.

    Raises ValueError if there is no value for each channel.
    """
    default_mean, default_std = _default_stats(in_chans, trained_with or {})
    return (
        _per_channel(mean or default_mean, in_chans, "mean"),
        _per_channel(std or default_std, in_chans, "std"),
    )


def _default_stats(in_chans: int, trained_with: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    same_channels = trained_with.get("in_chans") == in_chans
    if same_channels and trained_with.get("mean") and trained_with.get("std"):
        return trained_with["mean"], trained_with["std"]
    if in_chans == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    if in_chans == 1:
        return GREY_MEAN, GREY_STD
    return (), ()


def _per_channel(values: Sequence[float], in_chans: int, name: str) -> tuple[float, ...]:
    # One value serves all channels.
    if len(values) == 1:
        return tuple(values) * in_chans
    if len(values) != in_chans:
        raise ValueError(
            f"`{name}` needs {in_chans} values for `in_chans` {in_chans}, found {len(values)}: "
            f"python -m util.data stats PATH --in_chans {in_chans} computes them (add your `channels`)"
        )
    return tuple(values)
