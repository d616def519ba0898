"""`--init-from`: what a model knows stays where it is, a new text is learned, and all is told of the old one."""

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
    """An empty folder to work in; runs are not plotted here."""
    monkeypatch.setattr("smallm.training.report.plot.plot_runs", lambda runs, out, **options: out)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def new_text(tmp_path_factory) -> Path:
    """9,000 characters, most of which the text of `tiny_run` has not."""
    rng, file = random.Random(5), tmp_path_factory.mktemp("new") / "совы.txt"
    lines = [" ".join(rng.choice(WORDS) for _ in range(4)) + ".\n" for _ in range(400)]
    file.write_bytes("".join(lines).encode())
    return file


@pytest.fixture(scope="session")
def learned(tiny_run, new_text, tmp_path_factory) -> Path:
    """A run of 30 steps on `new_text` that began with the model of `tiny_run`."""
    run = tmp_path_factory.mktemp("runs") / "learned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smallm.training.report.plot.plot_runs", lambda runs, out, **options: out)
        assert learn(tiny_run, new_text, run) == 0
    return run


def learn(origin, text, out, *argv) -> int:
    return cli.main(["--init-from", str(origin), "--data", str(text), "--out", str(out), *SHORT, *argv])


def last_loss(run) -> float:
    return metrics(run, "eval")[-1]["val_loss"]


# What stays.


def test_old_ids_do_not_move_and_new_characters_follow_them(tiny_run, learned, text_file, new_text):
    old, new = load_vocabulary(best_checkpoint(tiny_run)), load_vocabulary(best_checkpoint(learned))
    assert new.tokens[: len(old.tokens)] == old.tokens
    text = text_file.read_text(encoding="utf-8")
    assert new.encode(text).tolist() == old.encode(text).tolist()
    text = new_text.read_text(encoding="utf-8")
    assert len(new.encode(text)) == len(text) < len(old.encode(text))
    tokenizer = Tokenizer.from_file(str(best_checkpoint(learned) / "tokenizer.json"))
    assert tokenizer.encode(text).ids == new.encode(text).tolist()


def test_logits_of_the_old_ids_are_those_of_the_old_model(tiny_run):
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


def test_new_rows_are_the_same_each_time_and_unlike_each_other():
    rows, vocabulary = torch.randn(256, 32), Vocabulary.from_characters("éñ")
    new = finetune.extend_embedding(rows, vocabulary)
    assert torch.equal(new, finetune.extend_embedding(rows, vocabulary))
    assert torch.equal(new[:256], rows)
    assert not torch.equal(new[256], new[257])


# What is learned, and what is said.


@pytest.mark.slow
def test_it_learns_faster_than_from_nothing(tiny_run, text_file):
    """A text in the language that the model knows, with a few characters that it does not."""
    text = text_file.read_text(encoding="utf-8")[:9000].replace("owl", "çok owl").replace("river", "ship")
    Path("new.txt").write_text(text, encoding="utf-8")
    shape = ["--model.n_layer=2", "--model.n_head=2", "--model.n_kv_head=1", "--model.n_embd=32",
             "--model.block_size=32"]  # fmt: skip
    assert cli.main(["--data", "new.txt", "--out", "scratch", *SHORT, *shape]) == 0
    assert learn(tiny_run, "new.txt", "run") == 0
    learned, scratch = Path("run"), Path("scratch")
    assert read_state(best_checkpoint(learned))[1].model == read_state(best_checkpoint(scratch))[1].model
    assert last_loss(learned) < 0.8 * last_loss(scratch)


def test_what_became_of_the_old_text_is_what_the_runtime_measures(tiny_run, learned, exported, tmp_path):
    (found,) = metrics(learned, "old_text")
    text = (tiny_run / VALIDATION).read_text(encoding="utf-8")
    assert (learned / OLD_VALIDATION).read_text(encoding="utf-8") == text
    export_checkpoint(best_checkpoint(learned), tmp_path / "export")
    before, after = (LanguageModel.load(path).perplexity(text) for path in (exported, tmp_path / "export"))
    assert found["before"] == pytest.approx(before.nats_per_char, abs=1e-4)
    assert found["after"] == pytest.approx(after.nats_per_char, abs=1e-4)
    assert found["after"] > found["before"]
    assert (found["characters"], found["name"]) == (len(text), tiny_run.name)
    assert found["step"] == read_state(best_checkpoint(learned))[0].step


