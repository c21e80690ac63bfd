"""Checkpoints: MAE's dictionary, written atomically, loaded without running code, found again in a fixed order.

A file is {model, optimizer, scaler, epoch, args} as in MAE, and `step` (optimizer updates done), `meters` (sums of the
unfinished epoch), `best`, `classes` (their names, in the order of a classifier's outputs), and named extras. `epoch` is
the last finished one, so that MAE's rule "resume at epoch + 1" holds for ours too.
"""

import argparse
import os

import torch

from util import dist
from util.dist.fsdp import cut_like
from util.weights.files import check_kind, evaluated_weights, kind_of, load

LAST = "checkpoint-last.pth"


def save_atomic(state: dict, path: str, writer: str = "") -> None:
    """Write `state` so that `path` holds either the old file or the whole new one, whatever happens.

    Two processes that might write at the same time give each its own `writer`, a word for the temporary file's name.
    Raises OSError (full disk, quota) with what stayed intact; nothing partial is left behind.
    """
    partial = f"{path}.partial-{writer}" if writer else f"{path}.partial"
    try:
        with open(partial, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch's zip writer raises RuntimeError when the disk is full
        if os.path.exists(partial):
            os.remove(partial)
        kept = f"the previous {path} is intact" if os.path.exists(path) else f"there is no {path}"
        raise OSError(f"could not save {path}: {e}; {kept}") from e


def describe_mismatch(own: dict, found: dict) -> str:
    """One line on how two state dicts differ in names and shapes; '' when they fit."""
    missing = [k for k in own if k not in found]
    extra = [k for k in found if k not in own]
    shapes = [
        f"{k} is {tuple(found[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in found and own[k].shape != found[k].shape
    ]

    def some(names):
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    parts = [
        f"missing {some(missing)}" if missing else "",
        f"unexpected {some(extra)}" if extra else "",
        some(shapes),
    ]
    return "; ".join(p for p in parts if p)


def load_strict(model: torch.nn.Module, state: dict, path: str, kept: set[str] = frozenset()) -> None:
    """Load all weights but the `kept` ones, or raise ValueError naming the architectures and the first differences."""
    own = {k: v for k, v in model.state_dict().items() if k not in kept}
    problem = describe_mismatch(own, state["model"])
    if problem:
        try:
            check_kind(state, path, kind_of({"model": own}))
        except ValueError as e:
            hint = "; if it lies in --output_dir, give another --output_dir: this run would go on from it"
            raise ValueError(f"{e}{hint if os.path.basename(path) == LAST else ''}") from None
        made_by = (state.get("args") or {}).get("model")
        raise ValueError(
            f"{path} does not fit this model: {problem}. "
            + (f"It was made with --model {made_by}; " if made_by else "")
            + "give the flags it was made with, or another --output_dir"
        )
    model.load_state_dict({k: cut_like(v, own[k]) for k, v in state["model"].items()}, strict=not kept)


def load_for_evaluation(model: torch.nn.Module, state: dict, path: str) -> None:
    """Load a fine-tuned classifier, its moving average where there is one; label heads stay behind if not asked for."""
    check_kind(state, path, "classifier")
    own = model.state_dict()
    weights = {k: v for k, v in evaluated_weights(state).items() if k in own or not k.startswith("pos_head.")}
    load_strict(model, state | {"model": weights}, path)


def find_start(output_dir: str | None, resume: str = "") -> str:
    """The file to continue from: the run's own last checkpoint, else `resume`, else '' (start anew).

    Raises ValueError where the ranks do not see the same: some would start from scratch.
    """
    own = os.path.join(output_dir or "", LAST)
    path = own if output_dir and os.path.isfile(own) else resume or ""
    if len(set(dist.gather_objects(path))) > 1:
        raise ValueError(f"only some ranks find {own}: put the run's folder where all nodes see it")
    return path


# Flags that may differ between a run and its continuation without changing what is computed.
HARMLESS = {
    "data_path",
    "output_dir",
    "log_dir",
    "device",
    "num_workers",
    "pin_mem",
    "resume",
    "compile",
    "save_every_epochs",
    "save_minutes",
    "save_steps",
    "keep",
    "print_freq",
    "picture_epochs",
    "predictions",
    "eval",
    "dist_backend",
    "dist_timeout",
    "dist_url",
    "dist_on_itp",
    "local_rank",
    "world_size",
    "start_epoch",
    "max_bad_images",
    "dry_run",
    "strategy",
    "grad_checkpointing",
}


# Flags on which it depends what an image is.
IMAGES = {"input_size", "patch_size", "in_chans", "mean", "std"}


def load_start(output_dir: str | None, resume: str) -> tuple[str, dict] | None:
    """(path, loaded checkpoint) that this run continues, or None; the same on all ranks."""
    path = find_start(output_dir, resume)
    return (path, load(path)) if path else None


def continue_from(output_dir: str | None, resume: str, args: dict) -> tuple[str, dict] | None:
    """`load_start`, and a line on which file it is and which flags have changed."""
    start = load_start(output_dir, resume)
    if start is not None:
        say_continuing(*start, args)
    return start


def say_continuing(path: str, state: dict, args: dict) -> None:
    old = state.get("args") or {}
    changed = changed_args(old, args)
    dist.print_rank0(
        f"continuing {path}" + (f" with changed flags ({'; '.join(changed)})" if changed else "")
    )
    for name in ("finetune", "init_from"):
        if args.get(name) and old.get(name, "") != args[name]:
            dist.print_rank0(
                f"warning: --{name} {args[name]} is not read: the run goes on from its own weights; for a new run give "
                "another --output_dir"
            )


def other_than_trained(state: dict | None, args: dict, more: tuple[str, ...] = ()) -> str:
    """Which flags of images, and `more`, an evaluation or a transfer has other than the checkpoint; '' for none."""
    old = (state or {}).get("args") or {}
    changed = changed_args({k: v for k, v in old.items() if k in {*IMAGES, *more} and v is not None}, args)
    return f" (other than in training: {'; '.join(changed)})" if changed else ""


def changed_args(old: dict, new: dict, ignore: set[str] = HARMLESS) -> list[str]:
    """Flags that differ between a checkpoint and this run, as 'name: old -> new'."""
    return [
        f"{k}: {old[k]} -> {v}"
        for k, v in sorted(new.items())
        if k in old and k not in ignore and str(old[k]) != str(v) and [old[k]] != v
    ]  # MAE's --input_size is one number


def plain_args(args: argparse.Namespace) -> dict:
    """Arguments as plain values that `weights_only` loads: numbers, strings, lists of them."""

    def plain(v):
        if isinstance(v, (list, tuple)):
            return [plain(x) for x in v]
        return v if isinstance(v, (int, float, bool, str, type(None))) else str(v)

    return {k: plain(v) for k, v in vars(args).items()}
