"""Where the images are: one compact listing for class folders, loose folders, lists of paths and uncompressed tars.

A listing is a few numpy arrays (names as one blob of bytes), not a million Python objects: forked loader workers share
its memory, because numpy has no per-element reference counts that would copy the pages. Every form of the same
data set gives the same order, that of torchvision's ImageFolder: class, then folder, then file name.
"""

import glob
import hashlib
import os

import numpy as np

from util.data.sources.listing import (
    COMPRESSED_SUFFIXES,
    IMAGE_SUFFIXES,
    compressed_error,
    from_names,
    list_folder,
    list_tars,
    load_cache,
    unpack_names,
)

MAX_OPEN_TARS = 256  # per process; the usual limit on open files is 1024
LAYOUTS = """Layouts that work:
  <data_path>/{train,val}/<class>/*.jpg, as ImageNet
  <data_path>/{train,val}.tar, or shards {train,val}-*.tar: uncompressed, members <class>/<name>
  for training also <data_path>/<class>/*.jpg, or one .tar file
  for training without labels also a folder of images, nested or not, or a text file of paths, one per line"""


class NoSplit(ValueError):
    """The data are there, but not this split of them."""


class ImageIndex:
    """Names, labels and bytes of n images; built by `build_index`.

    Attributes:
        path: what the user named.   root: the folder that names are relative to.   kind: the layout, in words.
        classes: sorted class names; empty if unlabelled.
        labels: (n,) int32, index into `classes`, -1 = unlabelled.
    """

    def __init__(self, path, root, kind, arrays, tars=(), labels=True):
        self.path, self.root, self.kind, self.tars = path, root, kind, list(tars)
        self.classes = unpack_names(arrays["classes"]) if labels else []
        # Loose images beside class folders have no label. They sort first, so leaving them out is a slice.
        self.ignored = int(np.searchsorted(arrays["labels"], 0)) if labels else 0
        first = self.ignored
        self.labels = arrays["labels"][first:] if labels else np.full(len(arrays["labels"]), -1, np.int32)
        self._blob = arrays["names"]
        self._ends, self._first_start = arrays["ends"][first:], int(arrays["ends"][first - 1]) if first else 0
        if self.tars:
            self._shard, self._offset, self._size = (arrays[k][first:] for k in ("shard", "offset", "size"))
        self._files = {}  # tar number -> open file, by need and per process

    def __len__(self) -> int:
        return len(self._ends)

    def __getstate__(self):
        return {**self.__dict__, "_files": {}}  # open files cannot be sent to a spawned worker

    def name(self, i: int) -> str:
        """Path of image i relative to `root`, or its member name in the tar."""
        start = self._ends[i - 1] if i > 0 else self._first_start
        return os.fsdecode(self._blob[start : self._ends[i]].tobytes())

    def read(self, i: int) -> bytes:
        """The undecoded bytes of image i. Raises OSError if they cannot be read."""
        if not self.tars:
            with open(os.path.join(self.root, self.name(i)), "rb") as file:
                return file.read()
        # pread has no file position, so a file opened before a fork may be shared by the workers.
        size = int(self._size[i])
        data = os.pread(self._tar(int(self._shard[i])).fileno(), size, int(self._offset[i]))
        if len(data) != size:
            raise OSError(f"{self.tars[self._shard[i]]} ends inside {self.name(i)}")
        return data

    def _tar(self, shard):
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_TARS:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = open(self.tars[shard], "rb", buffering=0)  # noqa: SIM115 (stays open)
        return self._files[shard]

    def digest(self) -> str:
        """Of names, order and labels: the same wherever the same images are listed."""
        found = hashlib.sha256(self._blob)
        for array in (self._ends, self.labels):
            found.update(np.ascontiguousarray(array))
        return found.hexdigest()

    def summary(self) -> str:
        """One line: path, number of images and classes, layout."""
        classes = f"{len(self.classes)} classes" if self.classes else "no labels"
        ignored = f"; {self.ignored} images outside class folders are ignored" if self.ignored else ""
        return f"{self.path}: {len(self)} images, {classes} ({self.kind}{ignored})"


