"""The model's small operations in plain PyTorch, and a whole block as a compiled kernel for CPUs.

In plain PyTorch on a CPU the block of a small model dissolves into dozens of passes over memory, which together cost as
much as its matrix products. The kernels (kernels.c) compute the same, forward and backward, in one call each. They
serve float32 on a CPU; everything else takes the plain form, which compilers fuse.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from smallm.inference.scoring import IGNORED
from smallm.training.model.kernels.compiler import has_bf16
from smallm.training.model.kernels.loader import Kernels, load

NORM_EPS = 1e-6
PANEL = 32  # the kernels take matrices whose sides are multiples of this


def kernels(x: Tensor) -> Kernels | None:
    """The kernels, if there are any for this tensor here and now; under bf16 autocast those of bf16 products."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled("cpu"):
        return load(bf16=True) if torch.get_autocast_dtype("cpu") == torch.bfloat16 and has_bf16() else None
    return load()


def block(
    x: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, n_head: int, window: int, dropout: float
) -> Tensor:
    """A whole TransformerBlock in one kernel: x (B, T, C) -> (B, T, C).

    weights: ln_1 (C,), c_attn ((nh + 2 nkv) hd, C), q_norm and k_norm (hd,), c_proj (C, nh hd), ln_2 (C,),
    c_fc (2 I, C), c_proj of the feed-forward (C, I); cos, sin (T, hd); window: as `attention` has it; dropout:
    probability, at the end of both halves.
    """
    seed = int(torch.randint(1 << 31, ())) if dropout else 0
    return _Block.apply(x, cos, sin, n_head, window, dropout, seed, *weights)


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x (..., C), gain (C,) -> x / rms(x) * gain, over the last dimension (Zhang and Sennrich 2019)."""
    return _RMSNorm.apply(x, gain) if kernels(x) else F.rms_norm(x, gain.shape, gain, NORM_EPS)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Nats per id. logits (B, T, V), targets (B, T); positions with target IGNORED do not count."""
    if not kernels(logits):
        flat = logits.flatten(0, 1).float()
        return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction=reduction)
    nats = _CrossEntropy.apply(logits, targets)  # (B, T)
    return nats.sum() if reduction == "sum" else nats.sum() / (targets != IGNORED).sum()


def attention(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, n_head: int, window: int = 0
) -> Tensor:
    """Causal self-attention on packed heads, queries and keys each RMS-normed and then rotated by their position.

    qkv (B, T, nh + 2 nkv, hd); gains (hd,); cos, sin (T, hd), the sine of the first half negated, as in RoFormer
    (Su et al. 2021) with the halves of a head rotated against each other; window: positions that each sees, its own
    included, 0 = all up to its own -> (B, T, nh, hd).
    """
    n_kv_head = (qkv.size(2) - n_head) // 2
    q, k, v = qkv.split((n_head, n_kv_head, n_kv_head), dim=2)
    q, k = _norm_and_rotate(q, q_gain, cos, sin), _norm_and_rotate(k, k_gain, cos, sin)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, hd)
    T, mask = q.size(2), None
    if 0 < window < T:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    gqa = n_kv_head != n_head
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return y.transpose(1, 2)


def polynomial_iteration(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """x (n, rows, columns) -> a x + (b S + c S S) x with S = x x^T, once for each a, b, c."""
    if kernels(x) and x.size(1) % PANEL == x.size(2) % PANEL == 0:
        x = x.clone(memory_format=torch.contiguous_format)
        load()("orthogonalise", x, torch.tensor(coefficients), *x.shape, len(coefficients))
        return x
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _norm_and_rotate(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = F.rms_norm(x, gain.shape, None, NORM_EPS) * gain.to(x.dtype)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (T, 1, hd)
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


class _Block(Function):
    @staticmethod
    def forward(ctx, x, cos, sin, n_head, window, dropout, seed, *weights):
        x, (B, T, C), hd = x.contiguous(), x.shape, cos.size(1)
        rows, inner = weights[1].size(0), weights[7].size(1)
        n_kv_head = (rows // hd - n_head) // 2
        ctx.sizes = (B, T, C, n_head, n_kv_head, hd, inner, window or T, seed, NORM_EPS, dropout)
        y, middle = torch.empty_like(x), torch.empty_like(x)
        qkv, attended, lse = (x.new_empty(B, T, n) for n in (rows, n_head * hd, n_head))
        gate_up = x.new_empty(B, T, 2 * inner)
        packed = x.new_empty(sum(w.numel() for w in weights))
        ctx.kernels = kernels(x)
        ctx.kernels("block", x, y, qkv, attended, lse, middle, gate_up, packed, *weights, cos, sin, *ctx.sizes)
        ctx.save_for_backward(x, qkv, attended, lse, middle, gate_up, cos, sin, *weights)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, qkv, attended, lse, middle, gate_up, cos, sin, *weights = ctx.saved_tensors
        dx, dattended, dqkv = (torch.empty_like(t) for t in (x, attended, qkv))
        count = sum(w.numel() for w in weights)
        gradients, packed, parts = (x.new_empty(n * count) for n in (1, 1, 2 * torch.get_num_threads()))
        ctx.kernels("block_backward", grad.contiguous(), x, qkv, attended, lse, middle, gate_up, dx, gradients,
               dattended, dqkv, packed, parts, *weights, cos, sin, *ctx.sizes)  # fmt: skip
        each = gradients.split([w.numel() for w in weights])
        return dx, None, None, None, None, None, None, *(g.view_as(w) for g, w in zip(each, weights, strict=True))


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, gain):
        x, y = x.contiguous(), torch.empty_like(x)
        load()("rms_norm", x, gain, y, x.numel() // x.size(-1), x.size(-1), NORM_EPS)
        ctx.save_for_backward(x, gain)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, gain = ctx.saved_tensors
        dx, dgain = torch.empty_like(x), torch.empty_like(gain)
        parts = x.new_empty(2 * torch.get_num_threads(), gain.numel())
        load()("rms_norm_backward", grad.contiguous(), x, gain, dx, dgain, parts,
               x.numel() // x.size(-1), x.size(-1), NORM_EPS)  # fmt: skip
        return dx, dgain


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits, targets):
        logits, targets = logits.contiguous(), targets.contiguous()
        nats, lse = (logits.new_empty(targets.shape) for _ in range(2))
        load()("cross_entropy", logits, targets, nats, lse, targets.numel(), logits.size(-1))
        ctx.save_for_backward(logits, targets, lse)
        return nats

    @staticmethod
    def backward(ctx, grad):
        logits, targets, lse = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        load()("cross_entropy_backward", grad.contiguous(), logits, targets, lse, dlogits,
               targets.numel(), logits.size(-1))  # fmt: skip
        return dlogits, None
