"""The formats of fuzz_files.py: valid files of a tiny model, and for each format a function that makes a case.

This is a module of fuzz_files.py, not a script.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mutations
import onnx

from smallm.cli import main as cli

TINY = """\
[data]
min_count = 2
val_fraction = 0.2
[model]
n_layer = 1
n_head = 1
n_embd = 16
n_inner = 32
block_size = 16
[optim]
name = "muon"
learning_rate = 0.02
betas = [0.9, 0.95]
[train]
batch_size = 4
max_steps = 2
eval_every = 1000
save_every = 1
sample_length = 3
mixed_precision = "no"
compile = "no"
[sample]
seed = "a"
top_k = 40
"""
TEXT = "".join(f"An old owl reads line {n} to Zoë, for 10 € and a 中.\n" for n in range(40))


@dataclass(frozen=True)
class Home:
    """The folder of valid files, from which each case makes mutated copies."""

    path: Path

    @property
    def run(self) -> Path:
        """A run of two steps, with its checkpoints."""
        return self.path / "run"

    @property
    def export(self) -> Path:
        """The export folder of the run."""
        return self.path / "export"

    @property
    def text(self) -> Path:
        """The training text."""
        return self.path / "text.txt"


Case = tuple[str, list[str]]
"""A command and its arguments."""
Mutation = Callable[[bytes, random.Random], bytes]
Make = Callable[[Home, Path, random.Random], Case]
"""Writes the files of a case into an empty folder."""


def make_home(home: Home) -> None:
    """Trains and exports the tiny model."""
    home.text.write_text(TEXT, encoding="utf-8")
    (home.path / "tiny.toml").write_text(TINY, encoding="utf-8")
    run("train", ["--config", str(home.path / "tiny.toml"), "--data", str(home.text), "--out", str(home.run)])
    # Resuming then ends at the first evaluation, without charts.
    shutil.rmtree(home.run / "checkpoints" / "step-000002")
    run("export", [str(home.run), "--out", str(home.export)])


def run(command: str, argv: list[str]) -> int:
    """Runs a command through its entry point, as a user does."""
    return cli.run(getattr(cli, command), argv)


# One function per format: writes mutated files into an empty folder and returns the command that reads them.


def onnx_case(home: Home, folder: Path, rng: random.Random) -> Case:
    """`model.onnx` alone."""
    (folder / "model.onnx").write_bytes(mutations.onnx_file((home.export / "model.onnx").read_bytes(), rng))
    return infer(home, folder / "model.onnx", rng)


def folder_case(home: Home, folder: Path, rng: random.Random) -> Case:
    """An export folder with mutated JSON files, metadata or draft table, or with a file replaced by something else."""
    shutil.copytree(home.export, folder / "export")
    table, model = folder / "export" / "draft_table.npy", folder / "export" / "model.onnx"
    file = rng.choice((table, rng.choice(sorted((folder / "export").glob("*.json")))))
    kind = rng.randrange(6)
    if kind < 4:
        manifest = json.loads((home.export / "smallm.json").read_text(encoding="utf-8"))
        text = mutations.json_text(manifest, rng)
        (folder / "export" / "smallm.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        with suppress(ValueError, RecursionError, AttributeError):  # only JSON objects can become metadata
            proto = onnx.load(model)
            onnx.helper.set_model_props(proto, {f"smallm.{k}": json.dumps(v) for k, v in json.loads(text).items()})
            onnx.save(proto, model)
    elif kind == 4:
        file.write_bytes(mutations.bytewise(file.read_bytes(), rng))
    else:
        replace(rng.choice((model, file)), rng)
    if rng.random() < 0.1:
        return "export", [str(home.run), "--out", str(folder / "export")]
    return infer(home, folder / "export", rng)


def replace(file: Path, rng: random.Random) -> None:
    """Replaces a file by a link, a folder, an empty file, a file of zeros, or deletes the file."""
    file.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        file.symlink_to(rng.choice(("/dev/zero", "/etc/passwd", file.name, "..", "smallm.json")))
    elif kind == 1:
        file.mkdir()
    elif kind < 4:
        file.touch()
        os.truncate(file, (kind - 2) << 31)


def checkpoint_case(name: str, mutate: Mutation, p_rewritten: float = 0.8) -> Make:
    """A case that mutates one file of the newest checkpoint.

    p_rewritten: probability that the checksums are recomputed, as an attacker could do.
    """

    def case(home: Home, folder: Path, rng: random.Random) -> Case:
        shutil.copytree(home.run, folder / "run")
        newest = sorted((folder / "run" / "checkpoints").glob("step-*"))[-1]
        (newest / name).write_bytes(mutate((newest / name).read_bytes(), rng))
        if rng.random() < p_rewritten:
            rewrite_checksums(newest)
        if name != "optimizer.safetensors" and rng.random() < 0.6:
            return "export", [str(rng.choice((newest, folder / "run"))), "--out", str(folder / "out")]
        return "train", ["--resume", str(folder / "run"), "--train.max_steps", "2", "--data", str(home.text)]

    return case


def rewrite_checksums(folder: Path) -> None:
    """Recomputes the checksums, if the file that holds them is still readable."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        values = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
        values["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in values["sha256"]}
        del values["checksum"]
        values["checksum"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        (folder / "training_state.json").write_text(json.dumps(values), encoding="utf-8")


def json_bytes(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with mutated bytes or values."""
    if rng.random() < 0.2:
        return mutations.bytewise(data, rng)
    return mutations.json_text(json.loads(data), rng).encode("utf-8", "surrogatepass")


def metrics_bytes(data: bytes, rng: random.Random) -> bytes:
    """`metrics.jsonl` with a line or some bytes edited."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    return mutations.bytewise(data, rng) if rng.random() < 0.4 else b"".join(
        [*lines[:at], json_bytes(lines[at], rng), b"\n", *lines[at + 1 :]])  # fmt: skip


def metrics_case(home: Home, folder: Path, rng: random.Random) -> Case:
    """The metrics of a run that is then resumed."""
    shutil.copytree(home.run, folder / "run")
    file = folder / "run" / "metrics.jsonl"
    file.write_bytes(metrics_bytes(file.read_bytes(), rng))
    return "train", ["--resume", str(folder / "run"), "--train.max_steps", "3", "--data", str(home.text)]


def toml_case(home: Home, folder: Path, rng: random.Random) -> Case:
    """A mutated config, trained for one step."""
    (folder / "my.toml").write_bytes(mutations.toml_text(TINY, rng))
    data = ["--data", str(home.text)] if rng.random() < 0.9 else []
    # One step and one sample character: large numbers of either are valid and only take long.
    steps = ["--train.max_steps", "1", "--train.epochs", "0", "--train.sample_length", "1"]
    return "train", ["--config", str(folder / "my.toml"), "--out", str(folder / "out"), *data, *steps]


def text_case(home: Home, folder: Path, rng: random.Random) -> Case:
    """A text for training or for --perplexity."""
    data, encoding = mutations.text_file(rng)
    (folder / "my.txt").write_bytes(data)
    if rng.random() < 0.6:
        return "infer", ["--model", str(home.export), "--perplexity", str(folder / "my.txt"), f"--encoding={encoding}"]
    tiny = str(home.path / "tiny.toml")
    return "train", ["--config", tiny, "--data", str(folder / "my.txt"), f"--encoding={encoding}", "--out",
                     str(folder / "out"), "--train.max_steps", "1"]  # fmt: skip


def prompt_case(home: Home, folder: Path, rng: random.Random) -> Case:
    """Seed texts and stop strings, most of them short, a few of ten million characters."""
    huge = rng.random() < 0.005
    length = rng.choice((0, 1, 3, 20, 300, 5000, 100_000)) if not huge else 10_000_000
    seed = mutations.text(rng, length) + ("\ud800" if rng.random() < 0.02 else "")
    argv = ["--model", str(home.export), f"--seed={seed}", "--max-length", str(rng.choice((0, 1, 20, 100)))]
    argv += ["--rng-seed", "7", *(["--json"] if rng.random() < 0.2 else [])]
    for _ in range(rng.choice((0, 1, 1, 2, 30))):
        length = rng.choice((0, 1, 2, 3, 50, 2000)) if not huge else 10_000_000 // 30
        argv.append(f"--stop={mutations.text(rng, length)}")
    names = ["max-length", "temperature", "top-k", "top-p", "min-p", "rng-seed", "threads"]
    for name in rng.sample(names, rng.choice((0, 0, 1))):
        # Excluded because they are valid and only take long: a huge --max-length, hundreds of threads.
        huge, numbers = "" if name == "max-length" else "9" * 400, mutations.NUMBERS[: 8 if name == "threads" else 11]
        argv.append(f"--{name}={rng.choice((*numbers, 'nan', 'inf', '1e308', huge, '9' * 5000, ''))}")
    return "infer", argv


def infer(home: Home, model: Path, rng: random.Random) -> Case:
    """Generates past block_size, or measures the perplexity of a text."""
    if rng.random() < 0.3:
        return "infer", ["--model", str(model), "--perplexity", str(home.text)]
    return "infer", ["--model", str(model), "--seed", "Zoë", "--max-length", "40", "--rng-seed", "7"]


FORMATS: dict[str, Make] = {
    "onnx": onnx_case,
    "export folder": folder_case,
    "prompts": prompt_case,
    "text": text_case,
    "toml": toml_case,
    "tokenizer.json": checkpoint_case("tokenizer.json", json_bytes),
    "training_state.json": checkpoint_case("training_state.json", json_bytes),
    "model.safetensors": checkpoint_case("model.safetensors", mutations.safetensors_file),
    "optimizer.safetensors": checkpoint_case("optimizer.safetensors", mutations.safetensors_file),
    "metrics.jsonl": metrics_case,
}
DEFAULT = [name for name in FORMATS if name != "metrics.jsonl"]  # a case of metrics.jsonl draws charts for seconds
