"""Charts: which losses they show, that the lines carry the data, and that any data can be drawn."""

import json
import math
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from run_records import evaluation, falling, read_history, train

from smallm.training.report.charts import (
    COLOURS,
    MAX_POINTS,
    loss_limits,
    page_charts,
    picture,
    short,
    smooth,
    spread,
    summary,
)
from smallm.training.report.record import RunRecord


def test_few_points_are_not_smoothed():
    values = np.array([5.0, 1.0, 3.0])
    np.testing.assert_array_equal(smooth(values), values)


def test_smoothing_removes_noise_and_keeps_the_level():
    noise = np.random.default_rng(0).normal(2.0, 0.1, 1000)
    smoothed = smooth(noise)
    assert smoothed.shape == noise.shape
    assert smoothed.std() < 0.35 * noise.std()
    np.testing.assert_allclose(smoothed[[0, -1]], 2.0, atol=0.1)  # zeros beyond the ends would pull these down
    np.testing.assert_allclose(smooth(np.arange(1000.0))[10:-10], np.arange(1000.0)[10:-10])  # centred: no lag


class TestLossLimits:
    def test_the_first_steps_do_not_squash_the_rest(self, tmp_path):
        run = read_history(tmp_path / "run", falling(1000))
        low, high = loss_limits([run])
        assert 1.4 < low < 1.5
        assert high < 2.0 < run.train["loss"][0]

    def test_all_later_losses_are_shown(self, tmp_path):
        records = [train(step, 3 - step / 500) for step in range(1, 1001)]
        overfit = [evaluation(step, 1.8 + step / 1000) for step in range(100, 1001, 100)]
        low, high = loss_limits([read_history(tmp_path / "run", records + overfit)])
        assert low < 1.0
        assert high > 2.8

    def test_neither_a_short_run_nor_a_blow_up_squashes_the_others(self, tmp_path):
        short = read_history(tmp_path / "run1", [train(step, 5.5) for step in range(1, 20)])
        blown = read_history(tmp_path / "run2", [train(step, 10.0 ** (step // 100)) for step in range(1, 1001)])
        assert loss_limits([read_history(tmp_path / "run3", falling(1000)), short])[1] < 2.0
        assert loss_limits([read_history(tmp_path / "run4", falling(1000)), blown])[1] < 7.0

    def test_one_point(self, tmp_path):
        low, high = loss_limits([read_history(tmp_path / "run", [train(1, 2.0)])])
        assert low < 2.0 < high


def test_summary(tmp_path):
    records = [train(10), evaluation(10, 3.0), evaluation(1000, 2.0), evaluation(1100, 2.5)]
    run = read_history(tmp_path / "run1", records)
    assert summary(run) == "best 2.000 nats (2.885 bits), step 1,000; final 2.500 (3.607)"
    run = read_history(tmp_path / "run2", [train(10, 2.345)])
    assert summary(run) == "not measured yet; last training loss 2.345 nats"


def test_the_lines_of_the_picture_carry_the_data(tmp_path):
    decay = [train(step, 2.0, 1e-3 * (1 - step / 200)) for step in range(1, 201)]
    runs = [
        read_history(tmp_path / "constant", falling(200)),
        read_history(tmp_path / "decay", [*decay, evaluation(200, 1.9)]),
    ]
    figure = picture(runs)
    by_step, by_time, rate, _unused = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["Loss by step", "Loss by time", "Learning rate", ""]

    def drawn(axes, x, y):
        found = [line for line in axes.lines if np.array_equal(line.get_xdata(), x)
                 and np.array_equal(line.get_ydata(), y)]  # fmt: skip
        return found[0].get_color()

    for run in runs:
        colours = {drawn(by_step, points["step"], points["loss"]) for points in (run.train, run.val)}
        colours |= {drawn(by_step, run.train["step"], smooth(run.train["loss"]))}
        colours |= {drawn(rate, run.train["step"], run.train["learning_rate"])}
        assert len(colours) == 1
    assert drawn(rate, runs[0].train["step"], runs[0].train["learning_rate"]) not in colours
    assert by_step.get_ylim() == by_time.get_ylim() == loss_limits(runs)
    assert "nats per character" in by_step.get_ylabel()
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [f"{run.name}: {summary(run)}" for run in runs]


def test_one_run_has_a_colour_for_each_kind_of_loss(tmp_path):
    by_step = picture([read_history(tmp_path / "run", falling(50))]).axes[0]
    assert [line.get_color() for line in by_step.lines] == [COLOURS[1], COLOURS[0], COLOURS[0]]


def charts_of(html: str) -> list[dict]:
    return [json.loads(unescape(data)) for data in re.findall(r'data-chart="(.*?)"', html)]


class TestPageCharts:
    def test_the_points_lie_on_the_lines(self, tmp_path):
        html = page_charts([read_history(tmp_path / "run", [*map(train, (10, 20, 40)), evaluation(40)])])
        training = charts_of(html)[0]["lines"][0]["points"]
        path = re.search(r'<path d="M ([^"]*)" clip-path="[^"]*" style="fill: none; stroke: var\(--c1\)', html)[1]
        drawn = [[round(float(x), 1) for x in point.split()] for point in path.replace("\n", "").split("L")]
        assert [point[:2] for point in training] == drawn
        assert [point[2] for point in training] == [10, 20, 40]

    def test_colours_and_fonts_are_left_to_the_page(self, tmp_path):
        runs = [read_history(tmp_path / str(i), falling(200)) for i in range(9)]
        html = page_charts(runs)
        assert set(re.findall(r"(?:stroke|fill): ([^;\"]+)", html)) == {
            "none", "var(--line)", "var(--paper)", *(f"var(--c{i})" for i in range(8))
        }  # fmt: skip
        assert "font" not in html
        assert "step" in re.findall(r"<text[^>]*>(.*?)</text>", html)  # text stays text

    def test_no_id_occurs_twice(self, tmp_path):
        ids = re.findall(r' id="(.*?)"', page_charts([read_history(tmp_path / "run", falling(300))]))
        assert len(set(ids)) == len(ids) > 0

    def test_a_long_run_is_thinned(self, tmp_path):
        html = page_charts([read_history(tmp_path / "run", falling(10_000))])
        assert len(charts_of(html)[0]["lines"][0]["points"]) == MAX_POINTS
        assert len(html) < 200_000

    def test_missing_values_are_left_out(self, tmp_path):
        records = [train(1, 3.0), train(2, math.nan), train(3, 2.0), evaluation(3)]
        training = charts_of(page_charts([read_history(tmp_path / "run", records)]))[0]["lines"][0]
        assert [point[2:] for point in training["points"]] == [[1, 3], [3, 2]]

    @pytest.mark.parametrize("records", [
        [train(10)], [evaluation(10)], [train(0, 5.5), evaluation(0, 5.5)], [train(10, learning_rate=None)],
        [train(1, 0.0), evaluation(1, 0.0)], [train(1, epoch=1e15), train(2, epoch=1e-15)],
    ], ids=["train", "eval", "step 0", "no rate", "no loss", "any epoch"])  # fmt: skip
    def test_any_number_of_points(self, tmp_path, records):
        run = read_history(tmp_path / "run", records)
        run = replace(run, train=run.train | {"characters": run.train["epoch"]}, record=RunRecord(train_characters=9))
        assert 3 <= page_charts([run, run]).count("<figure") <= 4


def test_evenly_spread_indices():
    assert spread(10, 240).tolist() == list(range(10))
    chosen = spread(10_000, 240)
    assert (len(chosen), chosen[0], chosen[-1]) == (240, 0, 9999)
    assert np.ptp(np.diff(chosen)) <= 1
    assert spread(0, 240).tolist() == []


@pytest.mark.parametrize(("value", "shown"), [
    (0, "0"), (0.02, "0.02"), (2e-5, "2e-5"), (2.5e-5, "2.5e-5"), (1.5, "1.5"), (150, "150"), (1500, "1.5 k"),
    (25_000, "25 k"), (2.5e6, "2.5 M"), (3e9, "3 G"),
])  # fmt: skip
def test_short_numbers(value, shown):
    assert short(value) == shown
