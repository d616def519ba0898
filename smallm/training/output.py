"""What training prints: a reader that goes away, such as `| head`, ends the output and not the run."""

import io
import sys
from typing import Any


class Output:
    """`sys.stderr` or `sys.stdout`; what cannot be written (closed pipe, full disk, missing stream) is dropped."""

    def __init__(self, name: str):
        """name: `stderr` or `stdout`; the stream that has this name now."""
        self._stream: Any = getattr(sys, name)

    def write(self, text: str) -> int:
        self._call("write", text)
        return len(text)

    def flush(self) -> None:
        self._call("flush")

    def isatty(self) -> bool:
        return bool(self._call("isatty"))

    def fileno(self) -> int:
        number = self._call("fileno")
        if number is None:
            raise OSError("the output has no file descriptor")
        return int(number)

    @property
    def encoding(self) -> str:
        """Of the stream; tqdm draws its bar in ASCII if the encoding is not UTF."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def _call(self, name: str, *arguments: str) -> Any:
        try:
            return getattr(self._stream, name)(*arguments)
        except (OSError, ValueError, AttributeError) as error:  # ValueError: closed; AttributeError: no stream
            if not isinstance(error, io.UnsupportedOperation) and name in ("write", "flush"):
                self._stream = None
            return None
