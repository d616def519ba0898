"""Ctrl-C and a scheduler's signals: the step in progress is finished and saved before the run stops."""

import signal
import threading
import time
from types import FrameType

import torch
from accelerate import Accelerator

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
SAME_REQUEST_SECONDS = 2.0
POLL_EVERY = 10  # steps, on several GPUs: polling makes the host wait for the device


class SignalGuard:
    """While active, the first SIGINT, SIGTERM or SIGUSR1 is only recorded, for `poll` to return; a later one raises
    `KeyboardInterrupt`.

    A launcher of several processes forwards the signal that the terminal has already sent to all of them, so every
    signal within two seconds of the first counts as the same request. Outside the main thread, where Python allows no
    signal handlers, none are installed, and no signal is ever recorded.
    """

    def __init__(self, accelerator: Accelerator):
        self.signum = 0
        """The signal that `poll` has returned last, the same on all processes; 0 before the first."""
        self._accelerator = accelerator
        self._received, self._received_at = 0, 0.0  # by this process

    def __enter__(self) -> "SignalGuard":
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._previous = {signum: signal.signal(signum, self._record) for signum in SIGNALS if in_main_thread}
        return self

    def __exit__(self, *_exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: a handler not set by Python

    def poll(self, step: int = 0) -> int:
        """The signal that any process has received, or 0; all processes get the same answer.

        All processes must call this at the same points, as processes that stop at different steps would wait for each
        other for ever. On several GPUs only every tenth step is polled.
        """
        if not self.signum:
            self.signum = self._any_rank(step)
        return self.signum

    def _any_rank(self, step: int) -> int:
        if self._accelerator.num_processes == 1:
            return self._received
        if self._accelerator.device.type != "cpu" and step % POLL_EVERY:
            return 0
        received = torch.tensor([self._received], device=self._accelerator.device)
        return int(self._accelerator.gather(received).max())

    def _record(self, signum: int, _frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._received_at = signum, time.monotonic()
        elif time.monotonic() - self._received_at > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
