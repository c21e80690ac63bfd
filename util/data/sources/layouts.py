"""Layouts of data sets: class folders, loose folders, lists of paths, tables and uncompressed tars.

Every layout of the same images gives the same order, that of torchvision's ImageFolder: class, then folder,
then file name.
"""

import contextlib
import glob
import itertools
import os
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from util.data.formats import IMAGE_SUFFIXES
from util.data.recognition import is_image_name
from util.data.sources.image_index import ImageIndex, NoSplit, some_names
from util.data.sources.listing import (
    class_of,
    composed,
    from_names,
    is_folder,
    list_folder,
    list_tars,
    names_in,
    selected,
    with_class_depth,
)
from util.data.sources.listing_cache import Listing, load_listing, pack_names, unpack_names
from util.data.sources.lists import (
    TABLES,
    Table,
    check_labels,
    folder_of,
    is_plain_list,
    listed_paths,
    names_paths,
    read_table,
    table_beside,
    text_lines,
)
from util.data.sources.pairs import named_classes
from util.data.sources.remote import local_copy
from util.data.sources.splits import (
    CHILDREN,
    SPLITS,
    describe_share,
    file_split,
    held_out,
    holds_folders,
    is_train_split,
    missing_splits,
    names_of,
    with_class,
    without_common_folder,
)
from util.data.sources.tars import COMPRESSED_SUFFIXES, compressed_error
from util.files.names import counted, printable
from util.flags.data_path import VAL_SPLIT, DataPath
from util.flags.groups import is_remote_path

PARENTS = 3  # folders above a path that may be the data set: it may name <data_path>/train/<class>/<image>
MOVE = "Move the class folders into train/"


class _Wanted(NamedTuple):
    """The images that are looked for: one split of a data set, with labels or without."""

    source: DataPath
    split: str
    labels: bool

    @property
    def path(self) -> str:
        return self.source.path

    @property
    def name(self) -> str:
        """The name of the split's folder."""
        if self.split == "val":
            return self.source.val_split
        return self.split

    def missing(self, message: str) -> ValueError:
        """Return the error for data without this split. A name that was given must be there."""
        if self.split == "val" and self.source.val_split != VAL_SPLIT:
            return ValueError(message)
        return NoSplit(message)


class _Found(NamedTuple):
    """The images that were found.

    Attributes:
        root: the folder that names are relative to.
        kind: the layout, in words.
        classes_from: where the class of an image comes from: "folders" of its name, "table", "pairs" of
            members, or "nothing".
    """

    root: str
    kind: str
    arrays: Listing
    tars: list[str] = []
    classes_from: str = "folders"


def build_index(data_path: str | os.PathLike, split: str = "train", *, labels: bool = True) -> ImageIndex:
    """List the images of one split, in the first of these layouts that `data_path` has.

    1. `<data_path>/<split>/<class>/*` (recursive)
    2. `<data_path>/<split>.tar`
    3. `<data_path>/<split>-*.tar`
    4. `<data_path>/<split>.csv` or `.tsv`: a table of paths and labels, see `read_table`. Paths are relative
       to the table's folder, or to images/ or <split>/ in it.
    5. `data_path` is itself such a table, maybe with a column of splits.
    6. for split "train" only: `data_path` is itself such a folder or tar, or a text file of paths. Paths are
       relative to the file's folder, blank lines and `#` comments are skipped, and the file's order is kept.

    A `DataPath` can give "val" another name, hold out a share of the training images as "val", and take the
    class from several folders. Otherwise the class is the first folder of an image's path. Its name is kept
    in Unicode's composed form. In tars without such folders it may lie beside the image, as WebDataset has
    it: `0001.jpg` with an integer in `0001.cls`, or with `label`, `cls` or `class` in `0001.json`. The names
    of these classes are the integers, in their order, or come from `classes.txt` or `classnames.txt` beside
    the tars. The images of a table are sorted like those of folders, not as in the file. `labels=False` takes
    every image, loose ones too, with label -1. Hidden files and folders (`.name`) are skipped. The listing of
    tars and large folders is cached next to them if that is writable, and checked against sizes and
    modification times.

    An address in an object store, as s3://bucket/folder, may have the layouts 2 and 3, or name one tar; see
    `util.data.sources.remote`.

    A folder train/ is the split, except as one class folder among others: if it holds loose images, others
    beside it hold images too, and there is no validation folder.

    Raises ValueError, with what was found, for a path without images in such a layout, for one that can be
    read in two ways, and for an empty class folder among training images. Classes may have no validation
    images.
    """
    source = DataPath.of(data_path)
    # Without a last slash, as names of caches are made by appending to the path.
    given = os.path.expanduser(source.path)
    if not given:
        raise ValueError("the path of the images is empty")
    if is_remote_path(given):
        return _index_remote(source, given, split, labels)
    return _build(replace(source, path=given.rstrip("/") or "/"), split, labels)


