"""The store: cached texts are complete, are found without reading the files, and are written by one process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from toys import open_corpus

from smallm.training.budget.configure import open_text
from smallm.training.config import Config, DataConfig
from smallm.training.data import corpus as corpus_module
from smallm.training.data import encoding as encode
from smallm.training.data import store
from smallm.training.data.source import Source

REPOSITORY = Path(__file__).parents[3]
TEXT = "Größe: 5 €\n日本語のテキスト\nplain end\n" * 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SMALLM_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Lets files be remembered although the tests have only just written them."""
    monkeypatch.setattr(store, "SETTLED_SECONDS", -60.0)


@pytest.fixture
def calls(monkeypatch):
    """Counts how often a text was surveyed and encoded."""
    calls = {"survey": 0, "encode": 0}

    def counting(name):
        def call(*args):
            calls[name] += 1
            return getattr(encode, name)(*args)

        return call

    for name in calls:
        monkeypatch.setattr(corpus_module, name, counting(name))
    return calls


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def opened(source, min_count=1, **options):
    return open_corpus(str(source), min_count=min_count, val_fraction=0.25, **options)


def text_of(corpus):
    return corpus.vocabulary.decode(corpus.train_ids) + corpus.val_text()


def unfinished(cache):
    return list(cache.rglob("*.unfinished"))


# -- surveys of files


def test_a_cached_file_is_not_read_again(file, cache, calls, monkeypatch):
    opened(file)
    monkeypatch.setattr(Source, "pieces", None)
    monkeypatch.chdir(file.parent)
    assert text_of(opened(file.name)) == TEXT
    assert calls == {"survey": 1, "encode": 1}


def test_other_settings_or_missing_ids_read_the_file_again(file, cache, calls):
    opened(file)
    opened(file, min_count=2)
    assert calls == {"survey": 2, "encode": 1}  # the vocabulary is the same
    opened(file, min_count=1000)
    assert calls == {"survey": 3, "encode": 2}
    next(cache.rglob("ids.bin")).unlink()
    opened(file)
    opened(file, min_count=1000)
    assert calls == {"survey": 4, "encode": 3}
    for content in (b"[]", b'{"values": {}, "checksum": 1}', None):
        for entry in (cache / "sources").iterdir():
            entry.write_bytes(content or entry.read_bytes().replace(b'"characters": ', b'"characters": 1'))
        assert text_of(opened(file)) == TEXT
    assert calls == {"survey": 7, "encode": 3}


def test_another_validation_share_reads_no_file(file, calls, monkeypatch):
    first = opened(file)
    monkeypatch.setattr(Source, "pieces", None)
    other = open_corpus(str(file), min_count=1, val_fraction=0.1)
    assert calls == {"survey": 1, "encode": 1}
    assert text_of(other) == text_of(first)
    assert other.val_characters < first.val_characters
    assert other.folder == first.folder
    assert other.cache_file("x") != first.cache_file("x")


def in_place(file):
    with file.open("r+b") as stream:
        stream.write(b"X")


def by_a_new_file(file):
    new = file.with_name("new")
    new.write_bytes(b"X" + file.read_bytes()[1:])
    new.replace(file)


def by_a_link(file):
    new = file.with_name("new")
    new.write_bytes(b"X" + file.read_bytes()[1:])
    file.unlink()
    try:
        file.symlink_to(new)
    except OSError:
        pytest.skip("Windows allows links to administrators only")


