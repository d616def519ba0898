"""Ctrl-C as a request: the step in progress is finished first."""

import signal


class Interrupt:
    """Within it, the first SIGINT sets `requested`; a second one interrupts at once, as usual."""

    def __enter__(self) -> "Interrupt":
        self.requested = False
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_exception) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, _signal, _frame) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)
