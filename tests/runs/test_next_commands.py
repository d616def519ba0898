"""The commands printed for a run do what they say, also through a shell, with any names and texts in them."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from smallm.runs.config_file import flatten, read_config
from smallm.runs.next_commands import longer_training, next_commands
from smallm.training import cli
from smallm.training.config import Config
from smallm.training.report.pages import changed_settings


@pytest.mark.parametrize("settings", [
    [],
    ["--sample.seed=a 'b' \"c\" $HOME `x` \\ \n\té\x1b", "--data=-my text;.txt", "--model.dropout=0.25"],
    ["--train.short_windows=[64, 32]", "--train.short_until=[0.2, 0.5]", "--optim.betas=[0.9, 0.99]"],
    ["--data", "a, b", "--data", "c", "--data.weights=2,1", "--data.include=*.md,a*", "--data.exclude=['x,y', 'z']"],
    ["--sample.seed=1e3", "--train.minutes=5", "--optim.learning_rate=0.00001"],
])  # fmt: skip
@pytest.mark.skipif(sys.platform == "win32", reason="the commands are quoted for cmd.exe, which runs no bash")
def test_the_command_gives_the_same_settings_through_a_shell(settings, tmp_path):
    config = cli.parse([*settings, "--out", str(tmp_path / "a")]).config
    values = flatten(config.to_dict())
    lines = next_commands(tmp_path / "it's\n& mine", values, "finished", changed=changed_settings(values))
    typed = lines["reproduce without this folder"]
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {typed}"], capture_output=True, check=True)
    python, m, smallm, train, *argv = done.stdout.decode().split("\0")[:-1]
    assert (python, m, smallm, train) == ("python", "-m", "smallm", "train")
    request = cli.parse(argv)
    assert request.config == config
    assert request.out == tmp_path / "it's\n& mine-again"
    if config.train.minutes:
        assert request.explicit >= flatten(config.to_dict()).keys()  # nothing is left to be chosen


def test_the_config_file_gives_the_same_run(tiny_run):
    lines = next_commands(tiny_run, flatten(read_config(tiny_run)), "finished", steps=60)
    request = cli.parse(shlex.split(lines["reproduce"])[4:])
    assert request.config.to_dict() == read_config(tiny_run)
    longer = cli.parse(shlex.split(lines["train for longer"])[4:])
    assert longer.config.train.max_steps == 120


def test_settings_with_their_defaults_need_no_flags():
    assert changed_settings(flatten(Config().to_dict())) == {}


@pytest.mark.parametrize(("config", "steps", "flag"), [
    ({"train.minutes": 5, "train.max_steps": 9}, 9, "--train.minutes=10"),
    ({"train.epochs": 1.5}, 9, "--train.epochs=3.0"),
    ({"train.max_steps": 0}, 9, "--train.max_steps=18"), ({}, None, "--train.max_steps=N"),
])  # fmt: skip
def test_a_longer_run_is_twice_as_long(config, steps, flag):
    longer = next_commands(Path("run"), config, "finished", steps)["train for longer"]
    assert longer == f"python -m smallm train --resume run {flag}"
    assert next_commands(Path("run"), config, "out of patience")["train for longer"].endswith(" --train.patience=0")


@pytest.mark.parametrize(("flags", "typed"), [
    ([], "--data python-docs"),
    (["--data", "my text;.txt", "--data=-b.txt"], "--data 'my text;.txt' --data ./-b.txt"),
    (["--data", "-", "--encoding", "latin-1", "--model.n_layer", "2"], "--data - --data.encoding=latin-1"),
    (["--data", "a", "--data.include", "*.md"], "--data a '--data.include=*.md'"),
    (["--data", "a", "--data.include", "*.md,*.rst", "--data.exclude", "[a]*"],
     "--data a '--data.include=*.md,*.rst' "
     "'--data.exclude=['\"'\"'[a]*'\"'\"']'"),
    (["--data", "a", "--data", "b", "--data.weights", "2,1"], "--data a --data b --data.weights=2.0,1.0"),
])  # fmt: skip
@pytest.mark.skipif(sys.platform == "win32", reason="the commands are quoted for cmd.exe")
def test_a_better_model_is_trained_on_the_same_text(flags, typed):
    config = cli.parse(flags).config
    line = longer_training(flatten(config.to_dict()), config.changed(), seconds=45)
    assert line == f"python -m smallm train {typed} --minutes 5"
    again = cli.parse(shlex.split(line)[4:]).config
    assert again.train.minutes == 5
    assert [Path(each) for each in _texts(again)] == [Path(each) for each in _texts(config)]
    assert again.data.weights == config.data.weights
    assert replace(again.data, source="", weights=()) == replace(config.data, source="", weights=())


def _texts(config):
    source = config.data.source
    return [source] if isinstance(source, str) else source


def test_a_better_model_takes_four_times_as_long_and_starts_from_the_same_model():
    config = {"data.source": "a.txt", "train.init_from": "runs/old"}
    assert longer_training(config, {}, seconds=601).endswith(" --data a.txt --init-from runs/old --minutes 41")
