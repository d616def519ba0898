"""`infer.py`: generate text from a seed, or measure a model on a text. Starts fast: argparse, numpy, onnxruntime."""

import argparse
import io
import json
import re
import secrets
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from smallm.cli import text_file
from smallm.cli.arguments import ArgumentParser
from smallm.errors import UserError
from smallm.runs.layout import newest_run, validation_text

EXAMPLES = """\
examples:
  python infer.py --seed "O God, O God!"
  python infer.py --model runs/shakespeare --seed "ROMEO:" --max-length 500 --temperature 0.8 --top-k 40
  python infer.py --seed "Anna" --stop "\\n" --num-samples 5
  python infer.py --interactive
  python infer.py --perplexity my.txt    (without a file: on the run's own validation text)
  python infer.py --surprise my.txt --html surprise.html"""
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}  # what may be written in --stop, --allow and --ban


def main(argv: Sequence[str]) -> int:
    """Runs `infer.py` with these arguments; text and figures go to stdout, in UTF-8, all else to stderr."""
    options = _parser().parse_args(argv)
    if options.interactive:
        _check_interactive(options)
    if isinstance(sys.stdout, io.TextIOWrapper):  # the model's characters need not be in the locale's encoding
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    if options.html is not None and options.surprise is None:
        raise UserError("--html goes with --surprise FILE")
    from smallm.language_model import LanguageModel  # after argparse, so that --help and mistakes are instant

    path = options.model
    if path is None:
        path = newest_run()
        print(f"model: {path}", file=sys.stderr)
    model = LanguageModel.load(path, threads=options.threads)
    if options.perplexity is not None:
        _perplexity(model, Path(options.perplexity) if options.perplexity else validation_text(Path(path)), options)
    elif options.surprise is not None:
        from smallm.cli.surprise import surprise

        page = Path(options.html) if options.html else None
        surprise(model, Path(options.surprise), options.encoding, options.spans, page, options.json)
    elif options.next is not None:
        _next_characters(model, options)
    elif options.interactive:
        from smallm.cli.repl import run_repl

        run_repl(model, options.seed, _chosen(options), options.stream)
    else:
        _generate(model, options)
    print(end="", flush=True)  # a reader who has gone (head) is noticed here, not when Python shuts down
    return 0


def _generate(model, options: argparse.Namespace) -> None:
    if options.num_samples < 1:
        raise UserError(f"--num-samples {options.num_samples} is out of range; it must be 1 or more")
    rng_seed = secrets.randbits(32) if options.rng_seed is None else options.rng_seed
    chosen = _chosen(options) | {"rng_seed": rng_seed}
    pieces = model.stream_many([options.seed] * options.num_samples, logprobs=options.json, **chosen)
    if options.json:
        samples = [{"new_text": "", "logprobs": []} for _ in range(options.num_samples)]
        for piece in pieces:
            samples[piece.number]["new_text"] += piece.text
            samples[piece.number]["logprobs"] += [round(value, 6) for value in piece.logprobs]
        samples = [{"text": options.seed + sample["new_text"], **sample} for sample in samples]
        print(json.dumps({"seed": options.seed, **chosen, "samples": samples}, ensure_ascii=False))
        return
    print(options.seed, end="", flush=options.stream)
    shown = 0
    for number, text in _in_order(pieces):
        if number > shown:
            print("\n" + "-" * 40 + "\n" + options.seed, end="")
            shown = number
        print(text, end="", flush=options.stream)
    print()
    if options.rng_seed is None:
        print(f"again with: --rng-seed {rng_seed}", file=sys.stderr)


def _chosen(options: argparse.Namespace) -> dict:
    """The options of generation that were given, as `LanguageModel` takes them."""
    chosen = {
        "max_length": options.max_length, "temperature": options.temperature, "top_k": options.top_k,
        "top_p": options.top_p, "min_p": options.min_p, "repetition_penalty": options.repetition_penalty,
        "repetition_window": options.repetition_window, "allowed": unescaped(options.allow),
        "banned": unescaped(options.ban), "stop": [unescaped(stop) for stop in options.stop],
        "min_length": options.min_length, "overflow": options.overflow, "rng_seed": options.rng_seed,
    }  # fmt: skip
    return {name: value for name, value in chosen.items() if value is not None}


def _in_order(pieces: Iterator) -> Iterator[tuple[int, str]]:
    """One text after the other, each as it comes or, as far as it was written beside those before it, at its turn."""
    held, ended, current = defaultdict(list), set(), 0
    for piece in pieces:
        held[piece.number].append(piece.text)
        if piece.last:
            ended.add(piece.number)
        while current in held:
            yield current, "".join(held.pop(current))
            if current in ended:
                current += 1


