"""Images that are decoded once give the same samples: from memory, and from the device up to rounding."""

import contextlib
import io
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import main_finetune
from util import dist
from util.data.datasets import ImageDataset, build_dataset
from util.data.formats import ReadSettings, decode
from util.data.loading import cached_pixels, device_loader, memory, resample
from util.data.loading.cache import cached
from util.data.loading.cached_pixels import CachedPixels
from util.data.loading.loader import build_loader, device_batches, eval_loader, train_loader
from util.data.loading.samplers import EpochSampler
from util.data.multicrop import TwoViews
from util.data.pixels import Pixels
from util.data.sources.image_index import ImageIndex
from util.data.sources.layouts import build_index
from util.data.timm_datasets import TimmDataset
from util.data.transforms import (
    CropSettings,
    eval_transform,
    finetune_transform,
    pretrain_transform,
    probe_transform,
)

CPU = torch.device("cpu")
# On other processors torch rounds differently from PIL and the native library; see test_native.py.
SAME_BITS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
GREY_LEVELS = 1 + int(not SAME_BITS)
LOADING = dict(batch_size=4, num_workers=0, pin_memory=False)
BROKEN = 3, 8


def encoded(seed, size, format="JPEG", mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """12 images of several sizes and formats in two classes; two of them cannot be read."""
    root = tmp_path_factory.mktemp("images")
    for i in range(12):
        path = root / "train" / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        format, mode = [("JPEG", "RGB"), ("PNG", "RGB"), ("JPEG", "L")][i % 3]
        path.write_bytes(encoded(i, (40 + 5 * (i % 4), 60 - 7 * (i % 3)), format, mode))
    index = build_index(root)
    for i in BROKEN:
        (root / "train" / index.name(i)).write_bytes(b"junk")
    return root


def samples(folder, transform, where, *, evaluation=False, epochs=(0, 3), **kwargs) -> list[dict]:
    """All batches of two epochs, each of the data set."""
    dataset = build_dataset(folder, "train", transform, seed=5, evaluation=evaluation, **kwargs)
    if evaluation:
        loader = cached(eval_loader(dataset, **LOADING), where, CPU)
        return [batch for _ in epochs for batch in loader]
    return batches_of(cached(train_loader(dataset, seed=5, **LOADING), where, CPU), epochs)


def batches_of(loader, epochs=(0, 3)) -> list[dict]:
    batches = []
    for epoch in epochs:
        loader.sampler.set_position(epoch)
        batches += list(loader)
    return batches


def compare(found, expected, most=0) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        assert a.keys() == b.keys() and a["bad"] == b["bad"]
        for name in a.keys() - {"bad"}:
            assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
            assert (a[name].double() - b[name].double()).abs().max() <= most * (name == "image"), name


TRAINING = {
    "pretrain": pretrain_transform((24, 20), vflip=0.5),
    "probe": probe_transform((20, 24)),
    "small crops": pretrain_transform(40, (0.05, 0.3)),
    "finetune": finetune_transform((20, 24), auto_augment="", crop=CropSettings(vflip=0.5)),
}
MORE = {"randaugment": finetune_transform(16), "two views": TwoViews((16, 16), (0.2, 1.0), 0.5)}
TURNED = {"turned": pretrain_transform((24, 20), vflip=0.5, rot90=0.8)}
EVALUATION = {
    "eval": eval_transform(24),
    "tall": eval_transform((40, 16), crop_pct=0.8),
    "whole": eval_transform(20, crop_pct=1.0),
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", [*TRAINING, *MORE, *TURNED, *EVALUATION])
def test_samples_from_memory_have_the_same_bits(request, folder, tmp_path, monkeypatch, name, native):
    if native:
        request.getfixturevalue("library")
    else:
        monkeypatch.setattr("util.data.native.bindings.LIBRARY", tmp_path / "absent.so")
    transform = (TRAINING | MORE | TURNED | EVALUATION)[name]
    evaluation = name in EVALUATION
    expected = samples(folder, transform, "none", evaluation=evaluation)
    assert sum(len(batch["bad"]) for batch in expected) >= 2 * len(BROKEN)
    compare(samples(folder, transform, "memory", evaluation=evaluation), expected)


@pytest.mark.parametrize("name", [*TRAINING, *EVALUATION])
def test_samples_of_the_device_are_the_same(library, folder, name):
    """Bit for bit, as images shrink little here; so are labels, keys, replacements and black images."""
    transform = (TRAINING | EVALUATION)[name]
    evaluation = name in EVALUATION
    expected = samples(folder, transform, "none", evaluation=evaluation)
    found = samples(folder, transform, "device", evaluation=evaluation)
    compare(found, expected, most=2 * int(evaluation and not SAME_BITS))
    assert any(batch["image"].any() for batch in found)
    if evaluation:
        black = [batch["image"][batch["index"] == i] for batch in found for i in BROKEN]
        assert sum(map(len, black)) == 4 and not any(image.any() for image in black)


@pytest.mark.parametrize("size", [(32, 32), (48, 20)])
def test_large_reductions_on_the_device_differ_by_a_grey_level_at_most(library, tmp_path, size):
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(i, (400 + 60 * (i % 2), 300)))
    index = build_index(tmp_path, labels=False)
    different = 0
    values = 0
    for transform in (pretrain_transform(size, (0.5, 1.0)), eval_transform(size)):
        dataset = ImageDataset(index, transform)
        loader = cached(build_loader(dataset, range(6), batch_size=6), "device", CPU)
        (found,) = loader
        expected = torch.stack([dataset[i]["image"] for i in range(6)])
        difference = (found["image"].int() - expected.int()).abs()
        assert difference.max() <= GREY_LEVELS
        different += int((difference > 0).sum())
        values += difference.numel()
    assert different <= 1e-3 * values or not SAME_BITS, (different, values)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channel_counts_on_the_device(tmp_path, channels):
    for i in range(4):
        array = np.random.default_rng(i).integers(0, 256, (5, 6, channels), dtype=np.uint8)
        array = array.repeat(8, 0).repeat(8, 1)
        np.save(tmp_path / f"{i}.npy", array)
    found, expected = (
        samples(tmp_path, pretrain_transform(30), where, read=ReadSettings(channels), labels=False)
        for where in ("device", "none")
    )
    compare(found, expected, most=2)


def test_a_sample_of_the_device_does_not_depend_on_its_batch(folder, monkeypatch):
    dataset = ImageDataset(build_index(folder), pretrain_transform((24, 20), vflip=0.5), seed=2)
    loader = cached(build_loader(dataset, [(4, i) for i in range(12)], batch_size=12), "device", CPU)
    (whole,) = loader
    (windows,) = loader.windows
    for chunk in (1, 40_000):  # of one image, and of a few
        monkeypatch.setattr(resample, "CHUNK", chunk)
        again = resample.resample(loader.images, whole["index"], windows["window"], (24, 20))
        assert torch.equal(again, whole["image"])
    alone = cached(build_loader(dataset, [(4, 7)], batch_size=1), "device", CPU)
    assert torch.equal(next(iter(alone))["image"][0], whole["image"][7])


def test_products_are_exact_even_if_the_run_allows_tf32(folder, monkeypatch):
    dataset = ImageDataset(build_index(folder), TRAINING["pretrain"])
    loader = cached(build_loader(dataset, [0], batch_size=1), "device", CPU)
    make = resample._resample
    inside = []

    def recorded(*args):
        inside.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return make(*args)

    monkeypatch.setattr(resample, "_resample", recorded)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", torch.bfloat16):
            next(iter(loader))
        assert inside == [("highest", False)]
        assert torch.get_float32_matmul_precision() == "high", "as it was before"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("size", [1, 3])
def test_batches_without_a_readable_image_are_black(tmp_path, size):
    """Here this is the last batch; with one image per batch, others as well."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encoded(i, (40, 30), "PNG"))
    for i in (1, 3, 4, 5):
        (tmp_path / f"{i}.png").write_bytes(b"junk")
    dataset = ImageDataset(build_index(tmp_path, labels=False), eval_transform(24), evaluation=True)
    expected = list(build_loader(dataset, range(6), batch_size=size))
    found = list(cached(build_loader(dataset, range(6), batch_size=size), "device", CPU))
    compare(found, expected, most=2 * int(not SAME_BITS))
    assert not found[-1]["image"].any() and found[-1]["label"].tolist() == [-1] * size


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at one time."""

    def __init__(self):
        super().__init__()
        self.tensors = {}
        self.alive = 0
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        results = made
        if not isinstance(made, (tuple, list)):
            results = [made]
        for tensor in results:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, tensor.untyped_storage())
        return made

    def _add(self, tensor, storage):
        place = storage.data_ptr()
        size = storage.nbytes()
        if place not in self.tensors:
            self.tensors[place] = 0
            self.alive += size
            self.most = max(self.most, self.alive)
        self.tensors[place] += 1  # views share a place
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place, size):
        self.tensors[place] -= 1
        if not self.tensors[place]:
            del self.tensors[place]
            self.alive -= size


