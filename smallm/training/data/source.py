"""The text as it lies there: a file, a folder of them or a built-in name, read in pieces of bounded size.

It is never altered: newlines are not translated, byte-order marks not stripped.
"""

import codecs
import difflib
import io
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from smallm.errors import UserError
from smallm.training.data.tidy import AS_IS, Tidy

PIECE_BYTES = 1 << 18  # what is made of it stays in the processor's cache
PROGRESS_FROM_BYTES = 20_000_000

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_HASH = "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
BINARY_BEGINNINGS = (b"%PDF", b"PK\x03\x04", b"\x1f\x8b", b"\x89PNG", b"\xff\xd8\xff", b"\x7fELF", b"GIF8")
BINARY_HEAD = 4096  # bytes among which a NUL tells a binary file from one in another 8-bit encoding


class Place(NamedTuple):
    """A place between two pieces, with all that it takes to read on from there."""

    characters: int = 0
    """Of the text before it."""
    part: int = 0
    offset: int = 0
    """Bytes of the part that were read."""
    state: tuple[bytes, int] | None = None
    """Of the decoder; None at the beginning of a part."""
    last: str = "\n"
    """The character before it."""
    held: str = ""
    """Characters that are read, and not given out before what follows them is known."""


class Piece(NamedTuple):
    """A part of the text, never empty."""

    text: str
    utf8: bytes
    """The same in UTF-8; lone surrogates, which that cannot hold, as three bytes each."""
    end: Place


@dataclass(frozen=True)
class Source:
    """A text that can be read, from its beginning or from a place in it."""

    name: str
    parts: list[Path | bytes]
    """Files, or a text in memory; between two of them a newline is put if there is none."""
    encoding: str = "utf-8"
    tidy: Tidy = AS_IS

    @property
    def files(self) -> list[Path]:
        """The parts that are files."""
        return [part for part in self.parts if isinstance(part, Path)]

    def pieces(self, doing: str, progress: bool, start: Place | None = None) -> Iterator[Piece]:
        """The text in pieces; `doing` names the bar that a long text gets on stderr if `progress` is wanted."""
        place = start or Place()
        try:
            sizes = [part.stat().st_size if isinstance(part, Path) else len(part) for part in self.parts]
            silent = not progress or sum(sizes) < PROGRESS_FROM_BYTES
            left = sum(sizes[place.part :]) - place.offset
            with tqdm(total=left, desc=doing, unit="B", unit_scale=True, leave=False, disable=silent) as bar:
                for part in range(place.part, len(self.parts)):
                    for piece in self._of_part(part, place, bar):
                        yield piece
                        place = piece.end
        except OSError as error:
            raise UserError(f"cannot read {error.filename or self.name}: {error.strerror}; check --data") from None

    def _of_part(self, part: int, place: Place, bar: tqdm) -> Iterator[Piece]:
        """The pieces of one part, from `place` on if that lies in it."""
        decoder = codecs.getincrementaldecoder(self.encoding)("strict")
        is_utf8 = codecs.lookup(self.encoding).name == "utf-8"
        between, characters, offset, held, data = "", place.characters, 0, "", b"?"
        if place.part == part and place.state is not None:
            offset, held = place.offset, place.held
            decoder.setstate(place.state)
        elif place.last != "\n":
            between = "\n"
        with self._open(part) as stream:
            stream.seek(offset)
            while data:
                begun = decoder.getstate()[0]  # the first bytes of a character
                data = stream.read(PIECE_BYTES)
                offset += len(data)
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeError as error:
                    problem = _decoding_problem(error, self.encoding, stream, offset)
                    raise UserError(f"{self.parts[part]} {problem}") from None
                text, held = self.tidy(held + text, final=not data)
                if text:
                    state, text = decoder.getstate(), between + text
                    characters += len(text)
                    if is_utf8 and not self.tidy:
                        utf8 = (between.encode() + begun + data).removesuffix(state[0])
                    else:
                        utf8 = text.encode(errors="surrogatepass")
                    yield Piece(text, utf8, Place(characters, part, offset, state, text[-1], held))
                    between = ""
                bar.update(len(data))

    def _open(self, part: int) -> BinaryIO:
        data = self.parts[part]
        return data.open("rb") if isinstance(data, Path) else io.BytesIO(data)


