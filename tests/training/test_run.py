"""smallm.training.run: locks, signals, runs killed before their first checkpoint, failing processes."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from smallm.training import cli
from smallm.training.checkpoint import manager
from smallm.training.checkpoint.format import read_state

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--model.n_layer=1", "--model.n_head=1", "--model.n_embd=32", "--model.block_size=8", "--train.batch_size=4",
         "--train.log_every=1", "--train.sample_length=0"]  # fmt: skip


def start(*argv):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


def wait_for_steps(run, process):
    log, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Signals and the lock.


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send a signal to another process")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_of_a_scheduler_or_terminal_saves(refused, text_file, tmp_path, name):
    signum = getattr(signal, name)
    run = tmp_path / "run"
    process = start("--data", str(text_file), "--out", str(run), *SMALL, "--train.max_steps=1000000",
                    "--train.eval_every=1000000")  # fmt: skip
    try:
        wait_for_steps(run, process)
        assert "is being trained by another process" in refused("--resume", str(run), "--train.max_steps=9999999")
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signum
    (saved,) = manager.checkpoints(run)
    step = read_state(saved)[0].step
    resume = f"python {ROOT / 'train.py'} --resume {run}"
    assert f"stopped by {signum.name} at step {step:,}; go on with: {resume}" in err
    assert "Traceback" not in err
    assert cli.main(["--resume", str(run), f"--train.max_steps={step + 1}"]) == 0  # the lock ended with its process


def test_a_second_process_may_not_train_the_same_run(refused, text_file, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        line = refused("--data", str(text_file), "--out", str(tmp_path / "run"), *SMALL)
    assert "is being trained by another process" in line
    assert "--out" in line


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_trains_without_a_lock(text_file, tmp_path, refused, monkeypatch, code):
    """As NFS mounts answer flock."""

    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    run = tmp_path / "run"
    assert cli.main(["--data", str(text_file), "--out", str(run), *SMALL, "--train.max_steps=2"]) == 0
    assert [folder.name for folder in manager.checkpoints(run)] == ["step-000002"]
    refused("--data", str(text_file), "--out", str(tmp_path / "new" / "run"), *SMALL, "--model.block_size=1000000")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_another_error_of_the_lock_is_one_line(text_file, tmp_path, refused, monkeypatch, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    assert "choose another --out" in refused("--data", str(text_file), "--out", str(tmp_path / "run"), *SMALL)


# Paths.


def test_a_run_folder_with_an_empty_name_is_refused(text_file, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.iterdir())
    assert "--out is empty" in refused("--data", str(text_file), "--out", "", *SMALL)
    assert list(tmp_path.iterdir()) == before


def test_a_run_folder_that_is_not_utf8_is_refused(text_file, tmp_path, refused):
    path = tmp_path / os.fsdecode(b"r\xf6m")
    assert "not valid UTF-8" in refused("--data", str(text_file), "--out", str(path), *SMALL)
    assert not path.exists()
    assert "not valid UTF-8" in refused("--resume", str(path))


def test_an_interrupted_evaluation_is_repeated(text_file, tmp_path, monkeypatch):
    """A signal interrupts a long evaluation, as a scheduler would not wait; the resumed run equals a whole one."""
    from smallm.training import evaluate

    argv = ["--data", str(text_file), *SMALL, "--train.max_steps=6", "--train.eval_every=2", "--train.patience=2"]
    assert cli.main([*argv, "--out", str(tmp_path / "straight")]) == 0

    passes, plain = [], evaluate._sum_of_nats

    def one_pass(*args):
        passes.append(True)
        if len(passes) == 2:
            signal.raise_signal(signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(evaluate, "IDS_PER_BATCH", 256)
    monkeypatch.setattr(evaluate, "_sum_of_nats", one_pass)
    run = tmp_path / "run"
    assert cli.main([*argv, "--out", str(run)]) == 143
    state, _ = read_state(manager.checkpoints(run)[-1])
    assert (state.step, state.val_loss, len(passes)) == (2, None, 2)
    monkeypatch.undo()
    assert cli.main(["--resume", str(run)]) == 0
    for ours, theirs in zip(manager.checkpoints(run), manager.checkpoints(tmp_path / "straight"), strict=True):
        a, b = read_state(ours)[0], read_state(theirs)[0]
        assert a.val_loss == pytest.approx(b.val_loss, abs=1e-6)  # the first was summed in other batches
        assert (a.step, a.best_step, a.evaluations_since_best) == (b.step, b.best_step, b.evaluations_since_best)
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


# Before the first checkpoint.


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(text_file, tmp_path):
    argv = ["--data", str(text_file), *SMALL, "--train.max_steps=4", "--train.seed=3"]
    assert cli.main([*argv, "--out", str(tmp_path / "straight")]) == 0
    run = shutil.copytree(tmp_path / "straight", tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert cli.main(["--resume", str(run)]) == 0
    ours, theirs = (manager.checkpoints(folder)[-1] / "model.safetensors" for folder in (run, tmp_path / "straight"))
    assert ours.read_bytes() == theirs.read_bytes()


# Several processes.

FAILING = """
import os, sys
sys.path.insert(0, {root!r})
from smallm.cli.main import run, train
from smallm.errors import UserError
from smallm.training.trainer import Trainer

plain = Trainer.train_step
def train_step(self, step):
    if os.environ["RANK"] == {rank!r} and step == 3:
        raise {error}
    return plain(self, step)
Trainer.train_step = train_step
raise SystemExit(run(train))
"""


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("error", ["UserError('the moon is full')", "RuntimeError('a bug of ours')"])
@pytest.mark.slow
def test_one_process_that_fails_ends_all_with_its_message(text_file, tmp_path, rank, error):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT), rank=rank, error=error))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script),
               "--data", str(text_file), "--out", str(tmp_path / "run"), *SMALL, "--train.max_steps=1000"]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    before = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode != 0
    assert time.monotonic() - before < 60
    if "moon" in error:
        printed = [line for line in done.stderr.splitlines() if line.startswith("smallm: ")]
        assert printed == ["smallm: the moon is full" if rank == "0" else "smallm: process 1: the moon is full"]
        assert "trainer.py" not in done.stderr  # no process prints a traceback
    else:
        assert done.stderr.count("RuntimeError: a bug of ours") == 1
        assert "Connection closed" not in done.stderr


# A full disk.

FULL_DISK = """
import resource, sys
sys.path.insert(0, {root!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))  # the largest size of a file, in bytes
from smallm.cli.main import run, train
raise SystemExit(run(train))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoints(tiny_run, tmp_path, name):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = {file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()}
    size = (manager.checkpoints(run)[-1] / name).stat().st_size - 100
    script = tmp_path / "script.py"
    script.write_text(FULL_DISK.format(root=str(ROOT), size=size))
    done = subprocess.run([sys.executable, str(script), "--resume", str(run), "--train.max_steps=65"], timeout=100,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"smallm: cannot write to {run}: ")
    assert f"--resume {run}" in last
    assert {file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()} == before
    assert cli.main(["--resume", str(run), "--train.max_steps=65"]) == 0  # once there is space


@pytest.mark.parametrize(("processes", "printed"), [("1", "done, shut down"), ("2", "done")])
@pytest.mark.slow
def test_several_processes_skip_pythons_shutdown(processes, printed):
    script = """
import atexit, sys
import smallm.training.run
from smallm.training import cli

smallm.training.run.run_training = lambda request, started, imports: print("done", end="") or 7
atexit.register(print, ", shut down")
sys.exit(cli.main([]))
"""
    environment = os.environ | {"WORLD_SIZE": processes}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (7, printed, "")
