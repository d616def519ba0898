"""Continues a trained run with a second text, and compares the losses on both texts before and after.

python examples/fine_tune.py runs/shakespeare sonnets.txt --max-steps 200
"""

import argparse
from pathlib import Path

import smallm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the finished run whose best checkpoint is the starting point")
    parser.add_argument("text", help="the new text")
    parser.add_argument("--max-steps", type=int, default=200, help="number of optimiser steps (default: 200)")
    parser.add_argument("--out", help="folder of the new run (default: the next free folder in runs/)")
    args = parser.parse_args()

    old_text = (Path(args.run) / "validation.txt").read_text("utf-8")
    before = smallm.LanguageModel.load(smallm.export(args.run, out=Path(args.run) / "before"))
    run = smallm.train(args.text, out=args.out, train={"init_from": args.run, "max_steps": args.max_steps})
    after = smallm.LanguageModel.load(smallm.export(run))

    new_text = (run.path / "validation.txt").read_text("utf-8")
    for name, text in (("old text", old_text), ("new text", new_text)):
        losses = [model.perplexity(text).nats_per_char for model in (before, after)]
        print(f"{name}: {losses[0]:.4f} nats per character before, {losses[1]:.4f} after")


if __name__ == "__main__":
    main()
