"""`--init-from`: ids of the old model stay, a new text is learned, forgetting is reported."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from test_distributed import TORCHRUN, launch
from test_training import ctrl_c, metrics, sha256
from tokenizers import Tokenizer
from toys import TOY_VOCABULARY, edit_state, random_model

from smallm import LanguageModel
from smallm.export.folder import export_checkpoint
from smallm.runs.layout import OLD_VALIDATION, VALIDATION
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training import cli, finetune
from smallm.training.checkpoint.format import load_model, load_vocabulary, load_weights, read_state
from smallm.training.checkpoint.manager import best_checkpoint, checkpoints
from smallm.training.config import Config, OptimConfig

WORDS = ["сова", "река", "луна", "the owl", "зима", "crème", "ёлка", "30 € ‰"]
SHORT = ["--train.max_steps=30", "--train.eval_every=10", "--train.batch_size=16", "--train.log_every=1",
         "--train.sample_length=8"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def new_text(tmp_path_factory) -> Path:
    """9,000 characters, most of them new to the vocabulary of `tiny_run`."""
    rng, file = random.Random(5), tmp_path_factory.mktemp("new") / "совы.txt"
    lines = [" ".join(rng.choice(WORDS) for _ in range(4)) + ".\n" for _ in range(400)]
    file.write_bytes("".join(lines).encode())
    return file


@pytest.fixture(scope="session")
def fine_tuned(tiny_run, new_text, tmp_path_factory) -> Path:
    """A run of 30 steps on `new_text` that started from the model of `tiny_run`."""
    run = tmp_path_factory.mktemp("runs") / "fine_tuned"
    assert fine_tune(tiny_run, new_text, run) == 0
    return run


def fine_tune(origin, text, out, *argv) -> int:
    return cli.main(["--init-from", str(origin), "--data", str(text), "--out", str(out), *SHORT, *argv])


def last_loss(run) -> float:
    return metrics(run, "eval")[-1]["val_loss"]


# Vocabulary and weights.


def test_old_ids_are_kept_and_new_characters_are_appended(tiny_run, fine_tuned, text_file, new_text):
    old, new = load_vocabulary(best_checkpoint(tiny_run)), load_vocabulary(best_checkpoint(fine_tuned))
    assert new.tokens[: len(old.tokens)] == old.tokens
    text = text_file.read_text(encoding="utf-8")
    assert new.encode(text).tolist() == old.encode(text).tolist()
    text = new_text.read_text(encoding="utf-8")
    assert len(new.encode(text)) == len(text) < len(old.encode(text))
    tokenizer = Tokenizer.from_file(str(best_checkpoint(fine_tuned) / "tokenizer.json"))
    assert tokenizer.encode(text).ids == new.encode(text).tolist()


def test_logits_of_old_ids_equal_those_of_the_old_model(tiny_run):
    old = load_model(best_checkpoint(tiny_run))
    vocabulary = load_vocabulary(best_checkpoint(tiny_run)).extended("сова‰")
    new = random_model(vocabulary, **{key: getattr(old.config, key) for key in ("n_head", "n_kv_head", "n_embd")})
    load_weights(best_checkpoint(tiny_run), new, lambda rows: finetune.extend_embedding(rows, vocabulary))
    ids = torch.randint(0, old.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(new(ids)[..., : old.vocab_size], old(ids))


def test_without_new_characters_there_are_no_new_rows():
    rows = torch.randn(TOY_VOCABULARY.size, 8)
    assert torch.equal(finetune.extend_embedding(rows, TOY_VOCABULARY), rows)


def test_new_rows_are_deterministic_and_differ():
    rows, vocabulary = torch.randn(256, 32), Vocabulary.from_characters("éñ")
    new = finetune.extend_embedding(rows, vocabulary)
    assert torch.equal(new, finetune.extend_embedding(rows, vocabulary))
    assert torch.equal(new[:256], rows)
    assert not torch.equal(new[256], new[257])


# Training and messages.


@pytest.mark.slow
def test_fine_tuning_beats_training_from_scratch(tiny_run, text_file):
    """On a text in the language of the old one, with a few new characters."""
    text = text_file.read_text(encoding="utf-8")[:9000].replace("owl", "çok owl").replace("river", "ship")
    Path("new.txt").write_text(text, encoding="utf-8")
    shape = ["--model.n_layer=2", "--model.n_head=2", "--model.n_kv_head=1", "--model.n_embd=32",
             "--model.block_size=32", "--model.rope_theta=10000"]  # fmt: skip
    assert cli.main(["--data", "new.txt", "--out", "scratch", *SHORT, *shape]) == 0
    assert fine_tune(tiny_run, "new.txt", "run") == 0
    fine_tuned, scratch = Path("run"), Path("scratch")
    assert read_state(best_checkpoint(fine_tuned))[1].model == read_state(best_checkpoint(scratch))[1].model
    assert last_loss(fine_tuned) < 0.8 * last_loss(scratch)


def test_forgetting_equals_what_the_runtime_measures(tiny_run, fine_tuned, exported, tmp_path):
    (found,) = metrics(fine_tuned, "old_text")
    text = (tiny_run / VALIDATION).read_text(encoding="utf-8")
    assert (fine_tuned / OLD_VALIDATION).read_text(encoding="utf-8") == text
    export_checkpoint(best_checkpoint(fine_tuned), tmp_path / "export")
    before, after = (LanguageModel.load(path).perplexity(text) for path in (exported, tmp_path / "export"))
    assert found["before"] == pytest.approx(before.nats_per_char, abs=1e-4)
    assert found["after"] == pytest.approx(after.nats_per_char, abs=1e-4)
    assert found["after"] > found["before"]
    assert (found["characters"], found["name"]) == (len(text), tiny_run.name)
    assert found["step"] == read_state(best_checkpoint(fine_tuned))[0].step


def test_forgetting_is_measured_with_the_best_checkpoint(tiny_run, new_text, tmp_path):
    """A learning rate that grows too high makes the last evaluation worse than an earlier one."""
    wild = ["--optim.learning_rate=1", "--optim.adam_learning_rate=1", "--optim.schedule=constant",
            "--train.mixed_precision=no"]  # fmt: skip
    assert fine_tune(tiny_run, new_text, "run", *wild, "--optim.warmup_steps=60", "--train.max_steps=60") == 0
    state = read_state(best_checkpoint(Path("run")))[0]
    assert state.step < 60
    (found,) = metrics(Path("run"), "old_text")
    export_checkpoint(best_checkpoint(Path("run")), tmp_path / "export")
    text = (tiny_run / VALIDATION).read_text(encoding="utf-8")
    assert found["after"] == pytest.approx(LanguageModel.load("export").perplexity(text).nats_per_char, abs=1e-4)


def test_messages(tiny_run, new_text, capsys):
    assert fine_tune(tiny_run, new_text, "run", "--train.max_steps=2", "--train.eval_every=2") == 0
    out, err = capsys.readouterr()
    assert f"init   {best_checkpoint(tiny_run)}: " in err
    assert "ids are new; " in err
    assert f"loss on the old text of {tiny_run.name}: " in out
    assert read_state(checkpoints(Path("run"))[-1])[0].facts["init_from"] == tiny_run.name


def test_a_missing_old_text_is_reported(tiny_run, new_text, capsys):
    shutil.copytree(tiny_run, "old")
    Path("old", VALIDATION).unlink()
    assert fine_tune("old", new_text, "run", "--train.max_steps=2") == 0
    assert "old text of old (validation.txt) is missing" in capsys.readouterr().out
    assert metrics(Path("run"), "old_text") == []
    assert not Path("run", OLD_VALIDATION).exists()


def test_learning_rates_are_scaled_unless_they_are_set():
    origin, config = finetune.Origin(Path(), Config(), Vocabulary(), None, 0.0), Config()
    scaled, usual = origin.scale_learning_rates(config, frozenset()).optim, OptimConfig()
    assert scaled.learning_rate < usual.learning_rate
    assert scaled.adam_learning_rate < usual.adam_learning_rate
    keys = frozenset({"optim.learning_rate", "optim.adam_learning_rate"})
    assert origin.scale_learning_rates(config, keys) == config


def test_minutes_choose_everything_except_the_shape(tiny_run, new_text):
    request = cli.parse(["--init-from", str(tiny_run), "--data", str(new_text), "--minutes", "1"])
    assert {"model.n_layer", "model.n_embd", "model.block_size", "model.rope_theta"} <= request.explicit
    assert (request.config.model.n_embd, request.config.model.n_head, request.config.model.block_size) == (32, 2, 32)
    assert not {"train.batch_size", "optim.learning_rate", "model.dropout"} & request.explicit


@pytest.mark.parametrize("block_size", [16, 48])
def test_the_context_length_may_differ(tiny_run, new_text, block_size):
    assert fine_tune(tiny_run, new_text, "run", f"--model.block_size={block_size}", "--train.max_steps=2") == 0
    assert load_model(checkpoints(Path("run"))[-1]).config.block_size == block_size


# Resuming.


def test_resume_is_exact_even_without_the_old_run(tiny_run, fine_tuned, new_text):
    shutil.copytree(tiny_run, "old")
    with ctrl_c(12):
        assert fine_tune("old", new_text, "run") == 130
    shutil.rmtree("old")
    assert cli.main(["--resume", "run"]) == 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert sha256(Path("run"), file) == sha256(fine_tuned, file), file
    ours, theirs = (metrics(run, "old_text")[0] for run in (Path("run"), fine_tuned))
    assert (ours["before"], ours["after"]) == (theirs["before"], theirs["after"])


def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny_run, fine_tuned, new_text):
    assert fine_tune(tiny_run, new_text, "run") == 0
    shutil.rmtree("run/checkpoints")
    assert cli.main(["--resume", "run"]) == 0
    assert sha256(Path("run")) == sha256(fine_tuned)


def test_a_fine_tuned_model_can_be_fine_tuned_again(fine_tuned, text_file):
    assert fine_tune(best_checkpoint(fine_tuned), text_file, "run", "--train.max_steps=2") == 0
    assert load_vocabulary(checkpoints(Path("run"))[-1]) == load_vocabulary(best_checkpoint(fine_tuned))
    config = read_state(checkpoints(Path("run"))[-1])[1]
    assert config.train.init_from == str(best_checkpoint(fine_tuned))


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_run, new_text, tmp_path):
    few = ["--train.max_steps=6", "--train.eval_every=6", "--optim.learning_rate=0.001", "--train.mixed_precision=no"]
    assert fine_tune(tiny_run, new_text, "one", *few) == 0
    done = launch(TORCHRUN, "--init-from", str(tiny_run), "--data", str(new_text), "--out", str(tmp_path / "two"),
                  *SHORT, *few)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss on the old text") == 1
    ours, theirs = (load_file(checkpoints(Path(run))[-1] / "model.safetensors") for run in ("two", "one"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-3)
    ours, theirs = (metrics(Path(run), "old_text")[0] for run in ("two", "one"))
    assert ours["before"] == pytest.approx(theirs["before"], abs=1e-5)
    assert ours["after"] == pytest.approx(theirs["after"], abs=1e-3)


# Unusual inputs.


def test_the_old_run_may_still_be_training(tiny_run, new_text):
    with FileLock(tiny_run / ".lock").acquire(timeout=0):
        assert fine_tune(tiny_run, new_text, "run", "--train.max_steps=1") == 0


def test_a_text_without_new_characters(tiny_run, capsys):
    Path("ascii.txt").write_text("an owl sings to the river. " * 100, encoding="utf-8")
    assert fine_tune(tiny_run, "ascii.txt", "run", "--train.max_steps=1") == 0
    assert ": 0 ids are new" in capsys.readouterr().err


def test_ten_thousand_new_characters(tiny_run):
    characters = [chr(0x4E00 + i) for i in range(10_000)]
    Path("many.txt").write_text("".join(characters * 3), encoding="utf-8")
    few = ["--data.min_count=2", "--train.max_steps=1", "--train.batch_size=2"]
    assert fine_tune(tiny_run, "many.txt", "run", *few) == 0
    old, new = load_vocabulary(best_checkpoint(tiny_run)), load_vocabulary(checkpoints(Path("run"))[-1])
    assert new.size >= old.size + 10_000
    assert len(new.encode("".join(characters))) == 10_000


def bad(name: str, tiny_run: Path) -> str:
    """A path that is not a usable run or checkpoint, by its defect."""
    if name == "another family":
        Path("gpt2").mkdir()
        Path("gpt2", "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
        Path("gpt2", "model.safetensors").write_bytes(b"x")
        return "gpt2"
    if name == "damaged checkpoint":
        shutil.copytree(best_checkpoint(tiny_run), "step")
        Path("step", "model.safetensors").write_bytes(b"x")
        return "step"
    if name == "weights of another shape":
        shutil.copytree(best_checkpoint(tiny_run), "step")
        edit_state(Path("step"), lambda values: values["config"]["model"].update(n_layer=3))
        return "step"
    if name == "no checkpoint yet":
        Path("early").mkdir()
        Path("early", "metrics.jsonl").touch()
        return "early"
    return {"nothing": "nowhere", "a file": __file__}[name]


@pytest.mark.parametrize(("name", "said"), {
    "nothing": "neither a run nor a checkpoint", "a file": "neither a run nor a checkpoint",
    "another family": "neither a run nor a checkpoint", "damaged checkpoint": "is damaged",
    "weights of another shape": "does not match its config", "no checkpoint yet": "has no checkpoint yet",
}.items())  # fmt: skip
def test_an_unusable_origin_is_refused(refused, tiny_run, new_text, name, said):
    path = bad(name, tiny_run)
    assert said in refused("--init-from", path, "--data", str(new_text), "--out", "run")
    assert not Path("run").exists()


@pytest.mark.parametrize(("argv", "said"), [
    (["--model.n_layer", "3"], "model.n_layer = 3 contradicts"),
    (["--model.n_kv_head", "2"], "which has 1; leave it out"),
    (["--config", "speedrun"], "contradicts"),
    (["--model.block_size", "100000"], "use a longer text or a smaller block_size"),
], ids=lambda value: value[1] if isinstance(value, list) else "")  # fmt: skip
def test_contradictory_options_are_one_line(refused, tiny_run, new_text, argv, said):
    assert said in refused("--init-from", str(tiny_run), "--data", str(new_text), "--out", "run", *argv)


def test_a_text_is_required_and_resume_is_excluded(refused, tiny_run):
    assert "--data FILE" in refused("--init-from", str(tiny_run))
    assert "leave out one of them" in refused("--resume", str(tiny_run), "--init-from", str(tiny_run))
    Path("short.txt").write_text("owl " * 8, encoding="utf-8")
    assert "too few for model.block_size = 32" in refused("--init-from", str(tiny_run), "--data", "short.txt")
