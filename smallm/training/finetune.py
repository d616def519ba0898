"""`--init-from`: a new run that begins with the model of another one, and learns a new text.

Shape and ids stay as they are; characters of the new text that have no id get one after the old ones. The moments of
the optimiser are not taken over: the run has a warm-up of its own, to a lower peak than that of a model that knows
nothing.
"""

import time
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from smallm.errors import UserError
from smallm.runs.layout import CHECKPOINTS, OLD_VALIDATION, VALIDATION, is_run, validation_text
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.checkpoint import format as checkpoint
from smallm.training.checkpoint.manager import best_checkpoint
from smallm.training.checkpoint.safe_load import check_fits
from smallm.training.config import Config
from smallm.training.data.corpus import BYTES
from smallm.training.distributed import broadcast_from_main
from smallm.training.evaluate import HeldOut, evaluate
from smallm.training.model.transformer import TransformerLanguageModel, init_embedding

if TYPE_CHECKING:
    from smallm.training.trainer import Trainer

SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "window", "rope_theta")
PEAK = 0.5  # of the learning rates: more forgets much more of the old text and hardly gains on the new one
MAX_OLD = 1 << 17  # characters of the old text that are measured on


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run begins with."""

    folder: Path
    config: Config
    vocabulary: Vocabulary
    old_text_loss: float | None
    """Nats per character of the old run's validation text; None if that is not there."""
    seconds: float
    """What measuring that took; it is measured once more at the end."""

    def scale_learning_rates(self, config: Config, explicit: Set[str]) -> Config:
        """`config` with rates for a model that knows something; what is `explicit`, as `section.field`, stays."""
        o = config.optim
        peaks = {"learning_rate": PEAK * o.learning_rate, "adam_learning_rate": PEAK * o.adam_learning_rate}
        chosen = {key: value for key, value in peaks.items() if f"optim.{key}" not in explicit}
        return replace(config, optim=replace(o, **chosen))

    def hand_over(self, trainer: "Trainer") -> None:
        """Gives a new run this model; all processes must call this, and all have the same weights then."""
        vocabulary = trainer.corpus.vocabulary
        checkpoint.load_weights(self.folder, trainer.model, lambda old: extend_embedding(old, vocabulary))
        trainer.state.base_vocab_size, trainer.state.old_text_loss = self.vocabulary.size, self.old_text_loss


def inherit_model_config(values: dict[str, Any], explicit: Set[str]) -> frozenset[str]:
    """Puts the shape of the model of `train.init_from` into the settings, and returns what is explicit now.

    Raises `UserError` if that is no model of ours, or if a setting contradicts it. The context may be another: rotary
    positions have no weights.
    """
    if "data.source" not in explicit:
        raise UserError("--init-from goes on with another text; name it: --data FILE")
    folder = origin_folder(Path(values["train"]["init_from"]))
    old = checkpoint.read_state(folder)[1].model
    shape, resolved = {name: getattr(old, name) for name in SHAPE}, {"n_kv_head": old.kv_heads, "n_inner": old.inner}
    for name, value in shape.items():
        given, value = values["model"][name], resolved.get(name, value)
        if f"model.{name}" in explicit and given not in (shape[name], value):
            raise UserError(f"model.{name} = {given} contradicts {folder}, which has {value}; leave it out")
    if "model.block_size" not in explicit:
        shape["block_size"] = old.block_size
    values["model"] |= shape
    values["train"]["init_from"] = str(folder)
    return frozenset(explicit) | {f"model.{name}" for name in (*SHAPE, "block_size")}


def origin_folder(path: Path) -> Path:
    """The checkpoint that this is, or the best one of the run that this is. Raises `UserError`."""
    if (path / checkpoint.STATE_FILE).is_file():
        if problem := checkpoint.verify(path):
            raise UserError(f"{path} is damaged ({problem}); use another checkpoint")
        return path
    if not is_run(path):
        raise UserError(f"{path} is neither a run nor a checkpoint of smallm; name one, such as runs/NAME")
    return best_checkpoint(path)


def name_of(folder: Path) -> str:
    """What to call the model of a checkpoint: the run, if it lies in one."""
    folder = folder.resolve()
    return folder.parents[1].name if folder.parent.name == CHECKPOINTS else folder.name


