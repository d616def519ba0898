"""`report.html`: what came of a run on one page, a file that needs nothing beside it.

The same folder gives the same page. What is not known of a run, an old one say, is left out.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from smallm.cli.table import duration
from smallm.html.characters import CHARACTERS_STATIC, characters, legend
from smallm.html.escape import escape
from smallm.html.page import page, save, table
from smallm.inference.scoring import perplexity
from smallm.runs.config_file import flatten
from smallm.training.analysis.baselines import Baseline, verdict
from smallm.training.config import Config
from smallm.training.report.charts import pictures
from smallm.training.report.next_commands import commands
from smallm.training.report.outcome import Outcome, number, read_outcomes
from smallm.training.report.svg import short

REPORT = "report.html"
SAMPLES, EVALUATIONS = 6, 40  # shown at most, the first and the last among them
STATES = {
    "training": "not ended: it still trains, or was killed",
    "finished": "finished",
    "out of patience": "ended because the validation loss no longer fell",
    "interrupted": "interrupted; it can be resumed",
}
MACHINE = ("device", "processor", "cores", "processes", "precision", "system")


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the page of a run, by default as `report.html` into its folder, and returns where.

    Raises `UserError` for a run without losses, and if the file cannot be written.
    """
    return write_page(run_page(*read_outcomes([run])), out or run / REPORT)


def write_page(text: str, out: Path) -> Path:
    """Writes a page, into a new folder if need be, and returns where. Raises `UserError`."""
    with suppress(OSError):  # then it cannot be saved either
        out.parent.mkdir(parents=True, exist_ok=True)
    save(out, text)
    return out


def run_page(outcome: Outcome) -> str:
    """The page of one run."""
    return whole_page(outcome.name, [
        _header(outcome),
        section("Loss", pictures([outcome])),
        section("Yardsticks", yardstick_bars(outcome.baselines)),
        section("Samples", _samples(outcome)),
        section("Copies", _copies(outcome)),
        section("Surprise", _passage(outcome)),
        section("Text", _findings(outcome)),
        section("Configuration", _configuration(outcome)),
        section("Speed, machine, versions", _machine(outcome)),
        section("Evaluations", _evaluations(outcome)),
        section("Commands", _commands(outcome)),
    ])  # fmt: skip


def whole_page(title: str, parts: Iterable[str]) -> str:
    """A page of these parts."""
    static = (*CHARACTERS_STATIC, "report.css", "report.js")
    return page(title, "\n".join(part for part in parts if part), static)


