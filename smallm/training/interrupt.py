"""Ctrl-C as a request: the step in progress is finished first."""

import signal
import time

import torch
from accelerate import Accelerator

SAME_REQUEST_SECONDS = 2.0
ASK_EVERY = 10  # steps; the answer makes a GPU's host wait


class Interrupt:
    """Within it, the first SIGINT sets `requested`; a later one interrupts at once, as usual.

    Launchers of several processes send on the signal that the terminal has sent to all of them already: what comes
    within two seconds counts as the same request.
    """

    def __enter__(self) -> "Interrupt":
        self.requested = False
        self._first = 0.0
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_exception) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def anywhere(self, accelerator: Accelerator, step: int) -> bool:
        """Whether it was requested on any process. All must call this after each step and get one answer, or some
        would wait for the others for ever: on CPUs at any step, on several GPUs at every tenth.
        """
        if accelerator.num_processes == 1:
            return self.requested
        if accelerator.device.type != "cpu" and step % ASK_EVERY:
            return False
        requested = torch.tensor(int(self.requested), device=accelerator.device)
        return bool(accelerator.reduce(requested, "sum").item())

    def _request(self, _signal, _frame) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
