"""A text as HTML, coloured by the surprisal of its characters, with the details of each character under the pointer."""

import base64
import html
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from smallm.html.escape import escape, visible

CHARACTERS_STATIC = ("characters.css", "characters.js")
"""The static files that a page with such a text needs."""
LEVELS = (3.0, 4.0, 5.0, 6.0, 7.0, 9.0)
"""A character of LEVELS[i] nats or more has colour i + 1; below LEVELS[0] nats it has no colour."""
CHARACTERS_PER_ELEMENT = 500  # each element states the offset at which it starts


def level(nats: np.ndarray) -> np.ndarray:
    """nats (n,) -> colours (n,), 0 to len(LEVELS); NaN, where nothing was predicted, gives 0."""
    colours: np.ndarray = np.searchsorted(LEVELS, np.nan_to_num(nats), side="right")
    return colours


def runs(text: str, levels: np.ndarray) -> Iterator[tuple[str, int]]:
    """text of n characters, colours (n,) -> the longest substrings of one colour, each with that colour."""
    changes = np.flatnonzero(np.diff(levels)) + 1
    for start, end in pairwise([0, *changes.tolist(), len(text)]):
        if start < end:
            yield text[start:end], int(levels[start])


def percent(p: float) -> str:
    """A probability as a percentage with two significant digits, or one digit below 10 %."""
    return f"{float(f'{100 * p:.{2 if p >= 0.1 else 1}g}'):g} %" if p >= 1e-5 else "less than 0.001 %"


def legend() -> str:
    """HTML that explains the colours."""
    steps = "".join(
        f'<li><i class="s{number}">{nats:g}</i> {percent(np.exp(-nats))}</li>'
        for number, nats in enumerate(LEVELS, start=1)
    )  # fmt: skip
    return f'<p class="legend-title">nats and probability, from</p>\n<ul class="legend">{steps}</ul>'


def characters(
    text: str,
    nats: np.ndarray,
    expected: np.ndarray,
    probabilities: np.ndarray,
    name: Callable[[int], str],
    spans: Sequence[tuple[int, int, str]] = (),
) -> str:
    """The text as a fragment of a page that includes `CHARACTERS_STATIC`.

    nats: (n,), the surprisal of each character; NaN where nothing was predicted.
    expected: (n, K), the ids with the highest probability, -1 where unknown. probabilities: (n, K), of these ids.
    name: what to show for an id.
    spans: (start, end, anchor) of passages and words to mark, in ascending order and without overlap.
    """
    shown, levels = visible(text), level(nats)
    edges = {0, len(text), *range(0, len(text), CHARACTERS_PER_ELEMENT)}
    edges |= {edge for start, end, _ in spans for edge in (start, end)}
    anchors = {start: anchor for start, _, anchor in spans}
    elements = []
    for start, end in pairwise(sorted(edges)):
        id = f' id="{escape(anchors[start])}"' if start in anchors else ""
        mark = ' class="span"' if any(first <= start < last for first, last, _ in spans) else ""
        elements.append(f'<span data-at="{start}"{id}{mark}>{_coloured(shown[start:end], levels[start:end])}</span>')
    return (
        '<div class="characters"><div class="text" tabindex="0" role="group" aria-label="The text: the arrow keys move '
        'by one character, n and p to the next and the previous marked span">' + "".join(elements) + "</div>\n"
        f'<script type="application/json">{_details(nats, expected, probabilities, name)}</script>\n'
        '<div class="detail" role="status" hidden></div></div>'
    )


def _coloured(text: str, levels: np.ndarray) -> str:
    """Each substring of one colour in an element; a coloured newline is an element that can be seen."""
    parts = []
    for run, number in runs(text, levels):
        content = html.escape(run, quote=False)
        marked = content.replace("\n", '<b class="end">\n</b>')
        parts.append(f'<i class="s{number}">{marked}</i>' if number else content)
    return "".join(parts)


def _details(nats: np.ndarray, expected: np.ndarray, probabilities: np.ndarray, name: Callable[[int], str]) -> str:
    """JSON with planes of numbers, which compress well: nats in hundredths, indices into `names`, 255 * sqrt(p).

    Per character 2 bytes of nats (0xFFFF: unknown), K times 2 bytes of indices and K times 1 byte of roots, before
    compression.
    """
    ids, indices = np.unique(expected, return_inverse=True)
    hundredths = np.where(np.isnan(nats), 0xFFFF, np.minimum(np.round(100 * np.nan_to_num(nats)), 0xFFFE))
    planes = [
        hundredths.astype("<u2").tobytes(),
        indices.reshape(expected.shape).T.astype("<u2").tobytes(),
        np.round(255 * np.sqrt(probabilities)).T.astype(np.uint8).tobytes(),
    ]
    data = base64.b64encode(zlib.compress(b"".join(planes), 9)).decode("ascii")
    names = [visible(name(id), keep="") if id >= 0 else "" for id in ids.tolist()]
    values = {"characters": len(nats), "expected": expected.shape[1], "names": names, "data": data}
    return json.dumps(values, ensure_ascii=False).replace("<", "\\u003c")
