"""`smallm watch RUN`: follows a run that trains in another terminal, or on another machine whose folder is mounted.

Reads the run folder only, so that the training does not notice it.
"""

import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from smallm.cli.arguments import ArgumentParser
from smallm.cli.main import plot
from smallm.cli.show import what_next
from smallm.cli.table import MISSING, duration, short_count
from smallm.cli.terminal import takes_control_codes
from smallm.errors import UserError
from smallm.html.escape import printable
from smallm.runs.layout import newest_run
from smallm.runs.metrics import Record, number
from smallm.runs.summary import BROKEN, FINISHED, RUNNING, Run, check_run, read_run

TAIL_BYTES = 1 << 20  # of metrics.jsonl: some thousand records
SILENT_SECONDS = 60  # without news, after which the age of the last news is shown
STEPS_FOR_ETA = 20  # records from which the time to come is estimated
MAX_SAMPLE_LINES = 8
MIN_CHART, MAX_CHART = 20, 100  # columns
CHART_LINES = 10
TRAIN_MARK, VAL_MARK = ".", "o"  # ASCII: every terminal has them
TOP, CLEAR_LINE, CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"


def main(argv: Sequence[str]) -> int:
    """Runs `smallm watch` with these arguments."""
    parser = ArgumentParser("watch", description="Follows a run until it ends: loss, chart, last sample, "
                            "speed and time left. Without a terminal, prints a line for each step that is new.",
                            )  # fmt: skip
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a run; default: the newest one")
    parser.add_argument("--once", action="store_true", help="print the state of this moment, and end")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="time between two looks (default: "
                        "2)")  # fmt: skip
    parser.add_argument("--html", metavar="PAGE", help="also write the report page anew after each evaluation; the "
                        "page reloads itself while the run trains")  # fmt: skip
    options = parser.parse_args(argv)
    if not 0.1 <= options.every <= 3600:
        raise UserError(f"--every {options.every} is out of range; it must be from 0.1 to 3600 seconds")
    path = options.run or newest_run()
    check_run(path)
    if options.once:
        run = read_run(path, TAIL_BYTES)
        print(*lines(run, time.time(), _columns()), sep="\n")
        return _write_page(run, options.html)
    with suppress(KeyboardInterrupt):  # the usual way to stop watching
        _follow(path, options.every, options.html)
    return 0


def _follow(path: Path, every: float, page: str | None) -> None:
    """Shows the run, again and again until it ends."""
    whole_screen, shown, evaluations = takes_control_codes(sys.stdout), None, -1
    while True:
        run = read_run(path, TAIL_BYTES)
        ended = run.state in (FINISHED, BROKEN) or (run.state != RUNNING and run.ending == "interrupted")
        if whole_screen:
            text = "".join(f"{line}{CLEAR_LINE}\n" for line in lines(run, time.time(), _columns()))
            print("\x1b[2J" * (shown is None) + TOP + text + CLEAR_REST, end="", flush=True)
        elif run.step != shown or ended:
            print(status(run, time.time()), flush=True)
        shown = run.step or 0
        count = len(_points(run, "eval", "val_loss"))
        if count and (count != evaluations or ended):
            _write_page(run, page)
        evaluations = count
        if ended:
            return
        time.sleep(every)


def _write_page(run: Run, page: str | None) -> int:
    return plot([str(run.path), "--html", page]) or 0 if page else 0


def lines(run: Run, now: float, columns: int) -> Iterator[str]:
    """The whole view. now: seconds since 1970; columns: width of the terminal."""
    yield printable(f"{run.path}: {_state(run, now)}")
    yield _progress(run)
    yield _loss_line(run)
    yield from chart(_points(run, "train", "loss"), _points(run, "eval", "val_loss"), columns)
    sample = next((line["sample"] for line in reversed(run.metrics) if isinstance(line.get("sample"), str)), "")
    if sample.strip():
        yield ""
        yield "last sample:"
        rows = sample.strip("\n").split("\n")[:MAX_SAMPLE_LINES]
        yield from (f"  {printable(row)[: max(1, columns - 2)]}" for row in rows)
    if run.state != RUNNING and run.ending != "training":
        yield from ("", *(f"next: {printable(each)}" for each in what_next(run)[:1]))


def status(run: Run, now: float) -> str:
    """The state, progress and losses on one line, for a file or a pipe."""
    return f"{_state(run, now)}; {_progress(run)}; {_loss_line(run)}"


