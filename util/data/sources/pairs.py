"""Labels of WebDataset's tars: `0001.jpg` lies beside `0001.cls`, or `0001.json`, which holds its label.

The key of a member is its path up to the first dot of the file's name; the members of one key are one sample.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from util.data.formats import IMAGE_SUFFIXES
from util.files.names import printable
from util.files.regular import open_regular

MAX_CLS_BYTES = 64
MAX_JSON_BYTES = 64 << 10
# Fields of the JSON that may hold the label; the first one counts.
FIELDS = ("label", "cls", "class")
# Files beside the tars with the name of class i in line i + 1.
NAME_FILES = ("classes.txt", "classnames.txt")
MAX_NAMES_BYTES = 16 << 20
MAX_NAME = 1000  # bytes of a class name
MAX_FAULT = 2000  # characters of a message
# Of several images of one sample the first of these kinds is taken; these are WebDataset's and timm's.
FIRST_SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp")
SUFFIXES = (*FIRST_SUFFIXES, *(suffix for suffix in IMAGE_SUFFIXES if suffix not in FIRST_SUFFIXES))


class Label(NamedTuple):
    """The label in a member with the suffix `kind`: the class as text, or the reason why it has none."""

    text: str
    fault: str = ""
    kind: str = ".cls"


class Pairs(NamedTuple):
    """The samples of tars in WebDataset's form.

    Attributes:
        kept: positions of the images, one for each sample, in the given order.
        labels: of each kept image, an index into `classes`; -1 if there is a fault.
        classes: names of the classes, integers in their order.
        fault: why the labels cannot be used, or ''.
    """

    kept: list[int]
    labels: list[int]
    classes: list[bytes]
    fault: str


def split_key(name: bytes) -> tuple[bytes, bytes]:
    """Split a member's name into its key and its suffix: a/1.seg.png has the key a/1 and .seg.png."""
    folder, slash, file = name.rpartition(b"/")
    base, dot, rest = file.partition(b".")
    return folder + slash + base, dot + rest.lower()


def label_bytes(name: bytes) -> int:
    """Return how many bytes a member with a label may have; 0 for other members."""
    # Quickly, for most members are images.
    if not name.lower().endswith((b".cls", b".json")):
        return 0
    return {b".cls": MAX_CLS_BYTES, b".json": MAX_JSON_BYTES}.get(split_key(name)[1], 0)


def read_label(name: bytes, data: bytes | None) -> Label | None:
    """Return the label in a member; None for JSON without one.

    `data` is None if the member has more bytes than `label_bytes`.
    """
    if name.lower().endswith(b".cls"):
        return _cls_label(data)
    return _json_label(data)


def _cls_label(data: bytes | None) -> Label:
    if data is None:
        return Label("", f"has more than {MAX_CLS_BYTES} bytes")
    if not data.strip():
        return Label("", "is empty")
    if not re.fullmatch(rb"[0-9]+", data.strip()):
        return Label("", f"holds {data[:20]!r}")
    return Label(str(int(data)))


def _json_label(data: bytes | None) -> Label | None:
    if data is None:
        return Label("", f"has more than {MAX_JSON_BYTES} bytes", ".json")
    try:
        fields = json.loads(data)
    # Brackets a thousand deep exceed Python's stack.
    except (ValueError, RecursionError):
        return Label("", "is no JSON", ".json")
    if not isinstance(fields, dict):
        return None
    value = next((fields[field] for field in FIELDS if field in fields), None)
    if value is None:
        return None
    text = ""
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        text = str(value).strip()
    if isinstance(value, (list, dict)):
        return Label("", f"holds a {type(value).__name__} as its label", ".json")
    if not _is_name(text) or re.fullmatch("-[0-9]+", text):
        return Label("", f"holds the label {str(value)[:20]!r}", ".json")
    if re.fullmatch(r"[0-9]+", text):
        text = str(int(text))
    return Label(text, kind=".json")


def _is_name(text: str) -> bool:
    # Names are stored as bytes, with a zero between them.
    try:
        return 0 < len(text.encode()) <= MAX_NAME and "\0" not in text
    except UnicodeEncodeError:
        return False


