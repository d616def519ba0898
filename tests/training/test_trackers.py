"""Trackers get the records of metrics.jsonl, stay offline, and cannot stop a training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from test_training import TOY, ctrl_c, flags, metrics, sha256

from smallm.errors import UserError
from smallm.training import cli, trackers
from smallm.training.checkpoint.format import read_state
from smallm.training.checkpoint.manager import checkpoints
from smallm.training.config import Config, TrainConfig
from smallm.training.request import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, and an environment without settings of trackers."""
    monkeypatch.chdir(tmp_path)
    for name, value in trackers.OFFLINE.items():
        monkeypatch.setenv(name, value)  # restored after the test
        monkeypatch.delenv(name)
    return tmp_path


class Notebook(GeneralTracker):
    """Stores all records; raises in the method named by `failing`."""

    requires_logging_directory = False
    failing = ""
    started: dict[str, "Notebook"] = {}  # noqa: RUF012

    def __init__(self, project, **settings):
        super().__init__()
        self.lines, self.settings, self.config, self.finished = [], settings, None, 0
        self.project = project
        self.started[self.name] = self

    def _fail(self, where):
        if self.failing == where:
            raise RuntimeError(f"no ink\n  in {self.name}")

    def start(self):
        self._fail("start")

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None):
        self._fail(f"step {step}")
        self.lines.append((step, values))

    def finish(self):
        self.finished += 1
        self._fail("finish")


class Diary(Notebook):
    """A tracker that takes texts."""

    def log_text(self, text, step):
        self._fail(f"text {step}")
        self.lines.append((step, {"text": text}))


@pytest.fixture
def notebook(monkeypatch):
    """Registers a tracker `notebook` that fails at a place, and `diary`; returns the trackers that started, by name."""

    def register(failing="", name="notebook", base=Notebook):
        kind = type(name.title(), (base,), {"name": name, "failing": failing, "started": started})
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
        return started

    started = {}
    register(name="diary", base=Diary)
    return register


@pytest.fixture
def train(text_file):
    def train(out="run", code=0, **changes):
        settings = TOY | {key.replace("__", "."): value for key, value in changes.items()}
        assert cli.main(["--data", str(text_file), "--out", out, *flags(settings)]) == code
        return Path(out)

    return train


def numbers(record):
    """What a tracker should get for a record of metrics.jsonl."""
    expected = {f"{record['kind']}/{key}": value for key, value in record.items()
              if key not in ("kind", "step", "sample") and value is not None}  # fmt: skip
    return record["step"], expected


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_tracker_gets_the_metrics_and_changes_nothing(train, notebook):
    notebook()
    run, started = train(train__log_with="notebook"), notebook()
    (book,) = started.values()
    assert book.lines == [numbers(line) for line in lines(run)]
    assert {key for _, values in book.lines for key in values} >= {
        "train/loss", "train/learning_rate", "train/grad_norm", "train/characters_per_second", "eval/val_loss",
    }  # fmt: skip
    assert (book.project, book.finished, book.settings) == ("smallm", 1, {})
    settings = Config.from_dict(read_state(checkpoints(run)[-1])[1].to_dict())
    assert book.config["model.n_layer"] == settings.model.n_layer == 2
    assert book.config["optim.betas"] == "0.9 0.95"
    assert set(map(type, book.config.values())) <= {int, float, str}
    assert sha256(run) == sha256(train("without"))
    assert not (Path("without") / trackers.LOGS).exists()


def test_samples_are_texts(train, notebook):
    run = train(train__log_with="diary")
    texts = [(step, values["text"]) for step, values in notebook()["diary"].lines if "text" in values]
    assert texts == [(line["step"], line["sample"]) for line in metrics(run, "eval")]
    assert len(texts) == 3


def test_several(train, notebook):
    notebook()
    run = train(train__log_with="notebook, diary,notebook")
    started = notebook()
    assert started["notebook"].lines == [numbers(line) for line in lines(run)]
    assert len(started["diary"].lines) > len(started["notebook"].lines)


