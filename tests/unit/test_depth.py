"""Images of more than 8 bits: their values on the way to the model, their range, statistics and pictures.

The reference is in float64 throughout.
"""

import itertools
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import main_pretrain
import tiny  # noqa: F401 (registers mae_test)
import visualize
from models_mae_pl import MODELS
from tools import convert, draw
from tools.inspect import describe
from util.data import __main__ as commands
from util.data import transforms
from util.data.datasets import build_dataset
from util.data.formats import ReadSettings
from util.data.loading.cache import cached
from util.data.loading.loader import eval_loader, train_loader
from util.data.multicrop import MultiCrop
from util.data.pixels import Pixels, split_range
from util.data.seeding import seeded
from util.data.survey import headers
from util.data.survey.ranges import check_same_depth, kept_range, settle_range, with_range, written
from util.data.survey.values import Values
from util.data.timm_datasets import TimmIterableDataset
from util.data.transforms import eval_transform, finetune_transform, pretrain_transform
from util.flags.parser import parse, run
from util.report.panels import Bands
from util.weights import checkpoint
from util.weights.defaults import as_stored

DTYPES = (np.uint8, np.uint16, np.int16, np.float32)
LIMITS = {np.uint8: (0, 255), np.uint16: (0, 65535), np.int16: (-32768, 32767)}
CPU = torch.device("cpu")


def values(dtype, shape=(31, 43, 2), seed=0):
    """Noise over all of a type's values, with large areas at both ends, where bicubic resizing overshoots."""
    draws = np.random.default_rng(seed)
    if dtype == np.float32:
        image = draws.normal(300, 20, shape)
        image[8:20, 10:30] = 1000
    else:
        low, high = LIMITS[dtype]
        image = draws.integers(low, high + 1, shape)
        image[8:20, 10:30] = high
        image[12:16, 15:25] = low
    return image.astype(dtype)


# --- the reference ---


def bicubic(length, first, size, out):
    """Weights (out, length) of the antialiased bicubic filter: `size` positions from `first` become `out`."""
    weights = np.zeros((out, length))
    scale = size / out
    stretch = max(1.0, scale)
    for i, j in itertools.product(range(out), range(size)):
        d = abs((j + 0.5 - (i + 0.5) * scale) / stretch)
        if d < 1:
            weights[i, first + j] = 1.5 * d**3 - 2.5 * d**2 + 1
        elif d < 2:
            weights[i, first + j] = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return weights / weights.sum(1, keepdims=True)


def resized(image, box, size):
    """(H, W, C) -> (C, *size) in float64, rounded and clipped to the type of the image."""
    top, left, height, width = box
    down = bicubic(image.shape[0], top, height, size[0])
    across = bicubic(image.shape[1], left, width, size[1])
    out = np.einsum("hwc,xw->chx", image.astype(np.float64), across)
    if image.dtype == np.uint8:
        out = rounded(out, np.uint8)  # as PIL
    return rounded(np.einsum("yh,chx->cyx", down, out), image.dtype.type)


def rounded(out, dtype):
    if dtype == np.float32:
        return out
    return np.clip(np.round(out), *LIMITS[dtype])


def assert_near(found, expected, dtype, levels=1.0):
    """Integers differ by a level where a value lies in the middle of two; float32 by its precision."""
    assert found.dtype == getattr(torch, np.dtype(dtype).name)
    # torch cannot subtract all types.
    error = np.abs(found.numpy().astype(np.float64) - expected)
    if dtype == np.float32:
        assert error.max() < 1e-5 * np.abs(expected).max()
    else:
        assert error.max() <= levels
        assert error.mean() < 0.15 * levels


def chw(image):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


# --- transforms ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(16, 16), (24, 60)], ids=["smaller", "larger"])
def test_crops_and_flips(dtype, size):
    image = values(dtype)
    transform = pretrain_transform(size, (0.3, 1.0), vflip=0.5)
    seen = set()
    for key in range(24):
        crop = transform.draw(*image.shape[:2], key)
        expected = resized(image, crop.box, size)
        expected = expected[:, :: -1 if crop.flip_y else 1, :: -1 if crop.flip_x else 1]
        assert_near(transform(chw(image), key), expected, dtype, levels=2 if dtype == np.uint8 else 1)
        seen.add((crop.flip_x, crop.flip_y))
    assert len(seen) == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_parts", [False, True])
