"""The model: a small decoder-only Transformer with the Qwen3 architecture.

Pre-norm RMSNorm, rotary position embedding (RoPE), RMSNorm on queries and keys, SwiGLU, tied embedding, optional
grouped-query heads. Software that supports dense Qwen3 models can therefore open a checkpoint as it is.

Shapes: B batch, T time (positions), C channels (n_embd), V vocabulary, nh query heads, nkv key/value heads, hd head
width, I inner width of the feed-forward.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smallm.training.config import ModelConfig
from smallm.training.model.operations import KERNEL_MULTIPLE, LayerKVCache, attention, block, cpu_kernels, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm with one gain per channel (Zhang and Sennrich 2019)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape."""
        return rms_norm(x, self.weight)


class Rotary(nn.Module):
    """Cosine and sine tables of the rotary position embedding (RoFormer, Su et al. 2021)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, block_size: int, theta: float):
        super().__init__()
        cos, sin = rotary_tables(head_dim, block_size, theta)
        self.register_buffer("cos", torch.cat((cos, cos), -1), persistent=False)  # (block_size, hd)
        self.register_buffer("sin", torch.cat((-sin, sin), -1), persistent=False)  # (block_size, hd)

    def forward(self, T: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Cosine and sine for T positions from `start`, each (T, hd); the first half of the sine is negated."""
        return self.cos[start : start + T], self.sin[start : start + T]


def rotary_tables(head_dim: int, block_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, each (block_size, hd / 2) in float32."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)  # (hd / 2,)
    angles = torch.arange(block_size, dtype=torch.float64)[:, None] * frequencies  # (block_size, hd / 2)
    return angles.cos().float(), angles.sin().float()


class MultiHeadSelfAttention(nn.Module):
    """Causal self-attention; one projection computes queries, keys and values."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.window = config.window
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)
        self.c_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerKVCache | None = None) -> Tensor:
        """x (B, T, C), cos and sin (T, hd) -> (B, T, C). Position t attends to positions up to t within the window."""
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim)  # (B, T, nh + 2 nkv, hd)
        y = attention(qkv, self.q_norm.weight, self.k_norm.weight, cos, sin, self.n_head, self.window, cache)
        return self.c_proj(y.reshape(B, T, -1))  # (B, T, nh, hd) -> (B, T, nh hd) -> (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020); one projection computes gate and up."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 2 * config.inner, bias=False)
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        gate, up = self.c_fc(x).chunk(2, dim=-1)  # (B, T, I) each
        return self.c_proj(F.silu(gate) * up)  # (B, T, C)


class TransformerBlock(nn.Module):
    """Self-attention, then feed-forward, each on normalised input and added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd)
        self.attn = MultiHeadSelfAttention(config)
        self.ln_2 = RMSNorm(config.n_embd)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        widths = (config.n_embd, config.inner, sum(config.packed_rows["attn.c_attn.weight"]))
        self.fits_kernels = all(width % KERNEL_MULTIPLE == 0 for width in widths)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerKVCache | None = None) -> Tensor:
        """x (B, T, C), cos and sin (T, hd) -> (B, T, C)."""
        if cache is None and self.fits_kernels and cpu_kernels(x):
            dropout = self.dropout.p if self.training else 0.0
            return block(x, dict(self.named_parameters()), cos, sin, self.attn.n_head, self.attn.window, dropout)
        x = x + self.dropout(self.attn(self.ln_1(x), cos, sin, cache))
        x = x + self.dropout(self.mlp(self.ln_2(x)))
        return x


class TransformerLanguageModel(nn.Module):
    """Maps ids to the logits of the next id, at every position."""

    def __init__(self, vocab_size: int, config: ModelConfig, seed: int | None = None):
        """With a seed, the initial weights depend on the seed alone; without, on PyTorch's global random state."""
        super().__init__()
        self.vocab_size, self.config = vocab_size, config
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd)
        self.rotary = Rotary(config.head_dim, config.block_size, config.rope_theta)
        self.init_weights(None if seed is None else torch.Generator().manual_seed(seed))

    def forward(self, ids: Tensor, caches: Sequence[LayerKVCache] = ()) -> Tensor:
        """ids (B, T) -> logits (B, T, V). The output matrix is the embedding (tied weights).

        caches: none, or one of each layer, with the positions before those of ids, to which the latter are added;
        unless the caches are empty, T must be 1. In all there are at most block_size positions.
        """
        cos, sin = self.rotary(ids.size(1), len(caches[0]) if caches else 0)  # (T, hd) each
        x = self.dropout(self.wte(ids))  # (B, T, C)
        each: Sequence[LayerKVCache | None] = caches or [None] * len(self.h)
        for layer, cache in zip(self.h, each, strict=True):
            x = layer(x, cos, sin, cache)  # (B, T, C)
        return F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialises all weights. Projections into the residual stream start at zero, so each block starts as the
        identity.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.zero_()
            elif name == "wte.weight":
                init_embedding(parameter, generator)
            elif parameter.ndim == 2:
                parameter.normal_(0, 0.5 * parameter.size(1) ** -0.5, generator=generator)
            else:  # gains of the norms
                parameter.fill_(1)

    def parameter_count(self) -> int:
        """Number of trainable parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_id(self) -> int:
        """Floating-point operations per id of one forward and backward pass over a window of block_size ids.

        Six per weight of a matrix product, plus the causal half of the two attention products (PaLM, Chowdhery et al.
        2022, appendix B).
        """
        c = self.config
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return 6 * matrices + 6 * c.n_layer * c.n_head * c.head_dim * min(c.window or c.block_size, c.block_size)


def init_embedding(rows: Tensor, generator: torch.Generator | None = None) -> None:
    """Initialises rows (n, C) of the embedding so that the first loss is near ln V at any width.

    With a standard deviation of 2 / C the logit of a character for itself is about 2.
    """
    rows.normal_(0, 2 / rows.size(1), generator=generator)
