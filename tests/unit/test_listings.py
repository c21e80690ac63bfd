"""Listings of damaged and hostile tars, folders, lists and caches: right images, or one error with a name."""

import io
import os
import pickle
import random
import re
import tarfile
import time
import tracemalloc
import unicodedata
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.data.datasets import ImageDataset, build_dataset
from util.data.formats import ReadSettings
from util.data.loading.cached_pixels import Reader
from util.data.sources import layouts, listing, listing_cache, splits, tars
from util.data.sources.image_index import ChangedTar, NoSplit, check_classes
from util.data.sources.layouts import build_index, class_names
from util.flags.data_path import DataPath
from util.weights import validate

FILES = {"a/0.jpg": b"0" * 700, "a/1.jpg": b"1", "b/2.jpg": b"2" * 512, "b/x/3.jpg": b"3" * 40}
END = b"\0" * 1024


def header(name, size=0, **fields):
    """The header of a member; a size may be bytes, as they lie in the tar."""
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if isinstance(size, int):
        size = b"%011o\0" % size
    block[124:136] = size
    return checked(block)


def checked(block):
    """Give a header the right checksum."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name, data, **fields):
    return header(name, len(data), **fields) + data + b"\0" * (-len(data) % 512)


def packed(files):
    return b"".join(member(name, data) for name, data in files.items())


def images(index):
    return {index.name(i): index.read(i) for i in range(len(index))}


def old(path, data=None):
    """Write a tar that looks old enough for its listing to be cached."""
    path.write_bytes(packed(FILES) + END if data is None else data)
    os.utime(path, (time.time() - 60,) * 2)
    return str(path)


# --- tars ---


def test_tars_that_were_appended_are_read(tmp_path):
    first = packed({"a/0.jpg": b"old", "a/1.jpg": b"1"})
    second = packed({"b/2.jpg": b"2" * 600, "a/0.jpg": b"new"})
    want = {"a/0.jpg": b"new", "a/1.jpg": b"1", "b/2.jpg": b"2" * 600}
    # As `cat` makes them, with blocking factors of 1 and 20 and one that is no multiple of a block, and as
    # `tar -A` does.
    for number, zeros in enumerate((END, END * 9, b"\0" * 512, b"\0" * 1100, b"\0" * (3 << 20), b"")):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(first + zeros + second + END)
        index = build_index(path)
        assert images(index) == want and index.classes == ["a", "b"], len(zeros)
        assert index.summary().endswith("(tar; left out: 1 earlier version)")
    path.write_bytes(first + END + second + END + packed({"c/3.jpg": b"3"}) + END)
    assert images(build_index(path)) == want | {"c/3.jpg": b"3"}


@pytest.mark.parametrize("junk", [b"x", b"x" * 512, b"x" * 5000, packed(FILES)[1:]])
def test_what_follows_the_end_and_is_no_tar_is_an_error(tmp_path, junk):
    data = packed(FILES) + END
    (tmp_path / "x.tar").write_bytes(data + junk + END)
    with pytest.raises(ValueError, match=f"x.tar is damaged at byte {len(data)}, after 4 images: "):
        build_index(tmp_path / "x.tar")


def test_holes_of_terabytes_take_no_time(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(packed(FILES))
    os.truncate(path, 4 << 40)
    assert images(build_index(path)) == FILES


def test_members_that_are_left_out_are_counted(tmp_path):
    others = (
        header("a/s1.jpg", type=tarfile.SYMTYPE, linkname="0.jpg")
        + header("a/s2.jpg", type=tarfile.LNKTYPE, linkname="a/none.jpg")
        + header("a/same.jpg", type=tarfile.LNKTYPE, linkname="./a/0.jpg")
        + header("a/dev.jpg", type=tarfile.CHRTYPE)
        + header("a/pipe.jpg", type=tarfile.FIFOTYPE)
        + member("../up.jpg", b"up")
        + member("a/../../up.jpg", b"up")
        + member("../notes.txt", b"no image")
        + header("a/folder.jpg/", type=tarfile.DIRTYPE)
        + header("a/link", type=tarfile.SYMTYPE, linkname="0.jpg")
        + member("/b/abs.jpg", b"abs")
        + member("a/new\nline\x1b.jpg", b"line")
        + member("a/.hidden.jpg", b"hidden")
    )
    path = tmp_path / "train.tar"
    old(path, others + packed(FILES) + END)
    with tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(2):
            info = tarfile.TarInfo(f"a/sparse{number}.jpg")
            info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
            info.size = 512
            tar.addfile(info, io.BytesIO(b"1\n0\n1\n".ljust(512, b"\0")))
        info = tarfile.TarInfo("a/n.jpg")
        info.pax_headers = {"path": "a/nul\0.jpg"}
        tar.addfile(info)
    path.write_bytes(path.read_bytes() + (tmp_path / "sparse.tar").read_bytes())
    os.utime(path, (1e9, 1e9))
    want = FILES | {"a/same.jpg": FILES["a/0.jpg"], "b/abs.jpg": b"abs", "a/new\nline\x1b.jpg": b"line"}
    for _ in range(2):  # the second time from the cache
        index = build_index(path)
        assert images(index) == want and index.classes == ["a", "b"]
        text = "1 .txt, 3 links, 3 unsafe names, 2 sparse files, 2 special files, 1 hidden"
        assert index.summary() == f"{path}: 7 images, 2 classes (tar; left out: {text})"
    assert (tmp_path / "train.tar.index.npz").exists()


def pax(records, kind=tarfile.XHDTYPE):
    return member("pax", records, type=kind)


def record(key, value):
    """A pax record, which starts with its own length."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while length != len(str(length)) + len(rest):
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