def _build(source: DataPath, split: str, labels: bool) -> ImageIndex:
    """`build_index` of a path that is complete."""
    if not os.path.exists(source.path):
        raise ValueError(f"no such file or folder: {printable(source.path)}")
    wanted = _Wanted(source, split, labels)
    shared = source.val_share > 0 and split in SPLITS
    if shared:
        _check_no_validation(source)
        wanted = wanted._replace(split="train")
    found = _find(wanted)
    index = _index(found, wanted)
    _check_not_empty(index, wanted)
    if labels:
        _check_classes(index, found, wanted)
    if shared:
        return _index(_part(found, wanted, split == "val"), wanted)
    return index


def _index_remote(source: DataPath, given: str, split: str, labels: bool) -> ImageIndex:
    """`build_index` of the local copy of tars in an object store."""
    name = split
    if split == "val":
        name = source.val_split
    if source.val_share > 0:
        name = "train"
    copy = local_copy(given, name, source.data_cache)
    index = build_index(replace(source, path=copy), split, labels=labels)
    # For messages, and as it was given.
    index.path = given
    return index


def class_names(path: str | os.PathLike) -> list[str]:
    """Return the names of classes in the order of a classifier's outputs.

    `path` is a data set, or a text file with one name per line. Raises ValueError if it is neither, and for a
    name that is listed twice.
    """
    source = DataPath.of(path)
    file = os.path.expanduser(source.path)
    # Validation images may lack some classes.
    trained = training_classes(source)
    if trained:
        return trained
    if os.path.isdir(file) or file.lower().endswith(".tar"):
        try:
            return build_index(source, "val").classes
        except ValueError:
            # Only training images, or a folder of class folders.
            return build_index(source).classes
    if not os.path.isfile(file):
        raise ValueError(f"no such file or folder of classes: {file}")
    # Names that are not valid UTF-8 must not end the run.
    lines = (composed(line).decode(errors="replace") for line in text_lines(file))
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"{file} lists classes twice: {some_names(twice)}")
    return names


def training_classes(data_path: str | os.PathLike) -> list[str]:
    """Return the names of the classes of a data set's training images, sorted; [] if it has none.

    In a folder they are read from the names of the class folders, which takes no listing of the images. For
    an address in an object store the result is [], because the tars would have to be downloaded.
    """
    source = DataPath.of(data_path)
    path = os.path.expanduser(source.path)
    if is_remote_path(path):
        return []
    root = os.path.join(path, "train")
    # A set that cannot be read is reported where its images are needed.
    with contextlib.suppress(OSError, ValueError):
        if os.path.isdir(root) and source.depth == 1 and not source.val_share:
            with os.scandir(os.fsencode(root)) as entries:
                inside = {composed(entry.name) for entry in entries if is_folder(entry)}
            return [os.fsdecode(name) for name in sorted(inside) if not name.startswith(b".")]
        is_table = path.lower().endswith(TABLES)
        if is_table or source.val_share or glob.glob(glob.escape(root) + "*"):
            return build_index(source).classes
    return []


def _find(wanted: _Wanted) -> _Found:
    if os.path.isdir(wanted.path):
        found = _find_in_folder(wanted)
    else:
        found = _find_in_file(wanted)
    depth = wanted.source.depth
    # Without labels, classes matter only to hold out a share of each.
    if depth > 1 and found.classes_from == "folders" and (wanted.labels or wanted.source.val_share):
        return found._replace(arrays=with_class_depth(found.arrays, depth))
    return found


