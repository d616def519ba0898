"""Corpora: the split, the cache, the sources, and every mistake that a user can make with them."""

import bz2
import codecs
import errno
import gzip
import hashlib
import lzma
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock

import pooch
import pytest
from filelock import FileLock
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toys import open_corpus

from smallm.errors import UserError
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.analysis.text_check import summary_lines
from smallm.training.analysis.text_statistics import compute_statistics
from smallm.training.data import corpus as corpus_module
from smallm.training.data import encoding as encode
from smallm.training.data import source
from smallm.training.data.source import SHAKESPEARE_HASH, Source

REPOSITORY = Path(__file__).parents[3]
MIXED = "Größe: 5 €\r\n日本語のテキスト\nπ ≈ 3.14 🎉🎉\r\nplain end"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SMALLM_CACHE", str(folder))
    return folder


@pytest.fixture
def encodings(monkeypatch):
    """Lists the encodings that took place."""
    calls = []
    monkeypatch.setattr(corpus_module, "encode", lambda *args: (calls.append(args), encode.encode(*args))[1])
    return calls


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


def opened(source, *, min_count=1, val_fraction=0.25, **options):
    return open_corpus(str(source), min_count=min_count, val_fraction=val_fraction, **options)


def both_texts(corpus):
    return corpus.vocabulary.decode(corpus.train_ids), corpus.val_text()


def message(source, **options):
    with pytest.raises(UserError) as caught:
        opened(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def left_over(cache):
    return [path.name for path in cache.rglob("*unfinished*")]


# -- the split


@pytest.mark.parametrize("text", ["to be, or not to be\n" * 9, MIXED * 3, "\ufeffBOM\r\r\n\x00\x85\u2028end"])
@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
def test_split_is_contiguous_and_exact(tmp_path, monkeypatch, text, piece_bytes):
    monkeypatch.setattr(source, "PIECE_BYTES", piece_bytes)
    corpus = opened(write(tmp_path / "a.txt", text), min_count=2)
    text = text.removeprefix("\ufeff")
    cut = len(text) * 3 // 4
    assert both_texts(corpus) == (text[:cut], text[cut:])
    assert (corpus.train_characters, corpus.val_characters) == (cut, len(text) - cut)
    assert corpus.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert corpus.name == "a.txt"
    assert "a.txt" in repr(corpus)


@settings(max_examples=25, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=4, max_size=60),
    piece_bytes=st.integers(1, 9),
    min_count=st.integers(1, 3),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32"]),
)
def test_any_text_round_trips(text, piece_bytes, min_count, encoding):
    assume(not text.startswith("\ufeff"))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "PIECE_BYTES", piece_bytes)
        file = write(Path(folder) / "a.txt", text, encoding)
        corpus = opened(file, val_fraction=0.5, min_count=min_count, encoding=encoding, cache=Path(folder))
        assert "".join(both_texts(corpus)) == text
        assert corpus.train_characters == len(text) // 2
        assert corpus.fingerprint == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("val_fraction", [0.1, 0.07, 0.3, 0.9, 1 / 3])
@pytest.mark.parametrize("characters", [100, 12_345])
def test_the_fraction_is_used_as_written(tmp_path, val_fraction, characters):
    corpus = opened(write(tmp_path / "a.txt", "a" * characters), val_fraction=val_fraction)
    assert corpus.train_characters == characters * (1 - Fraction(repr(val_fraction))) // 1
    assert corpus.train_characters + corpus.val_characters == characters


