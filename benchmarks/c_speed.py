"""Compares start-up and characters per second of the C kit with Python, turn by turn on the same cores.

    python benchmarks/c_speed.py --program KIT/generate --model KIT/model.onnx [--characters 2000] [--rounds 5]

Each measurement is a whole process on one thread, in seconds of processor time, which other work on the machine
hardly changes. Start-up is the time of a process that writes one character; the speed follows from the additional
time of a longer text. The C program runs twice, with and without ORT_GQA_DISABLE_FLASH_ATTENTION, which smallm's
Python runtime always sets. Prints medians, the ratio to Python in the same round, and whether the texts are equal, as
a table and then as one line of JSON.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"


def hosts(program: Path, model: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name -> command without the number of characters, and additional environment variables."""
    task = ["--seed", "The ", "--rng-seed", "1", "--overflow", "shift", "--max-length"]
    c = [str(program.resolve()), str(model), "--threads", "1", *task]
    python = [sys.executable, str(ROOT / "infer.py"), "--model", str(model), *task]
    return {"Python": (python, {}), "C": (c, {FLASH: "1"}), "C, flash attention": (c, {FLASH: "0"})}


def processor_seconds(command: Sequence[str], environment: Mapping[str, str], length: int) -> tuple[float, bytes]:
    """Processor seconds of a whole process, and its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run([*command, str(length)], capture_output=True, env=os.environ | environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, finished.stdout.rstrip(b"\n")


def measure(program: Path, model: Path, characters: int, rounds: int) -> dict[str, dict]:
    """Name -> medians over the rounds, and whether the text equals Python's."""
    commands = hosts(program, model)
    results = {name: {"start": [], "speed": [], "ratio": []} for name in commands}
    texts: dict[str, bytes] = {}
    for _ in range(rounds):
        for name, (command, environment) in commands.items():
            start, _text = processor_seconds(command, environment, 1)
            whole, texts[name] = processor_seconds(command, environment, characters)
            results[name]["start"].append(start)
            results[name]["speed"].append((characters - 1) / max(whole - start, 1e-9))
        for result in results.values():
            result["ratio"].append(result["speed"][-1] / results["Python"]["speed"][-1])
    return {
        name: {key: statistics.median(values) for key, values in result.items()}
        | {"same_text": texts[name] == texts["Python"]}
        for name, result in results.items()
    }


def main(argv: Sequence[str]) -> int:
    """Measures and prints the table and the line of JSON."""
    parser = argparse.ArgumentParser(prog="c_speed.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--program", type=Path, required=True, help="the program `generate` of a C kit")
    parser.add_argument("--model", type=Path, required=True, help="the model.onnx of the kit")
    parser.add_argument("--characters", type=int, default=2000, metavar="N", help="length of each text (default: 2000)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each program (default: 5)")
    options = parser.parse_args(argv)
    results = measure(options.program, options.model, options.characters, options.rounds)
    print(f"{'':20}{'start, s':>10}{'chars/s':>10}{'to Python':>11}  same text")
    for name, row in results.items():
        print(f"{name:20}{row['start']:10.3f}{row['speed']:10.0f}{row['ratio']:11.2f}  {row['same_text']}")
    print(json.dumps({"characters": options.characters, "rounds": options.rounds, "hosts": results}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
