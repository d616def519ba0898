"""The command line of `export.py` and `smallm export`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from smallm.cli.arguments import ArgumentParser
from smallm.cli.table import table
from smallm.errors import command
from smallm.language_model import MODEL_FILE

DESCRIPTION = """\
Writes a trained model as a folder that other runtimes can open: model.onnx, which holds the vocabulary and the settings
too, the configuration files of other runtimes, and a README.md with examples. The exported model is compared with the
PyTorch model and measured on the validation text first. If it differs, or if its precision costs too much, nothing is
written."""
PRECISIONS = ("fp32", "int8", "int4")
KITS = ("c", "node", "web")


def main(argv: Sequence[str]) -> int:
    """Runs `export.py` with these arguments and returns the exit code."""
    options = _parser().parse_args(argv)
    # torch and onnx take seconds to import; mistakes in the options are reported before.
    from smallm.export.folder import export_run

    export = export_run(**vars(options))
    _print_summary(export)
    if options.kit:
        print(f"next: read {export.path / 'README.md'}")
    else:
        is_default = options.run is None and options.out is None
        model = () if is_default else ("--model", export.path)
        print(f"next: {command('infer', *model, '--seed', 'Once')}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser("export", description=DESCRIPTION,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("run", nargs="?", type=Path, help="a run folder or one of its checkpoints (default: the newest run)")
    add(
        "--kit",
        choices=KITS,
        help="write a kit instead: the model as part of a C program, a Node program or a web page",
    )
    add("--out", metavar="DIR", help="folder to write (default: RUN/export, or RUN/kit-KIT)")
    add("--precision", choices=PRECISIONS, default="fp32",
        help="precision of the weight matrices; fewer bits make a smaller file (default: fp32)")  # fmt: skip
    add("--allow-loss", action="store_true", help="write the model however many bits per character its precision costs")
    add("--gguf", action="store_true", help="also write a GGUF file for llama.cpp: f32, or q8_0 with int8")
    add("--portable", action="store_true",
        help="also write model.portable.onnx, which uses standard ONNX operators only")  # fmt: skip
    return parser


def _print_summary(export) -> None:
    """Prints sizes, differences and losses of what `export_run` returned."""
    from smallm.export.portable_graph import PORTABLE_FILE

    quality, loss = export.quality, export.manifest.training["val_loss"]
    print(
        f"{export.checkpoint} -> {export.path / MODEL_FILE}: {quality.bytes / 1e6:.2f} MB, {quality.precision}, "
        f"logits within {export.difference:.1e} of PyTorch's"
        + (f", validation loss {loss:.4f}" if loss is not None else "")
    )
    for name, size in export.sizes.items():
        if name == PORTABLE_FILE or name.endswith(".gguf"):
            print(f"{export.path / name}: {size / 1e6:.2f} MB")
    heads = ["precision", "MB", "bits/char", "characters/s", "ONNX Runtime"]
    print(*table([heads, *(row.cells() for row in export.measured)]), sep="\n")
    if quality.loss is not None:
        print(f"{quality.precision} costs {quality.loss:.4f} bits per character")