def test_the_centre_crop(dtype, in_parts, monkeypatch):
    if in_parts:
        monkeypatch.setattr(transforms, "RESIZED_PIXELS", 0)
    image = values(dtype)
    transform = eval_transform(56)
    # The shorter side, 31, becomes 64, and the other one 88.
    whole = resized(image, (0, 0, 31, 43), (64, 88))
    expected = whole[:, 4:60, 16:72]
    assert_near(transform(chw(image)), expected, dtype, levels=2 if dtype == np.uint8 else 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_self_distillation(dtype):
    image = values(dtype, (40, 40, 1))
    crops = MultiCrop(
        (32, 32), (16, 16), 2, (4, 4), global_scale=(0.4, 1), local_scale=(0.1, 0.4), mask_ratios=[(0, 0)]
    )
    crops.views = [view._replace(blur=0.0) for view in crops.views]
    with seeded(3):
        views = crops(chw(image))
    for view, (x, y, width, height, flipped) in zip(
        [*views["image"], *views["local"]], views["boxes"].int().tolist()
    ):
        expected = resized(image, (y, x, height, width), view.shape[-2:])
        assert_near(view, expected[..., :: -1 if flipped else 1], dtype, levels=2 if dtype == np.uint8 else 1)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_blur_keeps_the_depth(dtype):
    crops = MultiCrop(
        (32, 32), (16, 16), 1, (4, 4), global_scale=(0.4, 1), local_scale=(0.1, 0.4), mask_ratios=[(0, 0)]
    )
    with seeded(0):
        views = crops(chw(values(dtype, (40, 40, 3))))
    kind = getattr(torch, np.dtype(dtype).name)
    assert views["image"].dtype == views["local"].dtype == kind
    constant = np.full((40, 40, 3), LIMITS.get(dtype, (0, 4321))[1], dtype)
    with seeded(0):
        views = crops(chw(constant))
    assert (views["image"].double() - float(constant[0, 0, 0])).abs().max() <= 0.01


# --- normalisation ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_normalize_maps_a_range_and_clips(dtype, per_channel):
    low, high, mean, std = ((10.0,), (200.0,), (0.4,), (0.2,))
    if per_channel:
        low, high, mean, std = ((10.0, -5.0), (200.0, 4000.0), (0.4, 0.5), (0.2, 0.1))
    image = chw(values(dtype))
    before = image.clone()
    pixels = Pixels(mean, std, low, high, deep=dtype != np.uint8)
    found = pixels.normalize(image[None])[0]
    assert found.dtype == torch.float32 and torch.equal(image, before), "the images themselves stay"

    def column(numbers):
        return np.asarray(numbers)[:, None, None]

    scaled = (before.numpy().astype(np.float64) - column(low)) / (column(high) - column(low))
    expected = (np.clip(scaled, 0, 1) - column(mean)) / column(std)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5, rtol=0)
    assert (scaled > 1).any() and (dtype == np.float32 or (scaled < 0).any())
    # Pictures: 0 for the low end, 255 for the high one.
    shown = pixels.unnormalize(found)
    assert (np.abs(shown.numpy() - 255 * np.clip(scaled, 0, 1)) <= 0.51).all()


def test_normalize_of_bytes_is_as_before():
    image = chw(values(np.uint8, (20, 20, 3)))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    expected = image.float() * scale.float()[:, None, None] + shift.float()[:, None, None]
    assert torch.equal(Pixels(mean, std).normalize(image), expected)


def test_the_range_that_is_stored():
    assert Pixels((0.5,), (0.5,)).range is None
    assert Pixels((0.5,), (0.5,), (0.0,), (255.0,), deep=True).range == [0, 255], "of float32, say"
    assert Pixels((0.5,), (0.5,), (0.0, 1.0), (9.0,), True).range == [0, 9, 1, 9]


# --- doors ---


def save(path, image):
    if path.suffix == ".png":
        Image.fromarray(image[..., 0]).save(path)
    else:
        np.save(path, image)


