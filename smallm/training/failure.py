"""When one of several processes fails: it says why, and the others end with it instead of waiting for ever."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate import Accelerator
from torch.distributed import TCPStore

from smallm.errors import ProcessError, UserError

ANSWER_SECONDS = 5


@contextmanager
def report_first_failure(accelerator: Accelerator) -> Iterator[None]:
    """Of all processes that fail within, the first lets its error through; the others exit with code 1, in silence.

    What they have to say is mostly that they lost the first one.
    """
    try:
        yield
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        if not _is_first():
            raise SystemExit(1) from None
        if isinstance(error, UserError) and accelerator.process_index:
            raise ProcessError(f"process {accelerator.process_index}: {error}") from None
        raise


def _is_first() -> bool:
    """Asks the store at which the processes have met; who gets no answer speaks for itself."""
    try:
        timeout = timedelta(seconds=ANSWER_SECONDS)
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
        return store.add(f"smallm/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True
