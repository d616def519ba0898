"""Calibration of GPTQ: second moments of the inputs of each matrix, on text that the model generates."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from smallm.generation.rng import Rng
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session
from smallm.training.model.transformer import TransformerBlock, TransformerLanguageModel

STREAMS, MAX_LENGTH = 32, 256
"""Texts that are generated, and ids of each: about 8,000 ids in all."""


def generated_ids(path: Path) -> np.ndarray:
    """Ids (STREAMS, T) that an exported model generates at temperature 1.

    Generated text calibrates nearly as well as the training text, as in LLM-QAT (Liu et al. 2023), and is always there.
    """
    session = Session(path)
    m = session.manifest
    cache, rng = KVCache(session, STREAMS), Rng(0)
    start = m.vocabulary.encode(m.start_text)[-1]
    ids = np.full((STREAMS, min(MAX_LENGTH, m.block_size)), start, np.int64)
    for t in range(1, ids.shape[1]):
        logits = cache.decode_batch(ids[:, t - 1]).astype(np.float64)
        shares = np.cumsum(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
        u = np.array([rng.uniform() for _ in range(STREAMS)])
        ids[:, t] = (shares <= u[:, None] * shares[:, -1:]).sum(axis=1)
    return ids


@torch.no_grad()
def second_moments(model: TransformerLanguageModel, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Parameter name of each projection -> sum of x x^T (K, K) float64 over its inputs x, for ids (streams, T)."""
    moments: dict[str, np.ndarray] = {}

    def add(name: str, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0].flatten(0, -2).double()
        moments[name] = moments.get(name, 0) + (x.T @ x).numpy()

    model = deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, TransformerBlock):
            layer.fits_kernels = False  # the fused path would bypass the hooks
        elif isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(partial(add, f"{name}.weight"))
    for row in torch.from_numpy(ids):
        model(row[None])
    return moments
