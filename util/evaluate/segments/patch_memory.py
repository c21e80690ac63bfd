"""In-context retrieval: patches are labelled by their nearest patches in a memory (Balazevic et al. 2023).

Shapes: B images, (H, W) pixels, (h, w) patches of an image, m queries, d channels of a feature, K classes.
"""

import os
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from util import dist
from util.evaluate.knn import nearest
from util.files.names import printable

# Rows of the memory that are moved or sent to other ranks at a time.
_ROWS = 65536
# Queries, and rows of the memory, that are compared at a time: similarities of 256 MB. A memory in a file is
# read once for each chunk of queries, so this one is large.
_QUERIES = 8192
_COMPARED = 8192
# Bytes of the memory that are put in order at a time.
_MOVED_BYTES = 256 * 2**20
# Bytes of the neighbours' labels that are in memory at a time.
_LABEL_BYTES = 128 * 2**20


class PatchMemory:
    """A random sample of at most `capacity` patches, features and soft labels, and a search among them.

    Each patch of the training set has a number. A hash of the seed and this number is the patch's rank in the
    draw, and the patches with the lowest ranks stay. So the sample depends on the seed and on the numbers
    only: not on the order of the patches, nor on how they are spread over processes.

    Features are normalised to length 1. With `half` they are stored in float16: 10 M x 384 values are 7.7 GB.
    Labels are stored as `label_dtype`: float16 holds the shares of 16x16 pixels exactly, and uint8 takes half
    of the memory. Room for an eighth more than `capacity` is taken at once. It is on the device, or in the
    file `path`, which is overwritten, belongs to one process, and is the caller's to delete.

    Raises ValueError if a value is out of range, and if there is no room for the file.
    """

    # Subclasses may keep features as they are.
    unit_length = True

    def __init__(
        self,
        dim: int,
        classes: int,
        capacity: int,
        device: torch.device,
        path: str | None = None,
        seed: int = 0,
        half: bool = True,
        label_dtype: torch.dtype = torch.float16,
    ):
        if capacity < 1:
            raise ValueError(f"`capacity` must be at least 1, found {capacity}")
        if label_dtype not in (torch.float16, torch.float32, torch.uint8):
            raise ValueError(f"`label_dtype` is float16, float32 or uint8, found {label_dtype}")
        self.capacity = capacity
        self.seed = seed
        self.device = device
        # Patches beyond the capacity wait in spare rows, so that not every batch sorts the whole sample.
        rows = capacity + max(capacity // 8, 1024)
        dtype = torch.float32
        if half:
            dtype = torch.float16
        shapes = [((rows, dim), dtype), ((rows, classes), label_dtype)]
        if path is None:
            self._stored = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        else:
            self._stored = _mapped(path, shapes)
        self._ranks = torch.empty(rows, dtype=torch.int64)
        self._used = 0
        # Patches with a higher rank are not in the sample.
        self._highest = torch.iinfo(torch.int64).max

    def __len__(self) -> int:
        return min(self._used, self.capacity)

    @property
    def features(self) -> Tensor:
        """The features of the sample (n, d), of length 1 but for rounding, where they are stored."""
        self._prune()
        return self._stored[0][: self._used]

    @property
    def labels(self) -> Tensor:
        """The soft labels of the sample (n, K), as they are stored: uint8 counts in 255ths."""
        self._prune()
        return self._stored[1][: self._used]

    def add(self, features: Tensor, labels: Tensor, numbers: Tensor) -> None:
        """Offer patches: features (m, d), soft labels (m, K) with values in [0, 1], numbers (m,) int64.

        All patches of the training set, and of all passes over it, have different numbers, also on different
        ranks. Patches without labels (all zero), whose pixels are all ignored, are left out.
        """
        ranks = draw_ranks(self.seed, numbers)  # (m,)
        offered = (labels > 0).any(1).cpu() & (ranks <= self._highest)
        spare = len(self._ranks) - self.capacity
        for rows in offered.nonzero().flatten().split(spare):
            if self._used + len(rows) > len(self._ranks):
                self._prune()
            new = slice(self._used, self._used + len(rows))
            parts = [part[rows.to(part.device)].float() for part in (features, labels)]
            if self.unit_length:
                parts[0] = F.normalize(parts[0], dim=1)
            if self._stored[1].dtype == torch.uint8:
                parts[1] = (parts[1] * 255).round()
            for stored, part in zip(self._stored, parts):
                stored[new] = part.to(stored)
            self._ranks[new] = ranks[rows]
            self._used = new.stop

    def _prune(self) -> None:
        """Keep the `capacity` patches with the lowest ranks."""
        if self._used <= self.capacity:
            return
        best = self._ranks[: self._used].topk(self.capacity, largest=False, sorted=False)
        staying = torch.zeros(self._used, dtype=torch.bool)
        staying[best.indices] = True
        self._highest = int(best.values.max())
        self._keep(staying)

    def _keep(self, staying: Tensor) -> None:
        """Keep some of the patches, (used,) bool, in the first rows: the last ones move to free places."""
        count = int(staying.sum())
        free = (~staying[:count]).nonzero().flatten()
        movers = staying[count:].nonzero().flatten() + count
        for target, source in zip(free.split(_ROWS), movers.split(_ROWS), strict=True):
            for stored in (*self._stored, self._ranks):
                stored[target.to(stored.device)] = stored[source.to(stored.device)]
        self._used = count

    def gather(self) -> None:
        """Give all ranks the sample of the patches of all ranks, which must call this together, and once.

        The sample is then in the order of the draw: of patches that are equally near to a query, which ones
        count does not depend on how they were spread.
        """
        self._prune()
        counts = dist.gather_objects(self._used)
        if len(counts) > 1:
            self._receive_all(counts)
        order = self._ranks[: self._used].argsort()
        self._ranks[: self._used] = self._ranks[order]
        for stored in self._stored:
            moved = order.to(stored.device)
            # Some columns at a time, so that the copy is small.
            columns = max(1, _MOVED_BYTES // (max(1, self._used) * stored.itemsize))
            for part in stored[: self._used].split(columns, dim=1):
                part.copy_(part[moved])

    def _receive_all(self, counts: list[int]) -> None:
        """Make the rows of this rank those of the sample of all ranks, which have `counts` patches."""
        if sum(counts) > self.capacity:
            self._highest = self._highest_of_all()
            self._keep(self._ranks[: self._used] <= self._highest)
        counts = dist.gather_objects(self._used)
        before = sum(counts[: dist.rank()])
        own = slice(before, before + self._used)
        self._shift(before)
        self._used = sum(counts)
        for start in range(0, self._used, _ROWS):
            rows = slice(start, min(start + _ROWS, self._used))
            for stored in (*self._stored, self._ranks):
                stored[rows] = self._received(stored, rows, own).to(stored)

    def _highest_of_all(self) -> int:
        """The highest rank in the draw of the sample of all processes, by halving the range of ranks."""
        own = self._ranks[: self._used].sort().values
        low = 0
        high = torch.iinfo(torch.int64).max
        while low < high:
            middle = (low + high) // 2
            below = int(torch.searchsorted(own, middle, right=True))
            if sum(dist.gather_objects(below)) >= self.capacity:
                high = middle
            else:
                low = middle + 1
        return low

    def _shift(self, by: int) -> None:
        """Move all patches to rows that are `by` further on, the last ones first."""
        for stop in range(self._used, 0, -_ROWS):
            rows = slice(max(0, stop - _ROWS), stop)
            for stored in (*self._stored, self._ranks):
                stored[rows.start + by : stop + by] = stored[rows].clone()

    def _received(self, stored: Tensor, rows: slice, own: slice) -> Tensor:
        """Rows of the whole sample, of which each rank has its own."""
        # A sum of one number and zeros is exact. Not all backends add float16 or uint8.
        dtype = torch.float32
        if stored.dtype == torch.int64:
            dtype = torch.int64
        part = torch.zeros(rows.stop - rows.start, *stored.shape[1:], dtype=dtype, device=self.device)
        first = max(rows.start, own.start)
        last = min(rows.stop, own.stop)
        if first < last:
            part[first - rows.start : last - rows.start] = stored[first:last].to(part)
        return dist.sum_over_ranks(part)

    @torch.no_grad()
    def scores(self, queries: Tensor, k: int = 30, temperature: float = 0.02) -> Tensor:
        """Return class scores (m, K) in float32 of queries (m, d), on the device.

        The labels of the k patches with the largest cosine similarity are averaged, with the softmax of
        similarity / temperature as weights. The search is exact. Raises ValueError if the memory is empty.
        """
        features = self.features
        labels = self.labels
        if not len(features):
            raise ValueError("the memory has no patches: all pixels of the training masks are ignored")
        queries = queries.to(self.device)
        # Autocast would round the similarities.
        with torch.autocast(self.device.type, enabled=False):
            similarity, index = nearest(queries, features, k, _QUERIES, _COMPARED)  # (m, k) each
            weights = (similarity / temperature).softmax(1)  # (m, k)
            rows = max(1, _LABEL_BYTES // (4 * weights.shape[1] * labels.shape[1]))
            scores = []
            for weight, neighbours in zip(weights.split(rows), index.split(rows)):
                found = labels[neighbours.to(labels.device)].to(self.device, torch.float32)  # (rows, k, K)
                scores.append((weight[:, None] @ found)[:, 0])
        summed = torch.cat(scores)
        if labels.dtype == torch.uint8:
            summed /= 255
        return summed


def _mapped(path: str, shapes: list[tuple[tuple[int, int], torch.dtype]]) -> list[Tensor]:
    """Tensors (rows, columns) in a new file, which the system reads and writes in parts."""
    sizes = [shape[0] * shape[1] * dtype.itemsize for shape, dtype in shapes]
    try:
        with open(path, "wb") as f:
            # With a file full of holes, a full disk would end the process without a message.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, sum(sizes))
            else:
                f.truncate(sum(sizes))
    except OSError as error:
        with suppress(OSError):
            os.remove(path)
        raise ValueError(
            f"the memory of {sum(sizes) / 1e9:.1f} GB cannot be stored in {printable(path)} "
            f"({error.strerror}): choose another file, or a smaller `capacity`"
        ) from None
    found = []
    start = 0
    for (shape, dtype), size in zip(shapes, sizes):
        name = str(dtype).removeprefix("torch.")
        array = np.memmap(path, dtype=name, mode="r+", offset=start, shape=shape)
        found.append(torch.from_numpy(array))
        start += size
    return found


def draw_ranks(seed: int, numbers: Tensor) -> Tensor:
    """Return the rank in the draw of each number (m,): `seeding.sample_seed(seed, 0, number)`."""
    state = np.zeros(1, dtype=np.uint64)
    increment = np.uint64(0x9E3779B97F4A7C15)
    multipliers = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
    # Arrays of unsigned integers wrap around.
    start = np.array([seed & 0xFFFFFFFFFFFFFFFF, 0], np.uint64)
    for values in (start[:1], start[1:], numbers.cpu().numpy().astype(np.uint64)):
        state = (state ^ values) + increment
        state = (state ^ state >> np.uint64(30)) * multipliers[0]
        state = (state ^ state >> np.uint64(27)) * multipliers[1]
        state = state ^ state >> np.uint64(31)
    return torch.from_numpy((state >> np.uint64(1)).astype(np.int64))


def soft_labels(mask: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """Return the share of each class among the counted pixels of each patch, (B, h, w, K) float32.

    `mask` (B, H, W) has classes or -1 for ignored pixels. Patches of which all pixels are ignored get zeros.
    Raises ValueError if the grid does not divide the mask, and for classes that are out of range.
    """
    B, H, W = mask.shape
    h, w = grid
    if H % h or W % w:
        raise ValueError(
            f"a grid of {h}x{w} patches does not divide masks of {H}x{W} pixels: resize the masks"
        )
    low, high = (int(value) for value in mask.aminmax())
    if low < -1 or high >= classes:
        raise ValueError(
            f"the mask has values from {low} to {high}, which are not all -1 or one of the {classes} "
            "classes: check the number of classes, and which value of the masks is ignored"
        )
    cells = mask.reshape(B, h, H // h, w, W // w).transpose(2, 3).flatten(3).long()  # (B, h, w, pixels)
    counts = torch.zeros(B, h, w, classes, device=mask.device)
    counts.scatter_add_(3, cells.clamp(min=0), (cells >= 0).float())
    return counts / counts.sum(3, keepdim=True).clamp(min=1)


def patch_labels(mask: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """Return the most frequent class of each patch (B, h, w) int64, of equal ones the first; -1 without any.

    Takes masks (B, H, W), and raises ValueError, as `soft_labels` does.
    """
    shares = soft_labels(mask, grid, classes)  # (B, h, w, K)
    best = shares.max(3)
    return torch.where(best.values > 0, shares.argmax(3), -1)
