"""`export.py`: from a run to a folder that any app can embed."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from smallm.errors import UserError
from smallm.runs import CHECKPOINTS, EXPORT, newest_run

DESCRIPTION = """\
Writes a trained model as an ONNX folder: model.onnx with vocabulary and settings inside, and the JSON files that other
runtimes read. The file is compared with the PyTorch model first; if they differ, nothing is written."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")


def main(argv: Sequence[str]) -> int:
    """Runs `export.py` with these arguments."""
    parser = _Parser(prog="export.py", description=DESCRIPTION, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", nargs="?", type=Path, help="run, or one of its checkpoints; default: the newest run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="export folder; default: RUN/export")
    options = parser.parse_args(argv)
    from smallm.export.folder import export_checkpoint  # torch and onnx are slow to import: mistakes are told before
    from smallm.runtime import MODEL_FILE
    from smallm.training.checkpoint import STATE_FILE, damage
    from smallm.training.shelf import best_checkpoint

    run = options.run or newest_run()
    try:
        checkpoint = run if (run / STATE_FILE).is_file() else best_checkpoint(run)
        if checkpoint == run and (problem := damage(run)):
            raise UserError(f"{run} is damaged ({problem}); export another checkpoint")
    except OSError as error:
        raise UserError(f"cannot read {run}: {error.strerror}") from None
    within_run = checkpoint == run and run.parent.name == CHECKPOINTS
    out = options.out or (run.parent.parent if within_run else run) / EXPORT
    manifest, difference = export_checkpoint(checkpoint, out)
    size = (out / MODEL_FILE).stat().st_size
    loss = manifest.training["val_loss"]
    print(
        f"{checkpoint} -> {out / MODEL_FILE}: {size / 1e6:.2f} MB, {manifest.precision}, "
        f"logits within {difference:.1e} of PyTorch's" + (f", validation loss {loss:.4f}" if loss is not None else "")
    )
    model = "" if options.run is None and options.out is None else f" --model {shlex.quote(str(out))}"
    print(f'next: python infer.py{model} --seed "Once"')
    return 0
