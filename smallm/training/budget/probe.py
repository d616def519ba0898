"""Measures how fast this machine trains a model of a given shape, by a few steps of a temporary model."""

import time
from collections.abc import Callable
from statistics import median

import torch
from accelerate import Accelerator
from torch import Tensor

from smallm.training.config import Config
from smallm.training.devices import prepare
from smallm.training.distributed import sum_over_processes
from smallm.training.model.compilation import compile_model, should_compile
from smallm.training.model.operations import cross_entropy
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.optimizers import build_optimizer, set_learning_rate

WARMUP_STEPS, MIN_STEPS, MAX_STEPS = 3, 3, 200  # untimed steps, and the range of the number of timed steps


def flops_per_second(
    accelerator: Accelerator, config: Config, vocab_size: int, rows: int, seconds: float, passes: int = 0
) -> float:
    """Training speed of all processes together, in FLOP per second (as `flops_per_id` counts FLOPs).

    All processes must call this, and all get the same result.

    Args:
        accelerator: of the run.
        config: shape of the model, and the optimiser.
        vocab_size: size of the vocabulary.
        rows: sequences per step and process; the ids are random.
        seconds: approximate duration of the measurement, without compilation.
        passes: expected forward and backward passes of the run on this device, by which train.compile = auto decides
            whether the run, and so this measurement, compiles the model; 0 = measure without compiling.
    """
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    bare = TransformerLanguageModel(vocab_size, config.model, seed=0)
    model, optimizer = prepare(accelerator, bare, build_optimizer(bare, config.optim))
    set_learning_rate(optimizer, 1.0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (rows, config.model.block_size), generator=generator).to(accelerator.device)

    forward: Callable[[Tensor], Tensor] = model
    if passes and should_compile(config.train.compile, accelerator.device, passes,
                                bare.flops_per_id() * ids.numel(), config.model.n_layer):  # fmt: skip
        forward = compile_model(model, accelerator, [(ids, ids)], say=lambda line: None)  # the run reports failures

    def step() -> float:
        start = time.perf_counter()
        accelerator.backward(cross_entropy(forward(ids), ids))
        if config.optim.grad_clip:
            accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    ranks = accelerator.num_processes
    step_seconds = sum_over_processes(accelerator, [step() for _ in range(WARMUP_STEPS)][-1]) / ranks
    count = min(MAX_STEPS, max(MIN_STEPS, int(seconds / step_seconds)))  # the same on each process
    step_seconds = sum_over_processes(accelerator, median([step() for _ in range(count)])) / ranks
    accelerator.free_memory()  # drops the temporary model and optimiser
    if scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    return ranks * ids.numel() * bare.flops_per_id() / step_seconds
