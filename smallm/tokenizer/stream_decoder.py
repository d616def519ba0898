"""Decodes ids that arrive one at a time into whole characters."""

import codecs
from collections.abc import Sequence

from smallm.errors import UserError


class StreamDecoder:
    """Decodes ids one at a time, and holds back the bytes of a character until the character is complete."""

    def __init__(self, spelled: Sequence[bytes]):
        """spelled: the bytes of each id of the vocabulary."""
        self._spelled = spelled
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The characters that this id completes; may be empty. Invalid bytes become U+FFFD. Raises `UserError`."""
        check_id(id, len(self._spelled))
        return self._utf8.decode(self._spelled[id])

    @property
    def pending(self) -> bytes:
        """The bytes held back: the beginning of a character, or empty."""
        return self._utf8.getstate()[0]

    def copy(self) -> "StreamDecoder":
        """Another decoder in the same state."""
        other = StreamDecoder(self._spelled)
        other._utf8.setstate(self._utf8.getstate())
        return other

    def flush(self) -> str:
        """Ends the text and resets the decoder. Returns U+FFFD if an incomplete character is left, else ""."""
        return self._utf8.decode(b"", final=True)


def check_id(id: int, size: int) -> None:
    """Raises `UserError` for an id that is not in a vocabulary of this size."""
    if not 0 <= id < size:
        raise UserError(f"id {id} is not in the vocabulary (0 to {size - 1}); is it from another model?")
