"""benchmarks/: the reference learns and scores correctly, and the scripts print correct figures."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from smallm.cli.main import run
from smallm.inference.scoring import windows
from smallm.runs.summary import read_run

ROOT = Path(__file__).parents[2]
TINY = """
[model]
n_layer = 1
n_head = 1
n_embd = 16
block_size = 80
[train]
batch_size = 4
max_steps = 2
eval_every = 2
log_every = 1
sample_length = 0
mixed_precision = "no"
"""


MODULES = {"fuzz_formats", "mutations", "peers"}  # imported by scripts, not scripts themselves


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_script_imports_and_explains_itself(script, monkeypatch, capsys):
    """--help works without the optional packages of a script, and the docstring names the command."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    if script.stem in MODULES:
        assert "not a script" in runpy.run_path(str(script))["__doc__"]
        return
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(script), run_name="__main__")
    assert not exit.value.code
    output, source = capsys.readouterr().out, script.read_text(encoding="utf-8")
    summary = source.removeprefix('"""').split("\n", 1)[0]
    assert " ".join(summary.split()) in " ".join(output.split())
    assert f"python benchmarks/{script.name}" in source


def test_quantisers_names_a_missing_package(benchmarks, monkeypatch, capsys):
    import quantisers

    monkeypatch.setitem(sys.modules, "onnxruntime.quantization.matmul_nbits_quantizer", None)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    assert run(quantisers.main, ["runs/x"]) == 2
    assert "pip install onnx-ir ml-dtypes" in capsys.readouterr().err


def test_overhead_of_generation(benchmarks, exported, text_file):
    """sampler.py separates the time inside the graph from the time outside."""
    import sampler

    model = sampler.LanguageModel.load(exported)
    found = sampler.overhead(model, text_file.read_text("utf-8"), length=8, rounds=2)
    assert found["graph"] > 0
    assert found["outside"] > 0
    assert found["characters_per_pass"] >= 1


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules nanogpt and train_speed."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import nanogpt
    import train_speed

    return nanogpt, train_speed


@pytest.fixture
def short_reference(benchmarks, monkeypatch):
    """The reference with a short warm-up and short evaluations, for short texts."""
    nanogpt, _ = benchmarks
    settings = nanogpt.Settings(n_layer=1, n_embd=32, learning_rate=1e-2, warmup_steps=3, eval_every=10, eval_batches=2)
    monkeypatch.setattr(nanogpt, "Settings", lambda: settings)
    return nanogpt


