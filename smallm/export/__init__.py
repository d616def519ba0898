"""Export of trained models: `smallm.export(run)` writes an ONNX folder or a kit. The only room that imports onnx."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from smallm.errors import missing_package
from smallm.options import check_names


class _HasPath(Protocol):
    @property
    def path(self) -> Path: ...


def export(
    run: str | os.PathLike[str] | _HasPath | None = None,
    *,
    precision: str = "fp32",
    kit: str | None = None,
    out: str | os.PathLike[str] | None = None,
    allow_loss: bool = False,
    gguf: bool = False,
    portable: bool = False,
) -> Path:
    """Writes a trained model as a folder that other runtimes open, or as a kit for another language.

    The exported model is compared with the PyTorch model and measured on the run's validation text first. The folder
    is written completely or not at all; an earlier export in the same place is replaced. Needs the `train` extra.

    Args:
        run: A run folder, one of its checkpoint folders, or an object with a `path`, such as what `smallm.train`
            returns. A run stands for its best checkpoint. None (the default) is the newest run in `runs/`.
        precision: How the weight matrices are stored: "fp32" (the default), "int8" or "int4".
        kit: "c", "node" or "web" writes a kit instead: sources around the model that make it part of a C program, a
            Node program or a web page. None (the default) writes the export folder.
        out: The folder to write. None (the default) is RUN/export, or RUN/kit-KIT.
        allow_loss: Write the model however many bits per character the precision costs. By default int8 may cost
            0.002 bits per character on the validation text and int4 0.02.
        gguf: Also write a GGUF file for llama.cpp, in f32 for fp32 and in q8_0 for int8. Not for a kit.
        portable: Also write `model.portable.onnx`, in fp32, which uses standard ONNX operators only. Not for a kit.

    Returns:
        The folder that was written. `smallm.LanguageModel.load` opens it.

    Raises:
        UserError: The run or an option is not usable, the exported model differs from the PyTorch model, the
            precision costs too much, or the folder cannot be written. Nothing has been written then.
    """
    try:
        from smallm.export.folder import export_run  # imports torch and onnx
    except ModuleNotFoundError as error:
        raise missing_package("export", error.name, "train") from None
    path: Any = getattr(run, "path", run)  # any type: `export_run` checks it
    return export_run(
        path, precision=precision, kit=kit, out=out, allow_loss=allow_loss, gguf=gguf, portable=portable
    ).path


class _CallableModule(ModuleType):
    """Lets `smallm.export(run)` work: Python binds the name `smallm.export` to this package once it is imported."""

    def __call__(self, run: str | os.PathLike[str] | _HasPath | None = None, **options: Any) -> Path:
        check_names(options, export.__kwdefaults__ or ())
        return export(run, **options)


sys.modules[__name__].__class__ = _CallableModule