@pytest.mark.parametrize("place", ["step 1", "step 5", "text 5", "step 12"])
def test_a_failing_tracker_is_reported_once_and_left_out(train, notebook, capsys, place):
    base = Diary if place.startswith("text") else Notebook
    notebook(place, base=base)
    run = train(train__log_with="notebook,diary")
    err = capsys.readouterr().err
    assert err.count("warning: notebook failed (no ink in notebook); training continues without it") == 1
    assert err.count("warning: ") == 1 + err.count("warning: no C compiler")
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))
    started = notebook(place, base=base)
    assert started["diary"].lines[-1][0] == 12
    last = int(place.split()[1])
    assert [step for step, _ in started["notebook"].lines if step > last] == []
    assert sha256(run) == sha256(train("without"))


def test_a_tracker_that_fails_at_the_end(train, notebook, capsys):
    notebook("finish")
    train(train__log_with="notebook,diary")
    assert "warning: notebook failed (no ink in notebook)" in capsys.readouterr().err
    assert notebook("finish")["diary"].finished == 1


def test_a_tracker_that_cannot_start_is_reported_before_training(refused, notebook, text_file, folder):
    notebook("start")
    argv = ["--data", str(text_file), "--out", "run", *flags(TOY), "--train.log_with", "notebook"]
    assert refused(*argv).split("smallm: ")[-1] == (
        "notebook cannot start (no ink in notebook); solve this problem, or leave the tracker out of train.log_with"
    )
    assert list(folder.iterdir()) == []


def test_a_failed_training_ends_its_trackers(notebook, text_file, monkeypatch):
    monkeypatch.setattr("smallm.training.trainer.evaluate", lambda *_, **options: float("nan"))
    with pytest.raises(UserError, match=r"lower optim\.learning_rate"):
        cli.main(["--data", str(text_file), "--out", "run", *flags(TOY), "--train.log_with=diary"])
    assert notebook()["diary"].finished == 1


def test_a_resumed_run_continues_its_log(train, notebook):
    notebook()
    with ctrl_c(6):
        train(code=130, train__log_with="notebook")
    first = notebook()["notebook"]
    assert first.finished == 1
    assert cli.main(["--resume", "run"]) == 0
    second = notebook()["notebook"]
    assert second is not first
    assert second.config is None  # stored at the first start
    steps = [step for step, values in first.lines + second.lines if "train/loss" in values]
    assert steps == list(range(1, 13))


@pytest.mark.parametrize(
    ("value", "names"),
    [("", ()), ("a", ("a",)), ("a,b", ("a", "b")), (" a  b,,a ", ("a", "b")), (("a", "b", "a"), ("a", "b")), ((), ())],
)
def test_names(value, names):
    config = TrainConfig(log_with=value)
    assert config.trackers == names
    whole = Config(train=config)
    assert Config.from_dict(whole.to_dict()) == whole


def test_what_the_documentation_shows():
    page = (ROOT / "docs" / "runs-and-reports.md").read_text(encoding="utf-8").split("\n## Trackers")[1]
    (command,) = re.findall(r"^python train.py (.*)$", page, re.MULTILINE)
    assert cli.parse(command.split()).config.train.trackers == ("tensorboard",)
    for name in tracking.LOGGER_TYPE_TO_CLASS:
        assert re.search(rf"\b{name}\b", page), name


def test_lists_in_files_and_flags(tmp_path):
    file = tmp_path / "t.toml"
    file.write_text('[train]\nlog_with = ["tensorboard", "wandb"]\n')
    both = ("tensorboard", "wandb")
    assert load_config(file).train.trackers == both
    for flag in ("tensorboard,wandb", '["tensorboard", "wandb"]'):
        assert cli.parse(["--train.log_with", flag]).config.train.trackers == both
    assert cli.parse(["--config", str(file), "--train.log_with", ""]).config.train.trackers == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensorbord", "there is no tracker 'tensorbord'; train.log_with knows aim, comet_ml, mlflow, tensorboard"),
        ("all", "there is no tracker 'all'"),
        ("wandb", "wandb is not installed; pip install wandb, or leave it out of train.log_with"),
    ],
)
def test_a_missing_tracker_is_reported_before_training(refused, monkeypatch, text_file, folder, given, message):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    line = refused("--data", str(text_file), "--out", "run", *flags(TOY), "--train.log_with", given)
    assert message in line
    assert list(folder.iterdir()) == []


