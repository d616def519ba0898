"""Guesses at the next ids, by a table, so that a model can check several of them in one pass.

That is speculative decoding (Leviathan et al. 2023, Chen et al. 2023), with a table of short contexts in the place of
a second model. The table is sampled with the very u that the model's logits will be sampled with, so that the two agree
more often than not. A wrong guess costs time and nothing else: the text is always the model's.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from smallm.errors import UserError
from smallm.generation.sampler import MIN_TEMPERATURE

DRAFT_TABLE_FILE = "draft_table.npy"
OLD_DRAFT_TABLE_FILE = "guesses.npy"  # the name until version 0.1; still read
CONTEXT = 4  # ids at most that a guess is made from
ALTERNATIVES = 8  # likeliest ids after a context
STEP = 1 / 32  # nats
NONE = 255  # in the place of nats: here is no id
ID_BITS = 16
MAX_IDS = (1 << ID_BITS) - 1
WHOLE = (1 << ID_BITS * CONTEXT) - 1
ROW = np.dtype([("context", "<u8"), ("ids", "<u2", (ALTERNATIVES,)), ("nats", "u1", (ALTERNATIVES,))])
"""A context is its ids, each plus 1, the newest in the lowest 16 bits. After it come these ids, the lowest first, each
by so many STEPs less likely than the likeliest."""


class DraftTable:
    """The table of one model: `export.py` writes it beside the model."""

    def __init__(self, table: np.ndarray):
        """table: (n,) of ROW."""
        self.table = table
        self._temperature, self._guesser = math.nan, None  # of the last call

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> "DraftTable":
        """Raises `UserError` for a file that is no table of guesses for this vocabulary."""
        try:
            table = np.load(path)
            if table.dtype != ROW or table.ndim != 1:
                raise ValueError
        except (ValueError, OSError, EOFError, SyntaxError, TypeError):
            raise UserError(f"{path} is damaged; export the model again, or delete the file") from None
        if not ((table["ids"] < vocab_size).all() and (table["nats"] == 0).any(axis=1).all()):
            raise UserError(f"{path} belongs to another model; export the model again, or delete the file")
        return cls(table)

    def at(self, temperature: float) -> "Drafter":
        """The same for texts of this temperature."""
        if temperature != self._temperature:
            nats = np.where(self.table["nats"] == NONE, np.inf, self.table["nats"] * STEP)
            shares = np.exp(-nats / max(temperature, MIN_TEMPERATURE)).cumsum(axis=1)
            guesser = Drafter(self.table["context"], self.table["ids"], shares / shares[:, -1:])
            self._guesser, self._temperature = guesser, temperature  # in this order: there may be other threads
        return self._guesser


class Drafter:
    """Guesses at one temperature."""

    def __init__(self, contexts: np.ndarray, ids: np.ndarray, shares: np.ndarray):
        """contexts (n,), ids (n, ALTERNATIVES) and their cumulative shares, the last 1."""
        self._ids, self._shares = ids, shares
        # Context -> its place, or what stands there once that was wanted: lists are quick to read, but slow to make.
        places = zip(contexts.tolist(), range(len(contexts)), strict=True)
        self._rows: dict[int, int | tuple[list[int], list[float]]] = dict(places)

    def follow(self, history: Sequence[int], draws: Iterable[float]) -> list[int]:
        """What may come after these ids: for each u of draws one id more."""
        rows, context = self._rows, pack(history[-CONTEXT:])
        found = []
        for u in draws:
            row, kept, key = rows.get(context), CONTEXT, context
            while row is None and kept:
                kept -= 1
                key &= (1 << ID_BITS * kept) - 1
                row = rows.get(key)
            if type(row) is int:
                row = rows[key] = self._ids[row].tolist(), self._shares[row].tolist()
            id = 0 if row is None else row[0][bisect_right(row[1], u)]
            found.append(id)
            context = (context << ID_BITS | id + 1) & WHOLE
        return found


def pack(ids: Sequence[int]) -> int:
    """At most CONTEXT ids as a context of the table."""
    key = 0
    for id in ids:
        key = key << ID_BITS | id + 1
    return key
