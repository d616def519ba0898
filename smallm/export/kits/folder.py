"""Kits: a folder with the model and what makes it part of a program in another language, or of a web page.

The sources lie in smallm/embed.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from smallm.errors import UserError
from smallm.export.folder import replacing
from smallm.export.kits.javascript import write_node, write_web
from smallm.language_model import MODEL_FILE
from smallm.model_file.manifest import MANIFEST_FILE

SOURCES = Path(__file__).parents[2] / "embed"
SPECIFICATION = "SAMPLING.md"


def write_kit(name: str, export_folder: Path, out: Path) -> None:
    """Writes the kit of this name, around the model of an export folder, as a whole or not at all. Raises `UserError`.

    `out` may be missing, empty, or an earlier kit of the same name, which is replaced.
    """
    try:
        out = out.resolve()
        with replacing(out) as folder:
            WRITERS[name](export_folder / MODEL_FILE, folder)
            shutil.copyfile(export_folder / MANIFEST_FILE, folder / MANIFEST_FILE)
            shutil.copyfile(SOURCES / SPECIFICATION, folder / SPECIFICATION)
            _check_replaceable(out, {*(file.name for file in folder.iterdir()), *BUILT[name]})
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None


def _check_replaceable(out: Path, names: set[str]) -> None:
    """Raises `UserError` unless `out` is missing, empty, or a kit in which nothing else lies."""
    found = {file.name for file in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if found and MANIFEST_FILE not in found:
        raise UserError(f"{out} exists and is no kit; choose another --out")
    if found - names:
        raise UserError(f"{out} also holds {min(found - names)}, which would be lost; move it, or choose another --out")


def write_c(model: Path, out: Path) -> None:
    """Fills the folder `out` with the sources of a C program around the model."""
    for file in (model, *(file for file in (SOURCES / "c").iterdir() if file.is_file())):
        shutil.copyfile(file, out / file.name)


WRITERS: Mapping[str, Callable[[Path, Path], None]] = {"c": write_c, "node": write_node, "web": write_web}
"""Kit -> what fills its folder, given the model."""

BUILT: Mapping[str, tuple[str, ...]] = {
    "c": ("generate", "build"),
    "node": ("node_modules", "package-lock.json"),
    "web": (),
}
"""Kit -> what a user builds in its folder; it goes when the kit is written anew."""
