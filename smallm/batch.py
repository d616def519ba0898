"""Many texts at a time: one step of the model gives each of them its next id."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from smallm.draft import Draft
from smallm.manifest import Manifest
from smallm.session import Session

MOST_STREAMS = 64
MOST_CACHE = 1 << 28  # bytes of keys and values, unless a single text takes more
FULL_ENOUGH = 0.75  # share of the streams that are in use; dropping others copies the caches of these


def write_together(session: Session, drafts: Iterable[Draft]) -> Iterator[Draft]:
    """Yields a draft each time when it has text to take or is done; those that are done make room for others."""
    drafts = iter(drafts)
    first = list(islice(drafts, streams(session.manifest)))
    return _Batch(session, first, drafts).run() if first else iter(())


def streams(model: Manifest) -> int:
    """How many texts are written at a time."""
    cache = 8 * model.n_layer * model.n_kv_head * model.head_dim * model.block_size  # bytes a text, float32
    return max(1, min(MOST_STREAMS, MOST_CACHE // cache))


class _Batch:
    """The streams of a decoder: each has a draft, or none is left for it."""

    def __init__(self, session: Session, drafts: list[Draft], waiting: Iterator[Draft]):
        self._drafts: list[Draft | None] = list(drafts)
        self._waiting = waiting
        self._fed = np.zeros(len(drafts), np.int64)  # ids of the text in the cache (streams,)
        self._decoder = session.decoder(len(drafts))
        self._logits = np.zeros((len(drafts), session.manifest.vocab_size), np.float32)

    def run(self) -> Iterator[Draft]:
        while any(self._drafts):
            if any(draft is not None and draft.done for draft in self._drafts):
                yield from self._replace()
                self._drop()
            self._predict()
            for draft, logits in zip(self._drafts, self._logits, strict=True):
                if draft is not None:
                    draft.choose(logits)
                    if draft.ready and not draft.done:
                        yield draft

    def _replace(self) -> Iterator[Draft]:
        """Yields the texts that are done; those that wait take their streams."""
        for stream, draft in enumerate(self._drafts):
            while draft is not None and draft.done:  # one that wants no text is done before it began
                yield draft
                draft = self._drafts[stream] = next(self._waiting, None)
                self._fed[stream] = 0

    def _drop(self) -> None:
        """Gives up the streams without a text when they are too many to be carried along."""
        kept = [stream for stream, draft in enumerate(self._drafts) if draft is not None]
        if 0 < len(kept) <= FULL_ENOUGH * len(self._drafts):
            self._decoder.select(np.array(kept))
            self._drafts = [self._drafts[stream] for stream in kept]
            self._fed, self._logits = self._fed[kept], self._logits[: len(kept)]

    def _predict(self) -> None:
        """The logits after each text: those that have room in their caches together, the others one by one."""
        decoder, size = self._decoder, self._decoder.block_size
        together = (self._fed > 0) & (self._fed < size)
        if together.any():
            for stream in np.flatnonzero(~together):
                decoder.reset(stream)  # what the step adds to it is not looked at
            self._logits[:] = decoder.step(np.array([draft.history[-1] if draft else 0 for draft in self._drafts]))
            self._fed += together
        for stream in np.flatnonzero(~together):
            draft = self._drafts[stream]
            if draft is not None:
                window = draft.window(fresh=self._fed[stream] == 0)
                decoder.reset(stream)
                self._logits[stream] = decoder.feed(window, stream)
                self._fed[stream] = len(window)