def test_the_best_checkpoint_is_the_one_that_is_told_of(tiny_run, new_text, tmp_path):
    """Too high a rate at the end makes the last evaluation worse than an earlier one."""
    wild = ["--optim.learning_rate=0.4", "--optim.adam_learning_rate=0.4", "--optim.schedule=constant"]
    assert learn(tiny_run, new_text, "run", *wild, "--optim.warmup_steps=60", "--train.max_steps=60") == 0
    state = read_state(best_checkpoint(Path("run")))[0]
    assert state.step < 60
    (found,) = metrics(Path("run"), "old_text")
    export_checkpoint(best_checkpoint(Path("run")), tmp_path / "export")
    text = (tiny_run / VALIDATION).read_text(encoding="utf-8")
    assert found["after"] == pytest.approx(LanguageModel.load("export").perplexity(text).nats_per_char, abs=1e-4)


def test_words(tiny_run, new_text, capsys):
    assert learn(tiny_run, new_text, "run", "--train.max_steps=2", "--train.eval_every=2") == 0
    out, err = capsys.readouterr()
    assert f"init   {best_checkpoint(tiny_run)}: " in err
    assert "ids are new; " in err
    assert f"loss on the old text of {tiny_run.name}: " in out
    assert read_state(checkpoints(Path("run"))[-1])[0].facts["init_from"] == tiny_run.name


def test_an_old_text_that_is_gone_is_said(tiny_run, new_text, capsys):
    shutil.copytree(tiny_run, "old")
    Path("old", VALIDATION).unlink()
    assert learn("old", new_text, "run", "--train.max_steps=2") == 0
    assert "old text of old (validation.txt) is missing" in capsys.readouterr().out
    assert metrics(Path("run"), "old_text") == []
    assert not Path("run", OLD_VALIDATION).exists()


def test_the_schedule_is_gentle_unless_it_is_set():
    origin, config = finetune.Origin(Path(), Config(), Vocabulary(), None, 0.0), Config()
    scale_learning_rates, usual = origin.scale_learning_rates(config, frozenset()).optim, OptimConfig()
    assert scale_learning_rates.learning_rate < usual.learning_rate
    assert scale_learning_rates.adam_learning_rate < usual.adam_learning_rate
    keys = frozenset({"optim.learning_rate", "optim.adam_learning_rate"})
    assert origin.scale_learning_rates(config, keys) == config


def test_minutes_choose_all_but_the_shape(tiny_run, new_text):
    request = cli.parse(["--init-from", str(tiny_run), "--data", str(new_text), "--minutes", "1"])
    assert {"model.n_layer", "model.n_embd", "model.block_size", "model.rope_theta"} <= request.explicit
    assert (request.config.model.n_embd, request.config.model.n_head, request.config.model.block_size) == (32, 2, 32)
    assert not {"train.batch_size", "optim.learning_rate", "model.dropout"} & request.explicit


@pytest.mark.parametrize("block_size", [16, 48])
def test_the_context_may_be_another(tiny_run, new_text, block_size):
    assert learn(tiny_run, new_text, "run", f"--model.block_size={block_size}", "--train.max_steps=2") == 0
    assert load_model(checkpoints(Path("run"))[-1]).config.block_size == block_size


# Going on.


def test_resume_is_exact_also_when_the_old_run_is_gone(tiny_run, learned, new_text):
    shutil.copytree(tiny_run, "old")
    with ctrl_c(12):
        assert learn("old", new_text, "run") == 130
    shutil.rmtree("old")
    assert cli.main(["--resume", "run"]) == 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert sha256(Path("run"), file) == sha256(learned, file), file
    ours, theirs = (metrics(run, "old_text")[0] for run in (Path("run"), learned))
    assert (ours["before"], ours["after"]) == (theirs["before"], theirs["after"])