@pytest.mark.parametrize(
    "long, short, channels, size",
    [pytest.param(2000, 8, 3, 32, marks=pytest.mark.slow), (2000, 8, 1, 8), (300, 300, 3, 24)],
)
def test_a_part_of_a_batch_takes_no_more_than_its_share(monkeypatch, long, short, channels, size):
    """An elongated image, whose filter has many positions, included; a single image takes what it needs."""
    transform = eval_transform(size)
    shapes = [(size, size)] * 11 + [(short, long)]
    images = torch.zeros(12, channels, max(short, size), long, dtype=torch.uint8)
    images.random_(generator=torch.Generator().manual_seed(0))
    rows = torch.arange(12)
    windows = torch.tensor([transform.window(*shape) for shape in shapes])
    monkeypatch.setattr(resample, "CHUNK", 1)
    with Peak() as one:
        expected = resample.resample(images, rows[-1:], windows[-1:], transform.size)
    assert one.most < 4 * 2**20
    monkeypatch.setattr(resample, "CHUNK", 2**20)
    with Peak() as peak:
        found = resample.resample(images, rows, windows, transform.size)
    # CHUNK counts floats; the results come on top.
    assert 2**20 < peak.most < 4 * 2**20 + 2 * found.nbytes, peak.most
    assert torch.equal(found[-1:], expected)


