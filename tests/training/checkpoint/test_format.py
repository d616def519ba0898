"""smallm.training.checkpoint.format: opens in transformers, is complete or absent, and damage is detected."""

import os
import pickle
import pickletools
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from toys import edit_state, message

from smallm.errors import UserError
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.checkpoint import format as checkpoint
from smallm.training.checkpoint.format import (
    TrainingState,
    gather_tensors,
    load_model,
    load_optimizer,
    load_vocabulary,
    read_state,
    save_checkpoint,
    verify,
)
from smallm.training.checkpoint.manager import best_checkpoint, checkpoints, saved_config
from smallm.training.config import Config, ModelConfig, OptimConfig
from smallm.training.model.operations import cross_entropy
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.optimizers import build_optimizer, set_learning_rate

VOCABULARY = Vocabulary.from_characters("Zoë söng: 10 € für naïve Größe 🎉")
GROUPED = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_inner=96, block_size=24, rope_theta=500.0)
TRICKY = "Zoë 10 €\r\n\t🎉🎉 日本 \x00\x7f  é e\u0301 I'll <|endoftext|> \ud7ff"
SAVED = {
    "model.safetensors", "optimizer.safetensors", "training_state.json", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def trained(config, steps=2, seed=1):
    """A model with random weights and an optimiser that has taken some steps."""
    model = TransformerLanguageModel(VOCABULARY.size, config.model, seed=seed)
    optimizer = build_optimizer(model, config.optim)
    set_learning_rate(optimizer, 1.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    for _ in range(steps):
        ids = torch.randint(VOCABULARY.size, (2, 9), generator=generator)
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(run, step=1, config=None, val_loss=None, model=None, optimizer=None):
    config = config or Config(model=GROUPED)
    if model is None:
        model, optimizer = trained(config)
    state = TrainingState(step=step, val_loss=val_loss)
    return save_checkpoint(run, state, config, gather_tensors(model, optimizer), VOCABULARY)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint that the test may damage."""
    return save(tmp_path / "run")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint shared by tests that restore it."""
    return save(tmp_path_factory.mktemp("saved") / "run")


# Other software.


def test_files_of_a_checkpoint(tiny_run):
    for folder in checkpoints(tiny_run):
        assert {file.name for file in folder.iterdir()} == SAVED
        assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # all have the same permissions


@pytest.mark.parametrize(("n_kv_head", "window"), [(0, 0), (2, 0), (1, 0), (2, 7)])
def test_opens_in_transformers_with_equal_logits(tmp_path, n_kv_head, window):
    from transformers import Qwen3ForCausalLM

    config = Config(model=ModelConfig(n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=64, block_size=24,
                                      window=window, rope_theta=500.0))  # fmt: skip
    model, optimizer = trained(config)
    folder = save(tmp_path, config=config, model=model, optimizer=optimizer)
    theirs, info = Qwen3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    ids = torch.randint(VOCABULARY.size, (3, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model.eval()(ids)
        assert ours.std() > 0.1
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=0, atol=5e-5)


def test_trained_run_opens_in_transformers(tiny_run):
    from transformers import Qwen3ForCausalLM

    folder = best_checkpoint(tiny_run)
    ids = torch.from_numpy(load_vocabulary(folder).encode("Zoë paints ten euros (10 €).\n").astype(np.int64))[None]
    with torch.no_grad():
        theirs = Qwen3ForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(theirs, load_model(folder)(ids), rtol=0, atol=1e-5)


def test_transformers_tokenizer_gives_the_same_ids(folder, tiny_run):
    from transformers import AutoTokenizer

    for path in (folder, best_checkpoint(tiny_run)):
        tokenizer, vocabulary = AutoTokenizer.from_pretrained(path), load_vocabulary(path)
        for text in (TRICKY, "ROMEO:\nO God, O God!", " leading", "", "éé"):
            ids = tokenizer(text)["input_ids"]
            assert ids == vocabulary.encode(text).tolist()
            assert tokenizer.decode(ids) == text


def test_transformers_generates_with_the_saved_defaults(tiny_run):
    from transformers import GenerationConfig

    sample = saved_config(tiny_run)[0].sample
    theirs = GenerationConfig.from_pretrained(best_checkpoint(tiny_run))
    assert (theirs.do_sample, theirs.temperature, theirs.top_k) == (True, sample.temperature, sample.top_k)


def test_runs_and_exports_contain_no_pickle_and_no_zip(tiny_run, exported, corpus_cache):
    folders = (tiny_run, exported, Path(os.environ["SMALLM_CACHE"]))
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 2 * len(SAVED)
    for file in files:
        data = file.read_bytes()
        for signature in (b"PK\x03\x04", b"PK\x05\x06"):
            assert signature not in data, file
        for found in re.finditer(rb"\x80[\x02-\x05]", data):
            assert not is_pickle(data[found.start() :]), (file, found)
        assert not is_pickle(data), file  # protocols 0 and 1 have no signature


def is_pickle(data):
    """Whether the data parse as a pickle of more than three opcodes."""
    try:
        names = [opcode.name for opcode, _, _ in pickletools.genops(data)]
    except Exception:
        return False
    return len(names) > 3


def test_is_pickle_detects_pickles():
    for protocol in range(6):
        assert is_pickle(pickle.dumps({"a": [1.5, Path("x")]}, protocol=protocol))
    assert not is_pickle(b"PROTO")


# Saving and loading.


@pytest.mark.parametrize("name", ["muon", "adamw", "adam"])
def test_weights_and_moments_are_restored_bit_for_bit(tmp_path, name):
    config = Config(model=GROUPED, optim=OptimConfig(name=name, learning_rate=0.01))
    model, optimizer = trained(config)
    folder = save(tmp_path, config=config, model=model, optimizer=optimizer)
    again = load_model(folder)
    assert not again.training
    for (key, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), key
    fresh = build_optimizer(again, config.optim)
    load_optimizer(folder, again, fresh)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert optimizer.state[p].keys() == fresh.state[q].keys()
        assert all(torch.equal(value, fresh.state[q][key]) for key, value in optimizer.state[p].items())
    assert load_vocabulary(folder).encode(TRICKY).tolist() == VOCABULARY.encode(TRICKY).tolist()


def test_the_state_is_restored(tmp_path):
    config = Config(model=GROUPED, optim=OptimConfig(betas=(0.7, 0.8)))
    state = TrainingState(step=7, val_loss=1.5, best_val_loss=1.25, best_step=5, evaluations_since_best=1, seconds=2.5,
                          fingerprint="ab", start_text="é", scaler={"scale": 4.0}, facts={"text": "ö"})  # fmt: skip
    folder = save_checkpoint(tmp_path, state, config, gather_tensors(*trained(config)), VOCABULARY)
    assert folder == tmp_path / "checkpoints" / "step-000007"
    assert read_state(folder) == (state, config)


def test_facts_that_no_card_could_show(tmp_path):
    config = Config(model=GROUPED)
    state = TrainingState(facts={"text": "ö", "characters": "many"})
    folder = save_checkpoint(tmp_path, state, config, gather_tensors(*trained(config)), VOCABULARY)
    assert "training_state.json is broken" in message(read_state, folder)


@pytest.mark.parametrize("broken", ["model.safetensors", "optimizer.safetensors", "fsync", "rename", "ctrl-c"])
def test_a_failed_save_leaves_nothing_behind_and_damages_nothing(tmp_path, monkeypatch, broken):
    model, optimizer = trained(Config(model=GROUPED))
    old = save(tmp_path, 5, model=model, optimizer=optimizer)
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    error = KeyboardInterrupt if broken == "ctrl-c" else OSError(28, "No space left on device")

    def fail(*args, **options):
        raise error

    def half(tensors, filename, *args, **options):
        save_file(tensors, filename, *args, **options)
        if Path(filename).name == broken or broken == "ctrl-c":
            Path(filename).write_bytes(Path(filename).read_bytes()[:100])
            raise error

    monkeypatch.setattr(checkpoint, "save_file", half)
    if broken == "fsync":
        monkeypatch.setattr("os.fsync", fail)
    if broken == "rename":
        for name in ("rename", "replace"):
            monkeypatch.setattr(Path, name, fail)
            monkeypatch.setattr(f"os.{name}", fail)
    with pytest.raises((OSError, UserError, KeyboardInterrupt)):
        save(tmp_path, 10, model=model, optimizer=optimizer)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    save(tmp_path, 10, model=model, optimizer=optimizer)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000005", "step-000010"]


def test_replacing_a_checkpoint_of_the_same_step_keeps_the_old_one_if_the_rename_fails(tmp_path, monkeypatch):
    model, optimizer = trained(Config(model=GROUPED))
    folder = save(tmp_path, 5, model=model, optimizer=optimizer)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    rename, failed = Path.replace, []

    def fail_once(self, target):
        if target == folder and not failed:
            failed.append(self)
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    with pytest.raises(OSError, match="Input/output error"):
        save(tmp_path, 5, val_loss=1.5, model=model, optimizer=optimizer)
    assert failed
    assert [path.name for path in folder.parent.iterdir()] == ["step-000005"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    save(tmp_path, 5, val_loss=1.5, model=model, optimizer=optimizer)
    assert read_state(folder)[0].val_loss == 1.5


def test_files_are_synced_before_the_folder_is_renamed(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(len(list(tmp_path.rglob("step-000001")))))
    folder = save(tmp_path, 1)
    assert folder.is_dir()
    assert sum(1 for finished in synced if not finished) >= len(SAVED)


def test_windows_saves_a_checkpoint(tmp_path, windows):
    assert verify(save(tmp_path, 1)) == ""


# Damaged and foreign checkpoints.


def change(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"), "model.layers.1.self_attn.k_proj.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), "31"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(95, 64)}), "(95, 64)"),
    ],
    ids=["missing", "missing part", "extra", "shape", "shape of part"],
)
def test_weights_must_match_exactly(folder, edit, said):
    change(folder / "model.safetensors", edit)
    text = message(load_model, folder)
    assert said in text
    assert "model.safetensors" in text


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("h.0.attn.c_attn.weight.momentum_buffer"), "h.0.attn.c_attn.weight"),
        (lambda t: t.pop("wte.weight.exp_avg"), "wte.weight"),
        (lambda t: t.update({"extra.exp_avg": torch.ones(1)}), "extra"),
        (lambda t: t.update({"ln_f.weight.exp_avg": torch.ones(31)}), "ln_f.weight"),
        (lambda t: t.update({"ln_f.weight.momentum_buffer": torch.ones(32)}), "ln_f.weight"),
    ],
    ids=["missing", "missing moment", "extra", "shape", "of another optimiser"],
)
def test_moments_must_match_exactly(folder, edit, said):
    change(folder / "optimizer.safetensors", edit)
    model = load_model(folder)
    text = message(load_optimizer, folder, model, build_optimizer(model, Config().optim))
    assert said in text
    assert "optimizer.safetensors" in text


