"""The precisions of an exported model, what each of them may cost, and what it does cost."""

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from smallm.cli.table import table
from smallm.errors import UserError
from smallm.export.calibration import own_text, second_moments
from smallm.export.graph import EXACT, build_graph, has_table, set_accuracy
from smallm.export.parity import check_parity
from smallm.export.quantisation import Quantised, fit, largest_block, round_to_nearest
from smallm.language_model import LanguageModel
from smallm.model_file.manifest import Manifest
from smallm.training.model.transformer import TransformerLanguageModel

TIMED_IDS = 400
PARITY_IDS = 64  # MatMulNBits in fp32 arithmetic is slow


@dataclass(frozen=True)
class Precision:
    """How the matrices of a model are stored."""

    name: str
    onnxruntime: str
    """The oldest version that runs it."""
    bits: int = 32
    block: int = 0
    """Inputs that share a scale."""
    most_loss: float = 0.0
    """Bits per character that it may cost against fp32."""


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", "1.21"),
        Precision("int8", "1.23", bits=8, block=128, most_loss=0.002),  # 1.22 on x86-64
        Precision("int4", "1.21", bits=4, block=128, most_loss=0.02),
    )
}


@dataclass(frozen=True)
class Quality:
    """What a model file is worth, measured."""

    precision: str
    bytes: int
    """Of the file, but for what it says of this."""
    bits_per_char: float | None
    """On the beginning of the validation text; None without one."""
    characters: int
    """How many were predicted for that."""
    chars_per_second: float
    """Of generation, one text."""
    onnxruntime: str
    """The oldest version that runs it."""
    loss: float | None = None
    """Bits per character lost against fp32."""

    def cells(self) -> list[str]:
        """Precision, MB, bits per character, characters per second and ONNX Runtime, for a table."""
        bits = "-" if self.bits_per_char is None else f"{self.bits_per_char:.4f}"
        size, speed = f"{self.bytes / 1e6:.2f}", f"{self.chars_per_second:,.0f}"
        return [self.precision, size, bits, speed, f"{self.onnxruntime} or newer"]


def measure(path: Path, precision: Precision, text: str, reference: Quality | None = None) -> Quality:
    """Loads a model file as an app would, scores the text with it, if there is enough, and lets it write."""
    model = LanguageModel.load(path)
    bits = model.perplexity(text).bits_per_char if len(text) > 1 else None
    loss = None if reference is None or bits is None else bits - reference.bits_per_char
    size, characters = path.stat().st_size, max(0, len(text) - 1)
    return Quality(precision.name, size, bits, characters, _speed(model), precision.onnxruntime, loss)


def _speed(model: LanguageModel) -> float:
    """Characters per second, the best of three."""
    length, best = max(1, min(TIMED_IDS, model.block_size - 1)), 0.0
    for rng_seed in range(3):
        begun = time.perf_counter()
        written = sum(map(len, model.stream(max_length=length, rng_seed=rng_seed)))
        best = max(best, written / (time.perf_counter() - begun))
    return best


def write_quantised(model: TransformerLanguageModel, manifest: Manifest, path: Path, precision: Precision) -> float:
    """Puts the graph with matrices in few bits in the place of that in fp32.

    Returns how far it is from PyTorch with the same matrices. That is checked in fp32 arithmetic: as the graph will
    run, inputs are rounded to 8 bits too. Raises `UserError`.
    """
    quantised = _quantised(model, precision, path)
    model = with_weights(model, {name: matrix.dequantised() for name, matrix in quantised.items()})
    proto = build_graph(model, manifest, quantised)
    exact = deepcopy(proto)
    set_accuracy(exact, EXACT)
    onnx.save(exact, path)
    difference = check_parity(model, path, PARITY_IDS)
    onnx.save(proto, path)
    return difference


def with_weights(model: TransformerLanguageModel, weights: Mapping[str, object]) -> TransformerLanguageModel:
    """A copy of a model with some of its parameters replaced by these arrays."""
    changed = deepcopy(model)
    with torch.no_grad():
        for name, values in weights.items():
            changed.get_parameter(name).copy_(torch.from_numpy(values))
    return changed


def _quantised(model: TransformerLanguageModel, precision: Precision, reference: Path) -> dict[str, Quantised]:
    """Every matrix but those that are tables in fp32: of 8 bits rounded, of 4 bits fitted to what goes through them."""
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    if has_table(model):
        names.remove("h.0.attn.c_attn.weight")
    matrices = {name: model.get_parameter(name).detach().float().cpu().numpy() for name in names}
    blocks = {name: min(precision.block, largest_block(matrix.shape[1])) for name, matrix in matrices.items()}
    if precision.bits == 8:
        return {name: round_to_nearest(matrix, 8, blocks[name]) for name, matrix in matrices.items()}
    del matrices["wte.weight"]  # in 4 bits the output matrix loses more than its size is worth
    moments = second_moments(model, own_text(reference))
    return {name: fit(matrix, moments[name], precision.bits, blocks[name]) for name, matrix in matrices.items()}


def check_loss(quality: Quality, precision: Precision) -> None:
    """Raises `UserError` if the precision costs more than it may, or if that is unknown."""
    if precision.bits == 32:
        return
    advice = "choose another --precision, or pass --allow-loss"
    if quality.loss is None:
        raise UserError(f"there is no validation text to measure the loss of {precision.name} on; {advice}")
    if not quality.loss <= precision.most_loss:  # also true for NaN
        raise UserError(
            f"{precision.name} loses {quality.loss:.4f} bits per character on the validation text, at most "
            f"{precision.most_loss:g} is allowed, so nothing was written; {advice}"
        )


def quality_table(rows: list[Quality]) -> str:
    """The measured files as lines of text, for a terminal."""
    heads = ["precision", "MB", "bits/char", "characters/s", "ONNX Runtime"]
    return "\n".join(table([heads, *(row.cells() for row in rows)]))