def _index(found: _Found, wanted: _Wanted) -> ImageIndex:
    return ImageIndex(wanted.path, found.root, found.kind, found.arrays, found.tars, wanted.labels)


# --- folders ---


def _find_in_folder(wanted: _Wanted) -> _Found:
    path = wanted.path
    root = os.path.join(path, wanted.name)
    kind = "folder"
    if wanted.labels:
        kind = "class folders"
    if os.path.isdir(root):
        if wanted.name != "train" or is_train_split(wanted.source, wanted.labels):
            return _find_in_split(wanted, root, kind)
        kind += ", of which train is one"
    found = _find_files(wanted, root, kind)
    if found is None:
        _check_has_split(wanted)
        found = _whole_folder(wanted, kind, list_folder(path, _cache_of_whole(path)))
    return found


def _find_files(wanted: _Wanted, root: str, kind: str) -> _Found | None:
    """Return the images of a split that are in tars or in a table, or of a folder that a cache lists."""
    found = _find_tar(wanted, root)
    table = table_beside(root)
    # Before globbing, which would list a flat folder as well.
    if found is None and not table:
        found = _listed_before(wanted, kind)
    if found is None:
        found = _find_shards(wanted, root)
    # Without labels, a table that lists no images, of boxes for example, is left alone.
    if found is None and table and (wanted.labels or names_paths(table)):
        found = _from_table(wanted, read_table(table))
    return found


def _find_tar(wanted: _Wanted, root: str) -> _Found | None:
    # Also a pipe of that name, which is then refused.
    if os.path.lexists(root + ".tar") and not os.path.isdir(root + ".tar"):
        return _tars(wanted, f"{wanted.name}.tar", [root + ".tar"], root + ".tar.index.npz")
    return None


def _find_shards(wanted: _Wanted, root: str) -> _Found | None:
    shards = sorted(glob.glob(glob.escape(root) + "-*.tar"))
    if shards:
        return _tars(wanted, f"{len(shards)} tar shards", shards, root + ".index.npz")
    return None


def _listed_before(wanted: _Wanted, kind: str) -> _Found | None:
    """Return the images of a folder without splits, if a cache holds its listing."""
    arrays = None
    if wanted.split == "train":
        arrays = load_listing(_cache_of_whole(wanted.path), wanted.path)
    if arrays is None:
        return None
    return _whole_folder(wanted, kind, arrays)


def _cache_of_whole(path: str) -> str:
    return os.path.join(path, ".index", "root.npz")


def _find_in_split(wanted: _Wanted, root: str, kind: str) -> _Found:
    """Return the images of the folder of a split; a table beside it may have the labels of loose images."""
    table = table_beside(root)
    if table and wanted.labels and not holds_folders(root):
        return _from_table(wanted, read_table(table))
    cache = os.path.join(wanted.path, ".index", f"{wanted.name}.npz")
    arrays = load_listing(cache, root)
    if arrays is None:
        arrays = list_folder(root, cache)
    return _Found(root, kind, arrays)


def _whole_folder(wanted: _Wanted, kind: str, arrays: Listing) -> _Found:
    _check_not_a_parent(wanted, unpack_names(arrays["stamped"]))
    return _Found(wanted.path, kind, arrays)


def _with_class_names(arrays: Listing, folder: str) -> Listing:
    """Return a listing of pairs with the names of its classes. Raises ValueError if labels are missing."""
    fault = arrays["fault"].tobytes().decode(errors="replace")
    if fault:
        raise ValueError(printable(fault))
    # The file of names may change without the tars, so it is no part of the listing.
    classes = named_classes(unpack_names(arrays["classes"]), folder)
    return arrays | {"classes": pack_names([os.fsencode(name) for name in classes])}


