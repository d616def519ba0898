"""Ctrl-C and a scheduler's signals: the step in progress is finished and saved before the run stops."""

import signal
import threading
import time
from types import FrameType

import torch
from accelerate import Accelerator

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
SAME_REQUEST_SECONDS = 2.0
POLL_SECONDS = 1.0  # between two exchanges of several processes: an exchange makes the host wait for the device


class SignalGuard:
    """While active, the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 is only recorded, for `poll` to return; a later one
    raises `KeyboardInterrupt`.

    A launcher of several processes forwards the signal that the terminal has already sent to all of them, so every
    signal within two seconds of the first counts as the same request. Outside the main thread, where Python allows no
    signal handlers, none are installed, and no signal is ever recorded. SIGHUP stays ignored under `nohup`.
    """

    def __init__(self, accelerator: Accelerator):
        self.signum = 0
        """The signal that `poll` has returned last, the same on all processes; 0 before the first."""
        self._accelerator = accelerator
        self._received, self._received_at = 0, 0.0  # by this process
        self.restart()

    def __enter__(self) -> "SignalGuard":
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._previous = {signum: signal.signal(signum, self._record) for signum in SIGNALS
                          if in_main_thread and not _is_ignored_hangup(signum)}  # fmt: skip
        return self

    def __exit__(self, *_exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: a handler not set by Python

    def poll(self) -> int:
        """The signal that any process has received, or 0; all processes get the same answer.

        All processes must call this at the same points, as processes that stop at different steps would wait for each
        other for ever. Several processes exchange their signals in about one call a second, or in every call if the
        calls are further apart.
        """
        if not self.signum:
            self.signum = self._received if self._accelerator.num_processes == 1 else self._any_rank()
        return self.signum

    def restart(self) -> None:
        """Exchanges signals in the next call of `poll`: the time between calls may change from here."""
        self._every, self._calls, self._exchanged_at = 1, 0, time.monotonic()

    def _any_rank(self) -> int:
        self._calls += 1
        if self._calls < self._every:
            return 0
        seconds = time.monotonic() - self._exchanged_at
        mine = torch.tensor([[self._received, seconds]], device=self._accelerator.device)
        signum, seconds = self._accelerator.gather(mine).amax(dim=0).tolist()
        # The slowest process sets the pace of all. The number of calls at most doubles, as the first ones may be fast.
        self._every = max(1, min(2 * self._every, int(self._every * POLL_SECONDS / max(seconds, 1e-6))))
        self._calls, self._exchanged_at = 0, time.monotonic()
        return int(signum)

    def _record(self, signum: int, _frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._received_at = signum, time.monotonic()
        elif time.monotonic() - self._received_at > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt


def _is_ignored_hangup(signum: int) -> bool:
    return signum == getattr(signal, "SIGHUP", None) and signal.getsignal(signum) is signal.SIG_IGN
