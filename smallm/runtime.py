"""`LanguageModel`: an exported model that writes and reads text. numpy and onnxruntime only.

Three layers: ids (`_next_ids`), text as it comes (`stream`), a whole string (`generate`).
"""

import heapq
import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import numpy as np

from smallm.errors import UserError
from smallm.manifest import Manifest
from smallm.runs import EXPORT, is_run
from smallm.sampling import NOT_FINITE, Rng, Sampling, ranked, sample
from smallm.scoring import IGNORED, Perplexity, begins_character, windows
from smallm.session import Session
from smallm.vocabulary import Vocabulary

MODEL_FILE = "model.onnx"
MOST_LOGITS = 1 << 25  # that are computed at a time: 128 MB
LEAST_PROBABILITY = 1e-6  # of the beginning of a character whose ends are looked for
Overflow = Literal["crop", "shift"]


class Options(TypedDict, total=False):
    """Options of generation; what is left out takes the model's own default (`LanguageModel.metadata.sampling`)."""

    temperature: float | None
    """0 = always the likeliest id."""
    top_k: int | None
    """Choose from the k likeliest ids; 0 = all."""
    top_p: float | None
    """Choose from the likeliest ids that make up this probability."""
    min_p: float | None
    """Least probability, relative to the likeliest id."""
    rng_seed: int | None
    """Equal rng_seed and stream_number give equal text; None = a random one."""
    stream_number: int
    """Tells several texts of one rng_seed apart."""
    stop: str | Sequence[str]
    """Generation ends before the first of these texts; only new text counts, and '' is no stop."""
    overflow: Overflow
    """What happens past block_size, see `LanguageModel`."""


