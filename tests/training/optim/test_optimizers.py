"""smallm.training.optim: learning rates computed by hand, and each optimiser against its textbook form."""

import math
import subprocess
import sys

import pytest
import torch

from smallm.training.config import Config, ModelConfig, OptimConfig, TrainConfig
from smallm.training.devices import multiplies_bf16
from smallm.training.model import operations
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim import optimizers as optim
from smallm.training.optim.optimizers import POLAR_EXPRESS, MuonAdamW, build_optimizer, orthogonalise, set_learning_rate
from smallm.training.optim.schedule import learning_rate_factor, window_length

MODEL = ModelConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, block_size=8)


def factor(step, schedule, *, total=104, per_epoch=10.0, warmup=4, peak=0.1, **more):
    config = OptimConfig(schedule=schedule, warmup_steps=warmup, learning_rate=peak, **more)
    return learning_rate_factor(step, config, total, per_epoch)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "cosine", "wsd"])
def test_warmup_is_linear_and_ends_at_the_peak(schedule):
    assert [factor(s, schedule) for s in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1], abs=1e-3)
    assert factor(0, schedule, warmup=0) == 1
    assert factor(0, schedule, warmup=1) == 1


def test_constant():
    assert {factor(s, "constant", gamma=0.5, min_lr=0.01) for s in range(4, 104)} == {1.0}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(4, 1), (9, 1), (10, 0.95), (19, 0.95), (20, 0.9025), (103, 0.95**10)],
)
def test_exponential_falls_by_gamma_at_the_start_of_each_epoch(step, expected):
    assert factor(step, "exponential") == pytest.approx(expected, rel=1e-12)


def test_exponential_with_fractional_epochs():
    # 2.5 steps per epoch: epoch 1 begins within step 2, so step 3 is its first step; epoch 2 begins at step 5
    factors = [factor(s, "exponential", gamma=0.5, warmup=0, per_epoch=2.5) for s in range(8)]
    assert factors == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    ("step", "min_lr", "expected"),
    [
        (4, 0.0, 1), (54, 0.0, 0.5), (104, 0.0, 0), (29, 0.0, 0.5 + math.sqrt(2) / 4), (500, 0.0, 0),
        (4, 0.02, 1), (54, 0.02, 0.6), (104, 0.02, 0.2),
    ],
)  # fmt: skip
def test_cosine(step, min_lr, expected):
    assert factor(step, "cosine", min_lr=min_lr) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "min_lr", "expected"),
    [(4, 0.0, 1), (78, 0.0, 1), (91, 0.0, 0.5), (103, 0.0, 1 / 26), (104, 0.0, 0), (500, 0.0, 0),
     (78, 0.02, 1), (91, 0.02, 0.6), (104, 0.02, 0.2)],
)  # fmt: skip
def test_wsd_decays_over_the_last_quarter(step, min_lr, expected):
    assert factor(step, "wsd", min_lr=min_lr, decay_fraction=0.25) == pytest.approx(expected, abs=1e-12)


def test_wsd_without_decay_and_with_decay_alone():
    assert factor(103, "wsd", decay_fraction=0.0) == 1
    assert factor(52, "wsd", decay_fraction=1.0) == 0.5


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_no_schedule_rises_after_warmup(schedule):
    factors = [factor(s, schedule, min_lr=0.03) for s in range(4, 110)]
    assert factors == sorted(factors, reverse=True)
    assert min(factors) == pytest.approx(0.3)


def test_windows_grow_with_the_progress_of_the_run():
    train = TrainConfig(short_windows=(16, 32), short_until=(0.25, 0.5))
    config = Config(model=ModelConfig(block_size=64), train=train)
    lengths = [window_length(step, config, 20) for step in range(20)]
    assert lengths == [16] * 5 + [32] * 5 + [64] * 10
    assert {window_length(step, Config(), 20) for step in range(20)} == {Config().model.block_size}


def test_set_learning_rate_scales_the_peak_of_each_group():
    model = TransformerLanguageModel(20, MODEL, seed=1)
    optimizer = build_optimizer(model, OptimConfig(name="muon", learning_rate=0.02, adam_learning_rate=0.005))
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.00125]


# The optimisers. All start from the same weights and get the same gradients.


