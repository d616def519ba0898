"""The JSON files that make a checkpoint or an export a Hugging Face model folder of the Qwen3 family."""

from typing import Any

from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.config import Config
from smallm.training.model.operations import NORM_EPS


def hugging_face_files(config: Config, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """File name -> content of config.json, generation_config.json, tokenizer.json and tokenizer_config.json."""
    m, sampling = config.model, config.sample.sampling
    model = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary.size,
        "hidden_size": m.n_embd,
        "intermediate_size": m.inner,
        "num_hidden_layers": m.n_layer,
        "num_attention_heads": m.n_head,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_dim,
        "max_position_embeddings": m.block_size,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": m.rope_theta,  # readers before transformers 5
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": m.window > 0,
        "sliding_window": m.window or None,
        "max_window_layers": 0 if m.window else m.n_layer,
        "layer_types": ["sliding_attention" if m.window else "full_attention"] * m.n_layer,
        "tie_word_embeddings": True,
        # No character serves as an end-of-text token.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    generation = {"do_sample": sampling.temperature > 0, "max_length": m.block_size,
                  "temperature": sampling.temperature or 1.0,
                  "top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": m.block_size,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_input_names": ["input_ids", "attention_mask"],  # the model accepts no other inputs
    }
    return {
        "config.json": model,
        "generation_config.json": generation,
        "tokenizer.json": vocabulary.tokenizer_json(),
        "tokenizer_config.json": tokenizer_config,
    }
