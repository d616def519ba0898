"""Self-contained HTML pages: one file, nothing from elsewhere, light and dark, on a phone and on paper.

`page` makes the document, `table` and `escape` its parts, and `characters` a text that is coloured by how little of it
a model expected, with the details of each character under the pointer. Styles and scripts lie in static/.
"""

import base64
import html
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from smallm.errors import UserError
from smallm.html.escape import LEVELS, level, percent, runs, visible

PAGES = Path(__file__).parent / "static"
SPAN = 500  # characters in an element that says where in the text it begins
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole document: `title` is text, `body` HTML, `style` and `script` come after what all pages share."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{source("page.css")}{style}</style>
</head>
<body>
{body}
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def save(path: Path, document: str) -> None:
    """Writes a page, whole or not at all. Raises `UserError`."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(document, encoding="utf-8", newline="\n")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from None


def source(name: str) -> str:
    """The content of a file in smallm/html/static."""
    return (PAGES / name).read_text(encoding="utf-8")


def escape(text: object) -> str:
    """Text as HTML, for content and for quoted attributes; characters that cannot be seen become stand-ins."""
    return html.escape(visible(str(text)))


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts and numbers; the numbers stand to the right."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _cell(value: object) -> str:
    return f'<td class="number">{value:,}</td>' if isinstance(value, (int, float)) else f"<td>{escape(value)}</td>"


# -- a text with the surprise of its characters


def legend() -> str:
    """What the colours mean."""
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
    places: Sequence[tuple[int, int, str]] = (),
) -> str:
    """The text as a coloured fragment; wants `CHARACTERS_STYLE` and `CHARACTERS_SCRIPT` on its page.

    nats (n,), NaN where nothing was predicted; expected (n, K) ids, -1 where there are none, and their probabilities
    (n, K); `name` says what to show for an id. `places` are (start, end, anchor) in the text, disjoint and in order.
    """
    shown, levels = visible(text), level(nats)
    edges = {0, len(text), *range(0, len(text), SPAN)} | {edge for start, end, _ in places for edge in (start, end)}
    anchors = {start: anchor for start, _, anchor in places}
    inside = np.zeros(len(text) + 1, bool)
    for start, end, _ in places:
        inside[start:end] = True
    spans = []
    for start, end in pairwise(sorted(edges)):
        id = f' id="{escape(anchors[start])}"' if start in anchors else ""
        place = ' class="place"' if inside[start] else ""
        spans.append(f'<span data-at="{start}"{id}{place}>{_coloured(shown[start:end], levels[start:end])}</span>')
    return (
        '<div class="characters"><div class="text" tabindex="0" role="group" aria-label="The text: arrow keys go from '
        'character to character, n and p to the next place and the one before">' + "".join(spans) + "</div>\n"
        f'<script type="application/json">{_details(nats, expected, probabilities, name)}</script>\n'
        '<div class="detail" role="status" hidden></div></div>'
    )


def _coloured(text: str, levels: np.ndarray) -> str:
    """Each run in an element; the end of a line is one that can be seen if it has a colour."""
    parts = []
    for run, number in runs(text, levels):
        content = html.escape(run, quote=False)
        marked = content.replace("\n", '<b class="end">\n</b>')
        parts.append(f'<i class="s{number}">{marked}</i>' if number else content)
    return "".join(parts)


def _details(nats: np.ndarray, expected: np.ndarray, probabilities: np.ndarray, name: Callable[[int], str]) -> str:
    """As JSON; numbers in planes, which compress well: nats in hundredths, places in `names`, roots of probabilities.

    Per character 2 bytes of nats (0xFFFF: none) and K times 2 of a name and 1 of 255 * sqrt(p), before compression.
    """
    ids, places = np.unique(expected, return_inverse=True)
    hundredths = np.where(np.isnan(nats), 0xFFFF, np.minimum(np.round(100 * np.nan_to_num(nats)), 0xFFFE))
    planes = [
        hundredths.astype("<u2").tobytes(),
        places.reshape(expected.shape).T.astype("<u2").tobytes(),
        np.round(255 * np.sqrt(probabilities)).T.astype(np.uint8).tobytes(),
    ]
    data = base64.b64encode(zlib.compress(b"".join(planes), 9)).decode("ascii")
    names = [visible(name(id), keep="") if id >= 0 else "" for id in ids.tolist()]
    values = {"characters": len(nats), "expected": expected.shape[1], "names": names, "data": data}
    return json.dumps(values, ensure_ascii=False).replace("<", "\\u003c")


CHARACTERS_STYLE = source("characters.css")
CHARACTERS_SCRIPT = source("characters.js")
