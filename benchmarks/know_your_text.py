"""Measures time and memory of text statistics, baselines, memorisation and surprisal, each in a separate process.

    python benchmarks/know_your_text.py [--sizes 1MB 100MB] [--text FILE] [--folder DIR] [--model EXPORT] [--only PART]

Texts of these sizes are generated (see big_corpus.py), or are the beginning of --text, which has to be long enough.
Each text is encoded first; then each part runs in a fresh process that opens the encoded text. The memorisation
report searches for 10,000 characters, half of which are copied from the training text. Seconds are processor and wall
time of the part alone, without imports. Memory is the peak resident memory of the process, and the share of the peak
that the part added. "SHA-256" is the time to hash the same file in the same process; the ratio to this time can be
compared between machines. Prints a table, then all figures as one line of JSON.

With --model, a model reads the text as well: compare "surprisal" (with its spans) and "surprisal-page" with
"perplexity" (adjacent windows) and "perplexity-half" (windows that overlap by half). A model of 0.8 M parameters
reads about ten thousand characters per second of processor time, so that 100 MB take hours; select parts with --only.
"""

import argparse
import contextlib
import hashlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from big_corpus import UNITS, make_text

from smallm.cli.surprise import surprise
from smallm.cli.text_file import pieces
from smallm.language_model import LanguageModel
from smallm.surprisal.measure import measure as measure_surprisal
from smallm.surprisal.page import PAGE_CHARACTERS
from smallm.surprisal.spans import SpanFinder
from smallm.training.analysis.baselines import _measure
from smallm.training.analysis.memorisation import measure_memorisation
from smallm.training.analysis.text_statistics import _compute
from smallm.training.config import DataConfig
from smallm.training.data.corpus import Corpus, open_corpus


def memorisation(corpus: Corpus) -> None:
    """Searches for 5,000 characters of the training part and for the same characters in reverse order."""
    training = corpus.vocabulary.decode(corpus.train_ids[:])
    copied = training[10_000:15_000]
    measure_memorisation([copied + copied[::-1]], training, corpus.val_text())


def surprisal(model: LanguageModel, text: Path) -> None:
    """Measures as `infer.py --surprise` does, without printing."""
    finder = SpanFinder(model.vocabulary)
    for part in measure_surprisal(model, pieces(text, "utf-8")):
        finder.add(part)
    finder.finish()


def surprisal_page(model: LanguageModel, text: Path) -> None:
    """Writes the page as well, and prints its bytes per character to stderr."""
    page = text.with_suffix(".html")
    with contextlib.redirect_stdout(io.StringIO()):
        surprise(model, text, "utf-8", max_spans=10, html=page, as_json=False)
    characters = min(PAGE_CHARACTERS, sum(map(len, pieces(text, "utf-8", bar=False))))
    print(
        f"the page: {page.stat().st_size / characters:.1f} bytes for each of {characters:,} characters", file=sys.stderr
    )


PARTS = {"text-statistics": _compute, "baselines": _measure, "memorisation": memorisation}
MODEL_PARTS = {
    "perplexity": lambda model, text: model.perplexity(pieces(text, "utf-8")),
    "perplexity-half": lambda model, text: model.perplexity(pieces(text, "utf-8"), stride=model.block_size // 2),
    "surprisal": surprisal,
    "surprisal-page": surprisal_page,
}


def open_text(text: Path, cache: Path) -> Corpus:
    return open_corpus(DataConfig(str(text)), cache=cache, progress=False)


def measure(part: str, text: Path, given: Path) -> dict:
    """Measures one part in this process.

    given: the cache of encoded texts, or the model for parts that need one.
    """
    started = time.process_time()
    with text.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    hashed = time.process_time() - started
    if part in PARTS:
        run = partial(PARTS[part], open_text(text, given))
    else:
        run = partial(MODEL_PARTS[part], LanguageModel.load(given, threads=1), text)
    before, started, wall = _peak_mb(), time.process_time(), time.perf_counter()
    run()
    seconds = {"cpu_s": time.process_time() - started, "wall_s": time.perf_counter() - wall, "hash_s": hashed}
    return seconds | {"peak_mb": _peak_mb(), "above_mb": _peak_mb() - before}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Measures and prints the table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["1MB", "100MB"], metavar="SIZE", help="sizes of the texts, such as 1MB or 2GB"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="use the beginning of this text")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="an existing folder for the texts (default: the temporary folder)"
    )
    parser.add_argument(
        "--model", type=Path, metavar="EXPORT", help="an export folder, for the parts that need a model"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*PARTS, *MODEL_PARTS], metavar="PART", help="measure these parts only"
    )
    parser.add_argument("--part", nargs=3, metavar=("PART", "TEXT", "GIVEN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part, text, given = args.part
        print(json.dumps(measure(part, Path(text), Path(given))))
        return
    parts = args.only or [*PARTS, *(MODEL_PARTS if args.model else [])]
    rows = []
    print("| text | part | processor, s | wall, s | SHA-256, s | ratio | peak, MB | added, MB |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for size in args.sizes:
            text, cache = Path(folder) / f"{size}.txt", Path(folder) / "cache"
            length = int(float(size[:-2]) * UNITS[size[-2:]])
            if args.text:
                text.write_bytes(args.text.read_bytes()[:length].decode(errors="ignore").encode())
            else:
                make_text(text, length)
            if set(parts) & set(PARTS):
                open_text(text, cache)
            for part in parts:
                command = [sys.executable, __file__, "--part", part, text, cache if part in PARTS else args.model]
                row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                rows.append({"text": size, "part": part} | row)
                print(
                    f"| {size} | {part} | {row['cpu_s']:.2f} | {row['wall_s']:.2f} | {row['hash_s']:.4f} "
                    f"| {row['cpu_s'] / row['hash_s']:,.0f} | {row['peak_mb']:,.0f} | {row['above_mb']:+,.0f} |",
                    flush=True,
                )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
