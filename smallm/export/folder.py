"""The export folder: written aside, checked, and only then put in its place."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnx
from onnx import helper

from smallm.errors import UserError
from smallm.export.graph import build_graph
from smallm.export.parity import check_parity
from smallm.export.precision import PRECISIONS, Precision, Quality, check_loss, measure, write_quantised
from smallm.manifest import MANIFEST_FILE, Manifest
from smallm.runs import validation_text
from smallm.runtime import MODEL_FILE
from smallm.training.checkpoint import load_model, load_vocabulary, model_files, read_state
from smallm.training.model import TransformerLanguageModel

MOST_MEASURED = 100_000  # characters of the validation text


@dataclass(frozen=True)
class Export:
    """What came of an export."""

    manifest: Manifest
    difference: float
    """Largest difference of a logit from PyTorch's, with the same matrices."""
    measured: list[Quality]
    """Of the model in fp32, and in its own precision if that is another."""


def export_checkpoint(checkpoint: Path, out: Path, precision: str = "fp32", allow_loss: bool = False) -> Export:
    """Writes the export folder of a checkpoint as a whole or not at all.

    Raises `UserError`, also if the precision costs more bits per character than it may, unless `allow_loss`.
    """
    model, manifest = load_model(checkpoint), replace(build_manifest(checkpoint), precision=precision)
    files = model_files(read_state(checkpoint)[1], load_vocabulary(checkpoint))
    try:
        out = out.resolve()
        _check_replaceable(out, {MODEL_FILE, MANIFEST_FILE, *files})
        with _replacing(out) as folder:
            export = _write_model(
                model, manifest, folder / MODEL_FILE, PRECISIONS[precision], _validation_text(checkpoint), allow_loss
            )
            for name, content in (files | {MANIFEST_FILE: asdict(export.manifest)}).items():
                (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    return export


def _write_model(
    model: TransformerLanguageModel, manifest: Manifest, path: Path, precision: Precision, text: str, allow_loss: bool
) -> Export:
    """Writes the file, compares it with PyTorch, measures it, and writes into it what was measured."""
    onnx.save(build_graph(model, manifest), path)
    difference = check_parity(model, path)
    measured = [measure(path, PRECISIONS["fp32"], text)]
    if precision.bits < 32:
        difference = write_quantised(model, manifest, path, precision)
        measured.append(measure(path, precision, text, measured[0]))
        if not allow_loss:
            check_loss(measured[-1], precision)
    manifest = replace(manifest, quality=asdict(measured[-1]))
    proto = onnx.load(path)
    helper.set_model_props(proto, manifest.to_metadata())
    onnx.save(proto, path)
    return Export(manifest, difference, measured)


def _validation_text(checkpoint: Path) -> str:
    """The beginning of the run's validation text; empty if the checkpoint comes without it."""
    try:
        path = validation_text(checkpoint)
    except UserError:
        return ""
    with path.open(encoding="utf-8", newline="") as file:
        return file.read(MOST_MEASURED)


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
        window=m.window,
        rope_theta=m.rope_theta,
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
