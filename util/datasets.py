"""Data sets. A sample is `(epoch, index)`, and everything random about it follows from that.

    python -m util.datasets stats PATH     mean and standard deviation per channel
    python -m util.datasets check PATH     list unreadable images; exit code 1 if there are any
    python -m util.datasets repack PATH TARGET [--long_side 500]     shards that are read faster; see util/repack.py
"""
import contextlib
import os
import random
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.transforms.v2.functional import pil_to_tensor

from util import dist, native
from util.args import Parser, run
from util.image_index import ImageIndex, NoSplit, build_index
from util.loader import build_loader
from util.samplers import EvalSampler, sample_seed
from util.transforms import PIL_MODES, decode, eval_transform

DEMO = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data", "demo")
READERS = ("hfds", "hfids", "wds", "tfds", "torch")
MAX_TRIES = 20  # draws for a sample whose image cannot be read


_numpy_bits = np.random.MT19937(0)  # seeded for every sample


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
    `bad` and another sample, drawn by its key, stands in for it; with `evaluation=True` the sample keeps its index and
    becomes a zero image with label -1, so that it can be left out and counted.

    Raises ValueError after 20 unreadable draws.

    Attributes:
        pixels: None, or a cache of decoded images, from which samples are then made: `pixels[i]` is image i,
            or raises ValueError; see util/cache.py.
    """
    exact_resume = True

    def __init__(self, index: ImageIndex, transform, *, in_chans: int = 3, seed: int = 0, evaluation: bool = False):
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
                    raise ValueError(f"{len(bad)} images drawn one after the other cannot be read, the last is "
                                     f"{self.index.name(i)} in {self.index.path}: {error}") from error
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


def build_dataset(data_path, split: str, transform, *, in_chans: int = 3, seed: int = 0, labels: bool = True,
                  evaluation: bool = False) -> Dataset:
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
        raise ValueError(f"{data_path}: timm's readers give 1 or 3 channels, not {in_chans}; use folders of .npy files")
    from timm.data import create_dataset  # slow to import, and most runs do not need it
    name, _, root = data_path.partition("=")
    try:
        dataset = create_dataset(name, root=os.path.expanduser(root) or None, is_training=not evaluation, seed=seed,
                                 split="validation" if split == "val" else split, input_img_mode=PIL_MODES[in_chans])
    except ImportError as error:
        raise ValueError(f"{data_path} needs a package that is not installed: pip install {error.name}") from error
    except Exception as error:
        kind = NoSplit if split == "val" else ValueError
        raise kind(f"timm cannot open {data_path} (split {split}, root {root or 'not given'}): {error!r}. The "
                   "form is <reader>/<name>[=<root>]; wds and torch need the root of the data.") from error
    kind = TimmIterableDataset if isinstance(dataset, IterableDataset) else TimmDataset
    return kind(dataset, transform, name=data_path, in_chans=in_chans, seed=seed)


def get_args_parser() -> Parser:
    p = Parser(prog="python -m util.datasets", description=__doc__.partition("\n")[0])
    p.add_argument("command", choices=("stats", "check", "repack"))
    p.add_argument("path")
    p.add_argument("target", nargs="?", help="repack: the folder that gets <split>-*.tar")
    p.add_argument("--split", default="train")
    p.add_argument("--in_chans", type=int, default=3)
    p.add_argument("--images", type=int, default=2000, help="stats: how many images, evenly spread")
    p.add_argument("--long_side", type=int, help="repack: shrink to it and encode anew; without it nothing is lost")
    p.add_argument("--quality", type=int, default=90, help="repack: of images that are encoded anew")
    p.add_argument("--num_workers", "--workers", type=int, default=os.cpu_count())
    return p


def command(args) -> int:
    if (args.command == "repack") != (args.target is not None):
        raise ValueError("repack takes two paths, and the others one")
    if _is_timms(args.path):
        raise ValueError(f"{args.command} reads folders, tars and lists of files, not timm's readers ({args.path})")
    if args.command == "repack":
        from util.repack import repack

        repack(args.path, args.target, split=args.split, long_side=args.long_side, quality=args.quality,
               num_workers=args.num_workers)
        return 0
    index = build_index(args.path, args.split, labels=False)
    print(index.summary())
    if args.command == "stats":
        return stats(index, args.in_chans, args.images)
    dataset = ImageDataset(index, eval_transform(8), in_chans=args.in_chans, evaluation=True)
    loader = build_loader(dataset, EvalSampler(len(index)), batch_size=64, num_workers=args.num_workers)
    bad = [i for batch in loader for i in batch["bad"]]
    print(*(f"unreadable: {index.name(i)}" for i in bad), sep="\n", end="\n" * bool(bad))
    print(f"{len(bad)} of {len(index)} images are unreadable")
    return int(bool(bad))


def stats(index: ImageIndex, in_chans: int, images: int) -> int:
    """Print --mean and --std of about `images` images of an index, spread over it; ValueError where none can be read."""
    if images < 1:
        raise ValueError(f"--images {images}: give at least 1")
    total, pixels = torch.zeros(2, in_chans, dtype=torch.float64), 0
    for i in range(0, len(index), max(1, len(index) // images)):
        try:
            image = decode(index.read(i), in_chans).double().div_(255).flatten(1)  # (C, H*W)
        except (OSError, ValueError) as error:
            print(f"left out: {index.name(i)} ({error})")
            continue
        total += torch.stack([image.sum(1), image.square().sum(1)])
        pixels += image.shape[1]
    if pixels == 0:
        raise ValueError(f"none of the images could be read with {in_chans} channels: give --in_chans as the images have it, "
                         "or see what `check` says")
    mean, square = total / pixels
    print("--mean", *(f"{v:.4f}" for v in mean), "--std", *(f"{v:.4f}" for v in (square - mean.square()).sqrt()))
    return 0


def main(argv: list[str] | None = None) -> int:
    return run(command, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
