"""Measures where the time of a character goes, with ONNX Runtime's profiler: microseconds per type of node.

    python benchmarks/profile_nodes.py runs/shakespeare/export/model.onnx [--length 400] [--threads 1]

The profiler adds a few microseconds per node. Therefore the same steps are timed without the profiler first, and the
figures of short nodes are upper bounds. Prints a table.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from smallm.cli.main import run
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session
from smallm.language_model import find_model

WARM_UP = 20  # steps


def write(session: Session, length: int) -> float:
    """Seconds for `length` greedy steps from an empty cache."""
    cache, id = KVCache(session), np.array([session.manifest.vocabulary.encode(session.manifest.start_text)[0]])
    started = time.perf_counter()
    for _ in range(length):
        id[0] = cache.decode_batch(id)[0].argmax()
    return time.perf_counter() - started


def open_profiled(session: Session, path: Path, folder: Path) -> ort.InferenceSession:
    """Replaces the session that generates by one with the profiler switched on, and returns it."""
    options = session._session.get_session_options()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session._open = lambda threads: ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session._session = session._open(session.threads)
    return session._session


def microseconds(events: list[dict]) -> dict[str, list[float]]:
    """Type of node -> microseconds of each of its runs."""
    durations = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["args"]["op_name"]].append(event["dur"])
    return durations


def main(argv: Sequence[str]) -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="an export folder or an .onnx file")
    parser.add_argument("--length", type=int, default=400, help="characters to generate (default: 400)")
    parser.add_argument("--threads", type=int, help="threads (default: chosen by the size of the model)")
    options = parser.parse_args(argv)
    path = find_model(options.model)
    session = Session(path, options.threads)
    length = min(options.length, session.manifest.block_size)
    write(session, WARM_UP)
    plain = min(write(session, length) for _ in range(5)) / length * 1e6
    with tempfile.TemporaryDirectory() as folder:
        profiled = open_profiled(session, path, Path(folder))
        write(session, length)
        kinds = microseconds(json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8")))
    total = sum(map(sum, kinds.values())) / length
    print(f"{plain:.1f} microseconds per character without the profiler, best of five; {total:.1f} in nodes with it")
    print(f"{'node':<34}{'per step':>10}{'each, us':>10}{'step, us':>12}{'share':>8}")
    for kind, each in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        step = sum(each) / length
        print(f"{kind:<34}{len(each) / length:>10.0f}{np.median(each):>10.1f}{step:>12.1f}{step / total:>8.0%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
