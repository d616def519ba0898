"""Reads `metrics.jsonl`, the log of a run: one JSON object a line, in the order in which they were written.

Each record has a "kind": "train" for the mean of some steps, "eval" for an evaluation, and others.
"""

import json
from pathlib import Path
from typing import Any

from smallm.errors import UserError
from smallm.runs.layout import METRICS

Record = dict[str, Any]


def read_metrics(run: Path, max_bytes: int | None = None, strict: bool = False) -> list[Record]:
    """The records of a run; empty if the file cannot be read.

    max_bytes: read only this many bytes at the end of the file; default: all of it.
    strict: raise `UserError` for a missing file, and for a broken line unless it is the last, which a kill may have cut
    short. By default broken lines are left out.
    """
    file = run / METRICS
    try:
        with file.open("rb") as stream:
            start = 0 if max_bytes is None else max(0, stream.seek(0, 2) - max_bytes)
            stream.seek(start)
            lines = stream.read().rstrip().split(b"\n")[1 if start else 0 :]
    except OSError:
        if not strict:
            return []
        problem = f"has no readable {METRICS}" if run.is_dir() else "is not a folder"
        raise UserError(f"{run} {problem}: give the folder of a training run, such as runs/NAME") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            records.append(record)
        except (ValueError, RecursionError) as error:
            cut_short = number == len(lines) and isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
            if strict and not cut_short:
                raise UserError(f"{file}: line {number} is broken; delete that line and try again") from None
    return records
