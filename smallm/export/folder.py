"""The export folder: written aside, checked, and only then put in its place."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import onnx

from smallm.errors import UserError
from smallm.export.graph import build_graph
from smallm.export.parity import check_parity
from smallm.manifest import MANIFEST_FILE, Manifest
from smallm.runtime import MODEL_FILE
from smallm.training.checkpoint import load_model, load_vocabulary, model_files, read_state


def export_checkpoint(checkpoint: Path, out: Path) -> tuple[Manifest, float]:
    """Writes the export folder of a checkpoint as a whole or not at all.

    Returns its manifest and the largest difference between its logits and PyTorch's. Raises `UserError`.
    """
    model, manifest = load_model(checkpoint), build_manifest(checkpoint)
    files = model_files(read_state(checkpoint)[1], load_vocabulary(checkpoint)) | {MANIFEST_FILE: asdict(manifest)}
    try:
        out = out.resolve()
        _check_replaceable(out, {MODEL_FILE, *files})
        with _replacing(out) as folder:
            onnx.save(build_graph(model, manifest), folder / MODEL_FILE)
            difference = check_parity(model, folder / MODEL_FILE)
            for name, content in files.items():
                (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    return manifest, difference


def build_manifest(checkpoint: Path) -> Manifest:
    """What the exported file of a checkpoint says about itself."""
    state, config = read_state(checkpoint)
    m, vocabulary = config.model, load_vocabulary(checkpoint)
    return Manifest(
        block_size=m.block_size,
        n_layer=m.n_layer,
        n_head=m.n_head,
        n_kv_head=m.kv_heads,
        n_embd=m.n_embd,
        head_dim=m.head_dim,
        vocab_size=vocabulary.size,
        tokens=vocabulary.hex_tokens(),
        start_text=state.start_text,
        sampling=asdict(config.sample.sampling),
        training=state.facts | {"step": state.step, "val_loss": state.val_loss, "fingerprint": state.fingerprint},
    )


def _check_replaceable(out: Path, names: set[str]) -> None:
    """Raises `UserError` unless `out` is missing, empty, or holds an earlier export and nothing else."""
    if not out.exists():
        return
    found = {file.name for file in out.iterdir()} if out.is_dir() else {out.name}
    if found and MANIFEST_FILE not in found:
        raise UserError(f"{out} exists and is no smallm export; choose another --out")
    if found - names:
        raise UserError(f"{out} also holds {min(found - names)}, which would be lost; move it, or choose another --out")


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `out` when the block ends; if the block raises, nothing has changed."""
    base = next(folder for folder in out.parents if folder.exists())
    new, old = (base / f".{out.name}.{os.getpid()}.{what}" for what in ("new", "old"))
    try:
        new.mkdir()
        yield new
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)
