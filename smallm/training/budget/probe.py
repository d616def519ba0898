"""How fast this machine trains a model of a given shape: a few steps of a model that is thrown away."""

import time
from statistics import median

import torch
from accelerate import Accelerator

from smallm.training.config import Config
from smallm.training.devices import prepare
from smallm.training.model.operations import cross_entropy
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.optimizers import build_optimizer, set_learning_rate

WARM_UP, LEAST, MOST = 3, 3, 200  # steps: that are not timed, as memory and kernels settle; and those that are


def flops_per_second(accelerator: Accelerator, config: Config, vocabulary: int, rows: int, seconds: float) -> float:
    """FLOPs of training (as `flops_per_id` counts them) that all processes together do in a second.

    config: of the model and the optimiser; vocabulary: its size; rows: sequences of random ids that a process takes in
    a step; seconds: about how long to measure. All processes must call this, and all get the same figure.
    """
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    bare = TransformerLanguageModel(vocabulary, config.model, seed=0)
    model, optimizer = prepare(accelerator, bare, build_optimizer(bare, config.optim))
    set_learning_rate(optimizer, 1.0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, config.model.block_size), generator=generator).to(accelerator.device)

    def step() -> float:
        begun = time.perf_counter()
        accelerator.backward(cross_entropy(model(ids), ids))
        if config.optim.grad_clip:
            accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - begun

    warm = _mean(accelerator, [step() for _ in range(WARM_UP)][-1])
    number = min(MOST, max(LEAST, int(seconds / warm)))  # on each process the same
    typical = _mean(accelerator, median([step() for _ in range(number)]))
    accelerator.free_memory()  # what was prepared here is forgotten
    if scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    return accelerator.num_processes * ids.numel() * bare.flops_per_id() / typical


def _mean(accelerator: Accelerator, seconds: float) -> float:
    """Over the processes."""
    if accelerator.num_processes == 1:
        return seconds
    kind = torch.float32 if accelerator.device.type == "mps" else torch.float64
    return accelerator.reduce(torch.tensor(seconds, dtype=kind, device=accelerator.device), "mean").item()
