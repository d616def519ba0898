"""Work divided over processes gives the result of one process, and each process computes only its slice."""

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from smallm.training.distributed import divide_rows

pytestmark = pytest.mark.slow

ROWS = (1, 2, 5)


def double(rank, processes, folder):
    """One of the processes: doubles rows, and notes how many it got."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    found = {}
    for n in ROWS:
        seen = []
        rows = torch.arange(3.0 * n).view(n, 3)
        result = divide_rows(lambda mine, seen=seen: (seen.append(len(mine)), 2 * mine)[1], rows)
        found[n] = (result, sum(seen))
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_one_process_orthogonalises_all_matrices():
    rows = torch.arange(6.0).view(2, 3)
    assert (divide_rows(lambda mine: 2 * mine, rows) == 2 * rows).all()


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_computes_a_part_and_all_get_all_matrices(processes, tmp_path):
    torch.multiprocessing.spawn(double, (processes, tmp_path), nprocs=processes)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    for n in ROWS:
        for result, _ in (each[n] for each in found):
            assert (result == 2 * torch.arange(3.0 * n).view(n, 3)).all()
        assert sum(count for _, count in (each[n] for each in found)) == n
        assert max(count for _, count in (each[n] for each in found)) == -(-n // processes)
