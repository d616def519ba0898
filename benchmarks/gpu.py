"""Runs everything that only a GPU can prove, within a time limit, and prints one table.

    python benchmarks/gpu.py [--minutes 25] [--seeds 1 2 3] [--data shakespeare] [--miniature]

In sequence, each in separate processes: fp32, TF32, bf16 and fp16, with Muon and AdamW, compiled and not, against fp32;
two processes on one GPU (gloo, because NCCL refuses to share a GPU) and on two GPUs (NCCL); FSDP2; SIGKILL and resume
with deterministic kernels, compared bit for bit; a loss that is not finite; the speed and memory of train.py, of a
plain PyTorch loop with the same model, and of nanoGPT's model and loop, in the shape of shakespeare-gpu and with 124 M
parameters; configs/shakespeare-gpu.toml to its end, scored on the whole validation text and by nanoGPT's protocol. A
measurement that fails, or does not fit into the time, is a line of the table that says why. --miniature runs the same
on tiny shapes, on the CPU if there is no GPU. Prints the table, then all figures as one line of JSON; progress goes to
stderr. The exit code is 1 if a measurement failed.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import nanogpt
from accelerate import PartialState
from train_speed import gemm_peak, open_text

from smallm.cli.main import run, train
from smallm.cli.table import table
from smallm.errors import UserError
from smallm.runs.metrics import read_metrics
from smallm.training import devices, ensemble, trainer
from smallm.training.checkpoint.format import load_model, read_state
from smallm.training.checkpoint.manager import best_checkpoint, checkpoints, saved_config
from smallm.training.config import ModelConfig, OptimConfig
from smallm.training.devices import versions
from smallm.training.model.operations import cross_entropy
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.optimizers import build_optimizer, set_learning_rate

TOLERANCE = 0.03  # nats per character from fp32, at the end of a short run
GOAL_LOSS, GOAL_SHARE = 1.4697, 0.5  # nanoGPT's published loss on tiny Shakespeare; share of the bf16 peak at 124 M
FP32 = {"NVIDIA_TF32_OVERRIDE": "0"}
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "TransformerBlock", "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip
ADAMW: dict[str, Any] = {"optim_name": "adamw", "optim_learning_rate": 0.001}
Shape = dict[str, int]  # n_layer, n_head, n_embd, block_size, batch_size


@dataclass(frozen=True)
class Scale:
    """The sizes of all measurements."""

    shape: Shape
    large: Shape
    steps: int
    """Of the short runs."""
    loop_steps: int
    recipe: tuple[str, ...]
    """Changes to shakespeare-gpu."""
    scored_batches: int
    """Of nanoGPT's protocol."""


FULL = Scale(
    {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64},
    {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32}, 200, 60, (), 200,
)  # fmt: skip
TINY = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 16, "batch_size": 4}
MAX_SECONDS = 240  # of a command in the miniature
MINIATURE = Scale(TINY, TINY, 6, 3, (*(f"--model.{k}={v}" for k, v in TINY.items() if k != "batch_size"),
                                     "--train.batch_size=4", "--train.max_steps=4"), 2)  # fmt: skip


@dataclass
class Row:
    """One line of the table."""

    name: str
    loss: float | None = None
    """Nats per character on the validation text."""
    characters_per_second: float | None = None
    share: float | None = None
    """Floating-point operations of the model per second, relative to the peak of matrix products in bf16."""
    memory_mb: float | None = None
    """Peak memory of the GPU, or of the process on a CPU."""
    seconds: float = 0.0
    verdict: str = ""
    failed: bool = False


class MeasurementError(Exception):
    """A measurement failed; the message is its verdict."""


# One training process, as this script starts it.