def _tars(wanted: _Wanted, kind: str, tars: list[str], cache: str) -> _Found:
    folder = os.path.dirname(tars[0])
    arrays = list_tars(tars, cache)
    if not len(arrays["paired"]):
        return _Found(folder, kind, arrays, tars)
    # To hold out a share of each class takes labels, too.
    if wanted.labels or wanted.source.val_share:
        arrays = _with_class_names(arrays, folder)
    return _Found(folder, f"{kind}, labels beside the images", arrays, tars, "pairs")


def _check_no_validation(source: DataPath) -> None:
    """Raise ValueError if a data set, of which a share is to be held out, has validation images already."""
    root = os.path.join(source.path, source.val_split)
    places = [root, *(root + suffix for suffix in (".tar", *TABLES))]
    there = [place for place in places if os.path.exists(place)]
    there += sorted(glob.glob(glob.escape(root) + "-*.tar"))
    if there:
        raise ValueError(
            f"`val_share` {source.val_share:g} holds out training images, and there are validation images "
            f"already: {printable(there[0])}. Leave `val_share` out"
        )


def _check_has_split(wanted: _Wanted) -> None:
    """Refuse a folder without the split: only training images may lie in the folder itself."""
    name = wanted.name
    root = os.path.join(wanted.path, name)
    for file in glob.glob(glob.escape(root) + "*"):
        if file.lower().endswith(COMPRESSED_SUFFIXES):
            raise compressed_error(file)
    if wanted.split != "train":
        raise wanted.missing(
            f"no {name}/, {name}.tar, {name}-*.tar or {name}.csv in {printable(wanted.path)}: found "
            f"{_contents(wanted.path)}. {_remedy(wanted)}"
        )


def _check_not_a_parent(wanted: _Wanted, folders: list[str]) -> None:
    """Refuse a folder that has no train/ but holds whole data sets: it would mix training and validation."""
    path = wanted.path
    # Folders that hold both train/ and a validation folder are whole data sets.
    train = {os.path.dirname(f) for f in folders if os.path.basename(f) == "train"}
    names = names_of("val", wanted.source)
    validation = {os.path.dirname(f) for f in folders if os.path.basename(f).lower() in names}
    nested = sorted(train & validation)
    remedy = _splits_remedy(wanted, [f for f in folders if "/" not in f and f != "."])
    if nested:
        remedy = f"Give {printable(os.path.join(path, nested[0]))}, which holds train/."
    if remedy:
        raise ValueError(f"{printable(path)} has no train/: found {_contents(path)}. {remedy}")


def _splits_remedy(wanted: _Wanted, folders: list[str]) -> str:
    """Say how to rename the folders inside that are splits under other names; '' if there are none."""
    validation = names_of("val", wanted.source)
    train = names_of("train", wanted.source)
    lower = {f.lower() for f in folders}
    # In other capitals, one name alone may be a folder like others: Test/ beside Blood/.
    alone = [f for f in folders if f in (*validation, "training")]
    if not alone and (lower.isdisjoint(validation) or lower.isdisjoint(train)):
        return ""
    steps = _renames(wanted)
    other = _class_of_that_name(alone, [f for f in folders if f.lower() not in (*validation, *train)])
    if wanted.labels:
        return f"{steps or MOVE}.{other}"
    steps = steps or "Rename the folder of the training images to train"
    return f"{steps}, or give the folder of the training images alone.{other}"


def _class_of_that_name(named: list[str], classes: list[str]) -> str:
    """Say what to do if a folder named as a split is a class; '' if there are no other class folders."""
    if not named or not classes:
        return ""
    shown = printable(named[0])
    return f" If {shown} is a class like {printable(classes[0])}, rename it: its name stands for a split."


# --- files ---