def build_index(data_path, split: str = "train", *, labels: bool = True) -> ImageIndex:
    """List the images of one split, in the first of these forms that `data_path` holds.

    1. `<data_path>/<split>/<class>/*` (recursive), 2. `<data_path>/<split>.tar`, 3. `<data_path>/<split>-*.tar`;
    for split "train" also 4. `data_path` is itself such a folder or tar, or a text file of paths (relative to the
    file's folder; blank lines and `#` comments skipped; the file's order is kept).

    The class is the first folder of an image's path. `labels=False` takes every image, loose ones too, with label -1.
    Hidden files and folders (`.name`) are skipped. Tars and large folders are listed once: the listing is cached
    beside them where that is writable, and is checked against sizes and modification times.

    Raises ValueError, with what was found, for a path that holds no images in such a form.
    """
    path = os.path.expanduser(os.fspath(data_path)).rstrip("/") or "/"
    if not os.path.exists(path):
        raise _misplaced(f"no such file or folder: {path}")
    index = _index_folder(path, split, labels) if os.path.isdir(path) else _index_file(path, split, labels)
    _check(index, split, labels)
    return index


def class_names(path) -> list[str]:
    """Names of classes in the order of a classifier's outputs: a data set's, or those in a text file, one per line.

    Raises ValueError where a path holds neither, and for a name that is listed twice.
    """
    path = os.path.expanduser(os.fspath(path))
    if os.path.isdir(path) or path.lower().endswith(".tar"):
        try:
            return build_index(path, "val").classes
        except ValueError:
            return build_index(path).classes  # training images alone, or a folder of class folders
    if not os.path.isfile(path):
        raise ValueError(f"no such file or folder of classes: {path}")
    with open(path, errors="replace") as file:
        names = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} lists classes twice: {some_names(twice)}")
    return names


def check_same_classes(train: ImageIndex, val: ImageIndex) -> None:
    """Raise ValueError unless both splits have the same class names: else equal labels would mean different classes."""
    if train.classes == val.classes:
        return
    only = [
        some_names(sorted(set(a.classes) - set(b.classes))) or "none" for a, b in ((train, val), (val, train))
    ]
    raise ValueError(
        f"{len(train.classes)} training and {len(val.classes)} validation classes in {train.path} differ; "
        f"only in training: {only[0]}; only in validation: {only[1]}. Give both the same class folders."
    )


# --- the layouts ---


def _index_folder(path, split, labels):
    root, kind = os.path.join(path, split), "class folders" if labels else "folder"
    if os.path.isdir(root):
        cache = os.path.join(path, ".index", f"{split}.npz")
        return ImageIndex(
            path, root, kind, load_cache(cache, root) or list_folder(root, cache), labels=labels
        )
    if os.path.isfile(root + ".tar"):
        return _index_tars(path, f"{split}.tar", [root + ".tar"], root + ".tar.index.npz", labels)
    cache = os.path.join(path, ".index", "root.npz")
    arrays = (
        load_cache(cache, path) if split == "train" else None
    )  # before globbing, which would list a flat folder too
    if arrays is None:
        if shards := sorted(glob.glob(glob.escape(root) + "-*.tar")):
            return _index_tars(path, f"{len(shards)} tar shards", shards, root + ".index.npz", labels)
        if compressed := [
            f for f in glob.glob(glob.escape(root) + "*") if f.lower().endswith(COMPRESSED_SUFFIXES)
        ]:
            raise compressed_error(compressed[0])
        if split != "train":
            raise NoSplit(
                f"no {split}/, {split}.tar or {split}-*.tar in {path}: found {_found(path)}.\n{LAYOUTS}"
            )
        arrays = list_folder(path, cache)
    _check_not_a_parent(path, unpack_names(arrays["stamped"]))
    return ImageIndex(path, path, kind, arrays, labels=labels)


def _index_tars(path, kind, tars, cache, labels):
    return ImageIndex(path, os.path.dirname(tars[0]), kind, list_tars(tars, cache), tars, labels)


