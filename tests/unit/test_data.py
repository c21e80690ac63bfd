"""From images on disk to batches: listings, decoding, augmentation, samplers, loader.

Images are generated; some tests also use real ones if they are present.
"""

import importlib.util
import io
import json
import os
import pickle
import random
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import warnings
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision import datasets as tv_datasets
from torchvision import transforms as tv
from torchvision.transforms import v2

import main_pretrain
from util import dist
from util.data import __main__ as commands
from util.data import datasets, formats
from util.data.datasets import ImageDataset, build_class_dataset, build_dataset
from util.data.formats import ReadSettings, decode, is_plain_jpeg
from util.data.formats.jpeg import Decoder, usable
from util.data.formats.pil import decode_by_pil
from util.data.loading.loader import build_loader, check_same_everywhere, collate, eval_loader, train_loader
from util.data.loading.samplers import EpochSampler, EvalSampler
from util.data.pixels import Pixels, normalize, unnormalize
from util.data.recognition import starts_like_image
from util.data.seeding import sample_seed, seeded
from util.data.sources import image_index, listing, tars
from util.data.sources.image_index import NoSplit, check_classes, describe_missing
from util.data.sources.layouts import build_index, class_names, training_classes
from util.data.timm_datasets import TimmDataset
from util.data.transforms import CropSettings, eval_transform, finetune_transform, pretrain_transform
from util.evaluate.passes import extract_features, mean_terms
from util.flags.data_path import DataPath
from util.flags.parser import answer_at_once, parse, run
from util.run.guards import BadImages
from util.run.log import write_predictions
from util.train.setup import Setup

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
NAMES = ["b/2.jpg", "a-b/1.jpg", "a/z.JPG", "a/x/1.png", "a/x-y/0.jpg", "a/10.jpeg", "b/1.webp", "a/9.jpg"]
ORDER = ["a/10.jpeg", "a/9.jpg", "a/z.JPG", "a/x/1.png", "a/x-y/0.jpg", "a-b/1.jpg", "b/1.webp", "b/2.jpg"]


def picture(seed=0, size=(48, 40), mode="RGB"):
    """A smooth random image of (W, H), in which one pixel of shift is visible."""
    channels = len(mode)  # one letter for each
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12, channels), dtype=np.uint8)
    image = Image.fromarray(noise.squeeze())  # (12, 12, 1) -> (12, 12), grey
    return image.resize(size, Image.Resampling.BICUBIC)


def encode(image, format="PNG", **kwargs):
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def write(root, names, broken=()):
    for i, name in enumerate(names):
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        format = Image.registered_extensions()[path.suffix.lower()]
        data = encode(picture(i, size=(40 + i % 7, 36 + i % 5)), format)
        if name in broken:
            data = b"junk"
        path.write_bytes(data)
    return str(root)


def pack(tar, root, names, prefix="./"):
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as file:
        for name in names:
            file.add(Path(root, name), prefix + name)
    return str(tar)


def age(*paths):
    """Make paths look older than the caches' guard against files that are still being written."""
    for path in paths:
        os.utime(path, (time.time() - 60,) * 2)


def names_of(index):
    return [index.name(i) for i in range(len(index))]


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        if isinstance(a[k], torch.Tensor):
            assert torch.equal(a[k], b[k]), k
        else:
            assert a[k] == b[k], k


# --- the index ---


def test_order_and_labels_equal_image_folder(tmp_path):
    root = write(tmp_path / "train", [*NAMES, "loose.png", ".hidden/1.jpg", "a/.z.jpg"])
    Path(root, "a", "notes.txt").write_text("no image")
    index = build_index(tmp_path, "train")
    shutil.rmtree(Path(root, ".hidden"))
    os.remove(Path(root, "a", ".z.jpg"))
    reference = tv_datasets.ImageFolder(root, is_valid_file=lambda p: not p.endswith("txt"))
    assert names_of(index) == [os.path.relpath(p, root) for p, _ in reference.samples] == ORDER
    assert index.labels.tolist() == [label for _, label in reference.samples]
    assert index.classes == reference.classes == ["a", "a-b", "b"]
    assert index.summary() == (
        f"{tmp_path}: 8 images, 3 classes (class folders; 1 image outside class folders ignored; "
        "left out: 1 .txt, 2 hidden)"
    )
    assert [index.read(i) for i in range(8)] == [Path(p).read_bytes() for p, _ in reference.samples]


@pytest.mark.parametrize(
    "transform", [pretrain_transform(24), finetune_transform((16, 24)), eval_transform(16)]
)
def test_every_layout_gives_the_same_samples(tmp_path, transform):
    names = [*NAMES, "loose.png", "a/.hidden.jpg", ".hidden/1.jpg"]
    root = write(tmp_path / "folder" / "train", names)
    shutil.copytree(root, tmp_path / "bare")
    for i, (folder, part) in enumerate(
        {
            "tar/train.tar": names,
            "x.tar": names[::-1],
            "shards/train-0.tar": names[::2],
            "shards/train-1.tar": names[1::2],
        }.items()
    ):
        Path(tmp_path, folder).parent.mkdir(exist_ok=True)
        pack(tmp_path / folder, root, part, prefix=("./", "")[i % 2])
    Path(root, "list.txt").write_text("# images\n\n" + "\n".join(["loose.png", *ORDER]) + "\r\n")
    for labels in (True, False):
        expected = build_dataset(tmp_path / "folder", "train", transform, seed=3, labels=labels)
        assert names_of(expected.index) == ["loose.png"] * (not labels) + ORDER
        for layout in ("bare", "tar", "x.tar", "shards") + ("folder/train/list.txt",) * (not labels):
            found = build_dataset(tmp_path / layout, "train", transform, seed=3, labels=labels)
            assert names_of(found.index) == names_of(expected.index), layout
            for i in range(len(found)):
                same(found[2, i], expected[2, i])


@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not installed")
def test_real_tar_equals_real_folder(tmp_path):
    with tarfile.open(REAL / "mini_imagenet20" / "val.tar") as tar:
        safely = {}
        if hasattr(tarfile, "data_filter"):  # since Python 3.11.4
            safely = {"filter": "data"}
        tar.extractall(tmp_path / "val", members=tar.getmembers()[:300], **safely)
        pack(tmp_path / "val.tar", tmp_path / "val", [m.name for m in tar.getmembers()[:300]], prefix="")
    index = build_index(tmp_path, "val")
    (tmp_path / "val").rename(tmp_path / "moved")
    tar_index = build_index(tmp_path, "val")
    assert (index.kind, tar_index.kind) == ("class folders", "val.tar")
    assert names_of(index) == names_of(tar_index)
    assert index.classes == tar_index.classes and len(index.classes) == 20
    (tmp_path / "moved").rename(tmp_path / "val")
    a, b = (ImageDataset(x, pretrain_transform(64)) for x in (index, tar_index))
    for i in range(0, 300, 7):
        same(a[5, i], b[5, i])
    # A link, so that nothing is written next to the real one.
    os.symlink(REAL / "photos.tar", tmp_path / "photos.tar")
    photos = build_index(tmp_path / "photos.tar", labels=False)
    data = photos.read(100)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))  # (H, W, 3)
    assert (decode(data).numpy() == expected.transpose(2, 0, 1)).all()


def old_tar(tmp_path):
    """A tar of NAMES that is old enough for its listing to be cached, and the folder of its files."""
    root = write(tmp_path / "src", NAMES)
    tar = pack(tmp_path / "train.tar", root, NAMES)
    age(tar)
    return tar, root


def test_a_tar_is_indexed_once(tmp_path, monkeypatch):
    tar, _ = old_tar(tmp_path)
    first = build_index(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # no temporary files
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("the tar was indexed again"))
    second = build_index(tmp_path)
    assert names_of(second) == names_of(first) == ORDER
    assert second.read(5) == first.read(5)
    assert np.array_equal(first.labels, second.labels) and second.classes == first.classes
    with np.load(tar + ".index.npz", allow_pickle=False) as arrays:
        assert all(a.dtype.kind in "iu" for a in arrays.values())


def test_a_tar_that_was_just_written_is_not_cached(tmp_path):
    tar = pack(tmp_path / "train.tar", write(tmp_path / "src", NAMES), NAMES)
    build_index(tmp_path)
    assert not Path(tar + ".index.npz").exists()  # its time cannot be trusted yet


def test_a_changed_tar_or_a_damaged_cache_is_indexed_again(tmp_path):
    tar, root = old_tar(tmp_path)
    build_index(tmp_path)
    pack(tar, root, NAMES[:4])
    assert names_of(build_index(tmp_path)) == [n for n in ORDER if n in NAMES[:4]]
    age(tar)
    build_index(tmp_path)
    os.truncate(tar + ".index.npz", 300)
    assert len(build_index(tmp_path)) == 4