HUGE = (1 << 60).to_bytes(12, "big").replace(b"\0", b"\x80", 1)
FIRST = packed({"a/0.jpg": b"0"})
HOSTILE = {
    "size of 2^60": (header("b/1.jpg", HUGE), r"b/1.jpg has a size of 1152921504606846976 bytes, and \d+ b"),
    "octal size": (header("b/1.jpg", b"7" * 11 + b"\0"), r"b/1.jpg has a size of 8589934591 bytes, and"),
    "a byte too many": (header("b/1.jpg", 2048) + b"1" * 512, r"b/1.jpg has a size of 2048 bytes, and 1536"),
    "size of 2^88": (header("b/1.jpg", b"\x80" + b"\xff" * 11), "cannot fit|too large|overflow|has a size"),
    "negative size": (header("b/1.jpg", b"\xff" * 10 + b"\xfe\0"), "has a size of -512 bytes"),
    "pax size": (pax(record(b"size", b"9" * 30)) + header("b/1.jpg"), "b/1.jpg has a size of 9{30} bytes"),
    "negative pax size": (pax(record(b"size", b"-512")) + header("b/1.jpg"), "has a size of -512 bytes"),
    "pax of 2^60": (header("pax", HUGE, type=tarfile.XHDTYPE), "headers are larger than 1048576 bytes"),
    "pax of -1024": (
        header("pax", b"\xff" * 10 + b"\xfc\0", type=tarfile.XHDTYPE),
        "headers are larger than",
    ),
    "name of 10 GB": (
        header("n", 10 << 30 & 0o77777777777, type=tarfile.GNUTYPE_LONGNAME),
        "are larger than",
    ),
    "long names": (
        member("n", b"n" * 99, type=tarfile.GNUTYPE_LONGNAME) * 900,
        "recursion|headers are larger",
    ),
    "pax chain": (pax(record(b"path", b"x")) * 2000, "recursion|headers are larger"),
    "digits": (pax(b"1" * 900_000) * 20 + packed(FILES), "more than 256 digits"),
    "globals": (
        b"".join(pax(record(b"k%d" % n, b"v"), tarfile.XGLTYPE) + member("x", b"") for n in range(1001)),
        "more than 1000 fields",
    ),
    "pax size, no number": (
        pax(record(b"size", b"1e3")) + member("b/1.jpg", b"1"),
        "b/1.jpg has a size of '1e3'",
    ),
    "negative base 256": (header("b/1.jpg", b"\xff" * 11 + b"\xfb"), "b/1.jpg has a size of -5 bytes"),
    "another's size": (header("b/1.txt", HUGE), "b/1.txt has a size of 1152921504606846976 bytes"),
    "real size alone": (
        pax(record(b"GNU.sparse.realsize", b"%d" % (1 << 60))) + member("b/1.jpg", b"1"),
        "b/1.jpg has a size of 1152921504606846976 bytes, and 512 bytes follow",
    ),
    "negative real size": (
        pax(record(b"GNU.sparse.realsize", b"-5")) + member("b/1.jpg", b"1"),
        "b/1.jpg has a size of -5 bytes",
    ),
    "real size, no number": (
        pax(record(b"GNU.sparse.realsize", b"abc")) + member("b/1.jpg", b"1"),
        "'abc', in the headers of b/1.jpg",
    ),
    "sparse file of 2^60": (
        header("b/1.jpg", HUGE, type=tarfile.GNUTYPE_SPARSE),
        r"b/1.jpg has a size of 1152921504606846976 bytes, and \d+ bytes follow",
    ),
    "broken map in the data": (
        pax(
            record(b"GNU.sparse.major", b"1")
            + record(b"GNU.sparse.minor", b"0")
            + record(b"GNU.sparse.realsize", b"9")
        )
        + member("b/1.jpg", b"99999999999\n0\n"),
        "in the headers of b/1.jpg",
    ),
    "sparse map": (
        checked(header("b/1.jpg", type=tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + b"\0" * 29) + b"1" * (2 << 20),
        "headers are larger than",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("before", [b"", FIRST, FIRST + END], ids=["first", "second", "appended"])
def test_hostile_headers_name_the_tar_at_once(tmp_path, kind, before):
    data, message = HOSTILE[kind]
    (tmp_path / "x.tar").write_bytes(before + data + END)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        build_index(tmp_path / "x.tar")
    assert time.monotonic() - start < 5
    place = "x.tar is not a tar, or is damaged or cut off ("
    if before and kind != "globals":
        place = f"x.tar is damaged at byte {len(before)}, after 1 image: "
    if kind != "globals":
        assert str(error.value).startswith(f"{tmp_path}/{place}")
    assert "\n" not in str(error.value)


def test_only_regular_files_are_tars_and_lists(tmp_path):
    for name in ("x.tar", "train.tar", "val-0.tar", "list.txt", "classes.txt"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    for name, split in [
        ("x.tar", "train"), ("", "train"), ("", "val"), ("list.txt", "train"), ("zero.txt", "train"),
        ("zero.tar", "train"),
    ]:  # fmt: skip
        with pytest.raises(OSError, match=r"is a (named pipe|device|socket), not a regular file"):
            build_index(tmp_path / name, split, labels=False)
    for name in ("classes.txt", "zero.txt"):
        with pytest.raises(ValueError, match=r"no such file or folder of classes: .*(classes|zero).txt"):
            class_names(tmp_path / name)


# --- labels beside the images: WebDataset's form ---


def pairs(labels, suffix="cls", start=0):
    """Members of samples with these labels."""
    files = {}
    for i, label in enumerate(labels, start):
        files[f"{i:04d}.jpg"] = b"%d" % i
        files[f"{i:04d}.{suffix}"] = label
    return files


def labelled(index):
    return [(index.name(i), index.classes[label]) for i, label in enumerate(index.labels.tolist())]


@pytest.mark.parametrize(
    "labels, suffix, classes",
    [
        ([b"10", b"2\n", b" 9", b"2"], "cls", ["2", "9", "10"]),
        ([b"10", b"002", b"9", b"2"], "CLS", ["2", "9", "10"]),
        (
            [b'{"label": 10}', b'{"cls": "2"}', b'{"class": 9}', b'{"label": 2, "cls": 5}'],
            "json",
            ["2", "9", "10"],
        ),
        (
            [b'{"label": "owl"}', b'{"cls": "ant "}', b'{"x": 1, "class": "cat"}', b'{"label": "ant"}'],
            "json",
            ["ant", "cat", "owl"],
        ),
    ],
)
def test_labels_lie_beside_the_images(tmp_path, labels, suffix, classes):
    # Other members of a sample change nothing.
    more = {"0000.txt": b"text", ".9.cls": b"x", "./0001.json.gz": b"x", "0007.cls": b"no image"}
    old(tmp_path / "train-0.tar", packed(pairs(labels[:2], suffix) | more) + END)
    old(tmp_path / "train-1.tar", packed(pairs(labels[2:], suffix, 2)) + END)
    texts = [classes[-1], classes[0], classes[1], classes[0]]
    for _ in range(2):  # listed, then from the cache
        index = build_index(tmp_path)
        assert index.classes == classes and index.paired
        assert labelled(index) == [(f"000{i}.jpg", text) for i, text in enumerate(texts)]
        assert index.summary().endswith(
            "4 images, 3 classes (2 tar shards, labels beside the images; left out: 1 .gz, 1 .txt, 1 hidden)"
        )
        loose = build_index(tmp_path, labels=False)
        assert images(loose) == images(index) and loose.labels.tolist() == [-1] * 4
    # One folder that holds all of them is no class.
    inside = {f"./all/{name}": data for name, data in pairs(labels, suffix).items()}
    index = build_index(old(tmp_path / "x.tar", packed(inside) + END))
    assert labelled(index) == [(f"all/000{i}.jpg", text) for i, text in enumerate(texts)]


def test_one_image_of_a_sample_is_taken(tmp_path):
    files = pairs([b"1", b"0", b"1"]) | {
        "0000.seg.png": b"mask",
        "0000.png": b"another",
        "0001.0.jpg": b"crop",
        "0003.PNG": b"3",
        "0003.bmp": b"no",
        "0003.cls": b"0",
        "0004.seg.png": b"only",
        "0004.cls": b"1",
    }
    path = old(tmp_path / "x.tar", packed(files) + END)
    for _ in range(2):
        index = build_index(path)
        assert images(index) == {
            "0000.jpg": b"0", "0001.jpg": b"1", "0002.jpg": b"2", "0003.PNG": b"3", "0004.seg.png": b"only",
        }  # fmt: skip
        assert index.labels.tolist() == [1, 0, 1, 0, 1] and "; left out: 4 extra images)" in index.summary()
    # Without labels beside them, they are images like others.
    path = old(tmp_path / "y.tar", packed({n: d for n, d in files.items() if ".cls" not in n}) + END)
    assert len(build_index(path, labels=False)) == 9


@pytest.mark.parametrize(
    "name, data, fault",
    [
        (
            "0001.cls",
            None,
            "0001.jpg has no label: there is neither 0001.cls nor 0001.json with label, cls or",
        ),
        ("0001.cls", b"", "0001.cls is empty, and should hold the label of the image, an integer from 0 on"),
        ("0001.cls", b"cat", "0001.cls holds b'cat'"),
        ("0001.cls", b"-1", "0001.cls holds b'-1'"),
        ("0001.cls", b"1.0", "0001.cls holds b'1.0'"),
        ("0001.cls", "\u0662".encode(), "0001.cls holds b"),
        ("0001.cls", b"1" * 65, "0001.cls has more than 64 bytes"),
        ("0001.json", b"1" * 65537, "0001.json has more than 65536 bytes"),
        ("0001.json", b"[" * 60000, "0001.json is no JSON"),
        ("0001.json", b"{", "0001.json is no JSON"),
        ("0001.json", b'{"label": true}', "0001.json holds the label 'True'"),
        ("0001.json", b'{"label": -3}', "0001.json holds the label '-3'"),
        ("0001.json", b'{"label": ' + b"[" * 900 + b"]" * 900 + b"}", "0001.json "),
        ("0001.json", b'{"label": [1]}', "0001.json holds a list as its label"),
        ("0001.json", b'{"label": "\\ud800"}', "0001.json holds the label"),
        ("0001.json", b'{"caption": "a"}', "0001.jpg has no label"),
        ("0001.json", b"5", "0001.jpg has no label"),
    ],
)
def test_a_label_that_is_none_names_the_tar_and_the_member(tmp_path, name, data, fault):
    files = pairs([b"0", b"1", b"2"])
    del files["0001.cls"]
    if data is not None:
        files[name] = data
    path = old(tmp_path / "train.tar", packed(files) + END)
    for _ in range(2):  # listed, then from the cache
        with pytest.raises(ValueError, match=re.escape(f"{path}: {fault}")):
            build_index(tmp_path)
        # Pretraining needs no labels.
        assert len(build_index(tmp_path, labels=False)) == 3
    assert Path(path + ".index.npz").exists()


def test_class_folders_win_over_labels_beside_the_images(tmp_path):
    files = FILES | {"a/0.cls": b"5", "a/1.json": b'{"label": 3}', "b/2.cls": b"x"}
    index = build_index(old(tmp_path / "x.tar", packed(files) + END))
    assert index.classes == ["a", "b"] and index.labels.tolist() == [0, 0, 1, 1] and not index.paired
    # JSON without labels says nothing.
    path = old(tmp_path / "y.tar", packed(pairs([b'{"caption": "x"}', b"{"], "json")) + END)
    assert len(build_index(path, labels=False)) == 2
    with pytest.raises(ValueError, match=r"y.tar holds 2 images without a label.*0001.jpg beside 0001.cls"):
        build_index(path)


def test_a_file_beside_the_tars_names_their_classes(tmp_path):
    old(tmp_path / "train.tar", packed(pairs([b"2", b"0", b"3"])) + END)
    assert build_index(tmp_path).classes == ["0", "2", "3"]
    (tmp_path / "classnames.txt").write_text("\ufeffowl\ncat\nant bear\nowl\n\n")
    assert build_index(tmp_path).classes == ["owl (0)", "ant bear", "owl (3)"]
    # The file may list a name that another one gets with its number.
    for lines, expected in (
        ("owl|x|owl|owl (0)", ["owl (0) (0)", "owl (2)", "owl (0)"]),
        ("owl|x|owl (3)|owl", ["owl (0)", "owl (3)", "owl (3) (3)"]),
    ):
        (tmp_path / "classnames.txt").write_text(lines.replace("|", "\n"))
        assert build_index(tmp_path).classes == expected
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(
        ValueError, match=r"classes.txt has 3 lines and no name for the label 3: .* line i \+ 1"
    ):
        build_index(tmp_path)
    assert len(build_index(tmp_path, labels=False)) == 3


# --- tars that change ---


def indexed(tmp_path, opened=False):
    path = tmp_path / "train.tar"
    index = build_index(old(path))
    if opened:
        index.read(0)
    return path, index


def reordered():
    return packed({name: FILES[name] for name in ("a/1.jpg", "a/0.jpg", "b/2.jpg", "b/x/3.jpg")}) + END


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda path: path.write_bytes(reordered()), "was replaced or changed since it was listed"),
        (lambda path: os.truncate(path, 2048), "was replaced or changed .* it had 5632 bytes, and has 2048"),
        (lambda path: path.write_bytes(END * 5), "was replaced or changed since it was listed"),
        (lambda path: path.unlink(), "was removed since it was listed"),
    ],
)
def test_a_tar_that_was_replaced_is_noticed(tmp_path, change, said):
    path, index = indexed(tmp_path)
    change(path)
    for i in range(4):
        with pytest.raises(ChangedTar, match=f"train.tar {said}"):
            index.check_unchanged(i)
        # Never other bytes in its name.
        with pytest.raises((ChangedTar, FileNotFoundError), match=r"train\.tar"):
            index.read(i)
    assert index._files == {}


def test_a_tar_that_is_overwritten_while_open_is_noticed(tmp_path):
    path, index = indexed(tmp_path, opened=True)
    index.check_unchanged(0)
    path.write_bytes(reordered())
    with pytest.raises(ChangedTar, match="was replaced or changed since it was listed"):
        pickle.loads(pickle.dumps(index)).read(0)  # as a worker of the next epoch
    with pytest.raises(ChangedTar, match="was replaced or changed since it was listed"):
        index.check_unchanged(0)


@pytest.mark.parametrize("evaluation", [True, False])
def test_a_replaced_tar_is_an_error_of_training_and_not_bad_images(tmp_path, evaluation):
    path, index = indexed(tmp_path)
    path.write_bytes(reordered())
    dataset = ImageDataset(index, lambda image: image, evaluation=evaluation)
    cached = Reader(index, ReadSettings(max_pixels=100))
    for read in (dataset.__getitem__, cached):
        with pytest.raises(ChangedTar, match="was replaced or changed since it was listed"):
            read(0)


def test_a_tar_that_is_replaced_while_open_is_read_from_the_old_file(tmp_path):
    path, index = indexed(tmp_path, opened=True)
    (tmp_path / "new").write_bytes(reordered())
    os.replace(tmp_path / "new", path)
    index.check_unchanged(0)
    assert images(index) == FILES


def test_a_tar_may_be_touched(tmp_path):
    """As users do where old files are deleted."""
    path, index = indexed(tmp_path)
    os.utime(path)
    assert images(index) == FILES
    os.utime(path, (5, 5))
    index.check_unchanged(3)


# --- what is left out ---


def encoded(kind, size=(9, 7)):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(file, kind)
    return file.getvalue()


def array():
    file = io.BytesIO()
    np.save(file, np.zeros((4, 5, 3), np.uint8))
    return file.getvalue()


# Name -> content of images whose names do not say it.
UNNAMED = {
    **{
        f"a/{kind}": encoded(kind)
        for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "AVIF")
    },
    **{f"b/{name}": array() for name in ("0.jpg_large", "1.2.840.113619", "b.2024-06-01", "plain")},
    "b/dicom": b"\0" * 128 + b"DICM" + b"\2\0",
    "b/photo.JPG~": encoded("JPEG"),
    "b/heic": b"\0\0\0\x18ftypheic\0\0\0\0",
}
# Others, and what they are counted as; "" for what is not worth a word.
OTHERS = {
    "README": (b"read me", "file without suffix"),
    "a/film": (b"\0\0\0\x18ftypisom\0\0\0\0", "file without suffix"),
    "a/empty": (b"", "file without suffix"),
    "a/BMW": (b"BMW and other cars are in the pictures.", "file without suffix"),
    "a/sound": (b"RIFF\x24\0\0\0WAVEfmt ", "file without suffix"),
    "a/notes.TXT": (encoded("JPEG"), ".txt"),
    "b/x.txt": (b"x", ".txt"),
    "b/0.xml": (b"<a/>", ".xml"),
    "b/set.tar.gz": (b"\x1f\x8b", ".gz"),
    "b/.hidden.jpg": (encoded("JPEG"), "hidden"),
    ".git/0": (b"x", "hidden"),
    ".git/1.jpg": (b"x", ""),  # in a folder that is counted
    ".index/train.npz": (b"PK\3\4", ""),
    "b/Thumbs.db": (b"x", ""),
    "b/.DS_Store": (b"x", ""),
    "b/._0.jpg": (b"x", ""),
    "__MACOSX/a/0.jpg": (encoded("JPEG"), ""),
    "train.tar.index.npz": (b"PK\3\4", ""),
}
LEFT_OUT = {".txt": 2, "file without suffix": 5, ".xml": 1, ".gz": 1, "hidden": 2}


