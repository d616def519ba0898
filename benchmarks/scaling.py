"""Measures how much faster two processes train than one, each with one thread, on the same global batch.

    python benchmarks/scaling.py [--rounds 5] [--steps 20] [--n-layer 6 --n-embd 192 --block-size 256 --batch-size 24]

In turn, `train.py` runs in one process, in two processes (gloo), and as two independent runs with half of the batch
each. Speeds come from the logs of the runs, in windows of five steps after the first ten, without start, evaluation
and checkpoints. The median window is printed, and the fastest, which shows the speed when no other program uses the
cores. Efficiency is the speed of two processes divided by twice the speed of one. The two independent runs show the
highest efficiency that the machine allows, because cores share caches and memory. Prints a table, then all figures as
one line of JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, WINDOW = 10, 5  # steps


def start(processes: int, data: str, run: Path, steps: int, batch_size: int, shape: Sequence[str]) -> subprocess.Popen:
    """Starts train.py for `steps` steps after the warm-up."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), "--data", str(data),
               "--out", str(run), *shape, f"--train.batch_size={batch_size}", f"--train.max_steps={steps + WARM_UP}",
               "--train.sample_length=0", f"--train.eval_every={steps + WARM_UP}", f"--train.log_every={WINDOW}",
               "--data.val_fraction=0.01"]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def speeds_of(process: subprocess.Popen, run: Path) -> list[float]:
    """Waits for the end of a run; returns steps per second in each window, by the times in its log."""
    _, stderr = process.communicate()
    if process.returncode:
        raise RuntimeError(f"train.py ended with exit code {process.returncode}:\n{stderr[-3000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["kind"] == "train" and line["step"] >= WARM_UP]
    return [WINDOW / (after - before) for before, after in itertools.pairwise(seconds)]


def measure(data: str, steps: int, batch_size: int, shape: Sequence[str], folder: Path) -> dict[str, list[float]]:
    """Steps per second in each window, of one process, two processes, and two independent runs of half of the batch."""

    def speeds(*runs: tuple[int, int]) -> list[list[float]]:
        folders = [Path(tempfile.mkdtemp(dir=folder)) for _ in runs]
        started = [start(n, data, run, steps, size, shape) for (n, size), run in zip(runs, folders, strict=True)]
        return [speeds_of(process, run) for process, run in zip(started, folders, strict=True)]

    (one,), (two,) = speeds((1, batch_size)), speeds((2, batch_size))
    independent = [sum(pair) / 2 for pair in zip(*speeds((1, batch_size // 2), (1, batch_size // 2)), strict=True)]
    return {"one": one, "two": two, "independent": independent}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints the table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--data", default="python-docs", metavar="TEXT", help="training text, as for train.py (default: %(default)s)"
    )
    for name, default in (("rounds", 5), ("steps", 20), ("n-layer", 6), ("n-embd", 192), ("block-size", 256),
                          ("batch-size", 24)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="default: %(default)s")
    o = parser.parse_args(argv)
    shape = [f"--model.n_layer={o.n_layer}", f"--model.n_embd={o.n_embd}", f"--model.n_head={o.n_embd // 32}",
             f"--model.block_size={o.block_size}"]  # fmt: skip
    windows: dict[str, list[float]] = {"one": [], "two": [], "independent": []}
    with tempfile.TemporaryDirectory(prefix="smallm-scaling-") as place:
        for number in range(o.rounds):
            for key, speeds in measure(o.data, o.steps, o.batch_size, shape, Path(place)).items():
                windows[key] += speeds
            medians = {key: round(statistics.median(speeds), 3) for key, speeds in windows.items()}
            print(f"after round {number + 1}: {medians}", file=sys.stderr)
    ids = o.batch_size * o.block_size
    print(f"{'steps per second':<22}{'median':>8}{'ids/s':>9}{'efficiency':>12}{'fastest':>10}{'efficiency':>12}")
    for label, key in (("one process", "one"), ("two processes", "two"), ("two runs, half batch", "independent")):
        line = f"{label:<22}"
        for statistic, width in ((statistics.median, 8), (max, 10)):
            speed = statistic(windows[key])
            line += f"{speed:>{width}.2f}" + (f"{speed * ids:>9,.0f}" if statistic is statistics.median else "")
            line += f"{'' if key == 'one' else format(speed / (2 * statistic(windows['one'])), '.2f'):>12}"
        print(line)
    print(json.dumps({"shape": shape, "steps": o.steps, "batch_size": o.batch_size, "rounds": o.rounds} | windows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
