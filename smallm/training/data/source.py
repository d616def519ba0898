"""Where a training text comes from: files, folders, patterns or a built-in text, read in pieces of bounded size.

A byte-order mark at the beginning of a file is not part of the text. Newlines and Unicode forms stay as they are unless
`Tidy` asks for a change.
"""

import difflib
import hashlib
import io
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from smallm.errors import UserError
from smallm.tokenizer.text_files import ending, find_files, is_pattern, last_part, text_pieces
from smallm.training.cache import unfinished_file
from smallm.training.config import DataConfig
from smallm.training.data.hub_datasets import PREFIX, stored_dataset
from smallm.training.output import Output

PIECE_BYTES = 1 << 18  # small enough that a piece and its ids stay in the processor's cache
PROGRESS_FROM_BYTES = 20_000_000
LONG_LINE = 40  # characters; shorter lines of python-docs may repeat
SHUFFLED = 8  # paragraphs of python-docs that stay together
MAX_HELD = 1 << 12  # characters; a letter with more combining marks than this is cut

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_HASH = "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Tidy(NamedTuple):
    """Changes made to a text while it is read."""

    normalise: str = "none"
    """`none`, or `nfc`: a letter and its accents become one character where Unicode has one."""
    newlines: str = "keep"
    """`keep`, or `lf`: CR LF and CR become LF."""

    def __call__(self, text: str, final: bool) -> tuple[str, str]:
        """Returns the changed text and an unchanged rest, whose form depends on the text that follows.

        Put the rest before the next piece. final: no text follows, so the rest is empty.
        """
        held = 0 if final else self._held(text)
        text, rest = text[: len(text) - held], text[len(text) - held :]
        if self.newlines == "lf":
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        return unicodedata.normalize("NFC", text) if self.normalise == "nfc" else text, rest

    def _held(self, text: str) -> int:
        """The number of characters at the end that may combine with the text that follows."""
        if self.normalise != "nfc":
            return int(self.newlines == "lf" and text.endswith("\r"))
        held = min(1, len(text))
        while 0 < held < min(len(text), MAX_HELD) and combines(text[-held]):
            held += 1
        if self.newlines == "lf" and text[:-held].endswith("\r"):
            held += 1
        return held if held < MAX_HELD else 0


def combines(character: str) -> bool:
    """Whether NFC may join the character to the one before it: marks, and vowels and finals of Hangul syllables."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"


class Text(Protocol):
    """A text that can be read any number of times."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def train_characters(self) -> Sequence[int]:
        """The lengths of the training parts at the beginning; empty if `data.val_fraction` gives the length."""

    def pieces(self, label: str, progress: bool) -> Iterator[str]:
        """Yields the text in pieces of bounded size, none of them empty.

        label: names the progress bar. progress: show the bar on stderr; only for texts of 20 MB and more.
        """