def test_only_the_training_part_determines_the_vocabulary(tmp_path):
    corpus = opened(write(tmp_path / "a.txt", "ä" * 30 + "ö" * 10))
    assert corpus.vocabulary.tokens == ("ä".encode(),)
    assert corpus.val_text() == "ö" * 10
    assert len(corpus.val_ids) == 20
    assert opened(tmp_path / "a.txt", min_count=31).vocabulary.tokens == ()


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.sampled_from("ab\n\r éß€日本🎉"), min_size=4, max_size=60),
    piece_bytes=st.integers(1, 30),
    min_count=st.integers(1, 3),
    val_fraction=st.sampled_from([0.1, 0.5, 0.75]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-be", "gb18030"]),
)
def test_ids_equal_those_of_the_whole_text_encoded_at_once(text, piece_bytes, min_count, val_fraction, encoding):
    cut = int(len(text) * (1 - Fraction(str(val_fraction))))
    assume(2 <= cut <= len(text) - 2)
    vocabulary = Vocabulary.from_characters(c for c in text[:cut] if text[:cut].count(c) >= min_count)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "PIECE_BYTES", piece_bytes)
        patch.setattr(encode, "CHARACTERS_BETWEEN_MARKS", 5)
        patch.setattr(corpus_module, "IDS_PER_PIECE", 3)
        file = write(Path(folder) / "a.txt", text, encoding)
        options = {"val_fraction": val_fraction, "min_count": min_count, "encoding": encoding}
        corpus = opened(file, **options, cache=Path(folder))
        assert corpus.vocabulary == vocabulary
        assert corpus.train_ids[:].tolist() == vocabulary.encode(text[:cut]).tolist()
        assert corpus.val_ids[:].tolist() == vocabulary.encode(text[cut:]).tolist()
        assert corpus.fingerprint == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso2022_jp", "utf-7"])
@pytest.mark.parametrize("parts", [["日本語\n日本", "語\nend"], ["日本", "日本語 日本語", "", "日本語"]])
def test_pieces_add_up_to_the_text(tmp_path, monkeypatch, encoding, parts):
    monkeypatch.setattr(source, "PIECE_BYTES", 3)
    files = [Path(write(tmp_path / f"{i}.txt", part, encoding)) for i, part in enumerate(parts)]
    pieces = list(Source("text", files, encoding).pieces("reading", False))
    assert len(pieces) > 3
    assert all(pieces)
    assert "".join(pieces) == "\n".join(filter(None, parts))


