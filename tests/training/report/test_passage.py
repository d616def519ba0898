"""The passage in the report: its predictions equal those of the model on the whole text at once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import TOY_VOCABULARY, random_model

from smallm.errors import UserError
from smallm.training.report.passage import read_passage
from smallm.training.report.record import Passage


@pytest.mark.parametrize(
    "text", ["one café\nñ" + "x" * 40 + "\né€中 and then some\n" * 60, "a", "", "no line's end " * 200]
)
def test_passage_against_the_whole_text_at_once(text):
    model = random_model(block_size=4096)
    ids = TOY_VOCABULARY.encode(text)
    passage = read_passage(model, SimpleNamespace(val_ids=ids, vocabulary=TOY_VOCABULARY), 7)
    assert passage.text in text
    assert len(passage.text) >= min(len(text) - 1, 400)
    if not passage.text:
        return
    assert "\n" not in passage.text[:1] or text.startswith("\n")
    with torch.no_grad():
        logs = model(torch.from_numpy(ids.astype(np.int64))[None])[0].log_softmax(-1)
    start = len(TOY_VOCABULARY.encode(text[: text.index(passage.text, 1)]))
    at = start
    for i, (character, nats) in enumerate(zip(passage.text, passage.nats, strict=True)):
        spelled = TOY_VOCABULARY.encode(character).tolist()
        expected = -sum(float(logs[at + i - 1, id]) for i, id in enumerate(spelled))
        assert nats == pytest.approx(expected, abs=2e-3)
        if i % 50 == 0:
            ranked = sorted(((float(logs[at - 1, id].exp()), id) for id in whole_ids()), reverse=True)[:5]
            assert passage.probabilities[i] == pytest.approx([p for p, _ in ranked], abs=1e-4)
            assert passage.expected[i] == TOY_VOCABULARY.decode([id for _, id in ranked])
        at += len(spelled)
    assert model.training


def whole_ids() -> list[int]:
    texts = {id: TOY_VOCABULARY.decode([id]) for id in range(TOY_VOCABULARY.size)}
    return [id for id, text in texts.items() if text != "\N{REPLACEMENT CHARACTER}"]


def test_passage_in_windows_sees_a_quarter_of_a_context():
    model = random_model(block_size=16)
    ids = TOY_VOCABULARY.encode("\nabc def ghi\n" * 200)
    passage = read_passage(model, SimpleNamespace(val_ids=ids, vocabulary=TOY_VOCABULARY), 1)
    start = 1
    i = 700  # windows begin at multiples of 12 and are scored from their fifth target on
    first = (start + i - 5) // 12 * 12
    with torch.no_grad():
        logs = model(torch.from_numpy(ids[first : start + i].astype(np.int64))[None])[0, -1].log_softmax(-1)
    assert 5 <= start + i - first <= 16
    assert passage.nats[i] == pytest.approx(-float(logs[ids[start + i]]), abs=2e-3)


def test_an_incomplete_passage_is_an_error():
    with pytest.raises(UserError):
        Passage(1, "ab", [1.0, 1.0], ["x", "xy"], [[0.1], [0.1]])