def test_a_run_killed_before_its_first_checkpoint_begins_again(tiny_run, learned, new_text):
    assert learn(tiny_run, new_text, "run") == 0
    shutil.rmtree("run/checkpoints")
    assert cli.main(["--resume", "run"]) == 0
    assert sha256(Path("run")) == sha256(learned)


def test_one_learns_on_from_what_has_learned_on(learned, text_file):
    assert learn(best_checkpoint(learned), text_file, "run", "--train.max_steps=2") == 0
    assert load_vocabulary(checkpoints(Path("run"))[-1]) == load_vocabulary(best_checkpoint(learned))
    config = read_state(checkpoints(Path("run"))[-1])[1]
    assert config.train.init_from == str(best_checkpoint(learned))


@pytest.mark.slow
def test_two_processes_begin_and_train_as_one(tiny_run, new_text, tmp_path):
    few = ["--train.max_steps=6", "--train.eval_every=6", "--optim.learning_rate=0.001"]
    assert learn(tiny_run, new_text, "one", *few) == 0
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


# What people may come with.


def test_a_run_in_training_may_be_begun_from(tiny_run, new_text):
    with FileLock(tiny_run / ".lock").acquire(timeout=0):
        assert learn(tiny_run, new_text, "run", "--train.max_steps=1") == 0


def test_a_text_without_new_characters(tiny_run, capsys):
    Path("ascii.txt").write_text("an owl sings to the river. " * 100, encoding="utf-8")
    assert learn(tiny_run, "ascii.txt", "run", "--train.max_steps=1") == 0
    assert ": 0 ids are new" in capsys.readouterr().err


def test_ten_thousand_new_characters(tiny_run):
    characters = [chr(0x4E00 + i) for i in range(10_000)]
    Path("many.txt").write_text("".join(characters * 3), encoding="utf-8")
    few = ["--data.min_count=2", "--train.max_steps=1", "--train.batch_size=2"]
    assert learn(tiny_run, "many.txt", "run", *few) == 0
    old, new = load_vocabulary(best_checkpoint(tiny_run)), load_vocabulary(checkpoints(Path("run"))[-1])
    assert new.size >= old.size + 10_000
    assert len(new.encode("".join(characters))) == 10_000


def bad(name: str, tiny_run: Path) -> str:
    """A path that is no model of ours, by what is wrong with it."""
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
    "weights of another shape": "does not fit the model", "no checkpoint yet": "has no checkpoint yet",
}.items())  # fmt: skip
def test_what_is_no_model_is_refused(refused, tiny_run, new_text, name, said):
    path = bad(name, tiny_run)
    assert said in refused("--init-from", path, "--data", str(new_text), "--out", "run")
    assert not Path("run").exists()


@pytest.mark.parametrize(("argv", "said"), [
    (["--model.n_layer", "3"], "model.n_layer = 3 contradicts"),
    (["--model.n_kv_head", "2"], "which has 1; leave it out"),
    (["--config", "speedrun"], "contradicts"),
    (["--model.block_size", "100000"], "use a longer text or a smaller block_size"),
], ids=lambda value: value[1] if isinstance(value, list) else "")  # fmt: skip
def test_contradictions_are_one_line(refused, tiny_run, new_text, argv, said):
    assert said in refused("--init-from", str(tiny_run), "--data", str(new_text), "--out", "run", *argv)


def test_it_wants_a_text_and_no_resume(refused, tiny_run):
    assert "--data FILE" in refused("--init-from", str(tiny_run))
    assert "leave out one of them" in refused("--resume", str(tiny_run), "--init-from", str(tiny_run))
    Path("short.txt").write_text("owl " * 8, encoding="utf-8")
    assert "too few for model.block_size = 32" in refused("--init-from", str(tiny_run), "--data", "short.txt")
