"""`train.py --minutes`: the run ends on time, prints its plan, and a resumed run uses the remaining time."""

import math
import random
import re
import time
import tomllib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import ctrl_c, flags, metrics
from toys import message

from smallm.training import callbacks, cli, run
from smallm.training.budget import configure, planner, probe
from smallm.training.budget.clock import END_SECONDS, Clock, StepBudget, TimeBudget, forecast
from smallm.training.budget.configure import check_time, compressed_bytes, open_text, plan_run
from smallm.training.budget.planner import Plan
from smallm.training.budget.probe import flops_per_second
from smallm.training.checkpoint.format import TrainingState, read_state
from smallm.training.checkpoint.manager import checkpoints
from smallm.training.cli import parse
from smallm.training.config import Config, TrainConfig
from smallm.training.devices import build_accelerator
from smallm.training.distributed import broadcast_from_main
from smallm.training.ensemble import Ensemble
from smallm.training.optim.schedule import mean_step_cost, member_shares

TINY = {
    "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 32, "model.block_size": 32, "train.batch_size": 8,
    "train.sample_length": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The command line.


def test_explicit_settings_are_known(folder):
    Path("mine.toml").write_text("[optim]\nbetas = [0.8, 0.9]\n[train]\nseed = 3\n")
    request = parse(["--minutes=2.5", "--config", "mine.toml", "--model.dropout", "0.1", "--data", "a.txt"])
    assert request.config.train.minutes == 2.5
    assert request.explicit == {"optim.betas", "train.seed", "train.minutes", "model.dropout", "data.source"}
    assert parse([]).explicit == set()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--minutes", "0"], ["minutes = 0", "such as 5"]),
        (["--minutes", "-1"], ["train.minutes", "-1"]),
        (["--minutes", "nan"], ["train.minutes", "nan"]),
        (["--minutes", "inf"], ["train.minutes", "inf"]),
        (["--minutes", "abc"], ["train.minutes", "abc", "number"]),
        (["--minutes"], ["minutes"]),
        (["--minutes", "2", "--train.max_steps", "10"], ["train.minutes", "train.max_steps"]),
        (["--minutes", "2", "--train.epochs", "1"], ["train.minutes", "train.epochs"]),
        (["--minutes", "2", "--data", "nowhere.txt"], ["nowhere.txt"]),
        (["--minutes", "2", "--model.n_embd", "50"], ["50", "16"]),
    ],
)
def test_mistakes(refused, argv, said):
    line = refused(*argv)
    assert all(words in line for words in said), line
    assert not Path("runs").exists()


def test_a_flag_displaces_the_length_that_a_file_gives():
    Path("steps.toml").write_text("[train]\nmax_steps = 100\nepochs = 2.0\n")
    Path("minutes.toml").write_text("[train]\nminutes = 3\n")
    assert parse(["--config", "minutes.toml"]).config.train.minutes == 3
    by_time = parse(["--config", "steps.toml", "--minutes", "2"]).config.train
    assert (by_time.minutes, by_time.max_steps, by_time.epochs) == (2, 0, 0)
    by_steps = parse(["--config", "minutes.toml", "--train.max_steps", "5"]).config.train
    assert (by_steps.minutes, by_steps.max_steps) == (0, 5)


def test_heads_and_width_can_be_set_alone():
    assert parse(["--minutes", "1", "--model.n_embd", "64"]).config.model.n_embd == 64
    assert parse(["--minutes", "1", "--model.n_head", "7"]).config.model.n_head == 7


# The budget, with simulated times.


def drive(budget, seconds_per_step, *, step=0, seconds=5.0, every=5, eval_every=300, pause=1.0, until=math.inf):
    """Simulates a run; returns the number of steps, the seconds and the progress before each step."""
    start, paused, progress = seconds, 0.0, []
    budget.update(step, seconds, paused)
    while step < budget.total_steps and step < until:
        progress.append(step / budget.total_steps)
        seconds += seconds_per_step(step, seconds - start)
        step += 1
        if step % every == 0 or step >= budget.total_steps:
            budget.update(step, seconds, paused)
        if step % eval_every == 0 or step >= budget.total_steps:
            seconds, paused = seconds + pause, paused + pause
    return step, seconds, progress


