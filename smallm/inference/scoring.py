"""How every loss is measured: each character of a text after the first is predicted exactly once."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from smallm.errors import UserError

IGNORED = -1  # in place of a target that is not scored
NOT_FINITE = "the model's logits are not finite: its weights are broken; train it again"
IDS_PER_BATCH = 8192


@dataclass(frozen=True)
class Perplexity:
    """The loss of a model on a text, per character."""

    nats_per_char: float
    bits_per_char: float
    perplexity: float
    characters: int
    """Number of predicted characters: all but the first."""

    @classmethod
    def of(cls, nats: float, characters: int) -> "Perplexity":
        """From the sum of nats over `characters` predicted characters."""
        mean = nats / characters
        return cls(mean, mean / math.log(2), perplexity(mean), characters)

    def __str__(self) -> str:
        return (f"{self.nats_per_char:.4f} nats per character (cross-entropy), {self.bits_per_char:.4f} bits per "
                f"character, perplexity {self.perplexity:.4f}, over {self.characters:,} characters")  # fmt: skip


def perplexity(nats: float) -> float:
    """e^nats; at most e^700, so that the result stays finite."""
    return math.exp(min(nats, 700.0))


def windows(
    pieces: Iterable[np.ndarray], block_size: int, stride: int | None = None, ids_per_batch: int = IDS_PER_BATCH
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts ids, given in pieces of any length, into batches of inputs (B, T) and targets (B, T), int64.

    block_size: number of ids T in a window. stride: distance of the windows in ids, from 1 to block_size; None (the
    default) = block_size. With a smaller stride the windows overlap, and every window after the first scores only its
    last `stride` targets, which have at least block_size - stride ids of context. Targets that are not scored are -1:
    those that an earlier window scored, padding, and the remaining ids of the first character.
    ids_per_batch: maximum of B T, as far as one window fits into it.
    """
    T, S, B = block_size, stride or block_size, max(1, ids_per_batch // block_size)
    assert 1 <= S <= T
    ids = np.empty((2, 0), np.int64)  # as input, as target
    begun, known = 0, 0  # characters begun so far; targets of the next window that an earlier window scored
    for piece in pieces:
        pair = np.stack((piece, piece)).astype(np.int64)
        if begun < 2:  # still in the first character
            starts = np.flatnonzero(begins_character(piece))
            pair[1, : starts[1 - begun] if begun + len(starts) > 1 else None] = IGNORED
            begun += len(starts)
        ids = np.concatenate((ids, pair), axis=1)
        count = (ids.shape[1] - T - 1) // S + 1
        if count > 0:
            yield from _batches(sliding_window_view(ids, T + 1, axis=1)[:, : count * S : S], B, known, T - S)
            ids, known = ids[:, count * S :], T - S
    if ids.shape[1] > 1 + known:
        rest = np.full((2, 1, T + 1), IGNORED, np.int64)
        rest[:, 0, : ids.shape[1]] = ids
        yield from _batches(rest, B, known, known)


def _batches(rows: np.ndarray, size: int, known: int, later: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """rows (2, n, T + 1) -> batches of `size` rows; masks the first `known` targets of row 0, `later` of the others."""
    for start in range(0, rows.shape[1], size):
        batch = rows[:, start : start + size]
        inputs, targets = batch[0, :, :-1].clip(min=0), batch[1, :, 1:].copy()
        targets[0, : later if start else known] = IGNORED
        targets[1:, :later] = IGNORED
        yield inputs, targets


def nats(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """logits (B, T, V), which are overwritten, and targets (B, T) -> nats (B, T) float64; 0 for targets of -1.

    Raises `UserError` for logits that are not finite.
    """
    found = np.zeros(targets.shape)
    for row, goals, result in zip(logits, targets, found, strict=True):  # one window fits into the cache
        counts = goals != IGNORED
        largest = row.max(axis=-1, keepdims=True)  # NaN if any logit is NaN
        with np.errstate(over="ignore", invalid="ignore"):  # a difference beyond float32: probability 0
            row -= largest
            chosen = row[np.arange(len(row)), goals.clip(min=0)].astype(np.float64)
            result[:] = np.log(np.exp(row, out=row).sum(axis=-1)) - chosen
        result[~counts] = 0.0
        if not (np.isfinite(largest).all() and np.isfinite(result).all()):
            raise UserError(NOT_FINITE)
    return found


def begins_character(ids: np.ndarray) -> np.ndarray:
    """Whether each id begins a character; only the bytes 0x80-0xBF, which continue a character in UTF-8, do not."""
    return (ids < 0x80) | (ids >= 0xC0)