def work(options: dict[str, Any], argv: Sequence[str]) -> int:
    """train.py with changes. Options: backend ("gloo" or ""), deterministic (bool), nan_step (-1 = no step), memory (a
    file for the peak memory in bytes).
    """
    torch.use_deterministic_algorithms(options["deterministic"], warn_only=True)
    plain_train, plain_step, loss = trainer.Trainer.train, trainer.Trainer.train_step, ensemble.cross_entropy

    def whole_run(self: trainer.Trainer) -> int:
        if "ACCELERATE_USE_FSDP" in os.environ and not hasattr(self.parameters[0], "full_tensor"):
            raise UserError("the weights are not sharded")
        code = plain_train(self)
        if self.accelerator.is_main_process:
            Path(options["memory"]).write_text(str(peak_memory()))
        return code

    def train_step(self: trainer.Trainer, step: int) -> Any:
        poisoned = patch.object(ensemble, "cross_entropy", lambda *tensors: loss(*tensors) * float("nan"))
        with poisoned if step == options["nan_step"] else nullcontext():
            return plain_step(self, step)

    backend = {"backend": options["backend"]} if options["backend"] else {}
    with (
        patch.object(devices, "PartialState", partial(PartialState, **backend)),
        patch.object(trainer.Trainer, "train", whole_run),
        patch.object(trainer.Trainer, "train_step", train_step),
    ):
        code = run(train, argv)
    return code


