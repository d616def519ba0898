"""The table of guesses of a model: what it gives on average after short contexts, from text that it reads."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from smallm.export.calibration import own_text
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

MIN_TEXT = 5_000  # ids
MIN_SEEN = 3  # times that a context occurs in the text; of rarer ones a shorter one is the better guess
MAX_CONTEXTS = 10_000  # the commonest: 320 KB


def write_draft_table(path: Path, text: str) -> None:
    """Puts the table beside a model file, from some text like that which it will write; its own, if that is short.

    None where there is nothing to go by: in a very short context, or with more ids than the table has room for.
    """
    model = LanguageModel.load(path)
    ids = model.vocabulary.encode(text)
    table = distil(model, ids if len(ids) >= MIN_TEXT else own_text(path).ravel()).table
    if len(table):
        np.save(path.with_name(DRAFT_TABLE_FILE), table)


def distil(model: LanguageModel, ids: np.ndarray) -> DraftTable:
    """ids (N,) of some text -> the table of what the model expects after contexts that occur there.

    The model's probabilities are averaged, which tells more than counting what does come next: each place in the text
    tells of every id (Hinton et al. 2015). All but the ALTERNATIVES likeliest at a place count as nothing.
    """
    places = [*_predictions(model, ids)] if model.vocab_size <= MAX_IDS else []
    if not places:
        return DraftTable(np.empty(0, ROW))
    contexts, *predicted = (np.concatenate(parts) for parts in zip(*places, strict=True))
    masks = [np.uint64((1 << ID_BITS * length) - 1) for length in range(CONTEXT + 1)]
    table, seen = (np.concatenate(p) for p in zip(*(_averages(contexts & m, *predicted) for m in masks), strict=True))
    commonest = np.argsort(-seen, kind="stable")[:MAX_CONTEXTS]
    return DraftTable(np.sort(table[commonest], order="context"))


def _predictions(model: LanguageModel, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of some places each: contexts (n,), the A likeliest ids (n, A) after them, in no order, their probabilities."""
    size, A = model.block_size, min(ALTERNATIVES, model.vocab_size)
    for start in range(0, len(ids) - CONTEXT + 1, size):
        row = ids[start : start + size].astype(np.int64)
        if len(row) < CONTEXT:
            continue
        logits = model.logits(row[None])[0, CONTEXT - 1 :]  # (n, V)
        logits -= logits.max(axis=1, keepdims=True)
        likeliest = np.argpartition(-logits, A - 1)[:, :A]
        chances = np.exp(np.take_along_axis(logits, likeliest, axis=1)) / np.exp(logits).sum(axis=1, keepdims=True)
        yield _contexts(row), likeliest, chances


def _contexts(ids: np.ndarray) -> np.ndarray:
    """ids (T,) -> the context (T - CONTEXT + 1,) that ends with each but the first few."""
    packed = np.zeros(len(ids) - CONTEXT + 1, np.uint64)
    for i in range(CONTEXT):
        packed = packed << np.uint64(ID_BITS) | (ids[i : i + len(packed)] + 1).astype(np.uint64)
    return packed


def _averages(contexts: np.ndarray, likeliest: np.ndarray, chances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the table (m,), one for each context that occurs often enough, and how often it does."""
    known, which, seen = np.unique(contexts, return_inverse=True, return_counts=True)
    pairs, place = np.unique((which[:, None] << ID_BITS | likeliest).ravel(), return_inverse=True)
    sums = np.bincount(place, weights=chances.ravel())
    which, ids = pairs >> ID_BITS, pairs & MAX_IDS
    order = np.lexsort((-sums, which))  # by context, the likeliest id first
    firsts = np.searchsorted(which, np.arange(len(known)))
    rank = np.arange(len(pairs)) - firsts[which]  # of what stands there in that order
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
