"""What smallm does with damaged and hostile files: each must end in success or in one `smallm:` line.

    python benchmarks/fuzz_files.py [--formats onnx text …] [--cases 2000] [--seed 1] [--workers 2] [--only N]

Valid files of a tiny model are made on the spot, mutated (mutations.py) and given to the real commands in forked
processes, whose crashes, hangs (`SECONDS`) and memory (`MAX_BYTES`, resident) are findings like a traceback is. The
mutation of case N is a function of seed, format and N; the files of each finding are kept, and --only N runs one case
again. Prints a table, then all figures as one line of JSON; progress goes to stderr.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from fuzz_formats import DEFAULT, FORMATS, Home, make_home, run

SECONDS = 30
MAX_BYTES = 1 << 30
POLL_SECONDS = 0.02
SPARE_BYTES = 4 << 30  # address space of a worker above what it starts with, so that a finding spares the machine
GOOD = ("success", "refused")
RECYCLE = 250  # cases after which a worker is replaced
@dataclass
class Row:
    """What came of the cases of one format."""

    name: str
    cases: int = 0
    success: int = 0
    refused: int = 0
    """Ended in one `smallm:` line and exit code 2."""
    findings: list[dict] = field(default_factory=list)
    """Number, kind and last words of each case that ended otherwise."""
    seconds: float = 0.0
    slowest: float = 0.0
    """Seconds of the slowest case."""
    peak_mb: float = 0.0
    """Largest resident memory of a worker."""


def perform(name: str, number: int, seed: int, home: Home, folder: Path) -> dict:
    """Runs one case in this process, and says how it ended."""
    rng = random.Random(f"{seed} {name} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    outputs = {descriptor: (folder / f".{descriptor}").open("w+b", buffering=0) for descriptor in (1, 2)}
    try:
        command, argv = FORMATS[name](home, folder, rng)
    except Exception:
        return {"kind": "mutation failed", "words": traceback.format_exc()[-600:]}
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    kept = {descriptor: os.dup(descriptor) for descriptor in outputs}
    for descriptor, file in outputs.items():
        os.dup2(file.fileno(), descriptor)
    begun = time.perf_counter()
    with stream(1) as out, stream(2) as err, redirect_stdout(out), redirect_stderr(err):
        try:
            code: object = run(command, argv)
        except BaseException:
            code = traceback.format_exc()
    seconds = time.perf_counter() - begun
    for descriptor, old in kept.items():
        os.dup2(old, descriptor)
        os.close(old)
    outputs[2].seek(0)
    said = outputs[2].read().decode("utf-8", "backslashreplace")
    for file in outputs.values():
        file.close()
    return verdict(code, said, may_ask_for_memory=name == "toml") | {"seconds": seconds, "peak": peak_bytes()}


def stream(descriptor: int) -> TextIO:
    """Python's stdout or stderr, over what the descriptor stands for at the moment."""
    return open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def verdict(code: object, said: str, may_ask_for_memory: bool = False) -> dict:
    """Of an exit code (or a traceback) and what went to stderr."""
    lines = said.replace("\r", "\n").splitlines()
    complaints = [line for line in lines if line.startswith("smallm: ")]
    words = lines[-1][:300] if lines else ""
    if not isinstance(code, int):
        return {"kind": "traceback", "words": str(code)[-900:]}
    if "Traceback" in said or "Warning:" in said:
        return {"kind": "noise", "words": said[-600:]}
    if code == 0:
        return {"kind": "success", "words": words}
    if code == 2 and len(complaints) == 1 and lines[-1] == complaints[0]:
        if "memory" in complaints[0] and not may_ask_for_memory:
            return {"kind": "memory", "words": words}
        return {"kind": "refused", "words": words}
    return {"kind": f"exit code {code}, {len(complaints)} lines", "words": said[-600:]}


