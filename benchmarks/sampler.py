"""Compares generation, batches, scoring and start-up with other libraries, on the same weights and cores.

    python benchmarks/sampler.py [RUN …] [--threads 1 2] [--length 512] [--rounds 5] [--only NAME …] [--data TEXT]

RUN is a run of train.py with a context of at least 16 + LENGTH ids. Without a run, the shapes S (4 layers, width 128)
and M (6 layers, width 384) are trained for a few steps, so that quantisation has something to lose. The peers are
transformers, onnxruntime-genai and llama.cpp (peers.py); those that are not installed are named and skipped.
Packages: transformers; onnxruntime-genai with onnx-ir, which its builder needs; llama-cpp-python with gguf. In turn,
and with each number of threads, each peer samples LENGTH characters after a seed of 16. Batches, scoring and whole
processes follow. Prints tables, then all figures as one line of JSON; progress goes to stderr.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from peers import PEERS, TEMPERATURE, TOP_K
from train_speed import cpu_name

from smallm import LanguageModel
from smallm.cli.main import run
from smallm.cli.table import table
from smallm.errors import UserError
from smallm.inference.scoring import windows
from smallm.inference.session import Binding
from smallm.runs.layout import validation_text
from smallm.training.checkpoint.format import load_model
from smallm.training.checkpoint.manager import best_checkpoint
from smallm.training.devices import versions

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"S": (4, 4, 128), "M": (6, 6, 384)}  # layers, heads, width
SEED, SCORED = 16, 400  # characters of the seed; characters of which the loss is measured, at most one context
STREAMS = 32  # texts of a batch
TIMED_TEXT = 20_000  # characters that are scored to measure the speed
SMALLM = "smallm"
PARTS = ["overhead", "batch", "scoring", "cold"]
COLD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (kind.from_pretrained(sys.argv[1]) for kind in (AutoTokenizer, AutoModelForCausalLM))
ids = tokenizer("O God, O God!", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, do_sample=True, max_new_tokens=200, pad_token_id=255)[0]))
"""


# A small process between this one and the command: the peak memory of a child includes that of its parent at the fork.
LAUNCHER = """
import resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(code)
"""


@dataclass
class Row:
    """One peer at its best number of threads."""

    name: str
    threads: int
    chars_per_second: float
    """Median over the rounds."""
    bits_per_char: float
    """Loss on the beginning of the validation text."""
    ratio: float | None = None
    """Speed relative to the best other library whose loss is at most 0.002 bits per character higher."""


def timed(work: Callable[[], int]) -> float:
    """Characters per second of `work`, which returns the number of characters."""
    started = time.perf_counter()
    characters = work()
    return characters / (time.perf_counter() - started)


def log(text: str) -> None:
    """Prints a line of progress."""
    print(f"sampler: {text}", file=sys.stderr, flush=True)


def train(shape: str, data: str, out: Path, length: int, steps: int) -> Path:
    """Trains a run of this shape for a few steps."""
    layers, heads, width = SHAPES[shape]
    settings = {
        "model.n_layer": layers, "model.n_head": heads, "model.n_embd": width, "model.block_size": SEED + length,
        "train.max_steps": steps, "train.batch_size": 2, "train.eval_every": steps, "train.sample_length": 0,
        "train.short_windows": "[64]", "train.short_until": "[0.9]", "optim.warmup_steps": 2,
    }  # fmt: skip
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    log(f"training {shape}")
    subprocess.run([sys.executable, ROOT / "train.py", "--data", data, "--out", out, *options], check=True, stdout=2)
    return out


def open_peers(checkpoint: Path, home: Path, threads: Sequence[int], only: Sequence[str]) -> dict[tuple, object]:
    """(name, threads) -> peer; names and skips those whose packages are missing."""
    peers = {}
    for name, make in PEERS.items():
        if only and not name.startswith(tuple(only)):
            continue
        try:
            for n in threads:  # in separate folders: genai stores the number of threads in a file
                log(f"{name}, {n} thread(s)")
                peers[name, n] = make(checkpoint, home / f"{name.replace(' ', '-')}-{n}", n)
        except ImportError as error:
            log(f"{name} is skipped: {error}")
    return peers


