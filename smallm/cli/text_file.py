"""Reads a text file of any size in pieces; every problem with the file is a `UserError`."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from smallm.errors import UserError
from smallm.tokenizer.text_formats import BYTE_ORDER_MARK, HEAD_BYTES, format_problem

PIECE_BYTES = 1 << 16  # small enough for the progress bar to move every few seconds


def pieces(path: Path, encoding: str, bar: bool = True) -> Iterator[str]:
    """The text of a file, piece by piece, without a byte-order mark.

    bar: show a progress bar on stderr if stderr is a terminal.
    Raises `UserError` for an unknown encoding, and for a file that cannot be read or is not valid in this encoding.
    """
    from tqdm import tqdm

    try:
        "a".encode(encoding)  # refuses codecs such as hex, which do not decode to text
        decoder = codecs.getincrementaldecoder(encoding)()
    except (LookupError, ValueError):
        raise UserError(f"there is no encoding {encoding!r}; pass for example --encoding latin-1") from None
    read, data, begun = 0, b"?", False
    try:
        with path.open("rb") as file, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, leave=False,
                                           disable=None if bar else True) as progress:  # fmt: skip
            if problem := format_problem(file.peek(HEAD_BYTES)[:HEAD_BYTES], encoding):
                raise UserError(f"{path} {problem}")
            while data:
                data = file.read(PIECE_BYTES)
                read += len(data)
                text = decoder.decode(data, final=not data)
                yield text if begun else text.removeprefix(BYTE_ORDER_MARK)
                begun = begun or text != ""
                progress.update(len(data))
    except UnicodeError as error:
        raise UserError(f"{path} {_problem(error, encoding, read)}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _problem(error: UnicodeError, encoding: str, read: int) -> str:
    """What is wrong with a file. read: how many bytes were read before the error."""
    codec = codecs.lookup(encoding).name
    what, hint = str(error), ""
    if isinstance(error, UnicodeDecodeError):
        offset = read - len(error.object) + error.start  # error.object starts in the previous piece
        what = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
        if b"\0" in error.object and not codec.startswith(("utf-16", "utf-32")):
            hint = ", perhaps a binary file"
    example = "latin-1" if codec == "utf-8" else "utf-8"
    return f"is not valid {encoding}{hint}: {what}; pass --encoding NAME, for example --encoding {example}"
