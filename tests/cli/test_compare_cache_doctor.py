"""The small commands `smallm compare`, `smallm cache`, `smallm doctor`, and the filters of `smallm runs`."""

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from test_imports import HEAVY, python

from smallm.cli import cache, doctor
from smallm.cli import main as cli


@pytest.fixture
def runs(tiny_run, tmp_path) -> Path:
    """Two runs that differ in a setting and in the loss."""
    for name in ("a", "b"):
        shutil.copytree(tiny_run, tmp_path / name)
    config = tmp_path / "b" / "config.toml"
    config.write_text(config.read_text(encoding="utf-8").replace("batch_size = 16", "batch_size = 99"))
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    with (tmp_path / "b" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "eval", "step": 60, "val_loss": 0.5}) + "\n")
    return tmp_path


def output(capsys, command, *argv) -> str:
    assert cli.run(command, list(map(str, argv))) == 0
    return capsys.readouterr().out


def names(text: str) -> list[str]:
    return [run["name"] for run in json.loads(text)]


def test_runs_are_sorted_and_filtered(runs, capsys):
    listed = [runs, "--json"]
    assert names(output(capsys, cli.runs, *listed, "--sort", "loss")) == ["b", "a"]
    assert names(output(capsys, cli.runs, *listed, "--sort", "name")) == ["a", "b"]
    for key in ("newest", "time", "steps", "size"):
        assert sorted(names(output(capsys, cli.runs, *listed, "--sort", key))) == ["a", "b"]
    assert names(output(capsys, cli.runs, *listed, "--state", "finished")) == ["a"]
    assert names(output(capsys, cli.runs, *listed, "--filter", "OWLS", "--sort", "name")) == ["a", "b"]
    assert cli.run(cli.runs, [str(runs), "--filter", "nothing"]) == 0
    assert "none of the 2 runs" in capsys.readouterr().err


def test_compare(runs, capsys, tmp_path):
    text = output(capsys, cli.compare, runs / "a", runs / "b")
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["a", "b"]
    assert ["train.batch_size", "16", "99"] in lines
    assert not any(line[:1] == ["model.n_layer"] for line in lines)
    values = json.loads(output(capsys, cli.compare, runs / "a", runs / "b", "--json"))
    assert values["settings"] == {"train.batch_size": [16, 99]}
    assert [run["name"] for run in values["runs"]] == ["a", "b"]
    assert "All runs have the same settings." in output(capsys, cli.compare, runs / "a", runs / "a")
    page = tmp_path / "page.html"
    assert str(page) in output(capsys, cli.compare, runs / "a", runs / "b", "--html", page)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert cli.run(cli.compare, [str(runs / "a")]) == 2
    assert "needs two runs" in capsys.readouterr().err


def test_cache_is_measured_and_cleared(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))
    assert json.loads(output(capsys, cli.cache, "--json"))["bytes"] == dict.fromkeys(cache.KINDS, 0)
    (tmp_path / "cache" / "corpora" / "x").mkdir(parents=True)
    (tmp_path / "cache" / "corpora" / "x" / "ids").write_bytes(b"12345")
    (tmp_path / "cache" / "kernels-1.so").write_bytes(b"123")
    (tmp_path / "cache" / "mine.txt").write_text("not smallm's")
    (tmp_path / "cache" / "stdin").mkdir()
    (tmp_path / "cache" / "stdin" / "1.txt").write_bytes(b"12")
    found = json.loads(output(capsys, cli.cache, "--json"))
    assert found["bytes"] == {"texts": 5, "downloads": 0, "compiled": 3, "stdin": 2}
    assert "deleted: compiled" in output(capsys, cli.cache, "--clear", "compiled")
    assert (tmp_path / "cache" / "corpora" / "x" / "ids").exists()
    output(capsys, cli.cache, "--clear")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["mine.txt", "stdin"]
    output(capsys, cli.cache, "--clear", "stdin")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["mine.txt"]


def test_doctor_knows_the_extras_for_users():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name, packages in doctor.EXTRAS.items():
        declared = [requirement for requirement in project["optional-dependencies"][name]
                    if sys.version_info < (3, 14) or "python_version" not in requirement]  # fmt: skip
        assert [re.match(r"[\w-]+", requirement)[0] for requirement in declared] == list(packages)
    assert set(project["optional-dependencies"]) - set(doctor.EXTRAS) == {"test", "dev", "hosts"}


@pytest.mark.slow
def test_doctor(capsys, monkeypatch):
    values = json.loads(output(capsys, cli.doctor, "--json"))
    assert values["packages"]["torch"] != "missing"
    assert values["works"]["generate"] == "yes"
    assert values["devices"]["cpu"] == "yes"
    text = output(capsys, cli.doctor)
    assert "kernels" in text
    assert "cache" in text
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._compiler().startswith(("missing", "not used"))


@pytest.mark.slow
def test_doctor_on_the_base_install():
    code = "from smallm.cli.main import run, doctor; raise SystemExit(run(doctor, ['--json']))"
    hidden = f"import importlib.metadata as m; old = m.version\ndef version(name):\n    if name in {HEAVY!r}:\n" \
             "        raise m.PackageNotFoundError(name)\n    return old(name)\nm.version = version\n"  # fmt: skip
    done = python(hidden + code, blocked=HEAVY)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["works"]["kernels"] == "no: PyTorch is not installed"