def test_the_cache_of_a_tar_lies_beside_it_or_in_the_users_cache(tmp_path, monkeypatch):
    tar, root = old_tar(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(build_index("train.tar")) == 8 and Path(tar + ".index.npz").exists()
    os.remove(tar + ".index.npz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(root) / "cache"))
    tmp_path.chmod(0o555)  # the user may not write here
    assert len(build_index(tmp_path)) == 8 and not Path(tar + ".index.npz").exists()
    monkeypatch.setattr(listing, "list_tar", lambda path: pytest.fail("the tar was listed again"))
    assert len(build_index(tmp_path)) == 8
    assert len(list((Path(root) / "cache" / "mae_pl").iterdir())) == 1
    tmp_path.chmod(0o755)


def test_a_tar_that_shrinks_later_is_an_error_of_its_images(tmp_path):
    tar, _ = old_tar(tmp_path)
    index = build_index(tmp_path)
    index.read(0)  # opens it
    os.truncate(tar, Path(tar).stat().st_size // 2)
    with pytest.raises(OSError, match="ends inside"):
        [index.read(i) for i in range(8)]


@pytest.mark.parametrize("place", ["train", "."])
def test_large_folder_listing_is_cached_and_checked(tmp_path, monkeypatch, place):
    write(tmp_path / place, ORDER[3:])
    folders = [p for p in [tmp_path / place, *(tmp_path / place).rglob("*")] if p.is_dir()]
    age(*folders)
    build_index(tmp_path)
    assert not (tmp_path / ".index").exists()  # small folders are listed every time
    monkeypatch.setattr(listing, "CACHE_FOLDERS_ABOVE", 1)
    build_index(tmp_path)
    assert (tmp_path / ".index").is_dir()
    with monkeypatch.context() as patch:
        scandir = os.scandir

        def first_look(path):
            # What lies beside train/ is looked at, and nothing in it.
            assert place == "train" and Path(path).name in (tmp_path.name, "."), "it was listed again"
            return scandir(path)

        patch.setattr(os, "scandir", first_look)
        assert names_of(build_index(tmp_path)) == ORDER[3:]
        assert set(build_index(tmp_path, labels=False).labels) == {-1}
        patch.chdir(tmp_path.parent)  # and the same by a relative path
        assert names_of(build_index(tmp_path.name)) == ORDER[3:]
    write(tmp_path / place, ["a/x/0.jpg"])  # in a nested folder
    assert names_of(build_index(tmp_path)) == ["a/x/0.jpg", *ORDER[3:]]


def test_a_bad_layout_stays_bad_when_its_listing_is_cached(tmp_path, monkeypatch):
    write(tmp_path, ORDER[3:])
    write(tmp_path / "whole", ["train/a/1.jpg", "val/a/1.jpg"])
    age(tmp_path, *tmp_path.rglob("*"))
    monkeypatch.setattr(listing, "CACHE_FOLDERS_ABOVE", 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Give .*/whole, which holds"):
            build_index(tmp_path)


def test_index_is_compact():
    names = [f"class{i % 100:03}/image{i:07}.jpg".encode() for i in range(20_000)]
    index = image_index.ImageIndex("", "", "", listing.from_names(names))
    arrays = [v for v in vars(index).values() if isinstance(v, np.ndarray)]
    assert sum(a.nbytes for a in arrays) / len(names) <= len(names[0]) + 8 + 4
    assert all(
        len(v) <= 100 for v in vars(index).values() if hasattr(v, "__len__") and not isinstance(v, np.ndarray)
    )
    assert index.name(19_999) == "class099/image0019999.jpg" and index.labels[200] == 1


def test_more_shards_than_open_files_and_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(image_index, "MAX_OPEN_TARS", 2)
    root = write(tmp_path / "src", ORDER)
    os.link(Path(root, "a/9.jpg"), Path(root, "b/9.jpg"))
    linked = {3: ["a/9.jpg", "b/9.jpg"]}  # in the last shard
    for i in range(4):
        pack(tmp_path / f"train-{i}.tar", root, ORDER[2 * i : 2 * i + 2] + linked.get(i, []))
    index = build_index(tmp_path)
    index.read(0)
    index = pickle.loads(pickle.dumps(index))  # as for a spawned worker, with a file open
    assert "b/9.jpg" in names_of(index)
    for i in [*range(len(index))] * 2:
        assert index.read(i) == Path(root, index.name(i)).read_bytes()
    assert len(index._files) == 2


def compressed(path):
    (path / "train.tar.gz").write_bytes(b"\x1f\x8b")
    return path, {}


def disguised(path):
    with tarfile.open(path / "train.tar", "w:gz") as tar:
        tar.add(write(path / "src", NAMES))
    return path, {}


def damaged(path, change):
    tar = Path(pack(path / "train.tar", write(path / "src", NAMES), NAMES, prefix=""))
    data = bytearray(tar.read_bytes())
    change(data, data.find(NAMES[4].encode()))  # where the fifth member's header starts
    tar.write_bytes(data)
    return path, {}


def cut_in_header(path):
    return damaged(path, lambda data, at: data.__delitem__(slice(at + 100, None)))


def cut_in_data(path):
    return damaged(path, lambda data, at: data.__delitem__(slice(at + 600, None)))


def overwritten(path):
    return damaged(path, lambda data, at: data.__setitem__(slice(at, at + 512), b"x" * 512))


def files(path, *names):
    for name in names:
        (path / name).write_bytes(b"")
    return path


def text(path, content):
    (path / "list.txt").write_bytes(content)
    return path / "list.txt"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: (p / "nowhere", {}), "no such file or folder: .*nowhere$"),
        (lambda p: (p, {}), "no images in .*: found nothing.*<class>"),
        (lambda p: (write(p, ["train/x.txt.jpg"]) and p, {}), "holds 1 loose image and no class folders"),
        (
            lambda p: (write(p, ["val/1.jpg", "val/2.jpg"]), dict(split="val")),
            "2 loose images .*val/<class>/.*valprep",
        ),
        (
            lambda p: (write(p, ["train/a/1.jpg"]), dict(split="val")),
            r"no val/, val.tar, val-\*.tar or val.csv in.*found 1 folder \(train\).*{train,val}/<class>",
        ),
        (
            lambda p: (write(p, ["val/a/1.jpg", "x/1.jpg"]), {}),
            r"no train/: found 2 folders \(val, x\)\. Move the class folders into train/\. If val is a class "
            r"like x, rename it: its name stands for a split\.$",
        ),
        (
            lambda p: (write(p, ["cat/1.jpg", "dog/1.jpg", "test/1.jpg"]), {}),
            r"Move the class folders into train/, and rename test to val\. If test is a class like",
        ),
        (
            lambda p: (write(p, ["cat/1.jpg", "dog/1.jpg", "test/1.jpg"]), dict(split="val")),
            r"Move the class folders into train/, and rename test to val\.$",
        ),
        (
            lambda p: (write(files(p, "train-0.tar"), ["test/a/1.jpg"]), dict(split="val")),
            r"\. Rename test to val, or give `val_split` test\.$",
        ),
        (
            lambda p: (write(p, ["training/a/1.jpg", "test/a/1.jpg"]), {}),
            r"Rename training to train and test to val\.$",
        ),
        (
            lambda p: (write(p, ["x/1.jpg", "test/1.jpg"]), dict(labels=False)),
            "Rename test to val, or give the folder",
        ),
        (
            lambda p: (write(p, ["i/train/a/1.jpg", "i/val/a/1.jpg"]), dict(labels=False)),
            "Give .*/i, which holds",
        ),
        (
            lambda p: (write(p, ["in/x/a/1.jpg", "in/x/b/1.jpg"]), {}),
            "the only class .* 'in'.*by one folder",
        ),
        (
            lambda p: ([write(p, ["a/1.jpg"]), *((p / x).mkdir() for x in "bc")][0], {}),
            "folders without images.*: b, c",
        ),
        (
            lambda p: ([(p / x).mkdir() for x in "abc"] and p, dict(labels=False)),
            r"found 3 folders \(a, b, c\)\. ",
        ),
        (compressed, "train.tar.gz is compressed.*gunzip"),
        (disguised, "train.tar is compressed"),
        (cut_in_data, "is damaged at byte \\d+, after 4 images: .*0.jpg has a size of \\d+ bytes, and 88 "),
        (cut_in_header, "is damaged at byte \\d+, after 4 images"),
        (overwritten, "is damaged at byte \\d+, after 4 images"),
        (
            lambda p: (pack(p / "x.tar", write(p, ["1.jpg"]), ["1.jpg"], ""), {}),
            "x.tar holds 1 image without a label",
        ),
        (
            lambda p: (pack(p / "x.tar", write(p, ["a/1.jpg"]), ["a/1.jpg"]), dict(split="val")),
            "x.tar is one file and has no val images.*{train,val}.tar",
        ),
        (lambda p: (text(p, b"a.jpg\n"), dict(labels=False)), "the first path in .* does not exist"),
        (lambda p: (text(p, b"a.jpg\n"), {}), "a list of 1 path, which has no labels"),
        (lambda p: (text(p, b"# none\n"), dict(labels=False)), "lists no images"),
        (lambda p: (text(p, b"\xff\xd8\0"), dict(labels=False)), "is not a folder, a .tar or a text file"),
        (lambda p: ("", dict(labels=False)), "is empty"),
        (lambda p: (text(p, b"file,label\na.jpg,1\n"), dict(labels=False)), "file,label.*without a header"),
        (
            lambda p: (Path(write(p, ["1.jpg"]), "1.jpg"), dict(labels=False)),
            "1.jpg is a single image.*folder",
        ),
        (lambda p: (Path(write(p, ["1.jpg"]), "1.jpg"), {}), "1.jpg is a single image.*{train,val}/<class>"),
        (
            lambda p: (files(p, "data.mdb", "lock.mdb"), dict(labels=False)),
            r"2 other files \(data.mdb, lock.mdb\).*train-\*.tar",
        ),
        (lambda p: (files(p, *map(str, range(7))), {}), r"7 other files \(0, 1, 2, 3, 4, \.\.\.\)"),
        (
            lambda p: (write(p, ["Train/a/1.jpg", "Valid/a/1.jpg"]), dict(labels=False)),
            "Rename Train to train and Valid to val, or give",
        ),
        (
            lambda p: (write(p, ["train/a/1.jpg", "validation/a/1.jpg", "test/a/1.jpg"]), dict(split="val")),
            r"Rename validation to val, or give `val_split` validation\.$",
        ),
    ],
)
def test_bad_layouts_are_named(tmp_path, make, message):
    path, kwargs = make(tmp_path)
    with pytest.raises(ValueError) as error:
        build_index(path, **kwargs)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("folders", [("Test", "Unlabeled"), ("Blood", "Test"), ("Training", "Blood")])
def test_one_name_of_a_split_in_other_capitals_is_a_folder_like_others(tmp_path, folders):
    write(tmp_path, [f"{folder}/1.jpg" for folder in folders])
    assert len(build_index(tmp_path, labels=False)) == 2


def test_many_folders_without_validation_images_are_not_searched(tmp_path, monkeypatch):
    """Pretraining on such data is common, and each look inside costs time on a network file system."""
    write(tmp_path, [f"{i:03}/1.jpg" for i in range(100)])
    looks = []
    real = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: looks.append(path) or real(path))
    with pytest.raises(NoSplit, match="no val/"):
        build_index(tmp_path, "val")
    assert len(looks) < 20


