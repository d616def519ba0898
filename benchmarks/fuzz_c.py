"""Feeds damaged and hostile model files to the C kit: whole programs, or millions of files guided by their coverage.

    python benchmarks/fuzz_c.py --program KIT/smallm_generate --model KIT/model.onnx [--cases 2000] [--seed 1]
        [--only N]
    python benchmarks/fuzz_c.py --runs 1000000 --model FP32.onnx INT8.onnx INT4.onnx [--seed 1]

--program must write text or one `smallm:` line. Build it with -fsanitize=address,undefined -fno-sanitize-recover=all,
so that every memory error and every leak is a finding. Case N is a function of --seed and N (see mutations.py).

--runs builds fuzz_target.c, which holds smallm.c, with clang's libFuzzer and the same sanitizers. It opens each file
from memory and generates and scores a few characters. The files begin as the models, each with the draft table beside
it, if there is one. They should be small: 30 kB give 600 files a second. More than 1 GB of memory, 512 MB at once, or
30 s for a file are findings, and the first finding ends the runs.

The files of findings are kept in --keep. Prints a table, then all figures as one line of JSON; progress goes to stderr.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import mutations
from tqdm import tqdm

HERE = Path(__file__).parent
ENGINE = HERE.parent / "smallm" / "embed" / "c"
MAX_SECONDS = 30  # for one case
GOOD = ("success", "refused")
UNGUIDED = (
    "choose", "sample", "key_at", "rank", "make_keys", "softmax_sum", "apply_*", "find_allowed", "has_any", "extend",
    "*_plain", "*_sse2", "*_avx2", "*_avx512",
)  # fmt: skip
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


def build_target(folder: Path, optimisation: str = "-O1") -> Path:
    """Builds the target of libFuzzer. Raises `CalledProcessError`.

    The kernels have the address sanitizer only: with both, clang takes many minutes for their unrolled loops. Loops
    over all ids do not guide the mutations, which would cost a third of the time.
    """
    target, ignored, unguided = (folder / name for name in ("fuzz_target", "ignored.txt", "unguided.txt"))
    ignored.write_text("[undefined]\nsrc:*smallm_kernels.h\n", encoding="utf-8")
    unguided.write_text("".join(f"fun:{name}\n" for name in UNGUIDED), encoding="utf-8")
    flags = ["-std=c99", optimisation, "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all",
             f"-fsanitize-ignorelist={ignored}", f"-fsanitize-coverage-ignorelist={unguided}"]  # fmt: skip
    subprocess.run(["clang", *flags, f"-I{ENGINE}", HERE / "fuzz_target.c", "-lm", "-o", target], check=True)
    return target


def run_target(target: Path, models: Sequence[Path], runs: int, seed: int) -> dict:
    """Runs the target in its folder. Returns its counts and, after a finding, the end of the report and the file."""
    corpus = target.with_name("corpus")
    corpus.mkdir()
    for number, model in enumerate(models):
        table = model.with_name("draft_table.npy")
        content = mutations.without_checksum(model.read_bytes()) + (table.read_bytes() if table.is_file() else b"")
        (corpus / f"{number}.onnx").write_bytes(content)
    largest = max(model.stat().st_size for model in models)
    flags = {"runs": runs, "seed": seed, "max_len": 3 * largest // 2, "rss_limit_mb": 1024, "malloc_limit_mb": 512,
             "timeout": MAX_SECONDS, "artifact_prefix": f"{target.parent}/"}  # fmt: skip
    argv = [target, *(f"-{name}={value}" for name, value in flags.items()), corpus]
    started, report = time.perf_counter(), []
    pipe = {"stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with subprocess.Popen(argv, env=os.environ | SANITIZERS, **pipe) as job:
        for line in job.stderr:
            report = [*report[-60:], line]
            if line.startswith("#"):
                print(line, end="", file=sys.stderr)
    count, edges, features = re.findall(r"^#(\d+).* cov: (\d+) ft: (\d+)", "".join(report), re.MULTILINE)[-1]
    found = [file for name in ("crash", "leak", "oom", "timeout") for file in target.parent.glob(f"{name}-*")]
    ended = {"runs": int(count), "edges": int(edges), "features": int(features),
             "seconds": round(time.perf_counter() - started)}  # fmt: skip
    return ended | {"findings": [{"file": str(f), "message": "".join(report)} for f in found], "code": job.returncode}


def run_guided(options: argparse.Namespace) -> int:
    """Builds and runs the target and prints the table and the line of JSON; returns 1 if there is a finding."""
    with tempfile.TemporaryDirectory(prefix="smallm-") as folder:
        ended = run_target(build_target(Path(folder)), options.model, options.runs, options.seed)
        for finding in ended["findings"]:
            options.keep.mkdir(parents=True, exist_ok=True)
            finding["file"] = str(shutil.copy(finding["file"], options.keep))
    print("\n".join(f"{name:32}{ended[name]:8}" for name in ("runs", "edges", "features", "seconds")))
    print(json.dumps({"seed": options.seed} | ended))
    return 1 if ended["code"] else 0


def main(argv: Sequence[str]) -> int:
    """Runs all cases and prints the table and the line of JSON; returns 1 if there are findings."""
    options = parse(argv)
    if options.runs is not None:
        return run_guided(options)
    models = [model.read_bytes() for model in options.model]
    kinds, findings, slowest = Counter(), [], 0.0
    numbers = range(options.cases) if options.only is None else [options.only]
    with tempfile.TemporaryDirectory(prefix="smallm-") as scratch:
        path = Path(scratch) / "model.onnx"
        for number in tqdm(numbers, unit="case", file=sys.stderr):
            path.write_bytes(mutation(models[number % len(models)], number, options.seed))
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
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--program", type=Path, help="the program `smallm_generate` of a C kit, built with sanitizers")
    way.add_argument("--runs", type=int, metavar="N", help="files that libFuzzer makes; needs clang")
    add("--model", type=Path, required=True, nargs="+", help="valid model.onnx files, which are mutated")
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
