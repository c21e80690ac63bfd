"""Where the images are: one compact listing for class folders, loose folders, lists of paths and uncompressed tars.

A listing is a few numpy arrays (names as one blob of bytes), not a million Python objects: forked loader workers share
its memory, because numpy has no per-element reference counts that would copy the pages. Every form of the same
data set gives the same order, that of torchvision's ImageFolder: class, then folder, then file name.
"""
import glob
import os
import tarfile
import time
import uuid
import zipfile

import numpy as np

IMAGE_SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".tif", b".tiff", b".ppm", b".pgm", b".gif", b".npy")
COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".lz4", ".zip", ".7z")
CACHE_FOLDERS_ABOVE = 20_000  # images; a smaller folder is listed faster than a cache of it is worth
MAX_OPEN_TARS = 256  # per process; the usual limit on open files is 1024
LAYOUTS = """Layouts that work:
  <data_path>/{train,val}/<class>/*.jpg, as ImageNet
  <data_path>/{train,val}.tar, or shards {train,val}-*.tar: uncompressed, members <class>/<name>
  for training also <data_path>/<class>/*.jpg, or one .tar file
  for training without labels also a folder of images, nested or not, or a text file of paths, one per line"""


class ImageIndex:
    """Names, labels and bytes of n images; built by `build_index`.

    Attributes:
        path: what the user named.   root: the folder that names are relative to.   kind: the layout, in words.
        classes: sorted class names; empty if unlabelled.
        labels: (n,) int32, index into `classes`, -1 = unlabelled.
    """

    def __init__(self, path, root, kind, arrays, tars=(), labels=True):
        self.path, self.root, self.kind, self.tars = path, root, kind, list(tars)
        self.classes = _unpack_names(arrays["classes"]) if labels else []
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
        return os.fsdecode(self._blob[start:self._ends[i]].tobytes())

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
    _check(index, split)
    return index


def check_same_classes(train: ImageIndex, val: ImageIndex) -> None:
    """Raise ValueError unless both splits have the same class names: else equal labels would mean different classes."""
    if train.classes == val.classes:
        return
    only = [_some(sorted(set(a.classes) - set(b.classes))) or "none" for a, b in ((train, val), (val, train))]
    raise ValueError(f"{len(train.classes)} training and {len(val.classes)} validation classes in {train.path} differ; "
                     f"only in training: {only[0]}; only in validation: {only[1]}. Give both the same class folders.")


# --- the layouts ---

def _index_folder(path, split, labels):
    root, kind = os.path.join(path, split), "class folders" if labels else "folder"
    if os.path.isdir(root):
        cache = os.path.join(path, ".index", f"{split}.npz")
        return ImageIndex(path, root, kind, _load(cache, root) or _list_folder(root, cache), labels=labels)
    if os.path.isfile(root + ".tar"):
        return _index_tars(path, f"{split}.tar", [root + ".tar"], root + ".tar.index.npz", labels)
    cache = os.path.join(path, ".index", "root.npz")
    arrays = _load(cache, path) if split == "train" else None  # before globbing, which would list a flat folder too
    if arrays is None:
        if shards := sorted(glob.glob(glob.escape(root) + "-*.tar")):
            return _index_tars(path, f"{len(shards)} tar shards", shards, root + ".index.npz", labels)
        if compressed := [f for f in glob.glob(glob.escape(root) + "*") if f.lower().endswith(COMPRESSED_SUFFIXES)]:
            raise _compressed(compressed[0])
        if split != "train":
            raise _misplaced(f"no {split}/, {split}.tar or {split}-*.tar in {path}: found {_found(path)}.")
        arrays = _list_folder(path, cache)
    _check_not_a_parent(path, _unpack_names(arrays["stamped"]))
    return ImageIndex(path, path, kind, arrays, labels=labels)


def _index_tars(path, kind, tars, cache, labels):
    return ImageIndex(path, os.path.dirname(tars[0]), kind, _tar_arrays(tars, cache), tars, labels)


def _index_file(path, split, labels):
    if split != "train":
        raise _misplaced(f"{path} is one file, which serves for training only; for {split} give the folder that holds "
                         f"{split}/ or {split}.tar.")
    if path.lower().endswith(COMPRESSED_SUFFIXES):
        raise _compressed(path)
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
        raise _misplaced(f"{path} is a list of {len(names)} paths, which has no labels; they come from class folders.")
    root = os.path.dirname(os.path.abspath(path))
    first = os.path.join(root, os.fsdecode(names[0]))
    if not os.path.isfile(first):
        raise ValueError(f"the first path in {path} does not exist: {first}. Paths are relative to the list's folder.")
    return ImageIndex(path, root, "list of paths", _arrays(names, sort=False), labels=False)


