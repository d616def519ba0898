"""`train.py --eval-only` measures a checkpoint as its run did; `--profile` writes a trace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smallm.training import cli
from smallm.training.profiled import TRACE
from smallm.training.usage import matrix_flops, peak_memory

ROOT = Path(__file__).parents[2]


def measured(capsys, *argv) -> dict:
    capsys.readouterr()
    assert cli.main(["--eval-only", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def best(run: Path) -> float:
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return min(record["val_loss"] for record in records if record["kind"] == "eval")


def test_the_loss_of_the_run_again(tiny_run, capsys):
    found = measured(capsys, tiny_run)
    assert found["nats_per_char"] == pytest.approx(best(tiny_run), abs=1e-6)
    assert found["text"] == "validation.txt"
    assert measured(capsys, found["checkpoint"]) == found
    assert measured(capsys, tiny_run, "--data", tiny_run / "validation.txt") == found
    assert cli.main(["--eval-only", str(tiny_run)]) == 0
    out = capsys.readouterr().out
    assert f"{found['nats_per_char']:.4f} nats per character (cross-entropy)" in out
    assert out.count("\n") == 1


def test_a_run_on_blocks(text_file, tmp_path, capsys):
    """`validation.txt` holds the ends of the blocks, and is measured as the run measured it."""
    toy = ["--model.n_layer=1", "--model.n_head=1", "--model.n_embd=32", "--model.block_size=16", "--train.max_steps=2"]
    run = tmp_path / "run"
    assert cli.main(["--data", str(text_file), "--out", str(run), *toy, "--data.split=blocks"]) == 0
    assert measured(capsys, run)["nats_per_char"] == pytest.approx(best(run), abs=1e-6)
    text, held_out = text_file.read_text(encoding="utf-8"), (run / "validation.txt").read_text(encoding="utf-8")
    assert held_out not in text
    assert set(held_out.splitlines(keepends=True)) <= set(text.splitlines(keepends=True))


def test_another_text_and_its_encoding(tiny_run, tmp_path, capsys):
    text = "the small café sings to the moon.\n" * 20
    for encoding in ("utf-8", "latin-1"):
        (tmp_path / encoding).write_text(text, encoding=encoding)
    found = [measured(capsys, tiny_run, "--data", tmp_path / name, "--encoding", name) for name in ("utf-8", "latin-1")]
    assert found[0]["nats_per_char"] == found[1]["nats_per_char"]
    assert found[0]["characters"] == len(text) - 1


def test_the_field_of_records(tiny_run, tmp_path, capsys):
    lines = ["the small café sings to the moon.\n", "an old owl\nasks for nothing at all.\n"] * 9
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines), encoding="utf-8")
    plain = measured(capsys, tiny_run, "--data", tmp_path / "a.txt")
    records = measured(capsys, tiny_run, "--data", tmp_path / "a.jsonl", "--data.field", "body")
    assert records == plain | {"text": "a.jsonl"}
    twice = measured(capsys, tiny_run, "--data", tmp_path / "a.txt", "--data", tmp_path / "a.txt")
    assert twice["characters"] == 2 * plain["characters"] + 1


def test_mistakes(tiny_run, tmp_path, refused):
    (tmp_path / "a.txt").write_text("a")
    run = str(tiny_run)
    assert "neither a run nor a checkpoint" in refused("--eval-only", str(tmp_path))
    assert "at least 2" in refused("--eval-only", run, "--data", str(tmp_path / "a.txt"))
    assert "--eval-only measures" in refused("--eval-only", run, "--model.n_layer", "2")
    assert "--eval-only measures" in refused("--eval-only", run, "--out", "x")
    assert "--json goes with --eval-only" in refused("--json")


@pytest.mark.slow
def test_two_processes_get_the_same_loss(tiny_run):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
              str(ROOT / "configs/accelerate/cpu-2.yaml"), "--main_process_port", "0"]  # fmt: skip
    done = subprocess.run([*launch, str(ROOT / "train.py"), "--eval-only", str(tiny_run), "--json"],
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["nats_per_char"] == pytest.approx(best(tiny_run), abs=1e-5)


@pytest.mark.slow
def test_profile(text_file, tmp_path, monkeypatch):
    toy = ["--model.n_layer=1", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=16",
           "--train.max_steps=12", "--train.sample_length=0"]  # fmt: skip
    run = tmp_path / "run"
    assert cli.main(["--data", str(text_file), "--out", str(run), *toy, "--profile"]) == 0
    events = json.loads((run / TRACE).read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") for event in events if event.get("ph") == "X") == 5


def test_a_run_logs_its_use_of_the_device(tiny_run):
    records = map(json.loads, (tiny_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [record for record in records if record["kind"] == "train"]
    assert all(0 < row["mfu"] < 5 for row in rows)
    assert all(10**7 < row["memory_bytes"] < 10**12 for row in rows)


def test_the_use_of_a_device_may_be_unknown(monkeypatch):
    assert matrix_flops(torch.device("cpu"), "no") > 1e8
    monkeypatch.setattr(torch, "ones", lambda *size, **options: torch.zeros(2, 3))  # a product that is refused
    assert matrix_flops(torch.device("cpu", 0), "fp16") is None
    assert peak_memory(torch.device("cpu")) > 10**7