def _find_in_file(wanted: _Wanted) -> _Found:
    path = wanted.path
    shown = printable(path)
    if os.fsencode(path).lower().endswith(IMAGE_SUFFIXES):
        raise ValueError(f"{shown} is a single image. {_remedy(wanted)}")
    if path.lower().endswith(TABLES) and (wanted.labels or not is_plain_list(path)):
        return _from_table(wanted, _rows(wanted, read_table(path)))
    if wanted.split != "train":
        raise wanted.missing(
            f"{shown} is one file and has no {wanted.name} images. {_remedy(wanted._replace(labels=True))}"
        )
    if path.lower().endswith(COMPRESSED_SUFFIXES):
        raise compressed_error(path)
    if path.lower().endswith(".tar"):
        return _tars(wanted, "tar", [path], path + ".index.npz")
    names = listed_paths(path)
    if not names:
        raise ValueError(f"{shown} lists no images: it needs one path per line.")
    if wanted.labels:
        found = f"{shown} is a list of {counted(len(names), 'path')}, which has no labels"
        raise ValueError(f"{found}. {_remedy(wanted)}")
    root = os.path.dirname(os.path.abspath(path))
    # To check all paths would take minutes on a network file system. A wrong root shows at the first.
    first = os.path.join(root, os.fsdecode(names[0]))
    if not os.path.isfile(first):
        raise ValueError(
            f"the first path in {shown} does not exist: {printable(first)}. A list holds one path per line, "
            "relative to the list's folder, without a header or further columns; a table (.csv) has both."
        )
    return _Found(root, "list of paths", from_names(names, sort=False), classes_from="nothing")


def _rows(wanted: _Wanted, table: Table) -> Table:
    """Return the rows of the split in a table of a whole data set. Raises ValueError if there are none."""
    shown = printable(table.file)
    if table.splits is None:
        if wanted.split != "train":
            remedy = _remedy(wanted._replace(labels=True))
            raise wanted.missing(f"{shown} has no column `split` and no {wanted.name} images. {remedy}")
        return table
    there = sorted(set(table.splits))
    source = wanted.source
    if source.val_share and source.val_split in there:
        raise ValueError(
            f"`val_share` {source.val_share:g} holds out training images, and {shown} has {source.val_split} "
            "images already: leave `val_share` out"
        )
    if wanted.name in there:
        return table.rows(wanted.name)
    remedy = f"Its splits are {some_names(there)}"
    others = [name for name in there if name.lower() in SPLITS["val"]]
    if wanted.split == "val" and others:
        remedy += f": give `val_split` {printable(others[0])}"
    raise wanted.missing(f"{shown} has no {wanted.name} images. {remedy}.")


def _from_table(wanted: _Wanted, table: Table) -> _Found:
    """Return the images of a table, in the order that they would have in class folders."""
    if not table.names:
        raise ValueError(f"{printable(table.file)} lists no images: it has a header and no further lines.")
    if wanted.labels:
        check_labels(table)
        if wanted.source.depth > 1:
            raise ValueError(
                f"`class_depth` {wanted.source.depth} takes the class from folders, and "
                f"{printable(table.file)} has it in a column: leave `class_depth` out"
            )
    kind = f"table, {table.columns}"
    root = folder_of(table)
    if table.classes is None:
        return _Found(root, kind, from_names(table.names), classes_from="nothing")
    arrays = from_names(table.names, classes=[owner or None for owner in table.classes])
    return _Found(root, kind, arrays, classes_from="table")


# --- a share that is held out ---


def _part(found: _Found, wanted: _Wanted, validation: bool) -> _Found:
    """Return the images that are held out for validation, or the others.

    Raises ValueError if no class has two images.
    """
    share = wanted.source.val_share
    chosen = held_out(*_named(found, wanted.source.depth), share)
    if not chosen.any():
        raise ValueError(
            f"`val_share` {share:g} holds out no image of {printable(wanted.path)}: no class has two images"
        )
    held = describe_share(int(chosen.sum()), share)
    part = chosen
    if not validation:
        part = ~chosen
    return found._replace(arrays=selected(found.arrays, np.flatnonzero(part)), kind=f"{found.kind}; {held}")


def _named(found: _Found, depth: int) -> tuple[list[bytes], list[bytes]]:
    """Return the names and the classes that the images have, or would have, in class folders."""
    names = names_in(found.arrays)
    if found.classes_from == "nothing":
        names = without_common_folder(names)
        return names, [class_of(name, depth) or b"" for name in names]
    # The last one is that of label -1.
    classes = [*map(os.fsencode, unpack_names(found.arrays["classes"])), b""]
    owners = [classes[label] for label in found.arrays["labels"].tolist()]
    if found.classes_from == "table":
        names = with_class(names, owners)
    return names, owners


