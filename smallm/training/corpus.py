"""From a text file, a folder of them or a built-in name to ids on disk: encoded once, then memory-mapped.

The text streams through in pieces, so memory stays bounded whatever its length, and it is never altered: newlines are
not translated, byte-order marks not stripped. The last part of it is kept for validation; nothing crosses the split.
The ids are cached by content, so a file that changed is noticed and one that only moved is not encoded again.
"""

import codecs
import difflib
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smallm.errors import UserError
from smallm.training.cache import cache_folder
from smallm.vocabulary import CODE_POINTS, Vocabulary, count_characters

PIECE_BYTES = 8 << 20
PROGRESS_FROM_BYTES = 20_000_000
CACHE_FORMAT = 1  # to be raised when the cached files, or the ids that a Vocabulary gives, change their meaning

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_HASH = "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as ids, cut once into a training part and the validation part that follows it.

    train_ids, val_ids: (N,) of the vocabulary's dtype, read-only; train_characters, val_characters: the lengths of the
    same parts in characters (code points); fingerprint: SHA-256 of the whole text in UTF-8, in hex; start_text: the
    character that generation from an empty seed starts from, a newline if the training part has one, else its first.
    """

    name: str
    vocabulary: Vocabulary = field(repr=False)
    train_ids: np.memmap = field(repr=False)
    val_ids: np.memmap = field(repr=False)
    train_characters: int
    val_characters: int
    fingerprint: str
    start_text: str

    def val_text(self) -> str:
        """The validation part as text."""
        return self.vocabulary.decode(self.val_ids)


def open_corpus(
    source: str,
    *,
    encoding: str = "utf-8",
    min_count: int,
    val_fraction: float,
    cache: Path | None = None,
    progress: bool = True,
) -> Corpus:
    """Open `source`: a file, a folder (every *.txt below it, joined) or a built-in name, looked for in this order.

    encoding: that of the files (built-in texts know their own); min_count: how often the training part must have a
    character for it to get an id of its own; val_fraction: the share of the characters, in (0, 1), kept for validation;
    cache: where encoded texts are kept, by default $SMALLM_CACHE or the user's cache folder; progress: show a bar on
    stderr while a long text is read. Raises UserError for all that the caller can mend.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--data.val_fraction must lie between 0 and 1, not {val_fraction}; try 0.1")
    try:
        "a".encode(encoding)  # refuses codecs such as hex, which do not give text
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError):
        raise UserError(f"there is no encoding {encoding!r}; pass for example --encoding latin-1") from None
    cache = cache or cache_folder()
    text = _find(source, encoding, cache)
    facts = _survey(text, val_fraction, progress)
    key = json.dumps([CACHE_FORMAT, facts["fingerprint"], float(val_fraction), int(min_count)])
    folder = cache / "corpora" / hashlib.sha256(key.encode()).hexdigest()
    try:
        corpus = _load(folder, text.name) or _build(text, facts, min_count, folder, progress)
    except OSError as error:
        raise UserError(f"cannot write to {cache}: {error.strerror or error}; set SMALLM_CACHE elsewhere") from None
    if corpus is None:
        raise UserError(f"{folder} was changed while it was being written; run the command again")
    return corpus


