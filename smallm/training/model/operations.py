"""The model's operations: in plain PyTorch for every device, and as compiled kernels for float32 on CPUs.

On a CPU, plain PyTorch runs the block of a small model as dozens of passes over memory, which together cost as much as
the matrix products. The kernels (kernels/kernels.c) compute the same operations, forward and backward, in one call
each. All other devices and types take the plain PyTorch form, which torch.compile can fuse.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from smallm.inference.scoring import IGNORED
from smallm.training.model.kernels.compiler import has_bf16
from smallm.training.model.kernels.loader import Kernels, load

NORM_EPS = 1e-6
KERNEL_MULTIPLE = 32  # the kernels take matrices whose sides are multiples of this


def cpu_kernels(x: Tensor) -> Kernels | None:
    """The compiled kernels that can process `x`, or None. Under bf16 autocast, the kernels with bf16 products."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled("cpu"):
        return load(bf16=True) if torch.get_autocast_dtype("cpu") == torch.bfloat16 and has_bf16() else None
    return load()


def block(
    x: Tensor, weights: Mapping[str, Tensor], cos: Tensor, sin: Tensor, n_head: int, window: int, dropout: float
) -> Tensor:
    """A whole TransformerBlock in one kernel call: x (B, T, C) -> (B, T, C).

    Args:
        x: float32 on a CPU; C, I and (nh + 2 nkv) hd are multiples of KERNEL_MULTIPLE.
        weights: the block's parameters by name (`TransformerBlock.named_parameters()`).
        cos, sin: tables from `Rotary`, (T, hd).
        n_head: number of query heads nh.
        window: number of positions that each position attends to, including itself; 0 = all earlier ones.
        dropout: probability, applied to the output of attention and of the feed-forward.
    """
    seed = int(torch.randint(1 << 31, ())) if dropout else 0
    hd, C = cos.size(1), x.size(2)
    rows, inner = weights["attn.c_attn.weight"].size(0), weights["mlp.c_proj.weight"].size(1)
    shapes = {
        "ln_1.weight": (C,), "attn.c_attn.weight": (rows, C), "attn.q_norm.weight": (hd,),
        "attn.k_norm.weight": (hd,), "attn.c_proj.weight": (C, n_head * hd), "ln_2.weight": (C,),
        "mlp.c_fc.weight": (2 * inner, C), "mlp.c_proj.weight": (C, inner),
    }  # fmt: skip
    assert cos.shape == sin.shape == (x.size(1), hd)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shapes
    return _Block.apply(x, cos, sin, n_head, window, dropout, seed, *(weights[name] for name in shapes))


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x (..., C), gain (C,) -> x / rms(x) * gain over the last dimension (Zhang and Sennrich 2019)."""
    if not cpu_kernels(x):
        return F.rms_norm(x, gain.shape, gain, NORM_EPS)
    assert gain.shape == x.shape[-1:]
    return _RMSNorm.apply(x, gain)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats. logits (B, T, V), targets (B, T); positions with target IGNORED (-1) do not count.

    reduction: "mean" = nats per id that counts, "sum" = nats of all ids.
    """
    if not cpu_kernels(logits):
        flat = logits.flatten(0, 1).float()  # (B T, V)
        return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction=reduction)
    assert targets.shape == logits.shape[:-1]
    assert targets.dtype == torch.int64
    nats = _CrossEntropy.apply(logits, targets)  # (B, T)
    return nats.sum() if reduction == "sum" else nats.sum() / (targets != IGNORED).sum()


