"""Models of random weights for the tests: no training, every weight far from its initial value."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from smallm.errors import UserError
from smallm.export.graph import build_graph
from smallm.generation.rng import Rng
from smallm.generation.sampler import MIN_TEMPERATURE, sample
from smallm.inference.scoring import NOT_FINITE
from smallm.model_file.manifest import Manifest
from smallm.model_file.sampling import Sampling
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.checkpoint import format as checkpoint
from smallm.training.config import DataConfig, ModelConfig
from smallm.training.data import corpus
from smallm.training.data.corpus import Corpus
from smallm.training.model.transformer import TransformerLanguageModel

TOY_VOCABULARY = Vocabulary.from_characters("éñ€中")
LATER_VOCABULARY = Vocabulary.from_characters("中é").extended("𝄞ñ").extended("€è")
"""Of a model that has learned on twice: not in the order of the code points."""
GREEDY = Sampling(temperature=0)


def open_corpus(
    source: str | Path, *, cache: Path | None = None, progress: bool = True, seed: int = 1, **settings
) -> Corpus:
    """The text with these settings of `DataConfig`."""
    return corpus.open_corpus(DataConfig(source=str(source), **settings), cache=cache, progress=progress, seed=seed)


def random_model(vocabulary: Vocabulary = TOY_VOCABULARY, **config) -> TransformerLanguageModel:
    """A model of these settings, two small layers by default, in which every matrix and every gain matters."""
    settings = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "block_size": 16, "rope_theta": 10000.0}
    model = TransformerLanguageModel(vocabulary.size, ModelConfig(**(settings | config)), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, 0, 1.5 * parameter.size(1) ** -0.5, generator=generator)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model


def manifest_of(model: TransformerLanguageModel, vocabulary: Vocabulary = TOY_VOCABULARY, **changes) -> Manifest:
    """What the export of this model would say about itself."""
    c = model.config
    values = {
        "block_size": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_kv_head": c.kv_heads,
        "n_embd": c.n_embd, "head_dim": c.head_dim, "window": c.window, "rope_theta": c.rope_theta,
        "vocab_size": vocabulary.size, "tokens": vocabulary.hex_tokens(),
        "start_text": "\n", "sampling": {"temperature": 0.7, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
    }  # fmt: skip
    return Manifest(**values | changes)


def save_onnx(model: TransformerLanguageModel, path: Path, vocabulary: Vocabulary = TOY_VOCABULARY) -> Path:
    """The model as an .onnx file, as export writes it."""
    onnx.save(build_graph(model, manifest_of(model, vocabulary)), path)
    return path


def longer(model: TransformerLanguageModel, block_size: int) -> TransformerLanguageModel:
    """The same model with room for more ids."""
    other = TransformerLanguageModel(model.vocab_size, replace(model.config, block_size=block_size)).eval()
    other.load_state_dict(model.state_dict())
    return other


def torch_text(
    model: TransformerLanguageModel,
    vocabulary: Vocabulary,
    seed: str,
    length: int,
    sampling: Sampling = GREEDY,
    rng: Rng | None = None,
    overflow: str = "shift",
) -> str:
    """What `LanguageModel.generate` has to give, the naive way: the whole window through PyTorch for each id."""
    block_size, decoder, new = model.config.block_size, vocabulary.decoder(), ""
    if overflow == "slide":
        model, block_size = longer(model, 1000), 1000
    window = vocabulary.encode(seed).tolist()[-block_size:]
    while len(new) < length:
        with torch.no_grad():
            logits = model(torch.tensor([window]))[0, -1].numpy()
        id = sample(logits, rng.uniform() if rng else 0.0, sampling)
        new += decoder.push(id)
        full = len(window) == block_size
        window = [*window, id][-(max(1, block_size // 2) if full and overflow == "shift" else block_size) :]
    return seed + new[:length]


def edit_state(folder: Path, edit: Callable[[dict], object] = lambda values: None) -> None:
    """Changes `training_state.json` of a checkpoint, and updates the checksums of the files and of the state."""
    file = folder / checkpoint.STATE_FILE
    values = json.loads(file.read_text(encoding="utf-8"))
    values["sha256"] = {other.name: checkpoint._sha256(other) for other in folder.iterdir() if other != file}
    edit(values)
    values.pop("checksum", None)
    file.write_text(json.dumps(values | {"checksum": checkpoint.checksum(values)}), encoding="utf-8")


def message(call, *args) -> str:
    """The one line of the `UserError` that a call raises."""
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def ranked(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """What `sample` follows: the ids that may be taken (K,), most likely first, and their weights (K,), the first 1."""
    order = np.argsort(-logits, kind="stable")  # NaN goes to the end
    if not np.isfinite(logits[order[0]]) or np.isnan(logits[order[-1]]):
        raise UserError(NOT_FINITE)
    kept = logits[order[: 1 if sampling.temperature == 0 else sampling.top_k or None]].astype(np.float64)
    weights = np.exp((kept - kept[0]) / max(sampling.temperature, MIN_TEMPERATURE))
    keep = len(weights)
    if sampling.top_p < 1:
        cumulative = weights.cumsum()
        keep = int(cumulative.searchsorted(sampling.top_p * cumulative[-1])) + 1
    if sampling.min_p > 0:
        keep = min(keep, int((-weights).searchsorted(-sampling.min_p, side="right")))
    return order[:keep], weights[:keep]