def generation(checkpoint: Path, home: Path, text: str, options: argparse.Namespace) -> list[Row]:
    """Measures all peers in turn, round after round."""
    peers = open_peers(checkpoint, home, options.threads, options.only)
    speeds: dict[tuple, list[float]] = {key: [] for key in peers}
    for number in range(options.rounds + 1):
        for key, peer in peers.items():
            speed = timed(lambda peer=peer, seed=number: len(peer.write(text[:SEED], options.length, seed)))
            if number:  # round 0 is a warm-up
                speeds[key].append(speed)
        log(f"round {number} of {options.rounds}")
    rows = []
    for name in dict.fromkeys(name for name, _ in peers):
        mine = {n: statistics.median(speeds[name, n]) for n in options.threads}
        best = max(mine, key=mine.get)
        rows.append(Row(name, best, mine[best], peers[name, best].bits(text[: min(SCORED, SEED + options.length)])))
    for row in rows:
        others = [r.chars_per_second for r in rows if not r.name.startswith(SMALLM)
                  and r.bits_per_char <= row.bits_per_char + 0.002]  # fmt: skip
        row.ratio = row.chars_per_second / max(others) if others and row.name.startswith(SMALLM) else None
    return rows


def overhead(model: LanguageModel, text: str, length: int, rounds: int) -> dict:
    """Microseconds per character inside and outside the graph, and characters per pass."""
    session, inside, whole, passes = model._session, 0.0, 0.0, 0
    bind = session.bind

    def timed_bind() -> Binding:
        binding = bind()
        run = binding.run

        def timed_run() -> None:
            nonlocal inside, passes
            started = time.perf_counter()
            run()
            inside, passes = inside + time.perf_counter() - started, passes + 1

        binding.run = timed_run
        return binding

    session.bind = timed_bind
    for number in range(rounds + 1):
        if number == 1:  # round 0 is a warm-up
            inside, whole, passes = 0.0, 0.0, 0
        options = {"temperature": TEMPERATURE, "top_k": TOP_K, "rng_seed": number}
        whole += length / timed(lambda o=options: len(model.generate(text[:SEED], length, **o)) - SEED)
    session.bind = bind
    graph, whole = (1e6 * seconds / (rounds * length) for seconds in (inside, whole))
    return {"graph": graph, "outside": whole - graph, "characters_per_pass": rounds * length / passes}


def batch(model: LanguageModel, text: str, length: int, rounds: int) -> dict:
    """Characters per second of one text and of a batch of texts."""
    options = {"temperature": TEMPERATURE, "top_k": TOP_K, "rng_seed": 1}
    one, many = [], []
    for _ in range(rounds):
        one.append(timed(lambda: len(model.generate(text[:SEED], length, **options)) - SEED))
        many.append(timed(lambda: STREAMS * length if model.generate_many([text[:SEED]] * STREAMS, length, **options)
                          else 0))  # fmt: skip
    one, many = map(statistics.median, (one, many))
    return {"streams": STREAMS, "one": one, "many": many, "ratio": many / one}


