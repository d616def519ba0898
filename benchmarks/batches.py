"""Compares many texts together with the same texts one by one, and several clients of one model with a single client.

    python benchmarks/batches.py MODEL [--texts 2,4,8,16,32,64] [--clients 2,4,8] [--length 200] [--rounds 5]

MODEL: a run or an export folder. In each round the ways take turns. `together` is `generate_many(N)`: characters per
processor second divided by those of the same texts one by one. `clients` are N threads that share the model, each with
a text of its own: characters per second of wall time, all together, divided by those of one thread. The figures are
medians over the rounds; below 1.0 a text would be faster alone. Prints a table, then all figures as one line of JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from smallm.cli.main import run
from smallm.cli.table import table
from smallm.language_model import LanguageModel


def rate(work: Callable[[], int], clock: Callable[[], float]) -> float:
    """The number that `work` returns, per second of this clock."""
    begun = clock()
    return work() / (clock() - begun)


def together(lm: LanguageModel, texts: int, length: int) -> float:
    """Speed of texts in one call, relative to one call for each."""
    seeds, options = ["The "] * texts, {"max_length": length, "rng_seed": 1}
    alone = rate(lambda: sum(len(lm.generate(seed, **options)) - 4 for seed in seeds), time.process_time)
    return rate(lambda: sum(len(text) - 4 for text in lm.generate_many(seeds, **options)), time.process_time) / alone


def clients(lm: LanguageModel, count: int, length: int) -> float:
    """Speed of threads that generate a text each, relative to one thread."""

    def client(number: int) -> int:
        return sum(map(len, lm.stream("The ", length, rng_seed=number)))

    alone = rate(lambda: client(0), time.perf_counter)
    with ThreadPoolExecutor(count) as pool:
        return rate(lambda: sum(pool.map(client, range(count))), time.perf_counter) / alone


def numbers(text: str) -> list[int]:
    """A list of numbers with commas."""
    return [int(word) for word in text.split(",")]


def measure(argv: Sequence[str]) -> int:
    """Measures and prints; raises `UserError` if there is no model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--texts", type=numbers, default=[2, 4, 8, 16, 32, 64], help="default: 2,4,8,16,32,64")
    parser.add_argument("--clients", type=numbers, default=[2, 4, 8], help="default: 2,4,8")
    parser.add_argument("--length", type=int, default=200, help="characters of a text (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    options = parser.parse_args(argv)
    lm = LanguageModel.load(options.model)
    lm.generate("The ", options.length, rng_seed=0)
    ways = [("together", n, together) for n in options.texts] + [("clients", n, clients) for n in options.clients]
    found: dict[tuple[str, int], list[float]] = {(name, n): [] for name, n, _ in ways}
    for _ in range(options.rounds):
        for name, n, way in ways:
            found[name, n].append(way(lm, n, options.length))
    medians = {key: statistics.median(values) for key, values in found.items()}
    rows = [[name, str(n), f"{ratio:.2f}"] for (name, n), ratio in medians.items()]
    print("\n".join(table([["way", "N", "to one"], *rows])))
    print(json.dumps({name: {n: round(r, 3) for (way, n), r in medians.items() if way == name} for name, _, _ in ways}))
    return 0


if __name__ == "__main__":
    sys.exit(run(measure, sys.argv[1:]))
