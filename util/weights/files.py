"""Reads checkpoint files without running any code in them."""

import argparse
import contextlib
import json
import os
import pathlib
import pickle
import pickletools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from util.files import formats
from util.files.names import printable
from util.weights import archive, layouts, validate
from util.weights.archive import crc32
from util.weights.locate import located
from util.weights.types import Checkpoint
from util.weights.validate import shown

# Python 3.13 moved pathlib's classes. A pickle names them as the Python version that wrote it did.
_PATH_CLASSES = (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.Path)
_SAFE_CLASSES: list[Any] = [
    argparse.Namespace,
    *((c, f"{home}.{c.__name__}") for c in _PATH_CLASSES for home in ("pathlib", "pathlib._local")),
]
# What safetensors files of ours store as text, besides tensors.
_METADATA = ("args", "classes")
DIGEST = "crc32"
# How many names of other files an error lists.
MOST_NAMES = 8
_ARRAY = b"bytearray\n"
# Libraries of which checkpoints ask for harmless names; other names matter more in a short list.
_USUAL = ("torch.", "numpy.", "collections.")


def load(path: str) -> Checkpoint:
    """Load a checkpoint without running any code in it; tensors are on the CPU.

    `path` is a file, a run's folder, which stands for its last checkpoint, or an address, which all ranks
    must load together. The weights lose the prefixes of torch.compile and the like; see `layouts`.

    All fields have the types that `Checkpoint` states: weights are dense, real and finite, and flags are
    plain values. Other entries are as the file has them. MAE's own files load too: they pickle an
    argparse.Namespace with pathlib paths.

    Raises ValueError with the reason if the file is missing, empty, truncated, damaged, not a checkpoint, or
    would run code (the message lists the names that it asks for), and if a field has another type.
    """
    path = located(path)
    _check_exists(path)
    # By the first bytes: files are renamed.
    if formats.is_safetensors(formats.first_bytes(path)):
        state = _load_safetensors(path)
    else:
        state = _load_pickle(path)
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__}, not a dictionary of weights: save it anew by "
            "torch.save(model.state_dict(), FILE) in the program that has the model"
        )
    if state and all(torch.is_tensor(v) for v in state.values()):
        # A file of bare weights.
        state = {"model": state}
    for name in state:
        if type(name) is not str:
            raise ValueError(f"{path} has an entry named {shown(name)}, which is no text: {validate.REMEDY}")
    most_bytes = archive.most_bytes(path)
    found = layouts.find(path, state)
    weights = validate.state_dict(path, ".".join(found.entries), found.weights, most_bytes)
    weights, note = layouts.unwrapped(path, weights)
    if found.role:
        note = "; ".join([f"the {found.role}'s weights", *filter(None, [note])])
    used = {"model", "args", "classes", found.entries[0]}
    if found.role:
        # The other model of a file of DINO's, iBOT's or SERE's, of which nothing else is used.
        used |= {"teacher", "student"}
    return Checkpoint(
        path,
        model=weights,
        args=validate.plain_flags(path, state.get("args")),
        classes=validate.class_names(path, state.get("classes")),
        entries=validate.entries(path, {k: v for k, v in state.items() if k not in used}, most_bytes),
        origin=note,
    )


def _check_exists(path: str) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file, but a folder, a pipe or a device: give a file")
    problem = formats.problem(path)
    if problem:
        raise ValueError(problem)
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        others: list[str] = []
        if os.path.isdir(folder):
            others = [name for name in sorted(os.listdir(folder)) if name.endswith(".pth")]
        message = f"no checkpoint at {path}"
        # A link that leads nowhere has a name, too.
        listed = [printable(name) for name in others[:MOST_NAMES] if name != os.path.basename(path)]
        if len(others) > MOST_NAMES:
            listed.append("...")
        if listed:
            message += f"; {folder} has {', '.join(listed)}"
        raise ValueError(message)


def _load_pickle(path: str) -> Any:
    try:
        return _unpickled(path)
    except _Damaged as e:
        raise ValueError(f"{path} is damaged: {e}; use another checkpoint{formats.beside(path)}") from None
    except pickle.UnpicklingError:
        names = _unsafe_names(path)
        if names:
            by_weight = sorted(names, key=lambda name: (name.startswith(_USUAL), name))
            listed = ", ".join(map(shown, by_weight[:8]))
            raise ValueError(
                f"{path} is refused: loading it would run code; it asks for {listed}. Checkpoints hold "
                "tensors and plain values only: if you trust the file, load it in the program that made "
                "it, and save the weights alone by torch.save(model.state_dict(), FILE)"
            ) from None
        raise ValueError(
            f"{path} is not a checkpoint: its pickle holds more than tensors and plain values; "
            f"use another one{formats.beside(path)}"
        ) from None
    except Exception as e:  # torch raises many types for damaged files, and the remedy is one
        raise ValueError(
            f"{path} is truncated or not a checkpoint{_first_line(e)}: use another one{formats.beside(path)}"
        ) from None