@pytest.mark.parametrize("change", [in_place, by_a_new_file, by_a_link])
def test_a_changed_file_is_noticed_although_size_and_time_are_the_same(file, calls, change):
    opened(file)
    before = file.stat()
    time.sleep(0.02)  # longer than a tick of the file system's clock
    change(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert text_of(opened(file)) == "X" + TEXT[1:]
    assert calls == {"survey": 2, "encode": 2}


def test_new_and_changed_files_of_a_folder_are_noticed(tmp_path, calls):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "ac":
        (folder / f"{name}.txt").write_text(f"text of {name}\n")
    opened(folder)
    opened(folder)
    assert calls == {"survey": 1, "encode": 1}
    (folder / "b.txt").write_text("text of b\n")
    assert text_of(opened(folder)) == "text of a\ntext of b\ntext of c\n"
    time.sleep(0.02)
    (folder / "c.txt").write_text("text of d\n")
    assert text_of(opened(folder)) == "text of a\ntext of b\ntext of d\n"
    assert calls == {"survey": 3, "encode": 3}


def test_another_encoding_is_another_text(file, calls):
    opened(file)
    assert text_of(opened(file, encoding="latin-1")) == TEXT.encode().decode("latin-1")
    assert text_of(opened(file)) == TEXT
    assert calls == {"survey": 2, "encode": 2}


def test_a_file_that_has_just_changed_is_not_cached(file, cache, calls, monkeypatch):
    monkeypatch.setattr(store, "SETTLED_SECONDS", 2.0)
    opened(file)
    opened(file)
    assert not (cache / "sources").exists()
    assert calls == {"survey": 2, "encode": 1}
    monkeypatch.setattr(store.time, "time", lambda: file.stat().st_ctime + 2.1)
    opened(file)
    opened(file)
    assert calls == {"survey": 3, "encode": 1}


def test_a_file_that_changes_while_it_is_read_is_not_cached(file, cache, monkeypatch):
    def survey(*args):
        found = encode.survey(*args)
        os.utime(file)
        return found

    monkeypatch.setattr(corpus_module, "survey", survey)
    opened(file)
    assert not (cache / "sources").exists()


def test_a_read_only_cache_is_usable(file, cache, calls, monkeypatch):
    opened(file)
    next((cache / "sources").iterdir()).unlink()

    def forbidden(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("mkdir", "write_text", "replace"):
        monkeypatch.setattr(Path, name, forbidden)
    assert text_of(opened(file)) == TEXT
    assert calls == {"survey": 2, "encode": 1}


# -- damage


@pytest.mark.parametrize("name", ["ids.bin", "corpus.json"])
def test_a_flipped_bit_is_noticed(file, cache, calls, name):
    opened(file)
    path = next(cache.rglob(name))
    good = path.read_bytes()
    place = good.index(b'"ids": ') + 8 if name == "corpus.json" else len(good) // 2
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    if name == "corpus.json":
        json.loads(path.read_text())
    assert text_of(opened(file)) == TEXT
    assert calls["encode"] == 2
    assert path.read_bytes() == good


def test_long_ids_are_not_hashed_at_each_start(file, cache, calls, monkeypatch):
    monkeypatch.setattr(store, "CHECKED_BYTES", 10)
    opened(file)
    assert json.loads(next(cache.rglob("corpus.json")).read_text())["values"]["checksum"] is None
    opened(file)
    assert calls["encode"] == 1


# -- several processes

KILLED = """
import os, signal, sys
from smallm.training.data import store
from smallm.training.budget.configure import open_text
from smallm.training.config import DataConfig
from smallm.training.data.corpus import open_corpus
store.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
open_corpus(DataConfig(sys.argv[1], min_count=int(sys.argv[2]), val_fraction=0.25))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_leftovers_of_a_killed_process_are_not_used_and_are_removed(file, cache, calls):
    for min_count in ("1", "1000"):
        done = subprocess.run([sys.executable, "-c", KILLED, str(file), min_count], cwd=REPOSITORY, check=False)
        assert done.returncode == -signal.SIGKILL
    # The second process has removed the leftovers of the first. All files of the second remain.
    (left,) = unfinished(cache)
    assert {path.name for path in left.iterdir()} == {"ids.bin", "corpus.json"}
    assert text_of(opened(file, min_count=1000)) == TEXT
    assert calls["encode"] == 1
    assert not unfinished(cache)


def test_files_of_a_running_process_are_left_alone(file, cache):
    work = cache / "corpora" / "abc.0123.unfinished"
    work.mkdir(parents=True)
    (cache / "locks").mkdir()
    with FileLock(cache / "locks" / "abc.lock"):
        opened(file)
        assert unfinished(cache) == [work]
    opened(file, min_count=1000)
    assert not unfinished(cache)


@pytest.fixture
def slow(file, monkeypatch):
    """Starts a thread that encodes the file; yields the event for which the thread waits."""
    begun, go_on = threading.Event(), threading.Event()
    write = corpus_module.encode

    def slowly(*args):
        begun.set()
        assert go_on.wait(60)
        return write(*args)

    monkeypatch.setattr(corpus_module, "encode", slowly)
    thread = threading.Thread(target=opened, args=(file,), kwargs={"progress": False})
    thread.start()
    assert begun.wait(60)
    yield go_on
    go_on.set()
    thread.join()


def test_one_process_encodes_and_the_other_waits(file, calls, slow, capsys):
    threading.Timer(0.2, slow.set).start()
    assert text_of(opened(file)) == TEXT
    assert calls == {"survey": 2, "encode": 1}
    assert capsys.readouterr().err == "text   another process is encoding this text; waiting for it\n"


def test_waiting_has_a_limit(file, cache, calls, slow, monkeypatch):
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(corpus_module, "encode", encode.encode)
    assert text_of(opened(file)) == TEXT
    slow.set()  # the slow thread finds the result of the fast one


def test_each_machine_encodes_for_itself(file):
    accelerator = SimpleNamespace(local_main_process_first=nullcontext, is_main_process=False)  # on a second machine
    corpus = open_text(accelerator, Config(DataConfig(source=str(file), min_count=1)))
    assert text_of(corpus) == TEXT
