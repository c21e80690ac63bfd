"""Checks what a checkpoint file holds before anything is used: each field has the type that it claims.

All functions raise ValueError: "FILE: its entry 'FIELD' is FOUND, expected WHAT: REMEDY".
"""

import argparse
import math
import pathlib
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from util.dist.optimizer_state import is_finite, unfit
from util.files.names import printable

REMEDY = "it is damaged or another program's; use another file"
# Names and values of a file are shown up to this length.
SHOWN = 80
# Entries of runs besides 'model' that are state dicts: average, teacher, and the teacher's centres.
STATE_DICTS = ("ema", "teacher", "centres")
# No run comes near these.
MOST_EPOCHS = 10**6
MOST_STEPS = 10**10
MOST_CLASSES = 10**6
MOST_PIXELS = 1 << 16
MOST_CHANNELS = 10**4
# Flags are some hundred values, most of them in no list.
MOST_VALUES = 10**5
MOST_CHARACTERS = 10**7
DEEPEST = 8
PLAIN = (int, float, bool, str, type(None))


def shown(value: Any) -> str:
    """A name or a value of a file for messages: on one line, without control characters, and short."""
    if isinstance(value, Tensor):
        # Nested tensors have no shape.
        if value.is_nested:
            return "a nested tensor"
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if not isinstance(value, PLAIN):
        return f"a {type(value).__name__}"
    # Python refuses to print numbers of more than 4300 digits.
    if type(value) is int and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    if len(text) > SHOWN:
        text = f"{text[:SHOWN]}..."
    return printable(text)


def refuse(path: str, field: str, found: Any, expected: str, remedy: str = REMEDY) -> NoReturn:
    """Raise the error for a field; `found` is shown as it is if it begins with 'a ', else quoted."""
    text = shown(found)
    if isinstance(found, str) and not found.startswith("a "):
        text = repr(text)
    raise ValueError(f"{path}: its entry '{shown(field)}' is {text}, expected {expected}: {remedy}")


def dictionary(path: str, field: str, value: Any) -> dict[str, Any]:
    """A dictionary whose keys are strings."""
    if not isinstance(value, dict):
        refuse(path, field, value, "a dictionary")
    for key in value:
        if type(key) is not str:
            refuse(path, field, f"a dictionary with the key {shown(key)}", "names as keys")
    return value


def whole(path: str, field: str, value: Any, least: int, most: int) -> int:
    """A whole number within bounds."""
    # True is an int for Python.
    if type(value) is not int or not least <= value <= most:
        refuse(path, field, value, f"a whole number from {least} to {most}")
    return value


def number(path: str, field: str, value: Any) -> float:
    """A finite number."""
    if type(value) not in (int, float):
        refuse(path, field, value, "a number")
    if type(value) is int and value.bit_length() > 64:
        refuse(path, field, value, "a number")
    if not math.isfinite(value):
        refuse(path, field, value, "a finite number")
    return value


def numbers(path: str, field: str, value: Any) -> dict[str, float]:
    """A dictionary of finite numbers."""
    return {k: number(path, f"{field}.{k}", v) for k, v in dictionary(path, field, value).items()}


# -- tensors -------------------------------------------------------------------------------------------------
def state_dict(path: str, field: str, value: Any, most_bytes: float = math.inf) -> dict[str, Tensor]:
    """A dictionary of weights: dense and finite tensors on the CPU, of at most `most_bytes` together."""
    weights = {}
    total = 0
    for name, tensor in dictionary(path, field, value).items():
        found = unfit(tensor)
        if found:
            refuse(path, f"{field}.{name}", found, "a dense tensor of real numbers")
        # Plain tensors: a pickle may give a tensor any attribute.
        weights[name] = tensor.detach()
        total += tensor.numel() * tensor.element_size()
    if total > most_bytes:
        refuse(path, field, f"a dictionary of tensors of {total} bytes", "what a file of its size can hold")
    # Only now, because the bytes are read here.
    for name, tensor in weights.items():
        if not is_finite(tensor):
            refuse(path, f"{field}.{name}", "a tensor with nan or infinite numbers", "finite numbers")
    return weights


