"""Writes GGUF, the model file of llama.cpp. The converter of llama.cpp itself refuses unknown vocabularies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from smallm.errors import UserError, missing_package
from smallm.export.hugging_face import PAD_ID
from smallm.export.precision import PRECISIONS

Q8_BLOCK = 32
"""Number of weights in a row that share a scale in q8_0."""


def check_gguf(precision: str, window: int = 0) -> None:
    """Raises `UserError` if the package gguf is missing, or if GGUF has no form for this precision or window."""
    if window:
        raise UserError(
            f"llama.cpp does not support sliding windows for Qwen3, and model.window = {window}; leave out --gguf"
        )
    if PRECISIONS[precision].gguf is None:
        fitting = " or ".join(name for name, each in PRECISIONS.items() if each.gguf)
        raise UserError(f"--gguf goes with --precision {fitting}, not {precision}")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise missing_package("--gguf", "gguf", "gguf") from None


def write_gguf(checkpoint: Path, path: Path, precision: str, name: str) -> None:
    """Writes a checkpoint as a GGUF file: matrices in f32, or in q8_0 for int8; everything else in f32.

    name: the model's name in the file. Raises `UserError` for an int8 model whose widths are not multiples of Q8_BLOCK.
    Needs the package gguf, see `check_gguf`.
    """
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tensors = load_file(checkpoint / "model.safetensors")
    kind = gguf.GGMLQuantizationType[PRECISIONS[precision].gguf]
    rows = {tensor.shape[1] for tensor in tensors.values() if tensor.ndim == 2}
    if precision == "int8" and any(row % Q8_BLOCK for row in rows):
        raise UserError(
            f"a GGUF in int8 needs widths that are multiples of {Q8_BLOCK}, this model has {sorted(rows)}; "
            "pass --precision fp32 with --gguf"
        )
    writer = gguf.GGUFWriter(path, "qwen3")
    _add_shape(writer, config)
    _add_vocabulary(writer, tokenizer)
    _add_sampling(writer, json.loads((checkpoint / "generation_config.json").read_text(encoding="utf-8")))
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if precision == "int8" else gguf.LlamaFileType.ALL_F32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for parameter, tensor in tensors.items():
        is_matrix = tensor.ndim == 2
        stored = gguf.quantize(tensor.astype(np.float32), kind) if is_matrix else tensor.astype(np.float32)
        gguf_name = str(names.get_name(parameter, try_suffixes=(".weight",)))
        writer.add_tensor(gguf_name, stored, raw_dtype=kind if is_matrix else None)
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


def _add_sampling(writer: Any, generation: dict[str, Any]) -> None:
    """Adds the sampling defaults, which newer versions of llama.cpp use in place of their own (min_p is 0.05 there)."""
    temperature = generation["temperature"] if generation["do_sample"] else 0.0
    writer.add_int32("general.sampling.top_k", generation["top_k"])  # gguf 0.17 has no functions for these keys
    floats = {"temp": temperature, "top_p": generation["top_p"], "min_p": generation["min_p"], "penalty_repeat": 1.0}
    for key, value in floats.items():
        writer.add_float32(f"general.sampling.{key}", value)


def _add_vocabulary(writer: Any, tokenizer: dict[str, Any]) -> None:
    """Adds the byte-level BPE of `tokenizer.json`. A merge is a pair, or a string of two parts in older files."""
    import gguf

    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # no merge crosses a character, so any pre-tokenizer works
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    writer.add_token_merges(merges or ["ÿ ÿ"])  # llama.cpp needs at least one merge; this one never applies
    writer.add_bos_token_id(PAD_ID)
    writer.add_eos_token_id(PAD_ID)  # llama.cpp needs an end-of-text id; its default is id 11
    writer.add_pad_token_id(PAD_ID)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
