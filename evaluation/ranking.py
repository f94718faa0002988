"""How good a ranking is: average precision and precision at k, as the revisited benchmark has them.

For a query, images are positive, junk (taken out of the ranking) or negative. The i-th positive at
rank r, both from 0, has the precision i / r before it (1 at r = 0) and (i + 1) / (r + 1) with it;
average precision is the mean over all positives of the mean of these two.
"""

import torch
import torch.nn.functional as F

QUERIES = 256  # ranked at once


def ranks_of(order, positives, junk=()):
    """Return the ranks, from 0, of the positives among what is not junk: a sorted list.

    order: the indices of all images, the nearest first.
    """
    known = torch.zeros(len(order), dtype=torch.long)
    known[torch.as_tensor(list(junk), dtype=torch.long)] = -1
    known[torch.as_tensor(list(positives), dtype=torch.long)] = 1
    ranked = known[order]
    return (ranked[ranked >= 0] == 1).nonzero()[:, 0].tolist()


def average_precision(ranks):
    """The area under precision over recall, by the trapezoidal rule, of the positives' ranks."""
    total = 0.0
    for i, rank in enumerate(ranks):
        before = i / rank if rank else 1.0
        total += (before + (i + 1) / (rank + 1)) / 2
    return total / len(ranks)


def precision_at(ranks, k):
    """The share of positives among the first k, or up to the last positive if that comes before."""
    k = min(k, ranks[-1] + 1)
    return sum(rank < k for rank in ranks) / k


def rankings(queries, database):
    """Yield for each query the indices of the database by cosine similarity, the nearest first.

    queries [m, d], database [n, d]: features, normalised here. Of equally near ones the lower
    index comes first.
    """
    queries, database = F.normalize(queries, dim=-1), F.normalize(database, dim=-1)
    for part in queries.split(QUERIES):
        yield from (part @ database.T).argsort(dim=-1, descending=True, stable=True).cpu()


def mean_average_precision(queries, database, positives):
    """Return mAP in per cent; positives: for each query a list of indices.

    A query without a positive is left out. ValueError: that is all of them.
    """
    values = []
    for i, order in enumerate(rankings(queries, database)):
        if positives[i]:
            values.append(average_precision(ranks_of(order, positives[i])))
    if not values:
        raise ValueError("no query has a positive")
    return 100 * sum(values) / len(values)
