"""Kits: a folder with a model and the sources that make it part of a C program, a Node program or a web page.

The sources are in `smallm/embed/`.
"""

import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from smallm.errors import UserError
from smallm.language_model import MODEL_FILE, find_model
from smallm.model_file.manifest import MANIFEST_FILE, Manifest
from smallm.model_file.onnx_reader import read_onnx
from smallm.training.cache import cache_folder

SOURCES = Path(__file__).parents[1] / "embed"
SPECIFICATION = "SAMPLING.md"
SUMS_FILE = "SHA256SUMS"
"""Digests of the files that a kit was written with, in the format of `sha256sum`: other files were edited."""
ORT_VERSION = "1.30.0"
"""The version of onnxruntime-web and onnxruntime-node that kits use and the tests run."""
ORT_FILES = {"ort.js": "ort.wasm.bundle.min.mjs", "ort.wasm": "ort-wasm-simd-threaded.wasm"}
"""File name in the web kit -> file name in the package's `dist`. Not all web servers know the type of .mjs."""
PAGE_FILES = ("index.html", "style.css", "page.js")
NPM_TIMEOUT = 600
"""Seconds that npm may take to download a package."""
EXACT = (
    "The same seed text, options and rngSeed give the text that smallm writes in Python, unless two characters are "
    "equally likely up to the seventh digit: rounding in browsers differs and may decide differently. Of 20 test texts "
    "of 2,000 characters one differed in the browser, and none in Node."
)
ROUNDED = (
    "The weights are in {precision}, and hosts round sums of such weights differently: the same seed, options and "
    "rngSeed give the same text on one host, but texts of different hosts may differ after a while. With an fp32 "
    "export texts agree far longer."
)


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
    promise = _copy_javascript(model, out)
    _copy([SOURCES / "node" / name for name in ("package.json", "example.mjs", "README.md")], out)
    _fill_in(out / "package.json", {"version": ORT_VERSION})
    _fill_in(out / "README.md", {"promise": promise})


def write_web(model: Path, out: Path, onnxruntime_web: Path | None = None) -> None:
    """Writes a static web page with the model into `out`.

    model: a .onnx file or an export folder.
    onnxruntime_web: a folder with that npm package; None downloads the package once, with npm, into the cache.
    Raises `UserError`.
    """
    dist = _dist(onnxruntime_web)
    promise = _copy_javascript(model, out)
    _copy([SOURCES / "web" / name for name in (*PAGE_FILES, "README.md")], out)
    (out / "onnxruntime").mkdir(exist_ok=True)
    for name, original in ORT_FILES.items():
        shutil.copyfile(dist / original, out / "onnxruntime" / name)
    values = _sizes(out) | {"version": ORT_VERSION, "promise": promise}
    _fill_in(out / "index.html", values)
    _fill_in(out / "README.md", values)


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


def _copy_model(model: Path, out: Path) -> Path:
    path = find_model(Path(model))
    _copy([path], out)
    (out / path.name).replace(out / MODEL_FILE)
    return path


def _copy_javascript(model: Path, out: Path) -> str:
    """Copies the model and the JavaScript module; returns a sentence about equal texts for the README."""
    path = _copy_model(model, out)
    precision = Manifest.from_metadata(read_onnx(path).metadata, path).precision
    _copy([SOURCES / "js" / name for name in ("smallm.js", "smallm.d.ts")], out)
    return EXACT if precision == "fp32" else ROUNDED.format(precision=precision)


def _sizes(out: Path) -> dict[str, str]:
    """The sizes that the web page and its README state."""
    groups = {
        "model": [out / MODEL_FILE],
        "runtime": [out / "onnxruntime" / name for name in ORT_FILES],
        "page": [out / name for name in (*PAGE_FILES, "smallm.js")],
    }
    sizes = {name: sum(file.stat().st_size for file in files) for name, files in groups.items()}
    sizes["total"] = sum(sizes.values())
    sizes["compressed"] = sum(len(gzip.compress(file.read_bytes(), 6)) for files in groups.values() for file in files)
    loaded = sum((out / name).stat().st_size for name in (MODEL_FILE, "onnxruntime/ort.wasm"))
    return {name: _megabytes(size) for name, size in sizes.items()} | {"loaded": str(loaded)}


def _fill_in(file: Path, values: dict[str, str]) -> None:
    """Replaces each `{{name}}` by its value."""
    text = file.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    file.write_text(text, encoding="utf-8")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def _dist(package: Path | None) -> Path:
    """The folder with the files of onnxruntime-web. Raises `UserError`."""
    dist = (package or _downloaded("onnxruntime-web")) / "dist"
    for name in ORT_FILES.values():
        if not (dist / name).is_file():
            raise UserError(f"{dist} has no {name}; the page needs the npm package onnxruntime-web {ORT_VERSION}")
    return dist


def _downloaded(name: str) -> Path:
    """An npm package in the cache, downloaded if it is missing: only the files that the page needs."""
    folder = cache_folder() / f"{name}-{ORT_VERSION}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            archive = _npm_pack(f"{name}@{ORT_VERSION}", Path(temporary))
            dist = Path(temporary) / name / "dist"
            dist.mkdir(parents=True)
            with tarfile.open(archive) as packed:
                for file in ORT_FILES.values():
                    content = packed.extractfile(f"package/dist/{file}")
                    if content is None:
                        raise KeyError(f"{file} is not a file")
                    (dist / file).write_bytes(content.read())
            dist.parent.replace(folder)
    except (OSError, tarfile.TarError, KeyError) as error:
        raise UserError(f"cannot store {name} in {folder}: {error}; set SMALLM_CACHE to another folder") from None
    return folder


def _npm_pack(package: str, folder: Path) -> Path:
    """The archive of an npm package, downloaded into a folder."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"npm is needed once to download {package}, but is not installed; get Node.js from nodejs.org")
    command = [npm, "pack", package, "--json", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, encoding="utf-8", timeout=NPM_TIMEOUT, check=True
        )
        return folder / json.loads(done.stdout)[0]["filename"]
    except (subprocess.SubprocessError, ValueError, LookupError):
        raise UserError(f"npm cannot download {package}; check the network: npm pack {package}") from None
