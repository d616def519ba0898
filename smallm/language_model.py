"""`LanguageModel`: an exported model that generates text and measures text. Needs numpy and onnxruntime only."""

import heapq
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from smallm.errors import UserError, command
from smallm.generation.batch import Batch, suits_batch
from smallm.generation.config import GenerationConfig, GenerationOptions, with_options
from smallm.generation.draft_table import DRAFT_TABLE_FILE, OLD_DRAFT_TABLE_FILE, DraftTable
from smallm.generation.logits_processors import LogitsProcessor
from smallm.generation.native_stream import NativeStream
from smallm.generation.sampler import probabilities
from smallm.generation.sequence_state import SequenceState
from smallm.generation.speculative import drafts_per_pass
from smallm.generation.text_stream import TextChunk, TextsInTurn, TextStream
from smallm.inference.kv_cache import KVCache
from smallm.inference.native import NativeModel
from smallm.inference.scoring import IDS_PER_BATCH, IGNORED, Perplexity, begins_character, nats, windows
from smallm.inference.session import Session
from smallm.model_file.manifest import Manifest
from smallm.options import Option, as_path, check_bool, check_int, with_hints
from smallm.runs.layout import EXPORT, is_run
from smallm.tokenizer.vocabulary import Vocabulary

MODEL_FILE = "model.onnx"
ENGINES = ("onnxruntime", "native")
MAX_LOGITS = 1 << 22  # logits computed at a time: 16 MB; more are not faster
MIN_PROBABILITY = 1e-6  # below it, the beginning of a character is not followed to its end


