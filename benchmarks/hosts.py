"""Compares one model in every host: start-up, characters per second, and size of what is shipped.

    python benchmarks/hosts.py RUN [--length 400] [--rounds 3]

Exports the run in fp32 with its kits. Each host in turn generates a text on one thread, for --rounds rounds, as a
whole process whose output is timed while it arrives. Start-up is the time from the start of the process to the first
new character; speed is measured over the characters after the first. The figures are medians; the ratio compares with
Python in the same round. The size counts what the host's package manager installs for this platform, or the program
and its library, and the model, but not Python, Node and the browser. Prints a table, then all figures as one line of
JSON.

Hosts that are not installed are named and skipped. C needs a compiler; Chromium needs `npm ci --ignore-scripts` in
tests/js; transformers.js needs the same in tests/hosts; genai needs the package onnxruntime-genai.
"""

import argparse
import codecs
import http.server
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import plain

from smallm.cli.main import run
from smallm.errors import UserError
from smallm.export.folder import export_checkpoint
from smallm.export.kits import PAGE_FILES, write_sources
from smallm.generation.draft_table import DRAFT_TABLE_FILE
from smallm.language_model import MODEL_FILE
from smallm.runs.layout import validation_text
from smallm.training.checkpoint.manager import best_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_suffix(".mjs")
KIT_MODULES, HOST_MODULES = (ROOT / "tests" / name / "node_modules" for name in ("js", "hosts"))
TOOLS = ("training", "export", "embed")  # rooms of smallm that the runtime does not import
SEED_CHARACTERS, TEMPERATURE, TOP_K = 16, 0.8, 40
MAX_SECONDS = 300  # for one text; then the process is killed


class MissingError(Exception):
    """A host cannot run; the message names the missing package or program."""


@dataclass(frozen=True)
class Host:
    """The command that runs a task in a host, and the files that an app ships."""

    command: Callable[[Mapping], list[str]]
    library: Sequence[Path]
    """Files and folders."""
    model: Sequence[Path]


@dataclass(frozen=True)
class Trial:
    """The times of one text, in seconds since the start of the process."""

    seed_seconds: float
    """Time of the first byte, which belongs to the seed."""
    start: float
    """Time of the first new character."""
    speed: float
    """Characters per second after the first new one."""
    text: str


# -- the hosts


def python(folder: Path, _work: Path) -> Host:
    """infer.py, with the packages and modules of the runtime."""
    return Host(
        lambda task: [sys.executable, str(ROOT / "infer.py"), "--model", str(folder), "--threads", "1", *flags(task)],
        [*packages("onnxruntime", "numpy"), *runtime_modules()],
        [folder / MODEL_FILE, *folder.glob(DRAFT_TABLE_FILE)],
    )


def c(folder: Path, work: Path) -> Host:
    """The program of the C kit, built with its Makefile."""
    if not shutil.which("cc"):
        raise MissingError("a C compiler")
    kit = work / "kit-c"
    kit.mkdir()
    write_sources("c", folder / MODEL_FILE, kit)
    subprocess.run(["make", "--silent"], cwd=kit, check=True, stdout=subprocess.DEVNULL)
    program = kit / "smallm_generate"
    return Host(lambda task: [str(program), str(kit / MODEL_FILE), *flags(task)], [program], [kit / MODEL_FILE])


def plain_c(folder: Path, work: Path) -> Host:
    """plain.c, straightforward loops in the manner of llama2.c."""
    if not shutil.which("cc"):
        raise MissingError("a C compiler")
    program, weights = plain.build_plain(folder / MODEL_FILE, work)
    return Host(lambda task: [program, weights, *flags(task)], [Path(program)], [Path(weights)])


def node(folder: Path, work: Path) -> Host:
    """The Node kit."""
    if not shutil.which("node"):
        raise MissingError("Node")
    kit = work / "kit-node"
    write_sources("node", folder, kit)
    return Host(
        partial(script, "node", kit, kit), [kit / name for name in ("smallm.js", "smallm.wasm")], [kit / MODEL_FILE]
    )


def chromium(folder: Path, work: Path, serve: Callable[[Path], str]) -> Host:
    """The page of the web kit in a headless browser."""
    modules, kit = javascript(KIT_MODULES, "playwright-core"), work / "kit-web"
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise MissingError("Chromium; on Debian: apt-get install chromium")
    write_sources("web", folder, kit)
    address = serve(kit)
    return Host(
        lambda task: [*script("chromium", modules, address, task), browser],
        [kit / name for name in (*PAGE_FILES, "smallm.js", "smallm.wasm")],
        [kit / MODEL_FILE],
    )