def _index_file(path, split, labels):
    if split != "train":
        raise NoSplit(
            f"{path} is one file, which serves for training only; for {split} give the folder that holds "
            f"{split}/ or {split}.tar.\n{LAYOUTS}"
        )
    if path.lower().endswith(COMPRESSED_SUFFIXES):
        raise compressed_error(path)
    if path.lower().endswith(".tar"):
        return _index_tars(path, "tar", [path], path + ".index.npz", labels)
    with open(path, "rb") as file:
        if b"\0" in file.read(4096):
            raise _misplaced(f"{path} is not a folder, a .tar or a text file of image paths.")
        file.seek(0)
        lines = [line.strip() for line in file]
    names = [line for line in lines if line and not line.startswith(b"#")]
    if not names:
        raise _misplaced(f"{path} lists no images.")
    if labels:
        raise _misplaced(
            f"{path} is a list of {len(names)} paths, which has no labels; they come from class folders."
        )
    root = os.path.dirname(os.path.abspath(path))
    first = os.path.join(root, os.fsdecode(names[0]))
    if not os.path.isfile(first):
        raise ValueError(
            f"the first path in {path} does not exist: {first}. Paths are relative to the list's folder."
        )
    return ImageIndex(path, root, "list of paths", from_names(names, sort=False), labels=False)


def _check(index, split, labels):
    """Refuse an index that is empty, or whose labels cannot be meant."""
    where = index.root if not index.tars else index.tars[0] + " and its fellow shards" * (len(index.tars) > 1)
    if len(index) == 0 and index.ignored and split != "train":
        raise ValueError(
            f"{where} holds {index.ignored} loose images and no class folders, so they have no labels. ImageNet's "
            f"validation archive unpacks flat: move every image to {split}/<class>/, with the same class folders as "
            "train/ (a script known as valprep.sh does it)."
        )
    if len(index) == 0 and index.ignored:
        raise _misplaced(
            f"{where} holds {index.ignored} loose images and no class folders, so they have no labels."
        )
    if len(index) == 0:
        raise _misplaced(
            f"no images in {where}" + (f": found {_found(index.root)}." if not index.tars else ".")
        )
    if labels and not index.classes:  # noted by an earlier version, which took the class of /a/1.jpg for ""
        raise ValueError(
            f"the listing of {where} has {len(index)} images and no classes: delete the .index.npz beside it"
        )
    counts = np.bincount(index.labels, minlength=len(index.classes)) if index.classes else []
    if empty := [name for name, count in zip(index.classes, counts) if count == 0]:
        raise ValueError(
            f"class folders without images in {where}: {some_names(empty)}. Remove or fill them: "
            "an empty folder would still count as a class."
        )
    if len(index.classes) == 1 and all(
        index.name(i).count("/") > 1 for i in (0, len(index) // 2, len(index) - 1)
    ):
        raise _misplaced(
            f"the only class in {where} is {index.classes[0]!r} and its images lie deeper, as in "
            f"{index.name(0)}: they seem to be one folder too deep."
        )


def _check_not_a_parent(path, folders):
    """Refuse a folder that has no train/ of its own but holds whole data sets: it would mix train and val."""
    validation = {"val", "valid", "validation", "test"}
    if other := sorted(f for f in folders if f in validation | {"training"}):
        raise _misplaced(
            f"{path} has no train/ but {some_names(other)}: found {_found(path)}. Rename the training folder "
            "to train/, or give it as the path."
        )
    train, val = (
        {os.path.dirname(f) for f in folders if os.path.basename(f) in n} for n in ({"train"}, validation)
    )
    if nested := sorted(train & val):
        raise _misplaced(
            f"{path} has no train/: found {_found(path)}. Did you mean {os.path.join(path, nested[0])}, "
            "which holds train/ and a validation folder?"
        )


def _misplaced(message):
    return ValueError(f"{message}\n{LAYOUTS}")


def _found(folder):
    with os.scandir(folder) as entries:
        entries = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    folders = [e.name for e in entries if e.is_dir()]
    others = [
        e.name for e in entries if not e.is_dir() and not os.fsencode(e.name).lower().endswith(IMAGE_SUFFIXES)
    ]
    images = len(entries) - len(folders) - len(others)
    return f"{len(folders)} folders{': ' * bool(folders)}{some_names(folders)} and {images} images" + (
        f" and {len(others)} other files: {some_names(others)}" if others else ""
    )


def some_names(names: list[str], most: int = 5) -> str:
    """The first of many names, and how many there are."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
