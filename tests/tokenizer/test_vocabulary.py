"""Vocabulary: text <-> ids, and the same ids from Hugging Face's tokenizers."""

import copy
import json
from itertools import chain
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from smallm.errors import UserError
from smallm.tokenizer import vocabulary as module
from smallm.tokenizer.vocabulary import Vocabulary, count_characters

LATIN = "éèüñß"
MIXED = "é€\u0301Яж漢字あ😀😂𝄞\U0010ffff"  # 2, 3 and 4 bytes; € and \u20ad, 😀 and 😁 share helper prefixes
VOCABULARIES = {
    "bytes": Vocabulary(),
    "latin": Vocabulary.from_characters(LATIN),
    "mixed": Vocabulary.from_characters(MIXED),
    "dense": Vocabulary.from_characters(chr(c) for c in [*range(0x80, 0x600), *range(0x4E00, 0x5200), 0x1F600]),
    "learned later": Vocabulary.from_characters("漢😂é").extended("字😀€").extended("è𝄞"),
    "last byte": Vocabulary.from_characters("\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff"),
}
HANDMADE = [
    "",
    " ",
    "  two  spaces ",
    "\ttab\n\nnewlines\r\nCRLF\r",
    "it's 3.14, don't!",
    "na\u00efve caf\u00e9, cafe\u0301",
    "\x00\x01\x7f",
    "€\u20ad\u20acx\u20ae",
    "漢字 漣 あい",
    "😀😁😂 👩\u200d👩\u200d👧 🇩🇪",
    "𝄞𝄟",
    "\ufeffBOM \u00a0nbsp \u2028 \u3000",
    "<s></s><unk> [UNK] ▁ Ġ Ċ",
]
# Mostly characters that the vocabularies know or nearly know, so that the interesting paths are taken often.
NEARBY = "".join(chr(ord(c) + d) for c in MIXED[:-1] + LATIN for d in (0, 1, 2, 64))
TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(NEARBY), st.sampled_from(" \t\r\nab'1")))
each_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES.keys())
quick = settings(deadline=None, max_examples=100)


def hugging_face(vocabulary: Vocabulary) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(vocabulary.tokenizer_json()))


HUGGING_FACE = {name: hugging_face(vocabulary) for name, vocabulary in VOCABULARIES.items()}


@each_vocabulary
@quick
@given(text=TEXTS)
def test_round_trip(vocabulary, text):
    ids = vocabulary.encode(text)
    assert ids.ndim == 1
    assert ids.dtype == vocabulary.dtype
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode(ids.tolist()) == text
    assert vocabulary.decode_bytes(ids) == text.encode()


@each_vocabulary
@quick
@given(text=TEXTS)
def test_the_loop_and_the_table_agree_wherever_the_text_is_cut(vocabulary, text):
    with patch.object(module, "_SHORT", 10**9):
        by_loop = vocabulary.encode(text).tolist()
    for chunk in (3, 10**6):
        with patch.object(module, "_SHORT", 0), patch.object(module, "_CHUNK", chunk):
            assert vocabulary.encode(text).tolist() == by_loop


@pytest.mark.parametrize("name", VOCABULARIES)
@quick
@given(text=TEXTS)
def test_ids_and_text_equal_those_of_tokenizers(name, text):
    same_ids_and_text(name, text)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_handmade_texts_equal_those_of_tokenizers(name):
    for text in [*HANDMADE, "\n".join(HANDMADE) * 20]:
        same_ids_and_text(name, text)


def same_ids_and_text(name, text):
    ids = VOCABULARIES[name].encode(text).tolist()
    assert HUGGING_FACE[name].encode(text).ids == ids
    assert HUGGING_FACE[name].decode(ids) == VOCABULARIES[name].decode(ids) == text


@pytest.mark.parametrize("name", VOCABULARIES)
@quick
@given(data=st.data())
def test_any_ids_decode_as_in_tokenizers_and_as_a_stream(name, data):
    vocabulary = VOCABULARIES[name]
    ids = data.draw(st.lists(st.integers(0, vocabulary.size - 1) | st.integers(0x80, 0xFF)))
    text = vocabulary.decode(ids)
    assert HUGGING_FACE[name].decode(ids) == text
    stream = vocabulary.decoder()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == text


@each_vocabulary
def test_ascii_encodes_to_its_own_bytes(vocabulary):
    text = "".join(map(chr, range(128)))
    with patch.object(Vocabulary, "_table", None):  # a table of every code point is not worth building for this
        assert Vocabulary(vocabulary.tokens).encode(text).tolist() == list(range(128))
    assert vocabulary.encode(text + "é")[:128].tolist() == list(range(128))


