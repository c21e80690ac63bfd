"""Shards that are read faster than the files they came from: `python -m util.data repack`.

Without `long_side` nothing is lost: JPEGs keep their coefficients and get restart markers, so that a crop's own part of
the entropy-coded data can be decoded alone. With it, images are shrunk to that length and encoded anew as well.
"""

import contextlib
import glob
import hashlib
import io
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Iterator

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from util.data import native
from util.data.sources.image_index import ImageIndex, build_index, some_names
from util.data.transforms import decode

SHARD_IMAGES = 5000
SETTLE_SECONDS = 2.5  # `build_index` does not cache the listing of tars that are younger than 2 s
MARKED, ENCODED, COPIED = "given restart markers", "encoded anew", "copied as they are"
UNREADABLE = "unreadable, copied as they are"


def repack(
    source: str,
    target: str,
    *,
    split: str = "train",
    long_side: int | None = None,
    quality: int = 90,
    num_workers: int = 0,
    shard_images: int = SHARD_IMAGES,
) -> Counter:
    """Write `target`/<split>-*.tar with the images and class folders of one split of `source`; see `build_index` for paths.

    A call that was stopped is continued by the same one: finished shards stay in a hidden folder until the last is
    there. Every JPEG that was rewritten is decoded again and compared: pixel for pixel, or its size where it was encoded
    anew. What is no 8-bit grey, RGB or CMYK image is copied, and so is what cannot be read, which training then reports.

    Returns how many images of this call went which way. Raises ValueError where a call with other settings, or anything
    else, has left shards in `target`, and without the native library.
    """
    if not native.library():
        raise ValueError(f"repacking needs the native library: `{native.BUILD}` ({native.describe()})")
    if not 1 <= quality <= 100 or (long_side is not None and long_side < 1):
        raise ValueError(f"quality {quality} must be in 1..100 and long_side {long_side} positive")
    index = build_index(source, split, labels=False)
    # What decides the shards' content; a resumed call must agree in all of it.
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
    shards = -(-len(index) // shard_images)
    finals = [os.path.join(target, f"{split}-{k:05d}.tar") for k in range(shards)]
    parts = [os.path.join(folder, os.path.basename(path)) for path in finals]
    wanted = [k for k in range(shards) if not os.path.exists(parts[k]) and not os.path.exists(finals[k])]
    order = [i for k in wanted for i in range(k * shard_images, min((k + 1) * shard_images, len(index)))]
    loader = DataLoader(
        _Converted(index, long_side, quality),
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        collate_fn=_unchanged,
        prefetch_factor=32 if num_workers else None,
    )
    counts, bad, before, after = Counter(), [], 0, 0
    with tqdm(total=len(index), initial=len(index) - len(order), unit=" images", disable=None) as progress:
        converted = iter(loader)
        for k in wanted:
            with _shard(parts[k]) as tar:
                for _ in range(k * shard_images, min((k + 1) * shard_images, len(index))):
                    name, data, way, size = next(converted)
                    _add(tar, name, data)
                    counts[way] += 1
                    bad += [name] if way == UNREADABLE else []
                    before, after = before + size, after + len(data)
                    progress.update()
    for part, final in zip(parts, finals):
        if os.path.exists(part):
            os.replace(part, final)
    _check(index, target, split, finals)
    print(*(f"{n} {way}" for way, n in counts.items()), sep="\n")
    print(*(f"unreadable: {name}" for name in bad), sep="\n", end="\n" * bool(bad))
    if before:
        print(f"{before} -> {after} bytes ({after / before:.3f}x)")
    return counts


def convert(data: bytes, long_side: int | None = None, quality: int = 90) -> tuple[bytes, str]:
    """One file -> what to store for it, and which way that went (MARKED, ENCODED, COPIED, UNREADABLE)."""
    if data[:6] == b"\x93NUMPY":
        return data, COPIED
    try:
        pixels = decode(data, 3)
    except ValueError:
        return data, UNREADABLE
    marked = native.add_restart_markers(data)
    if marked is not None and not torch.equal(decode(marked, 3), pixels):
        marked = None
    if not long_side:
        return (data, COPIED) if marked is None else (marked, MARKED)
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("L", "RGB", "CMYK"):  # alpha, palettes, more than 8 bit
            return data, COPIED
        image = image.convert("RGB") if image.mode == "CMYK" else image.copy()
    scale = min(1.0, long_side / max(image.size))
    size = tuple(max(1, round(n * scale)) for n in image.size)
    if scale < 1:
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    encoded = native.add_restart_markers(file.getvalue())
    assert encoded is not None and decode(encoded, 3).shape[1:] == size[::-1], "the new JPEG cannot be read"
    if scale == 1 and marked is not None and len(marked) <= len(encoded):
        return marked, MARKED  # encoding it anew would gain nothing
    return encoded, ENCODED


class _Converted(Dataset):
    def __init__(self, index: ImageIndex, long_side, quality):
        self.index, self.long_side, self.quality = index, long_side, quality

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i) -> tuple[str, bytes, str, int]:
        name = self.index.name(i)
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(
                f"{name} lies outside {self.index.root}: repack folders and tars, not lists of distant paths"
            )
        try:
            data = self.index.read(i)
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        made, way = convert(data, self.long_side, self.quality)
        if way == ENCODED and not name.lower().endswith((".jpg", ".jpeg")):
            name += ".jpg"
        return name, made, way, len(data)


