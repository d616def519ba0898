"""The messages that docs/troubleshooting.md explains are printed word for word for the mistakes that they describe."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from smallm.cli import main as cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = [row[1] for row in re.finditer(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)]
TINY = ["--train.max_steps", "2", "--train.sample_length", "0", "--model.n_layer", "1", "--model.n_embd", "32",
        "--model.n_head", "2"]  # fmt: skip
MISTAKES = {  # the beginning of the message -> program, arguments
    "no run found": (cli.infer, "--seed x"),
    "there is no file or folder": (cli.train, "--data shakspeare"),
    "my.txt is not valid": (cli.train, "--data my.txt"),
    "the training part": (cli.train, "--data my.txt"),
    "unrecognized": (cli.train, "--data my.txt --model.n_layers 4"),
    "model.n_embd": (cli.train, "--data my.txt --model.n_embd 100 --model.n_head 3"),
    "runs/mine already": (cli.train, "--data my.txt --out runs/mine"),
    "runs/mine is finished": (cli.train, "--resume runs/mine"),
    "runs/mine is not exported": (cli.infer, "--model runs/mine"),
    "train needs": (None, "--data my.txt"),
}


def program_without_torch(argv: list[str]) -> int:
    code = "import sys; sys.modules['torch'] = None; from smallm.cli.main import run, train; sys.exit(run(train))"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


def test_the_page_explains_ten_errors():
    assert len(MESSAGES) == len(MISTAKES) == 10
    for beginning in MISTAKES:
        assert sum(message.startswith(beginning) for message in MESSAGES) == 1, beginning


@pytest.mark.parametrize("beginning", MISTAKES)
def test_a_mistake_says_what_the_page_explains(tmp_path, monkeypatch, capsys, beginning):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = "caf\xe9 " * 100 if beginning.startswith("my.txt") else "a short text " * (
        10 if beginning.startswith("the training") else 400)
    Path("my.txt").write_bytes(text.encode("latin-1"))
    if beginning.startswith("runs/mine"):
        assert cli.run(cli.train, ["--data", "my.txt", "--out", "runs/mine", *TINY]) == 0
        capsys.readouterr()
    program, arguments = MISTAKES[beginning]
    argv = arguments.split()
    code = cli.run(program, argv) if program else program_without_torch(argv)
    said = capsys.readouterr().err.splitlines()[-1]
    (message,) = (each for each in MESSAGES if each.startswith(beginning))
    message = re.sub(r"python (\w+)\.py", r"python -m smallm \1", message)  # the form of a program such as pytest
    assert code == 2
    assert re.fullmatch("smallm: " + re.escape(message).replace(r"\.\.\.", ".*"), said), said
