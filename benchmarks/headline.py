"""Compares the loss of smallm and of nanoGPT's recipe after the same time on the same cores, for several budgets.

    python benchmarks/headline.py --results FILE [--data TEXT] [--minutes 0.17 1 2 5 10 20] [--seeds 1] [--picture SVG]

For each budget and seed two whole processes start at the same moment, each on half of the processor's cores: train.py
with `--minutes`, and nanogpt.py, nanoGPT's quick-start settings for a CPU with as many steps as fit into the time (its
learning rate falls over these steps). A busy machine therefore slows both. Losses are measured afterwards on the whole
validation text, the last tenth, in adjacent windows: of the context of each model, and of smallm in windows of 64 too.

Each pair of runs appends two lines of JSON to FILE. An interrupted series goes on, then the table of all lines is
printed and, with `--picture`, drawn. Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import nanogpt
import train_speed

from smallm.cli.main import run
from smallm.cli.table import table
from smallm.errors import UserError
from smallm.training.checkpoint.format import load_model
from smallm.training.checkpoint.manager import best_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MINUTES = (0.17, 1, 2, 5, 10, 20)
SHORT = 64  # the context of the reference
PROBE = 300  # steps of the run that measures the speed of the reference
NAMES = ("nanoGPT", "smallm")


@dataclass(frozen=True)
class Result:
    """A finished run."""

    name: str
    """An element of NAMES."""
    minutes: float
    """The budget."""
    seed: int
    seconds: float
    """Wall time of the process from its start to its exit."""
    parameters: int
    losses: dict[str, float]
    """Length of windows in ids -> nats per character of the whole validation text."""

    def best(self) -> float:
        """The loss in windows of the model's context."""
        return self.losses[max(self.losses, key=int)]


def halves() -> list[set[int]]:
    """The cores of this process in two halves."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UserError("the two processes need a core each; this machine has one")
    half = len(cores) // 2
    return [set(cores[:half]), set(cores[half : 2 * half])]


def seconds_of(command: Sequence[str], cores: set[int], cache: Path) -> float:
    """Seconds from the start of a Python process on these cores to its exit."""
    environment = os.environ | {"OMP_NUM_THREADS": str(len(cores)), "SMALLM_CACHE": str(cache)}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True,
                          preexec_fn=lambda: os.sched_setaffinity(0, cores))  # fmt: skip
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - started


def reference_command(text: Path, out: Path, steps: int, seed: int) -> list[str]:
    return [str(ROOT / "benchmarks" / "nanogpt.py"), "--data", str(text), "--out", str(out), "--steps", str(steps),
            "--seed", str(seed)]  # fmt: skip


def smallm_command(text: Path, out: Path, minutes: float, seed: int) -> list[str]:
    return [str(ROOT / "train.py"), "--data", str(text), "--data.encoding", "utf-8", "--out", str(out), "--minutes",
            str(minutes), "--train.seed", str(seed), "--data.val_fraction",
            str(train_speed.VAL_FRACTION)]  # fmt: skip


def run_pair(text: Path, home: Path, minutes: float, seed: int, steps: int) -> list[Result]:
    """Runs both programs at the same time and scores them."""
    folders = [home / f"{name}-{minutes}-{seed}" for name in NAMES]
    commands = [reference_command(text, folders[0], steps, seed), smallm_command(text, folders[1], minutes, seed)]
    with ThreadPoolExecutor(2) as pool:
        seconds = list(pool.map(seconds_of, commands, halves(), [home / "cache"] * 2))
    facts, scored = json.loads((folders[0] / "reference.json").read_text()), nanogpt.score_reference(text, folders[0])
    model, corpus = load_model(best_checkpoint(folders[1])), train_speed.open_text(text, 1, home / "cache")
    windows = sorted({SHORT, model.config.block_size})
    losses = {str(window): train_speed.full_loss(model, corpus, window) for window in windows}
    return [Result(NAMES[0], minutes, seed, seconds[0], facts["parameters"], {str(SHORT): scored["nats_per_char"]}),
            Result(NAMES[1], minutes, seed, seconds[1], model.parameter_count(), losses)]  # fmt: skip


def warm_up(text: Path, home: Path) -> None:
    """A short run of smallm: the first run on a machine compiles the kernels, and the first on a text encodes it."""
    command = [str(ROOT / "train.py"), "--data", str(text), "--data.encoding", "utf-8", "--data.val_fraction",
               str(train_speed.VAL_FRACTION), "--train.max_steps", "2", "--out", str(home / "first")]  # fmt: skip
    seconds_of(command, halves()[1], home / "cache")


def seconds_per_step(text: Path, home: Path) -> tuple[float, float]:
    """Seconds of the reference for its start and per step, beside a busy process on the other half of the cores."""
    times = []
    for steps in (PROBE // 3, PROBE):
        with ThreadPoolExecutor(2) as pool:
            commands = [reference_command(text, home / f"probe-{steps}-{half}", steps, 1) for half in range(2)]
            times.append(max(pool.map(seconds_of, commands, halves(), [home / "cache"] * 2)))
    each = (times[1] - times[0]) / (PROBE - PROBE // 3)
    return times[0] - each * (PROBE // 3), each


def read_results(file: Path) -> list[Result]:
    """The results of earlier calls."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [Result(**json.loads(line)) for line in lines]