def write_set(root, dtype, n=6, suffix=".npy", channels=2):
    for i in range(n):
        path = Path(root, "train", "ab"[i % 2], f"{i}{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, values(dtype, (20 + i, 30, channels), i))
    return Path(root)


def sources(root):
    """The same images as a folder, a tar and a list, in one order."""
    names = sorted(path.relative_to(root / "train") for path in (root / "train").rglob("*.*"))
    with tarfile.open(root / "train.tar", "w") as tar:
        for name in names:
            tar.add(root / "train" / name, name)
    (root / "train" / "list.txt").write_text("\n".join(map(str, names)))
    yield root / "train"
    yield root / "train.tar"
    yield root / "train" / "list.txt"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("evaluation", [False, True])
def test_every_door_gives_the_same_values(tmp_path, dtype, evaluation):
    root = write_set(tmp_path, dtype)
    size = 24
    transform = pretrain_transform(size)
    if evaluation:
        transform = eval_transform(size)

    def batch(source, cache_data):
        options = dict(read=ReadSettings(2), labels=False, seed=5, evaluation=evaluation)
        dataset = build_dataset(source, "train", transform, **options)
        loading = dict(batch_size=6, num_workers=0, pin_memory=False)
        if evaluation:
            loader = eval_loader(dataset, **loading)
        else:
            loader = train_loader(dataset, seed=5, **loading)
        return next(iter(cached(loader, cache_data, CPU)))

    batches = [batch(source, "none") for source in sources(root)] + [batch(root / "train", "memory")]
    for other in batches[1:]:
        assert torch.equal(batches[0]["image"], other["image"]) and torch.equal(
            batches[0]["key"], other["key"]
        )
    on_device = batch(root / "train", "device")
    names = sorted((root / "train").rglob("*.npy"))
    for i, key, image, resampled in zip(
        *(batches[0][name].tolist() for name in ("index", "key")), batches[0]["image"], on_device["image"]
    ):
        original = np.load(names[i])
        window = transform.window(*original.shape[:2], key)
        whole = resized(original, window[:4], window[4:6])
        rows, columns = slice(window.row, window.row + size), slice(window.column, window.column + size)
        expected = whole[:, rows, columns][..., :: -1 if window.flip_x else 1]
        levels = 2 if dtype == np.uint8 else 1
        assert_near(image, expected, dtype, levels)
        assert_near(resampled, expected, dtype, levels)


@pytest.mark.parametrize("value", [60001, 300.125])
def test_a_constant_image_stays_constant_on_the_device(tmp_path, value):
    dtype = np.uint16 if isinstance(value, int) else np.float32
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "a.npy", np.full((50, 50, 1), value, dtype))
    dataset = build_dataset(tmp_path, "train", pretrain_transform(16), read=ReadSettings(1), labels=False)
    loader = train_loader(dataset, batch_size=1, seed=0, num_workers=0, pin_memory=False)
    images = next(iter(cached(loader, "device", CPU)))["image"]
    assert (images.double() - value).abs().max() < 1e-4 * (dtype == np.float32) + 1e-9


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_timms_reader_gives_the_same_values(tmp_path, dtype):
    pytest.importorskip("timm")
    root = write_set(tmp_path, dtype, suffix=".png", channels=1)
    for channels in (1, 3):
        read = ReadSettings(channels)
        ours = build_dataset(root, "train", pretrain_transform(16), read=read, labels=False, seed=1)
        theirs = build_dataset(
            f"torch/image_folder={root}", "train", pretrain_transform(16), read=read, seed=1
        )
        assert ours.depth == theirs.depth == getattr(torch, np.dtype(dtype).name)
        for i in range(6):
            assert torch.equal(ours[0, i]["image"], theirs[0, i]["image"])
            assert torch.equal(ours.decoded(i), theirs.decoded(i))
        if dtype == np.uint16:
            with pytest.raises(ValueError, match=r"image_folder.* are uint16, with values from 0 to 65535"):
                settle_range(theirs, None, scaled=False)
            theirs.transform = SimpleNamespace(only_8_bits="`a`")
            with pytest.raises(ValueError, match="change the colours of 8-bit images"):
                with_range(Pixels((0.5,), (0.5,)), theirs, [0.0, 9.0], scaled=False)


@pytest.mark.parametrize(
    "dtypes, depth, unreadable",
    [
        ((np.uint16, np.uint16, np.uint8), "uint16", []),
        ((np.uint16, np.int16, np.uint16), "float32", []),
        ((np.int16, np.float32, np.uint8), "float32", []),
        ((np.uint8, np.uint8, np.uint16), "uint8", [2]),
    ],
)
def test_mixed_depths(tmp_path, dtypes, depth, unreadable):
    (tmp_path / "train").mkdir()
    images = [values(dtype, (20, 20, 1), i) for i, dtype in enumerate(dtypes)]
    for i, image in enumerate(images):
        save(tmp_path / "train" / f"{i}.npy", image)
    dataset = build_dataset(
        tmp_path, "train", eval_transform(16), read=ReadSettings(1), labels=False, evaluation=True
    )
    assert dataset.depth == getattr(torch, depth)
    for i, image in enumerate(images):
        sample = dataset[i]
        assert sample["image"].dtype == dataset.depth and sample["bad"] == [i] * (i in unreadable)
        if i in unreadable:
            assert "its pixels are uint16, and the data set has uint8" in dataset.fault(i)
        else:
            assert (dataset.decoded(i).double().numpy() == chw(image).double().numpy()).all()


