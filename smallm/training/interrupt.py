"""Ctrl-C as a request: the step in progress is finished first."""

import signal
import time

SAME_REQUEST_SECONDS = 2.0


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

    def _request(self, _signal, _frame) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
