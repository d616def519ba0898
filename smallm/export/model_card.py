"""The model card: the README.md of an export folder, with facts, measurements and examples for each runtime."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from smallm.export.hugging_face import PAD_ID, PAD_TOKEN
from smallm.export.precision import Quality
from smallm.model_file.manifest import Manifest
from smallm.runs.baselines_file import Baseline

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_suffix(".md")
WEIGHTS_FILE = "model.safetensors"
MARK = "<!-- Written by export.py, anew with each export; of changes, only those of the licence are kept. -->"
UNKNOWN_LICENCE = "unknown # fill in the licence of the model, such as mit or cc0-1.0; mind that of the text"
MAX_NEW = 200
"""New characters that the examples generate."""


def is_card(file: Path) -> bool:
    """Whether a README.md exists and is a model card that an export wrote."""
    return file.is_file() and MARK in file.read_text(encoding="utf-8", errors="replace")


def licence_of(file: Path) -> str:
    """The licence field of an earlier card, which users may fill in; otherwise a hint to fill it in."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = re.search(r"^license: (.+)$", text, re.MULTILINE)
    return found[1] if found else UNKNOWN_LICENCE


def model_card(
    name: str,
    manifest: Manifest,
    measured: Iterable[Quality],
    sizes: Mapping[str, int],
    sample: str,
    licence: str,
    baselines: Iterable[Baseline] = (),
) -> str:
    """The text of the model card: what the model is, its measured quality, and code for each runtime.

    Args:
        name: The name of the model.
        manifest: The manifest of the exported model.
        measured: Measurements of the model files.
        sizes: File name -> bytes of each file in the folder.
        sample: Text that the model wrote.
        licence: The content of the licence field.
        baselines: Losses of compressors and n-gram models on the same validation text.
    """
    shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in sample).strip("\n")
    seed = next((word for word in sample.split() if word.isalpha() and len(word) < 16), "The")
    length = len(manifest.vocabulary.encode(seed))
    new = max(1, min(MAX_NEW, manifest.block_size - length))
    loss, rows = manifest.training.get("val_loss"), [each for each in baselines if each.name != "model"]
    compared = [[each.name, f"{each.bits_per_char:.4f}", each.how] for each in rows]
    if compared and loss is not None:
        compared.insert(0, ["the model", f"{loss / math.log(2):.4f}", "on the whole validation text"])
    kilobytes = {file: f"{size / 1000:,.1f}" for file, size in sizes.items()}
    gguf = next((file for file in sizes if file.endswith(".gguf")), None)
    values = _facts(manifest) | kilobytes | {
        "name": _plain(name),
        "licence": licence,
        "library": "transformers" if WEIGHTS_FILE in sizes else "onnx",
        "mark": MARK,
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0)),
        "sample": shown,
        "baselines": _rows(compared) if compared and loss is not None else None,
        "precisions": _rows(each.cells() for each in measured),
        "seed": json.dumps(seed, ensure_ascii=False),
        "start": json.dumps(manifest.start_text, ensure_ascii=False),
        "pad": PAD_TOKEN,
        "pad_id": PAD_ID,
        "new": new,
        "all": new + length,
        "gguf": json.dumps(gguf, ensure_ascii=False) if gguf else None,
        "gguf_file": _cell(_code(gguf)),
        "gguf_kilobytes": kilobytes[gguf] if gguf else None,
    }  # fmt: skip
    return filled(TEMPLATE.read_text(encoding="utf-8"), {k: v for k, v in values.items() if v is not None})


def _facts(m: Manifest) -> dict[str, object]:
    """What the manifest tells, by the names in the template; None if unknown."""
    training, quality = m.training, m.quality
    text, loss, bits = training.get("text"), training.get("val_loss"), quality.get("bits_per_char")
    return {
        **asdict(m),
        **m.sampling,
        "trained_on": f", trained on {_code(text)}" if text else "",
        "text": _cell(_code(text)) if text else None,
        "characters": _thousands(training.get("characters")),
        "steps": _thousands(training.get("step")),
        "val_loss": None if loss is None else f"{loss:.4f}",
        "parameters": _thousands(training.get("parameters")),
        "onnxruntime": quality["onnxruntime"],
        "bits": None if bits is None else f"{bits:.4f}",
        "measured": _thousands(quality.get("characters", 0) + 1),
        "sampling": ", ".join(f"{key} {value:g}" for key, value in m.sampling.items()),
        "beyond_bytes": m.vocab_size - 256,
    }


def filled(template: str, values: Mapping[str, object]) -> str:
    """Fills in each `{{name}}`; blocks `<!-- if name -->` and table rows whose names have no value are left out."""
    blocks = re.compile("<!-- if (.+?) -->\n?(.*?)<!-- end -->\n?", re.DOTALL)
    text = blocks.sub(lambda block: block[2] if block[1] in values else "", template)
    name = re.compile("{{(.+?)}}")
    lines = (line for line in text.splitlines() if line[0:1] != "|" or {*name.findall(line)} <= values.keys())
    return name.sub(lambda found: str(values[found[1]]), "\n".join(lines)) + "\n"


def _thousands(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _rows(rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: object) -> str:
    """The text on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _code(text: object) -> str:
    return f"`{_plain(text).replace('`', chr(39))}`"