# --- the range ---


def opened(root, channels=1, **options):
    return build_dataset(root, "train", None, read=ReadSettings(channels), labels=False, **options)


def test_a_range_that_is_not_given_stops_with_what_was_found(tmp_path, capsys):
    pixels = Pixels((0.4,), (0.2,))
    deep = opened(write_set(tmp_path / "deep", np.uint16, channels=1))
    with pytest.raises(
        ValueError, match="deep are uint16, with values from 0 to 65535 in 6 images of 6"
    ) as error:
        with_range(pixels, deep, None, scaled=False)
    assert "give `range` 0 65535" in str(error.value) and "`python -m util.data stats`" in str(error.value)
    # The type's own limits, if mean and standard deviation are given.
    assert settle_range(deep, None, scaled=True) == ((0.0,), (65535.0,))
    assert "warning: " in capsys.readouterr().out
    signed = opened(write_set(tmp_path / "signed", np.int16, channels=1))
    with pytest.raises(ValueError, match="int16, with values from -32768 to 32767"):
        settle_range(signed, None, scaled=True)
    plain = opened(write_set(tmp_path / "plain", np.uint8, channels=1))
    assert with_range(pixels, plain, None, scaled=False) == pixels
    # One that is given, or stored.
    assert with_range(pixels, deep, [5, 10], False) == Pixels((0.4,), (0.2,), (5.0,), (10.0,), True)
    trained = {"range": [5, 10], "image_depth": "uint16"}
    assert settle_range(deep, None, False, trained) == ((5.0,), (10.0,))
    assert settle_range(deep, [1, 2], False, trained) == ((1.0,), (2.0,))
    with pytest.raises(
        ValueError, match=r"images of uint16 with values in `range` 5 and 10, and those of .*plain are uint8"
    ):
        settle_range(plain, None, False, trained)
    assert settle_range(plain, [0, 255], False, trained) == ((0.0,), (255.0,))
    for range_of_bytes in ([0.0, 255.0], [2.0, 252.0]):
        trained = with_range(pixels, plain, range_of_bytes, False).flags(torch.uint8)
        low, high = settle_range(plain, None, False, trained)
        assert [*low, *high] == range_of_bytes, "it is theirs"
    for given, message in (
        ([1], "takes a low and a higher value"),
        ([3, 2], "takes a low and a higher value, .*found 3 2"),
        ([1, 2, 3, 4], "2 pairs of values, and images have 1 channels"),
        (["p1", 5], "two percentiles"),
        (["p99", "p1"], "a low and a higher percentile, found p99 p1"),
        (["p1", "p101"], "p0 to p100"),
    ):
        with pytest.raises(ValueError, match=message):
            with_range(pixels, deep, given, False)