def _check_interactive(options: argparse.Namespace) -> None:
    given = {"--json": options.json, "--num-samples": options.num_samples != 1, "--next": options.next is not None,
             "--perplexity": options.perplexity is not None}  # fmt: skip
    for name, is_given in given.items():
        if is_given:
            raise UserError(f"--interactive does not go with {name}; leave out one of them")


def _next_characters(model, options: argparse.Namespace) -> None:
    if options.next < 1:
        raise UserError(f"--next {options.next} is out of range; it must be 1 or more")
    found = model.next_characters(options.seed, options.next)
    if options.json:
        values = [{"character": character, "probability": round(p, 9)} for character, p in found]
        print(json.dumps({"seed": options.seed, "next": values}, ensure_ascii=False))
        return
    for character, p in found:
        print(f"{p:.6f}  {json.dumps(character, ensure_ascii=False)}")


def unescaped(text: str | None) -> str | None:
    """The text with its \\n, \\t, \\r and \\\\ as the characters that they stand for."""
    return text and re.sub(r"\\([ntr\\])", lambda match: ESCAPES[match[1]], text)


def _perplexity(model, path: Path, options: argparse.Namespace) -> None:
    result = asdict(model.perplexity(text_file.pieces(path, options.encoding), stride=options.stride))
    if options.json:
        print(json.dumps({"file": str(path), **result}))
    else:
        print(
            f"{result['nats_per_char']:.4f} nats per character (cross-entropy), {result['bits_per_char']:.4f} bits per "
            f"character, perplexity {result['perplexity']:.4f}, over {result['characters']:,} characters"
        )


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="infer.py",
        description="Generates text with an exported model, or measures it on a text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", "--model_path", metavar="PATH", help="run, export folder or .onnx file; default: the newest run")
    add("--seed", "--seed_string", default="", metavar="TEXT", help="text to go on from (--seed=-x if with a dash)")
    add("--max-length", "--max_length", type=int, default=500, metavar="N", help="new characters (default: 500)")
    add("--temperature", type=float, metavar="T", help="0 = always the likeliest character (default: the model's)")
    add("--top-k", "--top_k", type=int, metavar="K", help="choose from the K likeliest; 0 = all")
    add("--top-p", "--top_p", type=float, metavar="P", help="choose from the likeliest that make up this probability")
    add("--min-p", "--min_p", type=float, metavar="P", help="least probability, relative to the likeliest")
    add("--repetition-penalty", "--repetition_penalty", type=float, metavar="R",
        help="above 1: what came up lately gets less likely (1 = off)")  # fmt: skip
    add("--repetition-window", "--repetition_window", type=int, metavar="N",
        help="how many of the last ids that looks at; 0 = block_size")  # fmt: skip
    add("--allow", metavar="CHARS", help="write these characters only")
    add("--ban", metavar="CHARS", help="write none of these characters, e.g. \\n")
    add("--rng-seed", "--rng_seed", type=int, metavar="N", help="random seed: the same N gives the same text")
    add("--num-samples", "--num_samples", type=int, default=1, metavar="N", help="texts to write (default: 1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text, e.g. \\n; may be repeated")
    add("--min-length", "--min_length", type=int, metavar="N", help="no stop within the first N new characters")
    add("--overflow", choices=("crop", "shift", "slide"),
        help="past block_size: crop = the last block_size ids, slow; shift = half of them, fast; slide = exact and "
        "fast, the default of models with a window (others: crop)")  # fmt: skip
    add("--stream", action=argparse.BooleanOptionalAction, default=True, help="print characters as they come")
    add("--interactive", action="store_true", help="type beginnings, change options and branch while the model writes")
    add("--next", type=int, metavar="N", help="print the N likeliest next characters after the seed")
    add("--perplexity", nargs="?", const="", metavar="FILE",
        help="measure the model on this text, or without FILE on the run's validation text")  # fmt: skip
    add("--stride", type=int, metavar="N", help="for --perplexity: overlapping windows N ids apart")
    add("--surprise", metavar="FILE", help="show what the model did not expect in this text, character by character")
    add("--html", metavar="PAGE", help="for --surprise: write it as a page with all details")
    add("--spans", "--places", type=int, default=10, metavar="N",
        help="for --surprise: passages and words to list (default: 10)")  # fmt: skip
    add("--encoding", default="utf-8", metavar="NAME", help="for --perplexity and --surprise: encoding of the file")
    add("--threads", type=int, metavar="N", help="threads of ONNX Runtime; default: by the size of the model")
    add("--json", action="store_true", help="print one JSON object, texts with the log-probability of each character")
    return parser
