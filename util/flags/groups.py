"""Command lines: MAE's flags, files of flags, and help that works. Imports nothing heavy: --help answers at once."""

import argparse

from layers.positional import label_choices
from util.flags.parser import COUNT, SHARE, number

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


COMPILE_MODES = "default", "max-autotune-no-cudagraphs", "reduce-overhead"


def add_data_flags(p: argparse.ArgumentParser, num_workers: int = 10) -> None:
    g = p.add_argument_group("data")
    g.add_argument(
        "--data_path", default="", type=str, help="folder, tar, list of paths; the embedded demo set if empty"
    )
    g.add_argument(
        "--input_size", default=[224], type=int, nargs="+", metavar=("H", "W"), help="image size, H [W]"
    )
    g.add_argument("--in_chans", default=3, type=int, help="image channels")
    g.add_argument(
        "--mean",
        default=None,
        type=float,
        nargs="+",
        help="per channel, of values in [0, 1]; ImageNet's for 3",
    )
    g.add_argument(
        "--std",
        default=None,
        type=float,
        nargs="+",
        help="per channel, of values in [0, 1]; ImageNet's for 3",
    )
    g.add_argument(
        "--num_workers", default=num_workers, type=number(0), help="data loading processes per rank"
    )
    g.add_argument(
        "--pin_mem",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="page-locked host memory for faster copies to a GPU",
    )
    g.add_argument("--no_pin_mem", dest="pin_mem", action="store_false", help=argparse.SUPPRESS)
    g.add_argument(
        "--cache_data",
        default="none",
        choices=["none", "memory", "device"],
        help="decode each image once and keep it; every rank keeps the whole set. memory: samples "
        "have the same bits as with none. device: crops are made there, a value may be one grey "
        "level off where images shrink a lot, and fine-tuning needs --aa ''",
    )
    g.add_argument(
        "--max_bad_images", default=0.01, type=SHARE, help="stop above this share of undecodable images"
    )


def add_optim_flags(
    p: argparse.ArgumentParser,
    *,
    batch_size: int,
    epochs: int,
    blr: float,
    min_lr: float,
    weight_decay: float,
    warmup_epochs: int,
    clip_grad: float | None = None,
    clip_help: str = "largest gradient norm; none by default",
) -> None:
    g = p.add_argument_group("optimisation")
    g.add_argument("--batch_size", default=batch_size, type=COUNT, help="images per rank and micro-step")
    g.add_argument("--epochs", default=epochs, type=int)
    g.add_argument("--accum_iter", default=1, type=COUNT, help="micro-steps per optimizer step")
    g.add_argument("--weight_decay", default=weight_decay, type=float)
    g.add_argument("--lr", default=None, type=float, help="absolute learning rate; overrides --blr")
    g.add_argument(
        "--blr",
        default=blr,
        type=float,
        help="base learning rate: lr = blr * batch_size * accum_iter * ranks / 256",
    )
    g.add_argument("--min_lr", default=min_lr, type=float, help="where the cosine ends")
    g.add_argument("--warmup_epochs", default=warmup_epochs, type=float)
    g.add_argument("--clip_grad", default=clip_grad, type=number(0, kind=float), help=clip_help)


def add_position_flags(p: argparse.ArgumentParser, *, pos_embed: str, pos_label: str) -> None:
    g = p.add_argument_group("positional embedding and labels")
    g.add_argument(
        "--pos_embed", default=pos_embed, choices=["none", "sincos", "learned"], help="encoder's embedding"
    )
    labels = list(label_choices())
    if pos_label == "auto":
        g.add_argument(
            "--pos_label",
            default="auto",
            choices=["auto", *labels],
            help="label loss; auto: the checkpoint's own, none from scratch",
        )
    else:
        g.add_argument("--pos_label", default=pos_label, choices=labels, help="label loss")
    g.add_argument(
        "--pos_weight", default=0.5, type=float, help="weight of the label loss (the paper's lambda)"
    )
    g.add_argument(
        "--pos_tokens",
        default=None if pos_label == "auto" else "half",
        choices=["half", "full"],
        help="channels that the label head reads"
        + "; the checkpoint's own, else half" * (pos_label == "auto"),
    )
    g.add_argument(
        "--rpl_pairs",
        default=0,
        type=number(0),
        metavar="N",
        help="RPL partners per query and step; 0 = all pairs",
    )


