"""Checkpoints: safetensors and JSON, written aside and renamed, each a Hugging Face model folder. No pickle.

checkpoints/step-000500/
    model.safetensors, config.json, generation_config.json, tokenizer.json, tokenizer_config.json
    optimizer.safetensors     moments by parameter name
    training_state.json       step, losses, resolved config, fingerprint of the text, versions; sha256 of all the others
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smallm.errors import UserError
from smallm.runs.layout import CHECKPOINTS
from smallm.runs.state_file import CHANGED, CHECKSUM, FORMAT_VERSION, STATE_FILE, checksum, read_json, read_state_file
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.checkpoint.hugging_face import hugging_face_files
from smallm.training.checkpoint.qwen3 import from_qwen3, to_qwen3
from smallm.training.checkpoint.safe_load import check_fits
from smallm.training.config import Config, check_types
from smallm.training.distributed import full_tensor, shard_like
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.optimizers import moment_names


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
    base_vocab_size: int = 0
    """Of a run begun with `train.init_from`: the ids that the model had before; 0 of any other."""
    old_text_loss: float | None = None
    """What the model had, before this run, on the text that it knew; in nats per character."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the fp16 loss scaler; empty in other precisions."""
    skipped_steps: int = 0
    """Steps that were left out, because the gradient was no number."""
    skipped_in_a_row: int = 0
    """How many of them are the last ones."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Text, device, versions: what the reader of an export may want to know."""


@dataclass(frozen=True)
class TrainingTensors:
    """What a checkpoint holds of model and optimiser, whole and on the CPU."""

    weights: dict[str, Tensor]
    """By the names that Qwen3 has for them."""
    moments: dict[str, Tensor]
    """`parameter.exp_avg` -> tensor, for each tensor of the optimiser's state."""

    @classmethod
    def gather(cls, model: TransformerLanguageModel, optimizer: torch.optim.Optimizer) -> "TrainingTensors":
        """Gathers what is spread over processes: all of them must call this."""
        weights = to_qwen3({name: full_tensor(tensor) for name, tensor in model.state_dict().items()}, model.config)
        moments = {
            f"{name}.{key}": full_tensor(tensor).detach().cpu().contiguous()
            for name, parameter in model.named_parameters()
            for key, tensor in optimizer.state.get(parameter, {}).items()
        }
        return cls(weights, moments)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINTS / f"step-{step:06d}"


def save_checkpoint(
    run: Path, state: TrainingState, config: Config, tensors: TrainingTensors, vocabulary: Vocabulary
) -> Path:
    """Writes `checkpoints/step-NNNNNN` as a whole or not at all, and returns it. Raises `OSError`."""
    folder = checkpoint_folder(run, state.step)
    aside, old = (folder.with_name(f".{folder.name}.{os.getpid()}{ending}") for ending in ("", ".old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        save_file(tensors.weights, aside / "model.safetensors", metadata={"format": "pt"})
        save_file(tensors.moments, aside / "optimizer.safetensors")
        for name, content in hugging_face_files(config, vocabulary).items():
            _write_json(aside / name, content)
        values = {"format_version": FORMAT_VERSION, **asdict(state), "config": config.to_dict(),
                  CHANGED: config.changed()}  # fmt: skip
        values["sha256"] = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
        _write_json(aside / STATE_FILE, values | {CHECKSUM: checksum(values)})
        mode = (aside / STATE_FILE).stat().st_mode
        for file in aside.iterdir():
            file.chmod(mode)  # safetensors keeps its files from everyone else
            _sync(file)
        _sync(aside)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        _sync(folder.parent)
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from None
    finally:
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)
    return folder


def read_state(folder: Path) -> tuple[TrainingState, Config]:
    """`training_state.json` of a checkpoint. Raises `UserError` if it is broken."""
    values = read_state_file(folder)
    try:
        for key in ("format_version", "sha256"):
            del values[key]
        values.pop(CHANGED, None)
        config, state = Config.from_dict(values.pop("config")), TrainingState(**values)
        check_types(state)
        if not all(type(n) is int and n >= 0 for n in (state.step, state.best_step, state.evaluations_since_best)):
            raise ValueError("a number of steps is none")
        return state, config
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        reason = f" ({error})" if isinstance(error, UserError) else ""
        raise UserError(f"{folder / STATE_FILE} is broken{reason}; use another checkpoint") from None


def verify(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, in a few words; nothing, if they are as they were written."""
    try:
        sums = read_state_file(folder)["sha256"]
        for name in sorted(sums):
            file = folder / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if _sha256(file) != sums[name]:
                return f"{name} is not as it was written"
    except UserError as error:
        return str(error).removeprefix(f"{folder}/")
    except (OSError, TypeError, AttributeError, KeyError) as error:
        return f"unreadable: {error}"
    return ""


def load_model(folder: Path, device: str | torch.device = "cpu") -> TransformerLanguageModel:
    """The model of a checkpoint, in eval mode. Raises `UserError`."""
    config, vocabulary = read_state(folder)[1], load_vocabulary(folder)
    check_fits(folder / "model.safetensors", config.model, vocabulary.size)
    model = TransformerLanguageModel(vocabulary.size, config.model)
    load_weights(folder, model)
    return model.to(device).eval()


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a checkpoint, from its `tokenizer.json`."""
    try:
        return Vocabulary.from_tokenizer_json(read_json(folder / "tokenizer.json"))
    except (OSError, ValueError):
        raise UserError(f"{folder / 'tokenizer.json'} is broken; use another checkpoint") from None


def load_weights(
    folder: Path, model: TransformerLanguageModel, extend: Callable[[Tensor], Tensor] = lambda embedding: embedding
) -> None:
    """Weights into the model; every name and shape must fit. extend: what to make of the embedding (V, C) before."""
    tensors, parameters = _load_tensors(folder / "model.safetensors"), dict(model.named_parameters())
    try:
        weights = from_qwen3(tensors, model.config)
        weights["wte.weight"] = extend(weights["wte.weight"])
        weights = {name: shard_like(parameters.get(name), tensor) for name, tensor in weights.items()}
        model.load_state_dict(weights, strict=True)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / 'model.safetensors'} does not fit the model it should hold: {reason}") from None


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Moments into the optimiser, each beside its parameter; every name and shape must fit."""
    file = folder / "optimizer.safetensors"
    tensors, moments = _load_tensors(file), moment_names(optimizer)
    for name, parameter in model.named_parameters():
        for key in moments[parameter]:
            tensor = tensors.pop(f"{name}.{key}", None)
            if tensor is None or tensor.shape != (() if key == "step" else parameter.shape):
                raise UserError(f"{file} does not fit the optimiser of this run: see {name}.{key}")
            tensor = tensor.to(parameter.device)
            optimizer.state[parameter][key] = tensor if key == "step" else shard_like(parameter, tensor)
    if tensors:
        raise UserError(f"{file} does not fit the optimiser of this run: {next(iter(tensors))} is left over")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} is missing, truncated or no safetensors file ({error}); use another checkpoint"
        ) from None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