# -- flags ---------------------------------------------------------------------------------------------------
class _Plain:
    """Copies flags as plain values, and limits how many there are: a list may contain itself many times."""

    def __init__(self, path: str):
        self.path = path
        self.values = MOST_VALUES
        self.characters = MOST_CHARACTERS

    def copied(self, field: str, value: Any, depth: int = 0) -> Any:
        self.count(field, value, depth)
        if type(value) in (list, tuple, torch.Size):
            return [self.copied(field, x, depth + 1) for x in value]
        if isinstance(value, dict):
            return {self.key(field, k): self.copied(field, v, depth + 1) for k, v in value.items()}
        if type(value) is int and value.bit_length() > 64:
            refuse(self.path, field, value, "a number")
        if type(value) in PLAIN:
            return value
        if isinstance(value, (pathlib.PurePath, torch.dtype, torch.device)):
            return str(value)
        refuse(self.path, field, value, "a plain value")

    def count(self, field: str, value: Any, depth: int) -> None:
        self.values -= 1
        if isinstance(value, str):
            self.characters -= len(value)
        if self.values < 0 or self.characters < 0 or depth > DEEPEST:
            refuse(self.path, field, value, "the flags of a run, which are fewer, shorter and less nested")

    def key(self, field: str, value: Any) -> str | int | float | bool | None:
        if type(value) in PLAIN:
            return self.copied(field, value)
        refuse(self.path, field, value, "a plain key")


def plain_flags(path: str, stored: Any, strict: bool = False) -> dict[str, Any]:
    """Stored flags as a dictionary of plain values. MAE's files store an argparse.Namespace with paths.

    Those that are read here have their types if the file is of this toolkit, or if `strict`. In other
    programs' files they are left out if they have not, except sizes.
    """
    if stored is None:
        return {}
    if isinstance(stored, argparse.Namespace):
        stored = vars(stored)
    stored = dictionary(path, "args", stored)
    plain = _Plain(path)
    flags = {name: plain.copied(f"args.{name}", value) for name, value in stored.items()}
    # All mains here have the flag, and no other program has it.
    strict = strict or "pos_label" in flags
    for name, check in _FLAGS.items():
        # None stands for a flag that was not given.
        if flags.get(name) is None:
            continue
        try:
            check(path, f"args.{name}", flags[name])
        except ValueError:
            if strict:
                raise
            # Another program's flag that has the name by chance. Sizes are checked where they count.
            if name not in _SIZES:
                del flags[name]
    return flags


def _text(path: str, field: str, value: Any) -> None:
    if type(value) is not str:
        refuse(path, field, value, "a text")


def _texts(path: str, field: str, value: Any) -> None:
    if not isinstance(value, list) or not all(type(x) is str for x in value):
        refuse(path, field, value, "a list of names")


def _choice(path: str, field: str, value: Any) -> None:
    if type(value) is not bool:
        refuse(path, field, value, "true or false")


def _count(path: str, field: str, value: Any) -> None:
    whole(path, field, value, 1, MOST_CHANNELS)


