"""Shards that load faster than the files they were made from: `python -m util.data repack`.

Without `long_side` nothing is lost: JPEGs keep their coefficients and get restart markers, so that a crop's
part of the entropy-coded data can be decoded alone. Images of more than 8 bits or four bands become arrays of
the same values. With it, images are also shrunk to that length, and those of 8 bits are encoded anew.
"""

import contextlib
import glob
import hashlib
import io
import os
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from util.data import native
from util.data.recognition import HEAD, is_image_name, starts_like_image, suffix_of
from util.data.repacking.conversion import ARRAY, COPIED, ENCODED, MARKED, UNREADABLE, convert
from util.data.sources.image_index import ImageIndex, some_names
from util.data.sources.layouts import build_index
from util.files.atomic import read_json, replacing, write_json
from util.files.names import counted, printable
from util.flags.groups import MAX_PIXELS

__all__ = ["ARRAY", "COPIED", "ENCODED", "MARKED", "UNREADABLE", "convert", "repack"]

SHARD_IMAGES = 5000
SETTLE_SECONDS = 2.5  # `build_index` does not cache the listing of tars that are younger than 2 s
PREFETCHED = 32  # images that each worker converts ahead


class Shard(NamedTuple):
    """One tar: its images, where it is written, and where it lies in the end."""

    images: range
    part: str
    final: str

    def exists(self) -> bool:
        """Tell whether this or an earlier call has finished the shard."""
        return os.path.exists(self.part) or os.path.exists(self.final)


class Converted(NamedTuple):
    """What is stored for one image, what was done with it (see `convert`), and its size before in bytes."""

    name: str
    data: bytes
    outcome: str
    size_before: int


def repack(
    source: str,
    target: str,
    *,
    split: str = "train",
    long_side: int | None = None,
    quality: int = 90,
    num_workers: int = 0,
    shard_images: int = SHARD_IMAGES,
    max_pixels: int = MAX_PIXELS,
) -> Counter:
    """Write `target`/<split>-*.tar with the images and class folders of one split of `source`.

    For paths see `build_index`. The same call continues one that was stopped: finished shards stay in a
    hidden folder until the last one is finished. Every rewritten JPEG is decoded again and compared: all its
    pixels, or its size if it was encoded anew. Images of more than 8 bits or four bands become arrays
    (`<name>.npy`) in their own depth, with all bands. Other images than 8-bit grey, RGB and CMYK are copied,
    and so are unreadable files, which training then reports, and images of more than `max_pixels` pixels.

    Returns the number of images of this call by outcome. Raises ValueError without the native library, and if
    `target` holds shards of a call with other settings, or other data.
    """
    _check_call(long_side, quality)
    index = build_index(source, split, labels=False)
    _warn_of_labels(index)
    # They decide the content of the shards; a call that continues another must agree in all of them.
    settings = dict(
        source=os.path.abspath(source),
        split=split,
        images=len(index),
        names=_digest(index),
        long_side=long_side,
        quality=quality if long_side else None,
        shard_images=shard_images,
    )
    _check_files(index)
    folder = _claim(target, split, settings)
    shards = _plan(len(index), shard_images, split, target, folder)
    missing = [shard for shard in shards if not shard.exists()]
    images = _Conversion(index, long_side, quality, max_pixels)
    report = _write(missing, images, num_workers)
    # Only now: half a data set must not look like a whole one.
    for shard in shards:
        if os.path.exists(shard.part):
            os.replace(shard.part, shard.final)
    _remove_leftovers(folder)
    _check(index, target, split, shards)
    report.show()
    return report.outcomes


def _warn_of_labels(index: ImageIndex) -> None:
    if index.paired:
        print(f"warning: the labels beside the images of {printable(index.path)} are left out")


def _check_call(long_side: int | None, quality: int) -> None:
    if not native.library():
        raise ValueError(f"repacking needs the native library: `{native.BUILD}` ({native.describe()})")
    if not 1 <= quality <= 100:
        raise ValueError(f"`quality` must be in 1..100, found {quality}")
    if long_side is not None and long_side < 1:
        raise ValueError(f"`long_side` must be positive, found {long_side}")


