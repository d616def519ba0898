"""Compares smallm's quantiser with ONNX Runtime's quantisers: bits per character lost, seconds, size.

    python benchmarks/quantisers.py RUN [RUN ...]

For each run, every method quantises the fp32 graph of the best checkpoint, always the same matrices (the constant
inputs of the MatMul nodes in the layers). smallm's runtime scores the result on the first 100,000 characters of the
run's validation text, with inputs rounded to 8 bits as in an export. Prints a table per run. Needs the packages
onnx_ir and ml_dtypes, which ONNX Runtime's quantisers import but do not install: pip install onnx-ir ml-dtypes.
"""

import argparse
import importlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from smallm import LanguageModel
from smallm.cli.main import run
from smallm.errors import UserError
from smallm.export.calibration import generated_ids, second_moments
from smallm.export.folder import MAX_MEASURED, build_manifest
from smallm.export.graph import INT8_INPUTS, build_graph, set_accuracy
from smallm.export.quantisation import gptq, largest_block, round_to_nearest
from smallm.runs.layout import validation_text
from smallm.training.checkpoint.format import load_model
from smallm.training.checkpoint.manager import best_checkpoint

FORMATS = ((4, 32), (4, 128), (8, 32), (8, 128))
"""Bits and block sizes. smallm exports with blocks of 128, or of the width of the matrix if that is smaller."""


class Comparison:
    """One checkpoint, its fp32 graph and its matrices.

    peer: the module `matmul_nbits_quantizer` of ONNX Runtime.
    """

    def __init__(self, checkpoint: Path, folder: Path, peer: ModuleType):
        self.peer = peer
        self.model, self.manifest = load_model(checkpoint), build_manifest(checkpoint)
        self.file = folder / "model.onnx"
        self.proto = build_graph(self.model, self.manifest)
        onnx.save(self.proto, self.file)
        self.text = validation_text(checkpoint).read_text(encoding="utf-8")[:MAX_MEASURED]
        self.fp32 = self.bits_per_char(self.proto)
        names = {f"{name}_t" for name, _ in self.model.named_parameters()}
        constants = {name for node in self.proto.graph.node if node.op_type == "MatMul" for name in node.input}
        self.matrices = {
            name.removesuffix("_t"): self.model.get_parameter(name.removesuffix("_t")).detach().numpy()
            for name in sorted(names & constants)
        }

    def bits_per_char(self, proto: onnx.ModelProto) -> float:
        """Loss of a graph on the validation text."""
        self.file.write_bytes(proto.SerializeToString())
        return LanguageModel.load(self.file).perplexity(self.text).bits_per_char

    def ours(self, bits: int, block: int, calibrated: bool) -> onnx.ModelProto:
        """smallm's quantiser: GPTQ with searched scales if `calibrated`, otherwise round to nearest."""
        onnx.save(self.proto, self.file)
        moments = second_moments(self.model, generated_ids(self.file)) if calibrated else {}
        quantised = {}
        for name, matrix in self.matrices.items():
            size = min(block, largest_block(matrix.shape[1]))
            quantised[name] = (
                gptq(matrix, moments[name], bits, size) if calibrated else round_to_nearest(matrix, bits, size)
            )
        return build_graph(self.model, self.manifest, quantised)

    def theirs(self, bits: int, block: int, config: object, symmetric: bool) -> onnx.ModelProto:
        """ONNX Runtime's `MatMulNBitsQuantizer`; config None means round to nearest."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        quantiser = self.peer.MatMulNBitsQuantizer(
            proto, bits=bits, block_size=block, is_symmetric=symmetric, accuracy_level=INT8_INPUTS, algo_config=config
        )
        quantiser.process()
        proto = quantiser.model.model
        set_accuracy(proto, INT8_INPUTS)
        return proto

    def calibration(self, rows: int) -> Iterator[dict[str, np.ndarray]]:
        """Inputs of passes over text that the model generated."""
        m = self.manifest
        onnx.save(self.proto, self.file)
        past = np.zeros((1, m.n_kv_head, 0, m.head_dim), np.float32)
        for ids in generated_ids(self.file)[:rows]:
            feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
            yield feeds | {f"past_key_values.{i}.{part}": past for i in range(m.n_layer) for part in ("key", "value")}

    def methods(self, bits: int, block: int) -> dict[str, Callable[[], onnx.ModelProto]]:
        """Name of a method -> function that returns the quantised graph."""
        methods = {
            "smallm: round to nearest": lambda: self.ours(bits, block, calibrated=False),
            "smallm: GPTQ, searched scales": lambda: self.ours(bits, block, calibrated=True),
            "ONNX Runtime: round to nearest, symmetric": lambda: self.theirs(bits, block, None, True),
            "ONNX Runtime: round to nearest, zero points": lambda: self.theirs(bits, block, None, False),
        }
        if bits == 4:  # the other methods of ONNX Runtime are compared in 4 bits only
            hqq = self.peer.HQQWeightOnlyQuantConfig(block_size=block, bits=bits)
            k_quant = self.peer.KQuantWeightOnlyQuantConfig()
            methods["ONNX Runtime: HQQ"] = lambda: self.theirs(bits, block, hqq, False)
            methods["ONNX Runtime: k-quant"] = lambda: self.theirs(bits, block, k_quant, False)
            for mse in (False, True):
                name = f"ONNX Runtime: GPTQ{', searched scales' if mse else ''}"
                methods[name] = lambda mse=mse: self.theirs(
                    bits, block, self.peer.GPTQWeightOnlyQuantConfig(list(self.calibration(32)), mse=mse), False
                )
        return methods


def import_peer() -> ModuleType:
    """ONNX Runtime's quantiser. Raises `UserError` if a package that it needs is missing."""
    try:
        return importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    except ModuleNotFoundError as error:
        message = f"ONNX Runtime's quantiser needs the package {error.name}; pip install onnx-ir ml-dtypes"
        raise UserError(message) from None


def main(argv: Sequence[str]) -> None:
    """Prints one table per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    runs, peer = parser.parse_args(argv).runs, import_peer()
    logging.getLogger(peer.__name__).setLevel(logging.WARNING)
    for folder_of_run in runs:
        with tempfile.TemporaryDirectory() as folder:
            comparison = Comparison(best_checkpoint(folder_of_run), Path(folder), peer)
            print(f"\n{folder_of_run}: fp32 {comparison.fp32:.4f} bits per character\n")
            print("| bits | block | method | bits per character lost | seconds | kB |\n|---|---|---|---|---|---|")
            for bits, block in FORMATS:
                for name, method in comparison.methods(bits, block).items():
                    started = time.perf_counter()
                    try:
                        proto = method()
                        seconds, size = time.perf_counter() - started, proto.ByteSize() / 1000
                        lost = f"{comparison.bits_per_char(proto) - comparison.fp32:+.4f} | {seconds:.1f} | {size:.0f}"
                    except Exception as error:  # the table shows which methods fail
                        lost = f"fails: {type(error).__name__}: {str(error)[:60]} | - | -"
                    print(f"| {bits} | {block} | {name} | {lost} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(run(main))