def test_reference_learns(short_reference, text_file, tmp_path, capsys):
    argv = ["--data", str(text_file), "--out", str(tmp_path), "--steps", "30"]
    assert run(short_reference.main, argv) == 0
    facts = json.loads((tmp_path / "reference.json").read_text())
    assert facts["best_estimate"] < 3  # nats; an untrained model has ln 38 = 3.6
    assert (facts["best_step"], facts["steps"]) == (30, 30)
    assert facts["characters_per_second"] == pytest.approx(12 * 64 / (facts["median_step_ms"] / 1000))
    capsys.readouterr()

    assert run(short_reference.main, [*argv, "--score"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["nats_per_char"] < 3


def test_a_run_is_scored_by_both_protocols(short_reference, tiny_run, capsys):
    assert run(short_reference.main, ["--run", str(tiny_run)]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["nats_per_char"] == pytest.approx(read_run(tiny_run).val_loss, abs=1e-4)
    error = scored["random_windows_error"]
    assert 0 < error < 0.02
    assert abs(scored["random_windows"] - scored["nats_per_char"]) < 5 * error


@pytest.mark.parametrize("length", [4000, 641 * 10])  # with a shorter last window, and without one
def test_reference_scores_every_character_once(short_reference, text_file, tmp_path, length):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text("utf-8")[:length], encoding="utf-8")
    short_reference.train(text, tmp_path, steps=3, seed=1, device="cpu")
    scored = short_reference.score_reference(text, tmp_path)

    vocab_size, train, val = short_reference.read_text(text, block_size=64)
    assert (len(train), len(val)) == (length - length // 10, length // 10)
    model = short_reference.GPT(vocab_size, short_reference.Settings())
    model.load_state_dict(short_reference.load_file(tmp_path / "model.safetensors"))
    nats = 0.0
    for ids, targets in windows([val.numpy()], 64):
        logs = model(torch.from_numpy(ids)).log_softmax(-1)
        for row, column in zip(*(targets >= 0).nonzero(), strict=True):
            nats -= logs[row, column, targets[row, column]].item()
    assert scored["nats_per_char"] == pytest.approx(nats / (len(val) - 1))
    assert (scored["characters"], scored["window"]) == (len(val) - 1, 64)


def test_reference_is_the_published_shape(benchmarks):
    nanogpt, _ = benchmarks
    settings = nanogpt.Settings()
    blocks = 4 * (12 * 128 * 128 + 2 * 128)
    model = nanogpt.GPT(65, settings)
    assert sum(p.numel() for p in model.parameters()) == 65 * 128 + 64 * 128 + blocks + 128
    assert model.flops_per_id() == 6 * (65 * 128 + 4 * 12 * 128 * 128) + 6 * 4 * 128 * 64
    rates = [settings.lr(step, 2000) for step in (0, 99, 100, 1050, 2000)]
    assert rates == pytest.approx([1e-3 / 101, 1e-3 * 100 / 101, 1e-3, 5.5e-4, 1e-4])


@pytest.mark.slow
def test_clients_of_a_server_get_the_texts_of_their_seeds(benchmarks, exported, capsys):
    import serve

    assert run(serve.measure, [str(exported), "--clients", "3", "--seconds", "0.5", "--length", "20"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["requests"] >= 3
    assert figures["wrong"] == 0


@pytest.mark.slow
def test_train_speed_end_to_end(benchmarks, text_file, tmp_path, monkeypatch, capsys):
    _, train_speed = benchmarks
    peak = {"flops_per_second": 1e11, "dtype": "float32", "device": "cpu", "name": "a CPU", "threads": 1}
    monkeypatch.setattr(train_speed.subprocess, "check_output", lambda command: json.dumps(peak))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    argv = ["--data", str(text_file), "--configs", str(config), "--seeds", "5", "--reference-steps", "3"]
    assert run(train_speed.main, argv) == 0

    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        *("run", "seed", "seconds", "step", "ms", "chars/s", "of", "peak", "parameters"), "loss@64", "ratio"
    ]  # fmt: skip
    assert len(lines) == 3
    facts = json.loads(last)
    reference, tiny = facts["rows"]
    assert (reference["name"], tiny["name"], tiny["seed"]) == ("reference", str(config), 5)
    assert tiny["ratio"] == reference["seconds"] / tiny["seconds"]
    assert lines[2].split()[-1] == f"{tiny['ratio']:.2f}"
    assert 0 < tiny["step_ms"] / 1000 < tiny["seconds"]
    assert tiny["losses"].keys() == {"64"}  # the context of 80 holds no longer window
    loss, summary = tiny["losses"]["64"], facts["configs"][str(config)]
    assert summary["losses"] == {"64": {"mean": loss, "worst": loss}}
    assert 3 < loss < 6
    assert facts["threads"] == 1
    assert facts["characters"]["validation"] == len(text_file.read_text("utf-8")) - facts["characters"]["train"]


def test_train_speed_scores_like_the_trainer(benchmarks, tiny_run, text_file):
    _, train_speed = benchmarks
    folder = train_speed.best_checkpoint(tiny_run)
    corpus = train_speed.open_text(text_file, min_count=10)
    loss = train_speed.full_loss(train_speed.load_model(folder), corpus, 32)
    state = json.loads((folder / "training_state.json").read_text("utf-8"))
    assert loss == pytest.approx(state["val_loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gpu_in_miniature(benchmarks, text_file, monkeypatch, capsys):
    """Every measurement for a GPU runs on the CPU: autocast, inductor, gloo, FSDP2, SIGKILL, NaN, the loops."""
    import gpu

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = run(gpu.main, ["--miniature", "--data", str(text_file), "--seeds", "1"])
    *lines, last = capsys.readouterr().out.splitlines()
    rows = {row["name"]: row for row in json.loads(last)["rows"]}
    assert code == 0, lines
    assert len(lines) == len(rows) + 1
    gpus = torch.cuda.device_count()
    for name, row in rows.items():
        assert not row["failed"]
        if "not run" in row["verdict"]:
            assert "fp16" in name
            assert not gpus
        else:
            assert row["characters_per_second"] > 0
            assert row["share"] > 0
            assert row["memory_mb"] > 0
            assert (row["loss"] is None) == name.endswith("loop")
    assert {"two processes, gloo", "bf16, muon, compiled", "124 M, nanogpt loop"} <= rows.keys()
    assert "equal bits" in rows["SIGKILL and resume, bf16, muon"]["verdict"]


def test_gpu_reports_failures_and_keeps_its_time(benchmarks, tmp_path):
    """A failed measurement is a line of the table, and the next one still runs, unless the time is over."""
    import gpu

    bench = gpu.Bench(gpu.MINIATURE, "nowhere.txt", minutes=1, home=tmp_path)
    bench.measure("no text", lambda row: gpu.void(bench.train(row, bench.short())))
    bench.end = 0
    bench.measure("late", lambda row: gpu.void(bench.train(row, bench.short())))
    failed, late = bench.rows
    assert failed.failed
    assert "nowhere.txt" in failed.verdict
    assert (late.failed, late.verdict) == (False, "not run: the time was over")
    assert "nowhere.txt" in gpu.format_table(bench.rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_without_a_gpu_is_one_line(benchmarks, capsys):
    import gpu

    assert run(gpu.main, []) == 2
    assert "--miniature" in capsys.readouterr().err


def test_peak(benchmarks):
    peak = benchmarks[1].gemm_peak(rounds=1)
    assert peak["flops_per_second"] > 1e8
    assert peak["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("script", "argv", "words"),
    [
        ("nanogpt", ["--data", "nowhere.txt", "--out", "out"], "nowhere.txt"),
        ("nanogpt", ["--data", "TEXT", "--out", "out", "--score"], "does not hold a model"),
        ("nanogpt", ["--data", "TEXT", "--out", "out", "--steps", "0"], "--steps 0"),
        ("train_speed", ["--data", "TEXT", "--configs", "nosuch"], "no config nosuch"),
        ("train_speed", ["--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(benchmarks, text_file, tmp_path, monkeypatch, capsys, script, argv, words):
    monkeypatch.chdir(tmp_path)
    argv = [str(text_file) if word == "TEXT" else word for word in argv]
    assert run(sys.modules[script].main, argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("smallm: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.fixture
def big_corpus(benchmarks):
    import big_corpus

    return big_corpus


@pytest.mark.parametrize("size", [1, 5000, 300_000])
def test_generated_texts_of_any_size(big_corpus, tmp_path, size):
    for name in "ab":
        big_corpus.make_text(tmp_path / name, size)
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    assert size <= len(data) < size + 4
    text = data.decode()
    assert size == 1 or 0.05 < sum(not c.isascii() for c in text) / len(text) < 0.5


def test_memory_includes_child_processes(big_corpus, tmp_path):
    program = "import time; held = b'x' * 40_000_000; time.sleep(1.5)"
    both = f"import subprocess, sys, pathlib; pathlib.Path('line').write_text('x'); c = {program!r}; " + (
        "child = subprocess.Popen([sys.executable, '-c', c]); exec(c); child.wait()"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        seen = big_corpus.watch([sys.executable, "-c", both], tmp_path, tmp_path / "log", tmp_path / "line")
    assert 80e6 < seen.peak < 160e6
    assert 0 < seen.seconds_to_line < seen.seconds
    assert seen.seconds > 1.5


def test_growth_compares_the_last_quarter_with_the_first(big_corpus):
    samples = list(enumerate([900, 10, 20, 500, 500, 500, 500, 25, 22]))
    assert big_corpus.growth(samples, since=1) == 25 - 20
    assert big_corpus.growth([], since=0) == 0


def test_big_corpus_end_to_end(big_corpus, tmp_path, monkeypatch, capsys):
    train = tmp_path / "train.py"
    train.write_text(
        "import os, sys, pathlib, time\n"
        "options = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "out = pathlib.Path(options['--out']); out.mkdir(); (out / 'metrics.jsonl').write_text('{}\\n')\n"
        "pathlib.Path(os.environ['SMALLM_CACHE'], 'corpora').mkdir(parents=True, exist_ok=True)\n"
        "held = b'x' * (10 * pathlib.Path(options['--data']).stat().st_size); time.sleep(0.1)\n"
    )
    monkeypatch.setattr(big_corpus, "TRAIN", train)
    assert run(big_corpus.main, ["--sizes", "50KB", "5MB", "--steps", "70", "--folder", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [(row["size"], row["start"], row["steps"]) for row in rows] == [
        ("50KB", "first", 20), ("50KB", "second", 20), ("5MB", "first", 20), ("5MB", "second", 20), ("5MB", "long", 70)
    ]  # fmt: skip
    assert [row["above_mb"] == 0 for row in rows] == [True, True, False, False, False]
    assert all(40 < row["above_mb"] < 60 for row in rows[2:])
    assert len(lines) == 1 + len(rows)
    assert list(tmp_path.iterdir()) == [train]  # all other files were deleted


def test_big_corpus_mistakes_are_one_line(big_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(big_corpus, "TRAIN", tmp_path / "nosuch.py")
    for argv, words in (
        (["--sizes", "4XB"], "4XB is not a size"), (["--sizes", "999999GB"], "of disk are needed"),
        (["--sizes", "1KB"], "ended with exit code"),
    ):  # fmt: skip
        assert run(big_corpus.main, [*argv, "--folder", str(tmp_path)]) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("smallm: ")
        assert words in err
