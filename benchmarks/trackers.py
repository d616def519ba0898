"""What a tracker costs a training: the time of its lines against that of the steps between them, in one run.

    python benchmarks/trackers.py [tensorboard] [--train.max_steps 200 …]

Trains the quick start with the tracker and takes the time that passes in it. Prints one JSON line.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from smallm.training import cli
from smallm.training import logger as report


def main(argv: list[str]) -> None:
    """Trains once, with a clock around the tracker's start and around each of its records."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "tensorboard"
    records: list[float] = []
    starts: list[float] = []
    report.log_record = clocked(report.log_record, records)
    Accelerator.init_trackers = clocked(Accelerator.init_trackers, starts)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        cli.main(["--out", str(run), "--train.log_with", name, *argv])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = lines[-1]["seconds"] - lines[0]["seconds"]
    spent = sum(records[1:])
    figures = {
        "tracker": name, "start_s": round(starts[0], 2), "records": len(records),
        "ms_per_record": round(1e3 * spent / len(records[1:]), 3), "share_of_training": round(spent / trained, 5),
    }  # fmt: skip
    print(json.dumps(figures))


def clocked(call: Callable, seconds: list[float]) -> Callable:
    """The same, noting how long it takes."""

    def timed(*arguments):
        before = time.perf_counter()
        result = call(*arguments)
        seconds.append(time.perf_counter() - before)
        return result

    return timed


if __name__ == "__main__":
    main(sys.argv[1:])