@pytest.mark.parametrize("planned", [100, 1000, 10_000])
@pytest.mark.parametrize(
    "seconds_per_step",
    [
        lambda step, seconds: 0.1,
        lambda step, seconds: 0.1 if seconds < 50 else 0.2,
        lambda step, seconds: 0.2 if seconds < 50 else 0.05,
        lambda step, seconds: 0.1 + 0.1 * (step == 400) * 100,  # one step takes ten seconds more
        lambda step, seconds: 0.1 * random.Random(step).choice([0.5, 1, 2]),
    ],
    ids=["even", "slower", "faster", "stall", "noise"],
)
def test_the_run_ends_on_time(planned, seconds_per_step):
    _, seconds, progress = drive(TimeBudget(2, planned, 1e9, 300), seconds_per_step)
    assert 120 * 0.97 <= seconds + END_SECONDS <= 120 * 1.02
    steady = progress[30:]  # before, the estimate is the planner's
    assert all(b > a - 0.01 for a, b in pairwise(steady))
    assert steady[-1] > 0.97


def test_progress_does_not_jump_at_an_unexpectedly_long_evaluation():
    _, seconds, progress = drive(TimeBudget(2, 1000, 1e9, 200), lambda step, seconds: 0.1, eval_every=200, pause=6.0)
    assert max(b - a for a, b in pairwise(progress[50:])) < 0.01
    assert seconds + END_SECONDS == pytest.approx(120, rel=0.03)


@settings(max_examples=30)
@given(st.floats(0.5, 6), st.floats(0.02, 1), st.integers(1, 1000))
def test_the_run_ends_on_time_for_any_plan(minutes, seconds_per_step, planned):
    every = max(1, int(minutes * 60 / seconds_per_step / 200))
    budget = TimeBudget(minutes, planned, 1e9, 10**9)
    _, seconds, _ = drive(budget, lambda *_: seconds_per_step, every=min(every, planned), eval_every=10**9, pause=0.5)
    slack = 2 * every * seconds_per_step + 0.02 * 60 * minutes
    assert abs(seconds + END_SECONDS - 60 * minutes) <= slack


def test_a_run_without_time_left_ends_after_one_step():
    budget = TimeBudget(0.1, 1000, 1e9, 100)
    assert drive(budget, lambda *_: 1.0, seconds=30.0, every=1)[0] == 1


def test_time_is_reserved_for_the_final_evaluation():
    """A single evaluation that takes as long as 40 steps, on a machine where start and end take ten seconds each."""
    budget = TimeBudget(1, 500, 1e9, 10**6, 40.0, Clock(0.0, 10.0).end_seconds)
    _, seconds, _ = drive(budget, lambda *_: 0.1, eval_every=10**6, pause=4.5)
    assert seconds + 10 == pytest.approx(60, abs=1.0)


@pytest.mark.parametrize(("imports", "reserved"), [(10, 10), (1, END_SECONDS)])
def test_the_end_is_expected_to_take_as_long_as_the_imports(monkeypatch, text_file, imports, reserved):
    clocks = []
    monkeypatch.setattr(run, "Trainer", lambda *arguments: clocks.append(arguments[4]))
    with pytest.raises(AttributeError):
        run.run_training(parse(["--data", str(text_file)]), time.perf_counter() - 20, imports)
    assert clocks[0].end_seconds == reserved


def test_a_short_text_ends_the_run_before_its_time():
    step, seconds, _ = drive(TimeBudget(60, 10**6, 10.0, 10**6), lambda *_: 0.1)
    assert step == 60 * 10
    assert seconds < 120


def test_a_resumed_run_keeps_its_progress_and_uses_the_remaining_time():
    budget = TimeBudget(2, 1000, 1e9, 300)
    step, seconds, progress = drive(budget, lambda *_: 0.1, until=500)
    state = TrainingState(step=step, seconds=seconds, planned_steps=budget.total_steps)
    again = TimeBudget(2, 0, 1e9, 300)
    again.resume(state, TrainConfig(minutes=2))
    assert step / again.total_steps == pytest.approx(progress[-1], abs=0.005)
    _, seconds, later = drive(again, lambda *_: 0.1, step=step, seconds=seconds + 4)  # the restart takes time
    assert abs(later[0] - progress[-1]) < 0.005
    assert seconds + END_SECONDS == pytest.approx(120, rel=0.03)


