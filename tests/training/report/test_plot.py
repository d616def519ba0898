"""`smallm plot`: the files that it writes, and its mistakes."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_records import evaluation, falling, train, write_run

from smallm.errors import UserError
from smallm.training.report.charts import COLOURS
from smallm.training.report.plot import main, plot_runs

pytestmark = pytest.mark.usefixtures("charts")
BLUE, ORANGE, GREEN = (0, 114, 178), (213, 94, 0), (0, 128, 93)


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.round(imread(path)[..., :3] * 255).astype(int)


def count(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(image - colour).max(-1) < 3).sum())


class TestPicture:
    def test_png(self, tmp_path):
        constant = write_run(tmp_path / "constant", falling(500))
        decay = write_run(tmp_path / "decay", falling(500, floor=1.3))
        assert plot_runs([constant], tmp_path / "new" / "one.png") == tmp_path / "new" / "one.png"
        plot_runs([constant, decay], tmp_path / "two.png")
        one, two = pixels(tmp_path / "new" / "one.png"), pixels(tmp_path / "two.png")
        assert one.shape == two.shape == (750, 1200, 3)
        assert count(one, BLUE) > 1000
        assert count(one, GREEN) == count(two, GREEN) == 0
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
        for colour in COLOURS[:6]:
            assert count(image, tuple(bytes.fromhex(colour[1:]))) > 100

    def test_a_name_with_dollars_is_not_typeset(self, tmp_path):
        out = plot_runs([write_run(tmp_path / "$\\frac$", [train(1)])], tmp_path / "loss.png")
        assert out.stat().st_size > 1000

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
        command = [sys.executable, "-m", "smallm", "plot", str(tmp_path / "none")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("smallm: ")
        assert done.stderr.count("\n") == 1

    def test_matplotlib_waits_until_it_is_needed(self):
        code = "import sys, smallm.training.report.plot; sys.exit('matplotlib' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
