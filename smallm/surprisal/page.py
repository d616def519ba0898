"""The page of `infer.py --surprise FILE --html PAGE`: the text in its colours, its details and its places."""

from collections.abc import Iterable

from smallm.html.characters import CHARACTERS_STATIC, characters, legend, percent
from smallm.html.escape import escape, visible
from smallm.html.page import page
from smallm.inference.scoring import Perplexity
from smallm.language_model import LanguageModel
from smallm.surprisal.measure import Measured, id_name
from smallm.surprisal.spans import Place

PAGE_CHARACTERS = 200_000  # of a text that a page holds; of what comes after, it has the places alone

HOW_TO_READ = """<p class="soft">Point at a character, or tap it, for what was expected in its place. With the keyboard:
arrow keys go from character to character, n and p to the next place and the one before.</p>"""


class PageText:
    """The beginning of a text, up to PAGE_CHARACTERS."""

    def __init__(self):
        self._parts: list[Measured] = []
        self._left = PAGE_CHARACTERS

    def add(self, part: Measured) -> None:
        """The next part of the text."""
        if self._left:
            self._parts.append(part[: self._left])
            self._left -= len(self._parts[-1].text)

    def measured(self) -> Measured:
        """What is kept."""
        return Measured.join(self._parts)


def surprisal_page(
    model: LanguageModel,
    name: str,
    figures: Perplexity,
    passages: list[Place],
    words: list[Place],
    kept: Measured,
) -> str:
    """A document; `kept` is the beginning of the text, or all of it."""
    total, n = figures.characters + 1, len(kept.text)
    anchors = {place: f"place-{number}" for number, place in enumerate([*passages, *words], start=1)}
    inside = {place: anchor for place, anchor in anchors.items() if place.end <= n}
    body = [f"<h1>What the model did not expect in {escape(name)}</h1>", _figures(model, figures)]
    if passages:
        body.append("<h2>Passages, by the nats that they have above what is usual in the text</h2>")
        body.append(_list(_passage(place, inside.get(place)) for place in passages))
    if words:
        body.append("<h2>Words, by the nats of their most surprising character</h2>")
        body.append(_list(_word(place, inside.get(place)) for place in words))
    if not anchors:
        body.append("<p>No place in it is surprising.</p>")
    body.append("<h2>The text</h2>")
    if n < total:
        body.append(f"<p>This page holds the first {n:,} of its {total:,} characters; of the others, only the places "
                    "above.</p>")  # fmt: skip
    body.append(HOW_TO_READ)
    body.append(legend())
    marked = sorted((place.offset, place.end, anchor) for place, anchor in inside.items())
    body.append(
        characters(
            kept.text, kept.nats, kept.expected, kept.probabilities, lambda id: id_name(model.vocabulary, id), marked
        )
    )
    return page(f"Surprise: {name}", "\n".join(body), (*CHARACTERS_STATIC, "spans.css"))


def summary(model: LanguageModel, figures: Perplexity) -> str:
    """How surprising the whole text is, and the model's own validation text beside it."""
    usual = model.metadata.training.get("val_loss")
    beside = "" if usual is None else f"; the model's own validation text has {usual:.4f}"
    return (
        f"{figures.nats_per_char:.4f} nats per character ({figures.bits_per_char:.4f} bits), over "
        f"{figures.characters:,} characters{beside}"
    )


def _figures(model: LanguageModel, figures: Perplexity) -> str:
    return (
        f"<p>{escape(summary(model, figures))}.</p>\n"
        f'<p class="soft">Each character is predicted from the {model.block_size // 2:,} to {model.block_size:,} ids '
        "before it, or from all that there are. Nats are -ln of the probability that it had.</p>"
    )


def _list(items: Iterable[str]) -> str:
    return '<ol class="spans">\n' + "\n".join(items) + "\n</ol>"


def _passage(place: Place, anchor: str | None) -> str:
    more = "…" if len(place.text) < place.characters else ""
    text = f"{_line(place.before)}<mark>{_line(place.text)}</mark>{more or _line(place.after)}"
    most = f"most at {place.peak.line}:{place.peak.column}, "
    return _item(place.line, place.column, f"{place.excess:,.1f}", anchor, text, most + _instead(place))


def _word(place: Place, anchor: str | None) -> str:
    at = place.peak.offset - place.offset
    before, after = place.before + place.text[:at], place.text[at + 1 :] + place.after
    text = f"{_line(before)}<mark>{_line(place.peak.character)}</mark>{_line(after)}"
    return _item(place.peak.line, place.peak.column, f"{place.peak.nats:.1f}", anchor, text, _instead(place))


def _item(line: int, column: int, value: str, anchor: str | None, text: str, instead: str) -> str:
    where = f"{line}:{column}"
    where = f'<a href="#{anchor}">{where}</a>' if anchor else where
    return (
        f'<li><span class="where">{where}</span> <span class="value">{value}</span>\n'
        f'<span class="excerpt">{text}</span> <span class="soft">{instead}</span></li>'
    )


def _instead(place: Place) -> str:
    """What stands there, and what was expected."""
    names = (f"{_code(name)} {percent(p)}".replace(" ", "\u00a0") for name, p in place.peak.expected)
    return f"{_code(place.peak.character)}; expected: {', '.join(names)}"


def _code(character: str) -> str:
    return f"<code>{'␣' if character == ' ' else _line(character)}</code>"


def _line(text: str) -> str:
    """As HTML, on one line."""
    return escape(visible(text, keep=""))
