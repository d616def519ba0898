"""The Hugging Face files of an export folder: those of a checkpoint, made ready for batches and empty prompts."""

from pathlib import Path
from typing import Any

from smallm.export.precision import PRECISIONS
from smallm.model_file.manifest import Manifest
from smallm.training.checkpoint.format import load_vocabulary, read_state
from smallm.training.checkpoint.hugging_face import hugging_face_files

PAD_ID = 255
"""The id of the byte 0xFF, which never occurs in UTF-8: used for padding and as end of text."""
PAD_TOKEN = "<|smallm_pad|>"
"""Name of PAD_ID. As a byte its name would be "ÿ", and transformers would take that letter in a text for padding."""
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
"""Only transformers reads this file. transformers.js must not pad: the ONNX graph has no padding on the left."""


def export_files(checkpoint: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """File name -> content of the JSON files of an export that Hugging Face's libraries read."""
    vocabulary = load_vocabulary(checkpoint)
    files = hugging_face_files(read_state(checkpoint)[1], vocabulary)
    # Without this entry transformers.js loads different files in a browser and in Node.
    files["config.json"] |= {"transformers.js_config": {"dtype": PRECISIONS[manifest.precision].transformers_js[0]}}
    # The id that begins a text is used for an empty prompt: model.generate() without ids.
    files["generation_config.json"] |= {"bos_token_id": start_id(manifest), "pad_token_id": PAD_ID}
    vocab = files["tokenizer.json"]["model"]["vocab"]
    vocab_with_padding = {PAD_TOKEN if id == PAD_ID else piece: id for piece, id in vocab.items()}
    files["tokenizer.json"]["model"]["vocab"] = vocab_with_padding
    files["tokenizer_config.json"] |= {"padding_side": "left"}
    token = {"content": PAD_TOKEN, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return files | {SPECIAL_TOKENS_FILE: {"pad_token": token}}


def start_id(manifest: Manifest) -> int:
    """The last id of the text that replaces an empty seed."""
    return int(manifest.vocabulary.encode(manifest.start_text)[-1])
