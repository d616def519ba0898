"""Guesses the encoding of a text from its most frequent characters; the guess is only proposed to the user."""

import codecs
import unicodedata

_FREQUENT = {
    "éèêëàâçùûîïôœäöüßÄÖÜñáíóúãõåæøÅÆØÀÇÈÉÊÁÍÓÚ¿¡«»’‘“”–—…°§ ": (1.0, "cp1252 mac-roman cp850"),
    "ąćęłńóśżźĄĆĘŁŚŻŹěščřžýáíéúůďťňČŠŽŘöüőűăţş": (1.0, "cp1250 iso8859-2"),
    "ığşİĞŞçöüâÇÖÜ": (1.0, "cp1254"),
    "αβγδεζηθικλμνξοπρστυφχψωςάέήίόύώΑΕΗΟΤΚΠ": (1.0, "cp1253 iso8859-7"),
    "אבגדהוזחטיךכלםמןנסעףפץצקרשת": (1.0, "cp1255"),
    "абвгдежзийклмнопрстуфхцчшщъыьэюяАВДИКМНОПРСТЯ–—«»": (1.0, "cp1251 koi8-r cp866 utf-16-le utf-16-be"),
    "ابتثجحخدذرزسشصضطظعغفقكلمنهويةىأإآئؤ،": (1.0, "cp1256"),
    "的一是不了在人有我他这這个個们們中来來上大为為和國国地到以，。、": (0.25, "gb18030 big5 utf-16-le utf-16-be"),
    "のにはをたがでてとしれさいるなもっこらりくあんまけそかきうすよ、。": (0.5, "cp932 euc_jp utf-16-le utf-16-be"),
    "이다는을의에가고하지한로도은기를사니아어인서있그나리자대일시들게해수": (0.4, "cp949 utf-16-le utf-16-be"),
}  # fmt: skip
"""Frequent non-ASCII characters of a language -> their usual share of the non-ASCII characters, and encodings.

Of equal shares the first counts, because the bytes of accented letters in cp1252 are also letters in cp1255 and cp1251.
"""
MIN_SHARE = 0.5  # of the usual share
MIN_CHARACTERS = 6  # non-ASCII characters that a guess needs
SAMPLE = 1 << 14  # bytes
_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
MIN_ASCII = 0.05  # share of ASCII characters, such as spaces and line ends, of most texts
_NO_TEXT = {"Cc", "Cn", "Co", "Cs"}  # categories: control, unassigned, private use, surrogate


def guess_encoding(data: bytes) -> str:
    """Returns the most likely encoding of these bytes, or "" if no encoding is likely.

    Bytes are UTF-16 or UTF-32 if they give assigned characters, some of them ASCII. Otherwise the share of
    frequent characters among all non-ASCII characters decides; it is low in a wrong encoding.
    """
    data = data[:SAMPLE]
    if _foreign(data, "utf-8"):
        return "utf-8"
    for encoding in _WIDE:
        text = _text(data, encoding)
        if len(text) >= MIN_CHARACTERS and sum(map(str.isascii, text)) >= MIN_ASCII * len(text):
            return encoding
    found = []
    for frequent, (usual, encodings) in _FREQUENT.items():
        for encoding in encodings.split():
            characters = _foreign(data, encoding)
            share = sum(c in frequent for c in characters) / max(1, len(characters))
            found.append((share / usual, encoding))
    share, encoding = max(found, key=lambda each: each[0])
    return encoding if share >= MIN_SHARE else ""


def _foreign(data: bytes, encoding: str) -> list[str]:
    """The non-ASCII characters; an empty list if they are few, or if the bytes are not a text in this encoding."""
    foreign = [c for c in _text(data, encoding) if not c.isascii()]
    return [] if len(foreign) < MIN_CHARACTERS else foreign


def _text(data: bytes, encoding: str) -> str:
    """The decoded bytes; "" if the bytes are not a text in this encoding."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data)  # the sample may end within a character
    except UnicodeDecodeError:
        return ""
    return "" if any(unicodedata.category(c) in _NO_TEXT for c in set(text) - set("\t\n\r\f")) else text
