"""`--train.ensemble N`: N models in one run, one after another; each learns from all those before it.

The first model learns from the text alone. Every later one starts with new weights and learns from the text and from
the mean of the probabilities that the models before it, its teachers, give to each id (Hinton, Vinyals and Dean 2015;
born-again networks, Furlanello et al. 2018). The last model is the result of the run. A text that is read many times
teaches a single model to memorise the text; the probabilities of a teacher tell the next model which other ids could
have followed.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from smallm.training.checkpoint.format import TrainingState, load_teachers
from smallm.training.config import Config
from smallm.training.distributed import full_tensor, shard_like
from smallm.training.model.operations import cross_entropy
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.schedule import member_shares

TEACHER_WEIGHT = 0.7  # of the loss against the teachers' probabilities; the rest is the loss against the text


class Ensemble:
    """The models of a run: which one trains when, and the finished ones, which teach it."""

    def __init__(self, accelerator: Accelerator, config: Config, vocab_size: int):
        self._accelerator, self._config, self._vocab_size = accelerator, config, vocab_size
        self.size = config.train.ensemble
        self._teachers = nn.ModuleList()

    def is_last(self, state: TrainingState) -> bool:
        """Whether the model that trains is the one that the run keeps."""
        return state.member == self.size - 1

    def end(self, state: TrainingState, total_steps: int) -> int:
        """The step at which the training of the current model ends, after at least one step."""
        share = sum(member_shares(self.size)[: state.member + 1])
        return max(state.member_start + 1, round(total_steps * share))

    def loss(self, logits: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the cross-entropy with the text that is part of it; both in nats per id.

        logits: of the model that trains, (B, T, V); ids, targets: (B, T).
        """
        text_loss = cross_entropy(logits, targets)
        if not self._teachers:
            return text_loss, text_loss
        teacher_loss = F.cross_entropy(logits.flatten(0, 1).float(), self._probabilities(ids).flatten(0, 1))
        return TEACHER_WEIGHT * teacher_loss + (1 - TEACHER_WEIGHT) * text_loss, text_loss

    def start_next(
        self, model: TransformerLanguageModel, optimizer: torch.optim.Optimizer, state: TrainingState
    ) -> None:
        """Makes the trained model a teacher, and gives `model` and `optimizer` the state of a new one.

        All processes must call this. The best loss starts anew too, since it is that of the model that the run keeps.
        """
        teacher = self._new_model()
        teacher.load_state_dict({name: full_tensor(tensor) for name, tensor in model.state_dict().items()})
        self._teachers.append(teacher)
        state.member, state.member_start = state.member + 1, state.step
        state.best_val_loss, state.best_step, state.evaluations_since_best = None, state.step, 0
        new, parameters = self._new_model(self._config.train.seed + state.member), dict(model.named_parameters())
        model.load_state_dict({name: shard_like(parameters[name], tensor) for name, tensor in new.state_dict().items()})
        optimizer.state.clear()

    def tensors(self) -> dict[str, Tensor]:
        """The teachers' weights as `number.parameter`, on the CPU, for a checkpoint."""
        return {name: tensor.cpu() for name, tensor in self._teachers.state_dict().items()}

    def restore(self, folder: Path, state: TrainingState) -> None:
        """Loads the teachers of a checkpoint. Raises `UserError` if they are missing or do not fit the model."""
        self._teachers.extend(self._new_model() for _ in range(state.member))
        load_teachers(folder, self._teachers)

    def _new_model(self, seed: int = 0) -> TransformerLanguageModel:
        model = TransformerLanguageModel(self._vocab_size, self._config.model, seed)
        return model.to(self._accelerator.device).eval()

    @torch.no_grad()
    def _probabilities(self, ids: Tensor) -> Tensor:
        """The mean of the teachers' probabilities of the next id: ids (B, T) -> (B, T, V)."""
        with self._accelerator.autocast():
            return torch.stack([teacher(ids).float().softmax(-1) for teacher in self._teachers]).mean(0)
