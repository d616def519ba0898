"""Ctrl-C, or the signals of a scheduler, as a request: the step in progress is finished first."""

import signal
import time

import torch
from accelerate import Accelerator

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
SAME_REQUEST_SECONDS = 2.0
ASK_EVERY = 10  # steps; the answer makes a GPU's host wait


class Interrupt:
    """Within it, the first SIGINT, SIGTERM or SIGUSR1 is kept as `requested`; a later one interrupts at once.

    Launchers of several processes send on the signal that the terminal has sent to all of them already: what comes
    within two seconds counts as the same request.
    """

    def __enter__(self) -> "Interrupt":
        self.requested = 0  # number of the signal
        self._first = 0.0
        self._previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def any_rank(self, accelerator: Accelerator, step: int = 0) -> int:
        """The signal that any process was sent, or 0. All must call this after each step and get one answer, or some
        would wait for the others for ever: on CPUs at any step, on several GPUs at every tenth.
        """
        if accelerator.num_processes == 1:
            return self.requested
        if accelerator.device.type != "cpu" and step % ASK_EVERY:
            return 0
        requested = torch.tensor([self.requested], device=accelerator.device)
        return int(accelerator.gather(requested).max())

    def _request(self, number: int, _frame) -> None:
        if not self.requested:
            self.requested, self._first = number, time.monotonic()
        elif time.monotonic() - self._first > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