def _plan(n: int, shard_images: int, split: str, target: str, folder: str) -> list[Shard]:
    """Divide n images into shards, which are written to `folder` and moved to `target` in the end."""
    shards = []
    for number, first in enumerate(range(0, n, shard_images)):
        file = f"{split}-{number:05d}.tar"
        images = range(first, min(first + shard_images, n))
        shards.append(Shard(images, os.path.join(folder, file), os.path.join(target, file)))
    return shards


class _Report:
    """What was done with the images of one call."""

    def __init__(self) -> None:
        self.outcomes: Counter = Counter()
        self.unreadable: list[str] = []
        self.bytes_before = 0
        self.bytes_after = 0

    def add(self, image: Converted) -> None:
        self.outcomes[image.outcome] += 1
        if image.outcome == UNREADABLE:
            self.unreadable.append(image.name)
        self.bytes_before += image.size_before
        self.bytes_after += len(image.data)

    def show(self) -> None:
        for outcome, images in self.outcomes.items():
            print(f"{images} {outcome}")
        for name in self.unreadable:
            print(f"unreadable: {printable(name)}")
        if self.unreadable:
            print("`python -m util.data check` gives the reasons")
        if self.bytes_before:
            ratio = self.bytes_after / self.bytes_before
            print(f"{self.bytes_before} -> {self.bytes_after} bytes ({ratio:.3f}x)")


def _write(shards: list[Shard], images: "_Conversion", num_workers: int) -> _Report:
    """Convert the images of all `shards`, one after the other, and write each shard to its `part`."""
    # The loader keeps this order, with any number of workers.
    order = [i for shard in shards for i in shard.images]
    options: dict[str, Any] = {}
    if num_workers:
        options["prefetch_factor"] = PREFETCHED
    loader = DataLoader(
        images, batch_size=None, sampler=order, num_workers=num_workers, collate_fn=_unchanged, **options
    )
    report = _Report()
    total = len(images)
    with tqdm(total=total, initial=total - len(order), unit=" images", disable=None) as progress:
        converted = iter(loader)
        for shard in shards:
            with _new_tar(shard.part) as tar:
                for _ in shard.images:
                    image = next(converted)
                    _add(tar, image.name, image.data)
                    report.add(image)
                    progress.update()
    return report


class _Conversion(Dataset):
    """The converted images of an index, made by a loader's workers."""

    def __init__(self, index: ImageIndex, long_side: int | None, quality: int, max_pixels: int):
        self.max_pixels = max_pixels
        self.index = index
        self.long_side = long_side
        self.quality = quality

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Converted:
        name = self.index.name(i)
        # A member of that name would lead outside of the folder that the tar is unpacked in.
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(
                f"{printable(name)} lies outside {self.index.root}: repack folders and tars, not lists of "
                "distant paths"
            )
        try:
            data = self.index.read(i)
        except OSError as error:
            raise ValueError(f"{printable(name)} cannot be read: {error}") from error
        stored, outcome = convert(data, self.long_side, self.quality, self.max_pixels)
        return Converted(_stored_name(name, stored, outcome), stored, outcome, len(data))


def _stored_name(name: str, stored: bytes, outcome: str) -> str:
    """Return the name under which a converted file is stored, and listed as an image.

    The old suffix stays, so that two names cannot become one.
    """
    lower = name.lower()
    # A PNG that has become a JPEG.
    if outcome == ENCODED and not lower.endswith((".jpg", ".jpeg")):
        return f"{name}.jpg"
    if outcome == ARRAY and not lower.endswith(".npy"):
        return f"{name}.npy"
    if is_image_name(os.fsencode(name)):
        return name
    if not suffix_of(os.fsencode(name)) and starts_like_image(stored[:HEAD]):
        return name
    # An unreadable file without a suffix among images, or one of a list of paths.
    return f"{name}.jpg"


