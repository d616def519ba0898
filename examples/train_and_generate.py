"""Trains a model on a text, exports it, and generates from it, all from Python.

python examples/train_and_generate.py my.txt --minutes 2
"""

import argparse

import smallm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a text file, a folder of .txt files, or a built-in name such as python-docs")
    parser.add_argument("--minutes", type=float, default=1.0, help="time for training (default: 1)")
    parser.add_argument("--out", help="run folder (default: the next free folder in runs/)")
    parser.add_argument("--seed", default="The ", help="the text that the model continues (default: 'The ')")
    args = parser.parse_args()

    run = smallm.train(args.text, minutes=args.minutes, out=args.out)
    print(f"{run.path}: {run.val_loss:.4f} nats per character after {run.step} steps")

    folder = smallm.export(run)
    with smallm.LanguageModel.load(folder) as lm:
        for text in lm.stream(args.seed, max_length=300, temperature=0.8, rng_seed=1):
            print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
