"""Listings of damaged and hostile tars, folders, lists and caches: right images, or one error with a name."""

import io
import os
import pickle
import random
import re
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.data.datasets import ImageDataset
from util.data.formats import ReadSettings
from util.data.loading.cached_pixels import Reader
from util.data.sources import layouts, listing, listing_cache, tars
from util.data.sources.image_index import ChangedTar
from util.data.sources.layouts import build_index, class_names

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
