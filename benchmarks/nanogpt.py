"""The reference of train_speed.py: a small GPT-2 in plain PyTorch with nanoGPT's quick-start settings for a CPU.

    python benchmarks/nanogpt.py --data FILE --out DIR [--steps 2000] [--seed 1] [--device cpu]
    python benchmarks/nanogpt.py --data FILE --out DIR --score
    python benchmarks/nanogpt.py --run RUN

The first command trains, keeps the best weights in DIR/model.safetensors and writes DIR/reference.json at its end;
progress goes to stderr. 2,000 steps took 95 s on two cores. The second prints the loss of these weights on the
validation text as JSON, the third that of the best checkpoint of a smallm run; both give the loss by two protocols, in
nats per character: of the whole text in adjacent windows (`nats_per_char`, as smallm reports it), and of 200 batches of
12 windows at random positions (`random_windows`, as nanoGPT estimates it, with the standard error of the mean).

Source: https://github.com/karpathy/nanoGPT, README, "I only have a macbook".
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout need not be installed

from smallm.cli.main import run
from smallm.errors import UserError
from smallm.runs.layout import VALIDATION
from smallm.training.checkpoint.format import load_model, load_vocabulary
from smallm.training.checkpoint.manager import best_checkpoint

RANDOM_BATCHES = 200  # of a score; nanoGPT's default


@dataclass(frozen=True)
class Settings:
    """nanoGPT's published settings; sizes in characters, rates per step."""

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 64
    batch_size: int = 12
    learning_rate: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    eval_every: int = 250
    eval_batches: int = 20

    def lr(self, step: int, steps: int) -> float:
        """Learning rate of step 0, 1, …: linear warm-up, then a cosine that ends at min_lr after `steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / (steps - self.warmup_steps)
        return self.min_lr + (self.learning_rate - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class Block(nn.Module):
    """Attention and a GELU MLP, each with pre-normalisation and a residual connection; no biases."""

    def __init__(self, s: Settings):
        super().__init__()
        self.n_head = s.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(s.n_embd, bias=False), nn.LayerNorm(s.n_embd, bias=False)
        self.c_attn = nn.Linear(s.n_embd, 3 * s.n_embd, bias=False)
        self.attn_proj = nn.Linear(s.n_embd, s.n_embd, bias=False)
        self.c_fc = nn.Linear(s.n_embd, 4 * s.n_embd, bias=False)
        self.mlp_proj = nn.Linear(4 * s.n_embd, s.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        heads = self.c_attn(self.ln_1(x)).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, nh, hd)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, nh, T, hd) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """ids (B, T) -> logits (B, T, V), with learned positions and tied embeddings."""

    def __init__(self, vocab_size: int, s: Settings):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, s.n_embd), nn.Embedding(s.block_size, s.n_embd)
        self.h = nn.ModuleList(Block(s) for _ in range(s.n_layer))
        self.ln_f = nn.LayerNorm(s.n_embd, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, 0, 0.02 / (math.sqrt(2 * s.n_layer) if "_proj" in name else 1))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V); T is at most block_size."""
        x = self.wte(ids) + self.wpe.weight[: ids.size(1)]
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)

    def flops_per_id(self) -> int:
        """Operations of a forward and backward pass per id, counted as in smallm's model; positions need no product."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2) - self.wpe.weight.numel()
        return 6 * matrices + 6 * len(self.h) * self.wpe.weight.numel()


def loss_of(model: nn.Module, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats per character, or the sum; ids and targets (B, T)."""
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction=reduction)


def read_text(path: Path, block_size: int) -> tuple[int, Tensor, Tensor]:
    """Vocabulary size, ids of the first 90 % of the characters of a UTF-8 text, and ids of the rest."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as a UTF-8 text: {error}") from None
    id_of = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([id_of[character] for character in text])
    train, val = ids.tensor_split([len(ids) * 9 // 10])
    if min(len(train), len(val)) <= block_size:
        raise UserError(f"{path} is too short: a tenth of it must have more than {block_size} characters")
    return len(id_of), train, val


def random_batch(ids: Tensor, s: Settings, device: str) -> tuple[Tensor, Tensor]:
    """Windows at random positions: ids and targets, each (B, T)."""
    starts = torch.randint(len(ids) - s.block_size, (s.batch_size,)).tolist()
    windows = torch.stack([ids[start : start + s.block_size + 1] for start in starts]).to(device)
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def estimate(model: nn.Module, ids: Tensor, s: Settings, device: str) -> tuple[float, float]:
    """Mean loss over `eval_batches` random batches, and its standard error."""
    losses = [loss_of(model, *random_batch(ids, s, device)).item() for _ in range(s.eval_batches)]
    return statistics.fmean(losses), statistics.stdev(losses) / math.sqrt(s.eval_batches)


def build_optimizer(model: GPT, s: Settings, device: str) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices, gains = ([p for p in model.parameters() if p.ndim == ndim] for ndim in (2, 1))
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=s.betas, fused=device == "cuda")


def update(model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], lr: float, clip: float) -> float:
    """One step; returns the loss before the step in nats per character."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = loss_of(model, *batch)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


