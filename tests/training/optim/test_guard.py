"""smallm.training.optim.guard: gradients that are not finite never reach the weights."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

from smallm.cli.main import run, train
from smallm.training import cli
from smallm.training.checkpoint.format import read_state
from smallm.training.checkpoint.manager import checkpoints
from smallm.training.config import Config, ModelConfig, OptimConfig
from smallm.training.model.operations import cross_entropy
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.guard import MAX_IN_A_ROW, StepGuard
from smallm.training.optim.optimizers import build_optimizer, set_learning_rate
from smallm.training.trainer import Trainer

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=8)
SMALL = ["--model.n_layer=1", "--model.n_head=1", "--model.n_embd=32", "--model.block_size=8", "--train.batch_size=4",
         "--train.log_every=1", "--train.sample_length=0"]  # fmt: skip


def stepped(name, flags, weight_decay=0.1):
    """Weights and moments after one step per flag: None = found_inf not set, 0 = normal step, 1 = skipped step."""
    config = OptimConfig(name=name, weight_decay=weight_decay, learning_rate=0.01)
    model = TransformerLanguageModel(64, SHAPE, seed=1)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 1.0)
    generator = torch.Generator().manual_seed(1)
    for flag in flags:
        ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(3) if flag else generator)
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        if flag:
            for p in model.parameters():
                p.grad[...] = math.nan
        if flag is not None:
            optimizer.found_inf = torch.tensor(float(flag))
        optimizer.step()
        optimizer.zero_grad()
    state = [value for p in model.parameters() for value in optimizer.state[p].values()]
    return [p.detach() for p in model.parameters()] + state


@pytest.mark.parametrize("name", ["muon", "adamw", "adam"])
def test_the_optimisers_skip_a_step_when_found_inf_is_set(name):
    """As on a GPU, where the host does not wait for the gradient norm."""
    plain, flagged, skipped = stepped(name, [None, None]), stepped(name, [0, 0]), stepped(name, [0, 1, 0])
    for ours, theirs, others in zip(flagged, plain, skipped, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(others, theirs)


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_counts(device):
    """Fused optimisers read `found_inf` on CUDA devices only; elsewhere the host skips the step."""
    made = []
    optimizer = SimpleNamespace(step=lambda: made.append(True), optimizer=SimpleNamespace())
    accelerator = SimpleNamespace(scaler=None, device=torch.device("cpu"), distributed_type="NO")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *shape, device, dtype: torch.empty(*shape, dtype=dtype).fill_(0))
        guard = StepGuard(SimpleNamespace(**vars(accelerator) | {"device": torch.device(device)}), optimizer)
    guard._device = accelerator.device
    for norm in (1.0, math.nan, math.inf, 2.0, -math.inf):
        guard.step(torch.tensor(norm))
    assert guard.counts == (3, 1)
    assert len(made) == (5 if device == "cuda" else 2)
    if device == "cuda":
        assert optimizer.optimizer.found_inf == 1
    guard.restore(7, 2)
    guard.step(torch.tensor(math.nan))
    assert guard.counts == (8, 3)
    guard.step(torch.tensor(1.0))
    assert guard.counts == (8, 0)


def fp16_step(name, clip, poison, scale):
    """One step of a model under loss scaling, on the CPU. Returns the norm, the counts and the next scale."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True
    accelerator.state._mixed_precision = "fp16"
    try:
        model = TransformerLanguageModel(64, SHAPE, seed=1)
        optimizer = AcceleratedOptimizer(build_optimizer(model, OptimConfig(name=name)), scaler=accelerator.scaler)
        accelerator._optimizers.append(optimizer)
        set_learning_rate(optimizer, 1.0)
        guard = StepGuard(accelerator, optimizer)
        ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
        accelerator.scaler.scale(cross_entropy(model(ids[:, :-1]), ids[:, 1:]) + poison).backward()
        if poison:
            model.wte.weight.grad[0, 0] = poison
        trainer = SimpleNamespace(
            config=Config(optim=OptimConfig(grad_clip=clip)), accelerator=accelerator,
            parameters=list(model.parameters()),
        )  # fmt: skip
        norm = Trainer._clip_gradient(trainer)
        guard.step(norm)
        return float(norm), guard.counts, accelerator.scaler.get_scale()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("name", ["muon", "adamw", "adam"])
