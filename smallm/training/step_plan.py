"""How a run divides into steps: micro-batches, epochs, evaluations and checkpoints."""

from dataclasses import dataclass

from smallm.training.config import Config
from smallm.training.data.corpus import Corpus
from smallm.training.data.dataset import CharDataset
from smallm.training.optim.schedule import divide_batch


@dataclass(frozen=True)
class StepPlan:
    """The sizes that follow from config, text and number of processes."""

    micro_batch_size: int
    """Sequences of one process in one forward pass."""
    grad_accum_steps: int
    """Forward passes of each process in a step."""
    steps_per_epoch: float
    eval_every: int
    """Steps between evaluations."""
    save_every: int
    """Steps between checkpoints."""
    ids_per_character: float
    """Of the training text. Losses and speeds are reported per character, independently of the vocabulary."""
    characters_per_step: float

    @classmethod
    def of(cls, config: Config, corpus: Corpus, dataset: CharDataset, ranks: int) -> "StepPlan":
        """Raises `UserError` if the batch cannot be divided over `ranks` processes."""
        c = config.train
        steps_per_epoch = len(dataset) / c.batch_size
        eval_every = c.eval_every or max(1, round(steps_per_epoch))
        ids_per_character = len(corpus.train_ids) / corpus.train_characters
        return cls(
            *divide_batch(c.batch_size, c.micro_batch_size, ranks), steps_per_epoch, eval_every,
            c.save_every or eval_every, ids_per_character, c.batch_size * config.model.block_size / ids_per_character,
        )  # fmt: skip
