"""Data sets. A sample is `(epoch, index)`, and everything random about it follows from that.

python -m util.data stats PATH     mean and standard deviation per channel
python -m util.data check PATH     list unreadable images; exit code 1 if there are any
python -m util.data repack PATH TARGET [--long_side 500]     shards that are read faster; see util/data/sources/repack.py
"""

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.transforms.v2.functional import pil_to_tensor

from util import dist
from util.data import native
from util.data.loading.samplers import sample_seed
from util.data.sources.image_index import ImageIndex, NoSplit, build_index
from util.data.transforms import PIL_MODES, decode

DEMO = os.path.join(str(Path(__file__).resolve().parents[2]), "data", "demo")
READERS = ("hfds", "hfids", "wds", "tfds", "torch")
MAX_TRIES = 20  # draws for a sample whose image cannot be read


_numpy_bits = np.random.MT19937(0)  # seeded for every sample


@contextlib.contextmanager
def _seeded(key):
    """Seed the global generators of torch, `random` and numpy for one sample. The main process gets its own back."""
    outer = (
        get_worker_info() is None
    )  # a worker has nothing to give back, and doing so costs more than seeding
    if outer:
        # Exchanging numpy's bit generator takes 2 us; saving and restoring its state would take 300.
        saved = torch.default_generator.get_state(), random.getstate(), np.random.get_bit_generator()
        np.random.set_bit_generator(_numpy_bits)
    try:
        torch.default_generator.manual_seed(key)
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        yield
    finally:
        if outer:
            torch.default_generator.set_state(saved[0])
            random.setstate(saved[1])
            np.random.set_bit_generator(saved[2])


def views(image) -> dict:
    """What a transform gave, by name: one image, or a dictionary of several views of it."""
    return image if isinstance(image, dict) else dict(image=image)


class ImageDataset(Dataset):
    """Samples by `(epoch, i)`, or by `i` for epoch 0, from an `ImageIndex`.

    A sample is a dict: image uint8 (C, H, W), label int (-1 = none), index int, key int (its `sample_seed`), bad
    list[int]. It depends on (seed, epoch, index) only, not on worker or rank. Where image i cannot be read, i goes into
    `bad` and another sample, drawn by its key, stands in for it; with `evaluation=True` the sample keeps its index and
    becomes a zero image with label -1, so that it can be left out and counted.

    Raises ValueError after 20 unreadable draws.

    Attributes:
        pixels: None, or a cache of decoded images, from which samples are then made: `pixels[i]` is image i,
            or raises ValueError; see util/data/loading/cache.py.
    """

    exact_resume = True

    def __init__(
        self, index: ImageIndex, transform, *, in_chans: int = 3, seed: int = 0, evaluation: bool = False
    ):
        self.index, self.transform, self.in_chans = index, transform, in_chans
        self.seed, self.evaluation = seed, evaluation
        self.pixels = None

    def __len__(self) -> int:
        return len(self.index)

    def summary(self) -> str:
        return self.index.summary() + (f"; {native.describe()}" if self._crops_jpegs() else "")

    def _crops_jpegs(self):
        return self.pixels is None and self.in_chans == 3 and hasattr(self.transform, "crop_jpeg")

    def __getitem__(self, item) -> dict:
        found, sample = self.resolve(item, self._load)
        image, whole = found or (None, torch.zeros(self.in_chans, 64, 64, dtype=torch.uint8))
        if image is None and hasattr(self.transform, "crop_jpeg"):
            image = self.transform(whole, sample["key"])  # draws from generators of its own
        elif image is None:
            with _seeded(sample["key"]):
                image = self.transform(whole)
        return views(image) | sample

    def _load(self, i, key):
        """(transformed image i, None) where the transform reads files itself, else (None, whole image)."""
        if self.pixels is not None:
            return None, self.pixels[i]
        data = self.index.read(i)
        image = self.transform.crop_jpeg(data, key) if self._crops_jpegs() else None
        return image, decode(data, self.in_chans) if image is None else None

    def resolve(self, item, load: Callable) -> tuple:
        """What `load(i, key)` returns for the image of the sample `item`, and the sample's other fields.

        `load` raises OSError or ValueError for an image that cannot be read. In evaluation the result is then
        None, in training that of a stand-in.
        """
        epoch, i = item if isinstance(item, tuple) else (0, item)
        bad, first = [], sample_seed(self.seed, epoch, i)
        while True:
            key, label = sample_seed(self.seed, epoch, i), int(self.index.labels[i])
            try:
                return load(i, key), dict(label=label, index=i, key=key, bad=bad)
            except (OSError, ValueError) as error:
                bad.append(i)
                if self.evaluation:
                    return None, dict(label=-1, index=i, key=key, bad=bad)
                if len(bad) == MAX_TRIES:
                    raise ValueError(
                        f"{len(bad)} images drawn one after the other cannot be read, the last is "
                        f"{self.index.name(i)} in {self.index.path}: {error}"
                    ) from error
                # Anywhere: the next ones lie in the same folder, which may be broken as a whole.
                i = sample_seed(first, 0, len(bad)) % len(self)


