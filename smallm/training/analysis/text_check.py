"""The text check: what the statistics of a text mean for training, and what to do; `train.py --check TEXT`."""

import unicodedata
from collections.abc import Iterator

from smallm.training.analysis.baselines import measure_baselines
from smallm.training.analysis.text_statistics import CONTROLS, LEAK_WIDTH, RARE, TextStatistics, compute_statistics
from smallm.training.config import Config
from smallm.training.data.corpus import Corpus, open_corpus

LEAK, REPEATED = 0.04, 0.1  # shares that are worth a warning; turns of phrase alone make up some percent
BINARY = 0.01  # share of control characters above which a file is not text
UNSEEN = 0.001
SORTED = 0.95  # share of the lines
TAIL_DISTANCE, TAIL_BITS = 1.4, 1.03  # standard deviations, and factor, by which the end of a text is harder to predict
MIN_LINES = 100
LONG_LINE = 10_000  # characters
SHORT_TEXT = 50_000  # characters of a training part that any useful model soon memorises
MISREAD = 5  # pairs; fewer may be intended
EXAMPLE = 40  # characters of an example


def check(config: Config) -> int:
    """Prints the report on stdout and returns 0. Raises `UserError` for a text that cannot be read."""
    corpus = open_corpus(config.data, seed=config.train.seed)
    print(*report_lines(corpus, compute_statistics(corpus)), sep="\n", flush=True)
    figures = ", ".join(f"{one.name} {one.bits_per_char:.3f}" for one in measure_baselines(corpus))
    print(f"beat     {figures}: bits per character of the validation text; a useful model needs fewer")
    return 0


def summary_lines(statistics: TextStatistics, split: str = "tail") -> list[str]:
    """For the start of training: the warnings, or one line that no problem was found. split: as `data.split`."""
    lines = warnings(statistics, split) or [f"{_characters(statistics)}; no problems found"]
    return [f"check  {line}" for line in lines]


def report_lines(corpus: Corpus, statistics: TextStatistics) -> list[str]:
    """The full report: the statistics and all warnings."""
    s, problems = statistics, warnings(statistics, corpus.split)
    lines = s.crlf + s.lf
    sample = "" if s.characters_read == s.train_characters else f"; {s.characters_read:,} of the former were read"
    kinds = [f"{number:,} {kind}" for kind, number in (("LF", s.lf), ("CR LF", s.crlf), ("CR", s.cr)) if number]
    rare = f"{100 * s.rare_share:.2g} % of the text: {_quoted(s.rare)}" if s.rare else "none"
    most = f"; most frequent: {_quoted(s.repeated_most)} ({s.repeated_times:,} times)" if s.repeated_times > 1 else ""
    return [
        f"text     {corpus.name}: {s.characters:,} characters, {lines:,} lines",
        f"parts    {s.train_characters:,} characters to train on, {corpus.val_characters:,} to validate on{sample}",
        f"letters  {_characters(s)}; vocabulary of {corpus.vocabulary.size:,} ids",
        f"rare     characters that occur fewer than {RARE} times: {rare}",
        f"lines    line ends: {', '.join(kinds) or 'none'}; longest line: {_longest(s)} characters "
        f"(line {s.longest_line_number:,})",
        f"repeats  {_percent(s.repeated)} of the training text repeats an earlier part of it{most}",
        f"leak     {_percent(s.leak)} of the validation text also occurs in the training text "
        f"(passages of {LEAK_WIDTH} characters or more; {s.leak_characters:,} characters compared)",
        *(f"warning  {line}" for line in problems),
        *([] if problems else ["result   no problems found"]),
    ]


def warnings(statistics: TextStatistics, split: str = "tail") -> list[str]:
    """The problems of a text, one line each: what was found, what follows from it, what to do. Most severe first.

    split: as `data.split`.
    """
    s = statistics
    return [*_reading_problems(s), *_loss_problems(s), *_split_problems(s, split), *_length_problems(s),
            *_style_problems(s)]  # fmt: skip


def _reading_problems(s: TextStatistics) -> Iterator[str]:
    """Signs that the file is not the intended text or was decoded wrongly."""
    controls = sum(s.controls.values())
    if controls > BINARY * s.characters:
        yield (
            f"{_percent(controls / s.characters)} of the text are control characters, so the file is probably binary; "
            "save it as plain text, or pass the right --encoding"
        )
    elif controls:
        kinds = ", ".join(f"{number:,} {name}" for name, number in list(s.controls.items())[:3])
        yield f"{controls:,} control characters ({kinds}); the model will learn to write them, so remove stray ones"
    if s.replacements:
        yield (
            f"{s.replacements:,} replacement characters (U+FFFD): an earlier conversion lost the original characters; "
            "convert the original file again"
        )
    if s.misread >= MISREAD:
        yield (
            f"{s.misread:,} pairs such as 'Ã©': UTF-8 was probably read as Latin-1 or cp1252; check --encoding, or "
            "convert the original file again"
        )
    if s.byte_order_marks:
        yield (
            f"{s.byte_order_marks:,} byte-order mark(s) (U+FEFF) within the text, which the model would learn as "
            "characters; delete them"
        )


