"""Training from the command line to the checkpoint: repeatable, exact after a resume, and clear about mistakes."""

import gzip
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toys import edit_state, open_corpus

from smallm.inference.scoring import IGNORED
from smallm.training import callbacks, cli, trainer
from smallm.training.checkpoint import format as checkpoint
from smallm.training.checkpoint.format import load_model, load_vocabulary, read_state
from smallm.training.checkpoint.manager import best_checkpoint, checkpoints
from smallm.training.config import KEYS, MAY_CHANGE, OptimConfig
from smallm.training.data.batch_loader import BatchLoader
from smallm.training.data.dataset import CharDataset
from smallm.training.model.operations import cross_entropy
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.optimizers import build_optimizer
from smallm.training.optim.schedule import divide_batch, total_steps

ROOT = Path(__file__).parents[2]
TOY = {
    "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 16,
    "train.batch_size": 8, "train.max_steps": 12, "train.eval_every": 5, "train.log_every": 1,
    "train.sample_length": 8, "optim.warmup_steps": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture
def train(text_file):
    """Trains a toy model into the folder `out`, with the settings TOY and `changes`; returns the folder."""

    def train(out, code=0, **changes):
        settings = TOY | {key.replace("__", "."): value for key, value in changes.items()}
        assert cli.main(["--data", str(text_file), "--out", out, *flags(settings)]) == code
        return Path(out)

    return train


def metrics(run, kind="train"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def sha256(run, name="model.safetensors"):
    return hashlib.sha256((checkpoints(run)[-1] / name).read_bytes()).hexdigest()


def names(run):
    return [folder.name for folder in checkpoints(run)]


@contextmanager
def ctrl_c(step):
    """Presses Ctrl-C while the batch of this step is loaded."""
    batch, pressed = BatchLoader.batch, []

    def pressing(self, wanted, *args, **options):
        if wanted == step and not pressed:
            pressed.append(True)  # once: later, a second signal raises KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        return batch(self, wanted, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLoader, "batch", pressing)
        yield


# Repeatability.


def test_two_runs_are_bitwise_equal(train):
    a, b = train("a", model__dropout=0.1), train("b", model__dropout=0.1)
    assert sha256(a) == sha256(b)
    assert sha256(a, "optimizer.safetensors") == sha256(b, "optimizer.safetensors")
    assert [line["loss"] for line in metrics(a)] == [line["loss"] for line in metrics(b)]
    assert [line["sample"] for line in metrics(a, "eval")] == [line["sample"] for line in metrics(b, "eval")]
    assert sha256(train("c", model__dropout=0.1, train__seed=2)) != sha256(a)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__name": "muon", "model__dropout": 0.1, "train__micro_batch_size": 2, "model__n_kv_head": 1,
         "train__short_windows": "[4, 8]", "train__short_until": "[0.3, 0.7]", "data__split": "blocks",
         "train__noise": 0.2},
        {"optim__name": "adamw", "optim__learning_rate": 0.01, "optim__schedule": "cosine", "train__log_every": 3,
         "data__split": "documents", "data__separator": ".\n", "data__source": "b.jsonl.gz", "data__weights": "1,3"},
    ],
    ids=["muon, dropout, accumulation, short windows, blocks, noise", "adamw, cosine, documents, weights, gzip"],
)
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(train, capsys, changes):
    Path("b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Another text."}\n' * 99))
    straight = train("straight", **changes)
    with ctrl_c(6):
        run = train("run", code=130, **changes)
    stopped = read_state(checkpoints(run)[-1])[0].step
    assert 6 <= stopped < 10
    assert f"python -m smallm train --resume {run}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    with (run / "metrics.jsonl").open("a") as file:  # as after a kill: newer than the checkpoint, cut short
        file.write(json.dumps({"kind": "train", "step": stopped + 1, "loss": 9.0}) + "\n" + '{"kind": "tr')
    assert cli.main(["--resume", str(run)]) == 0
    assert f"step {stopped}\n" in capsys.readouterr().err
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert sha256(run, file) == sha256(straight, file), file

    assert [line["step"] for line in metrics(run, "eval")] == [5, 10, 12]
    for ours, theirs in zip(metrics(run, "eval"), metrics(straight, "eval"), strict=True):
        assert (ours["val_loss"], ours["sample"]) == (theirs["val_loss"], theirs["sample"])
    if changes.get("train__log_every", 1) == 1:
        assert [line["step"] for line in metrics(run)] == list(range(1, 13))
        keys = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        for ours, theirs in zip(metrics(run), metrics(straight), strict=True):
            assert [ours[key] for key in keys] == [theirs[key] for key in keys]
    else:
        assert [line["step"] for line in metrics(run)] == [3, 6, 9, 12]
    for ours, theirs in zip(checkpoints(run), checkpoints(straight), strict=True):
        for key in ("step", "val_loss", "best_val_loss", "best_step", "evaluations_since_best"):
            assert getattr(read_state(ours)[0], key) == getattr(read_state(theirs)[0], key)