class LayerKVCache:
    """Keys and values of one layer for all positions so far, each (B, nkv, T, hd); empty at first."""

    def __init__(self) -> None:
        self._stored: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds later positions; returns keys and values of all positions."""
        if self._stored is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self._stored, (k, v), strict=True))
        self._stored = k, v
        return k, v

    def __len__(self) -> int:
        return 0 if self._stored is None else self._stored[0].size(2)


def attention(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, n_head: int, window: int = 0,
    cache: LayerKVCache | None = None,
) -> Tensor:  # fmt: skip
    """Causal self-attention on packed heads -> (B, T, nh, hd).

    Queries and keys are RMS-normed, then rotated (RoFormer, Su et al. 2021, in the half-split layout).

    Args:
        qkv: query, key and value heads, (B, T, nh + 2 nkv, hd).
        q_gain, k_gain: gains of the norms of queries and keys, (hd,).
        cos, sin: tables from `Rotary`, (T, hd); the first half of the sine is negated.
        n_head: number of query heads nh.
        window: number of positions that each position attends to, including itself; 0 = all earlier ones.
        cache: keys and values of the positions before, to which those of qkv are added. Unless the cache is empty, T
            must be 1.
    """
    n_kv_head = (qkv.size(2) - n_head) // 2
    q, k, v = qkv.split((n_head, n_kv_head, n_kv_head), dim=2)
    q, k = _norm_and_rotate(q, q_gain, cos, sin), _norm_and_rotate(k, k_gain, cos, sin)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, hd)
    T, mask = q.size(2), None
    if cache is not None:
        k, v = cache.extend(k, v)  # (B, nkv, positions, hd)
    causal = k.size(2) == T
    if causal and 0 < window < T:
        mask, causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window), False  # (T, T)
    elif not causal:  # the last position attends to the cached ones
        k, v = k[:, :, -window:], v[:, :, -window:]
    gqa = n_kv_head != n_head
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)
    return y.transpose(1, 2)  # (B, nh, T, hd) -> (B, T, nh, hd)


def polynomial_iteration(
    x: Tensor, coefficients: Sequence[tuple[float, float, float]], bf16: bool = False
) -> Tensor:
    """x (n, rows, columns) -> a x + (b S + c S S) x with S = x x^T, repeated for each (a, b, c) of the coefficients.

    bf16: whether kernels for bf16 compute float32 tensors on a CPU: with operands in bf16, and sums in float32.
    """
    if cpu_kernels(x) and x.size(1) % KERNEL_MULTIPLE == x.size(2) % KERNEL_MULTIPLE == 0:
        x = x.clone(memory_format=torch.contiguous_format)
        _kernels(bf16 and has_bf16())("orthogonalise", x, x.new_tensor(coefficients), *x.shape, len(coefficients))
        return x
    for a, b, c in coefficients:
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _kernels(bf16: bool = False) -> Kernels:
    kernels = load(bf16)
    assert kernels is not None  # `cpu_kernels` has returned kernels
    return kernels


def _parts_of_threads(total: Tensor) -> Tensor:
    """Memory for the partial sums of a gradient: two for each thread; one thread adds to the gradient itself."""
    threads = torch.get_num_threads()
    return total if threads == 1 else total.new_empty(2 * threads, *total.shape)


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
        ctx.kernels = cpu_kernels(x)  # the backward pass runs outside autocast and must use the same kernels
        ctx.kernels("block", x, y, qkv, attended, lse, middle, gate_up, packed, *weights, cos, sin, *ctx.sizes)
        ctx.save_for_backward(x, qkv, attended, lse, middle, gate_up, cos, sin, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, qkv, attended, lse, middle, gate_up, cos, sin, *weights = ctx.saved_tensors
        dx, dattended, dqkv = (torch.empty_like(t) for t in (x, attended, qkv))
        sizes = [w.numel() for w in weights]
        gradients, packed = (x.new_empty(sum(sizes)) for _ in range(2))
        parts = _parts_of_threads(gradients)
        ctx.kernels("block_backward", grad.contiguous(), x, qkv, attended, lse, middle, gate_up, dx, gradients,
               dattended, dqkv, packed, parts, *weights, cos, sin, *ctx.sizes)  # fmt: skip
        dweights = (g.view_as(w) for g, w in zip(gradients.split(sizes), weights, strict=True))
        return dx, None, None, None, None, None, None, *dweights


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, gain):
        x, y = x.contiguous(), torch.empty_like(x)
        _kernels()("rms_norm", x, gain, y, x.numel() // x.size(-1), x.size(-1), NORM_EPS)
        ctx.save_for_backward(x, gain)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gain = ctx.saved_tensors
        dx, dgain = torch.empty_like(x), torch.empty_like(gain)
        _kernels()("rms_norm_backward", grad.contiguous(), x, gain, dx, dgain, _parts_of_threads(dgain),
               x.numel() // x.size(-1), x.size(-1), NORM_EPS)  # fmt: skip
        return dx, dgain


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits, targets):
        logits, targets = logits.contiguous(), targets.contiguous()
        nats, lse = (logits.new_empty(targets.shape) for _ in range(2))
        _kernels()("cross_entropy", logits, targets, nats, lse, targets.numel(), logits.size(-1))
        ctx.save_for_backward(logits, targets, lse)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, targets, lse = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        _kernels()("cross_entropy_backward", grad.contiguous(), logits, targets, lse, dlogits,
               targets.numel(), logits.size(-1))  # fmt: skip
        return dlogits, None
