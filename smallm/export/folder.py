"""The export folder: written aside, checked, and only then put in its place."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from smallm.errors import UserError
from smallm.export.draft_table import write_draft_table
from smallm.export.gguf import check_gguf, write_gguf
from smallm.export.graph import build_graph
from smallm.export.model_card import CARD_FILE, WEIGHTS_FILE, is_card, licence_of, model_card
from smallm.export.parity import check_parity
from smallm.export.portable_graph import PORTABLE_FILE, build_portable
from smallm.export.precision import PRECISIONS, Precision, Quality, check_loss, measure, write_quantised
from smallm.generation.draft_table import DRAFT_TABLE_FILE, OLD_DRAFT_TABLE_FILE
from smallm.generation.speculative import drafts_per_pass
from smallm.language_model import MODEL_FILE, LanguageModel
from smallm.model_file.manifest import MANIFEST_FILE, Manifest, genai_config
from smallm.runs.layout import CHECKPOINTS, validation_text
from smallm.training.analysis.baselines import read_baselines
from smallm.training.checkpoint.format import load_model, load_vocabulary, read_state
from smallm.training.checkpoint.hugging_face import hugging_face_files
from smallm.training.model.transformer import TransformerLanguageModel

ONNX_FOLDER = "onnx"
TRANSFORMERS_JS = {
    "fp32": ("fp32", f"{ONNX_FOLDER}/model.onnx"),
    "int8": ("int8", f"{ONNX_FOLDER}/model_int8.onnx"),
    "int4": ("q4", f"{ONNX_FOLDER}/model_q4.onnx"),
}
"""Precision -> what transformers.js calls it, and where it looks for the file."""
MAX_MEASURED = 100_000  # characters of the validation text
MIN_SAMPLE, SAMPLE_LENGTH = 200, 400  # characters of the model's own


@dataclass(frozen=True)
class Export:
    """What came of an export."""

    manifest: Manifest
    difference: float
    """Largest difference of a logit from PyTorch's, with the same matrices."""
    measured: list[Quality]
    """Of the model in fp32, and in its own precision if that is another; then of the portable file, if there is one."""
    sizes: dict[str, int]
    """Bytes of the files in the folder, by their names; but for the card."""

    @property
    def quality(self) -> Quality:
        """The measurements of the exported model file."""
        return next(quality for quality in self.measured if quality.precision == self.manifest.precision)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    precision: str = "fp32",
    allow_loss: bool = False,
    gguf: bool = False,
    portable: bool = False,
) -> Export:
    """Writes the export folder of a checkpoint as a whole or not at all.

    gguf: with a GGUF too; portable: with a file of standard operators too, which is in fp32 whatever the precision.
    Raises `UserError`, also if the precision costs more bits per character than it may, unless `allow_loss`.
    """
    manifest = replace(build_manifest(checkpoint), precision=precision)
    if gguf:
        check_gguf(precision, manifest.window)
    model = load_model(checkpoint)
    text, name = _validation_text(checkpoint), name_of(checkpoint)
    try:
        out = out.resolve()
        check_replaceable(out, _names(name))
        licence = licence_of(out / CARD_FILE)
        with replacing(out) as folder:
            path = folder / MODEL_FILE
            written = _write_model(model, manifest, path, PRECISIONS[precision], text, allow_loss)
            manifest, difference, measured = written
            _write_json_files(folder, checkpoint, manifest)
            _link(path, folder / TRANSFORMERS_JS[precision][1])
            if precision == "fp32":  # a folder that is meant to be small does not bring the large weights along
                shutil.copyfile(checkpoint / WEIGHTS_FILE, folder / WEIGHTS_FILE)
            if gguf:
                write_gguf(checkpoint, folder / f"{name}.gguf", precision, name)
            if portable:
                measured.append(_write_portable(model, manifest, folder / PORTABLE_FILE, text))
            sizes = {file: (folder / file).stat().st_size for file in _names(name) if (folder / file).is_file()}
            baselines = read_baselines(checkpoint.resolve().parent.parent)
            card = model_card(name, manifest, measured, sizes, _sample(path), licence, baselines)
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    return Export(manifest, difference, measured, sizes)


def _sample(path: Path) -> str:
    """Some text of the model; not much beyond its context, where characters take longer."""
    model = LanguageModel.load(path)
    length = min(SAMPLE_LENGTH, max(MIN_SAMPLE, model.block_size))
    return "".join(model.stream(max_length=length, rng_seed=1))


