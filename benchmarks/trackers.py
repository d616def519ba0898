"""Measures the cost of a tracker: the time of its records as a share of the training time, within one run.

    python benchmarks/trackers.py [tensorboard] [any flag of train.py]

Trains the quick start with the tracker and adds up the time spent in the tracker. Prints one line of JSON. Takes
about a minute on two cores.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from accelerate import Accelerator

from smallm.cli.main import run
from smallm.training import cli, logger


def main(argv: list[str]) -> None:
    """Trains once and times the start of the tracker and each of its records."""
    if "--help" in argv:
        print(__doc__)
        return
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "tensorboard"
    records: list[float] = []
    starts: list[float] = []
    logger.log_record = timed(logger.log_record, records)
    Accelerator.init_trackers = timed(Accelerator.init_trackers, starts)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        cli.main(["--out", str(out), "--train.log_with", name, *argv])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = lines[-1]["seconds"] - lines[0]["seconds"]
    spent = sum(records[1:])
    figures = {
        "tracker": name, "start_s": round(starts[0], 2), "records": len(records),
        "ms_per_record": round(1e3 * spent / len(records[1:]), 3), "share_of_training": round(spent / trained, 5),
    }  # fmt: skip
    print(json.dumps(figures))


def timed(function: Callable, seconds: list[float]) -> Callable:
    """The function; each call appends its duration to `seconds`."""

    def wrapper(*arguments):
        before = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - before)
        return result

    return wrapper


if __name__ == "__main__":
    raise SystemExit(run(main))
