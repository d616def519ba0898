"""benchmarks/hosts.py: output is timed when it arrives, and a host that fails is an error."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from smallm import UserError

ROOT = Path(__file__).parents[2]
SLOW = """
import sys, time
print("seed", end="", flush=True)
for character in "€uro\\n":
    time.sleep(0.2)
    print(character, end="", flush=True)
"""


@pytest.fixture
def hosts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import hosts

    return hosts


def test_characters_are_timed_when_they_arrive(hosts):
    trial = hosts.write([sys.executable, "-c", SLOW], "seed", 4)
    assert trial.text == "seed€uro"
    assert trial.start - trial.seed_seconds >= 0.19
    assert 0 < trial.speed <= 3 / 0.6 * 1.05


@pytest.mark.parametrize("code", ["print('seed')", "print('other text')", "print('seed and'); sys.exit('no model')"])
def test_a_host_without_new_text_is_an_error(hosts, code):
    with pytest.raises(UserError, match="wrote no text") as error:
        hosts.write([sys.executable, "-c", f"import sys; {code}"], "seed", 4)
    assert "\n" not in str(error.value)
    assert ("no model" in str(error.value)) == ("no model" in code)


@pytest.mark.parametrize("compiler", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_only_python_and_a_compiler_are_installed(hosts, tiny_run, monkeypatch, capsys, compiler):
    """Hosts that are not installed are named and skipped; the others write the same text."""
    which = shutil.which
    if compiler and not which("cc"):
        pytest.skip("no C compiler")
    monkeypatch.setattr(hosts.shutil, "which", lambda name: which(name) if compiler and name == "cc" else None)
    found = hosts.importlib.util.find_spec
    spec = lambda name: None if name == "onnxruntime_genai" else found(name)  # noqa: E731
    monkeypatch.setattr(hosts.importlib.util, "find_spec", spec)
    assert hosts.main([str(tiny_run), "--length", "8", "--rounds", "2"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])["hosts"]
    assert list(found) == (["Python", "C", "plain C"] if compiler else ["Python"])
    assert all(figures["same_text"] for figures in found.values())
    assert found["Python"]["to_python"] == 1
    assert found["Python"]["library_mb"] > found["Python"]["model_mb"] > 0
    assert err.count(" is skipped: it needs ") == 7 - len(found)


def test_more_than_the_context_is_refused(hosts, tiny_run, capsys):
    assert hosts.main([str(tiny_run), "--length", "100000"]) == 2
    assert "--length 100000 is out of range" in capsys.readouterr().err
    assert hosts.main([str(tiny_run / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_library_of_python_is_what_generation_imports(hosts):
    rooms = {file.relative_to(ROOT / "smallm").parts[0] for file in hosts.runtime_modules()}
    assert rooms >= {"inference", "generation", "language_model.py"}
    assert not rooms & {"training", "export", "embed"}