def test_layout_of_the_ids():
    vocabulary = Vocabulary.from_characters("b€é\u20ad😀😁é")
    expected = [b"\xc3\xa9", b"\xe2\x82", b"\xe2\x82\xac", b"\xe2\x82\xad"]
    expected += [b"\xf0\x9f", b"\xf0\x9f\x98", b"\xf0\x9f\x98\x80", b"\xf0\x9f\x98\x81"]
    assert list(vocabulary.tokens) == expected
    assert vocabulary.size == len(vocabulary) == 256 + 8
    assert vocabulary.encode("é€\u20ad😀😁").tolist() == [256, 258, 259, 262, 263]
    assert Vocabulary(expected) == vocabulary
    assert repr(vocabulary) == "Vocabulary(size=264)"


@pytest.mark.parametrize("padding", ["", "é" * 100])
def test_rare_characters_are_spelled_with_the_longest_prefix(padding):
    vocabulary = Vocabulary.from_characters("é€😀")  # 256 é, 257 e282, 258 €, 259 f09f, 260 f09f98, 261 😀
    expected = {
        "\u20ad": [257, 0xAD],  # two bytes shared
        "\u2190": [0xE2, 0x86, 0x90],  # one byte shared
        "è": [0xC3, 0xA8],
        "😁": [260, 0x81],  # three bytes shared
        "🚀": [259, 0x9A, 0x80],  # two bytes shared
        "𝄞": [0xF0, 0x9D, 0x84, 0x9E],
    }
    for text, ids in expected.items():
        assert vocabulary.encode(text + padding)[: len(ids)].tolist() == ids
        assert vocabulary.encode(padding + text)[len(padding) :].tolist() == ids
    together = [*chain.from_iterable(expected.values()), *[256] * len(padding)]
    assert vocabulary.encode("".join(expected) + padding).tolist() == together


@given(characters=st.lists(st.characters(codec="utf-8")))
@quick
def test_order_and_repetition_of_the_characters_do_not_matter(characters):
    vocabulary = Vocabulary.from_characters(characters)
    assert Vocabulary.from_characters(reversed(characters * 2)) == vocabulary
    assert all(len(vocabulary.encode(c)) == 1 for c in characters)
    own = {c for c in characters if not c.isascii()}
    assert {t.decode() for t in vocabulary.tokens if len(t.decode(errors="ignore")) == 1} == own
    for again in (
        Vocabulary(vocabulary.tokens),
        Vocabulary.from_hex_tokens(vocabulary.hex_tokens()),
        Vocabulary.from_tokenizer_json(json.loads(json.dumps(vocabulary.tokenizer_json()))),
        Vocabulary.from_tokenizer_json(json.loads(hugging_face(vocabulary).to_str())),
    ):
        assert again == vocabulary


def test_new_characters_get_ids_after_the_old_ones():
    old = Vocabulary.from_characters("ñ€😀")
    new = old.extended("aé€\u20ad🎉漢")  # ASCII and known characters keep their ids
    assert new.tokens[: len(old.tokens)] == old.tokens
    added = [token.decode(errors="replace") for token in new.tokens[len(old.tokens) :]]
    assert added == ["é", "\u20ad", "\ufffd", "漢", "\ufffd", "🎉"]  # by code point, with the helpers that are new
    text = "El niño: 10 € 😀, ½ \u0159\n" * 9
    assert new.encode(text).tolist() == old.encode(text).tolist()
    assert len(new.encode("é€\u20ad🎉漢")) == 5
    assert old.extended("ñ") == old.extended([]) == old == Vocabulary().extended("ñ€😀")
    assert old.extended("é") != Vocabulary.from_characters("éñ€😀")  # the same characters, but older ids


@quick
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_existing_ids_stay_when_characters_are_added(texts):
    vocabulary = Vocabulary()
    for text in texts:
        before, vocabulary = vocabulary, vocabulary.extended(text)
        assert vocabulary.tokens[: len(before.tokens)] == before.tokens
        assert len(vocabulary.encode(text)) == len(text)
        assert vocabulary.decode(vocabulary.encode(text)) == text
    for again in (
        Vocabulary.from_hex_tokens(vocabulary.hex_tokens()),
        Vocabulary.from_tokenizer_json(json.loads(hugging_face(vocabulary).to_str())),
    ):
        assert again == vocabulary
    assert hugging_face(vocabulary).encode("".join(texts)).ids == vocabulary.encode("".join(texts)).tolist()


