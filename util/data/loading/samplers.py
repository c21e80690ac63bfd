"""Which samples, in which order: `(epoch, index)`, from which everything random about a sample follows."""

from functools import lru_cache

import torch
from torch.utils.data import Sampler


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed in [0, 2**63) of one sample: splitmix64 over the three numbers."""
    state = 0
    for value in (seed, epoch, index):
        state = (state ^ value) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class EpochSampler(Sampler):
    """One rank's `(epoch, index)` pairs of one epoch at a time; which epoch, and from where, `set_position` says.

    An epoch's permutation p follows from (seed, epoch). The m-th micro-batch of all ranks together is
    p[m * G:(m + 1) * G], G = batch_size * world_size, and rank r has its r-th part; so for equal G the batches do not
    depend on the number of ranks. A tail shorter than G is dropped.
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
        self.n, self.batch_size, self.rank, self.world_size = n, batch_size, rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.batches_per_epoch = n // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"{n} images are fewer than one batch: --batch_size {batch_size} x {world_size} ranks = "
                f"{batch_size * world_size}. Lower --batch_size to {n // world_size} or less."
            )
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
        return _permutation(self.n, self.seed, epoch, self.shuffle)[m * size : (m + 1) * size]


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
