"""The random generator of the sampler: draws are a function of (seed, stream, index), the same in every language."""

from smallm.options import check_int

MAX_SEED = (1 << 32) - 1


class Rng:
    """A counter-based generator of 32 bits: draw i = 1, 2, … is x = mix(key + i * 0x9E3779B9), u = (x >> 8) * 2**-24.

    key = mix(mix(seed) + stream); stream distinguishes the samples of one seed. `mix` is a bijection of 32 bits that
    T. Ettinger's search for low bias found (lowbias32). All arithmetic is modulo 2**32.
    """

    def __init__(self, seed: int, stream: int = 0):
        """seed and stream: 0 to 2**32 - 1. Raises `UserError` for other values."""
        check_int("rng_seed", seed, 0, MAX_SEED)
        check_int("stream_number", stream, 0, MAX_SEED)
        self._key = mix(mix(int(seed)) + int(stream))
        self.draws = 0

    def uniform(self) -> float:
        """The next u in [0, 1), a multiple of 2**-24."""
        self.draws += 1
        return self._draw(self.draws)

    def peek(self, n: int) -> list[float]:
        """The next n values of `uniform`, without drawing them."""
        return [self._draw(self.draws + i) for i in range(1, n + 1)]

    def _draw(self, i: int) -> float:
        x = (self._key + i * 0x9E3779B9) & 0xFFFFFFFF  # then `mix`, inlined for speed
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return ((x ^ (x >> 16)) >> 8) * 2.0**-24


def mix(x: int) -> int:
    """A bijection of the 32-bit numbers without visible structure; x is taken modulo 2**32."""
    x &= 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