@torch.no_grad()
def scoring(checkpoint: Path, model: LanguageModel, text: str, rounds: int) -> dict:
    """Characters per second of perplexity in windows of block_size: smallm, plain PyTorch, the training kernels."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    modules = {"torch": lambda ids: plain(ids).logits, "kernels": load_model(checkpoint)}
    ids = model.vocabulary.encode(text)
    ways = [(name, rows) for name in modules for rows in (1, 4, 16, 32)]
    speeds: dict[str, list[float]] = {"smallm": []} | {f"{name}, {rows} rows": [] for name, rows in ways}

    def pytorch(name: str, rows: int) -> int:
        nats = 0.0
        for inputs, targets in windows([ids], model.block_size):
            for i in range(0, len(inputs), rows):
                logits = modules[name](torch.from_numpy(inputs[i : i + rows])).flatten(0, 1)
                nats += torch.nn.functional.cross_entropy(
                    logits, torch.from_numpy(targets[i : i + rows]).flatten(), ignore_index=-1, reduction="sum"
                ).item()
        return len(text)

    torch.set_num_threads(os.cpu_count() or 1)
    for _ in range(rounds):
        speeds["smallm"].append(timed(lambda: model.perplexity(text).characters))
        for name, rows in ways:
            speeds[f"{name}, {rows} rows"].append(timed(lambda name=name, rows=rows: pytorch(name, rows)))
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    return medians | {"ratio": medians["smallm"] / max(v for k, v in medians.items() if k.startswith("torch"))}


def process(command: list) -> tuple[float, float]:
    """Seconds and peak memory in MB of a whole process."""
    launched = [sys.executable, "-S", "-c", LAUNCHER, *map(str, command)]
    finished = subprocess.run(launched, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise UserError(f"`{' '.join(map(str, command[:4]))} …` ended with exit code {finished.returncode}")
    seconds, megabytes = map(float, finished.stdout.split())
    return seconds, megabytes


def cold(checkpoint: Path, folder: Path, rounds: int) -> dict:
    """Whole processes in turn: infer.py for 1 and for 200 characters, transformers for 200."""
    infer = [sys.executable, ROOT / "infer.py", "--model", folder, "--seed", "O God, O God!", "--max-length"]
    commands = {"smallm, 1 character": [*infer, 1], "smallm, 200": [*infer, 200],
                "transformers, 200": [sys.executable, "-c", COLD, checkpoint]}  # fmt: skip
    found: dict[str, list] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            found[name].append(process(command))
    return {name: {"seconds": statistics.median(s for s, _ in each), "MB": statistics.median(m for _, m in each)}
            for name, each in found.items()}  # fmt: skip


def format_table(rows: list[Row]) -> str:
    cells = [["", "threads", "chars/s", "bits/char", "ratio"]] + [
        [row.name, str(row.threads), f"{row.chars_per_second:,.0f}", f"{row.bits_per_char:.4f}",
         "-" if row.ratio is None else f"{row.ratio:.2f}"] for row in rows
    ]  # fmt: skip
    return "\n".join(table(cells))


def measure(name: str, run_folder: Path, home: Path, options: argparse.Namespace) -> dict:
    """Measures one run, prints its tables and returns all figures."""
    checkpoint, text = best_checkpoint(run_folder), validation_text(run_folder).read_text(encoding="utf-8")
    rows = generation(checkpoint, home / name, text, options)
    print(f"{name}: {options.length} characters after {SEED}\n{format_table(rows)}", flush=True)
    facts = {"generation": [asdict(row) for row in rows]}
    parts = {
        "overhead": lambda model, _: overhead(model, text, options.length, options.rounds),
        "batch": lambda model, _: batch(model, text, options.length // 4, options.rounds),
        "scoring": lambda model, _: scoring(checkpoint, model, text[:TIMED_TEXT], options.rounds),
        "cold": lambda _, folder: cold(checkpoint, folder, options.rounds),
    }
    folder = home / name / "smallm-int8"
    for part in options.parts if folder.exists() else ():
        log(part)
        facts[part] = parts[part](LanguageModel.load(folder), folder)
        print(f"{name}, int8, {part}: {json.dumps(facts[part])}", flush=True)
    return facts


def main(argv: Sequence[str]) -> int:
    """Measures and prints the tables and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="runs to measure (default: train S and M)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="characters to generate (default: 512)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each peer (default: 5)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="training steps of S and M (default: 60)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="peers, by the beginnings of their names")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS, help="what to measure after generation")
    parser.add_argument("--data", default="shakespeare", metavar="TEXT", help="training text of S and M")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="smallm-") as folder:
        home = Path(folder)
        runs = {path.name: path for path in options.runs} or {
            shape: train(shape, options.data, home / f"run-{shape}", options.length, options.steps) for shape in SHAPES
        }
        facts = {name: measure(name, path, home, options) for name, path in runs.items()}
    about = {"versions": versions(), "cpu": cpu_name(), "cores": os.cpu_count(), "length": options.length}
    print(json.dumps(about | {"rounds": options.rounds, "runs": facts}, default=float))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
