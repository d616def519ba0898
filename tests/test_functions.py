"""smallm.training.functions: the backward passes written by hand are those of autograd."""

import pytest
import torch

from smallm.training import functions
from smallm.training.config import ModelConfig
from smallm.training.model import TransformerLanguageModel, cross_entropy


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tables(T, hd):
    angles = torch.arange(T, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03][: hd // 2])
    return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)


def test_rms_norm_against_finite_differences():
    x, gain = numbers(2, 3, 8, seed=1).requires_grad_(), numbers(8, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(functions._RMSNorm.apply, (x, gain))


def test_qk_norm_rotary_against_finite_differences():
    qkv, gain = numbers(2, 3, 4, 8, seed=1).requires_grad_(), numbers(3, 8, seed=2).requires_grad_()
    cos, sin = tables(3, 8)
    assert torch.autograd.gradcheck(lambda a, b: functions._QKNormRotary.apply(a, b, cos, sin, 2), (qkv, gain))


@pytest.mark.parametrize("zero_gain", [False, True])
def test_both_forms_compute_the_same(zero_gain):
    qkv, gain = numbers(2, 5, 8, 8, seed=3).requires_grad_(), numbers(6, 8, seed=4)
    gain = (gain * (0 if zero_gain else 1)).requires_grad_()
    results = []
    for form in (functions._QKNormRotary.apply, functions.qk_norm_rotary_plain):
        outputs = form(qkv, gain, *tables(5, 8), 4)
        weights = [numbers(*o.shape, seed=5 + i) for i, o in enumerate(outputs)]
        loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
        results.append((*outputs, *torch.autograd.grad(loss, (qkv, gain))))
    for own, plain in zip(*results, strict=True):
        torch.testing.assert_close(own, plain)


@pytest.mark.parametrize("n_kv_head", [0, 2])
def test_the_whole_model_has_equal_logits_and_gradients(monkeypatch, n_kv_head):
    config = ModelConfig(n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=64, block_size=16)
    model = TransformerLanguageModel(256, config, seed=1).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype) * 0.1)
    ids = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(3))
    results = []
    for own in (True, False):
        monkeypatch.setattr(functions, "_own_backward", lambda x, own=own: own)
        model.zero_grad()
        logits = model(ids[:, :-1])
        cross_entropy(logits, ids[:, 1:]).backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for own, plain in zip(*results, strict=True):
        torch.testing.assert_close(own, plain)
