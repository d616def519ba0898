"""The state of the REPL: a text that is continued, undone and branched. Independent of any terminal."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from smallm.errors import UserError
from smallm.generation.config import GenerationConfig
from smallm.generation.text_stream import TextStream
from smallm.language_model import LanguageModel

NO_LIMIT = 1 << 53  # max_length of the streams: the state counts the characters of a turn, so that streams can continue


@dataclass(eq=False)
class Turn:
    """A part of the text that was typed, or generated at one go."""

    typed: bool
    text: str = ""
    stopped: bool = False
    """Whether the model met a stop string."""


class ReplState:
    """The current text as a list of turns, the branches (named lists of turns), and the options for the next turn."""

    def __init__(self, model: LanguageModel, **options: Any):
        """options: as for `LanguageModel.stream`; max_length is the length of a turn. Raises `UserError`."""
        self.model = model
        self.turns: list[Turn] = []
        self.branches: dict[str, list[Turn]] = {}
        self.config = GenerationConfig(**options)
        self.config.resolve(model.metadata)
        self.rng_seed: int | None = None
        """The random seed used last."""
        self._waiting: tuple[TextStream, str] | None = None
        """The stream at the end of the text if nothing has changed since, and characters it has generated beyond."""

    @property
    def text(self) -> str:
        """The current text."""
        return "".join(turn.text for turn in self.turns)

    def set(self, name: str, value: Any) -> None:
        """Sets an option for the next turns. Raises `UserError`, in which case nothing changes."""
        config = replace(self.config, **{name: value})
        config.resolve(self.model.metadata)
        self.config = config
        if name != "max_length":
            self._waiting = None

    def add(self, text: str) -> None:
        """Adds a typed turn. Raises `UserError` for a text that UTF-8 cannot encode."""
        self.model.vocabulary.encode(text)
        self._waiting = None
        self.turns.append(Turn(typed=True, text=text))

    def generate(self, rng_seed: int | None = None) -> Iterator[str]:
        """Adds a turn of the model: yields the new text in chunks, up to max_length characters or a stop string.

        The iterator may be abandoned at any time; the turn then holds the text that was yielded. Directly after another
        turn of the model, the text continues as if that turn had been longer. Otherwise the random numbers start again,
        from `rng_seed`, the option or a random seed, and the text equals that of `LanguageModel.stream`.
        """
        stream, rest = self._waiting or (self._new_stream(rng_seed), "")
        turn, left = Turn(typed=False), self.config.max_length
        while left:
            self._waiting = None  # an interrupt must not leave a stream that is ahead of the text
            chunk = rest or next(stream, "")
            if self.turns[-1:] != [turn]:
                self.turns.append(turn)
            if not chunk:
                turn.stopped = True
                return
            new, rest = chunk[:left], chunk[left:]
            turn.text += new
            self._waiting = stream, rest
            left -= len(new)
            yield new

    def retry(self, rng_seed: int | None = None) -> Iterator[str]:
        """Replaces the last turn of the model, with this rng_seed; default: a random one, or the option's plus 1."""
        if not self.turns or self.turns[-1].typed:
            raise UserError("the model has written nothing since you typed; an empty line continues the text")
        known = self.config.rng_seed
        if rng_seed is None:
            rng_seed = secrets.randbits(32) if known is None else (known + (known == self.rng_seed)) % (1 << 32)
        config = replace(self.config, rng_seed=rng_seed)
        if known is not None:
            self.config = config
        self.undo()
        return self.generate(rng_seed)

    def undo(self) -> Turn:
        """Removes the last turn and returns it. Raises `UserError` for an empty text."""
        if not self.turns:
            raise UserError("there is no turn to undo")
        self._waiting = None
        return self.turns.pop()

    def branch(self, name: str = "") -> str:
        """Stores the current text under a name, by default the next number; returns the name. Raises `UserError`."""
        if not self.turns:
            raise UserError("there is no text yet to branch from")
        if name in self.branches:
            raise UserError(f"there is a branch {name} already; choose another name")
        if not name:
            name = next(str(n) for n in range(1, len(self.branches) + 2) if str(n) not in self.branches)
        self.branches[name] = self.turns.copy()
        return name

    def switch(self, name: str = "") -> str:
        """Switches to a branch, or without a name to an empty text, and stores the current text if no branch has it.

        Returns the name under which the current text was stored, or "". Raises `UserError` for an unknown branch.
        """
        if name and name not in self.branches:
            known = f"there are: {', '.join(self.branches)}" if self.branches else "/branch makes one"
            raise UserError(f"there is no branch {name}; {known}")
        stored = self.branch() if self.turns and self.turns not in self.branches.values() else ""
        self.turns = self.branches[name].copy() if name else []
        self._waiting = None
        return stored

    def _new_stream(self, rng_seed: int | None) -> TextStream:
        if rng_seed is None:
            rng_seed = self.config.rng_seed
        self.rng_seed = secrets.randbits(32) if rng_seed is None else rng_seed
        stopped = bool(self.turns) and self.turns[-1].stopped  # continue past the stop string
        min_length = max(self.config.min_length, int(stopped))
        config = replace(self.config, max_length=NO_LIMIT, min_length=min_length, rng_seed=self.rng_seed)
        return self.model.stream(self.text, config=config)
