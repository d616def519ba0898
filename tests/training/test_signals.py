"""smallm.training.interrupt: the first signal is a request, its echo from a launcher too, a later one is not."""

import signal
from types import SimpleNamespace

import pytest
import torch

from smallm.training import signals as interrupt
from smallm.training.signals import Interrupt


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the tests set."""
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_the_first_is_a_request_and_so_is_its_echo(clock, number):
    before = signal.getsignal(number)
    with Interrupt() as asked:
        assert not asked.requested
        signal.raise_signal(number)
        assert asked.requested == number
        clock[0] += interrupt.SAME_REQUEST_SECONDS - 0.1
        signal.raise_signal(number)
        assert asked.requested == number
    assert signal.getsignal(number) is before


def test_a_later_one_interrupts_at_once(clock):
    def twice():
        with Interrupt():
            signal.raise_signal(signal.SIGINT)
            clock[0] += interrupt.SAME_REQUEST_SECONDS + 0.1
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("device", "asked", "answers"),
    [("cpu", range(1, 22), range(5, 22)), ("meta", (10, 20), (10, 20))],  # meta: a device that is no CPU
)
def test_several_processes_agree(device, asked, answers):
    """Pressed on another process only, before the end of step 5."""
    steps = []

    def gather(tensor):
        assert (tensor.device.type, tensor.shape) == (device, (1,))
        steps.append(step)
        return torch.tensor([0, signal.SIGTERM if step >= 5 else 0])

    accelerator = SimpleNamespace(num_processes=2, device=torch.device(device), gather=gather)
    obeyed = []
    with Interrupt() as interrupt:
        for step in range(1, 22):
            if number := interrupt.any_rank(accelerator, step):
                assert number == signal.SIGTERM
                obeyed.append(step)
    assert steps == list(asked)
    assert obeyed == list(answers)


def test_one_process_asks_nobody():
    with Interrupt() as interrupt:
        alone = SimpleNamespace(num_processes=1)
        assert not interrupt.any_rank(alone, 1)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.any_rank(alone, 1) == signal.SIGINT
