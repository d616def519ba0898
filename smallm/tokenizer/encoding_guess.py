"""Guesses the encoding of a text from its most frequent characters; the guess is only proposed to the user."""

import codecs

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


def guess_encoding(data: bytes) -> str:
    """Returns the most likely encoding of these bytes, or "" if no encoding is likely.

    The share of frequent characters among all non-ASCII characters decides; it is low in a wrong encoding.
    """
    data = data[: SAMPLE - SAMPLE % 2]
    if _foreign(data, "utf-8"):
        return "utf-8"
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
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data)  # the sample may end within a character
    except UnicodeDecodeError:
        return []
    foreign = [c for c in text if not c.isascii()]
    controls = any((c < " " and c not in "\t\n\r\f") or "\x7f" <= c < "\xa0" for c in text)
    return [] if controls or len(foreign) < MIN_CHARACTERS else foreign
