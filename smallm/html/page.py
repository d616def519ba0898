"""Self-contained HTML pages: one file without external resources, for light and dark screens, phones and paper."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from smallm.atomic_write import atomic_write
from smallm.errors import UserError
from smallm.html.escape import escape

STATIC = Path(__file__).parent / "static"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(title: str, body: str, static: Sequence[str] = (), reload_seconds: int = 0) -> str:
    """A whole HTML document.

    title: plain text. body: HTML.
    static: names of style sheets (.css) and scripts (.js) in smallm/html/static that the page needs besides page.css.
    reload_seconds: time after which the browser opens the file again, without a script; 0 = never.
    """
    style = "".join(map(_static_file, ["page.css", *(name for name in static if name.endswith(".css"))]))
    script = "".join(_static_file(name) for name in static if name.endswith(".js"))
    reload = f'\n<meta http-equiv="refresh" content="{reload_seconds}">' if reload_seconds else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">{reload}
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
{body}
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def save(path: Path, document: str) -> None:
    """Writes a page completely or not at all. Raises `UserError`."""
    try:
        atomic_write(path, document)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from None


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table of texts and numbers; numbers are aligned to the right."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _static_file(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _cell(value: object) -> str:
    return f'<td class="number">{value:,}</td>' if isinstance(value, (int, float)) else f"<td>{escape(value)}</td>"
