"""The model card: the README.md of an export folder, which is what a stranger sees first."""

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
from smallm.training.analysis.baselines import Baseline

CARD_FILE = "README.md"
WEIGHTS_FILE = "model.safetensors"
MARK = "<!-- Written by export.py, anew with each export; of changes, only those of the licence are kept. -->"
UNKNOWN_LICENCE = "unknown # fill in that of the model, such as mit or cc0-1.0; mind that of the text"
LICENCE_LINE = re.compile(r"^license: (.+)$", re.MULTILINE)
MAX_NEW = 200  # characters that the examples write


def is_card(file: Path) -> bool:
    """Whether a README.md exists and is a model card that an export wrote."""
    return file.is_file() and MARK in file.read_text(encoding="utf-8", errors="replace")


def licence_of(file: Path) -> str:
    """What the user put into the licence field of an earlier card; otherwise a hint to do so."""
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
    """The card of a model: what it is, what it is worth, and how each host opens it.

    `sizes` are the bytes of the files in the folder by their names, `sample` some text that the model wrote.
    """
    name = _plain(name)
    parts = [
        _front_matter(licence, WEIGHTS_FILE in sizes),
        MARK,
        f"# {name}",
        _what_it_is(manifest),
        "## A sample",
        _sample(manifest, sample),
        "## The model",
        _facts(manifest),
        *_beside(manifest, [one for one in baselines if one.name != "model"]),
        "## Precision",
        _precision(list(measured)),
        "## Opening it",
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


def _what_it_is(manifest: Manifest) -> str:
    text = manifest.training.get("text")
    trained = f", trained on {_code(text)}" if text else ""
    return (
        f"A character-level language model{trained} with smallm. It writes text in the manner of what it was trained "
        "on, one character after another, and says how likely each character of a given text is. It needs ONNX Runtime "
        f"{manifest.quality['onnxruntime']} or newer; `{MODEL_FILE}` alone holds all there is, vocabulary included."
    )


def _sample(manifest: Manifest, sample: str) -> str:
    shown = _shown(sample)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    how = ", ".join(f"{key} {value:g}" for key, value in manifest.sampling.items())
    return f"{fence}text\n{shown}\n{fence}\n\nAs it came, with the model's defaults ({how}) and rng_seed 1."


def _shown(sample: str) -> str:
    """What of it a page can hold."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in sample).strip("\n")


def _facts(manifest: Manifest) -> str:
    m, training = manifest, manifest.training
    loss, more = training.get("val_loss"), m.vocab_size - 256
    bits = m.quality.get("bits_per_char")
    rows = {
        "trained on": training.get("text") and f"{_code(training['text'])}, {training['characters']:,} characters",
        "trained for": f"{training['step']:,} steps" if "step" in training else None,
        "validation loss": None if loss is None else f"{loss:.4f} nats per character, on text kept out of the training",
        "bits per character": None
        if bits is None
        else f"{bits:.4f} of this file, on the first {m.quality['characters'] + 1:,} characters of that text",
        "parameters": f"{training['parameters']:,}" if "parameters" in training else None,
        "shape": f"{m.n_layer} layers, {m.n_embd} wide, {m.n_head} heads, {m.n_kv_head} of keys and values "
        "(Transformer decoder of the Qwen3 family)",
        "context": f"{m.block_size} ids: a seed and what follows it have to fit into that in most hosts; smallm's own "
        "go on beyond it",
        "vocabulary": f"{m.vocab_size} ids: the 256 bytes, and {more} for characters that are not ASCII. Any text can "
        "be read and written; a rare character takes two to four ids",
        "end of text": "none: no character doubles as one, and generation goes on for as long as it is told to",
    }
    return _table(["", ""], [[key, value] for key, value in rows.items() if value])


def _beside(manifest: Manifest, baselines: list[Baseline]) -> list[str]:
    """What others need for the validation text, without which a loss says little."""
    loss = manifest.training.get("val_loss")
    if not baselines or loss is None:
        return []
    rows = [["the model", f"{loss / math.log(2):.4f}", "on the whole validation text"]]
    rows += [[_plain(one.name), f"{one.bits_per_char:.4f}", _plain(one.how)] for one in baselines]
    return ["## Beside compressors and counted letters", _table(["", "bits per character", ""], rows)]


def _precision(measured: list[Quality]) -> str:
    heads = ["precision", "MB", "bits per character", "characters per second", "ONNX Runtime"]
    return (
        "Measured at the export, by smallm's runtime: the loss on the beginning of the validation text, the speed of "
        "one text on the machine that exported it.\n\n" + _table(heads, [row.cells() for row in measured])
    )


def _examples(manifest: Manifest, sizes: Mapping[str, int], sample: str) -> list[str]:
    """Texts and code, with this folder as the working directory."""
    seed = next((word for word in sample.split() if word.isalpha() and len(word) < 16), "The")
    length = len(manifest.vocabulary.encode(seed))
    new = max(1, min(MAX_NEW, manifest.block_size - length))
    values = {"seed": json.dumps(seed, ensure_ascii=False), "new": new, "all": new + length}
    values |= {"block_size": manifest.block_size} | manifest.sampling
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
            return f"transformers.js, which looks for it there; the same bytes as `{MODEL_FILE}`"
        if name.endswith(".gguf"):
            return "llama.cpp and what is built on it"
        return READERS[name]

    rows = [[_code(name), f"{size / 1000:,.1f}", reader(name)] for name, size in sizes.items()]
    table = f"; with `{DRAFT_TABLE_FILE}` beside it smallm writes the same text faster"
    faster = table if DRAFT_TABLE_FILE in sizes else ""
    return (
        f"An app needs only the files of its host. For smallm and ONNX Runtime that is `{MODEL_FILE}`{faster}.\n\n"
        + _table(["file", "kB", "read by"], rows)
    )


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _plain(text: object) -> str:
    """On one line, whatever it holds."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _code(text: object) -> str:
    return f"`{_plain(text).replace('`', chr(39))}`"


READERS = {
    MODEL_FILE: "smallm, ONNX Runtime in any language, onnxruntime-genai",
    DRAFT_TABLE_FILE: "smallm: what probably comes next, for the model to check several characters at a time",
    MANIFEST_FILE: f"hosts that cannot read the metadata of `{MODEL_FILE}`, which say the same",
    "config.json": "transformers, transformers.js",
    "generation_config.json": "transformers, transformers.js: how to sample",
    "tokenizer.json": "all but smallm: the vocabulary as a byte-level BPE",
    "tokenizer_config.json": "all but smallm",
    "genai_config.json": "onnxruntime-genai",
    WEIGHTS_FILE: "transformers and others that build on PyTorch",
    PORTABLE_FILE: "OpenVINO and other engines than ONNX Runtime: operators of the ONNX standard only",
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
parameters.set_search_options(max_length=<all>)  # of seed and new text, in ids; at most <block_size>
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
    shape = past.partial_shape  # batch, heads, positions so far, channels
    feeds[past.any_name] = np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), np.float32)
print(tokenizer.decode([model(feeds)["logits"][0, -1].argmax()]))  # the likeliest to follow
```"""

ONNX_RUNTIME = f"""\
### ONNX Runtime, in any language

`{MODEL_FILE}` reads `input_ids` and `attention_mask` (batch, time), int64, and `past_key_values.N.key` and `.value`
(batch, heads of keys and values, time, channels), float32, of length 0 at first. It gives `logits` (batch, time,
vocabulary) and `present.N.key` and `.value`, which are the next step's past; both may be one buffer. The optional
`num_logits_to_keep`, a scalar, is 1 for the logits of the last position only. Ids below 256 are bytes of UTF-8; the
bytes of the others stand in the metadata as `smallm.tokens`."""
