"""Decodes ids that arrive one at a time into whole characters."""

from codecs import utf_8_decode
from collections.abc import Sequence

from smallm.errors import UserError


class StreamDecoder:
    """Decodes ids one at a time, and holds back the bytes of a character until the character is complete."""

    def __init__(self, spelled: Sequence[bytes]):
        """spelled: the bytes of each id of the vocabulary."""
        self._spelled = spelled
        self.pending = b""
        """The bytes held back: the beginning of a character, or empty."""

    def push(self, id: int) -> str:
        """The characters that this id completes; may be empty. Invalid bytes become U+FFFD. Raises `UserError`."""
        check_id(id, len(self._spelled))
        data = self.pending + self._spelled[id]
        text, used = utf_8_decode(data, "replace", False)
        self.pending = data[used:]
        return text

    def flush(self) -> str:
        """Ends the text and resets the decoder. Returns U+FFFD if an incomplete character is left, else ""."""
        text, _ = utf_8_decode(self.pending, "replace", True)
        self.pending = b""
        return text


def check_id(id: int, size: int) -> None:
    """Raises `UserError` for an id that is not in a vocabulary of this size."""
    if not 0 <= id < size:
        raise UserError(f"id {id} is not in the vocabulary (0 to {size - 1}); is it from another model?")
