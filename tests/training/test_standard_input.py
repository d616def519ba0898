"""`--data -`: standard input is stored once, and the run refers to the stored file."""

import io
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from toys import message

from smallm.training import cli
from smallm.training.checkpoint.manager import checkpoints
from smallm.training.config import DataConfig
from smallm.training.run import with_stored_input

TOY = ["--model.n_layer=1", "--model.n_head=1", "--model.n_embd=32", "--model.block_size=16", "--train.sample_length=0"]
TEXT = "Standard input: naïve and “quoted”.\n" * 99


@pytest.fixture
def piped(tmp_path, monkeypatch):
    """Lets standard input hold a text, once."""
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def piped(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))

    return piped


def test_a_run_and_its_resume(piped):
    Path("a.txt").write_text(TEXT, encoding="utf-8", newline="")
    for name, data in (("piped", "-"), ("file", "a.txt")):
        piped(TEXT)
        assert cli.main(["--data", data, "--out", name, *TOY, "--train.max_steps=2"]) == 0
        piped("")
        assert cli.main(["--resume", name, "--train.max_steps=4"]) == 0  # the text need not be piped again
    one, other = (checkpoints(Path(name))[-1] / "model.safetensors" for name in ("piped", "file"))
    assert one.read_bytes() == other.read_bytes()


def test_beside_other_texts_and_twice(piped):
    piped(TEXT)
    data = with_stored_input(Accelerator(cpu=True), DataConfig(("a.txt", "-"), weights=(1.0, 2.0)))
    assert data.source[0] == "a.txt"
    assert Path(data.source[1]).read_text(encoding="utf-8") == TEXT
    assert with_stored_input(Accelerator(cpu=True), data) == data
    piped(TEXT)
    assert with_stored_input(Accelerator(cpu=True), DataConfig("-")).source == data.source[1]  # the same text, one file


def test_a_terminal_and_a_cache_that_cannot_be_written(piped, monkeypatch):
    piped(TEXT)
    Path("cache").write_text("a file where the folder should be")
    assert message(with_stored_input, Accelerator(cpu=True), DataConfig("-")).startswith("cannot write to ")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "is a terminal" in message(with_stored_input, Accelerator(cpu=True), DataConfig("-"))
