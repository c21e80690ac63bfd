"""Finds the weights of one model in a checkpoint file: among its entries, and behind prefixes of their names.

torch.compile, DistributedDataParallel, FSDP, Lightning and DeepSpeed wrap a model, and each of them adds a
prefix to all names or puts the weights into an entry of its own. DINO, iBOT and SERE store a student and a
teacher.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from util.weights import validate
from util.weights.validate import shown

# Entries that hold weights, in the order of preference: ours and MAE's, timm's and Lightning's, a common one,
# DeepSpeed's, DINO's.
ENTRIES = ("model", "state_dict", "model_state_dict", "module", "teacher", "student")
# Parts of names that wrappers of single layers add anywhere: torch.compile, FSDP, activation checkpointing.
_INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Prefixes of all names: DistributedDataParallel's and AveragedModel's, Lightning's, a common one.
_OUTER = ("module.", "model.", "net.")
# Of two models in one state dict. The teacher is the one that DINO, iBOT and SERE evaluate.
_ROLES = ("teacher.", "student.")
# A prefix belongs to a wrapper if at least this share of the names has it. Others are those of a loss, say.
_NEARLY_ALL = 0.9
# Wrappers around wrappers.
_MOST_LAYERS = 8
# First parts of names that a model may have beside a wrapped backbone.
_OF_A_MODEL = (
    *("head", "fc_norm", "norm", "pos_head", "cls_token", "dist_token", "pos_embed", "blocks", "patch_embed"),
    *("mask_token", "ibot_head", "backbone"),
)
# What AveragedModel stores beside the weights.
_COUNTER = "n_averaged"


@dataclass(frozen=True)
class Found:
    """A place in a file: the names of the entries that lead to it, and what is there."""

    entries: tuple[str, ...]
    weights: dict[str, Any]

    @property
    def role(self) -> str:
        """ "teacher" or "student" if the last such entry says so, else ''."""
        roles = [name for name in self.entries if f"{name}." in _ROLES]
        return (roles or [""])[-1]


def find(path: str, state: Mapping[str, Any]) -> Found:
    """Find the entry of the weights, which may lie in other entries: {"module": {...}} of DeepSpeed, say.

    Raises ValueError if there is none.
    """
    entries: tuple[str, ...] = ()
    place: Mapping[str, Any] = state
    while len(entries) < _MOST_LAYERS:
        name = next((name for name in ENTRIES if isinstance(place.get(name), dict)), None)
        holds_weights = bool(entries) and any(torch.is_tensor(value) for value in place.values())
        if name is None or holds_weights:
            break
        entries += (name,)
        place = place[name]
    if not entries:
        found = ", ".join(map(shown, list(state)[:8])) or "nothing"
        raise ValueError(
            f"{path} does not have an entry 'model'; it has {found}: save the entry with the weights alone, "
            "by torch.save(torch.load(FILE)[ENTRY], NEW)"
        )
    return Found(entries, dict(place))


def unwrapped(path: str, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return the weights under the names of the wrapped model, and a note on what was chosen or left out.

    The tensors are the same, not copies. A prefix is removed if all names have it, or nearly all. Names
    without it stay if they are of a model, and are left out otherwise. Of a student and a teacher, the
    teacher is taken. Raises ValueError if a weight is there with and without a prefix, and if there are
    several models.
    """
    weights = _renamed(path, weights, _without_inner)
    notes = []
    for _ in range(_MOST_LAYERS):
        prefix = _shared_prefix(path, weights)
        if not prefix:
            break
        if prefix in _ROLES:
            notes.append(f"the {prefix[:-1]}'s weights")
        weights, left = _taken(path, weights, prefix)
        if left:
            notes.append(f"{', '.join(map(shown, left[:4]))} left out")
    return weights, "; ".join(notes)


def _without_inner(name: str) -> str:
    for part in _INNER:
        # Only whole parts of a name: what comes before is nothing or ends with a dot.
        name = name.removeprefix(part).replace(f".{part}", ".")
    return name


def _renamed(path: str, weights: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        short = rename(name)
        if short in renamed:
            raise ValueError(
                f"{path} has weights twice, as {shown(name)} and under a name that means the same: "
                f"{validate.REMEDY}"
            )
        renamed[short] = weight
    return renamed


def _shared_prefix(path: str, weights: Mapping[str, Tensor]) -> str:
    """The prefix that nearly all names have, or the role that is taken; '' if there is none."""
    for prefix in _OUTER:
        _check_twice(path, weights, prefix)
    counts = Counter(name.partition(".")[0] + "." for name in weights if name != _COUNTER)
    for prefix in _OUTER:
        if _is_of_all(weights, prefix, counts):
            return prefix
    if sum(counts[role] for role in _ROLES) >= max(1, _NEARLY_ALL * counts.total()):
        return next(role for role in _ROLES if counts[role])
    for prefix in _OUTER:
        _check_one_model(path, weights, prefix)
    return ""


def _is_of_all(weights: Mapping[str, Tensor], prefix: str, counts: Counter[str]) -> bool:
    """Whether nearly all names have a prefix, or most have it and the others are of a model."""
    if not counts[prefix] or counts[prefix] >= _NEARLY_ALL * counts.total():
        return counts[prefix] > 0
    # A wrapped backbone, and a head beside it.
    others = [name for name in weights if not name.startswith(prefix)]
    return 2 * counts[prefix] > len(weights) and all(map(_is_of_a_model, others))


def _check_twice(path: str, weights: Mapping[str, Tensor], prefix: str) -> None:
    if any(name.startswith(prefix) and name.removeprefix(prefix) in weights for name in weights):
        raise ValueError(
            f"{path} has weights twice, with the prefix '{prefix}' and without: {validate.REMEDY}"
        )


def _check_one_model(path: str, weights: Mapping[str, Tensor], prefix: str) -> None:
    """Raise ValueError if most of the names under `prefix` are there under another prefix as well."""
    own = {name.removeprefix(prefix) for name in weights if name.startswith(prefix)}
    others: dict[str, set[str]] = {}
    for name in weights:
        first, _, rest = name.partition(".")
        if not name.startswith(prefix):
            for outer in _OUTER:
                rest = rest.removeprefix(outer)
            others.setdefault(f"{first}.", set()).add(rest)
    for other, names in others.items():
        if own and 2 * len(names & own) > len(own):
            raise ValueError(
                f"{path} holds several models, under the prefixes '{prefix}' and '{shown(other)}': save the "
                "state dict of one of them as the entry 'model'"
            )


def _taken(path: str, weights: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under `prefix` without it, with those of a model beside it; and the names left out."""
    kept = {}
    left = []
    for name, weight in weights.items():
        if name.startswith(prefix) or (prefix not in _ROLES and _is_of_a_model(name)):
            kept[name] = weight
        elif name != _COUNTER and not name.startswith(_ROLES):
            left.append(name)
    return _renamed(path, kept, lambda name: name.removeprefix(prefix)), left


def _is_of_a_model(name: str) -> bool:
    first = name.partition(".")[0]
    return first in _OF_A_MODEL or first.startswith("decoder_")


def without_backbone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under `backbone.`, without this prefix."""
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