def genai(folder: Path, _work: Path) -> Host:
    """onnxruntime-genai in Python, with the export folder."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MissingError("the package onnxruntime-genai")
    program = Path(__file__).with_name("host_genai.py")
    return Host(
        lambda task: [sys.executable, str(program), str(folder), json.dumps(task)],
        packages("onnxruntime_genai", "onnxruntime", "numpy"),
        [folder / name for name in (MODEL_FILE, "genai_config.json", "tokenizer.json", "tokenizer_config.json")],
    )


def transformers_js(folder: Path, _work: Path) -> Host:
    """transformers.js under Node, with the export folder."""
    modules = javascript(HOST_MODULES, "@huggingface/transformers")
    own = [modules / "@huggingface/transformers/dist/transformers.node.cjs", modules / "sharp", modules / "@img"]
    configs = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    return Host(
        partial(script, "transformers", modules, folder),
        [*own, *onnxruntime_node(modules)],
        [folder / "onnx" / MODEL_FILE, *(folder / name for name in configs)],
    )


def runtime_modules() -> list[Path]:
    """smallm's modules that generation can import: everything but training, export and the sources of the kits."""
    package = ROOT / "smallm"
    return [file for file in package.rglob("*.py") if file.relative_to(package).parts[0] not in TOOLS]


def flags(task: Mapping) -> list[str]:
    """The task as flags, which are the same for infer.py and the C program."""
    names = {"seed": "seed", "max-length": "length", "temperature": "temperature", "top-k": "top_k"}
    values = {name: str(task[key]) for name, key in (names | {"rng-seed": "rng_seed"}).items()}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def script(host: str, modules: Path, model: Path | str, task: Mapping) -> list[str]:
    return ["node", str(SCRIPT), host, str(modules), str(model), json.dumps(task)]


def javascript(modules: Path, package: str) -> Path:
    """The node_modules folder, which must hold this package. Raises `MissingError`."""
    if not shutil.which("node") or not (modules / package).is_dir():
        raise MissingError(f"Node, and `npm ci --ignore-scripts` in {modules.parent.relative_to(ROOT)}")
    return modules


def onnxruntime_node(modules: Path) -> list[Path]:
    """The files of onnxruntime-node for this platform."""
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    binaries = sorted((modules / "onnxruntime-node" / "bin").glob(f"napi-*/{sys.platform}/{machine}"))
    return [*binaries, modules / "onnxruntime-node" / "dist", modules / "onnxruntime-common" / "dist"]


def packages(*names: str) -> list[Path]:
    """The folders of Python packages and of their bundled libraries."""
    found = [Path(importlib.util.find_spec(name).origin).parent for name in names]
    return found + [libs for folder in found if (libs := folder.with_name(f"{folder.name}.libs")).is_dir()]


def megabytes(paths: Sequence[Path]) -> float:
    """Total size of files and folders, without Python's bytecode caches."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files if "__pycache__" not in file.parts) / 1e6


@contextmanager
def serving() -> Iterator[Callable[[Path], str]]:
    """A function that serves a folder and returns its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ExitStack() as stack:

        def serve(folder: Path) -> str:
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return f"http://127.0.0.1:{server.server_port}/"

        yield serve


# -- the measurement