def origin_of(accelerator: Accelerator, config: Config, run: Path) -> Origin:
    """The checkpoint of `train.init_from`, measured on its old text, which is kept in the new run.

    Raises `UserError`.
    """
    folder = origin_folder(Path(config.train.init_from))
    old, vocabulary = checkpoint.read_state(folder)[1], checkpoint.load_vocabulary(folder)
    check_fits(folder / "model.safetensors", old.model, vocabulary.size)
    started, loss = time.perf_counter(), None
    if text := _beginning(folder):
        if accelerator.is_main_process:
            _keep(text, run)
        accelerator.wait_for_everyone()
        loss = old_text_loss(accelerator, checkpoint.load_model(folder, accelerator.device), vocabulary, run)
    (seconds,) = broadcast_from_main(accelerator, time.perf_counter() - started)
    return Origin(folder, old, vocabulary, loss, seconds)


def _keep(text: str, run: Path) -> None:
    try:
        (run / OLD_VALIDATION).write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror}; choose another --out") from None


def _beginning(folder: Path) -> str:
    """Of the validation text of a checkpoint's run; nothing if it is not there."""
    try:
        text = _read(validation_text(folder))
    except (UserError, OSError):
        return ""
    return text if len(text) > 1 else ""


def _read(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        return stream.read(MAX_OLD)


def old_text_loss(
    accelerator: Accelerator, model: TransformerLanguageModel, vocabulary: Vocabulary, run: Path
) -> float:
    """Nats per character of the old text, in windows as long as the model's context; all processes must call this."""
    text = _read(run / OLD_VALIDATION)
    return evaluate(accelerator, model, HeldOut(vocabulary.encode(text), len(text)), model.config.block_size)


def opening(trainer: "Trainer") -> str:
    """What the run began with, a line; nothing if it began with nothing."""
    s, size = trainer.state, trainer.corpus.vocabulary.size
    if not trainer.config.train.init_from:
        return ""
    loss = "" if s.old_text_loss is None else f"; {s.old_text_loss:.4f} nats per character on its own text"
    return f"init   {trainer.config.train.init_from}: {size - s.base_vocab_size:,} ids are new{loss}\n"


def measure_forgetting(trainer: "Trainer") -> list[str]:
    """How the loss on the old text moved, as a line and in the metrics; all processes must call this.

    Measured with the best checkpoint, which then is what `trainer.model` holds.
    """
    if not trainer.config.train.init_from:
        return []
    s, run, name = trainer.state, trainer.run, name_of(Path(trainer.config.train.init_from))
    if s.old_text_loss is None or not (run / OLD_VALIDATION).is_file():
        return [f"the old text of {name} ({VALIDATION}) was not there, so what became of its loss is not known"]
    if s.best_step != s.step:
        checkpoint.load_weights(checkpoint.checkpoint_folder(run, s.best_step), trainer.model)
    after = old_text_loss(trainer.accelerator, trainer.model, trainer.corpus.vocabulary, run)
    characters = len(_read(run / OLD_VALIDATION))
    trainer.report.old_text(step=s.best_step, name=name, characters=characters, before=s.old_text_loss, after=after)
    return [
        f"loss on the old text of {name}: {s.old_text_loss:.4f} nats per character before, {after:.4f} after "
        f"({after - s.old_text_loss:+.4f}), over {characters:,} characters"
    ]


def base_vocabulary(place: Path | None) -> Vocabulary:
    """To which the characters of the text were added, in a run that has come to this checkpoint."""
    size = 0 if place is None else checkpoint.read_state(place)[0].base_vocab_size
    return Vocabulary(checkpoint.load_vocabulary(place).tokens[: size - 256]) if size else BYTES


def extend_embedding(old: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Embedding (old size, C) -> (size, C), the new rows being those of a model that knows nothing.

    They beat the mean of the rows of the bytes that an id stands for: a model that has hardly met those bytes knows
    them as what never comes, and its first loss was nearly twice as high (13.4 nats instead of 7.5 on Russian).
    """
    new = torch.empty(vocabulary.size - len(old), old.size(1))
    init_embedding(new, torch.Generator().manual_seed(len(old)))
    return torch.cat((old, new.to(old)))
