"""The web page of the kits: its files in `smallm/embed/`, and the sizes that it states."""

import gzip
from collections.abc import Mapping
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "embed"
MODULE_FILES = ("smallm.js", "smallm.wasm")
PAGE_FILES = ("index.html", "style.css", "page.js", "worker.js")


def web_page_files() -> dict[str, Path]:
    """Name -> file, for each file that a browser loads besides model.onnx."""
    folders = {"js": MODULE_FILES, "web": PAGE_FILES}
    return {name: SOURCES / folder / name for folder, names in folders.items() for name in names}


def stated_sizes(files: Mapping[str, bytes]) -> dict[str, str]:
    """The values of the names in index.html. files: the content of each file of the page, model.onnx included."""
    groups = {"model": ["model.onnx"], "runtime": MODULE_FILES, "page": PAGE_FILES}
    sizes = {group: sum(len(files[name]) for name in names) for group, names in groups.items()}
    sizes["total"] = sum(sizes.values())
    sizes["compressed"] = sum(len(gzip.compress(files[name], 6)) for names in groups.values() for name in names)
    return {name: _readable(size) for name, size in sizes.items()} | {"loaded": str(len(files["model.onnx"]))}


def _readable(size: int) -> str:
    return f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"
