"""Precisions of an exported model: how each is written, the loss that it may cost, and its measured quality."""

import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from smallm.errors import UserError
from smallm.export.calibration import generated_ids, second_moments
from smallm.export.graph import EXACT, build_graph, has_table, set_accuracy
from smallm.export.parity import check_parity
from smallm.export.quantisation import Quantised, gptq, largest_block, round_to_nearest
from smallm.language_model import LanguageModel
from smallm.model_file.manifest import Manifest
from smallm.training.model.transformer import TransformerLanguageModel

TIMED_IDS = 400
"""Ids that are generated to measure the speed."""
PARITY_IDS = 64
"""Longest sequence in the parity check of quantised matrices; MatMulNBits in fp32 arithmetic is slow."""


@dataclass(frozen=True)
class Precision:
    """How the weight matrices of a model are stored."""

    name: str
    onnxruntime: str
    """The oldest version of ONNX Runtime that runs it."""
    transformers_js: tuple[str, str]
    """Its name in transformers.js, and the file that transformers.js loads."""
    gguf: str | None
    """Type of the matrices in a GGUF file; None if GGUF has no such type."""
    bits: int = 32
    block: int = 0
    """Number of inputs that share a scale."""
    max_loss: float = 0.0
    """Bits per character that the precision may cost compared with fp32."""


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", "1.21", ("fp32", "onnx/model.onnx"), "F32"),
        Precision("int8", "1.23", ("int8", "onnx/model_int8.onnx"), "Q8_0", 8, 128, max_loss=0.002),  # x86-64: 1.22
        Precision("int4", "1.21", ("q4", "onnx/model_q4.onnx"), None, 4, 128, max_loss=0.02),
    )
}


@dataclass(frozen=True)
class Quality:
    """Measurements of a model file."""

    precision: str
    bytes: int
    """Size of the file before the measurements were stored in it."""
    bits_per_char: float | None
    """Loss on the beginning of the validation text; None if there is no validation text."""
    characters: int
    """Number of characters that were predicted to measure the loss."""
    chars_per_second: float
    """Speed of generating one text."""
    onnxruntime: str
    """The oldest version of ONNX Runtime that runs the file."""
    loss: float | None = None
    """Bits per character lost compared with fp32; None for fp32, or if there is no validation text."""

    def cells(self) -> list[str]:
        """Precision, MB, bits per character, characters per second and ONNX Runtime, for a table."""
        bits = "-" if self.bits_per_char is None else f"{self.bits_per_char:.4f}"
        size, speed = f"{self.bytes / 1e6:.2f}", f"{self.chars_per_second:,.0f}"
        return [self.precision, size, bits, speed, f"{self.onnxruntime} or newer"]


def measure(path: Path, precision: Precision, text: str, reference: Quality | None = None) -> Quality:
    """Measures a model file as an app would run it: loss on the text, if it has two characters or more, and speed.

    reference: the measurements in fp32, from which the loss of another precision is counted.
    """
    model = LanguageModel.load(path)
    bits = model.perplexity(text).bits_per_char if len(text) > 1 else None
    exact = None if reference is None else reference.bits_per_char
    loss = None if exact is None or bits is None else bits - exact
    size, characters = path.stat().st_size, max(0, len(text) - 1)
    return Quality(precision.name, size, bits, characters, _speed(model), precision.onnxruntime, loss)


def _speed(model: LanguageModel) -> float:
    """Characters per second, the best of three runs."""
    length, best = max(1, min(TIMED_IDS, model.block_size - 1)), 0.0
    for rng_seed in range(3):
        begun = time.perf_counter()
        written = sum(map(len, model.stream(max_length=length, rng_seed=rng_seed)))
        best = max(best, written / (time.perf_counter() - begun))
    return best


def write_quantised(model: TransformerLanguageModel, manifest: Manifest, path: Path, precision: Precision) -> float:
    """Replaces the fp32 model file by one with quantised matrices.

    Returns the largest difference of a logit from PyTorch with the same, dequantised matrices. The parity check runs in
    fp32 arithmetic, the written graph rounds the inputs of the products to 8 bits. Raises `UserError`.
    """
    quantised = _quantised(model, precision, path)
    model = deepcopy(model)
    model.load_state_dict({n: torch.from_numpy(q.dequantised()) for n, q in quantised.items()}, strict=False)
    proto = build_graph(model, manifest, quantised)
    exact = deepcopy(proto)
    set_accuracy(exact, EXACT)
    onnx.save(exact, path)
    difference = check_parity(model, path, PARITY_IDS)
    onnx.save(proto, path)
    return difference


def _quantised(model: TransformerLanguageModel, precision: Precision, reference: Path) -> dict[str, Quantised]:
    """Parameter name -> quantised matrix: rounded to nearest in 8 bits, by GPTQ in 4 bits.

    The embedding stays in fp32, and so does the first layer's QKV projection if it is exported as a table.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    if has_table(model):
        names.remove("h.0.attn.c_attn.weight")
    matrices = {name: model.get_parameter(name).detach().float().cpu().numpy() for name in names}
    blocks = {name: min(precision.block, largest_block(matrix.shape[1])) for name, matrix in matrices.items()}
    if precision.bits == 8:
        return {name: round_to_nearest(matrix, 8, blocks[name]) for name, matrix in matrices.items()}
    del matrices["wte.weight"]  # the output matrix in 4 bits costs more loss than its size is worth
    moments = second_moments(model, generated_ids(reference))
    return {name: gptq(matrix, moments[name], precision.bits, blocks[name]) for name, matrix in matrices.items()}


def check_loss(quality: Quality, precision: Precision) -> None:
    """Raises `UserError` if the precision costs more than it may, or if its cost is unknown."""
    advice = "choose another --precision, or pass --allow-loss"
    if quality.loss is None:
        raise UserError(f"there is no validation text to measure the loss of {precision.name} on; {advice}")
    if not quality.loss <= precision.max_loss:  # true for NaN as well
        raise UserError(
            f"{precision.name} loses {quality.loss:.4f} bits per character on the validation text, at most "
            f"{precision.max_loss:g} is allowed, so nothing was written; {advice}"
        )
