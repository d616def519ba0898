"""Builds a model's draft table: the average predictions of the model after short contexts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from smallm.export.calibration import generated_ids
from smallm.generation.draft_table import (
    ALTERNATIVES,
    CONTEXT,
    DRAFT_TABLE_FILE,
    ID_BITS,
    MAX_IDS,
    NONE,
    ROW,
    STEP,
    DraftTable,
)
from smallm.language_model import LanguageModel

MIN_TEXT = 5_000
"""Ids; a shorter text is replaced by text that the model generates."""
MIN_SEEN = 3
"""Occurrences that a context needs; a shorter context predicts better than a rare one."""
MAX_CONTEXTS = 10_000
"""Most frequent contexts that are kept: 320 KB."""


def write_draft_table(path: Path, text: str) -> None:
    """Writes the draft table beside a model file, from the model's predictions on a text.

    text: similar to the text that the model will write; if it is shorter than MIN_TEXT ids, text that the model
    generates is used. Nothing is written if block_size is less than CONTEXT or if the vocabulary exceeds MAX_IDS.
    """
    model = LanguageModel.load(path)
    ids = model.vocabulary.encode(text)
    table = distil(model, ids if len(ids) >= MIN_TEXT else generated_ids(path).ravel()).table
    if len(table):
        np.save(path.with_name(DRAFT_TABLE_FILE), table)


def distil(model: LanguageModel, ids: np.ndarray) -> DraftTable:
    """The draft table of a model for the contexts that occur in ids (N,).

    Averages the model's probabilities after each context, which needs less text than counting the ids that follow
    (Hinton et al. 2015). At each position only the ALTERNATIVES likeliest ids are counted.
    """
    predictions = [*_predictions(model, ids)] if model.vocab_size <= MAX_IDS else []
    if not predictions:
        return DraftTable(np.empty(0, ROW))
    contexts, *predicted = (np.concatenate(parts) for parts in zip(*predictions, strict=True))
    masks = [np.uint64((1 << ID_BITS * length) - 1) for length in range(CONTEXT + 1)]
    table, seen = (np.concatenate(p) for p in zip(*(_averages(contexts & m, *predicted) for m in masks), strict=True))
    most_frequent = np.argsort(-seen, kind="stable")[:MAX_CONTEXTS]
    return DraftTable(np.sort(table[most_frequent], order="context"))


def _predictions(model: LanguageModel, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each window of the text: contexts (n,), the A likeliest next ids (n, A), unordered, and probabilities."""
    size, A = model.block_size, min(ALTERNATIVES, model.vocab_size)
    for start in range(0, len(ids) - CONTEXT + 1, size):
        row = ids[start : start + size].astype(np.int64)
        if len(row) < CONTEXT:
            continue
        logits = model.logits(row[None])[0, CONTEXT - 1 :]  # (n, V)
        logits -= logits.max(axis=1, keepdims=True)
        likeliest = np.argpartition(-logits, A - 1)[:, :A]
        probabilities = np.exp(np.take_along_axis(logits, likeliest, axis=1)) / np.exp(logits).sum(
            axis=1, keepdims=True
        )
        yield _contexts(row), likeliest, probabilities


def _contexts(ids: np.ndarray) -> np.ndarray:
    """ids (T,) -> packed contexts (T - CONTEXT + 1,), one ending at each id from the CONTEXT-th on."""
    packed = np.zeros(len(ids) - CONTEXT + 1, np.uint64)
    for i in range(CONTEXT):
        packed = packed << np.uint64(ID_BITS) | (ids[i : i + len(packed)] + 1).astype(np.uint64)
    return packed


def _averages(contexts: np.ndarray, likeliest: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the table (m,), one for each context that occurs at least MIN_SEEN times, and their counts (m,)."""
    known, which, seen = np.unique(contexts, return_inverse=True, return_counts=True)
    pairs, index = np.unique((which[:, None] << ID_BITS | likeliest).ravel(), return_inverse=True)
    sums = np.bincount(index, weights=probabilities.ravel())
    which, ids = pairs >> ID_BITS, pairs & MAX_IDS
    order = np.lexsort((-sums, which))  # by context, then by descending probability
    firsts = np.searchsorted(which, np.arange(len(known)))
    rank = np.arange(len(pairs)) - firsts[which]  # rank of each pair within its context, in that order
    nats = np.log(sums[order][firsts][which] / sums[order]) / STEP
    table = np.zeros(len(known), ROW)
    table["context"], table["nats"] = known, NONE
    kept = (rank < ALTERNATIVES) & (nats < NONE - 0.5)
    table["ids"][which[kept], rank[kept]] = ids[order][kept]
    table["nats"][which[kept], rank[kept]] = np.rint(nats[kept])
    ascending = np.argsort(np.where(table["nats"] == NONE, MAX_IDS, table["ids"]), axis=1, kind="stable")
    for name in ("ids", "nats"):
        table[name] = np.take_along_axis(table[name], ascending, axis=1)
    often = seen >= MIN_SEEN
    return table[often], seen[often]
