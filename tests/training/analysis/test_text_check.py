"""The text check: problems planted in a good text are found and measured, and no others; `Tidy` mends some of them."""

import io
import random
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import message, open_corpus

from smallm.cli.main import run, train
from smallm.tokenizer.vocabulary import CODE_POINTS, Vocabulary
from smallm.training.analysis import characters, text_statistics
from smallm.training.analysis.characters import pieces, spread
from smallm.training.analysis.text_check import summary_lines, warnings
from smallm.training.analysis.text_statistics import compute_statistics
from smallm.training.data import source
from smallm.training.data.source import Tidy

WORDS = ["stone", "river", "candle", "window", "garden", "thunder", "little", "silver", "écho", "über", "naïve"]


def prose(characters: int, seed: int = 1) -> str:
    """Lines of random words without long repeats."""
    rng, lines, length = random.Random(seed), [], 0
    while length < characters:
        lines.append(" ".join(f"{rng.choice(WORDS)}{rng.randrange(100)}" for _ in range(8)) + ".\n")
        length += len(lines[-1])
    return "".join(lines)[:characters]


@pytest.fixture
def statistics_of(tmp_path, monkeypatch):
    """Computes the statistics of a text, or of the bytes of a file."""
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))

    def statistics_of(text: str | bytes, **options):
        path = tmp_path / "a.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return compute_statistics(open_corpus(str(path), **{"min_count": 10, "val_fraction": 0.1} | options))

    return statistics_of


def only(statistics, *words: str) -> None:
    """There is exactly one warning, and it contains these words."""
    (line,) = warnings(statistics)
    assert "\n" not in line
    for word in words:
        assert word in line


# -- problems of a text


def test_a_good_text_gets_one_line(statistics_of):
    found = statistics_of(prose(100_000))
    assert warnings(found) == []
    (line,) = summary_lines(found)
    assert line.startswith("check  ")
    assert "Latin" in line
    assert found.leak == 0
    assert (found.characters, found.characters_read) == (100_000, 90_000)
    assert found.distinct == len(set(prose(100_000)))


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_leak_is_found_and_measured(statistics_of, share):
    text = prose(200_000)
    tail, copied = text[180_000:], text[50_000 : 50_000 + int(20_000 * share)]
    found = statistics_of(text[:180_000] + tail[:7_000] + copied + tail[7_000 + len(copied) :])
    assert found.leak == pytest.approx(share, abs=0.003)
    assert found.leak_example in copied
    only(found, f"{100 * found.leak:.1f} % of the validation text also occurs word for word", "remove")


def test_a_leak_into_a_long_validation_part_is_measured_on_a_sample(statistics_of, monkeypatch):
    monkeypatch.setattr(text_statistics, "LEAK_IDS", 8192)
    monkeypatch.setattr(text_statistics, "LEAK_PIECE", 256)
    text = prose(200_000)
    found = statistics_of(text[:180_000] + text[:10_000] + text[190_000:])
    assert found.leak_characters == 8192
    assert found.leak == pytest.approx(0.5, abs=0.05)


def test_windows_cross_pieces(statistics_of, monkeypatch):
    """One copied passage at several positions relative to the ends of pieces."""
    monkeypatch.setattr(characters, "PIECE", 1000)
    text = prose(60_000)
    for start in (970, 999, 1960):
        found = statistics_of(text[:54_000] + text[start : start + 70] + text[54_070:])
        assert found.leak * 6000 == pytest.approx(70, abs=8)  # a character at either end may match by chance


def test_repeats_are_counted(statistics_of):
    text = prose(100_000)
    found = statistics_of(text[:50_000] + text[:25_000] + text[75_000:])
    assert found.repeated == pytest.approx(25 / 90, abs=0.01)
    only(found, f"{100 * found.repeated:.1f} % of the training text repeats an earlier part of it")
    line = "This line occurs here again and again, the same each time as before.\n\n"
    found = statistics_of(text[:80_000] + line * 300 + text)
    assert found.repeated_times in (299, 300)
    assert found.repeated_most.strip() in line * 3


def test_repeats_are_counted_in_a_sample_of_a_long_text(statistics_of, monkeypatch):
    monkeypatch.setattr(text_statistics, "REPEAT_SAMPLE", 10_000)
    text = prose(100_000)
    assert statistics_of(text[:50_000] + text[:25_000] + text[75_000:]).repeated == pytest.approx(25 / 90, abs=0.03)


