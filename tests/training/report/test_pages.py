"""Report pages: they are complete and agree with the run, and they are written however the run ended."""

import errno
import json
import math
import re
import shutil
import signal
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from smallm.errors import UserError
from smallm.html.escape import visible
from smallm.runs.config_file import flatten
from smallm.runs.layout import RECORD as FILE
from smallm.training import cli
from smallm.training.config import Config
from smallm.training.data.batch_loader import BatchLoader
from smallm.training.report.history import read_histories
from smallm.training.report.pages import report_page, write_report
from smallm.training.report.plot import main as plot
from smallm.training.report.record import RecordWriter, RunRecord, read_record

VOID = {"meta", "br", "hr", "img", "link", "input"}
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'\x1b[31m\u202e"


class Page(HTMLParser):
    """A parsed page. Fails if elements are not closed in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words, self.headings = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def read(file: Path) -> Page:
    text = file.read_text(encoding="utf-8")
    found = Page(text)
    loaded = [value for name, value in found.attributes if name in ("src", "href", "action", "data", "poster")]
    assert [value for value in loaded if not value.startswith("#")] == []
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    return found


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A copy of `tiny_run` without its checkpoints, which a report does not need."""
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny", ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    return tmp_path / "runs" / "tiny"


def edit(run: Path, **values) -> None:
    """Changes fields of report.json."""
    known = json.loads((run / FILE).read_text(encoding="utf-8"))
    (run / FILE).write_text(json.dumps(known | values), encoding="utf-8")


def metrics(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_bytes().split(b"\n") if text]
    return [values for values in lines if values["kind"] == kind]


def page_of(run: Path) -> Page:
    return read(write_report([run]))


# A finished run.


def test_a_finished_run_has_a_report(tiny_run, text_file):
    found = read(tiny_run / "report.html")
    best = min(values["val_loss"] for values in metrics(tiny_run, "eval"))
    assert f"{best:.4f}" in found.text
    assert f"{best / math.log(2):.3f}" in found.text
    assert "finished" in found.text
    for values in metrics(tiny_run, "eval"):
        assert values["sample"].strip("\n") in found.text
        assert f"{values['val_loss']:.3f} nats" in found.text
    for one in json.loads((tiny_run / "baselines.json").read_text()):
        assert one["name"] in found.words
        assert f"{one['bits_per_char']:.3f}" in found.words
        assert one["how"] in found.words
    assert found.headings == ["Results", "Loss", "Baselines", "Samples", "Memorisation", "Configuration", "Surprisal",
                              "Text", "Machine and versions", "Commands"]  # fmt: skip
    assert text_file.name in found.text
    assert torch.__version__ in found.text


def test_all_settings_are_shown_and_changed_ones_marked(tiny_run):
    text = (tiny_run / "report.html").read_text(encoding="utf-8")
    section = text[text.index("<h2>Configuration") : text.index("<h2>Surprisal")]
    rows = re.findall(r"<tr><td>([a-z_.]+)</td><td>(.*?)</td><td>(.*?)</td></tr>", section)
    config, defaults = flatten(tomllib.loads((tiny_run / "config.toml").read_text())), flatten(Config().to_dict())
    assert [name for name, _, _ in rows] == list(config)
    assert {name for name, _, default in rows if default} == {
        name for name, value in config.items() if value != defaults[name]
    }
    assert ("model.n_layer", "2", "3") in rows


def test_the_charts_show_the_losses(run, tiny_run, charts):
    found = page_of(run)
    data = [json.loads(value) for name, value in found.attributes if name == "data-chart"]
    assert [one["x"] for one in data] == ["step", "characters of text", "step", "step"]
    training, validation = data[0]["lines"]
    assert [point[2:] for point in training["points"]] == [
        [values["step"], pytest.approx(values["loss"], rel=1e-4)] for values in metrics(tiny_run, "train")
    ]
    assert [point[2] for point in validation["points"]] == [20, 40, 60]
    record, last = read_record(tiny_run), metrics(tiny_run, "train")[-1]
    assert data[1]["lines"][0]["points"][-1][2] == pytest.approx(last["epoch"] * record.train_characters, rel=1e-4)


def test_an_ensemble_explains_its_jumps(run):
    assert "one after another" not in page_of(run).text
    config = run / "config.toml"
    config.write_text(re.sub(r"^ensemble = 1$", "ensemble = 2", config.read_text(), flags=re.MULTILINE))
    assert "This run trained 2 models one after another" in page_of(run).text


