"""The configuration file of onnxruntime-genai."""

from typing import Any

from smallm.export.hugging_face import PAD_ID, start_id
from smallm.model_file.manifest import Manifest

GENAI_FILE = "genai_config.json"


def genai_config(manifest: Manifest, model_file: str) -> dict[str, Any]:
    """The content of `genai_config.json`: the names, sizes and sampling defaults that onnxruntime-genai needs."""
    sampling = manifest.sampling
    greedy = sampling["temperature"] == 0
    return {
        "model": {
            "type": "qwen3",
            "vocab_size": manifest.vocab_size,
            "context_length": manifest.block_size,
            "bos_token_id": start_id(manifest),
            "eos_token_id": [],  # the vocabulary has no end-of-text id; genai takes the pad id, which no text contains
            "pad_token_id": PAD_ID,
            "decoder": {
                "filename": model_file,
                "hidden_size": manifest.n_embd,
                "head_size": manifest.head_dim,
                "num_attention_heads": manifest.n_head,
                "num_key_value_heads": manifest.n_kv_head,
                "num_hidden_layers": manifest.n_layer,
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "log_severity_level": 3,  # else ONNX Runtime warns that num_logits_to_keep may be left out
                    "provider_options": [],
                },
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": not greedy,
            "temperature": 1.0 if greedy else sampling["temperature"],
            "top_k": min(sampling["top_k"], manifest.vocab_size),  # onnxruntime-genai refuses a larger top_k
            "top_p": sampling["top_p"],
            "max_length": manifest.block_size,
            "past_present_share_buffer": True,
        },
    }
