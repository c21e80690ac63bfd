"""Damaged and hostile pictures through the data sets, as training and evaluation read them.

A picture gives a sample of the right kind, or it is unreadable, which the sample says. The same bytes give
the same pixels from a folder and from a tar. Nothing else may happen.
"""

import contextlib
import io
import itertools
import os
import random
import tarfile
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attacks.children import Begin, Limits, Outcome, Started, judge, measured, watched
from attacks.image_files import READ, Picture, hostile, seeds
from attacks.mutations import changed
from util.data.__main__ import main as data_command
from util.data.datasets import ImageDataset, build_dataset
from util.data.formats import ReadSettings
from util.data.transforms import eval_transform, finetune_transform, pretrain_transform

SIZE = 32
# A picture of the most pixels that are allowed costs about 900 MB.
LIMITS = Limits(cpu=15, wall=60, memory_mb=1100)
LONG = 2  # seconds
BATCH = 125
WAYS = 4  # transforms with three channels
FILLERS = 80  # readable pictures in each folder, to draw replacements from
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".npy")
NAMES = (
    "\x1b[2Jred",
    "a\nb",
    "=1+1",
    "-rf",
    "\u202egpj",
    "\udcff\udcfe",
    "'\"$(touch owned)`",
    "n" * 200,
    " ",
    "日本",
)


def transforms() -> dict[str, tuple[Any, int]]:
    """Return what the mains do to pictures, and with how many channels."""
    return {
        "pretraining": (pretrain_transform(SIZE), 3),
        "fine-tuning": (finetune_transform(SIZE), 3),
        "fine-tuning without colours": (finetune_transform(SIZE, auto_augment=None), 3),
        "evaluation": (eval_transform(SIZE), 3),
        "pretraining in grey": (pretrain_transform(SIZE), 1),
    }


@lru_cache(maxsize=1)
def valid() -> list[Picture]:
    return seeds()


def readable() -> list[Picture]:
    return [file for file in valid() if file.expected == READ]


@lru_cache(maxsize=1)
def given() -> list[Picture]:
    """Return the pictures that are not drawn: valid ones as they are, and hostile ones."""
    return valid() + hostile()


def picture(seed: int, number: int) -> Picture:
    """Return input `number`: first the given pictures, and then damaged ones."""
    if number < len(given()):
        return given()[number]
    draw = random.Random(f"images {seed} {number}")
    base = draw.choice(readable())
    if draw.random() < 0.1:
        base = draw.choice(valid())
    data, changes = changed(base.data, draw, [other.data for other in valid()])
    suffix = base.suffix
    if draw.random() < 0.1:
        suffix = draw.choice(SUFFIXES)
    return Picture(f"{base.what}: {changes}", suffix, data)


def file_name(seed: int, number: int, file: Picture) -> str:
    draw = random.Random(f"names {seed} {number}")
    name = f"{number:06d}"
    if file.make is not None:
        # Behind all others, which then have the same place in the folder and in the tar.
        name = f"z-{name}"
    if draw.random() < 0.05:
        name += draw.choice(NAMES)
    return f"c/{name}{file.suffix}"


# --- a batch ---


