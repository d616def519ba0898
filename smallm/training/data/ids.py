"""Ids in a file of any size, read through a memory map that stays small."""

import mmap
from pathlib import Path

import numpy as np

RESIDENT_BYTES = 64 << 20  # how much of the file may count as this process's memory
PLACE_BYTES = 2 << 20  # the largest page of the system's cache, which may be mapped whole where one id is read


class MappedIds:
    """The ids in a file, (N,) of `dtype`, read-only. A slice, or an array of positions, gives a copy of those ids.

    Pages of a map count as the process's memory once they are read, and windows from all over a long text would soon
    bring in all of it. So they are given back now and then; the system keeps them in its cache as long as it has room.
    """

    def __init__(self, path: Path, dtype: np.dtype | str):
        """Raises ValueError for a file that is empty or ends within an id."""
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ids = np.frombuffer(self._map, dtype)
        self._gives_back = len(self._map) > RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED")
        self._read = 0  # bytes at most that were mapped since the last time

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids."""
        return self._ids.dtype

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """A copy. Of an array of positions each row should lie together, as the ids of a window do."""
        if not self._gives_back:
            return np.array(self._ids[index])
        if isinstance(index, slice):
            return self._copy(index, places=1)
        most = RESIDENT_BYTES // PLACE_BYTES
        rows = [index[start : start + most] for start in range(0, max(1, len(index)), most)]
        return np.concatenate([self._copy(some, places=len(some)) for some in rows])

    def _copy(self, index: slice | np.ndarray, places: int) -> np.ndarray:
        ids = np.array(self._ids[index])
        self._read += ids.nbytes + places * PLACE_BYTES
        if self._read >= RESIDENT_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0
        return ids

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """All of them, as numpy asks for them."""
        return np.array(self[:], dtype)