def test_unequal_vocabularies():
    assert Vocabulary.from_characters("é") != Vocabulary()
    assert Vocabulary() != ()


def test_hex_form():
    assert Vocabulary.from_characters("é€").hex_tokens() == "c3a9 e282 e282ac"
    assert Vocabulary().hex_tokens() == ""
    assert Vocabulary.from_hex_tokens("") == Vocabulary()


def test_dtype_grows_with_the_size():
    tokens = Vocabulary.from_characters(chr(c) for c in range(0x80, 0x14000) if not 0xD800 <= c <= 0xDFFF).tokens
    for size, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        vocabulary = Vocabulary(tokens[: size - 256])
        last = vocabulary.tokens[-1].decode()
        assert vocabulary.size == size
        assert vocabulary.dtype == vocabulary.encode("a").dtype == vocabulary.encode(last).dtype == dtype
        assert vocabulary.encode(last * 100).tolist() == [size - 1] * 100
        assert vocabulary.decode(vocabulary.encode(last * 100)) == last * 100


@quick
@given(text=TEXTS)
@example("a\U0010ffff" * 3)
def test_counting(text):
    with patch.object(module, "_CHUNK", 5):
        counts = count_characters(text)
    assert counts.shape == (1 + max(map(ord, text), default=-1),)
    assert counts.dtype == np.int64
    assert {chr(c): counts[c] for c in np.flatnonzero(counts)} == {c: text.count(c) for c in text}


def test_stream_yields_only_whole_characters():
    vocabulary = Vocabulary.from_characters("é😀")
    stream = vocabulary.decoder()
    pieces = [stream.push(int(i)) for i in vocabulary.encode("aé😀😁è€")]
    assert pieces == ["a", "é", "😀", "", "😁", "", "è", "", "", "€"]
    assert stream.flush() == ""
    assert [stream.push(0xE2), stream.push(0x82), stream.flush()] == ["", "", "\ufffd"]
    assert stream.push(0x41) == "A"  # nothing of the cut character is left


def test_invalid_bytes_become_replacement_characters():
    assert Vocabulary().decode([0x41, 0xFF, 0x42, 0xE2, 0x82]) == "A\ufffdB\ufffd"


@pytest.mark.parametrize(
    "ids", [[256], [-1], [0, 1000], np.array([1 << 40]), [0.5], ["a"], [[1, 2]], 7, [1 << 80], [True]]
)
def test_unknown_ids(ids):
    with pytest.raises(UserError, match="id"):
        Vocabulary().decode(ids)


@pytest.mark.parametrize("id", [-1, 256, 1 << 80])
def test_stream_refuses_unknown_ids(id):
    with pytest.raises(UserError, match="not in the vocabulary"):
        Vocabulary().decoder().push(id)


@pytest.mark.parametrize("function", [Vocabulary().encode, count_characters])
@pytest.mark.parametrize("chunk", [4, 10**6])
def test_lone_surrogate(function, chunk):
    for length in (7, 500):
        with patch.object(module, "_CHUNK", chunk), pytest.raises(UserError, match=rf"U\+D83D\) at character {length}"):
            function("é" * length + "\ud83d" + "abc")


@pytest.mark.parametrize(
    "tokens",
    [
        [b""],
        [b"a"],
        [b"\xc3"],  # shorter than 2
        [b"ab"],  # ASCII
        ["é"],  # not bytes
        [257],
        [b"\xc3\xa9\xc3\xa9"],  # two characters
        [b"\xc3\xa9", b"\xc3\xa9"],  # twice
        [b"\xe2\x82\xac"],  # helper missing
        [b"\xe2\x82\xac", b"\xe2\x82"],  # helper late
        [b"\xe2\x82"],  # helper of nothing
        [b"\xe2\x82", b"\xc3\xa9", b"\xe2\x82\xac"],  # helper too early
        [b"\xf0\x9f", b"\xf0\x9f\x98\x80"],  # a helper left out
        [b"\xe2\x82", b"\xe2\x82\xac", b"\xe2\x82"],  # a helper again
        [b"\xe2\x82", [b"\xe2\x82\xac"]],  # not bytes, after a helper
        [b"\xed\xa0", b"\xed\xa0\x80"],  # surrogate
        [b"\xa9\xc3", b"\xa9\xc3\xa9"],  # a character after a stray byte
        [b"\xc0\x80"],  # overlong
        [b"\xf5\x80", b"\xf5\x80\x80", b"\xf5\x80\x80\x80"],  # past the last code point
        [b"\xc3\xa9" * 10**6],
    ],
)
def test_invalid_tokens(tokens):
    with pytest.raises(UserError) as caught:
        Vocabulary(tokens)
    assert one_short_line(caught)


