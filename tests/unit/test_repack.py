"""Repacking: lossless or smaller shards, and calls that continue stopped ones. Images are generated."""

import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_native import assert_same_pixels, jpeg, picture

from util.data import __main__ as commands
from util.data import formats, native
from util.data.datasets import ImageDataset, build_dataset
from util.data.formats import ReadSettings, decode
from util.data.native import bindings
from util.data.repacking import repack
from util.data.sources.layouts import build_index
from util.data.transforms import pretrain_transform

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture(autouse=True)
def impatient(request, monkeypatch):
    """Do not wait until listings can be cached, except where a test looks for one."""
    if "workers" not in request.fixturenames:
        monkeypatch.setattr(repack, "SETTLE_SECONDS", 0.0)


def source(tmp_path):
    """Two classes of JPEGs of several kinds and of other files, one of them unreadable."""
    png = io.BytesIO()
    npy = io.BytesIO()
    picture((70, 50)).save(png, "PNG")
    np.save(npy, np.zeros((4, 5, 3), np.uint8))
    files = {
        "a/0.jpg": jpeg(picture((120, 80))),
        "a/1.JPEG": jpeg(picture((64, 90), "L")),
        "a/2.png": png.getvalue(),
        "a/3.jpg": jpeg(picture((90, 60)), progressive=True),
        "b/0.jpg": jpeg(picture((40, 30), "CMYK")),
        "b/1.jpg": b"junk",
        "b/2.jpg": jpeg(picture((200, 100)), subsampling="4:4:4"),
        "b/x/3.npy": npy.getvalue(),
        "b/x/4.jpg": jpeg(picture((33, 47)), quality=30),
    }
    for name, data in files.items():
        path = tmp_path / "source" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(tmp_path / "source"), files


