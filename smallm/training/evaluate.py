"""The loss on the validation text, by the protocol that `infer.py --perplexity` follows too."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from smallm.scoring import windows
from smallm.training.corpus import Corpus
from smallm.training.model import cross_entropy

IDS_PER_PIECE = 1 << 20  # read from the memory map at a time


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, corpus: Corpus, block_size: int) -> float:
    """Nats per character of the validation text, in windows of `block_size` ids side by side.

    The windows are shared out over the processes; all of them must call this.
    """
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    ids = corpus.val_ids
    pieces = (np.asarray(ids[start : start + IDS_PER_PIECE]) for start in range(0, len(ids), IDS_PER_PIECE))
    for inputs, targets in windows(pieces, block_size):
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        if len(inputs[mine]):
            nats += _sum_of_nats(model, inputs[mine], targets[mine], accelerator.device)
    model.train()
    return accelerator.reduce(nats, "sum").item() / (corpus.val_characters - 1)


def _sum_of_nats(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, device: torch.device) -> torch.Tensor:
    logits = model(torch.from_numpy(inputs).to(device))
    return cross_entropy(logits, torch.from_numpy(targets).to(device), reduction="sum").double()
