"""A run's folder: its log, its checkpoints, and the checkpoint that it continues."""

import argparse
import os
from dataclasses import dataclass
from typing import Any

import torch

from util import dist
from util.files.names import printable
from util.flags.groups import OUTPUT_DIR, compile_mode
from util.flags.parser import with_flags
from util.run.checkpoint_manager import CheckpointManager, Owed
from util.run.log import Log
from util.run.training_images import TrainingImages, compare
from util.train.lr_sched import warmup_cosine
from util.train.setup import Budget
from util.weights import checkpoint
from util.weights.types import Checkpoint

STOPPED = 75  # exit code of a run that a signal stopped after saving its state (EX_TEMPFAIL)


@dataclass
class Session:
    """What the engine writes to, and where it starts.

    `flags` are stored in every checkpoint. `start` is the checkpoint to continue, or None for a fresh run. In
    a dry run a few updates are measured and nothing is written.
    """

    log: Log
    flags: dict
    checkpoints: CheckpointManager | None = None
    start: Checkpoint | None = None
    dry_run: bool = False

    @classmethod
    def open(
        cls,
        args: argparse.Namespace,
        flags: dict,
        start: Checkpoint | None,
        chance: dict[str, float] | None = None,
        loss_tag: str = "train_loss",
    ) -> "Session":
        """Open the run that the flags of a main describe.

        `chance` maps names of metrics to their chance levels. `loss_tag` is the loss's name in TensorBoard.
        """
        if not args.output_dir and not args.dry_run:
            note = "warning: `output_dir` is empty: no checkpoint and no log.txt is saved"
            dist.print_rank0(with_flags(note, vars(args)))
        log_dir = args.log_dir or args.output_dir
        if args.dry_run:
            log_dir = None
        checkpoints = None
        if args.output_dir:
            checkpoints = CheckpointManager(
                args.output_dir, args.save_every_epochs, args.save_minutes, args.save_steps, args.keep
            )
        log = Log(args.output_dir, log_dir, args.print_freq, chance, loss_tag)
        return cls(log, flags, checkpoints, start, args.dry_run)

    def check_images(self, dataset: Any) -> None:
        """Compare the training images with those of the run that wrote `start`; print what differs.

        Raises ValueError if they are others and `allow_other_data` is not given.
        """
        if self.start is None:
            return
        allowed = bool(self.flags.get("allow_other_data"))
        note = compare(self.start, TrainingImages.of(dataset), allowed)
        if note:
            dist.print_rank0(with_flags(note, self.flags))

    def owed(self) -> Owed | None:
        """Return what the run that wrote `start` still had to do, if it was killed right after that."""
        if self.checkpoints is None or self.start is None:
            return None
        return self.checkpoints.owed(self.start)

    def claim(self, owed: Owed | None) -> None:
        """Take the folder over, and make up for what a killed run `owed`. Does nothing on other ranks than 0.

        Raises ValueError if the folder belongs to a later start of this job.
        """
        if self.checkpoints is None or not dist.is_main():
            return
        self.checkpoints.claim()
        if owed is None:
            return
        try:
            self.checkpoints.make_up(owed)
        except OSError as error:
            print(f"warning: {error}; training continues", flush=True)

    def finish(self, owed: Owed | None) -> None:
        """Make up for what a killed run `owed`, if all epochs are done; the folder of a whole run stays as it
        is.
        """
        if self.checkpoints is None or owed is None or not dist.is_main():
            return
        try:
            if self.checkpoints.is_behind(owed):
                self.claim(owed)
        except OSError as error:
            print(f"warning: {error}", flush=True)


# What may change between two starts in the default folder: the schedule and the optimizer, and what changes
# neither the images nor the model.
MAY_CHANGE = {"epochs", "lr", "blr", "min_lr", "warmup_epochs", "batch_size", "accum_iter", "weight_decay"}
MAY_CHANGE |= {"layer_decay", "clip_grad", "amp", "compile_mode", "cache_data", "max_pixels"}
MAY_CHANGE |= {"crop_pct", "nb_classes"}
MOST_CHANGES = 6  # that an error lists


