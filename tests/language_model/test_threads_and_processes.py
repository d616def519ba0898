"""One model in programs with threads, processes and event loops: what docs/embedding.md promises."""

import asyncio
import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from toys import message, random_model, save_onnx

from smallm import LanguageModel
from smallm.inference import processors, session
from smallm.inference.session import default_threads, layer_bytes

VARIABLES = ("ORT_DISABLE_TELEMETRY", "ORT_GQA_DISABLE_FLASH_ATTENTION")


@pytest.fixture(scope="module")
def lm(exported) -> LanguageModel:
    return LanguageModel.load(exported)


def text(lm: LanguageModel, number: int) -> str:
    return lm.generate("the ", 60, rng_seed=1, stream_number=number, overflow="shift")


def test_threads_share_a_model(lm):
    expected = [text(lm, i) for i in range(32)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda i: text(lm, i), range(32))) == expected


def test_threads_load_and_close_models_while_others_generate(lm, exported):
    """ONNX Runtime's variables are set before, so no thread sees another environment."""
    before, expected = dict(os.environ), text(lm, 0)

    def load(_: int) -> str:
        with LanguageModel.load(exported, threads=2) as other:
            assert dict(os.environ) == before
            return text(other, 0)

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(load, range(32))) == {expected}
    assert dict(os.environ) == before


def test_an_event_loop_runs_texts_in_threads(lm):
    async def texts() -> list[str]:
        return await asyncio.gather(*(asyncio.to_thread(text, lm, i) for i in range(8)))

    assert asyncio.run(texts()) == [text(lm, i) for i in range(8)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_forks_after_loading(exported, threads):
    """A loaded model works in the child, also after passes in several threads."""
    lm = LanguageModel.load(exported, threads)
    expected = text(lm, 3)
    process = os.fork()
    if not process:
        os._exit(0 if text(lm, 3) == expected else 1)
    for _ in range(600):
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            break
        time.sleep(0.05)
    else:
        os.kill(process, 9)
        pytest.fail("the child hangs")
    assert status == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))])
def test_a_model_can_be_copied_and_pickled(lm, copied):
    other = copied(lm)
    assert text(other, 0) == text(lm, 0)
    other.close()
    assert text(lm, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_stream_is_branched_not_copied(lm, copied):
    stream = lm.stream("the ", 10)
    assert "branch" in message(copied, stream)
    assert next(stream)


@pytest.mark.slow
def test_a_thousand_texts_leave_the_memory_flat(lm):
    """Twenty different texts, as rows of the draft table are built when a text first needs them."""
    held = []
    tracemalloc.start()
    for number in range(1020):
        lm.generate("a", 10, rng_seed=number % 20)
        if number in (19, 1019):
            gc.collect()  # texts hold cycles, which live until Python looks for them
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] - held[0] < 200_000  # the cache of a single text takes more


def test_an_idle_model_uses_no_processor_time(exported):
    with LanguageModel.load(exported, threads=2) as lm:
        text(lm, 0)
        time.sleep(0.2)  # ONNX Runtime's threads spin for a while before they sleep
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.1


# -- the environment


def python(code: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name not in VARIABLES} | environment
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, env=variables, timeout=100
    ).stdout


SHOW = f"""
import json, os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(json.dumps([os.environ.get(name) for name in {VARIABLES!r}]))
sys.meta_path.insert(0, Watch())
import smallm.language_model
"""


@pytest.mark.parametrize(("given", "seen"), [({}, ["1", "1"]), ({VARIABLES[0]: "0", VARIABLES[1]: "0"}, ["0", "0"])])
def test_variables_of_onnxruntime_are_set_before_the_import_unless_the_user_did(given, seen):
    assert json.loads(python(SHOW, **given)) == seen


@pytest.mark.slow
def test_generating_looks_up_no_host_and_writes_nothing(exported, tmp_path):
    """Python's audit events cannot see ONNX Runtime's C++ code, so the home folder is compared too."""
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import sys
sys.addaudithook(lambda event, args: print(event, args) if event.startswith("socket.") else None)
from smallm import LanguageModel
LanguageModel.load({str(exported)!r}).generate("a", 200)
"""
    before = sorted(path.name for path in exported.rglob("*"))
    assert python(code, HOME=str(home), XDG_CACHE_HOME=str(home / "cache"), PYTHONDONTWRITEBYTECODE="1") == ""
    assert list(home.rglob("*")) == []
    assert sorted(path.name for path in exported.rglob("*")) == before


# -- the number of threads


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Eight processors in the affinity mask, and a tree of cgroups in which this process is in /a/b."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(processors, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(processors, "MEMBERSHIP", tmp_path / "self")
    (tmp_path / "self").write_text("4:cpu,cpuacct:/a/b\n0::/a/b\n")

    def write(name: str, content: str) -> None:
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return write


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/a/b/cpu.cfs_quota_us": "200000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu.max": "nonsense", "a/cpu.max": "0 0", "a/b/cpu.max": ""}, 8),
    ],
)
def test_a_quota_bounds_the_processors(cgroups, files, expected):
    for name, content in files.items():
        cgroups(name, content)
    assert processors.usable_processors() == expected


def test_affinity_bounds_the_processors_and_threads(cgroups, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for allowed, threads in ((1, 1), (2, 2), (3, 2), (6, 3), (8, 4), (32, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=allowed: set(range(n)))
        assert (processors.usable_processors(), default_threads(10**7), default_threads(10**5)) == (allowed, threads, 1)


def test_without_affinity_all_processors_count(cgroups, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processors.usable_processors() == 1


@pytest.mark.parametrize("settings", [{}, {"n_embd": 128, "block_size": 512}])
def test_layer_bytes_are_the_weights_of_a_layer(settings, tmp_path):
    """Without the embedding and the tables with a row per id or position."""
    model = random_model(**settings)
    path = save_onnx(model, tmp_path / "model.onnx")
    weights = 4 * sum(p.numel() for p in model.h[1].parameters())
    if model.vocab_size <= 4 * model.config.n_embd:  # the first layer's projection is a table
        weights -= 4 * model.h[0].attn.c_attn.weight.numel() // 2
    opened = session.Session(path)
    assert opened.layer_bytes == layer_bytes(path.stat().st_size, opened.manifest)
    assert abs(opened.layer_bytes - weights) < 0.15 * weights