def test_a_narrow_range_far_from_0_keeps_its_digits():
    values = torch.arange(16_777_200, 16_777_216, dtype=torch.float32).view(1, 4, 4)
    pixels = Pixels((0.5,), (0.25,), (16_777_200.0,), (16_777_216.0,), True)
    expected = (torch.arange(16, dtype=torch.float64).view(1, 4, 4) / 16 - 0.5) / 0.25
    torch.testing.assert_close(pixels.normalize(values).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ends", [[np.nan, 1.0], [0.0, np.inf], [1e38, 2e38], [1.0, np.nan]])
def test_ends_of_a_range_that_are_no_usual_numbers(ends):
    with pytest.raises(ValueError, match="takes a low and a higher value"):
        split_range(ends)


def test_percentiles_are_settled_once():
    """A run that goes on, and an evaluation, take what was measured when the training began."""
    trained = {"range": [5.0, 10.0]}
    assert kept_range(["p1", "p99"], trained) == [5.0, 10.0]
    assert kept_range([1.0, 2.0], trained) == [1.0, 2.0] and kept_range(None, trained) is None
    assert kept_range(["p1", "p99"], {"range": None}) == ["p1", "p99"]


def test_colour_changes_are_refused_for_streams_too(tmp_path):
    stream = TimmIterableDataset([], finetune_transform(16), read=ReadSettings.of({"range": [0.0, 1000.0]}))
    with pytest.raises(ValueError, match="change the colours of 8-bit images, and these are float32"):
        with_range(Pixels((0.5,), (0.5,)), stream, [0.0, 1000.0], False)
    usual = TimmIterableDataset([], finetune_transform(16), read=ReadSettings.of({"range": [0.0, 255.0]}))
    assert usual.depth == torch.uint8


def test_settings_that_no_file_should_hold():
    for settings in ({"transparency": "q"}, {"exif": "x"}):
        with pytest.raises(ValueError, match=r"found '[qx]'"):
            ReadSettings(**settings)


def test_large_files_are_looked_at_less_often(tmp_path, monkeypatch):
    dataset = opened(write_set(tmp_path, np.uint16, channels=1))
    size = len(dataset.index.read(0))
    for images in (1, 3, 6):
        monkeypatch.setattr(headers, "LOOKED_AT_BYTES", images * size - 1)
        assert headers.survey(dataset.index, ReadSettings(1)).images == images


def test_percentiles_are_those_of_each_channel(tmp_path, capsys):
    for dtype in DTYPES:
        root = write_set(tmp_path / np.dtype(dtype).name, dtype)
        low, high = settle_range(opened(root, 2), ["p2", "p99.5"], False)
        every = np.concatenate([np.load(p).reshape(-1, 2) for p in (root / "train").rglob("*.npy")])
        expected = np.percentile(every, [2, 99.5], axis=0, method="inverted_cdf")
        assert (np.array([low, high]) == expected).all()
        assert "range p2 p99.5 of 6 images: " in capsys.readouterr().out
    flat = tmp_path / "flat" / "train"
    flat.mkdir(parents=True)
    np.save(flat / "a.npy", np.stack([values(np.uint16)[..., 0], np.full((31, 43), 7, np.uint16)], -1))
    with pytest.raises(ValueError, match="is empty in channel 1, counted from 0: leave it out by `channels`"):
        settle_range(opened(tmp_path / "flat", 2), ["p1", "p99"], False)


def test_splits_of_different_depths_need_a_range():
    plain, deep, deeper = (SimpleNamespace(depth=d) for d in (torch.uint8, torch.uint16, torch.float32))
    for train, val in ((plain, deep), (deep, plain)):
        with pytest.raises(ValueError, match=r"one range does not fit both: .* give `range`"):
            check_same_depth(train, val, None)
        check_same_depth(train, val, [0, 1])
    check_same_depth(deep, deeper, None)
    check_same_depth(plain, plain, None)


def test_a_checkpoints_bands_are_those_of_a_run_that_starts_from_it():
    saved = checkpoint.Checkpoint(
        "p.pth", {}, {"in_chans": 2, "channels": [3, 1], "bands": 4, "exif": "apply"}
    )
    flags = dict(model="m", in_chans=3, channels=None, bands=None, alpha="drop", exif="ignore")
    found = as_stored(flags, (), saved, ["m"])
    assert ReadSettings.of(found) == ReadSettings(2, (3, 1), 4, exif="apply")
    other = as_stored(flags | dict(in_chans=2, channels=[0, 1]), ("in_chans", "channels"), saved, ["m"])
    assert ReadSettings.of(other) == ReadSettings(2, (0, 1), exif="apply")


@pytest.mark.parametrize(
    "low, high", [(0, 4095), (-1e-5, 2e-5), (300000.125, 300000.875), (0.25, 0.25), (-3e9, 7e9)]
)
def test_a_written_range_is_read_back(low, high):
    texts = written(low, high)
    parser = main_pretrain.get_args_parser()
    found = parser.parse_args(["--range", *texts]).range
    assert found[0] < found[1]
    if low < high:
        assert np.abs(np.subtract(found, [low, high])).max() < 1e-5 * (high - low)


# --- statistics ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_exact_for_all_that_is_kept(dtype):
    images = [values(dtype, (20, 20 + i, 3), i) for i in range(4)]
    found = Values(3, getattr(torch, np.dtype(dtype).name), 4)
    for image in images:
        found.add(chw(image))
    every = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)
    percents = [0, 0.1, 50, 99.9, 100]
    expected = np.percentile(every, percents, axis=0, method="inverted_cdf").T
    assert (np.array(found.percentiles(percents)) == expected).all()
    assert found.ends() == [(low, high) for low, high in zip(every.min(0), every.max(0))]
    low, high = np.percentile(every, [5, 95], axis=0)
    scaled = np.clip((every - low) / (high - low), 0, 1)
    stats = found.stats(low, high)
    np.testing.assert_allclose(stats.mean, scaled.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.std, scaled.std(0), rtol=1e-12)


