"""Escapes control characters and HTML, so that text from strangers cannot steer a terminal or a browser."""

import html
from functools import cache
from unicodedata import category

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters without a glyph: control, format, surrogate, line and paragraph separators."""
JOINERS = "\u200c\u200d"
"""Format characters that are left alone, because some scripts and emoji need them."""


def printable(text: str, keep: str = "") -> str:
    """The text with each hidden character as a Python escape such as `\\x1b` or `\\n`; those in `keep` stay."""
    if text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if c not in keep and _is_hidden(c) else c for c in text)


def visible(text: str, keep: str = "\n\t") -> str:
    """The text with one visible character in place of each hidden one, so that offsets stay the same.

    Control characters become their pictures (U+241B for escape), newlines and tabs arrows, and all others U+FFFD;
    the characters in `keep` stay.
    """
    return text.translate(_stand_ins(keep))


def escape(text: object) -> str:
    """Text as HTML, for content and for quoted attributes; hidden characters are replaced as in `visible`."""
    return html.escape(visible(str(text)))


def _is_hidden(character: str) -> bool:
    return category(character) in HIDDEN and character not in JOINERS


@cache
def _stand_ins(keep: str) -> dict[int, str]:
    blocks = (range(0x3000), range(0xD800, 0xE000), range(0xFE00, 0x12000), range(0x13000, 0x14000),
              range(0x1BC00, 0x1BD00), range(0x1D100, 0x1D200), range(0xE0000, 0xE0100))  # fmt: skip
    hidden = (code for block in blocks for code in block if _is_hidden(chr(code)))
    table = {code: chr(0x2400 + code) if code < 32 else "\N{REPLACEMENT CHARACTER}" for code in hidden}
    table |= {ord("\n"): "↵", ord("\t"): "⇥", 127: "\N{SYMBOL FOR DELETE}"}
    return {code: shown for code, shown in table.items() if chr(code) not in keep}
