import os
import signal

import pytest
import torch

from k_diffusion.training.signals import StopSignal


class Alone:
    num_processes = 1


class Two:
    """The first of two processes; the other one's wish is `other`."""

    num_processes = 2
    device = torch.device("cpu")
    other = 0

    def gather(self, x):
        return torch.cat([x, torch.tensor([self.other])])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish_and_the_second_acts(number, capfd):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    seen = []
    old = signal.signal(number, lambda n, frame: seen.append(n))
    try:
        with StopSignal() as stop:
            assert (stop.agreed(Alone()), stop.exit_code) == (False, 0)
            os.kill(os.getpid(), number)
            assert (stop.agreed(Alone()), stop.exit_code) == (True, 128 + number)
            assert f"{number.name}: saving after this step" in capfd.readouterr().err
            assert seen == []
            os.kill(os.getpid(), number)
            assert seen == [number]
    finally:
        signal.signal(number, old)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_handlers_are_given_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), StopSignal():
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_one_process_told_is_all_told_a_step_later():
    accelerator = Two()
    with StopSignal() as stop:
        assert not stop.agreed(accelerator)
        accelerator.other = signal.SIGTERM
        assert not stop.agreed(accelerator)
        accelerator.other = 0
        assert stop.agreed(accelerator)