def test_a_sample_of_floats_sees_all_columns(monkeypatch):
    monkeypatch.setattr("util.data.survey.values.KEPT", 64)
    found = Values(1, torch.float32, 1)
    # Each column has its own value; every 64th value is in the first column.
    found.add(torch.arange(64.0).expand(64, 64)[None])
    assert len(np.unique(found.kept[0])) > 50 and found.ends() == [(0.0, 63.0)]


def stats(capsys, *words):
    code = commands.main(["stats", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def flags_of(recipe):
    """What a main makes of a recipe."""
    return parse(main_pretrain.get_args_parser(), [f"@{recipe}"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_main_reads_the_recipe_back(tmp_path, monkeypatch, capsys, dtype):
    monkeypatch.chdir(tmp_path)
    root = write_set(tmp_path / "set", dtype, channels=12)
    for words, read in (
        (["--in_chans", 12], ReadSettings(12)),
        (["--in_chans", 12, "--channels", 11, 0], ReadSettings(2, (11, 0), 12)),
        (["--in_chans", 12, "--channels", 3, 4, 4], ReadSettings(3, (3, 4, 4), 12)),
    ):
        Path("set.args").unlink(missing_ok=True)
        code, out = stats(capsys, "set", *words)
        assert code == 0 and "written to set.args: give @set.args to a main" in out
        args = flags_of("set.args")
        depth = getattr(torch, np.dtype(dtype).name)
        found = ReadSettings.of(vars(args))
        assert (found.in_chans, found.channels, found.bands) == (read.in_chans, read.channels, read.bands)
        dataset = build_dataset(root, "train", None, read=found, labels=False)
        assert dataset.depth == depth
        pixels = with_range(Pixels(tuple(args.mean), tuple(args.std)), dataset, args.range, True)
        seen = torch.cat([pixels.normalize(dataset.decoded(i)).flatten(1) for i in range(6)], 1).double()
        # Zero mean and unit variance, up to the four digits of the recipe.
        assert seen.mean(1).abs().max() < 2e-3 and (seen.std(1) - 1).abs().max() < 2e-3
        printed = " ".join(line for line in Path("set.args").read_text().splitlines()[1:])
        assert printed in out


def test_what_is_printed_for_8_bit_rgb_is_mean_and_std(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for i in range(3):
        Image.fromarray(values(np.uint8, (20, 20, 3), i)).save(tmp_path / "set" / f"{i}.png")
    every = np.concatenate([values(np.uint8, (20, 20, 3), i).reshape(-1, 3) / 255 for i in range(3)])
    code, out = stats(capsys, "set")
    mean, std = (" ".join(f"{v:.4f}" for v in numbers) for numbers in (every.mean(0), every.std(0)))
    assert code == 0
    assert out.splitlines() == [
        "set: 3 images, no labels (folder)",
        f"--mean {mean} --std {std}",
        "written to set.args: give @set.args to a main",
    ]
    # The file is kept once it differs, whether or not it is named.
    assert "written to set.args" in stats(capsys, "set")[1]
    Path("set.args").write_text("# mine\n")
    for more, expected in (([], 0), (["--recipe", "set.args"], 2)):
        code, out = stats(capsys, "set", *more)
        assert code == expected and "--mean" in out and "set.args exists and is kept" in out
    code, out = stats(capsys, "set", "--recipe", "none/set.args")
    assert code == 2 and "--mean" not in out and "there is no folder none" in out
    assert Path("set.args").read_text() == "# mine\n"
    assert "written" not in stats(capsys, "set", "--recipe", "")[1]


def test_constant_bands_are_named_and_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for i in range(3):
        image = values(np.float32, (20, 20, 5), i)
        image[..., [1, 4]] = 0, -9999
        np.save(tmp_path / "set" / f"{i}.npy", image)
    code, out = stats(capsys, "set", "--in_chans", 5)
    assert code == 0 and "constant in 3 images: bands 1, 4, left out by --channels" in out
    args = flags_of("set.args")
    assert (args.in_chans, args.channels, args.bands) == (3, [0, 2, 3], 5)
    assert len(args.range) == 6 and len(args.mean) == len(args.std) == 3
    out = stats(capsys, "set", "--in_chans", 5, "--channels", 4, 2, "--recipe", "b.args")[1]
    assert "band 4, which --channels could leave out" in out
    args = flags_of("b.args")
    assert args.channels == [4, 2] and args.range[0] < args.range[1] and min(args.std) > 0
    out = stats(capsys, "set", "--in_chans", 5, "--channels", 4, 1, "--recipe", "")[1]
    assert "bands 4, 1" in out


def test_reasons_of_unreadable_files_are_counted(tmp_path, capsys):
    root = tmp_path / "set"
    root.mkdir()
    for i in range(3):
        np.save(root / f"good{i}.npy", values(np.uint16, (20, 20, 2), i))
    for i in range(20):
        np.save(root / f"shape{i}.npy", np.zeros((10 + i, 20, 5), np.uint16))
        (root / f"text{i}.png").write_bytes(b"no image " * (i + 1))
        (root / f"cut{i}.npy").write_bytes((root / "good0.npy").read_bytes()[: -1 - 10 * i])
    code, out = stats(capsys, root, "--in_chans", 2, "--recipe", "")
    lines = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert code == 0 and len(lines) == 3 and all("20 images, as " in line for line in lines), out
    assert "found uint16 (10, 20, 5), expected (H, W, 2) or (2, H, W)" in out
    # `check` names each.
    assert commands.main(["check", str(root), "--in_chans", "2", "--num_workers", "0"]) == 1
    out = capsys.readouterr().out
    assert out.count("unreadable: ") == 60 and "60 of 63 images unreadable" in out


def test_check_reads_in_the_depth_of_the_data_set(tmp_path, capsys):
    for i in range(4):
        save(tmp_path / f"{i}.png", values(np.uint8 if i else np.uint16, (20, 20, 1), i))
    assert commands.main(["check", str(tmp_path), "--in_chans", "1", "--num_workers", "0"]) == 1
    out = capsys.readouterr().out
    assert "unreadable: 0.png: " in out and "its pixels are uint16, and the data set has uint8" in out
    assert "1 of 4 images unreadable" in out


# --- pictures ---


def test_bands_of_pictures():
    assert Bands.of(1) == Bands((0,)) and Bands.of(3) == Bands((0, 1, 2))
    assert Bands.of(2) == Bands((0,), ", band 0") and Bands.of(13) == Bands((0, 1, 2), ", bands 0 1 2")
    assert Bands.of(3, [2, 1, 0]).note == ", bands 2 1 0" and Bands.of(3, [1]).note == ", band 1"
    for channels, given, message in (
        (12, [0, 1], "takes one number .grey. or three .red, green, blue., found 0 1"),
        (12, [3, 12, 0], "`picture_bands` 3 12 0: the model sees 12 channels, and their numbers are 0 to 11"),
        (1, [1], "0 to 0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            Bands.of(channels, given)
        assert "\n" not in str(error.value)
    images = torch.arange(5.0)[None, :, None, None].expand(2, 5, 4, 4)
    assert Bands.of(5, [4, 0, 2]).shown(images)[1, :, 0, 0].tolist() == [4, 0, 2]


def test_pictures_show_the_bands_in_their_range():
    model = MODELS["mae_test"](img_size=(16, 16), in_chans=4, pos_label="none")
    pixels = Pixels((0.5,) * 4, (0.2,) * 4, (1000.0,), (3000.0,), True)
    images = torch.full((1, 4, 16, 16), 1000, dtype=torch.uint16)
    for channel, value in enumerate((1000, 2004, 3000, 9000)):
        images[:, channel] = value
    normalised = pixels.normalize(images)
    picture = main_pretrain.draw(
        model, normalised, torch.zeros(1, dtype=torch.int64), 0.5, pixels, Bands.of(4, [3, 0, 1])
    )
    # Below the title, inside the first column.
    assert picture[-20, 20].tolist() == [255, 0, 128]
    assert (draw.as_pixels(normalised, pixels, Bands.of(4))[0, 0, 0] * 255).round().tolist() == [0, 128, 255]
    assert (draw.as_pixels(normalised, pixels, Bands.of(4, [1]))[0, 0, 0] * 255).round().tolist() == [128] * 3


def test_visualize_takes_a_range_and_bands(tmp_path, monkeypatch, capsys):
    model = MODELS["mae_test"](img_size=(16, 16), in_chans=2)
    flags = dict(
        model="mae_test", pos_label="apl", in_chans=2, input_size=[16, 16], mean=[0.5, 0.5], std=[0.2, 0.2]
    )
    flags["range"] = [0.0, 65535.0]
    torch.save({"model": model.state_dict(), "args": flags}, tmp_path / "m.pth")
    root = write_set(tmp_path / "set", np.uint16)
    seen = {}

    def panel(images, mask, prediction, **options):
        seen.update(options, images=images)
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(draw, "reconstruction_panel", panel)

    def drawn(*words):
        given = ["reconstruct", tmp_path / "m.pth", tmp_path / "r.png", "--data_path", root, *words]
        return run(visualize.main, parse(visualize.get_args_parser(), list(map(str, given))))

    assert drawn() == 0 and seen["titles"][0] == "original, band 0" and seen["images"].shape[1] == 1
    first = seen["images"]
    assert drawn("--picture_bands", 1, "--range", 0, 1000) == 0 and seen["titles"][0] == "original, band 1"
    assert not torch.equal(first, seen["images"]) and (seen["images"] == 1).double().mean() > 0.9
    assert drawn("--picture_bands", 2) == 2
    # A run's own pictures may have shown another band.
    torch.save({"model": model.state_dict(), "args": flags | {"picture_bands": [1]}}, tmp_path / "m.pth")
    assert drawn() == 0 and seen["titles"][0] == "original, band 1"
    assert drawn("--picture_bands", 0) == 0 and seen["titles"][0] == "original, band 0"
    # Images of 8 bits have another range.
    plain = write_set(tmp_path / "plain", np.uint8)
    assert drawn("--data_path", plain) == 2 and drawn("--data_path", plain, "--range", 0, 255) == 0
    # The checkpoint of 8-bit images does not know that of deeper ones.
    capsys.readouterr()
    torch.save({"model": model.state_dict(), "args": flags | {"range": None}}, tmp_path / "m.pth")
    assert drawn("--data_path", plain) == 0 and drawn() == 2
    assert "are uint16, with values from 0 to 65535" in capsys.readouterr().err


# --- exports ---


@pytest.mark.parametrize(
    "flags", [dict(range=[-1000.0, 400.0]), dict(channels=[3, 0], bands=4, range=[0.0, 9.0, 1.0, 5.0])]
)
def test_exports_keep_how_images_become_the_input(tmp_path, capsys, flags):
    channels = len(flags.get("channels", [0]))
    model = MODELS["mae_test"](img_size=(16, 16), in_chans=channels, pos_embed="learned", pos_label="none")
    flags = flags | dict(mean=[0.3] * channels, std=[0.2] * channels)
    stored = dict(
        model="mae_test", pos_label="none", pos_embed="learned", in_chans=channels, input_size=[16, 16]
    )
    torch.save({"model": model.state_dict(), "args": stored | flags}, tmp_path / "p.pth")

    def kept(path):
        args = checkpoint.load(str(path)).args
        return {name: args.get(name) for name in flags} == flags

    for to, name in (("encoder", "e.pth"), ("mae", "m.pth"), ("safetensors", "s.safetensors")):
        convert.export(str(tmp_path / "p.pth"), str(tmp_path / name), to)
        assert kept(tmp_path / name), to
    capsys.readouterr()
    convert.export(str(tmp_path / "p.pth"), str(tmp_path / "t.safetensors"), "timm")
    assert "timm does not apply that" in capsys.readouterr().out
    convert.import_file(str(tmp_path / "t.safetensors"), str(tmp_path / "back.pth"))
    assert kept(tmp_path / "back.pth")
    assert "names of MAE and timm" in describe(str(tmp_path / "t.safetensors"))
    convert.export(str(tmp_path / "p.pth"), str(tmp_path / "t.pth"), "timm")
    assert "not in this file, which holds weights only" in capsys.readouterr().out
    line = next(line for line in describe(str(tmp_path / "p.pth")).splitlines() if " input " in line)
    assert f"range {flags['range'][0]:g} {flags['range'][1]:g}" in line and "mean 0.3" in line


def test_hugging_face_folders_keep_it_too(tmp_path, capsys):
    pytest.importorskip("transformers")
    model = MODELS["mae_test"](img_size=(16, 16), in_chans=1, pos_embed="learned", pos_label="none")
    stored = dict(model="mae_test", pos_label="none", pos_embed="learned", in_chans=1, input_size=[16, 16])
    flags = dict(range=[-1000.0, 400.0], mean=[0.3], std=[0.2])
    torch.save({"model": model.state_dict(), "args": stored | flags}, tmp_path / "p.pth")
    convert.export(str(tmp_path / "p.pth"), str(tmp_path / "hf"), "hf")
    assert "(mae_pl_input in config.json); transformers does not apply that" in capsys.readouterr().out
    convert.import_file(str(tmp_path / "hf"), str(tmp_path / "back.pth"))
    args = checkpoint.load(str(tmp_path / "back.pth")).args
    assert {name: args[name] for name in flags} == flags
