"""The export folder: written aside, checked, and only then put in its place."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import onnx

from smallm.errors import UserError
from smallm.export.graph import build_graph
from smallm.export.parity import check_parity
from smallm.manifest import MANIFEST_FILE, Manifest
from smallm.runtime import MODEL_FILE
from smallm.training.checkpoint import load_model, load_vocabulary, model_files, read_state, sampling_defaults


def export_checkpoint(checkpoint: Path, out: Path) -> tuple[Manifest, float]:
    """Writes the export folder of a checkpoint as a whole or not at all.

    Returns its manifest and the largest difference between its logits and PyTorch's. Raises `UserError`.
    """
    if out.exists() and not _may_replace(out):
        raise UserError(f"{out} exists and is no smallm export; choose another --out")
    model, manifest = load_model(checkpoint), build_manifest(checkpoint)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        onnx.save(build_graph(model, manifest), aside / MODEL_FILE)
        difference = check_parity(model, aside / MODEL_FILE)
        files = model_files(read_state(checkpoint)[1], load_vocabulary(checkpoint)) | {MANIFEST_FILE: asdict(manifest)}
        for name, content in files.items():
            (aside / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        aside.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
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
        sampling=sampling_defaults(config),
        training=state.facts | {"step": state.step, "val_loss": state.val_loss, "fingerprint": state.fingerprint},
    )


def _may_replace(out: Path) -> bool:
    return out.is_dir() and ((out / MANIFEST_FILE).is_file() or not any(out.iterdir()))
