"""What may be done to a text as it is read, if that is asked for: one Unicode form, one kind of line end."""

import unicodedata
from typing import NamedTuple

MAX_HELD = 1 << 12  # characters; a letter with more accents than that is no text


class Tidy(NamedTuple):
    """How to read a text; false if as it is."""

    normalise: str = "none"
    """`none`, or `nfc`: a letter and its accents become one character where Unicode has that."""
    newlines: str = "keep"
    """`keep`, or `lf`: CR LF and CR become LF."""

    def __bool__(self) -> bool:
        return self != AS_IS

    def __call__(self, text: str, final: bool) -> tuple[str, str]:
        """The text as wanted, and the end of it, as it was, that depends on what follows; final: nothing follows."""
        held = 0 if final else self._held(text)
        text, rest = text[: len(text) - held], text[len(text) - held :]
        if self.newlines == "lf":
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        return unicodedata.normalize("NFC", text) if self.normalise == "nfc" else text, rest

    def _held(self, text: str) -> int:
        """How many characters at the end may join with what follows."""
        if self.normalise != "nfc":
            return int(self.newlines == "lf" and text.endswith("\r"))
        held = min(1, len(text))
        while 0 < held < min(len(text), MAX_HELD) and joins(text[-held]):
            held += 1
        if self.newlines == "lf" and text[:-held].endswith("\r"):
            held += 1
        return held if held < MAX_HELD else 0


AS_IS = Tidy()


def joins(character: str) -> bool:
    """Whether it may become one with the character before it: marks do, and the later letters of a Hangul syllable."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"
