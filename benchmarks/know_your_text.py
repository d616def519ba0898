"""Time and memory of text statistics, baselines, memorisation and surprisal, each in a separate process.

    python benchmarks/know_your_text.py [--sizes 1MB 100MB] [--text FILE] [--folder DIR] [--model EXPORT] [--only PART]

Texts of these sizes are made on the spot (see big_corpus.py), or are the beginning of --text, repeated never: it has to
be long enough. Each is encoded beforehand; then each part runs in a fresh process that opens the encoded text, and the
memorisation report searches for 10,000 characters, half of them copied. Seconds are of processor and of wall time, of
the part alone, without imports; memory is the process's highest resident memory, and how much of that came with the
part. As a reference on a noisy machine, "hash" is the time that SHA-256 of the same file takes in the same process: the
ratio to it compares between machines. Prints a table, then all figures as one line of JSON.

With --model the text is read by a model as well: "perplexity" and "perplexity-half", in windows side by side and
overlapping by half, are what to hold "surprise", with its places, and "surprise-page" against. A model of 0.8 M
parameters reads some ten thousand characters a second of processor time, so 100 MB take hours: --only surprise.
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

from smallm.cli.text_file import pieces
from smallm.language_model import LanguageModel
from smallm.surprisal.measure import measure as measure_surprise
from smallm.surprisal.page import PAGE_CHARACTERS
from smallm.surprisal.spans import SpanFinder
from smallm.surprisal.terminal_view import surprise
from smallm.training.analysis.baselines import _measure
from smallm.training.analysis.memorisation import measure_memorisation
from smallm.training.analysis.text_statistics import _compute
from smallm.training.data.corpus import Corpus, open_corpus


def memorisation(corpus: Corpus) -> None:
    """Of 5,000 characters of the training part and as many that nobody wrote."""
    learnt = corpus.vocabulary.decode(corpus.train_ids[:20_000])[-5000:]
    measure_memorisation(learnt + learnt[::-1], corpus)


def read_for_surprise(model: LanguageModel, text: Path) -> None:
    """As `infer.py --surprise` does, without printing."""
    finder = SpanFinder(model.vocabulary)
    for part in measure_surprise(model, pieces(text, "utf-8")):
        finder.add(part)
    finder.finish()


def write_page(model: LanguageModel, text: Path) -> None:
    """With the page, which says how many bytes it has for each character that it holds."""
    page = text.with_suffix(".html")
    with contextlib.redirect_stdout(io.StringIO()):
        surprise(model, text, "utf-8", most=10, html=page, as_json=False)
    held = min(PAGE_CHARACTERS, sum(map(len, pieces(text, "utf-8", bar=False))))
    print(f"the page: {page.stat().st_size / held:.1f} bytes for each of {held:,} characters", file=sys.stderr)


PARTS = {"text-statistics": _compute, "baselines": _measure, "memorisation": memorisation}
MODEL_PARTS = {
    "perplexity": lambda model, text: model.perplexity(pieces(text, "utf-8")),
    "perplexity-half": lambda model, text: model.perplexity(pieces(text, "utf-8"), stride=model.block_size // 2),
    "surprise": read_for_surprise,
    "surprise-page": write_page,
}


def opened(text: Path, cache: Path) -> Corpus:
    return open_corpus(str(text), min_count=10, val_fraction=0.1, cache=cache, progress=False)


def measure(part: str, text: Path, given: Path) -> dict:
    """Runs in a process of its own; `given` is the cache of encoded texts, or the model for the parts that take one."""
    begun = time.process_time()
    with text.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    hashed = time.process_time() - begun
    if part in PARTS:
        run = partial(PARTS[part], opened(text, given))
    else:
        run = partial(MODEL_PARTS[part], LanguageModel.load(given, threads=1), text)
    before, begun, wall = _peak_mb(), time.process_time(), time.perf_counter()
    run()
    seconds = {"cpu_s": time.process_time() - begun, "wall_s": time.perf_counter() - wall, "hash_s": hashed}
    return seconds | {"peak_mb": _peak_mb(), "above_mb": _peak_mb() - before}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1MB", "100MB"], help="such as 1MB or 2GB")
    parser.add_argument("--text", type=Path, help="a text to take the beginnings of")
    parser.add_argument("--folder", type=Path, help="for texts and encoded texts; default: a temporary one")
    parser.add_argument("--model", type=Path, help="an export folder, for the parts that read with a model")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *MODEL_PARTS], metavar="PART", help="measure only these")
    parser.add_argument("--part", nargs=3, metavar=("PART", "TEXT", "GIVEN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part, text, given = args.part
        print(json.dumps(measure(part, Path(text), Path(given))))
        return
    parts = args.only or [*PARTS, *(MODEL_PARTS if args.model else [])]
    rows = []
    print("| text | part | processor, s | wall, s | SHA-256 of it, s | ratio | peak, MB | of which by it |")
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
                opened(text, cache)
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
