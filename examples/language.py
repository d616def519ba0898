"""Detects the language of a text: the model that predicts the text best was trained on its language.

echo "Guten Morgen" | python examples/language.py english=runs/english german=runs/german
"""

import argparse
import sys

import smallm


def named_path(word: str) -> tuple[str, str]:
    name, equals, path = word.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{word!r} must be NAME=PATH, such as german=runs/german")
    return name, path


def bits_per_char(path: str, text: str) -> float:
    """Characters are the same for all models, whatever their vocabularies are, so the figures can be compared."""
    with smallm.LanguageModel.load(path) as lm:
        return lm.perplexity(text).bits_per_char


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=named_path, metavar="NAME=PATH", help="exported runs and their names")
    args = parser.parse_args()

    text = sys.stdin.read()
    ranking = sorted((bits_per_char(path, text), name) for name, path in args.models)
    for bits, name in ranking:
        print(f"{name}: {bits:.3f} bits per character")
    print(f"The text is {ranking[0][1]}.")


if __name__ == "__main__":
    main()
