"""A run from its request to its exit code: the lock, the text, the plan, the loop, and errors on the way."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import Timeout
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not re-exported for checkers

from smallm.errors import ProcessError, UserError, command
from smallm.runs.cache_folder import cache_folder
from smallm.runs.layout import LOCK
from smallm.training import trackers
from smallm.training.analysis.baselines import seconds_to_reserve
from smallm.training.budget.clock import END_SECONDS, Clock
from smallm.training.budget.configure import open_text, plan_run
from smallm.training.checkpoint.format import checkpoint_folder
from smallm.training.checkpoint.manager import newest_checkpoint, quarantine, restore_interrupted
from smallm.training.checkpoint.safe_load import check_fits
from smallm.training.config import DataConfig
from smallm.training.data.source import store_standard_input
from smallm.training.devices import build_accelerator
from smallm.training.distributed import broadcast_from_main
from smallm.training.finetune import base_vocabulary, load_origin
from smallm.training.locks import file_lock
from smallm.training.output import Output
from smallm.training.profiled import ProfiledTrainer
from smallm.training.request import Request
from smallm.training.trainer import Trainer

NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}  # of file systems without locks, such as NFS
STORE_SECONDS = 5  # to wait for the launcher's store when a process has failed


def run_training(request: Request, started: float, imports: float, last: bool = True) -> int:
    """Trains, and returns 0, or 128 + the number of the signal that interrupted the run.

    started: time.perf_counter() when the program began; a time budget counts from there. imports: seconds that the
    imports took. last: whether this process trains no more. Several processes keep their process group also then.
    Raises `UserError`.
    """
    config, out = request.config, request.out
    trackers.check(config.train.trackers)
    accelerator = build_accelerator(config.train, request.precision, request.threads)
    with report_first_failure(accelerator), _locked(accelerator, out):
        config = replace(config, data=with_stored_input(accelerator, config.data))
        folder = _newest_checkpoint(accelerator, out) if request.resume else None
        origin = load_origin(accelerator, config, out) if config.train.init_from and folder is None else None
        base = origin.vocabulary if origin else base_vocabulary(folder)
        planned = bool(config.train.minutes) and folder is None
        smaller_validation = planned and "data.val_fraction" not in request.explicit
        corpus = open_text(accelerator, config, base, smaller_validation)
        # The end takes about as long as the imports, since both depend on the machine, besides the measurements.
        end = max(END_SECONDS, imports) + seconds_to_reserve(corpus, 60 * config.train.minutes)
        end += origin.seconds if origin else 0
        clock = Clock(started, *broadcast_from_main(accelerator, end))  # the same on all processes
        planned_steps = 0
        if planned:
            config, planned_steps = plan_run(accelerator, config, corpus, request.explicit, clock)
        if origin:
            config = origin.scale_learning_rates(config, request.explicit)
        try:
            if folder is not None:
                check_fits(folder / "model.safetensors", config.model, corpus.vocabulary.size)
            kind = ProfiledTrainer if request.profile else Trainer
            trainer = kind(accelerator, config, corpus, out, clock, planned_steps)
            if folder is not None:
                trainer.resume(folder)
            elif origin:
                origin.load_into(trainer.model, corpus.vocabulary, trainer.state)
            with trackers.started(accelerator, config, out, trainer.state.step):
                code = trainer.train()
        except OSError as error:
            reason, resume = error.strerror or error, command("train", "--resume", out)
            raise UserError(f"cannot write to {out}: {reason}; solve this, then continue with: {resume}") from None
    if last and accelerator.num_processes == 1:
        accelerator.end_training()
    else:
        # Until the main process has written the run folder. The group is not ended: a later training needs it, and
        # its destructor would hold Python's lock while it waits for a thread of gloo, which may need that lock.
        accelerator.wait_for_everyone()
    return code


def with_stored_input(accelerator: Accelerator, data: DataConfig) -> DataConfig:
    """The settings with a file in place of standard input, which the main process reads and stores in the cache."""
    sources = [data.source] if isinstance(data.source, str) else [*data.source]
    if "-" not in sources or Path("-").is_file():
        return data
    path = str(store_standard_input(cache_folder())) if accelerator.is_main_process else ""
    (path,) = broadcast_object_list([path])
    stored = tuple(path if name == "-" else name for name in sources)
    return replace(data, source=path if isinstance(data.source, str) else stored)


@contextmanager
def report_first_failure(accelerator: Accelerator) -> Iterator[None]:
    """Of several processes, the first to fail within reports its error; the others exit silently with code 1.

    The errors of the others mostly say that they lost the connection to the first.
    """
    try:
        yield
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        if not _is_first_failure():
            raise SystemExit(1) from None
        if isinstance(error, UserError) and accelerator.process_index:
            raise ProcessError(f"process {accelerator.process_index}: {error}") from None
        raise


def _is_first_failure() -> bool:
    """Counts the failures in the store through which the processes met; True as well if the store does not answer."""
    try:
        timeout = timedelta(seconds=STORE_SECONDS)
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
        return store.add(f"smallm/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def _newest_checkpoint(accelerator: Accelerator, run: Path) -> Path | None:
    """The newest intact checkpoint of a run, None before its first one; damaged ones are reported and quarantined."""
    step = -1.0
    if accelerator.is_main_process:
        restore_interrupted(run)
        newest, damaged = newest_checkpoint(run)
        for folder, problem in damaged.items():
            print(f"warning: {folder} is damaged ({problem}); an earlier checkpoint is used", file=Output("stderr"))
            quarantine(folder)
        step = step if newest is None else float(newest.name.removeprefix("step-"))
    (step,) = broadcast_from_main(accelerator, step)
    return None if step < 0 else checkpoint_folder(run, int(step))


@contextmanager
def _locked(accelerator: Accelerator, run: Path) -> Iterator[None]:
    """Holds the lock of the run folder; the system releases the lock of a process that is killed.

    A run on a file system without locks is not locked.
    A folder that is still empty afterwards, because the training failed before it wrote anything, is removed.
    """
    if not accelerator.is_main_process:
        yield
        return
    created = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = file_lock(run / LOCK)
        with suppress(NotImplementedError):
            lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{run} is being trained by another process; wait for it, or choose another --out") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"cannot write to {run}: {error.strerror}; choose another --out") from None
    try:
        yield
    finally:
        lock.release()
        if {file.name for file in run.iterdir()} <= {LOCK}:  # on Windows the released lock is deleted already
            (run / LOCK).unlink(missing_ok=True)
            for folder in created:
                folder.rmdir()
