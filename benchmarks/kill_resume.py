"""Kills training at random moments, resumes it, and compares the result bit for bit with an uninterrupted run.

    python benchmarks/kill_resume.py [--kills 120] [--seed 1] [--data TEXT]

Each run is `train.py` with one process or two. SIGKILL is sent at a random time after the start, while a checkpoint
is written, or right after a random step. With two processes, it is sent to both, or to one, so that the launcher has
to stop the other. The run is resumed and killed again up to four times, then resumed to its end. The benchmark counts
runs whose final weights or optimizer moments differ in any bit from the uninterrupted run, and kills that left a run
without an intact checkpoint although it had one. Prints a table, then all figures as one line of JSON; progress goes
to stderr. The exit code is 1 if anything differs. 120 kills took 52 minutes on two busy cores; needs Linux.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from smallm.errors import UserError
from smallm.runs.layout import CHECKPOINTS, METRICS, is_run
from smallm.training.checkpoint.format import verify
from smallm.training.checkpoint.manager import checkpoints

ROOT = Path(__file__).resolve().parents[1]
KILLS_PER_RUN = 4
LAUNCHER_SECONDS = 90  # limit for the launcher to stop the other process after one was killed
POLL_SECONDS = 0.001
SHAPE = ["--model.n_layer=2", "--model.n_head=2", "--model.n_embd=64", "--model.block_size=32", "--train.log_every=1",
         "--train.sample_length=4", "--train.mixed_precision=no"]  # fmt: skip
VARIANTS = {
    "muon, dropout, accumulation, short windows": (1, [
        "--model.dropout=0.1", "--train.batch_size=8", "--train.micro_batch_size=2", "--train.short_windows=[8, 16]",
        "--train.short_until=[0.3, 0.6]", "--train.max_steps=60", "--train.save_every=3", "--train.eval_every=20"]),
    "adamw, cosine, clipping, early stopping": (1, [
        "--optim.name=adamw", "--optim.schedule=cosine", "--optim.learning_rate=0.02", "--train.patience=3",
        "--train.batch_size=4", "--train.max_steps=80", "--train.save_every=5", "--train.eval_every=8"]),
    "two processes, muon, dropout": (2, [
        "--model.dropout=0.1", "--train.batch_size=8", "--train.max_steps=40", "--train.save_every=3",
        "--train.eval_every=20"]),
}  # fmt: skip


@dataclass
class Tally:
    """The counts of one variant."""

    name: str
    processes: int
    runs: int = 0
    kills: int = 0
    moments: Counter = field(default_factory=Counter)
    differ: int = 0
    """Runs whose last checkpoint differs in any bit from that of the uninterrupted run."""
    unusable: int = 0
    """Kills that left no intact checkpoint although the run had one."""


class Killer:
    """Starts, kills and resumes train.py for one variant."""

    def __init__(self, name: str, data: Path, folder: Path, rng: random.Random):
        self.tally = Tally(name, VARIANTS[name][0])
        self.data, self.folder, self.rng = data, folder, rng
        self.log, started = folder / "log", time.monotonic()
        reference = folder / "reference"
        if code := self._start(reference).wait():
            raise UserError(f"the uninterrupted run ended with exit code {code}; its log is {self.log}")
        self.seconds = time.monotonic() - started
        self.digest = digest(reference)

    def run(self, kills: int) -> None:
        """Trains one run to its end with at most this number of kills."""
        run, killed = self.folder / f"run-{self.tally.runs}", 0
        while True:
            process = self._start(run)
            if killed >= kills or not self._kill(run, process):
                break
            killed += 1
        code = process.wait()  # 2 if the last checkpoint existed already, so that there was nothing to resume
        self.tally.runs += 1
        if digest(run) != self.digest:
            self.tally.differ += 1
            print(f"{run} ended with {code} and differs; its log ends:", file=sys.stderr)
            print(self.log.read_text(errors="replace")[-1500:], file=sys.stderr)

    def _start(self, run: Path) -> subprocess.Popen:
        """Starts the run, or resumes it if it exists."""
        processes, settings = VARIANTS[self.tally.name]
        new = ["--data", str(self.data), "--out", str(run), *SHAPE, *settings]
        argv = ["--resume", str(run)] if is_run(run) else new
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), *argv]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def _kill(self, run: Path, process: subprocess.Popen) -> bool:
        """Waits for a random moment and kills; returns False if the run had finished."""
        before = len(intact(run))
        moment = self.rng.choice(("time", "checkpoint", "step"))
        if not self._wait(moment, run, process):
            return False
        if self.tally.processes > 1 and self.rng.random() < 0.3 and (workers := children(process.pid)):
            os.kill(self.rng.choice(workers), signal.SIGKILL)
            process.wait(LAUNCHER_SECONDS)
            moment += ", one process"
        else:
            for pid in (process.pid, *children(process.pid)):
                os.kill(pid, signal.SIGKILL)
            process.wait()
        if process.returncode == 0:
            return False
        self.tally.kills += 1
        self.tally.moments[moment] += 1
        self.tally.unusable += bool(before) and not intact(run)
        return True

    def _wait(self, moment: str, run: Path, process: subprocess.Popen) -> bool:
        """Waits for the moment; returns False if the process ended first."""
        if moment == "time":
            end = time.monotonic() + self.rng.uniform(0, self.seconds)
            while time.monotonic() < end and process.poll() is None:
                time.sleep(POLL_SECONDS)
            return process.poll() is None
        passed, times = 0, self.rng.randint(1, 8 if moment == "checkpoint" else 30)
        seen, delay = watched_state(moment, run), self.rng.uniform(0, 0.004)
        while process.poll() is None:
            now = watched_state(moment, run)
            passed += bool(now) and now != seen
            seen = now
            if passed >= times:
                time.sleep(delay)
                return process.poll() is None
            time.sleep(POLL_SECONDS / 4)
        return False


def watched_state(moment: str, run: Path) -> object:
    """A value that changes while a checkpoint is written, or after each step; None before the files exist."""
    try:
        if moment == "step":
            return (run / METRICS).stat().st_size
        return tuple(file.name for file in (run / CHECKPOINTS).glob(".step*"))
    except OSError:
        return None


def intact(run: Path) -> list[Path]:
    """The undamaged checkpoints of a run."""
    return [folder for folder in checkpoints(run) if not verify(folder)] if is_run(run) else []


def digest(run: Path) -> str:
    """Name of the last checkpoint, and hashes of its weights and optimizer moments."""
    last = checkpoints(run)[-1]
    files = [last / "model.safetensors", last / "optimizer.safetensors"]
    return " ".join([last.name, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)])


def children(pid: int) -> list[int]:
    """The children of a process."""
    return [int(word) for file in Path(f"/proc/{pid}/task").glob("*/children") for word in file.read_text().split()]


def write_text(file: Path) -> Path:
    """Writes the default training text."""
    rng = random.Random(7)
    words = ["owl", "moon", "river", "café", "winter", "sings", "follows", "the", "an", "old", "naïve", "€"]
    file.write_text("".join(" ".join(rng.choices(words, k=8)) + ".\n" for _ in range(600)), encoding="utf-8")
    return file


def measure(kills: int, seed: int, data: Path | None, variants: Sequence[str] = tuple(VARIANTS)) -> list[Tally]:
    """Kills each variant in turn; `kills` is the total over all variants, rounded up."""
    rng, tallies = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="smallm-kill-") as place:
        data = data.resolve() if data else write_text(Path(place, "owls.txt"))
        os.environ.setdefault("SMALLM_CACHE", str(Path(place, "cache")))
        for number, name in enumerate(variants):
            folder = Path(place, str(number))
            folder.mkdir()
            killer = Killer(name, data, folder, rng)
            tallies.append(killer.tally)
            wanted = -(-kills // len(variants))
            while killer.tally.kills < wanted:
                killer.run(min(KILLS_PER_RUN, wanted - killer.tally.kills))
                print(f"{name}: {killer.tally.kills} of {wanted} kills", file=sys.stderr)
    return tallies


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and the line of JSON; returns 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=120, metavar="N",
                        help="kills over all variants (default: 120)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="random seed of the moments (default: 1)")
    parser.add_argument(
        "--data", type=Path, default=None, metavar="FILE", help="training text (default: a generated one)"
    )
    options = parser.parse_args(argv)
    started = time.monotonic()
    tallies = measure(options.kills, options.seed, options.data)
    print(f"{'variant':<44}{'processes':>10}{'runs':>6}{'kills':>7}{'differ':>8}{'unusable':>10}")
    for t in tallies:
        print(f"{t.name:<44}{t.processes:>10}{t.runs:>6}{t.kills:>7}{t.differ:>8}{t.unusable:>10}")
    moments = sum((t.moments for t in tallies), Counter())
    print("kills by moment: " + ", ".join(f"{moment} {number}" for moment, number in sorted(moments.items())))
    print(json.dumps({"seconds": round(time.monotonic() - started), "variants": [vars(t) for t in tallies]}))
    return int(any(t.differ or t.unusable for t in tallies))


if __name__ == "__main__":
    raise SystemExit(main())
