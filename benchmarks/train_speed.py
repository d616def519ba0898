"""Compares time and loss of whole training processes with a plain PyTorch reference on the same cores.

    python benchmarks/train_speed.py [--data TEXT] [--configs shakespeare-cpu …] [--seeds 1 2 3] [--no-reference]

In sequence: the peak of matrix products on this machine, benchmarks/nanogpt.py, then train.py for each config and
seed, each in a separate process. The processes share a cache that is empty at first: the first run of train.py
encodes the text and compiles the kernels, as the first run on a machine does, and later runs reuse both. Losses are
measured afterwards on the whole validation text, in nats per character. Prints a table, then all figures as one line
of JSON; progress goes to stderr.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import nanogpt

from smallm.cli.main import run
from smallm.cli.table import table
from smallm.errors import UserError
from smallm.inference.scoring import windows
from smallm.runs.metrics import read_metrics
from smallm.training.checkpoint.format import load_model
from smallm.training.checkpoint.manager import best_checkpoint, saved_config
from smallm.training.config import DataConfig
from smallm.training.data.corpus import Corpus, open_corpus
from smallm.training.devices import versions
from smallm.training.model.operations import cross_entropy
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.request import load_config

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = (64, 128, 256)
VAL_FRACTION = 0.1  # replaces the value of each config, so that all runs are scored on the same text
REFERENCE = "reference"


@dataclass
class Row:
    """The figures of one training process."""

    name: str
    """A config, or `reference`."""
    seed: int
    seconds: float
    """Wall time of the process from its start to its exit."""
    step_ms: float
    """Median milliseconds of a step, without evaluations and checkpoints."""
    characters_per_second: float
    """Characters of training text per second in the median step."""
    gemm_share: float
    """Floating-point operations of the model per second, relative to the peak of matrix products."""
    parameters: int
    losses: dict[int, float]
    """Length of windows in ids -> nats per character of the whole validation text."""
    ratio: float | None = None
    """Seconds of the reference divided by the seconds of this process."""


def gemm_peak(rounds: int = 10) -> dict:
    """Highest FLOP/s of a product of two square matrices, in fp32 on a CPU and bf16 on a GPU."""
    gpu = torch.cuda.is_available()
    device, dtype, size, products = ("cuda", torch.bfloat16, 8192, 20) if gpu else ("cpu", torch.float32, 2048, 1)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out, best = torch.empty_like(a), math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return {
        "flops_per_second": products * 2 * size**3 / best, "dtype": str(dtype).removeprefix("torch."), "device": device,
        "name": torch.cuda.get_device_name() if gpu else cpu_name(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def cpu_name() -> str:
    """The name of the processor, as far as the system provides it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def timed(command: list[str], cache: Path) -> float:
    """Seconds from the start of a Python process to its exit; the output goes to stderr, caches go into `cache`."""
    print(f"train_speed: {' '.join(command)}", file=sys.stderr, flush=True)
    caches = dict.fromkeys(("SMALLM_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), str(cache))
    started = time.perf_counter()
    code = subprocess.run([sys.executable, *command], stdout=2, env=os.environ | caches).returncode
    seconds = time.perf_counter() - started
    if code:
        raise UserError(f"`{' '.join(command)}` ended with exit code {code}; its message is above")
    return seconds


def cache_beside(out: Path) -> Path:
    """The cache that all runs of a benchmark share."""
    return out.parent / "cache"


def run_reference(text: Path, out: Path, steps: int, seed: int, peak: dict) -> Row:
    """Trains the reference in a separate process and scores it in this process."""
    options = ["--data", str(text), "--out", str(out), "--steps", str(steps), "--seed", str(seed)]
    seconds = timed([str(ROOT / "benchmarks" / "nanogpt.py"), *options, "--device", peak["device"]], cache_beside(out))
    facts, scored = json.loads((out / "reference.json").read_text()), nanogpt.score_reference(text, out)
    speed = facts["characters_per_second"]
    return Row(
        REFERENCE, seed, seconds, facts["median_step_ms"], speed,
        facts["flops_per_id"] * speed / peak["flops_per_second"], facts["parameters"],
        {scored["window"]: scored["nats_per_char"]}, ratio=1.0,
    )  # fmt: skip


def run_config(config: str, text: Path, out: Path, seed: int, peak: dict) -> Row:
    """Trains a config in a separate process and scores its best checkpoint in this process."""
    options = ["--config", config, "--data", str(text), "--out", str(out), "--train.seed", str(seed)]
    options += ["--data.encoding", "utf-8", "--data.val_fraction", str(VAL_FRACTION)]
    seconds = timed([str(ROOT / "train.py"), *options], cache_beside(out))
    settings, model = saved_config(out)[0], load_model(best_checkpoint(out))
    corpus = open_text(text, settings.data.min_count, cache_beside(out))
    speed = statistics.median(r["characters_per_second"] for r in read_metrics(out) if r["kind"] == "train")
    lengths = [n for n in WINDOWS if n <= settings.model.block_size] or [settings.model.block_size]
    ids_per_second = speed * len(corpus.train_ids) / corpus.train_characters
    return Row(
        config, seed, seconds, 1000 * settings.train.batch_size * settings.model.block_size / ids_per_second, speed,
        model.flops_per_id() * ids_per_second / peak["flops_per_second"], model.parameter_count(),
        {length: full_loss(model, corpus, length) for length in lengths},
    )  # fmt: skip


def open_text(source: str | Path, min_count: int, cache: Path | None = None) -> Corpus:
    """The text with the split of all runs."""
    data = DataConfig(str(source), min_count=min_count, val_fraction=VAL_FRACTION)
    return open_corpus(data, cache=cache, progress=False)


@torch.no_grad()
def full_loss(model: TransformerLanguageModel, corpus: Corpus, window: int) -> float:
    """Nats per character of the whole validation text in adjacent windows of `window` ids."""
    nats = 0.0
    for ids, targets in windows([np.asarray(corpus.val_ids)], window):
        nats += cross_entropy(model(torch.from_numpy(ids)), torch.from_numpy(targets), reduction="sum").item()
    return nats / (corpus.val_characters - 1)


def summary(rows: list[Row]) -> dict[str, dict]:
    """For each config: mean and highest loss over the seeds by window, mean seconds, mean and lowest ratio."""
    configs = {}
    for name in dict.fromkeys(row.name for row in rows if row.name != REFERENCE):
        mine = [row for row in rows if row.name == name]
        losses = {window: [row.losses[window] for row in mine] for window in mine[0].losses}
        ratios = [row.ratio for row in mine if row.ratio is not None]
        configs[name] = {
            "losses": {w: {"mean": statistics.fmean(each), "worst": max(each)} for w, each in losses.items()},
            "seconds": statistics.fmean(row.seconds for row in mine),
            "ratio": {"mean": statistics.fmean(ratios), "worst": min(ratios)} if ratios else None,
        }
    return configs


def format_table(rows: list[Row]) -> str:
    lengths = sorted({window for row in rows for window in row.losses})
    head = ["run", "seed", "seconds", "step ms", "chars/s", "of peak", "parameters"]
    cells = [[*head, *(f"loss@{n}" for n in lengths), "ratio"]] + [
        [row.name, str(row.seed), f"{row.seconds:.1f}", f"{row.step_ms:.2f}", f"{row.characters_per_second:,.0f}",
         f"{row.gemm_share:.1%}", f"{row.parameters:,}",
         *(f"{row.losses[n]:.4f}" if n in row.losses else "-" for n in lengths),
         "-" if row.ratio is None else f"{row.ratio:.2f}"]
        for row in rows
    ]  # fmt: skip
    return "\n".join(table(cells))


def measure(options: argparse.Namespace, corpus: Corpus) -> tuple[list[Row], dict]:
    """Runs all processes one after the other; returns their rows and the peak of matrix products."""
    with tempfile.TemporaryDirectory(prefix="smallm-") as folder:
        home = Path(folder)
        text = home / "text.txt"
        text.write_bytes((corpus.vocabulary.decode(corpus.train_ids) + corpus.val_text()).encode())
        print("train_speed: peak of matrix products", file=sys.stderr, flush=True)
        peak = json.loads(subprocess.check_output([sys.executable, __file__, "--peak"]))
        rows = []
        if options.reference:
            rows.append(run_reference(text, home / REFERENCE, options.reference_steps, options.seeds[0], peak))
        for config, seed in product(options.configs, options.seeds):
            row = run_config(config, text, home / f"run-{len(rows)}", seed, peak)
            row.ratio = rows[0].seconds / row.seconds if options.reference else None
            rows.append(row)
    return rows, peak


def main(argv: Sequence[str]) -> int:
    """Measures and prints the table and the line of JSON."""
    options = parse(argv)
    if options.peak:
        print(json.dumps(gemm_peak()))
        return 0
    for config in options.configs:
        load_config(config)  # reports a mistake before the measurements begin
    corpus = open_text(options.data, min_count=1)
    rows, peak = measure(options, corpus)
    print(format_table(rows))
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(), "cpu": cpu_name(),
        "threads": peak["threads"], "peak": peak, "text": corpus.name, "fingerprint": corpus.fingerprint,
        "characters": {"train": corpus.train_characters, "validation": corpus.val_characters},
    }  # fmt: skip
    print(json.dumps({**facts, "rows": [asdict(row) for row in rows], "configs": summary(rows)}))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="train_speed.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", default="shakespeare", metavar="TEXT",
        help="a UTF-8 file, a folder or a built-in text, as for train.py (default: %(default)s)")  # fmt: skip
    add("--configs", nargs="+", default=["speedrun", "shakespeare-cpu"], metavar="CONFIG",
        help="default: %(default)s")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N",
        help="random seeds of the runs; the reference uses the first (default: 1 2 3)")  # fmt: skip
    add("--no-reference", dest="reference", action="store_false", help="skip the reference and the ratios")
    add("--reference-steps", type=int, default=2000, metavar="N", help="steps of the reference (default: 2000)")
    add("--peak", action="store_true", help="only measure the peak of matrix products and print it as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(run(main))