@pytest.mark.parametrize(
    "path, options",
    [
        ("d/train", dict(split="val")),
        ("d/train/a", dict(split="val")),
        ("d/train/a/1.jpg", dict(split="val")),
        ("d/val/a/1.jpg", dict(labels=False)),
        ("d/train/empty", dict(labels=False)),
        (".", dict(split="val")),
        (".", dict(labels=False)),
        ("tars/train.tar", dict(split="val")),
    ],
)
def test_the_folder_that_an_error_names_serves(tmp_path, monkeypatch, path, options):
    root = write(tmp_path / "d", ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg"])
    for split in ("train", "val"):
        (tmp_path / "tars").mkdir(exist_ok=True)
        pack(tmp_path / "tars" / f"{split}.tar", Path(root, split), ["a/1.jpg", "b/1.jpg"])
    (tmp_path / "d" / "train" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        build_index(path, **options)
    (tmp_path / "d" / "train" / "empty").rmdir()
    named = re.search(r"Give (\S+), which holds", str(error.value))
    for split in ("train", "val"):
        assert build_index(named[1], split).classes == ["a", "b"]


def test_class_names_must_agree(tmp_path):
    write(tmp_path, ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"])
    train, val = (build_index(tmp_path, s) for s in ("train", "val"))
    check_classes(train, train)
    with pytest.raises(ValueError, match="only in training: b; only in validation: c"):
        check_classes(train, val)


@pytest.mark.parametrize("layout", ["folders", "tars"])
def test_validation_images_may_lack_classes(tmp_path, layout):
    """Their labels are those of training, also if the class has no folder."""
    names = {
        "train": ["a/1.jpg", "b/1.jpg", "c/1.jpg", "d/1.jpg"],
        "val": ["b/1.jpg", "b/2.jpg", "d/1.jpg", "loose.jpg"],
    }
    for split, listed in names.items():
        root = write(tmp_path / "f" / split, listed)
        if layout == "tars":
            (tmp_path / "t").mkdir(exist_ok=True)
            pack(tmp_path / "t" / f"{split}.tar", Path(root), listed)
    folder = tmp_path / layout[0]
    assert training_classes(str(folder)) == class_names(folder) == ["a", "b", "c", "d"]
    if layout == "folders":
        (folder / "val" / "c").mkdir()
        (folder / "train" / ".hidden").mkdir()
    train, val = (build_index(folder, split) for split in ("train", "val"))
    before = val.digest()
    assert describe_missing(val) == (
        "2 of 3 classes have validation images: no accuracy for c" if layout == "folders" else ""
    )
    check_classes(train, val)
    assert val.classes == ["a", "b", "c", "d"] and val.labels.tolist() == [1, 1, 3]
    assert describe_missing(val) == "2 of 4 classes have validation images: no accuracy for a, c"
    assert describe_missing(train) == "" and val.digest() != before
    dataset = ImageDataset(val, eval_transform(16), evaluation=True)
    assert [dataset[i]["label"] for i in range(3)] == [1, 1, 3]
    assert training_classes(str(folder / "val")) == training_classes(str(tmp_path / "none")) == []


def test_the_digest_is_of_the_images_that_are_used(tmp_path):
    write(tmp_path / "a" / "train", ["x/1.jpg", "y/2.jpg"])
    write(tmp_path / "b" / "train", ["x/1.jpg", "y/2.jpg", "loose.jpg"])
    a, b = (build_index(tmp_path / name) for name in "ab")
    assert a.digest() == b.digest() and len(a.digest()) == 64
    with_loose = build_index(tmp_path / "b", labels=False)
    assert with_loose.digest() not in (a.digest(), build_index(tmp_path / "a", labels=False).digest())
    write(tmp_path / "b" / "train", ["x/3.jpg"])
    assert build_index(tmp_path / "b").digest() != a.digest()


# --- decoding ---


@pytest.mark.parametrize(
    "format, mode, options",
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", dict(progressive=True)),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "L", {}),
        ("PNG", "P", dict(transparency=bytes(range(256)))),
        ("WEBP", "RGB", dict(lossless=True)),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("GIF", "P", {}),
        ("PPM", "RGB", {}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("decoder", ["torchcodec", "torchvision", "PIL"])
@pytest.mark.filterwarnings("error:.*ransparency")
def test_decode_equals_pil(format, mode, options, channels, decoder, monkeypatch):
    decode_by(decoder, monkeypatch)
    data = encode(in_mode(mode), format, **options)
    expected = np.asarray(by_pil(data, mode, channels)).reshape(40, 48, channels)
    decoded = decode(data, ReadSettings(channels))
    assert decoded.dtype == torch.uint8 and (decoded.numpy() == expected.transpose(2, 0, 1)).all()
    assert is_plain_jpeg(data) == (format == "JPEG" and mode != "CMYK")
    for part in (0.5, 0.9):
        with pytest.raises(ValueError, match="not a readable image"):
            decode(data[: int(len(data) * part)], ReadSettings(channels))
    with pytest.raises(ValueError, match="more than `max_pixels` 900"):
        decode(data, ReadSettings(channels, max_pixels=900))


def torchvision_version():
    return tuple(int(part) for part in torchvision.__version__.split(".")[:2])


def decode_by(name, monkeypatch):
    """Let a library, or PIL, decode ordinary JPEGs; skip the test if it is not installed."""
    found = Decoder("PIL", decode_by_pil)
    if name != "PIL":
        pytest.importorskip(name)
        found = usable(name)
        # The libjpeg of older ones makes other pixels of 4:4:0, and then it is not used.
        if found is None and name == "torchvision" and torchvision_version() < (0, 29):
            pytest.skip("this torchvision differs from PIL")
        assert found is not None, f"{name} is installed, and differs from PIL or cannot be loaded"
    monkeypatch.setattr(formats.jpeg, "decoder", lambda: found)


@pytest.mark.parametrize("decoder", ["torchcodec", "torchvision", "PIL"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("name", ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1"])
def test_every_decoder_reads_every_subsampling_as_pil_does(name, progressive, decoder, monkeypatch):
    # PIL does not write the last two. Their files have as many blocks as those of another subsampling.
    written, sampling = {"4:4:0": ("4:2:2", b"\x12"), "4:1:1": ("4:2:0", b"\x41")}.get(name, (name, b""))
    frame = {False: b"\xff\xc0", True: b"\xff\xc2"}[progressive]
    data = encode(picture(2, (64, 64)), "JPEG", subsampling=written, progressive=progressive)
    if sampling:
        at = data.index(b"\x03\x01", data.index(frame)) + 2
        data = data[:at] + sampling + data[at + 1 :]
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    decode_by(decoder, monkeypatch)
    assert (decode(data).numpy() == expected).all()


@pytest.mark.parametrize("decoder", ["torchcodec", "torchvision", "PIL"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_no_decoder_turns_an_image_unless_it_is_asked_to(orientation, decoder, monkeypatch):
    decode_by(decoder, monkeypatch)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(1), "JPEG", exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (decode(data).numpy() == stored.transpose(2, 0, 1)).all()
    assert (decode(data, ReadSettings(exif="apply")).numpy() == turned.transpose(2, 0, 1)).all()
    # EXIF between the scans of a progressive file.
    progressive = encode(picture(1), "JPEG", progressive=True)
    segment = data[2 : 4 + int.from_bytes(data[4:6])]
    if segment[:2] != b"\xff\xe1":  # JFIF comes first
        at = data.index(b"\xff\xe1")
        segment = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4])]
    last = progressive.rindex(b"\xff\xc4")  # the tables of the last scan
    moved = progressive[:last] + segment + progressive[last:]
    assert (decode(moved).numpy() == decode(progressive).numpy()).all()


def test_the_decoder_is_the_first_library_that_can_be_loaded_and_agrees_with_pil(monkeypatch):
    """A library that is absent, damaged, differs in one pixel or shows half an image is passed over."""

    def absent():
        raise ImportError("no module")

    def broken():
        raise OSError("libtorchcodec_image.so: undefined symbol")

    def brighter():
        return lambda data, read: decode_by_pil(data, read).clamp(min=1)

    def lenient():
        def decode(data, read):
            try:
                return decode_by_pil(data, read)
            except OSError:
                return torch.zeros(read.in_chans, 32, 32, dtype=torch.uint8)

        return decode

    def same():
        return decode_by_pil

    for faulty in (absent, broken, brighter, lenient):
        monkeypatch.setattr(formats.jpeg, "LIBRARIES", {"torchcodec": faulty, "torchvision": same})
        formats.jpeg.decoder.cache_clear()
        assert formats.jpeg.decoder().name == "torchvision", faulty
        monkeypatch.setattr(formats.jpeg, "LIBRARIES", {"torchcodec": faulty, "torchvision": faulty})
        formats.jpeg.decoder.cache_clear()
        assert formats.jpeg.decoder() == Decoder("PIL", decode_by_pil)
    monkeypatch.undo()
    formats.jpeg.decoder.cache_clear()
    installed = [name for name in formats.jpeg.LIBRARIES if importlib.util.find_spec(name)]
    assert formats.jpeg.decoder().name == installed[0]


@pytest.mark.parametrize("decoder", ["torchcodec", "torchvision"])
def test_decoding_neither_warns_nor_changes_the_filters_of_warnings(decoder, monkeypatch):
    decode_by(decoder, monkeypatch)
    data = encode(picture(1), "JPEG")
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(data)
        decode(data, ReadSettings(1))
    assert not caught and warnings.filters == before


@pytest.mark.parametrize("tar", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", ">u2", "float64"])
@pytest.mark.parametrize("shape", [(5, 6, 7), (6, 7, 5)])
def test_arrays_are_read_without_a_copy_and_can_be_written_to(tar, dtype, shape, tmp_path):
    array = np.random.default_rng(3).integers(0, 200, shape).astype(dtype)
    np.save(tmp_path / "0.npy", array)
    data = (tmp_path / "0.npy").read_bytes()
    path = tmp_path
    if tar:
        path = tmp_path / "train.tar"
        pack(path, tmp_path, ["0.npy"])
        (tmp_path / "0.npy").unlink()
    dataset = build_dataset(path, "train", lambda image: image, read=ReadSettings(5), labels=False)
    expected = np.moveaxis(array, shape.index(5), 0).astype(np.float64)
    for _ in range(2):  # what is written to an image is not seen by the next reader
        image = dataset[0]["image"]
        assert (image.numpy() == expected).all() and image.is_contiguous()
        image.zero_()
    # The caller's bytes are its own; the memory of a view is shared where pixels lie in it as they are.
    decode(data, ReadSettings(5)).zero_()
    assert (np.load(io.BytesIO(data)) == array).all()
    view = memoryview(bytearray(data))
    decode(view, ReadSettings(5)).zero_()
    shared = shape[0] == 5 and dtype not in (">u2", "float64")
    assert (np.load(io.BytesIO(view)) == 0).all() == shared


def test_large_values_are_finite_though_their_sum_is_not():
    array = np.full((1, 40, 40), 9e36, np.float32)
    assert (decode(encode_npy(array), ReadSettings(1)).numpy() == array).all()
    assert torch.isfinite(pretrain_transform(16)(decode(encode_npy(array), ReadSettings(1)), 0)).all()
    for value in (np.nan, np.inf, -np.inf):
        array[0, 1, 2] = value
        with pytest.raises(ValueError, match="1 of its 1600 values are not finite"):
            decode(encode_npy(array), ReadSettings(1))
    array[0, 3, 4] = np.inf
    with pytest.raises(ValueError, match="2 of its 1600 values are not finite"):
        decode(encode_npy(array), ReadSettings(1))
    nodata = np.full((1, 8, 8), 300, np.float32)
    nodata[0, 2] = -3.4028235e38  # GDAL's, which resizing makes NaN
    with pytest.raises(ValueError, match=r"8 of its 64 values are beyond 1e\+37: if they mark missing data"):
        decode(encode_npy(nodata), ReadSettings(1))


def encode_npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def in_mode(mode):
    if mode == "P":
        return picture(1).quantize(256)
    return picture(1, mode="RGBA").convert(mode)


def by_pil(data, mode, channels):
    """PIL's image of a file, whose own mode is `mode`, in the mode of 1, 3 or 4 channels."""
    image = Image.open(io.BytesIO(data))
    if image.format == "JPEG" and mode == "RGB" and channels == 1:
        image.draft("L", None)  # the luma in the file; by way of RGB it would change
    if image.format == "PNG" and mode == "P":
        image = image.convert("RGBA")
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def test_every_format_has_suffixes_and_a_decoder():
    assert len(set(formats.IMAGE_SUFFIXES)) == len(formats.IMAGE_SUFFIXES)
    assert {b".jpg", b".png", b".npy"} <= set(formats.IMAGE_SUFFIXES)
    assert formats.format_of(encode(picture())).decode(encode(picture()), ReadSettings()).shape == (3, 40, 48)
    assert formats.format_of(b"") is formats.FORMATS[-1], "the last one takes what no other matches"


def test_a_new_format_is_one_entry_of_the_table(monkeypatch):
    def decode_raw(data, read):
        return torch.frombuffer(bytearray(data[4:]), dtype=torch.uint8).view(read.in_chans, 2, 2)

    def describe_raw(data, read):
        return formats.Facts(torch.uint8, read.in_chans)

    def is_raw(data):
        return data[:4] == b"RAW!"

    assert not starts_like_image(b"RAW!")
    raw = formats.Format((".raw",), is_raw, decode_raw, describe_raw, is_raw, read_by_pil=False)
    monkeypatch.setattr(formats, "FORMATS", (raw, *formats.FORMATS))
    assert starts_like_image(b"RAW!")
    assert decode(b"RAW!" + bytes(range(12))).tolist()[2] == [[8, 9], [10, 11]]


def test_decode_16_bit_arrays_and_junk():
    values = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    files = {format: encode(Image.fromarray(values), format) for format in ("PNG", "TIFF")}
    files["PGM"] = b"P5\n16 16\n65535\n" + values.astype(">u2").tobytes()
    for format, data in files.items():
        for channels in (1, 3):
            found = decode(data, ReadSettings(channels))
            assert found.dtype == torch.uint16 and (found.numpy() == values).all(), format
            assert found.shape == (channels, 16, 16)
    array = np.random.default_rng(0).integers(0, 256, (6, 7, 5), dtype=np.uint8)

    def npy(x):
        file = io.BytesIO()
        np.save(file, x, allow_pickle=True)
        return file.getvalue()

    assert (decode(npy(array), ReadSettings(5)).numpy() == array.transpose(2, 0, 1)).all()
    assert (decode(npy(array[..., 0]), ReadSettings(1)).numpy() == array[None, ..., 0]).all()
    # Grey becomes three equal channels, as in other formats, unless bands are picked.
    grey = decode(npy(array[..., 0]), ReadSettings(3))
    assert grey.shape[0] == 3 and all((channel.numpy() == array[..., 0]).all() for channel in grey)
    assert decode(npy(array[..., 0]), ReadSettings(3, channels=(0,))).shape[0] == 1
    with pytest.raises(ValueError, match="which is one band"):
        decode(npy(array[..., 0]), ReadSettings(3, channels=(0,), bands=3))
    for data, channels, message in [
        (npy(array), 3, "found uint8 .*expected .H, W, 3."),
        (npy(array.astype(complex)), 5, "complex128, which are no pixels"),
        (npy(np.array([{}, 1])), 1, "found object"),
        (npy(array)[:-1], 5, "not a readable"),
        (b"", 3, "0 bytes"),
        (b"<html>", 3, "<htm"),
        (encode(picture()), 5, "1, 3 or 4 channels, not 5: use .npy"),
        (
            encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
            1,
            "16 of its 16 values are not",
        ),
        (encode(Image.fromarray(np.full((4, 4), 1 << 25, np.int32)), "TIFF"), 1, "integers reach 33554432"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode(data, ReadSettings(channels))


# --- transforms ---


@pytest.mark.parametrize("size, scale", [(32, (0.2, 1.0)), ((20, 50), (0.05, 0.5))])
def test_pretrain_transform_is_torchvisions_on_pil(size, scale):
    image = picture(2, size=(97, 61))
    tensor = decode(encode(image))
    reference = tv.Compose(
        [
            tv.RandomResizedCrop(size, scale, interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(0.3),
            tv.RandomVerticalFlip(0.6),
            tv.PILToTensor(),
        ]
    )
    transform = pretrain_transform(size, scale, hflip=0.3, vflip=0.6)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = reference(image).int()
        torch.manual_seed(seed)
        found = transform(tensor)
        assert found.dtype == torch.uint8
        assert (found.int() - expected).abs().max() <= 2  # a pixel of shift gives > 20
        torch.manual_seed(seed)
        box = tv.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
        torch.manual_seed(seed)
        assert box == transform.draw(*tensor.shape[-2:])[:4]


@pytest.mark.parametrize(
    "height, width", [(375, 500), (500, 333), (10, 400), (400, 10), (1, 1), (3, 4), (50, 199)]
)
def test_boxes_and_flips_are_torchvisions(height, width):
    """Also where no crop of the wanted area and aspect ratio fits into the image."""
    ours = pretrain_transform(8, hflip=0.3, vflip=0.6)
    theirs = v2.RandomResizedCrop(8, scale=(0.2, 1.0))
    for seed in range(50):
        torch.manual_seed(seed)
        box = theirs.make_params([torch.empty(1, height, width)])
        flips = [torch.rand(1).item() < p for p in (0.3, 0.6)]
        found = ours.draw(height, width, seed)
        assert found == (box["top"], box["left"], box["height"], box["width"], *flips, 0)
        torch.manual_seed(seed)
        assert ours.draw(height, width) == found


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(24, 24), (24, 16)])
def test_a_turned_crop_is_a_crop_that_is_turned(size, channels):
    """The box and the flips are those of a sample without turns, and so are all draws if the chance is 0."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (channels, 61, 47), dtype=np.uint8))
    turning = pretrain_transform(size, hflip=0.5, vflip=0.5, rot90=1.0)
    upright = pretrain_transform(size, hflip=0.5, vflip=0.5)
    on_its_side = pretrain_transform(size[::-1], hflip=0.5, vflip=0.5)
    found = set()
    for key in range(40):
        crop = turning.draw(61, 47, key)
        assert crop[:6] == upright.draw(61, 47, key)[:6] and crop.turns in (1, 2, 3)
        plain = (on_its_side if crop.turns % 2 else upright)(image, key)
        expected = np.rot90(plain.numpy(), crop.turns, axes=(1, 2))
        assert turning(image, key).shape == (channels, *size) and turning(image, key).is_contiguous()
        assert np.array_equal(turning(image, key).numpy(), expected)
        found.add((crop.flip_x, crop.flip_y, crop.turns))
    assert len(found) == 12


def test_turns_are_equally_likely():
    transform = pretrain_transform(8, hflip=0.0, rot90=0.6)
    turns = np.bincount([transform.draw(20, 20, key).turns for key in range(4000)], minlength=4)
    # Three standard deviations of a share are 0.023 here.
    assert np.abs(turns / 4000 - [0.4, 0.2, 0.2, 0.2]).max() < 0.024
    torch.manual_seed(3)
    with_global_draws = transform.draw(20, 20)
    assert transform.draw(20, 20, 3) == with_global_draws


def test_a_turn_moves_cells_as_their_labels_say():
    """Each cell of the result shows the place of the image that the turn puts there: what is labelled is the
    cell after augmentation.
    """
    # The whole image, 2 x 3 cells of a grey level each; levels survive bicubic resizing within a cell.
    cells = torch.arange(6, dtype=torch.uint8).reshape(2, 3) * 40
    image = cells.repeat_interleave(16, 0).repeat_interleave(16, 1)[None]  # (1, 32, 48)
    transform = pretrain_transform((48, 32), (1.0, 1.0), hflip=0.0, rot90=1.0)
    transform._draw_box = lambda height, width, key, generator: (0, 0, height, width)
    seen = set()
    for key in range(20):
        turns = transform.draw(32, 48, key).turns
        centres = transform(image, key)[0, 8::16, 8::16]
        if turns % 2:  # 48 x 32 pixels are 3 x 2 cells of 16
            assert torch.equal(centres, torch.rot90(cells, turns))
            seen.add(turns)
    assert seen == {1, 3}


@pytest.mark.parametrize("source", [(97, 61), (61, 97), (40, 40)])
@pytest.mark.parametrize("size, crop_pct", [(32, None), (48, 0.9), (256, None)])
def test_eval_transform_is_torchvisions_on_pil(source, size, crop_pct):
    image = picture(3, size=source)
    default = {32: 224 / 256, 256: 1.0}
    resize = int(size / (crop_pct or default[size]))
    reference = tv.Compose(
        [tv.Resize(resize, tv.InterpolationMode.BICUBIC), tv.CenterCrop(size), tv.PILToTensor()]
    )
    found = eval_transform(size, crop_pct)(decode(encode(image)))
    assert (found.int() - reference(image).int()).abs().max() <= 2


def test_eval_transform_covers_rectangles():
    ramp = np.stack(np.broadcast_arrays(np.arange(200)[None], np.arange(100)[:, None], 0), -1).astype(
        np.uint8
    )
    found = eval_transform((32, 96), crop_pct=1.0)(torch.from_numpy(ramp).permute(2, 0, 1))
    assert found.shape == (3, 32, 96)
    # (100, 200) -> (48, 96), then the middle 32 rows: the whole width is shown, and nothing is padded
    assert found[0, 5, 0] <= 1 and found[0, 5, -1] >= 198
    assert abs(int(found[1, 0, 0]) - 17) <= 1 and abs(int(found[1, -1, 0]) - 82) <= 1


@pytest.mark.parametrize("mode, mean", [("RGB", (0.4, 0.5, 0.6)), ("L", (0.5,))])
def test_finetune_transform_is_timms(mode, mean):
    import timm.data

    image = picture(4, size=(60, 50), mode=mode)
    transform = finetune_transform((24, 32), in_chans=len(mean), mean=mean, crop=CropSettings(vflip=0.2))
    reference = timm.data.create_transform(
        (24, 32),
        is_training=True,
        use_prefetcher=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=None,
        interpolation="bicubic",
        vflip=0.2,
        mean=mean,
    )
    outputs = []
    for seed in range(10):
        for f, x in (
            (reference, image),
            (pickle.loads(pickle.dumps(transform)), decode(encode(image), ReadSettings(len(mean)))),
        ):
            with seeded(seed):
                outputs.append(f(x))
        assert torch.equal(outputs[-1], outputs[-2]) and outputs[-1].dtype == torch.uint8
    hardest = finetune_transform(16, in_chans=len(mean), mean=mean, auto_augment="rand-m10-n6-inc1")
    for seed in range(60):  # the highest magnitude posterises to 0 bits, which new versions of Pillow refuse
        with seeded(seed):
            assert hardest(decode(encode(image), ReadSettings(len(mean)))).shape == (len(mean), 16, 16)


def timms_draws(height, width, key, monkeypatch, **options):
    """What timm's transform does to an image of that size.

    Returns top, left, height, width, flipped left-right, upside down.
    """
    import timm.data

    transform = timm.data.create_transform(
        8,
        is_training=True,
        use_prefetcher=True,
        auto_augment=None,
        color_jitter=None,
        interpolation="bicubic",
        **options,
    )
    boxes = []
    marked = np.zeros((8, 8, 3), np.uint8)
    marked[0, 0] = 255  # flips move this corner
    with monkeypatch.context() as patch:
        patch.setattr(
            timm.data.transforms.F,
            "resized_crop",
            lambda image, *box: boxes.append(box[:4]) or Image.fromarray(marked),
        )
        with seeded(key):
            found = np.asarray(transform(Image.new("RGB", (width, height))))
    if found.shape[-1] != 3:
        found = found.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    row, column = np.argwhere(found.max(-1))[0]
    return *boxes[0], bool(column), bool(row), 0


@pytest.mark.parametrize("height, width", [(375, 500), (72, 72), (10, 400), (400, 10), (50, 199)])
def test_crops_and_flips_of_fine_tuning_are_timms(height, width, monkeypatch):
    """Also if no crop fits. A run that is resumed must continue with the crops that it began with."""
    options = dict(scale=(0.08, 1.0), hflip=0.3, vflip=0.6)
    ours = finetune_transform(8, auto_augment="", crop=CropSettings(**options))
    keys = [sample_seed(0, epoch, 5) for epoch in range(50)]
    found = [ours.draw(height, width, key) for key in keys]
    assert found == [timms_draws(height, width, key, monkeypatch, **options) for key in keys]
    with seeded(keys[0]):
        assert ours.draw(height, width) == found[0], "by the global generators, too"
    assert len({crop.flip_y for crop in found}) == 2


def through_pil(image, size, **options):
    """Fine-tuning's transform as it was: by a PIL image."""
    import timm.data

    return timm.data.create_transform(
        size,
        is_training=True,
        use_prefetcher=True,
        auto_augment=None,
        color_jitter=None,
        interpolation="bicubic",
        **options,
    )(v2.functional.to_pil_image(image))


@pytest.mark.parametrize("mode, format", [("RGB", "JPEG"), ("RGB", "PNG"), ("L", "JPEG")])
def test_pixels_of_fine_tuning_are_those_of_pil(mode, format, tmp_path):
    """Up to the rounding of the two ways to resize; a wrong crop, flip or filter is far below 50 dB."""
    channels = {"RGB": 3, "L": 1}[mode]
    keys = [sample_seed(2, epoch, 0) for epoch in range(30)]
    data = encode(picture(4, size=(97, 81), mode=mode), format)
    (tmp_path / "x.jpg").write_bytes(data)
    transform = finetune_transform(
        (24, 32), in_chans=channels, auto_augment=None, crop=CropSettings(vflip=0.5)
    )
    dataset = ImageDataset(
        build_index(tmp_path, labels=False), transform, read=ReadSettings(channels), seed=2
    )
    errors = []
    for epoch, key in enumerate(keys):
        with seeded(key):
            expected = np.asarray(through_pil(decode(data, ReadSettings(channels)), (24, 32), vflip=0.5))
        found = dataset[epoch, 0]["image"].numpy()
        assert found.shape == expected.shape == (channels, 24, 32) and found.dtype == np.uint8
        errors.append(((found.astype(float) - expected) ** 2).mean())
    assert 10 * np.log10(255**2 / np.max(errors)) >= 50, errors


def test_color_jitter_and_other_filters_still_go_through_timm():
    import timm.data

    image = decode(encode(picture(4)))
    for options in (
        dict(color_jitter=0.4),
        dict(interpolation="bilinear"),
        dict(auto_augment="rand-m9-mstd0.5-inc1"),
    ):
        transform = finetune_transform(16, **dict(auto_augment="") | options)
        assert not hasattr(transform, "crop_jpeg") and not hasattr(transform, "window")
        reference = timm.data.create_transform(
            16,
            is_training=True,
            use_prefetcher=True,
            **dict(auto_augment=None, color_jitter=None, interpolation="bicubic") | options,
        )
        with seeded(7):
            expected = reference(v2.functional.to_pil_image(image))
        with seeded(7):
            assert torch.equal(transform(image), expected)


def test_finetune_transform_of_other_channel_counts():
    for kwargs in ({}, dict(auto_augment="", color_jitter=0.4)):
        with pytest.raises(ValueError, match="work on 1 or 3 channels, not on 5"):
            finetune_transform(16, in_chans=5, **kwargs)
    image = torch.randint(0, 256, (5, 40, 30), dtype=torch.uint8)
    torch.manual_seed(0)
    found = finetune_transform(16, in_chans=5, auto_augment=None, crop=CropSettings((0.2, 1)))(image)
    torch.manual_seed(0)
    assert torch.equal(found, pretrain_transform(16)(image))


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 8, 9), dtype=torch.uint8)
    mean = (0.4, 0.5, 0.6)
    std = [0.2, 0.3, 0.25]
    found = normalize(images, mean, std)
    torch.testing.assert_close(found, tv.functional.normalize(images / 255, mean, std))
    assert torch.equal(unnormalize(found, mean, std), images)
    assert unnormalize(torch.tensor([[[9.0]], [[-9.0]]]), (0.5,), (0.5,)).flatten().tolist() == [255, 0]
    with pytest.raises(ValueError, match="images have 3"):
        normalize(images, (0.5, 0.5), std)


# --- samples and samplers ---


def dataset_of(tmp_path, n=24, broken=(), **kwargs):
    names = [f"{'ab'[i % 2]}/{i:02}.jpg" for i in range(n)]
    write(tmp_path / "train", names, broken={n for n in names if int(n[2:4]) in broken})
    return build_dataset(tmp_path, "train", kwargs.pop("transform", pretrain_transform(16)), **kwargs)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_depend_on_seed_epoch_and_index_only(tmp_path, workers):
    dataset = dataset_of(tmp_path, seed=7, transform=finetune_transform(16))
    sampler = EpochSampler(24, batch_size=5, rank=0, world_size=1, seed=7)
    # In another order than the loader's.
    expected = {(e, i): dataset[e, i] for e in (1, 0) for i in reversed(range(24))}
    loader = build_loader(dataset, sampler, batch_size=5, num_workers=workers)
    for epoch in (0, 1):
        sampler.set_position(epoch)
        batches = list(loader)
        assert len(batches) == 4
        for m, batch in enumerate(batches):
            assert torch.equal(batch["index"], sampler.global_batch(epoch, m)) and batch["bad"] == []
            for j, i in enumerate(batch["index"].tolist()):
                check_sample(batch, j, expected[epoch, i])
                assert batch["key"][j] == sample_seed(7, epoch, i)
                assert batch["label"][j] == dataset.index.labels[i]
    assert not torch.equal(expected[0, 3]["image"], expected[1, 3]["image"])
    same(dataset[3], expected[0, 3])


def check_sample(batch, j, expected):
    for name in ("image", "label", "key"):
        assert torch.equal(batch[name][j], torch.as_tensor(expected[name])), name


def test_loading_leaves_the_global_generators_alone(tmp_path):
    dataset = dataset_of(tmp_path, transform=lambda x: x + random.randrange(99) + np.random.randint(99))
    draws = []
    for load in (False, True):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        for _ in range(3):
            if load:
                dataset[1, 2]
            draws.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert draws[:3] == draws[3:]
    random.seed(2)
    np.random.seed(2)
    # random and numpy.random are seeded as well
    assert torch.equal(dataset[1, 2]["image"], dataset[1, 2]["image"])


def test_sample_seed_is_frozen_and_well_mixed():
    # A change would break every resume.
    frozen = [1279368494785126216, 1700482428262628912, 7510213797696614745]
    assert [sample_seed(0, 0, 0), sample_seed(0, 0, 1), sample_seed(1, 2, 3)] == frozen
    seeds = [sample_seed(s, e, i) for s in range(5) for e in range(20) for i in range(100)]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0 and max(seeds) < 2**63
    bits = np.array([[s >> b & 1 for b in range(63)] for s in seeds])
    assert abs(bits.mean(0) - 0.5).max() < 0.03  # 6 sigma
    assert abs(np.corrcoef(bits.T) - np.eye(63)).max() < 0.06


def test_unreadable_images_are_replaced_and_reported(tmp_path):
    broken = {2, 3, 23}
    dataset = dataset_of(tmp_path, broken=(4, 6, 23), labels=False)  # a/04, a/06 -> 2, 3; b/23 -> 23
    for epoch in range(8):
        for i in (1, 2, 3, 23):
            tried = [i]
            while tried[-1] in broken:
                tried.append(sample_seed(sample_seed(0, epoch, i), 0, len(tried)) % len(dataset))
            found = dataset[epoch, i]
            same(found, dataset[epoch, tried[-1]] | dict(bad=tried[:-1]))
            assert found["key"] == sample_seed(0, epoch, tried[-1]) and found["image"].any()
    replacements = {dataset[epoch, 2]["index"] for epoch in range(8)}
    assert len(replacements) > 4, "not the neighbour, which may be damaged as well"
    assert collate([dataset[i] for i in (1, 2)])["bad"][0] == 2
    os.remove(tmp_path / "train" / dataset.index.name(1))
    assert dataset[1]["bad"][0] == 1  # a missing file


def test_unreadable_images_are_black_in_evaluation(tmp_path):
    dataset_of(tmp_path, broken=(4,))
    evaluation = ImageDataset(build_index(tmp_path), eval_transform(16), evaluation=True)
    found = evaluation[2]
    assert (found["index"], found["label"], found["bad"]) == (2, -1, [2]) and not found["image"].any()
    assert evaluation[1]["label"] == 0 and evaluation[1]["image"].any()


@pytest.mark.parametrize("count", [24, 3])
def test_a_data_set_without_a_readable_image_is_an_error(tmp_path, count):
    broken = dataset_of(tmp_path, n=count, broken=range(24))
    with pytest.raises(ValueError, match=r"20 images in a row could not be read.*not a readable image"):
        broken[0]


def test_ranks_must_list_the_same_images(tmp_path, monkeypatch):
    write(tmp_path / "a" / "train", ["x/1.png", "x/2.png", "y/3.png"])
    write(tmp_path / "b" / "train", ["x/1.png", "x/2.png", "y/3.png"])
    write(
        tmp_path / "c" / "train", ["x/1.png", "y/2.png", "y/3.png"]
    )  # the same number, one of another class
    a, b, c = (build_dataset(tmp_path / name, "train", eval_transform(16)) for name in "abc")
    # What the other rank sends.
    others = []
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [mine, *others])
    others[:] = [(b.index.digest(), "3 on node2")]
    check_same_everywhere(a)
    others[:] = [(c.index.digest(), "3 on node2")]
    for make in (eval_loader, partial(train_loader, seed=0)):
        with pytest.raises(
            ValueError, match=r"the processes list different images in .*a: 3 on node2, 3 on "
        ):
            make(a, batch_size=1, num_workers=0, pin_memory=False)


def mean_value(model, batch):
    return model(batch["image"]).mean(), {"label": batch["label"].float().mean()}


AS_THEY_ARE = Setup(torch.device("cpu"), "fp32", (16, 16), Pixels((0.0,) * 3, (1.0,) * 3))


def evaluation_loader(dataset):
    evaluated = ImageDataset(dataset.index, eval_transform(16), evaluation=True)
    return eval_loader(evaluated, batch_size=3, num_workers=0, pin_memory=False)


def test_evaluation_leaves_unreadable_images_out(tmp_path, capsys):
    """They may lie anywhere in a batch, or fill one; a loss function need not consider them."""
    loader = evaluation_loader(dataset_of(tmp_path, n=12, broken=(0, 1, 2, 7)))
    whole = [s for s in loader.dataset if not s["bad"]]
    stats = mean_terms(torch.nn.Flatten(), mean_value, loader, AS_THEY_ARE)
    assert stats["images"] == len(whole) == 8
    values = [s["image"].double().mean() / 255 for s in whole]
    assert stats["loss"] == pytest.approx(np.mean(values), rel=1e-5)
    assert stats["label"] == pytest.approx(np.mean([s["label"] for s in whole]))
    assert "leaves out 4 images that cannot be decoded" in capsys.readouterr().out


def test_features_leave_unreadable_images_out(tmp_path):
    loader = evaluation_loader(dataset_of(tmp_path, n=12, broken=(0, 1, 2, 7)))
    whole = [s for s in loader.dataset if not s["bad"]]
    x, y = extract_features(lambda images: images.flatten(1)[:, :5], loader, AS_THEY_ARE)
    assert torch.allclose(x, torch.stack([s["image"].flatten()[:5] / 255 for s in whole]))
    assert y.tolist() == [s["label"] for s in whole]


def test_an_evaluation_without_readable_images_is_an_error(tmp_path):
    loader = evaluation_loader(dataset_of(tmp_path, n=4, broken=(0, 1, 2, 3)))
    with pytest.raises(ValueError, match="none of the 4 images to evaluate on can be decoded"):
        mean_terms(torch.nn.Flatten(), mean_value, loader, AS_THEY_ARE)


def test_an_error_in_a_transform_is_not_a_bad_image(tmp_path):
    def fail(image):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        dataset_of(tmp_path, n=2, transform=fail)[0]


EPOCHS = (0, 1, 3)


def indices(sampler):
    return [i for _, i in sampler]


def samplers(world_size, shuffle, n=23, total=6):
    """One rank with batches of `total`, and several ranks with the same global batch."""
    alone = EpochSampler(n, batch_size=total, seed=5, shuffle=shuffle)
    options = dict(batch_size=total // world_size, world_size=world_size, seed=5, shuffle=shuffle)
    return alone, [EpochSampler(n, rank=rank, **options) for rank in range(world_size)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_index_once_up_to_the_remainder(shuffle):
    sampler, _ = samplers(1, shuffle)
    orders = []
    for epoch in EPOCHS:
        sampler.set_position(epoch)
        assert {e for e, _ in sampler} == {epoch}
        order = indices(sampler)
        assert len(set(order)) == len(order) == 18 and set(order) <= set(range(23))
        orders.append(order)
    other = EpochSampler(23, batch_size=6, seed=6)
    assert indices(other) != orders[0]
    if shuffle:
        assert orders[0] != orders[1] != orders[2] != orders[0]
    else:
        assert orders == [list(range(18))] * 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_divide_the_batches_of_one_rank(world_size, shuffle):
    alone, ranks = samplers(world_size, shuffle)
    size = 6 // world_size
    for epoch in EPOCHS:
        for sampler in (alone, *ranks):
            sampler.set_position(epoch)
        order = indices(alone)
        shares = [indices(sampler) for sampler in ranks]
        assert list(map(len, ranks)) == list(map(len, shares))
        for m in range(3):
            batch = list(chain.from_iterable(share[m * size : (m + 1) * size] for share in shares))
            assert batch == order[m * 6 : (m + 1) * 6] == ranks[0].global_batch(epoch, m).tolist()
        # From the middle of the epoch on.
        for sampler, share in zip(ranks, shares):
            sampler.set_position(epoch, 2)
            assert indices(sampler) == share[2 * size :] and len(sampler) == len(share) - 2 * size


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"5 images cannot fill one batch, `batch_size` 3 x 2 processes = 6"):
        EpochSampler(5, batch_size=3, rank=0, world_size=2, seed=0)


def test_eval_sampler_sees_every_image_once():
    for n, world_size in ((10, 3), (2, 4), (7, 1)):
        parts = [EvalSampler(n, r, world_size) for r in range(world_size)]
        assert sorted(i for p in parts for i in p) == list(range(n)) and sum(map(len, parts)) == n
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.slow  # starts a process
def test_workers_survive_signals_and_the_process_ends(tmp_path):
    """A worker outlives the signals that a scheduler sends to all, and does not keep its parent alive."""
    dataset_of(tmp_path, n=64)
    script = f"""
import multiprocessing, os, signal
from util.data.datasets import build_dataset
from util.data.loading.loader import build_loader
from util.data.loading.samplers import EpochSampler
from util.data.transforms import pretrain_transform
dataset = build_dataset({str(tmp_path)!r}, "train", pretrain_transform(16))
batches = iter(build_loader(dataset, EpochSampler(64, batch_size=2), batch_size=2, num_workers=2))
next(batches)
for worker in multiprocessing.active_children():
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid, name)
print(sum(len(b["index"]) for _, b in zip(range(20), batches)))
raise SystemExit(5)  # with the workers still running
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout.strip()) == (5, "40") and "Error" not in done.stderr, done.stderr


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_validation_during_pretraining_loads_as_fast_as_training(tmp_path):
    write(
        tmp_path,
        [f"{split}/a/{i}.png" for split in ("train", "val") for i in range(4)]
        + ["train/b/1.png", "val/b/1.png"],
    )
    args = parse(
        main_pretrain.get_args_parser(),
        ["--data_path", str(tmp_path), "--batch_size", "2", "--num_workers", "5"],
    )
    for device, pinned in (("cuda", True), ("cpu", False)):
        setup = Setup(torch.device(device), "fp32", (16, 16), Pixels((0.5,) * 3, (0.5,) * 3))
        loaders = main_pretrain.build_data(args, setup, {})[:2]
        assert [(loader.num_workers, loader.pin_memory) for loader in loaders] == [(5, pinned)] * 2


# --- other sources, command line ---


def test_demo_set_is_the_default(tmp_path, monkeypatch):
    root = write(tmp_path / "src", NAMES)
    pack(tmp_path / "train.tar", root, NAMES)
    assert Path(datasets.DEMO) == ROOT / "data" / "demo"
    monkeypatch.setattr(datasets, "DEMO", str(tmp_path))
    assert len(build_dataset(None, "train", None)) == len(build_dataset("", "train", None)) == 8


@pytest.mark.parametrize("depth", [torch.uint8, torch.uint16])
def test_timm_reads_a_folder_as_we_do(tmp_path, depth):
    root = write(tmp_path / "src", ORDER)
    if depth == torch.uint16:
        for i, name in enumerate(ORDER):
            grey = np.linspace(0, 65535 - i, 40 * 48).reshape(40, 48).astype(np.uint16)
            Image.fromarray(grey).save(Path(root, name), "PNG")
    for channels in (1, 3):
        options = dict(seed=2, read=ReadSettings(channels))
        ours = build_dataset(root, "train", pretrain_transform(16), **options)
        theirs = build_class_dataset(f"torch/image_folder={root}", "train", pretrain_transform(16), **options)
        assert theirs.exact_resume and theirs.classes == ours.classes == ["a", "a-b", "b"]
        assert ours.depth == theirs.depth == depth
        for i in range(8):
            # torchvision looks at suffixes, and leaves out none of these, but orders them in another way.
            same(theirs[1, i], ours[1, i])
            assert theirs[1, i]["image"].dtype == depth
        short = build_dataset(root, "train", pretrain_transform(16), seed=2, in_chans=channels)
        same(short[1, 3], ours[1, 3])
    found = "; among them: 8 uint16" * (depth == torch.uint16)
    assert theirs.summary() == f"torch/image_folder={root}: 8 images, 3 classes (read by timm){found}"
    check_classes(theirs, ours)


class Reader(SimpleNamespace):
    def __getitem__(self, i):
        return io.BytesIO(encode(picture(i))), self.labels[i]


class Listed:
    """A map-style set in timm's form: its reader gives files."""

    def __init__(self, labels, **reader):
        self.reader = Reader(labels=labels, **reader)

    def __len__(self):
        return len(self.reader.labels)


def features(**columns):
    return SimpleNamespace(features={name: SimpleNamespace(**column) for name, column in columns.items()})


@pytest.mark.parametrize(
    "dataset, nb_classes, classes",
    [
        (Listed([0], dataset=features(label=dict(names=["x", "y"])), label_key="label"), None, ["x", "y"]),
        (
            Listed([0], builder=SimpleNamespace(info=features(fine=dict(names=["x"]))), target_key="fine"),
            5,
            ["x"],
        ),
        (Listed([0], info={"num_classes": 3}), None, ["0", "1", "2"]),
        (Listed([0], info={}), 12, [str(i) for i in range(12)]),
        (SimpleNamespace(wnids=["n01", "n02"], classes=[("a", "b"), ("c",)]), None, ["n01", "n02"]),
        (SimpleNamespace(classes=["0 - zero", "1 - one"]), None, ["0 - zero", "1 - one"]),
        (SimpleNamespace(), 2, ["0", "1"]),
    ],
)
def test_class_names_come_from_the_reader_or_are_numbers(dataset, nb_classes, classes):
    samples = TimmDataset(dataset, eval_transform(16), name="x")
    samples.name_classes(nb_classes)
    assert samples.classes == classes


def test_sets_without_class_names_and_with_wrong_labels_are_refused():
    samples = TimmDataset(Listed([0, 2, -1, "cat", None], info={}), eval_transform(16), name="wds/x")
    with pytest.raises(
        ValueError, match="wds/x does not name its classes: give their number by `nb_classes`"
    ):
        samples.name_classes()
    # Pretraining needs no labels.
    assert [samples[i]["label"] for i in range(5)] == [0, 2, -1, -1, -1]
    samples.name_classes(2)
    assert samples[0]["label"] == 0
    for i, label in enumerate(["2", "-1", "cat", "None"], 1):
        with pytest.raises(
            ValueError, match=f"wds/x has the label {label}, and labels of 2 classes are 0 to 1"
        ):
            samples[i]


class Stream(torch.utils.data.IterableDataset):
    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 6

    def __iter__(self):
        return ((picture(i), i) for i in range(6))


def test_a_stream_of_timm(monkeypatch):
    import timm.data

    calls = []
    monkeypatch.setattr(timm.data, "create_dataset", lambda *a, **k: calls.append((a, k)) or Stream())
    stream = build_dataset("wds/x=/shards", "val", pretrain_transform(16), evaluation=True)
    names, options = calls[0]
    assert names == ("wds/x",)
    assert (options["root"], options["split"]) == ("/shards", "validation")
    named = DataPath("wds/x=/shards", "test")
    for split in ("val", "train"):
        build_dataset(named, split, pretrain_transform(16))
    assert [options["split"] for _, options in calls[1:]] == ["test", "train"]
    with pytest.raises(ValueError, match=r"wds/x=/shards: `val_share` and `class_depth` serve folders"):
        build_dataset(DataPath("wds/x=/shards", val_share=0.1), "train", None)
    assert not stream.exact_resume and "a run resumes at whole epochs only" in stream.summary()
    loader = build_loader(stream, None, batch_size=4)
    first = next(iter(loader))
    again = next(iter(loader))
    stream.set_epoch(1)
    later = next(iter(loader))
    assert stream.dataset.epoch == 1 and first["label"].tolist() == [0, 1, 2, 3]
    assert [len(batch["label"]) for batch in loader] == [4, 2], "an evaluation needs every image"
    stream.evaluation = False
    assert [len(batch["label"]) for batch in build_loader(stream, None, batch_size=4)] == [4]
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], later["image"])


def test_ranks_share_a_stream_exactly_in_evaluation(monkeypatch):
    import timm.data

    class Padded(Stream):
        """It gives a rank what timm gives: its share, and the last image again."""

        def __init__(self):
            self.reader = SimpleNamespace(dist_rank=dist.rank(), dist_num_replicas=dist.world_size())
            self.reader.num_samples = 6

        def __iter__(self):
            ranks = self.reader.dist_num_replicas
            share = list(range(6))[self.reader.dist_rank :: ranks]
            share += share[-1:] * (ranks > 1)
            return ((picture(i), i) for i in share)

    monkeypatch.setattr(timm.data, "create_dataset", lambda *a, **k: Padded())
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    found = {True: [], False: []}
    for rank in range(4):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        for evaluation in (True, False):
            stream = build_dataset("wds/x=/shards", "val", eval_transform(16), evaluation=evaluation)
            assert len(stream) == 6
            found[evaluation] += [sample["label"] for sample in stream]
    assert sorted(found[True]) == list(range(6)) and len(found[False]) == 10


def test_features_of_a_stream_are_those_of_its_images(monkeypatch):
    import timm.data

    monkeypatch.setattr(timm.data, "create_dataset", lambda *a, **k: Stream())
    stream = build_class_dataset("wds/x=/s", "val", eval_transform(16), evaluation=True, nb_classes=6)
    setup = Setup(torch.device("cpu"), "fp32", (16, 16), Pixels((0.5,) * 3, (0.5,) * 3))
    loader = eval_loader(stream, batch_size=4, num_workers=0, pin_memory=False)
    found, labels = extract_features(lambda images: images.mean((2, 3)), loader, setup)
    means = [sample["image"].double().mean((1, 2)) / 127.5 - 1 for sample in stream]
    assert labels.tolist() == list(range(6))
    assert torch.allclose(found, torch.stack(means).float(), atol=1e-5)


def test_a_set_without_validation_images_is_evaluated_on_its_test_images(monkeypatch):
    import timm.data

    def create(name, split, **options):
        if split == "validation":
            raise RuntimeError("split validation not found")
        return Listed([0, 1], info={"num_classes": 2})

    monkeypatch.setattr(timm.data, "create_dataset", create)
    val = build_class_dataset("hfds/cifar", "val", eval_transform(16), evaluation=True)
    assert val.summary() == "hfds/cifar (test): 2 images, 2 classes (read by timm)"
    with pytest.raises(NoSplit, match="split val"):
        build_dataset("hfds/cifar", "val", eval_transform(16))


def webdataset(root, split, labels, shards):
    """Write shards, and return their entry in _info.json."""
    names = []
    for shard in range(shards):
        names.append(f"{split}-{shard}.tar")
        with tarfile.open(root / names[-1], "w") as tar:
            for i in range(shard, len(labels), shards):
                for end, data in (("png", encode(picture(i))), ("cls", str(labels[i]).encode())):
                    member = tarfile.TarInfo(f"{i:04d}.{end}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    counts = [len(range(shard, len(labels), shards)) for shard in range(shards)]
    return dict(name=split, num_samples=len(labels), filenames=names, shard_lengths=counts)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_real_stream_gives_each_image_once_in_evaluation(tmp_path, monkeypatch, workers):
    pytest.importorskip("webdataset")
    splits = {"validation": webdataset(tmp_path, "validation", [0, 1, 2, 1, 0, 2, 1], 3)}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits, "num_classes": 3}))
    ours = {}
    for i in range(7):
        ours[i] = torch.from_numpy(np.array(picture(i))).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
    found = []
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        val = build_class_dataset(f"wds/x={tmp_path}", "val", eval_transform((40, 48), 1.0), evaluation=True)
        assert len(val) == 7 and val.classes == ["0", "1", "2"]
        for batch in eval_loader(val, batch_size=2, num_workers=workers, pin_memory=False):
            for image, label in zip(batch["image"], batch["label"].tolist()):
                number = next(i for i in ours if torch.equal(ours[i], image))
                assert label == [0, 1, 2, 1, 0, 2, 1][number]
                found.append(number)
    assert sorted(found) == list(range(7))


def test_hugging_faces_sets_serve_classifiers(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = tmp_path / "set"
    write(root / "train", ["ant/0.png", "bee/1.png", "bee/2.jpg"])
    grey = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(np.uint16)
    Image.fromarray(grey).save(root / "train" / "ant" / "0.png")
    transform = eval_transform((40, 48), 1.0)
    ours = build_dataset(root, "train", transform, evaluation=True)
    # The second one streams what the first has prepared: its length is known then.
    for reader in ("hfds", "hfids"):
        path = f"{reader}/{root}={tmp_path / 'cache'}"
        theirs = build_class_dataset(path, "train", transform, evaluation=True)
        assert theirs.classes == ["ant", "bee"] and len(theirs) == 3
        samples = list(theirs) if reader == "hfids" else [theirs[i] for i in range(3)]
        for sample, expected in zip(samples, [ours[i] for i in range(3)], strict=True):
            assert torch.equal(sample["image"], expected["image"]) and sample["label"] == expected["label"]


def test_what_timm_cannot_open(monkeypatch):
    import timm.data

    def missing(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(timm.data, "create_dataset", missing)
    message = "hfds/x needs a package that is not installed: pip install datasets"
    with pytest.raises(ValueError, match=message):
        build_dataset("hfds/x", "train", None)
    with pytest.raises(ValueError, match="1 or 3 channels, not 5"):
        build_dataset("hfds/x", "train", None, read=ReadSettings(5))


def test_command_line(tmp_path, capsys):
    write(tmp_path / "good", ORDER)
    images = [decode(Path(tmp_path, "good", n).read_bytes()).double().flatten(1) / 255 for n in ORDER]
    pixels = torch.cat(images, 1)
    assert commands.main(["stats", str(tmp_path / "good"), "--recipe", ""]) == 0
    numbers = [float(w) for w in capsys.readouterr().out.split("\n")[1].split() if w[0] == "0"]
    expected = torch.cat([pixels.mean(1), pixels.std(1, correction=0)])
    torch.testing.assert_close(torch.tensor(numbers).double(), expected, atol=1e-4, rtol=0)
    assert commands.main(["check", str(tmp_path / "good"), "--num_workers", "0"]) == 0
    write(tmp_path / "bad", ORDER, broken=["b/2.jpg"])
    assert commands.main(["check", str(tmp_path / "bad"), "--num_workers", "0"]) == 1
    out = capsys.readouterr().out
    assert "unreadable: b/2.jpg: not a readable image (4 bytes" in out and "\n1 of 8 images" in out
    for argv, message in (
        (["check", str(tmp_path / "nowhere")], "no such file or folder"),
        (["stats", "hfds/x"], "timm's readers"),
        (["stats", str(tmp_path / "good"), "--in-chans", "5"], "give --in_chans as the images have it"),
        (["stats", str(tmp_path / "good"), "extra"], "stats takes one path"),
    ):
        assert commands.main(argv) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, facts",
    [
        ("check nowhere", ["the path nowhere does not exist"]),
        ("stats gooo", ["gooo", "did you mean good?"]),
        ("repack nowhere out", ["the path nowhere does not exist"]),
        ("check ''", ["empty"]),
        ("check good/*.tar", ["good/*.tar", "train-*.tar"]),
        ("good check", ["good is a path", "check"]),
        ("good", ["good is a path", "stats, check, repack"]),
        ("chekc good", ["did you mean check?"]),
        ("", ["command, path"]),
    ],
)
def test_mistakes_in_a_command_are_answered_at_once(tmp_path, monkeypatch, capsys, words, facts):
    (tmp_path / "good").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["__main__.py", *shlex.split(words)])
    with pytest.raises(SystemExit) as end:
        answer_at_once("__main__", commands.get_args_parser())
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "error: " in error and all(fact in error for fact in facts), error


def test_file_names_that_are_not_utf_8(tmp_path, capfd):
    """Old archives hold Latin-1 names. Such files can be read, listed, predicted, and named in errors."""
    write(tmp_path / "a", ORDER)
    folder = os.fsencode(tmp_path / "a") + b"/b"
    os.rename(folder + b"/2.jpg", folder + b"/caf\xe9.jpg")
    index = build_index(tmp_path / "a", labels=False)
    i = next(i for i in range(len(index)) if "\udce9" in index.name(i))
    bad = BadImages(ImageDataset(index, eval_transform(8)), str(tmp_path), 1.0)
    bad.add([i])

    with open(tmp_path / "out.txt", "w", encoding="utf-8") as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        bad.check()  # in a job, without `run`
        assert run(lambda args: print(index.name(i)) or 0, None) == 0
    assert (tmp_path / "bad_images.txt").read_bytes() == b"b/caf\xe9.jpg\n"
    printed = (tmp_path / "out.txt").read_text()
    assert "the latest: b/caf\\xe9.jpg\n" in printed and printed.endswith("\nb/caf\\udce9.jpg\n")
    write_predictions(
        str(tmp_path / "p.csv"), [(i, -1, 0, 0.5)], SimpleNamespace(name=index.name, classes=["x"])
    )
    assert b"caf\xe9.jpg,unreadable" in (tmp_path / "p.csv").read_bytes()


def test_absolute_names_in_a_tar_are_as_others(tmp_path, monkeypatch):
    """As `tar -P` stores them; the first folder below the root is the class."""

    def pack_absolute(tar, prefix):  # `tarfile.add` would take the slash off
        with tarfile.open(tar, "w") as file:
            for name in NAMES:
                member = file.gettarinfo(Path(root, name))
                member.name = prefix + name
                with open(Path(root, name), "rb") as data:
                    file.addfile(member, data)
            member = tarfile.TarInfo(prefix + "b/link.jpg")
            member.type = tarfile.LNKTYPE
            member.linkname = prefix + "b/2.jpg"
            file.addfile(member)
        return tar

    root = write(tmp_path / "src", NAMES)
    plain = build_index(pack(tmp_path / "plain.tar", root, NAMES))
    path = pack_absolute(tmp_path / "train.tar", "/")
    found = build_index(path)
    assert found.classes == plain.classes and sorted(names_of(found)) == sorted(
        [*names_of(plain), "b/link.jpg"]
    )
    with pytest.raises(ValueError, match=r"the only class in .* is 'data' and its images lie deeper"):
        build_index(pack_absolute(tmp_path / "deep.tar", "/data/"))
    age(path)
    with monkeypatch.context() as earlier:
        earlier.setattr(tars, "_member_name", lambda name: os.fsencode(os.path.normpath(name)))
        build_index(path, labels=False)  # leaves a listing with the class ""
    assert build_index(path).classes == plain.classes, "it is not used"
