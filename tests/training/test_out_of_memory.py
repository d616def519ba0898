"""A device that runs out of memory gets smaller micro-batches of the same batch."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toys import message

from smallm.training import cli, trainer
from smallm.training.model.transformer import TransformerLanguageModel

TOY = ["--model.n_layer=1", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=16", "--train.batch_size=12",
       "--train.max_steps=6", "--train.eval_every=6", "--train.log_every=1", "--train.sample_length=0"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def limit(monkeypatch):
    """Lets forward passes of more than so many sequences run out of memory while the model trains."""
    real = TransformerLanguageModel.forward

    def limit(sequences: int, from_pass: int = 0) -> list[int]:
        passes: list[int] = []

        def forward(self, ids, *rest):
            if self.training:
                passes.append(len(ids))
                if len(ids) > sequences and len(passes) > from_pass:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(self, ids, *rest)

        monkeypatch.setattr(TransformerLanguageModel, "forward", forward)
        return passes

    return limit


def losses(run: str) -> list[float]:
    records = map(json.loads, (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize(("most", "micro"), [(5, 3), (1, 1), (6, 6)])
def test_the_micro_batch_is_halved_and_the_batch_stays(text_file, limit, capsys, most, micro):
    assert cli.main(["--data", str(text_file), "--out", "whole", *TOY]) == 0
    capsys.readouterr()
    passes = limit(most, from_pass=2)  # the first two steps still fit
    assert cli.main(["--data", str(text_file), "--out", "small", *TOY]) == 0
    assert losses("small") == pytest.approx(losses("whole"), rel=1e-5)
    assert f"a step of the same batch is now {12 // micro} passes of {micro}" in capsys.readouterr().err
    assert passes[:2] == [12, 12]
    assert passes[-12 // micro :] == [micro] * (12 // micro)


def test_one_sequence_that_does_not_fit_is_an_error(text_file, limit):
    limit(0)
    assert "one sequence does not fit" in message(cli.main, ["--data", str(text_file), "--out", "x", *TOY])


def test_several_processes_agree(text_file, limit, monkeypatch):
    """Another process runs out of memory twice: this one halves its micro-batch as well, before the first step."""
    others, passes = iter([True, True, False]), limit(99)

    def start(self):
        self.logger = SimpleNamespace(warning=lambda line: None)
        self.accelerator = SimpleNamespace(num_processes=2, device=torch.device("cuda"),
                                           no_sync=self.accelerator.no_sync,
                                           backward=self.accelerator.backward)  # fmt: skip
        self._fit_micro_batch()
        return self.plan.micro_batch_size

    def sum_over_processes(accelerator, mine):
        assert mine is False
        return float(next(others))

    monkeypatch.setattr(trainer, "sum_over_processes", sum_over_processes)
    monkeypatch.setattr(trainer.Trainer, "train", start)
    assert cli.main(["--data", str(text_file), "--out", "two", *TOY]) == 3
    assert passes == [12, 6, 3]
