"""Invents names: trains a small model on a list of names, and prints new names that are not in the list.

python examples/names.py names.txt --count 20
"""

import argparse
import random
from pathlib import Path

import smallm

ROUNDS = 20  # of `count` names each; a model that knows the list by heart finds no new name in them


def train(names: list[str], max_steps: int, out: Path) -> smallm.LanguageModel:
    """A model of 2 layers of width 64, which read the names in random order: the last tenth is the validation part."""
    out.mkdir(parents=True)
    text = out / "shuffled.txt"
    text.write_text("\n".join([*random.Random(1).sample(names, len(names)), ""]), encoding="utf-8")
    model = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64}
    run = smallm.train(text, out=out / "run", model=model, train={"max_steps": max_steps})
    print(f"{run.path}: {run.val_loss:.4f} nats per character")
    return smallm.LanguageModel.load(smallm.export(run))


def new_names(lm: smallm.LanguageModel, known: set[str], count: int) -> list[str]:
    """At most `count` different names that are not known."""
    longest, found = max(map(len, known)), dict[str, None]()
    for rng_seed in range(ROUNDS):
        for text in lm.generate_many(["\n"] * count, longest + 1, stop="\n", rng_seed=rng_seed):
            name = text.strip()
            if name and len(name) <= longest and name not in known:  # a longer one may be cut off
                found[name] = None
        if len(found) >= count:
            break
    return list(found)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", help="a UTF-8 text file with one name per line")
    parser.add_argument("--count", type=int, default=20, help="number of new names (default: 20)")
    parser.add_argument("--max-steps", type=int, default=400, help="number of optimiser steps (default: 400)")
    parser.add_argument("--out", default="runs/names", help="a new folder for the run (default: runs/names)")
    args = parser.parse_args()

    if Path(args.out).exists():
        parser.error(f"{args.out} exists; name a new folder with --out")
    lines = Path(args.names).read_text(encoding="utf-8").splitlines()
    known = {line.strip() for line in lines if line.strip()}
    with train(sorted(known), args.max_steps, Path(args.out)) as lm:
        print(*new_names(lm, known, args.count), sep="\n")


if __name__ == "__main__":
    main()
