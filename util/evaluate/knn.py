"""k-nearest-neighbour classification of features, in chunks: 50,000 queries against 1.3 M images fit any
machine.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = (10, 20, 100)


def nearest(
    queries: Tensor, bank: Tensor, k: int, query_chunk: int = 2048, bank_chunk: int = 65536
) -> tuple[Tensor, Tensor]:
    """Return the k rows of `bank` (n, d) with the largest cosine similarity to each of `queries` (m, d).

    Returns similarities (m, k) in falling order and indices (m, k). At most query_chunk x bank_chunk
    similarities are in memory at a time (512 MB in float32).
    """
    k = min(k, len(bank))
    chunks = [_nearest_of_chunk(chunk, bank, k, bank_chunk) for chunk in queries.split(query_chunk)]
    return torch.cat([values for values, _ in chunks]), torch.cat([indices for _, indices in chunks])


def _nearest_of_chunk(queries: Tensor, bank: Tensor, k: int, bank_chunk: int) -> tuple[Tensor, Tensor]:
    queries = F.normalize(queries.float(), dim=1)
    values = torch.empty(len(queries), 0, device=queries.device)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), bank_chunk):
        part = F.normalize(bank[start : start + bank_chunk].to(queries.device).float(), dim=1)
        best = (queries @ part.t()).topk(min(k, len(part)), dim=1)
        # The best k so far and the best of this part: the best k of all are among them.
        values = torch.cat([values, best.values], 1)
        indices = torch.cat([indices, best.indices + start], 1)
        values, order = values.topk(min(k, values.shape[1]), dim=1)
        indices = indices.gather(1, order)
    return values, indices


def knn_votes(
    similarity: Tensor, labels: Tensor, k: int, num_classes: int, temperature: float = 0.07
) -> Tensor:
    """Return class scores (m, num_classes) of the first k neighbours.

    `similarity` (m, >= k) is in falling order. Each neighbour votes for its label with exp(similarity /
    temperature) (Wu et al. 2018; the protocol of DINO).
    """
    # Relative to the nearest neighbour, so that the exponential cannot overflow.
    weight = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()  # (m, k)
    votes = torch.zeros(len(similarity), num_classes, device=similarity.device)
    return votes.scatter_add_(1, labels[:, :k], weight)


def knn_correct(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    ks: tuple[int, ...] = NEIGHBOURS,
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """Return {k: (m,), whether each query is classified correctly}, for features (m, d) and a bank (n, d).

    A k of more than n takes all n.
    """
    similarity, index = nearest(queries, bank, max(ks))
    labels = bank_labels.to(index.device)[index]  # (m, k)
    correct = {}
    for k in ks:
        votes = knn_votes(similarity, labels, k, num_classes, temperature)
        correct[k] = votes.argmax(1) == query_labels  # (m,)
    return correct
