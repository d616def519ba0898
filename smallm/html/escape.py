"""A text as it can be shown: without commands to a terminal or a browser, in the colours of its surprise."""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from unicodedata import category

import numpy as np

LEVELS = (3.0, 4.0, 5.0, 6.0, 7.0, 9.0)
"""From how many nats on a character has colour 1, 2, …; below the first it has none."""
JOINERS = (0x200C, 0x200D)  # without which some scripts and emoji look wrong
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories: control, format, surrogate, line and paragraph separators


def visible(text: str, keep: str = "\n\t") -> str:
    """The same number of characters, all of which can be seen and none of which moves the others.

    Control characters become their pictures (U+241B for escape), line ends and tabs arrows, those of the direction of
    writing and other invisible ones U+FFFD; `keep` stays, and so do joiners.
    """
    return text.translate(_stand_ins(keep))


@cache
def _stand_ins(keep: str) -> dict[int, str]:
    blocks = (range(0x3000), range(0xD800, 0xE000), range(0xFE00, 0x12000), range(0x13000, 0x14000),
              range(0x1BC00, 0x1BD00), range(0x1D100, 0x1D200), range(0xE0000, 0xE0100))  # fmt: skip
    hidden = (code for block in blocks for code in block if category(chr(code)) in HIDDEN and code not in JOINERS)
    table = {code: chr(0x2400 + code) if code < 32 else "\N{REPLACEMENT CHARACTER}" for code in hidden}
    table |= {ord("\n"): "↵", ord("\t"): "⇥", 127: "\N{SYMBOL FOR DELETE}"}
    return {code: shown for code, shown in table.items() if chr(code) not in keep}


def level(nats: np.ndarray) -> np.ndarray:
    """nats (n,) -> the colours (n,) from 0 to len(LEVELS); 0 for NaN, where nothing was predicted."""
    return np.searchsorted(LEVELS, np.nan_to_num(nats), side="right")


def runs(text: str, levels: np.ndarray) -> Iterator[tuple[str, int]]:
    """text of n characters, levels (n,) -> neighbours of one colour, with that colour."""
    changes = np.flatnonzero(np.diff(levels)) + 1
    for start, end in pairwise([0, *changes.tolist(), len(text)]):
        if start < end:
            yield text[start:end], int(levels[start])


def percent(p: float) -> str:
    """A probability, with two digits, or one if it is small."""
    return f"{float(f'{100 * p:.{2 if p >= 0.1 else 1}g}'):g} %" if p >= 1e-5 else "less than 0.001 %"