@pytest.mark.parametrize("layout", ["folder", "tar", "shards"])
def test_all_files_are_images_or_counted(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(listing, "CACHE_FOLDERS_ABOVE", 1)
    files = FILES | UNNAMED | {name: data for name, (data, _) in OTHERS.items()}
    if layout == "folder":
        for name, data in files.items():
            (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / name).write_bytes(data)
        for path in (tmp_path, tmp_path / "train", *(tmp_path / "train").rglob("*")):
            os.utime(path, (1e9, 1e9))
    elif layout == "tar":
        old(tmp_path / "train.tar", packed(files) + END)
    else:
        names = list(files)
        for shard in range(3):
            part = {name: files[name] for name in names[shard::3]}
            # A hidden folder that lies in two shards is one for each.
            part.pop(".git/1.jpg", None)
            old(tmp_path / f"train-{shard}.tar", packed(part) + END)
    for again in range(2):
        index = build_index(tmp_path)
        assert images(index) == FILES | UNNAMED, again
        assert index.left_out == LEFT_OUT
        kind = {"folder": "class folders", "tar": "train.tar", "shards": "3 tar shards"}[layout]
        assert index.summary() == (
            f"{tmp_path}: 19 images, 2 classes ({kind}; left out: 2 .txt, 1 .gz, 1 .xml, "
            "5 files without suffix, 2 hidden)"
        )
        # The second time from the cache.
        for name in ("list_folder", "list_tar"):
            monkeypatch.setattr(listing, name, None)
        monkeypatch.setattr(layouts, "list_folder", None)


def test_rare_suffixes_are_counted_together(tmp_path):
    files = {f"a/{n}.s{n}": b"" for n in range(150)} | {f"a/{n}.txt": b"" for n in range(9)}
    path = old(tmp_path / "train.tar", packed(files | FILES | {"a/.h": b""}) + END)
    for _ in range(2):
        index = build_index(path)
        assert len(index.left_out) == listing_cache.MAX_KINDS and sum(index.left_out.values()) == 160
        text = "9 .txt, 1 .s0, 1 .s1, 1 .s10, 1 .s100, 146 of other suffixes, 1 hidden"
        assert index.summary() == f"{path}: 4 images, 2 classes (tar; left out: {text})"


def test_listings_of_ours_are_no_images(tmp_path):
    """The user's archives of arrays are."""
    file = io.BytesIO()
    np.savez(file, image=np.zeros((4, 5, 3), np.uint8))
    (tmp_path / "0.npz").write_bytes(file.getvalue())
    old(tmp_path / "x.tar")
    build_index(tmp_path / "x.tar")
    assert (tmp_path / "x.tar.index.npz").exists()
    index = build_index(tmp_path, labels=False)
    assert [index.name(i) for i in range(len(index))] == ["0.npz"] and index.left_out == {".tar": 1}


@pytest.mark.parametrize(
    "content, images, looks",
    [
        (lambda n: b"\xff\xd8\xff\xe0", 1000, 32),
        (lambda n: b"text", 0, 32),
        (lambda n: b"\xff\xd8\xff" if n % 2 else b"text", 500, 1032),
    ],
)
def test_few_of_many_files_without_suffix_are_looked_at(tmp_path, monkeypatch, content, images, looks):
    train = tree(tmp_path)
    for n in range(1000):
        (train / "a" / f"{n}").write_bytes(content(n))
    looked = []
    look = listing._starts_like_image
    monkeypatch.setattr(listing, "_starts_like_image", lambda path: looked.append(path) or look(path))
    index = build_index(tmp_path)
    assert len(index) == 2 + images and index.left_out["file without suffix"] == 1000 - images
    assert len(looked) == looks


def test_pipes_and_closed_files_without_suffix_are_counted(tmp_path):
    train = tree(tmp_path)
    os.mkfifo(train / "a" / "pipe")
    (train / "a" / "gone").symlink_to("nowhere")
    (train / "a" / "linked").symlink_to("0.jpg")
    (train / "a" / "0.jpg").write_bytes(encoded("JPEG"))
    index = build_index(tmp_path)
    assert index.left_out == {"special file": 1, "link": 1} and len(index) == 3
    # In tars, too.
    members = (
        header("a/pipe", type=tarfile.FIFOTYPE)
        + header("a/gone", type=tarfile.SYMTYPE, linkname="nowhere")
        + packed(FILES | {"a/first": encoded("PNG")})
        + header("a/same", type=tarfile.LNKTYPE, linkname="a/first")
    )
    index = build_index(old(tmp_path / "x.tar", members + END))
    assert index.left_out == {"special file": 1, "link": 1}
    assert images(index) == FILES | {"a/first": encoded("PNG"), "a/same": encoded("PNG")}


# --- caches ---


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A tar, its cache, and a function that tells whether the cache is used; it checks the images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    more = {"a/n.txt": b"n", "a/m.txt": b"m", "a/.hidden": b"h"}
    path = old(tmp_path / "train.tar", packed(FILES | more) + END)
    cache = Path(path + ".index.npz")
    build_index(path)
    assert cache.exists()
    listed = []
    list_tar = tars.list_tar
    monkeypatch.setattr(listing, "list_tar", lambda tar: listed.append(tar) or list_tar(tar))

    def used():
        listed.clear()
        index = build_index(path)
        assert images(index) == FILES and index.labels.tolist() == [0, 0, 1, 1]
        assert index.left_out == {".txt": 2, "hidden": 1}
        return not listed

    assert used()
    return cache, used


def test_damaged_caches_are_made_again(cached):
    cache, used = cached
    good = cache.read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        cache.write_bytes(data)
        used()  # a bit that zipfile ignores, such as one of a date, does no harm
    for length in (0, 1, 300, len(good) // 2, len(good) - 1):
        cache.write_bytes(good[:length])
        assert not used(), length
        assert used(), "it was written anew"


def forged(cache, change):
    """Write a cache with a right seal and other content."""
    arrays = listing_cache._read(str(cache))
    arrays = {name: array.copy() for name, array in arrays.items()}
    arrays = change(arrays) or arrays
    with open(cache, "wb") as file:
        listing_cache._write(file, arrays)


def put(name, value, at=0):
    def change(arrays):
        arrays[name].reshape(-1)[at] = value

    return change


def swap(name, function):
    return lambda arrays: arrays | {name: function(arrays[name])}


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {"x": np.zeros(3)},
        lambda arrays: {name: array for name, array in arrays.items() if name != "shard"},
        lambda arrays: arrays | {"more": np.zeros(3)},
        swap("ends", lambda a: a.astype(np.int32)),
        swap("ends", lambda a: a.astype(">i8")),
        swap("ends", lambda a: a.astype(np.float64)),
        swap("ends", lambda a: a.astype("S8")),
        swap("ends", lambda a: a[::-1]),
        swap("ends", lambda a: a[None]),
        swap("ends", lambda a: a[:-1]),
        swap("ends", lambda a: a[:0]),
        put("ends", 0),
        put("ends", -1),
        put("ends", 2**62, -1),
        put("ends", 10**6, 1),
        put("names", 0, 3),
        swap("labels", lambda a: a[:-1]),
        put("labels", -2),
        put("labels", 2, -1),
        put("labels", 1, 0),
        put("labels", 2**31 - 1, -1),
        swap("classes", lambda a: a[:0]),
        swap("classes", lambda a: np.frombuffer(b"a\0a", np.uint8)),
        put("shard", 1),
        put("shard", -1),
        put("offset", -512),
        put("offset", 1 << 60),
        put("size", -1),
        put("size", 1 << 62),
        put("size", 1 << 13, -1),
        swap("paired", lambda a: np.ones(2, np.uint8)),
        swap("fault", lambda a: np.ones(2, np.uint8)),
        put("stamps", 7, 1),
        put("left_out", -1),
        put("left_out", 0),
        swap("left_out", lambda a: a[:1]),
        swap("left_out", lambda a: a[None]),
        swap("kinds", lambda a: a[:0]),
        swap("kinds", lambda a: np.frombuffer(b".txt\0.txt", np.uint8)),
        swap("kinds", lambda a: np.frombuffer(b"\0.txt", np.uint8)),
        swap("kinds", lambda a: np.frombuffer(b".txt\0" + b"x" * 41, np.uint8)),
        lambda arrays: {name: array for name, array in arrays.items() if name != "kinds"},
        swap("stamps", lambda a: a[:0]),
        swap("stamped", lambda a: np.frombuffer(b"other.tar", np.uint8)),
        swap("stamped", lambda a: a[:0]),
    ],
)
def test_caches_with_other_content_are_not_used(cached, change):
    cache, used = cached
    forged(cache, change)
    assert not used()