@with_hints
class LanguageModel:
    """A character-level language model.

    >>> with LanguageModel.load("runs/shakespeare") as lm:
    ...     print(lm.generate("O God, O God!", max_length=200, temperature=0.8, rng_seed=1))

    Attributes: `metadata` (sizes, sampling defaults, training facts), `vocabulary`, `vocab_size`, `block_size` (ids of
    context). Threads may share a model; a `TextStream` belongs to one thread at a time.

    A text may be longer than `block_size` ids; the option `overflow` says what the model sees then.
    """

    def __init__(
        self, session: Session, draft_table: DraftTable | None = None, native: NativeModel | None = None
    ):
        if not isinstance(session, Session):
            raise UserError("open a model with LanguageModel.load(path)")
        self._session, self._draft_table, self._native = session, draft_table, native
        self.metadata: Manifest = session.manifest
        self.vocabulary: Vocabulary = session.manifest.vocabulary
        self.vocab_size, self.block_size = session.manifest.vocab_size, session.manifest.block_size

    @classmethod
    def load(
        cls, path: str | Path, threads: int | None = None, speculative: bool = True, engine: str = "onnxruntime"
    ) -> "LanguageModel":
        """Opens a run that was exported, an export folder or an .onnx file.

        threads: threads of the engine, 1 to 1024; None chooses by the size of the model for ONNX Runtime, and is 1 for
        "native", where more threads pay for large models on cores without other work. speculative: whether to decode
        with `draft_table.npy` if the export left this file beside the model, which is up to twice as fast; with int8
        and int4, rounding may change the text. A damaged table is left aside, with a warning. engine: what generates
        text, "onnxruntime", or "native" for the C kit, which a C compiler on this machine compiles at first use:
        faster, the same text but for rounding; all other results are those of ONNX Runtime. Raises `UserError` for a
        path without a model, a model file that is damaged, and "native" without a compiler.
        """
        check_bool("speculative", speculative)
        Option(str, "", choices=ENGINES, name="engine", default="").check(engine)
        file = find_model(as_path("path", path))
        session = Session(file, threads)
        if engine == "native":
            return cls(session, native=NativeModel(file, threads or 1, speculative))
        tables = (file.with_name(name) for name in (DRAFT_TABLE_FILE, OLD_DRAFT_TABLE_FILE))
        table = next((path for path in tables if speculative and path.is_file()), None)
        try:
            return cls(session, DraftTable.load(table, session.manifest.vocab_size) if table else None)
        except UserError as error:
            warnings.warn(f"{error}; texts are the same without it, and come more slowly", stacklevel=3)
            return cls(session)

    def close(self) -> None:
        """Frees the memory of the model. Later calls raise `UserError`; streams that exist keep their part of it."""
        self._session.close()
        self._native = None  # which the streams keep

    def __enter__(self) -> "LanguageModel":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @with_options
    def generate(
        self,
        seed: str = "",
        max_length: int | None = None,
        *,
        config: GenerationConfig | None = None,
        **options: Unpack[GenerationOptions],
    ) -> str:
        """The seed text followed by new text.

        >>> lm.generate("O God, O God!", max_length=200, temperature=0.8, stop="\\n\\n", rng_seed=1)

        seed: the text to continue; "" stands for the model's start text, a newline. config: a `GenerationConfig`;
        options given in the call take precedence over it. Raises `UserError` for unknown options, values of the wrong
        type or out of range, and seed texts with a lone surrogate.
        """
        stream = self._stream(seed, _config(config, max_length, options), logprobs=False)
        return seed + "".join(stream)

    @with_options
    def generate_many(
        self,
        seeds: Iterable[str],
        max_length: int | None = None,
        *,
        config: GenerationConfig | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[str]:
        """For each seed text, this text followed by new text.

        >>> lm.generate_many(["ROMEO:", "JULIET:"], max_length=200, rng_seed=1)

        seeds: any iterable of texts. They are computed in a batch where that is faster: from 2 texts up, or from 4 if
        the model decodes with drafts. Text i equals that of `generate` with stream_number + i (with
        int8 and int4, rounding may change it). Arguments and errors as for `generate`.
        """
        seeds = _seeds(seeds)
        texts = [[seed] for seed in seeds]
        for chunk in self._chunks(seeds, _config(config, max_length, options), logprobs=False):
            texts[chunk.number].append(chunk.text)
        return ["".join(pieces) for pieces in texts]

    @with_options
    def stream(
        self,
        seed: str = "",
        max_length: int | None = None,
        logprobs: bool = False,
        *,
        config: GenerationConfig | None = None,
        **options: Unpack[GenerationOptions],
    ) -> TextStream:
        """The new text alone, as an iterator over pieces of whole characters.

        >>> for text in lm.stream("ROMEO:", max_length=500): print(text, end="", flush=True)

        logprobs: whether to fill `TextStream.logprobs` with the log-probability of each character. The stream can be
        left, continued and branched, see `TextStream`. Other arguments and errors as for `generate`.
        """
        return self._stream(seed, _config(config, max_length, options), logprobs)

    @with_options
    def stream_many(
        self,
        seeds: Iterable[str],
        max_length: int | None = None,
        logprobs: bool = False,
        *,
        config: GenerationConfig | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[TextChunk]:
        """The new texts of `generate_many` as they are computed, interleaved.

        >>> for chunk in lm.stream_many(["ROMEO:", "JULIET:"], max_length=500): print(chunk.number, chunk.text)

        Texts that are not computed in a batch follow one another. The last chunk of each text has `last` set, and may
        be empty. After an exception, also in the loop's body, the iterator continues with the same texts. Arguments and
        errors as for `stream`.
        """
        return self._chunks(_seeds(seeds), _config(config, max_length, options), logprobs)

    def next_characters(self, text: str, n: int = 10) -> list[tuple[str, float]]:
        """The n most likely next characters and their probabilities at temperature 1, the most likely first.

        The list is shorter if there are fewer characters. A character that several ids spell may be missing if it is
        less likely than 1e-6. The probabilities sum to less than 1: the remainder belongs to the characters not listed
        and to bytes that do not form a character.
        """
        check_int("n", n, at_least=0)
        after = self._continuations(self._encode_seed(text, "text")[-self.block_size :])
        found: list[tuple[str, float]] = []
        paths: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]  # beginnings of a character, the most likely first
        while paths and len(found) < n:
            negative, path = heapq.heappop(paths)
            character = self.vocabulary.decode_bytes(path).decode("utf-8", errors="ignore")
            if character:
                if tuple(self.vocabulary.encode(character)) == path:  # not the bytes of a character that has an id
                    found.append((character, -negative))
            elif len(path) < 4 and negative < -MIN_PROBABILITY:
                fits = begins_character(np.arange(self.vocab_size)) == (not path)  # others cannot become a character
                p = negative * probabilities(after(path))
                for id in np.flatnonzero(fits).tolist():
                    heapq.heappush(paths, (p.item(id), (*path, id)))
        return found

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """The logits (B, T, V) of what follows each of ids (B, T) int; B is at least 1, T is from 1 to `block_size`.

        Raises `UserError` for another shape and for ids that are not in the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or not (ids.size and ids.shape[1] <= self.block_size) or ids.dtype.kind not in "iu":
            raise UserError(
                f"ids of shape {ids.shape} and type {ids.dtype} do not fit; they must be integers of shape (B, T), "
                f"B from 1, T from 1 to block_size = {self.block_size}"
            )
        if not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise UserError(f"ids must be from 0 to {self.vocab_size - 1}, the size of this model's vocabulary")
        return self._session.logits(ids)

    def score(self, text: str) -> np.ndarray:
        """The nats of each character, -ln of its probability: (len(text),) float64.

        The first is NaN, since nothing comes before it. Raises `UserError` for lone surrogates.
        """
        _check_text("text", text)
        ids = self.vocabulary.encode(text)
        starts = np.flatnonzero(begins_character(ids))
        if not len(starts):
            return np.empty(0)
        scored = [self._nats(*batch)[batch[1] != IGNORED] for batch in self._windows([ids])]
        predicted = np.concatenate([np.empty(0), *scored])  # of the ids after the first character
        return np.add.reduceat(np.concatenate([np.full(len(ids) - len(predicted), np.nan), predicted]), starts)

    def perplexity(self, text: str | Iterable[str], stride: int | None = None) -> Perplexity:
        """How well the model predicts a text, given as a string or as an iterable of strings of any length.

        Every character after the first is predicted once. stride: ids between the starts of two windows, 1 to
        block_size; None = block_size, windows side by side. With a smaller stride the windows overlap and each id has
        at least block_size - stride ids of context. Raises `UserError` for a text of fewer than two characters or a
        stride out of range.
        """
        if stride is not None:
            check_int("stride", stride, 1, self.block_size, note="block_size")
        if isinstance(text, bytes) or not isinstance(text, Iterable):
            raise UserError(f"text = {text!r:.40} is not a text; pass a string, or an iterable of strings")
        characters = 0

        def pieces() -> Iterator[np.ndarray]:
            nonlocal characters
            for piece in [text] if isinstance(text, str) else text:
                _check_text("a piece of the text", piece)
                characters += len(piece)
                yield self.vocabulary.encode(piece)

        total = sum(float(self._nats(*batch).sum()) for batch in self._windows(pieces(), stride))
        if characters < 2:
            raise UserError(f"the text has {characters} character(s); perplexity needs at least 2")
        return Perplexity.of(total, characters - 1)

    def _stream(self, seed: str, config: GenerationConfig, logprobs: bool) -> TextStream:
        return self._streams([seed], config, logprobs)(0)

    def _chunks(self, seeds: Sequence[str], config: GenerationConfig, logprobs: bool) -> Iterator[TextChunk]:
        drafts = drafts_per_pass(self.metadata.precision, self._session.layer_bytes) if self._draft_table else 0
        if self._native is None and suits_batch(self.metadata, len(seeds), drafts):
            return Batch(self._session, self._states(seeds, config, logprobs))
        return TextsInTurn(len(seeds), self._streams(seeds, config, logprobs))

    def _streams(self, seeds: Sequence[str], config: GenerationConfig, logprobs: bool) -> Callable[[int], TextStream]:
        """A function from the number of a text to its stream."""
        states, native = self._states(seeds, config, logprobs), self._native
        if native is None:
            return lambda number: TextStream(self._session, states[number], self._draft_table)
        return lambda number: NativeStream(native, self.vocabulary.decode(states[number].history), states[number])

    def _states(self, seeds: Sequence[str], config: GenerationConfig, logprobs: bool) -> list[SequenceState]:
        check_bool("logprobs", logprobs)
        config = config.resolve(self.metadata)
        processor = LogitsProcessor(self.vocabulary, config)
        ids = (self._encode_seed(seed).tolist() for seed in seeds)
        return [
            SequenceState(self.vocabulary, each, self.block_size, config, processor, number, logprobs)
            for number, each in enumerate(ids)
        ]

    def _continuations(self, context: np.ndarray) -> Callable[[tuple[int, ...]], np.ndarray]:
        """A function from some more ids to the logits (V,) after context (T,) and these ids."""
        cache = KVCache(self._session)
        first = cache.prefill(context).copy()
        snapshot = cache.snapshot()

        def after(path: tuple[int, ...]) -> np.ndarray:
            if not path:
                return first
            if len(context) + len(path) <= self.block_size:
                cache.restore(snapshot)
                return cache.prefill(np.array(path))
            cache.reset()
            return cache.prefill(np.append(context, path)[-self.block_size :])

        return after

    def _encode_seed(self, seed: str, name: str = "seed") -> np.ndarray:
        _check_text(name, seed)
        seen = (seed or self.metadata.start_text)[-self.block_size :]  # a character has at least one id
        return self.vocabulary.encode(seen).astype(np.int64)

    def _windows(
        self, pieces: Iterable[np.ndarray], stride: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return windows(pieces, self.block_size, stride, min(IDS_PER_BATCH, MAX_LOGITS // self.vocab_size))

    def _nats(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The nats (B, T) float64 of targets (B, T) after inputs (B, T); 0 where the target does not count."""
        used = 1 + np.flatnonzero((targets != IGNORED).any(axis=0)).max(initial=0)  # the last window may be short
        found = np.zeros(targets.shape)
        found[:, :used] = nats(self._session.logits(inputs[:, :used]), targets[:, :used])
        return found


def find_model(path: Path) -> Path:
    """The .onnx file of a run, of an export folder, or the path itself if it is a file. Raises `UserError`."""
    try:
        for file in (path, path / MODEL_FILE, path / EXPORT / MODEL_FILE):
            if file.is_file():
                return file
        if is_run(path):
            raise UserError(f"{path} is not exported yet; run: {command('export', path)}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    raise UserError(f"there is no model in {path}; give a run, an export folder or an .onnx file")


def _config(
    config: GenerationConfig | None, max_length: int | None, options: Mapping[str, Any]
) -> GenerationConfig:
    """The config with the options of a call."""
    if max_length is not None:
        options = {"max_length": max_length, **options}
    if config is None:
        return GenerationConfig(**options)
    if not isinstance(config, GenerationConfig):
        raise UserError(f"config = {config!r:.40} is not a GenerationConfig; pass smallm.GenerationConfig(...)")
    return replace(config, **options) if options else config


def _seeds(seeds: Iterable[str]) -> list[str]:
    if isinstance(seeds, str | bytes) or not isinstance(seeds, Iterable):
        what = "a single string" if isinstance(seeds, str) else "not a list"
        raise UserError(f"seeds = {seeds!r:.40} is {what}; pass a list of seed texts")
    return list(seeds)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        what = "the text to continue" if name == "seed" else "a text"
        raise UserError(f"{name} = {text!r:.40} is not a string; pass {what}")
