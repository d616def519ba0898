"""Pages of one file each: the history of a run, `report.html`, and the comparison of several runs.

The same folder always gives the same page. What a run folder does not hold, such as that of an old run, is left out.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np

from smallm.cli.table import duration
from smallm.html.characters import CHARACTERS_STATIC, characters, legend
from smallm.html.escape import escape
from smallm.html.page import page, save, table
from smallm.inference.scoring import perplexity
from smallm.runs.baselines_file import Baseline
from smallm.runs.config_file import flatten
from smallm.runs.next_commands import next_commands
from smallm.training.analysis.baselines import verdict
from smallm.training.config import Config
from smallm.training.report.charts import page_charts, spread
from smallm.training.report.history import Row, RunHistory, number, read_histories

REPORT = "report.html"
MAX_SAMPLES = 6  # shown, the first and the last among them
Rows = Sequence[tuple[str, Sequence[str]]]  # the name of a figure, and its value for each run
STATES = {
    "training": "unfinished: the run still trains, or was killed",
    "finished": "finished",
    "out of patience": "ended early because the validation loss no longer fell",
    "interrupted": "interrupted; the run can be resumed",
}
MACHINE = ("device", "processor", "cores", "processes", "precision", "system")
LOSS_EXPLAINED = (
    "The loss measures how badly the model predicts the next character: it is the mean surprisal of a character, in "
    "nats. Lower is better. The validation loss is measured on text that the model does not train on. If it rises "
    "while the training loss falls, the model memorises its training text instead of learning what is general in it."
)
MEMORISATION_EXPLAINED = (
    "How much of the last samples stands word for word in the training text, and, for comparison, how much of the "
    "validation text does, which the model has never seen."
)


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page of a run, or the page that compares several runs, and returns its path.

    out: the file; default: report.html in the folder of the first run. Its folder is created if necessary.
    Raises `UserError` for a run without losses, and if the file cannot be written.
    """
    histories, out = read_histories(runs), out or runs[0] / REPORT
    with suppress(OSError):  # save() then fails too, with a message
        out.parent.mkdir(parents=True, exist_ok=True)
    save(out, run_page(histories[0]) if len(histories) == 1 else comparison_page(histories))
    return out


def run_page(run: RunHistory) -> str:
    """The page of one run."""
    return _page(run.name, [
        _header(run),
        _section("Loss", _soft(LOSS_EXPLAINED) + page_charts([run])),
        _section("Baselines", _baseline_bars(run.baselines)),
        _section("Samples", _samples(run)),
        _section("Memorisation", _memorisation(run)),
        _section("Surprisal", _surprisal(run)),
        _section("Text", _text_check(run)),
        _section("Configuration", _configuration(run)),
        _section("Speed, machine, versions", _machine(run)),
        _section("Commands", _commands(run)),
    ])  # fmt: skip


def comparison_page(runs: Sequence[RunHistory]) -> str:
    """The page of several runs; each run has a colour and a column."""
    title = " · ".join(run.name for run in runs)
    title = title if len(title) < 90 else f"{len(runs)} runs"
    baselines = [{one.name: f"{one.bits_per_char:.3f}" for one in run.baselines} for run in runs]
    memorisation = [{row[0]: row[1] for row in run.record.memorisation if len(row) > 1} for run in runs]
    return _page(title, [
        f"<header><h1>{escape(title)}</h1></header>",
        _section("Results", _results(runs)),
        _section("Loss", _soft(LOSS_EXPLAINED) + page_charts(runs)),
        _section("Configuration", _differences(runs)),
        _section("Baselines", _table(runs, baselines, "Bits per character of the validation text. Lower is better.")),
        _section("Memorisation", _table(runs, memorisation, MEMORISATION_EXPLAINED)),
        _section("Samples", _last_samples(runs)),
    ])  # fmt: skip