# --- checks of an index ---


def _place(index: ImageIndex) -> str:
    """Say where the images of an index lie."""
    if not index.tars:
        return index.root
    if len(index.tars) == 1:
        return index.tars[0]
    return f"{index.tars[0]} and the other shards"


def _check_not_empty(index: ImageIndex, wanted: _Wanted) -> None:
    """Raise ValueError for an index without images."""
    if len(index) > 0:
        return
    place = printable(_place(index))
    if index.ignored and wanted.source.depth > 1:
        depth = wanted.source.depth
        raise ValueError(
            f"`class_depth` {depth} takes the class from {depth} folders, and no image in {place} lies in as "
            "many: give a smaller number"
        )
    if index.ignored and index.tars:
        raise ValueError(
            f"{place} holds {counted(index.ignored, 'image')} without a label: neither in class folders, as "
            "<class>/0001.jpg, nor in WebDataset's form, as 0001.jpg beside 0001.cls"
        )
    if index.ignored:
        unpacked = ""
        if wanted.split == "val":
            unpacked = ". ImageNet's archive unpacks flat, and a script known as valprep.sh moves its images"
        raise ValueError(
            f"{place} holds {counted(index.ignored, 'loose image')} and no class folders, which give the "
            f"labels: move every image to {wanted.name}/<class>/, with the same classes in train and "
            f"{wanted.source.val_split}{unpacked}."
        )
    if index.tars:
        suffixes = ", ".join(os.fsdecode(suffix) for suffix in IMAGE_SUFFIXES)
        raise ValueError(f"no images in {place}: no member ends in {suffixes}.")
    raise ValueError(f"no images in {place}: found {_contents(index.root)}. {_remedy(wanted)}")