def seconds_left(run: Run) -> float | None:
    """Estimated from the last records, evaluations included; None if the folder does not tell enough."""
    known = _points(run, "train", "seconds")[-STEPS_FOR_ETA:]
    if len(known) < 2 or run.total_steps is None or known[-1][0] <= known[0][0]:
        return None
    per_step = (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])
    return max(0.0, per_step * (run.total_steps - known[-1][0]))


def chart(train: list[tuple[float, float]], val: list[tuple[float, float]], columns: int) -> list[str]:
    """A chart in ASCII of losses as (step, loss), the validation loss over the training loss; [] without two steps.

    The lowest tenth of the steps, where the loss falls steeply, is drawn at the upper edge where it is higher.
    """
    points = sorted(train + val)
    if not points or points[0][0] == points[-1][0]:
        return []
    first, last = points[0][0], points[-1][0]
    later = [loss for step, loss in points if step >= first + (last - first) / 10]
    low, high = min(later), max(later)
    label = max(len(f"{value:.2f}") for value in (low, high))
    width = max(MIN_CHART, min(MAX_CHART, columns - label - 3))
    grid = [[" "] * width for _ in range(CHART_LINES)]
    for mark, line in ((TRAIN_MARK, train), (VAL_MARK, val)):
        for step, loss in line:
            x = round((step - first) / (last - first) * (width - 1))
            y = round((high - min(loss, high)) / ((high - low) or 1) * (CHART_LINES - 1))
            grid[y][x] = mark
    labels = {0: f"{high:.2f}", CHART_LINES - 1: f"{low:.2f}"}
    rows = [f"{labels.get(i, ''):>{label}} |{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    ends = f"{first:,.0f}", f"{last:,.0f}"
    axis = f"{'':{label}} +{'-' * width}"
    return ["", *rows, axis, f"{'':{label}}  {ends[0]}{ends[1]:>{width - len(ends[0])}}",
            f"{'':{label}}  loss in nats by step: {TRAIN_MARK} training, {VAL_MARK} validation"]  # fmt: skip


def _points(run: Run, kind: str, key: str) -> list[tuple[float, float]]:
    """(step, value) of the records of a kind; broken values are left out."""
    rows = [(number(line.get("step")), number(line.get(key))) for line in run.metrics if line.get("kind") == kind]
    return [(step, value) for step, value in rows if step is not None and value is not None]


def _state(run: Run, now: float) -> str:
    """`training`, `finished`, `stopped` or the age of the last news."""
    silent = max(0.0, now - run.written)
    news = f", no news for {duration(silent)}" if silent >= SILENT_SECONDS else ""
    if run.state == RUNNING:
        return f"training{news}"
    if run.state == FINISHED:
        return "finished early, out of patience" if run.ending == "out of patience" else "finished"
    if run.state == BROKEN:
        return f"broken: {run.problem}"
    if run.ending == "interrupted":
        return "stopped; the run can be resumed"
    return f"training elsewhere, or killed{news}" if news else "training elsewhere"


def _progress(run: Run) -> str:
    step = MISSING if run.step is None else f"{run.step:,}"
    of = MISSING if run.total_steps is None else f"{run.total_steps:,}"
    share = f" ({100 * run.step / run.total_steps:.0f} %)" if run.step is not None and run.total_steps else ""
    last = _last(run, "train")
    parts = [f"step {step} of {of}{share}", duration(run.seconds)]
    if (speed := number(last.get("characters_per_second"))) is not None:
        parts.append(f"{speed:,.0f} chars/s")
    if (mfu := number(last.get("mfu"))) is not None:
        parts.append(f"MFU {100 * mfu:.0f} %")
    if (memory := number(last.get("memory_bytes"))) is not None:
        parts.append(f"{short_count(memory)}B")
    if run.state not in (FINISHED, BROKEN) and run.ending != "interrupted":
        parts.append(f"{duration(seconds_left(run))} left")
    return ", ".join(parts)


def _loss_line(run: Run) -> str:
    train, val = _points(run, "train", "loss")[-1:], _points(run, "eval", "val_loss")[-1:]
    shown = [f"training loss {train[0][1]:.4f}"] if train else ["no loss yet"]
    if val:
        shown.append(f"validation {val[0][1]:.4f} nats = {val[0][1] / math.log(2):.3f} bits per character")
    if run.val_loss is not None and val and val[0][1] > run.val_loss:
        shown.append(f"best {run.val_loss:.4f} at step {run.best_step:,}")
    return ", ".join(shown)


def _last(run: Run, kind: str) -> Record:
    return next((line for line in reversed(run.metrics) if line.get("kind") == kind), {})


def _columns() -> int:
    return shutil.get_terminal_size((80, 24)).columns
