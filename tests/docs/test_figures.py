"""A loss stands in one place, the table of recipes in benchmarks/README.md; all other texts only quote this table."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
NUMBER = r"\d+\.\d+"
QUOTE = re.compile(rf"({NUMBER})(?: (?:to|and|or) ({NUMBER}))? nats")
MEAN_RANGE = re.compile(rf"mean of[^(.]*\(({NUMBER}) to ({NUMBER})\)")
REFERENCE = "nanoGPT"


def recipes() -> dict[str, list[str]]:
    """Config -> the losses that benchmarks/README.md gives for it; none if it was not measured."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- recipes -->")[1].split("<!-- /recipes -->")[0]
    losses: dict[str, list[str]] = {}
    for line in table.strip().splitlines()[2:]:
        name, _, loss, *_ = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        losses[name] = re.findall(NUMBER, loss)
    return losses


def quotes(text: str) -> list[str]:
    """The numbers before the word "nats" in a text, and the range after a mean: `1.420 to 1.430 nats` gives two."""
    text = " ".join(text.split())
    return [number for pattern in (QUOTE, MEAN_RANGE) for match in pattern.findall(text) for number in match if number]


def agrees(quote: str, losses: list[str]) -> bool:
    """Whether a quote is one of the losses, rounded to the decimals of the quote."""
    decimals = len(quote.split(".")[1])
    return any(f"{float(loss):.{decimals}f}" == quote for loss in losses)


def wrong_quotes(text: str, config: str) -> list[str]:
    """The quotes in a text about one config that are neither its losses nor those of nanoGPT, the reference."""
    table = recipes()
    references = [loss for name, losses in table.items() if name.startswith(REFERENCE) for loss in losses]
    return [quote for quote in quotes(text) if not agrees(quote, table[config] + references)]


def header(config: Path) -> str:
    lines = config.read_text(encoding="utf-8").split("\n[")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines)


def test_every_config_has_a_row():
    assert {path.stem for path in CONFIGS} == {name for name in recipes() if not name.startswith(REFERENCE)}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_header_quotes_the_table(config):
    text, losses = header(config), recipes()[config.stem]
    assert wrong_quotes(text, config.stem) == []
    if losses:
        assert all(any(agrees(quote, [loss]) for quote in quotes(text)) for loss in losses), "a loss is missing"
    else:
        assert re.search("not (been )?measured", text)


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_rows_about_a_config_quote_the_table(page):
    rows = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    names = {path.stem for path in CONFIGS}
    found = [(row, name) for row in rows for name in re.findall(r"[\w-]+", row.replace("`", " ")) if name in names]
    assert len(found) >= 4
    for row, name in found:
        assert wrong_quotes(row, name) == [], row


def test_quotes_are_found_and_compared():
    assert quotes("Expect 1.420 to 1.430\nnats per character; the mean of 3 seeds (1.515 to 1.525), 1.52 nats") == [
        "1.420", "1.430", "1.52", "1.515", "1.525",
    ]  # fmt: skip
    assert agrees("1.28", ["1.2753"])
    assert agrees("1.275", ["1.2753"])
    assert not agrees("1.27", ["1.2753"])
    assert not agrees("1.20", ["1.2753"])
    assert wrong_quotes("1.18 nats, nanoGPT has 1.4697 nats", "quickstart") == []
    assert wrong_quotes("Expect 1.20 nats", "quickstart") == ["1.20"]