class TimmDataset(Dataset):
    """The same samples from a map-style set of (PIL image, label); timm itself replaces unreadable images."""

    exact_resume = True

    def __init__(self, dataset, transform, *, name: str = "", in_chans: int = 3, seed: int = 0):
        self.dataset, self.transform, self.mode, self.seed = dataset, transform, PIL_MODES[in_chans], seed
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def summary(self) -> str:
        resume = "" if self.exact_resume else "; a stream: a run resumes at whole epochs only"
        return f"{self.name}: {len(self)} images (read by timm{resume})"

    def __getitem__(self, item) -> dict:
        epoch, i = item if isinstance(item, tuple) else (0, item)
        return self._sample(*self.dataset[i], i, sample_seed(self.seed, epoch, i))

    def _sample(self, image, label, index, key):
        with _seeded(key):
            image = self.transform(pil_to_tensor(image.convert(self.mode)))
        return views(image) | dict(label=int(label), index=index, key=key, bad=[])


class TimmIterableDataset(TimmDataset, IterableDataset):
    """The same from a stream, in the stream's own order: index is -1, and a run can resume at epochs only."""

    exact_resume = False

    def __init__(self, dataset, transform, **kwargs):
        super().__init__(dataset, transform, **kwargs)
        self.epoch = torch.zeros(
            (), dtype=torch.int64
        ).share_memory_()  # seen by workers that are already running
        self.rank = dist.rank()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self):
        info = get_worker_info()
        stream = self.rank << 40 | (info.id if info else 0) << 32
        for count, (image, label) in enumerate(self.dataset):
            yield self._sample(image, label, -1, sample_seed(self.seed, int(self.epoch), stream | count))


class TensorSamples(Dataset):
    """Samples from tensors: features (n, d) under the name `image`, labels (n,); `index` is the images' listing."""

    exact_resume = True

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, index: ImageIndex):
        self.features, self.labels, self.index = features, labels, index

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, item) -> dict:
        i = item[1] if isinstance(item, tuple) else item
        return dict(image=self.features[i], label=int(self.labels[i]), index=i, key=0, bad=[])


def build_dataset(
    data_path,
    split: str,
    transform,
    *,
    in_chans: int = 3,
    seed: int = 0,
    labels: bool = True,
    evaluation: bool = False,
) -> Dataset:
    """The data set of `split` at `data_path`: a path as in `build_index`, or None for the embedded demo set.

    `<reader>/<name>[=<root>]`, with a reader of timm's (hfds, hfids, wds, tfds, torch), goes to timm, e.g.
    `hfds/uoft-cs/cifar10`, `wds/imagenet=/data/shards`, `torch/cifar10=/data`. Streams (hfids, wds, tfds) resume by
    epoch only: their `exact_resume` is False. Every data set has `summary()`, one line.
    """
    data_path = os.fspath(data_path or DEMO)
    if _is_timms(data_path):
        return _timm_dataset(data_path, split, transform, in_chans, seed, evaluation)
    index = build_index(data_path, split, labels=labels)
    return ImageDataset(index, transform, in_chans=in_chans, seed=seed, evaluation=evaluation)


def _is_timms(data_path):
    return data_path.partition("/")[0].lower() in READERS and not os.path.exists(data_path)


def _timm_dataset(data_path, split, transform, in_chans, seed, evaluation):
    if in_chans not in (1, 3):
        raise ValueError(
            f"{data_path}: timm's readers give 1 or 3 channels, not {in_chans}; use folders of .npy files"
        )
    from timm.data import create_dataset  # slow to import, and most runs do not need it

    name, _, root = data_path.partition("=")
    try:
        dataset = create_dataset(
            name,
            root=os.path.expanduser(root) or None,
            is_training=not evaluation,
            seed=seed,
            split="validation" if split == "val" else split,
            input_img_mode=PIL_MODES[in_chans],
        )
    except ImportError as error:
        raise ValueError(
            f"{data_path} needs a package that is not installed: pip install {error.name}"
        ) from error
    except Exception as error:
        kind = NoSplit if split == "val" else ValueError
        raise kind(
            f"timm cannot open {data_path} (split {split}, root {root or 'not given'}): {error!r}. The "
            "form is <reader>/<name>[=<root>]; wds and torch need the root of the data."
        ) from error
    kind = TimmIterableDataset if isinstance(dataset, IterableDataset) else TimmDataset
    return kind(dataset, transform, name=data_path, in_chans=in_chans, seed=seed)
