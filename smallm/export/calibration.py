"""What goes through a model's matrices when it reads text; text that it writes itself, since no other is at hand."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from smallm.generation.sampler import Rng
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session
from smallm.training.model.transformer import TransformerLanguageModel

STREAMS, LONGEST = 32, 256  # of the text: about 8,000 ids


def own_text(path: Path) -> np.ndarray:
    """Ids (STREAMS, T) that an exported model writes at temperature 1, each row from another first id.

    Text of the model's own serves nearly as well as what it was trained on, as in LLM-QAT (Liu et al. 2023).
    """
    session = Session(path)
    m = session.manifest
    cache, rng = KVCache(session, STREAMS), Rng(0)
    start = m.vocabulary.encode(m.start_text)[-1]
    ids = np.full((STREAMS, min(LONGEST, m.block_size)), start, np.int64)
    for t in range(1, ids.shape[1]):
        logits = cache.decode_batch(ids[:, t - 1]).astype(np.float64)
        shares = np.cumsum(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
        u = np.array([rng.uniform() for _ in range(STREAMS)])
        ids[:, t] = (shares <= u[:, None] * shares[:, -1:]).sum(axis=1)
    return ids


@torch.no_grad()
def second_moments(model: TransformerLanguageModel, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Parameter name of each projection -> sum of x x^T (K, K) float64 over its inputs x, when the model reads ids."""
    moments: dict[str, np.ndarray] = {}

    def watch(name: str, layer: nn.Linear) -> None:
        def add(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            x = inputs[0].flatten(0, -2).double()
            moments[name] = moments.get(name, 0) + (x.T @ x).numpy()

        layer.register_forward_pre_hook(add)

    model = deepcopy(model)
    for block in model.h:
        block.fits_kernels = False  # layer by layer, where the hooks are
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        watch(name, layer)
    for row in torch.from_numpy(ids):
        model(row[None])
    return moments
