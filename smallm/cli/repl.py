"""`infer.py --interactive`: a conversation about a `ReplState`, line by line, from a terminal or from a script."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from smallm.cli.infer import unescaped
from smallm.cli.repl_state import ReplState
from smallm.cli.terminal import bold, ctrl_c, line_editing
from smallm.errors import UserError
from smallm.html.escape import printable
from smallm.language_model import LanguageModel

WELCOME = "type a beginning and the model goes on; an empty line asks for more; /help lists the commands"
LEAVING = "Ctrl-D or /quit leaves"
HELP = r"""TEXT             goes at the end of the text, and the model goes on; \n is a
                 newline, \t a tab, \\ a backslash; two slashes begin with one
(empty line)     as /more
/more            the model goes on
/again [N]       its last piece once more, from another rng seed, or from N
/undo            takes back what came last, typed or written
/branch [NAME]   keeps the text as it stands under this name, or a number
/branches        lists what is kept; * is where you are
/go NAME         goes to what is kept; the text you leave is kept as well
/new             begins an empty text; the one you leave is kept
/text            shows the whole text
/next [N]        the N likeliest next characters (10)
/save FILE       writes the text to a file
/options         shows the value of every option
/unset OPTION    takes an option back to its default
/help, /quit     this; the end, as Ctrl-D; Ctrl-C stops the model alone
Options, with a value or, to see it, without:"""
OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {  # as typed: option, reader, help
    "temperature": ("temperature", float, "T: 0 = always the likeliest character"),
    "top-k": ("top_k", int, "K: choose from the K likeliest; 0 = all"),
    "top-p": ("top_p", float, "P: choose from the likeliest that make up this much"),
    "min-p": ("min_p", float, "P: least probability, relative to the likeliest"),
    "max-length": ("max_length", int, "N: characters that the model writes at once"),
    "min-length": ("min_length", int, "N: no stop within so many"),
    "stop": ("stop", unescaped, "TEXT: end before this text, besides those given before"),
    "allow": ("allowed", unescaped, "CHARS: write these characters only"),
    "ban": ("banned", unescaped, "CHARS: write none of these characters"),
    "repetition-penalty": ("repetition_penalty", float, "R: above 1, what came up lately gets less likely"),
    "repetition-window": ("repetition_window", int, "N: how many of the last ids that looks at; 0 = block_size"),
    "overflow": ("overflow", str, "crop, shift or slide: what happens past block_size"),
    "rng-seed": ("rng_seed", int, "N: the same N gives the same text"),
}
PROMPT = "> "
END_SHOWN = 48  # characters of a text in a list


def converse(model: LanguageModel, seed: str, options: Mapping[str, Any], flush: bool = True) -> None:
    """Reads lines from stdin until its end or /quit; texts and answers go to stdout, all else to stderr.

    seed: typed already; options: as for `LanguageModel.stream`. Raises `UserError` for one out of range.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    console = Console(ReplState(model, **options), flush)
    with line_editing(console.completions) if console.edits else nullcontext():
        console.run(seed)


