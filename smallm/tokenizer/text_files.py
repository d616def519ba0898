"""Finds files, and reads the text inside: gzip, bzip2, xz, Zstandard and ZIP, a field of JSON lines and CSV."""

import bz2
import csv
import glob
import gzip
import importlib
import io
import json
import lzma
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from smallm.errors import UserError
from smallm.tokenizer.text_formats import HEAD_BYTES, decoded

Stream = Any  # a binary file with `read` and `peek`: BufferedReader, GzipFile, BZ2File, LZMAFile or ZipExtFile

ZIP = rb"PK\x03\x04|PK\x05\x06"  # with files and without
DOCUMENTS = (".docx", ".odt", ".epub", ".xlsx", ".pptx")
DOCUMENT_MEMBERS = {"[Content_Types].xml", "mimetype"}
MAX_LINE_ENDS = 16  # characters after a separator
DOCUMENT_END = "\udfff"
"""A separator that no text holds, because UTF-8 cannot encode it."""
DAMAGES = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError)


def find_files(name: str, include: Sequence[str] = ("*.txt",), exclude: Sequence[str] = ()) -> list[Path]:
    """The files that a name stands for, in the order of their paths; [] if no file matches.

    name: a file, a folder (the files below it that `include` names and `exclude` does not) or a pattern such as
    `notes/**/*.md` (the files that it matches and `exclude` does not name). Paths in `exclude` begin at the folder, or
    where the first wildcard is. Raises `OSError` for a folder that cannot be read.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    if name and path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in _files(path)}
        return [files[each] for each in sorted(files) if _matches(each, include) and not _matches(each, exclude)]
    if not is_pattern(name):
        return []
    parts = path.parts
    folder = Path(*parts[: next(i for i, part in enumerate(parts) if is_pattern(part))])
    matches = map(Path, sorted(glob.glob(name, recursive=True)))  # noqa: PTH207, absolute ones too
    names = {file: (file.as_posix(), file.relative_to(folder).as_posix()) for file in matches if file.is_file()}
    return [file for file, paths in names.items() if not any(_matches(each, exclude) for each in paths)]


def is_pattern(name: str) -> bool:
    """Whether a name holds a wildcard."""
    return bool(set(name) & set("*?["))


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder. Raises `OSError` for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=refuse):
        files = (Path(parent, name) for name in names)
        yield from (file for file in files if file.is_file())


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the path or the name of the file, in capitals or not."""
    paths = (name.lower(), PurePath(name).name.lower())
    return any(fnmatchcase(path, pattern.lower()) for pattern in patterns for path in paths)


def text_pieces(
    file: Stream, name: object, encoding: str, piece_bytes: int, field: str = "text", separator: str = "\n"
) -> Iterator[tuple[str, int]]:
    """The text of a file in pieces, each with the number of bytes of the file that were read for it.

    file: a buffered binary file, compressed or not; the first bytes tell. A ZIP archive gives its files in the order of
    their names. name: of the file, for messages; .jsonl, .ndjson, .csv and .tsv (before .gz and the like) are read
    record by record. field: key or column with the text of a record. separator: follows each record, and each file of
    an archive, as `ending` says. Raises `UserError` for a file that is damaged, has no such field, or is no text.
    """
    before, seekable = 0, file.seekable()
    try:
        for text in _texts(file, str(name), encoding, piece_bytes, field, separator):
            now = file.tell() if seekable else 0
            yield text, now - before
            before = now
    except UserError:
        raise
    except Exception as error:
        decompressor = isinstance(error, OSError) and error.errno is None
        if not decompressor and not isinstance(error, (*DAMAGES, *_zstandard_errors())):
            raise
        raise UserError(f"{name} is damaged or encrypted: {error}; pass an intact file") from None


def ending(text: str, separator: str) -> str:
    """Returns what to write after a document that ends with `text`.

    The result is the separator, or "" if the document already ends with the separator, with or without line ends after
    it. If the document does not end with a newline, a newline precedes `DOCUMENT_END`.
    """
    if text.endswith(separator) or text.rstrip("\r\n").endswith(separator):
        return ""
    return "\n" + separator if separator == DOCUMENT_END and not text.endswith("\n") else separator


def _texts(
    stream: Stream, name: str, encoding: str, piece_bytes: int, field: str, separator: str
) -> Iterator[str]:
    head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
    if re.match(ZIP, head):
        for member, opened in _members(stream, name):
            with opened:
                yield from _ended(_texts(opened, member, encoding, piece_bytes, field, separator), separator)
        return
    if unpack := next((unpack for pattern, unpack in UNPACK.items() if re.match(pattern, head)), None):
        with unpack(stream, name) as unpacked:
            yield from _texts(unpacked, name, encoding, piece_bytes, field, separator)
        return
    texts: Iterator[str] = (text for text, _ in decoded(stream, name, encoding, piece_bytes))
    if records := RECORDS.get(_suffix(name)):
        texts = _gathered(records(texts, name, field), piece_bytes, separator)
    yield from texts


