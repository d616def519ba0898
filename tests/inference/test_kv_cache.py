"""smallm.decoder: any way of feeding texts to the caches gives the logits of the whole text at once."""

import numpy as np
import pytest
import torch
from toys import longer, random_model, save_onnx

from smallm.inference.session import Session

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    return Session(save_onnx(random_model(), tmp_path_factory.mktemp("decoder") / "model.onnx"))


@pytest.fixture
def ids() -> np.ndarray:
    """Six texts, one a row."""
    return np.random.default_rng(3).integers(0, 262, (6, BLOCK_SIZE))


def close(session, logits, ids):
    """Whether these are the logits after a text that is computed without a cache."""
    return np.abs(logits - session.logits(ids[None])[0, -1]).max() < 1e-4


def test_texts_of_different_lengths_step_together(session, ids):
    decoder = session.decoder(3)
    for stream, length in enumerate((5, 1, 9)):
        assert close(session, decoder.feed(ids[stream, :length], stream), ids[stream, :length])
    assert decoder.lengths.tolist() == [5, 1, 9]
    for n in range(1, BLOCK_SIZE - 8):
        logits = decoder.step(np.array([ids[0, 4 + n], ids[1, n], ids[2, 8 + n]]))
        assert logits.shape == (3, 262)
        for stream, length in enumerate((5, 1, 9)):
            assert close(session, logits[stream], ids[stream, : length + n])
    assert decoder.lengths.tolist() == [12, 8, BLOCK_SIZE]
    logits = decoder.feed(ids[1, 8:14], 1)  # several ids upon a past, beside others
    assert close(session, logits, ids[1, :14])


def test_one_step_from_nothing(session, ids):
    decoder = session.decoder(6)
    for n in range(BLOCK_SIZE):
        logits = decoder.step(ids[:, n])
        assert all(close(session, logits[i], ids[i, : n + 1]) for i in range(6))
    decoder.reset(4)
    assert decoder.lengths.tolist() == [16, 16, 16, 16, 0, 16]
    assert close(session, decoder.feed(ids[0, :3], 4), ids[0, :3])
    decoder.reset()
    assert decoder.lengths.tolist() == [0] * 6
    assert close(session, decoder.step(ids[:, 7])[2], ids[2, 7:8])


@pytest.mark.parametrize(("window", "block_size"), [(1, 8), (5, 16), (9, 16), (16, 16)])
def test_a_window_slides_without_end(tmp_path, window, block_size):
    """Id by id far past block_size: as PyTorch in one pass over all of it, with a table of positions that long."""
    model = random_model(window=window, block_size=block_size)
    session = Session(save_onnx(model, tmp_path / "model.onnx"))
    ids = np.random.default_rng(4).integers(0, 262, (2, 100))
    with torch.no_grad():
        expected = longer(model, 100)(torch.from_numpy(ids)).numpy()
    decoder = session.decoder(2)
    for t in range(100):
        for stream in np.flatnonzero(decoder.lengths == block_size):
            decoder.slide(stream)
        assert np.abs(decoder.step(ids[:, t]) - expected[:, t]).max() < 2e-4
    assert (decoder.lengths <= block_size).all()


def test_branches_from_one_prompt(session, ids):
    prompt, decoder = ids[0, :7], session.decoder()
    decoder.feed(prompt)
    snapshot = decoder.snapshot()
    decoder.feed(ids[1, :9])  # what comes later does not touch it
    assert snapshot.length == 7
    many = session.decoder(4)
    many.feed(ids[5], 2)
    for stream in range(4):
        many.restore(snapshot, stream)
    logits = many.step(ids[1:5, 0])
    assert all(close(session, logits[i], np.append(prompt, ids[i + 1, 0])) for i in range(4))
    decoder.restore(snapshot)
    assert close(session, decoder.feed(ids[3, :2]), np.append(prompt, ids[3, :2]))
    empty = session.decoder().snapshot()
    many.restore(empty, 1)
    assert many.lengths.tolist() == [8, 0, 8, 8]


@pytest.mark.parametrize("kept", [[0, 2, 3], [3, 1], [2], [0, 1, 2, 3]])
def test_the_streams_that_go_on(session, ids, kept):
    decoder = session.decoder(4)
    for stream in range(4):
        decoder.feed(ids[stream, : 4 + stream], stream)
    decoder.select(np.array(kept))
    assert (decoder.streams, decoder.lengths.tolist()) == (len(kept), [4 + stream for stream in kept])
    logits = decoder.step(ids[5, : len(kept)]).copy()
    for row, stream in enumerate(kept):
        assert close(session, logits[row], np.append(ids[stream, : 4 + stream], ids[5, row]))
        text = np.concatenate((ids[stream, : 4 + stream], ids[5, row : row + 1], ids[4, :2]))
        assert close(session, decoder.feed(ids[4, :2], row), text)


def test_more_than_fits(session, ids):
    decoder = session.decoder(2)
    decoder.feed(ids[0, :10], 1)
    for too_many in (ids[0, :7], ids[0, :0]):
        with pytest.raises(AssertionError):
            decoder.feed(too_many, 1)
    with pytest.raises(AssertionError):
        decoder.step(ids[:3, 0])
    assert close(session, decoder.feed(ids[0, 10:], 1), ids[0])
    with pytest.raises(AssertionError):
        decoder.step(ids[:2, 0])
