"""The draft table: proposes the next ids, so that a model can check several ids in one pass.

This is speculative decoding (Leviathan et al. 2023, Chen et al. 2023) with a table of short contexts instead of a
second model. The table is sampled with the same u as the model's logits, so that the two agree more often than not. A
wrong draft costs time only: the model decides every id.
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
CONTEXT = 4  # ids of context at most
ALTERNATIVES = 8  # most likely ids that are kept for a context
STEP = 1 / 32  # nats
NONE = 255  # as nats: this place holds no id
ID_BITS = 16
MAX_IDS = (1 << ID_BITS) - 1
CONTEXT_MASK = (1 << ID_BITS * CONTEXT) - 1
ROW = np.dtype([("context", "<u8"), ("ids", "<u2", (ALTERNATIVES,)), ("nats", "u1", (ALTERNATIVES,))])
"""A context packs its ids, each plus 1, the newest in the lowest 16 bits. `ids` are the ids that may follow, in
ascending order; `nats` says by how many STEPs each is less likely than the most likely id."""


class DraftTable:
    """The table of one model. `export.py` writes it beside the model."""

    def __init__(self, table: np.ndarray):
        """table: (n,) of ROW."""
        self.table = table
        self._temperature = math.nan  # of the last call of `drafter`
        self._drafter: Drafter | None = None

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> "DraftTable":
        """Reads a table. Raises `UserError` for a file that is not a draft table for this vocabulary."""
        try:
            mapped = np.lib.format.open_memmap(path, mode="r")  # allocates nothing, whatever shape the header states
            if mapped.dtype != ROW or mapped.ndim != 1 or mapped.offset + mapped.nbytes != path.stat().st_size:
                raise ValueError
            table = np.array(mapped)
        except Exception:  # numpy's parser of the header raises errors of many kinds
            raise UserError(f"{path} is damaged; export the model again, or delete the file") from None
        if not ((table["ids"] < vocab_size).all() and (table["nats"] == 0).any(axis=1).all()):
            raise UserError(f"{path} belongs to another model; export the model again, or delete the file")
        return cls(table)

    def drafter(self, temperature: float) -> "Drafter":
        """The drafter for texts of this temperature."""
        if temperature != self._temperature:
            nats = np.where(self.table["nats"] == NONE, np.inf, self.table["nats"] * STEP)
            cumulative = np.exp(-nats / max(temperature, MIN_TEMPERATURE)).cumsum(axis=1)
            drafter = Drafter(self.table["context"], self.table["ids"], cumulative / cumulative[:, -1:])
            self._drafter, self._temperature = drafter, temperature  # in this order: other threads may read
        assert self._drafter is not None
        return self._drafter


class Drafter:
    """Proposes ids at one temperature."""

    def __init__(self, contexts: np.ndarray, ids: np.ndarray, cumulative: np.ndarray):
        """contexts (n,), ids (n, ALTERNATIVES) and their cumulative probabilities, the last 1."""
        self._ids, self._cumulative = ids, cumulative
        # Context -> its row number, replaced by the row as lists at first use: lists are fast to read, slow to make.
        rows = zip(contexts.tolist(), range(len(contexts)), strict=True)
        self._rows: dict[int, int | tuple[list[int], list[float]]] = dict(rows)

    def propose(self, history: Sequence[int], draws: Iterable[float]) -> list[int]:
        """Drafts for the ids that follow the history: one id for each u of draws."""
        rows, context = self._rows, pack(history[-CONTEXT:])
        drafts = []
        for u in draws:
            row, length, key = rows.get(context), CONTEXT, context
            while row is None and length:
                length -= 1
                key &= (1 << ID_BITS * length) - 1
                row = rows.get(key)
            if isinstance(row, int):
                row = rows[key] = self._ids[row].tolist(), self._cumulative[row].tolist()
            id = 0 if row is None else row[0][bisect_right(row[1], u)]
            drafts.append(id)
            context = (context << ID_BITS | id + 1) & CONTEXT_MASK
        return drafts


def pack(ids: Sequence[int]) -> int:
    """At most CONTEXT ids as a context of the table."""
    key = 0
    for id in ids:
        key = key << ID_BITS | id + 1
    return key
