"""The model's small operations, each written twice: in plain PyTorch, and for CPUs with a backward pass of its own.

In plain PyTorch on a CPU a norm or a rotation dissolves into a dozen passes over memory, which together cost as much as
the matrix products of a small model. The second form computes the same with half of the passes. `rms_norm` and
`qk_norm_rotary` choose: the second form for float32 on a CPU, else the plain one, which compilers fuse. (For SwiGLU
such a form was no faster than autograd's.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

NORM_EPS = 1e-6


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x (..., C), gain (C,) -> x / rms(x) * gain, over the last dimension (Zhang and Sennrich 2019)."""
    return _RMSNorm.apply(x, gain) if _own_backward(x) else rms_norm_plain(x, gain)


def qk_norm_rotary(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, n_head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits packed heads and prepares queries and keys for attention: RMSNorm per head, then rotation by position.

    qkv (B, T, nh + 2 nkv, hd); gains (hd,); cos, sin (T, hd), the sine of the first half negated, as in RoFormer
    (Su et al. 2021) with the halves of a head rotated against each other. -> q (B, nh, T, hd), k and v (B, nkv, T, hd).
    """
    n_kv_head = (qkv.size(2) - n_head) // 2
    gain = torch.cat((q_gain.expand(n_head, -1), k_gain.expand(n_kv_head, -1)))  # (nh + nkv, hd)
    prepare = _QKNormRotary.apply if _own_backward(qkv) else qk_norm_rotary_plain
    q, k, v = prepare(qkv, gain, cos, sin, n_head)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def rms_norm_plain(x: Tensor, gain: Tensor) -> Tensor:
    """`rms_norm` in plain PyTorch."""
    return F.rms_norm(x, gain.shape, gain, NORM_EPS)


def qk_norm_rotary_plain(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, n_head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The work of `qk_norm_rotary` in plain PyTorch -> q (B, T, nh, hd), k and v (B, T, nkv, hd)."""
    heads, hd = gain.shape
    qk, v = qkv.split((heads, qkv.size(2) - heads), dim=2)
    qk = F.rms_norm(qk, (hd,), None, NORM_EPS) * gain
    cos, sin = cos[:, None].to(qk.dtype), sin[:, None].to(qk.dtype)  # (T, 1, hd)
    qk = qk * cos + qk.roll(hd // 2, -1) * sin
    return qk[:, :, :n_head], qk[:, :, n_head:], v


def _own_backward(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor) -> Tensor:
        scale = _inverse_rms(x)
        normed = x * scale
        ctx.save_for_backward(normed, scale, gain)
        return normed * gain

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        normed, scale, gain = ctx.saved_tensors
        grad_gain = (grad * normed).flatten(0, -2).sum(0)
        return _without_part_along(normed, grad * gain).mul_(scale), grad_gain


class _QKNormRotary(Function):
    @staticmethod
    def forward(
        ctx, qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, n_head: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, hd = gain.shape
        x = qkv[:, :, :heads]
        scale = _inverse_rms(x)
        normed = x * scale  # (B, T, nh + nkv, hd)
        cos, sin = cos[:, None], sin[:, None]  # (T, 1, hd)
        ctx.save_for_backward(normed, scale, gain, cos, sin)
        # Gain and rotation in one table (T, nh + nkv, hd), which is small beside the activations.
        qk = (normed * (cos * gain)).addcmul_(normed.roll(hd // 2, -1), sin * gain.roll(hd // 2, -1))
        return qk[:, :, :n_head], qk[:, :, n_head:], qkv[:, :, heads:]

    @staticmethod
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        normed, scale, gain, cos, sin = ctx.saved_tensors
        B, T, heads, hd = normed.shape
        grad = torch.cat((grad_q, grad_k), dim=2)
        turned_back = (grad * sin).roll(-(hd // 2), -1).addcmul_(grad, cos)
        grad_gain = (turned_back * normed).sum((0, 1))
        grad_qkv = grad.new_empty(B, T, heads + grad_v.size(2), hd)
        torch.mul(_without_part_along(normed, turned_back.mul_(gain)), scale, out=grad_qkv[:, :, :heads])
        grad_qkv[:, :, heads:] = grad_v
        return grad_qkv, grad_gain, None, None, None


def _inverse_rms(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.size(-1)).add_(NORM_EPS).rsqrt_()


def _without_part_along(normed: Tensor, grad: Tensor) -> Tensor:
    """The gradient (..., C) without its part along `normed`, which a norm takes away."""
    along = torch.linalg.vecdot(grad, normed).div_(-normed.size(-1)).unsqueeze(-1)
    return torch.addcmul(grad, normed, along)