class LanguageModel:
    """A character-level language model.

    A context longer than `block_size` ids is cut: with overflow "crop" the model sees exactly the last block_size ids
    at every step, and the window is computed anew for each id; with "shift" it goes on with the newest half of the
    window whenever that is full, which costs no more time per character than before.
    """

    def __init__(self, session: Session):
        self._session = session
        self.metadata: Manifest = session.manifest
        self.vocabulary: Vocabulary = session.manifest.vocabulary
        self.vocab_size, self.block_size = session.manifest.vocab_size, session.manifest.block_size

    @classmethod
    def load(cls, path: str | Path, threads: int | None = None) -> "LanguageModel":
        """Opens a run that was exported, an export folder or an .onnx file. Raises `UserError`."""
        return cls(Session(find_model(Path(path)), threads))

    def generate(self, seed: str = "", max_length: int = 500, **options: Unpack[Options]) -> str:
        """The seed text followed by up to `max_length` new characters. Raises `UserError` for a value out of range."""
        return seed + "".join(self.stream(seed, max_length, **options))

    def stream(self, seed: str = "", max_length: int = 500, **options: Unpack[Options]) -> Iterator[str]:
        """The new text alone, in pieces of whole characters as they come; options as for `generate`."""
        return self._stream(seed, max_length, **options)

    def _stream(
        self,
        seed: str,
        max_length: int,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        rng_seed: int | None = None,
        stop: str | Sequence[str] = (),
        overflow: Overflow = "crop",
        stream_number: int = 0,
    ) -> Iterator[str]:
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampling = Sampling.resolve(given, self.metadata.sampling)
        rng = Rng(secrets.randbits(32) if rng_seed is None else rng_seed, stream_number)
        if max_length < 0:
            raise UserError(f"max_length = {max_length} is out of range; it must be 0 or more")
        if overflow not in ("crop", "shift"):
            raise UserError(f"overflow = {overflow!r} is unknown; it must be 'crop' or 'shift'")
        stops = [stop] if isinstance(stop, str) else list(stop)
        ids = self._next_ids(self._encode_seed(seed), sampling, rng, overflow)
        return _until(islice(self._characters(ids), min(max_length, sys.maxsize)), [s for s in stops if s])

    def next_characters(self, text: str, n: int = 10) -> list[tuple[str, float]]:
        """The n likeliest next characters and their probabilities at temperature 1, the likeliest first.

        Fewer if there are fewer; one that is spelled in several ids may be missing if it is less likely than 1e-6. What
        is missing to 1 is also the probability of bytes that do not form a character.
        """
        context = self._encode_seed(text)[-self.block_size :]
        found: list[tuple[str, float]] = []
        paths: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]  # beginnings of a character, the likeliest first
        while paths and len(found) < n:
            negative, path = heapq.heappop(paths)
            character = self.vocabulary.decode_bytes(path).decode("utf-8", errors="ignore")
            if character:
                if tuple(self.vocabulary.encode(character)) == path:  # else it is spelled in bytes and has an id
                    found.append((character, -negative))
            elif len(path) < 4 and negative < -LEAST_PROBABILITY:
                ids = np.concatenate((context, np.array(path, np.int64)))[-self.block_size :]
                allowed, weights = ranked(self._session.decoder().feed(ids), Sampling(temperature=1.0))
                fits = begins_character(allowed) == (not path)  # others could not become a character
                probabilities = -negative * weights[fits] / weights.sum()
                for id, p in zip(allowed[fits].tolist(), probabilities.tolist(), strict=True):
                    heapq.heappush(paths, (-p, (*path, id)))
        return found

    def score(self, text: str) -> np.ndarray:
        """Nats of each character (len(text),) float64; the first is NaN, since nothing comes before it."""
        ids = self.vocabulary.encode(text)
        starts = np.flatnonzero(begins_character(ids))
        if not len(starts):
            return np.empty(0)
        scored = [self._nats(*batch)[batch[1] != IGNORED] for batch in windows([ids], self.block_size)]
        nats = np.concatenate([np.empty(0), *scored])  # of the ids after the first character
        return np.add.reduceat(np.concatenate([np.full(len(ids) - len(nats), np.nan), nats]), starts)

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

        nats = sum(float(self._nats(*batch).sum()) for batch in windows(pieces(), self.block_size, stride))
        if characters < 2:
            raise UserError(f"the text has {characters} character(s); perplexity needs at least 2")
        return Perplexity.of(nats, characters - 1)

    def _encode_seed(self, seed: str) -> np.ndarray:
        seen = (seed or self.metadata.start_text)[-self.block_size :]  # a character has at least one id
        return self.vocabulary.encode(seen).astype(np.int64)

    def _nats(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """inputs (B, T), targets (B, T) -> nats (B, T) float64; 0 where the target does not count."""
        rows = max(1, MOST_LOGITS // (inputs.shape[1] * self.vocab_size))
        if len(inputs) > rows:
            parts = range(0, len(inputs), rows)
            return np.concatenate([self._nats(inputs[i : i + rows], targets[i : i + rows]) for i in parts])
        logits = self._session.logits(inputs)  # (B, T, V)
        if not np.isfinite(logits).all():
            raise UserError(NOT_FINITE)
        with np.errstate(over="ignore"):  # from one end of float32 to the other: infinitely unlikely
            logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, targets.clip(min=0)[..., None], axis=-1)[..., 0].astype(np.float64)
        nats = np.log(np.exp(logits, out=logits).sum(axis=-1)) - chosen
        return np.where(targets == IGNORED, 0.0, nats)

    def _next_ids(self, ids: np.ndarray, sampling: Sampling, rng: Rng, overflow: Overflow) -> Iterator[int]:
        """Ids without end, each drawn from the model's prediction after all before it."""
        decoder = self._session.decoder()
        window = ids[-self.block_size :]
        logits = decoder.feed(window)
        history = list(window)
        while True:
            id = sample(logits, rng.uniform(), sampling)
            yield id
            history.append(id)
            if decoder.lengths[0] < self.block_size:
                logits = decoder.feed(np.array([id]))
                continue
            keep = self.block_size if overflow == "crop" else max(1, self.block_size // 2)
            history = history[-keep:]
            decoder.reset()
            logits = decoder.feed(np.array(history))

    def _characters(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = self.vocabulary.decoder()
        for id in ids:
            yield from decoder.push(id)


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


def _until(characters: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Characters up to the first stop string; those that may be its beginning are held back."""
    matchers, held = [_Matcher(stop) for stop in stops], ""
    for character in characters:
        held += character
        begun = [matcher.push(character) for matcher in matchers]
        met = [n for n, stop in zip(begun, stops, strict=True) if n == len(stop)]
        if met:
            held = held[: len(held) - max(met)]
            break
        free = len(held) - max(begun, default=0)
        if free:
            yield held[:free]
            held = held[free:]
    if held:
        yield held


class _Matcher:
    """How much of the beginning of a word a text ends with (Knuth, Morris and Pratt 1977), for words of any length.

    Time and memory go with the text, not with the word: borders are found only as far as the text has come.
    """

    def __init__(self, word: str):
        self.word, self.length = word, 0
        self.borders = [0]  # of word[:1], word[:2] …: length of the longest proper beginning that is its end too

    def push(self, character: str) -> int:
        """The new length; once it is that of the word, the end."""
        self.length = self._longer(self.length, character)
        if self.length > len(self.borders):
            self.borders.append(self._longer(self.borders[-1], character))
        return self.length

    def _longer(self, length: int, character: str) -> int:
        while length and self.word[length] != character:
            length = self.borders[length - 1]
        return length + (self.word[length] == character)