def add_head_flags(p: argparse.ArgumentParser, model_help: str) -> None:
    g = p.add_argument_group("class head (what is not given is the model's own)")
    g.add_argument("--head", default=None, choices=["linear", "second_order"], help=model_help)
    g.add_argument(
        "--so_dims",
        default=None,
        type=int,
        nargs=2,
        metavar=("D1", "D2"),
        help="widths of the two projections; 48 24, wider in so_vit_14 and so_vit_19",
    )
    g.add_argument(
        "--so_heads", default=None, type=int, metavar="N", help="cross-covariances of that size; 1"
    )
    g.add_argument(
        "--so_fusion",
        default=None,
        choices=["sum", "concat", "visual"],
        help="with the class token or pooled feature: sum of logits (default), one layer on both, not at all",
    )
    g.add_argument(
        "--so_alpha", default=None, type=float, metavar="A", help="power of the largest singular value; 0.5"
    )
    g.add_argument(
        "--so_iters", default=None, type=int, metavar="N", help="power iterations that estimate it; 1"
    )
    g.add_argument(
        "--so_dropout",
        default=None,
        type=float,
        metavar="P",
        help="of the second-order feature; 0, 0.5 in so_vit_14 and so_vit_19",
    )


def add_self_relation_flags(p: argparse.ArgumentParser, *, spatial: float, channel: float) -> None:
    g = p.add_argument_group("self-relation (SERE) and its momentum teacher")
    g.add_argument(
        "--sr_spatial",
        default=spatial,
        type=float,
        metavar="W",
        help="weight of the spatial relations; 0 is off",
    )
    g.add_argument(
        "--sr_channel",
        default=channel,
        type=float,
        metavar="W",
        help="weight of the channel relations; 0 is off",
    )
    g.add_argument(
        "--sr_temp_spatial", default=0.5, type=float, help="teacher's temperature for spatial relations"
    )
    g.add_argument(
        "--sr_temp_channel", default=0.1, type=float, help="teacher's temperature for channel relations"
    )
    g.add_argument(
        "--ema_momentum", default=0.996, type=float, help="where the teacher's momentum starts; it ends at 1"
    )


def add_augment_flags(p: argparse.ArgumentParser) -> None:
    """Of supervised training, as MAE and timm name them."""
    g = p.add_argument_group("augmentation")
    g.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy of timm; '' for none")
    g.add_argument("--color_jitter", default=None, type=float, help="without effect beside --aa")
    g.add_argument("--crop_scale", default=[0.08, 1.0], type=float, nargs=2, metavar=("MIN", "MAX"))
    g.add_argument("--hflip", default=0.5, type=SHARE)
    g.add_argument("--vflip", default=0.0, type=SHARE)
    g.add_argument("--reprob", default=0.25, type=SHARE, help="chance of random erasing")
    g.add_argument("--remode", default="pixel", choices=["const", "rand", "pixel"])
    g.add_argument("--recount", default=1, type=COUNT)
    g.add_argument("--resplit", action="store_true", help=argparse.SUPPRESS)
    g.add_argument("--smoothing", default=0.1, type=SHARE, help="label smoothing")
    g.add_argument("--mixup", default=0.0, type=number(0, kind=float), help="mixup alpha; 0 is off")
    g.add_argument("--cutmix", default=0.0, type=number(0, kind=float), help="cutmix alpha; 0 is off")
    g.add_argument("--cutmix_minmax", default=None, type=float, nargs=2)
    g.add_argument("--mixup_prob", default=1.0, type=SHARE)
    g.add_argument("--mixup_switch_prob", default=0.5, type=SHARE)
    g.add_argument("--mixup_mode", default="batch", choices=["batch", "pair", "elem"])