def test_accumulation_gives_the_same_result(train):
    whole = train("whole", train__max_steps=8, optim__learning_rate=0.01, optim__adam_learning_rate=0.002)
    parts = train("parts", train__max_steps=8, optim__learning_rate=0.01, optim__adam_learning_rate=0.002,
                  train__micro_batch_size=2)  # fmt: skip
    for key in ("loss", "grad_norm"):
        expected = [line[key] for line in metrics(whole)]
        assert [line[key] for line in metrics(parts)] == pytest.approx(expected, abs=1e-5)
    ours, theirs = (load_file(checkpoints(run)[-1] / "model.safetensors") for run in (whole, parts))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: name + text)


def test_training_equals_a_plain_pytorch_loop(train, text_file):
    """Without Accelerate and accumulation, with learning rates set by hand: the same weights."""
    run = train("run", train__max_steps=6, train__micro_batch_size=4, optim__schedule="constant", optim__grad_clip=0.5)
    config = read_state(checkpoints(run)[-1])[1]
    corpus = open_corpus(str(text_file), min_count=config.data.min_count, val_fraction=0.1)
    dataset = CharDataset(corpus.train_ids, 16, config.train.seed)
    model = TransformerLanguageModel(corpus.vocabulary.size, config.model, seed=config.train.seed)
    optimizer = build_optimizer(model, config.optim)
    for step, share in enumerate([1 / 3, 2 / 3, 1, 1, 1, 1]):
        for group, peak in zip(optimizer.param_groups, (0.02, 0.004), strict=True):
            group["lr"] = peak * share
        windows = torch.from_numpy(dataset.windows(np.arange(8 * step, 8 * step + 8)))
        loss = cross_entropy(model(windows[:, :-1]), windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        line = metrics(run)[step]
        per_character = len(corpus.train_ids) / corpus.train_characters
        assert line["loss"] == pytest.approx(loss.item() * per_character, abs=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert any(line["grad_norm"] > 0.5 for line in metrics(run))  # otherwise nothing was clipped
    for p, q in zip(load_model(checkpoints(run)[-1]).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


def test_dropout_differs_from_pass_to_pass(train, monkeypatch):
    masks, dropout = [], torch.nn.functional.dropout

    def recording(x, p=0.5, training=True, *args, **options):
        y = dropout(x, p, training, *args, **options)
        if training and p:
            masks.append((y == 0).numpy().tobytes())
        return y

    monkeypatch.setattr(torch.nn.functional, "dropout", recording)
    monkeypatch.setattr("smallm.training.model.transformer.cpu_kernels", lambda x: None)  # they have own masks
    train("run", model__dropout=0.5, train__max_steps=3, train__micro_batch_size=4)
    assert len(masks) == 3 * 2 * 5  # steps, forward passes, dropout layers
    assert len(set(masks[::5])) == 3 * 2  # of the embedding; an untrained block outputs zeros


# Metrics.


def test_reported_validation_loss_is_the_mean_over_all_characters_but_the_first(tiny_run):
    """Computed one character at a time, in adjacent windows, without batches."""
    line = metrics(tiny_run, "eval")[-1]
    folder = checkpoints(tiny_run)[-1]
    text = (tiny_run / "validation.txt").read_bytes().decode()
    ids = torch.from_numpy(load_vocabulary(folder).encode(text).astype(np.int64))
    model, nats = load_model(folder), 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            log_p = model(window[None, :-1])[0].double().log_softmax(-1)
            nats -= sum(log_p[t, window[t + 1]].item() for t in range(len(window) - 1))
    assert line["val_loss"] == pytest.approx(nats / (len(text) - 1), abs=1e-5)
    assert line["bits_per_character"] == pytest.approx(line["val_loss"] / math.log(2))
    assert line["perplexity"] == pytest.approx(math.exp(line["val_loss"]))
    assert read_state(folder)[0].val_loss == line["val_loss"]
    assert IGNORED == -1


@pytest.mark.parametrize(("eval_every", "drawn"), [(12, False), (5, True)])
def test_a_single_evaluation_is_not_plotted(train, charts, capsys, eval_every, drawn):
    picture = train("run", train__eval_every=eval_every) / "loss.png"
    assert ("curves in" in capsys.readouterr().out) == drawn
    assert picture.read_bytes()[:4] == b"\x89PNG" if drawn else not picture.exists()


def test_validation_text_is_the_tail_and_losses_fall(tiny_run, text_file):
    text = text_file.read_bytes().decode()
    validation = (tiny_run / "validation.txt").read_bytes().decode()
    assert text.endswith(validation)
    assert len(validation) == pytest.approx(len(text) / 10, abs=1)
    losses = [line["val_loss"] for line in metrics(tiny_run, "eval")]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1.6  # a unigram model has 2.9
    assert [line["step"] for line in metrics(tiny_run)] == [10, 20, 30, 40, 50, 60]
    for line in metrics(tiny_run, "eval"):
        between = [m["loss"] for m in metrics(tiny_run) if line["step"] - 20 < m["step"] <= line["step"]]
        assert line["train_loss"] == pytest.approx(sum(between) / 2)


def test_learning_rate_follows_the_schedule(train):
    run = train("run", train__max_steps=12, optim__schedule="wsd", optim__decay_fraction=0.5, optim__warmup_steps=4,
                optim__learning_rate=0.08, optim__min_lr=0.02, train__eval_every=12)  # fmt: skip
    rates = [line["learning_rate"] for line in metrics(run)]
    #       warm-up                   stable      six steps of decay, which reach min_lr after the last step
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.08, 0.08, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03])


def test_exponential_decay_by_epochs(train, text_file):
    windows = len(CharDataset(open_corpus(str(text_file), min_count=10, val_fraction=0.1).train_ids, 16))
    batch_size = windows * 10 // 44  # 4.4 steps an epoch
    run = train("run", optim__name="adam", optim__learning_rate=0.01, optim__warmup_steps=0, train__max_steps=10,
                train__eval_every=10, train__batch_size=batch_size,
                optim__schedule="exponential", optim__gamma=0.5)  # fmt: skip
    factors = [line["learning_rate"] / 0.01 for line in metrics(run)]
    assert factors == pytest.approx([1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25])
    epochs = [step * batch_size / windows for step in range(1, 11)]
    assert [line["epoch"] for line in metrics(run)] == pytest.approx(epochs)


@pytest.mark.parametrize(
    ("max_steps", "epochs", "per_epoch", "expected"),
    [(100, 0, 7.5, 100), (0, 2, 7.5, 15), (0, 1, 7.5, 8), (0, 0.1, 7.5, 1), (0, 0.01, 7.5, 1), (10, 2, 7.5, 10),
     (100, 2, 7.5, 15), (0, 3, 0.25, 1)],
)  # fmt: skip
def test_total_steps(max_steps, epochs, per_epoch, expected):
    assert total_steps(max_steps, epochs, per_epoch) == expected


def test_epochs_end_a_run(train):
    run = train("run", train__max_steps=0, train__epochs=0.06, train__eval_every=0)
    ends = metrics(run)[-1]
    assert ends["epoch"] == pytest.approx(0.06, abs=1 / 100)
    assert ends["epoch"] >= 0.06
    assert [line["step"] for line in metrics(run, "eval")] == [ends["step"]]


@pytest.mark.parametrize(
    ("batch_size", "micro", "ranks", "expected"),
    [(8, 0, 1, (8, 1)), (8, 0, 2, (4, 1)), (8, 2, 1, (2, 4)), (8, 2, 2, (2, 2)), (8, 8, 1, (8, 1)), (1, 0, 1, (1, 1))],
)
def test_divide_batch(batch_size, micro, ranks, expected):
    assert divide_batch(batch_size, micro, ranks) == expected


# Best and last checkpoint, early stopping.


@pytest.fixture
def losses(monkeypatch):
    """Makes the evaluations return these losses, in this order."""

    def script(*values):
        values = iter(values)
        monkeypatch.setattr(trainer, "evaluate", lambda *args, **options: next(values))

    return script


def test_best_and_last_checkpoints_are_kept(train, losses, capsys):
    losses(3.0, 2.0, 2.5, 2.25, 2.75)
    run = train("run", train__max_steps=10, train__eval_every=2, train__keep_last=1)
    assert names(run) == ["step-000004", "step-000010"]
    assert best_checkpoint(run).name == "step-000004"
    state = read_state(checkpoints(run)[-1])[0]
    assert (state.best_step, state.best_val_loss, state.val_loss, state.evaluations_since_best) == (4, 2.0, 2.75, 3)
    out = capsys.readouterr().out
    assert "2.0000 nats" in out
    assert "at step 4" in out
    assert f"python -m smallm export {run}" in out


def test_save_every_and_keep_last(train, losses):
    losses(3.0, 3.5)
    run = train("run", train__max_steps=10, train__eval_every=5, train__save_every=3, train__keep_last=2)
    assert names(run) == ["step-000005", "step-000009", "step-000010"]


def test_the_best_checkpoint_is_saved_even_if_no_save_is_due(train, losses):
    losses(3.0, 2.0, 2.5)
    run = train("run", train__max_steps=6, train__eval_every=2, train__save_every=6)
    assert "step-000004" in names(run)
    assert best_checkpoint(run).name == "step-000004"


def test_patience_stops_a_run_without_improvement(train, capsys):
    frozen = {"optim__name": "adamw", "optim__learning_rate": 1e-30, "train__eval_every": 2, "train__patience": 2}
    run = train("run", **frozen)
    assert [line["step"] for line in metrics(run, "eval")] == [2, 4, 6]
    assert metrics(run)[-1]["step"] == 6
    assert names(run)[-1] == "step-000006"
    assert best_checkpoint(run).name == "step-000002"
    assert "2 evaluations" in capsys.readouterr().err


def test_an_improvement_resets_patience(train, losses):
    losses(3.0, 3.1, 2.9, 3.0, 2.8, 3.0, 3.0, 1.0)
    run = train("run", train__max_steps=12, train__eval_every=1, train__patience=2)
    assert metrics(run)[-1]["step"] == 7


# Ctrl-C, and what a resume refuses.


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send this signal to another process")
def test_ctrl_c_saves_and_prints_the_resume_command(folder, text_file):
    command = [sys.executable, "-u", str(ROOT / "train.py"), "--data", str(text_file), "--out", "run",
               *flags(TOY | {"train.max_steps": 100_000, "train.eval_every": 100_000})]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        log, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 60
        while not (log.is_file() and log.read_text().count("\n") >= 3):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.rstrip().endswith(f"python {ROOT / 'train.py'} --resume run")
    assert out == ""
    step = read_state(checkpoints(folder / "run")[-1])[0].step
    assert f"interrupted at step {step:,}" in err
    assert cli.main(["--resume", "run", "--train.max_steps", str(step + 2), "--train.eval_every", "1"]) == 0
    assert [line["step"] for line in metrics(Path("run"))] == list(range(1, step + 3))


def test_a_second_signal_does_not_interrupt_the_save(train, monkeypatch):
    """Within two seconds of the first, as a launcher sends it."""
    save = checkpoint.save_checkpoint

    def interrupted_save(*args):
        signal.raise_signal(signal.SIGINT)
        return save(*args)

    monkeypatch.setattr(checkpoint, "save_checkpoint", interrupted_save)
    with ctrl_c(6):
        run = train("run", code=130, train__eval_every=100)
    assert names(run) == ["step-000007"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_runs_outside_the_main_thread(train):
    """Python allows signal handlers in the main thread only."""
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, "run", train__max_steps=2).result()
    assert names(run) == ["step-000002"]


def test_callbacks_see_a_snapshot_of_the_run(train, monkeypatch):
    """In the order of the events; a change to a snapshot does not reach the run."""
    events = []

    class Recorder(callbacks.Callback):
        def on_start(self, run):
            events.append(("start", run.state.step, run.progress))

        def on_log(self, run, metrics):
            events.append(("log", run.state.step))
            run.state.step = 1000

        def on_evaluation(self, run, evaluation):
            events.append(("evaluation", run.state.step, evaluation.improved))
            assert run.state.val_loss == evaluation.val_loss

        def on_end(self, run):
            events.append(("end", run.state.step, run.progress))

        def on_interrupt(self, run, signum):
            events.append(("interrupt", run.state.step, signum))

    monkeypatch.setattr(trainer, "default_callbacks", lambda: [Recorder()])
    train("run", train__max_steps=4, train__eval_every=4, train__log_every=2)
    assert events == [("start", 0, 0.0), ("log", 2), ("log", 4), ("evaluation", 4, True), ("end", 4, 1.0)]
    events.clear()
    with ctrl_c(0):
        train("other", code=130, train__log_every=100)
    assert events == [("start", 0, 0.0), ("interrupt", 1, signal.SIGINT)]


def test_ctrl_c_in_the_last_step(train, capsys):
    with ctrl_c(11):
        train("run", code=130)
    assert names(Path("run"))[-1] == "step-000012"
    capsys.readouterr()


def test_a_run_interrupted_before_its_first_evaluation_can_be_resumed(train, refused):
    with ctrl_c(1):
        run = train("run", code=130)
    assert best_checkpoint(run) == checkpoints(run)[-1]
    assert "already holds a run" in refused("--out", "run")
    assert cli.main(["--resume", "run"]) == 0


def test_resuming_a_finished_run_names_the_option_to_train_longer(refused, tiny_run):
    before = (tiny_run / "metrics.jsonl").read_bytes()
    line = refused("--resume", str(tiny_run))
    assert "finished (60 steps, " in line
    assert "--train.max_steps" in line
    assert (tiny_run / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def run(tiny_run):
    """A copy of the trained run, and flags that extend it."""
    return str(shutil.copytree(tiny_run, "copy")), "--train.max_steps", "62"


def test_a_finished_run_can_be_trained_longer(run):
    assert cli.main(["--resume", *run, "--train.log_every", "1"]) == 0
    assert metrics(Path(run[0]))[-1]["step"] == 62
    assert names(Path(run[0]))[-1] == "step-000062"


def test_resume_with_another_text_is_refused(refused, run, text_file):
    Path("other.txt").write_bytes(text_file.read_bytes() + b"!")
    before = Path(run[0], "metrics.jsonl").read_bytes()
    assert "not the text" in refused("--resume", *run, "--data", "other.txt")
    assert Path(run[0], "metrics.jsonl").read_bytes() == before


def test_resume_when_the_text_is_gone_is_one_line(refused, run, text_file, monkeypatch):
    edit_state(checkpoints(Path(run[0]))[-1], lambda state: state["config"]["data"].update(source="gone.txt"))
    assert "gone.txt" in refused("--resume", *run)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--model.n_layer", "3"), ("--model.n_layer", "1"), ("--model.n_embd", "64"), ("--model.n_kv_head", "2"),
     ("--model.n_inner", "64"), ("--optim.name", "adamw"), ("--data.val_fraction", "0.2"),
     ("--data.min_count", "5000"), ("--data.normalise", "nfc"), ("--data.newlines", "lf"), ("--data.split", "blocks"),
     ("--data.separator", "."),
     ("--model.rope_theta", "500"), ("--model.window", "8"), ("--model.dropout", "0.5"), ("--model.block_size", "16"),
     ("--train.batch_size", "4"), ("--train.seed", "77"), ("--train.mixed_precision", "bf16"),
     ("--optim.weight_decay", "0.25"), ("--optim.momentum", "0.5"), ("--optim.grad_clip", "7")],
)  # fmt: skip
def test_resume_with_another_function_order_or_optimiser_is_refused(refused, run, flag, value):
    """In one line that names the field, its old and its new value."""
    before = Path(run[0], "metrics.jsonl").read_bytes()
    line = refused("--resume", *run, flag, value)
    assert f"{run[0]} was trained with {flag.removeprefix('--')} = " in line
    assert value in line
    assert Path(run[0], "metrics.jsonl").read_bytes() == before


