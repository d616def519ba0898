"""How much faster two processes train than one, each with one thread, on the same global batch.

    python benchmarks/scaling.py [--rounds 5] [--steps 40] [--n-layer 6 --n-embd 192 --block-size 256 --batch-size 12]

Runs `train.py` in one process and in two (gloo), turn by turn, so that both meet the same noise of the machine, and
takes the speed of each from its own log: the steps after the first ten, without start, evaluation and checkpoints.
Efficiency is the time of one process over twice that of two. Prints a table, then all figures as one line of JSON.
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


def steps_per_second(processes: int, data: Path, steps: int, shape: Sequence[str], folder: Path) -> float:
    """Of a run of so many steps, by its own clock."""
    run = folder / f"run-{len(list(folder.iterdir()))}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), "--data", str(data),
               "--out", str(run), *shape, f"--train.max_steps={steps + WARM_UP}", "--train.sample_length=0",
               f"--train.eval_every={steps + WARM_UP}", f"--train.log_every={WARM_UP}",
               "--data.val_fraction=0.01"]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    return (train[-1]["step"] - train[0]["step"]) / (train[-1]["seconds"] - train[0]["seconds"])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", default="python-docs", help="text to train on")
    for name, default in (("rounds", 5), ("steps", 40), ("n-layer", 6), ("n-embd", 192), ("block-size", 256),
                          ("batch-size", 12)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args(argv)
    shape = [f"--model.n_layer={o.n_layer}", f"--model.n_embd={o.n_embd}", f"--model.n_head={o.n_embd // 32}",
             f"--model.block_size={o.block_size}", f"--train.batch_size={o.batch_size}"]  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(prefix="smallm-scaling-") as place:
        for number in range(o.rounds):
            one, two = (steps_per_second(n, o.data, o.steps, shape, Path(place)) for n in (1, 2))
            rows.append({"one": one, "two": two, "efficiency": two / (2 * one)})
            print(f"round {number + 1}: {rows[-1]}", file=sys.stderr)
    characters = o.batch_size * o.block_size
    middle = {key: statistics.median(row[key] for row in rows) for key in ("one", "two", "efficiency")}
    print(f"{'processes':>9} {'steps/s':>8} {'ids/s':>9}   efficiency (median of {o.rounds} pairs, least and most)")
    print(f"{1:>9} {middle['one']:>8.2f} {middle['one'] * characters:>9,.0f}")
    least, most = (pick(row["efficiency"] for row in rows) for pick in (min, max))
    print(f"{2:>9} {middle['two']:>8.2f} {middle['two'] * characters:>9,.0f}   "
          f"{middle['efficiency']:.2f} ({least:.2f} to {most:.2f})")  # fmt: skip
    print(json.dumps({"shape": shape, "steps": o.steps, "rounds": rows, "median": middle}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
