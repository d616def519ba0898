"""Feeds damaged and hostile model files to the program of the C kit, which must write text or one `smallm:` line.

    python benchmarks/fuzz_c.py --program KIT/smallm_generate --model KIT/model.onnx [--cases 2000] [--seed 1]
        [--only N]

Build the program with -fsanitize=address,undefined -fno-sanitize-recover=all, so that every memory error and every
leak is a finding. Case N is a function of --seed and N (see mutations.py); the files of findings are kept in --keep.
Prints a table, then all figures as one line of JSON; progress goes to stderr.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import mutations
from tqdm import tqdm

MAX_SECONDS = 30  # for one case
GOOD = ("success", "refused")
SANITIZERS = {
    "ASAN_OPTIONS": "allocator_may_return_null=1:hard_rss_limit_mb=1024",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def mutation(data: bytes, number: int, seed: int) -> bytes:
    """The model file of a case."""
    return mutations.onnx_file(data, random.Random(f"{seed} c {number}"))


def perform(program: Path, path: Path, number: int = 0) -> dict:
    """Runs the program with a file and describes how it ended; every fourth case scores a text."""
    if number % 4 == 3:
        text = path.with_suffix(".txt")
        text.write_text("an owl reads a line to Zoë, for 10 € and a 中.\n" * 3, encoding="utf-8")
        task = ["--score", str(text)]
    else:
        task = ["--seed", "an é and a 中", "--max-length", "40", "--rng-seed", str(number)]
    started = time.perf_counter()
    try:
        finished = subprocess.run(
            [program, path, *task], capture_output=True, timeout=MAX_SECONDS, env=os.environ | SANITIZERS
        )
    except subprocess.TimeoutExpired:
        return {"kind": "hang", "message": f"more than {MAX_SECONDS} s", "seconds": float(MAX_SECONDS)}
    stderr = finished.stderr.decode("utf-8", "backslashreplace")
    return {
        "kind": verdict(finished.returncode, stderr),
        "message": stderr[:900],
        "seconds": time.perf_counter() - started,
    }


def verdict(code: int, stderr: str) -> str:
    """Classifies an exit code and the text on stderr."""
    if code == 0 and stderr == "":
        return "success"
    if code == 2 and stderr.startswith("smallm: ") and stderr.count("\n") == 1 and stderr.endswith("\n"):
        return "refused"
    return f"exit code {code}, {stderr.count(chr(10))} lines"


def main(argv: Sequence[str]) -> int:
    """Runs all cases and prints the table and the line of JSON; returns 1 if there are findings."""
    options = parse(argv)
    data = options.model.read_bytes()
    kinds, findings, slowest = Counter(), [], 0.0
    numbers = range(options.cases) if options.only is None else [options.only]
    with tempfile.TemporaryDirectory(prefix="smallm-") as scratch:
        path = Path(scratch) / "model.onnx"
        for number in tqdm(numbers, unit="case", file=sys.stderr):
            path.write_bytes(mutation(data, number, options.seed))
            outcome = perform(options.program.resolve(), path, number)
            kinds[outcome["kind"]] += 1
            slowest = max(slowest, outcome["seconds"])
            if outcome["kind"] not in GOOD:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"c-{number}.onnx").write_bytes(path.read_bytes())
                findings.append({"number": number} | outcome)
    print("\n".join(f"{kind:32}{count:8}" for kind, count in kinds.most_common()) + f"\nslowest: {slowest:.1f} s")
    print(json.dumps({"seed": options.seed, "kinds": kinds, "findings": findings, "slowest": slowest}))
    return 1 if findings else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="fuzz_c.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--program", type=Path, required=True, help="the program `generate` of a C kit, built with sanitizers")
    add("--model", type=Path, required=True, help="a valid model.onnx, from which the mutations are made")
    add("--cases", type=int, default=2000, metavar="N", help="mutated files (default: 2000)")
    add("--seed", type=int, default=1, metavar="N", help="random seed of the mutations (default: 1)")
    add("--only", type=int, metavar="N", help="run this case only")
    add(
        "--keep",
        type=Path,
        default=Path("findings"),
        metavar="DIR",
        help="folder for the files of findings (default: %(default)s)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