def members(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    return found


def marker(data):
    """The restart interval in a JPEG's header, or 0."""
    at = data.find(b"\xff\xdd\x00\x04")
    if at < 0:
        return 0
    return int.from_bytes(data[at + 4 : at + 6])


def npy(shape, dtype=np.uint8):
    file = io.BytesIO()
    np.save(file, np.ones(shape, dtype))
    return file.getvalue()


@pytest.mark.parametrize(
    "data, outcome",
    [
        (npy((4, 5, 3)), repack.COPIED),
        (npy((4, 5)), repack.COPIED),
        (npy((4, 5, 12)), repack.COPIED),
        (npy((4, 5, 12))[:-1], repack.UNREADABLE),
        (npy((4, 5))[:40], repack.UNREADABLE),
        (b"\x93NUMPY", repack.UNREADABLE),
        (b"\x93NUMPY\x09\x00junk", repack.UNREADABLE),
        (npy((5,)), repack.UNREADABLE),
        (npy((4, 5, 3), np.complex128), repack.UNREADABLE),
        (npy((4, 0, 3)), repack.UNREADABLE),
        (npy((40, 50, 3)), repack.UNREADABLE),  # more pixels than allowed
    ],
)
@pytest.mark.parametrize("long_side", [None, 2])
def test_arrays_are_copied_and_damaged_ones_are_counted(data, outcome, long_side):
    assert repack.convert(data, long_side, max_pixels=1000) == (data, outcome)


def test_files_of_any_other_format_are_tried(monkeypatch):
    def decode_raw(data, read):
        return torch.frombuffer(bytearray(data[4:]), dtype=torch.uint8).view(read.in_chans or 3, 2, 2)

    def is_raw(data):
        return data[:4] == b"RAW!"

    def describe_raw(data, read):
        return formats.Facts(torch.uint8, 3)

    raw = formats.Format((".raw",), is_raw, decode_raw, describe_raw, is_raw, read_by_pil=False)
    monkeypatch.setattr(formats, "FORMATS", (raw, *formats.FORMATS))
    assert repack.convert(b"RAW!" + bytes(12))[1] == repack.COPIED
    assert repack.convert(b"RAW!" + bytes(11))[1] == repack.UNREADABLE


def test_the_report_names_a_damaged_array(tmp_path, capsys):
    path, _ = source(tmp_path)
    (tmp_path / "source" / "train" / "b" / "bad.npy").write_bytes(npy((4, 5, 3))[:-1])
    counts = repack.repack(path, str(tmp_path / "target"))
    assert counts == {repack.MARKED: 5, repack.COPIED: 3, repack.UNREADABLE: 2}
    assert "unreadable: b/bad.npy\n" in capsys.readouterr().out


MARKED = ("a/0.jpg", "a/1.JPEG", "a/3.jpg", "b/2.jpg", "b/x/4.jpg")
COPIED = ("a/2.png", "b/0.jpg", "b/1.jpg", "b/x/3.npy")


@pytest.mark.parametrize("workers", [0, 2])
def test_lossless_shards_hold_the_same_images(tmp_path, workers, capsys):
    path, files = source(tmp_path)
    target = str(tmp_path / "target")
    counts = repack.repack(path, target, num_workers=workers, shard_images=4)
    assert counts == {repack.MARKED: 5, repack.COPIED: 3, repack.UNREADABLE: 1}
    assert "unreadable: b/1.jpg" in capsys.readouterr().out
    shards = sorted(p.name for p in Path(target).glob("train-*"))
    assert shards == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert (tmp_path / "target" / "train.index.npz").exists(), "the listing is cached"
    made = members(target)
    assert list(made) == [build_index(path).name(i) for i in range(len(files))], "in the order of the source"
    assert {name: made[name] for name in COPIED} == {name: files[name] for name in COPIED}
    for name in MARKED:
        check_marked(name, made[name], files[name])


def check_marked(name, made, original):
    """A file has restart markers at a divisor of a row's MCUs, and nothing else has changed."""
    assert made != original and torch.equal(decode(made), decode(original))
    side = 16  # of an MCU, with chroma at half the resolution
    if name in ("a/1.JPEG", "b/2.jpg"):
        side = 8
    columns = -(-decode(made).shape[2] // side)
    assert marker(made) > 0 and columns % marker(made) == 0
    assert native.jpeg_size(made), "a progressive file has become a baseline one"


def test_lossless_shards_give_the_same_samples(tmp_path):
    path, _ = source(tmp_path)
    target = str(tmp_path / "target")
    repack.repack(path, target, shard_images=4)
    transform = pretrain_transform((24, 32))
    ours, theirs = (build_dataset(p, "train", transform, seed=5) for p in (target, path))
    assert ours.index.classes == theirs.index.classes == ["a", "b"]
    for i in range(len(ours)):
        made = ours[3, i]
        original = theirs[3, i]
        assert_same_pixels(made.pop("image"), original.pop("image"))
        assert made == original


def test_bounded_shards(tmp_path, capsys):
    path, files = source(tmp_path)
    target = str(tmp_path / "target")
    counts = repack.repack(path, target, long_side=64, quality=80)
    made = members(target)
    assert set(made) == {n + ".jpg" * (n == "a/2.png") for n in files}
    for name, size in {
        "a/0.jpg": (43, 64),
        "a/1.JPEG": (64, 46),
        "a/2.png.jpg": (46, 64),
        "a/3.jpg": (43, 64),
        "b/2.jpg": (32, 64),
        "b/0.jpg": (30, 40),
        "b/x/4.jpg": (47, 33),
    }.items():
        assert native.jpeg_size(made[name]) == size and marker(made[name]), name
    # Small already, and smaller at its own quality than at 80.
    assert torch.equal(decode(made["b/x/4.jpg"]), decode(files["b/x/4.jpg"]))
    assert counts == {repack.ENCODED: 6, repack.MARKED: 1, repack.COPIED: 1, repack.UNREADABLE: 1}
    expected = np.asarray(
        Image.open(io.BytesIO(files["a/2.png"])).resize((64, 46), Image.Resampling.LANCZOS)
    ).astype(int)
    error = np.abs(np.asarray(Image.open(io.BytesIO(made["a/2.png.jpg"]))) - expected)
    assert error.mean() < 12  # at quality 80, of a noisy picture; another picture differs by 60
    assert build_index(target).labels.tolist() == [0] * 4 + [1] * 5


def test_a_stopped_call_is_continued(tmp_path, monkeypatch, capsys):
    path, files = source(tmp_path)
    target = str(tmp_path / "target")
    done = []
    convert = repack.convert

    def dying(data, *args):
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(data)
        return convert(data, *args)

    with monkeypatch.context() as patch:
        patch.setattr(repack, "convert", dying)
        with pytest.raises(KeyboardInterrupt):
            repack.repack(path, target, shard_images=4)
    # Half a data set must not look like a whole one.
    with pytest.raises(ValueError, match=r"no images|no train"):
        build_index(target)
    for change in (
        dict(shard_images=5),
        dict(shard_images=4, long_side=64),
        dict(shard_images=4, long_side=64, quality=3),
    ):
        with pytest.raises(
            ValueError, match=r"shards of another call .*shard_images 4 -> 5|long_side None -> 64"
        ):
            repack.repack(path, target, **change)
    counts = repack.repack(path, target, shard_images=4)
    assert sum(counts.values()) == 5  # the first shard was kept
    assert list(members(target)) == [build_index(path).name(i) for i in range(len(files))]
    assert repack.repack(path, target, shard_images=4) == {}
    assert not list((tmp_path / "target").rglob("*.partial-*"))


def test_wrong_calls_are_named(tmp_path, monkeypatch):
    path, _ = source(tmp_path)
    with pytest.raises(ValueError, match="already holds train: choose another"):
        repack.repack(path, path)
    for kwargs in (dict(quality=0), dict(quality=101), dict(long_side=0)):
        with pytest.raises(ValueError, match=r"must be (in 1..100|positive), found"):
            repack.repack(path, str(tmp_path / "target"), **kwargs)
    (tmp_path / "list.txt").write_text("source/../source/train/a/0.jpg\n")
    with pytest.raises(ValueError, match="lies outside"):
        repack.repack(str(tmp_path / "list.txt"), str(tmp_path / "target"))
    monkeypatch.setattr(bindings, "LIBRARY", tmp_path / "absent.so")
    with pytest.raises(ValueError, match=r"needs the native library: .python -m util.data.native build"):
        repack.repack(path, str(tmp_path / "other"))


def test_command_line(tmp_path, capsys):
    path, _ = source(tmp_path)
    assert (
        commands.main(["repack", path, str(tmp_path / "target"), "--workers", "0", "--long_side", "50"]) == 0
    )
    assert "9 images, no labels (1 tar shards)" in capsys.readouterr().out
    file = os.path.join(path, "train", "a", "0.jpg")
    for wrong in (
        ["repack", path],
        ["stats", path, path],
        ["repack", path, file],
        ["repack", path, str(tmp_path / "target"), "--workers", "0"],
    ):
        assert commands.main(wrong) == 2
    errors = capsys.readouterr().err
    assert "long_side 50 -> None" in errors and f"Not a directory: '{file}" in errors


def test_files_that_cannot_be_opened_are_named_before_any_shard(tmp_path):
    path, _ = source(tmp_path)
    folder = tmp_path / "folder" / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(jpeg(picture()))
    (folder / "2.jpg").symlink_to("gone.jpg")
    with pytest.raises(ValueError, match=r"1 of 2 files cannot be opened: .*a/2.jpg: repair or remove them"):
        repack.repack(str(tmp_path / "folder"), str(tmp_path / "target"))
    assert not (tmp_path / "target").exists()
    (folder / "2.jpg").unlink()
    assert sum(repack.repack(str(tmp_path / "folder"), str(tmp_path / "target")).values()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_one_line(tmp_path, monkeypatch, capsys, workers):
    path, _ = source(tmp_path)
    monkeypatch.setattr(repack, "_check_files", lambda index: None)
    (tmp_path / "source" / "train" / "b" / "0.jpg").unlink()
    (tmp_path / "source" / "train" / "b" / "0.jpg").symlink_to("gone.jpg")
    assert commands.main(["repack", path, str(tmp_path / "target"), "--workers", str(workers)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [
        line for line in lines if line.startswith("error: b/0.jpg cannot be read: [Errno 2] No such file")
    ]
    assert "Traceback" not in "".join(line for line in lines if "MAE_PL_TRACEBACK" not in line)


def test_a_rewritten_file_with_other_pixels_is_not_used(monkeypatch):
    data = jpeg(picture(seed=1))
    other = jpeg(picture(seed=2))
    monkeypatch.setattr(native, "add_restart_markers", lambda _: other)
    assert repack.convert(data) == (data, repack.COPIED)


def test_shards_without_labels(tmp_path):
    (tmp_path / "flat").mkdir()
    for k in range(3):
        (tmp_path / "flat" / f"{k}.jpg").write_bytes(jpeg(picture(seed=k)))
    repack.repack(str(tmp_path / "flat"), str(tmp_path / "target"))
    made = ImageDataset(build_index(tmp_path / "target", labels=False), pretrain_transform(8))
    assert [made.index.name(i) for i in range(3)] == ["0.jpg", "1.jpg", "2.jpg"] and made[1]["bad"] == []


def test_what_a_killed_call_leaves_is_removed(tmp_path, monkeypatch):
    path, files = source(tmp_path)
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        # A killed process cannot tidy up.
        patch.setattr(os, "remove", lambda path: None)
        patch.setattr(repack, "convert", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            repack.repack(path, str(target), shard_images=4)
    assert len(list(target.rglob("*.partial-*"))) == 1
    repack.repack(path, str(target), shard_images=4)
    assert list(members(target)) == [build_index(path).name(i) for i in range(len(files))]
    assert not list(target.rglob("*.partial-*"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda note: note.write_bytes(b""), "settings.json is damaged, it is not JSON: it is empty"),
        (lambda note: note.write_text("[]"), "settings.json holds a JSON list where a dict is expected"),
        (lambda note: note.write_bytes(b"\xff{"), "settings.json is damaged, it is not JSON"),
        (lambda note: note.unlink(), "holds shards without their settings.json: delete that folder"),
    ],
)
def test_a_damaged_note_is_named(tmp_path, damage, message):
    path, _ = source(tmp_path)
    folder = tmp_path / "target" / ".repack-train"
    folder.mkdir(parents=True)
    (folder / "train-00000.tar").write_bytes(b"of other settings")
    (folder / "settings.json").write_text("{}")
    damage(folder / "settings.json")
    with pytest.raises(ValueError, match=re.escape(str(folder)) + ".*" + message):
        repack.repack(path, str(tmp_path / "target"))
    assert (folder / "train-00000.tar").read_bytes() == b"of other settings"


def test_repacking_a_tar_that_is_replaced_meanwhile_is_an_error(tmp_path, monkeypatch, capsys):
    path, _ = source(tmp_path)
    repack.repack(path, str(tmp_path / "first"))
    tar = tmp_path / "first" / "train-00000.tar"
    other = tar.read_bytes()[512:]
    claim = repack._claim
    monkeypatch.setattr(repack, "_claim", lambda *args: tar.write_bytes(other) and claim(*args))
    second = ["repack", str(tmp_path / "first"), str(tmp_path / "second"), "--workers", "0"]
    assert commands.main(second) == 2
    assert "train-00000.tar was replaced or changed since it was listed" in capsys.readouterr().err
    assert not list((tmp_path / "second").rglob("*.tar*"))


# --- images of more than 8 bits and of many bands ---


def drawn(shape, dtype, seed=0):
    """Values over the whole range of a type, smooth enough to be shrunk."""
    y, x = np.mgrid[: shape[0], : shape[1]] / 10
    wave = (np.sin(x + seed)[..., None] * np.cos(y)[..., None] * np.ones(shape[2:] or 1)).reshape(shape)
    if np.dtype(dtype).kind == "f":
        return (wave * 1e-3).astype(dtype)
    limits = np.iinfo(dtype)
    return (limits.min + (wave + 1) / 2 * (limits.max - limits.min)).astype(dtype)


def saved(array, kind, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(*unnamed, **arrays):
    file = io.BytesIO()
    np.savez_compressed(file, *unnamed, **arrays)
    return file.getvalue()


GREY = (70, 90)
CUBE = (60, 80, 13)
SIGNED = {339: 2}  # the sample format of a TIFF
# File -> content, channels to read it with, and whether it becomes an array.
DEEP = {
    "png16.png": (saved(drawn(GREY, np.uint16), "PNG"), (1, 3), True),
    "tiff16.tif": (saved(drawn(GREY, np.uint16), "TIFF", compression="tiff_lzw"), (1, 3), True),
    "signed.tif": (saved(drawn(GREY, np.int16).view(np.uint16), "TIFF", tiffinfo=SIGNED), (1, 3), True),
    "float.tif": (saved(drawn(GREY, np.float32), "TIFF", compression="tiff_deflate"), (1, 3), True),
    "square.tif": (saved(drawn((3, 3), np.uint16), "TIFF"), (1, 3), True),
    "without suffix": (saved(drawn(GREY, np.uint16), "PNG"), (1, 3), True),
    "cube.npz": (npz(image=drawn(CUBE, np.uint16)), (13,), True),
    "floats.npz": (npz(drawn(CUBE, np.float32).transpose(2, 0, 1)), (13,), True),
    "bytes.npz": (npz(drawn((50, 40, 3), np.uint8)), (3,), True),
    "two.npz": (npz(image=drawn(CUBE, np.int16), mask=drawn(GREY, np.uint8)), (13,), False),
    "cube.npy": (npy(drawn(CUBE, np.uint16)), (13,), False),
    "signed.npy": (npy(drawn(CUBE, np.int16).transpose(2, 0, 1)), (13,), False),
    "floats.npy": (npy(np.asfortranarray(drawn(CUBE, ">f4"))), (13,), False),
    "grey.npy": (npy(drawn(GREY, np.uint16)), (1, 3), False),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_and_many_bands_give_the_same_samples(tmp_path, name):
    data, channels, becomes_array = DEEP[name]
    path = tmp_path / "source" / "train" / "a" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    target = str(tmp_path / "target")
    outcome = repack.ARRAY if becomes_array else repack.COPIED
    assert repack.repack(str(tmp_path / "source"), target) == {outcome: 1}
    made = members(target)
    assert list(made) == [f"a/{name}" + ".npy" * becomes_array]
    if becomes_array:
        # The type of the file, without compression.
        assert (
            np.load(io.BytesIO(made[f"a/{name}.npy"])).dtype
            == decode(data, ReadSettings(channels[0])).numpy().dtype
        )
    else:
        assert made[f"a/{name}"] == data
    for number in channels:
        transform = pretrain_transform((24, 32))
        read = ReadSettings(number)
        ours, theirs = (
            build_dataset(p, "train", transform, read=read, seed=5)
            for p in (target, str(tmp_path / "source"))
        )
        assert ours.depth == theirs.depth
        assert torch.equal(ours.decoded(0), theirs.decoded(0))
        for epoch in range(3):
            sample, want = ours[epoch, 0], theirs[epoch, 0]
            assert sample["image"].dtype == want["image"].dtype == ours.depth and sample["bad"] == []
            assert torch.equal(sample["image"], want["image"])


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("form", ["tif", "npy", "npz", "first"])
def test_deep_images_are_shrunk_in_their_depth(dtype, form):
    array = drawn(GREY if form == "tif" else CUBE, dtype)
    pixels = array.reshape(*array.shape[:2], -1).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)
    if form == "tif":
        options = dict(tiffinfo=SIGNED) if dtype == np.int16 else {}
        stored = array.view(np.uint16) if dtype == np.int16 else array
        data = saved(stored, "TIFF", **options)
    else:
        data = {"npy": npy(array), "npz": npz(array), "first": npy(pixels)}[form]
    made, outcome = repack.convert(data, 40)
    assert outcome == repack.ARRAY
    found = decode(made, ReadSettings(len(pixels))).numpy()
    assert found.dtype == dtype and found.shape == (
        len(pixels),
        round(array.shape[0] * 40 / array.shape[1]),
        40,
    )
    for band, want in zip(found, pixels):
        exact = Image.fromarray(want.astype(np.float32)).resize((40, len(band)), Image.Resampling.LANCZOS)
        exact = np.asarray(exact, np.float64)
        if dtype != np.float32:
            exact = exact.round().clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
        assert (band == exact).all()
        assert len(np.unique(band)) > 500, "it was not reduced to 8 bits"
    # What is small enough keeps its values.
    kept, outcome = repack.convert(data, 100)
    assert torch.equal(decode(kept, ReadSettings(len(pixels))), decode(data, ReadSettings(len(pixels))))
    assert outcome == (repack.COPIED if form in ("npy", "first") else repack.ARRAY)


def pages(*arrays):
    file = io.BytesIO()
    first, *others = (Image.fromarray(array) for array in arrays)
    first.save(file, "TIFF", save_all=True, append_images=others)
    return file.getvalue()


def turned(array):
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(array, "PNG", exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        pages(drawn(GREY, np.uint16), drawn(GREY, np.uint16, seed=1)),
        turned(drawn(GREY, np.uint16)),
        npy(drawn((50, 40, 3), np.uint8)),
        npy(drawn((30, 90, 40), np.uint16)),
    ],
    ids=["pages", "turned", "8 bits", "unclear bands"],
)
def test_what_an_array_would_not_keep_is_copied(data):
    for long_side in (None, 20):
        assert repack.convert(data, long_side) == (data, repack.COPIED)


@pytest.mark.parametrize(
    "data",
    [
        npy(drawn(GREY, np.uint16))[:-1],
        npy(np.zeros((4, 5, 3), complex)),
        npy(np.full(GREY, np.nan, np.float32)),
        npy(np.zeros(7, np.uint8)),
        npz(np.zeros(7)),
        npz(drawn(CUBE, np.uint16))[:-30],
        npz(first=drawn(GREY, np.uint8), second=drawn(GREY, np.uint8)),
        saved(drawn(GREY, np.uint16), "PNG")[:200],
        saved(drawn(GREY, np.float32), "TIFF")[:-300],
        b"PK\3\4",
    ],
)
def test_unreadable_arrays_are_copied_and_named(data):
    for long_side in (None, 20):
        assert repack.convert(data, long_side) == (data, repack.UNREADABLE)


def test_files_without_suffix_stay_images(tmp_path):
    """Also those whose first bytes are none of an image, among many that are."""
    folder = tmp_path / "source" / "train" / "a"
    folder.mkdir(parents=True)
    for n in range(40):
        (folder / f"{n:02}").write_bytes(jpeg(picture((20, 20), seed=n)))
    (folder / "04").write_bytes(b"text")  # one that is not looked at
    assert repack.repack(str(tmp_path / "source"), str(tmp_path / "target")) == {
        repack.MARKED: 39,
        repack.UNREADABLE: 1,
    }
    names = list(members(tmp_path / "target"))
    assert len(names) == 40 and "a/00" in names and "a/04.jpg" in names
