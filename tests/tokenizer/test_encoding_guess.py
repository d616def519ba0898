"""The likely encoding of a text that is not UTF-8."""

import marshal
import pickle
import random
import zlib

import numpy as np
import pytest

from smallm.tokenizer.encoding_guess import SAMPLE, guess_encoding

TEXTS = [  # old sayings, first sentences and the Universal Declaration of Human Rights
    (
        "Le cœur a ses raisons que la raison ne connaît point. Il était une "
        "fois, à l’époque où les bêtes parlaient, un garçon très âgé.",
        "cp1252 mac-roman",
    ),
    (
        "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. "
        "Schöne Grüße aus Köln und München, und süße Träume!",
        "cp1252 cp850",
    ),
    (
        "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, "
        "vivía un hidalgo; ¿qué señal? mañana será otro día.",
        "cp1252",
    ),
    (
        "Litwo! Ojczyzno moja! ty jesteś jak zdrowie; ile cię trzeba cenić, ten "
        "tylko się dowie, kto cię stracił. Dziś piękność twą w całej ozdobie.",
        "cp1250 iso8859-2",
    ),
    (
        "Příliš žluťoučký kůň úpěl ďábelské ódy. Všechny děti "
        "šly do školy a měly se dobře, protože bylo léto.",
        "cp1250 iso8859-2",
    ),
    (
        "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. "
        "Akıl ve vicdana sahiptirler ve birbirlerine karşı kardeşlik.",
        "cp1254",
    ),
    (
        "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια "
        "και τα δικαιώματα. Είναι προικισμένοι με λογική.",
        "cp1253",
    ),
    (
        "Все счастливые семьи похожи друг на друга, каждая несчастливая "
        "семья несчастлива по-своему. Все смешалось в доме.",
        "cp1251 koi8-r cp866 utf-16-le utf-16-be",
    ),
    (
        "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. "
        "כולם חוננו בתבונה ובמצפון, לפיכך חובה עליהם לנהוג.",
        "cp1255",
    ),
    (
        "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا "
        "عقلا وضميرا وعليهم أن يعامل بعضهم بعضا بروح الإخاء.",
        "cp1256",
    ),
    (
        "人人生而自由，在尊严和权利上一律平等。他们"
        "赋有理性和良心，并应以兄弟关系的精神相对待。",
        "gb18030 utf-16-le utf-16-be",
    ),
    ("人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。", "big5"),
    (
        "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権"
        "利とについて平等である。人間は、理性と良心とを授けられており。",
        "cp932 euc_jp utf-16-le",
    ),
    (
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 "
        "동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며.",
        "cp949",
    ),
]


@pytest.mark.parametrize(("text", "encodings"), TEXTS)
def test_texts_in_many_languages(text, encodings):
    for encoding in encodings.split():
        data = (text + "\n").encode(encoding)
        for sample in (data, "ASCII at first.\n".encode(encoding) + 500 * data, data[:-2]):
            assert guess_encoding(sample) == encoding
    assert guess_encoding(f"{text}\n".encode()) == "utf-8"


@pytest.mark.parametrize("text", ["café ", "Zoë’s naïve “quote” ", "ÉCOLE à ", "mañana "])
def test_a_few_accents(text):
    assert guess_encoding((20 * text).encode("cp1252")) == "cp1252"


def test_no_guess_without_a_reason():
    rng = random.Random(1)
    assert [guess_encoding(rng.randbytes(SAMPLE)) for _ in range(9)] == [""] * 9
    assert [guess_encoding(data) for data in (b"", b"\xff", b"plain ASCII\n" * 99, b"one \xe9 alone")] == [""] * 4


@pytest.mark.parametrize(
    "text",
    [
        "Call me Ishmael. Some years ago",
        "one word",
        "Été, naïveté, “quotes”\n",
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता",
        "吾輩は猫である。\n名前はまだ無い。\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_characters(text, encoding):
    for sample in (text, 99 * text):
        assert guess_encoding(sample.encode(encoding)) == encoding


BINARY = [
    b"\1\2\xff\0" * 50,
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + zlib.compress(bytes(range(256)) * 9),
    b"\x7fELF\2\1\1\0" + bytes(8) + b"\3\0>\0\1\0\0\0\x80\x10" + bytes(30) + b".text\0.data\0\xff" * 9,
    np.linspace(-1, 1, 999, dtype=np.float32).tobytes(),
    np.ones(99, np.float32).tobytes(),
    np.arange(999, dtype=np.int16).tobytes(),
    np.sin(np.arange(999.0)).tobytes(),
    (9999 * np.sin(np.arange(999.0))).astype(">i2").tobytes(),
    pickle.dumps({"weights": list(range(999)), "bias": 0.5}),
    marshal.dumps(compile("print([x + 1 for x in range(9)])", "a.py", "exec")),
    zlib.compress(str(list(range(9999))).encode()),
]


@pytest.mark.parametrize("data", BINARY)
def test_a_binary_file_is_in_no_encoding(data):
    assert guess_encoding(data) == ""
