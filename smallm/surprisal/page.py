"""A page with a text coloured by surprisal, the details of each character, and the most surprising spans."""

from collections.abc import Iterable, Mapping
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
        body.append(_list(passages, inside, are_words=False))
    if words:
        body.append("<h2>Words, by the nats of their most surprising character</h2>")
        body.append(_list(words, inside, are_words=True))
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
    beside = "" if usual is None else f"; the model's own validation text has {usual:.4f}"
    return (
        f"{figures.nats_per_char:.4f} nats per character ({figures.bits_per_char:.4f} bits), over "
        f"{figures.characters:,} characters{beside}"
    )


def _list(spans: Iterable[Span], anchors: Mapping[Span, str], are_words: bool) -> str:
    """A list of passages, each shown whole, or of words, each with the character at its peak marked."""
    items = []
    for span in spans:
        at, peak, place, value = span.peak.offset - span.offset, span.peak, f"{span.line}:{span.column}", span.excess
        before, marked, after = span.before, span.text, "…" if len(span.text) < span.characters else span.after
        alternatives = f"most at {peak.line}:{peak.column}, {_alternatives(span)}"
        if are_words:
            place, value, alternatives = f"{peak.line}:{peak.column}", peak.nats, _alternatives(span)
            before, marked, after = before + span.text[:at], peak.character, span.text[at + 1 :] + span.after
        where = f'<a href="#{anchors[span]}">{place}</a>' if span in anchors else place
        items.append(
            f'<li><span class="where">{where}</span> <span class="value">{value:,.1f}</span>\n'
            f'<span class="excerpt">{_line(before)}<mark>{_line(marked)}</mark>{_line(after)}</span> '
            f'<span class="soft">{alternatives}</span></li>\n'
        )
    return f'<ol class="spans">\n{"".join(items)}</ol>'


def _alternatives(span: Span) -> str:
    """The character at the peak, and the characters that the model expected."""
    names = (f"{_code(name)} {percent(p)}".replace(" ", "\u00a0") for name, p in span.peak.expected)
    return f"{_code(span.peak.character)}; expected: {', '.join(names)}"


def _code(character: str) -> str:
    return f"<code>{'␣' if character == ' ' else _line(character)}</code>"


def _line(text: str) -> str:
    """The text as HTML on one line."""
    return escape(visible(text, keep=""))
