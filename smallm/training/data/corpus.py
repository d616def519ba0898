"""A text as ids on disk: encoded once, then memory-mapped.

The last part of the text is kept for validation; nothing crosses the split. The ids are cached by content, so a file
that changed is noticed and one that only moved is not encoded again.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from smallm.errors import UserError
from smallm.tokenizer.vocabulary import Vocabulary, frequent
from smallm.training.cache import cache_folder
from smallm.training.config import DataConfig
from smallm.training.data import index, store
from smallm.training.data.encoding import encode, survey, training_counts
from smallm.training.data.ids import MappedIds
from smallm.training.data.source import Source, find_source
from smallm.training.data.store import Stored
from smallm.training.data.tidy import Tidy

CACHE_FORMAT = 1  # to be raised when the cached files, or the ids that a Vocabulary gives, change their meaning
CHARACTERS_PER_PIECE = 1 << 18
BYTES = Vocabulary()


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as ids, cut once into a training part and the validation part that follows it.

    train_ids, val_ids: (N,) of the vocabulary's dtype, read-only; val_file: the validation part in UTF-8;
    train_characters, val_characters: the lengths of the same parts in characters (code points); fingerprint: SHA-256 of
    the whole text in UTF-8, in hex; start_text: the character that generation from an empty seed starts from, a newline
    if the training part has one, else its first.
    """

    name: str
    vocabulary: Vocabulary = field(repr=False)
    train_ids: MappedIds = field(repr=False)
    val_ids: MappedIds = field(repr=False)
    val_file: Path = field(repr=False)
    train_characters: int
    val_characters: int
    fingerprint: str
    start_text: str

    def val_text(self) -> str:
        """The validation part as text."""
        return "".join(self.val_pieces())

    def val_pieces(self) -> Iterator[str]:
        """The validation part as text, in pieces of bounded size."""
        with self.val_file.open(encoding="utf-8", errors="replace", newline="") as file:
            while piece := file.read(CHARACTERS_PER_PIECE):
                yield piece


def open_corpus(
    source: str,
    *,
    encoding: str = "utf-8",
    min_count: int,
    val_fraction: float,
    normalise: str = "none",
    newlines: str = "keep",
    base: Vocabulary = BYTES,
    cache: Path | None = None,
    progress: bool = True,
) -> Corpus:
    """Open `source`: a file, a folder (every *.txt below it, joined) or a built-in name, looked for in this order.

    encoding: that of the files (built-in texts know their own); min_count: how often the training part must have a
    character for it to get an id of its own; val_fraction: the share of the characters, in (0, 1), kept for validation;
    normalise: "nfc" joins accents with their letters; newlines: "lf" makes CR LF and CR one LF; base: the vocabulary to
    which the text's characters are added; cache: where encoded texts are kept, by default $SMALLM_CACHE or the user's
    cache folder; progress: show a bar on stderr while a long text is read. Raises UserError for all that the caller can
    mend.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--data.val_fraction must lie between 0 and 1, not {val_fraction}; try 0.1")
    try:
        "a".encode(encoding)  # refuses codecs such as hex, which do not give text
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError):
        raise UserError(f"there is no encoding {encoding!r}; pass for example --encoding latin-1") from None
    cache = cache or cache_folder()
    text = replace(find_source(source, encoding, cache), tidy=Tidy(normalise, newlines))
    try:
        stored = _open(text, min_count, val_fraction, base, cache, progress)
    except OSError as error:
        raise UserError(f"cannot write to {cache}: {error.strerror or error}; set SMALLM_CACHE elsewhere") from None
    if stored is None:
        raise UserError(f"{cache} was changed while it was being written; run the command again")
    facts, *files = stored
    scalars = (facts[key] for key in ("train_characters", "val_characters", "fingerprint", "start_text"))
    return Corpus(text.name, Vocabulary.from_hex_tokens(facts["tokens"]), *files, *scalars)


def corpus_of(data: DataConfig, base: Vocabulary = BYTES, progress: bool = True) -> Corpus:
    """The text that the settings name."""
    settings = {key: value for key, value in asdict(data).items() if key != "source"}
    return open_corpus(data.source, **settings, base=base, progress=progress)


def _open(
    text: Source, min_count: int, val_fraction: float, base: Vocabulary, cache: Path, progress: bool
) -> Stored | None:
    """What is stored of the text; it is read only if its files are not known, and encoded only if nothing is stored."""

    def folder(fingerprint: str) -> Path:
        key = json.dumps([CACHE_FORMAT, fingerprint, float(val_fraction), int(min_count), *base.hex_tokens().split()])
        return cache / "corpora" / hashlib.sha256(key.encode()).hexdigest()

    def write(folder: Path) -> dict:
        counts = training_counts(text, known, train_characters, progress)
        vocabulary = base.extended(frequent(counts, min_count))
        about_ids = encode(text, vocabulary, known.fingerprint, train_characters, folder, progress)
        val_characters = known.characters - train_characters
        about_text = {"fingerprint": known.fingerprint, "tokens": vocabulary.hex_tokens()}
        return about_text | about_ids | {"train_characters": train_characters, "val_characters": val_characters}

    remembered = index.recall(cache, text)
    if remembered and (stored := store.load(folder(remembered))):
        return stored
    before = index.stamps(text)
    known = survey(text, progress)
    index.remember(cache, text, before, known.fingerprint)
    train_characters = _cut(text.name, known.characters, val_fraction)
    place = folder(known.fingerprint)
    return store.load(place) or store.build(place, write, progress)


def _cut(name: str, characters: int, val_fraction: float) -> int:
    """How many of the characters are for training; the others are for validation."""
    train = int(characters * (1 - Fraction(str(val_fraction))))  # a tenth where 0.1 is written, not the nearest float
    val = characters - train
    if not characters:
        raise UserError(f"{name} is empty; pass a text with --data FILE")
    if min(train, val) < 2:
        parts = f"{train} characters to train on and {val} to validate on; each needs 2"
        raise UserError(f"{name} is too short: it gives {parts}; pass a longer text or --data.val_fraction 0.5")
    return train
