"""The format of a checkpoint: a folder of safetensors and JSON files, which is also a Hugging Face model folder.

checkpoints/step-000500/
    model.safetensors, config.json, generation_config.json, tokenizer.json, tokenizer_config.json
    optimizer.safetensors     optimiser state by parameter name
    teachers.safetensors      weights of the models trained before, by number and parameter name (train.ensemble)
    training_state.json       step, losses, resolved config, fingerprint of the text, versions, SHA-256 of the others

A checkpoint is written into a temporary folder and renamed, so it is either complete or absent. Pickle is never used.
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

from smallm.atomic_write import rename, sync
from smallm.errors import UserError
from smallm.model_file.manifest import check_facts
from smallm.runs.layout import CHECKPOINTS
from smallm.runs.state_file import CHANGED, CHECKSUM, FORMAT_VERSION, STATE_FILE, checksum, read_json, read_state_file
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.checkpoint.hugging_face import hugging_face_files
from smallm.training.checkpoint.qwen3 import from_qwen3, to_qwen3
from smallm.training.checkpoint.safe_load import check_fits, check_header
from smallm.training.config import Config, check_types
from smallm.training.distributed import full_tensor, shard_like
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.optimizers import moment_names

TEACHERS = "teachers.safetensors"
REPLACED = ".old"  # suffix of a checkpoint while another one of the same step takes its place


@dataclass
class TrainingState:
    """The progress of a run. Together with weights, optimiser state and config, all that a resume needs."""

    step: int = 0
    """Number of optimiser steps done."""
    val_loss: float | None = None
    """Validation loss at this step, in nats per character; None if not evaluated."""
    best_val_loss: float | None = None
    """Lowest validation loss so far, in nats per character."""
    best_step: int = 0
    """Step of the lowest validation loss."""
    evaluations_since_best: int = 0
    """Number of evaluations after `best_step`."""
    member: int = 0
    """Number of models of an ensemble (train.ensemble) that are trained; the best loss is that of the current model."""
    member_start: int = 0
    """Step at which the training of the current model began."""
    planned_steps: int = 0
    """Number of steps of the whole run; under train.minutes the estimate at this step."""
    seconds: float = 0.0
    """Training time so far. The first part counts from the start of the program, a resumed part from its first step."""
    fingerprint: str = ""
    """SHA-256 of the text."""
    start_text: str = "\n"
    """Seed text of samples, if sample.seed is empty."""
    base_vocab_size: int = 0
    """Size of the vocabulary of the model that train.init_from names; 0 without train.init_from."""
    old_text_loss: float | None = None
    """Loss of that model on its own validation text before this run, in nats per character."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the fp16 loss scaler; empty in other precisions."""
    skipped_steps: int = 0
    """Number of steps skipped because the gradient was not finite."""
    skipped_in_a_row: int = 0
    """Number of skipped steps in a row up to this step."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Name and size of the text, device, versions: copied into exports."""


