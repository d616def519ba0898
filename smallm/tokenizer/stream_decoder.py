"""Ids that come one at a time, as text: whole characters only."""

import codecs
from collections.abc import Sequence

from smallm.errors import UserError


class StreamDecoder:
    """Decodes ids one at a time, holding back the bytes of a character until it is whole."""

    def __init__(self, spelled: Sequence[bytes]):
        """spelled: the bytes that each id of the vocabulary stands for."""
        self._spelled = spelled
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The characters that this id completes: '' while there are none. Invalid bytes become U+FFFD."""
        check_id(id, len(self._spelled))
        return self._utf8.decode(self._spelled[id])

    @property
    def pending(self) -> bytes:
        """The bytes held back: the beginning of a character, or nothing."""
        return self._utf8.getstate()[0]

    def copy(self) -> "StreamDecoder":
        """Another decoder in the same state."""
        other = StreamDecoder(self._spelled)
        other._utf8.setstate(self._utf8.getstate())
        return other

    def flush(self) -> str:
        """What is left at the end: '' or U+FFFD for a character that was cut short. Starts afresh."""
        return self._utf8.decode(b"", final=True)


def check_id(id: int, size: int) -> None:
    """Raises `UserError` for an id that a vocabulary of this size does not have."""
    if not 0 <= id < size:
        raise UserError(f"id {id} is not in the vocabulary (0 to {size - 1}); is it from another model?")
