"""Finds typing errors: prints the words of a text that surprise a model most, with their line numbers.

python examples/typos.py runs/english letter.txt --count 10
"""

import argparse
import re
from pathlib import Path

import numpy as np

import smallm
from smallm.surprisal.measure import Measured, measure


def surprising_words(lm: smallm.LanguageModel, text: str, count: int) -> list[tuple[float, int, str]]:
    """The surprisal in nats, the line number from 1 and the word, the most surprising first.

    The surprisal of a word is that of its most surprising character. The character after the word counts as well: it
    shows that a letter is missing at the end.
    """
    if not text:
        return []
    nats = np.nan_to_num(Measured.join(list(measure(lm, [text]))).nats)  # (len(text),); the first is NaN
    words = [
        (float(nats[word.start() : word.end() + 1].max()), text.count("\n", 0, word.start()) + 1, word[0])
        for word in re.finditer(r"\w+", text)
    ]
    return sorted(words, key=lambda word: -word[0])[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported run of texts like this one, an export folder or an .onnx file")
    parser.add_argument("text", help="the text file (UTF-8)")
    parser.add_argument("--count", type=int, default=10, help="number of words (default: 10)")
    args = parser.parse_args()

    text = Path(args.text).read_text(encoding="utf-8")
    with smallm.LanguageModel.load(args.model) as lm:
        for nats, line, word in surprising_words(lm, text, args.count):
            print(f"{args.text}:{line}: {word} ({nats:.1f} nats)")


if __name__ == "__main__":
    main()