def _first_line(error: Exception) -> str:
    """The first line of an error in brackets."""
    lines = str(error).splitlines()
    return f" ({shown((lines or [type(error).__name__])[0])})"


class _Damaged(Exception):
    """Content that differs from its checksum."""


def _unpickled(path: str) -> Any:
    """What the file's pickle describes. Raises _Damaged, and errors of many types for other files."""
    if not archive.is_archive(path):
        # The format before PyTorch 1.6 has no checksums.
        with open(path, "rb") as raw:
            _check_arrays(_windows(raw))
        return _torch_load(path)
    with archive.opened(path) as file:
        file.check_small_records()
        _check_damage(file)
        _check_arrays([file.pickled()])
        try:
            state = _torch_load(file)
        except Exception:
            _check_damage(file)
            raise
        file.check_rest()
        _check_damage(file)
    return state


def _windows(file: BinaryIO) -> Iterator[bytes]:
    """The content of a file in pieces, each with the end of the one before it."""
    end = b""
    while piece := file.read(1 << 20):
        yield end + piece
        end = piece[-len(_ARRAY) :]


def _check_arrays(texts: Iterable[bytes]) -> None:
    """Raise ValueError if a pickle makes an array of bytes: a few letters may ask for one of any size."""
    if any(_ARRAY in text for text in texts):
        raise ValueError("it asks for a bytearray, which no weights are")


def _torch_load(file: Any) -> Any:
    with torch.serialization.safe_globals(_SAFE_CLASSES), warnings.catch_warnings():
        # Of pickles that are refused anyway.
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_damage(file: archive.Archive) -> None:
    name = file.damaged()
    if name:
        raise _Damaged(f"the content of {shown(name)} does not have the checksum that was stored with it")


def _unsafe_names(path: str) -> set[str]:
    """Names that a pickle would import, apart from those of MAE's own files."""
    names: set[str] = set()
    if archive.is_archive(path):
        # A damaged pickle may end anywhere.
        with contextlib.suppress(Exception):
            names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    else:
        names = _names_in_pickle(path)
    return {name for name in names if not name.startswith(("argparse.", "pathlib."))}


def _names_in_pickle(path: str) -> set[str]:
    """Names that a file in the format before PyTorch 1.6 would import; nothing is run."""
    names = set()
    strings: list[str] = []
    with open(path, "rb") as f, contextlib.suppress(Exception):
        # Such a file is up to five pickles in a row.
        for _ in range(5):
            for op, value, _ in pickletools.genops(f):
                if op.name == "GLOBAL":
                    names.add(str(value).replace(" ", "."))
                elif op.name == "STACK_GLOBAL":
                    # Module and name are the two strings that were pushed last.
                    names.add(".".join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
    return names


def _load_safetensors(path: str) -> dict[str, Any]:
    """The weights, and the flags and class names that `checkpoints.py export` stores as JSON."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as f:
            weights = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a mapping)
            metadata = f.metadata() or {}
    except Exception as e:  # types of its own, and those of torch
        raise ValueError(
            f"{path} is truncated or not a safetensors file{_first_line(e)}: use another one"
            + formats.beside(path)
        ) from None
    if DIGEST in metadata and metadata[DIGEST] != digest(weights, metadata):
        raise ValueError(
            f"{path} is damaged: its content does not have the checksum that was stored with it; use "
            f"another checkpoint{formats.beside(path)}"
        )
    return {"model": weights} | {k: _from_json(path, k, metadata[k]) for k in _METADATA if k in metadata}


def _from_json(path: str, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    # Brackets may be nested deeper than Python's stack.
    except (ValueError, RecursionError):
        validate.refuse(path, name, "a text that is not JSON", "what `export` writes")


def digest(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The CRC-32 of tensors and of what is stored with them; the safetensors format has no checksums."""
    crc = 0
    for name in _METADATA:
        crc = crc32(metadata.get(name, "").encode(), crc)
    for name, tensor in sorted(weights.items()):
        crc = crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        if tensor.numel():
            # numpy does not know all types, but the bytes of all.
            crc = crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
