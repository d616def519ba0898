"""GGUF, the file of llama.cpp and what is built on it. Its own converter refuses vocabularies that it does not know."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from smallm.errors import UserError

Q8_BLOCK = 32  # weights of a row that share a scale
KINDS = {"fp32": "F32", "int8": "Q8_0"}
"""Precision of the export -> that of the matrices in a GGUF."""
NEVER = 255
"""The id of the byte 0xFF, which no UTF-8 text has. llama.cpp wants an end of text; without one it takes id 11."""


def check_gguf(precision: str, window: int = 0) -> None:
    """Raises `UserError` if a GGUF cannot be written here, or not in this precision."""
    if window:
        raise UserError(f"llama.cpp knows no window in this family, this model has one of {window}; leave out --gguf")
    if precision not in KINDS:
        raise UserError(f"--gguf goes with --precision {' or '.join(KINDS)}, not {precision}")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("--gguf needs the package 'gguf'; install it with: pip install 'smallm[gguf]'") from None


def write_gguf(checkpoint: Path, path: Path, precision: str, name: str = "") -> None:
    """Writes a checkpoint as a GGUF: matrices in f32, or q8_0 for int8; all else in f32.

    Raises `UserError` for rows that q8_0 cannot hold. Needs the package gguf, see `check_gguf`.
    """
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tensors = load_file(checkpoint / "model.safetensors")
    kind = gguf.GGMLQuantizationType[KINDS[precision]]
    rows = {tensor.shape[1] for tensor in tensors.values() if tensor.ndim == 2}
    if precision == "int8" and any(row % Q8_BLOCK for row in rows):
        raise UserError(
            f"a GGUF in int8 needs widths that are multiples of {Q8_BLOCK}, this model has {sorted(rows)}; "
            "pass --precision fp32 with --gguf"
        )
    writer = gguf.GGUFWriter(path, "qwen3")
    _add_shape(writer, config)
    _add_vocabulary(writer, tokenizer)
    writer.add_name(name or path.stem)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if precision == "int8" else gguf.LlamaFileType.ALL_F32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for theirs, tensor in tensors.items():
        ours = names.get_name(theirs, try_suffixes=(".weight",))
        if tensor.ndim == 2:
            writer.add_tensor(ours, gguf.quantize(tensor.astype(np.float32), kind), raw_dtype=kind)
        else:
            writer.add_tensor(ours, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_vocabulary(writer: Any, tokenizer: dict[str, Any]) -> None:
    """The byte-level BPE of `tokenizer.json`; its merges are pairs, or strings of two words."""
    import gguf

    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # the merges cross no character, so any will do
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    writer.add_token_merges(merges or ["ÿ ÿ"])  # llama.cpp wants some; two bytes 0xFF stand in no text
    writer.add_bos_token_id(NEVER)
    writer.add_eos_token_id(NEVER)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
