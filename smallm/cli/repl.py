"""`infer.py --interactive`: reads lines from a terminal or a script, and carries them out on a `ReplState`."""

import inspect
import io
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from smallm.cli.repl_state import ReplState
from smallm.cli.terminal import line_editing, takes_colours
from smallm.errors import UserError
from smallm.generation.config import GenerationConfig
from smallm.html.escape import printable
from smallm.language_model import LanguageModel
from smallm.options import unescaped

WELCOME = "type a beginning and the model continues it; an empty line continues further; /help lists the commands"
LEAVING = "Ctrl-D or /quit leaves"
HELP = r"""TEXT                 is added to the text, and the model continues it; \n is a
                     newline, \t a tab, \\ a backslash; for a text that starts
                     with a slash type two slashes
(empty line)         same as /more; Ctrl-C stops only the model"""
OPTIONS = {each.flag: each for each in GenerationConfig.options() if each.flag}
ALIASES = {"again": "retry", "new": "go"}
PROMPT = "> "
END_SHOWN = 48  # characters of a text in a list


def run_repl(model: LanguageModel, seed: str, options: Mapping[str, Any], flush: bool = True) -> None:
    """Reads lines from stdin until its end or /quit. Texts and answers go to stdout, everything else to stderr.

    seed: text that counts as the first line.
    options: as for `LanguageModel.stream`. flush: print each character at once.
    Raises `UserError` for options out of range.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    Console(ReplState(model, **options), flush).run(seed)


class Console:
    """Reads lines and carries them out. A mistake is one line on stderr, after which the next line is read.

    Each method `do_NAME` is the command /NAME. Its docstring is the usage and the help text; its parameter, if it has
    one, is the argument as typed.
    """

    def __init__(self, state: ReplState, flush: bool = True):
        self.state, self._flush = state, flush
        self._interactive, self._escapes = sys.stdin.isatty(), sys.stdout.isatty()
        self._bold = takes_colours(sys.stdout, os.environ)
        self._saved: set[Path] = set()  # files that /save may overwrite
        names = [name.removeprefix("do_") for name in vars(Console) if name.startswith("do_")]
        self.commands: dict[str, Callable[..., Any]] = {name: getattr(self, f"do_{name}") for name in names}

    def run(self, seed: str = "") -> None:
        """Carries out `seed`, then lines until the end of stdin or /quit."""
        is_screen = self._interactive and self._escapes
        if self._interactive:
            print(WELCOME, file=sys.stderr)
        with line_editing(self.completions) if is_screen else nullcontext():
            while True:
                try:
                    if seed:
                        self._add(seed)
                    elif self.execute(input(PROMPT if is_screen else "")) is False:
                        return
                except EOFError:
                    print(end="\n" if is_screen else "")
                    return
                except UserError as error:
                    print(f"smallm: {printable(str(error))}", file=sys.stderr)
                except KeyboardInterrupt:
                    if not self._interactive:  # a script ends like any other program
                        raise
                    print(f"\n{LEAVING}", file=sys.stderr)
                seed = ""

    def execute(self, line: str) -> Any:
        """Carries out a line. Returns False for /quit. Raises `UserError`."""
        if any("\ud800" <= c <= "\udfff" for c in line):
            raise UserError("this line is not UTF-8; set the terminal, or save the file, as UTF-8")
        if not line:
            return self.do_more()
        if not line.startswith("/") or line.startswith("//"):
            return self._add(unescaped(line.removeprefix("/")))
        typed, _, argument = line[1:].partition(" ")
        name = typed.replace("_", "-")
        name = ALIASES.get(name, name)
        arguments = [argument] if argument.strip() else []
        if name in OPTIONS:
            return self._set_option(name, *arguments)
        if name not in self.commands:
            close = get_close_matches(name, [*self.commands, *OPTIONS], n=1)
            hint = f"did you mean /{close[0]}?" if close else "/help lists them; type // for a text with a slash"
            raise UserError(f"there is no command /{typed}; {hint}")
        command = self.commands[name]
        try:
            inspect.signature(command).bind(*arguments)
        except TypeError:
            raise UserError(f"this is not how /{name} is used; type {_usage(command)[0]}") from None
        return command(*map(str.strip, arguments))

    def completions(self, line: str) -> list[str]:
        """The commands that start with this text."""
        every = [f"/{name}" for name in (*self.commands, *OPTIONS)]
        every += [*(f"/go {name}" for name in self.state.branches), *(f"/unset {name}" for name in OPTIONS)]
        return [each for each in every if each.startswith(line)] if line.startswith("/") else []

    # Commands, in the order of /help.

    def do_more(self) -> None:
        """/more: the model continues the text"""
        self._stream(self.state.generate())

    def do_retry(self, rng_seed: str = "") -> None:
        """/retry [N]: replaces the last turn of the model, with another rng seed or with N"""
        self._stream(self.state.retry(_number("retry", rng_seed, int) if rng_seed else None))

    def do_undo(self) -> None:
        """/undo: removes the last turn, typed or written"""
        removed = self.state.undo()
        self._print(f"removed {len(removed.text):,} characters; left are {_end_of(self.state.text)}")

    def do_branch(self, name: str = "") -> None:
        """/branch [NAME]: stores the text under this name, by default a number"""
        self._print(f"stored as {self.state.branch(name)}")

    def do_branches(self) -> None:
        """/branches: lists the stored texts; * marks the current one"""
        for name, turns in self.state.branches.items():
            text = "".join(turn.text for turn in turns)
            self._print(f"{'*' if turns == self.state.turns else ' '} {name}  {_end_of(text)}")

    def do_go(self, name: str = "") -> None:
        """/go [NAME]: switches to a stored text, or without NAME to a new one; the current text is stored first"""
        if stored := self.state.switch(name):
            self._print(f"stored the other text as {stored}")
        self._print(_end_of(self.state.text))

    def do_text(self) -> None:
        """/text: shows the whole text"""
        for turn in self.state.turns:
            self._print(turn.text, end="", typed=turn.typed)
        self._print("")

    def do_next(self, n: str = "10") -> None:
        """/next [N]: lists the N most likely next characters, by default 10"""
        for character, p in self.state.model.next_characters(self.state.text, _number("next", n, int)):
            self._print(f"{p:.6f}  {json.dumps(character, ensure_ascii=False)}")

    def do_save(self, file: str) -> None:
        """/save FILE: writes the text to a new file; saving to the same file again overwrites it"""
        path, text = Path(file), self.state.text
        try:
            path = path.expanduser()
            with path.open("w" if path in self._saved else "x", encoding="utf-8", newline="") as stream:
                stream.write(text)
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name; ~ without a home folder
            problem = getattr(error, "strerror", None) or error
            raise UserError(f"cannot write {path}: {problem}; choose another name") from None
        self._saved.add(path)
        self._print(f"wrote {len(text):,} characters to {path}")

    def do_options(self) -> None:
        """/options: shows the value of every option"""
        for name in OPTIONS:
            self._set_option(name)

    def do_unset(self, option: str) -> None:
        """/unset OPTION: resets an option to its default"""
        name = option.removeprefix("/").replace("_", "-")
        if name not in OPTIONS:
            raise UserError(f"there is no option {option}; there are: {', '.join(OPTIONS)}")
        self.state.set(OPTIONS[name].name, OPTIONS[name].default)
        self._set_option(name)

    def do_help(self) -> None:
        """/help: shows this list"""
        self._print(HELP)
        lines = [_usage(command) for command in self.commands.values()]
        lines += [("Options", "without a value the command shows the current one:")]
        for name, option in OPTIONS.items():
            lines.append((f"/{name}", f"{option.metavar or '|'.join(option.choices)}: {option.help}"))
        for usage, text in lines:
            self._print(textwrap.fill(text, 80, initial_indent=f"{usage:20} ", subsequent_indent=" " * 21))

    def do_quit(self) -> bool:
        """/quit: leaves, as Ctrl-D does"""
        return False

    # Printing, and what several commands share.

    def _print(self, text: str, end: str = "\n", typed: bool = False) -> None:
        """Prints to stdout; on a terminal with control characters escaped, and with typed text in bold."""
        if self._escapes:
            text = printable(text, keep="\n\t")
        if typed and text and self._bold:
            text = f"\x1b[1m{text}\x1b[0m"
        print(text, end=end, flush=self._flush)

    def _stream(self, chunks: Iterator[str]) -> None:
        """Prints a text while it is generated, until its end or Ctrl-C."""
        try:
            for chunk in chunks:
                self._print(chunk, end="")
        except KeyboardInterrupt:
            if not self._interactive:
                raise
        self._print("")
        last = self.state.turns[-1:]
        if last and last[0].stopped and not last[0].text:
            print("the text starts with a stop string; an empty line continues after it", file=sys.stderr)

    def _add(self, text: str) -> None:
        self.state.add(text)
        self._print(text, end="", typed=True)
        self._stream(self.state.generate())

    def _set_option(self, flag: str, argument: str = "") -> None:
        """Sets an option if a value is given, and prints its value."""
        option, state = OPTIONS[flag], self.state
        if argument:
            is_text = option.parser is unescaped
            value = _number(flag, argument if is_text else argument.strip(), option.parser)
            state.set(option.name, [*state.config.stop, value] if option.repeated else value)
        known = state.config if option.name == "rng_seed" else state.config.resolve(state.model.metadata)
        value = getattr(known, option.name)
        if value is None:
            value = option.unset
            if option.name == "rng_seed" and state.rng_seed is not None:
                value = f"{value}; the last was {state.rng_seed}"
        elif option.parser is unescaped:
            texts = value if option.repeated else [value]
            value = " ".join(json.dumps(text, ensure_ascii=False) for text in texts if text) or "none"
        self._print(f"{flag} {value}")


def _end_of(text: str) -> str:
    """The length and the end of a text, on one line."""
    end = printable(text[-END_SHOWN:])
    return f"{len(text):,} characters{': ' if end else ''}{'…' if len(text) > END_SHOWN else ''}{end}"


def _usage(command: Callable[..., Any]) -> tuple[str, str]:
    """Usage and help text of a command."""
    usage, _, text = (inspect.getdoc(command) or "").partition(": ")
    return usage, text


def _number(name: str, argument: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(argument)
    except ValueError:
        kind = "whole number" if parse is int else "number"
        raise UserError(f"/{name} needs a {kind}, not {argument!r:.40}") from None
