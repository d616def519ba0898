"""Text to ids and back: ids 0-255 are the bytes, ids from 256 up are the non-ASCII characters the training text uses.

ASCII text encodes to its own bytes, a character with an id of its own takes one id, and every other character is
spelled in UTF-8, so any Unicode prompt works and nothing is ever "unknown". Written as a byte-level BPE whose merges
only rebuild single characters, the same vocabulary gives the same ids in Hugging Face tokenizers, onnxruntime-genai and
llama.cpp. A merge joins two pieces, so a 3- or 4-byte character needs helper tokens: its first 2 (and 3) bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from itertools import pairwise

import numpy as np

from smallm.errors import UserError
from smallm.tokenizer.stream_decoder import StreamDecoder, check_id

CODE_POINTS = 0x110000
_CHUNK = 1 << 18  # characters handled at a time: the arrays stay in the processor's cache
_SHORT = 64  # up to this many characters a loop is quicker than building the lookup table
_ADD_NOTHING = {  # what transformers 5 writes for "no post-processor"
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


class Vocabulary:
    """An immutable mapping between text and ids; equal tokens make equal vocabularies.

    ``tokens`` are the byte strings from id 256 up: non-ASCII characters in UTF-8, each right after those of its
    prefixes (of 2 or more bytes) that no earlier character brought in. Anything else is a ``UserError``. The characters
    of one text come by code point; those that a model learned later follow them.
    """

    def __init__(self, tokens: Sequence[bytes] = ()):
        self.tokens = tuple(tokens)
        self._bytes = (*(bytes([b]) for b in range(256)), *self.tokens)  # what each id stands for
        self._ids = {token: i for i, token in enumerate(self._bytes) if isinstance(token, bytes)}
        for id, (token, after) in enumerate(pairwise((*self.tokens, None)), 256):
            if not self._belongs(id, token, after):
                raise UserError(
                    f"vocabulary: {_show(token)} does not belong at id {id}; the tokens must be non-ASCII characters "
                    "in UTF-8, each once and right after its prefixes: build it with from_characters"
                )
        self.size = 256 + len(self.tokens)
        self.dtype = np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)

    def _belongs(self, id: int, token: bytes, after: bytes | None) -> bool:
        """Whether a token is new, its prefix is there before it, and it is a character or begins the token after it."""
        if not isinstance(token, bytes) or self._ids[token] != id or len(token) < 2:
            return False
        prefixed = len(token) == 2 or 256 <= self._ids.get(token[:-1], 0) < id
        return prefixed and (_is_character(token) or (isinstance(after, bytes) and after[:-1] == token))

    @classmethod
    def from_characters(cls, characters: Iterable[str]) -> "Vocabulary":
        """The vocabulary in which each of these characters has an id of its own (ASCII ones have one already)."""
        return cls().extended(characters)

    @classmethod
    def from_counts(cls, counts: np.ndarray, min_count: int) -> "Vocabulary":
        """The vocabulary of the characters that occur at least ``min_count`` >= 1 times, by count_characters."""
        return cls.from_characters(frequent(counts, min_count))

    def extended(self, characters: Iterable[str]) -> "Vocabulary":
        """With an id for each of these characters too. The ids that are there stay, and new ones follow them.

        A character without an id of its own may be spelled otherwise than before: with a prefix that is new.
        """
        chosen = set(characters)
        for c in chosen:
            if not isinstance(c, str) or len(c) != 1 or "\ud800" <= c <= "\udfff":
                raise UserError(f"vocabulary: {_show(c)} is not a character; pass single characters, no surrogates")
        due = _with_helpers(c.encode() for c in chosen if not c.isascii())
        return Vocabulary((*self.tokens, *(token for token in due if token not in self._ids)))

    def __len__(self) -> int:
        return self.size

    def __eq__(self, other: object) -> bool:
        return self.tokens == other.tokens if isinstance(other, Vocabulary) else NotImplemented

    def __repr__(self) -> str:
        return f"Vocabulary(size={self.size})"

    # -- text to ids

    def encode(self, text: str) -> np.ndarray:
        """The ids of ``text``, (N,) of ``dtype``; a lone surrogate, which UTF-8 cannot hold, is a ``UserError``."""
        try:
            pieces = [self._encode_chunk(chunk) for chunk in _chunks(text)]
        except UnicodeEncodeError:
            raise _surrogate_error(text) from None
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _encode_chunk(self, text: str) -> np.ndarray:
        if text.isascii():
            return np.frombuffer(text.encode("ascii"), np.uint8).astype(self.dtype)
        if len(text) <= _SHORT:
            return np.array([i for c in text for i in self._spell(c)], self.dtype)
        codes = _code_points(text)
        ids = self._table[codes]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size == 0:
            return ids.astype(self.dtype)
        rare, which = np.unique(codes[unknown], return_inverse=True)
        spellings = [self._spell(chr(c)) for c in rare]
        lengths = np.array([len(s) for s in spellings])[which]
        repeats = np.ones(len(ids), np.int64)
        repeats[unknown] = lengths
        starts = (np.cumsum(repeats) - repeats)[unknown]
        result = np.repeat(ids, repeats)
        padded = np.array([(*s, -1, -1, -1)[:4] for s in spellings])[which]
        for place in range(4):
            has = lengths > place
            result[starts[has] + place] = padded[has, place]
        return result.astype(self.dtype)

    def _spell(self, character: str) -> list[int]:
        """The longest prefix that is a token (at best the whole character), then single bytes: what BPE merges give."""
        data = character.encode()
        length = len(data)
        while length > 1 and data[:length] not in self._ids:
            length -= 1
        return [self._ids[data[:length]], *data[length:]]

    @cached_property
    def _table(self) -> np.ndarray:
        """The id of each code point, -1 where it has none of its own; (0x110000,) int32."""
        table = np.full(CODE_POINTS, -1, np.int32)
        table[:128] = np.arange(128)
        for i, token in enumerate(self.tokens, 256):
            if _is_character(token):
                table[ord(token.decode())] = i
        return table

    # -- ids to text

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 that the ids (N,) stand for; an id that the vocabulary does not have is a ``UserError``."""
        ids = np.asarray(ids)
        if ids.size == 0:
            return b""
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(f"ids must be a flat sequence of integers, not {ids.dtype} of shape {ids.shape}")
        for extreme in (ids.min(), ids.max()):
            check_id(int(extreme), self.size)
        pieces = self._padded[ids]
        used = pieces != 0
        used[:, 0] = True  # a zero that is not padding can only be id 0 itself
        return pieces[used].tobytes()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids (N,); bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decoder(self) -> StreamDecoder:
        """A fresh decoder for ids that come one at a time."""
        return StreamDecoder(self._bytes)

    @cached_property
    def _padded(self) -> np.ndarray:
        """The bytes of each id, filled up with zeros; (size, 4) uint8."""
        return np.array(self._bytes, "S4").view(np.uint8).reshape(-1, 4)

    # -- the vocabulary itself to a string (ONNX metadata) and to tokenizer.json, and back

    def hex_tokens(self) -> str:
        """The tokens from id 256 up in hexadecimal, separated by spaces ('c3a9 e282 e282ac'); '' if there are none."""
        return " ".join(token.hex() for token in self.tokens)

    @classmethod
    def from_hex_tokens(cls, text: str) -> "Vocabulary":
        """The inverse of hex_tokens."""
        try:
            tokens = [bytes.fromhex(word) for word in text.split()]
        except (AttributeError, ValueError):
            raise UserError(f"vocabulary: {_show(text)} is not a list of hexadecimal tokens; export again") from None
        return cls(tokens)

    def tokenizer_json(self) -> dict:
        """The content of a Hugging Face tokenizer.json (byte-level BPE) that gives the same ids."""
        spelled = ["".join(_alphabet()[b] for b in token) for token in self._bytes]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": dict(byte_level),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {piece: i for i, piece in enumerate(spelled)},
                "merges": [f"{piece[:-1]} {piece[-1]}" for piece in spelled[256:]],
            },
        }

    @classmethod
    def from_tokenizer_json(cls, content: dict) -> "Vocabulary":
        """The inverse of tokenizer_json, also after another tool re-wrote the file; a UserError for other content."""
        model = content.get("model") if isinstance(content, dict) else None
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
            raise _foreign_tokenizer("it has no vocabulary of pieces and ids")
        byte_of = {c: b for b, c in _alphabet().items()}
        try:
            vocabulary = cls([bytes(byte_of[c] for c in piece) for piece in sorted(vocab, key=vocab.get)[256:]])
        except (KeyError, TypeError, UserError):
            raise _foreign_tokenizer("its pieces are not the 256 bytes and then non-ASCII characters") from None
        expected = vocabulary.tokenizer_json()
        if content.get("post_processor") == _ADD_NOTHING:
            expected["post_processor"] = _ADD_NOTHING
        merges = expected["model"].pop("merges")
        if model.get("merges") not in (merges, [pair.split() for pair in merges]):  # both spellings are in use
            raise _foreign_tokenizer("its merges do not just rebuild the characters")
        for found, wanted in ((model, expected.pop("model")), (content, expected)):
            for key in (found.keys() | wanted.keys()) - {"merges", "model"}:
                if (found.get(key) or None) != (wanted.get(key) or None):  # None, False, "" and [] all say "none"
                    raise _foreign_tokenizer(f"its {_show(key)} differs")
        return vocabulary


