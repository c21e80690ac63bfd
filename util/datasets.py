"""Data sets, samplers and the loader. A sample is `(epoch, index)`, and everything random about it follows from that.

    python -m util.datasets stats PATH     mean and standard deviation per channel
    python -m util.datasets check PATH     list unreadable images; exit code 1 if there are any
    python -m util.datasets repack PATH TARGET [--long_side 500]     shards that are read faster; see util/repack.py
"""
import argparse
import atexit
import contextlib
import multiprocessing
import os
import random
import signal
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info
from torchvision.transforms.v2.functional import pil_to_tensor

from util import dist, native
from util.image_index import ImageIndex, build_index
from util.transforms import PIL_MODES, decode, eval_transform

DEMO = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data", "demo")
READERS = ("hfds", "hfids", "wds", "tfds", "torch")
MAX_TRIES = 20  # images in a row that cannot be read


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed in [0, 2**63) of one sample: splitmix64 over the three numbers."""
    state = 0
    for value in (seed, epoch, index):
        state = (state ^ value) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


_numpy_bits, _crop_generator = np.random.MT19937(0), torch.Generator()  # seeded for every sample


@contextlib.contextmanager
def _seeded(key):
    """Seed the global generators of torch, `random` and numpy for one sample. The main process gets its own back."""
    outer = get_worker_info() is None  # a worker has nothing to give back, and doing so costs more than seeding
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
    `bad` and the sample of the next index stands in for it; with `evaluation=True` the sample keeps its index and
    becomes a zero image with label -1, so that it can be left out and counted.

    Raises ValueError after 20 unreadable images in a row.
    """
    exact_resume = True

    def __init__(self, index: ImageIndex, transform, *, in_chans: int = 3, seed: int = 0, evaluation: bool = False):
        self.index, self.transform, self.in_chans = index, transform, in_chans
        self.seed, self.evaluation = seed, evaluation

    def __len__(self) -> int:
        return len(self.index)

    def summary(self) -> str:
        return self.index.summary() + (f"; {native.describe()}" if self._crops_jpegs() else "")

    def _crops_jpegs(self):
        return self.in_chans == 3 and hasattr(self.transform, "crop_jpeg")

    def __getitem__(self, item) -> dict:
        epoch, i = item if isinstance(item, tuple) else (0, item)
        bad, image = [], None
        while True:
            key, label = sample_seed(self.seed, epoch, i), int(self.index.labels[i])
            try:
                data = self.index.read(i)
                if self._crops_jpegs():  # draws from a generator of its own: seeding the global ones takes longer
                    image = self.transform.crop_jpeg(data, _crop_generator.manual_seed(key))
                whole = decode(data, self.in_chans) if image is None else None
                break
            except (OSError, ValueError) as error:
                bad.append(i)
                if self.evaluation:
                    whole, label = torch.zeros(self.in_chans, 64, 64, dtype=torch.uint8), -1
                    break
                if len(bad) == min(MAX_TRIES, len(self)):
                    raise ValueError(f"{len(bad)} images in a row cannot be read, the last is {self.index.name(i)} in "
                                     f"{self.index.path}: {error}") from error
                i = (i + 1) % len(self)
        if image is None:
            with _seeded(key):
                image = self.transform(whole)
        return views(image) | dict(label=label, index=i, key=key, bad=bad)


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
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that are already running
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


def collate(samples: list[dict]) -> dict:
    """Samples -> image uint8 (B, C, H, W) and other views, label, index and key int64 (B,), bad list[int]."""
    batch = {k: default_collate([s[k] for s in samples]) for k in samples[0] if k != "bad"}
    return batch | dict(bad=[i for s in samples for i in s["bad"]])


def some_samples(dataset, n: int) -> list[dict]:
    """Up to n samples to show, spread over the data set and the same at every call; a stream's first ones."""
    n = min(n, len(dataset))
    return [dataset[i * len(dataset) // n] for i in range(n)] if dataset.exact_resume else list(islice(dataset, n))


class EpochSampler(Sampler):
    """One rank's `(epoch, index)` pairs of one epoch at a time; which epoch, and from where, `set_position` says.

    An epoch's permutation p follows from (seed, epoch). The m-th micro-batch of all ranks together is
    p[m * G:(m + 1) * G], G = batch_size * world_size, and rank r has its r-th part; so for equal G the batches do not
    depend on the number of ranks. A tail shorter than G is dropped.
    """

    def __init__(self, n: int, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0,
                 shuffle: bool = True):
        self.n, self.batch_size, self.rank, self.world_size = n, batch_size, rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.batches_per_epoch = n // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise ValueError(f"{n} images are fewer than one batch: --batch_size {batch_size} x {world_size} ranks = "
                             f"{batch_size * world_size}. Lower --batch_size to {n // world_size} or less.")
        self.set_position(0)

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """The next iteration is `epoch`, from micro-batch `start_batch` of this rank on."""
        assert 0 <= start_batch <= self.batches_per_epoch, (start_batch, self.batches_per_epoch)
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return (self.batches_per_epoch - self.start_batch) * self.batch_size

    def __iter__(self):
        epoch, own = self.epoch, slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for m in range(self.start_batch, self.batches_per_epoch):
            for i in self.global_batch(epoch, m)[own].tolist():
                yield epoch, i

    def global_batch(self, epoch: int, m: int) -> torch.Tensor:
        """int64 (G,): the indices of all ranks' m-th micro-batch, in rank order."""
        size = self.batch_size * self.world_size
        return _permutation(self.n, self.seed, epoch, self.shuffle)[m * size:(m + 1) * size]


@lru_cache(maxsize=1)
def _permutation(n, seed, epoch, shuffle):
    if not shuffle:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(sample_seed(seed, epoch, -1)))


