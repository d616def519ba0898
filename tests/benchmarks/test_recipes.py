"""benchmarks/recipes.py: equal compute, texts without the validation tail, series that go on, and the verdict."""

import gzip
from pathlib import Path

import pytest

from smallm.cli.main import run

ROOT = Path(__file__).parents[2]
CONFIG = """
[model]
n_layer = 2
n_head = 2
n_embd = 64
block_size = 64
[train]
batch_size = 4
max_steps = 100
"""


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import recipes

    return recipes


@pytest.fixture
def series(recipes, tmp_path, monkeypatch):
    """Runs a series of recipes.py whose losses come from a function of the flags; returns the flags of its runs."""
    (tmp_path / "config.toml").write_text(CONFIG)
    monkeypatch.setattr(recipes, "JUDGE", 500)
    arguments = ["--config", str(tmp_path / "config.toml"), "--results", str(tmp_path / "results.jsonl"),
                 "--texts", "python", "--characters", "2000"]  # fmt: skip

    def series(loss, *more):
        runs = []
        monkeypatch.setattr(recipes, "train", lambda text, flags: runs.append(flags) or loss(" ".join(flags)))
        return run(recipes.main, [*arguments, *more]), runs

    return series


def test_variants_have_equal_compute(recipes, series):
    variants = ["--variant", "batch", "train.batch_size=8", "--variant", "wide", "model.n_embd=128",
                "--variant", "taught", "train.ensemble=2", "--seeds", "1"]  # fmt: skip
    _, runs = series(lambda flags: 1.0, *variants)
    steps = [next(int(flag.split("=")[1]) for flag in flags if "max_steps" in flag) for flags in runs]
    assert steps[:2] == [100, 50]
    assert 25 < steps[2] < 50  # four times the products, but the attention and the vocabulary grow twofold
    assert steps[3] == 82  # two thirds of the steps take a third longer, for the teacher's forward pass


def test_a_series_goes_on_after_a_failure(series, tmp_path, capsys):
    """Losses in the file are not measured again, even if its last line was cut off."""
    def fails_at_seed_2(flags):
        return 1 / 0 if "seed=2" in flags else 1.5

    with pytest.raises(ZeroDivisionError):
        series(fails_at_seed_2, "--variant", "x", "optim.weight_decay=1")
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"variant": "x", "lo')
    code, runs = series(lambda flags: 1.5, "--variant", "x", "optim.weight_decay=1")
    assert code == 0
    assert [[flag for flag in flags if "seed" in flag] for flags in runs] == [["--train.seed=2"]] * 2
    assert series(lambda flags: 1.5, "--variant", "x", "optim.weight_decay=1") == (0, [])


def test_pays_only_if_every_seed_gains_on_every_text(recipes):
    losses = {(v, t, s): 1.0 for v in (recipes.BASE, "good", "mixed") for t in "ab" for s in (1, 2)}
    losses |= {("good", t, s): 0.98 - 0.01 * s for t in "ab" for s in (1, 2)}
    losses |= {("mixed", t, s): 0.9 for t in "ab" for s in (1, 2)} | {("mixed", "b", 2): 1.001}
    lines = recipes.format_table(losses, "ab", (1, 2)).splitlines()
    assert lines[1].split() == ["good", *["+0.0350", "±", "0.0050"] * 2, "yes"]
    assert lines[2].split() == ["mixed", "+0.1000", "±", "0.0000", "+0.0495", "±", "0.0505", "no"]


def test_texts(recipes, tmp_path, monkeypatch, text_file):
    """The validation tail of Shakespeare is never part of a text; manual pages are unpacked."""
    monkeypatch.setattr(recipes, "JUDGE", 100)
    open_corpus = recipes.open_corpus
    data = recipes.DataConfig(str(text_file))
    monkeypatch.setattr(recipes, "open_corpus", lambda data_, progress: open_corpus(data, progress=False))
    text, corpus = text_file.read_text(), open_corpus(data, progress=False)
    built = recipes.build_text("shakespeare", 1000, tmp_path)
    assert built == text[:1000] + text[: corpus.train_characters][-100:]

    (tmp_path / "man1").mkdir()
    for name in ("a", "b"):
        (tmp_path / "man1" / f"{name}.1.gz").write_bytes(gzip.compress(f"頁{name}".encode() * 400))
    assert set(recipes.build_text("manuals", 700, tmp_path)) == set("頁ab")
    with pytest.raises(recipes.UserError, match="manuals has 1,600 characters"):
        recipes.build_text("manuals", 1600, tmp_path)


def test_a_failed_run_is_reported_with_its_message(recipes, text_file):
    with pytest.raises(recipes.UserError, match="n_head"):
        recipes.train(text_file, ["--model.n_embd=33"])
