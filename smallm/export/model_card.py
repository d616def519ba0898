"""The model card: the README.md of an export folder, with facts, measurements and examples for each runtime."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from smallm.export.portable_graph import PORTABLE_FILE
from smallm.export.precision import Quality
from smallm.generation.draft_table import DRAFT_TABLE_FILE
from smallm.language_model import MODEL_FILE
from smallm.model_file.manifest import MANIFEST_FILE, Manifest
from smallm.runs.baselines_file import Baseline

CARD_FILE = "README.md"
WEIGHTS_FILE = "model.safetensors"
MARK = "<!-- Written by export.py, anew with each export; of changes, only those of the licence are kept. -->"
UNKNOWN_LICENCE = "unknown # fill in the licence of the model, such as mit or cc0-1.0; mind that of the text"
LICENCE_LINE = re.compile(r"^license: (.+)$", re.MULTILINE)
MAX_NEW = 200
"""New characters that the examples generate."""


def is_card(file: Path) -> bool:
    """Whether a README.md exists and is a model card that an export wrote."""
    return file.is_file() and MARK in file.read_text(encoding="utf-8", errors="replace")


def licence_of(file: Path) -> str:
    """The licence field of an earlier card, which users may fill in; otherwise a hint to fill it in."""
    found = LICENCE_LINE.search(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
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
    name = _plain(name)
    parts = [
        _front_matter(licence, WEIGHTS_FILE in sizes),
        MARK,
        f"# {name}",
        _description(manifest),
        "## A sample",
        _sample(manifest, sample),
        "## The model",
        _facts(manifest),
        *_baselines(manifest, [baseline for baseline in baselines if baseline.name != "model"]),
        "## Precision",
        _precision(list(measured)),
        "## How to use the model",
        *_examples(manifest, sizes, sample),
        "## Files",
        _files(sizes),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(licence: str, has_weights: bool) -> str:
    tags = ["smallm", "character-level", "onnx", "onnxruntime-genai", "transformers.js"]
    library = "transformers" if has_weights else "onnx"
    lines = [f"license: {licence}", "pipeline_tag: text-generation", f"library_name: {library}"]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _description(manifest: Manifest) -> str:
    text = manifest.training.get("text")
    trained = f", trained on {_code(text)}" if text else ""
    return (
        f"A character-level language model{trained} with smallm. It writes text in the style of its training text, one "
        "character after another, and gives the probability of each character of a text. It needs ONNX Runtime "
        f"{manifest.quality['onnxruntime']} or newer; `{MODEL_FILE}` alone is complete, vocabulary included."
    )


def _sample(manifest: Manifest, sample: str) -> str:
    shown = _shown(sample)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    how = ", ".join(f"{key} {value:g}" for key, value in manifest.sampling.items())
    return f"{fence}text\n{shown}\n{fence}\n\nUnedited, with the model's sampling defaults ({how}) and rng_seed 1."


def _shown(sample: str) -> str:
    """The sample without control characters, which a page cannot show."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in sample).strip("\n")


def _facts(manifest: Manifest) -> str:
    m, training = manifest, manifest.training
    loss = training.get("val_loss")
    bits = m.quality.get("bits_per_char")
    rows = {
        "trained on": training.get("text") and f"{_code(training['text'])}, {training['characters']:,} characters",
        "trained for": f"{training['step']:,} steps" if "step" in training else None,
        "validation loss": None if loss is None else f"{loss:.4f} nats per character, on text that was not trained on",
        "bits per character": None
        if bits is None
        else f"{bits:.4f} with this file, on the first {m.quality['characters'] + 1:,} characters of that text",
        "parameters": f"{training['parameters']:,}" if "parameters" in training else None,
        "shape": f"{m.n_layer} layers, width {m.n_embd}, {m.n_head} query heads, {m.n_kv_head} key/value heads "
        "(Transformer decoder of the Qwen3 family)",
        "context": f"{m.block_size} ids: in most runtimes seed and new text must fit into the context; smallm's "
        "runtimes can continue beyond the context",
        "vocabulary": f"{m.vocab_size} ids: the 256 bytes, and {m.vocab_size - 256} for non-ASCII characters. Any "
        "text can be read and written; a rare character takes two to four ids",
        "end of text": "the vocabulary has no end-of-text id; generation ends after the requested number of characters",
    }
    return _table(["", ""], [[key, value] for key, value in rows.items() if value])


def _baselines(manifest: Manifest, baselines: list[Baseline]) -> list[str]:
    """The losses of the baselines on the validation text, for comparison."""
    loss = manifest.training.get("val_loss")
    if not baselines or loss is None:
        return []
    rows = [["the model", f"{loss / math.log(2):.4f}", "on the whole validation text"]]
    rows += [[_plain(each.name), f"{each.bits_per_char:.4f}", _plain(each.how)] for each in baselines]
    return ["## Compared with baselines", _table(["", "bits per character", ""], rows)]


def _precision(measured: list[Quality]) -> str:
    heads = ["precision", "MB", "bits per character", "characters per second", "ONNX Runtime"]
    return (
        "Measured during the export with smallm's runtime: the loss on the beginning of the validation text, and the "
        "speed of generating one text on the machine that exported the model.\n\n"
        + _table(heads, [row.cells() for row in measured])
    )