def test_crlf(statistics_of):
    text = prose(100_000)
    ends = text.count("\n")
    found = statistics_of(text.replace("\n", "\r\n").encode())
    assert (found.crlf, found.lf, found.cr) == (ends, 0, 0)
    only(found, "line ends are not LF", f"{ends:,} CR LF", "--data.newlines lf")
    half = text[:50_000].replace("\n", "\r\n") + text[50_000:]
    mixed = statistics_of(half.encode())
    assert (mixed.crlf, mixed.lf, mixed.cr) == (text[:50_000].count("\n"), text[50_000:].count("\n"), 0)
    only(mixed, "mixed", "--data.newlines lf")
    assert warnings(statistics_of(half.encode(), newlines="lf")) == []
    assert statistics_of(text.replace("\n", "\r").encode()).cr == ends


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_lines_are_counted_across_pieces(size):
    text = "ab\r\n\r\nc\rd\n" + "x" * 30 + "\r\ny\n\r"
    reading, counts = text_statistics.Reading(), np.zeros(CODE_POINTS, np.int64)
    for start in range(0, len(text), size):
        reading.add(text[start : start + size], counts)
    assert (reading.crlf, counts[ord("\n")], counts[ord("\r")]) == (3, 5, 5)
    assert (reading.longest_line, reading.longest_line_number) == (31, 4)  # the CR counts


def test_mixed_nfc_and_nfd(statistics_of):
    text = prose(100_000)
    half = text[:50_000] + unicodedata.normalize("NFD", text[50_000:])
    later = sum(text[50_000:].count(c) for c in "éüï")
    found = statistics_of(half)
    assert found.decomposed == later
    only(found, f"{later:,} accented letters are written as letter and accent", "--data.normalise nfc")
    assert warnings(statistics_of(half, normalise="nfc")) == []
    only(statistics_of(unicodedata.normalize("NFD", text)), "NFD", "--data.normalise nfc")


def test_texts_without_composed_forms_get_no_warning(statistics_of):
    assert warnings(statistics_of("한국어 텍스트입니다 हिन्दी पाठ है ไทยก็มี العربية\n" + prose(90_000))) == []


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ("a\ufeff", ["1 byte-order mark", "delete them"]),
        ("\x07\x1b", ["2 control characters", "U+0007", "U+001B"]),
        ("\ufffd\ufffd\ufffd", ["3 replacement characters"]),
        ("Ã©Ã¨Ã¤Ã¶â€™â€œ", ["6 pairs", "Latin-1"]),
        (prose(20_000).replace("\n", " "), ["line 1 is very long", "20,0"]),
    ],
)
def test_statistics_of_planted_repeats(statistics_of, planted, words):
    only(statistics_of(planted + prose(100_000)), *words)


def test_a_validation_part_in_another_language(statistics_of):
    text = prose(90_000) + "Совсем другой язык.\n" * 499
    only(statistics_of(text, min_count=1), "never occur", "С", "--data.split blocks")


# -- the order of the text


def names(number: int, seed: int = 1) -> list[str]:
    """Invented names, the frequent ones first: the rarer a name, the more and the rarer syllables it has."""
    rng, found = random.Random(seed), {}
    syllables = [a + b for b in "aeiou" for a in "lnmrstkdbvgfhpzjwcyqx"]
    for i in range(3 * number):
        share = (i + 1) / (3 * number)
        length = 2 + (rng.random() < 0.2 + 0.5 * share) + (rng.random() < 0.5 * share)
        chosen = (syllables[int(len(syllables) * (0.3 + 0.7 * share) * rng.random() ** 2)] for _ in range(length))
        found["".join(chosen)] = None
    return list(found)[:number]


@pytest.mark.parametrize("order", ["by frequency", "by alphabet"])
def test_a_list_in_order_has_another_end(statistics_of, order):
    listed = names(20_000) if order == "by frequency" else sorted(names(20_000))
    found = statistics_of("\n".join(listed) + "\n")
    if order == "by frequency":
        only(found, "bits per character", f"{found.tail_bits:.2f}", f"{found.middle_bits:.2f}", "--data.split")
    else:
        assert any("in alphabetical order" in line and "shuffle" in line for line in warnings(found))
    blocks = statistics_of("\n".join(listed) + "\n", split="blocks")
    assert not [line for line in warnings(blocks, "blocks") if "differs" in line or "alphabetical" in line]
    random.Random(2).shuffle(listed)
    assert warnings(statistics_of("\n".join(listed) + "\n")) == []


