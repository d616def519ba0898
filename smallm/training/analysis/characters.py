"""Reads a text of any length that is stored as ids, piece by piece."""

from collections.abc import Iterator

import numpy as np

from smallm.inference.scoring import begins_character
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.data.store import MappedIds

PIECE = 1 << 18  # ids read at a time: a piece and its hashes stay in the processor's cache


def pieces(ids: MappedIds, vocabulary: Vocabulary, max_ids: int, size: int = 0) -> Iterator[str]:
    """The text of all ids, or of `max_ids` of them in evenly spaced pieces; size: ids of a piece, by default PIECE."""
    for start, stop in spread(len(ids), max_ids, size or PIECE):
        part = np.asarray(ids[start : stop + 3])  # with the rest of the last character, which belongs to this piece
        begins = np.append(begins_character(part), True)
        first, last = int(begins.argmax()), stop - start + int(begins[stop - start :].argmax())
        yield vocabulary.decode(part[first:last])


def spread(length: int, limit: int, size: int) -> list[tuple[int, int]]:
    """Pieces [start, stop) of `size` that cover `length`, or `limit` of it in evenly spaced pieces if it is longer."""
    if length <= limit:
        return [(start, min(length, start + size)) for start in range(0, length, size)]
    size = min(size, limit)
    number = limit // size
    return [(start, start + size) for start in ((length - size) * i // max(1, number - 1) for i in range(number))]


def code_points(text: str) -> np.ndarray:
    """The code points (n,) uint32 of a string."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