def _examples(manifest: Manifest, sizes: Mapping[str, int], sample: str) -> list[str]:
    """Example code for each runtime, to be run in the export folder."""
    seed = next((word for word in sample.split() if word.isalpha() and len(word) < 16), "The")
    length = len(manifest.vocabulary.encode(seed))
    new = max(1, min(MAX_NEW, manifest.block_size - length))
    values = {"seed": json.dumps(seed, ensure_ascii=False), "new": new, "all": new + length,
              "block_size": manifest.block_size, **manifest.sampling}  # fmt: skip
    parts = ["The code runs in this folder.", SMALLM]
    if WEIGHTS_FILE in sizes:
        parts.append(TRANSFORMERS)
    parts += [GENAI, TRANSFORMERS_JS]
    for file in sizes:
        if file.endswith(".gguf"):
            parts.append(_filled(LLAMA_CPP, {"file": json.dumps(file, ensure_ascii=False)}))
    if PORTABLE_FILE in sizes:
        parts.append(OPENVINO)
    parts.append(ONNX_RUNTIME)
    return [_filled(part, values) for part in parts]


def _filled(template: str, values: Mapping[str, object]) -> str:
    return re.sub("<([a-z_]+)>", lambda found: str(values.get(found[1], found[0])), template)


def _files(sizes: Mapping[str, int]) -> str:
    def reader(name: str) -> str:
        if name.startswith("onnx/"):
            return f"transformers.js, which expects this name; the same bytes as `{MODEL_FILE}`"
        if name.endswith(".gguf"):
            return "llama.cpp and programs that build on it"
        return READERS[name]

    rows = [[_code(name), f"{size / 1000:,.1f}", reader(name)] for name, size in sizes.items()]
    has_table = DRAFT_TABLE_FILE in sizes
    faster = f"; with `{DRAFT_TABLE_FILE}` in the same folder smallm generates text faster" if has_table else ""
    return (
        f"An app needs only the files of its runtime. For smallm and ONNX Runtime that is `{MODEL_FILE}`{faster}.\n\n"
        + _table(["file", "kB", "read by"], rows)
    )


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _plain(text: object) -> str:
    """The text on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _code(text: object) -> str:
    return f"`{_plain(text).replace('`', chr(39))}`"


READERS = {
    MODEL_FILE: "smallm, ONNX Runtime in any language, onnxruntime-genai",
    DRAFT_TABLE_FILE: "smallm: the draft table for speculative decoding, which makes generation faster",
    MANIFEST_FILE: f"hosts that cannot read the metadata of `{MODEL_FILE}`; the content is the same",
    "config.json": "transformers, transformers.js",
    "generation_config.json": "transformers, transformers.js: sampling defaults",
    "tokenizer.json": "all runtimes except smallm: the vocabulary as a byte-level BPE",
    "tokenizer_config.json": "all runtimes except smallm",
    "genai_config.json": "onnxruntime-genai",
    WEIGHTS_FILE: "transformers and other libraries for PyTorch",
    PORTABLE_FILE: "OpenVINO and other engines than ONNX Runtime: standard ONNX operators only",
}

SMALLM = """\
### smallm

```python
from smallm import LanguageModel  # pip install smallm

model = LanguageModel.load(".")
print(model.generate(<seed>, max_length=<new>, rng_seed=1))
```"""

TRANSFORMERS = """\
### transformers

```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # pip install transformers torch

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer(<seed>, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=<new>)[0]))
```"""

GENAI = """\
### onnxruntime-genai

```python
import onnxruntime_genai as og  # pip install onnxruntime-genai

model = og.Model(".")
tokenizer, parameters = og.Tokenizer(model), og.GeneratorParams(model)
parameters.set_search_options(max_length=<all>)  # ids of seed and new text; at most <block_size>
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode(<seed>))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```"""

TRANSFORMERS_JS = """\
### transformers.js

```js
import { pipeline } from "@huggingface/transformers"; // npm install @huggingface/transformers

const generator = await pipeline("text-generation", "./");
const [{ generated_text }] = await generator(<seed>, { max_new_tokens: <new> });
console.log(generated_text);
```"""

LLAMA_CPP = """\
### llama.cpp

```python
from llama_cpp import Llama  # pip install llama-cpp-python

model = Llama(<file>, n_ctx=<block_size>, verbose=False)
print(model(<seed>, max_tokens=<new>, temperature=<temperature>, top_k=<top_k>)["choices"][0]["text"])
```"""

OPENVINO = f"""\
### OpenVINO

```python
import numpy as np
import openvino as ov
from tokenizers import Tokenizer  # pip install openvino tokenizers

tokenizer = Tokenizer.from_file("tokenizer.json")
model = ov.Core().compile_model("{PORTABLE_FILE}", "CPU")
ids = np.array([tokenizer.encode(<seed>).ids])
feeds = {{"input_ids": ids, "attention_mask": np.ones_like(ids)}}
for past in model.inputs[2:]:
    shape = past.partial_shape  # batch, heads, past length, channels
    feeds[past.any_name] = np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), np.float32)
print(tokenizer.decode([model(feeds)["logits"][0, -1].argmax()]))  # the likeliest next character
```"""

ONNX_RUNTIME = """\
### ONNX Runtime, in any language

Inputs: `input_ids` and `attention_mask` (batch, time), int64, and `past_key_values.N.key` and `.value` (batch,
key/value heads, past length, channels), float32, with past length 0 for the first pass. Outputs: `logits` (batch, time,
vocabulary), and `present.N.key` and `.value`, which are the past of the next pass; past and present may share one
buffer. The optional input `num_logits_to_keep`, a scalar, is 1 for the logits of the last position only. Ids below 256
are UTF-8 bytes; the bytes of the other ids are in the metadata, under `smallm.tokens`."""
