"""Quantised matrices: integer codes with one scale per block of inputs, by rounding to nearest or by GPTQ.

benchmarks/README.md compares this module with ONNX Runtime's quantiser.
"""

from dataclasses import dataclass

import numpy as np

DAMPING = 0.01
"""Added to the diagonal of the second moments, relative to its mean; the value of the GPTQ paper."""
SHRINK = np.linspace(0.7, 1.05, 15)
"""Scales that are tried, relative to the scale at which the largest weight is just representable."""


@dataclass(frozen=True)
class Quantised:
    """A matrix (N outputs, K inputs) in the format of ONNX Runtime's MatMulNBits: weight = (code - zero) * scale."""

    codes: np.ndarray
    """(N, blocks, block) uint8, from 0 to 2^bits - 1; zero is 2^(bits - 1). The last block is padded with zero."""
    scales: np.ndarray
    """(N, blocks) float32."""
    bits: int
    inputs: int
    """K."""

    @property
    def block(self) -> int:
        """Number of inputs that share a scale."""
        return self.codes.shape[2]

    def packed(self) -> np.ndarray:
        """The codes as stored: 8-bit codes as they are, 4-bit codes two to a byte, the first in the lower half."""
        return self.codes if self.bits == 8 else self.codes[..., 0::2] | self.codes[..., 1::2] << 4

    def dequantised(self) -> np.ndarray:
        """(N, K) float32."""
        weights = (self.codes.astype(np.float32) - 2 ** (self.bits - 1)) * self.scales[..., None]
        return weights.reshape(len(weights), -1)[:, : self.inputs]


def largest_block(inputs: int) -> int:
    """The largest block size, a power of two, that is not longer than a row; at least 16, MatMulNBits' minimum."""
    return max(16, 1 << (inputs.bit_length() - 1))


def round_to_nearest(weights: np.ndarray, bits: int, block: int) -> Quantised:
    """Rounds weights (N, K) to the nearest code; the weight of the largest magnitude in a block gets code 0."""
    blocks = _blocks(weights, block)
    scales = _largest(blocks) / -(2 ** (bits - 1))
    return Quantised(_codes(blocks, scales[..., None], bits), scales.astype(np.float32), bits, weights.shape[1])


def gptq(weights: np.ndarray, moments: np.ndarray, bits: int, block: int) -> Quantised:
    """Quantises a matrix by GPTQ (Frantar et al. 2022), with searched scales.

    Rounds the weights of one input after the other. The weights of the inputs that follow are corrected to compensate
    for the error in the outputs, as far as the inputs are correlated.

    Args:
        weights: (N, K).
        moments: Second moments of the inputs (K, K), see `second_moments`.
        bits: 4 or 8.
        block: Number of inputs that share a scale.
    """
    (N, K), remaining = weights.shape, weights.astype(np.float64)
    damped = moments + DAMPING * np.trace(moments) / K * np.eye(K)
    correction = np.linalg.cholesky(np.linalg.inv(damped)).T  # (K, K), upper: effect of an error on later inputs
    codes = np.full((N, -(-K // block), block), 2 ** (bits - 1), np.uint8)
    scales = np.empty(codes.shape[:2], np.float32)
    for i, start in enumerate(range(0, K, block)):
        stop = min(K, start + block)
        scale = scales[:, i] = _best_scales(remaining[:, start:stop], np.diag(damped)[start:stop], bits)
        errors = np.empty((N, stop - start))
        for k in range(start, stop):
            code = codes[:, i, k - start] = _codes(remaining[:, k], scale, bits)
            error = (remaining[:, k] - (code - 2.0 ** (bits - 1)) * scale) / correction[k, k]
            remaining[:, k + 1 : stop] -= np.outer(error, correction[k, k + 1 : stop])
            errors[:, k - start] = error
        remaining[:, stop:] -= errors @ correction[start:stop, stop:]
    return Quantised(codes, scales, bits, K)


def _best_scales(weights: np.ndarray, importance: np.ndarray, bits: int) -> np.ndarray:
    """The scales (N,) with the least squared error of weights (N, block), weighted by importance (block,)."""
    full_range = _largest(weights) / 2 ** (bits - 1)
    candidates = np.outer(np.concatenate((-SHRINK, SHRINK)), full_range).astype(np.float32)  # (candidates, N)
    errors = [
        np.square((_codes(weights, scale, bits) - 2.0 ** (bits - 1)) * scale - weights) @ importance
        for scale in candidates[..., None]
    ]
    return np.take_along_axis(candidates, np.argmin(errors, axis=0)[None], axis=0)[0]


def _blocks(weights: np.ndarray, block: int) -> np.ndarray:
    """(N, K) -> (N, blocks, block), padded with zeros at the end."""
    return np.pad(weights, ((0, 0), (0, -weights.shape[1] % block))).reshape(len(weights), -1, block)


def _largest(blocks: np.ndarray) -> np.ndarray:
    """The weight of the largest magnitude (…) in each block (…, block); 1 where all weights are 0."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    return np.where(largest == 0, 1, largest)


def _codes(weights: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint(weights / scales) + 2 ** (bits - 1), 0, 2**bits - 1).astype(np.uint8)
