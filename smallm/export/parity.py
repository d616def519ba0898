"""The parity checks: an exported file computes the logits of the PyTorch model, in every way that hosts run it."""

import math
from pathlib import Path

import numpy as np
import torch

from smallm.errors import UserError
from smallm.inference.kv_cache import KVCache
from smallm.inference.native import NativeContext, NativeModel
from smallm.inference.session import Session
from smallm.language_model import LanguageModel
from smallm.training.model.transformer import TransformerLanguageModel

TOLERANCE = 1e-4
"""Largest allowed difference of a logit, in fp32 arithmetic."""
MAX_IDS = 1024
"""Longest sequence that is compared."""
MAX_TEXT = 2_000
"""Characters on which the C engine is compared with ONNX Runtime."""
MAX_LOSS = 0.0005
"""Largest allowed difference in bits per character between the C engine and ONNX Runtime, of quantised models."""


def check_parity(model: TransformerLanguageModel, path: Path, max_ids: int = MAX_IDS) -> float:
    """The largest |difference| of a logit between PyTorch and the file, on random ids.

    Compares batches of 1 and 3 sequences of several lengths, up to block_size or `max_ids`, whole, id by id and in
    chunks. Raises `UserError` if a difference exceeds `TOLERANCE` or is NaN.
    """
    session = Session(path)
    block_size, generator = min(model.config.block_size, max_ids), np.random.default_rng(0)
    worst = 0.0
    for batch in (1, 3):
        for length in sorted({1, min(7, block_size), block_size}):
            ids = generator.integers(0, model.vocab_size, (batch, length))
            expected = _torch_logits(model, ids)  # (B, T, V)
            worst = max(worst, _difference(f"whole, {batch} x {length} ids", session.logits(ids), expected))
            found = _one_by_one(session, ids)
            worst = max(worst, _difference(f"{batch} x {length} ids, one at a time", found, expected))
            for size in {1, 3, max(1, length // 2)} if batch == 1 else ():
                found, positions = _in_chunks(session, ids[0], size)
                worst = max(worst, _difference(f"{length} ids, {size} at a time", found, expected[0, positions]))
    return worst


def _torch_logits(model: TransformerLanguageModel, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).float().numpy()
    if not np.isfinite(logits).all():
        raise UserError("the PyTorch model's logits are not finite, so nothing was written; train it again")
    return logits


def _one_by_one(session: Session, ids: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) of passes of one id, each given the cache that the previous pass returned."""
    past, found = None, []
    for t in range(ids.shape[1]):
        logits, past = session.forward_with_past(ids[:, t : t + 1], past)
        found.append(logits)
    return np.concatenate(found, axis=1)


def _in_chunks(session: Session, ids: np.ndarray, size: int) -> tuple[np.ndarray, list[int]]:
    """Logits (n, V) after each chunk read into a shared cache, and their positions."""
    cache, found, positions = KVCache(session), [], []
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        found.append(cache.prefill(chunk).copy())
        positions.append(start + len(chunk) - 1)
    return np.stack(found), positions


def _difference(what: str, found: np.ndarray, expected: np.ndarray) -> float:
    difference = float(np.abs(found - expected).max())
    if not difference < TOLERANCE:  # also true for NaN
        raise UserError(
            f"the exported graph differs from the PyTorch model by {difference:.2g} in a logit ({what}; "
            f"at most {TOLERANCE:g} is allowed), so nothing was written; please report this"
        )
    return difference


def check_native(path: Path, text: str, precision: str) -> None:
    """Compares the surprisal of each character of a text between the C engine and ONNX Runtime.

    In fp32 each may differ by 2 * TOLERANCE nats, since it is a difference of two logits. The two engines round the
    inputs of quantised products differently; there the mean may differ by MAX_LOSS, and by four standard errors.
    Raises `UserError`.
    """
    text = text[:MAX_TEXT]
    differences = NativeContext(NativeModel(path)).score(text)[1:] - LanguageModel.load(path).score(text)[1:]
    if precision == "fp32":
        difference, allowed, unit = np.abs(differences).max(), 2 * TOLERANCE, "nats for a character"
    else:
        difference, unit = abs(differences.mean()) / math.log(2), "bits per character"
        allowed = MAX_LOSS + 4 * differences.std() / math.sqrt(len(differences)) / math.log(2)
    if not difference <= allowed:  # also true for NaN
        raise UserError(
            f"the C engine differs from ONNX Runtime by {difference:.2g} {unit} (at most {allowed:.2g} is allowed), so "
            "nothing was written; please report this"
        )