def section(title: str, content: str) -> str:
    """A part of a page; nothing if there is nothing to tell."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """Figures with what they are, side by side."""
    cells = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for what, value in figures)
    return f'<dl class="tiles">{cells}</dl>'


def yardstick_bars(baselines: Sequence[Baseline]) -> str:
    """The model beside what compressors and counted n-grams need, the best first."""
    if not baselines:
        return ""
    most = max(one.bits_per_char for one in baselines) or 1.0
    rows = "".join(
        f'<tr class="{"model" if one.name == "model" else ""}"><th scope="row">{escape(one.name)}</th><td class="bar">'
        f'<i style="width:{100 * max(0.0, one.bits_per_char) / most:.1f}%"></i></td>'
        f'<td class="number">{one.bits_per_char:.3f}</td></tr>'
        for one in sorted(baselines, key=lambda one: one.bits_per_char)
    )
    how = "".join(f"<dt>{escape(one.name)}</dt><dd>{escape(one.how)}</dd>" for one in baselines)
    return (
        '<p class="soft">Bits per character of the validation text; less is better.</p>'
        f'<table class="bars">{rows}</table>'
        f"<details><summary>How each was measured</summary><dl>{how}</dl></details>"
    )


def bits(nats: float) -> str:
    """Nats as bits, to be read."""
    return f"{nats / math.log(2):.3f}"


def some(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    return [rows[place] for place in np.unique(places)]


def speed(outcome: Outcome) -> str:
    """Characters per second, to be read."""
    return f"{outcome.characters_per_second:,.0f}" if math.isfinite(outcome.characters_per_second) else "unknown"


def _header(outcome: Outcome) -> str:
    record = outcome.record
    text = f"trained on {record.facts['text']}" if "text" in record.facts else ""
    began = f"begun {record.began}" if record.began else ""
    about = " · ".join(filter(None, [text, STATES.get(record.state, ""), began]))
    return (
        f'<header>\n<h1>{escape(outcome.name)}</h1>\n<p class="soft">{escape(about)}</p>\n{tiles(_figures(outcome))}\n'
        f"{_verdict(outcome.baselines)}{_risen(outcome)}</header>"
    )


def _figures(outcome: Outcome) -> Iterator[tuple[str, str]]:
    best, record = outcome.best, outcome.record
    if math.isfinite(best):
        yield "nats per character of the validation text", f"{best:.4f}"
        yield "bits per character", bits(best)
        yield "perplexity", f"{perplexity(best):.2f}"
        yield "best step", f"{outcome.best_step:,}"
    yield "steps", f"{outcome.last_step:,}" + (f" of {record.planned_steps:,}" if record.planned_steps else "")
    if isinstance(parameters := record.facts.get("parameters"), int):
        yield "parameters", f"{parameters:,}"
    yield "time", duration(outcome.seconds)
    yield "characters per second", speed(outcome)


def _verdict(baselines: Sequence[Baseline]) -> str:
    model = [one.bits_per_char for one in baselines if one.name == "model"]
    others = [one for one in baselines if one.name != "model"]
    if not model or not others:
        return ""
    best = min(others, key=lambda one: one.bits_per_char)
    words = verdict(best, model[0])
    return f'<p class="verdict">{escape(words[0].upper() + words[1:])}.</p>\n'


def _risen(outcome: Outcome) -> str:
    """A word on a validation loss that is by now well above its best."""
    best, last = outcome.best, outcome.curves.val["loss"][-1:]
    if not len(last) or not last[0] > 1.01 * best:
        return ""
    return (
        f"<p>Since step {outcome.best_step:,} the validation loss has risen to {last[0]:.4f}: the model begins to know "
        "its text by heart. More text, <code>--model.dropout 0.2</code> or fewer steps help; the best checkpoint is "
        "kept.</p>\n"
    )


def _samples(outcome: Outcome) -> str:
    found = outcome.samples
    if not found:
        return ""
    shown = "".join(
        figure_of(f"step {number(row, 'step'):,.0f}, {number(row, 'val_loss'):.3f} nats", text)
        for row, text in some(found, SAMPLES)
    )
    more = f'<p class="soft">{min(SAMPLES, len(found))} of {len(found)}; all are in metrics.jsonl.</p>'
    return f'<div class="samples">{shown}</div>{more if len(found) > SAMPLES else ""}'


def figure_of(title: str, text: str) -> str:
    """A text with a title, as it was written."""
    return f'<figure><figcaption>{escape(title)}</figcaption><pre class="sample">{escape(text)}</pre></figure>'


def _copies(outcome: Outcome) -> str:
    rows = outcome.record.memorisation
    if not rows:
        return ""
    what = "What stands word for word in the training text: of the last samples, and of real text that it never had."
    return f'<p class="soft">{what}</p>{table(["", "samples", "validation text"], rows)}'


def _passage(outcome: Outcome) -> str:
    """The coloured text; its expected characters are numbered for it."""
    passage = outcome.record.passage
    if not passage.text:
        return ""
    names = sorted(set(chain(*passage.expected)))
    places = {name: place for place, name in enumerate(names)}
    expected = np.array([[places[name] for name in row] for row in passage.expected])
    text = characters(
        passage.text, np.array(passage.nats), expected, np.array(passage.probabilities), lambda place: names[place]
    )
    what = (
        f"A passage of the validation text, as the model of step {passage.step:,} reads it: the stronger the colour, "
        "the less a character was expected. Point at one, or tap it, for the five that were expected most."
    )
    return f'<p class="soft">{what}</p>{legend()}{text}'


def _findings(outcome: Outcome) -> str:
    """What the text doctor says: each of its lines begins with what it is about."""
    rows = [line.partition(" ")[::2] for line in outcome.record.findings]
    return table(["", ""], [(about, finding.strip()) for about, finding in rows]) if rows else ""


def _configuration(outcome: Outcome) -> str:
    """All settings, those that are not at their defaults first to the eye."""
    if not outcome.config:
        return ""
    defaults = flatten(Config().to_dict())
    sections: dict[str, list[str]] = {}
    for name, value in outcome.config.items():
        part, _, field = name.rpartition(".")
        default = defaults.get(name)
        mark, note = ("changed", f"default {setting(default)}") if value != default else ("", "")
        sections.setdefault(part, []).append(
            f'<tr class="{mark}"><th scope="row">{escape(field)}</th><td>{escape(setting(value))}</td>'
            f'<td class="soft">{escape(note)}</td></tr>'
        )
    tables = "".join(
        f'<div><h3>[{escape(part)}]</h3><table class="settings">{"".join(rows)}</table></div>'
        for part, rows in sections.items()
    )
    return f'<p class="soft">What differs from the defaults is marked.</p><div class="sections">{tables}</div>'


def setting(value: object) -> str:
    """A value of the configuration, as TOML has it."""
    return repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _machine(outcome: Outcome) -> str:
    facts = outcome.record.facts
    rows = [("characters per second", speed(outcome)), ("whole run", duration(outcome.seconds))]
    rows += [(name, str(facts[name])) for name in MACHINE if name in facts]
    apart = {*MACHINE, "text", "characters", "parameters"}
    rows += [(name, str(value)) for name, value in facts.items() if name not in apart]
    return table(["", ""], rows)


def _evaluations(outcome: Outcome) -> str:
    def cells(row: dict[str, Any]) -> list[object]:
        val, train = number(row, "val_loss"), number(row, "train_loss")
        seen = number(row, "epoch") * outcome.record.train_characters
        counts = [f"{number(row, 'step'):,.0f}", f"{number(row, 'epoch'):.2f}", short(seen) if seen else ""]
        losses = [f"{loss:.4f}" if math.isfinite(loss) else "" for loss in (train, val)]
        return [*counts, *losses, bits(val), f"{perplexity(val):.2f}", duration(number(row, "seconds"))]

    heads = ["step", "epoch", "characters", "train, nats", "validation, nats", "bits", "perplexity", "time"]
    rows = [cells(row) for row in some(outcome.evaluations, EVALUATIONS)]
    if not rows:
        return ""
    return f"<details><summary>{len(outcome.evaluations):,} of them</summary>{table(heads, rows)}</details>"


def _commands(outcome: Outcome) -> str:
    lines = commands(outcome.run, outcome.config, outcome.record.state)
    shown = "".join(f"<dt>{escape(what)}</dt><dd><pre>{escape(line)}</pre></dd>" for what, line in lines)
    return f'<dl class="commands">{shown}</dl>'
