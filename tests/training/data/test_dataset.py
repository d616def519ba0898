"""CharDataset: windows lie within the text, an epoch visits each once, and the order depends on (seed, step) alone."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smallm.training.data.dataset import CharDataset, WeightedDataset

sizes = st.tuples(st.integers(1, 40), st.integers(1, 900)).map(lambda size: (size[0], size[0] + size[1]))  # T, N > T
seeds = st.integers(0, 2**63)


def counting(N, T, seed=0):
    """A dataset whose ids are their own positions."""
    return CharDataset(np.arange(N, dtype=np.uint32), T, seed)


def batch(dataset, step, size):
    """The windows of a batch."""
    return dataset.windows(np.arange(step * size, (step + 1) * size))


@given(sizes, seeds, st.integers(0, 10**6), st.integers(1, 50))
def test_windows_lie_inside_the_text(size, seed, step, batch_size):
    T, N = size
    windows = batch(counting(N, T, seed), step, batch_size)
    assert windows.shape == (batch_size, T + 1)
    assert windows.dtype == np.int64
    assert windows.min() >= 0
    assert windows.max() < N
    assert (windows == windows[:, :1] + np.arange(T + 1)).all()


@given(sizes, seeds, st.integers(0, 1000))
def test_an_epoch_visits_each_window_once(size, seed, epoch):
    T, N = size
    dataset = counting(N, T, seed)
    n = len(dataset)
    starts = np.sort(dataset.starts(np.arange(epoch * n, (epoch + 1) * n)))
    assert (np.diff(starts) == T).all()  # adjacent: all distinct, none overlapping
    assert starts[0] >= 0
    assert N - (starts[-1] + T) < 2 * T  # less than two windows are left out in all
    assert starts[0] < T


@settings(max_examples=15)
@given(sizes, seeds, st.integers(1, 40), st.integers(1, 40))
def test_the_order_of_rows_does_not_depend_on_the_batch_size(size, seed, one, other):
    T, N = size
    dataset = counting(N, T, seed)

    def starts(batch_size):
        return np.concatenate([batch(dataset, step, batch_size)[:, 0] for step in range(-(-200 // batch_size))])[:200]

    assert np.array_equal(starts(one), starts(other))


def test_epochs_differ_in_order_and_offset():
    dataset = counting(5000, 32, seed=1)
    n = len(dataset)
    epochs = [dataset.starts(np.arange(e * n, (e + 1) * n)) for e in range(8)]
    assert len({epoch.min() for epoch in epochs}) >= 5  # of 32 offsets
    orders = {tuple((epoch - epoch.min()) // 32) for epoch in epochs}
    assert len(orders) == 8
    assert all(order != tuple(range(n)) for order in orders)


def test_the_order_is_well_shuffled():
    dataset = counting(64 * 1000, 16, seed=3)
    n = len(dataset)
    places = dataset.starts(np.arange(n)) // 16
    assert abs(np.corrcoef(np.arange(n), places)[0, 1]) < 0.06  # n = 3999: four standard deviations
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.06


def test_seeds_differ():
    batches = {batch(counting(5000, 32, seed), 0, 8).tobytes() for seed in range(50)}
    assert len(batches) == 50
    assert batch(counting(5000, 32, 7), 3, 8).tobytes() == batch(counting(5000, 32, 7), 3, 8).tobytes()


def test_adjacent_seeds_are_not_shifts_of_each_other():
    # otherwise runs with seeds 1 and 2 would visit the same epochs, shifted by one
    n = len(counting(5000, 32))
    epochs = {s: [counting(5000, 32, s).starts(np.arange(e * n, (e + 1) * n)).tobytes() for e in range(4)]
              for s in (1, 2, 3)}  # fmt: skip
    assert len({epoch for of_seed in epochs.values() for epoch in of_seed}) == 12


def test_the_shortest_text_is_one_window():
    dataset = CharDataset(np.arange(9), 8)
    assert len(dataset) == 1
    assert (batch(dataset, 4, 3) == np.arange(9)).all()
    with pytest.raises(AssertionError):
        CharDataset(np.arange(8), 8)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_memory_map(tmp_path, dtype):
    np.arange(1000, dtype=dtype).tofile(tmp_path / "ids.bin")
    mapped = CharDataset(np.memmap(tmp_path / "ids.bin", dtype, mode="r"), 16, seed=2)
    windows, expected = batch(mapped, 5, 8), batch(counting(1000, 16, seed=2), 5, 8)
    assert np.array_equal(windows, expected)
    assert type(windows) is np.ndarray
    windows[:] = 0  # a copy: the file stays as it was
    assert np.array_equal(batch(mapped, 5, 8), expected)


def test_a_text_of_any_length_is_shuffled_without_a_table():
    huge = np.broadcast_to(np.uint16(7), 10**11)  # takes no memory
    dataset = CharDataset(huge, 256, seed=1)
    started = time.process_time()
    starts = dataset.starts(np.arange(10**8, 10**8 + 1000))
    assert time.process_time() - started < 1
    assert len(set(starts.tolist())) == 1000
    assert starts.min() >= 0
    assert starts.max() + 257 <= 10**11
    assert starts.max() - starts.min() > 10**10
    assert (batch(dataset, 10**6, 4) == 7).all()


# -- several texts


@given(seeds, st.integers(1, 9), st.lists(st.integers(10, 400), min_size=1, max_size=4), st.data())
def test_windows_of_several_texts_are_drawn_by_weight(seed, T, lengths, data):
    weights = data.draw(st.lists(st.floats(0.1, 9), min_size=len(lengths), max_size=len(lengths)))
    ends = np.cumsum(lengths).tolist()
    dataset = WeightedDataset(np.arange(ends[-1], dtype=np.uint32), T, seed, ends, weights)
    n = len(dataset)
    assert n == len(counting(ends[-1], T))
    for epoch in (0, 3):
        starts = dataset.starts(np.arange(epoch * n, (epoch + 1) * n))
        texts = np.searchsorted(ends, starts, "right")
        assert np.array_equal(texts, np.searchsorted(ends, starts + T, "right"))  # no window crosses the end of a text
        counts = np.bincount(texts, minlength=len(lengths))
        assert np.abs(counts - n * np.array(weights) / sum(weights)).max() <= 1


def test_each_text_of_several_has_epochs_of_its_own():
    dataset = WeightedDataset(np.arange(3630), T := 16, 5, [330, 3630], [1, 1])
    starts = dataset.starts(np.arange(4 * len(dataset)))
    for first, length in ((0, 330), (330, 3300)):
        alone = CharDataset(np.arange(length), T, 5)
        drawn = starts[(starts >= first) & (starts < first + length)] - first
        assert sorted(drawn) == sorted(alone.starts(np.arange(len(drawn))))
    assert abs(np.corrcoef(starts[:-1] < 330, starts[1:] < 330)[0, 1]) < 0.15  # the texts alternate at random
    rows = np.random.RandomState(1).permutation(len(starts))
    assert np.array_equal(dataset.starts(rows), starts[rows])  # a row is a row, in any batch
