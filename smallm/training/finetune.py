"""`--init-from`: a new run that starts from the model of another run, and learns another text.

The shape of the model and its ids stay as they are; characters of the new text without an id get ids after the old
ones. The optimiser's moments are not inherited: the run has its own warm-up, to a lower peak than that of a new model.
"""

import time
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from smallm.errors import UserError
from smallm.runs.layout import OLD_VALIDATION, validation_text
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.checkpoint import format as checkpoint
from smallm.training.checkpoint.format import TrainingState
from smallm.training.checkpoint.manager import find_checkpoint
from smallm.training.checkpoint.safe_load import check_fits
from smallm.training.config import Config
from smallm.training.data.corpus import BYTES
from smallm.training.distributed import broadcast_from_main
from smallm.training.evaluate import evaluate
from smallm.training.model.transformer import TransformerLanguageModel, init_embedding

SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "window", "rope_theta")
LEARNING_RATE_SCALE = 0.5  # a higher peak forgets much more of the old text and hardly gains on the new text
MAX_OLD_CHARACTERS = 1 << 17  # of the old validation text that are evaluated


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run starts from."""

    folder: Path
    config: Config
    vocabulary: Vocabulary
    old_text_loss: float | None
    """Nats per character of the old run's validation text; None if that text is missing."""
    seconds: float
    """Duration of that evaluation, which is repeated at the end of the run."""

    def scale_learning_rates(self, config: Config, explicit: Set[str]) -> Config:
        """`config` with learning rates for a trained model; settings in `explicit` (`section.field`) stay."""
        o = config.optim
        peaks = {name: LEARNING_RATE_SCALE * getattr(o, name) for name in ("learning_rate", "adam_learning_rate")}
        return replace(config, optim=replace(o, **{k: v for k, v in peaks.items() if f"optim.{k}" not in explicit}))

    def load_into(self, model: TransformerLanguageModel, vocabulary: Vocabulary, state: TrainingState) -> None:
        """Loads the weights into a new model whose vocabulary extends the old one, and notes the origin in `state`.

        All processes must call this.
        """
        checkpoint.load_weights(self.folder, model, lambda old: extend_embedding(old, vocabulary))
        state.base_vocab_size, state.old_text_loss = self.vocabulary.size, self.old_text_loss


def inherit_model_config(values: dict[str, Any], explicit: Set[str]) -> frozenset[str]:
    """Copies the shape of the model of `train.init_from` into `values`, and returns the settings that are now explicit.

    The context length may differ, since rotary positions have no weights. Raises `UserError` if `init_from` is not a
    run or a checkpoint, or if an explicit setting contradicts the shape.
    """
    if "data.source" not in explicit:
        raise UserError("--init-from trains on another text; name it: --data FILE")
    folder = find_checkpoint(Path(values["train.init_from"]))
    old = checkpoint.read_state(folder)[1].model
    shape, resolved = {name: getattr(old, name) for name in SHAPE}, {"n_kv_head": old.kv_heads, "n_inner": old.inner}
    for name, value in shape.items():
        given, value = values[f"model.{name}"], resolved.get(name, value)
        if f"model.{name}" in explicit and given not in (shape[name], value):
            raise UserError(f"model.{name} = {given} contradicts {folder}, which has {value}; leave it out")
    if "model.block_size" not in explicit:
        shape["block_size"] = old.block_size
    values |= {f"model.{name}": value for name, value in shape.items()}
    values["train.init_from"] = str(folder)
    return frozenset(explicit) | {f"model.{name}" for name in (*SHAPE, "block_size")}


def load_origin(accelerator: Accelerator, config: Config, run: Path) -> Origin:
    """The checkpoint of `train.init_from`, with its loss on the old text, a copy of which is stored in the new run.

    All processes must call this.
    """
    folder = find_checkpoint(Path(config.train.init_from))
    old, vocabulary = checkpoint.read_state(folder)[1], checkpoint.load_vocabulary(folder)
    check_fits(folder / "model.safetensors", old.model, vocabulary.size)
    started, loss = time.perf_counter(), None
    if text := _old_text(folder):
        if accelerator.is_main_process:
            try:
                (run / OLD_VALIDATION).write_text(text, encoding="utf-8", newline="")
            except OSError as error:
                raise UserError(f"cannot write to {run}: {error.strerror}; choose another --out") from None
        accelerator.wait_for_everyone()
        loss, _ = old_text_loss(accelerator, checkpoint.load_model(folder, accelerator.device), vocabulary, run)
    (seconds,) = broadcast_from_main(accelerator, time.perf_counter() - started)
    return Origin(folder, old, vocabulary, loss, seconds)


def old_text_loss(
    accelerator: Accelerator, model: TransformerLanguageModel, vocabulary: Vocabulary, run: Path
) -> tuple[float, int]:
    """Nats per character of the old text stored in `run`, and its length; all processes must call this."""
    text = _read(run / OLD_VALIDATION)
    loss = evaluate(accelerator, model, vocabulary.encode(text), len(text), model.config.block_size)
    assert loss is not None  # nothing interrupts it
    return loss, len(text)


def base_vocabulary(folder: Path | None) -> Vocabulary:
    """The vocabulary that the characters of the training text were added to, in the run of this checkpoint."""
    if folder is None:
        return BYTES
    size = checkpoint.read_state(folder)[0].base_vocab_size
    return Vocabulary(checkpoint.load_vocabulary(folder).tokens[: size - 256]) if size else BYTES


def extend_embedding(old: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Embedding (old size, C) -> (vocabulary.size, C); the new rows are initialised as those of a new model.

    The mean of the rows of a character's UTF-8 bytes is worse: the old model has learned that rare bytes never occur,
    which nearly doubles the first loss (13.4 nats instead of 7.5 on Russian).
    """
    new = torch.empty(vocabulary.size - len(old), old.size(1))
    init_embedding(new, torch.Generator().manual_seed(len(old)))
    return torch.cat((old, new.to(old)))


def _old_text(folder: Path) -> str:
    """The start of the validation text of a checkpoint's run; empty if that text is missing."""
    try:
        text = _read(validation_text(folder))
    except (UserError, OSError):
        return ""
    return text if len(text) > 1 else ""


def _read(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        return stream.read(MAX_OLD_CHARACTERS)
