"""`smallm.train`: the trainer from a program, a notebook or a worker thread."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_imports import HEAVY, python

import smallm
from smallm.training import cli
from smallm.training.config import KEYS

MODEL = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 8}
FP32 = {"mixed_precision": "no"}  # with auto, each process measures whether bf16 is faster
TRAIN = {"batch_size": 4, "max_steps": 6, "eval_every": 3, "log_every": 1, "sample_length": 0}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train(text_file):
    """`smallm.train` with a toy model on a small text; `train_settings` replace single settings."""

    def train(train_settings=(), **options):
        return smallm.train(text_file, model=MODEL, train=TRAIN | dict(train_settings), **options)

    return train


def losses(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["kind"], line["step"], line.get("loss"), line.get("val_loss")) for line in lines]


def test_the_slurm_file_starts_train_py(train, text_file):
    run = train(out="run")
    flags = [f"--model.{name}={value}" for name, value in MODEL.items()]
    flags += [f"--train.{name}={value}" for name, value in TRAIN.items()]
    assert cli.main(["--data", str(text_file), "--out", "same", *flags]) == 0
    assert losses("run") == losses("same")
    assert isinstance(run, smallm.Run)
    assert (run.path, run.state, run.step) == (Path("run"), "finished", 6)
    assert run.best_checkpoint.is_dir()
    evaluations = [record["val_loss"] for record in run.metrics if record["kind"] == "eval"]
    assert run.val_loss == min(evaluations)
    assert run.config["model"]["n_embd"] == 32


def test_from_a_worker_thread(train):
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, out="run").result(timeout=60)
    assert run.state == "finished"
    assert signal.getsignal(signal.SIGINT) is before


def test_one_training_at_a_time(train, monkeypatch):
    begin, end = threading.Event(), threading.Event()

    def run_training(request, started, imports, last):
        request.out.mkdir()
        begin.set()
        end.wait(60)
        return 0

    monkeypatch.setattr("smallm.training.run.run_training", run_training)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(train, out="a")
        assert begin.wait(60)
        try:
            with pytest.raises(smallm.UserError, match="another training is running in this process"):
                train(out="b")
        finally:
            end.set()
        first.result(timeout=60)
        train(out="c")


def test_two_trainings_in_one_process_with_two_precisions(train):
    precisions = ["no", "bf16", "no"]
    runs = [train({"mixed_precision": precision}, out=f"{i}") for i, precision in enumerate(precisions)]
    assert losses(runs[0].path) == losses(runs[2].path)
    assert losses(runs[0].path) != losses(runs[1].path)


def test_a_failed_training_does_not_affect_the_next(train, text_file):
    short = text_file.parent / "short.txt"
    short.write_text("abc" * 5)
    with pytest.raises(smallm.UserError, match="too few"):
        smallm.train(short, out="run")
    assert train(out="run").state == "finished"


def test_resume(train):
    straight = train(out="straight")
    train({"max_steps": 3}, out="run")
    run = smallm.train(resume="run", train={"max_steps": 6})
    assert (run.path, run.step, run.val_loss) == (Path("run"), 6, straight.val_loss)
    with pytest.raises(smallm.UserError, match="leave out config and out"):
        smallm.train(resume="run", out="other")
    with pytest.raises(smallm.UserError, match="run is finished"):
        smallm.train(resume="run")


def test_settings_by_section_or_by_dotted_name(text_file):
    run = smallm.train(
        str(text_file), out=Path("run"), encoding="utf-8", config="quickstart", model=MODEL | {"n_embd": 48},
        **{f"train.{name}": value for name, value in TRAIN.items()}, **{"optim.betas": [0.8, 0.9]},
    )  # fmt: skip
    assert run.config["model"]["n_embd"] == 48
    assert run.config["optim"]["betas"] == [0.8, 0.9]
    assert run.config["train"]["max_steps"] == 6


def test_fine_tuning(train, text_file, tmp_path):
    old = train(out="old")
    (tmp_path / "new.txt").write_text(text_file.read_text(encoding="utf-8").upper(), encoding="utf-8")
    run = smallm.train("new.txt", init_from=old.path, out="new", train=TRAIN)
    assert run.config["model"]["n_embd"] == 32
    assert run.config["train"]["init_from"] == str(old.best_checkpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nowhere.txt"}, "nowhere.txt"),
        ({"source": "To be, or not to be,\nthat is the question"}, "write the text to a file first"),
        ({"source": "abc " * 1000}, "write the text to a file first"),
        ({"source": 3}, "source = 3 is not a path; pass a string or a Path"),
        ({"out": 3}, "out = 3 is not a path; pass a string or a Path"),
        ({"config": 3}, "config = 3 is not a path; pass a string or a Path"),
        ({"resume": 3}, "resume = 3 is not a path; pass a string or a Path"),
        ({"minute": 3}, "unknown setting minute; did you mean train.minutes?"),
        ({"model": {"n_layers": 2}}, "unknown setting model.n_layers; did you mean model.n_layer?"),
        ({"n_layer": 2}, "unknown setting n_layer; did you mean model.n_layer?"),
        ({"max_steps": 2}, "unknown setting max_steps; did you mean train.max_steps?"),
        ({"modle": {"n_layer": 2}}, "unknown setting modle.n_layer; did you mean model.n_layer?"),
        ({"model": 3}, "unknown setting model"),
        ({"model": {"n_layer": "two"}}, "model.n_layer = 'two' must be a whole number"),
        ({"model": {"n_layer": 0}}, "model.n_layer = 0 must be at least 1"),
        ({"optim": {"name": "sgd"}}, "optim.name = 'sgd' must be one of adam, adamw, muon"),
        ({"optim": {"betas": 0.9}}, "optim.betas = 0.9 must be a list of 2, each item a number"),
        ({"minutes": 0}, "minutes = 0 leaves no time to train"),
        ({"minutes": "five"}, "train.minutes = 'five' must be a number"),
        ({"minutes": 1, "train": {"minutes": 2}}, "minutes and train.minutes are the same setting"),
        ({"config": "shakespeer"}, "there is no config shakespeer"),
        ({"resume": "nowhere"}, "nowhere"),
        ({"train": {"log_with": "no-such-tracker"}}, "there is no tracker 'no-such-tracker'"),
    ],
)
def test_a_mistake_is_a_user_error(options, message, folder, capfd):
    with pytest.raises(smallm.UserError) as caught:
        smallm.train(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert list(folder.iterdir()) == []


def test_an_interrupt_saves_and_is_raised(train):
    def interrupt():
        deadline = time.monotonic() + 60
        while not (Path("run/metrics.jsonl").is_file() and len(losses("run")) >= 3) and time.monotonic() < deadline:
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train({"max_steps": 10**6, "eval_every": 10**6}, out="run")
    thread.join()
    (checkpoint,) = Path("run/checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert smallm.train(resume="run", train={"max_steps": step + 1}).step == step + 1


TWO_TRAININGS = """
import smallm
if __name__ == "__main__":
    text, *settings = {arguments!r}
    for out in ("a", "b"):
        run = smallm.train(text, out=out, model=settings[0], train=settings[1])
        print("%s %s\\n" % (run.state, run.val_loss), end="")  # one write: lines of two processes do not mix
"""


@pytest.mark.slow
def test_twice_with_two_processes(text_file, folder):
    Path("twice.py").write_text(TWO_TRAININGS.format(arguments=[str(text_file), MODEL, TRAIN | FP32]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "twice.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(smallm.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if re.fullmatch(r"finished \d\.\d+", line)]
    assert len(printed) == 4
    assert losses("a") == losses("b")


def test_the_base_install_names_the_missing_extra(folder):
    code = """
import smallm
try:
    smallm.train("x.txt")
except smallm.UserError as error:
    print(error)
"""
    done = python(code, blocked=HEAVY, cwd=folder)
    assert done.stderr == ""
    assert done.stdout.startswith("train needs the package '")
    assert done.stdout.endswith("install it with: pip install 'smallm[train]'\n")


def test_help_names_every_option():
    text = smallm.train.__doc__
    for option in ("source", "minutes", "config", "out", "resume", "encoding", "init_from", "settings"):
        assert f"\n    {option}: " in text
    assert {key.split(".")[0] for key in KEYS} == {"data", "model", "optim", "train", "sample"}
    assert all(f"`{section}`" in text for section in ("data", "model", "optim", "train", "sample"))
