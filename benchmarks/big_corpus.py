"""Measures time and memory of whole train.py processes on texts from 1 MB to 4 GB.

    python benchmarks/big_corpus.py [--sizes 1MB 100MB 4GB] [--steps 3000] [--folder DIR]

Each text is generated (English with accents, symbols, kanji and emoji; a function of its size). One process trains on
it for 20 steps with an empty cache, a second one with the cache that the first has filled. On the last text, a third
process trains for --steps short steps. The disk needs about three times the size of the largest text.

Memory is the resident memory of the process and its children, summed and sampled every 0.1 s, or the peak that Linux
records for the process where that is higher. "to step 1" is the time from the start of the process to the first line
of metrics.jsonl. "growth" is the highest memory in the last quarter of the time after step 1 minus that in the first
quarter. "above" is the peak minus the peak of the first text with the same state of the cache. MB are 10^6 bytes.
Prints a table, then all figures as one line of JSON; progress goes to stderr.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from train_speed import cpu_name

from smallm.cli.main import run
from smallm.cli.table import table
from smallm.errors import UserError
from smallm.runs.layout import METRICS
from smallm.training.devices import versions

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
SHORT_STEPS = 20
VAL_CHARACTERS = 20_000
DISK_SHARE = 3.2  # bytes on disk per byte of text: the text, and its ids of two bytes
SAMPLE_SECONDS = 0.1  # between two samples of memory; searching for children takes time
SETTINGS = {
    "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 32, "model.block_size": 32, "train.batch_size": 32,
    "train.log_every": 1, "train.eval_every": 10**9, "train.sample_length": 0, "train.compile": "no",
}  # fmt: skip
WORDS = """the of and a to in he was that it his her with as had for not at on she be but said they you him is from all
café naïve Größe façade Zoë señor 10 € — “so” … π ≈ 3.14 № 日本語 テキスト 東京 🎉 Привет мир"""


@dataclass
class Row:
    """The figures of one training process."""

    size: str
    start: str
    """`first`: the cache is empty; `second`: it holds the encoded text; `long`: as `second`, with --steps steps."""
    steps: int
    seconds: float
    """Wall time of the whole process."""
    seconds_to_step_1: float
    peak_mb: float
    """Highest resident memory of the process and its children, together."""
    growth_mb: float
    """Highest memory in the last quarter of the time after step 1, minus that in the first quarter."""
    above_mb: float = 0.0
    """Peak minus the peak of the first text with the same state of the cache."""


def make_text(path: Path, size: int) -> None:
    """Writes `size` bytes of UTF-8, or up to three more, to `path`; the text is a function of the size."""
    rng, words = random.Random(size), WORDS.split()
    lines = (" ".join(rng.choices(words, k=rng.randint(4, 14))) + "\n" for _ in range(20_000))
    blocks = ["".join(next(lines) for _ in range(100)).encode() for _ in range(200)]
    with path.open("wb") as file:
        while (left := size - file.tell()) > 0:
            file.write(b"".join(rng.sample(blocks, len(blocks)))[:left].decode(errors="ignore").encode() or b"\n")


@dataclass
class Observation:
    """Time and memory of a process from its start to its end."""

    seconds: float
    seconds_to_line: float
    """Time until the awaited file was not empty; NaN if it stayed empty."""
    peak: int
    """Highest resident memory in bytes."""
    samples: list[tuple[float, int]]
    """Seconds since the start, and resident bytes of the process and its children."""


def watch(command: list[str], cache: Path, log: Path, awaited: Path) -> Observation:
    """Runs a command to its end and samples its memory.

    log: receives the output. awaited: the file whose first content is timed.
    Raises `UserError` if the command fails.
    """
    with log.open("ab") as output:
        started, samples, recorded, line = time.perf_counter(), [(0.0, 0)], 0, math.nan
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"SMALLM_CACHE": str(cache)})
        watched = psutil.Process(process.pid)
        try:
            while process.poll() is None:
                seconds = time.perf_counter() - started
                samples.append((seconds, resident_bytes(watched)))
                recorded = max(recorded, recorded_peak(process.pid))
                if math.isnan(line) and awaited.is_file() and awaited.stat().st_size:
                    line = seconds
                time.sleep(SAMPLE_SECONDS)
        finally:
            process.kill()
    if process.returncode:
        raise UserError(f"`{' '.join(command)}` ended with exit code {process.returncode}: {last_line(log)}")
    return Observation(time.perf_counter() - started, line, max(recorded, *(size for _, size in samples)), samples)


def resident_bytes(parent: psutil.Process) -> int:
    """Resident memory of a process and its children; pages that they share count more than once."""
    total = 0
    with suppress(psutil.Error):  # the process has just ended
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_info().rss
    return total


def recorded_peak(pid: int) -> int:
    """Peak resident memory in bytes of a process without its children, as Linux records it; 0 on other systems."""
    # ru_maxrss does not do: it starts with the memory of the parent process.
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def last_line(log: Path) -> str:
    return (log.read_text(errors="replace").splitlines() or ["there is no output"])[-1]


def growth(samples: list[tuple[float, int]], since: float) -> float:
    """Highest sample of the last quarter of the samples minus that of the first quarter, in bytes."""
    later = [size for seconds, size in samples if seconds >= since]
    quarter = max(1, len(later) // 4)
    return max(later[-quarter:], default=0) - max(later[:quarter], default=0)


def train(size: str, start: str, text: Path, steps: int) -> Row:
    """Trains on the text, with the cache in the same folder."""
    out = text.with_name(f"run-{size}-{start}")
    settings = SETTINGS | {"train.max_steps": steps, "data.val_fraction": VAL_CHARACTERS / text.stat().st_size}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, str(TRAIN), "--data", str(text), "--out", str(out), *flags]
    print(f"big_corpus: {size}, {start} start, {steps} steps", file=sys.stderr, flush=True)
    seen = watch(command, text.with_name("cache"), text.with_name("log.txt"), out / METRICS)
    grown = growth(seen.samples, seen.seconds_to_line)
    return Row(size, start, steps, seen.seconds, seen.seconds_to_line, seen.peak / 1e6, grown / 1e6)


def measure(sizes: Sequence[str], steps: int, folder: Path) -> list[Row]:
    """Runs all processes, one after the other."""
    rows, text = [], folder / "text.txt"
    make_text(text, 10**5)
    train("100KB", "warm-up", text, 1)  # compiles the kernels, once per machine
    for size in sizes:
        print(f"big_corpus: writing a text of {size}", file=sys.stderr, flush=True)
        make_text(text, number_of_bytes(size))
        rows += [train(size, start, text, SHORT_STEPS) for start in ("first", "second")]
        if size == sizes[-1]:
            rows.append(train(size, "long", text, steps))
        shutil.rmtree(folder / "cache" / "corpora")
    for row in rows:
        start = "first" if row.start == "first" else "second"
        row.above_mb = row.peak_mb - next(other.peak_mb for other in rows if other.start == start)
    return rows


def number_of_bytes(size: str) -> int:
    """The size of a text such as `4GB`, `100MB` or `50KB`. Raises `UserError`."""
    try:
        return int(float(size[:-2]) * UNITS[size[-2:].upper()])
    except (KeyError, ValueError):
        raise UserError(f"{size} is not a size; write a size as 1MB, 100MB or 4GB") from None


def format_table(rows: list[Row]) -> str:
    cells = [["text", "start", "steps", "seconds", "to step 1", "peak MB", "above", "growth"]] + [
        [row.size, row.start, f"{row.steps:,}", f"{row.seconds:.1f}", f"{row.seconds_to_step_1:.1f}",
         f"{row.peak_mb:,.0f}", f"{row.above_mb:+,.0f}", f"{row.growth_mb:+,.0f}"]
        for row in rows
    ]  # fmt: skip
    return "\n".join(table(cells, left=()))


def main(argv: Sequence[str]) -> int:
    """Measures and prints the table and the line of JSON."""
    options = parse(argv)
    longest = max(map(number_of_bytes, options.sizes))
    with tempfile.TemporaryDirectory(prefix="smallm-", dir=options.folder) as folder:
        if (free := shutil.disk_usage(folder).free) < DISK_SHARE * longest:
            needed = f"{DISK_SHARE * longest / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free in {folder}"
            raise UserError(f"{needed}; choose another --folder or smaller --sizes")
        rows = measure(options.sizes, options.steps, Path(folder))
    print(format_table(rows))
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(), "cpu": cpu_name(),
             "cores": os.cpu_count()}  # fmt: skip
    print(json.dumps({**facts, "rows": [asdict(row) for row in rows]}))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="big_corpus.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["1MB", "100MB", "4GB"], metavar="SIZE",
        help="sizes of the texts in KB, MB or GB (default: 1MB 100MB 4GB)")  # fmt: skip
    add("--steps", type=int, default=3000, metavar="N", help="steps of the long run on the last text (default: 3000)")
    add("--folder", metavar="DIR", help="an existing folder for texts and runs (default: the temporary folder)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(run(main))
