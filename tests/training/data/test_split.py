"""The parts of a split do not overlap, and together they are the whole text."""

import json
import re
import tempfile
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import message, open_corpus

from smallm.training import cli
from smallm.training.config import DataConfig
from smallm.training.data import corpus as corpus_module
from smallm.training.data import source, split, store
from smallm.training.data.corpus import Corpus
from smallm.training.data.source import find_source

LINES = [f"line {n:06}, naïve and “quoted”\n" for n in range(4000)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "SETTLED_SECONDS", -60.0)  # files are remembered although they are new


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def both_texts(corpus: Corpus) -> tuple[str, str]:
    return corpus.vocabulary.decode(corpus.train_ids[:]), corpus.val_text()


def test_blocks_end_at_lines_and_make_up_the_text(tmp_path):
    file = written(tmp_path / "a.txt", "".join(LINES))
    corpus = open_corpus(file, split="blocks", min_count=1)
    train, val = (text.splitlines(keepends=True) for text in both_texts(corpus))
    assert sorted(train + val) == LINES
    assert (train, val) == (sorted(train), sorted(val))  # in the order of the text
    assert len(val) == pytest.approx(400, abs=15)
    places = np.array([LINES.index(line) for line in val])
    assert np.count_nonzero(np.diff(places) > 1) + 1 == file.stat().st_size // split.MIN_BLOCK_BYTES == 14
    assert corpus.train_characters == len("".join(train))
    assert corpus.fingerprint != open_corpus(file, min_count=1).fingerprint
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_file()]  # no copy of the text remains


def test_a_long_text_has_fifty_blocks(tmp_path):
    corpus = open_corpus(written(tmp_path / "a.txt", "".join(LINES) * 5), split="blocks", min_count=1)
    places = np.array([LINES.index(line) for line in corpus.val_text().splitlines(keepends=True)])
    assert np.count_nonzero(np.diff(places) != 1) + 1 == 50


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ab\n\r éß€日本🎉\u0301"), min_size=30, max_size=300),
    val_fraction=st.sampled_from([0.1, 0.5, 0.75]),
    piece_bytes=st.integers(1, 30),
)
def test_the_stretches_of_any_text_do_not_overlap_and_leave_nothing_out(text, val_fraction, piece_bytes):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "MIN_BLOCK_BYTES", 16)
        patch.setattr(source, "PIECE_BYTES", piece_bytes)
        data = DataConfig(str(written(Path(folder) / "a.txt", text)), split="blocks", val_fraction=val_fraction)
        text_source = find_source(data, Path(folder))
        with split.split_text(text_source, data, 1, Path(folder), False, lambda _: val_fraction) as found:
            assert isinstance(found, split.SplitText)
            train, val = (part.stretches for part in (found.train[0], found.val[0]))
            in_order = sorted([*train.tolist(), *val.tolist()])
            assert in_order[0][0] == 0
            assert in_order[-1][1] == len(text.encode())
            assert all(a[1] == b[0] for a, b in pairwise(in_order))
            parts = [b"".join(text.encode()[a:b] for a, b in part).decode() for part in (train, val)]
            assert "".join(found.pieces("reading", False)) == "".join(parts)
            assert found.train_characters == [len(parts[0])]


