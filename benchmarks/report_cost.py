"""Measures the share of a run's time that is spent on report.json and on the page.

    python benchmarks/report_cost.py [--out DIR] [any flag of train.py]

Trains in this process as train.py does, by default the quick start, and adds up the time of the report's parts: the
text check, the passage at each best evaluation, the record (report.json, also when another part writes it) and the
page (including imports). Shares refer to the whole process from before the import of PyTorch, in wall time and in
processor time; on a busy machine, only processor time is meaningful. Prints a table, then all figures as one line of
JSON. Takes as long as the run: about a minute for the quick start on two cores.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed


class Stopwatch:
    """Counts the calls of functions and adds up their wall and processor time in seconds."""

    def __init__(self):
        self.parts: dict[str, list[float]] = {}

    def __call__(self, name: str, function: Callable) -> Callable:
        """The function, timed under this name."""
        total = self.parts.setdefault(name, [0, 0.0, 0.0])

        @wraps(function)
        def timed(*args, **options):
            wall, processor = time.perf_counter(), time.process_time()
            result = function(*args, **options)
            total[0] += 1
            total[1] += time.perf_counter() - wall
            total[2] += time.process_time() - processor
            return result

        return timed


def main(argv: list[str]) -> int:
    """Trains with the flags `argv` and prints the table and the line of JSON."""
    if "--help" in argv:
        print(__doc__)
        return 0
    wall, processor, watch = time.perf_counter(), time.process_time(), Stopwatch()
    from smallm.training import callbacks, cli
    from smallm.training.report import record

    callbacks.compute_statistics = watch("text check", callbacks.compute_statistics)
    callbacks.read_passage = watch("passage", callbacks.read_passage)
    record.RecordWriter.update = watch("record", record.RecordWriter.update)
    callbacks.Report._write = watch("page", callbacks.Report._write)
    with tempfile.TemporaryDirectory() as folder:
        flags = argv if "--out" in argv else ["--out", f"{folder}/run", *argv]
        code = cli.main(flags)
    whole = time.perf_counter() - wall, time.process_time() - processor
    rows = {name: {"calls": calls, "wall_s": w, "cpu_s": c} for name, (calls, w, c) in watch.parts.items()}
    print("| part | calls | wall, s | processor, s | of the wall time | of the processor time |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        shares = f"{100 * row['wall_s'] / whole[0]:.2f} % | {100 * row['cpu_s'] / whole[1]:.2f} %"
        print(f"| {name} | {row['calls']} | {row['wall_s']:.3f} | {row['cpu_s']:.3f} | {shares} |")
    print(f"| whole run | | {whole[0]:.1f} | {whole[1]:.1f} | | |")
    print(json.dumps({"parts": rows, "whole": {"wall_s": whole[0], "cpu_s": whole[1]}}))
    return code


if __name__ == "__main__":
    from smallm.cli.main import run

    raise SystemExit(run(main))