class Console:
    """Reads lines and does what they say. A mistake is one line on stderr, and the conversation goes on."""

    def __init__(self, story: ReplState, flush: bool = True):
        self.story, self._flush = story, flush
        self._asks, self._shows = sys.stdin.isatty(), sys.stdout.isatty()
        self.edits = self._asks and self._shows
        """Whether lines are typed at a terminal that can have a history."""
        self._colours = self._shows and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
        self._saved: set[Path] = set()  # files that may be written to again
        self._commands: dict[str, Callable[[str], Any]] = {
            "more": self._more, "again": self._again, "undo": self._undo, "branch": self._branch,
            "branches": self._branches, "go": self._go, "new": self._new, "text": self._text, "next": self._next,
            "save": self._save, "options": self._options, "unset": self._unset, "help": self._help,
        }  # fmt: skip

    def run(self, seed: str = "") -> None:
        """The whole conversation."""
        if self._asks:
            print(WELCOME, file=sys.stderr)
        turn, goes_on = (partial(self._add, seed) if seed else self._turn), True
        while goes_on:
            try:
                goes_on = turn() is not False
            except UserError as error:
                print(f"smallm: {printable(str(error))}", file=sys.stderr)
            except KeyboardInterrupt:
                if not self._asks:  # a script is ended like any other program
                    raise
                print(f"\n{LEAVING}", file=sys.stderr)
            turn = self._turn

    def obey(self, line: str) -> bool:
        """Does what a line says; False if it says to leave. Raises `UserError`."""
        if any("\ud800" <= c <= "\udfff" for c in line):
            raise UserError("this line is not UTF-8; set the terminal, or save the file, as UTF-8")
        if not line:
            self._more("")
        elif not line.startswith("/") or line.startswith("//"):
            self._add(unescaped(line.removeprefix("/")))
        else:
            name, _, argument = line[1:].partition(" ")
            name = name.replace("_", "-")
            if name == "quit":
                return False
            if name in self._commands:
                self._commands[name](argument.strip())
            elif name in OPTIONS:
                self._option(name, argument)
            else:
                raise UserError(f"there is no command /{name}{self._like(name)}")
        return True

    def completions(self, line: str) -> list[str]:
        """The lines that one could become."""
        commands = [f"/{name}" for name in (*self._commands, "quit", *OPTIONS)]
        whole = [*commands, *(f"/go {name}" for name in self.story.branches), *(f"/unset {name}" for name in OPTIONS)]
        return [each for each in whole if each.startswith(line)] if line.startswith("/") else []

    # What is read and shown.

    def _turn(self) -> bool:
        if self.edits:
            with suppress(EOFError):
                return self.obey(input(PROMPT))
            print()
            return False
        if self._asks:
            print(PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return bool(line) and self.obey(line.removesuffix("\n"))

    def _print(self, text: str, end: str = "\n", typed: bool = False) -> None:
        """To stdout; if that is a terminal, with nothing in it that would command it."""
        if self._shows:
            text = printable(text, keep="\n\t")
        print(bold(text) if typed and self._colours else text, end=end, flush=self._flush)

    def _stream(self, pieces: Iterator[str]) -> None:
        """Shows a text as it comes, until its end or Ctrl-C."""
        wrote, here = False, self.story.here
        with ctrl_c() if self._asks else nullcontext([]) as pressed:
            for piece in pieces:
                self._print(piece, end="")
                wrote = True
                if pressed:
                    break
        self._print("")
        if not wrote and self.story.here is not here:
            print("a stop text came at once; an empty line goes on past it", file=sys.stderr)

    def _place(self, text: str) -> str:
        end = printable(text[-END_SHOWN:])
        return f"{len(text):,} characters{': ' if end else ''}{'…' if len(text) > END_SHOWN else ''}{end}"

    # The commands.

    def _add(self, text: str) -> None:
        self.story.type(text)
        self._print(text, end="", typed=True)
        self._stream(self.story.write())

    def _more(self, argument: str) -> None:
        _nothing("more", argument)
        self._stream(self.story.write())

    def _again(self, argument: str) -> None:
        self._stream(self.story.again(_number("again", argument) if argument else None))

    def _undo(self, argument: str) -> None:
        _nothing("undo", argument)
        undone = self.story.undo()
        self._print(f"took back {len(undone.text):,} characters; left are {self._place(self.story.text)}")

    def _branch(self, argument: str) -> None:
        self._print(f"kept as {self.story.branch(argument)}")

    def _branches(self, argument: str) -> None:
        _nothing("branches", argument)
        for name, part in self.story.branches.items():
            text = "".join(each.text for each in part.whole)
            self._print(f"{'*' if part is self.story.here else ' '} {name}  {self._place(text)}")

    def _go(self, argument: str) -> None:
        if not argument:
            raise UserError("/go wants the name of a branch; /branches lists them")
        self._left(self.story.go(argument))

    def _new(self, argument: str) -> None:
        _nothing("new", argument)
        self._left(self.story.go(None))

    def _left(self, kept: str) -> None:
        if kept:
            self._print(f"kept the other text as {kept}")
        self._print(self._place(self.story.text))

    def _text(self, argument: str) -> None:
        _nothing("text", argument)
        for part in self.story.parts:
            self._print(part.text, end="", typed=part.typed)
        self._print("")

    def _next(self, argument: str) -> None:
        n = _number("next", argument) if argument else 10
        if n < 1:
            raise UserError(f"/next {n} is out of range; it must be 1 or more")
        for character, p in self.story.next_characters(n):
            self._print(f"{p:.6f}  {json.dumps(character, ensure_ascii=False)}")

    def _save(self, argument: str) -> None:
        if not argument:
            raise UserError("/save wants the name of a file")
        path, text = Path(argument), self.story.text
        try:
            path = path.expanduser()
            with path.open("w" if path in self._saved else "x", encoding="utf-8", newline="") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(f"{path} is there already; choose another name") from None
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name; ~ without a home
            raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
        self._saved.add(path)
        self._print(f"wrote {len(text):,} characters to {path}")

    def _option(self, name: str, argument: str) -> None:
        """Sets an option, or shows it."""
        known, read, _ = OPTIONS[name]
        if argument.strip():
            try:
                value = read(argument if read is unescaped else argument.strip())
            except ValueError:
                kind = "whole number" if read is int else "number"
                raise UserError(f"/{name} wants a {kind}, not {argument.strip()!r:.40}") from None
            self.story.set(known, [*self.story.value("stop"), value] if known == "stop" else value)
        self._print(self._shown(name))

    def _options(self, argument: str) -> None:
        _nothing("options", argument)
        for name in OPTIONS:
            self._print(self._shown(name))

    def _shown(self, name: str) -> str:
        """An option and its value."""
        known = OPTIONS[name][0]
        value = self.story.value(known)
        if known == "rng_seed" and value is None:
            last = self.story.rng_seed
            return f"{name} random{'' if last is None else f'; the last was {last}'}"
        texts = [value] if isinstance(value, str) and known != "overflow" else value
        if isinstance(texts, list | tuple):
            value = " ".join(json.dumps(text, ensure_ascii=False) for text in texts if text) or "none"
        return f"{name} {'all' if value is None else value}"

    def _unset(self, argument: str) -> None:
        name = argument.removeprefix("/").replace("_", "-")
        if name not in OPTIONS:
            raise UserError(f"/unset wants an option: {', '.join(OPTIONS)}")
        self.story.unset(OPTIONS[name][0])
        self._print(self._shown(name))

    def _help(self, argument: str) -> None:
        _nothing("help", argument)
        self._print(HELP)
        for name, (_, _, what) in OPTIONS.items():
            self._print(f"/{name:<19} {what}")

    def _like(self, name: str) -> str:
        close = get_close_matches(name, [*self._commands, "quit", *OPTIONS], n=1)
        return f"; did you mean /{close[0]}?" if close else "; /help lists them, and a text with a slash begins with //"


def _nothing(name: str, argument: str) -> None:
    if argument:
        raise UserError(f"/{name} stands alone, without {argument!r:.40}")


def _number(name: str, argument: str) -> int:
    try:
        return int(argument)
    except ValueError:
        raise UserError(f"/{name} wants a whole number, not {argument!r:.40}") from None