@dataclass(frozen=True)
class _Text:
    name: str
    parts: list[Path | bytes]  # files, or a text in memory
    encoding: str = "utf-8"

    def pieces(self, doing: str, progress: bool) -> Iterator[str]:
        """The text from its beginning, in pieces, none empty; between two parts a newline is put if there is none."""
        last = "\n"
        try:
            size = sum(part.stat().st_size if isinstance(part, Path) else len(part) for part in self.parts)
            silent = not progress or size < PROGRESS_FROM_BYTES
            with tqdm(total=size, desc=doing, unit="B", unit_scale=True, leave=False, disable=silent) as bar:
                for part in self.parts:
                    between = "" if last == "\n" else "\n"
                    for piece in self._decoded(part, bar):
                        yield between + piece
                        between, last = "", piece[-1]
        except OSError as error:
            raise UserError(f"cannot read {error.filename or self.name}: {error.strerror}; check --data") from None

    def _decoded(self, part: Path | bytes, bar: tqdm) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder(self.encoding)("strict")
        head, read, lines, data = b"", 0, 0, b"?"
        try:
            with part.open("rb") if isinstance(part, Path) else io.BytesIO(part) as stream:
                while data:
                    data = stream.read(PIECE_BYTES)
                    head, read = head or data[:4], read + len(data)
                    if piece := decoder.decode(data, final=not data):
                        yield piece
                        lines += piece.count("\n")
                    bar.update(len(data))
        except UnicodeError as error:
            raise UserError(f"{part} {_decoding_problem(error, self.encoding, head, read, lines)}") from None


def _decoding_problem(error: UnicodeError, encoding: str, head: bytes, read: int, lines: int) -> str:
    """What is wrong with a file that begins with `head`, found after `read` bytes and `lines` good newlines."""
    codec = codecs.lookup(encoding).name
    for name, marks in BYTE_ORDER_MARKS.items():
        if head.startswith(marks) and not codec.startswith(name):
            return f"looks like {name.upper()}, not {encoding}; pass --encoding {name}"
    what = str(error)
    if isinstance(error, UnicodeDecodeError):
        # error.object: the bytes that the decoder had kept from the piece before, then this piece
        offset = read - len(error.object) + error.start
        line = 1 + lines + error.object[: error.start].decode(encoding, "replace").count("\n")
        what = f"byte 0x{error.object[error.start]:02x} at offset {offset} (line {line})"
    example = "latin-1" if codec.startswith("utf-8") else "utf-8"
    return f"is not valid {encoding}: {what}; pass --encoding NAME, for example --encoding {example}"


def _find(source: str, encoding: str, cache: Path) -> _Text:
    path = Path(source)
    try:
        if path.is_file():
            return _Text(path.name, [path], encoding)
        if source and path.is_dir():
            files = {file.relative_to(path).as_posix(): file for file in path.rglob("*.txt") if file.is_file()}
            if not files:
                raise UserError(f"folder {source} has no *.txt file in it; pass the text itself with --data FILE")
            return _Text(path.resolve().name, [files[name] for name in sorted(files)], encoding)
        if source and path.exists():
            raise UserError(f"{source} is neither a file nor a folder; save the text to a file, then pass --data FILE")
    except OSError as error:
        raise UserError(f"cannot read {source[:80]!r}: {error.strerror}; check --data") from None
    if source in BUILT_IN:
        return BUILT_IN[source](cache)
    hint = f"pass --data FILE, FOLDER, {' or '.join(BUILT_IN)}"
    raise UserError(f"there is no file or folder {source[:80]!r}{_nearest(path)}; {hint}")


def _nearest(path: Path) -> str:
    try:
        candidates = {entry.name.lower(): str(entry) for entry in path.parent.iterdir()}
    except (OSError, ValueError):  # ValueError: a NUL in the path
        candidates = {}
    candidates |= {name: name for name in BUILT_IN}
    near = difflib.get_close_matches(path.name.lower(), candidates, n=1)
    return f" (did you mean '{candidates[near[0]]}'?)" if near else ""


