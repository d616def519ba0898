"""What the text doctor's findings mean for a run, and what to do about them."""

import unicodedata
from collections.abc import Iterator

from smallm.training.analysis.text_statistics import CONTROLS, LEAK_WIDTH, RARE, Checkup
from smallm.training.data.corpus import Corpus

LEAK, REPEATED = 0.04, 0.1  # shares from which on they are worth a warning: turns of phrase make up some percent
BINARY = 0.01  # share of control characters that no text has
UNSEEN = 0.001
LONG_LINE = 10_000  # characters
SHORT_TEXT = 50_000  # characters to learn, that a model of any use knows by heart soon
MISREAD = 5  # pairs; fewer may be meant
SHOWN = 40  # characters of an example


def opening_lines(checkup: Checkup) -> list[str]:
    """For the start of a training: one line for a healthy text, else one for each thing that is wrong."""
    return [f"check  {line}" for line in warnings(checkup) or [f"{_characters(checkup)}; nothing wrong found"]]


def full_report(corpus: Corpus, checkup: Checkup) -> list[str]:
    """For `--check`: everything, and what to do."""
    c, wrong = checkup, warnings(checkup)
    lines = c.crlf + c.lf
    looked = "" if c.looked_at == c.train_characters else f"; looked at {c.looked_at:,} of those, evenly spread"
    kinds = [f"{number:,} {kind}" for kind, number in (("LF", c.lf), ("CR LF", c.crlf), ("CR", c.cr)) if number]
    rare = f"{100 * c.rare_share:.2g} % of the text: {_shown(c.rare)}" if c.rare else "none"
    repeats = f", most often {_shown(c.repeated_most)} ({c.repeated_times:,} times)" if c.repeated_times > 1 else ""
    return [
        f"text     {corpus.name}: {c.characters:,} characters, {lines:,} lines",
        f"parts    {c.train_characters:,} characters to learn, {corpus.val_characters:,} to validate{looked}",
        f"letters  {_characters(c)}; {corpus.vocabulary.size:,} ids",
        f"rare     characters seen fewer than {RARE} times: {rare}",
        f"lines    ends: {', '.join(kinds) or 'none'}; the longest has {c.longest_line:,} characters "
        f"(line {c.longest_line_number:,})",
        f"repeats  {_percent(c.repeated)} of the training part stood in it before{repeats}",
        f"leak     {_percent(c.leak)} of the validation tail stands in the training part "
        f"({LEAK_WIDTH} characters or more together; {c.leak_characters:,} were looked for)",
        *(f"warning  {line}" for line in wrong),
        *([] if wrong else ["result   nothing wrong found"]),
    ]


def warnings(checkup: Checkup) -> list[str]:
    """What is wrong, what it means and what to do: a line each, the gravest first."""
    return [line for group in (_about_reading, _about_losses, _about_writing) for line in group(checkup)]


def _about_reading(c: Checkup) -> Iterator[str]:
    """Signs that this is not the text that was meant."""
    controls = sum(c.controls.values())
    if c.controls.get("U+0000", 0) > c.characters / 8:
        yield (
            f"{_percent(c.controls['U+0000'] / c.characters)} of the text are NUL characters: it is UTF-16 or binary; "
            "try --encoding utf-16-le or utf-16-be"
        )
    elif controls > BINARY * c.characters:
        yield (
            f"{_percent(controls / c.characters)} of the text are control characters: it looks like a binary file, "
            "which gives no text to learn; save the text alone, or give the right --encoding"
        )
    elif controls:
        kinds = ", ".join(f"{number:,} {name}" for name, number in list(c.controls.items())[:3])
        yield f"{controls:,} control characters ({kinds}): the model may write them; remove them if they mean nothing"
    if c.damaged:
        yield (
            f"{c.damaged:,} replacement characters (U+FFFD): an earlier conversion lost what stood there; "
            "go back to the original text"
        )
    if c.misread >= MISREAD:
        yield (
            f"{c.misread:,} pairs such as 'Ã©': this looks like UTF-8 that was read as Latin-1 or cp1252; "
            "check --encoding, or go back to the original text"
        )
    if c.marks:
        yield (
            f"{c.marks:,} byte order mark(s), which the model would learn as characters; "
            "--encoding utf-8-sig leaves out the one at the beginning of each file"
        )


def _about_losses(c: Checkup) -> Iterator[str]:
    """What makes the loss say something else than one thinks."""
    if c.leak >= LEAK:
        yield (
            f"{_percent(c.leak)} of the validation tail stands word for word in the training part, such as "
            f"{_shown(c.leak_example)}: the validation loss looks better than the model is; "
            "remove the repeats from the text"
        )
    if c.repeated >= REPEATED:
        example = f", such as {_shown(c.repeated_most)}" if c.repeated_most else ""
        yield (
            f"{_percent(c.repeated)} of the training part are repeats of what stood before{example}: "
            "the model will know them by heart; leave them if that is the text's nature, else remove the copies"
        )
    if c.unseen_share >= UNSEEN:
        yield (
            f"{_percent(c.unseen_share)} of the validation tail are characters that the training part never has "
            f"({_shown(c.unseen)}): the end is another kind of text; mix the parts before joining them"
        )
    if c.train_characters < SHORT_TEXT:
        yield (
            f"{c.train_characters:,} characters to learn are few: the model will soon know them by heart; "
            "--minutes 1 chooses a model for that, and more text helps most"
        )


def _about_writing(c: Checkup) -> Iterator[str]:
    """What the model would learn though nobody wants it."""
    if c.crlf or c.cr:
        kinds = {"CR LF": c.crlf, "LF": c.lf, "CR": c.cr}
        used = [f"{number:,} {kind}" for kind, number in kinds.items() if number > 0]
        what = f"line ends are mixed ({', '.join(used)})" if len(used) > 1 else f"all {used[0]} line ends are not LF"
        yield f"{what}: the model learns to write them so; --data.newlines lf makes all of them LF"
    if c.decomposed and c.composed:
        yield (
            f"the same letters are written in two ways: {c.composed:,} as one character (NFC), {c.decomposed:,} with "
            "the accent apart (NFD); --data.normalise nfc makes all of them one character"
        )
    elif c.decomposed:
        yield (
            f"{c.decomposed:,} letters have their accent apart (NFD): more characters to learn, and prompts are seldom "
            "typed so; --data.normalise nfc makes them one character"
        )
    if c.longest_line > LONG_LINE:
        alone = "there are no line ends" if not c.crlf + c.lf else f"line {c.longest_line_number:,} is very long"
        yield f"{alone} ({c.longest_line:,} characters): if that is no accident it does no harm, else check the file"


def _characters(c: Checkup) -> str:
    """`65 distinct characters, Latin`."""
    main = {name: share for name, share in c.scripts.items() if share >= 0.001}
    main = [f"{name} {_percent(share)}" if share < 0.995 else name for name, share in main.items()]
    return f"{c.distinct:,} distinct characters, {', '.join(main) or 'no letters'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 or not share else "less than 0.1 %"


def _shown(text: str) -> str:
    """An example, safe on one line of a terminal."""
    short = text.strip(" \n")[:SHOWN]
    return "'" + "".join(c if c.isprintable() and ord(c) not in CONTROLS else _name(c) for c in short) + "'"


def _name(character: str) -> str:
    return ascii(character)[1:-1] if unicodedata.category(character) != "Zs" else " "