class EvalSampler(Sampler):
    """rank, rank + world_size, ...: every index exactly once over all ranks, so ranks may differ by one sample."""

    def __init__(self, n: int, rank: int = 0, world_size: int = 1):
        self.indices = range(rank, n, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


def build_dataset(data_path, split: str, transform, *, in_chans: int = 3, seed: int = 0, labels: bool = True,
                  evaluation: bool = False) -> Dataset:
    """The data set of `split` at `data_path`: a path as in `build_index`, or None for the embedded demo set.

    `<reader>/<name>[=<root>]`, with a reader of timm's (hfds, hfids, wds, tfds, torch), goes to timm, e.g.
    `hfds/uoft-cs/cifar10`, `wds/imagenet=/data/shards`, `torch/cifar10=/data`. Streams (hfids, wds, tfds) resume by
    epoch only: their `exact_resume` is False. Every data set has `summary()`, one line.
    """
    data_path = os.fspath(data_path or DEMO)
    if data_path.split("/")[0].lower() in READERS and not os.path.exists(data_path):
        return _timm_dataset(data_path, split, transform, in_chans, seed, evaluation)
    index = build_index(data_path, split, labels=labels)
    return ImageDataset(index, transform, in_chans=in_chans, seed=seed, evaluation=evaluation)


def _timm_dataset(data_path, split, transform, in_chans, seed, evaluation):
    if in_chans not in (1, 3):
        raise ValueError(f"{data_path}: timm's readers give 1 or 3 channels, not {in_chans}; use folders of .npy files")
    from timm.data import create_dataset  # slow to import, and most runs do not need it
    name, _, root = data_path.partition("=")
    try:
        dataset = create_dataset(name, root=os.path.expanduser(root) or None, is_training=not evaluation, seed=seed,
                                 split="validation" if split == "val" else split, input_img_mode=PIL_MODES[in_chans])
    except ImportError as error:
        raise ValueError(f"{data_path} needs a package that is not installed: pip install {error.name}") from error
    except Exception as error:
        raise ValueError(f"timm cannot open {data_path} (split {split}, root {root or 'not given'}): {error!r}. The "
                         "form is <reader>/<name>[=<root>]; wds and torch need the root of the data.") from error
    kind = TimmIterableDataset if isinstance(dataset, IterableDataset) else TimmDataset
    return kind(dataset, transform, name=data_path, in_chans=in_chans, seed=seed)


class Loader(DataLoader):
    """A DataLoader whose workers never see the signals that end a run.

    Schedulers and terminals signal every process. The parent decides what follows, and needs its workers until it has
    saved; so they are started with these signals blocked, which leaves no moment in which one could end a worker.
    """

    def __iter__(self):
        blocked = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@lru_cache(maxsize=1)  # once
def _kill_workers_at_exit():
    """multiprocessing ends daemons by SIGTERM at exit and waits for them: for ever, as it is blocked. So kill first."""
    def kill():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch reports each as a worker that crashed
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()
    atexit.register(kill)


def build_loader(dataset, sampler, *, batch_size: int, num_workers: int = 0, pin_memory: bool = False) -> Loader:
    """Batches as `collate` makes them, by workers that persist, with one thread each, and leave signals to the parent.

    `sampler` must be None for a stream, whose last, partial batches are dropped.
    """
    stream = isinstance(dataset, IterableDataset)
    if stream and hasattr(dataset.dataset, "set_loader_cfg"):
        dataset.dataset.set_loader_cfg(num_workers=num_workers)
    if num_workers > 0:
        _kill_workers_at_exit()
    return Loader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate,
                  pin_memory=pin_memory, drop_last=stream, persistent_workers=num_workers > 0)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m util.datasets", description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("stats", "check", "repack"))
    parser.add_argument("path")
    parser.add_argument("target", nargs="?", help="repack: the folder that gets <split>-*.tar")
    parser.add_argument("--split", default="train")
    parser.add_argument("--in_chans", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000, help="stats: how many images, evenly spread")
    parser.add_argument("--long_side", type=int, help="repack: shrink to it and encode anew; without it nothing is lost")
    parser.add_argument("--quality", type=int, default=90, help="repack: of images that are encoded anew")
    parser.add_argument("--num_workers", "--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if (args.command == "repack") != (args.target is not None):
        parser.error("repack takes two paths, and the others one")
    try:
        if args.command == "repack":
            from util.repack import repack
            repack(args.path, args.target, split=args.split, long_side=args.long_side, quality=args.quality,
                   num_workers=args.num_workers)
            return 0
        index = build_index(args.path, args.split, labels=False)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print(index.summary())
    if args.command == "check":
        dataset = ImageDataset(index, eval_transform(8), in_chans=args.in_chans, evaluation=True)
        loader = build_loader(dataset, EvalSampler(len(index)), batch_size=64, num_workers=args.num_workers)
        bad = [i for batch in loader for i in batch["bad"]]
        print(*(f"unreadable: {index.name(i)}" for i in bad), sep="\n", end="\n" * bool(bad))
        print(f"{len(bad)} of {len(index)} images are unreadable")
        return int(bool(bad))
    total, pixels = torch.zeros(2, args.in_chans, dtype=torch.float64), 0
    for i in range(0, len(index), max(1, len(index) // args.images)):
        image = decode(index.read(i), args.in_chans).double().div_(255).flatten(1)  # (C, H*W)
        total += torch.stack([image.sum(1), image.square().sum(1)])
        pixels += image.shape[1]
    mean, square = total / pixels
    print("--mean", *(f"{v:.4f}" for v in mean), "--std", *(f"{v:.4f}" for v in (square - mean.square()).sqrt()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
