"""smallm: character-level Transformer language models, from a text file to any app.

>>> from smallm import LanguageModel
>>> lm = LanguageModel.load("runs/shakespeare")
>>> print(lm.generate("O God, O God!", max_length=200, rng_seed=1))
"""

from importlib import import_module
from typing import TYPE_CHECKING

from smallm.errors import UserError

if TYPE_CHECKING:
    from smallm.export import export
    from smallm.generation.config import GenerationConfig
    from smallm.generation.text_stream import TextChunk, TextStream
    from smallm.inference.scoring import Perplexity
    from smallm.language_model import LanguageModel
    from smallm.runs.summary import Run
    from smallm.tokenizer.vocabulary import Vocabulary
    from smallm.training.api import train

__version__ = "0.2.0"
__all__ = [
    "GenerationConfig", "LanguageModel", "Perplexity", "Run", "TextChunk", "TextStream", "UserError", "Vocabulary",
    "__version__", "export", "train",
]  # fmt: skip

# Imported at first use: `smallm --help` and the trainer need not wait for onnxruntime, and a missing
# package is reported in one line.
_LAZY = {
    "GenerationConfig": "smallm.generation.config",
    "LanguageModel": "smallm.language_model",
    "Perplexity": "smallm.inference.scoring",
    "Run": "smallm.runs.summary",
    "TextChunk": "smallm.generation.text_stream",
    "TextStream": "smallm.generation.text_stream",
    "Vocabulary": "smallm.tokenizer.vocabulary",
    "train": "smallm.training.api",
}


def __getattr__(name: str) -> object:
    if name == "export":  # the package is callable, see there
        return import_module("smallm.export")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'smallm' has no attribute {name!r}")
