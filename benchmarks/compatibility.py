"""Opens every kind of exported file in old and new runtimes and writes the table in docs/export.md.

    python benchmarks/compatibility.py [--versions 1.21.0 1.22.0 1.23.0 newest] [--cache DIR] [--check]

Trains a tiny model on the documentation that comes with Python and exports it in each precision and as a portable
file. Each version of ONNX Runtime, installed with pip into a folder of its own, and the JavaScript packages of
tests/hosts (install them there with `npm ci --ignore-scripts`) then score a text and generate one greedily. Prints
the table and writes it into docs/export.md, unless --check is given. Exit code 1 if a file does not open in the
version that `export.py` states as the oldest, or in a newer one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from smallm.cli.main import run
from smallm.errors import UserError
from smallm.export.folder import export_checkpoint
from smallm.export.portable_graph import PORTABLE_FILE
from smallm.export.precision import PRECISIONS
from smallm.inference.session import Session
from smallm.language_model import MODEL_FILE
from smallm.model_file.manifest import Manifest
from smallm.runs.layout import validation_text
from smallm.training.checkpoint.manager import best_checkpoint

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("1.21.0", "1.22.0", "1.23.0", "newest")
FILES = (*PRECISIONS, "portable")
PAGE = ROOT / "docs" / "export.md"
BEGIN, END = "<!-- compatibility: written by benchmarks/compatibility.py -->", "<!-- /compatibility -->"
MODULES = ROOT / "tests" / "hosts" / "node_modules"
SCRIPT = Path(__file__).with_suffix(".mjs")
SEED_IDS, NEW_IDS = 8, 60
TRAINING = {
    "model.n_layer": 2, "model.n_head": 2, "model.n_kv_head": 1, "model.n_embd": 128, "model.block_size": 128,
    "train.max_steps": 150, "train.eval_every": 150, "train.sample_length": 0,
}  # fmt: skip
PROBE = """
import json, sys, numpy as np, onnxruntime
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session
path, task = sys.argv[1], json.load(open(sys.argv[2]))
session = Session(path, threads=1)
logits = session.logits(np.array([task["ids"]]))[0]
cache, written = KVCache(session), []
following = cache.prefill(np.array(task["seed"]))
for _ in range(task["new"]):
    written.append(int(following.argmax()))
    following = cache.decode_batch(np.array(written[-1:]))[0]
