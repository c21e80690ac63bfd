"""Checks of parsed flags that need no torch: wrong names and missing paths are reported before its import.

Only scripts and the launcher call them. Mains check the rest, and these once more where they read them.
"""

import argparse
import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence

from layers import sizes
from util.files import LAST_CHECKPOINT, formats
from util.files.names import printable
from util.flags.groups import ascending, channel_stats, compile_mode, is_remote_path, is_timm_path, pair

# Main -> the names of its models.
MODELS: Mapping[str, Callable[[], list[str]]] = {
    "main_pretrain": sizes.mae_names,
    "main_finetune": sizes.classifier_names,
    "main_linprobe": sizes.classifier_names,
    "main_segment": sizes.classifier_names,
    "main_sere": sizes.sere_names,
}
KINDS = {
    "main_pretrain": "a masked autoencoder, which main_pretrain.py trains",
    "main_finetune": "a classifier, which main_finetune.py trains",
    "main_sere": "a student of self-distillation, which main_sere.py trains",
}
LETTERS = {"t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge"}
# Flags with a file or folder to start from.
STARTS = ("resume", "finetune", "init_from", "distill_checkpoint")
# Arguments that name images -> how the command line has them.
IMAGE_PATHS = {"data_path": "--data_path", "path": "the path"}


def check(script: str, flags: argparse.Namespace) -> None:
    """Raise ValueError, which names the flag, for what is wrong in the flags of a script.

    Args:
        script: file name of the script.
        flags: its parsed flags. Those that a script does not have are not checked.
    """
    main = script.removesuffix(".py")
    if main in MODELS:
        check_model(main, flags.model)
    _check_sizes(flags)
    if hasattr(flags, "compile_mode"):
        compile_mode(flags.compile, flags.compile_mode, flags.accum_iter)
    _check_images(flags)
    _check_starts(main, flags)


