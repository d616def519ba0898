"""`export.py`: from a run to a folder that any app can embed."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from smallm.cli.arguments import ArgumentParser
from smallm.errors import UserError
from smallm.runs.layout import CHECKPOINTS, EXPORT, newest_run

DESCRIPTION = """\
Writes a trained model as a folder that other runtimes open too: model.onnx with vocabulary and settings inside, the
files that they look for, and a README.md that says how. The model is first compared with PyTorch's, and measured on the
validation text: if it differs, or if its precision costs too much, nothing is written."""
PRECISIONS = ("fp32", "int8", "int4")
KITS = ("c", "node", "web")


def main(argv: Sequence[str]) -> int:
    """Runs `export.py` with these arguments."""
    parser = ArgumentParser(prog="export.py", description=DESCRIPTION,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", nargs="?", type=Path, help="run, or one of its checkpoints; default: the newest run")
    parser.add_argument("--kit", choices=KITS,
                        help="write a kit instead: the model as part of a program or a web page")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="its folder; default: RUN/export, or RUN/kit-KIT")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32",
                        help="of the matrices; fewer bits: smaller, faster")  # fmt: skip
    parser.add_argument("--allow-loss", action="store_true", help="write it whatever the precision costs")
    parser.add_argument("--gguf", action="store_true", help="with a GGUF for llama.cpp: f32, or q8_0 with int8")
    parser.add_argument("--portable", action="store_true",
                        help="with model.portable.onnx: standard operators only, for other engines")  # fmt: skip
    options = parser.parse_args(argv)
    if options.kit and (options.gguf or options.portable):
        raise UserError("--gguf and --portable belong to the export folder; leave out --kit")
    from smallm.export.folder import export_checkpoint  # torch and onnx are slow to import: mistakes are told before
    from smallm.export.kits.folder import write_kit
    from smallm.export.portable_graph import PORTABLE_FILE
    from smallm.export.precision import quality_table
    from smallm.language_model import MODEL_FILE
    from smallm.training.checkpoint.format import STATE_FILE, verify
    from smallm.training.checkpoint.manager import best_checkpoint

    run = options.run or newest_run()
    try:
        checkpoint = run if (run / STATE_FILE).is_file() else best_checkpoint(run)
        if checkpoint == run and (problem := verify(run)):
            raise UserError(f"{run} is damaged ({problem}); export another checkpoint")
    except OSError as error:
        raise UserError(f"cannot read {run}: {error.strerror}") from None
    within_run = checkpoint == run and run.parent.name == CHECKPOINTS
    home = run.parent.parent if within_run else run
    out = options.out or home / (f"kit-{options.kit}" if options.kit else EXPORT)
    if options.kit:
        with TemporaryDirectory(prefix="smallm-") as folder:
            export = export_checkpoint(checkpoint, Path(folder) / EXPORT, options.precision, options.allow_loss)
            write_kit(options.kit, Path(folder) / EXPORT, out)
    else:
        export = export_checkpoint(
            checkpoint, out, options.precision, options.allow_loss, options.gguf, options.portable
        )
    quality = next(quality for quality in export.measured if quality.precision == options.precision)
    loss = export.manifest.training["val_loss"]
    print(
        f"{checkpoint} -> {out / MODEL_FILE}: {quality.bytes / 1e6:.2f} MB, {quality.precision}, "
        f"logits within {export.difference:.1e} of PyTorch's"
        + (f", validation loss {loss:.4f}" if loss is not None else "")
    )
    for name, size in export.sizes.items():
        if name == PORTABLE_FILE or name.endswith(".gguf"):
            print(f"{out / name}: {size / 1e6:.2f} MB")
    print(quality_table(export.measured))
    if quality.loss is not None:
        print(f"{quality.precision} costs {quality.loss:.4f} bits per character")
    if options.kit:
        print(f"next: read {out / 'README.md'}")
        return 0
    model = "" if options.run is None and options.out is None else f" --model {shlex.quote(str(out))}"
    print(f'next: python infer.py{model} --seed "Once"')
    return 0
