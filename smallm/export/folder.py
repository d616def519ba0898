"""From a run to the written export folder: the model file, the files that other runtimes read, and the model card."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import helper

from smallm.errors import UserError
from smallm.export.draft_table import write_draft_table
from smallm.export.genai import GENAI_FILE, genai_config
from smallm.export.gguf import check_gguf, write_gguf
from smallm.export.graph import build_graph
from smallm.export.hugging_face import SPECIAL_TOKENS_FILE, export_files
from smallm.export.kits import FILES, write_kit
from smallm.export.model_card import CARD_FILE, WEIGHTS_FILE, is_card, licence_of, model_card
from smallm.export.output_folder import check_replaceable, replacing
from smallm.export.parity import check_native, check_parity
from smallm.export.portable_graph import PORTABLE_FILE, build_portable
from smallm.export.precision import PRECISIONS, Precision, Quality, check_loss, measure, write_quantised
from smallm.generation.draft_table import DRAFT_TABLE_FILE, OLD_DRAFT_TABLE_FILE
from smallm.generation.speculative import drafts_per_pass
from smallm.inference.native import is_compiled, native_library
from smallm.language_model import MODEL_FILE, LanguageModel
from smallm.model_file.manifest import MANIFEST_FILE, Manifest
from smallm.model_file.onnx_reader import read_onnx
from smallm.options import as_path
from smallm.runs.baselines_file import read_baselines
from smallm.runs.layout import CHECKPOINTS, EXPORT, check_path, newest_run, out_folder, validation_text
from smallm.training.checkpoint.format import load_model, load_vocabulary, read_state
from smallm.training.checkpoint.manager import find_checkpoint, model_name
from smallm.training.model.transformer import TransformerLanguageModel

MAX_MEASURED = 100_000
"""Characters of the validation text that the loss is measured on."""
MIN_SAMPLE, SAMPLE_LENGTH = 200, 400
"""Characters of the sample in the model card."""


@dataclass(frozen=True)
class Export:
    """What was written, and what was measured."""

    path: Path
    """The export folder or the kit."""
    checkpoint: Path
    """The checkpoint that was exported."""
    manifest: Manifest
    difference: float
    """Largest difference between a logit and PyTorch's, computed with the same weights."""
    measured: list[Quality]
    """The model in fp32, then in the precision of the export if that is not fp32, then the portable file if written."""
    sizes: dict[str, int]
    """File name -> bytes of each file in the folder except the model card."""

    @property
    def quality(self) -> Quality:
        """The measurements of the exported model file."""
        return next(quality for quality in self.measured if quality.precision == self.manifest.precision)


def export_run(
    run: str | os.PathLike[str] | None, *, precision: str, kit: str | None, out: str | os.PathLike[str] | None,
    allow_loss: bool, gguf: bool, portable: bool,
) -> Export:  # fmt: skip
    """Writes the export folder or the kit of a run; for the options and errors see `smallm.export`."""
    for name, value, known in (("precision", precision, [*PRECISIONS]), ("kit", kit, [*FILES])):
        if value not in known and not (value is kit is None):
            raise UserError(f"unknown {name} {value!r}; use one of: {', '.join(known)}")
    if kit and (gguf or portable):
        raise UserError("a kit holds neither a GGUF file nor the portable model; leave out one or the other")
    path = None if out is None else out_folder(out)
    run = newest_run() if run is None else as_path("run", run)
    check_path(run)
    checkpoint = find_checkpoint(run)
    if path is None:
        is_in_run = checkpoint == run and run.parent.name == CHECKPOINTS
        path = (run.parent.parent if is_in_run else run) / (f"kit-{kit}" if kit else EXPORT)
    if kit is None:
        return export_checkpoint(checkpoint, path, precision, allow_loss, gguf, portable)
    with suppress(UserError):  # without a C compiler the engine of the kit is not compared with ONNX Runtime
        native_library()
    with TemporaryDirectory(prefix="smallm-") as folder:
        export = export_checkpoint(checkpoint, Path(folder) / EXPORT, precision, allow_loss)
        write_kit(kit, export.path, path)
        return replace(export, path=path)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    precision: str = "fp32",
    allow_loss: bool = False,
    gguf: bool = False,
    portable: bool = False,
) -> Export:
    """Writes the export folder of a checkpoint, completely or not at all.

    If the C library is there, compiled before or in the wheel, the C engine is compared with ONNX Runtime as well.

    Args:
        checkpoint: A checkpoint folder.
        out: The folder to write; missing, empty, or an earlier export, which is replaced.
        precision: "fp32", "int8" or "int4": how the weight matrices are stored.
        allow_loss: Write the model however many bits per character the precision costs.
        gguf: Also write a GGUF file, see `write_gguf`.
        portable: Also write a model file with standard ONNX operators only; it is in fp32 in every export.

    Raises:
        UserError: The checkpoint or `out` is not usable, the exported model differs from the PyTorch model or in the C
            engine, or the precision costs more bits per character than allowed.
    """
    manifest = replace(build_manifest(checkpoint), precision=precision)
    if gguf:
        check_gguf(precision, manifest.window)
    model = load_model(checkpoint)
    text, name = _validation_text(checkpoint), model_name(checkpoint)
    try:
        target = out.resolve()
        card = target / CARD_FILE
        check_replaceable(target, [file for file in _names(name) if file != CARD_FILE or is_card(card)])
        licence = licence_of(card)
        with replacing(target) as folder:
            path = folder / MODEL_FILE
            manifest, difference, measured = _write_model(
                model, manifest, path, PRECISIONS[precision], text, allow_loss
            )
            sample = _sample(path)
            if is_compiled():
                check_native(path, text if len(text) > 1 else sample, precision)
            _write_json_files(folder, checkpoint, manifest)
            _link(path, folder / PRECISIONS[precision].transformers_js[1])
            if precision == "fp32":  # a quantised export is meant to be small
                shutil.copyfile(checkpoint / WEIGHTS_FILE, folder / WEIGHTS_FILE)
            if gguf:
                write_gguf(checkpoint, folder / f"{name}.gguf", precision, name)
            if portable:
                measured.append(_write_portable(model, manifest, folder / PORTABLE_FILE, text))
            sizes = {file: (folder / file).stat().st_size for file in _names(name) if (folder / file).is_file()}
            baselines = read_baselines(checkpoint.resolve().parent.parent)
            content = model_card(name, manifest, measured, sizes, sample, licence, baselines)
            (folder / CARD_FILE).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another --out") from None
    return Export(out, checkpoint, manifest, difference, measured, sizes)