def _unchanged(sample):
    return sample


@contextlib.contextmanager
def _shard(path):
    """A tar to write to, which is at `path` whole or not at all."""
    with open(f"{path}.tmp", "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            yield tar
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def _add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _check_files(index):
    """ValueError that lists the files that are not there or not ours to read, before any shard is begun.

    Later, to remove one would change the list of names, and no finished shard would be taken over.
    """
    if index.tars:
        return
    paths = (os.path.join(index.root, index.name(i)) for i in range(len(index)))
    if bad := [path for path in paths if not os.access(path, os.R_OK)]:
        raise ValueError(
            f"{len(bad)} of {len(index)} files cannot be opened: {some_names(bad)}: mend or remove them"
        )


def _names(index) -> Iterator[bytes]:
    return (os.fsencode(index.name(i)) for i in range(len(index)))


def _digest(index):
    digest = hashlib.sha256()
    for name in _names(index):
        digest.update(name + b"\0")
    return digest.hexdigest()[:16]


def _claim(target, split, settings):
    """The hidden folder for unfinished shards, with the settings in it; refuses what other settings have left."""
    folder = os.path.join(target, f".repack-{split}")
    note = os.path.join(folder, "settings.json")
    if os.path.exists(note):
        with open(note) as file:
            found = json.load(file)
        if found != settings:
            changed = ", ".join(
                f"{k} {found.get(k)!r} -> {v!r}" for k, v in settings.items() if found.get(k) != v
            )
            raise ValueError(
                f"{target} holds {split} shards of another call ({changed}): give the same settings, or delete "
                f"{folder} and {split}-*.tar"
            )
    else:
        taken = [p for p in (split, f"{split}.tar") if os.path.exists(os.path.join(target, p))]
        taken += [os.path.basename(p) for p in glob.glob(glob.escape(os.path.join(target, split)) + "-*.tar")]
        if taken:
            raise ValueError(f"{target} already holds {', '.join(sorted(taken)[:5])}: choose another folder")
        os.makedirs(folder, exist_ok=True)
        with open(note + ".tmp", "w") as file:
            json.dump(settings, file, indent=1)
        os.replace(note + ".tmp", note)
    return folder


def _check(index, target, split, shards):
    """The shards, as training will see them, have the images and classes of the source. Leaves their listing cached."""
    newest = max(os.stat(path).st_mtime for path in shards)
    time.sleep(min(SETTLE_SECONDS, max(0.0, newest + SETTLE_SECONDS - time.time())))
    made = build_index(target, split, labels=False)
    if len(made) != len(index) or _folders(made) != _folders(index):
        raise ValueError(
            f"{target} holds {len(made)} images and {index.path} {len(index)}, or their folders differ: delete "
            f"{split}-*.tar and .repack-{split} there and repack again"
        )
    print(made.summary())


def _folders(index):
    return sorted(name.rpartition(b"/")[0] for name in _names(index))
