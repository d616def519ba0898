"""smallm.training.signals: the first signal and its echo from a launcher are recorded, a later one interrupts."""

import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from smallm.training import signals
from smallm.training.signals import SignalGuard

ALONE = SimpleNamespace(num_processes=1)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the tests set."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("signum", signals.SIGNALS)
def test_the_first_signal_and_its_echo_are_one_request(clock, signum):
    before = signal.getsignal(signum)
    with SignalGuard(ALONE) as guard:
        assert not guard.poll()
        signal.raise_signal(signum)
        assert guard.signum == 0  # until polled
        assert guard.poll() == guard.signum == signum
        clock[0] += signals.SAME_REQUEST_SECONDS - 0.1
        signal.raise_signal(signum)
        assert guard.poll() == signum
    assert signal.getsignal(signum) is before


def test_a_later_signal_interrupts_at_once(clock):
    def twice():
        with SignalGuard(ALONE):
            signal.raise_signal(signal.SIGINT)
            clock[0] += signals.SAME_REQUEST_SECONDS + 0.1
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_the_main_thread_no_handlers_are_installed():
    def handlers():
        with SignalGuard(ALONE) as guard:
            return [signal.getsignal(signum) for signum in signals.SIGNALS], guard.poll(1)

    before = [signal.getsignal(signum) for signum in signals.SIGNALS]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handlers).result() == (before, 0)


def test_a_handler_that_python_did_not_install_becomes_the_default(monkeypatch):
    """`signal.signal` returns None for a handler of a host program written in C."""
    install, before = signal.signal, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signals.signal, "signal", lambda *args: install(*args) and None)
    with SignalGuard(ALONE):
        pass
    monkeypatch.undo()
    assert install(signal.SIGTERM, before) is signal.SIG_DFL
    for signum in signals.SIGNALS:
        install(signum, signal.default_int_handler if signum == signal.SIGINT else before)


@pytest.mark.parametrize(
    ("device", "polled", "answers"),
    [("cpu", range(1, 6), range(5, 22)), ("meta", (10,), range(10, 22))],  # meta: a device other than the CPU
)
def test_several_processes_agree(device, polled, answers):
    """Another process gets the signal before the end of step 5."""
    steps = []

    def gather(tensor):
        assert (tensor.device.type, tensor.shape) == (device, (1,))
        steps.append(step)
        return torch.tensor([0, signal.SIGTERM if step >= 5 else 0])

    accelerator = SimpleNamespace(num_processes=2, device=torch.device(device), gather=gather)
    stopped = []
    with SignalGuard(accelerator) as guard:
        for step in range(1, 22):
            if signum := guard.poll(step):
                assert signum == signal.SIGTERM
                stopped.append(step)
    assert steps == list(polled)
    assert stopped == list(answers)


def test_a_single_process_answers_without_the_others():
    with SignalGuard(ALONE) as guard:
        assert not guard.poll(1)
        signal.raise_signal(signal.SIGINT)
        assert guard.poll(1) == signal.SIGINT