def test_more_minutes_extend_a_finished_run():
    state = TrainingState(step=1000, seconds=118, planned_steps=1000)
    same, longer = TimeBudget(2, 0, 1e9, 300), TimeBudget(4, 0, 1e9, 300)
    same.resume(state, TrainConfig(minutes=2))
    longer.resume(state, TrainConfig(minutes=2))
    assert same.total_steps == 1000
    assert longer.total_steps == pytest.approx(2000, rel=0.05)


def drive_ensemble(
    size, seconds_per_step, *, minutes=0.8, seconds=5.0, teacher=1 / 3, max_epochs_at=1e9, until=math.inf
):
    """Simulates a run of several models on a fake clock.

    Returns the seconds, the state, the first step of each model and the estimates of `total_steps`.
    """
    planned = max(1, round((60 * minutes - seconds - END_SECONDS) / (seconds_per_step * mean_step_cost(size))))
    eval_every = math.ceil(planned / 4.5)
    budget = TimeBudget(minutes, planned, max_epochs_at / planner.MAX_EPOCHS, eval_every, models=size)
    models = Ensemble(build_accelerator(TrainConfig()), Config.from_dict({"train.ensemble": size}), 256)
    state, paused, starts, totals = TrainingState(), 0.0, [0], []
    budget.update(0, seconds, paused)

    def pause(duration):
        nonlocal seconds, paused
        seconds, paused = seconds + duration, paused + duration

    while not (models.is_last(state) and state.step >= models.end(state, budget.total_steps)) and state.step < until:
        if state.step >= models.end(state, budget.total_steps):
            state.member, state.member_start = state.member + 1, state.step
            starts.append(state.step)
            pause(0.1)
        seconds += seconds_per_step * (1 + teacher * state.member)
        state.step += 1
        budget.update(state.step, seconds, paused, state.member, state.member_start)
        totals.append(budget.total_steps)
        if state.step % eval_every == 0 or state.step >= models.end(state, budget.total_steps):
            pause(0.5)
    state.seconds, state.planned_steps = seconds, budget.total_steps
    return seconds, state, starts, totals


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("teacher", "share"), [(1 / 3, 1.0), (0.6, 0.8)], ids=["as expected", "slow teachers"])
def test_an_ensemble_uses_its_time(size, teacher, share):
    """share: of the steps that the last model gets if steps with teachers take as long as expected."""
    seconds, state, starts, totals = drive_ensemble(size, 0.1, teacher=teacher)
    assert seconds + END_SECONDS == pytest.approx(48, rel=0.05)
    kept = state.step - starts[-1]
    assert kept / starts[1] == pytest.approx(2 * share, rel=0.1)
    if share == 1:
        assert totals[len(totals) // 8 :] == pytest.approx([state.step] * (len(totals) - len(totals) // 8), rel=0.08)


def test_a_short_text_shortens_all_models_of_an_ensemble():
    seconds, state, starts, _ = drive_ensemble(2, 0.1, max_epochs_at=150)
    assert (state.step, starts) == (150, [0, 50])
    assert seconds < 48 * 0.7


def test_an_ensemble_without_time_left_trains_each_model():
    _, state, starts, _ = drive_ensemble(2, 1.0, minutes=0.15, seconds=8.0)
    assert (state.step, starts) == (2, [0, 1])


@pytest.mark.parametrize("until", [40, 120, 200])
def test_a_resumed_ensemble_keeps_its_progress(until):
    _, state, _, totals = drive_ensemble(2, 0.1, until=until)
    again = TimeBudget(0.8, 0, 1e9, 300, models=2)
    again.resume(state, TrainConfig(minutes=0.8))
    assert again.total_steps == pytest.approx(totals[-1], abs=1)


def test_a_step_budget_does_not_change():
    budget = StepBudget(7)
    budget.resume(TrainingState(step=3, planned_steps=9), TrainConfig(max_steps=9))
    assert drive(budget, lambda *_: 100.0, every=1)[0] == 7


@pytest.mark.parametrize(("is_default", "before", "steps"), [
    (True, TrainConfig(), 560), (True, TrainConfig(max_steps=560), 800), (True, TrainConfig(minutes=1), 800),
    (False, TrainConfig(), 800),
])  # fmt: skip
def test_a_resumed_run_of_the_default_length_keeps_its_length(is_default, before, steps):
    """Runs of earlier versions had 560 steps by default."""
    budget = StepBudget(800, is_default)
    budget.resume(TrainingState(step=280, planned_steps=560), before)
    assert budget.total_steps == steps


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 10))
def test_the_forecast_approaches_the_loss(earlier, later, loss):
    (before, error_before), (after, error_after) = (forecast(progress, loss) for progress in sorted((earlier, later)))
    assert forecast(1.0, loss)[0] == pytest.approx(loss)
    assert before <= after <= loss * (1 + 1e-9)
    assert 0 < error_after / after <= error_before / before * (1 + 1e-9)


