"""Seeds of samples: everything random about a sample follows from (seed, epoch, index)."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import get_worker_info

# Lent to numpy.random while a sample is made; seeded anew for each one.
_numpy_bits = np.random.MT19937(0)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of one sample in [0, 2**63): splitmix64 (Steele et al. 2014) over the three numbers."""
    state = 0
    for value in (seed, epoch, index):
        state = (state ^ value) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def epoch_and_index(item: int | tuple[int, int]) -> tuple[int, int]:
    """Return (epoch, index) of a sampler's item. A plain index belongs to epoch 0."""
    if isinstance(item, tuple):
        return item
    return 0, item


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed the global generators of torch, `random` and numpy for one sample.

    In the main process they continue afterwards as if nothing had happened.
    """
    if get_worker_info() is not None:
        # A loader's worker draws for samples only, and restoring its generators would take longer than this.
        _seed_all(key)
        yield
        return
    torch_state = torch.default_generator.get_state()
    python_state = random.getstate()
    # Exchanging numpy's bit generator takes 2 us; saving and restoring its state would take 300 us.
    numpy_bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
    np.random.set_bit_generator(_numpy_bits)  # type: ignore[attr-defined]
    try:
        _seed_all(key)
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        np.random.set_bit_generator(numpy_bits)  # type: ignore[attr-defined]


def _seed_all(key: int) -> None:
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # numpy takes 32 bits
