"""A type checker accepts the right calls of the public API and reports each wrong one."""

import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
from pathlib import Path
import smallm
from smallm import GenerationConfig, LanguageModel
run = smallm.train("my.txt", minutes=5, optim={"learning_rate": 0.01})
folder: Path = smallm.export(run, precision="int8", kit="c")
smallm.export("runs/mine")
lm = LanguageModel.load("x")
text: str = lm.generate("a", 5, temperature=0.5, overflow="shift", config=GenerationConfig(stop=["a"]))
for piece in lm.stream("a", top_k=3):
    print(piece.upper())
loss: float = lm.perplexity(text).nats_per_char
"""
WRONG = (
    'lm.generate(overflow="bogus")',
    "lm.generate(topk=3)",
    "lm.generate(5)",
    'lm.stream(temperature="hot")',
    'GenerationConfig(overflow="bogus")',
    "lm.generate(stop=[1])",
    'lm.next_characters("a", "3")',
    "lm.perplexity(5)",
    'smallm.train("my.txt", minutes="5")',
    'smallm.export(run, precison="int8")',
    "smallm.export(5)",
)


@pytest.mark.slow
def test_a_type_checker_reports_the_wrong_calls_only(tmp_path):
    pytest.importorskip("mypy")
    file = tmp_path / "user.py"
    file.write_text(RIGHT + "".join(f"{call}\n" for call in WRONG), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path, file]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if line.startswith(str(file)) and "error" in line]
    lines = {int(line.split(":")[1]) for line in errors}
    first = RIGHT.count("\n") + 1
    assert lines == set(range(first, first + len(WRONG))), done.stdout
