"""The parts of a split lie nowhere on both sides, and make up the text."""

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import message, open_corpus

from smallm.training.config import DataConfig
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
        with split.split_text(find_source(data, Path(folder)), data, Path(folder), False) as found:
            assert isinstance(found, split.SplitText)
            in_order = sorted(found.stretches.tolist())
            assert in_order[0][0] == 0
            assert in_order[-1][1] == len(text.encode())
            assert all(a[1] == b[0] for a, b in pairwise(in_order))
            train, val = np.split(found.stretches, [found.train_count])
            parts = [b"".join(text.encode()[a:b] for a, b in part).decode() for part in (train, val)]
            assert "".join(found.pieces("reading", False)) == "".join(parts)
            assert found.train_characters == len(parts[0])


def test_a_known_text_is_not_read_again(tmp_path, monkeypatch):
    file = written(tmp_path / "a.txt", "".join(LINES))
    first = open_corpus(file, split="blocks")
    monkeypatch.setattr(split, "TemporaryFile", lambda dir: pytest.fail("read again"))
    again = open_corpus(file, split="blocks")
    assert both_texts(again) == both_texts(first)
    assert again.train_characters == first.train_characters
    assert open_corpus(file).val_text() == "".join(LINES)[-sum(map(len, LINES)) // 10 :]  # the tail has another entry


def test_texts_that_are_too_short(tmp_path):
    for text, problem in (("", "a.txt is empty"), ("abc", "a.txt is too short"), ("a\nb", "a.txt is too short")):
        file = written(tmp_path / "a.txt", text)
        assert message(lambda file: open_corpus(file, split="blocks"), file).startswith(problem)
    corpus = open_corpus(written(tmp_path / "b.txt", "abcd"), split="blocks", val_fraction=0.5)
    assert both_texts(corpus) == ("ab", "cd")
