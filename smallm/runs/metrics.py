"""Reads `metrics.jsonl`, the log of a run: one JSON object a line, in the order in which they were written.

Each record has a "kind": "train" for the mean of some steps, "eval" for an evaluation, and others.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from smallm.runs.layout import METRICS

Record = dict[str, Any]


def number(value: Any) -> float | None:
    """A number of a record, or None for what is missing, broken or implausible."""
    return float(value) if type(value) in (int, float) and 0 <= value < 1e12 else None


def read_metrics(run: Path, max_bytes: int | None = None) -> list[Record]:
    """The records of a run; empty if the file cannot be read. Broken lines, as a kill may leave one, are left out.

    max_bytes: read only this many bytes at the end of the file; default: all of it.
    """
    try:
        with (run / METRICS).open("rb") as stream:
            start = 0 if max_bytes is None else max(0, stream.seek(0, 2) - max_bytes)
            stream.seek(start)
            lines = stream.read().rstrip().split(b"\n")[1 if start else 0 :]
    except OSError:
        return []
    records = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