def write(command: Sequence[str], seed: str, length: int) -> Trial:
    """Runs a host and times its output. Raises `UserError` if the host fails or generates nothing."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"}
    decoder, text, arrived = codecs.getincrementaldecoder("utf-8")("replace"), "", []
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(command, env=environment, **pipes) as process:
            timer = threading.Timer(MAX_SECONDS, process.kill)
            timer.start()
            # Byte by byte: a fast host writes a short text in one piece.
            while data := os.read(process.stdout.fileno(), 1):
                text += decoder.decode(data)
                arrived.append((time.perf_counter() - started, min(len(text) - len(seed), length)))
            process.wait()
            timer.cancel()
        errors.seek(0)
        stderr = errors.read().decode(errors="replace").strip().splitlines()
    new = [(seconds, count) for seconds, count in arrived if count > 0]
    if process.returncode or not text.startswith(seed) or not new or new[-1][1] <= new[0][1]:
        raise UserError(f"{command[0]} wrote no text (exit code {process.returncode}): {' / '.join(stderr[-5:])}")
    (start, first), (end, last) = new[0], next(mark for mark in new if mark[1] == new[-1][1])
    return Trial(arrived[0][0], start, (last - first) / (end - start), text[: len(seed) + length])


def find_hosts(folder: Path, work: Path, serve: Callable[[Path], str]) -> dict[str, Host]:
    """The installed hosts; for the others, prints what is missing."""
    makers = {
        "Python": python,
        "C": c,
        "plain C": plain_c,
        "Node": node,
        "Chromium": partial(chromium, serve=serve),
        "onnxruntime-genai": genai,
        "transformers.js": transformers_js,
    }
    hosts = {}
    for name, make in makers.items():
        try:
            hosts[name] = make(folder, work)
        except MissingError as missing:
            print(f"{name} is skipped: it needs {missing}", file=sys.stderr)
    return hosts


def measure(hosts: Mapping[str, Host], seed: str, length: int, rounds: int) -> dict[str, dict]:
    """Name -> medians over the rounds, sizes in MB, and whether all texts equal Python's."""
    trials: dict[str, list[Trial]] = {name: [] for name in hosts}
    for number in range(1, rounds + 1):
        task = {"seed": seed, "length": length, "temperature": TEMPERATURE, "top_k": TOP_K, "rng_seed": number}
        for name, host in hosts.items():
            trials[name].append(write(host.command(task), seed, length))
            print(f"round {number}, {name}: {trials[name][-1].speed:.0f} characters/s", file=sys.stderr)
    found = {}
    for name, host in hosts.items():
        mine, reference = trials[name], trials["Python"]
        row = {
            key: statistics.median(asdict(trial)[key] for trial in mine) for key in ("seed_seconds", "start", "speed")
        }
        row["to_python"] = statistics.median(a.speed / b.speed for a, b in zip(mine, reference, strict=True))
        row |= {"library_mb": megabytes(host.library), "model_mb": megabytes(host.model)}
        found[name] = row | {"same_text": [trial.text for trial in mine] == [trial.text for trial in reference]}
    return found


def table(found: Mapping[str, Mapping]) -> str:
    """A Markdown table."""
    lines = ["| host | start, s | characters/s | to Python | library, MB | model, MB | ships, MB | Python's text |"]
    lines.append("|" + "---|" * 8)
    for name, each in found.items():
        figures = f"{each['start']:.2f} | {each['speed']:.0f} | {each['to_python']:.2f}"
        sizes = f"{each['library_mb']:.2f} | {each['model_mb']:.2f} | {each['library_mb'] + each['model_mb']:.2f}"
        lines.append(f"| {name} | {figures} | {sizes} | {'yes' if each['same_text'] else 'no'} |")
    return "\n".join(lines)


def compare(options: argparse.Namespace) -> None:
    """Exports the run, measures all hosts and prints the figures."""
    checkpoint = best_checkpoint(options.run)
    text = validation_text(options.run).read_text(encoding="utf-8")
    # A seed that starts with a dash would be read as a flag.
    begin = next((i for i, character in enumerate(text) if character.isalpha()), 0)
    seed = text[begin : begin + SEED_CHARACTERS]
    with tempfile.TemporaryDirectory(prefix="smallm-hosts-") as work, serving() as serve:
        folder = Path(work) / "export"
        manifest = export_checkpoint(checkpoint, folder, allow_loss=True).manifest
        max_length = manifest.block_size - len(manifest.vocabulary.encode(seed))
        if not 2 <= options.length <= max_length:  # other hosts stop at the end of the context
            raise UserError(
                f"--length {options.length} is out of range; with this model it must be from 2 to {max_length}"
            )
        hosts = find_hosts(folder, Path(work), serve)
        found = measure(hosts, seed, options.length, options.rounds)
    print(table(found))
    if "Chromium" in found:
        print(f"Chromium's start includes {found['Chromium']['seed_seconds']:.2f} s for the start of the browser.")
    print(json.dumps({"length": options.length, "rounds": options.rounds, "load": os.getloadavg(), "hosts": found}))


def main(argv: Sequence[str]) -> int:
    """Parses the command line and runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--length", type=int, default=400, metavar="N", help="new characters of each text (default: 400)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="texts of each host (default: 3)")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} is out of range; it must be at least 1")
    return run(compare, options)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
