"""Layouts of data sets: class folders, loose folders, lists of paths and uncompressed tars.

Every layout of the same images gives the same order, that of torchvision's ImageFolder: class, then folder,
then file name.
"""

import codecs
import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np

from util.data.formats import IMAGE_SUFFIXES
from util.data.formats.recognition import is_image_name
from util.data.sources.image_index import ImageIndex, NoSplit, some_names
from util.data.sources.listing import from_names, is_folder, list_folder, list_tars
from util.data.sources.listing_cache import Listing, load_listing, unpack_names
from util.data.sources.tars import COMPRESSED_SUFFIXES, compressed_error
from util.files.names import counted, printable
from util.files.regular import open_regular

# Names in lower case under which data sets keep their splits.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
PARENTS = 3  # folders above a path that may be the data set: it may name <data_path>/train/<class>/<image>
CHILDREN = 20  # a folder of more subfolders is not searched for a data set in one of them
MOVE = "Move the class folders into train/"
MAX_LINE = 1 << 16  # bytes; the longest path of Linux has 4096


def build_index(data_path: str | os.PathLike, split: str = "train", *, labels: bool = True) -> ImageIndex:
    """List the images of one split, in the first of these layouts that `data_path` has.

    1. `<data_path>/<split>/<class>/*` (recursive)
    2. `<data_path>/<split>.tar`
    3. `<data_path>/<split>-*.tar`
    4. for split "train" only: `data_path` is itself such a folder or tar, or a text file of paths. Paths are
       relative to the file's folder, blank lines and `#` comments are skipped, and the file's order is kept.

    The class is the first folder of an image's path. `labels=False` takes every image, loose ones too, with
    label -1. Hidden files and folders (`.name`) are skipped. The listing of tars and large folders is cached
    next to them if that is writable, and checked against sizes and modification times.

    Raises ValueError, with what was found, for a path without images in such a layout.
    """
    # Without a last slash, as names of caches are made by appending to the path.
    given = os.path.expanduser(os.fspath(data_path))
    if not given:
        raise ValueError("the path of the images is empty")
    path = given.rstrip("/") or "/"
    if not os.path.exists(path):
        raise ValueError(f"no such file or folder: {printable(path)}")
    if os.path.isdir(path):
        index = _index_folder(path, split, labels)
    else:
        index = _index_file(path, split, labels)
    _check_not_empty(index, split, labels)
    _check_classes(index)
    return index


def class_names(path: str | os.PathLike) -> list[str]:
    """Return the names of classes in the order of a classifier's outputs.

    `path` is a data set, or a text file with one name per line. Raises ValueError if it is neither, and for a
    name that is listed twice.
    """
    path = os.path.expanduser(os.fspath(path))
    if os.path.isdir(path) or path.lower().endswith(".tar"):
        try:
            return build_index(path, "val").classes
        except ValueError:
            # Only training images, or a folder of class folders.
            return build_index(path).classes
    if not os.path.isfile(path):
        raise ValueError(f"no such file or folder of classes: {path}")
    # Names that are not valid UTF-8 must not end the run.
    lines = (line.decode(errors="replace") for line in _text_lines(path))
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"{path} lists classes twice: {some_names(twice)}")
    return names


# --- folders ---


def _index_folder(path: str, split: str, labels: bool) -> ImageIndex:
    root = os.path.join(path, split)
    kind = "folder"
    if labels:
        kind = "class folders"
    if os.path.isdir(root):
        listing = _listed_folder(root, os.path.join(path, ".index", f"{split}.npz"))
        return ImageIndex(path, root, kind, listing, labels=labels)
    # Also a pipe of that name, which is then refused.
    if os.path.lexists(root + ".tar") and not os.path.isdir(root + ".tar"):
        return _index_tars(path, f"{split}.tar", [root + ".tar"], root + ".tar.index.npz", labels)
    cache = os.path.join(path, ".index", "root.npz")
    arrays: Listing | None = None
    if split == "train":
        arrays = load_listing(cache, path)  # before globbing, which would list a flat folder as well
    if arrays is None:
        shards = sorted(glob.glob(glob.escape(root) + "-*.tar"))
        if shards:
            return _index_tars(path, f"{len(shards)} tar shards", shards, root + ".index.npz", labels)
        _check_has_split(path, split)
        arrays = list_folder(path, cache)
    _check_not_a_parent(path, unpack_names(arrays["stamped"]), labels)
    return ImageIndex(path, path, kind, arrays, labels=labels)


def _listed_folder(root: str, cache: str) -> Listing:
    arrays = load_listing(cache, root)
    if arrays is None:
        arrays = list_folder(root, cache)
    return arrays


def _index_tars(path: str, kind: str, tars: list[str], cache: str, labels: bool) -> ImageIndex:
    return ImageIndex(path, os.path.dirname(tars[0]), kind, list_tars(tars, cache), tars, labels)


