"""`smallm watch` follows a run folder without locks or PyTorch, and ends with the run."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from smallm.cli import main as cli
from smallm.cli import watch
from smallm.runs.summary import read_run


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(tiny_run, tmp_path / "tiny")


def make_unfinished(run: Path, state: str, steps: int = 120) -> None:
    """The folder as it is in the middle of training, without a lock."""
    record = json.loads((run / "report.json").read_text(encoding="utf-8"))
    (run / "report.json").write_text(json.dumps(record | {"state": state, "planned_steps": steps}), encoding="utf-8")
    shutil.rmtree(run / "checkpoints")


def view(run: Path, now: float | None = None) -> str:
    return "\n".join(watch.lines(read_run(run), time.time() if now is None else now, 80))


def test_a_finished_run_is_printed_once(run, capsys):
    assert cli.run(cli.watch, [str(run)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert out.startswith("finished; step 60 of 60 (100 %), ")
    assert cli.run(cli.watch, [str(run), "--once"]) == 0
    whole = capsys.readouterr().out
    assert "\x1b" not in whole
    assert f"{run}: finished" in whole
    assert re.search(r"training loss \d\.\d{4}, validation \d\.\d{4} nats = \d\.\d{3} bits per character", whole)
    assert "last sample:" in whole
    assert "next: " in whole
    assert max(map(len, whole.splitlines())) < 250


def test_the_states(run):
    make_unfinished(run, "training")
    now = read_run(run).written
    assert ": training elsewhere\n" in view(run, now + 1)
    assert ": training elsewhere, or killed, no news for 2.0 min\n" in view(run, now + 120)
    assert " s left\n" in view(run, now)
    record = json.loads((run / "report.json").read_text(encoding="utf-8")) | {"state": "interrupted"}
    (run / "report.json").write_text(json.dumps(record), encoding="utf-8")
    assert ": stopped; the run can be resumed\n" in view(run, now)
    assert " left\n" not in view(run, now)


def test_it_follows_until_the_run_ends(run, capsys, monkeypatch):
    make_unfinished(run, "training")
    record = json.loads((run / "report.json").read_text(encoding="utf-8"))
    pages, news = [], iter([70, 80])

    def sleep(seconds):
        assert seconds == 0.5
        with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            for step in news:
                file.write(json.dumps({"kind": "train", "step": step, "loss": 2.0, "seconds": 1.0 * step}) + "\n")
                return
        (run / "report.json").write_text(json.dumps(record | {"state": "interrupted"}), encoding="utf-8")

    monkeypatch.setattr(watch.time, "sleep", sleep)
    monkeypatch.setattr(watch, "plot", lambda argv: pages.append(argv))
    assert cli.run(cli.watch, [str(run), "--every", "0.5", "--html", "page.html"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"step (\d+)", line)[1] for line in lines] == ["60", "70", "80", "80"]
    assert lines[-1].startswith("stopped")
    assert pages == [[str(run), "--html", "page.html"]] * 2  # at first and at the end: no new evaluation between


def test_a_terminal_is_drawn_again_in_place(run, capsys, monkeypatch):
    monkeypatch.setattr(watch, "takes_control_codes", lambda stream: True)
    assert cli.run(cli.watch, [str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("\x1b[2J\x1b[H")
    assert out.endswith("\x1b[J")
    assert "\x1b[K\n" in out


def test_the_sample_of_a_stranger_cannot_steer_the_terminal(run):
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "eval", "step": 61, "val_loss": "x", "sample": "evil\x1b[2J\nline"}) + "\n")
        file.write(json.dumps({"kind": "train", "step": 62, "loss": 1e400, "mfu": "much", "seconds": []}) + "\n")
    shown = view(run)
    assert "\x1b" not in shown
    assert "evil\\x1b[2J\n  line" in shown


def test_the_chart():
    train = [(step, 10 - step / 20) for step in range(0, 101, 10)]
    rows = watch.chart(train, [(100, 7.0)], 40)
    assert rows[1].startswith("9.50 |.")
    assert rows[10].startswith("5.00 |")
    assert sum(row.count("o") for row in rows[:11]) == 1
    assert max(map(len, rows[:13])) <= 40
    assert watch.chart([], [], 40) == watch.chart([(5, 1.0)], [(5, 1.1)], 40) == []
    assert len(watch.chart([(1, 2.0), (2, 2.0)], [], 10)) == 14


@pytest.mark.parametrize(
    ("argv", "problem"), [(["nowhere"], "nowhere is not a run; see"), (["--every", "0"], "--every 0.0 is out of range")]
)
def test_mistakes(argv, problem, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(cli.watch, argv) == 2
    assert problem in capsys.readouterr().err
