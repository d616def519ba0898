"""Texts in the formats that people have give the ids of the plain text."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest
from toys import open_corpus

from smallm.tokenizer.text_files import find_files

DOCUMENTS = [f"Document {n}: naïve café, “quoted”, comma\nand a second line\n" for n in range(60)]
TEXT = "".join(DOCUMENTS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))


def zipped(texts):
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in texts.items():
                archive.writestr(name, text)
        return file.getvalue()


def zstandard(data):
    return pytest.importorskip("zstandard").compress(data)


def json_lines(key="text"):
    return "".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(DOCUMENTS)).encode()


def separated(delimiter):
    file = io.StringIO()
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerows([("id", "text"), *enumerate(DOCUMENTS)])
    return file.getvalue().encode()


def ids(source, **settings):
    corpus = open_corpus(source, min_count=1, val_fraction=0.25, **settings)
    return np.concatenate([corpus.train_ids[:], corpus.val_ids[:]]).tolist(), corpus.fingerprint


@pytest.fixture
def plain(tmp_path):
    (tmp_path / "plain.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    return ids(tmp_path / "plain.txt")


FORMATS = {
    "a.txt.gz": lambda: gzip.compress(TEXT.encode()),
    "a.bz2": lambda: bz2.compress(TEXT.encode()),
    "a.xz": lambda: lzma.compress(TEXT.encode()),
    "a.zst": lambda: zstandard(TEXT.encode()),
    "a.zip": lambda: zipped({"b.txt": DOCUMENTS[-1], "a.txt": "".join(DOCUMENTS[:-1]), "__MACOSX/a.txt": "no"}),
    "b.zip": lambda: zipped({"a.jsonl": json_lines()}),
    "a.jsonl": json_lines,
    "A.NDJSON": json_lines,
    "a.jsonl.gz": lambda: gzip.compress(json_lines()),
    "a.jsonl.zst": lambda: zstandard(json_lines()),
    "a.csv": lambda: separated(","),
    "a.tsv.xz": lambda: lzma.compress(separated("\t")),
}


@pytest.mark.parametrize("piece_bytes", [7, 1 << 18])
@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_ids_of_the_plain_text(tmp_path, monkeypatch, plain, name, piece_bytes):
    monkeypatch.setattr("smallm.training.data.source.PIECE_BYTES", piece_bytes)
    (tmp_path / name).write_bytes(FORMATS[name]())
    assert ids(tmp_path / name) == plain


@pytest.mark.parametrize("name", FORMATS)
def test_the_blocks_of_each_format_are_those_of_the_plain_text(tmp_path, monkeypatch, plain, name):
    monkeypatch.setattr("smallm.training.data.split.MIN_BLOCK_BYTES", 500)
    (tmp_path / name).write_bytes(FORMATS[name]())
    found = ids(tmp_path / name, split="blocks")
    assert found == ids(tmp_path / "plain.txt", split="blocks")
    assert found != plain


def test_the_field_of_records(tmp_path, plain):
    (tmp_path / "a.jsonl").write_bytes(json_lines("body"))
    assert ids(tmp_path / "a.jsonl", field="body") == plain


def test_several_texts_patterns_and_folders(tmp_path, plain):
    for number, name in enumerate(["a.MD", "deep/b.md", "deep/er/c.txt"]):
        file = tmp_path / "notes" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes("".join(DOCUMENTS[20 * number : 20 * number + 20]).encode())
    (tmp_path / "notes" / "draft.md").write_text("not this one")
    notes = tmp_path / "notes"
    assert ids(notes, include=("*.md", "deep/*.txt"), exclude=("draft*",)) == plain
    assert ids(f"{notes}/**/*.md", exclude=("draft*",)) == ids(notes / "deep" / "b.md")


@pytest.mark.parametrize("name", ["notes", "notes/**/*.txt", "./notes/**/*.txt", "n*/**/*.txt"])
def test_an_excluded_path_begins_at_the_folder_or_at_the_first_wildcard(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for file in ("notes/a.txt", "notes/sub/b.txt"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("x")
    begin = "notes/" if name.startswith("n*") else ""
    assert find_files(name, exclude=(f"{begin}sub/*",)) == [Path("notes/a.txt")]
