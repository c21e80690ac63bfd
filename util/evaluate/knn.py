"""k-nearest-neighbour classification of features, in chunks: 50,000 queries against 1.3 M images fit any machine."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest(queries: Tensor, bank: Tensor, k: int, query_chunk: int = 2048, bank_chunk: int = 65536):
    """The k most similar rows of `bank` (n, d) for each of `queries` (m, d), by cosine -> (similarity, index), (m, k).

    Never holds more than query_chunk x bank_chunk similarities (512 MB in float32).
    """
    k = min(k, len(bank))
    values, indices = [], []
    for q in queries.split(query_chunk):
        q = F.normalize(q.float(), dim=1)
        best = (
            torch.empty(len(q), 0, device=q.device),
            torch.empty(len(q), 0, dtype=torch.int64, device=q.device),
        )
        for start in range(0, len(bank), bank_chunk):
            part = F.normalize(bank[start : start + bank_chunk].to(q.device).float(), dim=1)
            found = (q @ part.t()).topk(min(k, len(part)), dim=1)
            both = torch.cat([best[0], found.values], 1), torch.cat([best[1], found.indices + start], 1)
            top = both[0].topk(min(k, both[0].shape[1]), dim=1)
            best = top.values, both[1].gather(1, top.indices)
        values.append(best[0])
        indices.append(best[1])
    return torch.cat(values), torch.cat(indices)


def knn_votes(
    similarity: Tensor, labels: Tensor, k: int, num_classes: int, temperature: float = 0.07
) -> Tensor:
    """Class scores (m, classes) of the first k neighbours, (m, >= k) by falling similarity, each weighing
    exp(similarity / temperature) (Wu et al. 2018, the protocol of DINO)."""
    weight = (
        (similarity[:, :k] - similarity[:, :1]) / temperature
    ).exp()  # relative to the nearest: no overflow
    votes = torch.zeros(len(similarity), num_classes, device=similarity.device)
    return votes.scatter_add_(1, labels[:, :k], weight)


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    ks: tuple[int, ...] = (10, 20, 100),
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """{k: number of queries whose class of most votes is right}, for features (m, d) and (n, d)."""
    similarity, index = nearest(queries, bank, max(ks))
    labels = bank_labels.to(index.device)[index]  # (m, k)
    return {
        k: (knn_votes(similarity, labels, k, num_classes, temperature).argmax(1) == query_labels).sum()
        for k in ks
    }
