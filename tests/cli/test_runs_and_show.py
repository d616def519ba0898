"""`smallm runs` and `smallm show` describe run folders of any origin and change nothing."""

import errno
import json
import math
import os
import shutil
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from filelock import FileLock
from test_imports import HEAVY, python
from toys import edit_state

from smallm.cli import main as cli
from smallm.cli.runs import lines
from smallm.cli.table import columns_of, duration, short_count, shortened, table
from smallm.html.escape import printable
from smallm.runs.summary import TAIL_BYTES, find_runs, read_run
from smallm.training.checkpoint.manager import best_checkpoint, checkpoints

NASTY = "evil\x1b[2J\x07\u202e name"


@pytest.fixture
def runs(tiny_run, exported, tmp_path, monkeypatch) -> Path:
    """A folder of runs, in which `runs/tiny` is whole, finished and exported."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, "runs/tiny")
    shutil.copytree(exported, "runs/tiny/export")
    return Path("runs")


def listed(capsys, *argv) -> list[dict]:
    assert cli.run(cli.runs, ["--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def shown(capsys, *argv) -> str:
    assert cli.run(cli.show, argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def tree(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(file): (file.stat().st_size, file.stat().st_mtime) for file in folder.rglob("*")}


def evaluated(run: Path) -> list[dict]:
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["kind"] == "eval"]


# What the commands show.


def test_a_finished_run(runs, capsys):
    (run,) = listed(capsys)
    best = min(evaluated(runs / "tiny"), key=lambda record: record["val_loss"])
    assert (run["name"], run["path"], run["state"], run["problem"]) == ("tiny", "runs/tiny", "finished", "")
    assert (run["text"], run["step"], run["total_steps"]) == ("owls.txt", 60, 60)
    assert (run["val_loss"], run["best_step"]) == (best["val_loss"], best["step"])
    assert run["bits_per_character"] == pytest.approx(best["val_loss"] / math.log(2))
    assert run["epoch"] == evaluated(runs / "tiny")[-1]["epoch"]
    assert run["exports"] == {"export": "fp32"}
    assert run["parameters"] > 1000
    assert 0 < run["seconds"] < 1000


def test_the_table(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.run(cli.runs, []) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "text", "size", "nats", "bits", "steps", "epochs", "time", "age", "state", "export"]
    cells = row.split()
    assert (cells[0], cells[1], cells[-2], cells[-1]) == ("tiny", "owls.txt", "finished", "fp32")
    assert f"{min(record['val_loss'] for record in evaluated(runs / 'tiny')):.3f}" in cells


def test_states(runs, capsys):
    for name in ("stopped", "impatient", "cut", "begun", "held", "weightless"):
        shutil.copytree(runs / "tiny", runs / name)
    for name in ("stopped", "cut"):
        for folder in checkpoints(runs / name):
            edit_state(folder, lambda values: values.update(planned_steps=80))
    for folder in checkpoints(runs / "impatient"):
        edit_state(folder, lambda values: values.update(planned_steps=80, evaluations_since_best=2))
        edit_state(folder, lambda values: values["config"]["train"].update(patience=2))
    shutil.rmtree(runs / "begun" / "checkpoints")
    for folder in checkpoints(runs / "cut"):
        state = folder / "training_state.json"
        state.write_bytes(state.read_bytes()[:100])
    (checkpoints(runs / "weightless")[-1] / "model.safetensors").unlink()
    with FileLock(runs / "held" / ".lock").acquire(timeout=0):
        found = {run["name"]: run for run in listed(capsys)}
    assert {name: run["state"] for name, run in found.items()} == {
        "tiny": "finished", "stopped": "interrupted", "impatient": "finished", "cut": "broken",
        "begun": "interrupted", "held": "running", "weightless": "interrupted",
    }  # fmt: skip
    assert "training_state.json is missing or broken" in found["cut"]["problem"]
    assert "model.safetensors is missing" in found["weightless"]["problem"]
    assert found["weightless"]["step"] < 60
    assert found["begun"]["val_loss"] == min(record["val_loss"] for record in evaluated(runs / "tiny"))


def test_newest_first(runs, capsys):
    for i, name in enumerate(("old", "new", "middle")):
        shutil.copytree(runs / "tiny", runs / name)
        for file in (runs / name, runs / name / "metrics.jsonl", runs / name / "checkpoints"):
            os.utime(file, (0, 10**9 + (0, 2, 1)[i]))
    assert [run["name"] for run in listed(capsys)] == ["tiny", "new", "middle", "old"]
    written = [run["written"] for run in listed(capsys)]
    assert written == sorted(written, reverse=True)
    assert written[1] == "2001-09-09T01:46:42Z"
    (runs / "old" / "export-int8").mkdir()  # changes the time of the folder
    assert [run["name"] for run in listed(capsys)] == ["tiny", "new", "middle", "old"]


def test_one_run_may_be_named(runs, capsys):
    assert [run["name"] for run in listed(capsys, "runs/tiny")] == ["tiny"]


def test_show(runs, capsys):
    out = shown(capsys, "runs/tiny")
    last = evaluated(runs / "tiny")[-1]
    for words in ("runs/tiny: finished", "owls.txt", "60 steps", f"{last['val_loss']:.4f}", "model.n_layer = 2",
                  "checkpoints/step-000060", "export", "fp32", "metrics.jsonl", "python -m smallm export runs/tiny",
                  "python -m smallm train --resume runs/tiny --train.max_steps=120",
                  "python -m smallm infer --model runs/tiny",
                  "python -m smallm train --init-from runs/tiny --data OTHER.txt"):  # fmt: skip
        assert words in out, words
    assert "optim.name" not in out  # as by default
    assert last["sample"].strip("\n").splitlines()[0] in out


@pytest.mark.parametrize("command", ["show", "watch", "plot"])
def test_a_folder_that_does_not_exist(runs, capsys, monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["python", command, "runs/mime"])
    assert cli.main() == 2
    assert capsys.readouterr().err == "smallm: runs/mime is not a run; see the runs with: python -m smallm runs\n"


def test_show_as_json(runs, capsys):
    run = json.loads(shown(capsys, "runs/tiny", "--json"))
    assert [one["step"] for one in run["evaluations"]] == [20, 40, 60]
    assert run["evaluations"][-1]["val_loss"] == evaluated(runs / "tiny")[-1]["val_loss"]
    assert run["settings"]["model.n_embd"] == 32
    assert "model.dropout" not in run["settings"]
    assert {one["name"] for one in run["checkpoints"]} == {folder.name for folder in checkpoints(runs / "tiny")}
    (best,) = (one for one in run["checkpoints"] if one["best"])
    folder = best_checkpoint(runs / "tiny")
    assert best["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert run["baselines"].keys() >= {"model", "gzip", "xz"}
    assert run["sample"] == evaluated(runs / "tiny")[-1]["sample"]


def test_without_a_record_of_changed_settings_all_settings_are_shown(runs, capsys):
    for folder in checkpoints(runs / "tiny"):
        edit_state(folder, lambda values: values.pop("changed_settings"))
    run = json.loads(shown(capsys, "runs/tiny", "--json"))
    assert run["settings"]["model.n_embd"] == 32
    assert "model.dropout" in run["settings"]


def test_the_old_name_of_the_baselines_is_read(runs, capsys):
    expected = json.loads(shown(capsys, "runs/tiny", "--json"))["baselines"]
    (runs / "tiny/baselines.json").rename(runs / "tiny/yardsticks.json")
    assert json.loads(shown(capsys, "runs/tiny", "--json"))["baselines"] == expected


def test_show_takes_the_newest_run(runs, capsys):
    assert shown(capsys) == shown(capsys, "runs/tiny")


def test_an_interrupted_run_shows_how_to_resume(runs, capsys):
    for folder in checkpoints(runs / "tiny"):
        edit_state(folder, lambda values: values.update(planned_steps=80))
    out = shown(capsys, "runs/tiny")
    assert "60 of 80 steps" in out
    assert "python -m smallm train --resume runs/tiny\n" in out


def test_nothing_is_changed(runs, capsys):
    before = tree(runs)
    listed(capsys)
    shown(capsys, "runs/tiny")
    assert tree(runs) == before


@pytest.mark.parametrize("argv", [["runs"], ["runs", "--json"], ["show", "runs/tiny"], ["show", "runs/tiny", "--json"]])
def test_the_base_install_is_enough(runs, argv):
    code = """
