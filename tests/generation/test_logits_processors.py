"""Allowed characters: the text has no others, whichever ids encode them, and can always continue."""

import json

import make_golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TOY_VOCABULARY

from smallm.errors import UserError
from smallm.generation.config import GenerationConfig
from smallm.generation.logits_processors import AllowedCharacters
from smallm.tokenizer.vocabulary import Vocabulary

CHARACTERS = st.text(alphabet="ab\n\x00éèñ€中\ufffd🎉🎊ß", max_size=8)


def ids(allowed, pending=b""):
    """The ids that may come next."""
    mask = allowed.mask(pending)
    assert mask.dtype == np.float32
    assert set(mask.tolist()) <= {0.0, -np.inf}
    return set(np.flatnonzero(mask == 0).tolist())


def spelled(text):
    return set(TOY_VOCABULARY.encode(text).tolist())


@pytest.mark.parametrize(
    ("allowed", "banned", "pending", "expected"),
    [
        ("ab", "", b"", {97, 98}),
        ("abc", "b", b"", {97, 99}),
        ("aé", "", b"", {97, 0xC3} | spelled("é")),  # by its own id, or by its bytes
        ("aé", "", b"\xc3", {0xA9}),
        ("ß", "", b"", {0xC3}),
        ("🎉", "", b"\xf0\x9f", {0x8E}),
        ("🎉🎊", "🎊", b"\xf0\x9f\x8e", {0x89}),
        ("中", "", b"", {0xE4} | {i for i in range(256, TOY_VOCABULARY.size)
                                  if "中".encode().startswith(TOY_VOCABULARY.decode_bytes([i]))}),
    ],
)  # fmt: skip
def test_by_hand(allowed, banned, pending, expected):
    assert ids(AllowedCharacters(TOY_VOCABULARY, allowed, banned), pending) == expected


@pytest.mark.parametrize("case", json.loads(make_golden.FILE.read_text(encoding="utf-8"))["allowed"], ids=str)
def test_golden_allowed_ids(case):
    allowed = AllowedCharacters(Vocabulary.from_hex_tokens(case["tokens"]), case["allowed"], case["banned"])
    assert sorted(ids(allowed, bytes.fromhex(case["after"]))) == case["ids"]


def test_bans_by_hand():
    banned = AllowedCharacters(TOY_VOCABULARY, None, "aé")
    everything = set(range(TOY_VOCABULARY.size))
    assert ids(banned) == everything - {97} - spelled("é")
    assert ids(banned, b"\xc3") == everything - {97, 0xA9} - spelled("é")
    # a first byte of which every completion is banned is not allowed
    latin = "".join(map(chr, range(0xC0, 0x100)))  # all that begins with C3
    assert 0xC3 not in ids(AllowedCharacters(TOY_VOCABULARY, None, latin))
    assert 0xC3 in ids(AllowedCharacters(TOY_VOCABULARY, None, latin[1:]))
    # bytes that are not UTF-8 are decoded as U+FFFD
    assert ids(banned) >= {0x80, 0xFF}
    assert not ids(AllowedCharacters(TOY_VOCABULARY, None, "\ufffd")) & ({*range(0x80, 0xC2)} | {*range(0xF5, 0x100)})
    assert ids(AllowedCharacters(TOY_VOCABULARY, None, "\ufffd"), b"\xc3") == set(range(0x80, 0xC0))


@settings(max_examples=60)
@given(st.none() | CHARACTERS, CHARACTERS, st.lists(st.integers(0, 10_000), min_size=1, max_size=12))
def test_any_walk_gives_allowed_characters_and_goes_on(characters, banned, choices):
    try:
        GenerationConfig(allowed=characters, banned=banned)
    except UserError:
        assert characters is not None
        assert not set(characters) - set(banned)
        return
    allowed = AllowedCharacters(TOY_VOCABULARY, characters, banned)
    decoder, text = TOY_VOCABULARY.decoder(), ""
    for choice in choices:
        ways = sorted(ids(allowed, decoder.pending))
        assert ways
        text += decoder.push(ways[choice % len(ways)])
    assert not set(text) & set(banned)
    if characters is not None:
        assert set(text) <= set(characters)


@given(st.text(max_size=5), st.text(max_size=5))
def test_every_allowed_text_can_be_written(text, banned):
    allowed, decoder = AllowedCharacters(TOY_VOCABULARY, None, banned), TOY_VOCABULARY.decoder()
    for character in text:
        if character in banned:
            continue
        for id in TOY_VOCABULARY.encode(character).tolist():
            assert allowed.mask(decoder.pending)[id] == 0
            decoder.push(id)


@pytest.mark.parametrize(
    ("allowed", "banned", "message"),
    [
        ("", "", "allowed and banned leave no character"),
        ("ab", "ba", "allowed and banned leave no character"),
        ("a\udcff", "", "allowed = .* has a lone surrogate"),
        (None, "\udcff", "banned = .* has a lone surrogate"),
        (["a"], "", "allowed = .* is not a string"),
        (None, 7, "banned = 7 is not a string"),
    ],
)
def test_mistakes(allowed, banned, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(allowed=allowed, banned=banned)
