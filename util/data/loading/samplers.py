"""Which samples are loaded, and in which order. A sample is named by `(epoch, index)`."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.utils.data import Sampler

from util.data.seeding import sample_seed
from util.files.names import counted


class EpochSampler(Sampler):
    """One rank's `(epoch, index)` pairs, one epoch at a time.

    `set_position` chooses the epoch and the batch to start with.

    An epoch's permutation p follows from (seed, epoch). The m-th micro-batch of all ranks together is p[m *
    G:(m + 1) * G] with G = batch_size * world_size, and rank r has its r-th part. So for equal G the batches
    do not depend on the number of ranks. A remainder shorter than G is dropped.

    Raises ValueError if n is smaller than G.
    """

    def __init__(
        self,
        n: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ):
        self.n = n
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.batches_per_epoch = n // (batch_size * world_size)
        # Otherwise a run would train on nothing.
        if self.batches_per_epoch == 0:
            remedy = f"lower `batch_size` to {n // world_size}"
            if n < world_size:
                remedy = (
                    f"start {counted(n, 'process', 'processes')} with `batch_size` 1, or give more images"
                )
            batch = f"`batch_size` {batch_size}"
            if world_size > 1:
                batch += f" x {world_size} processes = {batch_size * world_size}"
            raise ValueError(f"{counted(n, 'image')} cannot fill one batch, {batch}: {remedy}")
        self.set_position(0)

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Let the next iteration be `epoch`, from micro-batch `start_batch` of this rank on."""
        assert 0 <= start_batch <= self.batches_per_epoch, (start_batch, self.batches_per_epoch)
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        return (self.batches_per_epoch - self.start_batch) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch  # `set_position` may be called while the last batches are still loaded
        this_rank = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for m in range(self.start_batch, self.batches_per_epoch):
            for i in self.global_batch(epoch, m)[this_rank].tolist():
                yield epoch, i

    def global_batch(self, epoch: int, m: int) -> torch.Tensor:
        """Return the indices of all ranks' m-th micro-batch, int64 (G,), in rank order."""
        size = self.batch_size * self.world_size
        # One global order, which ranks divide: it must not depend on the rank.
        return _permutation(self.n, self.seed, epoch, self.shuffle)[m * size : (m + 1) * size]


# All batches of an epoch share one permutation.
@lru_cache(maxsize=1)
def _permutation(n: int, seed: int, epoch: int, shuffle: bool) -> torch.Tensor:
    if not shuffle:
        return torch.arange(n)
    # No sample has index -1, so this seed is not a sample's.
    return torch.randperm(n, generator=torch.Generator().manual_seed(sample_seed(seed, epoch, -1)))


class EvalSampler(Sampler):
    """Every index exactly once over all ranks: rank, rank + world_size, ...

    The shares of two ranks differ by one sample at most.
    """

    def __init__(self, n: int, rank: int = 0, world_size: int = 1):
        # No padding: a repeated image would count twice in the accuracy.
        self.indices = range(rank, n, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