def add_run_flags(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("run")
    g.add_argument(
        "--output_dir", default="./output_dir", help="checkpoints, log.txt; a run in it is continued"
    )
    g.add_argument("--log_dir", default=None, help="TensorBoard files; --output_dir if not given")
    g.add_argument("--device", default="cuda", help="cuda (falls back to the CPU), cpu, mps")
    g.add_argument("--seed", default=0, type=int)
    g.add_argument(
        "--resume", default="", help="checkpoint to continue, unless --output_dir has its own last one"
    )
    g.add_argument(
        "--amp",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="auto: bf16 on GPUs that have it, else fp16; fp32 on the CPU",
    )
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g.add_argument(
        "--compile_mode",
        default="default",
        choices=COMPILE_MODES,
        help="mode of torch.compile; any but default implies --compile",
    )
    g.add_argument(
        "--save_every_epochs", default=20, type=number(0), help="numbered checkpoint every N epochs"
    )
    g.add_argument(
        "--save_minutes",
        default=30,
        type=number(0, kind=float),
        help="refresh checkpoint-last.pth that often",
    )
    g.add_argument(
        "--save_steps", default=0, type=number(0), help="refresh checkpoint-last.pth every N updates"
    )
    g.add_argument(
        "--keep", default=0, type=number(0), help="numbered checkpoints to keep, the newest; 0 = all"
    )
    g.add_argument(
        "--dry_run",
        action="store_true",
        help="measure a few steps, print data, speed, memory, hours, disk and where it would start, write nothing",
    )
    g.add_argument("--print_freq", default=20, type=COUNT, help="updates between log points")
    g = p.add_argument_group("ranks (torchrun sets them)")
    g.add_argument(
        "--strategy",
        default="ddp",
        choices=["ddp", "fsdp"],
        help="fsdp spreads parameters and optimizer state over the ranks, for models that do not fit",
    )
    g.add_argument("--dist_backend", default=None, help="nccl on GPUs, gloo elsewhere")
    g.add_argument(
        "--dist_timeout",
        default=30,
        type=number(0, kind=float),
        help="minutes that a rank waits for the others",
    )
    g.add_argument("--local_rank", default=-1, type=int, help="set by older launchers")
    for name in ("--world_size", "--start_epoch"):  # MAE's, read from the environment or the checkpoint here
        g.add_argument(name, default=None, type=int, help=argparse.SUPPRESS)
    g.add_argument("--dist_url", default="env://", help=argparse.SUPPRESS)
    g.add_argument("--dist_on_itp", action="store_true", help=argparse.SUPPRESS)


def compile_mode(args: argparse.Namespace) -> str | None:
    """The mode in which --compile and --compile_mode compile the model, None for not at all.

    ValueError where CUDA graphs, whose outputs the next call overwrites, meet an update of several calls.
    """
    if args.compile_mode == "reduce-overhead" and args.accum_iter > 1:
        raise ValueError(
            f"--compile_mode reduce-overhead replays CUDA graphs, which overwrite the results of the batch "
            f"before, and --accum_iter {args.accum_iter} still needs them: give --compile alone, or "
            "--accum_iter 1"
        )
    return args.compile_mode if args.compile or args.compile_mode != "default" else None


def add_eval_flags(g) -> None:
    g.add_argument("--eval", action="store_true", help="evaluate --resume and stop")
    g.add_argument(
        "--dist_eval", action="store_true", help=argparse.SUPPRESS
    )  # MAE's; always exact on all ranks here


def pair(values: list[int], flag: str) -> tuple[int, int]:
    """[H] or [H, W] -> (H, W)."""
    if len(values) not in (1, 2) or min(values) < 1:
        raise ValueError(
            f"{flag} takes one or two positive numbers, H [W], found {' '.join(map(str, values))}"
        )
    return values[0], values[-1]


def ascending(values: list[float], flag: str) -> tuple[float, float]:
    """[MIN, MAX] shares of an image, as a tuple."""
    if not 0 < values[0] <= values[1] <= 1:
        raise ValueError(
            f"{flag} takes the smallest and the largest share of an image, from above 0 to 1, found "
            f"{values[0]:g} {values[1]:g}"
        )
    return values[0], values[1]


def channel_stats(
    args: argparse.Namespace, stored: dict | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel: as given, else as `stored` in a checkpoint, else ImageNet's for 3 channels and their mean
    for 1."""
    before = stored or {}
    default = {3: (IMAGENET_MEAN, IMAGENET_STD), 1: ((0.449,), (0.226,))}.get(args.in_chans)
    if before.get("in_chans") == args.in_chans and before.get("mean") and before.get("std"):
        default = before["mean"], before["std"]
    mean = args.mean or (default and default[0])
    std = args.std or (default and default[1])
    for flag, values in (("--mean", mean), ("--std", std)):
        if values is None or len(values) != args.in_chans:
            raise ValueError(
                f"{flag} needs {args.in_chans} values for --in_chans {args.in_chans}, found {len(values or ())}: "
                "python -m util.data stats PATH computes them"
            )
    return tuple(mean), tuple(std)