def measure(options: argparse.Namespace) -> list[Result]:
    """Runs whatever FILE does not hold yet; returns all results."""
    results = read_results(options.results)
    done = {(result.minutes, result.seed) for result in results}
    missing = [pair for pair in product(options.minutes, options.seeds) if pair not in done]
    if not missing:
        return results
    with tempfile.TemporaryDirectory(prefix="smallm-") as folder:
        home, corpus = Path(folder), train_speed.open_text(options.data, 1)
        text = home / "text.txt"
        text.write_bytes((corpus.vocabulary.decode(corpus.train_ids) + corpus.val_text()).encode())
        warm_up(text, home)
        start, each = seconds_per_step(text, home)
        for minutes, seed in missing:
            pair = run_pair(text, home, minutes, seed, max(1, round((60 * minutes - start) / each)))
            with options.results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(result)) + "\n" for result in pair)
            results += pair
            print(f"headline: {minutes:g} minutes, seed {seed}: "
                  + ", ".join(f"{r.name} {r.best():.4f} after {r.seconds:.0f} s" for r in pair),
                  file=sys.stderr, flush=True)  # fmt: skip
    return results


def means(results: Sequence[Result], name: str) -> dict[float, tuple[float, float, int]]:
    """minutes -> mean seconds, mean loss in windows of the model's context, number of seeds."""
    groups: dict[float, list[Result]] = {}
    for result in results:
        if result.name == name:
            groups.setdefault(result.minutes, []).append(result)
    return {minutes: (statistics.fmean(r.seconds for r in group), statistics.fmean(r.best() for r in group), len(group))
            for minutes, group in sorted(groups.items())}  # fmt: skip


def format_table(results: Sequence[Result]) -> str:
    """Rows: a budget with the loss of both programs."""
    reference, ours = means(results, NAMES[0]), means(results, NAMES[1])
    short = {m: statistics.fmean(r.losses[str(SHORT)] for r in results if r.name == NAMES[1] and r.minutes == m)
             for m in ours}  # fmt: skip
    rows = [["minutes", "seeds", *NAMES, f"smallm in windows of {SHORT}", "seconds", "seconds"]]
    rows += [[f"{m:g}", str(ours[m][2]), f"{reference[m][1]:.4f}", f"{ours[m][1]:.4f}", f"{short[m]:.4f}",
              f"{reference[m][0]:.0f}", f"{ours[m][0]:.0f}"] for m in ours]  # fmt: skip
    return "\n".join(table(rows))


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws loss by time of both programs."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "smallm", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for name, colour in zip(NAMES, ("#8a8f98", "#1f6feb"), strict=True):
        points: dict[float, Any] = means(results, name)
        seconds, losses = [p[0] for p in points.values()], [p[1] for p in points.values()]
        axes.plot(seconds, losses, "o-", color=colour, linewidth=2, markersize=5)
        axes.annotate(name, (seconds[-1], losses[-1]), xytext=(9, 0), textcoords="offset points", va="center",
                      color=colour, fontweight="bold")  # fmt: skip
        for x, y in zip(seconds, losses, strict=True):
            axes.annotate(f"{y:.2f}", (x, y), xytext=(0, -14), textcoords="offset points", ha="center", fontsize=8,
                          color=colour)  # fmt: skip
    ticks = {10: "10 s", 60: "1 min", 120: "2 min", 300: "5 min", 600: "10 min", 1200: "20 min"}
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.margins(0.16, 0.12)
    axes.set_ylabel("validation loss (nats per character)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(prog="headline.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--results", type=Path, required=True, metavar="FILE", help="JSON lines of all finished runs")
    add("--data", default="shakespeare", metavar="TEXT", help="as for train.py (default: %(default)s)")
    add("--minutes", nargs="+", type=float, default=list(MINUTES), metavar="N",
        help=f"budgets (default: {' '.join(f'{m:g}' for m in MINUTES)})")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[1], metavar="N", help="random seeds (default: 1)")
    add("--picture", type=Path, metavar="SVG", help="draw the loss by time into this file")
    options = parser.parse_args(argv)
    results = measure(options)
    print(format_table(results))
    if options.picture:
        draw(results, options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