from smallm.cli.main import main
sys.argv[0] = "smallm"
code = main()
print(sorted({"torch", "onnxruntime"} & set(sys.modules)))
sys.exit(code)
"""
    done = python(code, *argv, blocked=(*HEAVY, "tomli_w", "filelock", "onnxruntime"), cwd=runs.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tiny" in done.stdout
    assert done.stdout.endswith("[]\n")


# Wrong arguments and damaged folders.


@pytest.mark.parametrize("calls", [["iterdir", "exists"], ["glob"]], ids=["closed", "unsearchable"])
def test_a_run_that_cannot_be_read_does_not_hide_the_others(runs, capsys, monkeypatch, calls):
    shutil.copytree(runs / "tiny", runs / "closed")

    def refusing(call):
        def checked(path, *more, **options):
            if "closed" in (path.name, path.parent.name):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path, *more, **options)

        return checked

    for call in calls:
        monkeypatch.setattr(Path, call, refusing(getattr(Path, call)))
    assert cli.run(cli.runs, [str(runs)]) == 0
    out, err = capsys.readouterr()
    assert "finished" in out
    assert err == f"smallm: cannot read {runs / 'closed'}: Permission denied\n"


def test_no_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for make in (lambda: None, lambda: Path("runs").mkdir(), lambda: Path("runs/notes").mkdir()):
        make()
        assert cli.run(cli.runs, []) == 0
        assert capsys.readouterr() == ("", "no runs in runs; train one with: python -m smallm train\n")
        assert listed(capsys) == []


@pytest.mark.parametrize("argv", [["runs", "nowhere"], ["runs", __file__], ["show", "nowhere"], ["show", "."], ["show"],
                                  ["show", __file__], ["runs", "--sort"]], ids=" ".join)  # fmt: skip
def test_a_path_that_is_not_a_run_is_one_line(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    assert cli.run(getattr(cli, argv[0]), argv[1:]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("smallm: ")


DAMAGE = {
    "no metrics": lambda run: (run / "metrics.jsonl").unlink(),
    "metrics are a folder": lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()),
    "half a line": lambda run: (run / "metrics.jsonl").write_bytes(
        (run / "metrics.jsonl").read_bytes() + b'{"kind": "eval", "step": 61, "sam'
    ),
    "other lines": lambda run: (run / "metrics.jsonl").write_text('[]\n7\n{"kind": "eval"}\n' + "[" * 10**5 + "\n\xff"),
    "invalid numbers": lambda run: (run / "metrics.jsonl").write_text(
        '{"kind": "eval", "step": NaN, "val_loss": "low", "epoch": [], "sample": 7}\n'
        '{"kind": "eval", "step": 1e400, "val_loss": -1, "train_loss": {}, "sample": ""}\n'
        '{"kind": "old_text", "before": "a", "after": null}\n'
    ),
    "no checkpoints": lambda run: shutil.rmtree(run / "checkpoints"),
    "strange checkpoints": lambda run: [
        (run / "checkpoints" / f"step-{x}").mkdir() for x in ("abc", "-1", "9" * 99)
    ],
    "an empty checkpoint": lambda run: (run / "checkpoints" / "step-000099").mkdir(),
    "state of zeros": lambda run: [(f / "training_state.json").write_bytes(bytes(99)) for f in checkpoints(run)],
    "state of another version": lambda run: [edit_state(f, lambda v: v.update(format_version=9))
                                             for f in checkpoints(run)],
    "state of wrong types": lambda run: [
        edit_state(f, lambda v: v.update(step="x", best_val_loss=[], facts=7, planned_steps=None, config=[],
                                         seconds="long", best_step=True))
        for f in checkpoints(run)
    ],
    "invalid config sections": lambda run: [
        edit_state(f, lambda v: v.update(config={"data": {"source": 7}, "train": 3, NASTY: {NASTY: NASTY}}))
        for f in checkpoints(run)
    ],
    "no config": lambda run: (shutil.rmtree(run / "checkpoints"), (run / "config.toml").unlink()),
    "config that is not TOML": lambda run: (shutil.rmtree(run / "checkpoints"), (run / "config.toml").write_text("=")),
    "other baselines": lambda run: (run / "baselines.json").write_text('[{"name": 7, "bits_per_char": "x"}, 3]'),
    "an invalid export": lambda run: (run / "export" / "smallm.json").write_text("["),
    "an invalid precision": lambda run: (run / "export" / "smallm.json").write_text('{"precision": 7}'),
    "a nasty text": lambda run: [edit_state(f, lambda v: v["facts"].update(text=NASTY * 50)) for f in checkpoints(run)],
    "a nasty precision": lambda run: (run / "export" / "smallm.json").write_text(json.dumps({"precision": NASTY * 9})),
    "a nasty sample": lambda run: (run / "metrics.jsonl").write_text(json.dumps(
        {"kind": "eval", "step": 60, "epoch": 1e11, "val_loss": 1e11, "sample": NASTY})),
    "a nasty file": lambda run: (run / NASTY).touch(),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_reported_without_a_traceback(runs, capsys, monkeypatch, what):
    DAMAGE[what](runs / "tiny")
    monkeypatch.setenv("COLUMNS", "80")
    for command, argv in ((cli.runs, []), (cli.runs, ["--json"]), (cli.show, ["runs/tiny"]),
                          (cli.show, ["runs/tiny", "--json"])):  # fmt: skip
        assert cli.run(command, argv) == 0, what
        out, err = capsys.readouterr()
        assert err == ""
        assert all(c.isprintable() or c == "\n" for c in out)
        assert "tiny" in out
        if argv == ["--json"]:
            (run,) = json.loads(out)
            assert (run["state"] == "broken") == (what in ("state of zeros", "state of another version", "no config",
                                                           "config that is not TOML")), run  # fmt: skip
        elif not argv:
            assert all(columns_of(line) <= 80 for line in out.splitlines()), out


def test_a_run_folder_with_control_characters_in_its_name(runs, capsys):
    (runs / "tiny").rename(runs / NASTY)
    assert cli.run(cli.runs, []) == 0
    assert cli.run(cli.show, [str(runs / NASTY)]) == 0
    out, _ = capsys.readouterr()
    assert r"\x1b" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_only_the_end_of_long_metrics_is_read(runs):
    line = json.dumps({"kind": "train", "step": 1, "loss": 1.0, "note": "x" * 1000}).encode() + b"\n"
    file = runs / "tiny" / "metrics.jsonl"
    kept = file.read_bytes()
    file.write_bytes(line * 20_000 + kept)
    tracemalloc.start()
    run = read_run(runs / "tiny")
    assert tracemalloc.get_traced_memory()[1] < 30 * TAIL_BYTES
    tracemalloc.stop()
    assert (run.step, run.metrics[-1]["step"]) == (60, 60)


@pytest.mark.parametrize("columns", [20, 80, 99, 100, 120, 400])
def test_the_table_fits(runs, columns):
    for name in ("a" * 100, "語" * 40, "x"):
        shutil.copytree(runs / "tiny", runs / name)
    found = lines([read_run(run) for run in find_runs(runs)], columns, time.time())
    assert max(map(columns_of, found)) <= max(80, min(120, columns))
    assert len(found) == 5
    assert len({columns_of(line[: line.rindex("finished")]) for line in found[1:]}) == 1
    assert ("epochs" in found[0]) == (columns >= 100)


@pytest.mark.parametrize(("text", "most", "expected"), [
    ("shakespeare", 11, "shakespeare"), ("shakespeare", 10, "shake…eare"), ("shakespeare", 9, "shak…eare"),
    ("語語語語", 5, "語…語"), ("語語語語", 4, "語…"), ("ab", 1, "…"), ("", 0, ""),
])  # fmt: skip
def test_names_are_shortened_in_the_middle(text, most, expected):
    assert shortened(text, most) == expected


def test_figures():
    counts = {None: "-", 0: "0", 999: "999", 12_345: "12.3k", 840_000: "840k", 999_900: "1,000k", 10_650_000: "10.7M"}
    assert {number: short_count(number) for number in counts} == counts
    times = {None: "-", math.nan: "-", 0: "0 s", 59.4: "59 s", 90: "1.5 min", 700: "12 min", 8000: "2.2 h",
             40_000: "11 h", 200_000: "2.3 d"}  # fmt: skip
    assert {seconds: duration(seconds) for seconds in times} == times
    assert printable("a\x1b\n€") == r"a\x1b\n€"
    assert table([["a", "1"], ["bb", "22"]], left=[0]) == ["a    1", "bb  22"]


def test_usage_names_the_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["smallm"])
    assert cli.main() == 0
    out = capsys.readouterr().out
    assert "smallm runs" in out
    assert "smallm show" in out