def test_the_settings_that_may_change_exist_and_are_none_of_the_model():
    assert set(KEYS) > MAY_CHANGE
    assert not any(key.startswith("model.") for key in MAY_CHANGE)


def test_resume_takes_other_lengths_rates_logging_and_saving(run):
    changed = ["--optim.learning_rate=0.001", "--train.eval_every=1", "--train.save_every=1", "--train.keep_last=5",
               "--train.log_every=1", "--train.patience=9", "--train.micro_batch_size=4", "--train.compile=no",
               "--sample.temperature=0.5", "--train.sample_length=0"]  # fmt: skip
    assert cli.main(["--resume", *run, *changed]) == 0
    assert names(Path(run[0]))[-2:] == ["step-000061", "step-000062"]


def test_resume_uses_the_precision_of_the_checkpoint(run):
    """Also for a run of an earlier version, whose config says auto and whose facts name the precision."""
    for folder in checkpoints(Path(run[0])):
        edit_state(folder, lambda state: state["facts"].update(precision="bf16"))
    assert cli.main(["--resume", *run, "--train.mixed_precision=bf16"]) == 0  # the same, named
    state, config = read_state(checkpoints(Path(run[0]))[-1])
    assert (state.step, state.facts["precision"], config.train.mixed_precision) == (62, "bf16", "auto")


