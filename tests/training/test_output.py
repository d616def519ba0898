"""Training with standard streams that nobody reads, or that are full or missing: the run finishes and is saved."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from smallm.cli import main as cli_main
from smallm.errors import UserError
from smallm.training import cli
from smallm.training.output import Output

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model.n_layer": 1, "model.n_embd": 32, "model.n_head": 1, "model.block_size": 32, "train.batch_size": 4,
    "train.max_steps": 20, "train.eval_every": 10, "train.compile": "no",
}  # fmt: skip


class Broken(io.StringIO):
    """A stream that takes some characters and then fails."""

    def __init__(self, error: Exception, room: int = 0):
        super().__init__()
        self._error, self._room = error, room

    def write(self, text):
        self._room -= len(text)
        if self._room < 0:
            raise self._error
        return super().write(text)


def arguments(text_file, out) -> list[str]:
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    return ["--data", str(text_file), "--out", str(out), *flags]


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space"), ValueError("closed")])
def test_output_that_fails_is_dropped(monkeypatch, error):
    monkeypatch.setattr(sys, "stderr", Broken(error, room=5))
    output = Output("stderr")
    for line in ("abc", "defgh", "x"):
        print(line, file=output, flush=True)
    assert sys.stderr.getvalue() == "abc\n"
    assert not output.isatty()


@pytest.mark.parametrize("streams", ["broken", "full", "closed", "missing", "plain"])
def test_a_run_outlives_its_output(text_file, tmp_path, monkeypatch, streams):
    def stream():
        if streams == "closed":
            found = io.StringIO()
            found.close()
            return found
        errors = {"broken": BrokenPipeError(32, "Broken pipe"), "full": OSError(28, "No space left on device")}
        return None if streams == "missing" else Broken(errors.get(streams), room=10**9 if streams == "plain" else 300)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream())
        patch.setattr(sys, "stdout", stream())
        assert cli.main(arguments(text_file, tmp_path / "run")) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-000020").is_dir()
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sh")
@pytest.mark.parametrize("redirection", ["2>&1 | head -3", "2>/dev/full >/dev/full", "2>&- >&- <&-", "| true"])
def test_a_run_outlives_the_reader_of_its_output(text_file, tmp_path, redirection):
    command = [sys.executable, str(ROOT / "train.py"), *arguments(text_file, tmp_path / "run")]
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f'"$@" {redirection}', "-", *command],
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert (tmp_path / "run" / "checkpoints" / "step-000020").is_dir()
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_worker_thread_prints_nothing_about_signals(text_file, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=cli.main, args=(arguments(text_file, tmp_path / "run"),))
    thread.start()
    thread.join()
    found = capsys.readouterr()
    assert "signal" not in found.out + found.err
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_command_leaves_the_streams_of_its_host_alone(monkeypatch, tmp_path):
    """Also if the command fails for another reason, and if stdout has no file descriptor."""

    def fails(_argv):
        raise OSError(36, "File name too long")

    with (tmp_path / "host").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli_main.run(fails, []) == 2
        print("the host's", flush=True)
    assert (tmp_path / "host").read_text() == "the host's\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli_main.run(fails, []) == 2


def test_missing_streams_are_empty_while_a_command_runs(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    seen = []

    def command(_argv):
        seen.append((sys.stdin.read(), sys.stdout.isatty(), sys.stderr.isatty()))
        raise UserError("a mistake")

    assert cli_main.run(command, []) == 2
    assert seen == [("", False, False)]
    assert sys.stdin is sys.stdout is sys.stderr is None


@pytest.mark.parametrize(("error", "code", "message"), [
    (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("can't start new thread"), 2, "the system allows no more threads"),
    (MemoryError(), 2, "there is not enough memory"),
    (OSError(errno.ENAMETOOLONG, "Long", "xx"), 2, f"[Errno {errno.ENAMETOOLONG}] Long: 'xx'; choose a shorter name"),
])  # fmt: skip
def test_an_interrupt_or_a_limit_during_the_start_is_one_line(monkeypatch, capsys, error, code, message):
    """Also while a command imports NumPy and PyTorch, which takes most of the start."""

    def start(_: str) -> None:
        raise error

    monkeypatch.setattr(cli_main, "import_module", start)
    assert cli_main.run(cli_main.train, []) == code
    err = capsys.readouterr().err
    assert err.startswith(f"smallm: {message}")
    assert err.count("\n") == 1
