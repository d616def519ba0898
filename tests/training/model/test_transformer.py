"""smallm.training.model.transformer: naive loops and figures by hand as reference; initialisation; learning."""

import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smallm.training.config import ModelConfig, OptimConfig
from smallm.training.model.operations import NORM_EPS, cross_entropy
from smallm.training.model.transformer import (
    MultiHeadSelfAttention,
    Rotary,
    TransformerBlock,
    TransformerLanguageModel,
)
from smallm.training.optim.optimizers import build_optimizer, set_learning_rate

TINY = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 16}


def randomised(module, seed=0):
    """The module with random weights everywhere: the zeros of the real initialisation would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 2 else 0.2) + (p.ndim == 1))
    return module.eval()


def model(vocab_size=40, seed=0, **changes):
    return randomised(TransformerLanguageModel(vocab_size, ModelConfig(**TINY | changes)), seed)


def some_ids(*shape, vocab_size=40, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_kv_head", [0, 2, 1])
@pytest.mark.parametrize("t", [0, 7, 15])
def test_attention_is_causal(t, n_kv_head):
    m, ids = model(n_kv_head=n_kv_head), some_ids(2, 16)
    changed = ids.clone()
    changed[:, t] = (ids[:, t] + 1) % 40
    difference = (m(ids) - m(changed)).abs().amax(-1)  # (B, T)
    assert (difference[:, :t] == 0).all()
    assert (difference[:, t:] > 1e-4).all()


def test_a_shorter_window_gives_the_same_logits():
    m, ids = model(), some_ids(3, 16)
    torch.testing.assert_close(m(ids[:, :5]), m(ids)[:, :5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 7), (2, 16)])
def test_shapes(B, T):
    m = model(n_kv_head=2)
    logits = m(some_ids(B, T))
    assert logits.shape == (B, T, 40)
    assert logits.dtype == torch.float32
    x = torch.randn(B, T, 64)
    assert m.h[0](x, *m.rotary(x.size(1))).shape == x.shape


@pytest.mark.parametrize("n_embd", [32, 128, 384])
@pytest.mark.parametrize("vocab_size", [256, 3000])
def test_the_first_loss_is_near_ln_v(n_embd, vocab_size):
    config = ModelConfig(n_layer=2, n_head=n_embd // 32, n_embd=n_embd, block_size=64)
    m = TransformerLanguageModel(vocab_size, config, seed=1)
    ids, targets = (some_ids(8, 64, vocab_size=vocab_size, seed=s) for s in (1, 2))
    with torch.no_grad():
        assert cross_entropy(m(ids), targets).item() == pytest.approx(math.log(vocab_size), abs=0.15)


def test_a_fresh_block_is_the_identity():
    m = TransformerLanguageModel(40, ModelConfig(**TINY), seed=1)
    x = torch.randn(2, 16, 64)
    assert all(torch.equal(block(x, *m.rotary(16)), x) for block in m.h)


def naive_attention(x, attention, config):
    """One sequence x (T, C), position by position and head by head, in float64."""
    T, hd, nh, nkv = len(x), config.head_dim, config.n_head, config.kv_heads
    weights = {name: p.detach().double().numpy() for name, p in attention.named_parameters()}

    def norm_and_rotate(vector, gain, position):
        vector = vector / math.sqrt(sum(v * v for v in vector) / hd + NORM_EPS) * gain
        rotated = np.empty(hd)
        for i in range(hd // 2):
            angle = position * config.rope_theta ** (-2 * i / hd)
            a, b = vector[i], vector[i + hd // 2]
            rotated[i] = a * math.cos(angle) - b * math.sin(angle)
            rotated[i + hd // 2] = b * math.cos(angle) + a * math.sin(angle)
        return rotated

    y = np.zeros((T, nh * hd))
    for t in range(T):
        packed = [weights["c_attn.weight"] @ x[s] for s in range(t + 1)]  # q of all heads, then k, then v
        for head in range(nh):
            shared = head // (nh // nkv)
            q = norm_and_rotate(packed[t][head * hd : (head + 1) * hd], weights["q_norm.weight"], t)
            scores, values = [], []
            for s in range(max(0, t + 1 - config.window) if config.window else 0, t + 1):
                k = packed[s][(nh + shared) * hd : (nh + shared + 1) * hd]
                scores.append(q @ norm_and_rotate(k, weights["k_norm.weight"], s) / math.sqrt(hd))
                values.append(packed[s][(nh + nkv + shared) * hd : (nh + nkv + shared + 1) * hd])
            shares = np.exp(np.array(scores) - max(scores))
            y[t, head * hd : (head + 1) * hd] = shares / shares.sum() @ np.array(values)
    return y @ weights["c_proj.weight"].T


@pytest.mark.parametrize("window", [0, 1, 4, 12])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_attention_against_a_naive_loop(n_kv_head, window):
    config = ModelConfig(
        n_layer=1, n_head=4, n_kv_head=n_kv_head, n_embd=64, block_size=12, window=window, rope_theta=50.0
    )
    attention = randomised(MultiHeadSelfAttention(config), seed=3)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        y = attention(x, *Rotary(config.head_dim, config.block_size, config.rope_theta)(x.size(1))).numpy()
    for one, expected in zip(y, x.double().numpy(), strict=True):
        np.testing.assert_allclose(one, naive_attention(expected, attention, config), rtol=1e-4, atol=1e-4)


def test_block_is_prenorm_attention_then_swiglu_each_added_to_the_residual_stream():
    config = ModelConfig(**TINY)
    block = randomised(TransformerBlock(config), seed=5)
    tables = Rotary(config.head_dim, config.block_size, config.rope_theta)(config.block_size)
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(6))

    def norm(value, gain):
        return value / (value.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * gain

    with torch.no_grad():
        expected = x + block.attn(norm(x, block.ln_1.weight), *tables)
        gate, up = (norm(expected, block.ln_2.weight) @ block.mlp.c_fc.weight.T).split(config.inner, -1)
        expected = expected + (gate * gate.sigmoid() * up) @ block.mlp.c_proj.weight.T
        torch.testing.assert_close(block(x, *tables), expected, rtol=1e-4, atol=1e-4)


def test_grouped_heads_equal_full_heads_with_repeated_weights():
    grouped, full = model(n_kv_head=2, seed=1), model(n_kv_head=0, seed=2)
    state = dict(grouped.state_dict())
    for name, weight in state.items():
        if name.endswith("c_attn.weight"):
            q, k, v = weight.split((64, 32, 32))
            k, v = (w.view(2, 16, 64).repeat_interleave(2, dim=0).reshape(64, 64) for w in (k, v))
            state[name] = torch.cat((q, k, v))
    full.load_state_dict(state, strict=True)
    ids = some_ids(2, 16)
    torch.testing.assert_close(grouped(ids), full(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "learning_rate"), [("muon", 0.02), ("adamw", 0.01), ("adam", 0.01)])
def test_overfits_one_batch(name, learning_rate):
    config = ModelConfig(**TINY | {"n_kv_head": 2})
    m = TransformerLanguageModel(40, config, seed=1)
    optimizer = build_optimizer(m, OptimConfig(name=name, learning_rate=learning_rate))
    set_learning_rate(optimizer, 1.0)
    ids = some_ids(4, 17)
    losses = []
    for _ in range(40):
        loss = cross_entropy(m(ids[:, :-1]), ids[:, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(40), abs=0.3)
    assert losses[-1] < 0.15  # random ids can only be memorised


def test_parameter_count_by_hand():
    m = TransformerLanguageModel(300, ModelConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_inner=160))
    attention = 64 * (4 + 2 + 2) * 16 + 64 * 64 + 2 * 16
    feed_forward = 64 * 2 * 160 + 160 * 64
    assert m.parameter_count() == 300 * 64 + 3 * (attention + feed_forward + 2 * 64) + 64


def test_flops_as_pytorch_counts_them(monkeypatch):
    # The counter does not see operations in the kernels.
    monkeypatch.setattr("smallm.training.model.transformer.cpu_kernels", lambda x: None)
    m = model(n_kv_head=2)
    B, T, C, layers = 2, 16, 64, 2
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        m(some_ids(B, T))
    forward = counter.get_total_flops() / (B * T)
    not_causal = 2 * layers * T * C  # PyTorch also counts the half of attention that the mask discards
    assert m.flops_per_id() == 3 * (forward - not_causal)


def test_dropout_is_for_training_only():
    m, ids = model(dropout=0.5), some_ids(2, 16)
    without = model(dropout=0.0)
    assert torch.equal(m(ids), without(ids))
    m.train()
    torch.manual_seed(1)
    first, second = m(ids), m(ids)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(m(ids), first)
    assert torch.equal(without.train()(ids), without.eval()(ids))


def test_the_seed_determines_the_initial_weights():
    config = ModelConfig(**TINY)

    def weights(seed, noise):
        torch.manual_seed(noise)
        return torch.cat([p.flatten() for p in TransformerLanguageModel(40, config, seed=seed).parameters()])

    assert torch.equal(weights(1, noise=1), weights(1, noise=2))
    assert not torch.equal(weights(1, noise=1), weights(2, noise=1))
    assert not torch.equal(weights(None, noise=1), weights(None, noise=2))


def test_cross_entropy_is_nats_per_id_and_skips_ignored_targets():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[0, 1, -1], [4, -1, 2]])
    p = logits.double().softmax(-1)
    nats = -sum(math.log(p[b, t, targets[b, t]]) for b in range(2) for t in range(3) if targets[b, t] >= 0)
    assert cross_entropy(logits, targets, reduction="sum").item() == pytest.approx(nats, rel=1e-5)
    assert cross_entropy(logits, targets).item() == pytest.approx(nats / 4, rel=1e-5)
    assert cross_entropy(logits.bfloat16(), targets).dtype == torch.float32
