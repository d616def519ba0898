"""`report.html`: the history of a run on one page, in a single file that needs no other files.

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
from smallm.training.report.charts import page_charts, short, spread
from smallm.training.report.history import Row, RunHistory, number, read_histories

REPORT = "report.html"
MAX_SAMPLES, MAX_EVALUATIONS = 6, 40  # shown, the first and the last among them
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


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the page of a run and returns its path.

    out: the file; default: report.html in the run folder.
    Raises `UserError` for a run without losses, and if the file cannot be written.
    """
    return write_page(run_page(*read_histories([run])), out or run / REPORT)


def write_page(text: str, out: Path) -> Path:
    """Writes a page, creating its folder if necessary, and returns its path. Raises `UserError`."""
    with suppress(OSError):  # save() then fails too, with a message
        out.parent.mkdir(parents=True, exist_ok=True)
    save(out, text)
    return out


def run_page(run: RunHistory) -> str:
    """The page of one run."""
    return whole_page(run.name, [
        _header(run),
        section("Loss", soft(LOSS_EXPLAINED) + page_charts([run])),
        section("Baselines", _baseline_bars(run.baselines)),
        section("Samples", _samples(run)),
        section("Memorisation", _memorisation(run)),
        section("Surprisal", _surprisal(run)),
        section("Text", _text_check(run)),
        section("Configuration", _configuration(run)),
        section("Speed, machine, versions", _machine(run)),
        section("Evaluations", _evaluations(run)),
        section("Commands", _commands(run)),
    ])  # fmt: skip


# Parts that the page of a comparison uses too.


def whole_page(title: str, parts: Iterable[str]) -> str:
    """An HTML document; empty parts are left out."""
    static = (*CHARACTERS_STATIC, "report.css", "report.js")
    return page(title, "\n".join(part for part in parts if part), static)


def section(title: str, content: str) -> str:
    """A section with a heading; nothing if the content is empty."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def soft(text: str) -> str:
    """A paragraph of explanation, in a softer colour."""
    return f'<p class="soft">{escape(text)}</p>'


def sample_figure(name: str, row: Row, text: str) -> str:
    """A sample with its title: a name, and the step and loss of its evaluation."""
    title = f"{name}step {number(row, 'step'):,.0f}, {number(row, 'val_loss'):.3f} nats"
    return f'<figure><figcaption>{escape(title)}</figcaption><pre class="sample">{escape(text)}</pre></figure>'


def bits(nats: float) -> str:
    """Nats as bits with three decimals."""
    return f"{nats / math.log(2):.3f}"


def figures(run: RunHistory) -> dict[str, str]:
    """The most important figures of a run, by their names; empty strings where they are unknown."""
    best, facts, known = run.best_loss, run.record.facts, math.isfinite(run.best_loss)
    of = f" of {run.record.planned_steps:,}" if run.record.planned_steps else ""
    parameters = facts.get("parameters")
    return {
        "validation loss, nats per character": f"{best:.4f}" if known else "",
        "bits per character": bits(best) if known else "",
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


# Sections.


def _header(run: RunHistory) -> str:
    record = run.record
    shown = {what: value for what, value in figures(run).items() if value and what != "device"}
    text = f"trained on {shown.pop('text')}" if "text" in shown else ""
    began = f"started {record.began}" if record.began else ""
    about = " · ".join(filter(None, [text, STATES.get(record.state, ""), began]))
    tiles = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for what, value in shown.items())
    return (
        f'<header>\n<h1>{escape(run.name)}</h1>\n{soft(about)}\n<dl class="tiles">{tiles}</dl>\n'
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
        f"{soft('Bits per character of the validation text, beside simpler ways to predict it. Lower is better.')}"
        f'<table class="bars">{rows}</table>'
        f"<details><summary>How each was measured</summary><dl>{how}</dl></details>"
    )


def _samples(run: RunHistory) -> str:
    found = run.samples
    if not found:
        return ""
    shown = "".join(sample_figure("", *found[i]) for i in spread(len(found), MAX_SAMPLES))
    more = soft(f"{MAX_SAMPLES} of {len(found)} samples; all of them are in metrics.jsonl.")
    return f'<div class="samples">{shown}</div>{more if len(found) > MAX_SAMPLES else ""}'


def _memorisation(run: RunHistory) -> str:
    rows = run.record.memorisation
    return soft(MEMORISATION_EXPLAINED) + table(["", "samples", "validation text"], rows) if rows else ""


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
    return f"{soft(what)}{legend()}{text}"


def _text_check(run: RunHistory) -> str:
    """The lines of the text check; the first word of each is its subject."""
    rows = [line.partition(" ")[::2] for line in run.record.findings]
    return table(["", ""], [(subject, finding.strip()) for subject, finding in rows]) if rows else ""


def _configuration(run: RunHistory) -> str:
    """All settings; those that differ from their defaults stand out."""
    if not run.config:
        return ""
    defaults = flatten(Config().to_dict())
    sections: dict[str, list[str]] = {}
    for name, value in run.config.items():
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
    return f'{soft("Settings that differ from their defaults are marked.")}<div class="sections">{tables}</div>'


def _machine(run: RunHistory) -> str:
    facts = run.record.facts
    rows = [(what, figures(run)[what]) for what in ("characters per second", "time")]
    rows += [(name, str(facts[name])) for name in MACHINE if name in facts]
    elsewhere = {*MACHINE, "text", "characters", "parameters"}
    rows += [(name, str(value)) for name, value in facts.items() if name not in elsewhere]
    return table(["", ""], rows)


def _evaluations(run: RunHistory) -> str:
    if not run.evaluations:
        return ""
    heads = ["step", "epoch", "characters", "train, nats", "validation, nats", "bits", "perplexity", "time"]
    rows = []
    for i in spread(len(run.evaluations), MAX_EVALUATIONS):
        row, seen = run.evaluations[i], run.val["characters"][i]
        val, train = number(row, "val_loss"), number(row, "train_loss")
        counts = [f"{number(row, 'step'):,.0f}", f"{number(row, 'epoch'):.2f}", short(seen) if seen > 0 else ""]
        losses = [f"{loss:.4f}" if math.isfinite(loss) else "" for loss in (train, val)]
        rows.append([*counts, *losses, bits(val), f"{perplexity(val):.2f}", duration(number(row, "seconds"))])
    count = len(run.evaluations)
    summary = f"{count:,} evaluations" if count > 1 else "1 evaluation"
    return f"<details><summary>{summary}</summary>{table(heads, rows)}</details>"


def _commands(run: RunHistory) -> str:
    record, changed = run.record, changed_settings(run.config)
    commands = next_commands(run.run, run.config, record.state, record.planned_steps or run.last_step, changed)
    shown = "".join(f"<dt>{escape(what)}</dt><dd><pre>{escape(line)}</pre></dd>" for what, line in commands.items())
    return f'<dl class="commands">{shown}</dl>'
