"""Checkpoints: safetensors and JSON, written aside and renamed, each a Hugging Face model folder. No pickle.

checkpoints/step-000500/
    model.safetensors, config.json, generation_config.json, tokenizer.json, tokenizer_config.json
    optimizer.safetensors     moments by parameter name
    training_state.json       step, losses, resolved config, fingerprint of the text, versions
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smallm.errors import UserError
from smallm.manifest import hugging_face_files
from smallm.runs import CHECKPOINTS, is_run
from smallm.training.config import Config
from smallm.training.functions import NORM_EPS
from smallm.training.model import TransformerLanguageModel
from smallm.training.optim import moments_of
from smallm.training.qwen3 import from_qwen3, to_qwen3
from smallm.vocabulary import Vocabulary

STATE_FILE = "training_state.json"
_EARLIER = "remove {} to use an earlier checkpoint"


@dataclass
class TrainingState:
    """Where a run stands; with the weights, the moments and the config it is all that resuming needs."""

    step: int = 0
    """Steps done."""
    val_loss: float | None = None
    """Validation loss at this step, in nats per character; None if it was not measured."""
    best_val_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    planned_steps: int = 0
    """Steps of the whole run; under train.minutes as they were expected at this one."""
    seconds: float = 0.0
    """Time spent so far, from the start of the program; of a resumed part, from the first step."""
    fingerprint: str = ""
    """sha256 of the text."""
    start_text: str = "\n"
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the fp16 loss scaler; empty in other precisions."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Text, device, versions: what the reader of an export may want to know."""


def save_checkpoint(
    run: Path,
    state: TrainingState,
    config: Config,
    model: TransformerLanguageModel,
    optimizer: torch.optim.Optimizer,
    vocabulary: Vocabulary,
) -> Path:
    """Writes `checkpoints/step-NNNNNN` as a whole or not at all, and returns it."""
    folder = run / CHECKPOINTS / f"step-{state.step:06d}"
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        weights = to_qwen3(model.state_dict(), config.model)
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        save_file(optimizer_tensors(model, optimizer), aside / "optimizer.safetensors")
        for name, content in model_files(config, vocabulary).items():
            _write_json(aside / name, content)
        _write_json(aside / STATE_FILE, {"format_version": 1, **asdict(state), "config": config.to_dict()})
        for file in aside.iterdir():
            _sync(file)
        _sync(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        _sync(folder.parent)
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def model_files(config: Config, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """The JSON files of the Hugging Face folder."""
    m = config.model
    return hugging_face_files(
        vocabulary,
        block_size=m.block_size,
        n_layer=m.n_layer,
        n_head=m.n_head,
        n_kv_head=m.kv_heads,
        n_embd=m.n_embd,
        n_inner=m.inner,
        head_dim=m.head_dim,
        rope_theta=m.rope_theta,
        norm_eps=NORM_EPS,
        sampling=asdict(config.sample.sampling),
    )


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Raises `UserError` if there is none."""
    if not is_run(run):
        raise UserError(f"{run} is not a run folder; train one with `python train.py --out {run}`")
    found = [folder for folder in (run / CHECKPOINTS).glob("step-[0-9]*") if (folder / STATE_FILE).is_file()]
    if not found:
        raise UserError(f"{run} has no checkpoint yet; train it again with `python train.py`")
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the lowest validation loss; the newest, if none was evaluated."""
    found = checkpoints(run)
    scored = [(state.val_loss, folder) for folder in found if (state := read_state(folder)[0]).val_loss is not None]
    return min(scored)[1] if scored else found[-1]


def saved_config(run: Path) -> Config:
    """The resolved config of a run, from its newest checkpoint."""
    return read_state(checkpoints(run)[-1])[1]


def read_state(folder: Path) -> tuple[TrainingState, Config]:
    """`training_state.json` of a checkpoint. Raises `UserError` if it is broken."""
    try:
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if values.pop("format_version") != 1:
            raise UserError(f"{folder} was written by another version of smallm")
        config, state = Config.from_dict(values.pop("config")), TrainingState(**values)
        if not all(type(n) is int and n >= 0 for n in (state.step, state.best_step, state.evaluations_since_best)):
            raise ValueError("a number of steps is none")
        return state, config
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f" ({error})" if isinstance(error, UserError) else ""
        raise UserError(f"{folder / STATE_FILE} is broken{reason}; {_EARLIER.format(folder)}") from None


def load_model(folder: Path, device: str | torch.device = "cpu") -> TransformerLanguageModel:
    """The model of a checkpoint, in eval mode. Raises `UserError`."""
    config, vocabulary = read_state(folder)[1], load_vocabulary(folder)
    model = TransformerLanguageModel(vocabulary.size, config.model)
    load_weights(folder, model)
    return model.to(device).eval()


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a checkpoint, from its `tokenizer.json`."""
    try:
        return Vocabulary.from_tokenizer_json(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise UserError(f"{folder / 'tokenizer.json'} is broken; {_EARLIER.format(folder)}") from None


def load_weights(folder: Path, model: TransformerLanguageModel) -> None:
    """Weights into the model; every name and shape must fit."""
    tensors = _load_tensors(folder / "model.safetensors")
    try:
        model.load_state_dict(from_qwen3(tensors, model.config), strict=True)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / 'model.safetensors'} does not fit the model it should hold: {reason}") from None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`parameter.exp_avg` -> tensor, for each tensor of the optimiser's state."""
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Moments into the optimiser, each beside its parameter; every name and shape must fit."""
    file = folder / "optimizer.safetensors"
    tensors, moments = _load_tensors(file), moments_of(optimizer)
    for name, parameter in model.named_parameters():
        for key in moments[parameter]:
            tensor = tensors.pop(f"{name}.{key}", None)
            if tensor is None or tensor.shape != (() if key == "step" else parameter.shape):
                raise UserError(f"{file} does not fit the optimiser of this run: see {name}.{key}")
            optimizer.state[parameter][key] = tensor.to(parameter.device)
    if tensors:
        raise UserError(f"{file} does not fit the optimiser of this run: {next(iter(tensors))} is left over")


def rotate(run: Path, best_step: int, keep_last: int) -> None:
    """Removes all checkpoints but the newest `keep_last` and the best."""
    for folder in checkpoints(run)[:-keep_last]:
        if folder.name != f"step-{best_step:06d}":
            shutil.rmtree(folder)
    for half in (run / CHECKPOINTS).glob(".step-*"):  # left behind by a kill in the middle of a save
        shutil.rmtree(half)


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} is missing, truncated or no safetensors file ({error}); {_EARLIER.format(file.parent)}"
        ) from None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