DAMAGES = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "header cut": lambda data: data[:5],
    "empty": lambda data: b"",
    "missing": None,
    "not text": lambda data: b"\xff\xfe" + bytes(range(256)),
    "a list": lambda data: b"[1, 2]",
    "an object": lambda data: b'{"a": 1}',
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", sorted(SAVED))
def test_a_damaged_file_is_noticed(folder, name, damage):
    file = folder / name
    assert verify(folder) == ""
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    assert verify(folder).startswith(name)
    if name in ("model.safetensors", "training_state.json", "tokenizer.json"):
        assert name in message(load_model, folder)


@given(st.sampled_from(sorted(SAVED)), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_noticed(saved, name, place, bit):
    file = saved / name
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    whole = file.read_bytes()
    try:
        file.write_bytes(data)
        assert verify(saved)
    finally:
        file.write_bytes(whole)


def other(key, value):
    def damage(content):
        content[key] = value

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        other("format_version", 1),
        other("step", "7"),
        other("step", None),
        other("unknown", 1),
        other("config", None),
        other("config", {"model": {"n_layer": "2"}}),
        other("config", {"model": {"n_layers": 2}}),
        other("config", {"model": 3}),
        lambda content: content.pop("config"),
        lambda content: content.pop("format_version"),
    ],
    ids=["version", "step text", "step null", "unknown key", "config null", "config type", "config key",
         "config section", "no config", "no version"],
)  # fmt: skip
def test_an_invalid_state_gives_one_line(folder, damage):
    edit_state(folder, damage)
    assert str(folder) in message(read_state, folder)


def test_an_edited_state_is_noticed(folder):
    file = folder / "training_state.json"
    file.write_text(file.read_text().replace('"step": 1,', '"step": 2,'))
    assert "does not match its checksum" in verify(folder)
    assert "does not match its checksum" in message(read_state, folder)


def test_a_state_file_with_the_old_key_of_its_checksum_is_read(folder):
    file = folder / "training_state.json"
    before = read_state(folder)
    file.write_text(file.read_text().replace('"checksum":', '"seal":'))
    assert read_state(folder) == before
    file.write_text(file.read_text().replace('"step": 1,', '"step": 2,'))
    assert "does not match its checksum" in message(read_state, folder)


def test_file_names_cannot_leave_the_folder(folder):
    edit_state(folder, lambda state: state["sha256"].update({"../secret": "0"}))
    assert verify(folder) == "../secret is missing"


def test_no_source_file_uses_pickle():
    root = Path(checkpoint.__file__).parents[1]
    for file in chain(root.rglob("*.py"), root.parent.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        for word in ("torch.load", "torch.save", "import pickle", "from pickle", "allow_pickle", "save_state("):
            assert word not in source, f"{file} has {word}"
