"""A page with a text coloured by surprisal, the details of each character, and the most surprising spans."""

from collections.abc import Iterable
from functools import partial

from smallm.html.characters import CHARACTERS_STATIC, characters, legend, percent
from smallm.html.escape import escape, visible
from smallm.html.page import page
from smallm.inference.scoring import Perplexity
from smallm.language_model import LanguageModel
from smallm.surprisal.measure import Measured, id_name
from smallm.surprisal.spans import Span

PAGE_CHARACTERS = 200_000  # at the beginning of a text that a page shows; of the rest it lists the spans only

HOW_TO_READ = """<p class="soft">Point at a character, or tap it, to see which characters the model expected here. With
the keyboard: the arrow keys move by one character, n and p to the next and the previous marked span.</p>"""


def surprisal_page(
    model: LanguageModel,
    name: str,
    figures: Perplexity,
    passages: list[Span],
    words: list[Span],
    stored: Measured,
) -> str:
    """The page as HTML.

    name: of the text. figures: of the whole text. stored: the beginning of the text, or all of the text.
    """
    total, n = figures.characters + 1, len(stored.text)
    anchors = {span: f"span-{number}" for number, span in enumerate([*passages, *words], start=1)}
    inside = {span: anchor for span, anchor in anchors.items() if span.end <= n}
    body = [
        f"<h1>What the model did not expect in {escape(name)}</h1>",
        f"<p>{escape(summary(model, figures))}.</p>",
        f'<p class="soft">Each character is predicted from the {model.block_size // 2:,} to {model.block_size:,} '
        "ids before it, or from all of them near the beginning. Nats are -ln of the probability that the model gave "
        "it.</p>",
    ]
    if passages:
        body.append("<h2>Passages, by nats above the usual surprisal of the text</h2>")
        body.append(_list(_passage(span, inside.get(span)) for span in passages))
    if words:
        body.append("<h2>Words, by the nats of their most surprising character</h2>")
        body.append(_list(_word(span, inside.get(span)) for span in words))
    if not anchors:
        body.append("<p>No span of the text is surprising.</p>")
    body.append("<h2>The text</h2>")
    if n < total:
        body.append(f"<p>This page holds the first {n:,} of its {total:,} characters; of the rest it lists only "
                    "the spans above.</p>")  # fmt: skip
    marked = sorted((span.offset, span.end, anchor) for span, anchor in inside.items())
    name_of = partial(id_name, model.vocabulary)
    text = characters(stored.text, stored.nats, stored.expected, stored.probabilities, name_of, marked)
    body += [HOW_TO_READ, legend(), text]
    return page(f"Surprisal: {name}", "\n".join(body), (*CHARACTERS_STATIC, "spans.css"))


def summary(model: LanguageModel, figures: Perplexity) -> str:
    """The figures of the text in one line, with the loss on the model's own validation text for comparison."""
    usual = model.metadata.training.get("val_loss")
    beside = "" if not isinstance(usual, int | float) else f"; the model's own validation text has {usual:.4f}"
    return (
        f"{figures.nats_per_char:.4f} nats per character ({figures.bits_per_char:.4f} bits), over "
        f"{figures.characters:,} characters{beside}"
    )


def _list(items: Iterable[str]) -> str:
    return '<ol class="spans">\n' + "\n".join(items) + "\n</ol>"


def _passage(span: Span, anchor: str | None) -> str:
    more = "…" if len(span.text) < span.characters else ""
    text = f"{_line(span.before)}<mark>{_line(span.text)}</mark>{more or _line(span.after)}"
    most = f"most at {span.peak.line}:{span.peak.column}, "
    return _item(span.line, span.column, f"{span.excess:,.1f}", anchor, text, most + _alternatives(span))


def _word(span: Span, anchor: str | None) -> str:
    at = span.peak.offset - span.offset
    before, after = span.before + span.text[:at], span.text[at + 1 :] + span.after
    text = f"{_line(before)}<mark>{_line(span.peak.character)}</mark>{_line(after)}"
    return _item(span.peak.line, span.peak.column, f"{span.peak.nats:.1f}", anchor, text, _alternatives(span))


def _item(line: int, column: int, value: str, anchor: str | None, text: str, alternatives: str) -> str:
    where = f"{line}:{column}"
    where = f'<a href="#{anchor}">{where}</a>' if anchor else where
    return (
        f'<li><span class="where">{where}</span> <span class="value">{value}</span>\n'
        f'<span class="excerpt">{text}</span> <span class="soft">{alternatives}</span></li>'
    )


def _alternatives(span: Span) -> str:
    """The character at the peak, and the characters that the model expected."""
    names = (f"{_code(name)} {percent(p)}".replace(" ", "\u00a0") for name, p in span.peak.expected)
    return f"{_code(span.peak.character)}; expected: {', '.join(names)}"


def _code(character: str) -> str:
    return f"<code>{'␣' if character == ' ' else _line(character)}</code>"


def _line(text: str) -> str:
    """The text as HTML on one line."""
    return escape(visible(text, keep=""))
