"""smallm.training.signals: the first signal and its echo from a launcher are recorded, a later one interrupts."""

import itertools
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


@pytest.fixture
def handlers():
    """Default handlers, also where the suite runs under nohup or in the background; the guard keeps ignored signals."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in signals.SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", signals.SIGNALS)
def test_the_first_signal_and_its_echo_are_one_request(clock, handlers, signum):
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
            return [signal.getsignal(signum) for signum in signals.SIGNALS], guard.poll()

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


@pytest.mark.parametrize("seconds", [0.001, 0.03, 0.4, 3.0])
@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta: a device other than the CPU
def test_several_processes_exchange_signals_every_second(clock, device, seconds):
    """Whatever a step costs; another process, which is slower by half, gets the signal after 20 seconds."""
    exchanges = []

    def gather(tensor):
        assert (tensor.device.type, tensor.shape) == (device, (1, 2))
        exchanges.append(clock[0])
        signum = signal.SIGTERM if clock[0] > 120 else 0
        return torch.tensor([[0, seconds * guard._every / 1.5], [signum, seconds * guard._every]])

    accelerator = SimpleNamespace(num_processes=2, device=torch.device(device), gather=gather)
    with SignalGuard(accelerator) as guard:
        while not guard.poll():
            clock[0] += seconds
        assert guard.poll() == signal.SIGTERM
    assert clock[0] < 120 + max(1, seconds) + 2 * seconds
    gaps = [later - before for before, later in itertools.pairwise(exchanges)]
    assert max(gaps) <= max(1, seconds) + 1e-6
    assert len(exchanges) < 20 * 2.5 + 12


def test_signals_are_exchanged_at_once_after_a_restart(clock):
    calls = []
    gather = lambda tensor: (calls.append(1), torch.tensor([[0, 1e-3]]))[1]  # noqa: E731
    with SignalGuard(SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=gather)) as guard:
        for _ in range(100):
            guard.poll()
        exchanges = len(calls)
        assert exchanges < 10
        guard.restart()
        guard.poll()
        assert len(calls) == exchanges + 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_nohup_keeps_hangups_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalGuard(ALONE) as guard:
            signal.raise_signal(signal.SIGHUP)
            assert guard.poll() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_single_process_answers_without_the_others():
    with SignalGuard(ALONE) as guard:
        assert not guard.poll()
        signal.raise_signal(signal.SIGINT)
        assert guard.poll() == signal.SIGINT
