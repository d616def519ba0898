"""smallm: character-level Transformer language models, from a text file to any app.

>>> from smallm import LanguageModel
>>> lm = LanguageModel.load("runs/shakespeare")
>>> print(lm.generate("O God, O God!", max_length=200, rng_seed=1))
"""

from typing import TYPE_CHECKING

from smallm.errors import UserError
from smallm.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from smallm.language_model import LanguageModel, Perplexity

__version__ = "0.1.0"
__all__ = ["LanguageModel", "Perplexity", "UserError", "Vocabulary", "__version__"]


def __getattr__(name: str):
    # onnxruntime costs start-up time that `smallm --help` and the trainer need not pay.
    if name in ("LanguageModel", "Perplexity"):
        from smallm import language_model as runtime

        return getattr(runtime, name)
    raise AttributeError(f"module 'smallm' has no attribute {name!r}")
