"""Reads a text file of any size in pieces; every problem with the file is a `UserError`."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from smallm.errors import UserError

PIECE_BYTES = 1 << 16  # small enough for the progress bar to move every few seconds
BYTE_ORDER_MARK = "\ufeff"
MARKS = {  # UTF-32 comes first, because its little-endian mark starts with the one of UTF-16
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


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
    read, data, head = 0, b"?", b""
    try:
        with path.open("rb") as file, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, leave=False,
                                           disable=None if bar else True) as progress:  # fmt: skip
            while data:
                data = file.read(PIECE_BYTES)
                read += len(data)
                is_first, head = not head, head or data[:4]
                text = decoder.decode(data, final=not data)
                yield text.removeprefix(BYTE_ORDER_MARK) if is_first else text
                progress.update(len(data))
    except UnicodeError as error:
        raise UserError(f"{path} {_problem(error, encoding, read, head)}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _problem(error: UnicodeError, encoding: str, read: int, head: bytes) -> str:
    """What is wrong with a file. head: its first bytes; read: how many bytes were read before the error."""
    codec = codecs.lookup(encoding).name
    for name, marks in MARKS.items():
        if head.startswith(marks) and not codec.startswith(name):
            return f"looks like {name.upper()}, not {encoding}; pass --encoding {name}"
    what, hint = str(error), ""
    if isinstance(error, UnicodeDecodeError):
        offset = read - len(error.object) + error.start  # error.object starts in the previous piece
        what = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
        if b"\0" in error.object and not codec.startswith(("utf-16", "utf-32")):
            hint = ", perhaps a binary file"
    example = "latin-1" if codec == "utf-8" else "utf-8"
    return f"is not valid {encoding}{hint}: {what}; pass --encoding NAME, for example --encoding {example}"
