"""Positional labels: tokens learn where they come from (Zhang et al., AAAI 2023, arXiv 2206.04981).

Each file of `kinds/` defines one or more kinds of labels; `head.PositionalHead` combines the kinds of a
model. This file does not import torch, so that command lines can list the names at once.
"""

import ast
import functools
import itertools
from pathlib import Path

KINDS = Path(__file__).parent / "kinds"


@functools.cache
def label_names() -> tuple[str, ...]:
    """The names of all kinds: the string `name` of each class in `kinds/*.py`, in the order of the files.

    The names are read from the source text, because importing the files would import torch.
    """
    names = []
    for path in sorted(KINDS.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                names += _assigned_names(node)
    return tuple(names)


def _assigned_names(node: ast.ClassDef) -> list[str]:
    """The value of `name = "..."` in the body of a class, if there is one."""
    return [
        str(statement.value.value)
        for statement in node.body
        if isinstance(statement, ast.Assign)
        and ast.unparse(statement.targets[0]) == "name"
        and isinstance(statement.value, ast.Constant)
    ]


def label_choices() -> tuple[str, ...]:
    """The values of `pos_label` that command lines offer: none, each kind, and each pair of kinds."""
    pairs = itertools.combinations(label_names(), 2)
    return ("none", *label_names(), *("+".join(pair) for pair in pairs))