def test_works_of_another_kind_at_the_end(statistics_of):
    reversed_words = "".join(" ".join(word[::-1] for word in line.split()) + "\n" for line in prose(10_000).split("\n"))
    only(statistics_of(prose(90_000) + reversed_words[:10_000]), "bits per character", "--data.split")


def test_ordinary_texts_do_not_end_differently(statistics_of):
    for text in (prose(300_000), prose(60_000, seed=3)):
        found = statistics_of(text)
        assert abs(found.tail_distance) < 1
        assert found.tail_bits == pytest.approx(found.middle_bits, rel=0.02)
    texts = sorted((Path(__file__).parents[3] / "docs").glob("*.md"))
    found = statistics_of("\n".join(path.read_text(encoding="utf-8") for path in texts))
    assert not [line for line in warnings(found) if "differs" in line]


def test_scripts_and_rare_characters(statistics_of):
    found = statistics_of("Ещё немного русского текста, " * 900 + "and some English. " * 1450 + "ж§§")
    assert list(found.scripts) == ["Cyrillic", "Latin"]
    assert found.scripts["Cyrillic"] == pytest.approx(0.5, abs=0.1)
    found = statistics_of("§" * 3 + "中" * 9 + prose(100_000) + "中" * 100)
    assert found.rare == "中§"


# -- files that are hardly text


def test_utf16_without_a_mark_and_binary_files(statistics_of):
    ascii_text = prose(9_000).encode("ascii", "ignore").decode()
    assert "--encoding utf-16-le" in message(statistics_of, ascii_text.encode("utf-16-le"))
    noise = np.random.default_rng(1).integers(0, 256, 60_000).astype(np.uint8).tobytes()
    assert "binary" in warnings(statistics_of(noise, encoding="latin-1"))[0]


def test_one_very_long_line(statistics_of):
    only(statistics_of(prose(1_000_000).replace("\n", " ")), "no line ends", "1,000,000 characters")


@pytest.mark.parametrize("text", ["abcd", "\r\n\r\n", "a" * 50_000, "\n" * 1000, "ééé\r\n中中" * 3, "a\ufeff\0\0"])
def test_texts_that_are_tiny_or_uniform(statistics_of, text):
    found = statistics_of(text, val_fraction=0.5)
    assert found.characters == len(text)
    assert 0 <= found.leak <= 1
    assert 0 <= found.repeated <= 1
    assert "only" in " ".join(warnings(found))


def test_statistics_are_cached(statistics_of, monkeypatch):
    first = statistics_of(prose(60_000))
    monkeypatch.setattr(text_statistics, "_compute", lambda corpus: pytest.fail("computed again"))
    assert statistics_of(prose(60_000)) == first
    monkeypatch.undo()


def test_a_cache_that_cannot_be_written_is_no_error(statistics_of, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    text, healthy = prose(60_000), Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: full() if "text-statistics" in str(to) else healthy(path, to))
    assert warnings(statistics_of(text)) == []


# -- the command


def test_check_reports_everything_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_bytes(prose(60_000).replace("\n", "\r\n").encode())
    assert run(train, ["--check", "my.txt"]) == 0
    out, _ = capsys.readouterr()
    for word in ("60,", "distinct", "CR LF", "--data.newlines lf", "leak", "gzip", "-gram"):
        assert word in out
    assert not Path("runs").exists()
    assert run(train, ["--check", "my.txt", "--data.newlines", "lf"]) == 0
    assert "no problems found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"a", ["too short"]),
        (prose(5000).encode("utf-16"), ["--encoding utf-16"]),
        (b"\x7fELF\x02\x01\x01\xff\x00" * 50, ["is a program"]),
        (b"%PDF-1.7\n\xe2\xe3\xcf\xd3\n", ["is a PDF"]),
        (b"\1\2\xff\3\0" * 50, ["binary file"]),
        ("Größe\n".encode("latin-1") * 50, ["--encoding cp1252"]),
    ],
)
def test_an_unreadable_text_is_one_line(tmp_path, refused, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    line = refused("--check", str(tmp_path / "a.txt"))
    for word in words:
        assert word in line


def test_check_refuses_a_run(refused):
    assert "--check only reports" in refused("--check", "a.txt", "--out", "runs/x")
    assert "leave out --data" in refused("--check", "a.txt", "--data", "b.txt")


# -- normalisation and newlines


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 18])
@pytest.mark.parametrize(("normalise", "newlines"), [("nfc", "keep"), ("none", "lf"), ("nfc", "lf")])
def test_normalised_texts(tmp_path, monkeypatch, piece_bytes, normalise, newlines):
    monkeypatch.setattr(source, "PIECE_BYTES", piece_bytes)
    text = "e\u0301a\r\r\nb\r" + "\u1112\u1161\u11ab a\u0323\u0302\r\n" * 3 + "中e\u0301\u0301\n\r"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    corpus = open_corpus(
        str(path), min_count=1, val_fraction=0.5, normalise=normalise, newlines=newlines, cache=tmp_path / "cache"
    )
    if newlines == "lf":
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", text) if normalise == "nfc" else text
    assert corpus.vocabulary.decode(corpus.train_ids) + corpus.val_text() == text


