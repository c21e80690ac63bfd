"""Batches for training and evaluation on this rank, and their way to the device."""

import atexit
import multiprocessing
import signal
import socket
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate

from util import dist
from util.data.contract import VIEWS, Samples
from util.data.loading.samplers import EpochSampler, EvalSampler
from util.data.loading.waits import Crew, StartWorker, WorkerKilled, batch_is_read, survives
from util.data.pixels import Pixels
from util.flags.groups import DATA_TIMEOUT

# The class of a loader's data set.
S = TypeVar("S", bound=Samples)
T = TypeVar("T")


def collate(samples: list[dict]) -> dict:
    """Stack samples to a batch.

    It has `image` (B, C, H, W) and other views; `label`, `index` and `key`, int64 (B,); and `bad`, a
    list of indices.
    """
    batch_is_read()
    # Samples have different numbers of `bad` indices, so these cannot be stacked.
    batch = {k: default_collate([s[k] for s in samples]) for k in samples[0] if k != "bad"}
    return batch | dict(bad=[i for s in samples for i in s["bad"]])


class Loader(DataLoader[dict], Generic[S]):
    """A DataLoader that notices when its workers do not answer or are killed; see `Crew` for its errors.

    If the run goes on after a worker was killed (`Guard.survives`), this process makes the other batches
    itself. They are the same.
    """

    dataset: S
    batch_size: int

    def __init__(self, dataset: S, *, data_timeout: float, num_workers: int, **options: Any):
        self.data_timeout = data_timeout
        self.crew = Crew(dataset, num_workers, data_timeout)
        super().__init__(
            dataset, num_workers=num_workers, worker_init_fn=StartWorker(self.crew.rows), **options
        )

    def __iter__(self) -> Any:
        # This process loads the images, and waits for nobody.
        if self.num_workers == 0:
            return super().__iter__()
        return self._batches(self._ask(super().__iter__, self.crew.start))

    def _batches(self, workers: Iterator[dict] | None) -> Iterator[dict]:
        """Yield the batches of the workers, and once they are lost, those that are left."""
        done = 0
        while workers is not None:
            try:
                batch = self._ask(workers.__next__, self.crew.wait)
            except StopIteration:
                return
            if batch is None:
                break
            done += 1
            yield batch
        sampler: Any = self.batch_sampler
        for numbers in islice(sampler, done, None):
            yield self.collate_fn([self.dataset[number] for number in numbers])

    def _ask(self, call: Callable[[], T], how: Callable[[Callable[[], T]], T]) -> T | None:
        """Return how(call), or None once the workers are lost and the run goes on without them."""
        if self.crew.dismissed:
            return None
        try:
            return how(call)
        except WorkerKilled as error:
            # A stream cannot be entered where its workers have left it.
            if isinstance(self.dataset, IterableDataset) or not survives(error):
                raise
            return None


@lru_cache(maxsize=1)  # registered once
def _kill_workers_at_exit() -> None:
    """Kill workers when the process exits.

    multiprocessing sends them SIGTERM at exit and waits for them. That would last forever,
    as they block SIGTERM.
    """

    def kill() -> None:
        # torch's handler would report each killed worker as a crash.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()

    atexit.register(kill)


def build_loader(
    dataset: S,
    sampler: Sampler | Iterable | None,
    *,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    data_timeout: float = DATA_TIMEOUT,
) -> Loader[S]:
    """Return a loader of batches as `collate` makes them.

    Its workers persist over epochs, use one thread each, and leave signals to the parent. `sampler` must be
    None for a stream; in training its last, partial batches are dropped. `data_timeout` is the number of
    minutes that a batch may take; 0 means for ever.
    """
    # DataLoader refuses a sampler for a stream.
    stream = isinstance(dataset, IterableDataset)
    source: Any = getattr(dataset, "dataset", None)
    if stream and hasattr(source, "set_loader_cfg"):
        source.set_loader_cfg(num_workers=num_workers)  # timm's streams divide by it
    if num_workers > 0:
        _kill_workers_at_exit()
    return Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        drop_last=stream and not getattr(dataset, "evaluation", False),
        persistent_workers=num_workers > 0,
        data_timeout=data_timeout,
    )


