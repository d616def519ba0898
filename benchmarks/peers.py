"""The generators that sampler.py compares; each opens a smallm checkpoint with a given number of threads.

A peer has `write(seed, length, rng_seed)`, which returns at least `length` new characters sampled with TEMPERATURE
and TOP_K, and `bits(text)`, the bits per character of a text of at most one context, without its first character. The
constructors raise `ImportError` if a package is not installed. This is a module of sampler.py, not a script.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from smallm import LanguageModel
from smallm.export.folder import export_checkpoint
from smallm.export.gguf import write_gguf
from smallm.training.checkpoint.format import load_vocabulary

TEMPERATURE, TOP_K = 0.8, 40
END_ID = 255  # a byte that UTF-8 never contains; stands for the end-of-text id, which some peers require


class Smallm:
    """An exported model through `LanguageModel`, on ONNX Runtime or the native engine."""

    def __init__(self, checkpoint: Path, folder: Path, threads: int, precision: str, engine: str = "onnxruntime"):
        folder = folder.with_name(f"smallm-{precision}")  # shared by all numbers of threads
        if not folder.exists():
            export_checkpoint(checkpoint, folder, precision, allow_loss=True)
        self.model = LanguageModel.load(folder, threads=threads, engine=engine)

    def write(self, seed: str, length: int, rng_seed: int) -> str:
        return self.model.generate(seed, length, temperature=TEMPERATURE, top_k=TOP_K, rng_seed=rng_seed)[len(seed) :]

    def bits(self, text: str) -> float:
        return float(self.model.score(text)[1:].mean() / math.log(2))


class Transformers:
    """`generate` of transformers, with a KV cache."""

    def __init__(self, checkpoint: Path, folder: Path, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        self._torch, self._threads = torch, threads
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        self.vocabulary = load_vocabulary(checkpoint)

    def write(self, seed: str, length: int, rng_seed: int) -> str:
        self._torch.set_num_threads(self._threads)
        self._torch.manual_seed(rng_seed)
        ids = self._torch.from_numpy(self.vocabulary.encode(seed).astype(np.int64))[None]
        options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "max_new_tokens": length}
        with self._torch.no_grad():
            new = self.model.generate(ids, attention_mask=self._torch.ones_like(ids), pad_token_id=END_ID, **options)
        return self.vocabulary.decode(new[0, ids.shape[1] :].tolist())

    def bits(self, text: str) -> float:
        ids = self.vocabulary.encode(text).astype(np.int64)
        with self._torch.no_grad():
            logits = self.model(self._torch.from_numpy(ids)[None, :-1]).logits[0].numpy()
        return bits_of(logits, ids[1:], len(text) - 1)


class GenAI:
    """onnxruntime-genai with a model that was made by the builder of that package."""

    def __init__(self, checkpoint: Path, folder: Path, threads: int, precision: str):
        import onnxruntime_genai

        require_onnx_ir()
        self._genai = onnxruntime_genai
        if not folder.exists():
            _build_genai(checkpoint, folder, precision)
        config = json.loads((folder / "genai_config.json").read_text())
        config["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": threads}
        (folder / "genai_config.json").write_text(json.dumps(config))
        self._folder, self.model = folder, onnxruntime_genai.Model(str(folder))
        self._config = json.loads((checkpoint / "config.json").read_text())
        self.vocabulary = load_vocabulary(checkpoint)

    def write(self, seed: str, length: int, rng_seed: int) -> str:
        ids = self.vocabulary.encode(seed).tolist()
        options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "random_seed": rng_seed}
        parameters = self._genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(ids) + length, **options)
        generator = self._genai.Generator(self.model, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return self.vocabulary.decode(generator.get_sequence(0)[len(ids) :].tolist())

    def bits(self, text: str) -> float:
        import onnxruntime

        session = onnxruntime.InferenceSession(self._folder / "model.onnx", providers=["CPUExecutionProvider"])
        ids = self.vocabulary.encode(text).astype(np.int64)
        feeds = {"input_ids": ids[None, :-1], "attention_mask": np.ones((1, len(ids) - 1), np.int64)}
        empty = np.zeros((1, self._config["num_key_value_heads"], 0, self._config["head_dim"]), np.float32)
        feeds |= {v.name: empty for v in session.get_inputs() if v.name.startswith("past_key_values")}
        return bits_of(session.run(["logits"], feeds)[0][0], ids[1:], len(text) - 1)


def _build_genai(checkpoint: Path, folder: Path, precision: str) -> None:
    """Runs the builder, which requires an end-of-text id; smallm's models have none, so END_ID is declared."""
    source = folder.with_name(folder.name + "-source")
    shutil.copytree(checkpoint, source)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(values | dict.fromkeys(("bos_token_id", "eos_token_id"), END_ID)))
    options = ["-i", source, "-o", folder, "-p", precision, "-e", "cpu", "-c", folder.with_name("cache")]
    subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, options)], check=True, stdout=2)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, with the checkpoint as GGUF."""

    def __init__(self, checkpoint: Path, folder: Path, threads: int, precision: str):
        from llama_cpp import Llama

        if not folder.exists():
            folder.mkdir(parents=True)
            write_gguf(checkpoint, folder / "model.gguf", precision, "model")
        context = json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"]
        self._open = lambda **options: Llama(
            str(folder / "model.gguf"),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            **options,
        )
        self.model, self.vocabulary = self._open(), load_vocabulary(checkpoint)

    def write(self, seed: str, length: int, rng_seed: int) -> str:
        ids, new = self.vocabulary.encode(seed).tolist(), []
        self.model.reset()
        self.model.set_seed(rng_seed)
        options = {"temp": TEMPERATURE, "top_k": TOP_K, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
        for id in self.model.generate(ids, reset=True, **options):
            new.append(id)
            if len(new) == length:
                return self.vocabulary.decode(new)

    def bits(self, text: str) -> float:
        model, ids = self._open(logits_all=True), self.vocabulary.encode(text).astype(np.int64)
        model.eval(ids[:-1].tolist())
        return bits_of(np.array(model.scores[: len(ids) - 1]), ids[1:], len(text) - 1)


def require_onnx_ir() -> None:
    """Raises `ImportError` without onnx_ir, which the builder of onnxruntime-genai imports but does not install."""
    if importlib.util.find_spec("onnx_ir") is None:
        raise ImportError("the builder of onnxruntime-genai needs onnx_ir too: pip install onnx-ir")


def bits_of(logits: np.ndarray, targets: np.ndarray, characters: int) -> float:
    """logits (T, V), targets (T,) -> bits per character."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    nats = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(targets)), targets]
    return float(nats.sum() / characters / math.log(2))


PEERS = {
    "smallm fp32": lambda *a: Smallm(*a, "fp32"),
    "smallm int8": lambda *a: Smallm(*a, "int8"),
    "smallm int4": lambda *a: Smallm(*a, "int4"),
    "smallm native fp32": lambda *a: Smallm(*a, "fp32", "native"),
    "smallm native int8": lambda *a: Smallm(*a, "int8", "native"),
    "transformers": Transformers,
    "genai fp32": lambda *a: GenAI(*a, "fp32"),
    "genai int4": lambda *a: GenAI(*a, "int4"),
    "llama.cpp fp32": lambda *a: LlamaCpp(*a, "fp32"),
    "llama.cpp q8_0": lambda *a: LlamaCpp(*a, "int8"),
}

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
