"""`train.ensemble`: several models in one run, each taught by those before it; the last one is the result."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import TOY, ctrl_c, flags, folder, metrics, names, sha256, train  # noqa: F401  # fixtures
from torch.nn import functional as F

from smallm.errors import UserError
from smallm.training import cli, ensemble
from smallm.training.checkpoint.format import TrainingState, load_model, read_state
from smallm.training.checkpoint.manager import best_checkpoint, checkpoints
from smallm.training.config import Config
from smallm.training.devices import build_accelerator
from smallm.training.ensemble import Ensemble
from smallm.training.report.charts import loss_limits
from smallm.training.report.history import read_histories

TWO = {"train__ensemble": 2, "train__max_steps": 12, "train__eval_every": 3}  # models of 4 and 8 steps


def members(size, steps):
    """(first step, end) of each model."""
    config, state, found = Config.from_dict({"train.ensemble": size}), TrainingState(), []
    models = Ensemble(build_accelerator(config.train), config, 256)
    while True:
        end = models.end(state, steps)
        found.append((state.member_start, end))
        if models.is_last(state):
            return found
        state.member, state.member_start = state.member + 1, end


def test_the_last_model_gets_twice_as_many_steps_as_each_other():
    assert members(1, 100) == [(0, 100)]
    assert members(2, 90) == [(0, 30), (30, 90)]
    assert members(3, 100) == [(0, 25), (25, 50), (50, 100)]
    assert members(4, 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert members(2, 1) == [(0, 1), (1, 2)]  # under train.minutes; each makes a step


def test_each_model_is_new_and_its_schedule_starts_anew(train, capsys):  # noqa: F811
    run, single = train("run", **TWO), train("single", train__max_steps=4, train__eval_every=3)
    lines = metrics(run)
    assert [line["member"] for line in lines] == [1] * 4 + [2] * 8
    assert [line["loss"] for line in lines[:4]] == [line["loss"] for line in metrics(single)]  # the first learns alone
    assert "member" not in metrics(single)[0]
    rates = [line["learning_rate"] for line in lines]
    assert rates[:3] == pytest.approx(rates[4:7])  # the warm-up
    assert lines[4]["loss"] > lines[3]["loss"]
    evaluated = [(line["step"], line["member"]) for line in metrics(run, "eval")]
    assert evaluated == [(3, 1), (4, 1), (6, 2), (9, 2), (12, 2)]
    err = capsys.readouterr().err
    assert "models 2, one after another; the last, with 67 % of the steps" in err
    assert "step 4: model 2 of 2 learns from the text and from the one before" in err
    assert "step 12 (epoch 0.09, model 2 of 2): validation" in err


def test_the_result_is_the_last_model_even_if_a_teacher_was_better(train, monkeypatch, capsys):  # noqa: F811
    losses = iter([1.0, 0.5, 3.0, 2.0, 2.5])
    monkeypatch.setattr("smallm.training.trainer.evaluate", lambda *args, **options: next(losses))
    run = train("run", **TWO)
    assert names(run) == ["step-000009", "step-000012"]  # keep_last; the teachers' checkpoints are gone
    assert best_checkpoint(run).name == "step-000009"
    assert "best validation loss 2.0000" in capsys.readouterr().out
    (history,) = read_histories([run])
    assert (history.best_step, history.best_loss) == (9, 2.0)
    low, high = loss_limits([history])
    assert low < 0.5 < high


def test_a_teacher_is_kept_in_the_checkpoints(train):  # noqa: F811
    run, single = train("run", **TWO), train("single", train__max_steps=4)
    teachers = load_file(checkpoints(run)[-1] / "teachers.safetensors")
    expected = load_model(checkpoints(single)[-1]).state_dict()
    assert {name.removeprefix("0.") for name in teachers} == set(expected)
    assert not (checkpoints(single)[-1] / "teachers.safetensors").exists()


@pytest.mark.parametrize("stop", [2, 3, 4, 9], ids=["teacher", "its last step", "first step", "student"])
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(train, stop):  # noqa: F811
    changes = TWO | {"model__dropout": 0.1, "train__micro_batch_size": 4, "train__short_windows": "[4, 8]",
                     "train__short_until": "[0.3, 0.7]"}  # fmt: skip
    straight = train("straight", **changes)
    with ctrl_c(stop):
        run = train("run", code=130, **changes)
    assert stop < read_state(checkpoints(run)[-1])[0].step < 12
    assert cli.main(["--resume", str(run)]) == 0
    for file in ("model.safetensors", "optimizer.safetensors", "teachers.safetensors"):
        assert sha256(run, file) == sha256(straight, file), file
    ours, theirs = (metrics(each, "eval") for each in (run, straight))
    assert [line["val_loss"] for line in ours] == [line["val_loss"] for line in theirs]


def test_patience_ends_a_teacher_and_then_the_run(train, monkeypatch, capsys):  # noqa: F811
    losses = iter([1.0, 2.0, 3.0, 1.5, 1.4, 1.6, 1.7])
    monkeypatch.setattr("smallm.training.trainer.evaluate", lambda *args, **options: next(losses))
    run = train("run", train__ensemble=2, train__max_steps=30, train__eval_every=2, train__patience=2)
    assert [line["member"] for line in metrics(run)] == [1] * 6 + [2] * 8
    out, err = capsys.readouterr()
    assert err.count("stopped: no better validation loss in 2 evaluations") == 1
    assert "best validation loss 1.4000" in out


def test_the_loss_is_that_of_the_text_and_of_the_mean_of_the_teachers():
    config = Config.from_dict({"model.n_layer": 1, "model.n_embd": 32, "model.n_head": 1, "train.ensemble": 3})
    models, state = Ensemble(build_accelerator(config.train), config, 256), TrainingState()
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, 5, 256, generator=generator), torch.randint(256, (2, 5), generator=generator)
    assert models.loss(logits, ids, ids)[0] == models.loss(logits, ids, ids)[1]
    model, optimizer = models._new_model(5), torch.optim.SGD([torch.zeros(1)])
    teachers = []
    for _ in range(2):
        teachers.append(model(ids).softmax(-1).detach())
        before = model.state_dict()["wte.weight"].clone()
        models.start_next(model, optimizer, state)
        assert not torch.equal(before, model.state_dict()["wte.weight"])
    loss, text_loss = models.loss(logits, ids, ids)
    assert text_loss == pytest.approx(F.cross_entropy(logits.view(-1, 256), ids.view(-1)).item())
    soft = -(sum(teachers) / 2 * logits.log_softmax(-1)).sum(-1).mean()
    weight = ensemble.TEACHER_WEIGHT
    assert loss.item() == pytest.approx((weight * soft + (1 - weight) * text_loss).item(), rel=1e-5)
    assert math.isclose(models._probabilities(ids).sum(-1).min().item(), 1, rel_tol=1e-5)


def test_mistakes(refused, train, text_file):  # noqa: F811
    toy = ["--data", str(text_file), *flags(TOY)]
    assert "train.ensemble = 0 must be at least 1" in refused(*toy, "--train.ensemble=0")
    line = refused(*toy, "--train.ensemble=3", "--train.max_steps=2")
    assert "3 models" in line
    assert "2 step(s)" in line
    with pytest.raises(UserError, match="leave out one"):
        Config.from_dict({"train.ensemble": 2, "train.init_from": "runs/a"})
    run = train("run", **TWO)
    assert "train.ensemble = 2, not 3" in refused("--resume", str(run), "--train.ensemble=3")


def test_teachers_that_do_not_fit_are_one_line(train, refused):  # noqa: F811
    run = train("run", **TWO)
    last = checkpoints(run)[-1]
    file = last / "teachers.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    models = Ensemble(build_accelerator(Config().train), read_state(last)[1], 256)
    with pytest.raises(UserError, match=r"teachers\.safetensors is missing, truncated"):
        models.restore(last, read_state(last)[0])
    save_file({"0.wte.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"teachers\.safetensors does not match"):
        models.restore(last, read_state(last)[0])


def test_a_finished_run_can_be_trained_longer(train):  # noqa: F811
    run = train("run", **TWO)
    assert cli.main(["--resume", str(run), "--train.max_steps", "14"]) == 0
    assert [line["member"] for line in metrics(run)][-1] == 2
    assert json.loads((checkpoints(run)[-1] / "training_state.json").read_text())["member_start"] == 4