def _check_has_split(path: str, split: str) -> None:
    """Refuse a folder without the split: only training images may lie in the folder itself."""
    root = os.path.join(path, split)
    for file in glob.glob(glob.escape(root) + "*"):
        if file.lower().endswith(COMPRESSED_SUFFIXES):
            raise compressed_error(file)
    if split != "train":
        raise NoSplit(
            f"no {split}/, {split}.tar or {split}-*.tar in {printable(path)}: found {_contents(path)}. "
            f"{_remedy(path, labels=True)}"
        )


def _check_not_a_parent(path: str, folders: list[str], labels: bool) -> None:
    """Refuse a folder that has no train/ but holds whole data sets: it would mix training and validation."""
    # Folders that hold both train/ and a validation folder are whole data sets.
    train = {os.path.dirname(f) for f in folders if os.path.basename(f) == "train"}
    validation = {os.path.dirname(f) for f in folders if os.path.basename(f).lower() in SPLITS["val"]}
    nested = sorted(train & validation)
    remedy = _splits_remedy(path, folders, labels)
    if nested:
        remedy = f"Give {printable(os.path.join(path, nested[0]))}, which holds train/."
    if remedy:
        raise ValueError(f"{printable(path)} has no train/: found {_contents(path)}. {remedy}")


def _splits_remedy(path: str, folders: list[str], labels: bool) -> str:
    """Say how to rename the folders inside that are splits under other names; '' if there are none."""
    found = {split for split, names in SPLITS.items() if any(f.lower() in names for f in folders)}
    # In other capitals, one name alone may be a folder like others: Test/ beside Blood/.
    if len(found) < 2 and not any(f in (*SPLITS["val"], "training") for f in folders):
        return ""
    steps = _renames(path, labels)
    if labels:
        return f"{steps or MOVE}."
    steps = steps or "Rename the folder of the training images to train"
    return f"{steps}, or give the folder of the training images alone."


# --- files ---


def _index_file(path: str, split: str, labels: bool) -> ImageIndex:
    shown = printable(path)
    if os.fsencode(path).lower().endswith(IMAGE_SUFFIXES):
        raise ValueError(f"{shown} is a single image. {_remedy(path, labels)}")
    if split != "train":
        raise NoSplit(f"{shown} is one file and has no {split} images. {_remedy(path, labels=True)}")
    if path.lower().endswith(COMPRESSED_SUFFIXES):
        raise compressed_error(path)
    if path.lower().endswith(".tar"):
        return _index_tars(path, "tar", [path], path + ".index.npz", labels)
    names = _listed_paths(path)
    if not names:
        raise ValueError(f"{shown} lists no images: it needs one path per line.")
    if labels:
        found = f"{shown} is a list of {counted(len(names), 'path')}, which has no labels"
        raise ValueError(f"{found}. {_remedy(path, labels)}")
    root = os.path.dirname(os.path.abspath(path))
    # To check all paths would take minutes on a network file system. A wrong root shows at the first.
    first = os.path.join(root, os.fsdecode(names[0]))
    if not os.path.isfile(first):
        raise ValueError(
            f"the first path in {shown} does not exist: {printable(first)}. A list holds one path per line, "
            "relative to the list's folder, without a header or further columns."
        )
    return ImageIndex(path, root, "list of paths", from_names(names, sort=False), labels=False)


def _listed_paths(path: str) -> list[bytes]:
    """Return the lines of a text file without blank lines and comments."""
    lines = [line.strip() for line in _text_lines(path)]
    return [line for line in lines if line and not line.startswith(b"#")]


