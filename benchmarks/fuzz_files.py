"""Feeds damaged and hostile files to the commands, which must succeed or end with one `smallm:` line.

    python benchmarks/fuzz_files.py [--formats onnx text …] [--cases 2000] [--seed 1] [--workers 2] [--only N]

Valid files of a tiny model are generated, mutated (mutations.py) and given to the commands of smallm in forked
processes. Crashes, tracebacks, hangs (MAX_SECONDS) and excessive memory (MAX_BYTES, resident) are findings. Case N is
a function of --seed, the format and N. The files of each finding are kept in --keep, and --only N runs one case
again. Prints a table, then all figures as one line of JSON; progress goes to stderr. The exit code is 1 if there are
findings.
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

from smallm.cli.table import table

MAX_SECONDS = 30  # for one case
MAX_BYTES = 500_000_000  # resident memory of one case
POLL_SECONDS = 0.02
EXTRA_BYTES = 4 << 30  # limit of the address space that a worker may add, which protects the machine
GOOD = ("success", "refused")
CASES_PER_PROCESS = 50  # afterwards a worker starts a new process: a training leaves about 1 MB behind


@dataclass
class Row:
    """The outcomes of the cases of one format."""

    name: str
    cases: int = 0
    success: int = 0
    refused: int = 0
    """Cases that ended with one `smallm:` line and exit code 2."""
    findings: list[dict] = field(default_factory=list)
    """Number, kind and message of each other case."""
    seconds: float = 0.0
    slowest: float = 0.0
    """Seconds of the slowest case."""
    peak_mb: float = 0.0
    """Largest resident memory of a worker."""


def perform(name: str, number: int, seed: int, home: Home, folder: Path) -> dict:
    """Runs one case in this process and describes how it ended."""
    rng = random.Random(f"{seed} {name} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    outputs = {descriptor: (folder / f".{descriptor}").open("w+b", buffering=0) for descriptor in (1, 2)}
    try:
        command, argv = FORMATS[name](home, folder, rng)
    except Exception:
        return {"kind": "mutation failed", "message": traceback.format_exc()[-600:]}
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak of memory
    originals = {descriptor: os.dup(descriptor) for descriptor in outputs}
    for descriptor, file in outputs.items():
        os.dup2(file.fileno(), descriptor)
    started = time.perf_counter()
    with stream(1) as out, stream(2) as err, redirect_stdout(out), redirect_stderr(err):
        try:
            code: object = run(command, argv)
        except BaseException:
            code = traceback.format_exc()
    seconds = time.perf_counter() - started
    for descriptor, old in originals.items():
        os.dup2(old, descriptor)
        os.close(old)
    outputs[2].seek(0)
    stderr = outputs[2].read().decode("utf-8", "backslashreplace")
    for file in outputs.values():
        file.close()
    return verdict(code, stderr, may_ask_for_memory=name == "toml") | {"seconds": seconds, "peak": peak_bytes()}


def stream(descriptor: int) -> TextIO:
    """A text stream for stdout or stderr that writes to the descriptor's present file."""
    return open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def verdict(code: object, stderr: str, may_ask_for_memory: bool = False) -> dict:
    """Classifies an exit code, or a traceback, and the text on stderr.

    may_ask_for_memory: whether a lack of memory is the user's mistake rather than a finding.
    """
    lines = stderr.replace("\r", "\n").splitlines()
    errors = [line for line in lines if line.startswith("smallm: ")]
    message = lines[-1][:300] if lines else ""
    if not isinstance(code, int):
        return {"kind": "traceback", "message": str(code)[-900:]}
    if "Traceback" in stderr or "Warning:" in stderr:
        return {"kind": "noise", "message": stderr[-600:]}
    if code == 0:
        return {"kind": "success", "message": message}
    if code == 2 and len(errors) == 1 and lines[-1] == errors[0]:
        if "memory" in errors[0] and not may_ask_for_memory:
            return {"kind": "memory", "message": message}
        return {"kind": "refused", "message": message}
    return {"kind": f"exit code {code}, {len(errors)} lines", "message": stderr[-600:]}


