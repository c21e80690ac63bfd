"""Layouts of images with segmentation masks: two of ours, and those of four public data sets.

A layout is recognised by the names of its folders. An image and its mask have the same path below the two
folders, apart from the suffix.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import escape, glob
from typing import Any, NamedTuple

import numpy as np

from util.data.segments.masks import IGNORED, MaskSettings
from util.data.sources.image_index import ImageIndex, NoSplit, some_names
from util.data.sources.layouts import build_index, class_names
from util.data.sources.listing import class_of, composed
from util.data.sources.lists import listed_paths
from util.data.sources.splits import held_out
from util.files.names import counted, printable
from util.flags.data_path import VAL_SPLIT, DataPath
from util.flags.groups import is_remote_path

VOC_CLASSES: tuple[str, ...] = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car")
VOC_CLASSES += ("cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant")
VOC_CLASSES += ("sheep", "sofa", "train", "tvmonitor")
CITYSCAPES_CLASSES: tuple[str, ...] = ("road", "sidewalk", "building", "wall", "fence", "pole")
CITYSCAPES_CLASSES += ("traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider")
CITYSCAPES_CLASSES += ("car", "truck", "bus", "train", "motorcycle", "bicycle")
# Label ids of these classes, in their order; the other ids up to 33 are not evaluated.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_TABLE = tuple(
    CITYSCAPES_IDS.index(value) if value in CITYSCAPES_IDS else IGNORED for value in range(34)
)
# Places of a data set in the folder that is given.
INSIDE = ("", "VOCdevkit/VOC2012", "VOC2012")
NO_MASK = "image without a mask"
NO_IMAGE = "mask without an image"
PLURALS = {NO_MASK: "images without a mask", NO_IMAGE: "masks without an image"}


class Variant(NamedTuple):
    """One kind of masks: how their names end, without the suffix, and what their numbers mean."""

    end: bytes
    settings: MaskSettings


@dataclass(frozen=True)
class Layout:
    """The folders of a data set. {} stands for the name of a split.

    Attributes:
        kind: its name, in words.
        images, masks: folders, or tars of these names.
        variants: kinds of masks; the first one that is there is taken.
        train, val: names of the splits.
        lists: files with the names of a split's pairs; '' if each split has its folder.
        image_end: how names of images end, without the suffix.
        classes: their names, if the layout has its own.
        names: the file that may name the classes, one per line.
    """

    kind: str
    images: str
    masks: str
    variants: tuple[Variant, ...] = (Variant(b"", MaskSettings()),)
    train: str = "train"
    val: str = "val"
    lists: str = ""
    image_end: bytes = b""
    classes: tuple[str, ...] = ()
    names: str = "classes.txt"

    def name(self, split: str, source: DataPath) -> str:
        """Return the name of a split's folders; `val_split` may give that of the validation images."""
        if split == "train":
            return self.train
        if source.val_split != VAL_SPLIT:
            return source.val_split
        return self.val

    def place(self, name: str) -> str:
        """Return what must be there for a split: its list, or the folder of its images."""
        return (self.lists or self.images).format(name)


IMAGENET_S = Layout(
    "ImageNet-S",
    "{}",
    "{}-segmentation",
    (Variant(b"", MaskSettings(None, 1000, encoding="red_green")),),
    train="train-semi",
    val="validation",
)
# The first one that matches is taken.
LAYOUTS = (
    Layout(
        "Cityscapes",
        "leftImg8bit/{}",
        "gtFine/{}",
        (
            Variant(b"_gtFine_labelIds", MaskSettings(19, 255, table=CITYSCAPES_TABLE)),
            Variant(b"_gtFine_labelTrainIds", MaskSettings(19, 255)),
        ),
        image_end=b"_leftImg8bit",
        classes=CITYSCAPES_CLASSES,
    ),
    Layout(
        "Pascal VOC",
        "JPEGImages",
        "SegmentationClass",
        (Variant(b"", MaskSettings(21, 255)),),
        lists="ImageSets/Segmentation/{}.txt",
        classes=VOC_CLASSES,
    ),
    Layout(
        "ADE20K",
        "images/{}",
        "annotations/{}",
        (Variant(b"", MaskSettings(150, 255, reduce_zero_label=True)),),
        train="training",
        val="validation",
    ),
    IMAGENET_S,
    Layout("images and masks", "images/{}", "masks/{}"),
    # A set for classification, with masks beside it. Its own classes.txt would name the classes of images.
    Layout("masks beside the images", "{}", "masks/{}", names="masks/classes.txt"),
)