def test_the_largest_weight_is_that_of_all_positions():
    """Here it is one in the middle. The last four are shown, and are smaller, as are the first four."""
    start, length, full, flip, first = (torch.tensor([value]) for value in (0, 27, 14, 0, 10))
    part, part_unit = resample.Axis(start, length, full, first, flip, 14).weights(4, 27)
    whole, unit = resample.Axis(start, length, full, start, flip, 14).weights(14, 27)
    ends = torch.cat([whole[:, :4], whole[:, 10:]]).max() * unit
    middle = whole.max() * unit
    assert ends < 0.5 < middle, "so that without it the weights would get one bit more"
    assert part_unit == unit and (part - whole[:, 10:]).abs().max() <= 1


def test_elongated_images_on_the_device_are_the_same(library, tmp_path):
    """The largest weight is that of all positions, and the centre crop shows few of them."""
    sizes = [(2000, 8), (32, 32), (8, 700), (300, 40), (33, 31), (90, 200)]
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.png").write_bytes(encoded(i, size, "PNG"))
    index = build_index(tmp_path, labels=False)
    for transform in (eval_transform(32), pretrain_transform(32, (0.5, 1.0))):
        dataset = ImageDataset(index, transform)
        (found,) = cached(build_loader(dataset, range(6), batch_size=6), "device", CPU)
        expected = torch.stack([dataset[i]["image"] for i in range(6)])
        assert (found["image"].int() - expected.int()).abs().max() <= GREY_LEVELS