def progress_bar(label: str, size: int, progress: bool) -> "tqdm[Any]":
    """A bar on stderr for reading `size` bytes; without `progress`, or for less than 20 MB, a silent one."""
    silent = not progress or size < PROGRESS_FROM_BYTES
    return tqdm(
        total=size, desc=label, unit="B", unit_scale=True, leave=False, disable=silent, file=Output("stderr")
    )  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A `Text` as files, which are read in one order.

    parts: files, or texts in memory as bytes; the separator is inserted between two parts, as `ending` says.
    """

    name: str
    parts: list[Path | bytes]
    encoding: str = "utf-8"
    tidy: Tidy = field(default_factory=Tidy)
    field: str = "text"
    """Key or column of the text in JSON lines and CSV."""
    separator: str = "\n"
    """Follows each record and each file of an archive."""
    train_characters: Sequence[int] = ()
    texts: tuple["Source", ...] = ()
    """The texts of which this one consists."""

    def pieces(self, label: str, progress: bool) -> Iterator[str]:
        """See `Text`. Raises `UserError` for files that cannot be read or decoded."""
        tail = ""
        try:
            size = sum(part.stat().st_size if isinstance(part, Path) else len(part) for part in self.parts)
            with progress_bar(label, size, progress) as bar:
                for part in self.parts:
                    before = ending(tail, self.separator) if tail else ""
                    for text in self._read(part, bar):
                        yield before + text
                        before, tail = "", last_part(tail + text, self.separator)
        except OSError as error:
            raise UserError(f"cannot read {error.filename or self.name}: {error.strerror}; check --data") from None

    def _read(self, part: Path | bytes, bar: tqdm) -> Iterator[str]:
        held, name = "", part if isinstance(part, Path) else self.name
        encoding = self.encoding if isinstance(part, Path) else "utf-8"
        with part.open("rb") if isinstance(part, Path) else io.BufferedReader(io.BytesIO(part)) as stream:
            for text, size in text_pieces(stream, name, encoding, PIECE_BYTES, self.field, self.separator):
                text, held = self.tidy(held + text, final=False)
                if text:
                    yield text
                bar.update(size)
        if held:
            yield self.tidy(held, final=True)[0]


def find_source(data: DataConfig, cache: Path) -> Source:
    """Finds the texts that the settings name, one after the other; downloads and standard input go to `cache`.

    A text is a file, a folder (the files below it that `include` names and `exclude` does not), a pattern, a built-in
    text, standard input (`-`) or a dataset (`hf:NAME`), in this order. Raises `UserError`, naming the nearest file or
    text, if nothing has this name.
    """
    names = (data.source,) if isinstance(data.source, str) else data.source
    found = [_find(name, data, cache) for name in names]
    if not found:
        raise UserError("data.source names no text; pass --data FILE")
    parts = [part for each in found for part in each.parts]
    encoding = data.encoding if len(found) > 1 else found[0].encoding
    settings: dict[str, Any] = {
        "tidy": Tidy(data.normalise, data.newlines), "field": data.field, "separator": data.separator or "\n",
    }  # fmt: skip
    texts = tuple(replace(each, **settings) for each in found)
    return Source(" + ".join(each.name for each in found), parts, encoding, **settings, texts=texts)


def _find(name: str, data: DataConfig, cache: Path) -> Source:
    path = Path(name)
    try:
        files = find_files(name, data.include, data.exclude)
        if path.is_dir() and name and not files:
            patterns = " or ".join(data.include)
            raise UserError(f"folder {name} contains no {patterns} file; pass the text itself with --data FILE, or "
                            "other patterns with --data.include")  # fmt: skip
        if files:
            return Source(_name(path), [*files], data.encoding)
        if name and path.exists():
            raise UserError(f"{name} is neither a file nor a folder; save the text to a file, then pass --data FILE")
    except OSError as error:
        raise UserError(f"cannot read {str(error.filename or name)[:80]!r}: {error.strerror}; check --data") from None
    if name in BUILT_IN:
        return BUILT_IN[name](cache)
    hint = f"pass --data FILE, FOLDER, {' or '.join(BUILT_IN)}"
    if name == "-":
        return Source("standard input", [store_standard_input(cache)], data.encoding)
    if name.startswith(PREFIX):
        return Source(name, [stored_dataset(name, data.field, cache)])
    if "://" in name:
        raise UserError(f"{name[:80]!r} is a web address; download the text, then {hint}")
    if is_pattern(name):
        raise UserError(f"no file matches the pattern {name[:80]!r}; {hint}")
    raise UserError(f"there is no file or folder {name[:80]!r}{_nearest(path)}; {hint}")


def _name(path: Path) -> str:
    """The name of a text: that of its file or folder, or the whole pattern."""
    return path.resolve().name if path.is_dir() else path.name if path.is_file() else str(path)


def store_standard_input(cache: Path) -> Path:
    """Stores standard input in the cache, because a text is read twice; the same text always gives the same file.

    Raises `UserError` if standard input is a terminal, or the cache cannot be written.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("standard input is a terminal; pipe a text into the command, or pass --data FILE")
    digest = hashlib.sha256()
    try:
        with unfinished_file(cache.absolute() / "stdin") as unfinished:
            with unfinished.open("wb") as file:
                while piece := sys.stdin.buffer.read(1 << 20):
                    digest.update(piece)
                    file.write(piece)
            if not unfinished.stat().st_size:
                raise UserError("standard input is empty; pipe a text into the command, or pass --data FILE")
            path = unfinished.with_name(f"{digest.hexdigest()[:16]}.txt")
            unfinished.replace(path)
    except OSError as error:
        raise UserError(f"cannot write to {cache}: {error.strerror or error}; set SMALLM_CACHE elsewhere") from None
    print(f"text   standard input is stored in {path}", file=Output("stderr"))
    return path


def _nearest(path: Path) -> str:
    try:
        candidates = {entry.name.lower(): str(entry) for entry in path.parent.iterdir()}
    except (OSError, ValueError):  # ValueError: a NUL in the path
        candidates = {}
    candidates |= {name: name for name in BUILT_IN}
    near = difflib.get_close_matches(path.name.lower(), candidates, n=1)
    return f" (did you mean '{candidates[near[0]]}'?)" if near else ""


def _python_docs(cache: Path) -> Source:
    """The language reference that CPython ships for help(), without tables; needs no download.

    Topics share sections, so a paragraph with a long line that occurred before is left out. The rest is shuffled, a few
    paragraphs at a time, so that the validation part is of the same kind as the training part.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no python-docs; pass another text with --data FILE") from None
    paragraphs: list[str] = []
    seen: set[str] = set()
    for paragraph in re.split(r"\n{2,}", "\n\n".join(topics[key].strip("\n") for key in sorted(topics))):
        lines = {line.strip() for line in paragraph.splitlines() if len(line.strip()) >= LONG_LINE} or {paragraph}
        if not lines & seen and not paragraph.lstrip().startswith("+--"):
            paragraphs.append(paragraph)
            seen |= lines
    starts = range(0, len(paragraphs), SHUFFLED)
    pieces = ["\n\n".join(paragraphs[start : start + SHUFFLED]) for start in starts]
    pieces.sort(key=lambda piece: hashlib.sha256(piece.encode()).digest())
    return Source("python-docs", [("\n\n\n".join(pieces) + "\n").encode()])


def _shakespeare(cache: Path) -> Source:
    """Tiny Shakespeare, downloaded once into the cache and verified."""
    import pooch

    pooch.get_logger().setLevel("ERROR")
    try:
        http = pooch.HTTPDownloader(timeout=20)  # seconds without a response
        folder = cache / "downloads"
        file = pooch.retrieve(SHAKESPEARE_URL, SHAKESPEARE_HASH, "shakespeare.txt", folder, downloader=http)
    except Exception as error:  # network, proxy, disk or checksum: the advice is the same
        raise UserError(
            f"shakespeare could not be downloaded ({type(error).__name__}); "
            f"download {SHAKESPEARE_URL} elsewhere and pass it with --data FILE"
        ) from None
    return Source("shakespeare", [Path(file)])


BUILT_IN = {"python-docs": _python_docs, "shakespeare": _shakespeare}
