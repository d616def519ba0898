"""smallm.export.genai: the configuration that onnxruntime-genai reads."""

from dataclasses import replace

from toys import manifest_of, random_model

from smallm.export.genai import genai_config

MANIFEST = manifest_of(random_model())


def test_genai_config():
    content = genai_config(MANIFEST, "model.onnx")
    decoder = content["model"].pop("decoder")
    ids = {"bos_token_id": ord("\n"), "eos_token_id": [], "pad_token_id": 255}
    assert content["model"] == {"type": "qwen3", "vocab_size": 262, "context_length": 16, **ids}
    assert {key: decoder[key] for key in ("filename", "head_size", "num_key_value_heads", "num_hidden_layers")} == {
        "filename": "model.onnx", "head_size": 16, "num_key_value_heads": 2, "num_hidden_layers": 2,
    }  # fmt: skip
    search = {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 0.95}
    assert content["search"] == search | {"max_length": 16, "past_present_share_buffer": True}
    for sampling, expected in (
        ({"temperature": 0.0, "top_k": 0}, {"do_sample": False, "temperature": 1.0, "top_k": 0}),
        ({"temperature": 1.0, "top_k": 1000}, {"do_sample": True, "temperature": 1.0, "top_k": 262}),
    ):
        found = genai_config(replace(MANIFEST, sampling=MANIFEST.sampling | sampling), "model.onnx")["search"]
        assert {key: found[key] for key in expected} == expected