def check_same_everywhere(dataset: Any) -> None:
    """Raise ValueError on all ranks unless they list the same images.

    Otherwise some images would be used twice and others never, or ranks would wait for a batch
    that does not come.
    """
    if dist.world_size() == 1 or not hasattr(dataset, "index"):
        return
    # The hash alone would not say which node is wrong.
    place = f"{len(dataset)} on {socket.gethostname()}"
    listings = dist.gather_objects((dataset.index.digest(), place))
    if len({digest for digest, _ in listings}) > 1:
        places = ", ".join(sorted({place for _, place in listings}))
        raise ValueError(
            f"the processes list different images in {dataset.index.path}: {places}. Copy the data to the "
            "nodes again, or give one copy that all of them see"
        )


def train_loader(
    dataset: S,
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    pin_memory: bool,
    data_timeout: float = DATA_TIMEOUT,
) -> Loader[S]:
    """Return a loader of this rank's shuffled batches, epoch by epoch; a stream keeps its own order."""
    check_same_everywhere(dataset)
    sampler = None
    if dataset.exact_resume:
        sampler = EpochSampler(
            len(dataset), batch_size=batch_size, rank=dist.rank(), world_size=dist.world_size(), seed=seed
        )
    return build_loader(
        dataset,
        sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        data_timeout=data_timeout,
    )


def eval_loader(
    dataset: S,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    data_timeout: float = DATA_TIMEOUT,
) -> Loader[S]:
    """Return a loader of this rank's share of all samples, each once over all ranks."""
    check_same_everywhere(dataset)
    sampler = None
    if dataset.exact_resume:
        sampler = EvalSampler(len(dataset), dist.rank(), dist.world_size())
    return build_loader(
        dataset,
        sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        data_timeout=data_timeout,
    )


def some_samples(dataset: Samples, n: int) -> list[dict]:
    """Return up to n samples to show, spread evenly and the same at every call.

    Of a stream they are the first ones.
    """
    n = min(n, len(dataset))
    # A stream cannot be asked for a sample by its number.
    if isinstance(dataset, IterableDataset):
        return list(islice(dataset, n))
    return [dataset[i * len(dataset) // n] for i in range(n)]


def sample_batches(dataset: Samples, n: int, batch_size: int) -> list[dict]:
    """Return `some_samples` in batches."""
    samples = some_samples(dataset, n)
    return [collate(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]


# --- to the device ---


@lru_cache(maxsize=8)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which batches are copied to a device, one for the whole run.

    The caching allocator keeps freed blocks for the stream that they were allocated on. A new stream in every
    epoch would leave a batch or two behind each time.
    """
    return torch.cuda.Stream(device)


def _moved(batch: dict, device: torch.device, pixels: Pixels) -> dict:
    """Copy a batch to the device and normalise its images there."""
    moved = {}
    # All copies are queued before the first computation.
    for name, value in batch.items():
        if torch.is_tensor(value):
            value = value.to(device, non_blocking=True)
        moved[name] = value
    for name in VIEWS:
        # Features that were computed before keep their values.
        if name in moved and moved[name].ndim > 2:
            moved[name] = pixels.normalize(moved[name])
    return moved


def device_batches(
    loader: Iterable[dict], device: torch.device, pixels: Pixels
) -> Generator[dict, None, None]:
    """Yield batches whose images (`image` and other views) are normalised to float32 on the device.

    On CUDA the next batch is copied while one is used.
    """
    if device.type == "cuda":
        yield from _prefetched(loader, device, pixels)
        return
    for batch in loader:
        yield _moved(batch, device, pixels)


def _prefetched(loader: Iterable[dict], device: torch.device, pixels: Pixels) -> Iterator[dict]:
    """Yield batches that were copied on a stream of their own while the batch before was used."""
    stream = _copy_stream(device)
    batches = iter(loader)
    ready = None
    while True:
        # A loader may make its batches on the device; the copy must follow on the same stream.
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            if batch is None:
                break
            coming = _moved(batch, device, pixels)
        # While the caller computes with this batch, the next one is on its way.
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(stream)
        # The allocator must not reuse the memory before the stream that computes is done with it.
        for value in coming.values():
            if torch.is_tensor(value):
                value.record_stream(torch.cuda.current_stream(device))
        ready = coming
    if ready is not None:
        yield ready
