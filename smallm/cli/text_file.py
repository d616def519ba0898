"""A text file of any size, in pieces; whatever is wrong with it is one line."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from smallm.errors import UserError

PIECE_BYTES = 1 << 16  # read at a time: the progress bar moves every few seconds
MARKS = {  # byte-order marks; UTF-32 first, whose little-endian one begins with that of UTF-16
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def pieces(path: Path, encoding: str, bar: bool = True) -> Iterator[str]:
    """The text of a file, piece by piece; with a progress bar on stderr if that is a terminal. Raises `UserError`."""
    from tqdm import tqdm

    try:
        "a".encode(encoding)  # refuses codecs such as hex, which do not give text
        decoder = codecs.getincrementaldecoder(encoding)()
    except (LookupError, ValueError):
        raise UserError(f"there is no encoding {encoding!r}; pass for example --encoding latin-1") from None
    read, data, begins = 0, b"?", b""
    try:
        with path.open("rb") as file, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, leave=False,
                                           disable=None if bar else True) as progress:  # fmt: skip
            while data:
                data = file.read(PIECE_BYTES)
                read += len(data)
                begins = begins or data[:4]
                yield decoder.decode(data, final=not data)
                progress.update(len(data))
    except UnicodeError as error:
        raise UserError(f"{path} {_problem(error, encoding, read, begins)}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _problem(error: UnicodeError, encoding: str, read: int, begins: bytes) -> str:
    """What is wrong with a file that begins with these bytes, `read` of which were read when the error came."""
    codec = codecs.lookup(encoding).name
    for name, marks in MARKS.items():
        if begins.startswith(marks) and not codec.startswith(name):
            return f"looks like {name.upper()}, not {encoding}; pass --encoding {name}"
    what, hint = str(error), ""
    if isinstance(error, UnicodeDecodeError):
        offset = read - len(error.object) + error.start  # object: bytes kept from the piece before, and this one
        what = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
        if b"\0" in error.object and not codec.startswith(("utf-16", "utf-32")):
            hint = ", perhaps a binary file"
    example = "latin-1" if codec == "utf-8" else "utf-8"
    return f"is not valid {encoding}{hint}: {what}; pass --encoding NAME, for example --encoding {example}"