def figures(run: RunHistory) -> dict[str, str]:
    """The most important figures of a run, by their names; empty strings where they are unknown."""
    best, facts, known = run.best_loss, run.record.facts, math.isfinite(run.best_loss)
    of = f" of {run.record.planned_steps:,}" if run.record.planned_steps else ""
    parameters = facts.get("parameters")
    return {
        "validation loss, nats per character": f"{best:.4f}" if known else "",
        "bits per character": f"{best / math.log(2):.3f}" if known else "",
        "perplexity": f"{perplexity(best):.3f}" if known else "",
        "best step": f"{run.best_step:,}" if known else "",
        "steps": f"{run.last_step:,}{of}",
        "parameters": f"{parameters:,}" if isinstance(parameters, int) else "",
        "text": str(facts.get("text", "")),
        "time": duration(run.seconds),
        "characters per second": f"{run.characters_per_second:,.0f}" if run.characters_per_second > 0 else "unknown",
        "device": str(facts.get("device", "")),
    }


def changed_settings(config: dict[str, object]) -> dict[str, object]:
    """The settings that differ from their defaults; with train.minutes, which would choose the others, all settings."""
    defaults = flatten(Config().to_dict())
    return {key: value for key, value in config.items() if config.get("train.minutes") or value != defaults.get(key)}


def setting(value: object) -> str:
    """A value of the configuration as TOML spells it."""
    return repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


# Sections of the page of a run.


def _header(run: RunHistory) -> str:
    record = run.record
    shown = {what: value for what, value in figures(run).items() if value and what != "device"}
    text = f"trained on {shown.pop('text')}" if "text" in shown else ""
    began = f"started {record.began}" if record.began else ""
    about = " · ".join(filter(None, [text, STATES.get(record.state, ""), began]))
    tiles = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for what, value in shown.items())
    return (
        f'<header>\n<h1>{escape(run.name)}</h1>\n{_soft(about)}\n<dl class="tiles">{tiles}</dl>\n'
        f"{_verdict(run.baselines)}{_overfitting(run)}</header>"
    )


def _verdict(baselines: Sequence[Baseline]) -> str:
    """One sentence that compares the model with the best baseline."""
    model = [one.bits_per_char for one in baselines if one.name == "model"]
    others = [one for one in baselines if one.name != "model"]
    if not model or not others:
        return ""
    words = verdict(min(others, key=lambda one: one.bits_per_char), model[0])
    return f'<p class="verdict">{escape(words[0].upper() + words[1:])}.</p>\n'


def _overfitting(run: RunHistory) -> str:
    """A warning if the last validation loss is well above the best."""
    last = run.val["loss"][-1:]
    if not len(last) or not last[0] > 1.01 * run.best_loss:
        return ""
    return (
        f"<p>Since step {run.best_step:,} the validation loss has risen to {last[0]:.4f}: the model overfits, that is, "
        "it memorises its training text. More text, <code>--model.dropout 0.2</code> or fewer steps help. The "
        "checkpoint with the lowest validation loss is kept, and is exported.</p>\n"
    )


def _baseline_bars(baselines: Sequence[Baseline]) -> str:
    """Bars with the bits per character of the model, the compressors and the n-gram model, best first."""
    if not baselines:
        return ""
    highest = max(one.bits_per_char for one in baselines) or 1.0
    rows = "".join(
        f'<tr class="{"model" if one.name == "model" else ""}"><th scope="row">{escape(one.name)}</th><td class="bar">'
        f'<i style="width:{100 * max(0.0, one.bits_per_char) / highest:.1f}%"></i></td>'
        f'<td class="number">{one.bits_per_char:.3f}</td></tr>'
        for one in sorted(baselines, key=lambda one: one.bits_per_char)
    )
    how = "".join(f"<dt>{escape(one.name)}</dt><dd>{escape(one.how)}</dd>" for one in baselines)
    return (
        f"{_soft('Bits per character of the validation text, beside simpler ways to predict it. Lower is better.')}"
        f'<table class="bars">{rows}</table>'
        f"<details><summary>How each was measured</summary><dl>{how}</dl></details>"
    )


def _samples(run: RunHistory) -> str:
    found = run.samples
    if not found:
        return ""
    shown = "".join(_sample("", *found[i]) for i in spread(len(found), MAX_SAMPLES))
    more = _soft(f"{MAX_SAMPLES} of {len(found)} samples; all of them are in metrics.jsonl.")
    return f'<div class="samples">{shown}</div>{more if len(found) > MAX_SAMPLES else ""}'


def _memorisation(run: RunHistory) -> str:
    rows = run.record.memorisation
    return _soft(MEMORISATION_EXPLAINED) + table(["", "samples", "validation text"], rows) if rows else ""