def test_a_piece_is_bounded_and_few_are_in_memory_at_once(monkeypatch):
    monkeypatch.setattr(source, "PIECE_BYTES", 100)
    taken = []
    pieces = (taken.append(piece) or piece for piece in Source("text", [b"long text " * 1000]).pieces("reading", False))
    for done, (piece, length) in enumerate(encode._with_each(len, pieces), 1):
        assert length == len(piece) <= 100
        assert len(taken) - done <= encode.MAX_THREADS + 2
    assert done == 100


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_validation_text_in_pieces(tmp_path, monkeypatch, encoding, size):
    monkeypatch.setattr(corpus_module, "IDS_PER_PIECE", size)
    text = MIXED[::-1]  # with the line ends in the second half
    corpus = opened(write(tmp_path / "a.txt", text, encoding), val_fraction=0.5, encoding=encoding)
    pieces = list(corpus.val_pieces())
    assert "".join(pieces) == corpus.val_text() == corpus.vocabulary.decode(corpus.val_ids) == text[len(text) // 2 :]
    assert max(map(len, pieces)) <= size


@pytest.mark.parametrize(("text", "start"), [("one line\nand more", "\n"), ("no line end", "n"), ("日本語" * 4, "日")])
def test_start_text(tmp_path, text, start):
    assert opened(write(tmp_path / "a.txt", text)).start_text == start
    assert opened(tmp_path / "a.txt").start_text == start  # also from the cache


def test_a_newline_in_the_validation_part_is_not_the_start(tmp_path):
    assert opened(write(tmp_path / "a.txt", "abcdefgh\n\n")).start_text == "a"


def test_tiny_shakespeare_is_split_as_published():
    file = REPOSITORY.parent / "shared" / "data" / "tinyshakespeare.txt"
    if not file.exists():
        pytest.skip("the text of tiny Shakespeare is not beside the repository")
    corpus = opened(file, val_fraction=0.1)
    assert (len(corpus.train_ids), len(corpus.val_ids)) == (1_003_854, 111_540)
    assert "sha256:" + corpus.fingerprint == SHAKESPEARE_HASH
    assert "".join(both_texts(corpus)) == file.read_bytes().decode()


def test_progress_only_for_long_texts(tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "a.txt", MIXED)
    opened(file)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(source, "PROGRESS_FROM_BYTES", 1)
    opened(file, min_count=2, progress=False)
    assert capsys.readouterr() == ("", "")
    opened(file, min_count=3)
    out, err = capsys.readouterr()
    assert out == ""
    assert all(word in err for word in ("reading", "encoding"))


# -- the cache


def test_cache_is_reused_until_something_changes(tmp_path, cache, encodings):
    file = tmp_path / "a.txt"
    first = opened(write(file, MIXED))
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    again = opened(file)
    assert len(encodings) == 1
    assert stamps == {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert both_texts(first) == both_texts(again)
    assert first.vocabulary == again.vocabulary
    assert opened(write(tmp_path / "copy.txt", MIXED)).name == "copy.txt"  # the content matters, not the path
    assert len(encodings) == 1

    opened(write(file, MIXED.replace("plain", "Plain")))
    opened(file, min_count=2)
    assert len(encodings) == 3
    assert len(list((cache / "corpora").iterdir())) == 3


@pytest.mark.parametrize("text", ["plain text of nothing but ASCII\n" * 9, "début " * 9 + "fin " * 9 + "été " * 9])
def test_a_text_is_stored_once_whatever_the_validation_share(tmp_path, cache, encodings, text):
    """As long as the training part has the same vocabulary; if rare characters are lost to it, the ids differ."""
    file = write(tmp_path / "a.txt", text)
    for val_fraction in (0.1, 0.25, 0.3, 1 / 3):
        corpus = opened(file, val_fraction=val_fraction, min_count=2)
        cut = int(len(text) * (1 - Fraction(str(val_fraction))))
        assert both_texts(corpus) == (text[:cut], text[cut:])
        assert (corpus.train_characters, corpus.val_characters) == (cut, len(text) - cut)
    assert len(encodings) == len(list((cache / "corpora").iterdir())) == 1
    opened(file, val_fraction=0.95, min_count=8)  # ASCII alone, or one é less
    assert len(encodings) == 1 if text.isascii() else 2

@pytest.mark.parametrize("name", ["ids.bin", "corpus.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "odd"])
def test_damaged_cache_is_rebuilt(tmp_path, cache, encodings, name, damage):
    file = write(tmp_path / "a.txt", MIXED)
    opened(file)
    (path,) = cache.rglob(name)
    good = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": good[:-2], "empty": b"", "odd": b"[]"}[damage])
    assert "".join(both_texts(opened(file))) == MIXED
    assert len(encodings) == 2
    assert path.read_bytes() == good
    assert not left_over(cache)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_no_unfinished_files_remain(tmp_path, cache, monkeypatch, error):
    def interrupted(*args):
        raise error

    file = write(tmp_path / "a.txt", MIXED)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(error):
            opened(file)
    assert list((cache / "corpora").iterdir()) == []
    assert "".join(both_texts(opened(file))) == MIXED


def test_threads_and_processes_at_once(tmp_path, cache, monkeypatch):
    text = MIXED * 20
    file = write(tmp_path / "a.txt", text)
    program = (
        "import sys; from smallm.training.data.corpus import DataConfig, open_corpus\n"
        "corpus = open_corpus(DataConfig(sys.argv[1], min_count=1, val_fraction=0.25))\n"
        "sys.stdout.buffer.write((corpus.vocabulary.decode(corpus.train_ids) + corpus.val_text()).encode())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, file], stdout=subprocess.PIPE, cwd=REPOSITORY)
        for _ in range(2)
    ]
    assert [process.communicate()[0].decode() for process in processes] == [text, text]

    monkeypatch.setattr(source, "PIECE_BYTES", 100)
    with ThreadPoolExecutor(4) as pool:  # four cache entries, each opened four times
        corpora = list(pool.map(lambda i: opened(file, min_count=2 + i // 4), range(16)))
    assert all("".join(both_texts(corpus)) == text for corpus in corpora)
    assert not left_over(cache)


def test_the_slower_process_uses_the_result_of_the_faster(tmp_path, cache, monkeypatch):
    no_locks = Mock(side_effect=NotImplementedError)  # filelock's answer on a file system without locks
    monkeypatch.setattr(FileLock, "acquire", no_locks)
    file, fsync = write(tmp_path / "a.txt", MIXED), os.fsync

    def overtaken(descriptor):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            opened(file)
        (path,) = (path for path in cache.rglob("ids.bin") if "unfinished" not in str(path))
        stamps.append(path.stat().st_ino)

    stamps = []
    monkeypatch.setattr(os, "fsync", overtaken)
    assert "".join(both_texts(opened(file))) == MIXED
    assert {path.stat().st_ino for path in cache.rglob("ids.bin")} == set(stamps)
    assert not left_over(cache)


def test_text_that_changes_between_the_readings(tmp_path, cache, monkeypatch):
    file = tmp_path / "a.txt"
    write(file, "one two three\n" * 3)
    survey = corpus_module.survey
    monkeypatch.setattr(corpus_module, "survey", lambda *args: (survey(*args), write(file, "one two THREE\n" * 3))[0])
    assert message(file) == "a.txt changed while it was being read; run the command again"
    assert list((cache / "corpora").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path, cache, monkeypatch):
    file = write(tmp_path / "a.txt", MIXED)
    write(cache, "a file where the folder should be")
    text = message(file)
    assert text.startswith(f"cannot write to {cache}: ")
    assert text.endswith("; set SMALLM_CACHE elsewhere")


def test_the_cache_folder_belongs_to_the_user(tmp_path, monkeypatch):
    monkeypatch.delenv("SMALLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    opened(write(tmp_path / "a.txt", MIXED))
    assert len(list((tmp_path / "smallm" / "corpora").iterdir())) == 1


# -- sources


def test_folder_is_joined_in_order(tmp_path):
    folder = tmp_path / "texts"
    write(folder / "b.txt", "second, no newline")
    write(folder / "a.txt", "first\r\n")
    write(folder / "c" / "deep.txt", "third\n")
    write(folder / "d.txt", "")
    write(folder / "e.txt", "last")
    write(folder / "notes.md", "not a text")
    corpus = opened(folder)
    assert "".join(both_texts(corpus)) == "first\r\nsecond, no newline\nthird\nlast"
    assert corpus.name == "texts"


def test_python_docs():
    corpus = opened("python-docs", min_count=5, encoding="latin-1")  # the encoding of files does not apply
    train, val = both_texts(corpus)
    assert corpus.train_characters + corpus.val_characters == len(train + val) > 200_000
    assert "statement" in val
    assert "“" in train + val
    assert corpus.name == "python-docs"
    assert corpus.start_text == "\n"
    paragraphs = re.split(r"\n{2,}", (train + val).strip())
    assert len(paragraphs) == len(set(paragraphs)) > 1000  # the topics share sections
    assert not any(each.startswith("+--") for each in paragraphs)  # tables
    lines = [line.strip() for each in paragraphs for line in {*each.splitlines()}]
    assert max(lines.count(line) for line in set(lines) if len(line) >= source.LONG_LINE) == 1


def test_the_validation_part_of_python_docs_is_like_the_rest():
    """The paragraphs are shuffled, so the text check finds no problems."""
    lines = summary_lines(compute_statistics(opened("python-docs", min_count=10)))
    assert [line.endswith("; no problems found") for line in lines] == [True]


def test_a_file_takes_precedence_over_the_name_of_a_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "python-docs", "mine")
    assert both_texts(opened("python-docs", val_fraction=0.5)) == ("mi", "ne")


def test_shakespeare_from_the_download(tmp_path, monkeypatch):
    def retrieve(url, known_hash, fname, path, downloader):
        assert (url, known_hash) == (source.SHAKESPEARE_URL, SHAKESPEARE_HASH)
        assert path == tmp_path / "cache" / "downloads"
        return write(Path(path) / fname, "First Citizen:\nSpeak, speak.\n")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    corpus = opened("shakespeare", encoding="utf-16")
    assert "".join(both_texts(corpus)) == "First Citizen:\nSpeak, speak.\n"
    assert corpus.name == "shakespeare"


@pytest.mark.parametrize("error", [ConnectionError("no\nnetwork"), ValueError("checksum"), TimeoutError()])
def test_shakespeare_offline(monkeypatch, error):
    def retrieve(*args, **options):
        raise error

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    text = message("shakespeare")
    assert text.startswith(f"shakespeare could not be downloaded ({type(error).__name__}); download https://raw.")
    assert text.endswith("/input.txt elsewhere and pass it with --data FILE")


# -- mistakes


def test_no_such_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "Chekhov.txt", "…")
    hint = "; pass --data FILE, FOLDER, python-docs or shakespeare"
    assert message("chekov.txt") == f"there is no file or folder 'chekov.txt' (did you mean 'Chekhov.txt'?){hint}"
    assert "(did you mean 'shakespeare'?)" in message("shakespere")
    assert f"(did you mean '{tmp_path / 'Chekhov.txt'}'?)" in message(tmp_path / "Chekhof.txt")
    for name in ("xyz", "", "no/such/folder", "line\nbreak", "nul\0in/it"):
        assert message(name) == f"there is no file or folder {name!r}{hint}"
    assert "File name too long" in message("Once upon a time " * 99)


def test_folder_without_texts(tmp_path):
    line = f"folder {tmp_path} contains no *.txt file; pass the text itself with --data FILE, or other patterns with "
    assert message(tmp_path) == line + "--data.include"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a file nor a folder; save the text to a file" in message(tmp_path / "pipe")


@pytest.mark.parametrize("part", ["open", "is_file", "stat"])
def test_forbidden_file(tmp_path, monkeypatch, part):
    def forbidden(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    file = write(tmp_path / "a.txt", MIXED)
    monkeypatch.setattr(Path, part, forbidden)
    text = message(file)
    assert text.startswith("cannot read ")
    assert f"{file}" in text
    assert text.endswith(": Permission denied; check --data")


def test_too_short(tmp_path):
    assert message(write(tmp_path / "a.txt", "")) == "a.txt is empty; pass a text with --data FILE"
    text = message(write(tmp_path / "b.txt", "日本語日本語日本語"), val_fraction=0.01)
    assert text.startswith("b.txt is too short: it gives 8 characters to train on and 1 to validate on; each needs 2;")
    assert "it gives 1 characters to train on and 8 to" in message(tmp_path / "b.txt", val_fraction=0.8)
    assert opened(write(tmp_path / "c.txt", "abcd"), val_fraction=0.5).val_text() == "cd"


@pytest.mark.parametrize("val_fraction", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_val_fraction_out_of_range(val_fraction):
    text = message("python-docs", val_fraction=val_fraction)
    assert text.startswith(f"data.val_fraction = {val_fraction} must be ")


def test_min_count_out_of_range(tmp_path):
    assert "data.min_count = 0 must be at least 1" in message(write(tmp_path / "a.txt", MIXED), min_count=0)


@pytest.mark.parametrize("encoding", ["klingon", "hex", "rot13", "utf-8\0", ""])
def test_unknown_encoding(tmp_path, encoding):
    text = message(write(tmp_path / "a.txt", MIXED), encoding=encoding)
    assert text == f"there is no encoding {encoding!r}; pass for example --encoding latin-1"


@pytest.mark.parametrize("piece_bytes", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("content", "encoding", "problem"),
    [
        (b"one\ntwo\nthr\xffee\n", "utf-8", "byte 0xff at offset 11 (line 3)"),
        ("日本語\n日本".encode() + b"\xe6\x97 ", "utf8", "byte 0xe6 at offset 16 (line 2)"),
        ("日本語\n日本語".encode()[:-1], "utf-8", "byte 0xe8 at offset 16 (line 2)"),
        ("日本語\n日".encode("shift_jis") + b"\x81", "shift_jis", "byte 0x81 at offset 9 (line 2)"),
        ("abc\ndef".encode("utf-16-le")[:-1], "utf-16-le", "byte 0x66 at offset 12 (line 2)"),
        ("naïve\n".encode(), "ascii", "byte 0xc3 at offset 2 (line 1)"),
        (b"no mark\n", "utf-16", "UTF-16 stream does not start with BOM"),
    ],
)
def test_invalid_bytes(tmp_path, cache, monkeypatch, content, encoding, problem, piece_bytes):
    monkeypatch.setattr(source, "PIECE_BYTES", piece_bytes)
    file = write(tmp_path / "a.txt", content)
    example = "latin-1" if encoding.startswith("utf8") or encoding == "utf-8" else "utf-8"
    hint = f"pass --encoding NAME, for example --encoding {example}"
    assert message(file, encoding=encoding) == f"{file} is not valid {encoding}: {problem}; {hint}"
    assert not cache.exists()


def test_invalid_bytes_in_a_folder_name_the_file(tmp_path):
    write(tmp_path / "a.txt", "good\n" * 3)
    bad = write(tmp_path / "b.txt", b"good\n\x80")
    assert message(tmp_path).startswith(f"{bad} is not valid utf-8: byte 0x80 at offset 5 (line 2);")
    assert opened(tmp_path, encoding="latin-1").val_text() == "good\n\x80"


@pytest.mark.parametrize("piece_bytes", [4, 1 << 20])
@pytest.mark.parametrize(
    ("mark", "codec", "name"),
    [
        (codecs.BOM_UTF16_LE, "utf-16-le", "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16-be", "utf-16"),
        (codecs.BOM_UTF32_LE, "utf-32-le", "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32-be", "utf-32"),
    ],
)
def test_utf16_is_recognised(tmp_path, monkeypatch, mark, codec, name, piece_bytes):
    monkeypatch.setattr(source, "PIECE_BYTES", piece_bytes)
    file = write(tmp_path / "a.txt", mark + MIXED.encode(codec))
    assert message(file) == f"{file} looks like {name.upper()}, not utf-8; pass --encoding {name}"
    assert "".join(both_texts(opened(file, encoding=name))) == MIXED


@pytest.mark.parametrize("piece_bytes", [4, 1 << 20])
def test_a_likely_encoding_is_proposed(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(source, "PIECE_BYTES", piece_bytes)
    text = "Plain at first.\nВсе счастливые семьи похожи друг на друга.\n" * 9
    file = write(tmp_path / "a.txt", text, "cp1251")
    line = f"{file} is not valid utf-8 but looks like cp1251: byte 0xc2 at offset 16 (line 2); pass --encoding cp1251"
    assert message(file) == line
    for encoding in ("utf-16-le", "utf-16-be"):
        line = f"{file} looks like {encoding.upper()} without a byte-order mark, not utf-8; pass --encoding {encoding}"
        for text in ("ASCII alone\n", "Все счастливые семьи похожи.\n"):
            assert message(write(tmp_path / "a.txt", text * 9, encoding)) == line
            assert "".join(both_texts(opened(file, encoding=encoding))) == text * 9


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        (gzip.compress(b"a text" * 9, mtime=0)[:-9], "a.txt.gz", "is damaged or encrypted: "),
        (bz2.compress(b"a text" * 99)[:-9], "a.bz2", "is damaged or encrypted: "),
        (lzma.compress(b"a text")[:-9], "a.xz", "is damaged or encrypted: "),
        (b"PK\x03\x04" + b"x" * 99, "a.zip", "is damaged or encrypted: "),
        (b"PK\x03\x04" + b"x" * 99, "a.docx", "is a document in a ZIP archive, as .docx, .odt and .epub files are"),
        (b"%PDF-1.4 in ASCII " * 99, "a.pdf", "is a PDF; convert it to plain text first"),
        (b"{\\rtf1 text}" * 9, "a.rtf", "is an RTF document; save it as plain text first"),
        (b"\x89PNG" + b"x" * 99, "a.png", "is a picture; pass a plain text"),
        (b"RIFF\n\n\n\nWAVEfmt ", "a.wav", "is sound or a film; pass a plain text"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "a.doc", "is a document of an office program; save it as plain text first"),
        (b"SQLite format 3\0\x10\0\1\1", "a.db", "is a database; export its text first"),
        (b"PAR1\x15\4", "a.parquet", "is a Parquet file; save its text as JSON lines first"),
        (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar"), "a.tar.gz", "is an archive; unpack it and pass the"),
        (b"a.txt".ljust(257, b"\0") + b"ustar", "a.tar", "is an archive; unpack it and pass the folder"),
        (b"\1\2\xff\0" * 50, "a.bin", "is not valid utf-8, perhaps a binary file: byte 0xff at offset 2 (line 1)"),
        (b'{"body": "a"}\n' * 9, "a.JSONL", "has no text in field 'text' of line 1: its fields are body; name another"),
        (b"{}\nword\n", "a.jsonl", "has no text in field 'text' of line 1: the line is not a record"),
        (b'{"text": "a"}\nword\n', "a.ndjson", "is not valid JSON in line 2; mend or remove the line"),
        (b'{"text": "\\ud800"}\n', "b.jsonl", "has a lone surrogate in line 1, which is no character"),
        (b"title,body\na,b\n", "a.csv", "has no text in field 'text' of line 2: its fields are title, body; name"),
    ],
)
def test_files_that_are_not_plain_text(tmp_path, cache, content, name, problem):
    file = write(tmp_path / name, content)
    assert message(file).startswith(f"{file} {problem}")
    assert not cache.exists()


def test_an_archive_without_files(tmp_path):
    assert message(write(tmp_path / "a.zip", b"PK\5\6" + bytes(18))) == "a.zip is empty; pass a text with --data FILE"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("texts/*.md", "no file matches the pattern 'texts/*.md'; pass --data FILE, FOLDER"),
        ("https://example.org/a.txt", "'https://example.org/a.txt' is a web address; download the text"),
    ],
)
def test_sources_that_are_not_read(source, problem):
    assert message(source).startswith(problem)


@pytest.mark.parametrize("piece_bytes", [1, 1 << 20])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(source, "PIECE_BYTES", piece_bytes)
    for name in "ab":
        write(tmp_path / "texts" / f"{name}.txt", "\ufeffa text\n")
    assert "".join(both_texts(opened(tmp_path / "texts"))) == "a text\n" * 2


def test_endings_in_capitals_are_text_files(tmp_path):
    write(tmp_path / "A.TXT", "a text\n")
    assert "".join(both_texts(opened(tmp_path))) == "a text\n"


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "a text\n")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert message(tmp_path).endswith("closed': Permission denied; check --data")


def test_lone_surrogates(tmp_path):
    file = write(tmp_path / "a.txt", b"half a character: +2AA- and on, and on")
    assert "lone surrogate (U+D800)" in message(file, encoding="utf-7")
