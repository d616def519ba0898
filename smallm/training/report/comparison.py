"""A page that compares several runs: their curves over each other, and the settings in which they differ."""

from collections.abc import Sequence
from pathlib import Path

from smallm.html.escape import escape
from smallm.runs.config_file import flatten
from smallm.training.config import Config
from smallm.training.report.charts import page_charts
from smallm.training.report.history import RunHistory, read_histories
from smallm.training.report.run_page import (
    LOSS_EXPLAINED,
    MEMORISATION_EXPLAINED,
    figures,
    sample_figure,
    section,
    setting,
    soft,
    whole_page,
    write_page,
)

Rows = Sequence[tuple[str, Sequence[str]]]  # the name of a figure, and its value for each run


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page that compares runs into the file `out`, and returns `out`.

    Raises `UserError` for a run without losses, and if the file cannot be written.
    """
    return write_page(comparison_page(read_histories(runs)), out)


def comparison_page(runs: Sequence[RunHistory]) -> str:
    """The page of several runs; each run has a colour and a column."""
    title = " · ".join(run.name for run in runs)
    title = title if len(title) < 90 else f"{len(runs)} runs"
    baselines = [{one.name: f"{one.bits_per_char:.3f}" for one in run.baselines} for run in runs]
    memorisation = [{row[0]: row[1] for row in run.record.memorisation if len(row) > 1} for run in runs]
    return whole_page(title, [
        f"<header><h1>{escape(title)}</h1></header>",
        section("Results", _results(runs)),
        section("Loss", soft(LOSS_EXPLAINED) + page_charts(runs)),
        section("Configuration", _differences(runs)),
        section("Baselines", _table(runs, baselines, "Bits per character of the validation text. Lower is better.")),
        section("Memorisation", _table(runs, memorisation, MEMORISATION_EXPLAINED)),
        section("Samples", _samples(runs)),
    ])  # fmt: skip


def _columns(runs: Sequence[RunHistory], rows: Rows, best: Sequence[str] = ()) -> str:
    """A table with a column for each run.

    best: names of the rows in which the lowest value is marked.
    """
    heads = "".join(
        f'<th scope="col"><i class="swatch c{i % 8}"></i>{escape(run.name)}</th>' for i, run in enumerate(runs)
    )
    body = "\n".join(
        f'<tr><th scope="row">{escape(what)}</th>{_cells(values, what in best)}</tr>' for what, values in rows
    )
    return (
        f'<div class="wide"><table class="runs"><thead><tr><td></td>{heads}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cells(values: Sequence[str], mark: bool) -> str:
    lowest = min(filter(None, values), key=float, default=None) if mark else None
    kinds = ["best" if mark and value == lowest else "" for value in values]
    return "".join(f'<td class="{kind}">{escape(value)}</td>' for kind, value in zip(kinds, values, strict=True))


def _results(runs: Sequence[RunHistory]) -> str:
    found = [figures(run) for run in runs]
    rows = [(name, [values[name] for values in found]) for name in found[0]]
    texts = {values["text"] for values in found} - {""}
    note = soft("The runs used different texts, so their losses cannot be compared.") if len(texts) > 1 else ""
    return note + _columns(runs, rows, best=[name for name, _ in rows[:3]])


def _differences(runs: Sequence[RunHistory]) -> str:
    """The settings in which the runs differ."""
    if not any(run.config for run in runs):
        return ""
    names = flatten(Config().to_dict()) | {key: None for run in runs for key in run.config}
    rows = [(name, [setting(run.config.get(name, "")) for run in runs]) for name in names]
    rows = [(name, values) for name, values in rows if len(set(values)) > 1]
    return _columns(runs, rows) if rows else soft("All runs have the same settings.")


def _table(runs: Sequence[RunHistory], values: Sequence[dict[str, str]], explanation: str) -> str:
    """A table of the values that each run has, by their names; values that a run lacks are blank."""
    names = list(dict.fromkeys(name for found in values for name in found))
    rows = [(name, [found.get(name, "") for found in values]) for name in names]
    return soft(explanation) + _columns(runs, rows) if rows else ""


def _samples(runs: Sequence[RunHistory]) -> str:
    """The last sample of each run, side by side."""
    shown = "".join(sample_figure(f"{run.name}, ", *sample) for run in runs for sample in run.samples[-1:])
    return f'<div class="samples">{shown}</div>' if shown else ""
