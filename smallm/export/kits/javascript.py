"""The kits for JavaScript: a web page and a Node package, each a folder with the model and what runs it."""

import gzip
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from smallm.errors import UserError
from smallm.language_model import MODEL_FILE, find_model
from smallm.model_file.manifest import Manifest
from smallm.model_file.onnx_reader import read_onnx
from smallm.training.cache import cache_folder

KITS = Path(__file__).parents[2] / "embed"
ORT_VERSION = "1.30.0"  # of onnxruntime-web and onnxruntime-node, what the tests run
ORT_FILES = {"ort.js": "ort.wasm.bundle.min.mjs", "ort.wasm": "ort-wasm-simd-threaded.wasm"}
"""Name in the page's folder -> in the package's dist. Some web servers do not know what .mjs is, all know .js."""
NPM_SECONDS = 600
EXACT = (
    "For the same seed text, options and rngSeed it writes the text that smallm writes in Python. Only where two "
    "characters are alike to the seventh digit may rounding, which is another in browsers, decide otherwise: of 20 "
    "test texts of 2,000 characters one parted in the browser, and none in Node."
)
ROUNDED = (
    "The weights are in {precision}, and hosts round its sums differently: the same seed, options and rngSeed give "
    "the same text on one host, and may part after a while on another. Of an fp32 export the texts agree far longer."
)


def write_web(model: Path, out: Path, onnxruntime_web: Path | None = None) -> None:
    """Fills the folder `out` with a static page around the model.

    model: an .onnx file or an export folder. onnxruntime_web: a folder with that npm package; None = npm fetches
    it once, into the cache. Raises `UserError`.
    """
    source = _dist(onnxruntime_web)
    _copy(out / "onnxruntime", {name: source / original for name, original in ORT_FILES.items()})
    promise = _copy_model(model, out)
    _copy(out, {name: KITS / "web" / name for name in ("index.html", "style.css", "page.js", "README.md")})
    groups = {
        "model": [out / MODEL_FILE],
        "runtime": [out / "onnxruntime" / name for name in ORT_FILES],
        "page": [out / name for name in ("index.html", "style.css", "page.js", "smallm.js")],
    }
    sizes = {name: sum(file.stat().st_size for file in files) for name, files in groups.items()}
    packed = sum(len(gzip.compress(file.read_bytes(), 6)) for files in groups.values() for file in files)
    values = {name: _megabytes(size) for name, size in sizes.items()}
    values |= {"total": _megabytes(sum(sizes.values())), "compressed": _megabytes(packed)}
    loaded = sum((out / name).stat().st_size for name in (MODEL_FILE, "onnxruntime/ort.wasm"))
    values |= {"loaded": str(loaded), "version": ORT_VERSION, "promise": promise}
    _fill_in(out / "index.html", values)
    _fill_in(out / "README.md", values)


def write_node(model: Path, out: Path) -> None:
    """Fills the folder `out` with an npm package around the model. Raises `UserError`."""
    promise = _copy_model(model, out)
    _copy(out, {name: KITS / "node" / name for name in ("package.json", "example.mjs", "README.md")})
    _fill_in(out / "package.json", {"version": ORT_VERSION})
    _fill_in(out / "README.md", {"promise": promise})


def _copy_model(model: Path, out: Path) -> str:
    """Copies the model and the module; returns what they promise about equal texts."""
    path = find_model(Path(model))
    precision = Manifest.from_metadata(read_onnx(path).metadata, path).precision
    _copy(out, {MODEL_FILE: path} | {name: KITS / "js" / name for name in ("smallm.js", "smallm.d.ts")})
    return EXACT if precision == "fp32" else ROUNDED.format(precision=precision)


def _copy(folder: Path, files: dict[str, Path]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in files.items():
            shutil.copyfile(source, folder / name)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out") from None


def _fill_in(file: Path, values: dict[str, str]) -> None:
    """Puts values in the place of their names in double braces."""
    text = file.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    file.write_text(text, encoding="utf-8")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def _dist(package: Path | None) -> Path:
    """The folder with onnxruntime-web's files; raises `UserError`."""
    dist = (package or _fetched("onnxruntime-web")) / "dist"
    for name in ORT_FILES.values():
        if not (dist / name).is_file():
            raise UserError(f"{dist} has no {name}; the page needs the npm package onnxruntime-web {ORT_VERSION}")
    return dist


def _fetched(name: str) -> Path:
    """An npm package in the cache, fetched if it is not there: only what the page needs of it."""
    folder = cache_folder() / f"{name}-{ORT_VERSION}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            archive = _npm_pack(f"{name}@{ORT_VERSION}", Path(aside))
            dist = Path(aside) / name / "dist"
            dist.mkdir(parents=True)
            with tarfile.open(archive) as packed:
                for file in ORT_FILES.values():
                    member = packed.extractfile(f"package/dist/{file}")
                    (dist / file).write_bytes(member.read())
            dist.parent.replace(folder)
    except (OSError, tarfile.TarError, KeyError) as error:
        raise UserError(f"cannot keep {name} in {folder}: {error}; set SMALLM_CACHE to another folder") from None
    return folder


def _npm_pack(package: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"npm has to fetch {package} once, and is not installed; install Node.js from nodejs.org")
    command = [npm, "pack", package, "--json", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_SECONDS, check=True)
        return folder / json.loads(done.stdout)[0]["filename"]
    except (subprocess.SubprocessError, ValueError, LookupError):
        raise UserError(f"npm cannot fetch {package}; check the network: npm pack {package}") from None
