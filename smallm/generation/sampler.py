"""From logits to an id: arithmetic on an array, with randomness as an argument.

The definition that every host of a smallm model shares:

0. The logits are the model's float32 numbers. Of ids that are not permitted they count as minus infinity. With a
   repetition penalty r other than 1, the logit x of each id that occurs among the last `repetition_window` ids of the
   seed and the new text becomes x / r if x > 0 and x * r otherwise, once however often it occurs, in single precision
   with r rounded to single (Keskar et al. 2019, CTRL, as Hugging Face has it).
1. Ids are ranked by logit, the largest first; of equal logits the lower id stands first.
2. temperature 0 takes the first. Otherwise weights are exp((logit - largest) / temperature), in double precision.
3. top_k keeps the first k ids, top_p the shortest beginning that holds at least that share of the kept weight,
   min_p the ids with at least that share of the first one's weight.
4. The weights kept are added up in the order of the ids. The id taken is the first whose cumulative weight exceeds u
   times the last one, with u in [0, 1). So ranks decide only which ids are kept: hosts whose logits differ in the last
   digits may rank two ids otherwise and still take the same.

Each id takes one draw of u, at temperature 0 too. u comes from `Rng`, whose draw i is a function of (seed, stream, i),
so a stream can be taken up again anywhere. tests/golden.json has draws and ids for hosts in other languages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from operator import eq

import numpy as np

from smallm.errors import UserError

MIN_TEMPERATURE = 1e-200  # below it nothing changes any more, but a division could overflow
NOT_FINITE = "the model's logits are not finite: its weights are broken; train it again"


@dataclass(frozen=True)
class Sampling:
    """How to choose the next id. Raises `UserError` for values out of range."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        t, k, p, m = (getattr(self, f.name) for f in fields(self))
        check(isinstance(t, Real) and 0 <= t < math.inf, "temperature", t, "0 or more (0 = the likeliest character)")
        check(isinstance(k, Integral) and k >= 0, "top_k", k, "a whole number, 0 or more (0 = all ids)")
        check(isinstance(p, Real) and 0 < p <= 1, "top_p", p, "above 0 and at most 1 (1 = all ids)")
        check(isinstance(m, Real) and 0 <= m <= 1, "min_p", m, "from 0 to 1 (0 = all ids)")

    @classmethod
    def resolve(cls, given: Mapping[str, float | None], defaults: Mapping[str, float]) -> "Sampling":
        """The values given, and where one is None the model's own default."""
        chosen = {f.name: given.get(f.name) for f in fields(cls)}
        return cls(**{k: defaults.get(k, getattr(cls, k)) if v is None else v for k, v in chosen.items()})


