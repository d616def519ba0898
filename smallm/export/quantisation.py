"""Matrices in few bits: whole numbers in blocks along the inputs, with one scale for each block."""

from dataclasses import dataclass

import numpy as np

DAMPING = 0.01  # of the moments' mean diagonal; GPTQ's own
SHRINK = np.linspace(0.7, 1.05, 15)  # scales that are tried, relative to the one that just holds the largest weight


@dataclass(frozen=True)
class Quantised:
    """A matrix (N outputs, K inputs) as ONNX Runtime's MatMulNBits wants it: weight = (code - zero) * scale."""

    codes: np.ndarray
    """(N, blocks, block) uint8, from 0 to 2^bits - 1; zero is 2^(bits - 1). The last block is filled up with zeros."""
    scales: np.ndarray
    """(N, blocks) float32."""
    bits: int
    inputs: int
    """K."""

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[2]

    def packed(self) -> np.ndarray:
        """The codes, those of 4 bits two to a byte, the first in the lower half."""
        return self.codes if self.bits == 8 else self.codes[..., 0::2] | self.codes[..., 1::2] << 4

    def dequantised(self) -> np.ndarray:
        """(N, K) float32."""
        weights = (self.codes.astype(np.float32) - 2 ** (self.bits - 1)) * self.scales[..., None]
        return weights.reshape(len(weights), -1)[:, : self.inputs]


def largest_block(inputs: int) -> int:
    """The largest block that is not longer than a row; at least 16, the smallest that there is."""
    return max(16, 1 << (inputs.bit_length() - 1))


def round_to_nearest(weights: np.ndarray, bits: int, block: int) -> Quantised:
    """weights (N, K) -> each by itself; the largest magnitude of a block gets the code at the longer end, 0."""
    blocks = _blocks(weights, block)
    scales = _largest(blocks) / -(2 ** (bits - 1))
    return Quantised(_codes(blocks, scales[..., None], bits), scales.astype(np.float32), bits, weights.shape[1])


def fit(weights: np.ndarray, moments: np.ndarray, bits: int, block: int) -> Quantised:
    """weights (N, K) and second moments of the inputs (K, K) -> one input after the other, the rest making up for it.

    GPTQ (Frantar et al. 2022), with scales searched for: what rounding one input's weights does to the outputs is
    compensated, as far as inputs go together, by those of the inputs that follow.
    """
    (N, K), rest = weights.shape, weights.astype(np.float64)
    damped = moments + DAMPING * np.trace(moments) / K * np.eye(K)
    follow = np.linalg.cholesky(np.linalg.inv(damped)).T  # upper: what each input's error means to later ones
    codes = np.full((N, -(-K // block), block), 2 ** (bits - 1), np.uint8)
    scales = np.empty(codes.shape[:2], np.float32)
    for number, start in enumerate(range(0, K, block)):
        stop = min(K, start + block)
        scale = scales[:, number] = _best_scales(rest[:, start:stop], np.diag(damped)[start:stop], bits)
        errors = np.empty((N, stop - start))
        for k in range(start, stop):
            code = codes[:, number, k - start] = _codes(rest[:, k], scale, bits)
            error = (rest[:, k] - (code - 2.0 ** (bits - 1)) * scale) / follow[k, k]
            rest[:, k + 1 : stop] -= np.outer(error, follow[k, k + 1 : stop])
            errors[:, k - start] = error
        rest[:, stop:] -= errors @ follow[start:stop, stop:]
    return Quantised(codes, scales, bits, K)


def _best_scales(weights: np.ndarray, importance: np.ndarray, bits: int) -> np.ndarray:
    """weights (N, block), importance (block,) -> of some scales around the obvious one, that with the least error."""
    obvious = _largest(weights) / 2 ** (bits - 1)
    candidates = np.outer(np.concatenate((-SHRINK, SHRINK)), obvious).astype(np.float32)  # (candidates, N)
    errors = [
        np.square((_codes(weights, scale, bits) - 2.0 ** (bits - 1)) * scale - weights) @ importance
        for scale in candidates[..., None]
    ]
    return np.take_along_axis(candidates, np.argmin(errors, axis=0)[None], axis=0)[0]


def _blocks(weights: np.ndarray, block: int) -> np.ndarray:
    """(N, K) -> (N, blocks, block), zeros at the end."""
    return np.pad(weights, ((0, 0), (0, -weights.shape[1] % block))).reshape(len(weights), -1, block)


def _largest(blocks: np.ndarray) -> np.ndarray:
    """Of each block (…, block) the weight of the largest magnitude (…); 1 where all are 0."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    return np.where(largest == 0, 1, largest)


def _codes(weights: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint(weights / scales) + 2 ** (bits - 1), 0, 2**bits - 1).astype(np.uint8)
