"""Datasets of the Hugging Face hub, through a stand-in for the package `datasets`."""

import importlib
import sys
from types import SimpleNamespace

import pytest
from toys import message, open_corpus

TEXTS = [f"Story {n}: “naïve”.\n" for n in range(99)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch):
    """Records the calls of `load_dataset`, which yields `hub.records`; an exception among them is raised."""

    def load_dataset(*place, split, streaming):
        hub.calls.append((*place, split, streaming))
        for record in hub.records:
            if isinstance(record, Exception):
                raise record
            yield record

    hub = SimpleNamespace(calls=[], records=[{"text": text, "n": n} for n, text in enumerate(TEXTS)])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return hub


def text_of(corpus):
    return corpus.vocabulary.decode(corpus.train_ids[:]) + corpus.val_text()


def test_a_dataset_is_read_once_as_a_stream(hub, capsys):
    corpus = open_corpus("hf:owner/stories")
    assert text_of(corpus) == "".join(TEXTS)
    assert corpus.name == "hf:owner/stories"
    assert hub.calls == [("owner/stories", None, "train", True)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("text   hf:owner/stories is stored in ")
    hub.records = [RuntimeError("no network")]
    assert text_of(open_corpus("hf:owner/stories", split="documents")).count("Story") == 99
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hf:a:b", ("a", "b", "train", True)),
        ("hf:a:b:test", ("a", "b", "test", True)),
        ("hf:a::test#body", ("a", None, "test", True)),
        ("hf:a#body", ("a", None, "train", True)),
    ],
)
def test_config_split_and_column(hub, name, call):
    hub.records = [{"body" if "#" in name else "story": text} for text in TEXTS]
    assert text_of(open_corpus(name, field="story")) == "".join(TEXTS)
    assert hub.calls == [call]


def test_mistakes(hub, cache, monkeypatch):
    assert message(open_corpus, "hf:a:b:c:d") == (
        "'hf:a:b:c:d' is not of the form hf:NAME[:CONFIG[:SPLIT]][#COLUMN]; correct --data"
    )
    assert "is not of the form" in message(open_corpus, "hf:")
    assert message(open_corpus, "hf:a#body") == (
        "hf:a#body has no text in field 'body' of line 1: its fields are text, n; name another with --data.field"
    )
    hub.records = [*hub.records, ConnectionError("the network\nis gone")]
    assert message(open_corpus, "hf:a").startswith("hf:a could not be loaded (ConnectionError: the network); check its")
    assert not list((cache / "hf").iterdir())  # half a dataset is not a text
    imported = importlib.import_module

    def missing(name):
        if name == "datasets":
            raise ModuleNotFoundError(name)
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert message(open_corpus, "hf:a") == (
        "hf:a needs the package 'datasets'; install it with: pip install 'smallm[datasets]'"
    )