def test_a_known_text_is_not_read_again(tmp_path, monkeypatch):
    file = written(tmp_path / "a.txt", "".join(LINES))
    first = open_corpus(file, split="blocks")
    monkeypatch.setattr(split, "TemporaryFile", lambda dir: pytest.fail("read again"))
    again = open_corpus(file, split="blocks")
    assert both_texts(again) == both_texts(first)
    assert again.train_characters == first.train_characters
    assert open_corpus(file).val_text() == "".join(LINES)[-sum(map(len, LINES)) // 10 :]  # the tail has another entry


@pytest.mark.parametrize(
    ("settings", "readings"),
    [
        ({"split": "tail"}, ["reading", "encoding"]),
        ({"split": "blocks"}, ["copying"]),
        ({"split": "documents"}, ["copying"]),
        ({"split": "documents", "separator": "|"}, ["copying"]),
        ({"split": "tail", "weights": (2.0, 1.0)}, ["copying"] * 2),
    ],
)
def test_a_text_is_read_once_to_choose_the_size_of_the_validation_part(tmp_path, monkeypatch, settings, readings):
    """`--minutes` chooses the size by the length of the text, which is known when the text is copied."""
    files = [str(written(tmp_path / f"{n}.jsonl", json_lines(STORIES[n : 300 - n]))) for n in range(2)]
    data = DataConfig(tuple(files) if "weights" in settings else files[0], **settings)
    labels, lengths, pieces = [], set(), source.Source.pieces
    monkeypatch.setattr(
        source.Source, "pieces", lambda self, label, progress: labels.append(label) or pieces(self, label, progress)
    )

    def choose(characters: int) -> float:
        lengths.add(characters)
        return 0.25

    corpus = corpus_module.open_corpus(data, choose_val_fraction=choose)
    assert labels == readings
    assert lengths == {corpus.train_characters + corpus.val_characters}
    assert corpus.val_fraction == 0.25
    for again in (
        corpus_module.open_corpus(replace(data, val_fraction=0.25)),
        corpus_module.open_corpus(data, choose_val_fraction=choose),
    ):
        assert both_texts(again) == both_texts(corpus)
    assert labels == readings  # the others come from the cache


def test_texts_that_are_too_short(tmp_path):
    for text, problem in (("", "a.txt is empty"), ("abc", "a.txt is too short"), ("a\nb", "a.txt is too short")):
        file = written(tmp_path / "a.txt", text)
        assert message(lambda file: open_corpus(file, split="blocks"), file).startswith(problem)
    corpus = open_corpus(written(tmp_path / "b.txt", "abcd"), split="blocks", val_fraction=0.5)
    assert both_texts(corpus) == ("ab", "cd")


# -- documents


STORIES = [f"Story {n}: “naïve”{' and so on' * (n % 7)}.\n{'Second line.' * (n % 3)}\n" for n in range(300)]
END = "<|endoftext|>"


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def documents(corpus: Corpus, of=STORIES) -> tuple[list[str], list[str]]:
    """The documents of both parts, in their order; checks that each is whole and that all are there once."""
    pattern = "|".join(re.escape(each) for each in sorted(of, key=len, reverse=True))
    parts = [re.findall(pattern, text) for text in both_texts(corpus)]
    assert ["".join(part) for part in parts] == list(both_texts(corpus))
    assert sorted(parts[0] + parts[1]) == sorted(of)
    return parts[0], parts[1]


def test_documents_are_shuffled_as_wholes_with_the_seed(tmp_path):
    file = written(tmp_path / "a.jsonl", json_lines(STORIES))
    train, val = documents(open_corpus(file, split="documents"))
    assert train[:5] != STORIES[:5]
    assert 0.1 <= len("".join(val)) / len("".join(STORIES)) < 0.11
    assert documents(open_corpus(file, split="documents", cache=tmp_path / "other")) == (train, val)
    other = documents(open_corpus(file, split="documents", seed=2))
    assert (set(other[1]), other[0][:5]) != (set(val), train[:5])
    assert open_corpus(file, split="documents").train_characters == len("".join(train))


@pytest.mark.parametrize("piece_bytes", [7, 1 << 18])
@pytest.mark.parametrize("given", ["records", "zipped records", "files", "zipped files", "two texts"])
def test_each_record_or_file_is_a_document(tmp_path, monkeypatch, given, piece_bytes):
    monkeypatch.setattr(source, "PIECE_BYTES", piece_bytes)
    texts = {f"{n:03}.txt": story for n, story in enumerate(STORIES)}
    if given == "records":
        place = written(tmp_path / "a.jsonl", json_lines(STORIES))
    elif given == "files":
        (tmp_path / "texts").mkdir()
        for name, text in texts.items():
            written(tmp_path / "texts" / name, text.removesuffix("\n") if text.count("\n") == 1 else text)
        place = tmp_path / "texts"
    elif given == "two texts":
        halves = STORIES[:150], STORIES[150:]
        place = [str(written(tmp_path / f"{n}.jsonl", json_lines(half))) for n, half in enumerate(halves)]
    else:
        members = {"a.jsonl": json_lines(STORIES[:99]), "b.jsonl": json_lines(STORIES[99:])}
        with zipfile.ZipFile(place := tmp_path / "a.zip", "w") as archive:
            for name, text in (members if given == "zipped records" else texts).items():
                archive.writestr(name, text)
    data = DataConfig(tuple(place) if isinstance(place, list) else str(place), split="documents")
    documents(corpus_module.open_corpus(data))


@pytest.mark.parametrize("piece_bytes", [3, 1 << 18])
@pytest.mark.parametrize("last", ["", END, END + "\n\r\n"])
@pytest.mark.parametrize("after", ["", "\n"])
def test_a_separator_ends_the_documents_of_a_text(tmp_path, monkeypatch, last, after, piece_bytes):
    monkeypatch.setattr(source, "PIECE_BYTES", piece_bytes)
    file = written(tmp_path / "a.txt", (END + after).join(STORIES) + last)
    corpus = open_corpus(file, split="documents", separator=END)
    stories = [each + END + after for each in STORIES[:-1]] + [STORIES[-1] + (last or END)]
    documents(corpus, stories)
    assert open_corpus(file, separator=END).fingerprint == open_corpus(file).fingerprint  # `tail` leaves the text alone


def test_a_separator_is_written_after_records_and_between_files(tmp_path):
    file = written(tmp_path / "a.jsonl", json_lines([STORIES[0], STORIES[1] + END, STORIES[2] + END + "\n"]))
    text = f"{STORIES[0]}{END}{STORIES[1]}{END}{STORIES[2]}{END}\n"
    assert "".join(both_texts(open_corpus(file, separator=END))) == text
    stories = [each + END for each in STORIES[:2]] + [f"{STORIES[2]}{END}\n"]
    documents(open_corpus(file, separator=END, split="documents"), stories)
    written(tmp_path / "b.txt", "b")
    written(tmp_path / "c.txt", "c" + END)
    written(tmp_path / "d.txt", "d")
    assert "".join(both_texts(open_corpus(tmp_path, separator=END))) == f"b{END}c{END}d"


def test_separators_in_other_settings(tmp_path):
    file = written(tmp_path / "a.jsonl", json_lines(["caf\u0065\u0301\r\n", "\u0301 b", "", "c"] * 9))
    found = both_texts(open_corpus(file, split="documents", normalise="nfc", newlines="lf", min_count=1))
    assert sorted("".join(found).splitlines()) == sorted(["café", "\u0301 b", "", "c"] * 9)
    settings = cli.parse(["--data", str(file), "--data.separator", r"\n---\n"]).config.data
    assert settings.separator == "\n---\n"


def test_one_document_is_refused(tmp_path):
    file = written(tmp_path / "a.txt", "one text\n" * 9)
    line = "a.txt is one document; name what ends its documents with --data.separator, or pass --data.split blocks"
    assert message(lambda: open_corpus(file, split="documents")) == line
    assert message(lambda: open_corpus(file, split="documents", separator="|")) == line
    assert "is empty" in message(lambda: open_corpus(written(file, ""), split="documents"))


# -- weights


@pytest.mark.parametrize("split_by", ["tail", "blocks", "documents"])
def test_with_weights_each_text_is_split_for_itself(tmp_path, split_by):
    stories = STORIES[:200], [each.upper() for each in STORIES]
    files = [str(written(tmp_path / f"{n}.jsonl", json_lines(part))) for n, part in enumerate(stories)]
    settings = {"split": split_by, "min_count": 1, "weights": (2.0, 1.0), "val_fraction": 0.25}
    corpus = corpus_module.open_corpus(DataConfig(tuple(files), **settings))
    first, second = np.split(corpus.train_ids[:], corpus.train_ends[:1])
    assert corpus.train_ends[1] == len(corpus.train_ids)
    train = [corpus.vocabulary.decode(part) for part in (first, second)]
    assert "".join(train) + corpus.val_text() == "".join(both_texts(corpus))
    assert len(train[0]) / len("".join(stories[0])) == pytest.approx(0.75, abs=0.01)
    assert [set(part) & set("aST") for part in train] == [set("aS"), set("ST")]
    half = len("".join(stories[0])) - len(train[0])
    assert sorted(train[0] + corpus.val_text()[:half]) == sorted("".join(stories[0]))
    assert sorted(train[1] + corpus.val_text()[half:]) == sorted("".join(stories[1]))


def test_one_weight_for_each_text():
    assert message(lambda: DataConfig(("a", "b"), weights=(1.0,))) == (
        "data.weights = (1.0,) must be one number for each --data, 2 in all"
    )
    assert "must be more than 0" in message(lambda: DataConfig(("a", "b"), weights=(1.0, 0.0)))
