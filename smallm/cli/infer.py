"""`infer.py`: generates text, or measures a model on a text. Starts fast: argparse, numpy, onnxruntime."""

import argparse
import io
import json
import secrets
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallm.cli import text_file
from smallm.cli.arguments import ArgumentParser
from smallm.cli.table import table
from smallm.errors import UserError
from smallm.generation.config import GenerationConfig
from smallm.html.escape import printable
from smallm.runs.layout import newest_run, validation_text

if TYPE_CHECKING:
    from smallm.language_model import LanguageModel

EXAMPLES = """\
examples:
  smallm infer --seed "O God, O God!"
  smallm infer --model runs/shakespeare --seed "ROMEO:" --max-length 500 --temperature 0.8 --top-k 40
  smallm infer --seed "Anna" --stop "\\n" --num-samples 5
  smallm infer --interactive
  smallm infer --perplexity my.txt    (without a file: on the run's own validation text)
  smallm infer --surprise my.txt --html surprise.html"""
GENERATION = {each.name for each in GenerationConfig.options() if each.flag}
MODES = {  # mode -> the options that it uses; "" = generate text. All modes use --model and --threads.
    "": GENERATION | {"engine", "seed", "num_samples", "stream", "json"},
    "interactive": GENERATION | {"engine", "seed", "stream"},
    "next": {"seed", "json"},
    "perplexity": {"stride", "encoding", "field", "json"},
    "surprise": {"html", "spans", "encoding", "field", "json"},
}
OVERFLOW_NOTE = (
    "note: past its context of {size} ids the model saw the newest half of them (--overflow shift, fast); "
    "--overflow crop always shows it the last {size}, but computes them again for each character"
)
MAX_SAMPLES = 10_000  # texts of one call
DEFAULTS = {
    "engine": "onnxruntime", "seed": "", "num_samples": 1, "stream": True, "json": False, "encoding": "utf-8",
    "field": "text", "spans": 10,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Runs `infer.py` with these arguments. Text and figures go to stdout, in UTF-8, everything else to stderr."""
    options = _parser().parse_args(argv)
    mode = next((mode for mode in MODES if mode and getattr(options, mode) is not None), "")
    _check_mode(mode, options)
    for name, default in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    if isinstance(sys.stdout, io.TextIOWrapper):  # the locale's encoding may lack the model's characters
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    from smallm.language_model import LanguageModel  # onnxruntime loads late, so that --help and mistakes are instant

    path = options.model
    if path is None:
        path = newest_run()
        print(f"model: {path}", file=sys.stderr)
    with warnings.catch_warnings(record=True, action="default") as caught:
        model = LanguageModel.load(path, threads=options.threads, engine=options.engine)
    for each in caught:
        print(f"warning: {printable(str(each.message))}", file=sys.stderr)
    if mode == "perplexity":
        _perplexity(model, text_file.files(options.perplexity) or [validation_text(Path(path))], options)
    elif mode == "surprise":
        from smallm.cli.surprise import surprise

        page = Path(options.html) if options.html else None
        text = Path(options.surprise)
        surprise(model, text, options.encoding, options.spans, page, options.json, options.field)
    elif mode == "next":
        _next_characters(model, options)
    elif mode == "interactive":
        from smallm.cli.repl import run_repl

        run_repl(model, options.seed, _given(options), options.stream)
    else:
        _generate(model, options)
    return 0


def _check_mode(mode: str, options: argparse.Namespace) -> None:
    """Raises `UserError` for an option that the mode would ignore."""
    used = MODES[mode] | {mode, "model", "threads"}
    for name, value in vars(options).items():
        if value is not None and name not in used:
            flag = "--" + {"allowed": "allow", "banned": "ban"}.get(name, name).replace("_", "-")
            if mode:
                raise UserError(f"--{mode} does not go with {flag}; leave out one of them")
            modes = " or ".join(f"--{mode}" for mode, names in MODES.items() if name in names)
            raise UserError(f"{flag} goes with {modes}{' FILE' if modes == '--surprise' else ''}")


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The options of generation that were given, and the length and the stop strings in any case."""
    given = {name: value for name in sorted(GENERATION) if (value := getattr(options, name)) is not None}
    return {"max_length": GenerationConfig.max_length, "stop": []} | given


def _generate(model: "LanguageModel", options: argparse.Namespace) -> None:
    if not 1 <= options.num_samples <= MAX_SAMPLES:
        raise UserError(f"--num-samples {options.num_samples} is out of range; it must be from 1 to {MAX_SAMPLES:,}")
    rng_seed = secrets.randbits(32) if options.rng_seed is None else options.rng_seed
    given = _given(options) | {"rng_seed": rng_seed}
    chunks = model.stream_many([options.seed] * options.num_samples, logprobs=options.json, **given)
    texts: list[list[str]] = [[] for _ in range(options.num_samples)]
    logprobs: list[list[float]] = [[] for _ in texts]
    ended, current = set(), 0  # current: the text that is printed; texts are computed together, and printed in order
    if not options.json:
        print(options.seed, end="", flush=options.stream)
    for chunk in chunks:
        texts[chunk.number].append(chunk.text)
        logprobs[chunk.number] += (round(value, 6) for value in chunk.logprobs)
        if options.json:
            continue
        if chunk.number == current:
            print(chunk.text, end="", flush=options.stream)
        if chunk.last:
            ended.add(chunk.number)
        while current in ended and current + 1 < options.num_samples:
            current += 1
            print("\n" + "-" * 40 + "\n" + options.seed + "".join(texts[current]), end="")
    new_texts = ["".join(pieces) for pieces in texts]
    if options.json:
        samples = [{"text": options.seed + text, "new_text": text, "logprobs": values}
                   for text, values in zip(new_texts, logprobs, strict=True)]  # fmt: skip
        print(json.dumps({"seed": options.seed, **given, "samples": samples}, ensure_ascii=False))
    else:
        print()
        if options.rng_seed is None:
            print(f"again with: --rng-seed {rng_seed}", file=sys.stderr)
    is_past = len(options.seed) + max(map(len, new_texts)) > model.block_size
    if is_past and options.overflow is None and not model.metadata.window:
        print(OVERFLOW_NOTE.format(size=model.block_size), file=sys.stderr)


def _next_characters(model: "LanguageModel", options: argparse.Namespace) -> None:
    if options.next < 1:
        raise UserError(f"--next {options.next} is out of range; it must be 1 or more")
    found = model.next_characters(options.seed, options.next)
    if options.json:
        values = [{"character": character, "probability": round(p, 9)} for character, p in found]
        print(json.dumps({"seed": options.seed, "next": values}, ensure_ascii=False))
        return
    for character, p in found:
        print(f"{p:.6f}  {json.dumps(character, ensure_ascii=False)}")


def _perplexity(model: "LanguageModel", paths: list[Path], options: argparse.Namespace) -> None:
    """Measures each file. Of several files, prints a table or a JSON object with the files and their total."""
    texts = (text_file.pieces(path, options.encoding, field=options.field) for path in paths)
    found = [model.perplexity(text, stride=options.stride) for text in texts]
    as_json = [{"file": str(path), **asdict(result)} for path, result in zip(paths, found, strict=True)]
    if len(found) == 1:
        print(json.dumps(as_json[0]) if options.json else found[0])
        return
    from smallm.inference.scoring import Perplexity

    nats = sum(result.nats_per_char * result.characters for result in found)
    total = Perplexity.of(nats, sum(result.characters for result in found))
    if options.json:
        print(json.dumps({"files": as_json, "total": asdict(total)}))
        return
    rows = [[printable(name), f"{result.characters:,}", f"{result.nats_per_char:.4f}", f"{result.bits_per_char:.4f}",
             f"{result.perplexity:.4f}"]
            for name, result in [*zip(map(str, paths), found, strict=True), ("total", total)]]  # fmt: skip
    print(*table([["file", "characters", "nats", "bits", "perplexity"], *rows]), sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        "infer",
        description="Generates text with an exported model, or measures a model on a text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", "--model_path", metavar="PATH", help="run, export folder or .onnx file (default: the newest run)")
    add("--engine", choices=("onnxruntime", "native"), help="what computes the text; native = the C kit, "
        "faster, compiled at first use by this machine's C compiler (default: onnxruntime)")
    add("--threads", type=int, metavar="N", help="threads of the engine (default: by the size of the model; native: 1)")
    add("--seed", "--seed_string", metavar="TEXT", help="text to continue; --seed=-x if it begins with a dash")
    for each in GenerationConfig.options():
        if each.flag:
            add(*dict.fromkeys((f"--{each.flag}", f"--{each.flag.replace('-', '_')}")), dest=each.name,
                type=each.parser, metavar=each.metavar or None, choices=each.choices or None,
                action="append" if each.repeated else "store",
                help=f"{each.help.removesuffix('.')} (default: {each.shown_default})")  # fmt: skip
    add("--num-samples", "--num_samples", type=int, metavar="N", help="number of texts (default: 1)")
    add("--stream", action=argparse.BooleanOptionalAction, default=None,
        help="print each character as soon as it is generated (default: yes)")  # fmt: skip
    add("--json", action="store_const", const=True,
        help="print one JSON object; generated texts with the log-probability of each character")  # fmt: skip
    modes = parser.add_argument_group("other modes, at most one of them").add_mutually_exclusive_group()
    modes.add_argument("--interactive", action="store_const", const=True,
        help="type texts, change options and branch while the model writes")  # fmt: skip
    modes.add_argument("--next", type=int, metavar="N", help="print the N most likely next characters after the seed")
    modes.add_argument("--perplexity", nargs="*", metavar="FILE", help="measure the model on these files, on all .txt "
        "files of a folder, or on those that a pattern such as 'notes/**/*.md' matches; without FILE, on the run's "
        "validation text")  # fmt: skip
    modes.add_argument("--surprise", metavar="FILE", help="show the surprisal of each character of this text")
    add("--stride", type=int, metavar="N", help="for --perplexity: ids between the starts of two windows (default: "
        "block_size)")  # fmt: skip
    add("--html", metavar="PAGE", help="for --surprise: write a page with all details")
    add("--spans", "--places", type=int, metavar="N",
        help="for --surprise: number of passages and of words to list (default: 10)")  # fmt: skip
    add("--encoding", metavar="NAME", help="for --perplexity and --surprise: encoding of the file (default: utf-8)")
    add("--field", "--data.field", metavar="NAME", help="for --perplexity and --surprise: key of JSON lines, or column "
        "of CSV, that holds the text (default: text)")  # fmt: skip
    return parser