def _loss_problems(s: TextStatistics) -> Iterator[str]:
    """Reasons why the validation loss is misleading."""
    if s.leak >= LEAK:
        yield (
            f"{_percent(s.leak)} of the validation text also occurs word for word in the training text, for example "
            f"{_quoted(s.leak_example)}: the validation loss will look better than the model is; "
            "remove duplicates from the text"
        )
    if s.repeated >= REPEATED:
        example = f", for example {_quoted(s.repeated_most)}" if s.repeated_most else ""
        yield (
            f"{_percent(s.repeated)} of the training text repeats an earlier part of it{example}: "
            "the model will memorise these passages; remove duplicates unless the repetition is intended"
        )


def _split_problems(s: TextStatistics, split: str) -> Iterator[str]:
    """Signs that the validation part is of another kind than the training part."""
    remedy = "; add --data.split blocks to measure on parts of the whole text" if split == "tail" else ""
    part = "the end, on which the loss is measured," if split == "tail" else "the validation text"
    if s.unseen_share >= UNSEEN:
        yield (
            f"{_percent(s.unseen_share)} of the validation text are characters that never occur in the training text "
            f"({_quoted(s.unseen)}): {part} differs from the rest{remedy}"
        )
    elif s.sorted_lines >= SORTED and s.lf >= MIN_LINES and split == "tail":
        yield (
            f"{_percent(s.sorted_lines)} of the lines are in alphabetical order, so the end, on which the loss is "
            f"measured, has other words than the rest{remedy}, or shuffle the lines"
        )
    elif s.tail_distance >= TAIL_DISTANCE and s.tail_bits >= TAIL_BITS * s.middle_bits:
        yield (
            f"{part} differs from the rest: an n-gram model needs {s.tail_bits:.2f} bits per character there and "
            f"{s.middle_bits:.2f} elsewhere{remedy}"
        )


def _length_problems(s: TextStatistics) -> Iterator[str]:
    if s.train_characters < SHORT_TEXT:
        yield (
            f"only {s.train_characters:,} characters to train on: the model will soon memorise them; "
            "more text helps most; with --minutes a model of suitable size is chosen"
        )


def _style_problems(s: TextStatistics) -> Iterator[str]:
    """Accidental properties that the model would imitate."""
    if s.crlf or s.cr:
        kinds = {"CR LF": s.crlf, "LF": s.lf, "CR": s.cr}
        used = [f"{number:,} {kind}" for kind, number in kinds.items() if number > 0]
        found = "line ends are mixed" if len(used) > 1 else "line ends are not LF"
        yield f"{found} ({', '.join(used)}); the model would imitate them, and --data.newlines lf converts them to LF"
    if s.decomposed:
        yield (
            f"{s.decomposed:,} accented letters are written as letter and accent (NFD): the text is longer "
            "than needed, and most prompts are typed otherwise; --data.normalise nfc makes each of them one character"
        )
    if s.longest_line > LONG_LINE:
        found = f"line {s.longest_line_number:,} is very long" if s.crlf + s.lf else "the text has no line ends"
        yield f"{found} ({_longest(s)} characters); this is harmless if intended, otherwise check the file"


def _characters(s: TextStatistics) -> str:
    """For example `65 distinct characters, Latin`."""
    main = {name: share for name, share in s.scripts.items() if share >= 0.001}
    scripts = [f"{name} {_percent(share)}" if share < 0.995 else name for name, share in main.items()]
    return f"{s.distinct:,} distinct characters, {', '.join(scripts) or 'no letters'}"


def _longest(s: TextStatistics) -> str:
    """The length of the longest line, of which only a part may have been read."""
    return f"{'' if s.characters_read == s.train_characters else 'at least '}{s.longest_line:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 or not share else "less than 0.1 %"


def _quoted(text: str) -> str:
    """An example, safe on one line of a terminal."""
    short = text.strip(" \n")[:EXAMPLE]
    return "'" + "".join(c if c.isprintable() and ord(c) not in CONTROLS else _escaped(c) for c in short) + "'"


def _escaped(character: str) -> str:
    return ascii(character)[1:-1] if unicodedata.category(character) != "Zs" else " "
