"""Batches for training and evaluation on this rank, and their way to the device."""
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader

from util import dist
from util.datasets import EpochSampler, EvalSampler, build_loader, collate, some_samples
from util.transforms import normalize


def train_loader(dataset, *, batch_size: int, seed: int, num_workers: int, pin_memory: bool) -> DataLoader:
    """This rank's shuffled batches, epoch by epoch; a stream keeps its own order."""
    sampler = None
    if dataset.exact_resume:
        sampler = EpochSampler(len(dataset), batch_size=batch_size, rank=dist.rank(), world_size=dist.world_size(), seed=seed)
    return build_loader(dataset, sampler, batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory)


def eval_loader(dataset, *, batch_size: int, num_workers: int, pin_memory: bool) -> DataLoader:
    """This rank's share of all samples, each once over all ranks."""
    sampler = EvalSampler(len(dataset), dist.rank(), dist.world_size()) if dataset.exact_resume else None
    return build_loader(dataset, sampler, batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory)


def sample_batches(dataset, n: int, batch_size: int) -> list[dict]:
    """Up to n samples of a data set, spread over it and the same at every call, in batches."""
    samples = some_samples(dataset, n)
    return [collate(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]


def device_batches(loader: Iterable, device: torch.device, mean, std) -> Iterator[dict]:
    """Batches with uint8 views (`image`, ...) normalised to float32 on the device; on CUDA the next one is copied while one
    is used."""
    copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def move(batch: dict) -> dict:
        batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        # Features that were computed before, boxes and masks pass as they are.
        return {k: normalize(v, mean, std) if torch.is_tensor(v) and v.dtype == torch.uint8 else v for k, v in batch.items()}

    if copy_stream is None:
        for batch in loader:
            yield move(batch)
        return
    ready = None
    for batch in loader:
        with torch.cuda.stream(copy_stream):
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