print(json.dumps({"version": onnxruntime.__version__, "logits": logits.tolist(), "written": written}))
"""


@dataclass(frozen=True)
class Result:
    """How a runtime handled a file."""

    bits: float | None = None
    """Bits per id of the scored text; None if the runtime refuses the file."""
    written: tuple[int, ...] = ()
    error: str = ""


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and prints or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--versions",
        nargs="+",
        default=VERSIONS,
        metavar="VERSION",
        help="versions of ONNX Runtime, the oldest first (default: %(default)s)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="install the versions here and keep them for the next run"
    )
    parser.add_argument("--check", action="store_true", help="only print the table")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="smallm-compatibility-") as folder:
        work = Path(folder)
        paths = export_all(work)
        task = make_task(paths["fp32"], work)
        rows = {}
        for version in options.versions:
            name, found = probe_version(version, options.cache or work, paths, task)
            rows[f"ONNX Runtime {name}, Python"] = found
        for package, title in (("onnxruntime-node", "Node"), ("onnxruntime-web", "wasm, under Node")):
            if (MODULES / package).is_dir():
                version = json.loads((MODULES / package / "package.json").read_text())["version"]
                rows[f"{package} {version}, {title}"] = {f: probe_js(package, paths[f], task) for f in FILES}
            else:
                print(
                    f"{package} is skipped; to include it, run `npm ci --ignore-scripts` in tests/hosts",
                    file=sys.stderr,
                )
    newest = rows[[name for name in rows if name.endswith(", Python")][-1]]
    lines = table(rows, newest)
    print(lines)
    for row, cells in rows.items():
        for file, found in cells.items():
            if found.error:
                print(f"{row}, {file}: {found.error}", file=sys.stderr)
    if not options.check:
        write_table(PAGE, lines)
    wrong = wrong_claims(dict(zip(options.versions, rows.values(), strict=False)))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def export_all(work: Path) -> dict[str, Path]:
    """Trains a small model and exports a file of each kind."""
    from smallm.cli import main as cli

    settings = [word for key, value in TRAINING.items() for word in (f"--{key}", str(value))]
    if run(cli.train, ["--out", str(work / "run"), *settings]):
        raise UserError("the training failed; its message is above")
    checkpoint, paths = best_checkpoint(work / "run"), {}
    for precision in PRECISIONS:
        out = work / precision
        export_checkpoint(checkpoint, out, precision, allow_loss=True, portable=precision == "fp32")
        paths[precision] = out / MODEL_FILE
    return paths | {"portable": paths["fp32"].with_name(PORTABLE_FILE)}


def make_task(path: Path, work: Path) -> Path:
    """Writes the task of every runtime: ids of the validation text to score, and a seed to continue greedily."""
    m: Manifest = Session(path).manifest
    text = validation_text(work / "run").read_text(encoding="utf-8")
    ids = m.vocabulary.encode(text[: 4 * m.block_size])[: m.block_size].tolist()
    values = {"ids": ids, "seed": ids[:SEED_IDS], "new": NEW_IDS}
    values |= {"n_layer": m.n_layer, "n_kv_head": m.n_kv_head, "head_dim": m.head_dim}
    (work / "task.json").write_text(json.dumps(values))
    return work / "task.json"


def probe_version(version: str, cache: Path, paths: Mapping[str, Path], task: Path) -> tuple[str, dict[str, Result]]:
    """Installs a version and runs every file in it, each in a separate process; returns the full version too."""
    target = cache / f"onnxruntime-{version}"
    if not target.is_dir():
        print(f"installing onnxruntime {version}", file=sys.stderr)
        wanted = "onnxruntime" if version == "newest" else f"onnxruntime=={version}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), wanted]
        subprocess.run(command, check=True, stdout=sys.stderr)
    code = f"import sys; sys.path[:0] = [{str(target)!r}, {str(ROOT)!r}]\n{PROBE}"
    found = {file: probe([sys.executable, "-c", code, str(paths[file]), str(task)], task) for file in paths}
    name = next(target.glob("onnxruntime-*.dist-info")).name.removeprefix("onnxruntime-").removesuffix(".dist-info")
    return name, found


def probe_js(package: str, path: Path, task: Path) -> Result:
    """Runs a file in a JavaScript package."""
    return probe(["node", str(SCRIPT), str(MODULES), package, str(path), str(task)], task)


def probe(command: Sequence[str], task: Path) -> Result:
    """Runs a probe and computes the loss from its logits."""
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    if finished.returncode:
        return Result(
            error=next(iter(reversed(finished.stderr.strip().splitlines())), f"exit code {finished.returncode}")
        )
    values = json.loads(finished.stdout)
    ids, logits = json.loads(task.read_text())["ids"], np.array(values["logits"])[:-1]
    logits -= logits.max(axis=1, keepdims=True)
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), ids[1:]]
    return Result(float(nats.mean() / np.log(2)), tuple(values["written"]))


def table(rows: Mapping[str, Mapping[str, Result]], newest: Mapping[str, Result]) -> str:
    """A Markdown table; a star marks a greedy text that differs from that of the newest version in Python."""

    def cell(file: str, found: Result) -> str:
        if found.bits is None:
            return "no"
        return f"{found.bits:.4f}" + ("" if found.written == newest[file].written else " *")

    lines = [["", *FILES], ["---"] * (1 + len(FILES))]
    lines += [[row, *(cell(file, cells[file]) for file in FILES)] for row, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(page: Path, lines: str) -> None:
    """Replaces the table between the two markers. Raises `UserError` if the markers are missing."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{page} has no markers for the table; add the lines {BEGIN} and {END}")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    page.write_text(f"{before}\n{lines}\n{after}", encoding="utf-8")


def wrong_claims(rows: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """The precisions that are refused by the version that `export.py` states, or by a newer one.

    rows: results by version. An older version may open a file: `export.py` states a version that suits all processors.
    """
    wrong = []
    for name, precision in PRECISIONS.items():
        supported = [version for version in rows if _number(version) >= _number(precision.onnxruntime)]
        refused = [version for version in supported if rows[version][name].bits is None]
        if refused:
            wrong.append(f"{name}: refused by {', '.join(refused)}; export.py states {precision.onnxruntime} or newer")
    return wrong


def _number(version: str) -> tuple[float, ...]:
    return (np.inf,) if version == "newest" else tuple(map(int, version.split(".")[:2]))


if __name__ == "__main__":
    sys.exit(run(main))