def test_a_cache_of_another_format_or_mixed_content_is_not_used(cached):
    cache, used = cached
    good = cache.read_bytes()
    with zipfile.ZipFile(cache, "a") as archive:
        now = listing_cache.FORMAT
        archive.comment = archive.comment.replace(b"listing %d " % now, b"listing %d " % (now - 1))
    assert not used()
    cache.write_bytes(good)
    # The arrays of another listing, with their own right checksums.
    arrays = listing_cache._read(str(cache))
    np.savez(cache, **arrays | {"offset": arrays["offset"] + 512})
    assert not used()
    np.savez(cache, **arrays | {"names": np.array([None, {}])}, allow_pickle=True)
    assert not used()


def bomb(cache):
    with zipfile.ZipFile(cache, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("names.npy", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(b"\0" * (1 << 20))
        archive.comment = listing_cache._seal(archive.infolist())


def sparse(cache):
    cache.write_bytes(b"PK")
    os.truncate(cache, 10 << 30)


def huge_shape(cache):
    with zipfile.ZipFile(cache, "w") as archive:
        with archive.open("names.npy", "w") as file:
            np.lib.format.write_array_header_1_0(
                file, dict(shape=(1 << 50,), fortran_order=False, descr="|u1")
            )
        archive.comment = listing_cache._seal(archive.infolist())


@pytest.mark.parametrize(
    "make", [bomb, sparse, huge_shape, os.mkfifo, os.mkdir, lambda p: p.symlink_to("/dev/zero")]
)
def test_what_is_no_cache_is_neither_read_nor_waited_for(cached, make):
    cache, used = cached
    cache.unlink()
    make(cache)
    start = time.monotonic()
    tracemalloc.start()
    assert not used() and used()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert time.monotonic() - start < 5


def test_a_folders_cache_must_list_that_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "CACHE_FOLDERS_ABOVE", 1)
    for name in ("a/0.jpg", "a/1.jpg", "b/2.jpg"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"")
    for path in (tmp_path, tmp_path / "train", *(tmp_path / "train").iterdir()):
        os.utime(path, (1e9, 1e9))
    cache = tmp_path / ".index" / "train.npz"
    for change in (
        swap("stamped", lambda a: a[:0]),
        lambda arrays: arrays | dict(stamped=arrays["stamped"][:0], stamps=arrays["stamps"][:0]),
        lambda arrays: arrays | dict(offset=arrays["ends"]),
    ):
        build_index(tmp_path)
        forged(cache, change)
        forged_names = cache.read_bytes()
        assert [build_index(tmp_path).name(i) for i in range(3)] == ["a/0.jpg", "a/1.jpg", "b/2.jpg"]
        assert cache.read_bytes() != forged_names, "it was made again"


# --- folders and lists ---


def tree(tmp_path):
    for name in ("a/0.jpg", "b/1.jpg"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"")
    return tmp_path / "train"


def test_links_to_a_folder_above_are_left_out_and_counted(tmp_path):
    train = tree(tmp_path)
    (train / "a" / "up").symlink_to("..")
    (train / "b" / "here").symlink_to(".")
    (train / "b" / "self.jpg").symlink_to("self.jpg")
    (train / "b" / "self").symlink_to("self")
    (train / "b" / "folder.jpg").mkdir()
    (train / "c").symlink_to("a")
    index = build_index(tmp_path)
    # Each of the links in a and in c leads back to the root.
    assert (
        index.summary()
        == f"{tmp_path}: 4 images, 3 classes (class folders; left out: 3 looping links, 1 link)"
    )
    assert [index.name(i) for i in range(4)] == ["a/0.jpg", "b/1.jpg", "b/self.jpg", "c/0.jpg"]


def test_links_that_multiply_are_an_error(tmp_path):
    train = tree(tmp_path)
    for depth in range(14):
        (tmp_path / str(depth)).mkdir()
        for side in "lr":
            (tmp_path / str(depth) / side).symlink_to(f"../{depth + 1}")
    (tmp_path / "14").mkdir()
    (train / "a" / "x").symlink_to("../../0")
    with pytest.raises(ValueError, match=r"links lead to .*train/a/x/.* in more than 1000 ways: remove some"):
        build_index(tmp_path)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file"), PermissionError(13, "Permission denied")]
)
def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, error):
    train = tree(tmp_path)
    scandir = os.scandir

    def failing(path):
        if os.fsdecode(path).endswith("train/b/"):
            raise error
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(ValueError, match=f"^{re.escape(str(train))}/b/ cannot be listed: {error.strerror}$"):
        build_index(tmp_path)


