"""The JSON files of a Hugging Face folder; that transformers opens such a folder is tested with the export."""

import json

import pytest
from toys import TOY_VOCABULARY

from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.checkpoint.hugging_face import hugging_face_files
from smallm.training.config import Config


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(0.8, {"do_sample": True, "temperature": 0.8}), (0.0, {"do_sample": False, "temperature": 1.0})],
)
def test_hugging_face_files(temperature, expected):
    settings = {
        "model": {"block_size": 16, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "rope_theta": 500.0},
        "sample": {"temperature": temperature, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    }
    files = hugging_face_files(Config.from_dict(settings), TOY_VOCABULARY)
    assert set(files) == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    config = files["config.json"]
    assert (config["vocab_size"], config["hidden_size"], config["head_dim"]) == (TOY_VOCABULARY.size, 64, 16)
    assert config["intermediate_size"] == Config.from_dict(settings).model.inner
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (2, 4, 2)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    expected |= {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "max_length": 16}
    assert files["generation_config.json"].items() >= expected.items()
    assert Vocabulary.from_tokenizer_json(files["tokenizer.json"]) == TOY_VOCABULARY
    json.dumps(files, allow_nan=False)
