"""`LanguageModel`: an exported model that writes and reads text. numpy and onnxruntime only.

The text itself comes from `smallm/generation`.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

import numpy as np

from smallm.errors import UserError
from smallm.generation.batch import generate_batch
from smallm.generation.config import Options, Request, resolve
from smallm.generation.draft_table import DRAFT_TABLE_FILE, OLD_DRAFT_TABLE_FILE, DraftTable
from smallm.generation.sampler import Sampling, ranked
from smallm.generation.sequence_state import SequenceState
from smallm.generation.text_stream import TextStream
from smallm.inference.kv_cache import KVCache
from smallm.inference.scoring import IGNORED, Perplexity, begins_character, nats, windows
from smallm.inference.session import Session
from smallm.model_file.manifest import Manifest
from smallm.runs.layout import EXPORT, is_run
from smallm.tokenizer.vocabulary import Vocabulary

MODEL_FILE = "model.onnx"
MAX_LOGITS = 1 << 22  # that are computed at a time: 16 MB; more at a time are no faster
MIN_PROBABILITY = 1e-6  # of the beginning of a character whose ends are looked for


class Piece(NamedTuple):
    """Some characters of one of several texts."""

    number: int
    """Which text: the place of its seed."""
    text: str
    logprobs: list[float]
    """As `TextStream.logprobs`; empty unless they were asked for."""
    last: bool
    """Whether this ends the text."""


class LanguageModel:
    """A character-level language model.

    A context longer than `block_size` ids is cut: with overflow "crop" the model sees exactly the last block_size ids
    at every step, and the window is computed anew for each id; with "shift" it goes on with the newest half of the
    window whenever that is full, which costs no more time per character than before. A model trained with
    `model.window` has a third way, "slide": attention sees so many positions anyway, so the text has no end, exactly.
    """

    def __init__(self, session: Session, guesses: DraftTable | None = None):
        self._session, self._guesses = session, guesses
        self.metadata: Manifest = session.manifest
        self.vocabulary: Vocabulary = session.manifest.vocabulary
        self.vocab_size, self.block_size = session.manifest.vocab_size, session.manifest.block_size

    @classmethod
    def load(cls, path: str | Path, threads: int | None = None) -> "LanguageModel":
        """Opens a run that was exported, an export folder or an .onnx file. Raises `UserError`.

        With the file of guesses that the export left beside the model, text comes faster, up to twice.
        """
        file = find_model(Path(path))
        session = Session(file, threads)
        tables = (file.with_name(name) for name in (DRAFT_TABLE_FILE, OLD_DRAFT_TABLE_FILE))
        table = next((path for path in tables if path.is_file()), None)
        return cls(session, table and DraftTable.load(table, session.manifest.vocab_size))

    def generate(self, seed: str = "", max_length: int = 500, **options: Unpack[Options]) -> str:
        """The seed text followed by up to `max_length` new characters. Raises `UserError` for a value out of range."""
        return seed + "".join(self.stream(seed, max_length, **options))

    def generate_many(self, seeds: Sequence[str], max_length: int = 500, **options: Unpack[Options]) -> list[str]:
        """A text for each seed, as `generate` gives it with the stream_number that is higher by the seed's place.

        They are computed side by side, which is several times faster than one after the other.
        """
        texts = [[seed] for seed in seeds]
        for piece in self.stream_many(seeds, max_length, **options):
            texts[piece.number].append(piece.text)
        return ["".join(pieces) for pieces in texts]

    def stream(
        self, seed: str = "", max_length: int = 500, logprobs: bool = False, **options: Unpack[Options]
    ) -> TextStream:
        """The new text alone, in pieces of whole characters as they come; options as for `generate`.

        What it returns can be left and gone back to, and branched, see `TextStream`.
        """
        draft = self._draft(seed, resolve(self.metadata, max_length, **options), 0, logprobs)
        return TextStream(self._session, draft, self._guesses)

    def stream_many(
        self, seeds: Sequence[str], max_length: int = 500, logprobs: bool = False, **options: Unpack[Options]
    ) -> Iterator[Piece]:
        """The new texts of `generate_many` as they come, interleaved; the last piece of each may be empty."""
        request = resolve(self.metadata, max_length, **options)
        drafts = [self._draft(seed, request, i, logprobs) for i, seed in enumerate(seeds)]
        return self._alone(*drafts) if len(drafts) == 1 else self._pieces(drafts)

    def _alone(self, draft: SequenceState) -> Iterator[Piece]:
        writer, last = TextStream(self._session, draft, self._guesses), False
        for text in writer:
            last = draft.done
            yield Piece(0, text, writer.logprobs, last)
        if not last:
            yield Piece(0, "", [], True)

    def _pieces(self, drafts: list[SequenceState]) -> Iterator[Piece]:
        numbers = {id(draft): number for number, draft in enumerate(drafts)}
        for draft in generate_batch(self._session, drafts):
            text = draft.take()
            yield Piece(numbers[id(draft)], text, draft.take_logprobs(len(text)), draft.done)

    def _draft(self, seed: str, request: Request, number: int, logprobs: bool) -> SequenceState:
        ids = self._encode_seed(seed).tolist()
        draft = SequenceState(self.vocabulary, ids, self.block_size, request, request.rng(number))
        draft.keeps_logprobs = logprobs
        return draft

    def next_characters(self, text: str, n: int = 10) -> list[tuple[str, float]]:
        """The n likeliest next characters and their probabilities at temperature 1, the likeliest first.

        Fewer if there are fewer; one that is spelled in several ids may be missing if it is less likely than 1e-6. What
        is missing to 1 is also the probability of bytes that do not form a character.
        """
        after = self._continuations(self._encode_seed(text)[-self.block_size :])
        found: list[tuple[str, float]] = []
        paths: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]  # beginnings of a character, the likeliest first
        while paths and len(found) < n:
            negative, path = heapq.heappop(paths)
            character = self.vocabulary.decode_bytes(path).decode("utf-8", errors="ignore")
            if character:
                if tuple(self.vocabulary.encode(character)) == path:  # else it is spelled in bytes and has an id
                    found.append((character, -negative))
            elif len(path) < 4 and negative < -MIN_PROBABILITY:
                allowed, weights = ranked(after(path), Sampling(temperature=1.0))
                fits = begins_character(allowed) == (not path)  # others could not become a character
                probabilities = -negative * weights[fits] / weights.sum()
                for id, p in zip(allowed[fits].tolist(), probabilities.tolist(), strict=True):
                    heapq.heappush(paths, (-p, (*path, id)))
        return found

    def _continuations(self, context: np.ndarray) -> Callable[[tuple[int, ...]], np.ndarray]:
        """context (T,) -> a function of some more ids that gives the logits (V,) after them."""
        decoder = KVCache(self._session)
        first = decoder.prefill(context).copy()
        snapshot = decoder.snapshot()

        def after(path: tuple[int, ...]) -> np.ndarray:
            if not path:
                return first
            if len(context) + len(path) <= self.block_size:
                decoder.restore(snapshot)
                return decoder.prefill(np.array(path))
            decoder.reset()
            return decoder.prefill(np.append(context, path)[-self.block_size :])

        return after

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """ids (B, T) -> logits (B, T, V) of what follows each of them; T up to block_size. Raises `UserError`."""
        return self._session.logits(ids)

    def score(self, text: str) -> np.ndarray:
        """Nats of each character (len(text),) float64; the first is NaN, since nothing comes before it."""
        ids = self.vocabulary.encode(text)
        starts = np.flatnonzero(begins_character(ids))
        if not len(starts):
            return np.empty(0)
        scored = [self._nats(*batch)[batch[1] != IGNORED] for batch in windows([ids], self.block_size)]
        later = np.concatenate([np.empty(0), *scored])  # of the ids after the first character
        return np.add.reduceat(np.concatenate([np.full(len(ids) - len(later), np.nan), later]), starts)

    def perplexity(self, text: str | Iterable[str], stride: int | None = None) -> Perplexity:
        """How well the model predicts a text, given as a string or in pieces of any length.

        Every character after the first is predicted once: in windows of block_size ids side by side, or, with `stride`,
        in overlapping windows that far apart, where each id sees at least block_size - stride ids before it. Raises
        `UserError` for a text of fewer than two characters or a stride out of range.
        """
        if stride is not None and not 1 <= stride <= self.block_size:
            raise UserError(f"stride = {stride} is out of range; it must be from 1 to block_size = {self.block_size}")
        characters = 0

        def pieces() -> Iterator[np.ndarray]:
            nonlocal characters
            for piece in [text] if isinstance(text, str) else text:
                characters += len(piece)
                yield self.vocabulary.encode(piece)

        total = sum(float(self._nats(*batch).sum()) for batch in windows(pieces(), self.block_size, stride))
        if characters < 2:
            raise UserError(f"the text has {characters} character(s); perplexity needs at least 2")
        return Perplexity.of(total, characters - 1)

    def _encode_seed(self, seed: str) -> np.ndarray:
        seen = (seed or self.metadata.start_text)[-self.block_size :]  # a character has at least one id
        return self.vocabulary.encode(seen).astype(np.int64)

    def _nats(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """inputs (B, T), targets (B, T) -> nats (B, T) float64; 0 where the target does not count."""
        rows = max(1, MAX_LOGITS // (inputs.shape[1] * self.vocab_size))
        if len(inputs) > rows:
            parts = range(0, len(inputs), rows)
            return np.concatenate([self._nats(inputs[i : i + rows], targets[i : i + rows]) for i in parts])
        used = 1 + np.flatnonzero((targets != IGNORED).any(axis=0)).max(initial=0)  # the last window may be short
        found = np.zeros(targets.shape)
        found[:, :used] = nats(self._session.logits(inputs[:, :used]), targets[:, :used])
        return found


def find_model(path: Path) -> Path:
    """The .onnx file that a run, an export folder or a file's own path stands for. Raises `UserError`."""
    try:
        for file in (path, path / MODEL_FILE, path / EXPORT / MODEL_FILE):
            if file.is_file():
                return file
        if is_run(path):
            raise UserError(f"{path} is not exported yet; run: python export.py {path}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    raise UserError(f"there is no model in {path}; give a run, an export folder or an .onnx file")
