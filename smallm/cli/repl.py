"""`infer.py --interactive`: reads lines from a terminal or a script, and carries them out on a `ReplState`."""

import inspect
import io
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from smallm.cli.repl_state import ReplState
from smallm.cli.terminal import bold, line_editing, note_ctrl_c
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
OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {  # as typed: option, parser, help
    each.flag: (each.name, each.parser, f"{each.metavar}: {each.help}" if each.metavar else each.help)
    for each in GenerationConfig.options()
    if each.flag
}
ALIASES = {"again": "retry"}
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
    console = Console(ReplState(model, **options), flush)
    with line_editing(console.completions) if console.has_line_editing else nullcontext():
        console.run(seed)


class Console:
    """Reads lines and carries them out. A mistake is one line on stderr, after which the next line is read.

    Each method `do_NAME` is the command /NAME. Its docstring is the usage and the help text; its parameter, if it has
    one, is the argument, a string or an int.
    """

    def __init__(self, state: ReplState, flush: bool = True):
        self.state, self._flush = state, flush
        self._interactive, stdout_is_terminal = sys.stdin.isatty(), sys.stdout.isatty()
        self.has_line_editing = self._interactive and stdout_is_terminal
        self._escapes = stdout_is_terminal
        self._bold = stdout_is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
        self._saved: set[Path] = set()  # files that /save may overwrite
        names = [name.removeprefix("do_") for name in vars(Console) if name.startswith("do_")]
        self.commands: dict[str, Callable[..., Any]] = {name: getattr(self, f"do_{name}") for name in names}

    def run(self, seed: str = "") -> None:
        """Carries out `seed`, then lines until the end of stdin or /quit."""
        if self._interactive:
            print(WELCOME, file=sys.stderr)
        step, goes_on = (partial(self._add, seed) if seed else self._read_and_execute), True
        while goes_on:
            try:
                goes_on = step() is not False
            except UserError as error:
                print(f"smallm: {printable(str(error))}", file=sys.stderr)
            except KeyboardInterrupt:
                if not self._interactive:  # a script ends like any other program
                    raise
                print(f"\n{LEAVING}", file=sys.stderr)
            step = self._read_and_execute

    def execute(self, line: str) -> bool:
        """Carries out a line. Returns False for /quit. Raises `UserError`."""
        if any("\ud800" <= c <= "\udfff" for c in line):
            raise UserError("this line is not UTF-8; set the terminal, or save the file, as UTF-8")
        if not line:
            self.do_more()
        elif not line.startswith("/") or line.startswith("//"):
            self._add(unescaped(line.removeprefix("/")))
        else:
            typed, _, argument = line[1:].partition(" ")
            name = typed.replace("_", "-")
            name = ALIASES.get(name, name)
            if name in OPTIONS:
                self._set_option(name, argument)
            elif name in self.commands:
                return self._call(name, argument.strip()) is not False
            else:
                close = get_close_matches(name, [*self.commands, *OPTIONS], n=1)
                hint = f"did you mean /{close[0]}?" if close else "/help lists them; type // for a text with a slash"
                raise UserError(f"there is no command /{typed}; {hint}")
        return True

    def completions(self, line: str) -> list[str]:
        """The commands that start with this text."""
        every = [f"/{name}" for name in (*self.commands, *OPTIONS)]
        every += [*(f"/go {name}" for name in self.state.branches), *(f"/unset {name}" for name in OPTIONS)]
        return [each for each in every if each.startswith(line)] if line.startswith("/") else []

    # Commands, in the order of /help.

    def do_more(self) -> None:
        """/more: the model continues the text"""
        self._stream(self.state.generate())

    def do_retry(self, rng_seed: int | None = None) -> None:
        """/retry [N]: replaces the last turn of the model, with another rng seed or with N; also /again"""
        self._stream(self.state.retry(rng_seed))

    def do_undo(self) -> None:
        """/undo: removes the last turn, typed or written"""
        removed = self.state.undo()
        self._print(f"removed {len(removed.text):,} characters; left are {_end_of(self.state.text)}")

    def do_branch(self, name: str = "") -> None:
        """/branch [NAME]: stores the text under this name, by default a number"""
        self._print(f"stored as {self.state.branch(name)}")

    def do_branches(self) -> None:
        """/branches: lists the stored texts; * marks the current one"""
        for name, turn in self.state.branches.items():
            text = "".join(each.text for each in turn.path)
            self._print(f"{'*' if turn is self.state.last else ' '} {name}  {_end_of(text)}")

    def do_go(self, name: str) -> None:
        """/go NAME: switches to a stored text; the current text is stored first"""
        self._switch(name)

    def do_new(self) -> None:
        """/new: starts an empty text; the current text is stored first"""
        self._switch(None)

    def do_text(self) -> None:
        """/text: shows the whole text"""
        for turn in self.state.turns:
            self._print(turn.text, end="", typed=turn.typed)
        self._print("")

    def do_next(self, n: int = 10) -> None:
        """/next [N]: lists the N most likely next characters, by default 10"""
        if n < 1:
            raise UserError(f"/next {n} is out of range; it must be 1 or more")
        for character, p in self.state.next_characters(n):
            self._print(f"{p:.6f}  {json.dumps(character, ensure_ascii=False)}")

    def do_save(self, file: str) -> None:
        """/save FILE: writes the text to a new file; saving to the same file again overwrites it"""
        path, text = Path(file), self.state.text
        try:
            path = path.expanduser()
            with path.open("w" if path in self._saved else "x", encoding="utf-8", newline="") as stream:
                stream.write(text)
        except FileExistsError:
            raise UserError(f"{path} exists already; choose another name") from None
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name; ~ without a home folder
            raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
        self._saved.add(path)
        self._print(f"wrote {len(text):,} characters to {path}")

    def do_options(self) -> None:
        """/options: shows the value of every option"""
        for name in OPTIONS:
            self._print(self._option_line(name))

    def do_unset(self, name: str = "") -> None:
        """/unset OPTION: resets an option to its default"""
        name = name.removeprefix("/").replace("_", "-")
        if name not in OPTIONS:
            raise UserError(f"/unset needs an option: {', '.join(OPTIONS)}")
        self.state.unset(OPTIONS[name][0])
        self._print(self._option_line(name))

    def do_help(self) -> None:
        """/help: shows this list"""
        self._print(HELP)
        for command in self.commands.values():
            self._print(_help_line(*_usage(command)))
        self._print("Options; without a value the command shows the current one:")
        for name, (_, _, text) in OPTIONS.items():
            metavar, _, text = text.partition(": ")
            self._print(_help_line(f"/{name}", f"{metavar}: {text}"))

    def do_quit(self) -> bool:
        """/quit: leaves, as Ctrl-D does"""
        return False

    # Reading and printing.

    def _read_and_execute(self) -> bool:
        if self.has_line_editing:
            with suppress(EOFError):
                return self.execute(input(PROMPT))
            print()
            return False
        if self._interactive:
            print(PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return bool(line) and self.execute(line.removesuffix("\n"))

    def _call(self, name: str, argument: str) -> Any:
        """Calls a command with the argument that its signature asks for."""
        command = self.commands[name]
        parameter = next(iter(inspect.signature(command).parameters.values()), None)
        if parameter is None:
            if argument:
                raise UserError(f"/{name} takes no argument, not {argument!r:.40}")
            return command()
        if argument:
            return command(argument if parameter.annotation is str else _number(name, argument, int))
        if parameter.default is parameter.empty:
            raise UserError(f"/{name} needs an argument: {_usage(command)[0]}")
        return command()

    def _print(self, text: str, end: str = "\n", typed: bool = False) -> None:
        """Prints to stdout; on a terminal with control characters escaped, and with typed text in bold."""
        if self._escapes:
            text = printable(text, keep="\n\t")
        print(bold(text) if typed and self._bold else text, end=end, flush=self._flush)

    def _stream(self, chunks: Iterator[str]) -> None:
        """Prints a text while it is generated, until its end or Ctrl-C."""
        is_empty, before = True, self.state.last
        ctrl_c: AbstractContextManager[list[bool]] = note_ctrl_c() if self._interactive else nullcontext([])
        with ctrl_c as pressed:
            for chunk in chunks:
                self._print(chunk, end="")
                is_empty = False
                if pressed:
                    break
        self._print("")
        if is_empty and self.state.last is not before:
            print("the text starts with a stop string; an empty line continues after it", file=sys.stderr)

    def _add(self, text: str) -> None:
        self.state.add(text)
        self._print(text, end="", typed=True)
        self._stream(self.state.generate())

    def _switch(self, name: str | None) -> None:
        if stored := self.state.switch(name):
            self._print(f"stored the other text as {stored}")
        self._print(_end_of(self.state.text))

    def _set_option(self, typed: str, argument: str) -> None:
        """Sets an option if a value is given, and prints its value."""
        name, parse, _ = OPTIONS[typed]
        if argument.strip():
            value = parse(argument) if parse is unescaped else _number(typed, argument.strip(), parse)
            self.state.set(name, [*self.state.value("stop"), value] if name == "stop" else value)
        self._print(self._option_line(typed))

    def _option_line(self, typed: str) -> str:
        name = OPTIONS[typed][0]
        value = self.state.value(name)
        if name == "rng_seed" and value is None:
            last = self.state.rng_seed
            return f"{typed} random{'' if last is None else f'; the last was {last}'}"
        texts = [value] if isinstance(value, str) and name != "overflow" else value
        if isinstance(texts, list | tuple):
            value = " ".join(json.dumps(text, ensure_ascii=False) for text in texts if text) or "none"
        return f"{typed} {'all' if value is None else value}"


def _end_of(text: str) -> str:
    """The length and the end of a text, on one line."""
    end = printable(text[-END_SHOWN:])
    return f"{len(text):,} characters{': ' if end else ''}{'…' if len(text) > END_SHOWN else ''}{end}"


def _usage(command: Callable[..., Any]) -> tuple[str, str]:
    """Usage and help text of a command."""
    usage, _, text = (inspect.getdoc(command) or "").partition(": ")
    return usage, text


def _help_line(usage: str, text: str) -> str:
    return textwrap.fill(text, 80, initial_indent=f"{usage:20} ", subsequent_indent=" " * 21)


def _number(name: str, argument: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(argument)
    except ValueError:
        kind = "whole number" if parse is int else "number"
        raise UserError(f"/{name} needs a {kind}, not {argument!r:.40}") from None
