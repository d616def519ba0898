"""Where the time of a character goes, by ONNX Runtime's own profiler: microseconds of each kind of node.

    python benchmarks/profile_nodes.py runs/shakespeare/export/model.onnx [--length 400] [--threads 1]

The profiler itself costs a few microseconds a node, so the same steps are timed without it first, and what it measures
of the smallest kind of node is no more than an upper bound. Prints a table.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from smallm.cli.main import run
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session
from smallm.language_model import find_model

WARM_UP = 20  # steps


def write(session: Session, length: int) -> float:
    """Seconds for so many steps from an empty cache, greedily."""
    cache, id = KVCache(session), np.array([session.manifest.vocabulary.encode(session.manifest.start_text)[0]])
    begun = time.perf_counter()
    for _ in range(length):
        id[0] = cache.decode_batch(id)[0].argmax()
    return time.perf_counter() - begun


def profiled(session: Session, path: Path, folder: Path) -> ort.InferenceSession:
    """The session that generates, opened again with the profiler on."""
    options = session._session.get_session_options()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session._open = lambda threads: ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session._session = session._open(session.threads)
    return session._session


def microseconds(events: list[dict]) -> dict[str, list[float]]:
    """Kind of node -> the microseconds of each of its runs."""
    found = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["args"]["op_name"]].append(event["dur"])
    return found


def main(argv: Sequence[str]) -> int:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(argv)
    path = find_model(options.model)
    session = Session(path, options.threads)
    length = min(options.length, session.manifest.block_size)
    write(session, WARM_UP)
    plain = min(write(session, length) for _ in range(5)) / length * 1e6
    with tempfile.TemporaryDirectory() as folder:
        profile = profiled(session, path, Path(folder))
        write(session, length)
        kinds = microseconds(json.loads(Path(profile.end_profiling()).read_text(encoding="utf-8")))
    total = sum(map(sum, kinds.values())) / length
    print(f"{plain:.1f} microseconds a character without the profiler, the best of five; with it {total:.1f} in nodes")
    print(f"{'node':<34}{'in a step':>10}{'each, us':>10}{'a step, us':>12}{'share':>8}")
    for kind, each in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        step = sum(each) / length
        print(f"{kind:<34}{len(each) / length:>10.0f}{np.median(each):>10.1f}{step:>12.1f}{step / total:>8.0%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