def peak_bytes() -> int:
    """Peak resident memory of this process in bytes since the peak was last reset."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(name: str, numbers: list[int], seed: int, home: Home, scratch: Path, pipe) -> None:
    """A worker process: sends the number of each case before it starts, and the outcome afterwards."""
    with suppress(OSError):  # only Linux has this file
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + EXTRA_BYTES,) * 2)
    os.chdir(scratch)
    for number in numbers:
        pipe.send((number, None))
        outcome = perform(name, number, seed, home, scratch / f"case-{number}")
        if outcome.get("peak", 0) > MAX_BYTES:
            outcome["kind"] = f"{outcome['peak'] / 1e9:.1f} GB of memory, {outcome['kind']}"
        if outcome["kind"] in GOOD:
            shutil.rmtree(scratch / f"case-{number}", ignore_errors=True)
        pipe.send((number, outcome))
    pipe.send((None, None))
    pipe.close()
    os._exit(0)  # skips exit handlers of libraries that were loaded before the fork


class Worker:
    """A forked process that runs cases; if the process dies or hangs, a new one runs the remaining cases."""

    def __init__(self, name: str, numbers: list[int], seed: int, home: Home, scratch: Path):
        self.left, self._arguments = numbers, (name, seed, home, scratch)
        self._start()

    def _start(self) -> None:
        name, *others = self._arguments
        context = multiprocessing.get_context("fork")
        self.pipe, remote = context.Pipe(duplex=False)
        arguments = (name, self.left[:CASES_PER_PROCESS], *others, remote)
        self.process = context.Process(target=work, args=arguments)
        self.process.start()
        remote.close()
        self.waited = 0.0

    def poll(self) -> tuple[int, dict] | None:
        """The number and outcome of the next finished case; None if no case has finished."""
        try:
            if self.pipe.poll(POLL_SECONDS):
                number, outcome = self.pipe.recv()
                self.waited = 0.0
                if number is None:
                    self._restart()
                elif outcome is not None:
                    self.left.remove(number)
                    return number, outcome
            else:
                # Counts our own waiting, so that a paused machine does not look like a hang.
                self.waited += POLL_SECONDS
                if self.waited > MAX_SECONDS:
                    self.process.kill()
                    return self._lost("hang", f"no end after {MAX_SECONDS} s")
        except EOFError:
            self.process.join()
            return self._lost("crash", f"exit code {self.process.exitcode}")
        return None

    def _lost(self, kind: str, message: str) -> tuple[int, dict]:
        number = self.left.pop(0)
        self._restart()
        return number, {"kind": kind, "message": message}

    def _restart(self) -> None:
        self.process.join()
        self.pipe.close()
        if self.left:
            self._start()


def fuzz(name: str, numbers: Sequence[int], options: argparse.Namespace, home: Home, scratch: Path) -> Row:
    """Runs all cases of one format."""
    row, started = Row(name), time.perf_counter()
    workers = []
    for i in range(min(options.workers, len(numbers))):
        workers.append(Worker(name, list(numbers[i :: options.workers]), options.seed, home, scratch))
    reported = time.perf_counter()
    while working := [worker for worker in workers if worker.left]:
        for worker in working:
            if finished := worker.poll():
                record(row, *finished, scratch, options.keep)
        if time.perf_counter() - reported > 20:
            reported = time.perf_counter()
            log(f"{name}: {row.cases} of {len(numbers)}")
    row.seconds = time.perf_counter() - started
    log(f"{name}: {row.success} succeeded, {row.refused} ended with one line, {len(row.findings)} findings")
    return row


def record(row: Row, number: int, outcome: dict, scratch: Path, keep: Path) -> None:
    """Adds a case to its row and keeps the files of a finding."""
    row.cases += 1
    row.slowest = max(row.slowest, outcome.get("seconds", 0.0))
    row.peak_mb = max(row.peak_mb, outcome.get("peak", 0) / 1e6)
    if outcome["kind"] in GOOD:
        setattr(row, outcome["kind"], getattr(row, outcome["kind"]) + 1)
        return
    row.findings.append({"number": number, "kind": outcome["kind"], "message": outcome["message"]})
    target = keep / f"{row.name.replace(' ', '-')}-{number}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(scratch / f"case-{number}", target)
    log(f"{row.name} {number}: {outcome['kind']}; see {target}\n{outcome['message']}")


def log(message: str) -> None:
    """Prints a line of progress."""
    print(f"fuzz_files: {message}", file=sys.stderr, flush=True)


def format_table(rows: list[Row]) -> str:
    cells = [["format", "cases", "success", "one line", "findings", "slowest, s", "peak, MB", "seconds"]] + [
        [row.name, str(row.cases), str(row.success), str(row.refused), str(len(row.findings)), f"{row.slowest:.1f}",
         f"{row.peak_mb:.0f}", f"{row.seconds:.0f}"]
        for row in rows
    ]  # fmt: skip
    return "\n".join(table(cells))


def preload() -> None:
    """Imports the modules that the commands need before the processes are forked."""
    names = ("matplotlib.pyplot", "torch.distributed.tensor", "tqdm", "smallm.cli.infer", "smallm.export.folder")
    for name in (*names, "smallm.training.run"):
        import_module(name)
    import_module("smallm.training.request").load_config("quickstart")


def in_child(function: Callable[..., None], *arguments: object) -> None:
    """Calls a function in a forked process, so that its threads and memory are freed with the process."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"fuzz_files: {function.__name__} ended with exit code {process.exitcode}")


def main(argv: Sequence[str]) -> int:
    """Runs all cases and prints the table and the line of JSON; returns 1 if there are findings."""
    options = parse(argv)
    # One thread per worker; must be set before PyTorch is imported.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    preload()
    with tempfile.TemporaryDirectory(prefix="smallm-", ignore_cleanup_errors=True) as scratch:
        os.environ["SMALLM_CACHE"] = f"{scratch}/cache"
        home = Home(Path(scratch) / "home")
        home.path.mkdir()
        in_child(make_home, home)
        numbers = range(options.cases) if options.only is None else [options.only]
        rows = [fuzz(name, numbers, options, home, Path(scratch)) for name in options.formats]
    print(format_table(rows))
    print(json.dumps({"seed": options.seed, "rows": [asdict(row) for row in rows]}))
    return 1 if any(row.findings for row in rows) else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="fuzz_files.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=DEFAULT,
        metavar="NAME",
        help=f"formats, of {', '.join(FORMATS)} (default: all but the last)",
    )
    add("--cases", type=int, default=2000, metavar="N", help="mutated inputs per format (default: 2000)")
    add("--seed", type=int, default=1, metavar="N", help="random seed of the mutations (default: 1)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")
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
