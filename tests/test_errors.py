"""Messages name the next command in the form in which the user started smallm, quoted for the shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smallm.errors import UserError, command, missing_package, pip_install, quoted
from smallm.language_model import find_model
from smallm.runs.next_commands import next_commands

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("started", "export", "plot"), [
    ("/usr/bin/smallm", "smallm export", "smallm plot"),
    ("smallm.exe", "smallm export", "smallm plot"),
    (str(ROOT / "smallm" / "__main__.py"), "python -m smallm export", "python -m smallm plot"),
    ("train.py", "python export.py", "python -m smallm plot"),
    (str(ROOT / "infer.py"), f"python {ROOT / 'export.py'}", "python -m smallm plot"),
    ("elsewhere/train.py", "python -m smallm export", "python -m smallm plot"),  # a program of the user
    ("", "python -m smallm export", "python -m smallm plot"),
])  # fmt: skip
def test_the_form_of_the_started_program(started, export, plot, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [started, "--seed", "x"])
    assert (command("export"), command("plot")) == (export, plot)
    assert command("export", Path("my run"), "--out", "b") == f"{export} {quoted('my run')} --out b"


@pytest.mark.slow
@pytest.mark.parametrize(("start", "shown"), [
    (["-m", "smallm", "infer"], "python -m smallm train"),
    ([str(ROOT / "infer.py")], f"python {ROOT / 'train.py'}"),
])  # fmt: skip
def test_a_message_of_a_process(start, shown, tmp_path):
    done = subprocess.run([sys.executable, *start, "--seed", "x"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stderr == f"smallm: no run found in runs/; name a folder, or train one with: {shown}\n"


def test_paths_in_messages_are_quoted(tmp_path):
    run = tmp_path / "my run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        find_model(run)
    assert str(error.value).endswith(f"run: {quoted('python', '-m', 'smallm', 'export', str(run))}")


def test_quoting_on_windows(monkeypatch):
    """cmd.exe knows no single quotes."""
    monkeypatch.setattr("sys.platform", "win32")
    line = quoted("python", "train.py", "--resume", "C:\\Users\\Zoë Q\\runs\\a", "--out", "runs\\b")
    assert pip_install("smallm[train]") == "pip install smallm[train]"
    assert line == 'python train.py --resume "C:\\Users\\Zoë Q\\runs\\a" --out runs\\b'


@pytest.mark.skipif(sys.platform == "win32", reason="test_quoting_on_windows")
def test_quoting():
    assert quoted("a", "b c", "", "x\ny'") == "a 'b c' '' $'x\\ny\\''"
    assert pip_install("smallm[train]") == "pip install 'smallm[train]'"
    assert str(missing_package("serve", "uvicorn", "serve")).endswith("install it with: pip install 'smallm[serve]'")
    assert str(missing_package("infer", "numpy")).endswith("'numpy'; install it with: pip install smallm")
    assert next_commands(Path("-run"), {}, "")["resume"] == "python -m smallm train --resume ./-run"