def ranked(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """logits (V,) -> the ids that may be taken, likeliest first (K,), and their weights (K,) float64, the first 1.

    Raises `UserError` if a logit is NaN or the largest is infinite.
    """
    order = np.argsort(-logits, kind="stable")  # NaN goes to the end
    weights = _weights(-logits[order], sampling)
    return order[: len(weights)], weights


def sample(logits: np.ndarray, u: float, sampling: Sampling) -> int:
    """logits (V,) and u in [0, 1) -> the id taken. Raises `UserError` as `ranked` does."""
    likeliest = logits.argmax()  # the first NaN, if there is one
    largest = logits.item(likeliest)
    if not math.isfinite(largest):
        raise UserError(NOT_FINITE)
    if sampling.temperature == 0:
        return int(likeliest)
    ids = _kept(logits, largest, sampling)
    weights = _weigh(logits if ids is None else logits[ids], largest, sampling.temperature)
    if sampling.min_p > 0:
        weights[weights < sampling.min_p] = 0
    place = pick(weights.cumsum(), u)
    return place if ids is None else ids.item(place)


def weigh(logits: np.ndarray, sampling: Sampling) -> np.ndarray | None:
    """logits (T, V) -> cumulative weights (T, V), by which `pick` takes the same ids as `sample`, for the price of one.

    None where rows have to be taken one by one: at temperature 0, with top_p, for equal logits at the edge of top_k,
    and for those that are not finite.
    """
    V, k = logits.shape[1], sampling.top_k
    ascending = np.sort(logits, axis=1)  # NaN goes to the end; quicker than to partition
    if sampling.temperature == 0 or sampling.top_p < 1 or not all(map(math.isfinite, ascending[:, -1].tolist())):
        return None
    weights = _weigh(logits, ascending[:, -1:], sampling.temperature)
    if 0 < k < V:
        out, least = ascending[:, V - k - 1], ascending[:, V - k]
        if any(map(eq, out.tolist(), least.tolist())):
            return None
        weights[logits < least[:, None]] = 0
    if sampling.min_p > 0:
        weights[weights < sampling.min_p] = 0
    return weights.cumsum(axis=1, out=weights)


def pick(cumulative: np.ndarray, u: float) -> int:
    """cumulative weights (V,) and u in [0, 1) -> the place of the first that exceeds u times the last."""
    return int(cumulative.searchsorted(u * cumulative.item(-1), side="right"))


def _kept(logits: np.ndarray, largest: float, sampling: Sampling) -> np.ndarray | None:
    """logits (V,) and the largest -> the ids that top_k and top_p keep (K,), in ascending order; None = all.

    By the last value kept: to partition ids (`argpartition`) costs as much and leaves ties to chance, to weigh all ids
    and mask the weights a fifth more.
    """
    V, count = len(logits), sampling.top_k
    if sampling.top_p == 1 and not 0 < count < V:
        return None
    ascending = logits.copy()
    if sampling.top_p < 1:
        ascending.sort()
        cumulative = _weigh(ascending[::-1][: count or None], largest, sampling.temperature).cumsum()
        count = int(cumulative.searchsorted(sampling.top_p * cumulative.item(-1))) + 1
    else:
        ascending.partition(V - count)
    least = ascending[V - count]
    ids = (logits >= least).nonzero()[0]
    surplus = len(ids) - count
    return ids if surplus == 0 else np.delete(ids, (logits[ids] == least).nonzero()[0][-surplus:])


def _weights(descending: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The negated logits (V,) in ascending order -> weights (K,) float64 of those that may be taken, the first 1."""
    first = descending.item(0)
    if not math.isfinite(first) or math.isnan(descending.item(-1)):
        raise UserError(NOT_FINITE)
    kept = descending[: 1 if sampling.temperature == 0 else sampling.top_k or None]
    weights = _weigh(-kept, -first, sampling.temperature)
    keep = len(weights)
    if sampling.top_p < 1:
        cumulative = weights.cumsum()
        keep = int(cumulative.searchsorted(sampling.top_p * cumulative[-1])) + 1
    if sampling.min_p > 0:
        keep = min(keep, int((-weights).searchsorted(-sampling.min_p, side="right")))
    return weights[:keep]


def _weigh(logits: np.ndarray, largest: float | np.ndarray, temperature: float) -> np.ndarray:
    """logits (…, K) -> weights (…, K) float64, that of the largest 1."""
    weights = logits.astype(np.float64)
    weights -= largest
    weights /= max(temperature, MIN_TEMPERATURE)
    np.exp(weights, out=weights)
    return weights


def apply_repetition_penalty(logits: np.ndarray, ids: Sequence[int], penalty: float) -> np.ndarray:
    """logits (V,) -> new ones (V,), in which those of the given ids are less likely, as step 0 has it."""
    changed, ids = logits.copy(), np.array(ids, np.int64)
    seen = logits[ids]
    with np.errstate(over="ignore"):  # from one end of float32: infinitely unlikely
        changed[ids] = np.where(seen > 0, seen / np.float32(penalty), seen * np.float32(penalty))
    return changed


def log_probability(logits: np.ndarray, id: int) -> float:
    """logits (V,) -> ln of the probability of an id at temperature 1, with all ids permitted."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    return shifted.item(id) - math.log(np.exp(shifted).sum())


class Rng:
    """A counter-based generator of 32 bits: draw i = 1, 2, … is x = mix(key + i * 0x9E3779B9), u = (x >> 8) * 2**-24.

    key = mix(mix(seed) + stream); stream tells the samples of one seed apart. `mix` is a bijection of 32 bits found by
    T. Ettinger's search for low bias (lowbias32). All arithmetic is modulo 2**32.
    """

    def __init__(self, seed: int, stream: int = 0):
        """seed and stream from 0 to 2**32 - 1. Raises `UserError` for others."""
        for name, value in (("rng_seed", seed), ("stream_number", stream)):
            fits = isinstance(value, Integral) and 0 <= value < 1 << 32
            check(fits, name, value, "a whole number from 0 to 4294967295")
        self._key = mix(mix(int(seed)) + int(stream))
        self.draws = 0

    def uniform(self) -> float:
        """The next u in [0, 1), a multiple of 2**-24."""
        self.draws += 1
        return self._draw(self.draws)

    def peek(self, n: int) -> list[float]:
        """The next n of them, which are yet to come."""
        return [self._draw(self.draws + i) for i in range(1, n + 1)]

    def _draw(self, i: int) -> float:
        x = (self._key + i * 0x9E3779B9) & 0xFFFFFFFF  # then `mix`, without a call
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return ((x ^ (x >> 16)) >> 8) * 2.0**-24


def mix(x: int) -> int:
    """A bijection of the 32-bit numbers that leaves no visible structure; x is taken modulo 2**32."""
    x &= 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def check(condition: bool, name: str, value: object, rule: str) -> None:
    """Raises `UserError` for an option that breaks its rule."""
    if not condition:  # also true for NaN
        raise UserError(f"{name} = {value} is out of range; it must be {rule}")