def _unchanged(sample: Any) -> Any:
    return sample


@contextlib.contextmanager
def _new_tar(path: str) -> Iterator[tarfile.TarFile]:
    """Open a tar for writing that appears at `path` when it is complete, and not before."""
    with (
        replacing(path, "wb") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        yield tar


def _remove_leftovers(folder: str) -> None:
    """Remove what killed calls have left of shards that they had begun."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*.tar.partial-*")):
        # Another call may do the same.
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _check_files(index: ImageIndex) -> None:
    """Raise ValueError that lists missing and unreadable files, before the first shard is begun.

    Removing one later would change the list of names, and the finished shards could not be used.
    """
    if index.tars:
        return
    paths = (os.path.join(index.root, index.name(i)) for i in range(len(index)))
    closed = [path for path in paths if not os.access(path, os.R_OK)]
    if closed:
        raise ValueError(
            f"{len(closed)} of {counted(len(index), 'file')} cannot be opened: "
            f"{some_names(closed)}: repair or remove them"
        )


def _names(index: ImageIndex) -> Iterator[bytes]:
    return (os.fsencode(index.name(i)) for i in range(len(index)))


def _digest(index: ImageIndex) -> str:
    digest = hashlib.sha256()
    for name in _names(index):
        digest.update(name + b"\0")
    return digest.hexdigest()[:16]


def _claim(target: str, split: str, settings: dict[str, Any]) -> str:
    """Return the hidden folder for finished shards, which also holds the settings.

    The settings decide the content of the shards. Raises ValueError if others have been used in `target`.
    """
    folder = os.path.join(target, f".repack-{split}")
    note = os.path.join(folder, "settings.json")
    if os.path.exists(note):
        # Shards of different settings must not be mixed.
        _check_same_settings(
            read_json(note, dict), settings, f"{target} holds {split} shards", f"{folder} and {split}-*.tar"
        )
        return folder
    root = os.path.join(target, split)
    paths = [path for path in (root, f"{root}.tar") if os.path.exists(path)]
    paths += glob.glob(glob.escape(root) + "-*.tar")
    if paths:
        names = sorted(map(os.path.basename, paths))
        raise ValueError(f"{target} already holds {', '.join(names[:5])}: choose another folder")
    os.makedirs(folder, exist_ok=True)
    if glob.glob(os.path.join(glob.escape(folder), "*.tar")):
        raise ValueError(f"{folder} holds shards without their {os.path.basename(note)}: delete that folder")
    # As a whole: half of a note would refuse the next call.
    write_json(note, settings)
    return folder


def _check_same_settings(earlier: dict, settings: dict, shards: str, leftovers: str) -> None:
    if earlier == settings:
        return
    changes = [
        f"{name} {earlier.get(name)!r} -> {value!r}"
        for name, value in settings.items()
        if earlier.get(name) != value
    ]
    raise ValueError(
        f"{shards} of another call ({', '.join(changes)}): give the same settings, or delete {leftovers}"
    )


def _check(index: ImageIndex, target: str, split: str, shards: list[Shard]) -> None:
    """Raise ValueError unless the shards, as training sees them, have the images and classes of the source.

    This leaves their listing cached.
    """
    # A listing of very young tars is not cached, so wait until they are old enough.
    newest = max(os.stat(shard.final).st_mtime for shard in shards)
    time.sleep(min(SETTLE_SECONDS, max(0.0, newest + SETTLE_SECONDS - time.time())))
    made = build_index(target, split, labels=False)
    if len(made) != len(index) or _folders(made) != _folders(index):
        raise ValueError(
            f"{target} holds {counted(len(made), 'image')} and {index.path} {len(index)}, or "
            f"their folders differ: delete {split}-*.tar and .repack-{split} there and repack again"
        )
    print(made.summary())


def _folders(index: ImageIndex) -> list[bytes]:
    return sorted(name.rpartition(b"/")[0] for name in _names(index))