def peak_memory() -> int:
    """Peak memory of this process in bytes: on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def loop(kind: str, shape: Shape, steps: int) -> dict[str, float]:
    """Speed of a loop without Accelerate in bf16 with AdamW: kind "plain" = our model, "nanogpt" = nanoGPT's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {key: value for key, value in shape.items() if key != "batch_size"}
    vocab_size, ids_per_step = 256, shape["batch_size"] * shape["block_size"]
    model: Any
    if kind == "nanogpt":
        settings = nanogpt.Settings(**shape)
        model = nanogpt.GPT(vocab_size, settings).to(device)
        optimizer = nanogpt.build_optimizer(model, settings, device)
    else:
        model = TransformerLanguageModel(vocab_size, ModelConfig(**sizes), seed=1).to(device)
        optimizer = build_optimizer(model, OptimConfig(name="adamw", learning_rate=1e-3))
        set_learning_rate(optimizer, 1.0)
    fast = torch.compile(model) if device == "cuda" else model
    text = torch.randint(vocab_size, (steps, shape["batch_size"], shape["block_size"] + 1), device=device)
    marks = []
    for batch in text:
        with torch.autocast(device, torch.bfloat16):
            loss = cross_entropy(fast(batch[:, :-1]), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    seconds = statistics.median(b - a for a, b in pairwise(marks))
    return {"speed": ids_per_step / seconds, "flops": model.flops_per_id(), "memory": peak_memory()}


# The measurements.


class Bench:
    """Starts the processes of all measurements and collects the rows."""

    def __init__(self, scale: Scale, data: str, minutes: float, home: Path):
        self.scale, self.data, self.home = scale, data, home
        self.end, self.rows, self.runs = time.monotonic() + 60 * minutes, list[Row](), 0
        self.gpus = torch.cuda.device_count()
        self.peak: dict[str, Any] = {}

    def measure(self, name: str, measure: Callable[[Row], None]) -> Row:
        """Adds a row; a failure or a lack of time is its verdict."""
        print(f"gpu: {name}", file=sys.stderr, flush=True)
        row, started = Row(name), time.monotonic()
        self.rows.append(row)
        try:
            if started > self.end:
                row.verdict = "not run: the time was over"
            else:
                measure(row)
        except subprocess.TimeoutExpired:
            row.verdict = "not finished: the time was over"
        except (MeasurementError, UserError) as error:
            row.failed, row.verdict = True, f"FAILED: {error}"
        row.seconds = time.monotonic() - started
        return row

    def short(self, **changes: Any) -> list[str]:
        """Flags of a short run in the shape of shakespeare-gpu; changes: `section_field=value`."""
        steps = self.scale.steps
        flags = {f"{'train' if key == 'batch_size' else 'model'}.{key}": n for key, n in self.scale.shape.items()} | {
            "model.dropout": 0, "train.max_steps": steps, "train.eval_every": steps, "train.log_every": 1,
            "train.sample_length": 0, "train.compile": "no", "train.patience": 0, "optim.warmup_steps": 10,
            "train.mixed_precision": "bf16",
        }  # fmt: skip
        flags |= {key.replace("_", ".", 1): value for key, value in changes.items()}
        return [f"--{key}={value}" for key, value in flags.items()]

    def command(
        self, argv: Sequence[str], processes: int = 0, backend: str = "", deterministic: bool = False,
        nan_step: int = -1,
    ) -> list[str]:  # fmt: skip
        """The command of train.py as `work` starts it. processes: of a launcher; 0 = without a launcher."""
        options = {"backend": backend, "deterministic": deterministic, "nan_step": nan_step,
                   "memory": str(self.home / "memory")}  # fmt: skip
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return [sys.executable, *(launcher if processes else []), str(Path(__file__).resolve()),
                "--work", json.dumps(options), *argv]  # fmt: skip

    def run(self, command: list[str], environment: dict[str, str]) -> str:
        """Runs a command to its end; returns its stdout, or raises `MeasurementError` with its last message."""
        seconds = max(1, self.end - time.monotonic())
        limit = MAX_SECONDS if self.scale is MINIATURE else seconds
        process = subprocess.Popen(
            command, env=self.environment(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, errors = process.communicate(timeout=min(seconds, limit))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the processes of a launcher would outlive it
            process.communicate()
            if seconds <= limit:
                raise
            raise MeasurementError(f"a command did not end within {limit} s") from None
        if process.returncode:
            ours = [line for line in errors.splitlines() if line.startswith("smallm: ")]
            raise MeasurementError((ours or errors.splitlines() or [f"exit code {process.returncode}"])[-1][:200])
        return output

    def environment(self, changes: dict[str, str]) -> dict[str, str]:
        """The environment of all processes; they share one cache."""
        on_cpu = {} if self.gpus else {"ACCELERATE_USE_CPU": "true"}
        return os.environ | {"SMALLM_CACHE": str(self.home / "cache")} | on_cpu | changes

    def train(
        self, row: Row, argv: Sequence[str], environment: dict[str, str] | None = None, **options: Any
    ) -> Path:  # fmt: skip
        """Trains one run, fills the row, and returns the folder of the run."""
        out = self.new_run()
        self.run(self.command([*self.new(out), *argv], **options), environment or {})
        self.fill(row, out)
        memory = self.home / "memory"
        row.memory_mb = int(memory.read_text()) / 1e6
        memory.unlink()  # of the main process
        return out

    def new_run(self) -> Path:
        """A folder for the next run."""
        self.runs += 1
        return self.home / f"run-{self.runs}"

    def new(self, out: Path) -> list[str]:
        """Flags of every new run."""
        return ["--config", "shakespeare-gpu", "--data", self.data, "--out", str(out)]

    def fill(self, row: Row, out: Path) -> None:
        """Loss, speed and share of the peak, from the metrics and the best checkpoint."""
        records, folder = read_metrics(out), best_checkpoint(out)
        row.loss = read_state(folder)[0].val_loss
        speeds = [record["characters_per_second"] for record in records if record["kind"] == "train"]
        row.characters_per_second = statistics.median(speeds)
        row.share = load_model(folder).flops_per_id() * row.characters_per_second / self.peak["flops_per_second"]

    # Each method adds rows.

    def precisions(self) -> None:
        """Precision, optimiser and compilation, against fp32."""

        def fp32(row: Row, **changes: Any) -> None:
            self.train(row, self.short(train_mixed_precision="no", **changes), FP32)

        plain, adamw = self.measure("fp32, muon", fp32), self.measure("fp32, adamw", partial(fp32, **ADAMW))
        variants: list[tuple[str, Row, dict[str, Any]]] = [
            ("TF32, muon", plain, {"train_mixed_precision": "no"}),
            ("bf16, muon", plain, {}),
            ("fp16, muon", plain, {"train_mixed_precision": "fp16"}),
            ("bf16, muon, compiled", plain, {"train_compile": "yes"}),
            ("bf16, adamw", adamw, ADAMW),
            ("fp16, adamw", adamw, ADAMW | {"train_mixed_precision": "fp16"}),
        ]
        for name, reference, changes in variants:
            self.measure(name, partial(self.compared, self.short(**changes), reference))

    def compared(self, argv: list[str], reference: Row, row: Row, **options: Any) -> None:
        """A run whose loss must be that of the reference, within TOLERANCE."""
        if "--train.mixed_precision=fp16" in argv and not self.gpus:
            row.verdict = "not run: fp16 needs a GPU"
            return
        self.train(row, argv, **options)
        if row.loss is None or reference.loss is None:
            raise MeasurementError("there is no loss to compare")
        row.verdict = f"{row.loss - reference.loss:+.4f} from {reference.name}"
        if not abs(row.loss - reference.loss) <= TOLERANCE:
            raise MeasurementError(row.verdict)

    def processes(self) -> None:
        """Several processes and FSDP2, against the run in bf16."""
        reference = next(row for row in self.rows if row.name == "bf16, muon")
        argv = self.short()
        self.measure("two processes, gloo", partial(self.compared, argv, reference, processes=2, backend="gloo"))
        if self.gpus > 1:
            self.measure("two processes, NCCL", partial(self.compared, argv, reference, processes=2))
        # Without several GPUs, FSDP2 runs in one process, because gloo cannot scatter and gather tensors on GPUs.
        ranks = min(2, self.gpus) or 2
        for compiled in ("no", "yes"):
            name = f"FSDP2, {ranks} process(es), compile {compiled}"
            sharded = self.short(train_compile=compiled)
            self.measure(name, partial(self.compared, sharded, reference, processes=ranks, environment=FSDP))

    def resume(self) -> None:
        """SIGKILL after the first checkpoint, then resume: equal bits with deterministic kernels."""

        def measure(row: Row) -> None:
            argv = self.short(train_save_every=max(2, self.scale.steps // 10), train_max_steps=5 * self.scale.steps)
            whole = self.train(row, argv, DETERMINISTIC, deterministic=True)
            out = self.new_run()
            command = self.command([*self.new(out), *argv], deterministic=True)
            environment = self.environment(DETERMINISTIC)
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as killed:
                while killed.poll() is None and not [*out.glob("checkpoints/step-*")] and time.monotonic() < self.end:
                    time.sleep(0.002)
                killed.kill()
            step = read_state(checkpoints(out)[-1])[0].step
            self.run(self.command(["--resume", str(out)], deterministic=True), DETERMINISTIC)
            for name in ("model.safetensors", "optimizer.safetensors"):
                ours, theirs = ((checkpoints(folder)[-1] / name).read_bytes() for folder in (out, whole))
                if ours != theirs:
                    raise MeasurementError(f"{name} differs after a resume at step {step}")
            row.verdict = f"killed, resumed at step {step}: equal bits"

        self.measure("SIGKILL and resume, bf16, muon", measure)

    def not_finite(self) -> None:
        """A step whose loss is NaN is skipped and counted, and the run goes on."""

        def measure(changes: dict[str, Any], row: Row) -> None:
            out = self.train(row, self.short(**changes), nan_step=2)
            skipped = [record["skipped_steps"] for record in read_metrics(out) if record["kind"] == "train"][-1]
            row.verdict = f"{skipped} step(s) skipped"
            if skipped < 1 or row.loss is None or not np.isfinite(row.loss):
                raise MeasurementError(row.verdict)

        half = "fp16" if self.gpus else "no"
        adamw = ADAMW | {"train_mixed_precision": half}
        for name, changes in (("bf16, muon", {}), (f"{half}, adamw", adamw)):
            self.measure(f"NaN in step 3, {name}", partial(measure, changes))

    def speeds(self) -> None:
        """train.py against loops without Accelerate, in both shapes."""
        for label, shape in (("10.7 M", self.scale.shape), ("124 M", self.scale.large)):
            flags = {f"{'train' if key == 'batch_size' else 'model'}_{key}": value for key, value in shape.items()}
            argv = self.short(
                **flags, **ADAMW, train_max_steps=self.scale.loop_steps,
                train_eval_every=self.scale.loop_steps, train_compile="yes" if self.gpus else "no",
            )  # fmt: skip
            row = self.measure(f"{label}, train.py", lambda row, argv=argv: void(self.train(row, argv)))
            if label == "124 M" and row.share is not None:
                row.verdict = f"goal {GOAL_SHARE:.0%} of peak"
            for kind in ("plain", "nanogpt"):
                self.measure(f"{label}, {kind} loop", partial(self.loop, kind, shape))

    def loop(self, kind: str, shape: Shape, row: Row) -> None:
        """A loop in a separate process."""
        argument = json.dumps({"kind": kind, "shape": shape, "steps": self.scale.loop_steps})
        found = json.loads(self.run([sys.executable, str(Path(__file__).resolve()), "--loop", argument], {}))
        row.characters_per_second, row.memory_mb = found["speed"], found["memory"] / 1e6
        row.share = found["flops"] * found["speed"] / self.peak["flops_per_second"]

    def recipe(self, seed: int) -> None:
        """configs/shakespeare-gpu.toml to its end."""

        def measure(row: Row) -> None:
            out = self.train(row, [*self.scale.recipe, f"--train.seed={seed}"])
            theirs = nanogpt_loss(out, self.data, self.scale.scored_batches, self.home / "cache")
            row.verdict = f"{theirs:.4f} by nanoGPT's protocol; goal {GOAL_LOSS}"

        self.measure(f"shakespeare-gpu, seed {seed}", measure)


def void(_result: object) -> None:
    """Discards a result."""


@torch.no_grad()
def nanogpt_loss(out: Path, data: str, batches: int, cache: Path) -> float:
    """Mean loss of the best checkpoint over random validation batches of 64 windows, as nanoGPT reports it."""
    settings, device = saved_config(out)[0], "cuda" if torch.cuda.is_available() else "cpu"
    model, corpus = load_model(best_checkpoint(out), device), open_text(data, settings.data.min_count, cache)
    ids, T, rng = np.asarray(corpus.val_ids).astype(np.int64), settings.model.block_size, np.random.default_rng(1337)
    losses = []
    for _ in range(batches):
        rows = np.stack([ids[start : start + T + 1] for start in rng.integers(len(ids) - T, size=64)])
        batch = torch.from_numpy(rows).to(device)
        losses.append(cross_entropy(model(batch[:, :-1]), batch[:, 1:].contiguous()).item())
    return statistics.fmean(losses)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    head = ["run", "loss", "chars/s", "of peak", "MB", "seconds", "verdict"]
    cells = [head, *([
        row.name, cell(row.loss, ".4f"), cell(row.characters_per_second, ",.0f"), cell(row.share, ".1%"),
        cell(row.memory_mb, ",.0f"), f"{row.seconds:.0f}", row.verdict,
    ] for row in rows)]  # fmt: skip
    lines = table(cells, left=(0, len(head) - 1))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Measures and prints the table and the line of JSON."""
    if argv[:1] == ["--work"]:
        return work(json.loads(argv[1]), argv[2:])
    options = parse(argv)
    if options.loop:
        print(json.dumps(loop(**json.loads(options.loop))))
        return 0
    if not (options.miniature or torch.cuda.is_available()):
        raise UserError("no GPU was found; --miniature runs every measurement in tiny shapes on the CPU")
    with tempfile.TemporaryDirectory(prefix="smallm-") as folder:
        bench = Bench(MINIATURE if options.miniature else FULL, options.data, options.minutes, Path(folder))
        bench.peak = gemm_peak(rounds=1 if options.miniature else 10)
        bench.precisions()
        bench.processes()
        bench.resume()
        bench.not_finite()
        bench.recipe(options.seeds[0])
        bench.speeds()
        for seed in options.seeds[1:]:
            bench.recipe(seed)
    print(format_table(bench.rows))
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(), "peak": bench.peak,
             "miniature": options.miniature}  # fmt: skip
    print(json.dumps({**facts, "rows": [asdict(row) for row in bench.rows]}))
    return int(any(row.failed for row in bench.rows))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--minutes", type=float, default=25, metavar="N", help="time limit of all measurements (default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N",
        help="seeds of shakespeare-gpu; the first runs before the speeds (default: 1 2 3)")  # fmt: skip
    add("--data", default="shakespeare", metavar="TEXT", help="a text, as for train.py (default: %(default)s)")
    add("--miniature", action="store_true", help="tiny shapes, also without a GPU: tests this script")
    add("--loop", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(run(main))
