"""`train.py --check TEXT`: all that can be told of a text before a model is trained on it."""

from smallm.training.analysis.advice import full_report
from smallm.training.analysis.baselines import baselines
from smallm.training.analysis.text_statistics import examine
from smallm.training.config import DataConfig
from smallm.training.data.corpus import corpus_of


def check(data: DataConfig) -> int:
    """Prints the findings on stdout; returns 0, whatever they are. Raises UserError for a text that cannot be read."""
    corpus = corpus_of(data)
    print(*full_report(corpus, examine(corpus)), sep="\n", flush=True)
    figures = ", ".join(f"{one.name} {one.bits_per_char:.3f}" for one in baselines(corpus))
    print(f"beat     {figures}: bits per character of the validation tail, which a model must get below")
    return 0
