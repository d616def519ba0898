"""The state of the REPL: a text that is continued, undone and branched. Independent of any terminal."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from smallm.errors import UserError
from smallm.generation.config import GenerationConfig
from smallm.generation.rng import Rng
from smallm.generation.text_stream import TextStream
from smallm.language_model import LanguageModel

NO_LIMIT = 1 << 53  # max_length of the streams: the state counts the characters of a turn, so that streams can continue
MAX_STREAMS = 8  # paused streams; each holds a KV cache
DEFAULTS = {"max_length": 500, "rng_seed": None, "stop": ()}
"""Defaults of the REPL's own; those of all other options come from the model."""


@dataclass(eq=False)
class Turn:
    """A part of the text that was typed, or generated at one go."""

    before: "Turn | None"
    """The turn before; the turns of all branches are a tree."""
    typed: bool
    text: str = ""
    stopped: bool = False
    """Whether the model met a stop string."""

    @property
    def path(self) -> list["Turn"]:
        """All turns up to this one, in order."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.before
        return turns[::-1]


@dataclass(eq=False)
class _PausedStream:
    """A stream at the end of a turn, and characters that it has generated beyond that end."""

    stream: TextStream
    rest: str = ""

    def next(self, max_length: int) -> str:
        """The next characters, at most `max_length`. Raises `StopIteration` after a stop string."""
        chunk = self.rest or next(self.stream)
        self.rest = chunk[max_length:]
        return chunk[:max_length]


class ReplState:
    """The current text, its branches, and the options for the next turn.

    Texts that share a beginning are a tree of turns: undo is a step to the turn before, a branch is a name for a turn.
    Streams that wait at the ends of turns let the model continue without reading the text again.
    """

    def __init__(self, model: LanguageModel, **options: Any):
        """options: as for `LanguageModel.stream`; max_length is the length of a turn. Raises `UserError`."""
        self.model = model
        self.last: Turn | None = None
        """The last turn of the current text; None for an empty text."""
        self.branches: dict[str, Turn] = {}
        self.options: dict[str, Any] = {}
        """The options that were set; the others have their defaults."""
        self.rng_seed: int | None = None
        """The random seed used last."""
        self._restart_rng = False  # the next turn starts the random numbers again
        self._seed_is_unused = False  # no turn has used the rng_seed that was set
        self._paused: dict[tuple[Turn | str | None, ...], _PausedStream] = {}  # least recently used first
        for name, value in options.items():
            self.set(name, value)

    @property
    def text(self) -> str:
        """The current text."""
        return "".join(turn.text for turn in self.turns)

    @property
    def turns(self) -> list[Turn]:
        """The turns of the current text, in order."""
        return self.last.path if self.last else []

    def set(self, name: str, value: Any) -> None:
        """Sets an option for the next turns. Raises `UserError`, in which case nothing changes."""
        wanted = self.options | {name: value}
        GenerationConfig(**DEFAULTS | wanted).resolve(self.model.metadata)
        self.options = wanted
        if name == "rng_seed":
            self._restart_rng = self._seed_is_unused = True

    def value(self, name: str) -> Any:
        """The current value of an option; None for a random rng_seed, and for `allowed` if all characters are."""
        if name in ("stop", "allowed", "banned", "rng_seed"):
            return self.options.get(name, {"stop": (), "banned": ""}.get(name))
        return getattr(GenerationConfig(**DEFAULTS | self.options).resolve(self.model.metadata), name)

    def unset(self, name: str) -> None:
        """Resets an option to its default."""
        self.options.pop(name, None)

    def add(self, text: str) -> None:
        """Adds a typed turn. Raises `UserError` for a text that UTF-8 cannot encode."""
        self.model.vocabulary.encode(text)
        self.last = Turn(self.last, typed=True, text=text)

    def generate(self, rng_seed: int | None = None) -> Iterator[str]:
        """Adds a turn of the model: yields the new text in chunks, up to max_length characters or a stop string.

        The iterator may be abandoned at any time; the turn then holds what was yielded. Directly after another turn of
        the model, the text continues as if that turn had been longer. Otherwise the random numbers start again, from
        `rng_seed`, the option or a random seed, and the text equals that of `LanguageModel.stream`.
        Raises `UserError`.
        """
        options = DEFAULTS | self.options
        left, paused = options["max_length"], self._resume(options, rng_seed)
        turn = Turn(self.last, typed=False)
        key = _key(turn, options)
        while left:
            try:
                chunk = paused.next(left)
            except StopIteration:
                self.last, turn.stopped = turn, True
                self._paused.pop(key, None)  # the stream is past the stop string, which is not part of the turn
                return
            except BaseException:  # an interrupt can leave the stream in any state
                self._paused.pop(key, None)
                raise
            if self.last is not turn:
                self.last = turn
                self._store(key, paused)
            turn.text += chunk
            left -= len(chunk)
            yield chunk

    def retry(self, rng_seed: int | None = None) -> Iterator[str]:
        """Replaces the last turn of the model, with this rng_seed; default: a random one, or the option's plus 1."""
        if self.last is None or self.last.typed:
            raise UserError("the model has written nothing since you typed; an empty line continues the text")
        known = self.options.get("rng_seed")
        if rng_seed is None:
            rng_seed = secrets.randbits(32) if known is None else (known + (not self._seed_is_unused)) % (1 << 32)
        Rng(rng_seed)  # refuses a seed out of range before anything changes
        if known is not None:
            self.set("rng_seed", rng_seed)
        self.last = self.last.before
        return self.generate(rng_seed)

    def undo(self) -> Turn:
        """Removes the last turn and returns it. Raises `UserError` if there is none."""
        if self.last is None:
            raise UserError("there is no turn to undo")
        removed, self.last = self.last, self.last.before
        self._restart_rng = True
        return removed

    def branch(self, name: str = "") -> str:
        """Stores the current text under a name, by default the next number; returns the name. Raises `UserError`."""
        if self.last is None:
            raise UserError("there is no text yet to branch from")
        if name in self.branches:
            raise UserError(f"there is a branch {name} already; choose another name")
        if not name:
            name = str(next(n for n in range(1, len(self.branches) + 2) if str(n) not in self.branches))
        self.branches[name] = self.last
        return name

    def switch(self, name: str | None) -> str:
        """Switches to a branch, or with None to an empty text, and stores the current text if no branch has it.

        Returns the name under which the current text was stored, or "". Raises `UserError` for an unknown branch.
        """
        if name is not None and name not in self.branches:
            known = f"there are: {', '.join(self.branches)}" if self.branches else "/branch makes one"
            raise UserError(f"there is no branch {name}; {known}")
        is_unsaved = self.last is not None and self.last not in self.branches.values()
        stored = self.branch() if is_unsaved else ""
        self.last, self._restart_rng = None if name is None else self.branches[name], True
        return stored

    def next_characters(self, n: int) -> list[tuple[str, float]]:
        """The n most likely next characters with their probabilities."""
        return self.model.next_characters(self.text, n)

    def _resume(self, options: dict[str, Any], rng_seed: int | None) -> _PausedStream:
        """A branch of the stream that waits at the end of the text, or of a new stream."""
        same_draws = _key(self.last, options)
        continues = same_draws in self._paused and rng_seed is None and not self._restart_rng
        if rng_seed is None:
            rng_seed = options["rng_seed"]
        if not continues:
            self.rng_seed = secrets.randbits(32) if rng_seed is None else rng_seed
        key = same_draws if continues else (*same_draws, "restarted")
        waiting = self._paused.get(key) or _PausedStream(self._new_stream(options))
        self._restart_rng = self._seed_is_unused = False
        self._paused.pop(key, None)  # an interrupt in the next line must not leave a broken stream behind
        branch = _PausedStream(waiting.stream.branch(None if continues else self.rng_seed), waiting.rest)
        self._store(key, waiting)
        return branch

    def _new_stream(self, options: dict[str, Any]) -> TextStream:
        wanted = options | {"max_length": NO_LIMIT}
        if self.last is not None and self.last.stopped:  # continue past the stop string
            wanted["min_length"] = max(1, wanted.get("min_length", 0))
        return self.model.stream(self.text, **wanted)

    def _store(self, key: tuple[Turn | str | None, ...], paused: _PausedStream) -> None:
        self._paused.pop(key, None)
        self._paused[key] = paused
        while len(self._paused) > MAX_STREAMS:
            del self._paused[next(iter(self._paused))]


def _key(turn: Turn | None, options: dict[str, Any]) -> tuple[Turn | str | None, ...]:
    """The end of a text and all options on which its continuation depends, except its length and random seed."""
    return turn, repr(sorted(item for item in options.items() if item[0] not in ("max_length", "rng_seed")))
