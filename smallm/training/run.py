"""A run from its config to its exit code: everything around the loop that can go wrong."""

import sys
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from smallm.errors import UserError
from smallm.runs.layout import LOCK
from smallm.training import trackers
from smallm.training.analysis.baselines import seconds_kept
from smallm.training.budget.clock import Clock
from smallm.training.budget.setup import open_text, plan_run
from smallm.training.checkpoint.format import folder_of
from smallm.training.checkpoint.manager import newest_checkpoint, quarantine
from smallm.training.checkpoint.safe_load import check_fits
from smallm.training.config import Config
from smallm.training.data.corpus import Corpus
from smallm.training.devices import broadcast_from_main, build_accelerator
from smallm.training.failure import report_first_failure
from smallm.training.finetune import Origin, base_vocabulary, origin_of
from smallm.training.trainer import Trainer


def train(
    config: Config, out: Path, resume: bool = False, explicit: Set[str] = frozenset(), started: float | None = None
) -> int:
    """Trains by `config` into the run folder `out`, and returns the exit code. Raises `UserError`.

    explicit: settings, as `section.field`, that `train.minutes` must not choose; started: time.perf_counter() as the
    program began, by default now.
    """
    clock, planned_steps = Clock.after_imports(time.perf_counter() if started is None else started), 0
    trackers.check(config.train.trackers)
    accelerator = build_accelerator(config.train)
    with report_first_failure(accelerator), _locked(accelerator, out):
        place = _newest(accelerator, out) if resume else None
        origin = origin_of(accelerator, config, out) if config.train.init_from and place is None else None
        base = origin.vocabulary if origin else base_vocabulary(place)
        corpus = open_text(accelerator, config.data, base)
        clock = _with_end(accelerator, clock, config, corpus, origin)
        if config.train.minutes and place is None:
            config, corpus, planned_steps = plan_run(accelerator, config, corpus, explicit, clock, base)
        if origin:
            config = origin.scale_learning_rates(config, explicit)
        try:
            if place is not None:
                check_fits(place / "model.safetensors", config.model, corpus.vocabulary.size)
            trainer = Trainer(accelerator, config, corpus, out, clock, planned_steps)
            if place is not None:
                trainer.resume(place)
            elif origin:
                origin.hand_over(trainer)
            with trackers.started(accelerator, config, out, trainer.state.step):
                code = trainer.train()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write to {out}: {reason}; make room, then go on with --resume {out}") from None
    accelerator.end_training()
    return code


def _with_end(accelerator: Accelerator, clock: Clock, config: Config, corpus: Corpus, origin: Origin | None) -> Clock:
    """With the time for what is measured after the last step; the same for all processes, as their steps must be."""
    end = clock.end_seconds + seconds_kept(corpus, 60 * config.train.minutes) + (origin.seconds if origin else 0)
    return replace(clock, end_seconds=broadcast_from_main(accelerator, end)[0])


def _newest(accelerator: Accelerator, run: Path) -> Path | None:
    """The newest intact checkpoint of a run, None before its first; damaged ones are said and put aside."""
    step = -1.0
    if accelerator.is_main_process:
        damaged = {}
        place = newest_checkpoint(run, damaged.setdefault)
        for folder, problem in damaged.items():
            print(f"warning: {folder} is damaged ({problem}); going on from an earlier one", file=sys.stderr)
            quarantine(folder)
        step = step if place is None else float(place.name.removeprefix("step-"))
    (step,) = broadcast_from_main(accelerator, step)
    return None if step < 0 else folder_of(run, int(step))


@contextmanager
def _locked(accelerator: Accelerator, run: Path) -> Iterator[None]:
    """The run is ours alone within; the system takes the lock back from a process that is killed."""
    if not accelerator.is_main_process:
        yield
        return
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(f"{run} is being trained by another process; wait for it, or choose another --out") from None
    except NotImplementedError:  # a file system that knows no locks
        yield
        return
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror}; choose another --out") from None
    try:
        with lock:
            yield
    finally:
        if [file.name for file in run.iterdir()] == [LOCK]:  # nothing came of it
            (run / LOCK).unlink()
            for folder in made:
                folder.rmdir()