def test_fp16_counts_skipped_steps_and_reports_the_norm_without_the_loss_scale(name, clip):
    """Accelerate's `step_was_skipped` is always False for the fused Adam and AdamW (accelerate#4242)."""
    plain, scaled = (fp16_step(name, clip, 0.0, scale) for scale in (1.0, 1024.0))
    assert scaled[0] == pytest.approx(plain[0], rel=1e-4)
    assert scaled[1:] == ((0, 0), 1024.0)
    assert fp16_step(name, clip, math.inf, 1024.0)[1:] == ((1, 1), 512.0)


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the loss of some steps infinite or NaN."""

    def poisoned(values):
        def loss(logits, targets):
            return cross_entropy(logits, targets) + values.get(current[0], 0.0)

        def train_step(self, step):
            current[0] = step
            return plain(self, step)

        current, plain = [0], Trainer.train_step
        monkeypatch.setattr("smallm.training.ensemble.cross_entropy", loss)
        monkeypatch.setattr(Trainer, "train_step", train_step)

    return poisoned


def train_lines(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]


@pytest.mark.parametrize("clip", ["0", "1.0"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(poisoned, text_file, tmp_path, capsys, value, clip):
    out = tmp_path / "run"
    poisoned({3: value, 4: value})
    argv = ["--data", str(text_file), "--out", str(out), *SMALL, "--train.max_steps=8", f"--optim.grad_clip={clip}"]
    assert cli.main(argv) == 0
    lines = train_lines(out)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [False] * 3 + [True] * 2 + [False] * 3
    assert all(line["loss"] < 6 for line in lines if line["loss"])
    state, _ = read_state(checkpoints(out)[-1])
    assert (state.skipped_steps, state.skipped_in_a_row) == (2, 0)
    assert math.isfinite(state.best_val_loss)
    assert capsys.readouterr().err.count("warning: 1 step(s)") == 2


def test_too_many_skipped_steps_in_a_row_end_the_run_and_keep_its_checkpoints(poisoned, text_file, tmp_path, capsys):
    out = tmp_path / "run"
    poisoned(dict.fromkeys(range(7, 100), math.nan))
    argv = ["--data", str(text_file), "--out", str(out), *SMALL, "--train.max_steps=50", "--train.save_every=5"]
    assert run(train, argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"smallm: the last {MAX_IN_A_ROW} steps")
    assert "optim.learning_rate" in line
    newest = checkpoints(out)[-1]
    assert read_state(newest)[0].step == 15
    assert read_state(newest)[0].skipped_in_a_row == 8  # a resumed run continues to count
    from safetensors.torch import load_file

    for file in ("model.safetensors", "optimizer.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(newest / file).values())
    assert run(train, ["--resume", str(out)]) == 2
    assert "steps up to step 17 " in capsys.readouterr().err.splitlines()[-1]


def test_the_guard_changes_nothing_else(text_file, tmp_path, monkeypatch):
    """Neither the factor of 1 on the loss nor the norm computed without clipping changes the weights."""
    argv = ["--data", str(text_file), *SMALL, "--train.max_steps=4", "--optim.grad_clip=0"]
    assert cli.main([*argv, "--out", str(tmp_path / "with")]) == 0
    monkeypatch.setattr(StepGuard, "step", lambda self, norm: self._optimizer.step())
    assert cli.main([*argv, "--out", str(tmp_path / "without")]) == 0
    a, b = (Path(checkpoints(tmp_path / name)[-1], "model.safetensors").read_bytes() for name in ("with", "without"))
    assert a == b
