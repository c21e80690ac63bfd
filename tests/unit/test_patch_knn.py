"""In-context retrieval against brute force: the sample, the search, and the labels of patches."""

import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from util.data.seeding import sample_seed
from util.evaluate.position import position_only
from util.evaluate.segments import patch_memory as patch_knn
from util.evaluate.segments.patch_memory import PatchMemory, draw_ranks, patch_labels, soft_labels
from util.evaluate.segments.retrieval import Neighbours, mean_labels, scores_of

CPU = torch.device("cpu")
DIM, K = 16, 5


def patches(n: int = 3000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, soft labels (each tenth patch has none) and numbers that are far apart."""
    g = torch.Generator().manual_seed(1)
    features = torch.randn(n, DIM, generator=g) * torch.rand(n, 1, generator=g)
    labels = torch.randint(0, 257, (n, K), generator=g) / 256
    labels[::10] = 0
    return features, labels, 7 * torch.arange(n) + 2**40


def filled(capacity: int, order: torch.Tensor | None = None, batch: int = 3000, **options) -> PatchMemory:
    memory = PatchMemory(DIM, K, capacity, CPU, **options)
    features, labels, numbers = patches()
    if order is None:
        order = torch.arange(len(numbers))
    for rows in order.split(batch):
        memory.add(features[rows], labels[rows], numbers[rows])
    return memory


def sample(capacity: int, seed: int = 0) -> torch.Tensor:
    """The rows of `patches` that are in the sample, by plain sorting."""
    _, labels, numbers = patches()
    known = labels.any(1).nonzero().flatten().tolist()
    return torch.tensor(sorted(known, key=lambda i: sample_seed(seed, 0, int(numbers[i])))[:capacity])


def rows_sorted(x: torch.Tensor) -> list[tuple]:
    return sorted(map(tuple, x.tolist()))


# --- the sample ---


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 3])
def test_ranks_are_those_of_samples(seed):
    numbers = torch.tensor([0, 1, 2, 1000, 2**40, 2**63 - 1])
    assert draw_ranks(seed, numbers).tolist() == [sample_seed(seed, 0, int(n)) for n in numbers]


@pytest.mark.parametrize("capacity", [1, 100, 1000, 2700, 5000])
@pytest.mark.parametrize("batch", [3000, 170, 1])
def test_the_sample_depends_on_the_seed_only(capacity, batch, monkeypatch):
    monkeypatch.setattr(patch_knn, "_ROWS", 64)
    if batch == 1 and capacity > 100:
        pytest.skip("slow, and the same code")
    features, labels, _ = patches()
    chosen = sample(capacity)
    assert len(chosen) == min(capacity, 2700)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(5))
    for memory in (filled(capacity, batch=batch), filled(capacity, order, batch)):
        assert len(memory) == len(chosen) == len(memory.features) == len(memory.labels)
        assert memory.features.dtype == memory.labels.dtype == torch.float16
        expected = F.normalize(features[chosen], dim=1).half()
        both = torch.cat([memory.features, memory.labels], 1)
        assert rows_sorted(both) == rows_sorted(torch.cat([expected, labels[chosen].half()], 1))
    if capacity < 2700:
        other = filled(capacity, seed=1)
        assert rows_sorted(other.features) != rows_sorted(memory.features)


def test_the_sample_is_spread_evenly():
    """900 of 2,700: in each third of the patches about 300, with a standard deviation of 11.5."""
    thirds = Counter((sample(900, seed=9) // 1000).tolist())
    assert all(abs(count - 300) < 50 for count in thirds.values()), thirds


RANK = """
import torch, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/unit"]
from test_patch_knn import patches, DIM, K
from util import dist
from util.evaluate.segments import patch_memory as patch_knn
patch_knn._ROWS = 64
dist.init("cpu")
features, labels, numbers = patches()
for capacity in (100, 1000, 2700, 5000):
    memory = patch_knn.PatchMemory(DIM, K, capacity, torch.device("cpu"), path=f"{path}.map{{dist.rank()}}")
    # Shares of 1 to 5; the last rank has none.
    rows = torch.arange(3000) % 6 > 4 if dist.rank() == 0 else torch.arange(3000) % 6 <= 4
    if dist.rank() == 2:
        rows[:] = False
    memory.add(features[rows], labels[rows], numbers[rows])
    memory.gather()
    found = memory.features, memory.labels, memory.scores(features[:50])
    torch.save(found, f"{path}.{{capacity}}.{{dist.rank()}}")
dist.shutdown()
"""


@pytest.mark.slow
def test_ranks_share_the_sample_of_one_process(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = Path(__file__).parents[2]
    code = RANK.format(tests=str(root / "tests"), path=str(tmp_path / "memory"))
    environment = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=root, env=os.environ | environment | {"RANK": str(r)}
        )
        for r in range(3)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0, 0]
    for capacity in (100, 1000, 2700, 5000):
        alone = filled(capacity)
        found = [torch.load(tmp_path / f"memory.{capacity}.{r}") for r in range(3)]
        for features, labels, scores in found:
            both = torch.cat([features, labels], 1)
            assert rows_sorted(both) == rows_sorted(torch.cat([alone.features, alone.labels], 1))
            assert torch.allclose(scores, alone.scores(patches()[0][:50]), atol=1e-5)
            # The same rows in the same order on all ranks.
            assert torch.equal(features, found[0][0]) and torch.equal(scores, found[0][2])


# --- the search ---


def brute_force(memory: PatchMemory, queries: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """The same in float64, one query at a time."""
    features, labels = memory.features.double(), memory.labels.double()
    if memory.labels.dtype == torch.uint8:
        labels = labels / 255
    rows = []
    for query in queries.double():
        similarity = [float(query @ f / query.norm() / f.norm()) for f in features]
        best = sorted(range(len(features)), key=lambda i: -similarity[i])[:k]
        weights = [torch.tensor(similarity[i] / temperature).exp() for i in best]
        rows.append(sum(weight * labels[i] for weight, i in zip(weights, best)) / sum(weights))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options", [{}, {"half": False}, {"label_dtype": torch.uint8}, {"label_dtype": torch.float32}]
)
@pytest.mark.parametrize("k, temperature", [(30, 0.02), (1, 0.02), (5, 1.0), (1000, 0.1)])
def test_scores_are_those_of_brute_force(options, k, temperature, tmp_path, monkeypatch):
    queries = torch.randn(7, DIM)
    memory = filled(400, **options)
    scores = memory.scores(queries, k, temperature)
    assert scores.shape == (7, K) and scores.dtype == torch.float32
    assert torch.allclose(scores.double(), brute_force(memory, queries, k, temperature), atol=1e-4)
    # In small chunks, from a file, and under autocast.
    monkeypatch.setattr(patch_knn, "_QUERIES", 3)
    monkeypatch.setattr(patch_knn, "_COMPARED", 37)
    monkeypatch.setattr(patch_knn, "_LABEL_BYTES", 1)
    stored = filled(400, batch=50, path=str(tmp_path / "memory"), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(stored.scores(queries, k, temperature), scores, atol=1e-4)
    assert (tmp_path / "memory").stat().st_size >= stored.features.nbytes + stored.labels.nbytes


def test_defaults_are_those_of_the_paper():
    memory = filled(400)
    queries = torch.randn(3, DIM)
    assert torch.equal(memory.scores(queries), memory.scores(queries, k=30, temperature=0.02))


def test_memories_that_cannot_be_are_errors(tmp_path):
    with pytest.raises(ValueError, match="has no patches"):
        PatchMemory(DIM, K, 10, CPU).scores(torch.zeros(1, DIM))
    with pytest.raises(ValueError, match="`capacity`"):
        PatchMemory(DIM, K, 0, CPU)
    with pytest.raises(ValueError, match="`label_dtype`"):
        PatchMemory(DIM, K, 10, CPU, label_dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cannot be stored in .*missing"):
        PatchMemory(DIM, K, 10, CPU, path=str(tmp_path / "missing" / "memory"))
    # More than any disk has.
    with pytest.raises(ValueError, match="a smaller `capacity`"):
        PatchMemory(2**20, K, 2**32, CPU, path=str(tmp_path / "memory"))
    assert not list(tmp_path.iterdir())


# --- labels of patches ---


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_labels_of_patches_are_counted(dtype):
    g = torch.Generator().manual_seed(2)
    mask = torch.randint(-1, 3, (2, 12, 10), generator=g).to(dtype)
    mask[0, :4, :5] = -1
    # Two classes with as many pixels each.
    mask[1, :4, :5] = torch.tensor([2, 1]).repeat(10).reshape(4, 5).to(dtype)
    shares = soft_labels(mask, (3, 2), 4)
    majority = patch_labels(mask, (3, 2), 4)
    assert shares.shape == (2, 3, 2, 4) and shares.dtype == torch.float32 and majority.dtype == torch.int64
    for b in range(2):
        for y in range(3):
            for x in range(2):
                pixels = mask[b, 4 * y : 4 * y + 4, 5 * x : 5 * x + 5].flatten().tolist()
                counted = [p for p in pixels if p >= 0]
                expected = [counted.count(c) / max(len(counted), 1) for c in range(4)]
                assert shares[b, y, x].tolist() == pytest.approx(expected)
                best = expected.index(max(expected)) if counted else -1
                assert majority[b, y, x] == best
    assert majority[0, 0, 0] == -1 and majority[1, 0, 0] == 1


def test_masks_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="3x2 patches does not divide masks of 12x9"):
        soft_labels(torch.zeros(1, 12, 9, dtype=torch.int64), (3, 2), 4)
    for value in (4, -2):
        mask = torch.zeros(1, 12, 10, dtype=torch.int64)
        mask[0, 3, 3] = value
        with pytest.raises(ValueError, match="one of the 4 classes"):
            soft_labels(mask, (3, 2), 4)


def test_position_alone_lets_all_patches_of_a_cell_vote():
    """The first k of equally near patches would be those of a few images."""
    draws = torch.Generator().manual_seed(0)
    images, cells = 50, 6
    labels = torch.rand(images, cells, K, generator=draws)
    labels /= labels.sum(2, keepdim=True)
    labels[:, 5] = 0  # ignored in all images
    memory = PatchMemory(cells, K, images * cells, torch.device("cpu"), label_dtype=torch.float32)
    for i in range(images):
        memory.add(torch.eye(cells), labels[i], torch.arange(cells) + i * cells)
    assert torch.allclose(mean_labels(memory), labels.mean(0), atol=1e-6)
    found = scores_of(Positions(), [memory], Neighbours(3, 0.02, 100))(torch.zeros(2, 3, 8, 12))
    expected = labels.mean(0).t().unflatten(1, (2, 3)).expand(2, K, 2, 3)
    assert torch.allclose(found, expected, atol=1e-6)


class Positions:
    """Sources of features that are the one-hot cells of a grid of 2 x 3."""

    names = ("position",)

    def __call__(self, images):
        return position_only(len(images), (2, 3))

    def widths(self):
        return [6]
