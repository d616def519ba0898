"""Text to ids and back: ids 0-255 are the bytes, ids from 256 up the non-ASCII characters of the training text.

ASCII text encodes to its bytes, each character of the vocabulary takes one id, and every other character is spelled in
UTF-8 bytes. So any Unicode text can be encoded, and no id for unknown characters exists. Written as a byte-level BPE
whose merges only rebuild single characters, the vocabulary gives the same ids in Hugging Face tokenizers,
onnxruntime-genai and llama.cpp. A merge joins two tokens, so a character of 3 or 4 bytes needs helper tokens: its first
2 (and 3) bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from smallm.errors import UserError
from smallm.tokenizer.stream_decoder import StreamDecoder, check_id

CODE_POINTS = 0x110000
_CHUNK = 1 << 18  # characters encoded at a time: the arrays fit the processor's cache
_SHORT = 64  # for up to this many characters a loop is faster than building the lookup table
_NO_POST_PROCESSOR = {  # as transformers 5 writes it
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


class Vocabulary:
    """An immutable mapping between text and ids. Vocabularies with equal tokens are equal.

    tokens: the byte strings of the ids from 256 up: non-ASCII characters in UTF-8, each directly after those of its
        prefixes (of 2 or more bytes) that are not there yet. The characters of the first text are in the order of
        their code points; characters added by `extended` follow.
    Raises `UserError` for other tokens.
    """

    def __init__(self, tokens: Sequence[bytes] = ()):
        self.tokens = tuple(tokens)
        self._bytes = (*(bytes([b]) for b in range(256)), *self.tokens)  # of each id
        self._ids = {token: i for i, token in enumerate(self._bytes) if isinstance(token, bytes)}
        for id, (token, after) in enumerate(pairwise((*self.tokens, None)), 256):
            if not self._belongs(id, token, after):
                raise UserError(
                    f"vocabulary: {_show(token)} does not belong at id {id}; the tokens must be non-ASCII characters "
                    "in UTF-8, each once and right after its prefixes: build it with from_characters"
                )
        self.size = 256 + len(self.tokens)
        self.dtype = np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)

    def _belongs(self, id: int, token: bytes | None, after: bytes | None) -> bool:
        """Whether a token is unique, its prefix precedes it, and it is a character or the prefix of the next token."""
        if not isinstance(token, bytes) or self._ids[token] != id or len(token) < 2:
            return False
        prefixed = len(token) == 2 or 256 <= self._ids.get(token[:-1], 0) < id
        return prefixed and (_is_character(token) or (isinstance(after, bytes) and after[:-1] == token))

    @classmethod
    def from_characters(cls, characters: Iterable[str]) -> "Vocabulary":
        """The vocabulary with an id for each of these characters (ASCII characters have one already)."""
        return cls().extended(characters)

    def extended(self, characters: Iterable[str]) -> "Vocabulary":
        """This vocabulary with an id for each of these characters. Existing ids stay, new ids follow them.

        The spelling of other characters may change, because it uses the longest known prefix. Raises `UserError`.
        """
        chosen = set(characters)
        for c in chosen:
            if not isinstance(c, str) or len(c) != 1 or "\ud800" <= c <= "\udfff":
                raise UserError(f"vocabulary: {_show(c)} is not a character; pass single characters, no surrogates")
        encoded = (c.encode() for c in chosen if not c.isascii())
        tokens = {data[:length] for data in encoded for length in range(2, len(data) + 1)}
        # UTF-8 bytes sort like code points, and a prefix sorts before its extensions: exactly the order needed.
        return Vocabulary((*self.tokens, *sorted(tokens - self._ids.keys())))

    def __len__(self) -> int:
        return self.size

    def __eq__(self, other: object) -> bool:
        return self.tokens == other.tokens if isinstance(other, Vocabulary) else NotImplemented

    def __repr__(self) -> str:
        return f"Vocabulary(size={self.size})"

    # -- text to ids

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (N,) of `dtype`. Raises `UserError` for a lone surrogate, which UTF-8 cannot encode."""
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
        ids: np.ndarray = self._table[codes]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size == 0:
            return ids.astype(self.dtype)
        rare, which = np.unique(codes[unknown], return_inverse=True)
        spelled = np.array([(*self._spell(chr(c)), -1, -1, -1)[:4] for c in rare])[which]  # -1: no further id
        repeats = np.ones(len(ids), np.int64)
        repeats[unknown] = (spelled >= 0).sum(axis=1)
        result = np.repeat(ids, repeats)
        result[result < 0] = spelled[spelled >= 0]
        return result.astype(self.dtype)

    def _spell(self, character: str) -> list[int]:
        """The longest prefix that is a token (possibly the whole character), then single bytes, as BPE merges give."""
        data = character.encode()
        length = len(data)
        while length > 1 and data[:length] not in self._ids:
            length -= 1
        return [self._ids[data[:length]], *data[length:]]

    @cached_property
    def _table(self) -> np.ndarray:
        """(0x110000,) int32: the id of each code point, or -1 if the code point is not in the vocabulary."""
        table = np.full(CODE_POINTS, -1, np.int32)
        table[:128] = np.arange(128)
        for i, token in enumerate(self.tokens, 256):
            if _is_character(token):
                table[ord(token.decode())] = i
        return table

    # -- ids to text

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 bytes of ids (N,). Raises `UserError` for an id that is not in the vocabulary."""
        ids = np.asarray(ids)
        if ids.size == 0:
            return b""
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(f"ids must be a flat sequence of integers, not {ids.dtype} of shape {ids.shape}")
        for extreme in (ids.min(), ids.max()):
            check_id(int(extreme), self.size)
        pieces: np.ndarray = self._padded[ids]
        used = pieces != 0
        used[:, 0] = True  # of id 0, whose only byte is zero
        return bytes(pieces[used])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids (N,); bytes that are not valid UTF-8 become U+FFFD. Raises `UserError` for an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decoder(self) -> StreamDecoder:
        """A new decoder for ids that arrive one at a time."""
        return StreamDecoder(self._bytes)

    @cached_property
    def _padded(self) -> np.ndarray:
        """(size, 4) uint8: the bytes of each id, padded with zeros."""
        return np.array(self._bytes, "S4").view(np.uint8).reshape(-1, 4)

    # -- the vocabulary to a string (ONNX metadata) and to tokenizer.json, and back

    def hex_tokens(self) -> str:
        """The tokens from id 256 up in hexadecimal, separated by spaces, as in 'c3a9 e282 e282ac'."""
        return " ".join(token.hex() for token in self.tokens)

    @classmethod
    def from_hex_tokens(cls, text: str) -> "Vocabulary":
        """The inverse of `hex_tokens`. Raises `UserError`."""
        try:
            tokens = [bytes.fromhex(word) for word in text.split()]
        except (AttributeError, ValueError):
            raise UserError(f"vocabulary: {_show(text)} is not a list of hexadecimal tokens; export again") from None
        return cls(tokens)

    def tokenizer_json(self) -> dict[str, Any]:
        """The content of a Hugging Face tokenizer.json, a byte-level BPE that gives the same ids."""
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
    def from_tokenizer_json(cls, content: dict[str, Any]) -> "Vocabulary":
        """The inverse of `tokenizer_json`, also if another tool has rewritten the file. Raises `UserError`."""
        byte_of = {c: b for b, c in _alphabet().items()}
        try:
            model, vocab = content["model"], content["model"]["vocab"]
            if not all(isinstance(id, int) for id in vocab.values()):
                raise TypeError
            vocabulary = cls([bytes(byte_of[c] for c in piece) for piece in sorted(vocab, key=vocab.__getitem__)[256:]])
        except (KeyError, TypeError, AttributeError, UserError):
            raise _foreign_tokenizer("its pieces are not the 256 bytes and then non-ASCII characters") from None
        expected = vocabulary.tokenizer_json()
        if content.get("post_processor") == _NO_POST_PROCESSOR:
            expected["post_processor"] = _NO_POST_PROCESSOR
        merges = expected["model"].pop("merges")
        if model.get("merges") not in (merges, [pair.split() for pair in merges]):  # both forms are in use
            raise _foreign_tokenizer("its merges do not just rebuild the characters")
        for found, wanted in ((model, expected.pop("model")), (content, expected)):
            for key in (found.keys() | wanted.keys()) - {"merges", "model"}:
                if (found.get(key) or None) != (wanted.get(key) or None):  # None, False, "" and [] are equivalent
                    raise _foreign_tokenizer(f"its {_show(key)} differs")
        return vocabulary


def count_characters(text: str) -> np.ndarray:
    """(n,) int64: the occurrences of each code point up to the highest. Raises `UserError` for a lone surrogate."""
    counts = np.zeros(0, np.int64)
    try:
        for chunk in _chunks(text):
            found = np.bincount(_code_points(chunk))
            counts, found = sorted((counts, found), key=len, reverse=True)
            counts[: len(found)] += found
    except UnicodeEncodeError:
        raise _surrogate_error(text) from None
    return counts


def _chunks(text: str) -> Iterator[str]:
    return (text[i : i + _CHUNK] for i in range(0, max(len(text), 1), _CHUNK))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _is_character(token: bytes) -> bool:
    text = token.decode(errors="ignore") if isinstance(token, bytes) and 2 <= len(token) <= 4 else ""
    return len(text) == 1 and text.encode() == token


@cache
def _alphabet() -> dict[int, str]:
    """The printable character for each byte that GPT-2's tokenizer introduced and byte-level BPE tokenizers share."""
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
    """A value of unknown origin as one short printable line."""
    text = value[:24].hex() if isinstance(value, bytes) else ascii(value)
    return text if len(text) <= 48 else text[:45] + "..."
