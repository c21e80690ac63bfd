"""Layouts of data sets: class folders, loose folders, lists of paths and uncompressed tars.

Every layout of the same images gives the same order, that of torchvision's ImageFolder: class, then folder,
then file name.
"""

import codecs
import glob
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np

from util.data.formats import IMAGE_SUFFIXES
from util.data.sources.image_index import ImageIndex, NoSplit, some_names
from util.data.sources.listing import from_names, is_folder, list_folder, list_tars
from util.data.sources.listing_cache import Listing, load_listing, unpack_names
from util.data.sources.tars import COMPRESSED_SUFFIXES, compressed_error
from util.files.names import printable
from util.files.regular import open_regular

LAYOUTS = """Layouts that work:
  <data_path>/{train,val}/<class>/*.jpg, as ImageNet
  <data_path>/{train,val}.tar, or shards {train,val}-*.tar: uncompressed, members <class>/<name>
  for training also <data_path>/<class>/*.jpg, or one .tar file
  for training without labels also a folder of images, nested or not, or a text file of paths, one per line"""
VALIDATION = {"val", "valid", "validation", "test"}
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
    path = os.path.expanduser(os.fspath(data_path)).rstrip("/") or "/"
    if not os.path.exists(path):
        raise _misplaced(f"no such file or folder: {path}")
    if os.path.isdir(path):
        index = _index_folder(path, split, labels)
    else:
        index = _index_file(path, split, labels)
    _check_not_empty(index, split)
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
    _check_not_a_parent(path, unpack_names(arrays["stamped"]))
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
            f"no {split}/, {split}.tar or {split}-*.tar in {path}: found {_contents(path)}.\n{LAYOUTS}"
        )


def _check_not_a_parent(path: str, folders: list[str]) -> None:
    """Refuse a folder that has no train/ but holds whole data sets: it would mix training and validation."""
    other = sorted(f for f in folders if f in VALIDATION | {"training"})
    if other:
        raise _misplaced(
            f"{path} has no train/ but {some_names(other)}: found {_contents(path)}. Rename the training "
            "folder to train/, or give it as the path."
        )
    # Folders that hold both train/ and a validation folder are whole data sets.
    train = {os.path.dirname(f) for f in folders if os.path.basename(f) == "train"}
    validation = {os.path.dirname(f) for f in folders if os.path.basename(f) in VALIDATION}
    nested = sorted(train & validation)
    if nested:
        raise _misplaced(
            f"{path} has no train/: found {_contents(path)}. Did you mean {os.path.join(path, nested[0])}, "
            "which holds train/ and a validation folder?"
        )


# --- files ---


def _index_file(path: str, split: str, labels: bool) -> ImageIndex:
    if split != "train":
        raise NoSplit(
            f"{path} is one file, which serves for training only; for {split} give the folder that holds "
            f"{split}/ or {split}.tar.\n{LAYOUTS}"
        )
    if path.lower().endswith(COMPRESSED_SUFFIXES):
        raise compressed_error(path)
    if path.lower().endswith(".tar"):
        return _index_tars(path, "tar", [path], path + ".index.npz", labels)
    names = _listed_paths(path)
    if not names:
        raise _misplaced(f"{path} lists no images.")
    if labels:
        raise _misplaced(
            f"{path} is a list of {len(names)} paths, which has no labels; they come from class folders."
        )
    root = os.path.dirname(os.path.abspath(path))
    # To check all paths would take minutes on a network file system. A wrong root shows at the first.
    first = os.path.join(root, os.fsdecode(names[0]))
    if not os.path.isfile(first):
        raise ValueError(
            f"the first path in {path} does not exist: {first}. Paths are relative to the list's folder."
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
                raise _misplaced(
                    f"{printable(path)} is not a folder, a .tar or a text file of image paths: line {number} "
                    "is binary or too long."
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


def _check_not_empty(index: ImageIndex, split: str) -> None:
    """Raise ValueError for an index without images."""
    if len(index) > 0:
        return
    place = _place(index)
    if index.ignored:
        loose = f"{place} holds {index.ignored} loose images and no class folders, so they have no labels."
        if split == "train":
            raise _misplaced(loose)
        raise ValueError(
            f"{loose} ImageNet's validation archive unpacks flat: move every image to {split}/<class>/, with "
            "the same class folders as train/ (a script known as valprep.sh does it)."
        )
    if index.tars:
        raise _misplaced(f"no images in {place}.")
    raise _misplaced(f"no images in {place}: found {_contents(index.root)}.")


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
        raise _misplaced(
            f"the only class in {place} is {index.classes[0]!r} and its images lie deeper, as in "
            f"{index.name(0)}: they seem to be one folder too deep."
        )


def _misplaced(message: str) -> ValueError:
    return ValueError(f"{message}\n{LAYOUTS}")


def _contents(folder: str) -> str:
    """Say what a folder holds, for errors."""
    with os.scandir(folder) as entries:
        visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    folders = [entry.name for entry in visible if is_folder(entry)]
    files = [entry.name for entry in visible if not is_folder(entry)]
    others = [name for name in files if not os.fsencode(name).lower().endswith(IMAGE_SUFFIXES)]
    found = f"{_counted(folders, 'folders')} and {len(files) - len(others)} images"
    if others:
        found += f" and {_counted(others, 'other files')}"
    return found


def _counted(names: list[str], noun: str) -> str:
    if not names:
        return f"0 {noun}"
    return f"{len(names)} {noun}: {some_names(names)}"