def test_the_passage_is_of_the_best_step_and_coloured(tiny_run):
    passage = read_record(tiny_run).passage
    evaluations = metrics(tiny_run, "eval")
    best = min(evaluations, key=lambda values: values["val_loss"])
    assert passage.step == best["step"]
    assert passage.text in (tiny_run / "validation.txt").read_text(encoding="utf-8")
    assert np.mean(passage.nats) == pytest.approx(best["val_loss"], rel=0.3)  # the loss of the whole text
    assert passage.text in read(tiny_run / "report.html").text.replace("↵", "")


def test_a_page_written_again_is_identical(run, charts, tmp_path, capsys):
    before = write_report([run]).read_bytes()
    capsys.readouterr()
    assert plot([str(run), "--html", str(tmp_path / "sub" / "again.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'sub' / 'again.html'}\n"
    assert (tmp_path / "sub" / "again.html").read_bytes() == before
    assert list((tmp_path / "sub").iterdir()) == [tmp_path / "sub" / "again.html"]


def test_a_page_and_a_picture_in_one_call(run, charts, tmp_path, capsys):
    assert plot([str(run), "--html", str(tmp_path / "a.html"), "--out", str(tmp_path / "a.svg")]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "a.html"), str(tmp_path / "a.svg")]
    assert (tmp_path / "a.svg").is_file()


# Runs that ended otherwise, and folders that lack files.


@pytest.fixture
def train(text_file, tmp_path, monkeypatch):
    """A function that trains a tiny model for 12 steps into the folder `run` and returns this folder."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 16, "model.block_size": 16, "train.batch_size": 8,
        "train.max_steps": 12, "train.eval_every": 5, "train.log_every": 1, "train.sample_length": 8,
    }  # fmt: skip

    def train(*argv, code=0):
        new = ["--data", str(text_file), "--out", "run", *(f"--{key}={value}" for key, value in settings.items())]
        assert cli.main([*([] if "--resume" in argv else new), *argv]) == code
        return Path("run")

    return train


def test_an_interrupted_run_has_a_report_and_a_resumed_run_a_new_one(train, charts, monkeypatch, capsys):
    batch = BatchLoader.batch

    def pressing(self, wanted, *args, **options):
        if wanted == 7:
            signal.raise_signal(signal.SIGINT)
        return batch(self, wanted, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "batch", pressing)
        run = train(code=130)
    assert "report: run/report.html\n" in capsys.readouterr().err
    found = read(run / "report.html")
    assert "interrupted" in found.text
    assert "8 of 12" in found.text
    assert "python -m smallm train --resume run" in found.text
    passage = read_record(run).passage
    assert passage.step == 5
    train("--resume", "run")
    assert "report: run/report.html\n" in capsys.readouterr().out
    found = read(run / "report.html")
    assert "interrupted" not in found.text
    assert "12 of 12" in found.text
    assert read_record(run).passage.step == 12


def test_out_of_patience(train):
    run = train("--train.eval_every=1", "--train.patience=1", "--optim.learning_rate=3.0", "--optim.grad_clip=0",
                "--train.max_steps=60", "--optim.schedule=constant")  # fmt: skip
    found = read(run / "report.html")
    assert "ended early because the validation loss no longer fell" in found.text
    assert "python -m smallm train --resume run --train.patience=0" in found.text


def test_the_report_of_a_killed_run_can_be_written_later(run):
    (run / "report.html").unlink()
    edit(run, state="training", memorisation=[])  # as before the end of a run
    (run / "baselines.json").unlink()
    found = page_of(run)
    assert "the run still trains, or was killed" in found.text
    assert {"Loss", "Samples", "Surprisal", "Text", "Commands"} <= set(found.headings)
    assert not {"Baselines", "Memorisation"} & set(found.headings)


def test_the_report_of_an_old_run_leaves_out_what_is_missing(run, charts):
    for name in (FILE, "config.toml", "baselines.json", "validation.txt", "report.html"):
        (run / name).unlink()
    found = page_of(run)
    assert found.headings == ["Results", "Loss", "Samples", "Commands"]
    assert "nan" not in found.text.lower().split()


@pytest.mark.parametrize("name", ["report.html", FILE, "baselines.json"])
def test_a_report_that_cannot_be_written_does_not_fail_the_run(train, tmp_path, capsys, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    train()
    out, err = capsys.readouterr()
    assert "best validation loss" in out
    assert "next: python -m smallm export run" in out
    assert [text for text in err.splitlines() if name.split(".")[0] in text and "warning: " in text]
    assert err.count("warning") == 1
    assert ("report: " in out) == (name != "report.html")
    assert [file.name for file in (tmp_path / "run").glob("*report.*") if file.name not in ("report.html", FILE)] == []


def test_a_full_disk(run, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    before = (run / "report.html").read_bytes()
    with pytest.raises(UserError, match=r"report\.html.*No space left on device"):
        write_report([run])
    said = []
    writer = RecordWriter(run, said.append, resumed=True)
    writer.update(state="finished")
    writer.update(state="interrupted")
    assert len(said) == 1  # the warning is printed once
    assert "No space left on device" in said[0]
    assert (run / "report.html").read_bytes() == before


# Files from strangers.


def test_hostile_names_texts_and_settings_stay_text(run, charts, tmp_path):
    nasty = run.with_name("a & b <script>")
    run.rename(nasty)
    (nasty / "config.toml").write_text(f"[sample]\nseed = {json.dumps(NASTY)}\n[{json.dumps(NASTY)}]\nx = 1\n")
    (nasty / "baselines.json").write_text(json.dumps([{"name": NASTY, "bits_per_char": 2.0, "how": NASTY}]))
    count = len(NASTY)
    passage = {"step": 1, "text": NASTY, "nats": [1.0] * count, "expected": ["<>&'\""] * count,
               "probabilities": [[0.2] * 5] * count}  # fmt: skip
    facts = {"text": NASTY, NASTY: NASTY}
    edit(nasty, facts=facts, findings=[NASTY], memorisation=[[NASTY] * 3], began=NASTY, passage=passage)
    values = metrics(nasty, "eval")[-1]
    with (nasty / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step, text in ((61, NASTY), (62, "\ud83d half a character")):
            file.write(json.dumps(values | {"step": step, "sample": text}) + "\n")
    usual = page_of_tags(tmp_path, run=nasty)
    assert usual.tags.count("script") == 2  # the passage's data and the page's own
    assert "img" not in usual.tags
    assert not [name for name, _ in usual.attributes if name.startswith("on")]
    assert "a & b <script>" in usual.words
    shown = NASTY.replace("\x1b", "␛").replace("\u202e", "\N{REPLACEMENT CHARACTER}")
    assert usual.text.count(shown) >= 8
    assert not [c for c in usual.text if ord(c) < 32 and c not in "\n\t"]


def page_of_tags(tmp_path: Path, run: Path) -> Page:
    comparison = tmp_path / "compare.html"
    assert plot([str(run), str(run), "--html", str(comparison)]) == 0
    assert "img" not in read(comparison).tags
    return page_of(run)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff", b'{"version": 99}', b'{"version": 1, "passage": 3}',
    b'{"version": 1, "nonsense": 3}', b'{"version": 1, "planned_steps": "many"}', b'{"version": 1, "findings": [3]}',
    b'{"version": 1, "facts": {"text": [1]}}', b'{"version": 1, "memorisation": [[1, 2]]}', b"[" * 100_000,
    b'{"version": 1, "passage": {"text": "ab", "nats": [1.0], "expected": ["a"], "probabilities": [[0.5]]}}',
    b'{"version": 1, "passage": {"text": "a", "nats": [NaN], "expected": ["a"], "probabilities": [[0.5]]}}',
    b'{"version": 1, "passage": {"text": "a", "nats": ["x"], "expected": ["a"], "probabilities": [[0.5]]}}',
    b'{"version": 1, "passage": {"text": "a", "nats": [1.0], "expected": [1], "probabilities": [[0.5]]}}',
    b'{"version": 1, "passage": {"text": "a", "nats": [1e999], "expected": ["a"], "probabilities": [[0.5]]}}',
    b'{"version": 1, "passage": {"text": "a", "nats": [1.0], "expected": ["a"], "probabilities": [[2.0]]}}',
    b'{"version": 1, "planned_steps": 1' + b"0" * 500 + b"}",
])  # fmt: skip
def test_a_broken_record_counts_as_empty(run, content):
    (run / FILE).write_bytes(content)
    assert read_record(run) == RunRecord()
    assert "Surprisal" not in page_of(run).headings


def test_a_new_run_forgets_the_record_of_an_earlier_one(run):
    RecordWriter(run, print, resumed=False).update(state="training")
    assert read_record(run) == RunRecord(state="training")


def test_the_old_name_of_memorisation_is_read(run):
    values = json.loads((run / FILE).read_text(encoding="utf-8"))
    rows = values.pop("memorisation")
    (run / FILE).write_text(json.dumps(values | {"copies": rows}), encoding="utf-8")
    assert read_record(run).memorisation == rows != []
    assert "Memorisation" in page_of(run).headings


def test_a_passage_without_expected_characters(run):
    edit(run, passage={"step": 1, "text": "ab", "nats": [1, 2.5], "expected": ["", ""], "probabilities": [[], []]})
    assert "Surprisal" in page_of(run).headings


@pytest.mark.parametrize("name", ["config.toml", "baselines.json"])
@pytest.mark.parametrize("content", [b"", b"\xff", b"[", b'[{"name": 1}]', b'{"a": 1}', b"3", b"a = [[1], {b = 2}]"])
def test_other_broken_files_are_left_out(run, name, content):
    (run / name).write_bytes(content)
    assert "Baselines" not in page_of(run).headings or name == "config.toml"


def test_missing_figures_are_left_out(run, charts):
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for kind, loss in (("train", "loss"), ("eval", "train_loss")):
            values = {"kind": kind, "step": 70, "epoch": None, "learning_rate": None, "val_loss": None}
            file.write(json.dumps(values | {loss: None}) + "\n")
    found = page_of(run)
    assert "-" in found.words  # the time
    assert not re.search(r"\bnan\b", found.text)


@pytest.mark.parametrize("argv", [["none"], ["runs/tiny", "none"]])
def test_a_folder_that_is_not_a_run_is_an_error(run, argv, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    with pytest.raises(UserError, match=r"^none is not a run; see the runs with: "):
        plot([*argv, "--html", "a.html"])
    assert not Path("a.html").exists()


# Comparisons.


def test_comparison(run, train, charts, tmp_path):
    other = train("--optim.schedule=cosine")
    assert plot([str(run), str(other), "--html", str(tmp_path / "compare.html")]) == 0
    found = read(tmp_path / "compare.html")
    assert found.headings == ["Results", "Loss", "Baselines", "Samples", "Memorisation", "Configuration"]
    for one in (run, other):
        best = min(values["val_loss"] for values in metrics(one, "eval"))
        assert f"{best:.4f}" in found.words
        assert visible(metrics(one, "eval")[-1]["sample"].strip("\n")) in found.text
    assert "optim.schedule" in found.words
    assert {"'wsd'", "'cosine'"} <= set(found.words)
    assert "optim.momentum" not in found.words
    data = [json.loads(value) for name, value in found.attributes if name == "data-chart"]
    assert [one["x"] for one in data] == ["step", "characters of text", "seconds", "step"]
    assert {one["name"] for one in data[0]["lines"]} == {"tiny", "tiny, training", "run", "run, training"}
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    lowest = min(values["val_loss"] for one in (run, other) for values in metrics(one, "eval"))
    assert re.findall(r'<td class="best">(.*?)</td>', text)[0] == f"{lowest:.4f}"


def test_comparison_of_equal_runs_and_of_old_runs(run, charts):
    assert "All runs have the same settings." in report_page(read_histories([run, run]))
    for name in (FILE, "config.toml", "baselines.json"):
        (run / name).unlink()
    assert Page(report_page(read_histories([run, run]))).headings == ["Results", "Loss", "Samples"]


def test_the_benchmark_adds_up(monkeypatch, text_file, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    import report_cost

    from smallm.training import callbacks
    from smallm.training.report import record

    monkeypatch.chdir(tmp_path)
    for place, name in ((callbacks, "compute_statistics"), (callbacks, "read_passage"),
                        (record.RecordWriter, "update"), (callbacks.Report, "_write")):  # fmt: skip
        monkeypatch.setattr(place, name, getattr(place, name))  # put back at the end
    argv = ["--data", str(text_file), "--train.max_steps=4", "--train.eval_every=2", "--train.sample_length=0"]
    assert report_cost.main(argv) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: part["calls"] for name, part in figures["parts"].items()} == {
        "text check": 1, "passage": 2, "record": 6, "page": 1,
    }  # fmt: skip
    assert 0 < figures["parts"]["passage"]["wall_s"] < figures["whole"]["wall_s"]
    assert not (tmp_path / "runs").exists()


# Figures that change during a run.


def test_the_models_baseline_figure_is_of_the_whole_run(run):
    values = metrics(run, "eval")[-1]
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(values | {"step": 80, "val_loss": 0.5}) + "\n")
    assert read_histories([run])[0].baselines[0].bits_per_char == pytest.approx(0.5 / math.log(2))


def test_a_risen_validation_loss_gives_a_warning(run):
    assert "has risen" not in page_of(run).text
    values = metrics(run, "eval")[-1]
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(values | {"step": 80, "val_loss": 1.2 * values["val_loss"]}) + "\n")
    assert "Since step 60 the validation loss has risen" in page_of(run).text


def test_the_samples_are_a_list_that_the_script_makes_a_slider(run):
    html = write_report([run]).read_text(encoding="utf-8")
    history = html[html.index('<div class="history">') :]
    history = history[: history.index("</section>")]
    assert history.count("<figcaption>") == len(metrics(run, "eval"))
    assert "hidden" not in history
    assert "<script" not in history


def test_only_the_page_of_an_unfinished_run_reloads_itself(run):
    assert "http-equiv=\"refresh\"" not in write_report([run]).read_text(encoding="utf-8")
    edit(run, state="training")
    assert '<meta http-equiv="refresh" content="10">' in write_report([run]).read_text(encoding="utf-8")
