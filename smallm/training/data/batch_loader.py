"""Gives each process its rows of every batch, on its device."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from smallm.training.data.dataset import CharDataset
from smallm.training.data.store import MappedIds
from smallm.training.devices import free_bytes, to_device

RESIDENT_SHARE = 0.1  # share of a GPU's free memory that the training text may take
PIECE = 1 << 24  # ids copied to the device at a time


class BatchLoader:
    """The batches of a run, divided among the processes and the micro-steps of a step.

    A text that fits into a small part of the GPU's memory is kept there; then only the offsets of the windows are sent.
    """

    def __init__(
        self, dataset: CharDataset, batch_size: int, micro_batch_size: int, accelerator: Accelerator, noise: float = 0.0
    ):
        """
        Args:
            dataset: the windows.
            batch_size: sequences of a step on all processes.
            micro_batch_size: sequences of one forward pass on one process.
            accelerator: of the run.
            noise: fraction of the input ids that are replaced by random ids of the same window; default 0.
        """
        self.dataset, self.batch_size, self.micro_batch_size = dataset, batch_size, micro_batch_size
        self.noise = noise
        self.rank, self.ranks, self.device = accelerator.process_index, accelerator.num_processes, accelerator.device
        fits = 4 * len(dataset.ids) <= RESIDENT_SHARE * free_bytes(self.device)
        self.text = _resident(dataset.ids, self.device) if fits else None
        self._window = torch.arange(dataset.block_size + 1, device=self.device)

    def batch(self, step: int, micro_step: int, window: int) -> tuple[Tensor, Tensor]:
        """ids and targets of one forward pass on this process, each (B, T) int64 with T = window.

        window: block_size or a divisor of it; each sequence of block_size is then cut into pieces, which keeps the
        order of the text.
        """
        first = step * self.batch_size + (micro_step * self.ranks + self.rank) * self.micro_batch_size
        rows = np.arange(first, first + self.micro_batch_size)  # (B,)
        if self.text is None:
            windows = to_device(self.dataset.windows(rows), self.device)  # (B, T + 1)
        else:
            starts = to_device(self.dataset.starts(rows), self.device)  # (B,)
            windows = self.text[starts[:, None] + self._window].long()
        ids, targets = windows[:, :-1], windows[:, 1:]  # (B, T) each
        if self.noise:
            ids = ids.gather(1, to_device(self.dataset.sources(rows, self.noise), self.device))
        return ids.reshape(-1, window), targets.reshape(-1, window)

    def seed_dropout(self, step: int, micro_step: int) -> None:
        """Seeds dropout from (seed, step, micro-step, rank), so that a resumed run draws the same masks."""
        seed = np.random.SeedSequence((self.dataset.seed, step, micro_step, self.rank))
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))


def _resident(ids: MappedIds | np.ndarray, device: torch.device) -> Tensor:
    """The whole text on the device, (N,) int32: PyTorch hardly supports unsigned types, and every id fits."""
    text = torch.empty(len(ids), dtype=torch.int32, device=device)
    for start in range(0, len(ids), PIECE):
        text[start : start + PIECE] = torch.from_numpy(ids[start : start + PIECE].astype(np.int32))
    return text
