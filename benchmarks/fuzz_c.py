"""What the C kit's program does with damaged and hostile model files: text, or one `smallm:` line; never a crash.

    python benchmarks/fuzz_c.py --program KIT/generate --model KIT/model.onnx [--cases 2000] [--seed 1] [--only N]

Build the program with -fsanitize=address,undefined -fno-sanitize-recover=all, so that every fault is a finding, leaks
too. The mutation of case N (mutations.py) is a function of seed and N; the files of findings are kept in --keep. Prints
a table, then all figures as one line of JSON; progress goes to stderr.
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

SECONDS = 30
GOOD = ("success", "refused")
SANITIZERS = {
    "ASAN_OPTIONS": "allocator_may_return_null=1:hard_rss_limit_mb=1024",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def mutation(data: bytes, number: int, seed: int) -> bytes:
    """The file of a case."""
    return mutations.onnx_file(data, random.Random(f"{seed} c {number}"))


def perform(program: Path, path: Path, number: int = 0) -> dict:
    """Gives a file to the program, to write with or, every fourth number, to measure a text with. How it ended."""
    if number % 4 == 3:
        text = path.with_suffix(".txt")
        text.write_text("an owl reads a line to Zoë, for 10 € and a 中.\n" * 3, encoding="utf-8")
        task = ["--score", str(text)]
    else:
        task = ["--seed", "an é and a 中", "--max-length", "40", "--rng-seed", str(number)]
    begun = time.perf_counter()
    try:
        done = subprocess.run([program, path, *task], capture_output=True, timeout=SECONDS, env=os.environ | SANITIZERS)
    except subprocess.TimeoutExpired:
        return {"kind": "hang", "words": f"more than {SECONDS} s", "seconds": float(SECONDS)}
    said = done.stderr.decode("utf-8", "backslashreplace")
    return {"kind": verdict(done.returncode, said), "words": said[:900], "seconds": time.perf_counter() - begun}


def verdict(code: int, said: str) -> str:
    """Of an exit code and what went to stderr."""
    if code == 0 and said == "":
        return "success"
    if code == 2 and said.startswith("smallm: ") and said.count("\n") == 1 and said.endswith("\n"):
        return "refused"
    return f"exit code {code}, {said.count(chr(10))} lines"


def main(argv: Sequence[str]) -> int:
    """Fuzzes, and prints the table and the JSON line; exit code 1 if there are findings."""
    options = parse(argv)
    data = options.model.read_bytes()
    kinds, findings, slowest = Counter(), [], 0.0
    numbers = range(options.cases) if options.only is None else [options.only]
    with tempfile.TemporaryDirectory(prefix="smallm-") as scratch:
        path = Path(scratch) / "model.onnx"
        for number in tqdm(numbers, unit="case", file=sys.stderr):
            path.write_bytes(mutation(data, number, options.seed))
            ended = perform(options.program.resolve(), path, number)
            kinds[ended["kind"]] += 1
            slowest = max(slowest, ended["seconds"])
            if ended["kind"] not in GOOD:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"c-{number}.onnx").write_bytes(path.read_bytes())
                findings.append({"number": number} | ended)
    print("\n".join(f"{kind:32}{count:8}" for kind, count in kinds.most_common()) + f"\nslowest: {slowest:.1f} s")
    print(json.dumps({"seed": options.seed, "kinds": kinds, "findings": findings, "slowest": slowest}))
    return 1 if findings else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="fuzz_c.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--program", type=Path, required=True, help="`generate` of a C kit, built with sanitizers")
    add("--model", type=Path, required=True, help="a valid model.onnx, which the mutations begin with")
    add("--cases", type=int, default=2000, metavar="N", help="mutated files (default: 2000)")
    add("--seed", type=int, default=1, metavar="N", help="of the mutations (default: 1)")
    add("--only", type=int, metavar="N", help="this case alone")
    add("--keep", type=Path, default=Path("findings"), metavar="DIR", help="where the files of findings go")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
