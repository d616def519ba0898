"""Decodes the text of a file in pieces; a file that is not a plain text, or in another encoding, is one line."""

import codecs
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from io import BufferedReader
from itertools import chain
from typing import Any

from smallm.errors import UserError
from smallm.tokenizer.encoding_guess import SAMPLE, guess_encoding

BYTE_ORDER_MARK = "\ufeff"
HEAD_BYTES = 512  # enough to recognise a format; a multiple of 4, as UTF-32 needs
_MARKS = {  # UTF-32 comes first, because its little-endian mark starts with the one of UTF-16
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_WIDE = ("utf-16", "utf-32")
_CONTROLS = bytes({*range(32)} - set(b"\t\n\f\r"))  # high bytes of UTF-16 in most alphabets; rare in other texts
MAX_CONTROLS = 0.05  # share of such bytes; in compressed or random bytes it is 0.11
_FORMATS = {
    rb"%PDF-": "is a PDF; convert it to plain text first, for instance with pdftotext",
    rb"\{\\rtf": "is an RTF document; save it as plain text first",
    rb"\xd0\xcf\x11\xe0": "is a document of an office program; save it as plain text first",
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP": "is a picture; pass a plain text",
    rb"RIFF.{4}(WAVE|AVI )|OggS\0|fLaC\0|ID3[\2-\4]|\0.{3}ftyp": "is sound or a film; pass a plain text",
    rb"\x7fELF|MZ\x90\0": "is a program; pass a plain text",
    rb"SQLite format 3\0": "is a database; export its text first",
    rb"PAR1\x15": "is a Parquet file; save its text as JSON lines first",
    rb"7z\xbc\xaf|Rar!\x1a|.{257}ustar": "is an archive; unpack it and pass the folder",
}


def decoder_of(encoding: str) -> codecs.IncrementalDecoder:
    """A new decoder. Raises `UserError` for an unknown encoding."""
    try:
        "a".encode(encoding)  # refuses codecs such as hex, which do not decode to text
        return codecs.getincrementaldecoder(encoding)()
    except (LookupError, ValueError):
        raise UserError(f"there is no encoding {encoding!r}; pass for example --encoding latin-1") from None


def decoded(stream: "BufferedReader[Any]", name: object, encoding: str, piece_bytes: int) -> Iterator[tuple[str, int]]:
    """The text of a stream without a byte-order mark, in pieces, each with its number of bytes; 0 for the last piece.

    name: of the file, for messages. Raises `UserError` for an unknown encoding, for text in another encoding, and for a
    file that is not a plain text.
    """
    decoder = decoder_of(encoding)
    if problem := _format_problem(stream.peek(HEAD_BYTES)[:HEAD_BYTES], encoding):
        raise UserError(f"{name} {problem}")
    read, newlines, begun = 0, 0, False
    for data in chain(iter(partial(stream.read, piece_bytes), b""), [b""]):
        read += len(data)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeError as error:
            rest = stream.read(SAMPLE)
            raise UserError(f"{name} {_decoding_problem(error, encoding, read, newlines, rest)}") from None
        newlines += text.count("\n")
        if text and not begun:
            text, begun = text.removeprefix(BYTE_ORDER_MARK), True
        yield text, len(data)


def _format_problem(head: bytes, encoding: str) -> str:
    """What is wrong with a file that begins with these bytes, and what to do; "" if nothing is."""
    codec = codecs.lookup(encoding).name
    marked = next((name for name, marks in _MARKS.items() if head.startswith(marks)), "")
    if not codec.startswith(marked):
        return f"looks like {marked.upper()}, not {encoding}; pass --encoding {marked}"
    if problem := next((problem for pattern, problem in _FORMATS.items() if re.match(pattern, head, re.DOTALL)), ""):
        return problem
    if not codec.startswith(_WIDE) and (likely := guess_encoding(head)).startswith(_WIDE):
        return f"looks like {likely.upper()} without a byte-order mark, not {encoding}; pass --encoding {likely}"
    return ""


def _decoding_problem(error: UnicodeError, encoding: str, read: int, newlines: int, rest: bytes) -> str:
    """What is wrong with a file.

    read: bytes read so far; newlines: decoded before the piece with the error; rest: some bytes after the piece.
    """
    codec, what = codecs.lookup(encoding).name, str(error)
    example = "latin-1" if codec.startswith("utf-8") else "utf-8"
    if isinstance(error, UnicodeDecodeError):
        before = error.object[: error.start]  # error.object starts in the previous piece
        what = f"byte 0x{error.object[error.start]:02x} at offset {read - len(error.object) + error.start}"
        with suppress(UnicodeError):  # some codecs, such as idna, cannot ignore errors
            what += f" (line {1 + newlines + before.decode(encoding, 'ignore').count(chr(10))})"
        first, begin = read - len(error.object), max(0, error.start - 1000)
        sample = error.object[begin + -(first + begin) % 4 :] + rest  # from a multiple of 4, as UTF-32 needs
        if before.isascii() and (likely := guess_encoding(sample)):
            return f"is not valid {encoding} but looks like {likely}: {what}; pass --encoding {likely}"
        controls = sum(byte in _CONTROLS for byte in sample)
        if not codec.startswith(_WIDE) and (b"\0" in sample or controls > MAX_CONTROLS * len(sample)):
            return f"is not valid {encoding}, perhaps a binary file: {what}; pass a plain text, or name its --encoding"
    return f"is not valid {encoding}: {what}; pass --encoding NAME, for example --encoding {example}"
