"""Ids in a file of any size, read through a memory map that stays small."""

import mmap
from pathlib import Path

import numpy as np

RESIDENT_BYTES = 64 << 20  # how much of the file may count as this process's memory
TOUCHED_BYTES = 64 << 10  # the system maps so much around a place that is read


class MappedIds:
    """The ids in a file, (N,) of `dtype`, read-only. A slice, or an array of positions, gives a copy of those ids.

    Pages of a map count as the process's memory once they are read, and windows from all over a long text would bring
    in all of it. So they are given back now and then; they stay in the system's cache as long as there is room.
    """

    def __init__(self, path: Path, dtype: np.dtype | str):
        """Raises ValueError for a file that is empty or ends within an id."""
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ids = np.frombuffer(self._map, dtype)
        self._gives_back = len(self._map) > RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED")
        self._touched = 0  # bytes at most, since they were given back

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids."""
        return self._ids.dtype

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """A copy. Each row of an array of positions should lie together, as a window does."""
        ids = np.array(self._ids[index])
        if self._gives_back:
            places = len(index) if isinstance(index, np.ndarray) else 1
            self._touched += ids.nbytes + places * TOUCHED_BYTES
            if self._touched > RESIDENT_BYTES:
                self._map.madvise(mmap.MADV_DONTNEED)
                self._touched = 0
        return ids

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """All of them, as numpy asks for them."""
        return np.array(self[:], dtype)
