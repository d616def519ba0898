"""Many requests, one model: the requests take turns in a few threads, a slice of time each."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from smallm.generation.text_stream import TextStream
from smallm.language_model import LanguageModel
from smallm.serve.completion_request import CompletionRequest, Limits

SLICE = 0.02  # seconds of computing before the next request has its turn


class Slice(NamedTuple):
    """Some new characters of one text."""

    number: int
    text: str
    logprobs: list[float | None]
    finish_reason: str | None
    """None except at the end of the text: "stop" or "length"."""


class BusyError(Exception):
    """As many requests as the limit allows are being answered."""


class GenerationQueue:
    """Answers requests with one model. A request waits in the queue of the threads between its slices."""

    def __init__(self, model: LanguageModel, limits: Limits, threads: int):
        self.model, self.limits = model, limits
        self.active = 0
        """Requests that are being answered."""
        self.characters = 0
        """New characters since the start."""
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="generate")

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the active requests. Raises `BusyError` if `max_requests` requests are active."""
        if self.active >= self.limits.max_requests:
            raise BusyError
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    async def slices(self, request: CompletionRequest) -> AsyncGenerator[Slice, None]:
        """The texts of a request, one after the other; text i is prompt i // n, with `stream_number` = i."""
        loop = asyncio.get_running_loop()
        for number in range(len(request.prompts) * request.n):
            prompt = request.prompts[number // request.n]
            if request.echo and prompt:
                yield await loop.run_in_executor(self._threads, self._echo, request, number, prompt)
            start = partial(self.model.stream, prompt, logprobs=request.logprobs, **request.options(number))
            stream = await loop.run_in_executor(self._threads, start)
            length, finish_reason = 0, None
            while finish_reason is None:
                text, logprobs = await loop.run_in_executor(self._threads, _compute, stream)
                length += len(text)
                self.characters += len(text)
                if stream.done:
                    finish_reason = "length" if length >= request.config.max_length else "stop"
                yield Slice(number, text, logprobs, finish_reason)

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _echo(self, request: CompletionRequest, number: int, prompt: str) -> Slice:
        nats = self.model.score(prompt).tolist() if request.logprobs else []
        return Slice(number, prompt, [None if math.isnan(each) else -each for each in nats], None)


def _compute(stream: TextStream) -> tuple[str, list[float | None]]:
    """The next characters of a stream: those of a slice of time, and at least one piece."""
    end, texts, logprobs = time.monotonic() + SLICE, list[str](), list[float | None]()
    for text in stream:
        texts.append(text)
        logprobs += stream.logprobs
        if time.monotonic() >= end:
            break
    return "".join(texts), logprobs
