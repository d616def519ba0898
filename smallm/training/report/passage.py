"""Scores a passage of the validation text: the surprisal of each character, and the likeliest candidates for it."""

import numpy as np
import torch

from smallm.inference.scoring import IGNORED, begins_character, windows
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.data.corpus import Corpus
from smallm.training.devices import to_device
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.report.record import Passage

LENGTH = 1000  # ids
SEARCHED = 2000  # ids at the beginning of the validation text among which the passage begins
EXPECTED = 5  # likeliest characters stored for each position


def read_passage(model: TransformerLanguageModel, corpus: Corpus, step: int) -> Passage:
    """Scores whole lines of the validation text, about `LENGTH` ids; a shorter text without its first character.

    Each character is predicted from at least a quarter of a context, where the text has as much before the character.
    With several processes, all of them must call this function, because FSDP shards the weights.

    step: step of the model, stored in the passage.
    """
    ids, block_size = np.asarray(corpus.val_ids[: SEARCHED + LENGTH]), model.config.block_size
    first, last = _whole_lines(ids)
    before = max(0, first - block_size)
    ids = ids[before:last]
    nats, likeliest, probabilities = _predict(model, ids, corpus.vocabulary)
    unpredicted = len(ids) - len(nats)  # the ids of the first character
    starts = np.flatnonzero(begins_character(ids))
    starts = starts[starts >= max(unpredicted, first - before)]
    if not len(starts):
        return Passage()
    at = starts - unpredicted
    return Passage(
        step,
        text=corpus.vocabulary.decode(ids[starts[0] :]),
        nats=np.add.reduceat(nats, at).round(3).tolist(),
        expected=[corpus.vocabulary.decode(row) for row in likeliest[at]],
        probabilities=probabilities[at].round(4).tolist(),
    )


def _whole_lines(ids: np.ndarray) -> tuple[int, int]:
    """Start and end of the passage: at line ends, unless the lines are long or the text is short."""
    is_end = ids == ord("\n")
    begins = np.flatnonzero(is_end[:-1] & ~is_end[1:]) + 1
    first = int(begins[0]) if len(begins) and begins[0] + LENGTH <= len(ids) else 0
    ends = np.flatnonzero(is_end[first + LENGTH // 2 : first + LENGTH])
    return first, first + LENGTH // 2 + int(ends[-1]) if len(ends) else first + LENGTH


@torch.no_grad()
def _predict(
    model: TransformerLanguageModel, ids: np.ndarray, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids (N,) -> for the n ids after the first character: nats (n,), likeliest ids (n, K), probabilities (n, K).

    The likeliest ids are chosen among those that spell a whole character; an id that begins a rare character could
    belong to several.
    """
    device, block_size = next(model.parameters()).device, model.config.block_size
    whole = torch.from_numpy(_whole_characters(vocabulary)).to(device)
    results = [np.empty(0), np.empty((0, EXPECTED), np.int64), np.empty((0, EXPECTED))]
    model.eval()
    for inputs, targets in windows([ids], block_size, block_size - block_size // 4):
        logits, goals = model(to_device(inputs, device)), to_device(targets, device)  # (B, T, V), (B, T)
        counted = goals != IGNORED
        log_probs = logits[counted].float().log_softmax(-1)  # (n, V)
        top = log_probs[:, whole].topk(EXPECTED)
        parts = (-log_probs.gather(1, goals[counted][:, None])[:, 0], whole[top.indices], top.values.exp())
        results = [np.concatenate([old, part.cpu().numpy()]) for old, part in zip(results, parts, strict=True)]
    model.train()
    nats, likeliest, probabilities = results
    return nats, likeliest, probabilities


def _whole_characters(vocabulary: Vocabulary) -> np.ndarray:
    """The ids that spell a whole character each."""
    above = [id for id in range(256, vocabulary.size) if vocabulary.decoder().push(id)]
    return np.array([*range(128), *above])