@pytest.mark.parametrize("where", ["memory", "device"])
def test_files_are_decoded_once_and_workers_make_the_same(folder, where, monkeypatch, capsys):
    expected = samples(folder, TRAINING["pretrain"], "none")
    dataset = build_dataset(folder, "train", TRAINING["pretrain"], seed=5)
    loader = cached(train_loader(dataset, seed=5, batch_size=4, num_workers=2, pin_memory=False), where, CPU)
    printed = capsys.readouterr().out
    readable = [decode(dataset.index.read(i)) for i in range(12) if i not in BROKEN]
    assert "12 images decoded in 0." in printed and "MB in memory; 2 cannot be read" in printed
    pixels = sum(image.numel() for image in readable)
    assert where == "device" or dataset.pixels.nbytes == pixels
    monkeypatch.setattr(ImageIndex, "read", lambda *args: pytest.fail("a file was read again"))
    compare(batches_of(loader), expected)
    assert len(loader) == 3 and loader.batch_size == 4 and loader.dataset is dataset


def test_batches_on_the_device_pass_without_a_copy(folder, monkeypatch):
    dataset = build_dataset(folder, "train", TRAINING["pretrain"])
    loader = cached(train_loader(dataset, seed=0, **LOADING), "device", CPU)
    seen = []
    monkeypatch.setattr("util.data.pixels.normalize", lambda images, mean, std: seen.append(images) or images)
    made = []
    monkeypatch.setattr(
        device_loader, "resample", lambda *args: made.append(resample.resample(*args)) or made[-1]
    )
    assert len(list(device_batches(loader, CPU, Pixels((0.5,), (0.5,))))) == 3
    assert [image.data_ptr() for image in seen] == [image.data_ptr() for image in made]


def test_images_lie_in_several_tensors(folder, monkeypatch):
    """Each has the size of SLAB or of its image; the images do not depend on it."""
    index = build_index(folder)
    whole = CachedPixels(index, ReadSettings())
    monkeypatch.setattr(cached_pixels, "SLAB", 9000)
    parts = CachedPixels(index, ReadSettings(), threads=3)
    assert len(whole.slabs) == 1 and len(parts.slabs) > 4
    for i in range(12):
        if i in BROKEN:
            with pytest.raises(ValueError, match="not a readable image"):
                parts[i]
        else:
            assert torch.equal(parts[i], whole[i]) and torch.equal(whole[i], decode(index.read(i)))


def test_few_decoded_images_wait(folder, monkeypatch):
    """Threads that decode faster than images are stored must not fill the memory."""
    made = []
    stored = []
    waiting = []
    keep = CachedPixels._keep
    decoded = cached_pixels.decode

    def slow(self, i, image, free):
        time.sleep(0.05)
        waiting.append(len(made) - len(stored))
        stored.append(i)
        return keep(self, i, image, free)

    monkeypatch.setattr(cached_pixels, "PROBED", 0)
    monkeypatch.setattr(cached_pixels, "decode", lambda *args: made.append(args) or decoded(*args))
    monkeypatch.setattr(CachedPixels, "_keep", slow)
    pixels = CachedPixels(build_index(folder), ReadSettings(), threads=2)
    assert stored == list(range(12)) and sorted(pixels.errors) == list(BROKEN)
    assert max(waiting) <= 5  # two for each thread, and the one that is kept
    with ThreadPoolExecutor(2) as pool:
        assert list(cached_pixels.in_order(pool, str, range(9), 3)) == list("012345678")


def test_images_go_to_the_device_in_parts(folder, monkeypatch):
    """A part has COPIED bytes, or one image; the result does not depend on it."""
    index = build_index(folder)
    sizes = []
    zeros = torch.zeros
    pixels = CachedPixels(index, ReadSettings())
    whole = device_loader.padded_images(pixels, index, CPU)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: sizes.append(args) or zeros(*args, **kwargs))
    for copied, images in ((1, 1), (3 * whole[0].nbytes + 1, 3), (5 * whole[0].nbytes, 5)):
        monkeypatch.setattr(device_loader, "COPIED", copied)
        sizes.clear()
        assert torch.equal(device_loader.padded_images(pixels, index, CPU), whole)
        parts = [shape[0] for (shape,) in sizes[1:]]
        assert sum(parts) == 12 and max(parts) == images


# --- refusals ---