def _python_docs(cache: Path) -> _Text:
    """The language reference that CPython carries for help(); no download."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python comes without python-docs; pass another text with --data FILE") from None
    texts = dict.fromkeys(topics[key].strip("\n") for key in sorted(topics))  # some topics share one text
    return _Text("python-docs", [("\n\n\n".join(texts) + "\n").encode()])


def _shakespeare(cache: Path) -> _Text:
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
    return _Text("shakespeare", [Path(file)])


BUILT_IN = {"python-docs": _python_docs, "shakespeare": _shakespeare}


def _survey(text: _Text, val_fraction: float, progress: bool) -> dict:
    """Read the text once to see that it decodes, what it is and where to cut it."""
    digest, characters, ascii_only = hashlib.sha256(), 0, True
    for piece in text.pieces("reading", progress):
        digest.update(piece.encode(errors="surrogatepass"))  # a Vocabulary refuses lone surrogates, in better words
        characters += len(piece)
        ascii_only = ascii_only and piece.isascii()
    train = int(characters * (1 - Fraction(str(val_fraction))))  # a tenth where 0.1 is written, not the nearest float
    val = characters - train
    if not characters:
        raise UserError(f"{text.name} is empty; pass a text with --data FILE")
    if min(train, val) < 2:
        parts = f"{train} characters to train on and {val} to validate on; each needs 2"
        raise UserError(f"{text.name} is too short: it gives {parts}; pass a longer text or --data.val_fraction 0.5")
    return {"fingerprint": digest.hexdigest(), "ascii": ascii_only, "train_characters": train, "val_characters": val}


def _halves(pieces: Iterator[str], train_characters: int) -> Iterator[tuple[str, str]]:
    """Each piece as (what of it is for training, what is for validation)."""
    for piece in pieces:
        yield piece[:train_characters], piece[train_characters:]
        train_characters = max(0, train_characters - len(piece))


def _build(text: _Text, facts: dict, min_count: int, folder: Path, progress: bool) -> Corpus | None:
    """Encode the text into `folder`, which comes to exist whole or not at all."""
    counts = np.zeros(CODE_POINTS, np.int64)
    if not facts["ascii"]:  # the ids of ASCII characters do not depend on their counts
        for train, _ in _halves(text.pieces("counting", progress), facts["train_characters"]):
            counts += count_characters(train)
    vocabulary = Vocabulary.from_counts(counts, min_count)
    unfinished = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        facts = facts | _encode(text, facts, vocabulary, unfinished, progress)
        (unfinished / "corpus.json").write_text(json.dumps(facts), encoding="utf-8")
        for path in unfinished.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        try:
            unfinished.replace(folder)
        except OSError:
            if _load(folder, text.name) is None:  # else another process was faster
                # What is there is damaged. All depends on the folder's name alone, so two processes' files go together.
                for file in ("train.bin", "val.bin", "corpus.json"):
                    (unfinished / file).replace(folder / file)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return _load(folder, text.name)


def _encode(text: _Text, facts: dict, vocabulary: Vocabulary, folder: Path, progress: bool) -> dict:
    """Write train.bin and val.bin; returns what there is to say of them."""
    digest, start_text, counts = hashlib.sha256(), "", [0, 0]
    with (folder / "train.bin").open("wb") as train_file, (folder / "val.bin").open("wb") as val_file:
        for halves in _halves(text.pieces("encoding", progress), facts["train_characters"]):
            start_text = "\n" if "\n" in halves[0] else start_text or halves[0][:1]
            for i, file in enumerate((train_file, val_file)):
                ids = vocabulary.encode(halves[i])
                file.write(ids.data)
                counts[i] += len(ids)
                digest.update(halves[i].encode())
    if digest.hexdigest() != facts["fingerprint"]:
        raise UserError(f"{text.name} changed while it was being read; run the command again")
    about_ids = {"dtype": vocabulary.dtype.str, "train_ids": counts[0], "val_ids": counts[1]}
    return about_ids | {"tokens": vocabulary.hex_tokens(), "start_text": start_text}


def _load(folder: Path, name: str) -> Corpus | None:
    """The corpus in this folder, None if there is none or it is not whole."""
    try:
        facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        train, val = (np.memmap(folder / f"{part}.bin", facts["dtype"], mode="r") for part in ("train", "val"))
        if (len(train), len(val)) != (facts["train_ids"], facts["val_ids"]):
            return None
        vocabulary = Vocabulary.from_hex_tokens(facts["tokens"])
        scalars = (facts[key] for key in ("train_characters", "val_characters", "fingerprint", "start_text"))
        return Corpus(name, vocabulary, train, val, *scalars)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
