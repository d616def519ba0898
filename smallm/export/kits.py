"""Kits: a folder with a model and the sources that make it part of a C program, a Node program or a web page.

The sources are in `smallm/embed/`.
"""

import gzip
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from smallm.errors import UserError
from smallm.language_model import MODEL_FILE, find_model
from smallm.model_file.manifest import MANIFEST_FILE

SOURCES = Path(__file__).parents[1] / "embed"
SPECIFICATION = "SAMPLING.md"
SUMS_FILE = "SHA256SUMS"
"""Digests of the files that a kit was written with, in the format of `sha256sum`: other files were edited."""
MODULE_FILES = ("smallm.js", "smallm.d.ts", "smallm.wasm")
PACKAGE_FILES = ("smallm.cjs", "smallm.d.cts", "LICENSE")
PAGE_FILES = ("index.html", "style.css", "page.js", "worker.js")


def write_kit(name: str, export_folder: Path, out: Path) -> None:
    """Writes the kit "c", "node" or "web" around the model of an export folder.

    `out` may be missing, empty, or an earlier kit: its files are replaced unless the user has edited them, and files
    that the user has added, such as `node_modules`, stay. Raises `UserError`, and then has written nothing.
    """
    try:
        out = out.resolve()
        parent = next(folder for folder in out.parents if folder.exists())
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=parent) as temporary:
            folder = Path(temporary)
            WRITERS[name](export_folder, folder)
            _copy([export_folder / MANIFEST_FILE, SOURCES / SPECIFICATION], folder)
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


def write_c(model: Path, out: Path) -> None:
    """Writes the sources of a C program and the model into `out`.

    model: a .onnx file or an export folder. Raises `UserError`.
    """
    _copy_model(model, out)
    _copy((file for file in (SOURCES / "c").iterdir() if file.is_file()), out)


def write_node(model: Path, out: Path) -> None:
    """Writes an npm package with the model into `out`.

    model: a .onnx file or an export folder. Raises `UserError`.
    """
    _copy_model(model, out)
    _copy((SOURCES / "js" / name for name in (*MODULE_FILES, *PACKAGE_FILES)), out)
    _copy((SOURCES / "node").iterdir(), out)


def write_web(model: Path, out: Path) -> None:
    """Writes a static web page with the model into `out`.

    model: a .onnx file or an export folder. Raises `UserError`.
    """
    _copy_model(model, out)
    _copy((SOURCES / "js" / name for name in MODULE_FILES), out)
    _copy((SOURCES / "web").iterdir(), out)
    for name in ("index.html", "README.md"):
        _fill_in(out / name, _sizes(out))


WRITERS: Mapping[str, Callable[[Path, Path], None]] = {"c": write_c, "node": write_node, "web": write_web}
"""Kit -> the function that fills its folder, given the model."""


def _copy(files: Iterable[Path], folder: Path) -> None:
    """Copies files into a folder, which is created if it is missing. Raises `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, folder / file.name)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out") from None


def _copy_model(model: Path, out: Path) -> None:
    path = find_model(Path(model))
    _copy([path], out)
    (out / path.name).replace(out / MODEL_FILE)


def _sizes(out: Path) -> dict[str, str]:
    """The sizes that the web page and its README state."""
    groups = {"model": [MODEL_FILE], "runtime": ["smallm.wasm", "smallm.js"], "page": PAGE_FILES}
    contents = {group: [(out / name).read_bytes() for name in names] for group, names in groups.items()}
    sizes = {group: sum(map(len, files)) for group, files in contents.items()}
    sizes["total"] = sum(sizes.values())
    sizes["compressed"] = sum(len(gzip.compress(file, 6)) for files in contents.values() for file in files)
    loaded = {"loaded": str((out / MODEL_FILE).stat().st_size)}
    return {name: _readable(size) for name, size in sizes.items()} | loaded


def _fill_in(file: Path, values: dict[str, str]) -> None:
    """Replaces each `{{name}}` by its value."""
    text = file.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    file.write_text(text, encoding="utf-8")


def _readable(size: int) -> str:
    return f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"
