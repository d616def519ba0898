"""A text in the making, as `infer.py --interactive` has it: gone on with, taken back, branched. No terminal here."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from smallm.errors import UserError
from smallm.generation.config import resolve
from smallm.generation.sampler import Rng
from smallm.generation.text_stream import TextStream
from smallm.language_model import LanguageModel

ENDLESS = 1 << 53  # characters: how much to write at once is for the story to count, so that a writer can go on
KEPT = 8  # writers that wait at the ends of parts; each holds a whole cache
FRESH = {"max_length": 500, "rng_seed": None, "stop": ()}  # the options' values at the start; of others the model's


@dataclass(eq=False)
class Part:
    """What was typed, or written at one go, after all that came before it."""

    before: "Part | None"
    typed: bool
    text: str = ""
    stopped: bool = False
    """Whether the model met a stop text."""

    @property
    def whole(self) -> list["Part"]:
        """All parts of the text that ends here, in their order."""
        parts, part = [], self
        while part is not None:
            parts.append(part)
            part = part.before
        return parts[::-1]


@dataclass(eq=False)
class _Paused:
    """A writer that waits at the end of a part, and what it has given beyond that."""

    writer: TextStream
    rest: str = ""

    def take(self, most: int) -> str:
        """The next piece, at most so many characters of it."""
        piece = self.rest or next(self.writer)
        self.rest = piece[most:]
        return piece[:most]


class ReplState:
    """The text so far with its branches, and the options for what comes next.

    The texts that share a beginning are a tree of parts: to take back is to step to the part before, a branch is a name
    for a part, and the model goes on from where it has been without reading the text again.
    """

    def __init__(self, model: LanguageModel, **options: Any):
        """options: as for `LanguageModel.stream`, max_length for one go. Raises `UserError` for one out of range."""
        self.model = model
        self.here: Part | None = None
        """The last part of the text; None = there is no text."""
        self.branches: dict[str, Part] = {}
        self.options: dict[str, Any] = {}
        """Those that were set; `FRESH` and the model have the others."""
        self.rng_seed: int | None = None
        """What was drawn from last."""
        self._anew = False  # whether the draws begin anew, whatever the text ends with
        self._unused = False  # whether nothing was drawn yet from the rng_seed that was set
        self._paused: dict[tuple, _Paused] = {}  # the longest unused first
        for name, value in options.items():
            self.set(name, value)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(part.text for part in self.parts)

    @property
    def parts(self) -> list[Part]:
        """What was typed and what was written, in their order."""
        return self.here.whole if self.here else []

    def set(self, name: str, value: Any) -> None:
        """An option for what is written from now on. Raises `UserError`, and nothing has changed then."""
        wanted = self.options | {name: value}
        resolve(self.model.metadata, **FRESH | wanted).rng()
        self.options = wanted
        if name == "rng_seed":
            self._anew = self._unused = True

    def value(self, name: str) -> Any:
        """What holds for an option now; of rng_seed None if it is random, of allowed if it is all characters."""
        if name in ("stop", "allowed", "banned", "rng_seed"):
            return self.options.get(name, {"stop": (), "banned": ""}.get(name))
        request = resolve(self.model.metadata, **FRESH | self.options)
        return getattr(request.sampling if hasattr(request.sampling, name) else request, name)

    def unset(self, name: str) -> None:
        """Takes an option back to its default."""
        self.options.pop(name, None)

    def type(self, text: str) -> None:
        """Adds what a person wrote. Raises `UserError` for a text that UTF-8 cannot hold."""
        self.model.vocabulary.encode(text)
        self.here = Part(self.here, typed=True, text=text)

    def write(self, rng_seed: int | None = None) -> Iterator[str]:
        """Has the model go on: the new text in pieces, up to max_length characters or a stop text.

        It may be left at any time; what came is part of the text. Right after another go of the model it is what that
        would have given if it had been longer. Else the draws begin anew, from `rng_seed`, the option or a random one,
        and it is what `LanguageModel.stream` gives for the text so far. Raises `UserError`.
        """
        options = FRESH | self.options
        left, paused = options["max_length"], self._begin(options, rng_seed)
        part = Part(self.here, typed=False)
        key = _key(part, options)
        while left:
            try:
                piece = paused.take(left)
            except StopIteration:
                self.here, part.stopped = part, True
                self._paused.pop(key, None)  # it is beyond the stop text, which is no part of this one
                return
            except BaseException:  # it was interrupted, nobody knows where
                self._paused.pop(key, None)
                raise
            if self.here is not part:
                self.here = part
                self._keep(key, paused)
            part.text += piece
            left -= len(piece)
            yield piece

    def again(self, rng_seed: int | None = None) -> Iterator[str]:
        """Has the model write its last part anew, from another rng_seed: a random one, or if one is set, the next."""
        if self.here is None or self.here.typed:
            raise UserError("the model wrote nothing since you typed; an empty line has it go on")
        known = self.options.get("rng_seed")
        if rng_seed is None:
            rng_seed = secrets.randbits(32) if known is None else (known + (not self._unused)) % (1 << 32)
        Rng(rng_seed)  # refuses what is out of range before anything is taken back
        if known is not None:
            self.set("rng_seed", rng_seed)
        self.here = self.here.before
        return self.write(rng_seed)

    def undo(self) -> Part:
        """Takes back the last part, typed or written, and returns it. Raises `UserError` if there is none."""
        if self.here is None:
            raise UserError("there is no text to take back")
        undone, self.here = self.here, self.here.before
        self._anew = True
        return undone

    def branch(self, name: str = "") -> str:
        """Gives the text as it stands a name, by default the next number, and returns it. Raises `UserError`."""
        if self.here is None:
            raise UserError("there is no text yet to branch from")
        if name in self.branches:
            raise UserError(f"there is a branch {name} already; choose another name")
        if not name:
            name = str(next(n for n in range(1, len(self.branches) + 2) if str(n) not in self.branches))
        self.branches[name] = self.here
        return name

    def go(self, name: str | None) -> str:
        """Goes to a branch, or with None to an empty text. Returns the branch that keeps the text left, '' for none.

        Raises `UserError` if there is no such branch.
        """
        if name is not None and name not in self.branches:
            known = f"there are: {', '.join(self.branches)}" if self.branches else "/branch makes one"
            raise UserError(f"there is no branch {name}; {known}")
        lost = self.here is not None and self.here not in self.branches.values()
        kept = self.branch() if lost else ""
        self.here, self._anew = None if name is None else self.branches[name], True
        return kept

    def next_characters(self, n: int) -> list[tuple[str, float]]:
        """The n likeliest next characters, as `LanguageModel.next_characters` has them."""
        return self.model.next_characters(self.text, n)

    def _begin(self, options: dict[str, Any], rng_seed: int | None) -> _Paused:
        """What to write with at the end of the text: a branch of the writer that waits there, or of a new one."""
        on = _key(self.here, options)  # one that goes on drawing where it stopped
        goes_on = on in self._paused and rng_seed is None and not self._anew
        if rng_seed is None:
            rng_seed = options["rng_seed"]
        if not goes_on:
            self.rng_seed = secrets.randbits(32) if rng_seed is None else rng_seed
        key = on if goes_on else (*on, "anew")
        waiting = self._paused.get(key) or _Paused(self._writer(options))
        self._anew = self._unused = False
        self._paused.pop(key, None)  # whoever is interrupted in the next line leaves nothing half done behind
        branch = _Paused(waiting.writer.branch(None if goes_on else self.rng_seed), waiting.rest)
        self._keep(key, waiting)
        return branch

    def _writer(self, options: dict[str, Any]) -> TextStream:
        wanted = options | {"max_length": ENDLESS}
        if self.here is not None and self.here.stopped:  # to go on is to go past the stop text
            wanted["min_length"] = max(1, wanted.get("min_length", 0))
        return self.model.stream(self.text, **wanted)

    def _keep(self, key: tuple, paused: _Paused) -> None:
        self._paused.pop(key, None)
        self._paused[key] = paused
        while len(self._paused) > KEPT:
            del self._paused[next(iter(self._paused))]


def _key(part: Part | None, options: dict[str, Any]) -> tuple:
    """Where a writer stands and what it goes by, but for the length of what it gives and its draws."""
    return part, repr(sorted(item for item in options.items() if item[0] not in ("max_length", "rng_seed")))
