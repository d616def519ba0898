"""Compares smallm.c with plain.c, a program of straightforward loops in the manner of llama2.c, on one thread.

    python benchmarks/plain.py FP32.onnx [INT8.onnx] [--length 512] [--rounds 7] [--onnxruntime]

plain.c gets -O3 -march=native -ffast-math; smallm.c is built as its Makefile does. With --onnxruntime, infer.py
generates the texts too, on ONNX Runtime, with the draft table beside each model. All generate the same texts. Each
round runs all programs in turn, as whole processes, for one character and for --length more; the difference of the
processor times gives the characters per second. Prints medians, the ratios within a round with their range, and
whether the texts of fp32 are equal, then all figures as one line of JSON.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

HERE = Path(__file__).resolve().parent
ENGINE = HERE.parent / "smallm" / "embed" / "c"
SEED = "The quick brown "


def build_plain(model: Path, folder: Path) -> list[str]:
    """Builds plain.c and writes the weights of an fp32 model for it; returns the command without flags."""
    program, weights = folder / "plain", folder / "weights.bin"
    flags = ["-O3", "-march=native", "-ffast-math"]
    subprocess.run(["cc", *flags, HERE / "plain.c", "-lm", "-o", program], check=True)
    weights.write_bytes(_weights(onnx.load(model)))
    return [str(program), str(weights)]


def _weights(proto: onnx.ModelProto) -> bytes:
    """The sizes, weights and tokens in the order in which plain.c reads them; matrices become (outputs, inputs)."""
    manifest = {entry.key.removeprefix("smallm."): json.loads(entry.value) for entry in proto.metadata_props}
    data = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    layers, table = manifest["n_layer"], "qkv_table" in data
    names = ["wte.weight", *["qkv_table"] * table]
    for i in range(layers):
        first = [] if table and i == 0 else ["ln_1.weight", "attn.qk_gain", "attn.c_attn.weight_t"]
        rest = ["attn.c_proj.weight_t", "ln_2.weight", "mlp.c_fc.weight_t", "mlp.c_proj.weight_t"]
        names += [f"h.{i}.{name}" for name in first + rest]
    names += ["ln_f.weight", "cos_cache", "sin_cache"]
    keys = ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "vocab_size", "block_size")
    sizes = [manifest[key] for key in keys]
    parts = [np.array([*sizes, len(data["h.0.mlp.c_proj.weight_t"]), table], np.int32).tobytes()]
    for name in names:
        weights = data[name].T if name.endswith("_t") else data[name]
        parts.append(np.ascontiguousarray(weights, np.float32).tobytes())
    tokens = [bytes([i]) for i in range(256)] + [bytes.fromhex(word) for word in manifest["tokens"].split()]
    return b"".join([*parts, *(bytes([len(token)]) + token.ljust(4, b"\0") for token in tokens)])


def generate(command: Sequence[str], length: int, rng_seed: int) -> tuple[bytes, float]:
    """The text of a process and its processor time in seconds."""
    flags = {"seed": SEED, "max-length": length, "temperature": 0.8, "top-k": 40, "rng-seed": rng_seed}
    argv = [*command, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = subprocess.run(argv, capture_output=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return text, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: Sequence[str]) -> int:
    """Builds and measures the programs and prints the figures."""
    parser = argparse.ArgumentParser(prog="plain.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", type=Path, nargs="+", help="a model.onnx in fp32, then others of the same shape")
    parser.add_argument("--length", type=int, default=512, help="new characters after the first (default: 512)")
    parser.add_argument("--onnxruntime", action="store_true", help="also measure infer.py, on ONNX Runtime")
    parser.add_argument("--rounds", type=int, default=7, help="texts of each program (default: 7)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="smallm-") as work:
        program = Path(work) / "smallm_generate"
        sources = [ENGINE / "smallm.c", ENGINE / "main.c"]
        subprocess.run(["cc", "-O2", *sources, "-lm", "-o", program], check=True)
        commands = {"plain.c": build_plain(options.model[0], Path(work))}
        commands |= {f"smallm.c {model}": [str(program), str(model)] for model in options.model}
        if options.onnxruntime:
            infer = [sys.executable, str(HERE.parent / "infer.py"), "--threads", "1", "--model"]
            commands |= {f"infer.py {model}": [*infer, str(model)] for model in options.model}
        speeds: dict[str, list[float]] = {name: [] for name in commands}
        texts: dict[str, list[bytes]] = {name: [] for name in commands}
        for rng_seed in range(options.rounds):
            for name, command in commands.items():
                _, start = generate(command, 1, rng_seed)
                text, whole = generate(command, 1 + options.length, rng_seed)
                speeds[name].append(options.length / max(whole - start, 1e-6))
                texts[name].append(text.rstrip(b"\n"))
    found = {}
    for name in commands:
        ratios = [mine / plain for mine, plain in zip(speeds[name], speeds["plain.c"], strict=True)]
        equal = sum(a == b.rstrip(b"\n") for a, b in zip(texts[name], texts["plain.c"], strict=True))
        found[name] = {"speed": statistics.median(speeds[name]), "to_plain": statistics.median(ratios),
                       "range": [min(ratios), max(ratios)], "equal_texts": equal}  # fmt: skip
        print(f"{name}: {found[name]['speed']:.0f} characters/s, {found[name]['to_plain']:.2f} times plain.c "
              f"({min(ratios):.2f} to {max(ratios):.2f}), {equal} of {options.rounds} texts equal")  # fmt: skip
    print(json.dumps({"length": options.length, "rounds": options.rounds, "programs": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