def test_a_missing_tracker_in_a_new_process(text_file, folder):
    """There Accelerate has no state yet when the names are checked."""
    code = """
import sys
from accelerate import tracking
from smallm.cli import main as cli
tracking._available_trackers.clear()
sys.exit(cli.run(cli.train))
"""
    argv = ["--data", str(text_file), "--out", "run", *flags(TOY), "--train.log_with=tensorboard"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=100,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "smallm: tensorboard is not installed; pip install tensorboard, or leave it out of train.log_with\n"
    )
    assert list(folder.iterdir()) == []


def test_trackers_are_offline_unless_the_environment_says_otherwise(train, notebook, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    train(train__log_with="diary")
    assert os.environ["WANDB_MODE"] == "online"
    assert {name: os.environ[name] for name in trackers.OFFLINE} == trackers.OFFLINE | {"WANDB_MODE": "online"}


def test_without_trackers_no_tracker_is_imported_or_configured(text_file):
    code = f"""
import os, sys
from smallm.training import cli
from smallm.training.trackers import OFFLINE
assert cli.main({["--data", str(text_file), "--out", "run", *flags(TOY)]!r}) == 0
print([name for name in ("tensorboard", "torch.utils.tensorboard", "wandb", "mlflow", "aim") if name in sys.modules],
      [name for name in OFFLINE if name in os.environ])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["[] []"], done.stderr


@pytest.mark.parametrize("name", sorted(tracking.LOGGER_TYPE_TO_CLASS))
def test_the_settings_of_a_tracker_suit_accelerates_wrapper(name, tmp_path):
    """The wrappers can be built without their packages, which only `start` imports."""
    settings = trackers._tracker_settings(tmp_path, 3).get(name, {})
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    folder = [str(tmp_path)] if kind.requires_logging_directory else []
    assert kind(trackers.PROJECT, *folder, **settings).name == name


def test_a_run_has_one_id(tmp_path):
    first = trackers._tracker_settings(tmp_path, 0)["wandb"]
    assert trackers._tracker_settings(tmp_path, 5)["wandb"] == first
    assert first["name"] == tmp_path.parent.name
    assert trackers._tracker_settings(tmp_path, 0)["wandb"]["id"] != first["id"]


# With TensorBoard, if it is installed.


@pytest.fixture
def read_tensorboard():
    """Reads from the log of TensorBoard the points of a curve, or the texts, by step."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module, reason="tensorboard is not installed")

    def read(run, tag):
        events = accumulator.EventAccumulator(str(run / "logs" / "smallm"), {"tensors": 0, "scalars": 0})
        events.Reload()
        if tag in events.Tags()["scalars"]:
            return [(event.step, event.value) for event in events.Scalars(tag)]
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]

    return read


def test_tensorboard_and_resume(train, read_tensorboard):
    with ctrl_c(8):
        run = train(code=130, train__log_with="tensorboard", train__save_every=100)
    # As after a kill some steps behind the checkpoint of step 5: the steps in between are trained again.
    newest = checkpoints(run)[-1]
    assert len(checkpoints(run)) > 1
    for file in sorted(newest.iterdir(), reverse=True):
        file.unlink()
    newest.rmdir()
    assert cli.main(["--resume", "run"]) == 0
    expected = [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in metrics(run)]
    assert [step for step, _ in expected] == list(range(1, 13))
    assert read_tensorboard(run, "train/loss") == expected
    shown = read_tensorboard(run, "eval/sample/text_summary")
    samples = [(line["step"], "".join(f"    {part}" for part in line["sample"].splitlines(keepends=True)))
               for line in metrics(run, "eval")]  # fmt: skip
    assert shown == samples


def test_tensorboard_on_a_full_disk(train, read_tensorboard, capsys, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, number = RecordWriter.write, []

    def full(self, data):
        number.append(1)
        if len(number) > 12:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    run = train(train__log_with="tensorboard")
    err = capsys.readouterr().err
    assert "warning: tensorboard failed ([Errno 28] No space left on device); training continues without it" in err
    assert err.count("warning: ") == 1 + err.count("warning: no C compiler")
    assert "Traceback" not in err
    assert len(metrics(run)) == 12