@given(st.text("ae\u0301\u0323\u0302\r\n\u1112\u1161\u11ab中", max_size=30), st.lists(st.integers(1, 4), min_size=1))
def test_normalising_in_pieces_equals_normalising_the_whole(text, sizes):
    wanted = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    given, held, result = 0, "", ""
    for size in [*sizes, *[1] * len(text)]:
        piece, held = Tidy("nfc", "lf")(held + text[given : given + size], final=False)
        given, result = given + size, result + piece
    assert result + Tidy("nfc", "lf")(held, final=True)[0] == wanted


def test_a_letter_with_very_many_accents_is_split():
    piece, held = Tidy("nfc")("e" + "\u0301" * 2 * source.MAX_HELD, final=False)
    assert len(held) < source.MAX_HELD < len(piece)


def test_a_normalised_file_is_another_text(tmp_path, monkeypatch):
    """The cache tells the tidied text from the unchanged one, also when the file is not read again."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n" * 20)
    monkeypatch.setattr("smallm.training.data.store.SETTLED_SECONDS", -60.0)
    options = {"min_count": 1, "val_fraction": 0.5, "cache": tmp_path / "cache"}
    corpora = [open_corpus(str(path), newlines=newlines, **options) for newlines in ("keep", "lf", "keep", "lf")]
    assert [corpus.train_characters + corpus.val_characters for corpus in corpora] == [200, 160, 200, 160]
    assert corpora[0].fingerprint == corpora[2].fingerprint != corpora[1].fingerprint == corpora[3].fingerprint


# -- characters of ids


@given(st.text("ab\néß€中🎉", min_size=1, max_size=60), st.sets(st.sampled_from("é€中🎉")), st.integers(1, 9))
def test_characters_of_ids_in_pieces(text, known, size):
    vocabulary = Vocabulary.from_characters(known)
    assert "".join(pieces(vocabulary.encode(text), vocabulary, 1000, size)) == text


def test_spread_pieces_cover_the_ends():
    assert spread(10, 10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert spread(100, 20, 5) == [(0, 5), (31, 36), (63, 68), (95, 100)]
    assert spread(100, 3, 5) == [(0, 3)]


def test_a_longer_text_than_is_characters_read(statistics_of, monkeypatch):
    monkeypatch.setattr(text_statistics, "MAX_TRAIN", 30_000)
    monkeypatch.setattr(characters, "PIECE", 1000)
    found = statistics_of(prose(100_000))
    assert 29_000 < found.characters_read <= 30_000
    assert warnings(replace(found, train_characters=90_000)) == []


def test_the_longest_line_of_a_text_that_is_read_in_part(statistics_of, monkeypatch):
    monkeypatch.setattr(text_statistics, "MAX_TRAIN", 40_000)
    monkeypatch.setattr(characters, "PIECE", 20_000)
    found = statistics_of(prose(200_000).replace("\n", " "), val_fraction=0.001)
    assert 19_900 < found.longest_line <= 20_200  # the last piece and the validation part, not all pieces together
    assert f"(at least {found.longest_line:,} characters)" in warnings(found)[-1]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])  # of a Windows console, and of LC_ALL=C
def test_characters_that_the_console_lacks_are_escaped(tmp_path, monkeypatch, encoding):
    file, console = tmp_path / "a.txt", io.TextIOWrapper(io.BytesIO(), encoding)
    file.write_text(prose(3000) + "吾輩は猫である。\n" * 200, encoding="utf-8")
    monkeypatch.setattr("sys.stdout", console)
    assert run(train, ["--check", str(file)]) == 0
    console.flush()
    assert b"\\u732b" in console.buffer.getvalue()