def train(data: Path, out: Path, steps: int, seed: int, device: str) -> dict:
    """Trains, writes the best weights and reference.json into `out`, and returns the content of reference.json."""
    s = Settings()
    torch.manual_seed(seed)
    vocab_size, train_ids, val_ids = read_text(data, s.block_size)
    out.mkdir(parents=True, exist_ok=True)
    model = GPT(vocab_size, s).to(device)
    optimizer = build_optimizer(model, s, device)
    seconds, best_loss, best_step = [], math.inf, 0
    for step in range(1, steps + 1):
        started = time.perf_counter()
        loss = update(model, optimizer, random_batch(train_ids, s, device), s.lr(step - 1, steps), s.grad_clip)
        seconds.append(time.perf_counter() - started)
        if step % 100 == 0 or step == steps:
            print(f"step {step} loss {loss:.4f} {1000 * seconds[-1]:.2f} ms", file=sys.stderr)
        if step % s.eval_every == 0 or step == steps:
            train_loss, val_loss = (estimate(model, ids, s, device)[0] for ids in (train_ids, val_ids))
            print(f"step {step} estimates: train {train_loss:.4f}, validation {val_loss:.4f}", file=sys.stderr)
            if val_loss < best_loss:
                best_loss, best_step = val_loss, step
                save_file(model.state_dict(), out / "model.safetensors")
    median = statistics.median(seconds)
    result = {
        "median_step_ms": 1000 * median, "characters_per_second": s.batch_size * s.block_size / median,
        "parameters": sum(p.numel() for p in model.parameters()), "flops_per_id": model.flops_per_id(),
        "best_estimate": best_loss, "best_step": best_step, "steps": steps, "seed": seed, "device": device,
    }  # fmt: skip
    (out / "reference.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def score_reference(data: Path, out: Path) -> dict:
    """The loss of trained weights of the reference by both protocols."""
    s = Settings()
    vocab_size, _, ids = read_text(data, s.block_size)
    model = GPT(vocab_size, s).eval()
    try:
        model.load_state_dict(load_file(out / "model.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{out} does not hold a model of this text: {' '.join(str(error).split())}") from None
    return score(model, ids, len(ids), s.block_size)


def score_run(folder: Path) -> dict:
    """The loss of the best checkpoint of a smallm run by both protocols, in windows of its context."""
    checkpoint = best_checkpoint(folder)
    model, vocabulary = load_model(checkpoint), load_vocabulary(checkpoint)
    try:
        with (folder / VALIDATION).open(encoding="utf-8", newline="") as file:
            text = file.read()
    except OSError:
        raise UserError(f"{folder} does not hold its validation text, {VALIDATION}") from None
    ids = torch.tensor(vocabulary.encode(text).tolist())
    if len(ids) <= model.config.block_size:
        raise UserError(f"{folder / VALIDATION} is not longer than a window of {model.config.block_size}")
    return score(model, ids, len(text), model.config.block_size)


@torch.no_grad()
def score(model: nn.Module, ids: Tensor, characters: int, T: int) -> dict:
    """The loss of a text by both protocols; in adjacent windows all ids but the first count once."""
    predicted, nats = len(ids) - 1, 0.0
    whole = predicted // T * T  # the rest is a last, shorter window
    for start in range(0, whole, 128 * T):
        end = min(start + 128 * T, whole)
        nats += loss_of(model, ids[start:end].view(-1, T), ids[start + 1 : end + 1].view(-1, T), "sum").item()
    if whole < predicted:
        nats += loss_of(model, ids[None, whole:-1], ids[None, whole + 1 :], "sum").item()
    torch.manual_seed(1)
    loss, error = estimate(model, ids, replace(Settings(), block_size=T, eval_batches=RANDOM_BATCHES), "cpu")
    per_character = len(ids) / characters
    return {
        "nats_per_char": nats / (characters - 1), "characters": characters - 1, "window": T,
        "random_windows": loss * per_character, "random_windows_error": error * per_character,
    }  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Trains, or scores trained weights or a run."""
    parser = argparse.ArgumentParser(prog="nanogpt.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, metavar="FILE", help="a UTF-8 text")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the weights and reference.json")
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="updates (default: 2000)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="random seed (default: 1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--score", action="store_true", help="measure the weights in DIR instead of training")
    parser.add_argument("--run", type=Path, metavar="RUN", help="measure this run of smallm instead of training")
    options = parser.parse_args(argv)
    if options.run:
        print(json.dumps(score_run(options.run)))
        return 0
    if options.data is None or options.out is None:
        raise UserError("give --data and --out, or --run")
    if options.score:
        print(json.dumps(score_reference(options.data, options.out)))
        return 0
    if options.steps < 1:
        raise UserError(f"--steps {options.steps} is out of range; it must be 1 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU was found; use --device cpu")
    train(options.data, options.out, options.steps, options.seed, options.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
