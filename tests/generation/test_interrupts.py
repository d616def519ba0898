"""A stream that an exception interrupts at any point gives, when it goes on, the text of an uninterrupted stream."""

import asyncio
import dis
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import pytest
from toys import random_model, save_onnx

from smallm import LanguageModel, UserError
from smallm.export.draft_table import write_draft_table
from smallm.generation import batch
from smallm.inference.session import Binding

ROOMS = ("/smallm/generation/", "/smallm/inference/", "/smallm/tokenizer/", "/smallm/language_model.py")
SIGNAL_POINTS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME"}  # CPython runs handlers after these


@cache
def names_of(code) -> dict[int, str]:
    """The names of the instructions of a function, by offset."""
    return {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}


class Interrupter:
    """Runs functions, and raises an exception at the n-th point where a signal handler could raise one."""

    def __init__(self, error: type[BaseException] = KeyboardInterrupt):
        self._error = error
        self.interrupted = 0

    def run(self, function, n: int):
        """function(), in which the exception may be raised."""
        self._left, self._last = n, {}
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            return function()
        finally:
            sys.settrace(before)

    def finish(self, function, first: int):
        """function() as often as necessary: each time, the exception comes later, by a tenth."""
        while True:
            try:
                return self.run(function, first)
            except self._error:
                self.interrupted += 1
                first += 1 + first // 10

    def _trace(self, frame, event, _argument):
        if not any(room in frame.f_code.co_filename for room in ROOMS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            name = self._last.get(frame)
            self._last[frame] = names_of(frame.f_code).get(frame.f_lasti)
            if name is None or name in SIGNAL_POINTS:
                self._left -= 1
                if self._left == 0:
                    raise self._error
        return self._trace


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, LanguageModel]:
    """Random weights, 16 ids of context, with a draft table that is often right; "slide" needs a window."""
    found = {}
    for name, window in (("plain", 0), ("window", 6)):
        path = save_onnx(random_model(window=window), tmp_path_factory.mktemp(name) / "toy.onnx")
        write_draft_table(path, "")
        found[name] = LanguageModel.load(path)
    return found | {"crop": found["plain"], "shift": found["plain"], "slide": found["window"]}


def with_drafts(lm: LanguageModel, wanted: bool) -> LanguageModel:
    return lm if wanted else LanguageModel(lm._session)


def pieces_of(stream) -> list[tuple[str, list[float]]]:
    return [(piece, stream.logprobs) for piece in stream]


OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.2, "stop": ["zz", "é", "q\x07"], "logprobs": True},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3, "max_length": 25, "logprobs": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "stop", "processors"])
@pytest.mark.parametrize("drafts", [False, True], ids=["id by id", "drafts"])
@pytest.mark.parametrize("overflow", ["crop", "shift", "slide"])
def test_an_interrupt_at_any_point_of_a_stream(models, overflow, drafts, options):
    """In every step, the exception comes at one point after another, until the step ends before the exception."""
    lm = with_drafts(models[overflow], drafts)
    options = {"rng_seed": 6, "max_length": 50, "overflow": overflow, **options}
    expected = pieces_of(lm.stream("Zoë €", **options))
    stream, found, interrupter = lm.stream("Zoë €", **options), [], Interrupter()
    while True:
        piece = interrupter.finish(partial(next, stream, None), 1 + 5 * len(found) % 31)
        if piece is None:
            break
        found.append((piece, stream.logprobs))
    assert found == expected
    assert interrupter.interrupted > len(found)


@pytest.mark.parametrize("overflow", ["crop", "shift", "slide"])
def test_an_interrupt_at_any_point_of_a_branch(models, overflow):
    lm, options = models[overflow], {"rng_seed": 6, "overflow": overflow, "temperature": 0.7}
    expected = list(lm.stream("Zoë €", 40, **options))
    for taken in (0, 3, 11, 12, 20):
        stream, interrupter = lm.stream("Zoë €", 40, **options), Interrupter()
        assert [next(stream) for _ in range(taken)] == expected[:taken]
        branch = interrupter.finish(stream.branch, 1)
        assert list(branch) == list(stream) == expected[taken:]
        assert interrupter.interrupted > 5


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "stop", "processors"])
@pytest.mark.parametrize("at_once", [1, 3], ids=["in turn", "batch"])
@pytest.mark.parametrize("overflow", ["crop", "shift", "slide"])
def test_an_interrupt_at_any_point_of_many_texts(models, overflow, at_once, options, monkeypatch):
    """More texts than streams, so that texts take the streams of others and streams are dropped at the end."""
    monkeypatch.setattr(batch, "MAX_STREAMS", at_once)
    lm = with_drafts(models[overflow], at_once == 1)
    seeds = ["Zoë €", "a", "a", "", "an old owl sleeps"][: 2 if at_once == 1 else 5]
    options = {"rng_seed": 6, "max_length": 25, "overflow": overflow, **options}
    expected = list(lm.stream_many(seeds, **options))
    chunks, found, interrupter = lm.stream_many(seeds, **options), [], Interrupter()
    while chunk := interrupter.finish(partial(next, chunks, None), 1 + 5 * len(found) % 31):
        found.append(chunk)
    assert found == expected
    assert interrupter.interrupted > len(found)
    assert next(chunks, None) is None


