"""How much faster two processes train than one, each with one thread, on the same global batch.

    python benchmarks/scaling.py [--rounds 5] [--steps 40] [--n-layer 6 --n-embd 192 --block-size 256 --batch-size 12]

Runs `train.py` in one process, in two (gloo), and as two runs of half the batch that know nothing of each other, turn
by turn, so that all meet the same noise of the machine. The speed of each is that of its own log: the steps after the
first ten, without start, evaluation and checkpoints. Efficiency is the speed of two processes over twice that of one;
the two strangers show how much of that the machine gives at all, since cores share caches, memory and sometimes
themselves. Prints a table, then all figures as one line of JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 10  # steps


def start(processes: int, data: Path, run: Path, steps: int, batch_size: int, shape: Sequence[str]) -> subprocess.Popen:
    """train.py, for so many steps after those that do not count."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), "--data", str(data),
               "--out", str(run), *shape, f"--train.batch_size={batch_size}", f"--train.max_steps={steps + WARM_UP}",
               "--train.sample_length=0", f"--train.eval_every={steps + WARM_UP}", f"--train.log_every={WARM_UP}",
               "--data.val_fraction=0.01"]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def steps_per_second(process: subprocess.Popen, run: Path) -> float:
    """Of a run, once it is finished, by its own clock."""
    _, words = process.communicate()
    if process.returncode:
        raise RuntimeError(f"train.py ended with exit code {process.returncode}:\n{words[-3000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    return (train[-1]["step"] - train[0]["step"]) / (train[-1]["seconds"] - train[0]["seconds"])


def measure(data: Path, steps: int, batch_size: int, shape: Sequence[str], folder: Path) -> dict[str, float]:
    """Steps of the whole batch a second: of one process, of two, and of two strangers with half of it each."""

    def speeds(*runs: tuple[int, int]) -> list[float]:
        places = [folder / f"{len(list(folder.iterdir())) + i}" for i in range(len(runs))]
        for place in places:
            place.mkdir()
        started = [start(n, data, place, steps, size, shape) for (n, size), place in zip(runs, places, strict=True)]
        return [steps_per_second(process, place) for process, place in zip(started, places, strict=True)]

    (one,), (two,) = speeds((1, batch_size)), speeds((2, batch_size))
    strangers = sum(speeds((1, batch_size // 2), (1, batch_size // 2))) / 2
    return {"one": one, "two": two, "strangers": strangers, "efficiency": two / (2 * one),
            "possible": strangers / (2 * one)}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", default="python-docs", help="text to train on")
    for name, default in (("rounds", 5), ("steps", 40), ("n-layer", 6), ("n-embd", 192), ("block-size", 256),
                          ("batch-size", 12)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args(argv)
    shape = [f"--model.n_layer={o.n_layer}", f"--model.n_embd={o.n_embd}", f"--model.n_head={o.n_embd // 32}",
             f"--model.block_size={o.block_size}"]  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(prefix="smallm-scaling-") as place:
        for number in range(o.rounds):
            rows.append(measure(o.data, o.steps, o.batch_size, shape, Path(place)))
            print(f"round {number + 1}: {rows[-1]}", file=sys.stderr)
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    ids = o.batch_size * o.block_size
    print(f"{'':<24}{'steps/s':>8}{'ids/s':>9}{'efficiency':>12}   median of {o.rounds} rounds, least and most")
    for words, key, share in (("one process", "one", None), ("two processes", "two", "efficiency"),
                              ("two strangers", "strangers", "possible")):  # fmt: skip
        least, most = (pick(row[share] for row in rows) if share else 0.5 for pick in (min, max))
        percent = f"{middle[share]:>12.2f}   {least:.2f} to {most:.2f}" if share else ""
        print(f"{words:<24}{middle[key]:>8.2f}{middle[key] * ids:>9,.0f}{percent}")
    print(json.dumps({"shape": shape, "steps": o.steps, "batch_size": o.batch_size, "rounds": rows, "median": middle}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