# Mistakes: one line on stderr, and no files.


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ["there is no", "mine.txt"]),
        (b"", ["mine.txt is empty"]),
        (b"a", ["mine.txt is too short"]),
        (b"short. " * 2, ["12 characters", "model.block_size = 16"]),
        (b"x" * 17, ["15 characters", "model.block_size = 16"]),
        (b"good " * 100 + b"\n\xff bad", ["mine.txt", "0xff", "offset 501", "line 2", "--encoding"]),
    ],
    ids=["missing", "empty", "one character", "short", "short by one", "not UTF-8"],
)
def test_an_unusable_text_is_one_line(refused, folder, content, said):
    if content is not None:
        Path("mine.txt").write_bytes(content)
    before = sorted(folder.iterdir())
    line = refused("--data", "mine.txt", "--out", "run", *flags(TOY))
    for words in said:
        assert words in line
    line = refused("--data", "mine.txt", *flags(TOY))
    assert sorted(folder.iterdir()) == before  # no run, no runs/


def test_the_shortest_usable_text():
    Path("mine.txt").write_text("abcdefghijklmnopqrs")  # 17 characters for training, one window of 16; 2 for validation
    assert cli.main(["--data", "mine.txt", "--out", "run", *flags(TOY | {"train.max_steps": 2})]) == 0
    assert [line["val_loss"] > 0 for line in metrics(Path("run"), "eval")] == [True]


