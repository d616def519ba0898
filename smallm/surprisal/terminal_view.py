"""`infer.py --surprise`: a text in the terminal, coloured by how little the model expected it, and its places."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np

from smallm.cli import text_file
from smallm.errors import UserError
from smallm.html.characters import LEVELS, level, percent, runs
from smallm.html.escape import visible
from smallm.html.page import save
from smallm.inference.scoring import Perplexity
from smallm.language_model import LanguageModel
from smallm.surprisal.measure import measure
from smallm.surprisal.page import PAGE_CHARACTERS, PageText, summary, surprisal_page
from smallm.surprisal.spans import Place, SpanFinder

COLOURS = ((16, 230), (16, 222), (16, 215), (16, 209), (16, 203), (231, 160))  # of the 256: characters, background
BYTE_ORDER_MARK = "\ufeff"
SHOWN = 60  # characters of a place, in a list


def surprise(
    model: LanguageModel, path: Path, encoding: str, most: int, html: Path | None, as_json: bool
) -> None:
    """Measures a file, and prints what is surprising in it; writes a page as well if `html` is given.

    The text itself is printed only if nothing else shows it and stdout takes colours. Raises `UserError`.
    """
    if most < 1:
        raise UserError(f"--places {most} is out of range; it must be 1 or more")
    if html:
        _check_writable(html, path)
    coloured = not html and not as_json and takes_colours(sys.stdout, os.environ)
    finder, kept = SpanFinder(model.vocabulary, most), PageText()
    if coloured:
        print(legend())
    text = _without_mark(text_file.pieces(path, encoding, bar=not coloured))
    for part in measure(model, text, detailed=PAGE_CHARACTERS if html else 0):
        finder.add(part)
        if html:
            kept.add(part)
        if coloured:
            print(painted(part.text, part.nats), end="")
    passages, words = finder.finish()
    if finder.characters < 2:
        raise UserError(f"{path} has {finder.characters} character(s); there must be at least 2")
    figures = Perplexity.of(finder.nats, finder.characters - 1)
    if html:
        save(html, surprisal_page(model, path.name, figures, passages, words, kept.measured()))
    if as_json:
        print(_json({"file": str(path), **asdict(figures), "passages": passages, "words": words}))
        return
    if coloured:
        print("\n")
    print(f"{visible(str(path), keep='')}: {summary(model, figures)}")
    print("\n".join(_listed(passages, words)))
    if html:
        print(f"written: {html}", file=sys.stderr)


def takes_colours(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether it is a terminal that knows colours, of a user who wants them."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def legend() -> str:
    """The colours, with the nats and the probabilities from which on they are used."""
    steps = [f"{_paint(f' {nats:g} ', n)} {percent(np.exp(-nats))}" for n, nats in enumerate(LEVELS, start=1)]
    return f"nats and probability: below {LEVELS[0]:g} no colour, from {', '.join(steps)}"


def painted(text: str, nats: np.ndarray) -> str:
    """text of n characters, nats (n,) -> the same with escape codes, and with no others than those."""
    return "".join(_paint(run, number) for run, number in runs(visible(text), level(nats)))


def _paint(text: str, number: int) -> str:
    """In colour `number`; the end of a line is shown in it, and leaves it, or the whole line would have it."""
    if number == 0:
        return text
    front, back = COLOURS[number - 1]
    on, off = f"\033[38;5;{front};48;5;{back}m", "\033[0m"
    return f"{on}{text.replace(chr(10), f'↵{off}{chr(10)}{on}')}{off}".replace(f"{on}{off}", "")


def _listed(passages: list[Place], words: list[Place]) -> Iterator[str]:
    if not passages and not words:
        yield "no place in it is surprising"
    if passages:
        yield "\npassages, by the nats that they have above what is usual in the text:"
    for place in passages:
        yield f"{place.line:>7}:{place.column:<5}{place.excess:>7,.1f}  {excerpt(place.text)}"
        yield f"{'':22}most at {place.peak.line}:{place.peak.column}, {_instead(place)}"
    if words:
        yield "\nwords, by the nats of their most surprising character:"
    for place in words:
        at = place.peak.offset - place.offset
        word = f"{place.text[:at]}[{place.text[at : at + 1]}]{place.text[at + 1 :]}"
        where = f"{place.peak.line:>7}:{place.peak.column:<5}"
        yield f"{where}{place.peak.nats:>7,.1f}  {excerpt(word):24} {_instead(place)}"


def _instead(place: Place) -> str:
    named = ", ".join(f"{quoted(name)} {percent(p)}" for name, p in place.peak.expected[:3])
    return f"{quoted(place.peak.character)}; expected: {named}"


def quoted(character: str) -> str:
    """A character, so that a space is seen."""
    return f"'{visible(character, keep='')}'"


def excerpt(text: str, length: int = SHOWN) -> str:
    """On one line, and not too long."""
    line = visible(text, keep="")
    return line if len(line) <= length else line[: length - 1] + "…"


def _json(values: dict) -> str:
    """One line, in which what a terminal might obey is escaped."""
    line = json.dumps(values, ensure_ascii=False, default=asdict)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def _without_mark(pieces: Iterable[str]) -> Iterator[str]:
    """The text without a byte-order mark, which editors do not count either."""
    begun = False
    for piece in pieces:
        yield piece if begun else piece.removeprefix(BYTE_ORDER_MARK)
        begun = begun or bool(piece)


def _check_writable(html: Path, text: Path) -> None:
    """Sooner than after an hour of measuring. Raises `UserError`."""
    folder = html.parent
    if html.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = "it is a folder" if html.is_dir() else f"{folder} is no folder that can be written to"
        raise UserError(f"cannot write {html}: {problem}; name another file")
    if html.exists() and text.exists() and html.samefile(text):
        raise UserError(f"--html {html} is the text itself; name another file")
