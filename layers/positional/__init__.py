"""Positional labels: tokens learn where they come from (Zhang et al., AAAI 2023, arXiv 2206.04981).

Each file of `kinds/` defines one or more kinds of labels; `head.PositionalHead` combines the kinds of a
model. This file does not import torch, so that command lines can list the names at once.
"""

import functools
import itertools
import re
from pathlib import Path

KINDS = Path(__file__).parent / "kinds"


@functools.cache
def label_names() -> tuple[str, ...]:
    """The names of all kinds: the string `name` of each class in `kinds/*.py`, in the order of the files.

    The names are read from the source text, because importing the files would import torch.
    """
    texts = [path.read_text() for path in sorted(KINDS.glob("*.py"))]
    return tuple(re.findall(r'^    name = "(\w+)"$', "\n".join(texts), re.MULTILINE))


def label_choices() -> tuple[str, ...]:
    """The values of `pos_label` that command lines offer: none, each kind, and each pair of kinds."""
    pairs = itertools.combinations(label_names(), 2)
    return ("none", *label_names(), *("+".join(pair) for pair in pairs))
