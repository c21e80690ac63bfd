"""Checkpoints of runs: writing them, loading them into a model, and finding the one to continue from.

A file is {model, optimizer, scaler, epoch, args} as in MAE, and `step` (optimizer updates done), `meters`
(sums of the unfinished epoch), `best`, `classes` (the class names in the order of a classifier's outputs),
and named extras. `epoch` is the last finished one, so that MAE's rule "resume at epoch + 1" holds for our
files too.
"""

import contextlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layers.contract import Backbone
from util import dist
from util.dist.fsdp import cut_like
from util.files import LAST_CHECKPOINT
from util.files.atomic import replacing
from util.files.formats import SUCH_AS
from util.files.names import counted
from util.weights.defaults import fitting
from util.weights.files import load
from util.weights.types import Checkpoint, kind_of, stored_flags
from util.weights.validate import shown

NUMBERED = re.compile(r"checkpoint-(0|[1-9][0-9]*)\.pth")
# How many whole checkpoints are looked for to be offered in the place of a damaged one.
MOST_LISTED = 5


def save_atomic(state: dict[str, Any], path: str, writer: str = "") -> None:
    """Write `state` so that `path` holds either the old file or the whole new one, even after a crash.

    Two processes that may write at the same time each give their own `writer`, which becomes part of the
    temporary file's name. Raises OSError (full disk, quota), which says whether the previous file is intact;
    no partial file is left behind.
    """
    try:
        with replacing(path, "wb", writer) as f:
            torch.save(state, f)
    # torch's zip writer raises RuntimeError when the disk is full.
    except (OSError, RuntimeError) as e:
        consequence = f"there is no {path}"
        if os.path.exists(path):
            consequence = f"the previous {path} is intact"
        raise OSError(f"could not save {path}: {e}; {consequence}") from e


