"""The loss on the validation text, by the protocol of `infer.py --perplexity`, and samples of the model's text."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from smallm.generation.rng import Rng
from smallm.generation.sampler import sample
from smallm.inference.scoring import windows
from smallm.model_file.sampling import Sampling
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.data.store import MappedIds
from smallm.training.devices import to_device
from smallm.training.model.operations import cross_entropy

IDS_PER_READ = 1 << 20  # from the memory map


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, ids: MappedIds | np.ndarray, characters: int, block_size: int,
    interrupted: Callable[[], int] = lambda: 0,
) -> float | None:  # fmt: skip
    """Mean loss of a text in nats per character, in adjacent windows of `block_size` ids; None if interrupted.

    The windows are divided over the processes; all processes must call this.
    ids: the text, (N,); characters: its length; interrupted: called before each forward pass, must return the same on
    all processes, and stops the evaluation if the result is not 0.
    """
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    reads = (np.asarray(ids[start : start + IDS_PER_READ]) for start in range(0, len(ids), IDS_PER_READ))
    for inputs, targets in windows(reads, block_size):  # (B, T) each
        if interrupted():
            model.train()
            return None
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        if len(inputs[mine]):
            nats += _sum_of_nats(model, inputs[mine], targets[mine], accelerator.device)
        else:  # with sharded weights (FSDP) every process has to take part in every forward pass
            _sum_of_nats(model, inputs[:1], targets[:1], accelerator.device)
    model.train()
    return accelerator.reduce(nats, "sum").item() / (characters - 1)


@torch.no_grad()
def sample_text(
    model: nn.Module, vocabulary: Vocabulary, ids: list[int], length: int, block_size: int, sampling: Sampling
) -> str:
    """`length` more ids after `ids`, as text: a short sample while training. Without a KV cache, unlike `infer.py`.

    With sharded weights (FSDP) all processes must call this; all get the same text.
    """
    device = next(model.parameters()).device
    rng, decoder, text = Rng(0), vocabulary.decoder(), ""
    model.eval()
    for _ in range(length):
        logits = model(torch.tensor([ids[-block_size:]], device=device))  # (1, T, V)
        ids = [*ids, sample(logits[0, -1].float().cpu().numpy(), rng.uniform(), sampling)]
        text += decoder.push(ids[-1])
    model.train()
    return text


def _sum_of_nats(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, device: torch.device) -> torch.Tensor:
    logits = model(to_device(inputs, device))  # (B, T, V)
    return cross_entropy(logits, to_device(targets, device), reduction="sum").double()
