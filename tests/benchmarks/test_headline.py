"""benchmarks/headline.py: the programs run on separate cores, series go on, table and picture show the means."""

import json
import os
from pathlib import Path

import pytest

from smallm.cli.main import run
from smallm.runs.summary import read_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def headline(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import headline

    return headline


def pair(headline, minutes, seed):
    """Made-up results: the loss falls with the time."""
    reference = headline.Result("nanoGPT", minutes, seed, 60 * minutes, 10, {"64": 2.5 / minutes + seed})
    return [reference, headline.Result("smallm", minutes, seed, 61.0, 20, {"64": 2.0 / minutes, "128": 1.5 / minutes})]


def test_a_series_goes_on_and_prints_means(headline, monkeypatch, tmp_path, capsys, charts):
    text, results, picture = tmp_path / "text.txt", tmp_path / "results.jsonl", tmp_path / "loss.svg"
    text.write_text("a line of text\n" * 100)
    runs = []
    monkeypatch.setattr(headline, "warm_up", lambda text, home: None)
    monkeypatch.setattr(headline, "seconds_per_step", lambda text, home: (4.0, 0.5))

    def run_pair(text, home, minutes, seed, steps):
        runs.append((minutes, seed, steps))
        return pair(headline, minutes, seed)

    monkeypatch.setattr(headline, "run_pair", run_pair)
    arguments = ["--data", str(text), "--results", str(results), "--seeds", "1", "2"]
    assert run(headline.main, [*arguments, "--minutes", "1"]) == 0
    assert runs == [(1, 1, 112), (1, 2, 112)]  # (60 s - 4 s) / 0.5 s
    assert run(headline.main, [*arguments, "--minutes", "1", "2", "--picture", str(picture)]) == 0
    assert [minutes for minutes, _, _ in runs] == [1, 1, 2, 2]
    assert len(results.read_text().splitlines()) == 8
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:5] == ["2", "2", "2.7500", "0.7500", "1.0000"]  # means over seeds; windows of the context, then of 64
    assert ">2.75<" in picture.read_text()


def test_the_programs_run_on_separate_cores(headline, tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    first, second = headline.halves()
    assert len(first) == len(second) >= 1
    assert not first & second
    for cores in (first, second):
        out = tmp_path / "cores.json"
        program = ("import json, os, sys; facts = sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS']; "
                   "json.dump(facts, open(sys.argv[1], 'w'))")  # fmt: skip
        headline.seconds_of(["-c", program, str(out)], cores, tmp_path)
        assert json.loads(out.read_text()) == [sorted(cores), str(len(cores))]


@pytest.mark.slow
def test_a_pair_of_runs(headline, monkeypatch, tmp_path):
    """Real processes of a few seconds; the loss of a run is the one that the run itself reports."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(3000)))
    headline.warm_up(text, tmp_path)
    reference, ours = headline.run_pair(text, tmp_path, 0.4, 1, 30)
    assert set(reference.losses) == {"64"}
    assert 0.5 < reference.best() < 4.2
    assert ours.best() == pytest.approx(read_run(tmp_path / "smallm-0.4-1").val_loss, abs=0.002)  # bf16 in the run
    assert min(reference.seconds, ours.seconds) > 1
