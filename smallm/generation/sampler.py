"""From logits to an id: arithmetic on an array, with randomness as an argument.

The definition that every host of a smallm model shares:

0. The logits are the model's float32 numbers. Logits of ids that are not allowed count as minus infinity. With a
   repetition penalty r other than 1, the logit x of each id that occurs among the last `repetition_window` ids of the
   seed text and the new text becomes x / r if x > 0 and x * r otherwise, once per id, in single precision with r
   rounded to single precision (Keskar et al. 2019, CTRL; as in Hugging Face transformers).
1. Ids are ranked by logit, the largest first; of equal logits the lower id comes first.
2. temperature 0 takes the first id. Otherwise weights are exp((logit - largest) / temperature), in double precision.
3. top_k keeps the first k ids; top_p keeps the shortest beginning that holds at least this fraction of the weight kept
   so far; min_p keeps the ids with at least this fraction of the first id's weight.
4. The weights kept are summed in the order of the ids. The sampler takes the first id whose cumulative weight exceeds u
   times the total, with u in [0, 1). So ranks only decide which ids are kept: two hosts whose logits differ in the last
   digits may rank two ids differently and still take the same id.

Each id uses one draw of u, also at temperature 0. u comes from `Rng`, whose draw i is a function of (seed, stream, i),
so a stream can continue anywhere. tests/golden.json holds draws and ids for hosts in other languages.
"""

import math
from operator import eq

import numpy as np

from smallm.errors import UserError
from smallm.inference.scoring import NOT_FINITE
from smallm.model_file.sampling import Sampling

MIN_TEMPERATURE = 1e-200  # a lower temperature gives the same ids, but the division could overflow


def sample(logits: np.ndarray, u: float, sampling: Sampling) -> int:
    """The id that u in [0, 1) takes from logits (V,). Raises `UserError` for a NaN and an infinite largest logit."""
    most_likely = logits.argmax()  # the first NaN, if there is one
    largest = logits.item(most_likely)
    if not math.isfinite(largest):
        raise UserError(NOT_FINITE)
    if sampling.temperature == 0:
        return int(most_likely)
    ids = _kept(logits, largest, sampling)
    weights = _weights(logits if ids is None else logits[ids], largest, sampling.temperature)
    if sampling.min_p > 0:
        weights[weights < sampling.min_p] = 0
    index = pick(weights.cumsum(), u)
    return index if ids is None else ids.item(index)


def cumulative_weights(logits: np.ndarray, sampling: Sampling) -> np.ndarray | None:
    """Cumulative weights (T, V) of logits (T, V), from which `pick` takes the same ids as `sample`.

    All rows together cost about as much as one. None if the rows have to be sampled one by one: at temperature 0, with
    top_p, with equal logits at the edge of top_k, and with logits that are not finite.
    """
    if sampling.temperature == 0 or sampling.top_p < 1:
        return None
    V, k = logits.shape[1], sampling.top_k
    ascending = np.sort(logits, axis=1)  # NaN goes to the end; faster than partitioning
    if not all(map(math.isfinite, ascending[:, -1].tolist())):
        return None
    weights = _weights(logits, ascending[:, -1:], sampling.temperature)
    if 0 < k < V:
        dropped, lowest_kept = ascending[:, V - k - 1], ascending[:, V - k]
        if any(map(eq, dropped.tolist(), lowest_kept.tolist())):
            return None
        weights[logits < lowest_kept[:, None]] = 0
    if sampling.min_p > 0:
        weights[weights < sampling.min_p] = 0
    return weights.cumsum(axis=1, out=weights)


def pick(cumulative: np.ndarray, u: float) -> int:
    """The first index whose cumulative weight (V,) exceeds u times the total, u in [0, 1)."""
    return int(cumulative.searchsorted(u * cumulative.item(-1), side="right"))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The probability of each id (V,) float64 at temperature 1. Raises `UserError` as `sample` does."""
    largest = logits.max().item()  # NaN if any logit is NaN
    if not math.isfinite(largest):
        raise UserError(NOT_FINITE)
    weights = _weights(logits, largest, 1.0)
    weights /= weights.sum()
    return weights


def log_probability(logits: np.ndarray, id: int) -> float:
    """ln of the probability of an id at temperature 1, given the model's logits (V,)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    return shifted.item(id) - math.log(np.exp(shifted).sum())


def _kept(logits: np.ndarray, largest: float, sampling: Sampling) -> np.ndarray | None:
    """The ids that top_k and top_p keep (K,), in ascending order; None = all ids.

    Compares with the lowest logit kept: `argpartition` costs as much and breaks ties by chance.
    """
    V, count = len(logits), sampling.top_k
    if sampling.top_p == 1 and not 0 < count < V:
        return None
    ascending = logits.copy()
    if sampling.top_p < 1:
        ascending.sort()
        cumulative = _weights(ascending[::-1][: count or None], largest, sampling.temperature).cumsum()
        count = int(cumulative.searchsorted(sampling.top_p * cumulative.item(-1))) + 1
    else:
        ascending.partition(V - count)
    lowest = ascending[V - count]
    ids = (logits >= lowest).nonzero()[0]
    surplus = len(ids) - count
    return ids if surplus == 0 else np.delete(ids, (logits[ids] == lowest).nonzero()[0][-surplus:])


def _weights(logits: np.ndarray, largest: float | np.ndarray, temperature: float) -> np.ndarray:
    """Weights (…, K) float64 of logits (…, K); the weight of the largest logit is 1."""
    weights = logits.astype(np.float64)
    weights -= largest
    weights /= max(temperature, MIN_TEMPERATURE)
    np.exp(weights, out=weights)
    return weights
