"""The readers of a run's small files, and the writer that never leaves half a file."""

import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from smallm import UserError
from smallm.atomic_write import WINDOWS_WAITS, atomic_write, rename, sync
from smallm.runs.config_file import flatten, read_config, read_toml
from smallm.runs.metrics import read_metrics
from smallm.runs.summary import is_running

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


def test_windows_syncs_files_that_are_open_for_writing_and_no_folders(tmp_path, windows):
    (tmp_path / "a").write_text("a")
    sync(tmp_path / "a")
    sync(tmp_path)


@pytest.mark.parametrize("attempts", [1, 2, 9])
def test_windows_renames_a_file_as_soon_as_no_other_program_has_it_open(tmp_path, windows, monkeypatch, attempts):
    refused, replace = [], Path.replace

    def refuse(path, target):
        refused.append(path)
        if len(refused) <= attempts:
            raise PermissionError(errno.EACCES, "Access is denied")
        return replace(path, target)

    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    if attempts > len(WINDOWS_WAITS):
        with pytest.raises(PermissionError):
            rename(tmp_path / "a", tmp_path / "b")
        return
    rename(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"


def test_a_locked_run_is_running_on_windows_too(tmp_path, monkeypatch):
    asked = []

    def locking(descriptor, mode, size):
        asked.append(mode)
        if held and mode == "lock":
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK="lock", LK_UNLCK="unlock"))
    monkeypatch.setattr(sys, "platform", "win32")
    held = True
    assert not is_running(tmp_path)  # there is no lock file
    (tmp_path / ".lock").touch()
    assert is_running(tmp_path)
    held = False
    assert not is_running(tmp_path)
    assert asked == ["lock", "lock", "unlock"]


def test_metrics_are_read_in_order(tmp_path):
    assert [line["step"] for line in read_metrics(log(tmp_path, LINES))] == [1, 2]


def test_the_end_of_the_metrics_can_be_read_alone(tmp_path):
    assert read_metrics(log(tmp_path, LINES), max_bytes=35) == [{"kind": "eval", "step": 2}]


@pytest.mark.parametrize("cut", ['{"kind": "eval", "st', b'{"sample": "\xc3'])
def test_a_last_line_that_was_cut_short_is_left_out(tmp_path, cut):
    log(tmp_path, LINES.encode() + (cut if isinstance(cut, bytes) else cut.encode()))
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("broken", ["[]", "7", "{", "[" * 100_000])
def test_other_broken_lines_are_left_out(tmp_path, broken):
    log(tmp_path, f"{broken}\n{LINES}")
    assert len(read_metrics(tmp_path)) == 2


def test_missing_metrics(tmp_path):
    assert read_metrics(tmp_path) == read_metrics(tmp_path / "nowhere") == []


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