def test_a_text_without_a_line_end_or_any_ascii():
    Path("mine.txt").write_text("語言模型" * 60, encoding="utf-8")
    assert cli.main(["--data", "mine.txt", "--out", "run", *flags(TOY | {"train.max_steps": 2})]) == 0
    state = read_state(checkpoints(Path("run"))[-1])[0]
    assert state.start_text == "語"
    assert state.facts["characters"] == 240
    # an untrained model predicts about 270 ids uniformly, and each of these characters is one id
    assert metrics(Path("run"))[0]["loss"] == pytest.approx(math.log(270), abs=0.5)


def test_losses_are_per_character_even_if_characters_take_several_ids():
    Path("mine.txt").write_text("語言模型" * 60, encoding="utf-8")
    settings = flags(TOY | {"train.max_steps": 1, "data.min_count": 1000})
    assert cli.main(["--data", "mine.txt", "--out", "run", *settings]) == 0
    assert metrics(Path("run"))[0]["loss"] == pytest.approx(3 * math.log(256), rel=0.1)  # three bytes each
    assert metrics(Path("run"), "eval")[0]["val_loss"] == pytest.approx(3 * math.log(256), rel=0.2)


@pytest.mark.parametrize(
    "out", [str(Path("file.txt", "run")), *(["/proc/run"] if sys.platform == "linux" else [])]
)
def test_a_folder_that_cannot_be_made_is_one_line(refused, text_file, out):
    Path("file.txt").write_text("mine")
    assert out in refused("--data", str(text_file), "--out", out, *flags(TOY))


