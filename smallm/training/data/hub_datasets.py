"""Texts of the Hugging Face hub, read as a stream with the package `datasets` and stored as JSON lines in the cache."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from smallm.errors import UserError, missing_package
from smallm.tokenizer.text_files import text_of_record
from smallm.training.cache import digest, unfinished_file
from smallm.training.output import Output

PREFIX = "hf:"


def stored_dataset(name: str, field: str, cache: Path) -> Path:
    """A file of JSON lines with the texts of a dataset, in `field`; a dataset whose file exists is not loaded again.

    name: hf:NAME[:CONFIG[:SPLIT]][#COLUMN]; the split is "train" by default, the column `field`.
    Raises `UserError` if `datasets` is missing, and for a dataset or a column that cannot be read.
    """
    place, _, column = name.removeprefix(PREFIX).partition("#")
    path, config, split, *more = (*place.split(":"), "", "")
    if not path or any(more):
        raise UserError(f"{name!r:.80} is not of the form hf:NAME[:CONFIG[:SPLIT]][#COLUMN]; correct --data")
    column, split = column or field, split or "train"
    file = cache / "hf" / f"{digest([path, config, split, column, field])[:16]}.jsonl"
    if not file.is_file():
        with unfinished_file(file.parent) as unfinished:
            with unfinished.open("w", encoding="utf-8") as lines:
                for text in _texts(name, path, config, split, column):
                    lines.write(json.dumps({field: text}, ensure_ascii=False) + "\n")
            unfinished.replace(file)
        print(f"text   {name} is stored in {file}; delete this file to load the dataset again", file=Output("stderr"))
    return file


def _texts(name: str, path: str, config: str, split: str, column: str) -> Iterator[str]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise missing_package(name, "datasets", "datasets") from None
    try:
        records = datasets.load_dataset(path, config or None, split=split, streaming=True)
        bar = tqdm(records, desc="loading", unit=" texts", leave=False, disable=None, file=Output("stderr"))
        for number, record in enumerate(bar, 1):
            yield text_of_record(record, name, number, column)
    except UserError:
        raise
    except Exception as error:  # of the network, the hub or the dataset: the advice is the same
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name} could not be loaded ({reason:.200}); check its name and configuration, or pass a text "
                        "with --data FILE") from None  # fmt: skip