def peak_bytes() -> int:
    """Largest resident memory of this process since it was last reset."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(name: str, numbers: list[int], seed: int, home: Home, scratch: Path, pipe) -> None:
    """A worker: tells which case it begins, then how that ended."""
    with suppress(OSError):  # Linux has it
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_BYTES,) * 2)
    os.chdir(scratch)
    for number in numbers:
        pipe.send((number, None))
        ended = perform(name, number, seed, home, scratch / f"case-{number}")
        if ended.get("peak", 0) > MAX_BYTES:
            ended["kind"] = f"{ended['peak'] / 1e9:.1f} GB of memory, {ended['kind']}"
        if ended["kind"] in GOOD:
            shutil.rmtree(scratch / f"case-{number}", ignore_errors=True)
        pipe.send((number, ended))
    pipe.send((None, None))
    pipe.close()
    os._exit(0)  # without the farewells of libraries that were loaded before the fork


class Worker:
    """A forked process with cases to do; when it dies or hangs, the next one takes over what is left."""

    def __init__(self, name: str, numbers: list[int], seed: int, home: Home, scratch: Path):
        self.left, self._arguments = numbers, (name, seed, home, scratch)
        self._start()

    def _start(self) -> None:
        name, *others = self._arguments
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe(duplex=False)
        arguments = (name, self.left[:RECYCLE], *others, theirs)
        self.process = context.Process(target=work, args=arguments)
        self.process.start()
        theirs.close()
        self.waited = 0.0

    def poll(self) -> tuple[int, dict] | None:
        """The next case that ended, if one has."""
        try:
            if self.pipe.poll(POLL_SECONDS):
                number, outcome = self.pipe.recv()
                self.waited = 0.0
                if number is None:
                    self._renew()
                elif outcome is not None:
                    self.left.remove(number)
                    return number, outcome
            else:
                self.waited += POLL_SECONDS  # of our own waiting: a machine that pauses us all is no hang
                if self.waited > SECONDS:
                    self.process.kill()
                    return self._lost("hang", f"no end after {SECONDS} s")
        except EOFError:
            self.process.join()
            return self._lost("crash", f"exit code {self.process.exitcode}")
        return None

    def _lost(self, kind: str, words: str) -> tuple[int, dict]:
        number = self.left.pop(0)
        self._renew()
        return number, {"kind": kind, "words": words}

    def _renew(self) -> None:
        self.process.join()
        self.pipe.close()
        if self.left:
            self._start()


def fuzz(name: str, numbers: Sequence[int], options: argparse.Namespace, home: Home, scratch: Path) -> Row:
    """All cases of one format."""
    row, begun = Row(name), time.perf_counter()
    workers = []
    for i in range(min(options.workers, len(numbers))):
        workers.append(Worker(name, list(numbers[i :: options.workers]), options.seed, home, scratch))
    told = time.perf_counter()
    while working := [worker for worker in workers if worker.left]:
        for worker in working:
            if ended := worker.poll():
                judge(row, *ended, scratch, options.keep)
        if time.perf_counter() - told > 20:
            told = time.perf_counter()
            say(f"{name}: {row.cases} of {len(numbers)}")
    row.seconds = time.perf_counter() - begun
    say(f"{name}: {row.success} successes, {row.refused} in one line, {len(row.findings)} findings")
    return row


def judge(row: Row, number: int, outcome: dict, scratch: Path, keep: Path) -> None:
    """Enters a case into its row; a finding's files are kept."""
    row.cases += 1
    row.slowest = max(row.slowest, outcome.get("seconds", 0.0))
    row.peak_mb = max(row.peak_mb, outcome.get("peak", 0) / 1e6)
    if outcome["kind"] in GOOD:
        setattr(row, outcome["kind"], getattr(row, outcome["kind"]) + 1)
        return
    row.findings.append({"number": number, "kind": outcome["kind"], "words": outcome["words"]})
    kept = keep / f"{row.name.replace(' ', '-')}-{number}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.move(scratch / f"case-{number}", kept)
    say(f"{row.name} {number}: {outcome['kind']}; see {kept}\n{outcome['words']}")


def say(message: str) -> None:
    """A line of progress."""
    print(f"fuzz_files: {message}", file=sys.stderr, flush=True)


def table(rows: list[Row]) -> str:
    """The rows for people."""
    cells = [["format", "cases", "success", "one line", "findings", "slowest, s", "peak, MB", "seconds"]] + [
        [row.name, str(row.cases), str(row.success), str(row.refused), str(len(row.findings)), f"{row.slowest:.1f}",
         f"{row.peak_mb:.0f}", f"{row.seconds:.0f}"]
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)


def preload() -> None:
    """Imports now what the commands import later, for all forked processes; no threads, no work."""
    names = ("matplotlib.pyplot", "torch.distributed.tensor", "tqdm", "smallm.cli.infer", "smallm.export.folder")
    for name in (*names, "smallm.training.run"):
        import_module(name)
    import_module("smallm.training.request").load_config("quickstart")


def in_child(function: Callable[..., None], *arguments: object) -> None:
    """Calls in a forked process, whose threads and memory go with it."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"fuzz_files: {function.__name__} ended with exit code {process.exitcode}")


def main(argv: Sequence[str]) -> int:
    """Fuzzes, and prints the table and the JSON line; exit code 1 if there are findings."""
    options = parse(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before PyTorch is imported: one thread a worker
    preload()
    with tempfile.TemporaryDirectory(prefix="smallm-", ignore_cleanup_errors=True) as scratch:
        os.environ["SMALLM_CACHE"] = f"{scratch}/cache"
        home = Home(Path(scratch) / "home")
        home.path.mkdir()
        in_child(make_home, home)
        numbers = range(options.cases) if options.only is None else [options.only]
        rows = [fuzz(name, numbers, options, home, Path(scratch)) for name in options.formats]
    print(table(rows))
    print(json.dumps({"seed": options.seed, "rows": [asdict(row) for row in rows]}))
    return 1 if any(row.findings for row in rows) else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="fuzz_files.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--formats", nargs="+", choices=FORMATS, default=DEFAULT, metavar="NAME",
        help=f"of {', '.join(FORMATS)}; default: all but the last")
    add("--cases", type=int, default=2000, metavar="N", help="mutated inputs of each format (default: 2000)")
    add("--seed", type=int, default=1, metavar="N", help="of the mutations (default: 1)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)")
    add("--only", type=int, metavar="N", help="this case alone")
    add("--keep", type=Path, default=Path("findings"), metavar="DIR", help="where the files of findings go")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
