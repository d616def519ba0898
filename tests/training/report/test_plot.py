"""The picture of a run's losses: what is read, what is shown, and that it is drawn."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smallm.errors import UserError
from smallm.training.report import plot
from smallm.training.report.plot import curves, loss_limits, main, plot_runs, read_metrics, smooth, summary

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def train(step, loss=2.0, learning_rate=1e-3, epoch=None):
    epoch = step / 100 if epoch is None else epoch
    return {"kind": "train", "step": step, "epoch": epoch, "loss": loss, "learning_rate": learning_rate,
            "grad_norm": 0.8, "characters_per_second": 51000.0, "seconds": 3.2}  # fmt: skip


def evaluation(step, val_loss=2.1, train_loss=2.2):
    return {"kind": "eval", "step": step, "epoch": step / 100, "train_loss": train_loss, "val_loss": val_loss,
            "bits_per_character": val_loss and val_loss / math.log(2), "perplexity": val_loss and math.exp(val_loss),
            "seconds": 14.1, "sample": "To be\u2028or not: café"}  # fmt: skip


def write_run(folder: Path, records: list[dict], end: bytes = b"") -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records]
    (folder / "metrics.jsonl").write_bytes(b"".join(lines) + end)
    return folder


def falling(steps: int, floor: float = 1.5) -> list[dict]:
    """Records of a run that falls from 5.5 nats, most of it in the first twentieth."""
    loss = [floor + (5.5 - floor) * math.exp(-step / (0.01 * steps)) for step in range(steps)]
    evaluations = [evaluation(step, loss[step] + 0.1) for step in range(0, steps, 20)]
    return [train(step, loss[step]) for step in range(steps)] + evaluations


class TestReadMetrics:
    def test_in_the_order_of_the_file(self, tmp_path):
        records = [train(10), train(20), evaluation(20, train_loss=None)]
        assert read_metrics(write_run(tmp_path / "run", records)) == records

    @pytest.mark.parametrize("end", [b'{"kind": "tr', b'{"kind": "eval", "sample": "caf\xc3', b"{\n", b"\n\n"])
    def test_a_cut_last_line_is_left_out(self, tmp_path, end):
        assert read_metrics(write_run(tmp_path / "run", [train(10)], end)) == [train(10)]

    def test_other_kinds_are_left_out(self, tmp_path):
        assert read_metrics(write_run(tmp_path / "run", [{"kind": "start", "version": 1}, train(10)])) == [train(10)]

    @pytest.mark.parametrize("bad", [
        b'{"kind": "tr\n', b"[1]\n", b"\n", b'"kind"\n', b"{}\n", b'{"kind": "train", "step": 3}\n', b"\xff\n",
        json.dumps(train(20) | {"step": None}).encode() + b"\n",
        json.dumps(train(20) | {"loss": "low"}).encode() + b"\n",
        json.dumps(train(20) | {"step": math.nan}).encode() + b"\n",
        json.dumps(train(20) | {"loss": 10**400}).encode() + b"\n",
        json.dumps(train(20) | {"epoch": 1e300}).encode() + b"\n",
        json.dumps(evaluation(20) | {"val_loss": [2.1]}).encode() + b"\n",
    ])  # fmt: skip
    def test_a_broken_line_is_named(self, tmp_path, bad):
        run = write_run(tmp_path / "run", [train(10)], bad + json.dumps(train(30)).encode() + b"\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is broken"):
            read_metrics(run)

    def test_a_whole_but_wrong_last_line_is_an_error(self, tmp_path):
        with pytest.raises(UserError, match="line 2 is broken"):
            read_metrics(write_run(tmp_path / "run", [train(10)], b'{"kind": "train"}'))

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="is not a folder"):
            read_metrics(tmp_path / "none")
        with pytest.raises(UserError, match=r"has no readable metrics\.jsonl"):
            read_metrics(tmp_path)

    @pytest.mark.parametrize("records", [[], [{"kind": "start"}], [train(10, loss=None)], [train(10, loss=math.nan)]])
    def test_no_loss(self, tmp_path, records):
        with pytest.raises(UserError, match="holds no loss yet"):
            read_metrics(write_run(tmp_path / "run", records))


class TestCurves:
    def test_columns(self):
        run = curves("name", [train(10, 2.5, 1e-3), evaluation(10, 2.4), train(20, None, 5e-4), evaluation(20, 2.3)])
        np.testing.assert_array_equal(run.train["step"], [10, 20])
        np.testing.assert_array_equal(run.train["epoch"], [0.1, 0.2])
        np.testing.assert_array_equal(run.train["loss"], [2.5, np.nan])
        np.testing.assert_array_equal(run.train["learning_rate"], [1e-3, 5e-4])
        np.testing.assert_array_equal(run.val["loss"], [2.4, 2.3])
        assert run.best == 1

    def test_a_resumed_run_counts_the_later_record(self):
        run = curves("", [train(step, 3.0) for step in (10, 20, 30)] + [train(step, 2.0) for step in (15, 20, 40)])
        np.testing.assert_array_equal(run.train["step"], [10, 15, 20, 30, 40])
        np.testing.assert_array_equal(run.train["loss"], [3, 2, 2, 3, 2])

    def test_without_training_lines_the_evaluations_tell_the_training_loss(self):
        run = curves("", [evaluation(5, 2.1, None), evaluation(8, 2.0, 2.2)])
        np.testing.assert_array_equal(run.train["loss"], [np.nan, 2.2])

    def test_best_skips_what_is_missing(self):
        assert curves("", [evaluation(1, None), evaluation(2, 2.0), evaluation(3, 2.5)]).best == 1
        assert curves("", [train(1), evaluation(1, None)]).best is None


def test_smooth_few_points_stay():
    values = np.array([5.0, 1.0, 3.0])
    np.testing.assert_array_equal(smooth(values), values)


def test_smooth_keeps_the_level_and_takes_the_noise():
    noise = np.random.default_rng(0).normal(2.0, 0.1, 1000)
    smoothed = smooth(noise)
    assert smoothed.shape == noise.shape
    assert smoothed.std() < 0.35 * noise.std()
    np.testing.assert_allclose(smoothed[[0, -1]], 2.0, atol=0.1)  # zeros beyond the ends would pull these down
    np.testing.assert_allclose(smooth(np.arange(1000.0))[10:-10], np.arange(1000.0)[10:-10])  # centred: no lag


class TestLossLimits:
    def test_the_first_steps_do_not_squash_the_rest(self):
        run = curves("", falling(1000))
        low, high = loss_limits([run])
        assert 1.4 < low < 1.5
        assert high < 2.0 < run.train["loss"][0]

    def test_all_that_comes_later_is_shown(self):
        records = [train(step, 3 - step / 500) for step in range(1, 1001)]
        overfit = [evaluation(step, 1.8 + step / 1000) for step in range(100, 1001, 100)]
        low, high = loss_limits([curves("", records + overfit)])
        assert low < 1.0
        assert high > 2.8

    def test_neither_a_short_run_nor_a_blow_up_squashes_the_others(self):
        short = curves("", [train(step, 5.5) for step in range(1, 20)])
        blown = curves("", [train(step, 10.0 ** (step // 100)) for step in range(1, 1001)])
        assert loss_limits([curves("", falling(1000)), short])[1] < 2.0
        assert loss_limits([curves("", falling(1000)), blown])[1] < 7.0

    def test_one_point(self):
        low, high = loss_limits([curves("", [train(1, 2.0)])])
        assert low < 2.0 < high


def test_summary():
    run = curves("", [train(10), evaluation(10, 3.0), evaluation(1000, 2.0), evaluation(1100, 2.5)])
    assert summary(run) == "best 2.000 nats (2.885 bits), step 1,000; final 2.500 (3.607)"
    assert summary(curves("", [train(10, 2.345)])) == "not measured yet; last training loss 2.345 nats"


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.round(imread(path)[..., :3] * 255).astype(int)


def count(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(image - colour).max(-1) < 3).sum())


class TestPicture:
    def test_lines_carry_the_data(self):
        decay = [train(step, 2.0, 1e-3 * (1 - step / 500)) for step in range(1, 501)]
        runs = [curves("constant", falling(500)), curves("decay", [*decay, evaluation(500, 1.9)])]
        by_step, by_epoch, rate, key = plot._figure(runs).axes

        def drawn(axes, x, y):
            found = [line for line in axes.lines if np.array_equal(line.get_xdata(), x)
                     and np.array_equal(line.get_ydata(), y)]  # fmt: skip
            return found[0].get_color()

        for run in runs:
            colours = {drawn(axes, points[x], points["loss"]) for points in (run.train, run.val)
                       for axes, x in ((by_step, "step"), (by_epoch, "epoch"))}  # fmt: skip
            colours |= {drawn(by_step, run.train["step"], smooth(run.train["loss"]))}
            colours |= {drawn(rate, run.train["step"], run.train["learning_rate"])}
            assert len(colours) == 1
        assert drawn(rate, runs[0].train["step"], runs[0].train["learning_rate"]) not in colours
        assert by_step.get_ylim() == by_epoch.get_ylim() == loss_limits(runs)
        assert by_step.get_xlim() == rate.get_xlim()
        assert "nats per character" in by_step.get_ylabel()
        told = [text.get_text() for text in key.get_legend().get_texts()]
        assert told == [f"{run.name}\n{summary(run)}" for run in runs]

    def test_png(self, tmp_path):
        constant = write_run(tmp_path / "constant", falling(500))
        decay = write_run(tmp_path / "decay", falling(500, floor=1.3))
        assert plot_runs([constant], tmp_path / "new" / "one.png") == tmp_path / "new" / "one.png"
        plot_runs([constant, decay], tmp_path / "two.png")
        one, two = pixels(tmp_path / "new" / "one.png"), pixels(tmp_path / "two.png")
        assert one.shape == two.shape == (750, 1200, 3)
        assert count(one, BLUE) > 1000
        assert count(one, ORANGE) == 0
        assert min(count(two, BLUE), count(two, ORANGE)) > 1000
        assert count(two, (255, 255, 255)) > 0.7 * two.shape[0] * two.shape[1]

    @pytest.mark.parametrize("records", [
        [train(10)], [evaluation(10)], [train(0, 5.5), evaluation(0, 5.5)], [train(10, learning_rate=None)],
        [train(1, 2.0), train(2, math.nan), train(3, math.inf)], falling(10_000),
    ], ids=["train", "eval", "step 0", "no rate", "not finite", "10,000"])  # fmt: skip
    def test_any_number_of_points(self, tmp_path, records):
        out = plot_runs([write_run(tmp_path / "run", records)], tmp_path / "loss.png")
        assert count(pixels(out), BLUE) > 50

    def test_six_runs_of_any_name_and_length(self, tmp_path):
        names = ["a/run", "b/run", "_hidden", "$\\frac$", "莎士比亚", "long-" * 40]
        runs = [write_run(tmp_path / name, falling(100 * (i + 1))) for i, name in enumerate(names)]
        image = pixels(plot_runs(runs, tmp_path / "six.png"))
        for colour in plot.COLOURS[:6]:
            assert count(image, tuple(bytes.fromhex(colour[1:]))) > 100

    def test_a_name_that_is_no_formula(self, tmp_path):
        out = plot_runs([write_run(tmp_path / "$\\frac$", [train(1)])], tmp_path / "loss.png")
        assert out.stat().st_size > 1000

    def test_runs_of_one_name_are_told_apart(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(plot, "curves", lambda name, records: seen.append(name) or curves(name, records))
        plot_runs([write_run(tmp_path / name, [train(1)]) for name in ("a/run", "b/run")], tmp_path / "x.svg")
        assert [name for name in seen if name] == ["a/run", "b/run"]

    def test_out_must_be_a_picture_that_can_be_written(self, tmp_path):
        run = write_run(tmp_path / "run", [train(1)])
        with pytest.raises(UserError, match=r"ends in \.png"):
            plot_runs([run], tmp_path / "loss.txt")
        with pytest.raises(UserError, match="cannot write"):
            plot_runs([run], run / "metrics.jsonl" / "loss.png")


class TestMain:
    def test_one_run(self, tmp_path, capsys):
        run = write_run(tmp_path / "run", [train(1)])
        assert main([str(run)]) == 0
        assert capsys.readouterr().out == f"{run / 'loss.png'}\n"
        assert (run / "loss.png").stat().st_size > 1000

    def test_several_runs(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        runs = [str(write_run(tmp_path / name, [train(1)])) for name in "ab"]
        assert main(runs) == 0
        assert capsys.readouterr().out == "compare.png\n"
        assert main([*runs, "--out", "other.pdf"]) == 0
        assert {path.name for path in tmp_path.glob("*.*")} == {"compare.png", "other.pdf"}

    def test_a_mistake_is_one_line(self, tmp_path):
        command = [sys.executable, "-m", "smallm.training.report.plot", str(tmp_path / "none")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("smallm: ")
        assert done.stderr.count("\n") == 1

    def test_matplotlib_waits_until_it_is_needed(self):
        code = "import sys, smallm.training.report.plot; sys.exit('matplotlib' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
