"""The C kit beside Python, turn by turn on the same cores: start-up and characters per second of processor time.

    python benchmarks/c_speed.py --program KIT/generate --model KIT/model.onnx [--characters 2000] [--rounds 5]

Whole processes on one thread, in seconds of processor time, which other work on the machine hardly changes. Start-up is
that of a process that writes a single character; the speed comes from what a longer text takes more. C runs twice, with
and without ORT_GQA_DISABLE_FLASH_ATTENTION, which Python's session always sets. Medians, ratios to Python in the same
round, and whether the texts are the same. Prints a table, then all figures as one line of JSON.
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
    """Name -> command without its length, and environment."""
    writing = ["--seed", "The ", "--rng-seed", "1", "--overflow", "shift", "--max-length"]
    c = [str(program.resolve()), str(model), "--threads", "1", *writing]
    python = [sys.executable, str(ROOT / "infer.py"), "--model", str(model), *writing]
    return {"Python": (python, {}), "C": (c, {FLASH: "1"}), "C, flash attention": (c, {FLASH: "0"})}


def processor_seconds(command: Sequence[str], environment: Mapping[str, str], length: int) -> tuple[float, bytes]:
    """Of a whole process, and what it wrote."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, str(length)], capture_output=True, env=os.environ | environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout.rstrip(b"\n")


def measure(program: Path, model: Path, characters: int, rounds: int) -> dict[str, dict]:
    """Name -> medians over the rounds, and whether the text is Python's."""
    commands = hosts(program, model)
    found = {name: {"start": [], "speed": [], "ratio": []} for name in commands}
    texts: dict[str, bytes] = {}
    for _ in range(rounds):
        for name, (command, environment) in commands.items():
            start, _text = processor_seconds(command, environment, 1)
            whole, texts[name] = processor_seconds(command, environment, characters)
            found[name]["start"].append(start)
            found[name]["speed"].append((characters - 1) / max(whole - start, 1e-9))
        for each in found.values():
            each["ratio"].append(each["speed"][-1] / found["Python"]["speed"][-1])
    return {
        name: {what: statistics.median(values) for what, values in each.items()}
        | {"same_text": texts[name] == texts["Python"]}
        for name, each in found.items()
    }


def main(argv: Sequence[str]) -> int:
    """Measures, and prints the table and the JSON line."""
    parser = argparse.ArgumentParser(prog="c_speed.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--program", type=Path, required=True, help="`generate` of a C kit")
    parser.add_argument("--model", type=Path, required=True, help="the model.onnx of the kit")
    parser.add_argument("--characters", type=int, default=2000, metavar="N", help="of each text (default: 2000)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    options = parser.parse_args(argv)
    found = measure(options.program, options.model, options.characters, options.rounds)
    print(f"{'':20}{'start, s':>10}{'chars/s':>10}{'to Python':>11}  same text")
    for name, each in found.items():
        print(f"{name:20}{each['start']:10.3f}{each['speed']:10.0f}{each['ratio']:11.2f}  {each['same_text']}")
    print(json.dumps({"characters": options.characters, "rounds": options.rounds, "hosts": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
