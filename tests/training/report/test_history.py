"""The history of a run: which records count, and what happens to broken ones."""

import json
import math

import numpy as np
import pytest
from run_records import evaluation, read_history, train, write_run

from smallm.errors import UserError
from smallm.training.report.history import read_histories


class TestRecords:
    def test_evaluations_keep_their_content(self, tmp_path):
        records = [train(10), train(20), evaluation(20, train_loss=None)]
        assert read_histories([write_run(tmp_path / "run", records)])[0].evaluations == records[2:]

    @pytest.mark.parametrize("end", [b'{"kind": "tr', b'{"kind": "eval", "sample": "caf\xc3', b"{\n", b"\n\n"])
    def test_a_cut_last_line_is_left_out(self, tmp_path, end):
        run = read_histories([write_run(tmp_path / "run", [train(10)], end)])[0]
        assert (run.train["step"].tolist(), run.evaluations) == ([10], [])

    def test_other_kinds_are_left_out(self, tmp_path):
        run = read_history(tmp_path / "run", [{"kind": "start", "version": 1}, train(10)])
        assert (run.train["step"].tolist(), run.evaluations) == ([10], [])

    @pytest.mark.parametrize("bad", [
        b'{"kind": "tr\n', b"[1]\n", b"\n", b'"kind"\n', b"{}\n", b'{"kind": "train"}\n', b"\xff\n", b'{"kind": []}\n',
        json.dumps(train(20) | {"step": None}).encode() + b"\n",
        json.dumps(train(20) | {"step": math.nan}).encode() + b"\n",
        json.dumps(train(20) | {"step": 10**400}).encode() + b"\n",
    ])  # fmt: skip
    def test_a_broken_line_is_left_out(self, tmp_path, bad):
        run = write_run(tmp_path / "run", [train(10)], bad + json.dumps(train(30)).encode() + b"\n")
        assert read_histories([run])[0].train["step"].tolist() == [10, 30]

    @pytest.mark.parametrize("value", ["low", 10**400, 1e300, [2.1], None, math.inf])
    def test_a_broken_figure_is_missing(self, tmp_path, value):
        records = [train(10), train(20) | {"loss": value}, evaluation(20) | {"val_loss": value, "epoch": value}]
        run = read_history(tmp_path / "run", records)
        assert np.isnan([run.train["loss"][1], run.val["loss"][0], run.val["epoch"][0]]).all()

    @pytest.mark.parametrize("name", ["", "none"])
    def test_missing(self, tmp_path, name):
        with pytest.raises(UserError, match=r"metrics\.jsonl holds no loss: give the folder of a run"):
            read_histories([tmp_path / name])

    @pytest.mark.parametrize("records", [[], [{"kind": "start"}], [train(10, loss=None)], [train(10, loss=math.nan)]])
    def test_no_loss(self, tmp_path, records):
        with pytest.raises(UserError, match="holds no loss"):
            read_history(tmp_path / "run", records)


class TestCurves:
    def test_columns(self, tmp_path):
        records = [train(10, 2.5, 1e-3), evaluation(10, 2.4), train(20, None, 5e-4), evaluation(20, 2.3)]
        run = read_history(tmp_path / "run", records)
        np.testing.assert_array_equal(run.train["step"], [10, 20])
        np.testing.assert_array_equal(run.train["epoch"], [0.1, 0.2])
        np.testing.assert_array_equal(run.train["loss"], [2.5, np.nan])
        np.testing.assert_array_equal(run.train["learning_rate"], [1e-3, 5e-4])
        np.testing.assert_array_equal(run.val["loss"], [2.4, 2.3])
        assert run.best_index == 1

    def test_of_a_step_logged_twice_the_later_record_counts(self, tmp_path):
        before, after = [train(step, 3.0) for step in (10, 20, 30)], [train(step, 2.0) for step in (15, 20, 40)]
        run = read_history(tmp_path / "run", before + after)
        np.testing.assert_array_equal(run.train["step"], [10, 15, 20, 30, 40])
        np.testing.assert_array_equal(run.train["loss"], [3, 2, 2, 3, 2])

    def test_without_training_records_the_evaluations_give_the_training_loss(self, tmp_path):
        run = read_history(tmp_path / "run", [evaluation(5, 2.1, None), evaluation(8, 2.0, 2.2)])
        np.testing.assert_array_equal(run.train["loss"], [np.nan, 2.2])

    def test_the_best_loss_ignores_missing_losses(self, tmp_path):
        records = [evaluation(1, None), evaluation(2, 2.0), evaluation(3, 2.5)]
        assert read_history(tmp_path / "run1", records).best_index == 1
        assert read_history(tmp_path / "run2", [train(1), evaluation(1, None)]).best_index is None


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / name, [train(1)]) for name in ("a/run", "b/run", "long-" * 40)]
    names = [run.name for run in read_histories(runs)]
    assert names[:2] == ["a/run", "b/run"]
    assert len(names[2]) == 54
    assert names[2].startswith("long-long-")
    assert names[2].endswith("-long-")