def check_and_print_continuing(args: argparse.Namespace, start: Checkpoint, flags: dict) -> None:
    """Print which checkpoint the run continues, and which flags have changed.

    Raises ValueError if the checkpoint lies in the default folder and is of a run with another model or other
    data: the next run without an `output_dir` would otherwise continue the one before it. A folder that is
    given by hand is continued with changed flags as far as they can be loaded.
    """
    in_default = os.path.dirname(os.path.abspath(start.path)) == os.path.abspath(OUTPUT_DIR)
    changed = _changes_of_the_run(start, flags)
    if args.output_dir == OUTPUT_DIR and in_default and changed:
        if len(changed) > MOST_CHANGES:
            changed[MOST_CHANGES:] = [f"and {len(changed) - MOST_CHANGES} more"]
        raise ValueError(
            f"{start.path}, in the default folder, belongs to another run ({'; '.join(changed)}): "
            "give the new run its own `output_dir`, or continue that one with its own flags"
        )
    checkpoint.print_continuing(start, flags)


def _changes_of_the_run(start: Checkpoint, flags: dict) -> list[str]:
    """Return the flags, as 'name: old -> new', that make another run of the one that wrote `start`."""
    old = {name: value for name, value in start.args.items() if name not in MAY_CHANGE}
    # A run that has started keeps its weights, wherever they came from.
    new = {name: value for name, value in flags.items() if value or name not in ("finetune", "init_from")}
    changed = checkpoint.changed_flags(old, new)
    # Other models come with other settings of their own.
    changed.sort(key=lambda text: not text.startswith("model: "))
    if "data_path" in old and not flags.get("allow_other_data"):
        changed += _changed_data(str(old["data_path"]), flags.get("data_path", ""))
    resume = flags.get("resume", "")
    # A requeued job repeats the flag of its first start.
    if resume != old.get("resume", "") and checkpoint.is_another_file(resume, start.path):
        changed.append(f"resume: {resume}, which is another file")
    return changed


def _changed_data(before: str, now: str) -> list[str]:
    if _place(before) == _place(now):
        return []
    # An empty path is the demo set.
    return [f"data_path: {printable(before) or 'the demo set'} -> {now or 'the demo set'}"]


def _place(path: str) -> str:
    """Return a path without links, '' for ''."""
    if not path:
        return ""
    return os.path.realpath(path)


def join_ranks(args: argparse.Namespace) -> torch.device:
    """Join the ranks that the flags of a main and its launcher describe; return this rank's device.

    Prints a line for each of MAE's flags that has no effect. Raises ValueError and RuntimeError as
    `dist.init` does, and ValueError if flags ask for a launcher or an address that is not there.
    """
    if args.dist_on_itp:
        os.environ |= dist.openmpi_ranks(os.environ)
    # Before `flag_ranks`, which looks for RANK; `dist.init` does the same for callers without these flags.
    os.environ |= dist.slurm_ranks(os.environ)
    found, notes = dist.flag_ranks(os.environ, args.dist_url, args.world_size)
    os.environ |= found
    device = dist.init(args.device, args.dist_backend, args.dist_timeout, args.local_rank)
    if args.start_epoch:
        notes.append(
            f"`start_epoch` {args.start_epoch} has no effect: a new run starts at epoch 0, and a continued "
            "one where its checkpoint ends"
        )
    for note in notes:
        dist.print_rank0(with_flags(note, vars(args)))
    return device


def open_budget(args: argparse.Namespace, lr: float) -> Budget:
    """Return the training budget that the flags of a main describe, with MAE's schedule to the learning rate
    `lr`.
    """

    # Trials are too short for it, and so are the embedded images.
    if args.warmup_epochs > args.epochs and not args.max_steps and args.data_path:
        note = (
            f"warning: `warmup_epochs` {args.warmup_epochs:g} is more than `epochs` {args.epochs}: the "
            f"learning rate only rises, to {args.epochs / args.warmup_epochs:.0%} of {lr:.3g}; a tenth of "
            f"the run is `warmup_epochs` {args.epochs / 10:g}"
        )
        dist.print_rank0(with_flags(note, vars(args)))

    def lr_at(done: float) -> float:
        return warmup_cosine(done, lr=lr, min_lr=args.min_lr, warmup=args.warmup_epochs, total=args.epochs)

    return Budget(
        args.epochs,
        lr_at,
        seed=args.seed,
        accum_iter=args.accum_iter,
        clip_grad=args.clip_grad,
        compile_mode=compile_mode(args.compile, args.compile_mode, args.accum_iter),
        max_bad_images=args.max_bad_images,
        max_steps=args.max_steps,
    )


def effective_batch(args: argparse.Namespace) -> int:
    """Return the number of images per update, over all ranks and micro-batches."""
    return args.batch_size * args.accum_iter * dist.world_size()


def describe_batch(args: argparse.Namespace, lr: float) -> str:
    """Return the effective batch and the learning rate as text."""
    product = f"{args.batch_size} x {args.accum_iter} x {dist.world_size()}"
    return f"effective batch {product} = {effective_batch(args)}, lr {lr:.3g}"