class Folder:
    """Pictures in a folder and in a tar, and the data sets that read them."""

    def __init__(self, root: Path, seed: int, numbers: list[int]):
        self.pictures = {number: picture(seed, number) for number in numbers}
        self.names = {n: file_name(seed, n, self.pictures[n]) for n in numbers}
        self.root = root
        (root / "folder" / "train" / "c").mkdir(parents=True)
        (root / "tars").mkdir()
        with tarfile.open(root / "tars" / "train.tar", "w") as tar:
            for number in numbers:
                self._add(tar, self.names[number], self.pictures[number])
            for number, filler in zip(range(FILLERS), itertools.cycle(readable())):
                self._add(tar, f"c/filler-{number}{filler.suffix}", filler)
        self.seed = seed
        # By source and transform. In evaluation no other picture replaces an unreadable one.
        self.sets = {
            name: [self.dataset(source, transform, channels, True) for source in ("folder", "tars")]
            for name, (transform, channels) in transforms().items()
        }
        self.training = self.dataset("folder", pretrain_transform(SIZE), 3, False)
        self.place = [{s.index.name(i): i for i in range(len(s))} for s in self.sets["pretraining"]]
        self.listed = {n for n in numbers if self.place[0].get(self.names[n]) is not None}
        # Number -> the transforms that found the picture unreadable.
        self.refused: dict[int, set[str]] = {}

    def _add(self, tar: tarfile.TarFile, name: str, file: Picture) -> None:
        path = self.root / "folder" / "train" / name
        if file.make is not None:
            file.make(path)
            return
        path.write_bytes(file.data)
        member = tarfile.TarInfo(name)
        member.size = len(file.data)
        tar.addfile(member, io.BytesIO(file.data))

    def dataset(self, source: str, transform: Any, channels: int, evaluation: bool) -> ImageDataset:
        found = build_dataset(
            self.root / source,
            "train",
            transform,
            read=ReadSettings(channels),
            seed=self.seed,
            labels=False,
            evaluation=evaluation,
        )
        assert isinstance(found, ImageDataset)
        return found

    def judge(self, number: int) -> Outcome:
        """Read a picture in every way."""
        file = self.pictures[number]
        outcome = Outcome(number, file.what)
        refused = self.refused.setdefault(number, set())
        if number not in self.listed:
            return outcome
        for name, (_, channels) in transforms().items():
            read = []
            for dataset, place in zip(self.sets[name], self.place):
                # What is no file lies in the folder only. What takes long is read once.
                i = place.get(self.names[number])
                if i is not None and not (read and outcome.seconds > LONG):
                    read.append(_sample(dataset, i, outcome, name))
            samples = [sample for sample in read if sample is not None]
            if any(_problem(outcome, name, sample, channels) for sample in samples):
                continue
            if len(samples) == 2 and not _same(*samples):
                outcome.fail("not repeated", f"{name}: the folder and the tar give other pixels")
            if channels == 3 and any(sample["bad"] for sample in samples):
                refused.add(name)
            elif channels == 3 and samples:
                outcome.verdict = READ
        if file.expected not in ("", outcome.verdict) and not outcome.failures:
            outcome.fail(f"not {file.expected}", outcome.verdict)
        return outcome

    def replace(self, number: int) -> Outcome:
        """Train on a picture; if it is unreadable, another one replaces it.

        The crop is not that of `judge`, and the native library does not see damage outside of a crop.
        """
        outcome = Outcome(number, self.pictures[number].what)
        if number not in self.listed:
            return outcome
        i = self.place[0][self.names[number]]
        sample = _sample(self.training, (1, i), outcome, "training")
        if sample is None or _problem(outcome, "training", sample, 3):
            return outcome
        bad = sample["bad"]
        if bad and (bad[0] != i or sample["index"] in bad):
            outcome.fail("not replaced", f"{bad} by {sample['index']}")
        return outcome

    def check(self) -> Iterator[Outcome]:
        """`python -m util.data check` names the same unreadable pictures, in lines that are safe to print."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            data_command(["check", str(self.root / "folder"), "--num_workers", "0"])
        lines = printed.getvalue().split("\n")
        for number in sorted(self.listed):
            outcome = Outcome(number, self.pictures[number].what)
            # Up to its number a name has no letters that are escaped.
            start = self.names[number][: self.names[number].index(f"{number:06d}") + 6]
            found = [line for line in lines if start in line]
            refused = self.refused[number]
            # A transform may refuse what another one can make a sample of.
            if len(refused) in (0, WAYS) and bool(found) != bool(refused):
                outcome.fail("check disagrees", found or f"{refused}, and it is not named")
            name = self.pictures[number].suffix
            if any(name not in line or not line.isprintable() for line in found):
                outcome.fail("not printable", ascii(found))
            yield outcome


def _sample(dataset: ImageDataset, item: Any, outcome: Outcome, way: str) -> dict | None:
    try:
        with measured(outcome, LIMITS), watched():
            return dataset[item]
    except Started as error:
        outcome.fail("a program", f"{way}: {error}")
    except Exception as error:
        outcome.fail(type(error).__name__, f"{way}: {error}")
    return None


def _problem(outcome: Outcome, name: str, sample: dict, channels: int) -> bool:
    """Note what is wrong with a sample."""
    image = sample["image"]
    fits = torch.is_tensor(image) and image.dtype == torch.uint8 and image.shape == (channels, SIZE, SIZE)
    if not fits:
        outcome.fail("another sample", f"{name}: {getattr(image, 'shape', type(image))}")
    return not fits


def _same(one: dict, other: dict) -> bool:
    return bool(one["bad"]) == bool(other["bad"]) and torch.equal(one["image"], other["image"])


# --- the attack ---


def attack(count: int, seed: int, keep: Path | None, only: int | None = None) -> list[Outcome]:
    """Judge that many pictures."""
    numbers = list(range(max(count, 1)))
    if only is not None:
        numbers = [only]
    given()  # before the forks
    batches = max(1, round(len(numbers) / BATCH))

    def work(batch: list[int], begin: Begin) -> Iterator[Outcome]:
        with tempfile.TemporaryDirectory(prefix="attack-") as root:
            os.chdir(root)
            begin(batch[0], "the folder of a batch")
            yield from judged(Path(root), seed, batch, begin)

    # The given pictures, which include all slow ones, are spread over all batches.
    outcomes = judge([numbers[start::batches] for start in range(batches)], work, LIMITS)
    if keep is not None:
        _keep(keep, seed, outcomes)
    return outcomes


def judged(root: Path, seed: int, batch: list[int], begin: Begin) -> Iterator[Outcome]:
    """Judge each picture, and then the folder of those that did no harm."""
    batch = list(batch)
    folder: Folder | None = None
    while folder is None:
        try:
            folder = Folder(Path(tempfile.mkdtemp(dir=root)), seed, batch)
        except (ValueError, OSError) as error:
            # An error that names the file refuses it, and with it the folder in which it lies.
            named = [n for n in batch if file_name(seed, n, picture(seed, n)) in str(error)]
            if not named:
                raise
            batch.remove(named[0])
            yield Outcome(named[0], picture(seed, named[0]).what)
    harmless = []
    for number in batch:
        begin(number, folder.pictures[number].what)
        outcome = folder.judge(number)
        yield outcome
        if not outcome.failures:
            harmless.append(number)
    if not harmless:
        return
    rest = Folder(Path(tempfile.mkdtemp(dir=root)), seed, harmless)
    rest.refused = folder.refused
    for number in harmless:
        begin(number, folder.pictures[number].what)
        yield rest.replace(number)
    begin(harmless[0], "`check` of a folder")
    yield from rest.check()


def _keep(folder: Path, seed: int, outcomes: list[Outcome]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for outcome in outcomes:
        file = picture(seed, outcome.number)
        if outcome.failures and file.make is None:
            (folder / f"image-{outcome.number}{file.suffix}").write_bytes(file.data)