def test_a_failed_pass_of_many_texts(models, monkeypatch):
    """Every seventh pass of the model fails: the texts stay the same."""
    for lm in (models["plain"], with_drafts(models["plain"], False)):
        expected = list(lm.stream_many(["a", "bc", ""], 30, rng_seed=3))
        run, passes, found, failures = Binding.run, itertools.count(1), [], 0

        def fails(self, run=run, passes=passes):
            run(self)
            if next(passes) % 7 == 0:
                raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(Binding, "run", fails)
            chunks = lm.stream_many(["a", "bc", ""], 30, rng_seed=3)
            while len(found) < len(expected):
                try:
                    found.extend(itertools.islice(chunks, 1))
                except MemoryError:
                    failures += 1
        assert found == expected
        assert failures > 5


@pytest.mark.parametrize("error", [UserError, SystemExit])
def test_other_exceptions_are_as_good_as_ctrl_c(models, error):
    lm, options = models["slide"], {"rng_seed": 2, "overflow": "slide"}
    stream, interrupter, found = lm.stream("a", 40, **options), Interrupter(error), ""
    while piece := interrupter.finish(partial(next, stream, ""), 1 + len(found) % 97):
        found += piece
    assert found == "".join(lm.stream("a", 40, **options))
    assert interrupter.interrupted > 20


def test_an_exception_of_the_consumer(models):
    stream, found = models["plain"].stream("a", 30, rng_seed=3), []
    while not stream.done:
        try:
            for piece in stream:
                found.append(piece)
                raise ValueError
        except ValueError:
            continue
    assert found == list(models["plain"].stream("a", 30, rng_seed=3))


def test_many_texts_after_an_exception_of_the_consumer(models):
    for lm in (models["plain"], with_drafts(models["plain"], False)):
        chunks, found = lm.stream_many(["a", "b"], 30, rng_seed=3), []
        while sum(chunk.last for chunk in found) < 2:
            try:
                for chunk in chunks:
                    found.append(chunk)
                    raise ValueError
            except ValueError:
                continue
        assert found == list(lm.stream_many(["a", "b"], 30, rng_seed=3))


def test_threads_that_share_many_texts_take_turns(models):
    for lm in (models["plain"], with_drafts(models["plain"], False)):
        expected = list(lm.stream_many(["a", "b", "c"], 100, rng_seed=3))
        chunks, found = lm.stream_many(["a", "b", "c"], 100, rng_seed=3), []
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(found.extend, chunks) for _ in range(4)]:
                future.result()
        assert sorted(found) == sorted(expected)


def test_threads_that_share_a_stream_take_turns(models):
    """As when an asyncio task is cancelled and its thread still computes."""
    expected = list(models["plain"].stream("a", 300, rng_seed=3, overflow="shift"))
    stream, found = models["plain"].stream("a", 300, rng_seed=3, overflow="shift"), []

    def read():
        found.extend(stream)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(read) for _ in range(4)]:
            future.result()
    assert sorted(found) == sorted(expected)


def test_cancelled_asyncio_tasks(models):
    lm, options = models["plain"], {"rng_seed": 3, "overflow": "shift"}
    stream, found = lm.stream("a", 200, **options), []

    def step():
        piece = next(stream, "")
        found.append(piece)
        return piece

    async def read():
        cancelled = 0
        while not stream.done:
            try:
                await asyncio.wait_for(asyncio.to_thread(step), 1e-5)
            except TimeoutError:
                cancelled += 1
        await asyncio.get_running_loop().shutdown_default_executor()
        return cancelled

    assert asyncio.run(read()) > 10
    assert sorted(filter(None, found)) == sorted(lm.stream("a", 200, **options))


def test_a_generator_that_raises_within_perplexity(models):
    lm, text = models["plain"], "the owl and the moon " * 9

    def pieces():
        yield text[:70]
        raise ValueError("the consumer's own")

    expected = lm.perplexity(text)
    with pytest.raises(ValueError, match="the consumer's own"):
        lm.perplexity(pieces())
    assert lm.perplexity(iter([text[:70], text[70:]])) == expected
