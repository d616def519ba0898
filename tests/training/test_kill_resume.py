"""A dozen of the kills that benchmarks/kill_resume.py makes by the hundred."""

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
@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")
def test_a_dozen_kills_change_nothing(kill_resume):
    tallies = kill_resume.survey(kills=12, seed=5, data=None)
    assert sum(tally.kills for tally in tallies) == 12
    assert [tally.differ for tally in tallies] == [0] * 3
    assert [tally.unusable for tally in tallies] == [0] * 3


def test_what_differs_and_what_is_spoiled_is_counted(kill_resume, monkeypatch):
    """On a run that does not go on from its checkpoint, and loses those it had."""
    name = "adamw, cosine, clipping, early stopping"
    processes, settings = kill_resume.VARIANTS[name]
    monkeypatch.setitem(kill_resume.VARIANTS, name, (processes, [*settings, "--train.max_steps=20"]))

    class Forgetful(kill_resume.Killer):
        def _start(self, run):
            if run.exists():  # begins anew, with other batches
                import shutil

                shutil.rmtree(run)
                monkeypatch.setitem(kill_resume.VARIANTS, name, (1, [*settings, "--train.seed=2"]))
            return super()._start(run)

    monkeypatch.setattr(kill_resume, "Killer", Forgetful)
    monkeypatch.setattr(kill_resume, "KILLS_PER_RUN", 1)
    (tally,) = kill_resume.survey(kills=1, seed=3, data=None, variants=[name])
    assert tally.differ == tally.runs >= 1
