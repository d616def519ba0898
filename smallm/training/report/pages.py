"""Pages of one file each: the history of a run, `report.html`, and the comparison of several runs.

The same folder always gives the same page. What a run folder does not hold, such as that of an old run, is left out.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np

from smallm.cli.table import duration
from smallm.html.characters import CHARACTERS_STATIC, characters, legend
from smallm.html.escape import escape
from smallm.html.page import page, save, table
from smallm.inference.scoring import perplexity
from smallm.runs.config_file import flatten
from smallm.runs.metrics import Record
from smallm.runs.next_commands import next_commands
from smallm.training.analysis.baselines import verdict
from smallm.training.config import Config
from smallm.training.report.charts import page_charts, spread
from smallm.training.report.history import RunHistory, number, read_histories
from smallm.training.report.record import Passage

REPORT = "report.html"
MAX_SAMPLES = 40  # in the slider, the first and the last among them
RELOAD_SECONDS = 10  # of the page of a run that still trains
STATES = {
    "training": "unfinished: the run still trains, or was killed",
    "finished": "finished",
    "out of patience": "ended early because the validation loss no longer fell",
    "interrupted": "interrupted; the run can be resumed",
}
LOSS_EXPLAINED = (
    "The loss measures how badly the model predicts the next character: it is the mean surprisal of a character, in "
    "nats. Lower is better. The validation loss is measured on text that the model does not train on. If it rises "
    "while the training loss falls, the model memorises its training text instead of learning what is general in it."
)
ENSEMBLE_EXPLAINED = (
    "{} trained {} models one after another (train.ensemble), so the loss jumps wherever the next model starts. Each "
    "learns from the text and from the models before it; the last one is the result."
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
    save(out, report_page(histories))
    return out


def report_page(runs: Sequence[RunHistory]) -> str:
    """The page of one run, or of several, of which each has a colour and a column."""
    title = " · ".join(run.name for run in runs)
    title = title if len(title) < 90 else f"{len(runs)} runs"
    sections = {
        "Results": _results(runs),
        "Loss": _soft(LOSS_EXPLAINED) + _ensembles(runs) + page_charts(runs),
        "Baselines": _baselines(runs),
        "Samples": _samples(runs),
        "Memorisation": _memorisation(runs),
        "Configuration": _configuration(runs),
    }
    if len(runs) == 1:
        run = runs[0]
        facts = [(name, f"{each:,}" if isinstance(each, int) else str(each)) for name, each in run.record.facts.items()]
        findings = [line.split(maxsplit=1) for line in run.record.findings]  # the first word is the subject
        sections |= {
            "Surprisal": _surprisal(run.record.passage),
            "Text": table(["", ""], findings) if findings else "",
            "Machine and versions": table(["", ""], facts) if facts else "",
            "Commands": _commands(run),
        }
    body = "\n".join(
        f"<section>\n<h2>{name}</h2>\n{content}\n</section>" for name, content in sections.items() if content
    )
    reload = RELOAD_SECONDS if len(runs) == 1 and runs[0].record.state == "training" else 0
    header = f"<header>\n<h1>{escape(title)}</h1>\n{''.join(map(_about, runs))}</header>\n"
    return page(title, header + body, (*CHARACTERS_STATIC, "report.css", "report.js"), reload)


def changed_settings(config: dict[str, object]) -> dict[str, object]:
    """The settings that differ from their defaults; with train.minutes, which would choose the others, all settings."""
    defaults = flatten(Config().to_dict())
    return {key: value for key, value in config.items() if config.get("train.minutes") or value != defaults.get(key)}


# Sections.


def _about(run: RunHistory) -> str:
    """How the run ended, how its model compares with the baselines, and a warning if the loss has risen."""
    record, last = run.record, run.val["loss"][-1:]
    text = f"trained on {record.facts['text']}" if "text" in record.facts else ""
    began = f"started {record.began}" if record.began else ""
    state = " · ".join(filter(None, [run.name, text, STATES.get(record.state, ""), began]))
    model = [one.bits_per_char for one in run.baselines if one.name == "model"]
    others = [one for one in run.baselines if one.name != "model"]
    place = verdict(others, model[0], every="all baselines") if model and others else ""
    words = f"In bits per character, the model {place}." if place else ""
    risen = (
        f"<p>Since step {run.best_step:,} the validation loss has risen to {last[0]:.4f}: the model overfits, that is, "
        "it memorises its training text. More text, <code>--model.dropout 0.2</code> or fewer steps help. The "
        "checkpoint with the lowest validation loss is kept, and is exported.</p>\n"
    ) if len(last) and last[0] > 1.01 * run.best_loss else ""  # fmt: skip
    return f'{_soft(state)}<p class="verdict">{escape(words)}</p>\n{risen}'


def _results(runs: Sequence[RunHistory]) -> str:
    found = [_figures(run) for run in runs]
    texts = {values["text"] for values in found} - {""}
    note = _soft("The runs used different texts, so their losses cannot be compared.") if len(texts) > 1 else ""
    names = list(found[0])
    return note + _columns(runs, found, best=names[:3])


def _figures(run: RunHistory) -> dict[str, str]:
    """The most important figures of a run, by their names; empty strings where they are unknown."""
    best, facts, known = run.best_loss, run.record.facts, math.isfinite(run.best_loss)
    of = f" of {run.record.planned_steps:,}" if run.record.planned_steps else ""
    usage = {}
    if np.isfinite(mfu := run.train["mfu"]).any():
        usage["MFU"] = f"{100 * np.nanmedian(mfu):.0f} %"
    if np.isfinite(memory := run.train["memory_bytes"]).any():
        usage["memory"] = f"{np.nanmax(memory) / 1e9:.2f} GB"
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
        **usage,
        "device": str(facts.get("device", "")),
    }


def _ensembles(runs: Sequence[RunHistory]) -> str:
    """Why the curves of some runs have jumps."""
    sizes = {run.name if len(runs) > 1 else "This run": run.config.get("train.ensemble") for run in runs}
    return "".join(_soft(ENSEMBLE_EXPLAINED.format(name, size)) for name, size in sizes.items()
                   if isinstance(size, int) and size > 1)  # fmt: skip


def _baselines(runs: Sequence[RunHistory]) -> str:
    """Bits per character of the model, compressors and the n-gram model; for one run also how each was measured."""
    if not any(run.baselines for run in runs):
        return ""
    what = _soft("Bits per character of the validation text, beside simpler ways to predict it. Lower is better.")
    if len(runs) > 1:
        return what + _columns(runs, [{one.name: f"{one.bits_per_char:.3f}" for one in run.baselines} for run in runs])
    ordered = sorted(runs[0].baselines, key=lambda one: one.bits_per_char)
    rows = [(one.name, f"{one.bits_per_char:.3f}", one.how) for one in ordered]
    return what + table(["", "bits per character", "how it was measured"], rows)


def _samples(runs: Sequence[RunHistory]) -> str:
    """Samples of the whole run; of several runs the last of each."""
    found = [(run.name, sample) for run in runs for sample in (run.samples if len(runs) == 1 else run.samples[-1:])]
    chosen = spread(len(found), MAX_SAMPLES if len(runs) == 1 else len(runs))
    more = _soft(f"{MAX_SAMPLES} of {len(found)} samples; all of them are in metrics.jsonl.")
    shown = "".join(_sample(name, *sample) for name, sample in (found[i] for i in chosen))
    kind = "history" if len(runs) == 1 else "samples"  # report.js turns a history into a slider
    return f'<div class="{kind}">{shown}</div>{more if len(chosen) < len(found) else ""}' if found else ""


def _sample(name: str, row: Record, text: str) -> str:
    title = f"{name}, step {number(row, 'step'):,.0f}, {number(row, 'val_loss'):.3f} nats"
    return f'<figure><figcaption>{escape(title)}</figcaption><pre class="sample">{escape(text)}</pre></figure>'


def _memorisation(runs: Sequence[RunHistory]) -> str:
    tables = [run.record.memorisation for run in runs]
    if not any(tables):
        return ""
    if len(runs) == 1:
        return _soft(MEMORISATION_EXPLAINED) + table(["", "samples", "validation text"], tables[0])
    found = [{row[0]: row[1] for row in rows if len(row) > 1} for rows in tables]
    return _soft(MEMORISATION_EXPLAINED) + _columns(runs, found)


def _configuration(runs: Sequence[RunHistory]) -> str:
    """All settings of a run, or those in which several runs differ; with the default where a run differs from it."""
    if not any(run.config for run in runs):
        return ""
    defaults = flatten(Config().to_dict())
    names = [name for name in defaults | {key: None for run in runs for key in run.config}
             if len({str(run.config.get(name)) for run in runs}) > 1 or len(runs) == 1]  # fmt: skip
    rows = []
    for name in names:
        values = [run.config.get(name, "") for run in runs]
        default = defaults.get(name, "")
        rows.append([name, *map(_setting, values), "" if {*map(str, values)} == {str(default)} else _setting(default)])
    heads = ["", *(run.name for run in runs), "default, if it differs"]
    return table(heads, rows) if rows else _soft("All runs have the same settings.")


def _setting(value: object) -> str:
    """A value of the configuration as TOML spells it."""
    return repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _surprisal(passage: Passage) -> str:
    """A passage of the validation text, coloured by surprisal; the candidates are passed by index."""
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


def _commands(run: RunHistory) -> str:
    record, changed = run.record, changed_settings(run.config)
    commands = next_commands(run.run, run.config, record.state, record.planned_steps or run.last_step, changed)
    shown = ""
    for what, line in commands.items():
        words = " ".join(f"<span>{escape(word)}</span>" for word in line.split(" "))  # lines do not break in "--flags"
        shown += f"<dt>{escape(what)}</dt><dd><pre>{words}</pre></dd>"
    return f'<dl class="commands">{shown}</dl>'


def _columns(runs: Sequence[RunHistory], values: Sequence[dict[str, str]], best: Sequence[str] = ()) -> str:
    """A table with a column for each run, of the values of the runs by their names; missing values are blank.

    best: names of the rows in which the lowest value is marked.
    """
    heads = "".join(f'<th scope="col"><i class="swatch c{i % 8}"></i>{escape(run.name)}</th>'
                    for i, run in enumerate(runs))  # fmt: skip
    rows = []
    for name in dict.fromkeys(chain(*values)):
        row = [found.get(name, "") for found in values]
        lowest = min(filter(None, row), key=float, default=None) if name in best and len(runs) > 1 else None
        cells = "".join(f'<td class="{"best" if value == lowest else ""}">{escape(value)}</td>' for value in row)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table class="runs"><thead><tr><td></td>{heads}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _soft(text: str) -> str:
    """A paragraph of explanation, in a softer colour."""
    return f'<p class="soft">{escape(text)}</p>'