def gather_tensors(
    model: TransformerLanguageModel, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by Qwen3's names and optimiser state by `parameter.exp_avg`, unsharded and on the CPU.

    All processes must call this if the model is sharded. A GPU holds only one whole tensor at a time.
    """
    weights = to_qwen3({name: _whole(tensor) for name, tensor in model.state_dict().items()}, model.config)
    moments = {
        f"{name}.{key}": _whole(tensor).contiguous()
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }
    return weights, moments


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / CHECKPOINTS / f"step-{step:06d}"


def save_checkpoint(
    run: Path, state: TrainingState, config: Config, tensors: tuple[dict[str, Tensor], dict[str, Tensor]],
    vocabulary: Vocabulary, teachers: dict[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """Writes the folder `checkpoints/step-NNNNNN` with the result of `gather_tensors`, and returns its path.

    teachers: the weights of the models of an ensemble that are trained, as `number.parameter`.
    A checkpoint of the same step is replaced. If anything fails, the old checkpoint stays and nothing else is left
    behind. Raises `OSError`.
    """
    folder = checkpoint_folder(run, state.step)
    unfinished, old = (folder.with_name(f".{folder.name}.{os.getpid()}{ending}") for ending in ("", REPLACED))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        weights, moments = tensors
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        save_file(moments, unfinished / "optimizer.safetensors")
        if teachers:
            save_file(teachers, unfinished / TEACHERS)
        for name, content in hugging_face_files(config, vocabulary).items():
            _write_json(unfinished / name, content)
        values = {"format_version": FORMAT_VERSION, **asdict(state), "config": config.to_dict(),
                  CHANGED: config.changed()}  # fmt: skip
        values["sha256"] = {file.name: _sha256(file) for file in sorted(unfinished.iterdir())}
        _write_json(unfinished / STATE_FILE, values | {CHECKSUM: checksum(values)})
        mode = (unfinished / STATE_FILE).stat().st_mode
        for file in unfinished.iterdir():
            file.chmod(mode)  # safetensors creates files that only their owner may read
            sync(file)
        sync(unfinished)
        if folder.exists():
            rename(folder, old)
        rename(unfinished, folder)
        sync(folder.parent)
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from None
    finally:
        if old.exists() and not folder.exists():  # interrupted between the two renames
            rename(old, folder)
        for leftover in (unfinished, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def read_state(folder: Path) -> tuple[TrainingState, Config]:
    """State and config from `training_state.json` of a checkpoint. Raises `UserError` if the file is broken."""
    values = read_state_file(folder)
    try:
        for key in ("format_version", "sha256"):
            del values[key]
        values.pop(CHANGED, None)
        config, state = Config.from_dict(values.pop("config")), TrainingState(**values)
        check_types(state)
        check_facts(state.facts)
        if not all(type(n) is int and n >= 0 for n in (state.step, state.best_step, state.evaluations_since_best,
                                                       state.member, state.member_start)):  # fmt: skip
            raise ValueError("step counts must not be negative")
        if state.member >= config.train.ensemble:
            raise ValueError("an ensemble has no model of this number")
        return state, config
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        reason = f" ({error})" if isinstance(error, UserError) else ""
        raise UserError(f"{folder / STATE_FILE} is broken{reason}; use another checkpoint") from None


def verify(folder: Path) -> str:
    """Compares all files of a checkpoint with their checksums; returns the first problem, or "" if all are intact."""
    try:
        checksums = read_state_file(folder)["sha256"]
        for name in sorted(checksums):
            file = folder / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if _sha256(file) != checksums[name]:
                return f"{name} does not match its checksum"
    except UserError as error:
        return str(error).removeprefix(f"{folder}{os.sep}")
    except (OSError, TypeError, AttributeError, KeyError) as error:
        return f"unreadable: {error}"
    return ""


def load_model(folder: Path, device: str | torch.device = "cpu") -> TransformerLanguageModel:
    """The model of a checkpoint, in eval mode, on `device`. Raises `UserError` if the checkpoint is damaged."""
    config, vocabulary = read_state(folder)[1], load_vocabulary(folder)
    check_fits(folder / "model.safetensors", config.model, vocabulary.size)
    model = TransformerLanguageModel(vocabulary.size, config.model)
    load_weights(folder, model)
    return model.to(device).eval()


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary in `tokenizer.json` of a checkpoint. Raises `UserError` if the file is broken."""
    try:
        return Vocabulary.from_tokenizer_json(read_json(folder / "tokenizer.json"))
    except (OSError, ValueError):
        raise UserError(f"{folder / 'tokenizer.json'} is broken; use another checkpoint") from None


def load_weights(
    folder: Path, model: TransformerLanguageModel, extend: Callable[[Tensor], Tensor] = lambda embedding: embedding
) -> None:
    """Loads the weights of a checkpoint into `model`. Raises `UserError` unless all names and shapes match.

    extend: applied to the stored embedding (V, C) first, to add rows for new ids.
    """
    tensors, parameters = _load_tensors(folder / "model.safetensors"), dict(model.named_parameters())
    try:
        weights = from_qwen3(tensors, model.config)
        weights["wte.weight"] = extend(weights["wte.weight"])
        weights = {name: shard_like(parameters.get(name), tensor) for name, tensor in weights.items()}
        model.load_state_dict(weights, strict=True)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / 'model.safetensors'} does not match its config: {reason}") from None


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimiser state of a checkpoint. Raises `UserError` unless all names and shapes match."""
    file = folder / "optimizer.safetensors"
    tensors, moments = _load_tensors(file), moment_names(optimizer)
    for name, parameter in model.named_parameters():
        for key in moments[parameter]:
            tensor = tensors.pop(f"{name}.{key}", None)
            if tensor is None or tensor.shape != (() if key == "step" else parameter.shape):
                raise UserError(f"{file} does not match the optimiser of this run: see {name}.{key}")
            tensor = tensor.to(parameter.device)
            optimizer.state[parameter][key] = tensor if key == "step" else shard_like(parameter, tensor)
    if tensors:
        raise UserError(f"{file} does not match the optimiser of this run: unexpected {next(iter(tensors))}")


def load_teachers(folder: Path, teachers: nn.ModuleList) -> None:
    """Loads the weights of the teachers of a checkpoint. Raises `UserError` unless all names and shapes match."""
    file = folder / TEACHERS
    tensors = _load_tensors(file) if teachers else {}
    try:
        teachers.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(f"{file} does not match its config: {' '.join(str(error).split())}") from None


def _whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on the CPU."""
    return full_tensor(tensor).detach().cpu()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _load_tensors(file: Path) -> dict[str, Tensor]:
    check_header(file)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} is missing, truncated or not a safetensors file ({error}); use another checkpoint"
        ) from None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