def _finite_numbers(path: str, field: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        refuse(path, field, value, "a list of numbers")
    for x in value:
        number(path, field, x)


def _positive_numbers(path: str, field: str, value: Any) -> None:
    _finite_numbers(path, field, value)
    if min(value) <= 0:
        refuse(path, field, "a list with a number that is not positive", "numbers above 0")


def _sizes(path: str, field: str, value: Any) -> None:
    # A number, a list, or, in files of others, a text that contains them.
    listed = value
    if not isinstance(value, list):
        listed = [value]
    for x in listed:
        if type(x) is not str:
            whole(path, field, x, 1, MOST_PIXELS)


def _number(path: str, field: str, value: Any) -> None:
    number(path, field, value)


def _epsilon(path: str, field: str, value: Any) -> None:
    if not 0 < number(path, field, value) <= 1:
        refuse(path, field, value, "a number above 0, up to 1")


def _share(path: str, field: str, value: Any) -> None:
    if not 0 <= number(path, field, value) < 1:
        refuse(path, field, value, "a number from 0 to below 1")


def _bands(path: str, field: str, value: Any) -> None:
    right = type(value) in (list, tuple) and 0 < len(value) <= MOST_CHANNELS
    if not right or not all(type(each) is int and 0 <= each < MOST_CHANNELS for each in value):
        refuse(path, field, value, f"up to {MOST_CHANNELS} numbers of bands, from 0")


# Flags that are read from files, with what they have to be.
_FLAGS: dict[str, Callable[[str, str, Any], None]] = {
    **dict.fromkeys(("model", "pos_label", "pos_tokens", "pos_embed", "pool", "patch_embed"), _text),
    **dict.fromkeys(("head", "finetune", "so_fusion", "image_depth"), _text),
    **dict.fromkeys(("num_heads", "decoder_heads", "in_chans", "bands", "so_heads", "so_iters"), _count),
    **dict.fromkeys(("mean", "range"), _finite_numbers),
    "channels": _bands,
    **dict.fromkeys(("std", "lr_grid"), _positive_numbers),
    **dict.fromkeys(("input_size", "patch_size", "so_dims"), _sizes),
    **dict.fromkeys(("norm_pix_loss", "swin_merge_last"), _choice),
    **dict.fromkeys(("so_alpha", "so_dropout"), _number),
    "layer_norm_eps": _epsilon,
    "mask_ratio": _share,
    "new_parameters": _texts,
}


# Flags of the model's sizes, which other programs have, too.
_SIZES = ("num_heads", "decoder_heads", "input_size", "patch_size")


# -- the other fields ----------------------------------------------------------------------------------------
def class_names(path: str, stored: Any) -> list[str] | None:
    """Names of classes, each once, in Unicode's composed form; None if the file stores none."""
    if stored is None:
        return None
    if type(stored) not in (list, tuple) or not all(type(name) is str for name in stored):
        refuse(path, "classes", stored, "a list of names")
    if len(stored) > MOST_CLASSES:
        refuse(path, "classes", f"a list of {len(stored)} names", f"at most {MOST_CLASSES}")
    if len(set(stored)) < len(stored):
        refuse(path, "classes", "a list in which a name is repeated", "different names")
    # Earlier versions stored them as the file system had them. Data sets give the composed form.
    composed = [unicodedata.normalize("NFC", name) for name in stored]
    if len(set(composed)) < len(composed):
        return list(stored)
    return composed


def _optional(check: Callable[..., Any], *more: Any) -> Callable[[str, str, Any], Any]:
    """A check of a field that may be None."""

    def checked(path: str, field: str, value: Any) -> Any:
        if value is None:
            return None
        return check(path, field, value, *more)

    return checked


_FIELDS: dict[str, Callable[[str, str, Any], Any]] = {
    # -1 before the end of the first epoch.
    "epoch": _optional(whole, -1, MOST_EPOCHS),
    "step": _optional(whole, 0, MOST_STEPS),
    "updates_per_epoch": _optional(whole, 1, MOST_STEPS),
    "best": _optional(number),
    "best_epoch": _optional(whole, 0, MOST_EPOCHS),
    "meters": _optional(numbers),
    "scaler": _optional(numbers),
    "optimizer": _optional(dictionary),
}


def entries(path: str, stored: Mapping[str, Any], most_bytes: float) -> dict[str, Any]:
    """The further entries of a file: those that are used have their types, others stay as they are."""
    checked = dict(stored)
    for name, check in _FIELDS.items():
        if name in checked:
            checked[name] = check(path, name, checked[name])
    for name in STATE_DICTS:
        if checked.get(name) is not None:
            checked[name] = state_dict(path, name, checked[name], most_bytes)
    _check_position(path, checked)
    return checked


def _check_position(path: str, stored: Mapping[str, Any]) -> None:
    """Refuse a step that is not in the epoch after the last finished one."""
    epoch = stored.get("epoch")
    step = stored.get("step")
    updates = stored.get("updates_per_epoch")
    if epoch is None or step is None or updates is None:
        return
    first = (epoch + 1) * updates
    if not first <= step <= first + updates:
        expected = f"{first} to {first + updates} after epoch {epoch} of {updates} updates each"
        refuse(path, "step", step, expected)
