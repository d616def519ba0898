"""What the model expects in a passage of the validation text: for each character its nats and the likeliest others."""

import numpy as np
import torch
from torch import nn

from smallm.inference.scoring import IGNORED, begins_character, windows
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.data.corpus import Corpus
from smallm.training.devices import to_device
from smallm.training.report.record import Passage

LENGTH = 1000  # ids
LOOKED_THROUGH = 2000  # ids at the beginning of the validation text, in which a line begins that is begun with
EXPECTED = 5  # characters that are told for each place


def read_passage(model: nn.Module, corpus: Corpus, step: int) -> Passage:
    """Whole lines of the validation text, about LENGTH ids, or all but the first character of a shorter text.

    Each character is predicted from a quarter of a context at least, where there is one. On several processes all must
    call this: they may hold the weights together (FSDP).
    """
    ids, block_size = np.asarray(corpus.val_ids[: LOOKED_THROUGH + LENGTH]), model.config.block_size
    first, last = _whole_lines(ids)
    before = max(0, first - block_size)
    ids = ids[before:last]
    nats, likeliest, probabilities = _look(model, ids, corpus.vocabulary)
    known = len(ids) - len(nats)  # the ids of the first character, which nothing comes before
    starts = np.flatnonzero(begins_character(ids))
    starts = starts[starts >= max(known, first - before)]
    if not len(starts):
        return Passage()
    at = starts - known
    return Passage(
        step,
        text=corpus.vocabulary.decode(ids[starts[0] :]),
        nats=np.add.reduceat(nats, at).round(3).tolist(),
        expected=[corpus.vocabulary.decode(row) for row in likeliest[at]],
        probabilities=probabilities[at].round(4).tolist(),
    )


def _whole_lines(ids: np.ndarray) -> tuple[int, int]:
    """Where the passage begins and ends: at lines, but where these are long or the text is short."""
    is_end = ids == ord("\n")
    begins = np.flatnonzero(is_end[:-1] & ~is_end[1:]) + 1
    first = int(begins[0]) if len(begins) and begins[0] + LENGTH <= len(ids) else 0
    ends = np.flatnonzero(is_end[first + LENGTH // 2 : first + LENGTH])
    return first, first + LENGTH // 2 + int(ends[-1]) if len(ends) else first + LENGTH


@torch.no_grad()
def _look(model: nn.Module, ids: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids (N,) -> for each id after the first character its nats (n,), the likeliest and their probabilities (n, 5).

    Of the likeliest, only ids that are a character each: what begins a rare one could become several.
    """
    device, block_size = next(model.parameters()).device, model.config.block_size
    whole = torch.from_numpy(_whole_characters(vocabulary)).to(device)
    found = [np.empty(0), np.empty((0, EXPECTED), np.int64), np.empty((0, EXPECTED))]
    model.eval()
    for inputs, targets in windows([ids], block_size, block_size - block_size // 4):
        logits, goals = model(to_device(inputs, device)), to_device(targets, device)
        counts = goals != IGNORED
        logs = logits[counts].float().log_softmax(-1)  # (n, V)
        top = logs[:, whole].topk(EXPECTED)
        parts = (-logs.gather(1, goals[counts][:, None])[:, 0], whole[top.indices], top.values.exp())
        found = [np.concatenate([old, part.cpu().numpy()]) for old, part in zip(found, parts, strict=True)]
    model.train()
    return tuple(found)


def _whole_characters(vocabulary: Vocabulary) -> np.ndarray:
    """The ids that are a character each."""
    several = [id for id in range(256, vocabulary.size) if vocabulary.decoder().push(id)]
    return np.array([*range(128), *several])