def test_evaluations_under_a_time_budget_say_what_to_expect_at_the_end():
    def said(progress: float, minutes: float = 1.0, member: str = "", few: bool = False, base: str = "") -> str:
        train = TrainConfig(minutes=minutes, init_from=base)
        run = SimpleNamespace(config=Config(train=train), progress=progress, member=member,
                              has_few_steps=few)  # fmt: skip
        return callbacks.expected_end(run, 2.0)

    lines = [said(progress) for progress in (0.1, 0.2, 0.5, 0.9)]
    assert not lines[0]  # too early
    pattern = r"; expect about (\d\.\d\d) nats at the end, give or take 0\.\d\d"
    expected = [float(re.fullmatch(pattern, line)[1]) for line in lines[1:]]
    assert expected == sorted(expected)
    assert expected[-1] < 2
    assert not said(1.0)
    assert not said(0.5, minutes=0)
    assert not said(0.5, member="model 1 of 2")
    assert not said(0.5, few=True)
    assert not said(0.5, base="runs/other")


# A time that is too short.


def plan_of(seconds: float, steps_per_second: float = 20.0, models: int = 1, short_text_at: float = math.inf) -> Plan:
    """A plan whose steps grow with the time."""
    steps = round(steps_per_second * min(seconds, short_text_at))
    return Plan({}, 0.0, 0.0, steps, member_shares(models)[-1] * steps, 1.0, seconds >= short_text_at)


def warned(minutes: float, beside: float, plan=plan_of) -> list[str]:
    return check_time(minutes, beside, plan(max(1.0, 60 * minutes - beside)), plan)


def test_a_time_that_is_too_short_gives_a_warning_with_the_least_time():
    (line,) = warned(0.2, 5.0)
    assert line == ("warning: minutes = 0.2 leaves the model about 140 steps, in which it hardly learns anything; give "
                    "minutes = 0.3 or more")  # fmt: skip
    assert warned(0.3, 5.0) == []
    assert "give minutes = 24 or more" in warned(10, 5.0, lambda seconds: plan_of(seconds, 0.16))[0]


def test_no_steps_are_a_mistake():
    assert message(warned, 0.05, 5.2) == (
        "minutes = 0.05 leaves time for 0 steps, since the start and the end of the run take 5 s here; give "
        "minutes = 0.3 or more"
    )
    assert "time for 1 step, since" in message(warned, 0.1, 5.94)
    assert len(warned(0.1, 5.69)) == 1  # 6 steps


def test_the_model_that_an_ensemble_keeps_needs_enough_steps():
    (line,) = warned(0.25, 5.0, lambda seconds: plan_of(seconds, models=2))  # 200 steps, 133 of them for the last one
    assert "about 133 steps" in line


def test_a_short_text_is_no_lack_of_time():
    def plan(seconds):
        return plan_of(seconds, short_text_at=4.0)

    assert warned(0.2, 5.0, plan) == []
    assert "give minutes = 0.2 or more" in message(warned, 0.05, 5.0, plan)


