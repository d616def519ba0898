"""Two processes on one CPU (gloo): batches, losses and weights as with one process, messages printed once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smallm.training import cli
from smallm.training.checkpoint.format import read_state
from smallm.training.checkpoint.manager import checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOY = [
    "--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=16", "--train.batch_size=8",
    "--train.log_every=1", "--train.eval_every=10", "--train.sample_length=8", "--train.mixed_precision=no",
    "--train.short_windows=[4, 8]", "--train.short_until=[0.04, 0.08]", "--train.noise=0.1",
    "--optim.learning_rate=0.01", "--optim.adam_learning_rate=0.002", "--optim.schedule=constant",
]  # fmt: skip


ACCELERATE = ["accelerate.commands.accelerate_cli", "launch", "--config_file", "configs/accelerate/cpu-2.yaml"]
FSDP = ["accelerate.commands.accelerate_cli", "launch", "--config_file", "configs/accelerate/fsdp.yaml",
        "--num_processes=2", "--mixed_precision=no"]  # fmt: skip
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(launcher, *argv, script=ROOT / "train.py"):
    """Starts train.py, or another script, in two processes, in a new process group, as a terminal does."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "LOCAL_", "WORLD_"))}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, str(script), *argv],
        cwd=ROOT, env=inherited | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def launch(launcher, *argv, script=ROOT / "train.py", text=""):
    """Runs train.py, or another script, in two processes until it ends. text: their standard input."""
    with start(launcher, *argv, script=script) as process:
        out, err = process.communicate(text, timeout=110)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_the_process_group_is_never_ended(text_file, tmp_path):
    """Its destructor waits with Python's lock for a thread of gloo; one run in about 60 waited for ever."""
    (tmp_path / "script.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from smallm.training import cli

def exit_at_once(code):
    os.write(1, b"group: %d\\n" % torch.distributed.is_initialized())
    os._exit(code)

cli._exit_at_once = exit_at_once
cli.main(sys.argv[1:])
""")
    argv = ["--data", str(text_file), "--out", str(tmp_path / "run"), *TOY, "--train.max_steps=2"]
    done = launch(TORCHRUN, *argv, script=tmp_path / "script.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("group: 1\n") == 2


def metrics(run, kind):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_two_processes_train_as_one_and_one_process_can_resume(text_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "b.txt").write_text("Another text.\n" * 99)
    toy = ["--data", str(text_file), *TOY, "--data.split=blocks", "--data.weights=1,3"]
    argv = ["--out", str(two), *toy, "--data=-", "--train.max_steps=20"]  # the main process alone reads standard input
    done = launch(ACCELERATE, *argv, text="Another text.\n" * 99)
    assert done.returncode == 0, done.stderr
    assert "2 process" in done.stderr
    assert done.stderr.count("owls.txt") == 1  # the second process is silent
    assert done.stdout.count("best validation loss") == 1
    assert read_state(checkpoints(two)[-1])[0].step == 20

    # The learning rate is constant, so a longer run by one process has to give the same result.
    assert cli.main(["--resume", str(two), "--train.max_steps=24"]) == 0
    assert cli.main(["--out", str(one), *toy, f"--data={tmp_path / 'b.txt'}", "--train.max_steps=24"]) == 0
    assert_same(two, one, 24)
    ours, theirs = ({line["step"]: line["train_loss"] for line in metrics(run, "eval")} for run in (two, one))
    assert [ours[step] for step in (10, 20)] == pytest.approx([theirs[step] for step in (10, 20)], abs=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_moves_from_fsdp_to_four_processes_and_to_one(text_file, tmp_path, optimizer):
    """FSDP2 on two processes, then DDP on four with accumulation, then one process."""
    one, moved = tmp_path / "one", tmp_path / "moved"
    steady = ["--train.short_windows=[]", "--train.short_until=[]"]  # the steps of short windows depend on max_steps
    toy = [*TOY, f"--optim.name={optimizer}", *steady]
    done = launch(FSDP, "--data", str(text_file), "--out", str(moved), *toy, "--train.max_steps=8")
    assert done.returncode == 0, done.stderr
    assert "2 process" in done.stderr
    four = [*TORCHRUN[:-1], "--nproc-per-node=4"]
    done = launch(four, "--resume", str(moved), "--train.max_steps=14", "--train.micro_batch_size=1")
    assert done.returncode == 0, done.stderr
    assert "2 x 1 sequences" in done.stderr
    assert cli.main(["--resume", str(moved), "--train.max_steps=18"]) == 0
    assert cli.main(["--data", str(text_file), "--out", str(one), *toy, "--train.max_steps=18"]) == 0
    assert_same(moved, one, 18)


def assert_same(run, other, steps):
    """Asserts that two runs took the same steps, up to the order of floating-point sums."""
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, steps + 1))
    for kind, key in (("train", "loss"), ("train", "learning_rate"), ("eval", "val_loss")):
        ours = {line["step"]: line[key] for line in metrics(run, kind)}
        theirs = {line["step"]: line[key] for line in metrics(other, kind)}
        assert ours == pytest.approx({step: theirs.get(step, value) for step, value in ours.items()}, abs=1e-4), key
    for line, theirs in zip(metrics(run, "train"), metrics(other, "train"), strict=True):
        assert line["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-3)
    ours, theirs = (load_file(checkpoints(folder)[-1] / "model.safetensors") for folder in (run, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-3, msg=lambda text, name=name: name + text)


def test_a_batch_that_two_processes_cannot_divide_is_one_line(text_file, tmp_path):
    done = launch(TORCHRUN, "--data", str(text_file), "--out", str(tmp_path / "run"), *TOY, "--train.batch_size=7")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "smallm: " in line]
    assert len(said) == 1, done.stderr
    assert "train.batch_size = 7 cannot be divided among 2 process(es)" in said[0]  # by either process
    assert "6 or 8" in said[0]
    assert "trainer.py" not in done.stderr  # no traceback of smallm; the launcher prints its own
    assert not list(tmp_path.glob("run/[!.]*"))  # the launcher may kill the process before the lock file is removed


def test_ctrl_c_under_a_launcher_saves(text_file, tmp_path):
    run = tmp_path / "run"
    endless = ["--train.max_steps=100000", "--train.eval_every=100000"]
    with start(TORCHRUN, "--data", str(text_file), "--out", str(run), *TOY, *endless) as process:
        give_up = time.monotonic() + 100
        while time.monotonic() < give_up and not ((run / "metrics.jsonl").is_file() and metrics(run, "train")):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # to all processes; the launcher forwards the signal too
        _, err = process.communicate(timeout=60)
    (saved,) = checkpoints(run)
    assert read_state(saved)[0].step > 0
    assert f"--resume {run}" in err


@pytest.mark.parametrize("launcher", [ACCELERATE, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_train_an_ensemble_as_one(text_file, tmp_path, launcher):
    """Models of 4 and 8 steps; one process goes on after the tenth step, with the same teacher."""
    one, two = tmp_path / "one", tmp_path / "two"
    toy = ["--data", str(text_file), *TOY, "--train.ensemble=2", "--train.max_steps=12", "--train.eval_every=5"]
    done = launch(launcher, "--out", str(two), *toy)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("learns from the text and from the one before") == 1
    assert cli.main(["--out", str(one), *toy]) == 0
    assert_same(two, one, 12)
    (two / "checkpoints" / "step-000012").rename(tmp_path / "last")
    assert cli.main(["--resume", str(two)]) == 0
    assert_same(two, one, 12)
