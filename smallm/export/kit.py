"""Kits: a folder with the model and the sources that make it part of a program in another language.

The sources lie in smallm/kits/NAME. A writer knows what else a kit of its name needs.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from smallm.errors import UserError
from smallm.export.folder import _check_replaceable, _replacing
from smallm.manifest import MANIFEST_FILE
from smallm.runtime import MODEL_FILE

SOURCES = Path(__file__).parents[1] / "kits"
SPECIFICATION = "SAMPLING.md"


def write_kit(name: str, export_folder: Path, out: Path) -> None:
    """Writes the kit of this name, around the model of an export folder, as a whole or not at all. Raises `UserError`.

    `out` may be missing, empty, or an earlier kit of the same name, which is replaced.
    """
    try:
        out = out.resolve()
        files = kit_files(name) | {file: export_folder / file for file in (MODEL_FILE, MANIFEST_FILE)}
        _check_replaceable(out, {*files, *BUILT.get(name, ())})
        with _replacing(out) as folder:
            for file, source in files.items():
                shutil.copyfile(source, folder / file)
            WRITERS[name](folder)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None


def kit_files(name: str) -> dict[str, Path]:
    """Name in the kit -> source of the files that every kit of this name has, besides the model."""
    found = {file.name: file for file in sorted((SOURCES / name).iterdir()) if file.is_file()}
    return found | {SPECIFICATION: SOURCES / SPECIFICATION}


def _sources_alone(folder: Path) -> None:
    """For a kit that is its sources and the model."""


WRITERS: Mapping[str, Callable[[Path], None]] = {"c": _sources_alone}
"""Kit -> what adds to its folder, which has sources, specification, model and manifest already."""

BUILT: Mapping[str, tuple[str, ...]] = {"c": ("generate", "build")}
"""Kit -> what a user builds in its folder; it goes when the kit is written anew."""