def test_a_whole_run_without_time_is_refused(text_file, refused, monkeypatch):
    monkeypatch.setattr(run, "END_SECONDS", 100.0)
    line = refused("--data", str(text_file), "--minutes", "0.05", "--out", "run", *flags(TINY))
    assert "minutes = 0.05 leaves time for 0 steps" in line
    assert not Path("run").exists()


def test_a_resumed_run_of_few_steps_warns(text_file, monkeypatch, capsys):
    for module in (planner, configure, callbacks):
        monkeypatch.setattr(module, "MIN_STEPS", 10**6)
    monkeypatch.setattr(planner, "MAX_EPOCHS", 10**9)
    settings = TINY | {"train.ensemble": 1}
    with ctrl_c(1):
        assert cli.main(["--data", str(text_file), "--minutes", "1", "--out", "run", *flags(settings)]) == 130
    assert capsys.readouterr().err.count("warning: minutes = 1 leaves the model about") == 1
    with ctrl_c(3):
        assert cli.main(["--resume", "run"]) == 130
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    assert re.fullmatch(r"warning: minutes = 1 leaves the model about \d+ steps in all, in which it hardly learns "
                        r"anything; train longer with: .* train --resume run --minutes \d+(\.\d)?", line)  # fmt: skip


# Machine and text.


def test_the_probe_measures_and_leaves_nothing_behind():
    config, accelerator = Config(), build_accelerator(TrainConfig())
    before = torch.get_rng_state()
    assert 1e6 < flops_per_second(accelerator, config, 256, rows=2, seconds=0.05) < 1e16
    assert accelerator._models == accelerator._optimizers == []
    torch.manual_seed(0)
    assert broadcast_from_main(accelerator, 1.5, 2.5) == (1.5, 2.5)
    assert before is not None


@pytest.mark.parametrize(("choice", "compiled"), [("yes", 1), ("no", 0), ("auto", 0)])
def test_the_last_probe_compiles_the_model_if_the_run_will(monkeypatch, text_file, choice, compiled):
    """Otherwise the plan would be made for a slower run."""
    calls = []
    monkeypatch.setattr(probe, "compile_model", lambda model, *arguments, say: calls.append(model) or model)
    monkeypatch.setattr(configure, "HANDFUL", 0)  # a busy machine has no time left
    config = Config.from_dict({"data.source": str(text_file), "train.minutes": 0.1, "train.compile": choice} | TINY)
    accelerator = build_accelerator(config.train)
    plan_run(accelerator, config, open_text(accelerator, config), set(TINY), Clock(time.perf_counter()))
    assert len(calls) == compiled


def test_compressed_bytes():
    accelerator = build_accelerator(TrainConfig())
    rng = random.Random(1)
    texts = {
        "same": "the same line again\n" * 20_000,
        "noise": "".join(rng.choice("abcdefghijklmnop") for _ in range(400_000)),
        "tiny": "abc\n" * 3,
        "unicode": "".join(rng.choice("абвгдежз") for _ in range(50_000)),
    }
    bytes_of = {}
    for name, text in texts.items():
        Path(name).write_text(text, encoding="utf-8")
        config = Config.from_dict({"data": {"source": name}})
        bytes_of[name] = compressed_bytes(open_text(accelerator, config))
    assert 0 < bytes_of["same"] < 5_000
    assert 360_000 / 2 <= bytes_of["noise"] < 1.2 * 360_000 / 2  # 4 bits per character
    assert bytes_of["tiny"] > 0
    assert 45_000 * 3 / 8 <= bytes_of["unicode"] < 1.3 * 45_000 * 3 / 8


# Whole runs.


def test_compiling_the_kernels_is_not_part_of_the_imports(monkeypatch, text_file):
    """Else a first run would reserve as long for its end as the compiler takes."""
    monkeypatch.setattr(cli, "compile_kernels", lambda bf16: time.sleep(0.3))
    given = []
    monkeypatch.setattr(run, "run_training", lambda request, started, imports: given.append(imports) or 0)
    assert cli.main(["--data", str(text_file)]) == 0
    assert given[0] < 0.2


