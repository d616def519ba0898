"""Matrices in few bits: whole numbers in blocks along the inputs, with one scale for each block."""

from dataclasses import dataclass

import numpy as np


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


def round_to_nearest(weights: np.ndarray, bits: int, block: int) -> Quantised:
    """weights (N, K) float32 -> each block by itself: the largest magnitude gets the code 0, the one far end."""
    N, K = weights.shape
    blocks = np.pad(weights, ((0, 0), (0, -K % block))).reshape(N, -1, block)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    zero = 2 ** (bits - 1)
    scales = np.where(largest == 0, 1, largest / -zero).astype(np.float32)
    codes = np.clip(np.rint(blocks / scales[..., None]) + zero, 0, 2 * zero - 1).astype(np.uint8)
    return Quantised(codes, scales, bits, K)
