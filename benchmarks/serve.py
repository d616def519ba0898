"""Runs many clients of `smallm serve` at once: latencies, speed, and whether every text is the one of its seed.

    python benchmarks/serve.py MODEL [--clients 32] [--seconds 60] [--length 100] [--engine onnxruntime|native]

MODEL: a run or an export folder. Starts a server as a process of its own. Each client sends streaming requests with the
`openai` package, one after the other, until the time is over; every text is compared with that of `LanguageModel`.
Prints percentiles of the time to the first piece and to the last one, then all figures as one line of JSON. Exit code 1
if a request failed or a text differs. Needs the extra `serve` and the package `openai`.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from smallm.cli.main import run
from smallm.cli.table import table
from smallm.language_model import LanguageModel

PROMPT, SEEDS = "The ", 50  # different texts
Request = tuple[float, float, bool]  # seconds to the first and to the last piece, and whether the text is right


@contextmanager
def server(model: Path, engine: str) -> Iterator[str]:
    """The address of a server that runs until the block ends."""
    argv = [sys.executable, "-m", "smallm", "serve", model, "--port", "0", "--engine", engine]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr or []:
                if found := re.search(r"http://\S+", line):
                    yield found[0]
                    break
        finally:
            process.terminate()


async def client(api, expected: dict[int, str], first: int, end: float, found: list[Request]) -> None:
    """Sends requests until `end` and appends what they took."""
    seed = first
    while time.perf_counter() < end:
        seed = (seed + 1) % SEEDS
        begun, pieces, first_piece = time.perf_counter(), [], 0.0
        try:
            options = {"max_tokens": len(expected[seed]) - len(PROMPT), "seed": seed}
            async for part in await api.completions.create(model="", prompt=PROMPT, stream=True, **options):
                pieces.append(part.choices[0].text)
                first_piece = first_piece or time.perf_counter() - begun
        except Exception as error:  # the request is lost, whatever the cause
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        found.append((first_piece, time.perf_counter() - begun, PROMPT + "".join(pieces) == expected[seed]))


async def clients(address: str, expected: dict[int, str], count: int, seconds: float) -> list[Request]:
    """Runs the clients; what each request took."""
    import openai

    found: list[Request] = []
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as api:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(client(api, expected, number, end, found) for number in range(count)))
    return found


def measure(argv: Sequence[str]) -> int:
    """Measures and prints; raises `UserError` if there is no model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("--clients", type=int, default=32, help="default: 32")
    parser.add_argument("--seconds", type=float, default=60, help="default: 60")
    parser.add_argument("--length", type=int, default=100, help="characters of a text (default: 100)")
    parser.add_argument("--engine", choices=("onnxruntime", "native"), default="onnxruntime")
    options = parser.parse_args(argv)
    with LanguageModel.load(options.model, engine=options.engine) as lm:
        expected = {seed: lm.generate(PROMPT, options.length, rng_seed=seed) for seed in range(SEEDS)}
    with server(options.model, options.engine) as address:
        begun = time.perf_counter()
        found = asyncio.run(clients(address, expected, options.clients, options.seconds))
        seconds = time.perf_counter() - begun
    columns = {"first piece": [one[0] for one in found], "whole text": [one[1] for one in found]}
    percentiles = {name: statistics.quantiles(values, n=100, method="inclusive") for name, values in columns.items()}
    rows = [[name, *(f"{cuts[p - 1]:.3f}" for p in (50, 95, 99))] for name, cuts in percentiles.items()]
    print("\n".join(table([["seconds", "p50", "p95", "p99"], *rows])))
    wrong = sum(not right for *_, right in found)
    speed = (len(found) - wrong) * options.length / seconds
    print(f"{len(found):,} requests, {wrong} lost or wrong, {speed:,.0f} characters per second")
    figures = {name: {p: round(cuts[p - 1], 4) for p in (50, 95, 99)} for name, cuts in percentiles.items()}
    counts = {"clients": options.clients, "requests": len(found), "wrong": wrong, "speed": round(speed)}
    print(json.dumps(counts | figures))
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(run(measure, sys.argv[1:]))
