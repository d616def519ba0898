"""MappedIds: indexing returns the ids in the file, and the memory map stays small."""

import errno
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from smallm.training.config import DataConfig
from smallm.training.data import store
from smallm.training.data.corpus import open_corpus
from smallm.training.data.dataset import CharDataset
from smallm.training.data.store import MappedIds


@pytest.fixture(params=[1 << 30, 1 << 21], ids=["small", "releases"])
def file(request, tmp_path, monkeypatch):
    """A file of a million ids, below or above the limit from which pages are released."""
    monkeypatch.setattr(store, "RESIDENT_BYTES", request.param)
    np.arange(1 << 20, dtype=np.uint32).tofile(tmp_path / "ids.bin")
    return tmp_path / "ids.bin"


def test_slices_and_positions_give_copies(file):
    ids, expected = MappedIds(file, "<u4"), np.arange(1 << 20, dtype=np.uint32)
    assert len(ids) == 1 << 20
    assert ids.dtype == np.uint32
    starts = np.random.default_rng(1).integers(0, len(ids) - 9, 100)
    for index in (slice(5, 12), slice(0, 0), slice(-3, None), starts, starts[:, None] + np.arange(9), starts[:0]):
        taken = ids[index]
        assert taken.dtype == np.uint32
        np.testing.assert_array_equal(taken, expected[index])
        taken[:] = 0
        np.testing.assert_array_equal(ids[index], expected[index])
    np.testing.assert_array_equal(np.asarray(ids), expected)


def test_positions_of_a_part(file):
    part = MappedIds(file, "<u4").part(1000, 2000)
    assert len(part) == 1000
    np.testing.assert_array_equal(part[:3], [1000, 1001, 1002])
    np.testing.assert_array_equal(part[np.array([[5, 6], [998, 999]])], [[1005, 1006], [1998, 1999]])
    assert MappedIds(file, "<u4").part(1000, 1 << 20)[-1:].tolist() == [(1 << 20) - 1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_text_is_mapped_once(tmp_path):
    """The address space of a process may be limited (`ulimit -v`)."""
    (tmp_path / "text.txt").write_text("One two three.\n" * 100)
    corpus = open_corpus(DataConfig(source=(str(tmp_path / "text.txt"),)), cache=tmp_path / "cache", progress=False)
    assert len(corpus.train_ids) > len(corpus.val_ids) > 0
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) == 1


def test_too_little_address_space_is_no_fault_of_the_cache(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    (tmp_path / "text.txt").write_text("One two three.\n" * 100)
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError):
        open_corpus(DataConfig(source=(str(tmp_path / "text.txt"),)), cache=tmp_path / "cache", progress=False)


@pytest.mark.parametrize("size", [0, 3, 9])
def test_a_file_that_is_empty_or_ends_within_an_id(tmp_path, size):
    (tmp_path / "ids.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=r"empty|multiple"):
        MappedIds(tmp_path / "ids.bin", "<u2")


def mapped_megabytes(file):
    """How much of a mapped file counts as memory of this process."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(file)):
            return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) / 1024
    return 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("madvise", [True, False])
@pytest.mark.slow
def test_a_long_text_is_read_through_a_small_map(tmp_path, monkeypatch, madvise):
    monkeypatch.setattr(store, "RESIDENT_BYTES", 4 << 20)
    if not madvise:  # as on Windows: pages are not released
        monkeypatch.delattr(mmap, "MADV_DONTNEED")
    with (tmp_path / "ids.bin").open("wb") as file:
        file.truncate(64 << 20)
    ids = MappedIds(tmp_path / "ids.bin", "<u2")
    assert mapped_megabytes(tmp_path / "ids.bin") < 1
    dataset, most = CharDataset(ids, 64, seed=1), 0
    for step in range(20):
        assert not dataset.windows(np.arange(100 * step, 100 * step + 100)).any()
        most = max(most, mapped_megabytes(tmp_path / "ids.bin"))
    for start in range(0, len(ids), 1 << 18):
        assert not ids[start : start + (1 << 18)].any()
        most = max(most, mapped_megabytes(tmp_path / "ids.bin"))
    assert (most < 8) == madvise