def as_pairs(
    names: Sequence[bytes], shards: Sequence[int], labels: Sequence[Label | None], tars: Sequence[str]
) -> Pairs | None:
    """Return the samples of tars in WebDataset's form; None for tars in other forms.

    It is the form of tars that hold labels, and whose images do not lie in class folders: all of them lie in
    one folder, or in none.

    Args:
        names: of the images, those of one tar after the other.
        shards: number of the tar of each image.
        labels: of each image; None for one without a label.
        tars: paths, for messages.
    """
    if not any(map(_shows_form, labels)) or len(set(map(_first_folder, names))) > 1:
        return None
    kept: list[int] = []
    for _, of_tar in groupby(range(len(names)), lambda i: shards[i]):
        kept += _one_image_per_key(names, of_tar)
    known = [label.text for i in kept if (label := labels[i]) and not label.fault]
    if len(known) < len(kept):
        first = next(i for i in kept if not (label := labels[i]) or label.fault)
        fault = f"{printable(tars[shards[first]])}: {_fault(names[first], labels[first])}"
        return Pairs(kept, [-1] * len(kept), [], fault[:MAX_FAULT])
    classes = _sorted_classes(set(known))
    number = {name: i for i, name in enumerate(classes)}
    return Pairs(kept, [number[text] for text in known], [name.encode() for name in classes], "")


def _shows_form(label: Label | None) -> bool:
    """Tell whether a label shows WebDataset's form. JSON can be about anything; a .cls member is a label."""
    return label is not None and (bool(label.text) or label.kind == ".cls")


def _first_folder(name: bytes) -> bytes:
    folder, slash, _ = name.partition(b"/")
    return folder + slash if slash else b""


def _fault(name: bytes, label: Label | None) -> str:
    shown = printable(os.fsdecode(split_key(name)[0]))
    if label is None:
        return (
            f"{printable(os.fsdecode(name))} has no label: there is neither {shown}.cls nor {shown}.json "
            f"with {', '.join(FIELDS[:-1])} or {FIELDS[-1]}"
        )
    return f"{shown}{label.kind} {label.fault}, and should hold the label of the image, an integer from 0 on"


def _one_image_per_key(names: Sequence[bytes], numbers: Iterable[int]) -> list[int]:
    """Return those of the numbered images of one tar that are the images of their samples."""
    best: dict[bytes, tuple[tuple[int, int, bytes], int]] = {}
    for i in numbers:
        key, suffix = split_key(names[i])
        candidate = (_rank(suffix), i)
        if key not in best or candidate < best[key]:
            best[key] = candidate
    return sorted(i for _, i in best.values())


def _rank(suffix: bytes) -> tuple[int, int, bytes]:
    """Return the sort key of the images of a sample: whole suffixes first, then WebDataset's kinds."""
    last = suffix[suffix.rfind(b".") :]
    return suffix.count(b"."), SUFFIXES.index(last), suffix


def _sorted_classes(names: set[str]) -> list[str]:
    """Sort class names: by number if all are integers, else as text."""
    if all(map(_is_number, names)):
        return sorted(names, key=int)
    return sorted(names)


def _is_number(name: str) -> bool:
    return re.fullmatch("[0-9]+", name) is not None


def named_classes(classes: list[str], folder: str) -> list[str]:
    """Return the names of integer classes from a file of NAME_FILES in `folder`, if there is one.

    Equal names get the numbers of their classes, so that all names differ. Raises ValueError if the
    file has no line for a class.
    """
    if not all(map(_is_number, classes)):
        return classes
    for file in NAME_FILES:
        path = os.path.join(folder, file)
        if os.path.exists(path):
            return _names_of(classes, path)
    return classes


def _names_of(classes: list[str], path: str) -> list[str]:
    with open_regular(path) as file:
        lines = file.read(MAX_NAMES_BYTES).decode("utf-8-sig", "replace").rstrip().split("\n")
    names = [line.strip().replace("\0", "") for line in lines]
    missing = [name for name in classes if int(name) >= len(names) or not names[int(name)]]
    if missing:
        raise ValueError(
            f"{printable(path)} has {len(names)} lines and no name for the label {missing[0]}: the name of "
            "class i stands in line i + 1"
        )
    return _numbered([names[int(name)] for name in classes], classes)


def _numbered(names: list[str], labels: list[str]) -> list[str]:
    """Return names that all differ: names that were equal get the number of their class."""
    counts = Counter(names)
    taken = set(names)
    found = []
    for name, label in zip(names, labels):
        if counts[name] > 1:
            # The file may list a name with just this number.
            while name in taken:
                name += f" ({label})"
            taken.add(name)
        found.append(name)
    return found
