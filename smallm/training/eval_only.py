"""`train.py --eval-only RUN`: the loss of a checkpoint on a text, measured by all processes, without training."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from smallm.errors import UserError
from smallm.inference.scoring import Perplexity
from smallm.runs.cache_folder import cache_folder
from smallm.runs.layout import validation_text
from smallm.training.checkpoint import format as checkpoint
from smallm.training.checkpoint.manager import find_checkpoint
from smallm.training.checkpoint.safe_load import check_fits
from smallm.training.data.source import find_source
from smallm.training.devices import build_accelerator
from smallm.training.evaluate import evaluate
from smallm.training.output import Output
from smallm.training.request import PRECISIONS
from smallm.training.run import report_first_failure, with_stored_input


def evaluate_only(run: Path, settings: dict[str, Any], as_json: bool) -> None:
    """Prints nats, bits and perplexity per character on stdout, by the protocol of the run's own evaluations.

    run: a run, whose best checkpoint is used, or a checkpoint. settings: `source`, `encoding` (default: utf-8) and
    `field` of the text, as in `DataConfig`; without a source, the run's validation text is measured. as_json: print a
    JSON object. Raises `UserError`.
    """
    folder = find_checkpoint(run)
    state, config = checkpoint.read_state(folder)
    vocabulary = checkpoint.load_vocabulary(folder)
    check_fits(folder / "model.safetensors", config.model, vocabulary.size)
    accelerator = build_accelerator(config.train, PRECISIONS.get(str(state.facts.get("precision")), ""))
    with report_first_failure(accelerator):
        given = {"source": str(validation_text(folder)), "encoding": "utf-8", "weights": ()} | settings
        if isinstance(given["source"], list):
            given["source"] = tuple(given["source"])
        text = find_source(with_stored_input(accelerator, replace(config.data, **given)), cache_folder())
        characters, ids = 0, [np.empty(0, np.int64)]
        for piece in text.pieces("reading", progress=accelerator.is_main_process):
            characters += len(piece)
            ids.append(vocabulary.encode(piece))
        if characters < 2:
            raise UserError(f"the text has {characters} character(s); perplexity needs at least 2")
        model = checkpoint.load_model(folder, accelerator.device)
        with accelerator.autocast():
            loss = evaluate(accelerator, model, np.concatenate(ids), characters, model.config.block_size)
    assert loss is not None  # nothing interrupts the evaluation
    found = Perplexity.of(loss * (characters - 1), characters - 1)
    if accelerator.is_main_process:
        values = {"checkpoint": str(folder), "text": text.name, "step": state.step, **asdict(found)}
        line = json.dumps(values) if as_json else f"{folder}, on {text.name}: {found}"
        print(line, file=Output("stdout"), flush=True)