def test_lists_of_paths(tmp_path):
    train = tree(tmp_path)
    (train / "list.txt").write_bytes(b"\xef\xbb\xbfa/0.jpg\r\n# c\r\n\r\n../train/b/1.jpg\r\n")
    index = build_index(train / "list.txt", labels=False)
    assert [index.name(i) for i in range(2)] == ["a/0.jpg", "../train/b/1.jpg"]
    (train / "classes.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert class_names(train / "classes.txt") == ["a", "b"]
    for content, line in ((b"a/0.jpg\n" * 999 + b"a\0b.jpg", 1000), (b"a/0.jpg\n" + b"a" * (1 << 20), 2)):
        (train / "list.txt").write_bytes(content)
        for read in (lambda path: build_index(path, labels=False), class_names):
            with pytest.raises(ValueError, match=f"list.txt is not a .*: line {line} is binary or too long"):
                read(train / "list.txt")


def test_many_classes_in_a_list_take_no_time(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(map(str, range(100_000))))
    assert len(class_names(path)) == 100_000
    path.write_text("a\nb\na\n")
    with pytest.raises(ValueError, match=r"classes.txt lists classes twice: a$"):
        class_names(path)


# --- names that are reserved for splits ---


def place(root, *names):
    """Write files that hold their own names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def names_of(index):
    return [index.name(i) for i in range(len(index))]


VEHICLES = [f"{folder}/{i}.jpg" for folder in ("bus", "car", "train") for i in range(3)]


def test_a_class_may_be_called_train(tmp_path):
    index = build_index(place(tmp_path, *VEHICLES))
    assert names_of(index) == VEHICLES and index.classes == ["bus", "car", "train"]
    assert index.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert index.summary() == f"{tmp_path}: 9 images, 3 classes (class folders, of which train is one)"
    with pytest.raises(NoSplit, match="no val/"):
        build_index(tmp_path, "val")
    # Without labels it may be the split beside masks, for example.
    with pytest.raises(ValueError, match=r"/train is the training split, or a class beside bus, car, which"):
        build_index(tmp_path, labels=False)


@pytest.mark.parametrize(
    "others",
    [
        ["val/a/1.jpg", "val/b/1.jpg", "bus/1.jpg"],
        ["test/1.jpg", "extra/deep/1.jpg"],
        ["annotations/1.xml", ".hidden/1.jpg", "README.md"],
        ["valid.tar", "bus/1.jpg"],
        ["val-000.tar", "bus/1.jpg"],
        ["empty/a/b/c.txt"],
        ["holdout/1.jpg"],
        [],
    ],
)
@pytest.mark.parametrize("labels", [True, False])
def test_train_beside_other_splits_or_no_images_is_the_split(tmp_path, others, labels):
    place(tmp_path, "train/a/1.jpg", "train/b/1.jpg", *others)
    index = build_index(DataPath(str(tmp_path), "holdout"), labels=labels)
    assert names_of(index) == ["a/1.jpg", "b/1.jpg"]


@pytest.mark.parametrize("inside", [["a/1.jpg", "b/1.jpg"], ["1.jpg", "b/1.jpg"]])
@pytest.mark.parametrize("labels", [True, False])
def test_train_that_may_be_a_class_or_the_split_is_an_error(tmp_path, inside, labels):
    place(tmp_path, "bus/1.jpg", *(f"train/{name}" for name in inside))
    with pytest.raises(ValueError) as error:
        build_index(tmp_path, labels=labels)
    shown = re.escape(str(tmp_path / "train"))
    assert re.search(
        f"^{shown} is the training split, or a class beside bus, .* give {shown} alone or move .* rename it",
        str(error.value),
    )
    # What it advises works.
    assert len(build_index(tmp_path / "train", labels=False)) == 2
    (tmp_path / "train").rename(tmp_path / "trains")
    assert build_index(tmp_path).classes == ["bus", "trains"]


def test_the_look_at_other_folders_is_bounded(tmp_path, monkeypatch):
    """Folders may hold a million images, on a network file system."""
    place(tmp_path, "train/a/1.jpg", *(f"{i:03}/notes/{n}/x.txt" for i in range(100) for n in range(9)))
    looks = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looks.append(path) or scandir(path))
    read = []
    monkeypatch.setattr(splits, "is_folder", lambda entry: read.append(entry) or listing.is_folder(entry))
    build_index(tmp_path)
    assert len(looks) < 100
    monkeypatch.setattr(splits, "ENTRIES", 5)
    read.clear()
    build_index(tmp_path)
    assert len(read) <= 5 * len(looks)


# --- other names of the validation images ---


@pytest.mark.parametrize("name", ["valid", "validation", "test", "dev"])
def test_validation_images_may_have_another_name(tmp_path, name):
    root = place(tmp_path / "src", f"{name}/a/1.jpg", f"{name}/b/1.jpg", "train/a/2.jpg", "train/b/2.jpg")
    files = {"a/1.jpg": b"1", "b/1.jpg": b"1"}
    layouts = {"src": root}
    for layout, tar in (("tar", f"{name}.tar"), ("shards", f"{name}-0.tar")):
        layouts[layout] = tmp_path / layout
        layouts[layout].mkdir()
        (layouts[layout] / tar).write_bytes(packed(files) + END)
        (layouts[layout] / "train.tar").write_bytes(packed(files) + END)
    for layout in layouts.values():
        index = build_index(DataPath(str(layout), name), "val")
        assert names_of(index) == ["a/1.jpg", "b/1.jpg"] and index.classes == ["a", "b"]
        with pytest.raises(NoSplit) as error:
            build_index(layout, "val")
        advised = re.search(r"`val_split` (\w+)", str(error.value))
        assert (advised and advised[1]) == (name if name != "dev" else None), error.value
        # A name that was given must be there: to go on without validation would be a surprise.
        with pytest.raises(ValueError, match=r"no nowhere/, nowhere.tar") as error:
            build_index(DataPath(str(layout), "nowhere"), "val")
        assert not isinstance(error.value, NoSplit)


def test_a_folder_that_is_named_as_validation_is_no_class(tmp_path):
    place(tmp_path, "a/1.jpg", "b/1.jpg", "dev/a/1.jpg")
    assert build_index(tmp_path).classes == ["a", "b", "dev"]
    with pytest.raises(ValueError, match=r"Move the class folders into train/. If dev is a class like a"):
        build_index(DataPath(str(tmp_path), "dev"))


def test_the_demo_set_has_validation_images():
    with pytest.raises(ValueError, match=r"there are validation images already: .*demo/val.tar"):
        build_dataset(DataPath(val_share=0.1), "train", None)


@pytest.mark.parametrize("values", [("", "a/b"), ("", ""), ("", "train"), ("", ".val"), ("", "val", 1.0)])
def test_settings_of_a_path_that_make_no_sense(values):
    with pytest.raises(ValueError, match=r"`val_s(plit|hare)`"):
        DataPath(*values)


# --- a share that is held out ---

SHARED = [f"{c}/{i:02}.jpg" for c in "ab" for i in range(20)] + [
    "b/deep/0.jpg",
    "c/0.jpg",
    "d/0.jpg",
    "d/1.jpg",
]


def share(path, split, labels=True, part=0.1):
    return names_of(build_index(DataPath(str(path), val_share=part), split, labels=labels))


def test_a_share_is_the_same_in_every_layout(tmp_path):
    root = place(tmp_path / "folders", *SHARED)
    want = share(root, "val")
    # Fixed for ever: the smallest hashes of each class, of which c has too few.
    by_hash = {
        c: sorted((n for n in SHARED if n[0] == c), key=lambda n: sha256(n.encode()).digest()) for c in "abd"
    }
    assert want == sorted(by_hash["a"][:2]) + sorted(by_hash["b"][:2]) + by_hash["d"][:1]
    place(tmp_path / "split", *(f"train/{name}" for name in SHARED))
    (tmp_path / "x.tar").write_bytes(packed({name: b"" for name in SHARED[::-1]}) + END)
    for shard in range(2):
        path = tmp_path / "shards" / f"train-{shard}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(packed({name: name.encode() for name in SHARED[shard::2]}) + END)
    table = [f"folders/{name},{name[0]}\n" for name in SHARED[::-1]]
    (tmp_path / "x.csv").write_text("path,label\n" + "".join(table))
    for layout in ("split", "x.tar", "shards"):
        for labels in (True, False):
            assert share(tmp_path / layout, "val", labels) == want
            assert share(tmp_path / layout, "train", labels) == [n for n in ORDERED if n not in want]
    (tmp_path / "list.txt").write_text("".join(f"folders/{name}\n" for name in SHARED))
    prefixed = [f"folders/{name}" for name in want]
    assert share(tmp_path / "x.csv", "val") == share(tmp_path / "x.csv", "val", False) == prefixed
    assert sorted(share(tmp_path / "list.txt", "val", False)) == sorted(prefixed)
    assert len(share(tmp_path / "list.txt", "train", False)) == len(SHARED) - len(want)


ORDERED = sorted(SHARED, key=lambda name: (name[0], os.path.dirname(name), name))


def test_a_share_has_the_right_images_labels_and_summary(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(packed({"loose.jpg": b"x"} | {name: name.encode() for name in SHARED}) + END)
    train, val = (build_index(DataPath(str(path), val_share=0.25), split) for split in ("train", "val"))
    assert train.classes == val.classes == ["a", "b", "c", "d"]
    check_classes(train, val)
    found = images(train) | images(val)
    assert found == {name: name.encode() for name in SHARED} and len(train) + len(val) == len(SHARED)
    for index in (train, val):
        assert [index.classes[label] for label in index.labels] == [n[0] for n in names_of(index)]
        assert "11 images held out for validation, 25% of each class" in index.summary()
    assert np.bincount(val.labels, minlength=4).tolist() == [5, 5, 0, 1]
    assert np.bincount(train.labels, minlength=4).tolist() == [15, 16, 1, 1]
    assert train.ignored == 1 and val.ignored == 0
    assert len({index.digest() for index in (train, val, build_index(path))}) == 3


def test_accents_do_not_change_a_share(tmp_path):
    names = [f"{c}/{i}.jpg" for c in ("Käfer", "Biene") for i in range(30)]
    for form in ("NFC", "NFD"):
        place(tmp_path / form, *(unicodedata.normalize(form, name) for name in names))
    found = [[unicodedata.normalize("NFC", n) for n in share(tmp_path / f, "val")] for f in ("NFC", "NFD")]
    assert found[0] == found[1] and len(found[0]) == 6


@pytest.mark.parametrize("there", ["val/a/1.jpg", "val.tar", "val-0.tar", "val.csv"])
def test_a_share_beside_validation_images_is_refused(tmp_path, there):
    place(tmp_path, "train/a/1.jpg", "train/a/2.jpg", there)
    for split in ("train", "val"):
        with pytest.raises(
            ValueError, match=r"there are validation images already: .*/val.*\. Leave `val_share`"
        ):
            share(tmp_path, split)
    # Test images stay apart.
    os.rename(tmp_path / there.split("/")[0], tmp_path / there.split("/")[0].replace("val", "test"))
    assert len(share(tmp_path, "train")) == len(share(tmp_path, "val")) == 1


def test_a_share_of_single_images_is_refused(tmp_path):
    place(tmp_path, "a/1.jpg", "b/1.jpg")
    with pytest.raises(
        ValueError, match=r"`val_share` 0.1 holds out no image of .*: no class has two images"
    ):
        share(tmp_path, "val")
    with pytest.raises(NoSplit, match=r"hold out training images: `val_share` 0.1"):
        build_index(tmp_path, "val")


# --- tables ---

ROWS = [("img/3.jpg", "zebra"), ("img/1.jpg", "ant"), ("img/2.jpg", "zebra"), ("img/0.jpg", "ant")]


@pytest.mark.parametrize(
    "columns", ["path,label", "filename,label", "image,class", "Image Name,Class-Name", "label,file"]
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [",.csv", ";.csv", "\t.tsv"])
def test_tables(tmp_path, columns, ending, mark, suffix):
    place(tmp_path, *(path for path, _ in ROWS))
    separator, suffix = suffix[0], suffix[1:]
    rows = [columns.split(","), *(pair[::-1] if columns.startswith("label") else pair for pair in ROWS)]
    text = ending.join(separator.join(row) for row in rows) + ending * 2
    path = tmp_path / f"x{suffix}"
    path.write_bytes(mark + text.encode())
    index = build_index(path)
    assert images(index) == {f"img/{i}.jpg": f"img/{i}.jpg".encode() for i in range(4)}
    assert names_of(index) == ["img/0.jpg", "img/1.jpg", "img/2.jpg", "img/3.jpg"]
    assert index.classes == ["ant", "zebra"] and index.labels.tolist() == [0, 0, 1, 1]
    taken = sorted(columns.split(","), key=lambda name: "l" in name.lower() and "file" not in name)
    assert index.summary() == (
        f"{path}: 4 images, 2 classes (table, paths from `{taken[0]}`, classes from `{taken[1]}`)"
    )
    assert names_of(build_index(path, labels=False)) == names_of(index)


def mini_imagenet(tmp_path):
    """As it is usually found: three tables beside images/."""
    for number, split in enumerate(("train", "val", "test")):
        names = [f"n{c}{number}{i}.jpg" for c in "ba" for i in range(2)]
        place(tmp_path / "images", *names)
        (tmp_path / f"{split}.csv").write_text("filename,label\n" + "".join(f"{n},{n[:2]}\n" for n in names))
    return tmp_path


def test_tables_of_splits_beside_images(tmp_path):
    mini_imagenet(tmp_path)
    for split, name, number in (("train", "val", 0), ("val", "val", 1), ("val", "test", 2)):
        index = build_index(DataPath(f"{tmp_path}/", name), split)
        assert names_of(index) == [f"n{c}{number}{i}.jpg" for c in "ab" for i in range(2)]
        assert index.classes == ["na", "nb"] and index.read(0) == f"na{number}0.jpg".encode()
    assert len(build_index(tmp_path, labels=False)) == 4
    with pytest.raises(NoSplit, match=f"Give {tmp_path}, which holds train and val"):
        build_index(tmp_path / "train.csv", "val")
    os.remove(tmp_path / "val.csv")
    with pytest.raises(NoSplit, match="Give `val_split` test, or rename the files"):
        build_index(tmp_path, "val")


def test_a_table_labels_the_loose_images_of_a_split(tmp_path):
    place(tmp_path, "train/1.jpg", "train/2.jpg", "test/1.jpg", "test/2.jpg")
    (tmp_path / "train.csv").write_text("image_id,label\n2.jpg,a\n1.jpg,b\n")
    index = build_index(tmp_path)
    assert images(index) == {"2.jpg": b"train/2.jpg", "1.jpg": b"train/1.jpg"} and index.classes == ["a", "b"]
    assert names_of(build_index(tmp_path, labels=False)) == ["1.jpg", "2.jpg"]


def test_a_table_may_have_a_column_of_splits(tmp_path):
    place(tmp_path, *(path for path, _ in ROWS))
    rows = [
        f"{path},{owner},{split}\n"
        for (path, owner), split in zip(ROWS, ("train", "train", "valid", "valid"))
    ]
    path = tmp_path / "x.csv"
    path.write_text("path,label,split\n" + "".join(rows))
    assert names_of(build_index(path)) == ["img/1.jpg", "img/3.jpg"]
    assert names_of(build_index(DataPath(str(path), "valid"), "val")) == ["img/0.jpg", "img/2.jpg"]
    with pytest.raises(
        NoSplit, match=r"has no val images. Its splits are train, valid: give `val_split` valid\.$"
    ):
        build_index(path, "val")
    with pytest.raises(ValueError, match=r"`val_share` 0.5 .*has valid images already"):
        build_index(DataPath(str(path), "valid", 0.5))


def test_a_table_that_lists_no_images_is_left_alone_without_labels(tmp_path):
    place(tmp_path, "images/1.jpg")
    for text in (b"box,width\n1,2\n", "path,label\n".encode("utf-16")):
        (tmp_path / "train.csv").write_bytes(text)
        assert names_of(build_index(tmp_path, labels=False)) == ["images/1.jpg"]
    # A list in one column, whatever its name ends in, is a plain list.
    (tmp_path / "list.csv").write_text("images/1.jpg\r\n")
    assert names_of(build_index(tmp_path / "list.csv", labels=False)) == ["images/1.jpg"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,label\nno.jpg,a\n", "line 2 of .*x.csv names no.jpg, which does not exist"),
        ("path,label\n", "lists no images"),
        (
            "a/1.jpg,cat\n",
            "line 1 of .*x.csv names no column of paths: found a/1.jpg, cat. A table starts with",
        ),
        ("what,label\na/1.jpg,cat\n", "line 1 of .*x.csv names no column of paths: found what, label"),
        ("path,what\na/1.jpg,cat\n", "has no column of labels .paths from `path`., which a classifier needs"),
        ("path,label\na/1.jpg,cat\n\nb/1.jpg,\n", "line 4 of .*x.csv has an empty label: fill it"),
        ("path,label\na/1.jpg,cat\n,cat\n", "line 3 of .*x.csv has no path"),
        ("path,label\na/1.jpg,cat\nb/1.jpg,b\n./a/1.jpg,dog\n", "line 4 .*lists a/1.jpg again, after line 2"),
        ("path,label\na/1.jpg,cat,x\n", "line 2 of .*x.csv has 3 values, and the header has 2: "),
        ('path,label\na/1.jpg,"cat\n', "line 2 of .*x.csv cannot be read: "),
        ("path,label\na/1.jpg,c\0t\n", "line 2 is binary"),
        ("", "found nothing"),
    ],
)
def test_bad_tables_name_the_line(tmp_path, text, message):
    place(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        build_index(tmp_path / "x.csv")
    assert "\n" not in str(error.value)


# --- the class is in several folders ---

PLACES = ["a/airfield/1.jpg", "a/alley/1.jpg", "b/bank/deep/1.jpg", "b/bank/2.jpg"]


def layouts_of(tmp_path, names):
    place(tmp_path / "folder", *names)
    (tmp_path / "x.tar").write_bytes(packed({name: b"" for name in names}) + END)
    return tmp_path / "folder", tmp_path / "x.tar"


def test_classes_two_folders_deep_are_asked_about(tmp_path):
    for path in layouts_of(tmp_path, PLACES):
        with pytest.raises(ValueError) as error:
            build_index(path)
        assert re.search(
            "as a/airfield/1.jpg: give `class_depth` 2 for 3 classes such as a/airfield, or "
            "`class_depth` 1 for 2 classes such as a$",
            str(error.value),
        )
        index = build_index(DataPath(str(path), class_depth=2))
        assert index.classes == ["a/airfield", "a/alley", "b/bank"] and index.labels.tolist() == [0, 1, 2, 2]
        assert names_of(index) == ["a/airfield/1.jpg", "a/alley/1.jpg", "b/bank/2.jpg", "b/bank/deep/1.jpg"]
        index = build_index(DataPath(str(path), class_depth=1))
        assert index.classes == ["a", "b"] and index.labels.tolist() == [0, 0, 1, 1]
        assert build_index(path, labels=False).labels.tolist() == [-1] * 4
        with pytest.raises(ValueError, match="`class_depth` 9 takes the class from 9 folders, and no image"):
            build_index(DataPath(str(path), class_depth=9))


@pytest.mark.parametrize(
    "names",
    [
        ["n01/1.jpg", "n02/x/1.jpg", "n02/y/1.jpg"],
        ["n01/images/1.jpg", "n02/images/1.jpg"],
        ["n01/n01_images/1.jpg", "n02/n02_images/1.jpg"],
        ["bus/day/1.jpg", "bus/night/1.jpg", "car/day/1.jpg", "car/night/1.jpg"],
    ],
)
def test_folders_in_class_folders_are_no_classes(tmp_path, names):
    for path in layouts_of(tmp_path, names):
        index = build_index(path)
        assert index.classes == sorted({name.split("/")[0] for name in names}) and names_of(index) == names


def test_deep_classes_are_sorted_and_checked_as_others(tmp_path):
    names = ["a/b/1.jpg", "a/b-c/1.jpg", "a/b/x/1.jpg", "loose/1.jpg"]
    for path in layouts_of(tmp_path, names):
        index = build_index(DataPath(str(path), class_depth=2))
        assert names_of(index) == ["a/b/1.jpg", "a/b/x/1.jpg", "a/b-c/1.jpg"] and index.ignored == 1
        assert index.classes == ["a/b", "a/b-c"] and index.labels.tolist() == [0, 0, 1]
    (tmp_path / "folder" / "a" / "none").mkdir()
    with pytest.raises(ValueError, match=r"class folders without images in .*: a/none"):
        build_index(DataPath(str(tmp_path / "folder"), class_depth=2))


# --- two forms of the same name ---


def test_the_forms_of_accents_make_no_other_classes(tmp_path):
    """macOS's archives hold decomposed names; in bytes they sort in another place, too."""
    names = ["caf\N{LATIN SMALL LETTER E WITH ACUTE}/1.jpg", "cafz/1.jpg", "cafe/1.jpg"]
    place(tmp_path, *(f"train/{unicodedata.normalize('NFD', name)}" for name in names))
    place(tmp_path, *(f"val/{name}" for name in names))
    train, val = (build_index(tmp_path, split) for split in ("train", "val"))
    check_classes(train, val)
    assert train.classes == ["cafe", "cafz", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]
    for index in (train, val):
        assert index.labels.tolist() == [0, 1, 2]
        assert [unicodedata.normalize("NFC", n) for n in names_of(index)] == [
            f"{c}/1.jpg" for c in val.classes
        ]
        assert len(images(index)) == 3, "files are found by the names that they have"
    (tmp_path / "classes.txt").write_text(unicodedata.normalize("NFD", "\n".join(train.classes)))
    assert class_names(tmp_path / "classes.txt") == train.classes
    stored = [unicodedata.normalize("NFD", name) for name in train.classes]
    assert stored != train.classes and validate.class_names("x.pth", stored) == train.classes


def test_class_folders_that_differ_in_form_only_are_an_error(tmp_path):
    names = [
        unicodedata.normalize(form, "K\N{LATIN SMALL LETTER A WITH DIAERESIS}fer") for form in ("NFC", "NFD")
    ]
    for path in layouts_of(tmp_path, [f"{name}/x/{i}.jpg" for i, name in enumerate(names)] + ["a/1.jpg"]):
        with pytest.raises(
            ValueError, match="holds two class folders K\N{LATIN SMALL LETTER A WITH DIAERESIS}fer, whose"
        ):
            build_index(path)
        assert len(build_index(path, labels=False)) == 3


# --- what must not change ---


def test_the_usual_layouts_keep_their_digests(tmp_path):
    """A run that continues compares the digest of its images with the one that it has stored."""
    names = ["a/0.jpg", "a/x/1.jpg", "b/2.jpg", "a-b/3.jpg", "loose.png"]
    place(tmp_path, *(f"train/{name}" for name in names))
    with_labels = "73318ef0fe866bfadf4eecee962fb1cb049dbe2ecb5afde3aa1a7e51d22f3a6f"
    without = "3a8af2c9002cafdce35af8f1175ed084f9b14861723061401db5d0256eb2710c"
    (tmp_path / "x.tar").write_bytes(packed({name: b"" for name in names}) + END)
    for path in (tmp_path, tmp_path / "train", tmp_path / "x.tar"):
        assert build_index(path).digest() == with_labels
        assert build_index(path, labels=False).digest() == without


# --- ways to write a path ---


def test_a_path_may_start_with_a_tilde_and_end_with_slashes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    old(tmp_path / "train.tar")
    tree(tmp_path / "set")
    for path in ("~/train.tar", "~/train.tar/", "~", "~//", DataPath("~/")):
        assert images(build_index(path)) == FILES
    for path in ("~/set", "~/set//", "~/set/train/"):
        assert names_of(build_index(path)) == ["a/0.jpg", "b/1.jpg"]