def describe_mismatch(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """One line on how two state dicts differ in names, shapes and kinds of numbers; '' if they fit."""
    missing = [k for k in expected if k not in weights]
    unexpected = [shown(k) for k in weights if k not in expected]
    shapes = [
        f"{k} is {tuple(weights[k].shape)}, not {tuple(v.shape)}"
        for k, v in expected.items()
        if k in weights and v.shape != weights[k].shape
    ]
    # A precision may differ; whole numbers in place of real ones are others.
    shapes += [
        f"{k} is of {weights[k].dtype}, not {v.dtype}"
        for k, v in expected.items()
        if k in weights and v.is_floating_point() != weights[k].is_floating_point()
    ]
    parts = []
    if missing:
        parts.append(f"missing {_first_few(missing)}")
    if unexpected:
        parts.append(f"unexpected {_first_few(unexpected)}")
    if shapes:
        parts.append(_first_few(shapes))
    return "; ".join(parts)


def _first_few(items: list[str]) -> str:
    # A model of another size differs in hundreds of weights.
    listed = ", ".join(items[:2])
    if len(items) > 2:
        listed += f" and {len(items) - 2} more"
    return listed


def load_part(module: torch.nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Load a further module of a run, such as its average, from the entry `name` of a checkpoint.

    Raises ValueError, with the first differences, if the entry does not fit.
    """
    problem = describe_mismatch(module.state_dict(), checkpoint.entries[name])
    if problem:
        raise ValueError(
            f"{checkpoint.path}: its entry '{name}' does not fit this run: give the flags that it was made "
            f"with, or another `output_dir`; {problem}"
        )
    module.load_state_dict(checkpoint.entries[name])


def load_strict(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Load all weights of a checkpoint.

    Raises ValueError, with the kinds of models and the first differences, if the weights do not fit.
    """
    expected = model.state_dict()
    problem = describe_mismatch(expected, checkpoint.model)
    if problem:
        _refuse(checkpoint, expected, problem)
    # A sharded model takes its rank's part of each tensor.
    weights = {k: cut_like(v, expected[k]) for k, v in checkpoint.model.items()}
    model.load_state_dict(weights)


def _refuse(checkpoint: Checkpoint, expected: Mapping[str, Tensor], problem: str) -> None:
    """Raise the error for weights that do not fit: the wrong kind of file, or a model of other sizes."""
    wanted = kind_of(expected)
    # If the kind is wrong, hundreds of names differ, and only the kind helps the user.
    try:
        checkpoint.check_kind(wanted)
    except ValueError as e:
        hint = ""
        # A run continues from the last checkpoint of its folder without being asked.
        if os.path.basename(checkpoint.path) == LAST_CHECKPOINT:
            hint = (
                "; if it lies in `output_dir`, choose another `output_dir`: this run would continue from it"
            )
        raise ValueError(f"{e}{hint}") from None
    other_size = _size_remedy(checkpoint, wanted, expected)
    if other_size:
        raise ValueError(f"{checkpoint.path} is of another image size: {other_size}; {problem}")
    remedy = _classes_remedy(checkpoint, expected) or fitting(checkpoint, expected)
    remedy = remedy or "give the flags that it was made with"
    raise ValueError(
        f"{checkpoint.path} does not fit this model: {remedy}, or give another file or another `output_dir`; "
        + problem
    )


def _size_remedy(checkpoint: Checkpoint, wanted: str, expected: Mapping[str, Tensor]) -> str:
    """What to do with weights that differ in their grid of patches alone; '' if they differ otherwise."""
    parameters = {"pretraining": "`init_from`", "classifier": "`finetune`", "segmenter": "`finetune`"}
    weights = checkpoint.model
    differ = [name for name in expected if name in weights and weights[name].shape != expected[name].shape]
    of_the_grid = all(re.search(r"pos_embed$|^pos_head\..*\.classifier\.", name) for name in differ)
    if wanted not in parameters or not differ or not of_the_grid or weights.keys() != expected.keys():
        return ""
    other = ""
    if wanted == "segmenter":
        other = "to evaluate on larger images leave `input_size` out and give `eval_side` or `window`; "
    return (
        f"{other}a run continues at its own size: start a new one, in another `output_dir`, with "
        f"{parameters[wanted]} {checkpoint.path}, which resizes the embedding and starts fresh moments"
    )


def _classes_remedy(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> str:
    """What to do with a classifier of another number of classes; '' if it has as many."""
    names = [name for name in ("head.bias", "segment_head.classify.bias") if name in expected]
    stored = checkpoint.model.get((names or [""])[0])
    wanted = expected.get((names or [""])[0])
    if stored is None or wanted is None or stored.shape == wanted.shape:
        return ""
    return (
        f"it has {counted(stored.numel(), 'class', 'classes')}, and the data have {wanted.numel()}: give its "
        f"own data, or start a new run with `finetune` {checkpoint.path}"
    )


def load_for_evaluation(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Load the evaluated weights of a fine-tuned classifier, without label heads that the model lacks."""
    checkpoint.check_kind("classifier")
    # A model for evaluation has label heads only if their accuracy was asked for.
    expected = model.state_dict()
    stored = checkpoint.evaluated_weights()
    if isinstance(model, Backbone):
        # timm's models may need resized embeddings and other names.
        try:
            stored = model.own_names(stored)
        except ValueError as e:
            raise ValueError(f"{checkpoint.path} does not fit this model: {e}") from None
    weights = {k: v for k, v in stored.items() if k in expected or not k.startswith("pos_head.")}
    load_strict(model, replace(checkpoint, model=weights))


def find_start(output_dir: str | None, resume: str = "") -> str:
    """The file to continue from: the last checkpoint in `output_dir`, else `resume`, else '' (a new run).

    Raises ValueError if the ranks see different files: some would start from scratch.
    """
    last = os.path.join(output_dir or "", LAST_CHECKPOINT)
    path = resume or ""
    # The run's own checkpoint comes first: a requeued job repeats the flags of its first start.
    if output_dir and os.path.isfile(last):
        path = last
    if len(set(dist.gather_objects(path))) > 1:
        raise ValueError(f"only some nodes find {last}: put the run's folder where all nodes see it")
    return path


# Flags that may differ between a run and its continuation without changing what is computed.
HARMLESS = {
    "data_path",
    "output_dir",
    "log_dir",
    "device",
    "num_workers",
    "data_timeout",
    "data_cache",
    "pin_mem",
    "resume",
    "allow_other_data",
    "compile",
    "save_every_epochs",
    "save_minutes",
    "save_steps",
    "keep",
    "print_freq",
    "picture_bands",
    "picture_epochs",
    "predictions",
    "eval",
    # MAE's flags without an effect here.
    "dist_eval",
    "resplit",
    "dist_backend",
    "dist_timeout",
    "dist_url",
    "dist_on_itp",
    "local_rank",
    "world_size",
    "start_epoch",
    "max_bad_images",
    "max_steps",
    "dry_run",
    "strategy",
    "grad_checkpointing",
}
# Flags that are usually left out and then have the value of the model, the data or the checkpoint. MAE stores
# the values that they got, such as the learning rate.
LEFT_OPEN = {"patch_size", "lr", "nb_classes", "in_chans", "input_size", "mean", "std", "layer_norm_eps"}
LEFT_OPEN |= {"range", "channels", "bands"}
LEFT_OPEN |= {"finetune", "init_from"}
# Flags that decide what an image is.
IMAGES = {
    "input_size",
    "patch_size",
    "in_chans",
    "mean",
    "std",
    "range",
    "channels",
    "bands",
    "alpha",
    "exif",
}


def load_start(output_dir: str | None, resume: str) -> Checkpoint | None:
    """The checkpoint that this run continues, the same on all ranks; None for a new run.

    If the last checkpoint in `output_dir` is damaged, it is `resume`; in a job that was requeued it is rather
    the newest numbered checkpoint that is whole, because such a job repeats the flags of its first start. The
    run says so. Raises ValueError on all ranks if one of them cannot load the file; for a damaged last
    checkpoint the error names those that are whole.
    """
    path = find_start(output_dir, resume)
    if not path:
        return None
    checkpoint, problem = _load_together(path)
    if checkpoint is not None:
        return checkpoint
    is_last = bool(output_dir) and path == os.path.join(output_dir or "", LAST_CHECKPOINT)
    if not is_last:
        raise ValueError(problem)
    # Numbered checkpoints that were read as a whole are named in the place of those beside it.
    problem = problem.partition(SUCH_AS)[0]
    other = _substitute(path, resume, problem)
    checkpoint, next_problem = _load_together(other)
    if checkpoint is None:
        raise ValueError(f"{problem}. And {next_problem}")
    dist.print_rank0(
        f"warning: {problem}. The run continues from {other}; the damaged file is replaced at the next save"
    )
    return checkpoint


def _load_together(path: str) -> tuple[Checkpoint | None, str]:
    """A checkpoint that all ranks can load, or None and the problem of the first one that cannot."""
    checkpoint = None
    problem = ""
    try:
        checkpoint = load(path)
    except (ValueError, OSError) as e:
        problem = str(e)
    problems = [text for text in dist.gather_objects(problem) if text]
    if problems:
        return None, problem or problems[0]
    return checkpoint, ""


def _substitute(last: str, resume: str, problem: str) -> str:
    """The file that takes the place of the damaged `last` one, the same on all ranks; see `load_start`.

    Raises ValueError, which lists the whole numbered checkpoints, if a run was started by hand without
    another file, and if there is none.
    """
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    is_other = is_another_file(resume, last)
    if is_other and not requeued:
        return resume
    found: list[str] = []
    if dist.is_main():
        most = MOST_LISTED
        if requeued:
            most = 1
        found = _whole_numbered(os.path.dirname(last), most)
    found = dist.gather_objects(found)[0]
    if requeued and (found or is_other):
        return (found or [resume])[0]
    if not found:
        raise ValueError(
            f"{problem}. No numbered checkpoint in that folder is whole: give a file by `resume`, or another "
            "`output_dir`"
        )
    raise ValueError(
        f"{problem}. Undamaged numbered checkpoints: {', '.join(found)}. The same command with "
        f"`resume` {found[0]} continues from the newest, and its next save replaces the damaged file"
    )


def is_another_file(resume: str, last: str) -> bool:
    """Whether `resume` is given and means another file than `last`."""
    if os.path.isdir(resume):
        # A folder stands for its last checkpoint.
        resume = os.path.join(resume, LAST_CHECKPOINT)
    return bool(resume) and not (os.path.exists(resume) and os.path.samefile(last, resume))


def _whole_numbered(folder: str, most: int) -> list[str]:
    """The newest numbered checkpoints of a folder that load, newest first, at most `most`."""
    numbers = [int(match[1]) for match in map(NUMBERED.fullmatch, os.listdir(folder or ".")) if match]
    whole: list[str] = []
    for number in sorted(numbers, reverse=True):
        path = os.path.join(folder, f"checkpoint-{number}.pth")
        # Reading one takes as long as a start of the run.
        if len(whole) == most:
            break
        with contextlib.suppress(ValueError, OSError):
            load(path)
            whole.append(path)
    return whole


def to_evaluate(start: Checkpoint | None) -> Checkpoint:
    """The checkpoint that is evaluated; raises ValueError if there is none."""
    if start is None:
        raise ValueError("`eval` needs `resume`, the checkpoint to evaluate")
    return start


def print_continuing(checkpoint: Checkpoint, flags: dict[str, Any]) -> None:
    """Print which checkpoint the run continues, which flags have changed, and which have no effect."""
    changed = changed_flags(checkpoint.args, flags)
    note = ""
    if changed:
        note = f" with changed flags ({'; '.join(changed)})"
    dist.print_rank0(f"continuing {checkpoint.path}{note}")
    # These name weights for the start of a run, and this one has started.
    for name in ("finetune", "init_from", "resume"):
        # A probe reads its encoder at each start, and stores a checksum of it.
        if name == "finetune" and "encoder" in flags:
            continue
        if name == "resume" and not _goes_before_resume(checkpoint, flags):
            continue
        if flags.get(name) and checkpoint.args.get(name, "") != flags[name]:
            dist.print_rank0(
                f"warning: --{name} {flags[name]} is not read: the run continues from its own weights; for a "
                "new run give another --output_dir"
            )


def _goes_before_resume(checkpoint: Checkpoint, flags: Mapping[str, Any]) -> bool:
    """Whether the run's own checkpoint is read in the place of another one that `resume` names."""
    folder = os.path.dirname(os.path.abspath(checkpoint.path))
    is_own = folder == os.path.abspath(flags.get("output_dir") or os.curdir)
    return is_own and is_another_file(flags.get("resume", ""), checkpoint.path)


def other_than_trained(
    checkpoint: Checkpoint | None, flags: dict[str, Any], more: Collection[str] = ()
) -> str:
    """How the flags of images, and the flags `more`, differ from those of the checkpoint, or ''."""
    names = {*IMAGES, *more}
    # None means that a flag was not given, which is not a difference.
    trained = {k: v for k, v in stored_flags(checkpoint).items() if k in names and v is not None}
    changed = changed_flags(trained, flags)
    if not changed:
        return ""
    return f" (other than in training: {'; '.join(changed)})"


def changed_flags(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Flags, except the harmless ones, that differ between a checkpoint and this run: 'name: old -> new'."""
    return [
        f"{k}: {_text(old[k])} -> {v}"
        for k, v in sorted(new.items())
        if k in old and k not in HARMLESS and not _means_the_same(k, old[k], v)
    ]


def _means_the_same(name: str, old: Any, new: Any) -> bool:
    """Whether a stored value and one of this run are the same; other programs spell some differently."""
    if new in (None, "") and name in LEFT_OPEN:
        return True
    # MAE stores `input_size` as a number, we as a list. [224] and [224, 224] are the same square.
    if _square(old) == _square(new):
        return True
    # argparse leaves an empty text where another program has nothing.
    return str(old) == str(new) or {str(old), str(new)} <= {"", "None"}


def _square(value: Any) -> list[Any]:
    """A number or a list as a list, in which a pair of equal numbers is one."""
    values = [value]
    if isinstance(value, list):
        values = value
    if len(values) == 2 and values[0] == values[1]:
        return values[:1]
    return values


def _text(value: Any) -> str:
    """A stored flag on one line."""
    return shown(str(value))


def plain_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as plain values that `weights_only` loads: numbers, strings, lists of them."""
    return {k: _plain(v) for k, v in flags.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, (int, float, bool, str, type(None))):
        return value
    return str(value)
