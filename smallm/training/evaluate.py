"""How good the model is by now: its loss on the validation text, by the protocol of `infer.py`, and a sample."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from smallm.generation.sampler import Rng, Sampling, sample
from smallm.inference.scoring import windows
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.config import Config
from smallm.training.data.corpus import Corpus
from smallm.training.devices import to_device
from smallm.training.model.operations import cross_entropy

IDS_PER_PIECE = 1 << 20  # read from the memory map at a time


class HeldOut(NamedTuple):
    """A text to measure on, besides the validation part of a corpus."""

    val_ids: np.ndarray  # (N,)
    val_characters: int


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, corpus: Corpus | HeldOut, block_size: int,
    asked: Callable[[], int] = lambda: 0,
) -> float | None:
    """Nats per character of the validation text, in windows of `block_size` ids side by side.

    The windows are shared out over the processes; all of them must call this. asked: whether to break off, which gives
    None; asked before each pass through the model.
    """
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    ids = corpus.val_ids
    pieces = (np.asarray(ids[start : start + IDS_PER_PIECE]) for start in range(0, len(ids), IDS_PER_PIECE))
    for inputs, targets in windows(pieces, block_size):
        if asked():
            model.train()
            return None
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        if len(inputs[mine]):
            nats += _sum_of_nats(model, inputs[mine], targets[mine], accelerator.device)
        else:  # the processes may hold the weights together (FSDP), so each takes part in each pass
            _sum_of_nats(model, inputs[:1], targets[:1], accelerator.device)
    model.train()
    return accelerator.reduce(nats, "sum").item() / (corpus.val_characters - 1)


def a_sample(model: nn.Module, corpus: Corpus, config: Config) -> str:
    """What the model writes by the settings of the run, their seed text included."""
    c, vocabulary = config, corpus.vocabulary
    ids = vocabulary.encode(c.sample.seed or corpus.start_text).tolist()
    text = write_sample(model, vocabulary, ids, c.train.sample_length, c.model.block_size, c.sample.sampling)
    return c.sample.seed + text


@torch.no_grad()
def write_sample(
    model: nn.Module, vocabulary: Vocabulary, ids: list[int], length: int, block_size: int, sampling: Sampling
) -> str:
    """A glimpse of what the model writes after `ids`: `length` of them, as text. `infer.py` is the real sampler."""
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
    logits = model(to_device(inputs, device))
    return cross_entropy(logits, to_device(targets, device), reduction="sum").double()
