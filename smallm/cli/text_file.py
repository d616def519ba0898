"""Reads a text file of any size in pieces; every problem with the file is a `UserError`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from smallm.errors import UserError
from smallm.tokenizer.text_files import find_files, is_pattern, text_pieces

PIECE_BYTES = 1 << 16  # small enough for the progress bar to move every few seconds


def files(names: Sequence[str]) -> list[Path]:
    """The files that names of files, folders (all .txt files below) and patterns such as `notes/**/*.md` stand for.

    Raises `UserError` for a folder or a pattern without files, a web address, and a folder that cannot be read.
    """
    found: list[Path] = []
    for name in names:
        try:
            matches = find_files(name)
        except OSError as error:
            raise UserError(f"cannot read {error.filename or name}: {error.strerror}") from None
        if not matches and (Path(name).is_dir() or is_pattern(name)):
            raise UserError(f"{name} has no text file; name files, folders with .txt files, or a pattern in quotes")
        if not matches and "://" in name:
            raise UserError(f"{name[:80]!r} is a web address; download the text, then name the file")
        found += matches or [Path(name)]  # opening a file that does not exist tells why
    return list(dict.fromkeys(found))


def pieces(path: Path, encoding: str, bar: bool = True, field: str = "text") -> Iterator[str]:
    """The text of a file, compressed or not, piece by piece, without a byte-order mark.

    bar: show a progress bar on stderr if stderr is a terminal. field: key of JSON lines, or column
    of CSV, that holds the text.
    Raises `UserError` for an unknown encoding, and for a file that cannot be read or is not valid in this encoding.
    """
    from tqdm import tqdm

    try:
        with path.open("rb") as file, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, leave=False,
                                           disable=None if bar else True) as progress:  # fmt: skip
            for text, size in text_pieces(file, path, encoding, PIECE_BYTES, field):
                yield text
                progress.update(size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