class Pairs:
    """Images with masks, and where their bytes are; made by `build_pairs`.

    Attributes:
        path: what the user named.
        kind: the layout, in words.
        images, masks: their listings, in the same order.
        settings: what the layout says about masks.
        classes: names of the classes; empty if they are not known.
        left_out: numbers of images without a mask and of masks without an image, under NO_MASK and NO_IMAGE.
        labels: zeros (n,), for data sets of images with one label each.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        images: ImageIndex,
        masks: ImageIndex,
        settings: MaskSettings,
        classes: list[str],
        left_out: Counter[str],
        digest: str,
    ):
        self.path = path
        self.kind = kind
        self.images = images
        self.masks = masks
        self.settings = settings
        self.classes = classes
        self.left_out = left_out
        self.labels = np.zeros(len(images), np.int32)
        self._digest = digest

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """Return the path of image i in its listing."""
        return self.images.name(i)

    def mask_name(self, i: int) -> str:
        """Return the path of mask i in its listing."""
        return self.masks.name(i)

    def read(self, i: int) -> bytes:
        """Return the undecoded bytes of image i. Raises OSError."""
        return self.images.read(i)

    def read_writable(self, i: int) -> memoryview:
        """Return those of an image into writable memory; see `ImageIndex`."""
        return self.images.read_writable(i)

    def read_mask(self, i: int) -> bytes:
        """Return the undecoded bytes of mask i. Raises OSError."""
        return self.masks.read(i)

    def check_unchanged(self, i: int) -> None:
        """Raise ChangedTar if a tar that holds pair i has changed since it was listed."""
        self.images.check_unchanged(i)
        self.masks.check_unchanged(i)

    def digest(self) -> str:
        """Return a hash of the names of images and masks below their folders, and of their order."""
        return self._digest

    def summary(self) -> str:
        """Return one line: path, number of pairs, layout."""
        counts = [counted(n, kind, PLURALS[kind]) for kind, n in self.left_out.items() if n]
        left_out = ""
        if counts:
            left_out = f"; left out: {', '.join(counts)}"
        return f"{self.path}: {counted(len(self), 'pair')} of image and mask ({self.kind}{left_out})"


class _Side(NamedTuple):
    """The images of a split, or its masks.

    Attributes:
        listing: of these and maybe others.
        numbers: their numbers there.
        names: their paths below the split's folder.
        place: that folder, for errors.
    """

    listing: ImageIndex
    numbers: list[int]
    names: list[bytes]
    place: str


# --- where the folders are ---


class _Folder:
    """A data set in a folder."""

    def __init__(self, root: str, source: DataPath):
        self.root = root
        self.source = source

    def holds(self, place: str) -> bool:
        path = os.path.join(self.root, place)
        if place.endswith(".txt"):
            return os.path.isfile(path)
        return os.path.isdir(path) or os.path.isfile(f"{path}.tar") or bool(glob(f"{escape(path)}-*.tar"))

    def side(self, place: str) -> _Side:
        parent, name = os.path.split(os.path.join(self.root, place))
        source = DataPath(parent, data_cache=self.source.data_cache)
        split = "train"
        # The listing of a split under any name.
        if name != "train":
            source = replace(source, val_split=name)
            split = "val"
        index = build_index(source, split, labels=False)
        names = [os.fsencode(index.name(i)) for i in range(len(index))]
        return _Side(index, list(range(len(index))), names, os.path.join(parent, name))

    def lines(self, place: str) -> list[bytes]:
        return listed_paths(os.path.join(self.root, place))

    def classes(self, names: str) -> list[str]:
        """Return the names in a file; none without that file."""
        file = os.path.join(self.root, names)
        if not os.path.isfile(file):
            return []
        return class_names(file)


class _Tar:
    """A data set in one tar, maybe below a folder there."""

    def __init__(self, index: ImageIndex):
        self.index = index
        self.names = [os.fsencode(index.name(i)) for i in range(len(index))]
        above = {os.path.dirname(name) for name in self.names}
        self.prefix = os.path.commonpath(above)
        if self.prefix:
            self.prefix += b"/"
        self.folders: set[bytes] = set()
        for folder in above:
            while folder and folder not in self.folders:
                self.folders.add(folder)
                folder = os.path.dirname(folder)

    def holds(self, place: str) -> bool:
        return self.prefix + os.fsencode(place) in self.folders

    def side(self, place: str) -> _Side:
        start = self.prefix + os.fsencode(place) + b"/"
        numbers = [i for i, name in enumerate(self.names) if name.startswith(start)]
        names = [self.names[i][len(start) :] for i in numbers]
        return _Side(self.index, numbers, names, f"{os.fsdecode(start)} of {self.index.tars[0]}")

    def lines(self, place: str) -> list[bytes]:
        raise NotImplementedError("files in a tar that are no images are not listed")

    def classes(self, names: str) -> list[str]:
        return []


def _places(source: DataPath) -> Iterator[_Folder | _Tar]:
    """Yield where the folders of a layout may be. Raises ValueError for a path that is neither."""
    path = os.path.expanduser(source.path)
    if path.lower().endswith(".tar") and not os.path.isdir(path):
        plain = replace(source, path=path, val_share=0.0)
        yield _Tar(build_index(plain, "train", labels=False))
        return
    if is_remote_path(path):
        raise ValueError(f"{printable(path)}: pairs in an object store are read from one tar only")
    if not os.path.isdir(path):
        if os.path.exists(path):
            raise ValueError(
                f"{printable(path)} is one file: give the folder, or the tar, of images and masks"
            )
        raise ValueError(f"no such folder or tar of images and masks: {printable(path)}")
    for inside in INSIDE:
        yield _Folder(os.path.join(path, inside).rstrip("/"), source)
    # Archives often unpack to one folder.
    with os.scandir(path) as entries:
        folders = [entry.path for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    if len(folders) == 1:
        yield _Folder(folders[0], source)


def _found(source: DataPath) -> tuple[_Folder | _Tar, Layout]:
    """Return the layout of a data set, and where it is. Raises ValueError if there is none."""
    for place in _places(source):
        for layout in LAYOUTS:
            if _matches(layout, place, source):
                return place, layout
    raise ValueError(
        f"no images with masks in {printable(source.path)}: give a folder or tar with images/{{train,val}} "
        "and masks/{train,val} (a PNG for each image), or {train,val} and masks/{train,val}, or ADE20K "
        "(images, annotations), Pascal VOC (JPEGImages, SegmentationClass), Cityscapes (leftImg8bit, gtFine) "
        "or ImageNet-S (train-semi, train-semi-segmentation)"
    )


def _matches(layout: Layout, place: _Folder | _Tar, source: DataPath) -> bool:
    """Tell whether images and masks of some split are there."""
    names = {layout.name(split, source) for split in ("train", "val")}
    patterns = [layout.images, layout.masks]
    if layout.lists:
        patterns.append(layout.lists)
    return all(any(place.holds(pattern.format(name)) for name in names) for pattern in patterns)


# --- pairs ---


def build_pairs(source: DataPath, split: str) -> Pairs:
    """List the images of one split ("train" or "val") that have masks.

    The layouts are, with tars instead of folders where the names are those of splits:

    1. `DIR/images/{train,val}/**` and `DIR/masks/{train,val}/**.png`, also in one tar, and there below any
       folder
    2. `DIR/{train,val}/**` and `DIR/masks/{train,val}/**.png`, likewise
    3. ADE20K, Pascal VOC 2012, Cityscapes (fine annotations) and ImageNet-S, as they are unpacked

    `DIR/classes.txt`, in the second layout `DIR/masks/classes.txt`, may name the classes, one per line.
    `val_split` gives the name of another validation
    split, and `val_share` holds out training pairs, by a hash of their names.

    Raises ValueError for data in no such layout, if no image has a mask, and if names are ambiguous; and
    `NoSplit` if only the validation split is missing.
    """
    source = DataPath.of(source)
    place, layout = _found(source)
    shared = source.val_share > 0
    if shared and place.holds(layout.place(layout.name("val", source))):
        raise ValueError(
            f"`val_share` {source.val_share:g} holds out training images, and there are validation images "
            f"already: {printable(layout.place(layout.name('val', source)))}. Leave `val_share` out"
        )
    name = layout.name("train" if shared else split, source)
    _check_split(place, layout, name, source)
    images = _by_key(_images(place, layout, name), layout.image_end)
    masks, variant = _masks(place, layout, name)
    settings, classes = _meaning(place, layout, variant, name)
    left_out = Counter({NO_MASK: len(images.keys - masks.keys), NO_IMAGE: len(masks.keys - images.keys)})
    keys = sorted(images.keys & masks.keys, key=_order)
    if not keys:
        raise _no_pairs(images, masks)
    kind = layout.kind
    if shared:
        keys, held = _share(keys, source.val_share, split == "val")
        kind += f"; {held}"
    return Pairs(
        source.path,
        kind,
        images.chosen(keys),
        masks.chosen(keys),
        settings,
        classes,
        left_out,
        _digest(images, masks, keys),
    )


class _Keyed(NamedTuple):
    """A side of which the files are named by what images and masks have in common."""

    side: _Side
    found: dict[bytes, int]

    @property
    def keys(self) -> Any:
        return self.found.keys()

    def chosen(self, keys: list[bytes]) -> ImageIndex:
        numbers = [self.side.numbers[self.found[key]] for key in keys]
        return self.side.listing.subset(np.array(numbers, np.int64))


def _by_key(side: _Side, end: bytes) -> _Keyed:
    """Return the files by their paths without suffix and without `end`; those without it are left out."""
    found: dict[bytes, int] = {}
    for at, name in enumerate(side.names):
        key = _stem(name)
        if not key.endswith(end):
            continue
        key = composed(key[: len(key) - len(end)])
        if key in found:
            raise ValueError(
                f"{printable(os.fsdecode(side.names[found[key]]))} and {printable(os.fsdecode(name))} in "
                f"{printable(side.place)} have the same name apart from the suffix: rename one of them"
            )
        found[key] = at
    return _Keyed(side, found)


def _stem(name: bytes) -> bytes:
    folder, slash, file = name.rpartition(b"/")
    stem, dot, _ = file.rpartition(b".")
    if not dot:
        return name
    return folder + slash + stem


def _order(key: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the sort key of torchvision's ImageFolder, as for other images."""
    folder, _, file = key.rpartition(b"/")
    return class_of(key) or b"", folder, file


