"""A text as ids on disk: encoded once, memory-mapped, and cut into a training part and a validation part after it."""

import codecs
import errno
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from smallm.errors import UserError
from smallm.inference.scoring import begins_character
from smallm.runs.cache_folder import cache_folder
from smallm.tokenizer.text_formats import decoder_of
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.config import DataConfig
from smallm.training.data import store
from smallm.training.data.encoding import Survey, encode, survey
from smallm.training.data.source import Source, find_source
from smallm.training.data.split import split_key, split_text
from smallm.training.data.store import MappedIds

IDS_PER_PIECE = 1 << 18
BYTES = Vocabulary()


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as ids, cut once into a training part and the validation part that follows it.

    train_ids, val_ids: (N,) of the vocabulary's dtype, read-only. train_characters, val_characters: the lengths of the
    same parts in characters (code points). fingerprint: SHA-256 of the whole text in UTF-8, in hex, in the order of the
    parts. start_text: the character that generation from an empty seed starts from: a newline if the training part has
    one, otherwise its first character. folder: where the ids are stored. split, val_fraction: the settings of `data`
    that made the parts. train_ends: with `data.weights`, where the training part of each text ends in `train_ids`.
    """

    name: str
    vocabulary: Vocabulary = field(repr=False)
    train_ids: MappedIds = field(repr=False)
    val_ids: MappedIds = field(repr=False)
    train_characters: int
    val_characters: int
    fingerprint: str
    start_text: str
    folder: Path = field(repr=False)
    split: str = "tail"
    val_fraction: float = 0.1
    train_ends: tuple[int, ...] = ()

    def val_text(self) -> str:
        """The validation part as text."""
        return "".join(self.val_pieces())

    def val_pieces(self) -> Iterator[str]:
        """Yields the validation part as text, in pieces of bounded size."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for start in range(0, len(self.val_ids), IDS_PER_PIECE):
            yield decoder.decode(self.vocabulary.decode_bytes(self.val_ids[start : start + IDS_PER_PIECE]))

    def cache_file(self, name: str) -> Path:
        """The file that caches the results called `name` for this text and split."""
        return self.folder / f"{name}-{self.train_characters}.json"


def open_corpus(
    data: DataConfig, base: Vocabulary = BYTES, cache: Path | None = None, progress: bool = True, seed: int = 1,
    choose_val_fraction: Callable[[int], float] | None = None,
) -> Corpus:
    """Opens the text that the settings name; reads and encodes it only if the cache does not know it yet.

    base: the vocabulary to which the characters of the text are added.
    cache: folder for encoded texts; by default $SMALLM_CACHE, or the user's cache folder.
    progress: show a bar on stderr while a long text is read.
    seed: of the order of documents (`train.seed`).
    choose_val_fraction: gives the share of the validation part for the length of the text in characters; by default
    the share is `data.val_fraction`.
    Raises `UserError` for a text that cannot be found, read, decoded, split or stored.
    """
    decoder_of(data.encoding)  # an unknown encoding is an error for built-in texts, too
    cache = cache or cache_folder()
    try:
        text = find_source(data, cache)
        return _open(text, data, base, cache, progress, seed, choose_val_fraction or (lambda _: data.val_fraction))
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError from None
        raise UserError(f"cannot write to {cache}: {error.strerror or error}; set SMALLM_CACHE elsewhere") from None


def _open(
    text: Source, data: DataConfig, base: Vocabulary, cache: Path, progress: bool, seed: int,
    choose_val_fraction: Callable[[int], float],
) -> Corpus:
    def key(val_fraction: float | None) -> tuple[object, ...]:
        return (data.min_count, *split_key(data, seed, val_fraction))

    def recall() -> dict[str, Any] | None:
        found = store.recall(cache, text, key(None))
        return store.recall(cache, text, key(choose_val_fraction(found["characters"]))) if found else None

    def parts(known: Survey) -> tuple[int, Vocabulary, Path]:
        train_characters = _train_characters(text.name, known, choose_val_fraction(known.characters))
        vocabulary = known.vocabulary(train_characters, base)
        return train_characters, vocabulary, store.ids_folder(cache, known.fingerprint, vocabulary.hex_tokens().split())

    stored = None
    if remembered := recall():
        known = Survey(**remembered)
        train_characters, vocabulary, folder = parts(known)
        stored = store.load(folder)
    if stored is None:  # read it, also if it is remembered: `encode` must get the fingerprint of the text as it is now
        before = store.stamps(text)
        with split_text(text, data, seed, cache, progress, choose_val_fraction) as ordered:
            known = survey(ordered, data.min_count, progress)
            for each in {key(None), key(choose_val_fraction(known.characters))}:
                store.remember(cache, text, each, before, asdict(known))
            train_characters, vocabulary, folder = parts(known)
            stored = store.load(folder) or store.build(
                folder, lambda folder: encode(ordered, vocabulary, known.fingerprint, folder, progress), progress
            )
    if stored is None:
        raise UserError(f"{cache} was changed while it was being written; run the command again")
    ids, marks = stored
    cut = _ids_of(ids, marks, train_characters)
    ends = [_ids_of(ids, marks, end) for end in accumulate(known.train_characters)]
    return Corpus(
        text.name, vocabulary, ids.part(0, cut), ids.part(cut, len(ids)),
        train_characters, known.characters - train_characters, known.fingerprint,
        start_text="\n" if known.first_newline < train_characters else known.first_character, folder=folder,
        split=data.split, val_fraction=choose_val_fraction(known.characters), train_ends=tuple(ends),
    )  # fmt: skip


def _train_characters(name: str, known: Survey, val_fraction: float) -> int:
    """How many of the characters are for training; the others are for validation. Raises `UserError` if too few."""
    characters = known.characters
    train = sum(known.train_characters) or int(characters * (1 - Fraction(str(val_fraction))))  # 1/10 for 0.1
    val = characters - train
    if not characters:
        raise UserError(f"{name} is empty; pass a text with --data FILE")
    if min(train, val) < 2:
        parts = f"{train} characters to train on and {val} to validate on; each needs 2"
        raise UserError(f"{name} is too short: it gives {parts}; pass a longer text or --data.val_fraction 0.5")
    return train


def _ids_of(ids: MappedIds, marks: store.Marks, characters: int) -> int:
    """The number of ids that the first `characters` of the text take."""
    at, offset = marks[bisect_right(marks, characters, key=lambda mark: mark[0]) - 1]
    while offset < len(ids):  # an id that continues a character may be the first of its piece
        starts = np.flatnonzero(begins_character(ids[offset : offset + IDS_PER_PIECE]))
        if characters - at < len(starts):
            return offset + int(starts[characters - at])
        at, offset = at + len(starts), offset + IDS_PER_PIECE
    return offset
