"""Kits: a folder with a model and the sources that make it part of a C program, a Node program or a web page.

The sources are in `smallm/embed/`.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from smallm.errors import UserError
from smallm.export.model_card import filled
from smallm.generation.draft_table import DRAFT_TABLE_FILE
from smallm.html.web_page import PAGE_FILES, SOURCES, stated_sizes
from smallm.language_model import MODEL_FILE, find_model
from smallm.model_file.manifest import MANIFEST_FILE

SPECIFICATION = "SAMPLING.md"
SUMS_FILE = "SHA256SUMS"
"""Digests of the files that a kit was written with, in the format of `sha256sum`: other files were edited."""
MODULE = ("js/smallm.js", "js/smallm.d.ts", "js/smallm.wasm")
FILES: Mapping[str, Sequence[str]] = {
    "c": ("c/*",),
    "node": (*MODULE, "js/smallm.cjs", "js/smallm.d.cts", "js/LICENSE", "node/*"),
    "web": (*MODULE, "web/*"),
}
"""Kit -> its sources in `smallm/embed/`."""
__all__ = ["PAGE_FILES", "SOURCES", "write_kit", "write_sources"]


def write_kit(name: str, export_folder: Path, out: Path) -> None:
    """Writes the kit "c", "node" or "web" around the model of an export folder.

    `out` may be missing, empty, or an earlier kit: its files are replaced, and files that the user has added, such as
    `node_modules`, stay. Raises `UserError`, before any file is written if the user has edited one of them.
    """
    try:
        out = out.resolve()
        parent = next(folder for folder in out.parents if folder.exists())
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=parent) as temporary:
            folder = Path(temporary)
            write_sources(name, export_folder, folder)
            shutil.copyfile(export_folder / MANIFEST_FILE, folder / MANIFEST_FILE)
            shutil.copyfile(SOURCES / SPECIFICATION, folder / SPECIFICATION)
            _move_files(folder, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None


def _move_files(folder: Path, out: Path) -> None:
    """Moves the files of a new kit into `out`. Raises `UserError` if a file there has been edited."""
    sums_file = out / SUMS_FILE
    known = sums_file.read_text(encoding="utf-8", errors="replace").splitlines() if sums_file.is_file() else []
    if not known and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not a kit with a file {SUMS_FILE}; move it away, or choose another --out")
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    sums = [f"{_sha256(folder / name)}  {name}" for name in names]
    for name in names:
        if (out / name).exists() and f"{_sha256(out / name)}  {name}" not in {*known, *sums}:
            raise UserError(f"{out / name} has been edited; move it away, or choose another --out")
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).replace(out / name)
    sums_file.write_text("\n".join([*sums, ""]), encoding="utf-8", newline="\n")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_sources(kit: str, model: Path, out: Path) -> None:
    """Writes a model, which is a .onnx file or an export folder, and the sources of a kit into a folder; for C also the
    draft table beside the model, if there is one."""
    files = {file.name: file for pattern in FILES[kit] for file in SOURCES.glob(pattern) if file.is_file()}
    model = find_model(model)
    table = model.with_name(DRAFT_TABLE_FILE)
    if kit == "c" and table.is_file():
        files[DRAFT_TABLE_FILE] = table
    out.mkdir(parents=True, exist_ok=True)
    for name, file in {**files, MODEL_FILE: model}.items():
        shutil.copyfile(file, out / name)
    if kit == "web":
        sizes = stated_sizes({file.name: file.read_bytes() for file in out.iterdir() if file.is_file()})
        for name in ("index.html", "README.md"):
            text = (out / name).read_text(encoding="utf-8")
            (out / name).write_text(filled(text, sizes), encoding="utf-8")