def _check_split(place: _Folder | _Tar, layout: Layout, name: str, source: DataPath) -> None:
    """Raise ValueError if a split is not there, or only half of it."""
    wanted = layout.place(name)
    where = printable(source.path)
    if not place.holds(wanted):
        # A name that was given must be there, and a set without training images is of no use.
        if name == layout.val and source.val_split == VAL_SPLIT:
            raise NoSplit(
                f"no {wanted} in {where} ({layout.kind}): give `val_split` with the name of another split, "
                "or hold out training images: `val_share` 0.1"
            )
        raise ValueError(f"no {printable(wanted)} in {where} ({layout.kind})")
    masks = layout.masks.format(name)
    if not place.holds(masks):
        raise ValueError(f"{printable(wanted)} in {where} has no masks: no {printable(masks)} beside it")


def _images(place: _Folder | _Tar, layout: Layout, name: str) -> _Side:
    side = place.side(layout.images.format(name))
    return _listed(side, place, layout, name, whole=True)


def _masks(place: _Folder | _Tar, layout: Layout, name: str) -> tuple[_Keyed, Variant]:
    """Return the masks of the first kind that is there, and that kind."""
    side = place.side(layout.masks.format(name))
    side = _listed(side, place, layout, name, whole=False)
    for variant in layout.variants:
        masks = _by_key(side, variant.end)
        if masks.found:
            break
    return masks, variant


