"""A text in the terminal, coloured by surprisal, and the list of its most surprising spans."""

from collections.abc import Iterator, Sequence

import numpy as np

from smallm.html.characters import LEVELS, level, percent, runs
from smallm.html.escape import visible
from smallm.surprisal.spans import Span

COLOURS = ((16, 230), (16, 222), (16, 215), (16, 209), (16, 203), (231, 160))
"""Foreground and background of each level, as numbers of the 256-colour palette."""
MAX_EXCERPT = 60  # characters


def legend() -> str:
    """A line that explains the colours."""
    steps = [f"{_paint(f' {nats:g} ', n)} {percent(np.exp(-nats))}" for n, nats in enumerate(LEVELS, start=1)]
    return f"nats and probability: below {LEVELS[0]:g} no colour, from {', '.join(steps)}"


def painted(text: str, nats: np.ndarray) -> str:
    """text of n characters, surprisals (n,) -> the text with colour codes; its control characters are replaced."""
    return "".join(_paint(run, number) for run, number in runs(visible(text), level(nats)))


def span_list(passages: Sequence[Span], words: Sequence[Span]) -> Iterator[str]:
    """The lines that list the spans."""
    if not passages and not words:
        yield "no span of the text is surprising"
    if passages:
        yield "\npassages, by nats above the usual surprisal of the text:"
    for span in passages:
        yield f"{span.line:>7}:{span.column:<5}{span.excess:>7,.1f}  {_excerpt(span.text)}"
        yield f"{'':22}most at {span.peak.line}:{span.peak.column}, {_alternatives(span)}"
    if words:
        yield "\nwords, by the nats of their most surprising character:"
    for span in words:
        at = span.peak.offset - span.offset
        word = f"{span.text[:at]}[{span.text[at : at + 1]}]{span.text[at + 1 :]}"
        where = f"{span.peak.line:>7}:{span.peak.column:<5}"
        yield f"{where}{span.peak.nats:>7,.1f}  {_excerpt(word):24} {_alternatives(span)}"


def _paint(text: str, number: int) -> str:
    """The text in colour `number`; each newline is shown as an arrow, and the colour ends before the newline."""
    if number == 0:
        return text
    front, back = COLOURS[number - 1]
    on, off = f"\033[38;5;{front};48;5;{back}m", "\033[0m"
    return f"{on}{text.replace(chr(10), f'↵{off}{chr(10)}{on}')}{off}".replace(f"{on}{off}", "")


def _alternatives(span: Span) -> str:
    """The character at the peak, and the three characters that the model expected most."""
    named = ", ".join(f"{_quoted(name)} {percent(p)}" for name, p in span.peak.expected[:3])
    return f"{_quoted(span.peak.character)}; expected: {named}"


def _quoted(character: str) -> str:
    return f"'{visible(character, keep='')}'"


def _excerpt(text: str) -> str:
    line = visible(text, keep="")
    return line if len(line) <= MAX_EXCERPT else line[: MAX_EXCERPT - 1] + "…"
