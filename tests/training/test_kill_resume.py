"""A dozen kills by benchmarks/kill_resume.py, which makes hundreds of them."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def kill_resume(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import kill_resume

    return kill_resume


@pytest.mark.timeout(580)
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark looks for processes in /proc")
def test_a_dozen_kills_change_nothing(kill_resume):
    tallies = kill_resume.measure(kills=12, seed=5, data=None)
    assert sum(tally.kills for tally in tallies) == 12
    assert [tally.differ for tally in tallies] == [0] * 3
    assert [tally.unusable for tally in tallies] == [0] * 3


def test_runs_that_differ_and_unusable_checkpoints_are_counted(kill_resume, monkeypatch):
    """With a run that starts anew instead of resuming, and loses its checkpoints."""
    name = "adamw, cosine, clipping, early stopping"
    processes, settings = kill_resume.VARIANTS[name]
    monkeypatch.setitem(kill_resume.VARIANTS, name, (processes, [*settings, "--train.max_steps=20"]))

    class Forgetful(kill_resume.Killer):
        def _start(self, run):
            if run.exists():  # starts anew, with other batches
                import shutil

                shutil.rmtree(run)
                monkeypatch.setitem(kill_resume.VARIANTS, name, (1, [*settings, "--train.seed=2"]))
            return super()._start(run)

    monkeypatch.setattr(kill_resume, "Killer", Forgetful)
    monkeypatch.setattr(kill_resume, "KILLS_PER_RUN", 1)
    (tally,) = kill_resume.measure(kills=1, seed=3, data=None, variants=[name])
    assert tally.differ == tally.runs >= 1