def test_other_data_sets_and_transforms_are_refused_with_advice(folder):
    def loader(transform, **kwargs):
        return train_loader(build_dataset(folder, "train", transform, **kwargs), seed=0, **LOADING)

    for transform in MORE.values():
        with pytest.raises(
            ValueError, match=r"give `cache_data` memory, or .*`auto_augment` ''.*`sr_views` same"
        ):
            cached(loader(transform), "device", CPU)
    with pytest.raises(ValueError, match=r"does not turn them: give `cache_data` memory, or `rot90` 0"):
        cached(loader(TURNED["turned"]), "device", CPU)
    padded = build_loader(build_dataset(folder, "train", eval_transform(16, 1.2)), range(12), batch_size=4)
    with pytest.raises(ValueError, match=r"give `crop_pct` 1 or less, or `cache_data` memory"):
        cached(padded, "device", CPU)
    for where in ("memory", "device"):
        with pytest.raises(ValueError, match=r"`dct_scaling` decodes a file anew .* leave one of them out"):
            cached(loader(pretrain_transform(16, dct_scaling=True)), where, CPU)
        timms = TimmDataset([0] * 8, pretrain_transform(16), name="hfds/x")
        with pytest.raises(ValueError, match=r"hfds/x: 8 images .*not from timm's readers: give .*none"):
            cached(train_loader(timms, seed=0, **LOADING), where, CPU)
        assert cached(train_loader(timms, seed=0, **LOADING), "none", CPU)


def test_sets_that_do_not_fit_are_refused(folder, monkeypatch):
    index = build_index(folder)
    readable = [decode(index.read(i)) for i in range(12) if i not in BROKEN]
    unpadded = sum(image.numel() for image in readable) / len(readable) * 12
    padded = 12 * 3 * max(image.shape[1] for image in readable) * max(image.shape[2] for image in readable)
    for device, needed in ((None, unpadded), (CPU, unpadded + padded)):
        for room in (needed + 1, needed - 1):
            monkeypatch.setattr(memory, "available_memory", lambda room=room: room)
            if room > needed:
                CachedPixels(index, ReadSettings(), device=device)
                continue
            with pytest.raises(ValueError, match=r"12 decoded images .* 0 MB are left: give .*none"):
                CachedPixels(index, ReadSettings(), device=device)
    monkeypatch.setattr(memory, "available_memory", lambda: unpadded + 1)
    for room in (padded + 1, padded - 1):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, room=room: (room, 8e10))
        if room > padded:
            CachedPixels(index, ReadSettings(), device=torch.device("cuda"))
            continue
        with pytest.raises(ValueError, match=r"12 decoded images .* on a GPU of .*: give .*memory"):
            CachedPixels(index, ReadSettings(), device=torch.device("cuda"))
    # Two ranks share a host. Both must refuse the set, or one would wait for the other.
    monkeypatch.setattr(memory, "available_memory", lambda: 1.5 * unpadded)
    CachedPixels(index, ReadSettings())
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [mine, mine])
    with pytest.raises(ValueError, match="by all its processes"):
        CachedPixels(index, ReadSettings())
    small = memory.Need("elsewhere", 2.0, 1.0, 0.0, 0.0)
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [mine, small])
    with pytest.raises(ValueError, match="on elsewhere"):
        CachedPixels(index, ReadSettings())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_large_image_that_was_not_probed_is_found_before_all_are_padded(tmp_path, monkeypatch, device):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(encoded(i, (300, 200) if i == 5 else (32, 32), "PNG"))
    index = build_index(tmp_path, labels=False)
    device = torch.device(device)
    monkeypatch.setattr(cached_pixels, "PROBED", 2)  # images 0 and 4
    padded = 8 * 3 * 300 * 200
    room = {"cpu": padded - 1, "cuda": 1e5}[device.type]
    monkeypatch.setattr(memory, "available_memory", lambda: room)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (padded - 1, 8e10))
    pixels = CachedPixels(index, ReadSettings(), device=device)
    message = r"8 decoded images .* padded to 5.png \(200 x 300 pixels\), .* 1 MB .*: give .*memory, or none"
    with pytest.raises(ValueError, match=message):
        device_loader.padded_images(pixels, index, device)
    # The height and the width may be those of two images.
    (tmp_path / "6.png").write_bytes(encoded(6, (20, 210), "PNG"))
    index = build_index(tmp_path, labels=False)
    with pytest.raises(ValueError, match=r"padded to 5.png \(200 x 300 pixels\) and 6.png \(210 x 20 pix"):
        device_loader.padded_images(CachedPixels(index, ReadSettings(), device=device), index, device)
    # All ranks refuse if one of them lacks the memory.
    monkeypatch.setattr(memory, "available_memory", lambda: 1e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1e9, 8e10))
    other = memory.Need("elsewhere", 2.0, 1.0, 0.0, 0.0)
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [mine, other])
    with pytest.raises(ValueError, match="on elsewhere"):
        device_loader.padded_images(pixels, index, device)