def _sample(path: Path) -> str:
    """A sample of the model's text; about one context long, since characters beyond the context take longer."""
    model = LanguageModel.load(path)
    length = min(SAMPLE_LENGTH, max(MIN_SAMPLE, model.block_size))
    return "".join(model.stream(max_length=length, rng_seed=1))


def _names(name: str) -> list[str]:
    """All files that an export folder may hold."""
    own = [MODEL_FILE, MANIFEST_FILE, "config.json", "generation_config.json", "tokenizer.json"]
    own += ["tokenizer_config.json", SPECIAL_TOKENS_FILE, GENAI_FILE]
    own += [each.transformers_js[1] for each in PRECISIONS.values()]
    return [*own, DRAFT_TABLE_FILE, OLD_DRAFT_TABLE_FILE, WEIGHTS_FILE, PORTABLE_FILE, f"{name}.gguf", CARD_FILE]


def _write_model(
    model: TransformerLanguageModel, manifest: Manifest, path: Path, precision: Precision, text: str, allow_loss: bool
) -> tuple[Manifest, float, list[Quality]]:
    """Writes the model file, compares it with PyTorch, measures it, and stores the measurements in its metadata.

    Returns the final manifest, the largest difference of a logit, and the measurements.
    """
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
            path.with_name(DRAFT_TABLE_FILE).unlink(missing_ok=True)  # the runtime would not use the table
    return _with_quality(path, manifest, measured[-1]), difference, measured


def _write_portable(model: TransformerLanguageModel, manifest: Manifest, path: Path, text: str) -> Quality:
    """Writes the portable model file, compared with PyTorch and measured like the main one."""
    manifest = replace(manifest, precision="fp32", checksum=0)  # its own is not known yet
    proto = build_portable(model, manifest)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    check_parity(model, path)
    quality = measure(path, PRECISIONS["fp32"], text)
    _with_quality(path, manifest, quality)
    return replace(quality, precision="fp32, portable")


def _with_quality(path: Path, manifest: Manifest, quality: Quality) -> Manifest:
    """Stores the measurements and the checksum in the metadata of a model file."""
    manifest = replace(manifest, quality=asdict(quality), checksum=read_onnx(path).checksum)
    proto = onnx.load(path)
    helper.set_model_props(proto, manifest.to_metadata())
    onnx.save(proto, path)
    return manifest


def _write_json_files(folder: Path, checkpoint: Path, manifest: Manifest) -> None:
    """Writes the JSON files that hosts read besides the model."""
    files = export_files(checkpoint, manifest)
    files |= {MANIFEST_FILE: asdict(manifest), GENAI_FILE: genai_config(manifest, MODEL_FILE)}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _link(file: Path, other: Path) -> None:
    """Makes `other` a hard link to the file, or a copy where the file system has no hard links."""
    other.parent.mkdir(exist_ok=True)
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)


def _validation_text(checkpoint: Path) -> str:
    """The beginning of the run's validation text; empty if the run has no such file."""
    try:
        path = validation_text(checkpoint)
    except UserError:
        return ""
    with path.open(encoding="utf-8", newline="") as file:
        return file.read(MAX_MEASURED)


def build_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint's export, in fp32 and without measurements."""
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