def _text_lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a text file without a byte order mark. Raises ValueError for a binary file."""
    with open_regular(path) as file:
        number = 0
        # A binary file without a line break would be read as a whole otherwise.
        while line := file.readline(MAX_LINE):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            # An image, for example, was given by mistake.
            if b"\0" in line or len(line) == MAX_LINE:
                raise ValueError(
                    f"{printable(path)} is not a folder, a .tar or a text file of one path per line: line "
                    f"{number} is binary or too long. Other formats of data sets are not read."
                )
            yield line


# --- checks of an index ---


def _place(index: ImageIndex) -> str:
    """Say where the images of an index lie."""
    if not index.tars:
        return index.root
    if len(index.tars) == 1:
        return index.tars[0]
    return f"{index.tars[0]} and the other shards"


def _check_not_empty(index: ImageIndex, split: str, labels: bool) -> None:
    """Raise ValueError for an index without images."""
    if len(index) > 0:
        return
    place = printable(_place(index))
    if index.ignored:
        unpacked = ""
        if split == "val":
            unpacked = ". ImageNet's archive unpacks flat, and a script known as valprep.sh moves its images"
        raise ValueError(
            f"{place} holds {counted(index.ignored, 'loose image')} and no class folders, which give the "
            f"labels: move every image to {split}/<class>/, with the same classes in train and val{unpacked}."
        )
    if index.tars:
        suffixes = ", ".join(os.fsdecode(suffix) for suffix in IMAGE_SUFFIXES)
        raise ValueError(f"no images in {place}: no member ends in {suffixes}.")
    raise ValueError(f"no images in {place}: found {_contents(index.root)}. {_remedy(index.path, labels)}")


def _check_classes(index: ImageIndex) -> None:
    """Raise ValueError for an index whose labels cannot be what the user meant."""
    place = _place(index)
    if not index.classes:
        return
    # An empty class folder shifts the numbers of all classes that follow.
    counts = np.bincount(index.labels, minlength=len(index.classes))
    empty = [name for name, count in zip(index.classes, counts) if count == 0]
    if empty:
        raise ValueError(
            f"class folders without images in {place}: {some_names(empty)}. Remove or fill them: "
            "an empty folder would still count as a class."
        )
    # Three names suffice: with a folder too many, all images lie too deep.
    few = (0, len(index) // 2, len(index) - 1)
    if len(index.classes) == 1 and all(index.name(i).count("/") > 1 for i in few):
        raise ValueError(
            f"the only class in {printable(place)} is {index.classes[0]!r} and its images lie deeper, as in "
            f"{printable(index.name(0))}: move them up by one folder, so that the first is the class."
        )


# --- what to do ---


def _remedy(path: str, labels: bool) -> str:
    """Say what to do about a path without the images that are needed, for errors.

    Without labels, training images alone suffice.
    """
    folder = os.path.abspath(path)
    near = _whole_set_near(folder)
    if near:
        return f"Give {printable(near)}, which holds train and val."
    if os.path.isdir(folder):
        steps = _renames(folder, labels)
        if steps:
            return f"{steps}."
    if labels:
        return (
            "Give a folder with {train,val}/<class>/*, or with uncompressed tars of <class>/*: "
            "{train,val}.tar or {train,val}-*.tar."
        )
    return (
        "Give a folder of images, nested or not, one .tar, a folder with train.tar or train-*.tar, or a text "
        "file of one path per line."
    )


def _whole_set_near(path: str) -> str:
    """Return the next folder above, or else the first one inside, that holds both splits; '' for none.

    Pretraining without validation images passes here: many folders inside must not cost a look at each.
    """
    candidates = [path]
    for _ in range(PARENTS):
        candidates.append(os.path.dirname(candidates[-1]))
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            inside = (entry.path for entry in entries if is_folder(entry))
            first = list(itertools.islice(inside, CHILDREN + 1))
        if len(first) <= CHILDREN:
            candidates += sorted(first)
    return next((each for each in candidates[1:] if not _missing(each)), "")


def _missing(folder: str) -> list[str]:
    """Return the splits that a folder holds neither as a folder nor as a tar."""
    found = []
    for split in SPLITS:
        place = os.path.join(folder, split)
        if not os.path.isdir(place) and not os.path.isfile(place + ".tar"):
            found.append(split)
    return found


def _renames(folder: str, labels: bool) -> str:
    """Say how to rename folders to the missing splits of a data set: "Rename valid to val". "" for none."""
    with os.scandir(folder) as entries:
        inside = list(entries)
    names = {entry.name.lower(): entry.name for entry in inside if is_folder(entry)}
    renames = []
    for split in _missing(folder):
        found = [names[name] for name in SPLITS[split] if name in names]
        if found:
            renames.append(f"{found[0]} to {split}")
    if not renames:
        return ""
    # Without training images, be they shards, the other folders are the classes.
    if labels and not any(entry.name.lower().startswith("train") for entry in inside):
        return f"{MOVE}, and rename {' and '.join(renames)}"
    return f"Rename {' and '.join(renames)}"


def _contents(folder: str) -> str:
    """Say what a folder holds, for errors."""
    with os.scandir(folder) as entries:
        visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    folders = [entry.name for entry in visible if is_folder(entry)]
    files = [entry.name for entry in visible if not is_folder(entry)]
    others = [name for name in files if not is_image_name(os.fsencode(name))]
    found = []
    if folders:
        found.append(f"{counted(len(folders), 'folder')} ({_first(folders)})")
    if len(files) > len(others):
        found.append(counted(len(files) - len(others), "image"))
    if others:
        found.append(f"{counted(len(others), 'other file')} ({_first(others)})")
    return ", ".join(found) or "nothing"


def _first(names: list[str]) -> str:
    """Return the first of many names."""
    if len(names) > 5:
        return f"{some_names(names[:5])}, ..."
    return some_names(names)