def test_available_memory_is_what_is_left(tmp_path):
    found = memory.available_memory()
    assert 1e6 < found < 1e14
    proc = tmp_path / "proc"
    groups = tmp_path / "groups"

    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def group(name, limit, used, inactive=0):
        write(groups / name / "memory.max", f"{limit}\n")
        write(groups / name / "memory.current", f"{used}\n")
        write(groups / name / "memory.stat", f"anon {used - inactive}\ninactive_file {inactive}\n")

    def left():
        return memory.available_memory(str(proc), str(groups))

    assert left() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "macOS has no /proc"
    write(proc / "meminfo", "MemTotal: 9000 kB\nMemAvailable:    2000 kB\n")
    assert left() == 2_048_000
    write(proc / "self" / "cgroup", "1:memory:/old\n0::/job/step/task\n")
    assert left() == 2_048_000, "no files of groups"
    group("job/step/task", 1_000_000, 700_000, 100_000)
    assert left() == 400_000
    # SLURM limits the job, or its step, and not the task in it.
    group("job/step/task", "max", 700_000)
    assert left() == 2_048_000
    group("job", 900_000, 800_000, 50_000)
    assert left() == 150_000
    group("job/step", 800_000, 750_000)
    assert left() == 50_000
    group("job/step/task", 900_000, 700_000)
    assert left() == 50_000, "the smallest counts, not the nearest"
    group("", 750_000, 740_000)
    assert left() == 10_000, "a container's own root"
    write(proc / "self" / "cgroup", "0::/\n")
    assert left() == 10_000


def test_ranks_share_the_samples_and_not_the_cache(folder):
    dataset = ImageDataset(build_index(folder), TRAINING["pretrain"], seed=5)
    loaders = []
    for size, rank, ranks in ((6, 0, 1), (3, 0, 2), (3, 1, 2)):
        sampler = EpochSampler(12, batch_size=size, rank=rank, world_size=ranks, seed=5)
        loaders.append(cached(build_loader(dataset, sampler, batch_size=size), "device", CPU))
    for whole, first, second in zip(*loaders, strict=True):
        for name in ("image", "label", "index", "key"):
            assert torch.equal(torch.cat([first[name], second[name]]), whole[name]), name
    assert [len(loader.images) for loader in loaders] == [12, 12, 12]


@pytest.mark.gpu
def test_a_gpu_resamples_to_the_same_bits(folder):
    """Even if the run allows TF32, whose products would not be exact."""
    torch.set_float32_matmul_precision("high")
    cuda = torch.device("cuda")
    for transform, evaluation in ((TRAINING["pretrain"], False), (EVALUATION["tall"], True)):
        dataset = build_dataset(folder, "train", transform, evaluation=evaluation)
        batches = []
        for device in (CPU, cuda):
            loader = build_loader(dataset, range(12), batch_size=5)
            batches.append(
                list(device_batches(cached(loader, "device", device), cuda, Pixels((0.5,), (0.5,))))
            )
        for a, b in zip(*batches, strict=True):
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["key"], b["key"])


@pytest.mark.parametrize(
    "flags, refused",
    [
        ([], True),
        (["--color_jitter", "0.4", "--aa", ""], True),
        (["--aa", ""], False),
        (["--eval", "--resume", "F"], False),
    ],
)
def test_fine_tuning_refuses_its_augmentation_before_it_reads_anything(flags, refused):
    args = main_finetune.get_args_parser().parse_args(["--cache_data", "device", *flags])
    expectation = contextlib.nullcontext()
    if refused:
        expectation = pytest.raises(ValueError, match="--aa ''")
    with expectation:
        main_finetune.check_flags(args)