def test_micro_batches_that_do_not_divide_are_one_line(refused, folder, text_file):
    line = refused("--data", str(text_file), "--out", "run", *flags(TOY), "--train.micro_batch_size", "3")
    assert "batch_size = 8" in line
    assert "use batch_size 6 or 9" in line
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_one_line(monkeypatch, capsys, text_file):
    from smallm.cli.main import run, train

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert run(train, ["--data", str(text_file), "--out", "run", *flags(TOY)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("smallm: ")
    assert "No space left" in last
    assert list(Path("run/checkpoints").iterdir()) == []


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_explodes_is_one_line(capsys, text_file, log_every):
    from smallm.cli.main import run, train

    settings = TOY | {"optim.name": "adam", "optim.learning_rate": 1e30, "optim.grad_clip": 0, "optim.warmup_steps": 0,
                      "train.log_every": log_every, "train.eval_every": 2}  # fmt: skip
    assert run(train, ["--data", str(text_file), "--out", "run", *flags(settings)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("smallm: ")
    assert "optim.learning_rate" in last
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # the handlers are restored


def test_an_enormous_validation_loss_is_not_a_traceback(train, losses):
    losses(800.0, 3.0)  # e^800 overflows a float
    run = train("run", train__max_steps=4, train__eval_every=2)
    assert best_checkpoint(run).name == "step-000004"
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not valid JSON"))


def test_config_of_the_run_is_in_its_checkpoints(tiny_run, text_file):
    state, config = read_state(checkpoints(tiny_run)[-1])
    assert (config.data.source, config.model.n_kv_head, config.train.max_steps) == (str(text_file), 1, 60)
    assert config.optim == OptimConfig(
        adam_learning_rate=0.005, warmup_steps=10, decay_fraction=0.6, weight_decay=0.0
    )
    text = text_file.read_bytes()
    assert state.fingerprint == hashlib.sha256(text).hexdigest()
    assert state.facts["text"] == "owls.txt"
    assert state.facts["characters"] == len(text.decode())
    assert {"python", "smallm", "torch", "accelerate", "numpy", "device", "precision"} <= state.facts.keys()
