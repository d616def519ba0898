"""Fixtures that the whole suite shares: a text, and one run that was really trained on it."""

import errno
import os
import random
import signal
from pathlib import Path

import pytest
from hypothesis import settings

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # threads that outnumber the cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# A slow machine must not fail a test, and the same code always meets the same examples. `--hypothesis-profile explore`
# draws new ones.
settings.register_profile("explore", deadline=None)
settings.register_profile("smallm", deadline=None, derandomize=True)
settings.load_profile("smallm")

SLOW_FIXTURES = {"sanitized", "inner", "chromium", "node", "read_tensorboard"}


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items):
    """Tests that need a sanitized C program, Node, a browser or TensorBoard are slow."""
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


def pytest_make_parametrize_id(val):
    """Bytes are not part of a test's name: `gzip.compress` writes the time, and workers must agree on each name."""
    return "bytes" if isinstance(val, bytes) else None


SUBJECTS = ["the small café", "an old owl", "my naïve friend", "the river", "Zoë", "every child", "the piñata"]
VERBS = ["sings to", "remembers", "asks for", "paints", "follows", "never sees"]
OBJECTS = ["the moon", "a crème brûlée", "the long winter", "its façade", "ten euros (10 €)", "nothing at all"]


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """Signals are handled as in a terminal; a shell makes its background jobs ignore SIGINT, and `nohup` SIGHUP."""
    usual = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    for name, handler in usual.items():
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum is not None and signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, handler)


@pytest.fixture(scope="session", autouse=True)
def fp32():
    """`mixed_precision = auto` means fp32 in the tests of this process, also on processors that are faster in bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smallm.training.precision.MAX_BF16_TIME", 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def corpus_cache(tmp_path_factory):
    """Encoded texts stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_charts():
    """Runs draw no charts, which would take longer than the training of a tiny model. Returns what draws them."""
    from smallm.training.report import pages, plot

    drawing = {"smallm.training.report.plot.plot_runs": plot.plot_runs,
               "smallm.training.report.pages.page_charts": pages.page_charts}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, drawn in zip(drawing, (lambda runs, out: out, lambda runs: ""), strict=True):
            patch.setattr(name, drawn)
        yield drawing


@pytest.fixture
def charts(no_charts, monkeypatch):
    """Runs draw charts, as outside of the tests."""
    for name, function in no_charts.items():
        monkeypatch.setattr(name, function)


@pytest.fixture
def windows(monkeypatch):
    """Lets `os.open` and `os.fsync` refuse what Windows refuses: folders, and descriptors that cannot write."""
    opened, real_open, real_sync = {}, os.open, os.fsync

    def open_file(path, flags, *rest, **options):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        descriptor = real_open(path, flags, *rest, **options)
        opened[descriptor] = flags
        return descriptor

    def synced(descriptor):
        if not opened.get(descriptor, os.O_RDWR) & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real_sync(descriptor)

    monkeypatch.setattr("smallm.atomic_write.WINDOWS", True)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", synced)


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
        "model.rope_theta": 10000.0, "train.max_steps": 60, "train.batch_size": 16, "train.eval_every": 20,
        "optim.warmup_steps": 10, "optim.decay_fraction": 0.6, "optim.weight_decay": 0.0,
        "optim.adam_learning_rate": 0.005,
    }  # fmt: skip
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    assert main(["--data", str(text_file), "--out", str(run), *argv]) == 0
    return run


@pytest.fixture
def refused(capsys):
    """Runs `train.py` with arguments that it must refuse, and returns the one line that it says about them."""
    from smallm.cli.main import run, train

    def refused(*argv: str) -> str:
        capsys.readouterr()
        code = run(train, argv)
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.startswith("smallm: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        return err.rstrip("\n")

    return refused


@pytest.fixture(scope="session")
def exported(tiny_run, tmp_path_factory) -> Path:
    """The export folder of `tiny_run`; not inside it."""
    from smallm.export.folder import export_checkpoint
    from smallm.training.checkpoint.manager import best_checkpoint

    out = tmp_path_factory.mktemp("exported") / "tiny"
    export_checkpoint(best_checkpoint(tiny_run), out)
    return out