def count_characters(text: str) -> np.ndarray:
    """How often each code point occurs, up to the highest: (n,) int64. A lone surrogate is a UserError."""
    counts = np.zeros(0, np.int64)
    try:
        for chunk in _chunks(text):
            found = np.bincount(_code_points(chunk))
            counts, found = sorted((counts, found), key=len, reverse=True)
            counts[: len(found)] += found
    except UnicodeEncodeError:
        raise _surrogate_error(text) from None
    return counts


def frequent(counts: np.ndarray, min_count: int) -> list[str]:
    """The characters that occur at least ``min_count`` >= 1 times, by count_characters."""
    if min_count < 1:
        raise UserError(f"min_count is {min_count}: a character needs an id only if it occurs; use 1 or more")
    return [chr(c) for c in np.flatnonzero(np.asarray(counts) >= min_count) if not 0xD800 <= c <= 0xDFFF]


def _chunks(text: str) -> Iterator[str]:
    return (text[i : i + _CHUNK] for i in range(0, max(len(text), 1), _CHUNK))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _with_helpers(characters: Iterable[bytes]) -> list[bytes]:
    # Bytes sort as code points do and a prefix before what it starts, so sorting alone gives the order we want.
    return sorted({data[:length] for data in characters for length in range(2, len(data) + 1)})


def _is_character(token: bytes) -> bool:
    text = token.decode(errors="ignore") if isinstance(token, bytes) and 2 <= len(token) <= 4 else ""
    return len(text) == 1 and text.encode() == token


@cache
def _alphabet() -> dict[int, str]:
    """The printable stand-in for each byte that GPT-2's tokenizer introduced and all byte-level BPE readers share."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)}


def _surrogate_error(text: str) -> UserError:
    position = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    return UserError(
        f"the text has a lone surrogate (U+{ord(text[position]):04X}) at character {position}, which UTF-8 cannot "
        "hold; remove it, or read the text as UTF-8 with errors='replace'"
    )


def _foreign_tokenizer(reason: str) -> UserError:
    return UserError(f"tokenizer.json is not one that smallm wrote: {reason}; use the file of the training run")


def _show(value: object) -> str:
    """A value from a stranger, safe to print: one short line."""
    text = value[:24].hex() if isinstance(value, bytes) else ascii(value)
    return text if len(text) <= 48 else text[:45] + "..."