def _suffix(name: str) -> str:
    """The suffix of a name before those of compressed files, in lower case."""
    return PurePath(re.sub(r"(\.(gz|bz2|xz|zst))+$", "", name.lower())).suffix


# -- archives and compressed files


def _members(stream: Stream, name: str) -> Iterator[tuple[str, Stream]]:
    """The files of a ZIP archive. Raises `UserError` for a document of an office program or an electronic book."""
    document = f"{name} is a document in a ZIP archive, as .docx, .odt and .epub files are; save it as plain text first"
    if PurePath(name).suffix.lower() in DOCUMENTS:
        raise UserError(document)
    with zipfile.ZipFile(stream) as archive:
        members = sorted(archive.namelist())
        if DOCUMENT_MEMBERS & set(members):
            raise UserError(document)
        for member in members:
            if not member.endswith("/") and not member.startswith("__MACOSX/"):
                yield f"{name}/{member}", archive.open(member)


def _unzstd(stream: Stream, name: str) -> Stream:
    try:
        if sys.version_info >= (3, 14):
            return io.BufferedReader(importlib.import_module("compression.zstd").ZstdFile(stream))
        reader = importlib.import_module("zstandard").ZstdDecompressor().stream_reader(
            stream, read_across_frames=True, closefd=False
        )  # fmt: skip
    except ImportError:
        raise UserError(
            f"{name} is compressed with Zstandard; pip install 'smallm[zstd]' to read it, or unpack it with unzstd"
        ) from None
    return io.BufferedReader(reader)


def _zstandard_errors() -> list[type[Exception]]:
    modules = (sys.modules.get(name) for name in ("zstandard", "compression.zstd"))
    return [module.ZstdError for module in modules if module]


UNPACK: dict[bytes, Callable[[Stream, str], Stream]] = {
    rb"\x1f\x8b": lambda stream, name: gzip.GzipFile(fileobj=stream),
    rb"BZh[1-9]1AY&SY": lambda stream, name: bz2.BZ2File(stream),
    rb"\xfd7zXZ\0": lambda stream, name: lzma.LZMAFile(stream),  # noqa: SIM115
    rb"\x28\xb5\x2f\xfd": _unzstd,
}


# -- records


def _json_lines(texts: Iterator[str], name: str, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(texts), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{name} is not valid JSON in line {number}; mend or remove the line") from None
        yield text_of_record(record, name, number, field)


def _comma_separated(texts: Iterator[str], name: str, field: str) -> Iterator[str]:
    delimiter = "\t" if _suffix(name) == ".tsv" else ","
    rows = csv.DictReader(_lines(texts), delimiter=delimiter)
    try:
        for row in rows:
            yield text_of_record(row, name, rows.line_num, field)
    except csv.Error as error:
        raise UserError(f"{name} is not valid CSV in line {rows.line_num}: {error}; pass JSON lines instead") from None


RECORDS = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _comma_separated, ".tsv": _comma_separated,
}  # fmt: skip


def text_of_record(record: object, name: str, line: int, field: str) -> str:
    """Returns the text in a field of a record.

    name, line: the file and the line of the record, for the message. Raises `UserError` if the record has no such
    field, or if the field does not hold a text.
    """
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        known = ", ".join(map(str, list(record)[:9])) if isinstance(record, dict) else ""
        fields = f"its fields are {known}" if known else "the line is not a record"
        raise UserError(
            f"{name} has no text in field {field!r} of line {line}: {fields[:200]}; name another with --data.field"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} has a lone surrogate in line {line}, which is no character; mend the line") from None
    return value


def _lines(texts: Iterator[str]) -> Iterator[str]:
    """The lines of a text, each with its newline."""
    begun: list[str] = []
    for text in texts:
        *lines, last = re.split(r"(?<=\n)", text)
        for line in lines:
            yield "".join((*begun, line))
            begun = []
        begun.append(last)
    if last := "".join(begun):
        yield last


def _gathered(records: Iterator[str], characters: int, separator: str) -> Iterator[str]:
    """The records, each with a separator at its end, in pieces of about so many characters."""
    held: list[str] = []
    size = 0
    for record in records:
        held.append(record + ending(record, separator))
        size += len(held[-1])
        if size >= characters:
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)


def _ended(texts: Iterator[str], separator: str) -> Iterator[str]:
    """The pieces of a text, with a separator at its end; an empty text stays empty."""
    tail = ""
    for text in texts:
        yield text
        tail = last_part(tail + text, separator)
    if tail and (end := ending(tail, separator)):
        yield end


def last_part(text: str, separator: str) -> str:
    """Returns the last characters of a text, enough of them for `ending`."""
    return text[-len(separator) - MAX_LINE_ENDS :]
