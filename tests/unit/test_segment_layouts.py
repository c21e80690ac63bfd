"""Listings of images with segmentation masks: our layout in folders and tars, and public data sets'."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from util.data.datasets import DEMO
from util.data.segments.dataset import build_segment_dataset
from util.data.segments.layouts import CITYSCAPES_CLASSES, NO_IMAGE, NO_MASK, build_pairs
from util.data.segments.masks import IGNORED, MaskSettings, decode_mask
from util.data.segments.transforms import SegmentEval
from util.data.sources.image_index import ChangedTar, NoSplit
from util.data.sources.layouts import build_index, class_names
from util.flags.data_path import DataPath

NAMES = ["a-b/1", "a/x/2", "a/x-y/3", "4", "a/5.v2"]
# The order of torchvision's ImageFolder: class, folder, file.
ORDERED = ["4", "a/5.v2", "a/x/2", "a/x-y/3", "a-b/1"]


def encoded(values: np.ndarray, suffix: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, suffix)
    return file.getvalue()


def picture(number: int, suffix: str = "JPEG") -> bytes:
    return encoded(np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8), suffix)


def mask_of(number: int, most: int = 3) -> bytes:
    return encoded(np.random.default_rng(number).integers(0, most, (6, 8), np.uint8))


def ours(names: list[str] = NAMES, split: str = "train") -> dict[str, bytes]:
    """Name -> content of the files of our layout."""
    files = {}
    for i, name in enumerate(names):
        files[f"images/{split}/{name}.jpg"] = picture(i)
        files[f"masks/{split}/{name}.png"] = mask_of(i)
    return files


def unpack(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def pack(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def below(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {name.removeprefix(folder): data for name, data in files.items() if name.startswith(folder)}


# --- ours ---


def test_images_and_masks_in_folders(tmp_path):
    files = ours() | {
        "images/train/lonely.jpg": picture(9),
        "masks/train/1.png": mask_of(9),
        "masks/train/2.png": mask_of(9),
    }
    pairs = build_pairs(DataPath(str(unpack(tmp_path, files))), "train")
    assert [pairs.name(i) for i in range(len(pairs))] == [f"{name}.jpg" for name in ORDERED]
    for i, name in enumerate(ORDERED):
        assert pairs.mask_name(i) == f"{name}.png"
        assert pairs.read(i) == files[f"images/train/{name}.jpg"]
        assert bytes(pairs.read_writable(i)) == pairs.read(i)
        assert pairs.read_mask(i) == files[f"masks/train/{name}.png"]
    assert pairs.left_out == {NO_MASK: 1, NO_IMAGE: 2}
    assert (pairs.path, pairs.settings, pairs.classes) == (str(tmp_path), MaskSettings(), [])
    assert pairs.summary() == (
        f"{tmp_path}: 5 pairs of image and mask (images and masks; left out: 1 image without a mask, "
        "2 masks without an image)"
    )


@pytest.fixture
def everywhere(tmp_path) -> dict[str, DataPath]:
    """The same pairs, as folders and as tars."""
    files = ours() | ours(["v"], "val")
    tars = {}
    for folder in ("images/train", "masks/train", "images/val", "masks/val"):
        tars[f"{folder}.tar"] = below(files, f"{folder}/")
    for name, members in tars.items():
        pack(tmp_path / "tars" / name, members)
    return {
        "folder": DataPath(str(unpack(tmp_path / "folder", files))),
        "inside": DataPath(str(unpack(tmp_path / "inside" / "set", files).parent)),
        "tars": DataPath(str(tmp_path / "tars")),
        "tar": DataPath(str(pack(tmp_path / "one.tar", files))),
        "prefix": DataPath(
            str(pack(tmp_path / "two.tar", {f"./c/d/{name}": data for name, data in files.items()}))
        ),
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_all_places_of_our_layout_give_the_same_pairs(everywhere, split):
    found = {name: build_pairs(path, split) for name, path in everywhere.items()}
    first = found.pop("folder")
    assert len(first) == {"train": 5, "val": 1}[split]
    for name, pairs in found.items():
        assert pairs.digest() == first.digest(), name
        assert pairs.kind == first.kind
        for i in range(len(first)):
            assert (pairs.read(i), pairs.read_mask(i)) == (first.read(i), first.read_mask(i)), name


def test_the_digest_is_of_the_names_of_images_and_masks(tmp_path):
    plain = ours()

    def digest(folder: str, files: dict[str, bytes]) -> str:
        return build_pairs(DataPath(str(unpack(tmp_path / folder, files))), "train").digest()

    first = digest("first", plain)
    other_data = {name: data for name, data in ours().items()} | {"masks/train/4.png": mask_of(77)}
    assert digest("same", other_data) == first
    renamed_mask = {name.replace("train/4.png", "train/4.tif"): data for name, data in plain.items()}
    renamed_image = {name.replace("train/4.jpg", "train/4.png"): data for name, data in plain.items()}
    fewer = {name: data for name, data in plain.items() if "/4." not in name}
    digests = {first, digest("a", renamed_mask), digest("b", renamed_image), digest("c", fewer)}
    assert len(digests) == 4


def test_pairs_of_a_tar_are_read_in_other_processes(everywhere):
    pairs = build_pairs(everywhere["prefix"], "train")
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy.read_mask(2) == pairs.read_mask(2) and copy.digest() == pairs.digest()


def test_a_tar_that_was_replaced_is_noticed(everywhere):
    pairs = build_pairs(everywhere["tars"], "train")
    pairs.check_unchanged(0)
    pack(Path(everywhere["tars"].path) / "masks" / "train.tar", {"x.png": mask_of(1)})
    with pytest.raises(ChangedTar, match=r"masks/train\.tar was replaced"):
        pairs.check_unchanged(0)


def test_another_validation_split(tmp_path):
    files = ours() | ours(["t1", "t2"], "test")
    root = str(unpack(tmp_path, files))
    assert len(build_pairs(DataPath(root, val_split="test"), "val")) == 2
    assert len(build_pairs(DataPath(root, val_split="test"), "train")) == 5
    with pytest.raises(NoSplit, match=r"no images/val in .*`val_split`.*`val_share` 0\.1"):
        build_pairs(DataPath(root), "val")
    with pytest.raises(ValueError, match="no images/holdout in") as error:
        build_pairs(DataPath(root, val_split="holdout"), "val")
    assert not isinstance(error.value, NoSplit)


def test_a_share_of_the_training_pairs_is_held_out(tmp_path):
    files = ours([f"{i:02}" for i in range(20)])
    folder = DataPath(str(unpack(tmp_path / "folder", files)), val_share=0.25)
    tar = DataPath(str(pack(tmp_path / "x.tar", files)), val_share=0.25)
    train = build_pairs(folder, "train")
    val = build_pairs(folder, "val")
    assert (len(train), len(val)) == (15, 5)
    assert sorted(stems_of(train) + stems_of(val)) == [f"{i:02}" for i in range(20)]
    assert "5 pairs held out for validation" in train.summary()
    assert build_pairs(tar, "val").digest() == val.digest()
    unpack(tmp_path / "folder", ours(["v"], "val"))
    with pytest.raises(ValueError, match=r"`val_share` 0\.25 holds out .* already: images/val"):
        build_pairs(folder, "train")


def stems_of(pairs) -> list[str]:
    return [Path(pairs.name(i)).stem for i in range(len(pairs))]


def test_names_of_classes(tmp_path):
    root = unpack(tmp_path, ours() | {"classes.txt": b"sky\n\nroad\n tree \n"})
    pairs = build_pairs(DataPath(str(root)), "train")
    assert pairs.classes == ["sky", "road", "tree"]
    assert pairs.settings == MaskSettings(num_classes=3)
    dataset = build_segment_dataset(DataPath(str(root)), "train", SegmentEval())
    assert dataset.classes == pairs.classes
    with pytest.raises(ValueError, match=r"`num_classes` 4, and .* has names of 3 classes"):
        build_segment_dataset(DataPath(str(root)), "train", SegmentEval(), masks=MaskSettings(num_classes=4))
    (root / "classes.txt").write_text("sky\nsky\n")
    with pytest.raises(ValueError, match="lists classes twice: sky"):
        build_pairs(DataPath(str(root)), "train")


# --- masks beside the images of a classification set ---


def beside(split: str) -> dict[str, bytes]:
    """The pairs of `ours`, of which the images have folders of classes in DIR/<split> itself."""
    files = {}
    for name, data in ours(["a/1", "a/2", "b/1"], split).items():
        files[name.removeprefix("images/")] = data
    return files | {"masks/classes.txt": b"sky\nroad\ntree\n"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_beside_the_images(tmp_path, split):
    files = beside("train") | beside("val")
    tars = {}
    for folder in ("train", "val", "masks/train", "masks/val"):
        tars[folder] = below(files, f"{folder}/")
    for folder, members in tars.items():
        pack(tmp_path / "tars" / f"{folder}.tar", members)
    unpack(tmp_path / "tars", {"masks/classes.txt": files["masks/classes.txt"]})
    found = [
        build_pairs(DataPath(str(path)), split)
        for path in (unpack(tmp_path / "folder", files), tmp_path / "tars", pack(tmp_path / "x.tar", files))
    ]
    for pairs in found:
        assert [pairs.name(i)[-7:] for i in range(len(pairs))] == ["a/1.jpg", "a/2.jpg", "b/1.jpg"]
        for i, name in enumerate(("a/1", "a/2", "b/1")):
            assert pairs.read(i) == files[f"{split}/{name}.jpg"]
            assert pairs.read_mask(i) == files[f"masks/{split}/{name}.png"]
        assert pairs.kind == "masks beside the images" and pairs.digest() == found[0].digest()
    # Files in a tar that are no images are not read.
    assert [pairs.classes for pairs in found] == [["sky", "road", "tree"], ["sky", "road", "tree"], []]


def test_names_of_images_and_of_masks_differ(tmp_path):
    """DIR/classes.txt names the classes of images, and masks/classes.txt those of pixels."""
    root = unpack(tmp_path, beside("train") | {"classes.txt": b"cat\ndog\n"})
    assert build_pairs(DataPath(str(root)), "train").classes == ["sky", "road", "tree"]
    (root / "masks" / "classes.txt").unlink()
    assert build_pairs(DataPath(str(root)), "train").classes == []


def test_loose_images_with_masks_beside_them(tmp_path):
    """masks/ is not a class beside train/, also without validation images."""
    files = {}
    for i in range(8):
        files |= {f"train/{i}.jpg": picture(i), f"masks/train/{i}.png": mask_of(i)}
    root = str(unpack(tmp_path, files))
    assert len(build_pairs(DataPath(root), "train")) == 8
    assert len(build_pairs(DataPath(root, val_share=0.25), "val")) == 2
    with pytest.raises(NoSplit, match=r"no val in"):
        build_pairs(DataPath(root), "val")
    assert len(build_index(root, "train", labels=False)) == 8


def test_a_split_without_masks_beside_it(tmp_path):
    files = beside("train") | beside("val")
    root = unpack(tmp_path, {name: data for name, data in files.items() if "masks/val" not in name})
    with pytest.raises(ValueError, match=r"val in .* has no masks: no masks/val beside it"):
        build_pairs(DataPath(str(root)), "val")


@pytest.mark.parametrize("split, count", [("train", 200), ("val", 50)])
def test_the_demo_set(tmp_path, split, count):
    dataset = build_segment_dataset(DataPath(), split, SegmentEval())
    assert dataset.path == DEMO and len(dataset) == count and dataset.index.left_out.total() == 0
    assert dataset.classes == Path(DEMO, "masks", "classes.txt").read_text().split()
    with (
        tarfile.open(Path(DEMO, f"{split}.tar")) as images,
        tarfile.open(Path(DEMO, "masks", f"{split}.tar")) as masks,
    ):
        for i in (0, count - 1):
            name = dataset.name(i)
            assert dataset.index.read(i) == images.extractfile(name).read()
            stored = np.asarray(Image.open(masks.extractfile(name.replace(".jpg", ".png"))))
            sample = dataset[i]
            assert sample["image"].shape == (3, 64, 64)
            assert np.array_equal(sample["mask"], np.where(stored == 255, IGNORED, stored.astype(np.int16)))


@pytest.mark.parametrize("split", ["train", "val"])
def test_classification_does_not_see_the_masks(tmp_path, split):
    """Neither in the demo set nor in folders: listings and classes are those without masks."""
    (tmp_path / "tars").mkdir()
    for name in ("train.tar", "val.tar"):
        (tmp_path / "tars" / name).symlink_to(Path(DEMO, name))
    files = beside("train") | beside("val")
    with_masks = unpack(tmp_path / "with", files)
    plain = {name: data for name, data in files.items() if not name.startswith("masks/")}
    for there, alone in ((DEMO, tmp_path / "tars"), (with_masks, unpack(tmp_path / "plain", plain))):
        for labels in (True, False):
            found = [build_index(path, split, labels=labels) for path in (there, alone)]
            assert found[0].digest() == found[1].digest() and len(found[0]) in (200, 50, 3)
            assert found[0].classes == found[1].classes and found[0].kind == found[1].kind
            assert np.array_equal(found[0].labels, found[1].labels)
        assert class_names(there) == class_names(alone)


# --- errors ---


def test_a_folder_without_a_layout(tmp_path):
    unpack(tmp_path, {"train/cat/1.jpg": picture(1), "images/train/1.jpg": picture(1)})
    with pytest.raises(ValueError, match="no images with masks in") as error:
        build_pairs(DataPath(str(tmp_path)), "train")
    for word in ("images/{train,val}", "ADE20K", "Pascal VOC", "Cityscapes", "ImageNet-S"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match="no such folder or tar"):
        build_pairs(DataPath(str(tmp_path / "absent")), "train")
    with pytest.raises(ValueError, match="no such file"):
        build_pairs(DataPath(str(tmp_path / "absent.tar")), "train")
    with pytest.raises(ValueError, match="from one tar only"):
        build_pairs(DataPath("s3://bucket/folder"), "train")


def test_images_without_any_mask(tmp_path):
    files = {"images/train/a.jpg": picture(1), "masks/train/a_mask.png": mask_of(1)}
    with pytest.raises(
        ValueError, match=r"none of the 1 image in .*images/train has a mask in .*a_mask\.png"
    ):
        build_pairs(DataPath(str(unpack(tmp_path, files))), "train")


def test_a_split_without_masks(tmp_path):
    files = ours() | {"images/val/a.jpg": picture(1)}
    with pytest.raises(ValueError, match=r"images/val in .* has no masks: no masks/val"):
        build_pairs(DataPath(str(unpack(tmp_path, files))), "val")


@pytest.mark.parametrize("twin", ["images/train/4.png", "masks/train/4.tif"])
def test_two_files_of_one_name(tmp_path, twin):
    files = ours() | {twin: picture(1, "PNG")}
    with pytest.raises(ValueError, match=r"4\.\w+ and 4\.\w+ in .* have the same name apart from the suffix"):
        build_pairs(DataPath(str(unpack(tmp_path, files))), "train")


def test_names_in_errors_are_escaped(tmp_path):
    files = {"images/train/a\x1b[2J.jpg": picture(1), "masks/train/b.png": mask_of(1)}
    with pytest.raises(ValueError, match=r"a\\x1b\[2J\.jpg"):
        build_pairs(DataPath(str(unpack(tmp_path, files))), "train")


# --- public data sets ---


def test_ade20k(tmp_path):
    files = {}
    for split, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            files[f"images/{split}/ADE_{i}.jpg"] = picture(i)
            files[f"annotations/{split}/ADE_{i}.png"] = encoded(np.full((6, 8), 150 * i // 2, np.uint8))
    files["objectInfo150.txt"] = b"Idx\n"
    root = DataPath(str(unpack(tmp_path / "ADEChallengeData2016", files).parent))
    pairs = build_pairs(root, "train")
    assert (len(pairs), pairs.kind) == (3, "ADE20K")
    assert len(build_pairs(root, "val")) == 2
    assert pairs.settings == MaskSettings(150, 255, reduce_zero_label=True)
    dataset = build_segment_dataset(root, "train", SegmentEval())
    assert [int(dataset[i]["mask"][0, 0]) for i in range(3)] == [IGNORED, 74, 149]
    assert len(dataset.classes) == 150


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_pascal_voc(tmp_path, inside):
    colours = Image.fromarray(np.array([[0, 1], [20, 255]], np.uint8), "P")
    colours.putpalette([200, 100, 50] * 256)
    file = io.BytesIO()
    colours.save(file, "PNG")
    files = {f"JPEGImages/2007_{i}.jpg": encoded(np.zeros((2, 2, 3), np.uint8), "JPEG") for i in range(6)}
    files |= {f"SegmentationClass/2007_{i}.png": file.getvalue() for i in (0, 2, 3)}
    files["ImageSets/Segmentation/train.txt"] = b"2007_2\n2007_0\n2007_5\n"
    files["ImageSets/Segmentation/val.txt"] = b"2007_3\n"
    root = unpack(tmp_path / inside, files)
    source = DataPath(str(tmp_path))
    pairs = build_pairs(source, "train")
    assert [pairs.name(i) for i in range(2)] == ["2007_0.jpg", "2007_2.jpg"]
    assert pairs.mask_name(1) == "2007_2.png"
    # Masks of other splits are not left out of this one.
    assert pairs.left_out == {NO_MASK: 1, NO_IMAGE: 0}
    assert pairs.settings == MaskSettings(21, 255)
    assert pairs.classes[:2] == ["background", "aeroplane"] and pairs.classes[20] == "tvmonitor"
    assert len(pairs.classes) == 21
    assert len(build_pairs(source, "val")) == 1
    sample = build_segment_dataset(source, "val", SegmentEval())[0]
    assert sample["mask"].tolist() == [[0, 1], [20, IGNORED]]
    with pytest.raises(ValueError, match=r"no ImageSets/Segmentation/trainval\.txt"):
        build_pairs(DataPath(str(tmp_path), val_split="trainval"), "val")
    (root / "JPEGImages" / "2007_0.jpg").unlink()
    with pytest.raises(ValueError, match=r"train\.txt lists 1 image not in .*JPEGImages: 2007_0"):
        build_pairs(source, "train")


# Label ids in the order of train ids, from the data set's paper and documentation.
LABEL_IDS = {"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17}
LABEL_IDS |= {"traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23}
LABEL_IDS |= {"person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31}
LABEL_IDS |= {"motorcycle": 32, "bicycle": 33}


def cityscapes(kind: str, values: np.ndarray) -> dict[str, bytes]:
    files = {}
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        stem = f"{city}/{city}_000000_000019"
        files[f"leftImg8bit/{split}/{stem}_leftImg8bit.png"] = encoded(np.zeros((1, 35, 3), np.uint8))
        files[f"gtFine/{split}/{stem}_gtFine_{kind}.png"] = encoded(values)
        files[f"gtFine/{split}/{stem}_gtFine_color.png"] = encoded(np.zeros((1, 35, 3), np.uint8))
        files[f"gtFine/{split}/{stem}_gtFine_instanceIds.png"] = encoded(values)
        files[f"gtFine/{split}/{stem}_gtFine_polygons.json"] = b"{}"
    return files


def test_cityscapes(tmp_path):
    values = np.array([[*range(34), 255]], np.uint8)
    source = DataPath(str(unpack(tmp_path, cityscapes("labelIds", values))))
    pairs = build_pairs(source, "train")
    assert len(pairs) == 2 and pairs.left_out == {NO_MASK: 0, NO_IMAGE: 0}
    assert pairs.mask_name(1) == "bochum/bochum_000000_000019_gtFine_labelIds.png"
    assert pairs.classes == list(LABEL_IDS) == list(CITYSCAPES_CLASSES)
    mask = build_segment_dataset(source, "val", SegmentEval())[0]["mask"][0]
    expected = [IGNORED] * 35
    for train_id, label_id in enumerate(LABEL_IDS.values()):
        expected[label_id] = train_id
    assert mask.tolist() == expected


def test_cityscapes_with_train_ids_only(tmp_path):
    values = np.array([[*range(19), *[255] * 16]], np.uint8)
    source = DataPath(str(unpack(tmp_path, cityscapes("labelTrainIds", values))))
    dataset = build_segment_dataset(source, "train", SegmentEval())
    assert dataset.settings == MaskSettings(19, 255)
    assert dataset[1]["mask"][0].tolist() == [*range(19), *[IGNORED] * 16]


def test_imagenet_s(tmp_path):
    folders = ["n01443537", "n01491361", "n01531178"]
    values = np.zeros((6, 8, 3), np.uint8)
    values[0, 0] = (232, 3, 0)  # 1000
    values[0, 1] = (3, 0, 0)
    files = {}
    for images, masks in (
        ("train-semi", "train-semi-segmentation"),
        ("validation", "validation-segmentation"),
    ):
        for i, folder in enumerate(folders[: 3 - (images == "validation")]):
            files[f"{images}/{folder}/{folder}_{i}.JPEG"] = picture(i)
            files[f"{masks}/{folder}/{folder}_{i}.png"] = encoded(values)
    files["test/x.JPEG"] = picture(1)
    source = DataPath(str(unpack(tmp_path, files)))
    train = build_pairs(source, "train")
    assert train.classes == ["other", *folders]
    assert train.settings == MaskSettings(4, 1000, encoding="red_green")
    val = build_pairs(source, "val")
    # Its classes are those of the training images, of which it lacks one.
    assert len(val) == 2 and val.settings == train.settings
    mask = decode_mask(val.read_mask(0), val.settings, 100)
    assert mask[0, :3].tolist() == [IGNORED, 3, 0]
    # What is not given follows from the layout.
    dataset = build_segment_dataset(source, "val", SegmentEval(), masks=MaskSettings(num_classes=4))
    assert dataset.settings == train.settings and torch.equal(dataset[0]["mask"], mask)
    os.rename(tmp_path / "train-semi", tmp_path / "elsewhere")
    assert build_pairs(source, "val").classes == ["other", *folders[:2]]
