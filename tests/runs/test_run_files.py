"""The readers of a run's small files, and the writer that never leaves half a file."""

import errno
from pathlib import Path

import pytest

from smallm import UserError
from smallm.atomic_write import atomic_write
from smallm.runs.config_file import flatten, read_config, read_toml
from smallm.runs.metrics import read_metrics

LINES = '{"kind": "train", "step": 1}\n{"kind": "eval", "step": 2}\n'


def log(run: Path, content: str | bytes) -> Path:
    (run / "metrics.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    return run


@pytest.mark.parametrize("content", ["línea\r\n", b"\x00\xff"])
def test_atomic_write_replaces_a_file(tmp_path, content):
    file = tmp_path / "a.json"
    file.write_text("old")
    atomic_write(file, content)
    assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    def write_half(path, content):
        with path.open("wb") as stream:
            stream.write(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "a.json"
    file.write_text("old")
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(file, "new content")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_metrics_are_read_in_order(tmp_path):
    assert [line["step"] for line in read_metrics(log(tmp_path, LINES))] == [1, 2]
    assert read_metrics(tmp_path, strict=True) == read_metrics(tmp_path)


def test_the_end_of_the_metrics_can_be_read_alone(tmp_path):
    assert read_metrics(log(tmp_path, LINES), max_bytes=35) == [{"kind": "eval", "step": 2}]


@pytest.mark.parametrize("cut", ['{"kind": "eval", "st', b'{"sample": "\xc3'])
def test_a_last_line_that_was_cut_short_is_left_out(tmp_path, cut):
    log(tmp_path, LINES.encode() + (cut if isinstance(cut, bytes) else cut.encode()))
    assert len(read_metrics(tmp_path)) == len(read_metrics(tmp_path, strict=True)) == 2


@pytest.mark.parametrize("broken", ["[]", "7", "{", "[" * 100_000])
def test_other_broken_lines_are_left_out_or_refused(tmp_path, broken):
    log(tmp_path, f"{broken}\n{LINES}")
    assert len(read_metrics(tmp_path)) == 2
    with pytest.raises(UserError, match="line 1 is broken"):
        read_metrics(tmp_path, strict=True)


def test_missing_metrics(tmp_path):
    assert read_metrics(tmp_path) == []
    for run, problem in ((tmp_path, "has no readable"), (tmp_path / "nowhere", "is not a folder")):
        with pytest.raises(UserError, match=problem):
            read_metrics(run, strict=True)


def test_settings_are_read_by_section(tmp_path):
    (tmp_path / "config.toml").write_text("[model]\nn_layer = 2\n", encoding="utf-8")
    assert flatten(read_config(tmp_path)) == {"model.n_layer": 2}
    assert read_toml(tmp_path / "config.toml") == {"model": {"n_layer": 2}}


@pytest.mark.parametrize("content", [None, b"=", b"\xff", b"a = " + b"[" * 100_000])
def test_settings_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "config.toml").write_bytes(content)
    assert read_config(tmp_path) == {}
    with pytest.raises(UserError, match=r"config\.toml is not a readable TOML file"):
        read_toml(tmp_path / "config.toml")