def _listed(side: _Side, place: _Folder | _Tar, layout: Layout, name: str, whole: bool) -> _Side:
    """Return the files that the list of a split names; all without lists.

    Raises ValueError if files are missing, with `whole`, or if the list is empty.
    """
    if not layout.lists:
        return side
    file = layout.lists.format(name)
    wanted = {composed(line) for line in place.lines(file)}
    kept = [i for i, found in enumerate(side.names) if composed(_stem(found)) in wanted]
    if whole and len(kept) < len(wanted):
        missing = sorted(wanted - {composed(_stem(side.names[i])) for i in kept})
        raise ValueError(
            f"{printable(file)} lists {counted(len(missing), 'image')} not in {printable(side.place)}: "
            f"{some_names([os.fsdecode(each) for each in missing])}. Copy the images again"
        )
    if not wanted:
        raise ValueError(f"{printable(file)} lists no images")
    return side._replace(numbers=[side.numbers[i] for i in kept], names=[side.names[i] for i in kept])


def _meaning(
    place: _Folder | _Tar, layout: Layout, variant: Variant, name: str
) -> tuple[MaskSettings, list[str]]:
    """Return what the numbers of masks mean, and the names of the classes."""
    classes = list(layout.classes)
    if layout is IMAGENET_S:
        known = next(each for each in (layout.train, name) if place.holds(layout.images.format(each)))
        folders = {class_of(path) or b"" for path in place.side(layout.images.format(known)).names}
        # Their numbers are those of the sorted folders, and 0 is everything else.
        classes = ["other", *(os.fsdecode(each) for each in sorted(folders - {b""}))]
    listed = place.classes(layout.names)
    settings = variant.settings
    fixed = settings.num_classes
    if listed and fixed is not None and len(listed) != fixed:
        raise ValueError(f"{layout.names} has {len(listed)} names, and {layout.kind} has {fixed} classes")
    classes = listed or classes
    if classes and fixed is None:
        settings = replace(settings, num_classes=len(classes))
    return settings, classes


