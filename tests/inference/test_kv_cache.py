"""smallm.cache: any way of feeding texts to the caches gives the logits of the whole text at once."""

import numpy as np
import pytest
import torch
from toys import longer, random_model, save_onnx

from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Binding, Session

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    return Session(save_onnx(random_model(), tmp_path_factory.mktemp("cache") / "model.onnx"))


@pytest.fixture
def ids() -> np.ndarray:
    """Six texts, one a row."""
    return np.random.default_rng(3).integers(0, 262, (6, BLOCK_SIZE))


def close(session, logits, ids):
    """Whether these are the logits after a text that is computed without a cache."""
    return np.abs(logits - session.logits(ids[None])[0, -1]).max() < 1e-4


def test_texts_of_different_lengths_step_together(session, ids):
    cache = KVCache(session, 3)
    for stream, length in enumerate((5, 1, 9)):
        assert close(session, cache.prefill(ids[stream, :length], stream), ids[stream, :length])
    assert cache.lengths.tolist() == [5, 1, 9]
    for n in range(1, BLOCK_SIZE - 8):
        logits = cache.decode_batch(np.array([ids[0, 4 + n], ids[1, n], ids[2, 8 + n]]))
        assert logits.shape == (3, 262)
        for stream, length in enumerate((5, 1, 9)):
            assert close(session, logits[stream], ids[stream, : length + n])
    assert cache.lengths.tolist() == [12, 8, BLOCK_SIZE]
    logits = cache.prefill(ids[1, 8:14], 1)  # several ids upon a past, beside others
    assert close(session, logits, ids[1, :14])


def test_one_step_from_nothing(session, ids):
    cache = KVCache(session, 6)
    for n in range(BLOCK_SIZE):
        logits = cache.decode_batch(ids[:, n])
        assert all(close(session, logits[i], ids[i, : n + 1]) for i in range(6))
    cache.reset(4)
    assert cache.lengths.tolist() == [16, 16, 16, 16, 0, 16]
    assert close(session, cache.prefill(ids[0, :3], 4), ids[0, :3])
    cache.reset()
    assert cache.lengths.tolist() == [0] * 6
    assert close(session, cache.decode_batch(ids[:, 7])[2], ids[2, 7:8])


@pytest.mark.parametrize(("window", "block_size"), [(1, 8), (5, 16), (9, 16), (16, 16)])
def test_a_window_slides_for_ever(tmp_path, window, block_size):
    """Id by id far past block_size: as PyTorch in one pass over all of it, with a table of positions that long."""
    model = random_model(window=window, block_size=block_size)
    session = Session(save_onnx(model, tmp_path / "model.onnx"))
    ids = np.random.default_rng(4).integers(0, 262, (2, 100))
    with torch.no_grad():
        expected = longer(model, 100)(torch.from_numpy(ids)).numpy()
    cache = KVCache(session, 2)
    for t in range(100):
        for stream in np.flatnonzero(cache.lengths == block_size):
            cache.slide(stream)
        assert np.abs(cache.decode_batch(ids[:, t]) - expected[:, t]).max() < 2e-4
    assert (cache.lengths <= block_size).all()


def test_branches_from_one_prompt(session, ids):
    prompt, cache = ids[0, :7], KVCache(session)
    cache.prefill(prompt)
    snapshot = cache.snapshot()
    cache.prefill(ids[1, :9])  # what comes later does not touch it
    assert snapshot.shape[2] == 7
    many = KVCache(session, 4)
    many.prefill(ids[5], 2)
    for stream in range(4):
        many.restore(snapshot, stream)
    logits = many.decode_batch(ids[1:5, 0])
    assert all(close(session, logits[i], np.append(prompt, ids[i + 1, 0])) for i in range(4))
    cache.restore(snapshot)
    assert close(session, cache.prefill(ids[3, :2]), np.append(prompt, ids[3, :2]))
    empty = KVCache(session).snapshot()
    many.restore(empty, 1)
    assert many.lengths.tolist() == [8, 0, 8, 8]


def test_more_texts_than_the_cache_can_hold(session, ids):
    cache = KVCache(session, 2)
    cache.prefill(ids[0, :10], 1)
    for too_many in (ids[0, :7], ids[0, :0]):
        with pytest.raises(AssertionError):
            cache.prefill(too_many, 1)
    with pytest.raises(AssertionError):
        cache.decode_batch(ids[:3, 0])
    assert close(session, cache.prefill(ids[0, 10:], 1), ids[0])
    with pytest.raises(AssertionError):
        cache.decode_batch(ids[:2, 0])


@pytest.mark.parametrize("call", ["prefill", "decode_one", "decode_batch", "verify"])
def test_a_pass_that_was_interrupted_can_be_repeated(session, ids, monkeypatch, call):
    """`rewind` restores the cache, also after the model has run."""
    argument = {"decode_one": ids[0, 4], "decode_batch": ids[0, 4:5]}.get(call, ids[0, 4:7])
    cache = KVCache(session)
    cache.prefill(ids[0, :4])
    run = Binding.run

    def interrupted(self):
        run(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Binding, "run", interrupted)
        cache._bind()
        with pytest.raises(KeyboardInterrupt):
            getattr(cache, call)(argument)
    cache.rewind(4)
    assert (cache.lengths.tolist(), cache.longest, cache.end) == ([4], 4, 4)
    assert close(session, cache.decode_one(ids[0, 4]), ids[0, :5])  # shorter than what was interrupted
    cache.truncate(1)
    getattr(cache, call)(argument)
    length = 4 + np.size(argument)
    assert close(session, cache.decode_one(ids[0, length]), ids[0, : length + 1])