def start(seed=1):
    model = TransformerLanguageModel(20, MODEL, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def parts(model):
    """The matrices, which Muon and weight decay treat, and the other parameters."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if name.startswith("h.") and p.ndim == 2]
    rest = [p for name, p in named.items() if not (name.startswith("h.") and p.ndim == 2)]
    assert len(matrices) == 8
    assert len(rest) == 10
    return matrices, rest


def assert_same_trajectory(model, optimizer, reference, reference_step, factors=(0.5, 1.0, 1.0, 0.3), **tolerance):
    for step, factor in enumerate(factors):
        for m in (model, reference):
            give_gradients(m, step)
        set_learning_rate(optimizer, factor)
        optimizer.step()
        reference_step(factor)
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, msg=lambda text, at=f"{name}, step {step}: ": at + text, **tolerance)


def stepping(*optimizers_and_peaks):
    def step(factor):
        for optimizer, peak in optimizers_and_peaks:
            for group in optimizer.param_groups:
                group["lr"] = factor * peak
            optimizer.step()

    return step


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_equal_pytorchs(name):
    model, reference = start(), start()
    optimizer = build_optimizer(
        model, OptimConfig(name=name, learning_rate=0.01, weight_decay=0.2, betas=(0.8, 0.9))
    )  # fmt: skip
    matrices, rest = parts(reference)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    decayed = kind(matrices, betas=(0.8, 0.9), weight_decay=0.2 if name == "adamw" else 0, foreach=False)
    plain = kind(rest, betas=(0.8, 0.9), weight_decay=0, foreach=False)
    step = stepping((decayed, 0.01), (plain, 0.01))
    assert_same_trajectory(model, optimizer, reference, step, rtol=1e-5, atol=1e-6)


def muon_config(**changes):
    return OptimConfig(**{"name": "muon", "learning_rate": 0.05, "adam_learning_rate": 0.01, "momentum": 0.9,
                          "weight_decay": 0.2, "betas": (0.8, 0.9)} | changes)  # fmt: skip


def matrices_of(model):
    """Each matrix that Muon orthogonalises: q, k, v, output, gate, up and down of each block."""
    for block in model.h:
        yield from block.attn.c_attn.weight.split((32, 16, 16))
        yield block.attn.c_proj.weight
        yield from block.mlp.c_fc.weight.split(96)
        yield block.mlp.c_proj.weight


def test_muon_equals_pytorchs_muon_and_adamw(monkeypatch):
    """With PyTorch's coefficients, and each packed matrix as a separate parameter."""
    monkeypatch.setattr(optim, "POLAR_EXPRESS", ((3.4445, -4.7750, 2.0315),) * 5)
    model, reference = start(), start()
    alone = [torch.nn.Parameter(m.detach().clone()) for m in matrices_of(reference)]
    muon = torch.optim.Muon(alone, weight_decay=0.2, momentum=0.9)  # computes in bfloat16
    adamw = torch.optim.AdamW(parts(reference)[1], betas=(0.8, 0.9), weight_decay=0, foreach=False)

    @torch.no_grad()
    def step(factor):
        gradients = [p.grad for p in reference.parameters()]
        swapped = start()
        for p, gradient in zip(swapped.parameters(), gradients, strict=True):
            p.copy_(gradient)
        for p, gradient in zip(alone, matrices_of(swapped), strict=True):
            p.grad = gradient.clone()
        stepping((muon, 0.05), (adamw, 0.01))(factor)
        for m, p in zip(matrices_of(reference), alone, strict=True):
            m.copy_(p)

    assert_same_trajectory(model, build_optimizer(model, muon_config()), reference, step, rtol=0, atol=1.2e-2)


def test_muon_equals_its_definition_in_float64():
    model, reference = start(), start()
    adamw = torch.optim.AdamW(parts(reference)[1], betas=(0.8, 0.9), weight_decay=0, foreach=False)
    momenta = [torch.zeros_like(p, dtype=torch.float64) for p in parts(reference)[0]]

    @torch.no_grad()
    def step(factor):
        stepping((adamw, 0.01))(factor)
        updates = start()
        for p, update, momentum in zip(parts(reference)[0], parts(updates)[0], momenta, strict=True):
            momentum.mul_(0.9).add_(0.1 * p.grad.double())
            update.copy_(0.1 * p.grad.double() + 0.9 * momentum)  # Nesterov
        for p, update in zip(matrices_of(reference), matrices_of(updates), strict=True):
            x = update.double() / (1.01 * update.norm())
            for a, b, c in POLAR_EXPRESS[:4]:
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            lr = factor * 0.05
            p.copy_(p.double() * (1 - lr * 0.2) - lr * max(1, p.size(0) / p.size(1)) ** 0.5 * x)

    optimizer = build_optimizer(model, muon_config(newton_schulz_steps=4))
    assert_same_trajectory(model, optimizer, reference, step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "steps", "lowest", "highest"),
    [((3, 32, 96), 5, 0.85, 1.15), ((2, 64, 64), 8, 0.9, 1.1), ((1, 40, 64), 3, 0.1, 1.9)],
)
def test_orthogonalise_brings_singular_values_near_one(shape, steps, lowest, highest):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 7.0
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    assert (s.amax(-1) / s.amin(-1) > 1.5).all()
    result = orthogonalise(matrices, POLAR_EXPRESS[:steps])
    assert result.shape == matrices.shape
    assert result.dtype == matrices.dtype
    rotated = u.mT @ result @ vt.mT  # diagonal if the singular vectors are the same
    values = rotated.diagonal(dim1=-2, dim2=-1)
    assert values.min() > lowest
    assert values.max() < highest
    assert (rotated - torch.diag_embed(values)).abs().max() < 1e-3


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("steps", [5, 8])
def test_orthogonalise_in_bf16_keeps_singular_values_bounded(monkeypatch, device, steps):
    """Ill-conditioned gradients, as small batches give: rounding must not be multiplied by the later iterations."""
    monkeypatch.setattr(operations, "has_bf16", lambda: True)  # other processors emulate the products
    monkeypatch.setattr(optim, "multiplies_bf16", lambda _: device == "gpu")
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(200, n, 32, generator=generator))[0] for n in (32, 96))
    for smallest in (-1, -3):
        result = orthogonalise(u * torch.logspace(0, smallest, 32) @ v.mT, POLAR_EXPRESS[:steps], bf16=device == "cpu")
        assert torch.linalg.matrix_norm(result, 2).max() < 1.2


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_muon_computes_in_bf16_only_on_gpus_with_bf16_tensor_cores(monkeypatch, capability, dtype):
    """The device is faked: the matrices are on the CPU, but report a CUDA device."""
    seen = []
    monkeypatch.setattr(optim, "multiplies_bf16", lambda device: multiplies_bf16(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(optim, "polynomial_iteration", lambda x, *options: (seen.append(x.dtype), x)[1])
    assert orthogonalise(torch.ones(1, 4, 4), POLAR_EXPRESS).dtype == torch.float32
    assert seen == [dtype]


def test_sharded_matrices_are_whole_only_a_few_at_a_time(monkeypatch):
    """A step in parts gives the result of a step with all matrices at once."""
    whole, parted, sizes = start(), start(), []
    plain = MuonAdamW._muon_step

    def counted(self, group, parameters):
        sizes.append(sum(p.numel() for p in parameters))
        plain(self, group, parameters)

    for model, limit in ((whole, 1 << 26), (parted, 6200)):
        with monkeypatch.context() as patch:
            patch.setattr(optim, "MAX_GATHERED", limit)
            patch.setattr(optim, "_is_sharded", lambda parameter: True)
            patch.setattr(optim, "shard_like", lambda parameter, tensor: tensor)
            patch.setattr(MuonAdamW, "_muon_step", counted)
            optimizer = build_optimizer(model, muon_config())
            set_learning_rate(optimizer, 1.0)
            for step in range(2):
                give_gradients(model, step)
                optimizer.step()
    assert len(sizes) > 6
    assert max(sizes[2:]) <= 6200
    for ours, theirs in zip(parted.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_matrices_of_one_shape_do_not_mix():
    matrices = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([orthogonalise(m[None], POLAR_EXPRESS) for m in matrices])
    torch.testing.assert_close(orthogonalise(matrices, POLAR_EXPRESS), alone, rtol=1e-4, atol=1e-5)


def test_the_optimiser_does_not_import_the_compiler():
    """Importing it takes longer than the first 50 steps of a small model."""
    code = """
import sys, torch
from smallm.training.model import operations
from smallm.training.optim import optimizers as optim
from smallm.training.config import ModelConfig, OptimConfig
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.optimizers import build_optimizer
model = TransformerLanguageModel(20, ModelConfig(n_layer=1, n_head=1, n_embd=32, block_size=8))
optimizer = build_optimizer(model, OptimConfig())
model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
optimizer.step()
optimizer.zero_grad()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("name", "decayed"), [("muon", True), ("adamw", True), ("adam", False)])
def test_weight_decay_is_for_matrices_only(name, decayed):
    model, before = start(), start()
    optimizer = build_optimizer(model, OptimConfig(name=name, learning_rate=0.1, weight_decay=0.5, grad_clip=0))
    set_learning_rate(optimizer, 1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for after, old in zip(parts(model)[0], parts(before)[0], strict=True):
        torch.testing.assert_close(after, old * (1 - 0.1 * 0.5) if decayed else old)
    for after, old in zip(parts(model)[1], parts(before)[1], strict=True):
        assert torch.equal(after, old)


def test_muon_does_not_change_parameters_without_a_gradient():
    model, before = start(), start()
    optimizer = build_optimizer(model, muon_config())
    assert isinstance(optimizer, MuonAdamW)
    set_learning_rate(optimizer, 1.0)
    give_gradients(model, 0)
    frozen = [model.h[0].mlp.c_fc.weight, model.wte.weight]
    for p in frozen:
        p.grad = None
    optimizer.step()
    assert torch.equal(model.wte.weight, before.wte.weight)
    assert torch.equal(model.h[0].mlp.c_fc.weight, before.h[0].mlp.c_fc.weight)
    assert not torch.equal(model.h[1].mlp.c_fc.weight, before.h[1].mlp.c_fc.weight)
