"""`train.py --check TEXT`: all that can be told of a text before a model is trained on it."""

from smallm.training.advice import full_report
from smallm.training.config import DataConfig
from smallm.training.corpus import corpus_of
from smallm.training.doctor import examine


def check(data: DataConfig) -> int:
    """Prints the findings on stdout; returns 0, whatever they are. Raises UserError for a text that cannot be read."""
    corpus = corpus_of(data)
    print(*full_report(corpus, examine(corpus)), sep="\n", flush=True)
    return 0
