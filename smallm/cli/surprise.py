"""`infer.py --surprise FILE`: measures a file, prints its most surprising spans, and writes a page."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from smallm.cli import text_file
from smallm.cli.terminal import takes_colours
from smallm.errors import UserError
from smallm.html.escape import visible
from smallm.html.page import save
from smallm.inference.scoring import Perplexity
from smallm.language_model import LanguageModel
from smallm.surprisal.measure import Measured, measure
from smallm.surprisal.page import PAGE_CHARACTERS, summary, surprisal_page
from smallm.surprisal.spans import SpanFinder
from smallm.surprisal.terminal_view import legend, painted, span_list


def surprise(
    model: LanguageModel, path: Path, encoding: str, max_spans: int, html: Path | None, as_json: bool,
    field: str = "text",
) -> None:
    """Measures a text file and prints its figures and most surprising spans.

    The coloured text itself is printed if stdout is a terminal with colours and neither `html` nor `as_json` is given.

    max_spans: how many passages, and how many words, to list.
    html: a page to write. as_json: print one JSON object instead. field: key of JSON lines, or column
    of CSV, that holds the text.
    Raises `UserError`.
    """
    if max_spans < 1:
        raise UserError(f"--spans {max_spans} is out of range; it must be 1 or more")
    if html:
        _check_writable(html, path)
    coloured = not html and not as_json and takes_colours(sys.stdout, os.environ)
    finder, shown, read = SpanFinder(model.vocabulary, max_spans), [], 0
    if coloured:
        print(legend())
    for part in measure(model, text_file.pieces(path, encoding, bar=not coloured, field=field)):
        finder.add(part)
        if html and read < PAGE_CHARACTERS:
            shown.append(part[: PAGE_CHARACTERS - read])
        read += len(part.text)
        if coloured:
            print(painted(part.text, part.nats), end="")
    passages, words = finder.finish()
    if finder.characters < 2:
        raise UserError(f"{path} has {finder.characters} character(s); there must be at least 2")
    figures = Perplexity.of(finder.nats, finder.characters - 1)
    if html:
        save(html, surprisal_page(model, path.name, figures, passages, words, Measured.join(shown)))
    if as_json:
        spans = {"passages": list(map(asdict, passages)), "words": list(map(asdict, words))}
        print(json.dumps({"file": str(path), **asdict(figures), **spans}, ensure_ascii=True))
        return
    if coloured:
        print("\n")
    print(f"{visible(str(path), keep='')}: {summary(model, figures)}")
    print("\n".join(span_list(passages, words)))
    if html:
        print(f"written: {html}", file=sys.stderr)


def _check_writable(html: Path, text: Path) -> None:
    """Checks before measuring, which may take an hour. Raises `UserError`."""
    folder = html.parent
    if html.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = "it is a folder" if html.is_dir() else f"{folder} is not a folder with write permission"
        raise UserError(f"cannot write {html}: {problem}; name another file")
    if html.exists() and text.exists() and html.samefile(text):
        raise UserError(f"--html {html} is the text itself; name another file")
