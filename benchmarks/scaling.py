"""How much faster two processes train than one, each with one thread, on the same global batch.

    python benchmarks/scaling.py [--rounds 5] [--steps 20] [--n-layer 6 --n-embd 192 --block-size 256 --batch-size 24]

Runs `train.py` in one process, in two (gloo), and as two runs of half the batch that know nothing of each other, turn
by turn, so that all meet the same noise of the machine. The speed of each is that of its own log, by windows of five
steps after the first ten, without start, evaluation and checkpoints: the median window, and the fastest, which says
what is possible when nobody else wants the cores. Efficiency is the speed of two processes over twice that of one; the
two strangers show how much of that the machine gives at all, since cores share caches, memory and sometimes themselves.
Prints a table, then all figures as one line of JSON.
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
    """train.py, for so many steps after those that do not count."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), "--data", str(data),
               "--out", str(run), *shape, f"--train.batch_size={batch_size}", f"--train.max_steps={steps + WARM_UP}",
               "--train.sample_length=0", f"--train.eval_every={steps + WARM_UP}", f"--train.log_every={WINDOW}",
               "--data.val_fraction=0.01"]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def speeds_of(process: subprocess.Popen, run: Path) -> list[float]:
    """Steps per second in each window of a run, once it is finished, by its own clock."""
    _, words = process.communicate()
    if process.returncode:
        raise RuntimeError(f"train.py ended with exit code {process.returncode}:\n{words[-3000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["kind"] == "train" and line["step"] >= WARM_UP]
    return [WINDOW / (after - before) for before, after in itertools.pairwise(seconds)]


def measure(data: str, steps: int, batch_size: int, shape: Sequence[str], folder: Path) -> dict[str, list[float]]:
    """Steps a second, window by window: of one process, of two, and of two strangers with half of the batch each."""

    def speeds(*runs: tuple[int, int]) -> list[list[float]]:
        places = [Path(tempfile.mkdtemp(dir=folder)) for _ in runs]
        started = [start(n, data, place, steps, size, shape) for (n, size), place in zip(runs, places, strict=True)]
        return [speeds_of(process, place) for process, place in zip(started, places, strict=True)]

    (one,), (two,) = speeds((1, batch_size)), speeds((2, batch_size))
    strangers = [sum(pair) / 2 for pair in zip(*speeds((1, batch_size // 2), (1, batch_size // 2)), strict=True)]
    return {"one": one, "two": two, "strangers": strangers}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", default="python-docs", help="text to train on")
    for name, default in (("rounds", 5), ("steps", 20), ("n-layer", 6), ("n-embd", 192), ("block-size", 256),
                          ("batch-size", 24)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args(argv)
    shape = [f"--model.n_layer={o.n_layer}", f"--model.n_embd={o.n_embd}", f"--model.n_head={o.n_embd // 32}",
             f"--model.block_size={o.block_size}"]  # fmt: skip
    windows: dict[str, list[float]] = {"one": [], "two": [], "strangers": []}
    with tempfile.TemporaryDirectory(prefix="smallm-scaling-") as place:
        for number in range(o.rounds):
            for key, speeds in measure(o.data, o.steps, o.batch_size, shape, Path(place)).items():
                windows[key] += speeds
            medians = {key: round(statistics.median(speeds), 3) for key, speeds in windows.items()}
            print(f"after round {number + 1}: {medians}", file=sys.stderr)
    ids = o.batch_size * o.block_size
    print(f"{'steps per second':<20}{'median':>8}{'ids/s':>9}{'efficiency':>12}{'fastest':>10}{'efficiency':>12}")
    for words, key in (("one process", "one"), ("two processes", "two"), ("two strangers", "strangers")):
        line = f"{words:<20}"
        for of, width in ((statistics.median, 8), (max, 10)):
            speed = of(windows[key])
            line += f"{speed:>{width}.2f}" + (f"{speed * ids:>9,.0f}" if of is statistics.median else "")
            line += f"{'' if key == 'one' else format(speed / (2 * of(windows['one'])), '.2f'):>12}"
        print(line)
    print(json.dumps({"shape": shape, "steps": o.steps, "batch_size": o.batch_size, "rounds": o.rounds} | windows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