def announce(flags: argparse.Namespace) -> None:
    """Print on rank 0 that the demo images are used because the data are not named."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    first = next((os.environ[name] for name in names if name in os.environ), "0") == "0"
    left_out = getattr(flags, "data_path", None) == "" and "data_path" not in getattr(flags, "given", ())
    # A status is not a run.
    if first and left_out and getattr(flags, "status", None) is None:
        print("no --data_path: the embedded demo images are used", flush=True)


# --- models


def check_model(main: str, name: str, names: Sequence[str] = ()) -> None:
    """Raise ValueError, with the nearest name, if a main has no model of that name.

    `names` are those of its models; if none are given they are the toolkit's own.
    """
    if main not in MODELS:
        return
    names = names or MODELS[main]()
    # timm's names are known once timm is imported.
    takes_timm = main in ("main_finetune", "main_linprobe", "main_segment")
    if name in names or (takes_timm and name.startswith("timm/")):
        return
    here = sizes.same_encoder(name, names)
    for other, kind in KINDS.items():
        if here and name in MODELS[other]():
            raise ValueError(f"`model` {name} is {kind}; {main}.py takes {here}")
    near = here or nearest(name, names)
    message = f"`model` {printable(name)} is unknown"
    if near:
        message += f"; did you mean {near}? --help lists all names"
    else:
        message += f"; there are {', '.join(names)}"
    if takes_timm:
        message += "; timm's models are timm/NAME"
    raise ValueError(message)


def nearest(name: str, names: Sequence[str]) -> str:
    """Return the most similar name, '' if none is similar. ViT-B/16, for example, is a vit_base_patch16."""
    plain = re.sub(r"\W+", "_", name.lower())
    short = re.search(r"vit_?([tslbh])_?(\d+)", plain)
    if short is not None:
        plain = f"vit_{LETTERS[short[1]]}_patch{short[2]}"
    same = [each for each in names if each.endswith(plain) or (len(plain) > 5 and each.startswith(plain))]
    return (same or difflib.get_close_matches(plain, names, n=1) or [""])[0]


# --- sizes


def _check_sizes(flags: argparse.Namespace) -> None:
    for name in ("input_size", "patch_size", "local_size"):
        if getattr(flags, name, None):
            pair(getattr(flags, name), f"--{name}")
    for name in ("crop_scale", "global_crops_scale", "local_crops_scale"):
        if getattr(flags, name, None):
            ascending(getattr(flags, name), f"--{name}")
    # A checkpoint may know the statistics.
    if hasattr(flags, "mean") and not any(getattr(flags, name, "") for name in STARTS):
        last = os.path.join(flags.output_dir or "", LAST_CHECKPOINT)
        if not os.path.exists(last):
            channel_stats(flags.in_chans, flags.mean, flags.std)


# --- paths


def check_given(flags: argparse.Namespace) -> None:
    """Raise ValueError for a path of images that is given and empty: the demo images would be used."""
    for name, shown in IMAGE_PATHS.items():
        if name in getattr(flags, "given", ()) and not all(_listed(getattr(flags, name)) or [""]):
            message = f"{shown} is empty (perhaps an unset shell variable): name the images"
            if shown.startswith("-"):
                message += ", or leave the flag out for the embedded demo images"
            raise ValueError(message)


def _check_images(flags: argparse.Namespace) -> None:
    """Raise ValueError for a path of images that is empty, not one path, or does not exist."""
    check_given(flags)
    for name, shown in IMAGE_PATHS.items():
        for path in _listed(getattr(flags, name, "")):
            _check_image_path(shown, path)


def _listed(paths: str | list[str]) -> list[str]:
    """Return the paths of a flag that takes one, or any number of them."""
    if isinstance(paths, str):
        return [paths]
    return paths


def _check_image_path(shown: str, path: str) -> None:
    if not path or is_timm_path(path) or is_remote_path(path):
        return
    if os.path.exists(os.path.expanduser(path)):
        return
    if "://" in path:
        raise ValueError(
            f"{shown} {printable(path)} is a web address, and images are read from disk: download them, "
            "and give their folder or .tar"
        )
    if re.search(r"[*?{]", path):
        raise ValueError(
            f"{shown} {printable(path)} is a pattern: give the folder; its train-*.tar and val-*.tar "
            "are read as shards"
        )
    _check_path(shown, path)


def _check_starts(main: str, flags: argparse.Namespace) -> None:
    """Raise ValueError for a start that does not exist, unless the run continues from its own checkpoint."""
    if getattr(flags, "eval", False) and not flags.resume:
        raise ValueError(
            f"--eval needs --resume FILE, the trained checkpoint to evaluate{_meant(main, flags)}"
        )
    if main == "main_linprobe" and not any((flags.finetune, flags.pretrained, flags.eval)):
        raise ValueError(no_encoder(flags.model))
    own = os.path.join(getattr(flags, "output_dir", "") or "", LAST_CHECKPOINT)
    # A requeued job repeats the flags of its first start, whose files may be gone.
    if os.path.exists(own) and not getattr(flags, "eval", False):
        return
    for name in STARTS:
        for path in _listed(getattr(flags, name, "")):
            _check_start(f"--{name}", path)


def _check_start(flag: str, path: str) -> None:
    """Raise ValueError if a path is no checkpoint, or does not exist."""
    problem = formats.problem(path)
    if problem:
        raise ValueError(f"{flag} {problem}")
    _check_path(flag, path)


def no_encoder(model: str) -> str:
    """What a probe without an encoder needs."""
    text = "--finetune FILE is needed: the pretrained checkpoint whose features are probed"
    if model.startswith("timm/"):
        text += "; --pretrained takes the weights that timm publishes"
    return text


def _meant(main: str, flags: argparse.Namespace) -> str:
    """What to give if --finetune names the classifier to evaluate."""
    kind = {"main_finetune": "classifier", "main_segment": "segmenter"}.get(main)
    # A probe is evaluated with its encoder.
    if kind is None or not flags.finetune or getattr(flags, "probe", None):
        return ""
    file = printable(flags.finetune)
    return f"; --finetune starts a training: if {file} is a trained {kind}, give --resume {file}"


def _check_path(flag: str, path: str) -> None:
    """Raise ValueError, with a similar name of the same folder, if a file or folder does not exist."""
    # Checkpoints at an address are downloaded.
    if not path or "://" in path:
        return
    whole = os.path.expanduser(path)
    if os.path.exists(whole):
        return
    folder = os.path.dirname(whole.rstrip("/")) or "."
    name = os.path.basename(whole.rstrip("/"))
    shown = printable(path)
    if not os.path.isdir(folder):
        parent = folder
        while not os.path.isdir(parent):
            parent = os.path.dirname(parent) or "."
        there = printable(os.path.abspath(parent))
        raise ValueError(f"{flag} {shown} does not exist: the last part of it that exists is {there}")
    near = difflib.get_close_matches(name, os.listdir(folder), n=1)
    hint = f"there is no {printable(name)} in {printable(os.path.abspath(folder))}"
    if near:
        hint += f"; did you mean {printable(near[0])}?"
    if folder == "/":
        hint += "; perhaps a shell variable before it is empty"
    raise ValueError(f"{flag} {shown} does not exist: {hint}")
