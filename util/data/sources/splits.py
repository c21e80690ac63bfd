"""Splits of a data set: which of its folders are splits, and a share of the training images as validation."""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator

import numpy as np

from util.data.formats import IMAGE_SUFFIXES
from util.data.sources.image_index import some_names
from util.data.sources.listing import composed, is_folder
from util.data.sources.lists import TABLES
from util.files.names import counted, printable
from util.flags.data_path import DataPath

# Names in lower case under which data sets keep their splits.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
CHILDREN = 20  # a folder of more subfolders is not searched for a data set in one of them
# Entries of a folder that are looked at: a folder may hold a million, and listing them takes minutes.
ENTRIES = 1000


def names_of(split: str, source: DataPath) -> tuple[str, ...]:
    """Return the names, in lower case, under which a split may lie."""
    if split == "val":
        return (*SPLITS["val"], source.val_split.lower())
    return SPLITS[split]


def missing_splits(folder: str, source: DataPath) -> list[str]:
    """Return the splits, train and val, that a folder holds neither as a folder, a tar nor a table."""
    missing = []
    for split, name in (("train", "train"), ("val", source.val_split)):
        place = os.path.join(folder, name)
        files = (place + suffix for suffix in (".tar", *TABLES))
        if not os.path.isdir(place) and not any(map(os.path.isfile, files)):
            missing.append(split)
    return missing


# --- names that are reserved for splits ---


def is_train_split(source: DataPath, labels: bool) -> bool:
    """Tell whether the folder train/ in a data set is the split, and not a class beside other classes.

    It is the split unless other folders beside it hold images and no other split is there. Only the first
    entries of folders are looked at. Raises ValueError if train/ may be either.
    """
    folders, files = _visible(source.path)
    splits = {*names_of("train", source), *names_of("val", source)}
    others = sorted(name for name in folders if name.lower() not in splits)
    # A folder with a train/ of its own is no class: it may hold the masks of these images.
    others = [name for name in others if not os.path.isdir(os.path.join(source.path, name, "train"))]
    if not others or _has_validation(source, folders, files):
        return True
    classes = [name for name in others[:CHILDREN] if _holds_images(os.path.join(source.path, name))]
    train = os.path.join(source.path, "train")
    if not classes or not _holds_images(train):
        return True
    inside, _ = _visible(train)
    # Images that lie in train/ itself would have no label.
    if labels and not inside:
        return False
    shown = printable(train)
    raise ValueError(
        f"{shown} is the training split, or a class beside {some_names(classes)}, which hold images, too. If "
        f"it is the split, give {shown} alone or move the other folders away; if it is a class, rename it."
    )


def _has_validation(source: DataPath, folders: list[str], files: list[str]) -> bool:
    """Tell whether validation images lie beside train/, as a folder, tars or a table."""
    names = names_of("val", source)
    if any(name.lower() in names for name in folders):
        return True
    # They may come after the first entries.
    if any(os.path.isdir(os.path.join(source.path, name)) for name in names):
        return True
    return any(file_split(file) in names for file in files)


def file_split(file: str) -> str:
    """Return the name of the split, in lower case, that a file would hold: "val" for val-000.tar."""
    stem, suffix = os.path.splitext(file.lower())
    if suffix == ".tar":
        return stem.partition("-")[0]
    if suffix in TABLES:
        return stem
    return ""


def _visible(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of folders and of other files among the first entries of a folder."""
    folders = []
    files = []
    with os.scandir(folder) as entries:
        for entry in itertools.islice(entries, ENTRIES):
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                folders.append(entry.name)
            else:
                files.append(entry.name)
    return folders, files


def holds_folders(folder: str) -> bool:
    """Tell whether there are folders among the first entries of a folder."""
    return bool(_visible(folder)[0])


def _holds_images(folder: str) -> bool:
    """Tell whether the first entries of a folder, or of the first folders in it, are images."""
    inside, files = _visible(folder)
    if _some_image(files):
        return True
    return any(_some_image(_visible(os.path.join(folder, name))[1]) for name in sorted(inside)[:3])


def _some_image(files: Iterable[str]) -> bool:
    return any(os.fsencode(file).lower().endswith(IMAGE_SUFFIXES) for file in files)


# --- a share that is held out ---


def held_out(names: list[bytes], groups: list[bytes], share: float) -> np.ndarray:
    """Choose the images that are held out for validation: a boolean array (n,).

    Of each group the images with the smallest hash of their name are taken: `share` of them, at least one of
    two or more, and never all. So the same images are taken in every layout, on every rank and in every run.

    Args:
        names: of the images; names that differ in Unicode's forms only count as the same.
        groups: the class of each image, b"" without one.
    """
    members: dict[bytes, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    chosen = np.zeros(len(names), bool)
    for images in members.values():
        count = min(max(1, int(share * len(images) + 0.5)), len(images) - 1)
        ranked = sorted(images, key=lambda i: (hashlib.sha256(composed(names[i])).digest(), names[i]))
        chosen[ranked[:count]] = True
    return chosen


def without_common_folder(names: list[bytes]) -> list[bytes]:
    """Return names relative to the deepest folder that holds them all: a list may lie anywhere above."""
    folders = {os.path.dirname(name) for name in names}
    # Absolute and relative names have no folder in common.
    if len({name.startswith(b"/") for name in folders}) != 1:
        return names
    common = os.path.commonpath(folders)
    if not common:
        return names
    start = len(common.rstrip(b"/")) + 1
    return [name[start:] for name in names]


def with_class(names: list[bytes], classes: list[bytes]) -> list[bytes]:
    """Return the names that images have in class folders, of images whose classes a table gives."""
    return list(_with_class(without_common_folder(names), classes))


def _with_class(names: list[bytes], classes: list[bytes]) -> Iterator[bytes]:
    for name, owner in zip(names, classes):
        if not owner or name.startswith(owner + b"/"):
            yield name
        else:
            yield owner + b"/" + name


def describe_share(count: int, share: float) -> str:
    """Say in a summary that images were held out."""
    return f"{counted(count, 'image')} held out for validation, {100 * share:g}% of each class"
