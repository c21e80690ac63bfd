"""The embedded demo set is small, balanced, readable, and equal to the drawings of its generator."""

import importlib.util
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "data" / "demo"


def read(split):
    """All (member, JPEG bytes) in the order of the tar."""
    with tarfile.open(FOLDER / f"{split}.tar") as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_demo", FOLDER / "make_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_tars_are_small():
    size = sum((FOLDER / f"{split}.tar").stat().st_size for split in ("train", "val"))
    assert size < 400_000


@pytest.mark.parametrize("split,per_class", [("train", 20), ("val", 5)])
def test_members(split, per_class, generator):
    members = [member for member, _ in read(split)]
    classes = [member.name.split("/")[0] for member in members]
    assert Counter(classes) == dict.fromkeys(generator.CLASSES, per_class)
    # Classes take turns, so any prefix of the tar is balanced.
    assert classes[:10] == classes[10:20] == list(generator.CLASSES)
    assert [member.name for member in members[::10]] == [
        f"balloon/{number:04d}.jpg" for number in range(per_class)
    ]
    assert all(member.isreg() and (member.mtime, member.uid, member.gid) == (0, 0, 0) for member in members)


@pytest.mark.parametrize("split", ["train", "val"])
def test_pictures_are_64_pixel_rgb_jpegs(split):
    for member, data in read(split):
        picture = Image.open(io.BytesIO(data))
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (64, 64)), member.name
        # Neither blank nor almost.
        assert np.asarray(picture).std() > 15, member.name


def test_no_picture_occurs_twice():
    pictures = [
        decode(data).astype(np.float32).ravel() for split in ("train", "val") for _, data in read(split)
    ]
    pictures = np.stack(pictures)
    squares = (pictures**2).sum(1)
    # Mean squared differences of all pairs.
    distance = (squares[:, None] + squares - 2 * pictures @ pictures.T) / pictures.shape[1]
    np.fill_diagonal(distance, np.inf)
    # No near-copies either: validation pictures would otherwise be in the training set.
    assert distance.min() > 20


def test_generator_draws_what_is_stored(generator):
    for split in ("train", "val"):
        member, data = read(split)[0]
        name, number = member.name.removesuffix(".jpg").split("/")
        drawn = np.asarray(generator.draw(split, name, int(number))).astype(float)
        # The loss of one JPEG compression.
        assert np.abs(drawn - decode(data)).mean() < 6


def test_tars_are_reproducible(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "PER_CLASS", {"val": 1})
    for name in ("a", "b"):
        generator.write(tmp_path / f"{name}.tar", "val")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == [f"{name}/0000.jpg" for name in generator.CLASSES]


def test_layout_carries_position():
    """The nearest training patch predicts row and column of a validation patch far better than chance."""

    def patches(split):  # (pictures, 64 cells, 192)
        pixels = np.stack([decode(data) for _, data in read(split)]).astype(np.float32)
        return pixels.reshape(-1, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(pixels), 64, 192)

    train = patches("train").reshape(-1, 192)
    val = patches("val").reshape(-1, 192)
    distance = (train**2).sum(1) - 2 * val @ train.T
    predicted = distance.argmin(1) % 64
    true = np.arange(len(val)) % 64
    # Chance is 1/64 for the cell, and 1/8 for the row and the column.
    assert (predicted == true).mean() > 0.25
    assert (predicted // 8 == true // 8).mean() > 0.4
    assert (predicted % 8 == true % 8).mean() > 0.4