@pytest.mark.parametrize("characters", ["\ud800", ["ab"], [""], [7], [b"a"]])
def test_invalid_characters(characters):
    with pytest.raises(UserError) as caught:
        Vocabulary.from_characters(characters)
    assert one_short_line(caught)


@pytest.mark.parametrize("text", ["xyz", "c3a", "é", "c3a9,e282", "c3a9 c3a9", "61", None, 7, "z" * 10**6])
def test_invalid_hex(text):
    with pytest.raises(UserError) as caught:
        Vocabulary.from_hex_tokens(text)
    assert one_short_line(caught)


def one_short_line(caught) -> bool:
    return "\n" not in str(caught.value) and len(str(caught.value)) < 300


def changed(path: str, value: object) -> dict:
    content = copy.deepcopy(Vocabulary.from_characters("é€").tokenizer_json())
    *parents, last = path.split(".")
    place = content
    for key in parents:
        place = place[key]
    place[last] = value
    return content


def reordered() -> dict:
    content = Vocabulary.from_characters("é€").tokenizer_json()
    vocab = content["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    return content


FOREIGN = {
    "null": None,
    "list": [],
    "string": "tokenizer",
    "empty": {},
    "no model": changed("model", None),
    "model is text": changed("model", "BPE"),
    "no vocabulary": changed("model.vocab", None),
    "vocabulary is a list": changed("model.vocab", ["a"]),
    "empty vocabulary": changed("model.vocab", {}),
    "id is text": changed("model.vocab.é", "300"),
    "id is a float": changed("model.vocab.!", 33.0),
    "id is true": changed("model.vocab.é", True),
    "gap": changed("model.vocab.é", 300),
    "negative id": changed("model.vocab.!", -1),
    "same id twice": changed("model.vocab.!", 34),
    "huge id": changed("model.vocab.é", 1 << 80),
    "piece outside the alphabet": changed("model.vocab.漢", 259),
    "word": changed("model.vocab.the", 259),
    "empty piece": changed("model.vocab.", 259),
    "bytes reordered": reordered(),
    "no merges": changed("model.merges", None),
    "fewer merges": changed("model.merges", []),
    "merges are text": changed("model.merges", "a b"),
    "merges of numbers": changed("model.merges", [1, 2, 3]),
    "model type": changed("model.type", "WordLevel"),
    "dropout": changed("model.dropout", 0.1),
    "byte fallback": changed("model.byte_fallback", True),
    "suffix": changed("model.end_of_word_suffix", "</w>"),
    "unknown model key": changed("model.more", 1),
    "unknown key": changed("more", 1),
    "added token": changed("added_tokens", [{"id": 259, "content": "<s>"}]),
    "normalizer": changed("normalizer", {"type": "NFC"}),
    "pre-tokenizer": changed("pre_tokenizer", None),
    "pre-tokenizer adds a space": changed("pre_tokenizer.add_prefix_space", True),
    "decoder": changed("decoder", {"type": "Fuse"}),
    "post-processor": changed("post_processor", {"type": "ByteLevel"}),
    "post-processor adds": changed("post_processor", {"type": "TemplateProcessing", "special_tokens": {"<s>": {}}}),
    "truncation": changed("truncation", {"max_length": 5}),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_another_tokenizer_is_refused(content):
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        Vocabulary.from_tokenizer_json(content)
    assert one_short_line(caught)


def test_a_file_that_another_tool_saved_again():
    vocabulary = Vocabulary.from_characters(MIXED)
    content = vocabulary.tokenizer_json()
    content["model"]["merges"] = [pair.split(" ") for pair in content["model"]["merges"]]
    content["model"]["end_of_word_suffix"] = ""
    del content["truncation"], content["model"]["ignore_merges"]
    first, second = ({"Sequence": {"id": id, "type_id": n}} for n, id in enumerate("AB"))
    template = {"type": "TemplateProcessing", "single": [first], "pair": [first, second], "special_tokens": {}}
    content["post_processor"] = template  # as transformers 5 saves it: adds nothing
    assert Vocabulary.from_tokenizer_json(content) == vocabulary
