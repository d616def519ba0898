"""smallm.training.interrupt: the first Ctrl-C is a request, its echo from a launcher too, a later one is not."""

import signal

import pytest

from smallm.training import interrupt
from smallm.training.interrupt import Interrupt


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the tests set."""
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    return now


def test_the_first_is_a_request_and_so_is_its_echo(clock):
    with Interrupt() as asked:
        assert not asked.requested
        signal.raise_signal(signal.SIGINT)
        assert asked.requested
        clock[0] += interrupt.SAME_REQUEST_SECONDS - 0.1
        signal.raise_signal(signal.SIGINT)
        assert asked.requested
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_later_one_interrupts_at_once(clock):
    def twice():
        with Interrupt():
            signal.raise_signal(signal.SIGINT)
            clock[0] += interrupt.SAME_REQUEST_SECONDS + 0.1
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