@pytest.mark.parametrize(("wall", "busy", "compiling", "seconds"), [
    (10, 2, 9, 4), (10, 2, 30, 4), (3, 2, 30, 3), (10, 2, 0.1, 10),
], ids=["one compiler", "a slow one", "enough cores", "other programs"])  # fmt: skip
def test_a_compiler_beside_the_imports_does_not_count(wall, busy, compiling, seconds):
    assert cli.import_seconds(wall, busy, compiling) == seconds


def test_a_run_without_time_left_ends_with_its_last_model(text_file, monkeypatch):
    monkeypatch.setattr(configure, "HANDFUL", 0)
    settings = TINY | {"train.ensemble": 2, "train.log_every": 1}
    assert cli.main(["--data", str(text_file), "--minutes", "0.001", "--out", "run", *flags(settings)]) == 0
    assert [line["member"] for line in metrics(Path("run"))] == [1, 2]


@pytest.mark.slow
def test_a_timed_run_prints_its_plan_and_resumes_after_ctrl_c(text_file, capsys):
    argv = ["--data", str(text_file), "--minutes", "0.2", "--out", "run", *flags(TINY)]
    with ctrl_c(3):  # early, since a busy machine takes few steps
        assert cli.main(argv) == 130
    err = capsys.readouterr().err
    assert len(re.findall(r"^plan   ", err, re.MULTILINE)) == 3
    assert "GFLOP/s" in err
    assert "KB of information" in err
    assert "1 layers x 32" in err

    written = tomllib.loads(Path("run/config.toml").read_text(encoding="utf-8"))
    state, config = read_state(checkpoints(Path("run"))[-1])
    assert Config.from_dict(written) == config
    assert config.train.minutes == 0.2
    assert {key: written[key.split(".")[0]][key.split(".")[1]] for key in TINY} == {**TINY}
    assert config.optim.decay_fraction == 0.7  # chosen; differs from the default
    assert 3 <= state.step <= state.planned_steps

    assert cli.main(["--resume", "run"]) == 0
    out, err = capsys.readouterr()
    assert "plan  " not in err
    assert f"going on from step {state.step}" in err
    assert "best validation loss" in out
    end, _ = read_state(checkpoints(Path("run"))[-1])
    assert end.step == end.planned_steps > state.step
    assert metrics(Path("run"))[-1]["step"] == metrics(Path("run"), "eval")[-1]["step"] == end.step
    assert metrics(Path("run"))[-1]["learning_rate"] < 0.2 * config.optim.learning_rate
    assert end.seconds < 40  # 12 seconds were requested


def test_resuming_a_finished_timed_run_asks_for_more_minutes(text_file, refused, capsys, monkeypatch):
    monkeypatch.setattr(configure, "HANDFUL", 0)  # a busy machine has no time left
    argv = ["--data", str(text_file), "--data.val_fraction", "0.2", "--minutes", "0.04", "--out", "run", *flags(TINY)]
    assert cli.main(argv) == 0
    line = refused("--resume", "run")
    assert "finished" in line
    assert "--minutes N" in line
    before, config = read_state(checkpoints(Path("run"))[-1])
    assert config.data.val_fraction == 0.2
    capsys.readouterr()
    assert cli.main(["--resume", "run", "--train.max_steps", str(before.step + 3)]) == 0
    assert read_state(checkpoints(Path("run"))[-1])[0].step == before.step + 3


def test_the_saved_config_gives_the_same_shape_and_parts_again(text_file, monkeypatch):
    monkeypatch.setattr(configure, "HANDFUL", 0)  # a busy machine has no time left
    monkeypatch.setattr(planner, "MAX_VALIDATION", len(text_file.read_text()) // 20)
    assert cli.main(["--data", str(text_file), "--minutes", "0.04", "--out", "a"]) == 0
    assert cli.main(["--config", "a/config.toml", "--out", "b"]) == 0
    a, b = (read_state(checkpoints(Path(run))[-1])[1] for run in ("a", "b"))
    assert a == b
    assert a.data.val_fraction == pytest.approx(0.05, rel=0.01)
