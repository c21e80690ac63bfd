"""Reads checkpoint files without running any code in them."""

import argparse
import contextlib
import json
import os
import pathlib
import pickle
import pickletools
import zipfile
from typing import Any

import torch

from util.weights.types import Checkpoint

# Python 3.13 moved pathlib's classes. A pickle names them as the Python version that wrote it did.
_PATH_CLASSES = (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.Path)
_SAFE_CLASSES = [
    argparse.Namespace,
    *((c, f"{home}.{c.__name__}") for c in _PATH_CLASSES for home in ("pathlib", "pathlib._local")),
]
# Entries that hold the weights, in the order of preference: ours and MAE's, timm's, DINO's.
_WEIGHT_ENTRIES = ("model", "state_dict", "teacher", "student")


def load(path: str) -> Checkpoint:
    """Load a checkpoint without running any code in it; tensors are on the CPU.

    MAE's own files load too: they pickle an argparse.Namespace with pathlib paths. Raises ValueError with the reason
    if the file is missing, empty, truncated, not a checkpoint, or would run code (the message lists the names that it
    asks for).
    """
    _check_exists(path)
    if path.endswith(".safetensors"):
        state = _load_safetensors(path)
    else:
        state = _load_pickle(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dictionary of weights")
    if state and all(torch.is_tensor(v) for v in state.values()):
        # A file of bare weights.
        state = {"model": state}
    return Checkpoint(
        path,
        # DistributedDataParallel prefixes all names, and DINO stores the wrapped model.
        model={k.removeprefix("module."): v for k, v in _find_weights(state, path).items()},
        args=_plain_flags(state.get("args")),
        classes=state.get("classes"),
        entries={k: v for k, v in state.items() if k not in ("model", "args", "classes")},
    )


def _check_exists(path: str) -> None:
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        others: list[str] = []
        if os.path.isdir(folder):
            others = sorted(f for f in os.listdir(folder) if f.endswith(".pth"))
        message = f"no checkpoint at {path}"
        if others:
            message += f"; {folder} has {', '.join(others)}"
        raise ValueError(message)
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty: the run that wrote it was interrupted; use another checkpoint")


def _load_pickle(path: str) -> Any:
    try:
        with torch.serialization.safe_globals(_SAFE_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        names = _unsafe_names(path)
        if names:
            raise ValueError(
                f"{path} is refused: loading it would run code; it asks for {', '.join(sorted(names))}. "
                "Checkpoints hold tensors and plain values only: if you trust the file, save its 'model' entry anew"
            ) from None
        raise ValueError(
            f"{path} is not a checkpoint: its pickle holds more than tensors and plain values"
        ) from None
    except Exception as e:  # torch raises many types for damaged files, and the remedy is one
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} is truncated or not a checkpoint ({reason}): use another one") from None


def _unsafe_names(path: str) -> set[str]:
    """Names that a pickle would import, apart from those of MAE's own files."""
    if zipfile.is_zipfile(path):
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    else:
        names = _names_in_pickle(path)
    return {name for name in names if not name.startswith(("argparse.", "pathlib."))}


def _names_in_pickle(path: str) -> set[str]:
    """Names that a file in the format before PyTorch 1.6 would import; nothing is run."""
    names = set()
    strings: list[str] = []
    with open(path, "rb") as f, contextlib.suppress(ValueError, IndexError):
        # Such a file is up to five pickles in a row.
        for _ in range(5):
            for op, value, _ in pickletools.genops(f):
                if op.name == "GLOBAL":
                    names.add(value.replace(" ", "."))
                elif op.name == "STACK_GLOBAL":
                    # Module and name are the two strings that were pushed last.
                    names.add(".".join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
    return names


def _load_safetensors(path: str) -> dict[str, Any]:
    """The weights, and the flags and class names that `checkpoints.py export` stores as JSON in the metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            state = {"model": {k: f.get_tensor(k) for k in f.keys()}}  # noqa: SIM118 (not a mapping)
            metadata = f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is truncated or not a safetensors file ({e}): use another one") from None
    return state | {k: json.loads(metadata[k]) for k in ("args", "classes") if k in metadata}


def _find_weights(state: dict[str, Any], path: str) -> dict[str, Any]:
    """The entry of the file that holds the weights."""
    for name in _WEIGHT_ENTRIES:
        if isinstance(state.get(name), dict):
            return state[name]
    entries = ", ".join(map(str, list(state)[:8])) or "nothing"
    raise ValueError(f"{path} does not have an entry 'model'; it has {entries}")


def _plain_flags(stored: Any) -> dict[str, Any]:
    """Stored flags as a dictionary; MAE's files store an argparse.Namespace, in which paths become strings."""
    if isinstance(stored, argparse.Namespace):
        return {k: _plain_value(v) for k, v in vars(stored).items()}
    return stored or {}


def _plain_value(value: Any) -> Any:
    if isinstance(value, (int, float, bool, type(None))):
        return value
    return str(value)
