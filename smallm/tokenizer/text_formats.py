"""What the first bytes of a file tell about its format, and the byte-order mark."""

import codecs
import re

BYTE_ORDER_MARK = "\ufeff"
HEAD_BYTES = 16
"""How many bytes `format_problem` looks at."""
_MARKS = {  # UTF-32 comes first, because its little-endian mark starts with the one of UTF-16
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_FORMATS = {
    rb"\x1f\x8b": "is compressed with gzip; unpack the text first, for instance with gunzip",
    rb"\x28\xb5\x2f\xfd": "is compressed with Zstandard; unpack the text first, for instance with unzstd",
    rb"BZh[1-9]1AY&SY": "is compressed with bzip2; unpack the text first, for instance with bunzip2",
    rb"\xfd7zXZ\0": "is compressed with xz; unpack the text first, for instance with unxz",
    rb"PK\x03\x04": "is a ZIP archive, as .docx, .odt and .epub files are; unpack it, or save it as plain text, first",
    rb"%PDF-": "is a PDF; convert it to plain text first, for instance with pdftotext",
    rb"\{\\rtf": "is an RTF document; save it as plain text first",
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a": "is a picture; pass a plain text",
    rb"\x7fELF|MZ\x90\0": "is a program; pass a plain text",
}


def format_problem(head: bytes, encoding: str) -> str:
    """What is wrong with a file that begins with these bytes, and what to do; "" if nothing is."""
    codec = codecs.lookup(encoding).name
    marked = next((name for name, marks in _MARKS.items() if head.startswith(marks)), "")
    if not codec.startswith(marked):
        return f"looks like {marked.upper()}, not {encoding}; pass --encoding {marked}"
    return next((problem for pattern, problem in _FORMATS.items() if re.match(pattern, head)), "")
