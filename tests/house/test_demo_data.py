"""The embedded demo set is small, balanced, readable, and equal to the drawings of its generator.

So are its masks, which fit their pictures.
"""

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
    """All (member, bytes) in the order of the tar: `train`, `val`, `masks/train` or `masks/val`."""
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
        picture, _ = generator.draw(split, name, int(number))
        drawn = np.asarray(picture).astype(float)
        # The loss of one JPEG compression.
        assert np.abs(drawn - decode(data)).mean() < 6


def test_tars_are_reproducible(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "PER_CLASS", {"val": 1})
    for name in ("a", "b"):
        generator.write(tmp_path / name, "val")
    for path, suffix in (("val.tar", "jpg"), ("masks/val.tar", "png")):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
        with tarfile.open(tmp_path / "a" / path) as tar:
            assert tar.getnames() == [f"{name}/0000.{suffix}" for name in generator.CLASSES]


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


# -- masks
# ---------------------------------------------------------------------------------------------------------
def masks(split):
    """Member without suffix -> mask (64, 64), in the order of the tar."""
    return {
        member.name.removesuffix(".png"): decode(data).astype(int) for member, data in read(f"masks/{split}")
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_are_small_grey_pngs_with_the_names_of_the_pictures(split):
    found = read(f"masks/{split}")
    names = [member.name.replace(".jpg", ".png") for member, _ in read(split)]
    assert [member.name for member, _ in found] == names
    for member, data in found:
        assert member.isreg() and (member.mtime, member.uid, member.gid) == (0, 0, 0)
        mask = Image.open(io.BytesIO(data))
        assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (64, 64)), member.name
        # One block of the tar.
        assert len(data) <= 512, member.name


def test_labels_have_names(generator):
    names = (FOLDER / "masks" / "classes.txt").read_text().splitlines()
    assert names == list(generator.LABELS)
    for split in ("train", "val"):
        values = np.stack(list(masks(split).values()))
        assert set(np.unique(values)) == {*range(len(names)), 255}
        assert (values == 255).mean() < 0.02


def test_generator_draws_the_masks_that_are_stored(generator):
    stored = masks("val")
    for name in generator.CLASSES:
        _, drawn = generator.draw("val", name, 2)
        # Another version of Pillow may draw a few pixels differently.
        assert (np.asarray(drawn) != stored[f"{name}/0002"]).mean() < 0.005


def rows(mask, names, *labels):
    """The rows of a mask in which one of the labels occurs."""
    return np.nonzero(np.isin(mask, [names.index(label) for label in labels]).any(1))[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_sky_and_wall_are_above_what_one_stands_on(split, generator):
    for name, mask in masks(split).items():
        if name.split("/")[0] in ("lamp", "table"):
            upper, lower = ["wall"], ["floor"]
        else:
            upper, lower = ["sky"], ["ground", "water"]
        assert rows(mask, generator.LABELS, *upper).max() < rows(mask, generator.LABELS, *lower).min(), name


# The share of pixels that the object takes, at least and at most, for each class.
SHARES = {
    "balloon": (0.04, 0.2),
    "boat": (0.03, 0.15),
    "bridge": (0.12, 0.25),
    "car": (0.03, 0.12),
    "house": (0.06, 0.25),
    "lamp": (0.02, 0.08),
    "mountain": (0.15, 0.4),
    "table": (0.07, 0.15),
    "tower": (0.05, 0.15),
    "tree": (0.05, 0.2),
}


@pytest.mark.parametrize("split", ["train", "val"])
def test_objects_have_their_size(split, generator):
    for name, mask in masks(split).items():
        kind = name.split("/")[0]
        label = {"tree": "tree"}.get(kind, "object")
        low, high = SHARES[kind]
        assert low < (mask == generator.LABELS.index(label)).mean() < high, name


def contrast(picture, mask):
    """How much more the picture changes where the mask changes than elsewhere, from a pixel to the next."""
    inside, across = [], []
    for axis in (0, 1):
        change = np.abs(np.diff(picture, axis=axis)).sum(2)
        border = np.diff(mask, axis=axis) != 0
        across.append(change[border])
        inside.append(change[~border])
    return np.concatenate(across).mean() / np.concatenate(inside).mean()


def test_borders_of_masks_are_edges_of_pictures(generator):
    pictures = {
        member.name.removesuffix(".jpg"): decode(data).astype(float) for member, data in read("train")
    }
    found = masks("train")
    for kind in generator.CLASSES:
        names = [name for name in found if name.startswith(f"{kind}/")]
        true = np.mean([contrast(pictures[name], found[name]) for name in names])
        shifted = np.mean([contrast(pictures[name], np.roll(found[name], (2, 3), (0, 1))) for name in names])
        assert true > 2 and true > 1.4 * shifted, kind


def test_arches_and_gaps_show_what_is_behind(generator):
    water, ground, thing = (generator.LABELS.index(label) for label in ("water", "ground", "object"))
    found = masks("train")
    for number in range(20):
        bridge = found[f"bridge/{number:04d}"]
        # Pillars stand in water: in some row both alternate.
        row = max(range(64), key=lambda y: (bridge[y] == thing).any() * (bridge[y] == water).sum())
        changes = np.diff((bridge[row] == thing).astype(int))
        assert (changes != 0).sum() >= 3, number
        # The deck spans the picture.
        assert (bridge == thing).all(1).any(), number
        # The road belongs to the ground.
        assert (found[f"car/{number:04d}"][-3:] == ground).all(), number
