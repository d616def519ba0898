"""smallm.training.checkpoint.manager: which checkpoints a run has, and which one is used."""

import json
import shutil
from pathlib import Path

import pytest
from toys import message

from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training import cli
from smallm.training.checkpoint.format import TrainingState, gather_tensors, read_state, save_checkpoint
from smallm.training.checkpoint.manager import (
    best_checkpoint,
    checkpoints,
    newest_checkpoint,
    prune,
    restore_interrupted,
    saved_config,
)
from smallm.training.config import Config, ModelConfig
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.optimizers import build_optimizer

VOCABULARY = Vocabulary.from_characters("é")
CONFIG = Config(model=ModelConfig(n_layer=1, n_head=1, n_embd=32, block_size=8))


@pytest.fixture(scope="module")
def tensors():
    model = TransformerLanguageModel(VOCABULARY.size, CONFIG.model, seed=1)
    return gather_tensors(model, build_optimizer(model, CONFIG.optim))


@pytest.fixture
def save(tmp_path, tensors):
    """Writes the checkpoint of a step into a run."""

    def save(step, val_loss=None):
        return save_checkpoint(tmp_path, TrainingState(step=step, val_loss=val_loss), CONFIG, tensors, VOCABULARY)

    return save


def names(run):
    return [folder.name for folder in checkpoints(run)]


def flip(file, place=-1):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_prune_keeps_the_best_and_the_last(tmp_path, save):
    for step in (5, 10, 15, 20, 25):
        save(step)
    (tmp_path / "checkpoints" / "mine").mkdir()
    prune(tmp_path, best_step=10, keep_last=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000010", "step-000020", "step-000025"]
    prune(tmp_path, best_step=25, keep_last=1)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000025"]
    assert (tmp_path / "checkpoints" / "mine").is_dir()


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path, save):
    for step in (1_000_000, 999_999, 5):
        save(step)
    assert [read_state(folder)[0].step for folder in checkpoints(tmp_path)] == [5, 999_999, 1_000_000]


def test_best_checkpoint(tmp_path, save):
    save(1)
    assert best_checkpoint(tmp_path).name == "step-000001"
    for step, loss in ((2, 1.5), (3, 1.25), (4, 2.0), (5, None)):
        save(step, loss)
    assert best_checkpoint(tmp_path).name == "step-000003"


def test_prune_leaves_for_later_what_another_program_has_open_on_windows(tmp_path, save, monkeypatch):
    for step in (1, 2, 3):
        save(step)
    replace = Path.replace

    def refuse(path, target):
        if path.name == "step-000001":
            raise PermissionError(13, "Access is denied")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        prune(tmp_path, best_step=3, keep_last=1)
    assert names(tmp_path) == ["step-000001", "step-000003"]
    prune(tmp_path, best_step=3, keep_last=1)
    assert names(tmp_path) == ["step-000003"]


