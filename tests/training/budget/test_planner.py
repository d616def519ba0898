"""smallm.training.budget.planner: a plan for any time, machine and text; every plan is a config that can be run."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallm.runs.config_file import flatten
from smallm.training.budget.planner import (
    DROPOUT,
    ENSEMBLE_DROPOUT,
    ENSEMBLE_FROM,
    LADDER,
    MAX_EPOCHS,
    MIN_STEPS,
    Plan,
    choose_dropout,
    choose_settings,
    choose_val_fraction,
    has_few_steps,
    least_seconds,
)
from smallm.training.config import Config
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.schedule import divide_batch

TWO_CORES = 155e9  # FLOP/s


def plan(train_ids=1_000_000, seconds=110.0, flops=TWO_CORES, ranks=1, compressed_bytes=None, **explicit) -> Plan:
    explicit = {key.replace("__", "."): value for key, value in explicit.items()}
    return choose_settings(train_ids=int(train_ids), val_ids=max(1, int(train_ids / 9)), vocab_size=256, ranks=ranks,
                  compressed_bytes=compressed_bytes or 0.29 * train_ids, seconds=seconds, flops_per_second=flops,
                  explicit=explicit)  # fmt: skip


def size(plan: Plan) -> int:
    return plan.settings["model.n_layer"] * plan.settings["model.n_embd"] ** 2


texts = st.floats(math.log(2e3), math.log(1e10)).map(lambda x: int(math.exp(x)))
times = st.floats(math.log(10), math.log(1e6)).map(math.exp)
machines = st.floats(math.log(1e9), math.log(1e15)).map(math.exp)
big_texts = st.just(10**10)


# Any input.


@given(texts, times, machines, st.integers(1, 8), st.floats(0.001, 1))
def test_every_plan_is_a_config_that_can_be_run(train_ids, seconds, flops, ranks, bytes_per_id):
    chosen = plan(train_ids, seconds, flops, ranks, compressed_bytes=bytes_per_id * train_ids)
    config = chosen.config(Config())
    assert Config.from_dict(config.to_dict()) == config
    assert (config.model.n_layer, config.model.n_embd) in LADDER
    assert config.model.block_size <= train_ids / 4
    assert divide_batch(config.train.batch_size, 0, ranks) == (config.train.batch_size // ranks, 1)
    assert config.train.batch_size >= 2
    assert config.model.head_dim in (32, 64)
    assert chosen.epochs <= MAX_EPOCHS
    assert chosen.steps >= 1
    assert chosen.short_text == (chosen.epochs == MAX_EPOCHS)


@given(big_texts, times, machines, st.floats(1, 1000))
def test_more_compute_never_gives_a_smaller_model(train_ids, seconds, flops, factor):
    few = plan(train_ids, seconds, flops)
    assert size(plan(train_ids, seconds * factor, flops)) >= size(few)
    assert size(plan(train_ids, seconds, flops * factor)) >= size(few)


@given(texts, times, machines, st.floats(1, 1000))
def test_a_smaller_text_never_gives_a_bigger_model(train_ids, seconds, flops, factor):
    assert size(plan(max(2000, train_ids / factor), seconds, flops)) <= size(plan(train_ids, seconds, flops))


free = {
    "model.n_layer": st.integers(1, 12), "model.dropout": st.floats(0, 0.5), "model.n_embd": st.sampled_from([64, 192]),
    "model.n_head": st.sampled_from([1, 2]), "model.block_size": st.sampled_from([16, 100, 128, 250]),
    "optim.name": st.sampled_from(["adamw", "muon"]), "optim.learning_rate": st.floats(1e-4, 1),
    "train.batch_size": st.integers(1, 99), "train.eval_every": st.integers(0, 99), "train.seed": st.integers(0, 9),
    "train.short_windows": st.just([]), "train.short_until": st.just([]),
}  # fmt: skip


@given(texts, times, machines, st.fixed_dictionaries({}, optional=free))
def test_explicit_settings_are_kept_and_the_others_match(train_ids, seconds, flops, explicit):
    chosen = plan(train_ids, seconds, flops, **{key.replace(".", "__"): value for key, value in explicit.items()})
    assert not chosen.settings.keys() & explicit.keys()
    values = flatten(replace(chosen, settings=chosen.settings | explicit).config(Config()).to_dict())
    assert values | chosen.settings | explicit == values


# The rules.


def test_shakespeare_in_two_minutes_on_two_cores():
    s = plan().settings
    assert (s["model.n_layer"], s["model.n_embd"], s["model.n_head"]) == (4, 128, 4)
    assert (s["model.block_size"], s["train.short_windows"], s["model.rope_theta"]) == (256, [64, 128], 1000.0)
    assert s["model.dropout"] < 0.05
    assert (s["optim.name"], s["optim.momentum"], s["optim.grad_clip"]) == ("muon", 0.9, 0.0)


def test_flops_of_the_plan_are_those_of_the_model():
    chosen = plan(seconds=100.0)
    config = chosen.config(Config())
    model = TransformerLanguageModel(256, config.model)
    assert chosen.ids * model.flops_per_id() == pytest.approx(0.9 * 100 * TWO_CORES, rel=0.02)
    assert chosen.steps == round(chosen.ids / (config.train.batch_size * config.model.block_size))


def test_a_short_text_gets_a_small_model_dropout_and_an_early_end():
    short = plan(180_000, 400)
    assert size(short) < size(plan(1_000_000, 400))
    assert short.settings["model.dropout"] == 0.05
    assert plan(180_000, 400, train__ensemble=1).settings["model.dropout"] == 0.2
    assert not short.short_text
    assert plan(180_000, 3600).short_text
    assert plan(180_000, 3600).steps == plan(180_000, 7200).steps
    assert size(plan(1e6, 600, compressed_bytes=1000.0)) == 2 * 64**2  # a single line, repeated


def test_dropout_rises_with_the_epochs():
    epochs = (0.1, 2.7, 5, 8, 12, 17, 25, 60)
    assert [choose_dropout(number) for number in epochs] == [0, 0, 0, 0.05, 0.1, 0.15, 0.2, 0.2]
    rising = [choose_dropout(1.1**n) for n in range(50)]
    assert rising == sorted(rising)


def test_the_documentation_states_these_rules():
    text = " ".join((Path(__file__).parents[3] / "docs" / "time-budget.md").read_text(encoding="utf-8").split())
    (none, _), (some, middle), (most, highest) = DROPOUT
    assert f"none up to {none} epochs, {middle} at {some}, {highest} from {most} on" in text
    assert f"read the text {ENSEMBLE_FROM} times or more, it trains two models" in text
    assert f"dropout of at most {ENSEMBLE_DROPOUT}" in text
    assert f"the text has been read {MAX_EPOCHS} times" in text
    assert f"fewer than {MIN_STEPS} steps" in text
    assert "noise (`--train.noise`) is never chosen" in text
    assert not any("noise" in key for key in plan().settings | plan(200_000, 180).settings)


def test_a_text_that_is_read_many_times_gets_two_models():
    few, many = plan(1e6, 600), plan(200_000, 180)
    assert (few.epochs < 8, few.settings["train.ensemble"]) == (True, 1)
    assert (many.epochs > 8, many.settings["train.ensemble"]) == (True, 2)
    one = plan(200_000, 180, train__ensemble=1)
    assert many.ids == pytest.approx(9 / 11 * one.ids)  # two thirds of the steps take a third longer
    assert many.settings["optim.warmup_steps"] == round(0.02 * many.steps / 3)
    assert plan(200_000, 180, train__init_from="runs/a").settings["train.ensemble"] == 1
    assert plan(1e6, 600, train__ensemble=3).ids == pytest.approx(plan(1e6, 600).ids / (1 + 1 / 12 + 1 / 3))


def test_the_least_time_gives_enough_steps():
    def slow(seconds):
        return plan(seconds=seconds, flops=1e9)

    assert slow(10).kept_steps < MIN_STEPS
    least = least_seconds(slow, 10.0)
    assert slow(least).kept_steps >= MIN_STEPS > slow(least / 1.1).kept_steps
    tiny = plan(3000, 60)
    assert tiny.short_text
    assert least_seconds(lambda seconds: plan(3000, seconds), 60) == 60
    assert plan(200_000, 180).kept_steps == pytest.approx(plan(200_000, 180).steps * 2 / 3)


def test_few_steps():
    assert has_few_steps(MIN_STEPS - 1, 1e9, 1)
    assert not has_few_steps(MIN_STEPS, 1e9, 1)
    assert has_few_steps(MIN_STEPS, 1e9, 2)  # the last model makes two thirds of them
    assert not has_few_steps(60, 1.0, 1)  # the text is short, not the time


def test_a_gpu_gets_a_long_window_and_clipping():
    s = plan(1e9, 3600, 20e12).settings
    assert (s["model.block_size"], s["model.rope_theta"], s["optim.grad_clip"]) == (512, 10000.0, 1.0)
    assert (s["optim.momentum"], s["optim.newton_schulz_steps"]) == (0.95, 5)
    assert s["model.n_embd"] / s["model.n_head"] == 64


def test_evaluations_leave_the_time_to_training():
    often = plan()
    assert 4 <= often.steps / often.settings["train.eval_every"] <= 5
    assert 5 * often.settings["train.eval_every"] > 1.05 * often.steps  # none just before the final one
    seldom = plan(1e8)  # the validation part is longer than the time allows to read
    assert seldom.settings["train.eval_every"] > seldom.steps


def test_other_optimisers_get_their_own_learning_rate():
    assert plan(optim__name="adamw").settings["optim.learning_rate"] == 0.002
    assert "optim.learning_rate" not in plan(optim__name="adamw", optim__learning_rate=0.01).settings


def test_heads_and_width_match_explicit_settings():
    assert plan(model__n_embd=96).settings["model.n_head"] == 3
    assert plan(model__n_embd=48).settings["model.n_head"] == 3
    assert plan(model__n_head=3).settings["model.n_embd"] % 96 == 0
    deep, flat = plan(model__n_layer=12), plan(model__n_layer=2)
    assert deep.settings["model.n_embd"] < flat.settings["model.n_embd"]
    assert plan(train__micro_batch_size=4, ranks=2).settings["train.batch_size"] % 8 == 0


@pytest.mark.parametrize(
    ("characters", "minutes", "validation"),
    [(1_115_394, 2, 111_539), (20e6, 2, 120e3), (20e6, 0.1, 50e3), (10e9, 600, 2e6), (10e3, 2, 1e3), (5e6, 10, 500e3)],
)
def test_validation_takes_a_tenth_or_what_can_be_evaluated_in_time(characters, minutes, validation):
    fraction = choose_val_fraction(int(characters), minutes, 0.1)
    assert fraction * characters == pytest.approx(validation, rel=1e-3)
    assert 0 < fraction <= 0.1
