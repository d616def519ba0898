"""The protocol of every loss that smallm reports: each character after the first is predicted exactly once."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

IGNORED = -1  # a target that does not count
IDS_PER_BATCH = 8192


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text."""

    nats_per_char: float
    bits_per_char: float
    perplexity: float
    characters: int
    """Characters predicted: all but the first."""

    @classmethod
    def of(cls, nats: float, characters: int) -> "Perplexity":
        """From the sum of nats over `characters` predicted ones."""
        mean = nats / characters
        return cls(mean, mean / math.log(2), math.exp(mean), characters)


def windows(
    pieces: Iterable[np.ndarray], block_size: int, stride: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts ids, given in pieces of any length, into batches of inputs (B, T) and targets (B, T), int64.

    Windows of T = block_size ids, side by side, or `stride` apart: then all but the first are scored on their last
    `stride` targets only, which have longer contexts. Targets that do not count are -1: those scored before, the
    padding of the last window, and the rest of the first character where that is spelled in several ids.
    """
    T, S = block_size, stride or block_size
    assert 1 <= S <= T
    first, ids = True, np.empty(0, np.int64)
    for piece in pieces:
        ids = np.concatenate((ids, piece.astype(np.int64)))
        count = (len(ids) - T - 1) // S + 1
        if count > 0:
            yield from _batches(sliding_window_view(ids, T + 1)[: count * S : S], T - S, first)
            ids, first = ids[count * S :], False
    if len(ids) > 1 + (0 if first else T - S):
        row = np.full((1, T + 1), IGNORED, np.int64)
        row[0, : len(ids)] = ids
        yield from _batches(row, T - S, first)


def _batches(rows: np.ndarray, known: int, first: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """rows (n, T + 1) -> batches; `known` targets of each row were scored in the row before."""
    per_batch = max(1, IDS_PER_BATCH // (rows.shape[1] - 1))
    for start in range(0, len(rows), per_batch):
        batch = rows[start : start + per_batch]
        inputs, targets = batch[:, :-1].clip(min=0), batch[:, 1:].copy()
        begins = first and start == 0
        targets[int(begins) :, :known] = IGNORED
        if begins:
            targets[0, : ids_of_first_character(batch[0]) - 1] = IGNORED
        yield inputs, targets


def begins_character(ids: np.ndarray) -> np.ndarray:
    """Whether each id begins a character: all do but the bytes 0x80-0xBF, which continue one in UTF-8."""
    return (ids < 0x80) | (ids >= 0xC0)


def ids_of_first_character(ids: np.ndarray) -> int:
    """Number of ids that spell the first character."""
    later = np.flatnonzero(begins_character(ids[1:8]))
    return int(later[0]) + 1 if len(later) else min(len(ids), 4)
