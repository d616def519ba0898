"""Measures generation past block_size: bits per character and speed of `crop` and `shift`, and a million characters.

    python benchmarks/long_text.py --model runs/shakespeare --text validation.txt

Prints three tables: speed and memory of a process that generates a million characters with `shift`; characters per
second within and past block_size, for both ways; bits per character by position in a text that is read from its
beginning, for both ways, where each prediction has the context that generation has at this position. A model with an
attention window is measured with `slide`. Long at the defaults: reduce --characters and --samples for a quick look.
"""

import argparse
import math
import resource
import sys
import time
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from smallm import LanguageModel
from smallm.generation.batch import MAX_STREAMS
from smallm.inference.kv_cache import KVCache
from smallm.inference.scoring import IGNORED, nats

WINDOWS = 32  # per batch


def context(position: int, block_size: int, overflow: str) -> int:
    """Number of ids that the model sees when it predicts the id at this position, counted from 1."""
    if position <= block_size or overflow == "crop":
        return min(position, block_size)
    half = max(1, block_size // 2)
    return half + (position - block_size - 1) % (block_size - half + 1)


def bits(lm: LanguageModel, ids: np.ndarray, ends: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """Bits (n,) of the ids at the indices `ends` (n,), each predicted from the `contexts` (n,) ids before it."""
    result = np.empty(len(ends))
    by_context = np.argsort(contexts, kind="stable")
    for some in np.array_split(by_context, max(1, len(ends) // WINDOWS)):
        T = contexts[some].max()
        rows = np.zeros((len(some), T + 1), np.int64)
        targets = np.full((len(some), T), IGNORED)
        for row, n, end in zip(range(len(some)), contexts[some], ends[some], strict=True):
            rows[row, : n + 1] = ids[end - n : end + 1]
            targets[row, n - 1] = ids[end]
        result[some] = nats(lm._session.logits(rows[:, :-1]), targets).sum(axis=1)
    return result / math.log(2)


def curve(lm: LanguageModel, text: str, samples: int) -> None:
    """Prints bits per character by position: means over the same characters, with a different beginning in each row."""
    ids, size, rng = lm.vocabulary.encode(text).astype(np.int64), lm.block_size, np.random.default_rng(0)
    ends = rng.integers(size + 1, len(ids), samples)
    whole = bits(lm, ids, ends, np.full(samples, size))
    edges = [1, *(size * k // 8 for k in (1, 2, 4, 8, 10, 12, 14, 16, 20, 24, 32))]
    print(f"\n{'positions':>13} {'crop':>8} {'shift':>8} {'shift - crop':>17}   (bits per character)")
    for first, last in pairwise(edges):
        positions = rng.integers(first, last, samples) + 1
        crop, shift = (np.array([context(p, size, way) for p in positions]) for way in ("crop", "shift"))
        crop = whole if first >= size else bits(lm, ids, ends, crop)
        shift = crop if first < size else bits(lm, ids, ends, shift)
        difference = f"{(shift - crop).mean():.4f} ± {(shift - crop).std() / samples**0.5:.4f}"
        print(f"{first + 1:>5} - {last:<5} {crop.mean():8.4f} {shift.mean():8.4f} {difference:>17}", flush=True)
    strided = lm.perplexity(text, stride=size - size // 2).bits_per_char
    print(
        f"the whole text: adjacent windows {lm.perplexity(text).bits_per_char:.4f}, overlapping by half {strided:.4f}"
    )


def sliding(lm: LanguageModel, text: str, samples: int) -> None:
    """Prints bits per character by position for a model with an attention window, on a batch of texts."""
    ids, size = lm.vocabulary.encode(text).astype(np.int64), lm.block_size
    begins = np.random.default_rng(0).integers(0, len(ids) - 4 * size - 1, samples)
    cache, bits_at = KVCache(lm._session, samples), np.empty((4 * size, samples))
    for t in range(4 * size):
        for stream in np.flatnonzero(cache.lengths == size):
            cache.slide(stream)
        logits = cache.decode_batch(ids[begins + t])[:, None]
        bits_at[t] = nats(logits.copy(), ids[begins + t + 1][:, None])[:, 0] / math.log(2)
    print(f"\n{'positions':>13} {'slide':>8}   (bits per character)")
    for first, last in pairwise([1, *(size * k // 8 for k in (1, 2, 4, 8, 16, 24, 32))]):
        print(f"{first + 1:>5} - {last:<5} {bits_at[first:last].mean():8.4f}", flush=True)
    print(f"the whole text, adjacent windows: {lm.perplexity(text).bits_per_char:.4f}")


def speed(lm: LanguageModel) -> None:
    """Prints characters per second within block_size and past it."""
    size, ways = lm.block_size, ["crop", "shift"] + ["slide"] * (lm.metadata.window > 0)
    print(f"\n{'positions':>12}" + "".join(f"{way:>9}" for way in ways) + "   (characters per second, medians of 3)")
    for first, length in ((1, size - 1), (2 * size, size // 2)):
        rates = {way: [] for way in ways}
        for _ in range(3):
            for overflow, measured in rates.items():
                stream = lm.stream("\n" * first, length + 1, overflow=overflow, rng_seed=1, temperature=0.8, top_k=40)
                next(stream)
                started = time.perf_counter()
                n = sum(len(chunk) for chunk in stream)
                measured.append(n / (time.perf_counter() - started))
        print(
            f"{first:>5} - {first + length:<5}" + "".join(f"{np.median(measured):9.0f}" for measured in rates.values())
        )


def endless(lm: LanguageModel, characters: int) -> None:
    """Prints speed and peak memory while one text grows, with `shift` or `slide`."""
    print(f"\n{'characters':>12} {'per second':>10} {'peak RSS, MB':>12}")
    way = "slide" if lm.metadata.window else "shift"
    stream = lm.stream("\n", characters, overflow=way, rng_seed=1, temperature=0.8, top_k=40)
    generated = 0
    while generated < characters:
        started = time.perf_counter()
        n = sum(len(chunk) for chunk in islice(stream, characters // 10))
        generated += n
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{generated:>12,} {n / (time.perf_counter() - started):>10.0f} {memory:>12.1f}", flush=True)


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run, an export folder or an .onnx file")
    parser.add_argument("--text", required=True, type=Path, help="a text that the model was not trained on")
    parser.add_argument(
        "--samples", type=int, default=1024, help="predicted characters per row of the third table (default: 1024)"
    )
    parser.add_argument(
        "--characters", type=int, default=1_000_000, help="length of the long text (default: 1,000,000)"
    )
    parser.add_argument("--threads", type=int, help="threads (default: chosen by the size of the model)")
    options = parser.parse_args()
    lm = LanguageModel.load(options.model, threads=options.threads)
    print(f"block_size {lm.block_size}, {lm.metadata.n_layer} x {lm.metadata.n_embd}, {lm.metadata.precision}")
    endless(lm, options.characters)
    speed(lm)
    text = options.text.read_text(encoding="utf-8")
    if lm.metadata.window:
        sliding(lm, text, min(options.samples, MAX_STREAMS))
    else:
        curve(lm, text, options.samples)


if __name__ == "__main__":
    sys.exit(main())