def _check_classes(index: ImageIndex, found: _Found, wanted: _Wanted) -> None:
    """Raise ValueError for an index whose labels cannot be what the user meant."""
    place = printable(_place(index))
    source = wanted.source
    empty = index.without_images()
    # A rare class may have no image to validate on. It must have some to learn from.
    if empty and wanted.split == "train":
        raise ValueError(
            f"class folders without images in {place}: {some_names(empty)}. Remove or fill them: "
            "an empty folder would still count as a class."
        )
    if found.classes_from != "folders":
        return
    _check_twins(index, source.depth)
    if source.class_depth is not None:
        return
    # Three names suffice: with a folder too many, all images lie too deep.
    few = (0, len(index) // 2, len(index) - 1)
    if len(index.classes) == 1 and all(index.name(i).count("/") > 1 for i in few):
        raise ValueError(
            f"the only class in {place} is {index.classes[0]!r} and its images lie deeper, as in "
            f"{printable(index.name(0))}: move them up by one folder, so that the first is the class, or "
            "give `class_depth` 2."
        )
    _check_depth(index)


def _check_twins(index: ImageIndex, depth: int) -> None:
    """Raise ValueError for two class folders whose names differ in Unicode's forms only."""
    ends = np.searchsorted(index.labels, np.arange(len(index.classes)), side="right").tolist()
    for name, start, end in zip(index.classes, [0, *ends], ends):
        if name.isascii():
            continue
        # Images of a class are sorted by folder, so that its first and last one suffice.
        folders = [class_of(os.fsencode(index.name(i)), depth) for i in (start, end - 1)]
        if folders[0] != folders[1]:
            raise ValueError(
                f"{printable(_place(index))} holds two class folders {printable(name)}, whose names differ "
                "only in how Unicode writes accents (NFC and NFD): move their images into one"
            )


def _check_depth(index: ImageIndex) -> None:
    """Raise ValueError if the second folders may be the classes: a/airfield/1.jpg, a/alley/1.jpg.

    They are not if a first folder holds images itself, holds one folder only, or if all hold the same ones.
    """
    # Images that lie in a class folder itself come before those in folders in it.
    starts = np.searchsorted(index.labels, np.arange(len(index.classes))).tolist()
    if any(index.name(i).count("/") < 2 for i in starts):
        return
    inside: dict[str, set[str]] = {}
    for i in range(len(index)):
        first, second, _ = index.name(i).split("/", 2)
        inside.setdefault(first, set()).add(second)
    several = [first for first, seconds in inside.items() if len(seconds) > 1]
    same = len({frozenset(seconds) for seconds in inside.values()}) == 1
    if not several or same:
        return
    first = several[0]
    second = f"{first}/{min(inside[first])}"
    raise ValueError(
        f"all images in {printable(_place(index))} lie at least two folders deep, as "
        f"{printable(index.name(0))}: give `class_depth` 2 for {sum(map(len, inside.values()))} classes such "
        f"as {printable(second)}, or `class_depth` 1 for {len(inside)} classes such as {printable(first)}"
    )


# --- what to do ---


def _remedy(wanted: _Wanted) -> str:
    """Say what to do about a path without the images that are needed, for errors.

    Without labels, training images alone suffice.
    """
    folder = os.path.abspath(wanted.path)
    near = _whole_set_near(folder, wanted.source)
    if near:
        return f"Give {printable(near)}, which holds train and {wanted.source.val_split}."
    if os.path.isdir(folder):
        steps = _renames(wanted)
        if steps:
            return f"{steps}."
    if wanted.split == "val":
        return (
            "Give a folder with {train,val}/<class>/*, or with uncompressed tars of <class>/*: "
            "{train,val}.tar or {train,val}-*.tar; or hold out training images: `val_share` 0.1."
        )
    if wanted.labels:
        return (
            "Give a folder with {train,val}/<class>/*, or with uncompressed tars of <class>/*: "
            "{train,val}.tar or {train,val}-*.tar, or tables (.csv) with the columns path and label."
        )
    return (
        "Give a folder of images, nested or not, one .tar, a folder with train.tar or train-*.tar, or a text "
        "file of one path per line."
    )


def _whole_set_near(path: str, source: DataPath) -> str:
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
    return next((each for each in candidates[1:] if not missing_splits(each, source)), "")


def _renames(wanted: _Wanted) -> str:
    """Say how to rename what holds the missing splits of a data set: "Rename valid to val". "" for none."""
    with os.scandir(wanted.path) as entries:
        inside = list(entries)
    folders = {entry.name.lower(): entry.name for entry in inside if is_folder(entry)}
    found = {}
    for split in missing_splits(wanted.path, wanted.source):
        named = [folders[name] for name in names_of(split, wanted.source) if name in folders]
        if named:
            found[split] = named[0]
    if not found:
        return _other_files(wanted, [entry.name for entry in inside])
    has_train = any(entry.name.lower().startswith("train") for entry in inside)
    return _steps(wanted, found, has_train)


def _steps(wanted: _Wanted, found: dict[str, str], has_train: bool) -> str:
    """Say how to rename folders: `found` has those of the missing splits."""
    targets = {"train": "train", "val": wanted.source.val_split}
    steps = " and ".join(f"{printable(name)} to {targets[split]}" for split, name in found.items())
    if has_train and list(found) == ["val"]:
        given = f"`val_split` {printable(found['val'])}"
        # A wrong name was given.
        if wanted.source.val_split != VAL_SPLIT:
            return f"Give {given}"
        return f"Rename {steps}, or give {given}"
    # Without training images, be they shards, the other folders are the classes.
    if wanted.labels and not has_train:
        return f"{MOVE}, and rename {steps}"
    return f"Rename {steps}"


def _other_files(wanted: _Wanted, files: list[str]) -> str:
    """Name the validation images that are tars or tables under another name; '' if there are none."""
    if wanted.split != "val":
        return ""
    # Names without numbers and suffixes.
    stems = {file_split(file): file.partition(".")[0].partition("-")[0] for file in files}
    found = [stems[name] for name in SPLITS["val"] if name in stems and name != wanted.source.val_split]
    if not found:
        return ""
    return f"Give `val_split` {printable(found[0])}, or rename the files"


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