def _share(keys: list[bytes], share: float, validation: bool) -> tuple[list[bytes], str]:
    """Return the pairs that are held out for validation, or the others, and a remark for the summary."""
    chosen = held_out(keys, [class_of(key) or b"" for key in keys], share)
    if not chosen.any():
        raise ValueError(f"`val_share` {share:g} holds out no pair: no folder has two")
    held = f"{counted(int(chosen.sum()), 'pair')} held out for validation"
    return [key for key, out in zip(keys, chosen.tolist()) if out == validation], held


def _digest(images: _Keyed, masks: _Keyed, keys: list[bytes]) -> str:
    content = hashlib.sha256()
    for keyed in (images, masks):
        for key in keys:
            # A name has no zero byte.
            content.update(keyed.side.names[keyed.found[key]] + b"\0")
    return content.hexdigest()


def _no_pairs(images: _Keyed, masks: _Keyed) -> ValueError:
    """Return the error for images without any mask."""
    examples = []
    for keyed in (images, masks):
        example = "none"
        if keyed.found:
            example = printable(os.fsdecode(keyed.side.names[next(iter(keyed.found.values()))]))
        examples.append(example)
    return ValueError(
        f"none of the {counted(len(images.found), 'image')} in {printable(images.side.place)} has a mask in "
        f"{printable(masks.side.place)}: a mask has the path of its image and the suffix .png; found "
        f"{examples[0]} and {examples[1]}"
    )
