"""smallm.training.config, request and cli: settings from files and flags, and the messages for mistakes."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from smallm.errors import UserError
from smallm.training.cli import build_parser, parse
from smallm.training.config import KEYS, Config, ModelConfig, OptimConfig
from smallm.training.request import find_config, load_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.toml"))
NAMES = ("quickstart", "shakespeare-cpu", "shakespeare-gpu", "lr-decay", "no-lr-decay")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, and no training: a mistake must be reported before the training begins."""

    def run_training(request, started, imports):
        pytest.fail("training began")

    monkeypatch.setattr("smallm.training.run.run_training", run_training)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toml(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# The shipped files.


def test_the_configs_exist():
    assert {path.stem for path in SHIPPED} >= set(NAMES)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_config_loads(path):
    config = load_config(path)
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    resolved = config.to_dict()
    for section, values in written.items():
        assert {key: resolved[section][key] for key in values} == values
    header = path.read_text(encoding="utf-8").split("[")[0]
    assert header.startswith("#")
    assert re.search(r"(?i)loss|nats", header), "the header says what loss to expect"
    assert re.search(r"(?i)minute|second|\bmin\b|\d s\b", header), "the header says how long it takes"


def test_quickstart_is_the_default():
    assert load_config("quickstart") == Config()


def test_gpu_config_has_the_documented_size():
    from smallm.training.model.transformer import TransformerLanguageModel

    model = load_config("shakespeare-gpu").model
    assert (model.n_layer, model.n_embd, model.block_size) == (6, 384, 256)
    assert TransformerLanguageModel(256, model).parameter_count() == pytest.approx(10.7e6, rel=0.02)


def test_the_decay_pair_is_the_original_recipe_and_differs_in_the_schedule():
    decay, none = load_config("lr-decay"), load_config("no-lr-decay")
    o = decay.optim
    assert (o.name, o.learning_rate, o.schedule, o.gamma, o.grad_clip) == ("adam", 1e-3, "exponential", 0.95, 1.0)
    gamma_free = dataclasses.replace(none.optim, schedule=o.schedule, gamma=o.gamma)
    assert dataclasses.replace(none, optim=gamma_free) == decay
    assert none.optim.schedule == "constant" or none.optim.gamma == 1.0


# Round trips.


def test_to_dict_and_back():
    config = Config(model=ModelConfig(n_layer=2, dropout=0.1), optim=OptimConfig(betas=(0.8, 0.99)))
    plain = json.loads(json.dumps(config.to_dict()))
    assert Config.from_dict(plain) == config
    assert plain["optim"]["betas"] == [0.8, 0.99]
    assert Config.from_dict({}) == Config()
    assert Config.from_dict({"model": {"n_layer": 2}}).model == ModelConfig(n_layer=2)


configs = st.builds(
    lambda source, n_layer, dropout, rate, betas, schedule, seed, compile, text: Config.from_dict(
        {
            "data": {"source": source},
            "model": {"n_layer": n_layer, "dropout": dropout},
            "optim": {"learning_rate": rate, "betas": betas, "schedule": schedule},
            "train": {"seed": seed, "compile": compile},
            "sample": {"seed": text},
        }
    ),
    source=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    n_layer=st.integers(1, 99),
    dropout=st.floats(0, 0.99),
    rate=st.floats(1e-6, 10),
    betas=st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
    schedule=st.sampled_from(["constant", "exponential", "cosine", "wsd"]),
    seed=st.integers(0, 2**31),
    compile=st.sampled_from(["auto", "yes", "no"]),
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0")),
)


@settings(max_examples=12)
@given(configs)
def test_through_toml_and_back(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("toml") / "c.toml"
    path.write_bytes(tomli_w.dumps(config.to_dict()).encode())
    assert load_config(path) == config


# The command line.


def test_defaults():
    request = parse([])
    assert request.config == Config()
    assert (request.out, request.resume) == (Path("runs/quickstart"), False)


def test_the_flags_of_the_design():
    words = (
        "--model.block_size 64 --optim.learning_rate 1e-3 --train.max_steps 500 --train.batch_size 64 "
        "--train.eval_every 50 --train.save_every 50 --train.seed 1 --train.mixed_precision auto"
    )
    config = parse(words.split()).config
    t = config.train
    assert (config.model.block_size, config.optim.learning_rate) == (64, 1e-3)
    assert (t.max_steps, t.batch_size, t.eval_every, t.save_every, t.seed) == (500, 64, 50, 50, 1)


def test_every_setting_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code in (0, None)
    text = " ".join(capsys.readouterr().out.split())
    entries = dict(re.findall(r" --(\w+\.\w+) (.*?)(?= --\w+\.\w+ |$)", text.split("[data]")[1]))
    assert set(entries) == set(KEYS)
    for key, entry in entries.items():
        assert "default:" in entry, key
        explained = re.split(r"\((?:type:|default:)", entry)[0]
        assert len(explained.split()) > 2, f"{key} is not explained: {entry}"


FLAGS = """
--help --data --encoding --minutes --init-from --config --out --resume --check --eval-only --profile --json
--data.source --data.include --data.exclude --data.field
--data.encoding --data.min_count --data.val_fraction --data.weights --data.split --data.separator --data.normalise
--data.newlines
--model.n_layer --model.n_head --model.n_kv_head --model.n_embd --model.n_inner --model.block_size --model.window
--model.dropout --model.rope_theta
--optim.name --optim.learning_rate --optim.adam_learning_rate --optim.schedule --optim.gamma --optim.warmup_steps
--optim.decay_fraction --optim.min_lr --optim.weight_decay --optim.betas --optim.momentum --optim.newton_schulz_steps
--optim.grad_clip
--train.batch_size --train.short_windows --train.short_until --train.noise --train.micro_batch_size --train.max_steps
--train.epochs --train.minutes --train.eval_every --train.save_every --train.keep_last --train.patience
--train.log_every --train.log_with --train.sample_length --train.ensemble --train.init_from --train.seed
--train.mixed_precision --train.compile --sample.seed --sample.temperature --sample.top_k --sample.top_p --sample.min_p
"""


def test_the_list_of_flags():
    """A flag that is renamed or removed breaks the scripts of users and the configs of their runs."""
    flags = {flag for action in build_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert flags == set(FLAGS.split())


@pytest.mark.parametrize(
    ("argv", "betas"),
    [
        ("--optim.betas=0.8,0.99", (0.8, 0.99)),
        ("--optim.betas=[0.8, 0.99]", (0.8, 0.99)),
        ("--optim.betas=[0,0.5]", (0, 0.5)),
    ],
)
def test_lists_are_written_with_commas_or_as_in_toml(argv, betas):
    assert parse([argv]).config.optim.betas == betas
    train = parse(["--train.short_windows", "32,64", "--train.short_until", "[0.2, 0.5]"]).config.train
    assert (train.short_windows, train.short_until) == ((32, 64), (0.2, 0.5))
    assert parse(["--train.log_with", '["tensorboard", "wandb"]']).config.train.trackers == ("tensorboard", "wandb")
    assert parse(["--train.log_with", "tensorboard,wandb"]).config.train.trackers == ("tensorboard", "wandb")


def test_flags_override_the_file_in_any_order(folder):
    path = toml(folder / "mine.toml", "[model]\nn_layer = 5\nn_embd = 48\n[optim]\nbetas = [0.8, 0.9]\n")
    for argv in (
        ["--config", path, "--model.n_layer", "2"],
        ["--model.n_layer", "2", "--config", path],
        ["--model.n_layer=2", f"--config={path}"],
    ):
        request = parse(argv)
        assert (request.config.model.n_layer, request.config.model.n_embd) == (2, 48)
        assert request.config.optim.betas == (0.8, 0.9)
        assert request.out == Path("runs/mine")


def test_of_two_files_the_second_wins(folder):
    first = toml(folder / "a.toml", "[model]\nn_layer = 5\nn_embd = 48\n")
    second = toml(folder / "b.toml", "[model]\nn_layer = 2\n")
    model = parse(["--config", first, "--config", second]).config.model
    assert (model.n_layer, model.n_embd) == (2, 48)


def test_short_forms():
    for argv in (["--data", "a.txt", "--encoding", "latin-1"], ["--data=a.txt", "--encoding=latin-1"]):
        data = parse(argv).config.data
        assert (data.source, data.encoding) == ("a.txt", "latin-1")


@pytest.mark.parametrize("text", ["1984", "true", "null", "1e3", "[x]", "a: b", "~", "", "{}", "#1.txt"])
def test_a_file_name_or_seed_text_is_not_parsed(text):
    config = parse(["--data", text, "--sample.seed", text]).config
    assert (config.data.source, config.sample.seed) == (text, text)


def test_shipped_configs_are_found_by_name(folder):
    name = SHIPPED[0].stem if SHIPPED else pytest.fail("no configs")
    for spelling in (name, f"{name}.toml"):  # from any folder
        assert find_config(spelling).read_bytes() == SHIPPED[0].read_bytes()
        assert parse(["--config", spelling]).out == Path("runs") / name
    toml(folder / f"{name}.toml", "[model]\nn_layer = 7\n")  # a file in the current folder comes first
    assert parse(["--config", f"{name}.toml"]).config.model.n_layer == 7


def test_default_folder_is_the_first_free_one(folder):
    (folder / "runs/quickstart").mkdir(parents=True)
    (folder / "runs/quickstart-2").mkdir()
    assert parse([]).out == Path("runs/quickstart-3")
    assert parse(["--out", "x/y"]).out == Path("x/y")


# Mistakes: one line on stderr, exit code 2, nothing on stdout, nothing left behind.


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        # unknown keys
        (["--model.n_layers", "2"], ["--model.n_layers 2", "did you mean --model.n_layer?"]),
        (["--model.n_layers=2"], ["--model.n_layers=2", "did you mean --model.n_layer?"]),
        (["--n_layers", "2"], ["--n_layers 2", "did you mean --model.n_layer?"]),
        (["--rsume", "r"], ["--rsume r", "did you mean --resume?"]),
        (["--data", "a.txt", "b.txt"], ["unrecognized arguments: b.txt", "did you mean --data b.txt", "quote a value"]),
        (["--train.learning_rate", "1"], ["train.learning_rate", "optim.learning_rate"]),
        (["--batch_size", "4"], ["batch_size", "train.batch_size"]),
        (["--train.max-steps", "4"], ["train.max-steps", "train.max_steps"]),
        (["--zzz", "4"], ["zzz"]),
        (["--dat", "x"], ["dat"]),
        (["stray"], ["stray"]),
        # wrong types
        (["--model.n_layer", "two"], ["model.n_layer", "two"]),
        (["--model.n_layer", "2.5"], ["model.n_layer", "2.5"]),
        (["--optim.learning_rate", "fast"], ["optim.learning_rate", "fast"]),
        (["--train.compile", "perhaps"], ["train.compile", "auto", "perhaps"]),
        (["--optim.name", "sgd"], ["optim.name", "adamw"]),
        (["--train.mixed_precision", "int8"], ["train.mixed_precision", "bf16"]),
        (["--optim.betas", "0.9"], ["optim.betas"]),
        (["--optim.betas", "[0.9,0.95,0.99]"], ["optim.betas"]),
        (["--model.n_layer"], ["model.n_layer"]),
        (["--config"], ["config"]),
        (["--out"], ["out"]),
        # impossible values
        (["--model.n_layer", "0"], ["model.n_layer = 0"]),
        (["--model.block_size", "-1"], ["model.block_size"]),
        (["--model.dropout", "1"], ["model.dropout"]),
        (["--model.dropout", "nan"], ["model.dropout"]),
        (["--optim.learning_rate", "0"], ["optim.learning_rate"]),
        (["--optim.learning_rate", "nan"], ["optim.learning_rate"]),
        (["--optim.learning_rate", "inf"], ["optim.learning_rate"]),
        (["--optim.min_lr", "1"], ["optim.min_lr", "learning_rate"]),
        (["--optim.betas", "[0.9,1.0]"], ["betas"]),
        (["--data.val_fraction", "1"], ["data.val_fraction"]),
        (["--train.batch_size", "0"], ["train.batch_size"]),
        (["--train.batch_size", str(2**53)], ["train.batch_size"]),
        (["--train.short_windows", "[64]"], ["train.short_until", "1 numbers"]),
        (["--train.short_windows", "[48]", "--train.short_until", "[0.5]"], ["short_windows", "48", "block_size"]),
        (["--train.short_windows", "[256]", "--train.short_until", "[0.5]"], ["train.short_windows", "shorter"]),
        (["--train.short_windows", "[32,64]", "--train.short_until", "[0.5,0.5]"], ["train.short_until", "rise"]),
        (["--train.short_windows", "[64]", "--train.short_until", "[1.0]"], ["train.short_until", "below 1"]),
        (["--optim.newton_schulz_steps", "9"], ["optim.newton_schulz_steps", "8"]),
        (["--train.seed", "-1"], ["train.seed"]),
        (["--train.seed", "4294967296"], ["train.seed"]),  # the generator of the samples has 32 bits
        (["--train.epochs", "nan"], ["train.epochs"]),
        (["--sample.temperature", "-1"], ["temperature", "-1"]),
        (["--sample.top_k", "-1"], ["top_k", "-1"]),
        (["--sample.top_p", "0"], ["top_p"]),
        (["--sample.min_p", "2"], ["min_p"]),
        # impossible combinations
        (["--model.n_embd", "100", "--model.n_head", "3"], ["n_embd = 100", "n_head = 3", "99"]),
        (["--model.n_embd", "48", "--model.n_head", "4"], ["12", "multiple of 16"]),
        (["--model.n_kv_head", "2"], ["n_head = 3", "n_kv_head = 2"]),
        (["--model.n_kv_head", "8"], ["n_head = 3", "n_kv_head = 8"]),
        # files
        (["--config", "nowhere.toml"], ["nowhere.toml"]),
        (["--config", "."], ["."]),
        (["--config", "/nowhere/quickstart.toml"], ["/nowhere/quickstart.toml"]),
        # resuming
        (["--resume", "nowhere"], ["nowhere"]),
        (["--resume", "nowhere", "--out", "x"], ["resume", "leave out config and out"]),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_a_mistake_is_one_line(refused, folder, argv, expected):
    line = refused(*argv)
    for words in expected:
        assert words in line
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[model]\nn_layers = 2\n", ["model.n_layers", "did you mean model.n_layer?", "mine.toml"]),
        ("[modle]\nn_layer = 2\n", ["modle.n_layer", "model.n_layer", "mine.toml"]),
        ("n_layer = 2\n", ["n_layer", "model.n_layer", "mine.toml"]),
        ("[train]\nmax_step = 2\n", ["train.max_step", "train.max_steps"]),
        ("[model]\nn_layer = 'two'\n", ["model.n_layer", "two"]),
        ("[model]\nn_layer = 2.5\n", ["model.n_layer", "2.5"]),
        ("[optim]\nbetas = 0.9\n", ["optim.betas"]),
        ("[optim]\nname = 'sgd'\n", ["optim.name", "sgd"]),
        ("model = 3\n", ["model"]),
        ("[model]\nn_layer = [2]\n", ["model.n_layer"]),
        ("[model.n_layer]\nx = 2\n", ["model.n_layer"]),
        ("[model\n", ["mine.toml"]),
        ("[model]\nn_layer = 2\nn_layer = 3\n", ["mine.toml"]),
        ("[model]\nn_embd = 100\nn_head = 3\n", ["n_embd = 100", "n_head = 3"]),
        ("resume = 'x'\n", ["resume"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line(refused, folder, text, expected):
    path = toml(folder / "mine.toml", text)
    line = refused("--config", path)
    for words in expected:
        assert words in line
    assert [path.name for path in folder.iterdir()] == ["mine.toml"]


def test_a_file_that_is_not_utf8_is_one_line(refused, folder):
    (folder / "mine.toml").write_bytes(b"[data]\nsource = '\xff'\n")
    assert "mine.toml" in refused("--config", "mine.toml")


def test_missing_config_names_the_shipped_ones(refused):
    line = refused("--config", "shakespeer")
    for name in NAMES:
        assert name in line


def test_resume_with_out_or_config_is_refused(refused, tiny_run, folder):
    path = toml(folder / "mine.toml", "")
    assert "leave out config and out" in refused("--resume", str(tiny_run), "--out", "x")
    assert "leave out config and out" in refused("--resume", str(tiny_run), "--config", path)
    assert not (folder / "x").exists()


def test_resume_takes_the_settings_of_the_run_and_flags_override_them(tiny_run):
    request = parse(["--resume", str(tiny_run), "--train.max_steps", "70"])
    assert (request.out, request.resume) == (tiny_run, True)
    assert (request.config.model.n_embd, request.config.train.batch_size) == (32, 16)
    assert request.config.train.max_steps == 70


def test_a_folder_with_a_run_is_not_used_for_another(refused, tiny_run):
    before = sorted(path.name for path in tiny_run.rglob("*"))
    assert f"--resume {tiny_run}" in refused("--out", str(tiny_run))
    assert sorted(path.name for path in tiny_run.rglob("*")) == before


def test_the_run_folder_cannot_be_a_file(refused, folder):
    (folder / "x").write_text("mine")
    assert "x is a file" in refused("--out", "x")
    assert (folder / "x").read_text() == "mine"


def test_from_dict_refuses_an_invalid_config():
    with pytest.raises(UserError, match=r"did you mean model\.n_layer\?"):
        Config.from_dict({"model": {"n_layers": 2}})
    with pytest.raises(UserError):
        Config.from_dict({"model": 3})
