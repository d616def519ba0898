"""The loss on the validation text, by the protocol of `infer.py --perplexity`, and samples of the model's text."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator

from smallm.generation.rng import Rng
from smallm.generation.sampler import sample
from smallm.inference.scoring import IDS_PER_BATCH, windows
from smallm.model_file.sampling import Sampling
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.data.store import MappedIds
from smallm.training.devices import to_device
from smallm.training.distributed import sum_over_processes
from smallm.training.model.operations import LayerKVCache, cross_entropy
from smallm.training.model.transformer import TransformerLanguageModel

IDS_PER_READ = 1 << 20  # from the memory map
IDS_PER_GPU_PASS = 1 << 16  # in one forward pass of one GPU
LOGITS_PER_GPU_PASS = 1 << 28  # 1 GiB in float32
GPU_PASSES_PER_SYNC = 8  # reading a loss, and asking several GPUs for a signal, makes the host wait for the device


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: TransformerLanguageModel, ids: MappedIds | np.ndarray, characters: int,
    block_size: int,
    interrupted: Callable[[], int] = lambda: 0,
) -> float | None:  # fmt: skip
    """Mean loss of a text in nats per character, in adjacent windows of `block_size` ids; None if interrupted.

    The windows are divided over the processes; all processes must call this.
    ids: the text, (N,); characters: its length; interrupted: called before each forward pass (on GPUs, before each
    eighth), must return the same on all processes, and stops the evaluation if the result is not 0.
    """
    on_cpu, ranks = accelerator.device.type == "cpu", accelerator.num_processes
    per_pass = IDS_PER_BATCH if on_cpu else ranks * ids_per_gpu_pass(model.vocab_size)
    per_read = max(IDS_PER_READ, per_pass)
    reads = (np.asarray(ids[start : start + per_read]) for start in range(0, len(ids), per_read))
    passes_per_sync = 1 if on_cpu else GPU_PASSES_PER_SYNC
    nats = 0.0  # of this process
    passes: list[torch.Tensor] = []  # since the last sync; few, because they split the heap among the logits
    model.eval()
    for number, (inputs, targets) in enumerate(windows(reads, block_size, ids_per_batch=per_pass)):  # (B, T) each
        if number % passes_per_sync == 0:
            nats, passes = _add(nats, passes), []
            if interrupted():
                model.train()
                return None
        mine = slice(accelerator.process_index, None, ranks)
        if len(inputs[mine]):
            passes.append(_sum_of_nats(model, inputs[mine], targets[mine], accelerator.device))
        else:  # with sharded weights (FSDP) every process has to take part in every forward pass
            _sum_of_nats(model, inputs[:1], targets[:1], accelerator.device)
    model.train()
    return sum_over_processes(accelerator, _add(nats, passes)) / (characters - 1)


def _add(nats: float, passes: list[torch.Tensor]) -> float:
    """`nats` and the losses of some passes, added in their order; one transfer from the device."""
    for each in torch.stack(passes).tolist() if passes else ():
        nats += each
    return nats


def ids_per_gpu_pass(vocab_size: int) -> int:
    """Ids in one forward pass of one GPU: enough to occupy it, and few enough for the logits to fit."""
    return max(IDS_PER_BATCH, min(IDS_PER_GPU_PASS, LOGITS_PER_GPU_PASS // vocab_size))


@torch.no_grad()
def sample_text(
    model: TransformerLanguageModel, vocabulary: Vocabulary, ids: list[int], length: int, block_size: int,
    sampling: Sampling,
) -> str:  # fmt: skip
    """`length` more ids after `ids`, as text: a sample while training.

    With a KV cache up to block_size ids; past them, each id needs a pass over the last block_size ids. With sharded
    weights (FSDP) all processes must call this; all get the same text.
    """
    device = next(model.parameters()).device
    rng, decoder, text = Rng(0), vocabulary.decoder(), ""
    ids = ids[-block_size:]
    caches, new = [LayerKVCache() for _ in range(model.config.n_layer)], ids
    model.eval()
    for _ in range(length):
        if len(ids) > block_size:
            caches, new = [], ids[-block_size:]
        logits = model(torch.tensor([new], device=device), caches)  # (1, T, V)
        ids = [*ids, sample(logits[0, -1].float().cpu().numpy(), rng.uniform(), sampling)]
        new = ids[-1:]
        text += decoder.push(ids[-1])
    model.train()
    return text


def _sum_of_nats(
    model: TransformerLanguageModel, inputs: np.ndarray, targets: np.ndarray, device: torch.device
) -> torch.Tensor:
    logits = model(to_device(inputs, device))  # (B, T, V)
    return cross_entropy(logits, to_device(targets, device), reduction="sum")
