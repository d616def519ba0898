"""Fixtures that the whole suite shares: a text, and one run that was really trained on it."""

import random
from pathlib import Path

import pytest

SUBJECTS = ["the small café", "an old owl", "my naïve friend", "the river", "Zoë", "every child", "the piñata"]
VERBS = ["sings to", "remembers", "asks for", "paints", "follows", "never sees"]
OBJECTS = ["the moon", "a crème brûlée", "the long winter", "its façade", "ten euros (10 €)", "nothing at all"]


@pytest.fixture(scope="session", autouse=True)
def corpus_cache(tmp_path_factory):
    """Encoded texts stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 20,000 characters of a little grammar, some of them not ASCII; always the same."""
    rng = random.Random(7)
    lines = [f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}.\n" for _ in range(560)]
    path = tmp_path_factory.mktemp("text") / "owls.txt"
    path.write_bytes("".join(lines).encode())
    return path


@pytest.fixture(scope="session")
def tiny_run(text_file, tmp_path_factory) -> Path:
    """A finished run of 60 steps on `text_file`: 2 layers x 32, 2 heads, 1 of them for keys and values, context 32."""
    from smallm.training.cli import main

    run = tmp_path_factory.mktemp("runs") / "tiny"
    settings = {
        "model.n_layer": 2, "model.n_head": 2, "model.n_kv_head": 1, "model.n_embd": 32, "model.block_size": 32,
        "train.max_steps": 60, "train.batch_size": 16, "train.eval_every": 20,
    }  # fmt: skip
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    assert main(["--data", str(text_file), "--out", str(run), *argv]) == 0
    return run