def find_source(name: str, encoding: str, cache: Path) -> Source:
    """A file, a folder (every *.txt below it) or a built-in name, looked for in this order; downloads go to `cache`."""
    path = Path(name)
    try:
        if path.is_file():
            return Source(path.name, [path], encoding)
        if name and path.is_dir():
            files = {file.relative_to(path).as_posix(): file for file in path.rglob("*.txt") if file.is_file()}
            if not files:
                raise UserError(f"folder {name} has no *.txt file in it; pass the text itself with --data FILE")
            return Source(path.resolve().name, [files[name] for name in sorted(files)], encoding)
        if name and path.exists():
            raise UserError(f"{name} is neither a file nor a folder; save the text to a file, then pass --data FILE")
    except OSError as error:
        raise UserError(f"cannot read {name[:80]!r}: {error.strerror}; check --data") from None
    if name in BUILT_IN:
        return BUILT_IN[name](cache)
    hint = f"pass --data FILE, FOLDER, {' or '.join(BUILT_IN)}"
    raise UserError(f"there is no file or folder {name[:80]!r}{_nearest(path)}; {hint}")


def _nearest(path: Path) -> str:
    try:
        candidates = {entry.name.lower(): str(entry) for entry in path.parent.iterdir()}
    except (OSError, ValueError):  # ValueError: a NUL in the path
        candidates = {}
    candidates |= {name: name for name in BUILT_IN}
    near = difflib.get_close_matches(path.name.lower(), candidates, n=1)
    return f" (did you mean '{candidates[near[0]]}'?)" if near else ""


def _python_docs(cache: Path) -> Source:
    """The language reference that CPython carries for help(), each paragraph once; no download."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python comes without python-docs; pass another text with --data FILE") from None
    texts, seen = [], set()
    for key in sorted(topics):  # they share sections: a fifth of them all, and of the validation tail an eighth
        fresh = [each for each in dict.fromkeys(re.split(r"\n{2,}", topics[key].strip("\n"))) if each not in seen]
        seen.update(fresh)
        texts += ["\n\n".join(fresh)] if fresh else []
    return Source("python-docs", [("\n\n\n".join(texts) + "\n").encode()])


def _shakespeare(cache: Path) -> Source:
    """Tiny Shakespeare, downloaded once into the cache and verified."""
    import pooch

    pooch.get_logger().setLevel("ERROR")
    try:
        http = pooch.HTTPDownloader(timeout=20)  # seconds without an answer
        folder = cache / "downloads"
        file = pooch.retrieve(SHAKESPEARE_URL, SHAKESPEARE_HASH, "shakespeare.txt", folder, downloader=http)
    except Exception as error:  # network, proxy, disk or checksum: the way out is the same
        raise UserError(
            f"shakespeare could not be downloaded ({type(error).__name__}); "
            f"download {SHAKESPEARE_URL} elsewhere and pass it with --data FILE"
        ) from None
    return Source("shakespeare", [Path(file)])


BUILT_IN = {"python-docs": _python_docs, "shakespeare": _shakespeare}


def _decoding_problem(error: UnicodeError, encoding: str, stream: BinaryIO, read: int) -> str:
    """What is wrong with a file of which `read` bytes were read when the error came."""
    codec = codecs.lookup(encoding).name
    stream.seek(0)
    head = stream.read(4)
    for name, marks in BYTE_ORDER_MARKS.items():
        if head.startswith(marks) and not codec.startswith(name):
            return f"looks like {name.upper()}, not {encoding}; pass --encoding {name}"
    wide = codec.startswith(("utf-16", "utf-32"))
    if not wide and (head.startswith(BINARY_BEGINNINGS) or b"\0" in stream.read(BINARY_HEAD)):
        return "is a binary file, or UTF-16 (--encoding utf-16-le); pass plain text with --data FILE"
    what = str(error)
    if isinstance(error, UnicodeDecodeError):
        # error.object: the bytes that the decoder had kept from the piece before, then this piece
        offset = read - len(error.object) + error.start
        what = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
        with suppress(UnicodeError):  # some encodings, such as idna, cannot pass over what is wrong
            what += f" (line {1 + _newlines(stream, offset, encoding)})"
    example = "latin-1" if codec.startswith("utf-8") else "utf-8"
    return f"is not valid {encoding}: {what}; pass --encoding NAME, for example --encoding {example}"


def _newlines(stream: BinaryIO, size: int, encoding: str) -> int:
    """How many there are in the first `size` bytes."""
    decoder = codecs.getincrementaldecoder(encoding)("ignore")
    stream.seek(0)
    return sum(
        decoder.decode(stream.read(min(PIECE_BYTES, size - start))).count("\n") for start in range(0, size, PIECE_BYTES)
    )