def _check(index, split):
    """Refuse an index that is empty, or whose labels cannot be meant."""
    where = index.root if not index.tars else index.tars[0] + " and its fellow shards" * (len(index.tars) > 1)
    if len(index) == 0 and index.ignored and split != "train":
        raise ValueError(
            f"{where} holds {index.ignored} loose images and no class folders, so they have no labels. ImageNet's "
            f"validation archive unpacks flat: move every image to {split}/<class>/, with the same class folders as "
            "train/ (a script known as valprep.sh does it).")
    if len(index) == 0 and index.ignored:
        raise _misplaced(f"{where} holds {index.ignored} loose images and no class folders, so they have no labels.")
    if len(index) == 0:
        raise _misplaced(f"no images in {where}" + (f": found {_found(index.root)}." if not index.tars else "."))
    counts = np.bincount(index.labels, minlength=len(index.classes)) if index.classes else []
    if empty := [name for name, count in zip(index.classes, counts) if count == 0]:
        raise ValueError(f"class folders without images in {where}: {_some(empty)}. Remove or fill them: "
                         "an empty folder would still count as a class.")
    if len(index.classes) == 1 and all(index.name(i).count("/") > 1 for i in (0, len(index) // 2, len(index) - 1)):
        raise _misplaced(f"the only class in {where} is {index.classes[0]!r} and its images lie deeper, as in "
                         f"{index.name(0)}: they seem to be one folder too deep.")


def _check_not_a_parent(path, folders):
    """Refuse a folder that has no train/ of its own but holds whole data sets: it would mix train and val."""
    validation = {"val", "valid", "validation", "test"}
    if other := sorted(f for f in folders if f in validation | {"training"}):
        raise _misplaced(f"{path} has no train/ but {_some(other)}: found {_found(path)}. Rename the training folder "
                         "to train/, or give it as the path.")
    train, val = ({os.path.dirname(f) for f in folders if os.path.basename(f) in n} for n in ({"train"}, validation))
    if nested := sorted(train & val):
        raise _misplaced(f"{path} has no train/: found {_found(path)}. Did you mean {os.path.join(path, nested[0])}, "
                         "which holds train/ and a validation folder?")


def _misplaced(message):
    return ValueError(f"{message}\n{LAYOUTS}")


def _compressed(path):
    return ValueError(f"{path} is compressed, so single images cannot be read from it. Unpack it once, for example "
                      "with `gunzip <file>.tar.gz` or `unzip`, and give the .tar or the folder.")


def _found(folder):
    with os.scandir(folder) as entries:
        entries = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    folders = [e.name for e in entries if e.is_dir()]
    others = [e.name for e in entries if not e.is_dir() and not os.fsencode(e.name).lower().endswith(IMAGE_SUFFIXES)]
    images = len(entries) - len(folders) - len(others)
    return (f"{len(folders)} folders{': ' * bool(folders)}{_some(folders)} and {images} images"
            + (f" and {len(others)} other files: {_some(others)}" if others else ""))


def _some(names, most=5):
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


# --- listing and cache ---

def _unpack_names(blob):
    return [os.fsdecode(n) for n in blob.tobytes().split(b"\0")] if len(blob) else []


def _pack_names(names):
    return np.frombuffer(b"\0".join(names), np.uint8)


def _order(name):
    folder, _, file = name.rpartition(b"/")
    return folder.partition(b"/")[0], folder, file  # as ImageFolder: not plain path order, nested folders come last


def _arrays(names, folders=(), sort=True, **columns):
    """Names (bytes) -> the arrays of a listing. `folders` adds classes that hold nothing. `columns`: one value each."""
    order = sorted(range(len(names)), key=lambda i: _order(names[i])) if sort else range(len(names))
    names = [names[i] for i in order]
    firsts = [name.partition(b"/")[0] if b"/" in name else None for name in names]
    classes = sorted({f for f in firsts if f is not None} | set(folders))
    number = {None: -1} | {name: i for i, name in enumerate(classes)}
    return dict(
        names=np.frombuffer(b"".join(names), np.uint8), ends=np.cumsum([len(n) for n in names], dtype=np.int64),
        labels=np.array([number[f] for f in firsts], np.int32), classes=_pack_names(classes),
        **{k: np.asarray(v)[np.asarray(order, np.int64)] for k, v in columns.items()})


def _list_folder(root, cache):
    names, folders, stamps, pending = [], [], [], [b""]
    while pending:
        prefix = pending.pop()  # b"", b"class/", b"class/deeper/"
        folder = os.path.join(os.fsencode(root), prefix)
        folders.append(prefix.rstrip(b"/") or b".")
        stamps.append(_stamp(folder))  # before listing: a change during it invalidates the cache
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    pending.append(prefix + entry.name + b"/")
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    names.append(prefix + entry.name)
    arrays = _arrays(names, {f.partition(b"/")[0] for f in folders[1:]})
    arrays |= dict(stamped=_pack_names(folders), stamps=np.array(stamps, np.int64))
    if len(names) > CACHE_FOLDERS_ABOVE:
        _save(cache, root, arrays)
    return arrays


def _tar_arrays(tars, cache):
    base = os.path.dirname(os.path.abspath(tars[0]))
    stamped = _pack_names([os.path.basename(os.fsencode(t)) for t in tars])
    arrays = _load(cache, base)
    if arrays is not None and np.array_equal(arrays["stamped"], stamped):
        return arrays
    stamps = np.array([_stamp(t) for t in tars], np.int64)
    names, columns = [], dict(shard=[], offset=[], size=[])
    for shard, path in enumerate(tars):
        for name, offset, size in _tar_members(path):
            names.append(name)
            for column, value in zip(columns.values(), (shard, offset, size)):
                column.append(value)
    arrays = _arrays(names, **{k: np.array(v, np.int32 if k == "shard" else np.int64) for k, v in columns.items()})
    arrays |= dict(stamped=stamped, stamps=stamps)
    _save(cache, base, arrays)
    return arrays


def _tar_members(path):
    """(name, offset, size) of each image in an uncompressed tar; names without a leading `./`."""
    found, links = {}, []
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep them all: gigabytes for a large set
                name = os.fsencode(os.path.normpath(member.name))
                if name.startswith(b".") or b"/." in name or not name.lower().endswith(IMAGE_SUFFIXES):
                    continue
                if member.islnk():  # tar stores the second name of a file as a link to the first
                    links.append((name, os.fsencode(os.path.normpath(member.linkname))))
                elif member.isreg() and not member.issparse():
                    found[name] = member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        with open(path, "rb") as file:
            magic = file.read(6)
        if magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK")):
            raise _compressed(path) from error
        raise ValueError(f"{path} is not a tar, or is damaged or cut off ({error})") from error
    with open(path, "rb") as file:  # tarfile takes a damaged header for the end of the archive
        file.seek(end)
        if file.read(512).strip(b"\0"):
            raise ValueError(f"{path} is damaged at byte {end}, after {len(found)} images: copy it again")
    found |= {name: found[target] for name, target in links if target in found}
    return [(name, *place) for name, place in found.items()]


def _stamp(path):
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def _load(cache, base):
    """The cached arrays if every file or folder that they were made from is unchanged, else None."""
    try:
        with np.load(cache, allow_pickle=False) as file:
            arrays = dict(file)
        stamps = [_stamp(os.path.join(base, name)) for name in _unpack_names(arrays["stamped"])]
        return arrays if np.array_equal(arrays["stamps"], np.array(stamps, np.int64)) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent, from another version or damaged: list again


def _save(cache, base, arrays):
    """Write atomically; a folder that cannot be written means listing again next time, not an error."""
    if not len(arrays["ends"]) or time.time_ns() - arrays["stamps"][:, 0].max() < 2e9:
        return  # perhaps still being filled, and file systems round times: a later change could go unseen
    temporary = f"{cache}.{uuid.uuid4().hex}.tmp"  # many ranks may write at once
    try:
        folder = os.path.dirname(os.path.abspath(cache))
        if not os.stat(folder if os.path.isdir(folder) else os.path.dirname(folder)).st_mode & 0o222:
            return  # root could write all the same, but the owner closed it
        if not os.path.isdir(folder):
            os.mkdir(folder)  # this changes the time of `base` if `base` is its parent
            if os.path.dirname(folder) == os.path.abspath(base):
                arrays["stamps"][0] = _stamp(base)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, cache)
    except OSError:
        if os.path.exists(temporary):
            os.remove(temporary)
