"""Many texts at a time: one step of the model gives each of them its next id."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from smallm.generation.sequence_state import SequenceState
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session
from smallm.model_file.manifest import Manifest

MAX_STREAMS = 64
MAX_CACHE = 1 << 28  # bytes of keys and values, unless a single text takes more
FULL_ENOUGH = 0.75  # share of the streams that are in use; dropping others copies the caches of these


def generate_batch(session: Session, drafts: Iterable[SequenceState]) -> Iterator[SequenceState]:
    """Yields a draft each time when it has text to take or is done; those that are done make room for others.

    The drafts are of one request.
    """
    drafts = iter(drafts)
    first = list(islice(drafts, streams(session.manifest)))
    return _Batch(session, first, drafts).run() if first else iter(())


def streams(model: Manifest) -> int:
    """How many texts are written at a time."""
    cache = 8 * model.n_layer * model.n_kv_head * model.head_dim * model.block_size  # bytes a text, float32
    return max(1, min(MAX_STREAMS, MAX_CACHE // cache))


class _Batch:
    """The streams of a decoder: each has a draft, or none is left for it."""

    def __init__(self, session: Session, drafts: list[SequenceState], waiting: Iterator[SequenceState]):
        self._drafts: list[SequenceState | None] = list(drafts)
        self._waiting = waiting
        self._weigh = drafts[0].weigh
        self._decoder = KVCache(session, len(drafts))
        self._fresh = np.ones(len(drafts), bool)  # streams that have nothing of their draft in the cache, or no draft
        self._steps = 0  # that all can take together, before one is full
        self._logits = np.zeros((len(drafts), session.manifest.vocab_size), np.float32)

    def run(self) -> Iterator[SequenceState]:
        ended = any(draft.done for draft in self._drafts)
        while any(self._drafts):
            if ended:
                yield from self._replace()
                self._drop()
                ended = False
            self._predict()
            for draft, *row in zip(self._drafts, self._logits, self._weigh(self._logits), strict=True):
                if draft is not None:
                    draft.choose(*row)
                    if draft.done:
                        ended = True
                    elif draft.ready:
                        yield draft

    def _replace(self) -> Iterator[SequenceState]:
        """Yields the texts that are done; those that wait take their streams."""
        self._steps = 0
        for stream, draft in enumerate(self._drafts):
            while draft is not None and draft.done:  # one that wants no text is done before it began
                yield draft
                draft = self._drafts[stream] = next(self._waiting, None)
                self._fresh[stream] = True

    def _drop(self) -> None:
        """Gives up the streams without a text when they are too many to be carried along."""
        kept = [stream for stream, draft in enumerate(self._drafts) if draft is not None]
        if 0 < len(kept) <= FULL_ENOUGH * len(self._drafts):
            self._decoder.select(np.array(kept))
            self._drafts = [self._drafts[stream] for stream in kept]
            self._fresh, self._logits = self._fresh[kept], self._logits[: len(kept)]

    def _predict(self) -> None:
        """The logits after each text: those that have room in their caches together, the others one by one."""
        if self._steps:
            self._steps -= 1
            self._step()
            return
        decoder, size = self._decoder, self._decoder.block_size
        for stream in np.flatnonzero(~self._fresh & (decoder.lengths == size)):
            if self._drafts[stream].request.overflow == "slide":
                decoder.slide(stream)
        alone = self._fresh | (decoder.lengths == size)
        for stream in np.flatnonzero(alone):
            decoder.reset(stream)  # what a step adds to it is not looked at
        if not alone.all():
            self._step()
        read: dict[bytes, int] = {}  # by which stream; many texts of one seed read it once
        for stream in np.flatnonzero(alone):
            draft = self._drafts[stream]
            decoder.reset(stream)
            if draft is not None:
                window = draft.window(self._fresh[stream])
                other = read.setdefault(window.tobytes(), stream)
                if other == stream:
                    self._logits[stream] = decoder.prefill(window, stream)
                else:
                    decoder.restore(decoder.snapshot(other), stream)
                    self._logits[stream] = self._logits[other]
                self._fresh[stream] = False
        self._steps = size - int(decoder.lengths.max())

    def _step(self) -> None:
        ids = [0 if draft is None else draft.history[-1] for draft in self._drafts]
        self._logits[:] = self._decoder.decode_batch(np.array(ids))
