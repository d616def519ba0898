"""Several runs on one page: their curves over each other, and what sets them apart."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from smallm.cli.table import duration
from smallm.html.escape import escape
from smallm.inference.scoring import perplexity
from smallm.runs.config_file import flatten
from smallm.training.config import Config
from smallm.training.report.charts import pictures
from smallm.training.report.outcome import Outcome, number, read_outcomes
from smallm.training.report.run_page import bits, figure_of, section, setting, speed, whole_page, write_page


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page of these runs and returns where.

    Raises `UserError` for a run without losses, and if the file cannot be written.
    """
    return write_page(comparison_page(read_outcomes(runs)), out)


def comparison_page(outcomes: Sequence[Outcome]) -> str:
    """The page of several runs, each with a colour and a column of its own."""
    title = " · ".join(one.name for one in outcomes)
    title = title if len(title) < 90 else f"{len(outcomes)} runs"
    return whole_page(title, [
        f"<header><h1>{escape(title)}</h1></header>",
        section("Results", _results(outcomes)),
        section("Loss", pictures(outcomes)),
        section("Configuration", _differences(outcomes)),
        section("Yardsticks", _yardsticks(outcomes)),
        section("Copies", _copies(outcomes)),
        section("Samples", _samples(outcomes)),
    ])  # fmt: skip


def _columns(outcomes: Sequence[Outcome], rows: Sequence[tuple[str, Sequence[str]]], best: Sequence[str] = ()) -> str:
    """A table with a column for each run; in the rows `best` names, the lowest figure is marked."""
    heads = "".join(
        f'<th scope="col"><i class="swatch c{place % 8}"></i>{escape(one.name)}</th>'
        for place, one in enumerate(outcomes)
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


def _results(outcomes: Sequence[Outcome]) -> str:
    def row(what: str, value: Callable[[Outcome], str]) -> tuple[str, list[str]]:
        return what, [value(one) for one in outcomes]

    def of_best(show: Callable[[float], str]) -> Callable[[Outcome], str]:
        return lambda one: show(one.best) if math.isfinite(one.best) else ""

    rows = [
        row("nats per character", of_best(lambda best: f"{best:.4f}")),
        row("bits per character", of_best(bits)),
        row("perplexity", of_best(lambda best: f"{perplexity(best):.3f}")),
        row("best step", lambda one: f"{one.best_step:,}"),
        row("steps", lambda one: f"{one.last_step:,}"),
        row("parameters", lambda one: _fact(one, "parameters")),
        row("text", lambda one: _fact(one, "text")),
        row("time", lambda one: duration(one.seconds)),
        row("characters per second", speed),
        row("device", lambda one: _fact(one, "device")),
    ]
    texts = {_fact(one, "text") for one in outcomes}
    note = "Losses on different texts do not compare." if len(texts - {""}) > 1 else ""
    table = _columns(outcomes, rows, best=("nats per character", "bits per character", "perplexity"))
    return (f'<p class="soft">{note}</p>' if note else "") + table


def _fact(outcome: Outcome, name: str) -> str:
    value = outcome.record.facts.get(name, "")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _differences(outcomes: Sequence[Outcome]) -> str:
    """The settings that are not the same in all runs."""
    known = flatten(Config().to_dict()) | {key: None for one in outcomes for key in one.config}
    rows = [(key, [setting(one.config.get(key, "")) for one in outcomes]) for key in known]
    rows = [(key, values) for key, values in rows if len(set(values)) > 1]
    if not any(one.config for one in outcomes):
        return ""
    return _columns(outcomes, rows) if rows else '<p class="soft">The same settings.</p>'


def _yardsticks(outcomes: Sequence[Outcome]) -> str:
    """Bits per character; those of the compressors differ where the texts do."""
    figures = [{one.name: f"{one.bits_per_char:.3f}" for one in outcome.baselines} for outcome in outcomes]
    names = list(dict.fromkeys(name for found in figures for name in found))
    rows = [(name, [found.get(name, "") for found in figures]) for name in names]
    return _columns(outcomes, rows) if rows else ""


def _copies(outcomes: Sequence[Outcome]) -> str:
    """Of the samples."""
    figures = [{row[0]: row[1] for row in one.record.memorisation if len(row) > 1} for one in outcomes]
    names = list(dict.fromkeys(name for found in figures for name in found))
    rows = [(name, [found.get(name, "") for found in figures]) for name in names]
    return _columns(outcomes, rows) if rows else ""


def _samples(outcomes: Sequence[Outcome]) -> str:
    """The last of each, side by side."""
    shown = "".join(
        figure_of(f"{one.name}, step {number(row, 'step'):,.0f}, {number(row, 'val_loss'):.3f} nats", text)
        for one in outcomes
        for row, text in one.samples[-1:]
    )
    return f'<div class="samples">{shown}</div>' if shown else ""
