"""Batches for training and evaluation on this rank, and their way to the device."""

import atexit
import multiprocessing
import signal
import socket
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from util import dist
from util.data.loading.samplers import EpochSampler, EvalSampler
from util.data.pixels import Pixels
from util.dist.allocator import return_freed_memory


def collate(samples: list[dict]) -> dict:
    """Samples -> image uint8 (B, C, H, W) and other views, label, index and key int64 (B,), bad list[int]."""
    batch = {k: default_collate([s[k] for s in samples]) for k in samples[0] if k != "bad"}
    return batch | dict(bad=[i for s in samples for i in s["bad"]])


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


def build_loader(
    dataset, sampler, *, batch_size: int, num_workers: int = 0, pin_memory: bool = False
) -> Loader:
    """Batches as `collate` makes them, by workers that persist, with one thread each, and leave signals to the parent.

    `sampler` must be None for a stream, whose last, partial batches are dropped.
    """
    stream = isinstance(dataset, IterableDataset)
    if stream and hasattr(dataset.dataset, "set_loader_cfg"):
        dataset.dataset.set_loader_cfg(num_workers=num_workers)
    if num_workers > 0:
        _kill_workers_at_exit()
    return Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        drop_last=stream,
        persistent_workers=num_workers > 0,
        worker_init_fn=return_freed_memory,
    )


def check_same_everywhere(dataset) -> None:
    """ValueError on all ranks unless they list the same images: else some would be used twice, others never, or ranks wait
    for a batch that does not come."""
    if dist.world_size() == 1 or not hasattr(dataset, "index"):
        return
    found = dist.gather_objects((dataset.index.digest(), f"{len(dataset)} on {socket.gethostname()}"))
    if len({digest for digest, _ in found}) > 1:
        places = ", ".join(sorted({where for _, where in found}))
        raise ValueError(
            f"the ranks list different images in {dataset.index.path}: {places}. Copy the data to the nodes "
            "again, or give one copy that all of them see"
        )


def train_loader(dataset, *, batch_size: int, seed: int, num_workers: int, pin_memory: bool) -> DataLoader:
    """This rank's shuffled batches, epoch by epoch; a stream keeps its own order."""
    sampler = None
    check_same_everywhere(dataset)
    if dataset.exact_resume:
        sampler = EpochSampler(
            len(dataset), batch_size=batch_size, rank=dist.rank(), world_size=dist.world_size(), seed=seed
        )
    return build_loader(
        dataset, sampler, batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory
    )


def eval_loader(dataset, *, batch_size: int, num_workers: int, pin_memory: bool) -> DataLoader:
    """This rank's share of all samples, each once over all ranks."""
    check_same_everywhere(dataset)
    sampler = EvalSampler(len(dataset), dist.rank(), dist.world_size()) if dataset.exact_resume else None
    return build_loader(
        dataset, sampler, batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory
    )


def some_samples(dataset, n: int) -> list[dict]:
    """Up to n samples to show, spread over the data set and the same at every call; a stream's first ones."""
    n = min(n, len(dataset))
    return (
        [dataset[i * len(dataset) // n] for i in range(n)]
        if dataset.exact_resume
        else list(islice(dataset, n))
    )


def sample_batches(dataset, n: int, batch_size: int) -> list[dict]:
    """Up to n samples of a data set, spread over it and the same at every call, in batches."""
    samples = some_samples(dataset, n)
    return [collate(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]


@lru_cache(maxsize=8)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches are copied to a device: one for the whole run.

    The caching allocator keeps freed blocks for the stream that they were allocated on. A new stream in every epoch
    would leave a batch or two behind each time.
    """
    return torch.cuda.Stream(device)


def device_batches(loader: Iterable, device: torch.device, pixels: Pixels) -> Iterator[dict]:
    """Batches with uint8 views (`image`, ...) normalised to float32 on the device; on CUDA the next one is copied while one
    is used."""
    copy_stream = _copy_stream(device) if device.type == "cuda" else None

    def move(batch: dict) -> dict:
        batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        # Features that were computed before, boxes and masks pass as they are.
        return {
            k: pixels.normalize(v) if torch.is_tensor(v) and v.dtype == torch.uint8 else v
            for k, v in batch.items()
        }

    if copy_stream is None:
        for batch in loader:
            yield move(batch)
        return
    ready, batches = None, iter(loader)
    while True:
        with torch.cuda.stream(copy_stream):
            # In this stream, as a loader may make its batches on the device; `move` must come after that.
            batch = next(batches, None)
            if batch is None:
                break
            coming = move(batch)
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(copy_stream)
        for v in coming.values():
            if torch.is_tensor(v):
                v.record_stream(torch.cuda.current_stream(device))
        ready = coming
    if ready is not None:
        yield ready