def _surprisal(run: RunHistory) -> str:
    """A passage of the validation text, coloured by surprisal; the candidates are passed by index."""
    passage = run.record.passage
    if not passage.text:
        return ""
    names = sorted(set(chain(*passage.expected)))
    index = {name: i for i, name in enumerate(names)}
    expected = np.array([[index[name] for name in row] for row in passage.expected])
    text = characters(
        passage.text, np.array(passage.nats), expected, np.array(passage.probabilities), lambda i: names[i]
    )
    what = (
        f"A passage of the validation text, coloured by the surprisal of each character for the model of step "
        f"{passage.step:,}: the stronger the colour, the less the model expected the character. Point at a character, "
        "or tap it, to see the five characters that were most likely there for the model."
    )
    return f"{_soft(what)}{legend()}{text}"


def _text_check(run: RunHistory) -> str:
    """The lines of the text check; the first word of each is its subject."""
    rows = [line.partition(" ")[::2] for line in run.record.findings]
    return table(["", ""], [(subject, finding.strip()) for subject, finding in rows]) if rows else ""


def _configuration(run: RunHistory) -> str:
    defaults = flatten(Config().to_dict())
    rows = [(name, setting(value), setting(defaults.get(name)) if value != defaults.get(name) else "")
            for name, value in run.config.items()]  # fmt: skip
    return table(["setting", "value", "default, where it differs"], rows) if rows else ""


def _machine(run: RunHistory) -> str:
    facts = run.record.facts
    rows = [(what, figures(run)[what]) for what in ("characters per second", "time")]
    rows += [(name, str(facts[name])) for name in MACHINE if name in facts]
    elsewhere = {*MACHINE, "text", "characters", "parameters"}
    rows += [(name, str(value)) for name, value in facts.items() if name not in elsewhere]
    return table(["", ""], rows)


def _commands(run: RunHistory) -> str:
    record, changed = run.record, changed_settings(run.config)
    commands = next_commands(run.run, run.config, record.state, record.planned_steps or run.last_step, changed)
    shown = "".join(f"<dt>{escape(what)}</dt><dd><pre>{escape(line)}</pre></dd>" for what, line in commands.items())
    return f'<dl class="commands">{shown}</dl>'


# Sections of a comparison.


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
    note = _soft("The runs used different texts, so their losses cannot be compared.") if len(texts) > 1 else ""
    return note + _columns(runs, rows, best=[name for name, _ in rows[:3]])


def _differences(runs: Sequence[RunHistory]) -> str:
    """The settings in which the runs differ."""
    if not any(run.config for run in runs):
        return ""
    names = flatten(Config().to_dict()) | {key: None for run in runs for key in run.config}
    rows = [(name, [setting(run.config.get(name, "")) for run in runs]) for name in names]
    rows = [(name, values) for name, values in rows if len(set(values)) > 1]
    return _columns(runs, rows) if rows else _soft("All runs have the same settings.")


def _table(runs: Sequence[RunHistory], values: Sequence[dict[str, str]], explanation: str) -> str:
    """A table of the values that each run has, by their names; values that a run lacks are blank."""
    names = list(dict.fromkeys(name for found in values for name in found))
    rows = [(name, [found.get(name, "") for found in values]) for name in names]
    return _soft(explanation) + _columns(runs, rows) if rows else ""


def _last_samples(runs: Sequence[RunHistory]) -> str:
    """The last sample of each run, side by side."""
    shown = "".join(_sample(f"{run.name}, ", *sample) for run in runs for sample in run.samples[-1:])
    return f'<div class="samples">{shown}</div>' if shown else ""


# Parts of both.


def _page(title: str, parts: Iterable[str]) -> str:
    """An HTML document; empty parts are left out."""
    return page(title, "\n".join(filter(None, parts)), (*CHARACTERS_STATIC, "report.css", "report.js"))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _soft(text: str) -> str:
    """A paragraph of explanation, in a softer colour."""
    return f'<p class="soft">{escape(text)}</p>'


def _sample(name: str, row: Row, text: str) -> str:
    """A sample with its title: a name, and the step and loss of its evaluation."""
    title = f"{name}step {number(row, 'step'):,.0f}, {number(row, 'val_loss'):.3f} nats"
    return f'<figure><figcaption>{escape(title)}</figcaption><pre class="sample">{escape(text)}</pre></figure>'