def test_prune_deletes_what_a_kill_left_behind(tmp_path, save):
    half = tmp_path / "checkpoints" / ".step-000005.123"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    for step in (5, 10):
        save(step)
        prune(tmp_path, best_step=step, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000010"]


# Damage.


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A copy of the trained run, with checkpoints at steps 40 and 60, that a test may damage."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_the_newest_intact_checkpoint_is_used(tmp_path, save):
    for step in (5, 10, 15):
        save(step)
    assert newest_checkpoint(tmp_path)[0].name == "step-000015"
    flip(tmp_path / "checkpoints/step-000015/model.safetensors")
    (tmp_path / "checkpoints/step-000005").touch()  # modification times do not matter
    assert newest_checkpoint(tmp_path)[0].name == "step-000010"
    (tmp_path / "checkpoints/step-000010/training_state.json").unlink()
    newest, damaged = newest_checkpoint(tmp_path)
    assert newest.name == "step-000005"
    assert {folder.name: problem for folder, problem in damaged.items()} == {
        "step-000015": "model.safetensors does not match its checksum",
        "step-000010": "training_state.json is missing or broken; use another checkpoint",
    }
    flip(tmp_path / "checkpoints/step-000005/config.json")
    assert "all checkpoints" in message(newest_checkpoint, tmp_path)
    assert "all checkpoints" in message(saved_config, tmp_path)
    assert "damaged" in message(best_checkpoint, tmp_path)


def test_the_best_intact_checkpoint_is_used(tmp_path, save, capsys):
    for step, loss in ((5, 1.25), (10, 1.5), (15, 2.0)):
        save(step, loss)
    flip(tmp_path / "checkpoints/step-000005/tokenizer.json")
    assert best_checkpoint(tmp_path).name == "step-000010"
    line = capsys.readouterr().err
    assert line.startswith("warning: ")
    assert "step-000005 is damaged" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training_state.json"])
def test_resume_uses_the_newest_intact_checkpoint(run, tiny_run, capsys, name):
    flip(run / "checkpoints/step-000060" / name, 100)
    assert cli.main(["--resume", str(run)]) == 0  # from 40 to 60, once more
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1
    assert f"step-000060 is damaged ({name}" in said[0]
    assert "an earlier checkpoint is used" in said[0]
    assert names(run) == ["step-000040", "step-000060"]
    assert [file.name for file in (run / "checkpoints").iterdir() if "damaged" in file.name] == []
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (folder / "checkpoints/step-000060" / file for folder in (run, tiny_run))
        assert ours.read_bytes() == theirs.read_bytes()


def test_resume_with_all_checkpoints_damaged_prints_one_line(refused, run):
    for folder in checkpoints(run):
        flip(folder / "model.safetensors")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    line = refused("--resume", str(run))
    assert "all checkpoints" in line
    assert "model.safetensors does not match its checksum" in line
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_damaged_checkpoints_do_not_count_towards_keep_last(run):
    flip(run / "checkpoints/step-000060/model.safetensors")
    assert cli.main(["--resume", str(run), "--train.max_steps=55", "--train.save_every=5"]) == 0
    assert names(run)[-2:] == ["step-000050", "step-000055"]


def test_a_folder_that_is_not_a_run_gives_one_line(tmp_path):
    for call in (checkpoints, best_checkpoint, saved_config):
        assert "not a run folder" in message(call, tmp_path)
    (tmp_path / "checkpoints" / ".step-000005.123").mkdir(parents=True)  # a kill in the middle of the first save
    (tmp_path / "checkpoints" / "step-x").mkdir()
    assert checkpoints(tmp_path) == []
    assert "no checkpoint yet" in message(best_checkpoint, tmp_path)
    assert "neither a checkpoint nor a readable config.toml" in message(saved_config, tmp_path)
    (tmp_path / "config.toml").write_text("[model]\nn_layer = 7\n")
    assert saved_config(tmp_path)[0].model.n_layer == 7
    (tmp_path / "config.toml").write_text("[model]\nn_lay")
    assert "neither a checkpoint nor a readable config.toml" in message(saved_config, tmp_path)


def test_a_kill_between_the_renames_of_a_checkpoint_saved_twice_loses_nothing(run):
    """A resumed run repeats an evaluation that a signal interrupted, and saves the same step again."""
    (run / "checkpoints/step-000060").rename(run / "checkpoints/.step-000060.123.old")
    before = (run / "checkpoints/.step-000060.123.old/model.safetensors").read_bytes()
    assert names(run) == ["step-000040"]
    assert cli.main(["--resume", str(run), "--train.max_steps=61"]) == 0
    assert names(run) == ["step-000060", "step-000061"]
    assert (run / "checkpoints/step-000060/model.safetensors").read_bytes() == before
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 61


def test_an_old_copy_does_not_replace_a_complete_checkpoint(run):
    old = shutil.copytree(run / "checkpoints/step-000060", run / "checkpoints/.step-000060.123.old")
    (old / "model.safetensors").unlink()
    restore_interrupted(run)
    assert (run / "checkpoints/step-000060/model.safetensors").is_file()
