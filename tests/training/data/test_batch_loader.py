"""BatchLoader: each process gets its rows of the batch, from a memory map or from the device."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smallm.training.data import batch_loader
from smallm.training.data.batch_loader import BatchLoader
from smallm.training.data.dataset import CharDataset

CPU = torch.device("cpu")


def process(rank, ranks):
    return SimpleNamespace(process_index=rank, num_processes=ranks, device=CPU)


@pytest.fixture(params=[("<u2", 1 << 16), ("<u4", 1 << 20)], ids=["uint16", "uint32"])
def dataset(request, tmp_path):
    """Windows of 8 ids in a memory map, with ids up to the highest for which the type is used."""
    dtype, count = request.param
    ids = np.random.default_rng(1).integers(0, count, 1003).astype(dtype)
    ids[:8] = count - 1
    ids.tofile(tmp_path / "train.bin")
    return CharDataset(np.memmap(tmp_path / "train.bin", dtype, mode="r"), 8, seed=3)


@pytest.fixture
def resident(monkeypatch):
    """Lets every device have room for the text, which is copied in many pieces."""
    monkeypatch.setattr(batch_loader, "free_bytes", lambda device: 4 * 1003 * 10)
    monkeypatch.setattr(batch_loader, "PIECE", 100)


@pytest.mark.parametrize(("ranks", "size"), [(1, 12), (1, 4), (2, 3), (3, 2), (4, 3)])
def test_the_rows_of_all_processes_add_up_to_the_batch(dataset, resident, ranks, size, monkeypatch):
    near = [BatchLoader(dataset, 12, size, process(rank, ranks)) for rank in range(ranks)]
    monkeypatch.setattr(batch_loader, "free_bytes", lambda device: 0)
    far = [BatchLoader(dataset, 12, size, process(rank, ranks)) for rank in range(ranks)]
    assert {(f.text is None, n.text is None) for f, n in zip(far, near, strict=True)} == {(True, False)}
    for step in (0, 1, 10, 11, 1000):  # 11 begins the second epoch
        places = [(rank, micro_step) for micro_step in range(12 // (ranks * size)) for rank in range(ranks)]
        windows = dataset.windows(np.arange(12 * step, 12 * step + 12))
        for part, whole in enumerate((windows[:, :-1], windows[:, 1:])):
            for loaders in (far, near):
                batches = [loaders[rank].batch(step, micro_step, 8)[part] for rank, micro_step in places]
                assert {(tuple(batch.shape), batch.dtype) for batch in batches} == {((size, 8), torch.int64)}
                np.testing.assert_array_equal(torch.cat(batches), whole)


def test_short_windows_are_pieces_of_long_windows(dataset):
    loader = BatchLoader(dataset, 6, 6, process(0, 1))
    whole = loader.batch(3, 0, 8)
    for window in (1, 2, 4):
        for part, long in zip(loader.batch(3, 0, window), whole, strict=True):
            assert part.shape == (6 * 8 // window, window)
            assert torch.equal(part.reshape(6, 8), long)


def test_noise_replaces_a_share_of_the_inputs_by_ids_of_the_same_window(dataset, resident, monkeypatch):
    clean, near = (BatchLoader(dataset, 120, 120, process(0, 1), noise) for noise in (0.0, 0.25))
    monkeypatch.setattr(batch_loader, "free_bytes", lambda device: 0)
    far = BatchLoader(dataset, 120, 120, process(0, 1), 0.25)
    parts = [BatchLoader(dataset, 120, 20, process(rank, 2), 0.25) for rank in range(2)]
    (ids, targets), (noisy, same), (again, _) = (loader.batch(2, 0, 8) for loader in (clean, near, far))
    assert torch.equal(targets, same)
    assert torch.equal(noisy, again)
    assert torch.equal(noisy, torch.cat([part.batch(2, i, 8)[0] for i in range(3) for part in parts]))
    assert torch.equal(noisy.reshape(-1, 4), near.batch(2, 0, 4)[0])
    assert 0.15 < (noisy != ids).float().mean() < 0.3  # a quarter, less those replaced by an equal id
    assert not torch.equal(noisy != ids, near.batch(3, 0, 8)[0] != clean.batch(3, 0, 8)[0])
    assert all(set(changed) <= set(window) for changed, window in zip(noisy.tolist(), ids.tolist(), strict=True))


def test_a_text_that_is_too_long_is_not_resident(dataset, resident, monkeypatch):
    assert BatchLoader(dataset, 2, 2, process(0, 1)).text.dtype == torch.int32
    monkeypatch.setattr(batch_loader, "free_bytes", lambda device: 4 * 1003 * 10 - 1)
    assert BatchLoader(dataset, 2, 2, process(0, 1)).text is None


def test_on_a_cpu_the_text_is_not_copied(dataset):
    assert BatchLoader(dataset, 2, 2, process(0, 1)).text is None


def test_dropout_is_seeded_by_step_pass_and_process(dataset):
    def drawn(rank, step, micro_step):
        BatchLoader(dataset, 12, 2, process(rank, 2)).seed_dropout(step, micro_step)
        return torch.rand(1).item()

    places = [(rank, step, micro_step) for rank in (0, 1) for step in (0, 1, 7) for micro_step in (0, 1)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert [drawn(*place) for place in places] == [drawn(*place) for place in places]