def name_of(checkpoint: Path) -> str:
    """What to call the model: the name of the run, or of a checkpoint that lies elsewhere."""
    folder = checkpoint.resolve()
    return folder.parent.parent.name if folder.parent.name == CHECKPOINTS else folder.name


def _names(name: str) -> list[str]:
    """All files that an export folder may have."""
    own = [MODEL_FILE, MANIFEST_FILE, "config.json", "generation_config.json", "tokenizer.json"]
    own += ["tokenizer_config.json", "genai_config.json", *(file for _, file in TRANSFORMERS_JS.values())]
    return [*own, DRAFT_TABLE_FILE, OLD_DRAFT_TABLE_FILE, WEIGHTS_FILE, PORTABLE_FILE, f"{name}.gguf", CARD_FILE]


def _write_model(
    model: TransformerLanguageModel, manifest: Manifest, path: Path, precision: Precision, text: str, allow_loss: bool
) -> tuple[Manifest, float, list[Quality]]:
    """Writes the file, compares it with PyTorch, measures it, and writes into it what was measured."""
    onnx.save(build_graph(model, manifest), path)
    difference = check_parity(model, path)
    write_draft_table(path, text)
    measured = [measure(path, PRECISIONS["fp32"], text)]
    if precision.bits < 32:
        difference = write_quantised(model, manifest, path, precision)
        measured.append(measure(path, precision, text, measured[0]))
        if not allow_loss:
            check_loss(measured[-1], precision)
        if not drafts_per_pass(precision.name, path.stat().st_size // manifest.n_layer):
            path.with_name(DRAFT_TABLE_FILE).unlink(missing_ok=True)  # nobody would read it
    return _with_quality(path, manifest, measured[-1]), difference, measured


def _write_portable(model: TransformerLanguageModel, manifest: Manifest, path: Path, text: str) -> Quality:
    """Writes the file of standard operators, checked and measured as the other."""
    manifest = replace(manifest, precision="fp32")
    proto = build_portable(model, manifest)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    check_parity(model, path)
    quality = measure(path, PRECISIONS["fp32"], text)
    _with_quality(path, manifest, quality)
    return replace(quality, precision="fp32, portable")


def _with_quality(path: Path, manifest: Manifest, quality: Quality) -> Manifest:
    """Writes into a model file what was measured of it."""
    manifest = replace(manifest, quality=asdict(quality))
    proto = onnx.load(path)
    helper.set_model_props(proto, manifest.to_metadata())
    onnx.save(proto, path)
    return manifest


def _write_json_files(folder: Path, checkpoint: Path, manifest: Manifest) -> None:
    """What hosts read besides the model."""
    files: dict[str, Mapping[str, Any]] = hugging_face_files(read_state(checkpoint)[1], load_vocabulary(checkpoint))
    # Without it transformers.js takes another file in a browser than under Node.
    files["config.json"] |= {"transformers.js_config": {"dtype": TRANSFORMERS_JS[manifest.precision][0]}}
    files |= {MANIFEST_FILE: asdict(manifest), "genai_config.json": genai_config(manifest, MODEL_FILE)}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _link(file: Path, other: Path) -> None:
    """The same file in another place: without a second copy, where the file system can do that."""
    other.parent.mkdir(exist_ok=True)
    with suppress(OSError):
        os.link(file, other)
        return
    shutil.copyfile(file, other)


def _validation_text(checkpoint: Path) -> str:
    """The beginning of the run's validation text; empty if the checkpoint comes without it."""
    try:
        path = validation_text(checkpoint)
    except UserError:
        return ""
    with path.open(encoding="utf-8", newline="") as file:
        return file.read(MAX_MEASURED)


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


def check_replaceable(out: Path, names: list[str]) -> None:
    """Raises `UserError` unless `out` is missing, empty, or holds an earlier export and nothing else."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_FILE).exists()):
        raise UserError(f"{out} exists and is no smallm export; choose another --out")
    others = {file.relative_to(out).as_posix() for file in out.rglob("*")} - set(names) - {ONNX_FOLDER}
    if (out / CARD_FILE).exists() and not is_card(out / CARD_FILE):
        others.add(CARD_FILE)
    if others:
        raise UserError(f"{out} also holds {min(others)}, which would be lost; move it, or choose another --out")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
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
